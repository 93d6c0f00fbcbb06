"""What MARIGOLD is made of: derivatives of losses from their values at displaced parameters.

balancer.py       the step, from the losses to `.grad` and the next weights
options.py        the arguments, checked against each other
joint.py          the weighted gradient d of one backward, apart from what `.grad` held
perturb.py        displaced copies of the parameters, evaluated in the parameters' place
replay.py         the same random numbers and module buffers in every evaluation
evaluations.py    the losses at several points, in sequence or in one batched forward
functional.py     closures that can be evaluated in a batch
probe.py          one estimate: where to evaluate, and what the losses say there
estimators.py     losses at points -> derivatives and Gram matrices; step sizes
known_vectors.py  the vectors that the estimator "span" goes along
upper_level.py    the task weights, and the losses that they balance
simplex_rules.py  how the task weights move
info.py           what a step tells
"""

from __future__ import annotations

from .functional import FunctionalClosure

__all__ = ["FunctionalClosure"]

"""What MARIGOLD is made of: derivatives of losses from their values at displaced parameters.

joint.py          the weighted gradient d of one backward, apart from what `.grad` held
perturb.py        displaced copies of the parameters, evaluated in the parameters' place
replay.py         the same random numbers and module buffers in every evaluation
evaluations.py    the losses at several points, in sequence or in one batched forward
functional.py     closures that can be evaluated in a batch
estimators.py     losses at points -> derivatives and Gram matrices; step sizes
known_vectors.py  the vectors that the estimator "span" goes along
simplex_rules.py  how the task weights move
"""

from __future__ import annotations

from .functional import FunctionalClosure

__all__ = ["FunctionalClosure"]

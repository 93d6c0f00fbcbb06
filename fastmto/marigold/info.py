"""What a step of MARIGOLD tells."""

from __future__ import annotations

from torch import Tensor

from ..engine.batch import Info


class MarigoldInfo(Info):
    """`Info` with what the estimate of the step found.

    Keys beyond `Info`'s:
        estimator: its name.
        evaluation: "sequential", "batched", or None where nothing was evaluated.
        evaluations: how many times the closure was evaluated in this step.
        derivatives: y (n,) float64 of the n present tasks ("forward", "central"; for "reuse" see
            `MARIGOLD.last_derivatives` after `update`); None where not estimated.
        step: h = mu ||v||, the length of the displacement; None where nothing was displaced.
        next_lambda: (T,) simplex weights that the next step starts from.
        dropped: why the estimate was dropped; None where it was not.

    `gram` is the estimated Gram matrix ("directions" and "span").
    """

    _KEYS = (
        *Info._KEYS, "estimator", "evaluation", "evaluations", "derivatives", "step",
        "next_lambda", "dropped",
    )  # fmt: skip

    estimator: str
    evaluation: str | None = None
    evaluations: int = 0
    derivatives: Tensor | None = None
    step: float | None = None
    next_lambda: Tensor | None = None
    dropped: str | None = None

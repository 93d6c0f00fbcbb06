"""DualProj: the mean gradient projected on the cone in which no task gets worse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import weightings
from .gradient_balancer import GradientOptions, GramBalancer

if TYPE_CHECKING:
    from typing_extensions import Unpack


class DualProj(GramBalancer):
    """DualProj: the mean gradient projected on the cone in which no task gets worse.

    Source: the projection of GEM, Lopez-Paz and Ranzato, Gradient Episodic Memory, NeurIPS 2017,
    arXiv 1706.08840, equations 10 and 11, with all tasks as constraints, as Quinton and Rey,
    arXiv 2406.16232, compare it.

    Args:
        preference: weights (T,) of the gradients whose sum is projected; 1/T by default.
        n_tasks, options: as `GradientBalancer`.
    """

    key = "dualproj"

    def __init__(
        self,
        n_tasks: int | None = None,
        *,
        preference: Sequence[float] | None = None,
        **options: Unpack[GradientOptions],
    ) -> None:
        super().__init__(weightings.DualProj(preference), n_tasks, **options)

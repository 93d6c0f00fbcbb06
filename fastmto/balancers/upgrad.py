"""UPGrad: every gradient projected on the cone in which no task gets worse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import weightings
from .gradient_balancer import GradientOptions, GramBalancer

if TYPE_CHECKING:
    from typing_extensions import Unpack


class UPGrad(GramBalancer):
    """UPGrad: every gradient projected on the cone in which no task gets worse.

    Source: Quinton and Rey, Jacobian Descent for Multi-Objective Optimization, arXiv 2406.16232,
    section 2.2 (A_UPGrad).

    Args:
        preference: weights (T,) of the projections; 1/T by default.
        n_tasks, options: as `GradientBalancer`.
    """

    key = "upgrad"

    def __init__(
        self,
        n_tasks: int | None = None,
        *,
        preference: Sequence[float] | None = None,
        **options: Unpack[GradientOptions],
    ) -> None:
        super().__init__(weightings.UPGrad(preference), n_tasks, **options)

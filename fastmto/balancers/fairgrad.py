"""FairGrad: alpha-fair utilities of the tasks' loss decreases."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import weightings
from .gradient_balancer import GradientOptions, GramBalancer

if TYPE_CHECKING:
    from typing_extensions import Unpack


class FairGrad(GramBalancer):
    """FairGrad: alpha-fair utilities of the tasks' loss decreases.

    Source: Ban and Ji, Fair Resource Allocation in Multi-Task Learning, ICML 2024,
    arXiv 2402.15638, equation 5: G a = a^(-1/alpha). alpha = 1 is the bargaining solution.

    Args:
        alpha: the fairness, > 0.
        n_tasks, options: as `GradientBalancer`.
    """

    key = "fairgrad"

    def __init__(
        self,
        n_tasks: int | None = None,
        *,
        alpha: float = 1.0,
        **options: Unpack[GradientOptions],
    ) -> None:
        super().__init__(weightings.FairGrad(alpha), n_tasks, **options)

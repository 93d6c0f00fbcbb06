"""CAGrad: the direction that helps the worst task most, near the mean gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import weightings
from .gradient_balancer import GradientOptions, GramBalancer

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CAGrad(GramBalancer):
    """CAGrad: the direction that helps the worst task most, near the mean gradient.

    Source: Liu et al., Conflict-Averse Gradient Descent, NeurIPS 2021, arXiv 2110.14048, equations
    3 and 4: max_d min_i <g_i, d> subject to ||d - g_0|| <= c ||g_0||, g_0 the mean gradient.

    Args:
        c, rescale: as `fastmto.weightings.CAGrad`.
        n_tasks, options: as `GradientBalancer`.
    """

    key = "cagrad"

    def __init__(
        self,
        n_tasks: int | None = None,
        *,
        c: float = 0.4,
        rescale: int = 1,
        **options: Unpack[GradientOptions],
    ) -> None:
        super().__init__(weightings.CAGrad(c, rescale), n_tasks, **options)

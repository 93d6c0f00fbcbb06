"""Aligned-MTL: the gradients' principal components brought to one length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import weightings
from ..engine.balancer import Batch
from ..engine.buffers import Buffers
from .gradient_balancer import GradientOptions, GramBalancer

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AlignedMTL(GramBalancer):
    """Aligned-MTL: the gradients' principal components brought to one length.

    Source: Senushkin et al., Independent Component Alignment for Multi-Task Learning, CVPR 2023,
    arXiv 2305.19000, equations 12 to 14 and Algorithm 1. The rank is found with the eps of the
    gradients' dtype, of several the widest, as in the published code.

    Args:
        scale: which singular value the others are brought to, as `fastmto.weightings.AlignedMTL`.
        n_tasks, options: as `GradientBalancer`.
    """

    key = "aligned_mtl"
    weighting: weightings.AlignedMTL

    def __init__(
        self,
        n_tasks: int | None = None,
        *,
        scale: str = "min",
        **options: Unpack[GradientOptions],
    ) -> None:
        super().__init__(weightings.AlignedMTL(scale=scale), n_tasks, **options)

    def _weigh(self, buffers: Buffers, active: list[int], batch: Batch) -> tuple[Tensor, Tensor]:
        # The Gram matrix is float64, the rounding in it that of the rows.
        self.weighting.eps = max(torch.finfo(x.dtype).eps for x in buffers.layouts)
        return super()._weigh(buffers, active, batch)

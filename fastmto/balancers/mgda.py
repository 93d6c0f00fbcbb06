"""MGDA: the shortest vector in the convex hull of the tasks' gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import weightings
from ..checks import check_choice
from ..engine.balancer import Batch
from .gradient_balancer import GradientOptions, GramBalancer

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MGDA(GramBalancer):
    """MGDA: the shortest vector in the convex hull of the tasks' gradients.

    Source: Desideri, Multiple-gradient descent algorithm, 2012; Sener and Koltun, Multi-Task
    Learning as Multi-Objective Optimization, NeurIPS 2018, arXiv 1810.04650, equation 3:
    min_w ||sum_i w_i g_i||^2, w in the simplex.

    Args:
        normalization: by what gradients are divided before w is sought, as in Sener and Koltun's
            released code, which applies w to the gradients as they were: "none", "l2" (their
            lengths), "loss" (their losses) or "loss+" (both).
        n_tasks, options: as `GradientBalancer`.
    """

    key = "mgda"

    def __init__(
        self,
        n_tasks: int | None = None,
        *,
        normalization: str = "none",
        **options: Unpack[GradientOptions],
    ) -> None:
        check_choice("normalization", normalization, ("none", "l2", "loss", "loss+"))
        self.normalization = normalization
        weighting = weightings.MGDA(normalization="l2" if normalization == "l2" else "none")
        super().__init__(weighting, n_tasks, **options)

    def _solve(self, gram: Tensor, active: list[int], batch: Batch) -> Tensor:
        if self.normalization in ("loss", "loss+"):
            values = self._positive_losses(
                batch, f"normalization={self.normalization!r} divides by it"
            )
            losses = torch.tensor([values[i] for i in active], dtype=torch.float64)
            if self.normalization == "loss+":
                squares = gram.diagonal()
                losses *= torch.where(squares > 0, squares, 1.0).sqrt()
            gram = gram / losses[:, None] / losses
        return super()._solve(gram, active, batch)

    def _device_solver(self, n_tasks: int) -> weightings.DeviceSolver | None:
        by_losses = self.normalization in ("loss", "loss+")
        return None if by_losses else super()._device_solver(n_tasks)

    def _options(self) -> dict[str, Any]:
        return {"normalization": self.normalization, **super()._options()}

"""Aligned-MTL: gradients whose principal components are made equally long."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..solvers import Result, aligned_mtl
from .base import SolverWeighting


class AlignedMTL(SolverWeighting):
    """The mean of the gradients after their principal components are made equally long.

    Source: Senushkin et al., "Independent Component Alignment for Multi-Task Learning",
    CVPR 2023, arXiv 2305.19000, Algorithm 1: with G = V diag(lambda) V' over the eigenvalues
    that are not 0 (lambda > max(lambda) T eps),

        w = B p,   B = sigma V diag(lambda^(-1/2)) V',   p = 1/T

    so that the aligned gradients, the columns of [g_1 ... g_T] B, have all singular values equal
    to sigma: the smallest of sqrt(lambda) ("min", the paper's choice), or, from the published
    code, the root of the median ("median"; of an even number the smaller middle one) or of the
    mean of lambda ("rmse").

    Scaling: g -> c g leaves the weights as they are. The lengths of single gradients count.

    Conventions: the published code sums the aligned gradients, p = 1 (T times these weights);
    the paper has task weights p that sum to 1, and TorchJD too has 1/T.

    Args:
        scale: "min", "median" or "rmse".
        eps: relative rounding of what the Gram matrix was taken from, in [0, 1); None for
            `rounding`, which the balancers set, or that of its dtype, as the published code has it.
            A float64 Gram of float32 gradients wants `eps=torch.finfo(torch.float32).eps`: of
            dependent gradients, rounding leaves an eigenvalue above 0, and sigma would be the root
            of that.

    Raises:
        ValueError: another scale, or eps out of range.

    Example: `weights = fastmto.weightings.AlignedMTL(scale="rmse")(gram)`.
    """

    def __init__(self, scale: str = "min", eps: float | None = None) -> None:
        # A solve of one task has no numbers that could fail: what it refuses is an argument.
        aligned_mtl(torch.ones(1, 1, dtype=torch.float64), scale, eps)
        self.scale = scale
        self.eps = eps

    def _solve(self, gram: Tensor, tasks: Sequence[int] | None) -> Result[Tensor]:
        eps = self.rounding if self.eps is None else self.eps
        return aligned_mtl(gram, self.scale, eps)

    def __repr__(self) -> str:
        eps = "" if self.eps is None else f", eps={self.eps:.3g}"
        return f"AlignedMTL(scale={self.scale!r}{eps})"

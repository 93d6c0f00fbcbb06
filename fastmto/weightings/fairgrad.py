"""Alpha-fair weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..solvers import Result, fairgrad
from .base import SolverWeighting


class FairGrad(SolverWeighting):
    """The alpha-fair joint gradient.

    Source: Ban and Ji, "Fair Resource Allocation in Multi-Task Learning", ICML 2024,
    arXiv 2402.15638, equation 4: the direction that maximises the alpha-fair utility
    sum_i <g_i, d>^(1 - alpha) / (1 - alpha) in a ball has the weights a > 0 with

        G a = a^(-1/alpha)

    alpha = 1 is Nash bargaining; alpha -> 0 tends to equal weights (take `Equal` for 0), a large
    alpha to max-min fairness.

    Scaling: g -> c g gives a -> c^(-2 alpha / (1 + alpha)) a, so the direction stays and
    ||sum_i a_i g_i|| scales as c^((1 - alpha) / (1 + alpha)). Rescaling one task counts, but for
    alpha = 1.

    Peers: TorchJD and the published code minimise the residual by scipy's `least_squares` from
    equal weights, in the units of the gradients: it stops where it starts for small ones (weights
    about ten times too small for gradients of length 1e-4). TorchJD's alpha = 0 is 1/T.

    Args:
        alpha: > 0.

    Raises:
        ValueError: alpha out of range.

    Example: `weights = fastmto.weightings.FairGrad(alpha=2.0)(gram)`.
    """

    @property
    def positive(self) -> bool:
        return True

    def __init__(self, alpha: float = 1.0) -> None:
        # A solve of one task has no numbers that could fail: what it refuses is an argument.
        fairgrad(torch.ones(1, 1, dtype=torch.float64), alpha)
        self.alpha = alpha

    def _solve(self, gram: Tensor, tasks: Sequence[int] | None) -> Result[Tensor]:
        return fairgrad(gram, self.alpha)

    def __repr__(self) -> str:
        return f"FairGrad(alpha={self.alpha!r})"

"""The min-norm point of the tasks' gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..solvers import Result, mgda
from .base import DeviceSolver, SolverWeighting


class MGDA(SolverWeighting):
    """Multiple-gradient descent: the shortest convex combination of the gradients.

    Sources: Désidéri 2012 (MGDA); Sener and Koltun, NeurIPS 2018, arXiv 1810.04650, equation 3.

        min_w w'Gw   s.t.  w >= 0, sum_i w_i = 1

    The direction d = sum_i w_i g_i has <g_i, d> >= ||d||^2 for every task, and is 0 exactly at
    Pareto stationarity. d is unique; w is not where gradients are linearly dependent.

    Scaling: g -> c g leaves w as it is. Without normalization the shortest gradients get most of
    the weight; with "l2" w does not depend on the lengths of the gradients at all.

    Normalizations (table of the papers' code: g_i is divided by its length, its loss, or both):
    as there, the normalised gradients only serve to find w, which then weighs the losses as they
    are. "loss" and "loss+" look at the losses and are options of `fastmto.balancers.MGDA`.

    Peers: TorchJD runs at most 100 Frank-Wolfe steps and stops once one is shorter than 1e-3, so
    its w is approximate (here: exact). LibMTL runs the paper's solver for 250 steps, with weights
    of at most 0.999 in a pair, and applies w to the normalised gradients.

    Args:
        normalization: "none", or "l2": w of the gradients divided by their lengths. A gradient of
            length 0 is the shortest point whichever the normalization: it gets all the weight.

    Raises:
        ValueError: another normalization.
    """

    def __init__(self, normalization: str = "none") -> None:
        if normalization not in ("none", "l2"):
            raise ValueError(f"normalization must be 'none' or 'l2', got {normalization!r}")
        self.normalization = normalization

    def _solve(self, gram: Tensor, tasks: Sequence[int] | None) -> Result[Tensor]:
        return mgda(gram if self.normalization == "none" else _cosines(gram))

    def _device_solver(self, n_tasks: int) -> DeviceSolver | None:
        if n_tasks > ops.MAX_SOLVED_TASKS:
            return None

        def solve(gram: Tensor, weights: Tensor, info: Tensor, tasks: Sequence[int] | None) -> None:
            ops.mgda(gram if self.normalization == "none" else _cosines(gram), weights, info)

        return solve

    def __repr__(self) -> str:
        return f"MGDA(normalization={self.normalization!r})"


def _cosines(gram: Tensor) -> Tensor:
    """Gram matrix of the gradients divided by their lengths, float64; a zero one stays zero."""
    wide = gram.detach().to(torch.float64)
    squares = wide.diagonal()
    if wide.shape != 2 * squares.shape:
        return wide  # not square: the solver says so
    lengths = torch.where(squares > 0, squares, 1.0).sqrt()
    return wide / lengths[:, None] / lengths

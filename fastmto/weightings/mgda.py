"""The min-norm point of the tasks' gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..checks import check_choice
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
    are.

    Peers: TorchJD runs at most 100 Frank-Wolfe steps and stops once one is shorter than 1e-3, so
    its w is approximate (here: exact). LibMTL runs the paper's solver for 250 steps, with weights
    of at most 0.999 in a pair, and applies w to the normalised gradients.

    Args:
        normalization: what gradients are divided by before w is sought: "none", "l2" (their
            lengths), "loss" (their losses, which have to be positive) or "loss+" (both). A gradient
            of length 0 is the shortest point whichever the normalization: it gets all the weight.

    Raises:
        ValueError: another normalization; in a call, no losses where they are needed.

    Example: `weights = fastmto.weightings.MGDA("loss")(gram, losses=losses)`.
    """

    def __init__(self, normalization: str = "none") -> None:
        check_choice("normalization", normalization, ("none", "l2", "loss", "loss+"))
        self.normalization = normalization

    @property
    def needs_losses(self) -> str:
        by_losses = self.normalization in ("loss", "loss+")
        return f"normalization={self.normalization!r} divides by it" if by_losses else ""

    def __call__(
        self,
        gram: Tensor,
        tasks: Sequence[int] | None = None,
        losses: Tensor | None = None,
    ) -> Tensor:
        """As `Weighting`; losses (n,) of the tasks, positive, for "loss" and "loss+"."""
        if not self.needs_losses:
            return super().__call__(gram, tasks)
        if losses is None or losses.shape != (len(gram),) or bool((losses <= 0).any()):
            raise ValueError(
                f"losses must be {len(gram)} positive numbers: {self.needs_losses}; got {losses}"
            )
        by = losses.detach().to(gram.device, torch.float64)
        wide = _cosines(gram) if self.normalization == "loss+" else gram.to(torch.float64)
        return super().__call__(wide / by[:, None] / by, tasks).to(gram.dtype)

    def _solve(self, gram: Tensor, tasks: Sequence[int] | None) -> Result[Tensor]:
        return mgda(_cosines(gram) if self.normalization == "l2" else gram)

    def device_solver(self, n_tasks: int) -> DeviceSolver | None:
        if self.needs_losses or n_tasks > ops.MAX_SOLVED_TASKS:
            return None

        def solve(gram: Tensor, weights: Tensor, info: Tensor, tasks: Sequence[int] | None) -> None:
            ops.mgda(_cosines(gram) if self.normalization == "l2" else gram, weights, info)

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

"""Unconflicting projection of each gradient."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..solvers import Result, upgrad
from .base import SolverWeighting, as_preference, of_tasks


class UPGrad(SolverWeighting):
    """The mean of the gradients, each projected onto the dual cone of all of them.

    Source: Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization",
    arXiv 2406.16232, section 2 (UPGrad) and Proposition 1 (the projections on the Gram matrix):

        d = sum_i pi(p_i g_i),   pi(x) = argmin_y ||y - x||  s.t.  <g_j, y> >= 0 for all j
        weights of pi(sum_j u_j g_j):   min_v v'Gv  s.t.  v >= u

    No conflict: <g_i, d> >= 0 for every task. Scaling: pi does not depend on the lengths of the
    gradients, so g_i -> c_i g_i changes the contribution of task i, and that in proportion to c_i:
    d is linear in c ("linear under scaling").

    Peers: TorchJD divides G by its trace and adds 1e-4 I before it solves, which keeps the QP
    solver alive but lets conflicts through, large ones where lengths differ, and is not linear
    under scaling any more; a trace below 1e-4 is taken as 0. Nothing is added here.

    Args:
        preference: one number p >= 0 per task; 1/T each by default (T the tasks of the call). A
            task of preference 0 is still never conflicted with.

    Raises:
        ValueError: a preference out of range.

    Example: `weights = fastmto.weightings.UPGrad(preference=[1.0, 2.0])(gram)`.
    """

    @property
    def positive(self) -> bool:
        return self.preference is None or bool((self.preference > 0).all())  # v >= p

    def __init__(self, preference: Sequence[float] | Tensor | None = None) -> None:
        self.preference = as_preference(preference, positive=False)

    def _solve(self, gram: Tensor, tasks: Sequence[int] | None) -> Result[Tensor]:
        if self.preference is None:
            return upgrad(gram)
        return upgrad(gram, of_tasks(self.preference, gram, tasks))

    def __repr__(self) -> str:
        return "UPGrad()" if self.preference is None else f"UPGrad({self.preference.tolist()})"

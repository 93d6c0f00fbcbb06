"""Unconflicting projection of the mean gradient."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..solvers import Result, dual_cone
from .base import SolverWeighting, as_preference, of_tasks


class DualProj(SolverWeighting):
    """The mean of the gradients, projected onto the dual cone of all of them.

    Source: Lopez-Paz and Ranzato, "Gradient Episodic Memory", NeurIPS 2017, arXiv 1706.08840,
    equation 11, where a gradient is projected so that it conflicts with no task; the name and the
    use on the mean are from Quinton and Rey, arXiv 2406.16232.

        d = argmin_y ||y - sum_i p_i g_i||  s.t.  <g_j, y> >= 0 for all j
        its weights:   min_v v'Gv  s.t.  v >= p

    No conflict: <g_i, d> >= 0 for every task. Scaling: g -> c g leaves the weights as they are.
    Not linear in the length of one gradient, other than UPGrad.

    Peers: TorchJD divides G by its trace and adds 1e-4 I, as for UPGrad.

    Args:
        preference: one number p >= 0 per task; 1/T each by default (T the tasks of the call).

    Raises:
        ValueError: a preference out of range.

    Example: `weights = fastmto.weightings.DualProj(preference=[1.0, 2.0])(gram)`.
    """

    @property
    def positive(self) -> bool:
        return self.preference is None or bool((self.preference > 0).all())  # v >= p

    def __init__(self, preference: Sequence[float] | Tensor | None = None) -> None:
        self.preference = as_preference(preference, positive=False)

    def _solve(self, gram: Tensor, tasks: Sequence[int] | None) -> Result[Tensor]:
        if self.preference is None:
            return dual_cone(gram)
        return dual_cone(gram, of_tasks(self.preference, gram, tasks))

    def __repr__(self) -> str:
        return "DualProj()" if self.preference is None else f"DualProj({self.preference.tolist()})"

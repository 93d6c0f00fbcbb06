"""Conflict-averse gradient descent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..solvers import Result, cagrad
from .base import SolverWeighting


class CAGrad(SolverWeighting):
    """The mean gradient, moved towards the task that it serves least.

    Source: Liu et al., NeurIPS 2021, arXiv 2110.14048, section 3 and Algorithm 1. With the mean
    gradient g_0 = (1/T) sum_i g_i the direction d solves

        max_d min_i <g_i, d>   s.t.  ||d - g_0|| <= c ||g_0||

    by its dual: w minimises <g_w, g_0> + c ||g_0|| ||g_w|| over the simplex, g_w = sum_i w_i g_i,
    and d = g_0 + c (||g_0|| / ||g_w||) g_w. The weights are those of d.

    Scaling: g -> s g leaves the weights as they are. The lengths of the tasks' gradients count:
    the method is not invariant to rescaling one task.

    Pareto-stationary gradients: where no d of the ball gains more than 0 for all tasks, it is the
    d with a gain of 0 that is nearest to g_0.

    Conventions: the paper's code divides d by 1 + c^2 (`rescale=1`, its default) or 1 + c
    (`rescale=2`), so that d is about as long as g_0. LibMTL does the same, for three tasks only
    and by a general-purpose optimizer. TorchJD does not rescale (`rescale=0`), solves to an
    interior-point tolerance, and returns zeros where the trace of G is below 1e-4, or ||g_w|| is
    in units of its root. The code of the Nash-MTL family also clips the joint gradient to norm 1,
    which is left to the user's optimizer here.

    Args:
        c: how far d may be from g_0, in lengths of g_0; 0 is the mean of the gradients. The
            paper's proof that the mean loss is minimised (Theorem 3.2) is for c < 1.
        rescale: 0, 1 or 2, see above.

    Attributes:
        result: its weights are those before the rescaling.

    Raises:
        ValueError: c or rescale out of range.

    Example: `weights = fastmto.weightings.CAGrad(c=0.2)(gram)`.
    """

    @property
    def positive(self) -> bool:
        return True  # those of g_0 are, and w >= 0

    def __init__(self, c: float = 0.4, rescale: int = 1) -> None:
        if rescale not in (0, 1, 2):
            raise ValueError(f"rescale must be 0, 1 or 2, got {rescale!r}")
        # A solve of one task has no numbers that could fail: what it refuses is an argument.
        cagrad(torch.ones(1, 1, dtype=torch.float64), c)
        self.c = c
        self.rescale = rescale
        self._factor = 1.0 / (1.0, 1.0 + c * c, 1.0 + c)[rescale]

    def _solve(self, gram: Tensor, tasks: Sequence[int] | None) -> Result[Tensor]:
        return cagrad(gram, self.c)

    def __call__(self, gram: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        weights = super().__call__(gram, tasks)
        return weights if self.rescale == 0 else weights * self._factor

    def __repr__(self) -> str:
        return f"CAGrad(c={self.c!r}, rescale={self.rescale})"

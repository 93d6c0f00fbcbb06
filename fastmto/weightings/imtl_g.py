"""Equal projections onto all gradients."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..solvers import Result, imtl_g
from .base import SolverWeighting


class IMTLG(SolverWeighting):
    """The joint gradient whose projections onto all tasks' gradients are equally long.

    Source: Liu et al., "Towards Impartial Multi-Task Learning", ICLR 2021, section 3.1: with the
    unit gradients u_i = g_i / ||g_i|| and d = sum_i w_i g_i,

        <d, u_1> = ... = <d, u_T>,   sum_i w_i = 1

    The paper's closed form inverts a matrix of differences to the first task; on the Gram matrix
    this is w_i = (v_i / ||g_i||) / sum_j (v_j / ||g_j||) with C v = 1, C the cosines. Weights can
    be negative. For T = 2, w = (||g_2||, ||g_1||) / (||g_1|| + ||g_2||).

    Scaling: the direction does not depend on the lengths of the gradients: g_i -> c_i g_i gives
    w_i -> w_i / c_i, up to the common factor that keeps the sum 1.

    Peers: LibMTL inverts the paper's matrix. TorchJD solves with a pseudoinverse of G in the
    dtype of the input, so that a gradient shorter than the longest by a factor of sqrt(T eps) is
    dropped, and returns zeros where the sum above is below 1e-12, in the units of the gradients.

    Example: `weights = fastmto.weightings.IMTLG()(gram)`.
    """

    def _solve(self, gram: Tensor, tasks: Sequence[int] | None) -> Result[Tensor]:
        return imtl_g(gram)

    def __repr__(self) -> str:
        return "IMTLG()"

"""Conflict-averse weights: the mean gradient, moved to raise the smallest gain."""

from __future__ import annotations

from . import _solvers
from ._solvers import Result
from .convert import Kind, converted

_cagrad = _solvers.cagrad


def cagrad(gram: Kind, c: float = 0.4) -> Result[Kind]:
    """Weights v of the CAGrad direction d = sum_i v_i g_i:

        maximise min_i <g_i, d>   subject to   |d - g0| <= c |g0|,   g0 = sum_i g_i / T

    Source: Liu et al., arXiv 2110.14048, equation 2. With w from the dual,
    min_w <g_w, g0> + c |g0| |g_w| over the simplex (algorithm 1), v_i = 1/T + c |g0| / |g_w| w_i:
    without the factor 1 / (1 + c^2) ("rescale 1") or 1 / (1 + c) of the authors' code, and without
    its additions of 1e-8. Exact, by the critical line: v as a function of the smallest gain is
    linear between changes of the active set.

    Where g_w = 0 (Pareto stationary) the formula for v is void, and every d with gains >= 0 in the
    ball is a solution: v is that of the one closest to g0. Where g0 = 0, v = 1/T. A zero gradient
    keeps 1/T.

    Statuses: solved, not_finite, not_symmetric, not_psd, max_iterations (|d - g0| is not c |g0|:
    seen on float32 products of dependent gradients, which are indefinite).

    Args:
        gram: (T, T) array or tensor, as `fastmto.solvers.bargaining`: computed in float64 on the
            host, not modified; contiguous float64 or float32 CPU tensors are read in place.
        c: in [0, 1e6), the radius relative to |g0|; below 1 d descends on the mean loss.

    Returns:
        `Result` with `weights` (T,) as `fastmto.solvers.bargaining` returns them, None unless
        solved; `status`; `iterations`, changes of the
        active set; `residual`, the largest violation of <g_i, d> >= m (= where v_i > 1/T), m the
        smallest gain, relative to |g_i| sum_j v_j |g_j|; `kappa` 0 (no meaning here).

    Raises:
        TypeError: gram is neither an array nor a tensor.
        ValueError: its shape or dtype, or c out of range.

    Example:
        >>> import numpy as np, fastmto
        >>> gram = np.array([[4.0, -1.0], [-1.0, 1.0]])
        >>> fastmto.solvers.cagrad(gram, c=0.4).status
        'solved'
    """
    result = _cagrad(gram, c)
    return converted(_cagrad, gram, c) if result is None else result

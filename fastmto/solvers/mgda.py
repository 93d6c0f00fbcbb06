"""The point of least norm in the convex hull of the gradients."""

from __future__ import annotations

from . import _solvers
from ._solvers import Result
from .convert import Kind, converted

_mgda = _solvers.mgda


def mgda(gram: Kind) -> Result[Kind]:
    """Weights w of MGDA:

        minimise w'G w   subject to   w >= 0, sum w = 1

    Sources: Desideri, C. R. Acad. Sci. 350 (2012); Sener & Koltun, arXiv 1810.04650, equation 4.
    Exact, by an active-set method on the cosines, where the papers' Frank-Wolfe iteration stops
    early: the value w'G w is right to rounding for lengths of any spread.

    Where gradients are equal or dependent w need not be unique; sum_i w_i g_i is. 0 in the hull
    (Pareto stationary) is a solution like others, of value 0. A zero gradient has weight 1; several
    share it.

    Statuses: solved, not_finite, not_symmetric, not_psd, max_iterations (not seen).

    Args:
        gram: (T, T) array or tensor, as `fastmto.solvers.bargaining`: computed in float64 on the
            host, not modified; contiguous float64 or float32 CPU tensors are read in place.

    Returns:
        `Result` with `weights` (T,) as `fastmto.solvers.bargaining` returns them, None unless
        solved; `status`; `iterations` of the active set;
        `residual`, the largest violation of (G w)_i >= w'G w (= where w_i > 0) relative to
        |g_i| sum_j w_j |g_j|; `kappa` 0 (no meaning here).

    Raises:
        TypeError: gram is neither an array nor a tensor.
        ValueError: its shape or dtype.

    Example:
        >>> import numpy as np, fastmto
        >>> gram = np.array([[4.0, -1.0], [-1.0, 1.0]])
        >>> fastmto.solvers.mgda(gram).status
        'solved'
    """
    result = _mgda(gram)
    return converted(_mgda, gram) if result is None else result

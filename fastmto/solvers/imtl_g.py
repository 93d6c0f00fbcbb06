"""The combination with equal projections on all gradients."""

from __future__ import annotations

from . import _solvers
from ._solvers import Result
from .convert import Kind, converted

_imtl_g = _solvers.imtl_g


def imtl_g(gram: Kind) -> Result[Kind]:
    """Weights w of IMTL-G:

        <g_i, d> / |g_i| equal for all i,   d = sum_i w_i g_i,   sum w = 1

    Source: Liu et al., Towards Impartial Multi-task Learning, ICLR 2021, section 3.1. Solved as
    w_i = v_i / |g_i| / sum_j v_j / |g_j|, C v = 1 for the cosines C, which treats the tasks alike;
    the paper's closed form singles out the first one. Weights may be negative.

    For T = 2 w = (|g_2|, |g_1|) / (|g_1| + |g_2|) for every cosine, the parallel ones included.

    Statuses: solved, not_finite, not_symmetric, not_psd, zero_update (a gradient has no direction),
    singular (T > 2: dependent gradients, so no weights or not only one; or a sum of v_i / |g_i|
    that is 0 to rounding).

    Args:
        gram: (T, T) array or tensor, as `fastmto.solvers.bargaining`: computed in float64 on the
            host, not modified; contiguous float64 or float32 CPU tensors are read in place.

    Returns:
        `Result` with `weights` (T,) as `fastmto.solvers.bargaining` returns them, None unless
        solved; `status`; `iterations` 0; `residual`,
        max_i |(C v)_i - 1| / (1 + sum |v|); `kappa` 0 (no meaning here).

    Raises:
        TypeError: gram is neither an array nor a tensor.
        ValueError: its shape or dtype.

    Example:
        >>> import numpy as np, fastmto
        >>> gram = np.array([[4.0, -1.0], [-1.0, 1.0]])
        >>> fastmto.solvers.imtl_g(gram).status
        'solved'
    """
    result = _imtl_g(gram)
    return converted(_imtl_g, gram) if result is None else result

"""Weights of alpha-fair descent."""

from __future__ import annotations

from . import _solvers
from ._solvers import Result
from .convert import Kind, converted

_fairgrad = _solvers.fairgrad


def fairgrad(gram: Kind, alpha: float = 1.0) -> Result[Kind]:
    """Weights a > 0 of FairGrad:

        (G a)_i = a_i^(-1/alpha)

    Source: Ban & Ji, arXiv 2402.15638, equation 4. The only minimiser of
    a'G a / 2 - sum_i a_i^(1-r) / (1-r), r = 1/alpha, by damped Newton on the correlation matrix
    with the lengths taken out; the authors' code runs a least-squares solver from 1/T. alpha = 1
    is `bargaining`; larger alpha favours the tasks that gain least.

    Statuses: solved, not_finite, not_symmetric, not_psd, zero_update, near_stationary (as
    `bargaining`), max_iterations (lengths so far apart that |g_i|^(r-1) leaves float64).

    Args:
        gram: (T, T) array or tensor, as `fastmto.solvers.bargaining`: computed in float64 on the
            host, not modified; contiguous float64 or float32 CPU tensors are read in place.
        alpha: in [0.01, 100).

    Returns:
        `Result` with `weights` (T,) as `fastmto.solvers.bargaining` returns them, None unless
        solved; `status`; `iterations`, Newton steps;
        `residual`, max_i |a_i^r (G a)_i - 1|; `kappa`, max_i a_i^r sum_j |G_ij| a_j: relative
        errors of the cosines are magnified by about this.

    Raises:
        TypeError: gram is neither an array nor a tensor.
        ValueError: its shape or dtype, or alpha out of range.

    Example:
        >>> import numpy as np, fastmto
        >>> gram = np.array([[4.0, -1.0], [-1.0, 1.0]])
        >>> fastmto.solvers.fairgrad(gram, 2.0).status
        'solved'
    """
    result = _fairgrad(gram, alpha)
    return converted(_fairgrad, gram, alpha) if result is None else result

"""Projections on the dual cone of the gradients, {d : <g_i, d> >= 0 for all i}."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import _solvers
from ._solvers import Result
from .convert import Kind, converted, to_vector

if TYPE_CHECKING:
    from .convert import Vector

_dual_cone = _solvers.dual_cone
_upgrad = _solvers.upgrad


def dual_cone(gram: Kind, reference: Vector | None = None) -> Result[Kind]:
    """Weights v of the projection of sum_i u_i g_i on the dual cone:

        minimise v'G v   subject to   v >= u

    Source: Quinton & Rey, arXiv 2406.16232, proposition 1 (DualProj for u the preference). Solved
    as a complementarity problem on the cosines, block pivots first, then single ones; no ridge, so
    g_i -> c_i g_i, u_i -> u_i / c_i only rescales v. Where G is singular the projection is unique,
    its weights need not be. A zero gradient keeps u_i.

    Statuses: solved, not_finite, not_symmetric, not_psd (also a negative direction met on the way),
    max_iterations (not seen).

    Args:
        gram: (T, T) array or tensor, as `fastmto.solvers.bargaining`: computed in float64 on the
            host, not modified; contiguous float64 or float32 CPU tensors are read in place.
        reference: (T,) finite u; 1/T each by default.

    Returns:
        `Result` with `weights` (T,) as `fastmto.solvers.bargaining` returns them, None unless
        solved; `status`; `iterations`, factorisations and
        exchanges; `residual`, the largest violation of (G v)_i >= 0 (= where v_i > u_i) relative to
        |g_i| sum_j (|u_j| + v_j - u_j) |g_j|; `kappa` 0 (no meaning here).

    Raises:
        TypeError: gram is neither an array nor a tensor.
        ValueError: its shape or dtype, or a reference that is not T finite numbers.

    Example:
        >>> import numpy as np, fastmto
        >>> gram = np.array([[4.0, -1.0], [-1.0, 1.0]])
        >>> fastmto.solvers.dual_cone(gram, np.ones(2)).status
        'solved'

    Example:
        >>> import numpy as np, fastmto
        >>> gram = np.array([[4.0, -1.0], [-1.0, 1.0]])
        >>> fastmto.solvers.upgrad(gram).status
        'solved'
    """
    result = _dual_cone(gram, reference)
    if result is not None:
        return result
    return converted(_dual_cone, gram, to_vector(reference, "reference"))


def upgrad(gram: Kind, preference: Vector | None = None) -> Result[Kind]:
    """Weights of UPGrad: the sum over i of the `dual_cone` solutions for u = p_i e_i.

    Source: Quinton & Rey, arXiv 2406.16232, equation 5. Every gradient is projected on its own, so
    the sum conflicts with none: G v >= 0.

    Args:
        gram: (T, T) array or tensor, as `fastmto.solvers.bargaining`: computed in float64 on the
            host, not modified; contiguous float64 or float32 CPU tensors are read in place.
        preference: (T,) finite p; 1/T each by default.

    Returns:
        As `dual_cone`, `iterations` summed and `residual` the largest of the T problems; statuses
        and errors as there.
    """
    result = _upgrad(gram, preference)
    if result is not None:
        return result
    return converted(_upgrad, gram, to_vector(preference, "preference"))

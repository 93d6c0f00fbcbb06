"""Gradient surgery on the Gram matrix."""

from __future__ import annotations

from typing import Any

from . import _solvers
from ._solvers import Result
from .convert import Kind, converted, to_indices

_pcgrad = _solvers.pcgrad


def pcgrad(gram: Kind, orders: Any) -> Result[Kind]:
    """Weights w of PCGrad for given orders: sum_i h_i = sum_j w_j g_j with

        h_i <- g_i;   for j in orders[i]:  if <h_i, g_j> < 0:  h_i <- h_i - <h_i, g_j>/|g_j|^2 g_j

    Source: Yu et al., arXiv 2001.06782, algorithm 1. Each h_i stays a combination of the gradients,
    so that O(T^3) on the Gram matrix replace T^2 passes over the gradients. Zero gradients conflict
    with nothing.

    Statuses: solved, not_finite, not_symmetric, not_psd.

    Args:
        gram: (T, T) array or tensor, as `fastmto.solvers.bargaining`: computed in float64 on the
            host, not modified; contiguous float64 or float32 CPU tensors are read in place.
        orders: (T, T-1) integers, row i the other tasks in the order in which task i meets them;
            the paper draws them anew at each step. int64 arrays are read in place.

    Returns:
        `Result` with `weights` (T,) as `fastmto.solvers.bargaining` returns them, None unless
        solved; `status`; `iterations`, the projections made;
        `residual` and `kappa` 0 (no meaning here).

    Raises:
        TypeError: gram is neither an array nor a tensor.
        ValueError: its shape or dtype, or a row of orders that is not every other task once.
    """
    result = _pcgrad(gram, orders)
    return converted(_pcgrad, gram, to_indices(orders, "orders")) if result is None else result

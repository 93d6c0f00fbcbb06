"""Projection on the simplex."""

from __future__ import annotations

from . import _solvers
from ._solvers import Result
from .convert import Kind, converted

_simplex_projection = _solvers.simplex_projection


def simplex_projection(vector: Kind) -> Result[Kind]:
    """The point of the simplex {w >= 0, sum w = 1} next to a vector:

        w = max(vector - theta, 0),   theta such that sum w = 1

    By Michelot's shrinking sets (J. Optim. Theory Appl. 50, 1986). Statuses: solved, not_finite.

    Args:
        vector: (T,) array or tensor of a floating dtype; not modified.

    Returns:
        `Result` with `weights` (T,) of the kind of `vector`, as `fastmto.solvers.bargaining`
        returns them; `iterations`, passes; `residual`, |sum w - 1|; `kappa` 0 (no meaning here).

    Raises:
        TypeError: vector is neither an array nor a tensor.
        ValueError: its shape or dtype.

    Example:
        >>> import numpy as np, fastmto
        >>> fastmto.solvers.simplex_projection(np.array([2.0, 1.0])).weights.tolist()
        [1.0, 0.0]
    """
    result = _simplex_projection(vector)
    return converted(_simplex_projection, vector, name="vector") if result is None else result

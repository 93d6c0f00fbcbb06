"""Weights that make the gradients orthogonal and of equal length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

from .. import _solvers
from .._solvers import Result
from .convert import converted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from .convert import Array

_aligned_mtl = _solvers.aligned_mtl


@overload
def aligned_mtl(gram: Array, scale: str = ...) -> Result[NDArray[np.float64]]: ...
@overload
def aligned_mtl(gram: Tensor, scale: str = ...) -> Result[Tensor]: ...
def aligned_mtl(gram: Array | Tensor, scale: str = "min") -> Result[Any]:
    """Weights w of Aligned-MTL:

        w = sigma V diag(lambda)^-1/2 V' p,   G = V diag(lambda) V',   p = 1/T

    Source: Senushkin et al., CVPR 2023, algorithm 1, over the eigenvalues above T eps max(lambda).
    Not invariant to the lengths of the gradients. For G = 0 the weights are p.

    Statuses: solved, not_finite, not_symmetric, not_psd, max_iterations (not seen).

    Args:
        gram: (T, T) array or tensor, as `fastmto.solvers.bargaining`: computed in float64 on the
            host, not modified; contiguous float64 or float32 CPU tensors are read in place.
        scale: sigma is the root of the smallest of these eigenvalues ("min", the paper), of their
            median, the lower one of two ("median"), or of their mean ("rmse"); the last two are
            the authors' code.

    Returns:
        `Result` with `weights` (T,) as `fastmto.solvers.bargaining` returns them, None unless
        solved; `status`; `iterations`, sweeps of the
        eigenvalue solver; `residual` 0; `kappa`, largest over smallest of these eigenvalues: the
        weights are right to about eps times that.

    Raises:
        TypeError: gram is neither an array nor a tensor.
        ValueError: its shape or dtype, or another scale.
    """
    result = _aligned_mtl(gram, scale)
    return converted(_aligned_mtl, gram, scale) if result is None else result

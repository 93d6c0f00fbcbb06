"""Weights that make the gradients orthogonal and of equal length."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _solvers
from ._solvers import Result
from .convert import Kind, converted

_aligned_mtl = _solvers.aligned_mtl


def aligned_mtl(gram: Kind, scale: str = "min", eps: float | None = None) -> Result[Kind]:
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
        eps: relative rounding of the Gram's entries, in [0, 1): what tells a principal component
            from noise, which would be brought to sigma as well. None: that of the Gram's dtype.
            Give the gradients' eps where a float64 Gram was taken from narrower gradients:
            `torch.finfo(torch.float32).eps`. float64's is the least that counts, and the largest
            eigenvalue stays in any case.

    Returns:
        `Result` with `weights` (T,) as `fastmto.solvers.bargaining` returns them, None unless
        solved; `status`; `iterations`, sweeps of the
        eigenvalue solver; `residual` 0; `kappa`, largest over smallest of these eigenvalues: the
        weights are right to about the Gram's rounding times that.

    Raises:
        TypeError: gram is neither an array nor a tensor.
        ValueError: its shape or dtype, another scale, or eps out of range.

    Example:
        >>> import numpy as np, fastmto
        >>> gram = np.array([[4.0, -1.0], [-1.0, 1.0]])
        >>> fastmto.solvers.aligned_mtl(gram).status
        'solved'
    """
    result = _aligned_mtl(gram, scale, eps)
    if result is not None:
        return result
    return converted(_aligned_mtl, gram, scale, _rounding(gram) if eps is None else eps)


def _rounding(gram: Any) -> float | None:
    """eps of the dtype; None where it has none, which `converted` refuses."""
    if isinstance(gram, Tensor) and gram.is_floating_point():
        return torch.finfo(gram.dtype).eps
    if isinstance(gram, np.ndarray) and np.issubdtype(gram.dtype, np.floating):
        return float(np.finfo(gram.dtype).eps)
    return None

"""What the native solvers do not take as it is: conversion of the arguments, and back.

The native functions take a Gram matrix as a contiguous float64 array, or as a contiguous float64 or
float32 CPU tensor, whose data are read in place, and answer in kind; they return None for anything
else, which then comes here. So the lean path is such a Gram matrix together with vectors that are
None or contiguous float64 arrays: no Python code but the call, no torch operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from ._solvers import Result

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[np.floating[Any]]
    Vector: TypeAlias = Array | Tensor | Sequence[float]

#: What a Gram matrix is, the weights are as well (of an array: float64).
Kind = TypeVar("Kind", "NDArray[np.floating[Any]]", Tensor)


def converted(
    native: Callable[..., Result[Any] | None], value: Any, *arguments: Any, name: str = "gram"
) -> Result[Any]:
    """`native(value, *arguments)` for a Gram matrix or vector of any kind; the others are ready.

    Raises:
        TypeError: value is neither an array nor a tensor.
        ValueError: its dtype is not a floating one, or what `native` refuses.
    """
    result = native(value, *arguments)
    if result is not None:
        return result
    result = native(to_numpy(value, name), *arguments)
    if result is None:
        raise AssertionError("a converted array was refused as not converted")
    if not isinstance(value, Tensor) or result.weights is None:
        return result
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    weights = torch.from_numpy(result.weights).to(value.device, dtype)
    return Result(weights, result.status, result.iterations, result.residual, result.kappa)


def to_numpy(value: Any, name: str) -> NDArray[np.float64]:
    """`value` as a C-contiguous float64 array; no copy where it is one already."""
    if isinstance(value, Tensor):
        if not value.is_floating_point() or value.layout != torch.strided:
            raise ValueError(
                f"{name} must be a dense tensor of a floating dtype, "
                f"got {value.dtype} ({value.layout})"
            )
        value = value.detach().to("cpu", torch.float64).resolve_neg().numpy()
    elif not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a numpy array or a tensor, got {type(value).__name__}")
    if not np.issubdtype(value.dtype, np.floating):
        raise ValueError(f"{name} must have a floating dtype, got {value.dtype}")
    return np.ascontiguousarray(value, dtype=np.float64)


def to_vector(value: Any, name: str) -> NDArray[np.float64] | None:
    """None, or `value` as a C-contiguous float64 array."""
    if value is None or isinstance(value, Tensor):
        return None if value is None else to_numpy(value, name)
    try:
        return np.ascontiguousarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be T numbers, got {value!r}") from error


def to_indices(value: Any, name: str) -> NDArray[np.int64]:
    """`value` as a C-contiguous int64 array."""
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must hold integers, got {array.dtype}")
    return np.ascontiguousarray(array, dtype=np.int64)

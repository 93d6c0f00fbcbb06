"""The ops on the CPU: checks, then the compiled kernels (csrc/kernels) on raw addresses.

The semantics are the docstring of `fastmto.ops`. Every function here takes a private `isa` (0 the
best of this machine, 1 baseline, 2 x86-64-v3, 3 x86-64-v4) for tests and benches.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from .. import _kernels
from ..rules import Clippy, Rule
from . import Steps, perturbation

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_PACK = struct.Struct("6d").pack
_ABSENT = bytes(6 * 8)

#: The last rule, step and packed coefficients: single parameters come in long runs of the same.
_packed: tuple[Rule | None, int, bytes] = (None, 0, b"")

#: What the three passes over updates take first, in the order of `_kernels.search`.
_Update = tuple[int, int, bool, int, int, int, int, bytes, int, int, int, int, int, int, int, int]


def _describe(tensor: Tensor) -> str:
    return (
        f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}, "
        f"strides {tensor.stride()}, on {tensor.device}"
    )


def _wrong(name: str, expected: str, tensor: Tensor) -> ValueError:
    return ValueError(f"{name} must be {expected}, got {_describe(tensor)}")


def _check_vector(name: str, tensor: Tensor, dtype: torch.dtype, numel: int) -> None:
    if (
        tensor.dtype is not dtype
        or tensor.shape != (numel,)
        or not tensor.is_contiguous()
        or not tensor.is_cpu
    ):
        kind = str(dtype).removeprefix("torch.")
        raise _wrong(name, f"a contiguous {kind} CPU tensor of shape ({numel},)", tensor)


def _check_matrix(name: str, tensor: Tensor, rows: int, columns: int) -> None:
    if (
        tensor.dtype is not torch.float64
        or tensor.shape != (rows, columns)
        or not tensor.is_contiguous()
        or not tensor.is_cpu
    ):
        raise _wrong(name, f"a contiguous float64 CPU tensor of shape ({rows}, {columns})", tensor)


def _check_grads(grads: Tensor) -> tuple[int, int, int, int]:
    """The number of the dtype, T, P and the row stride of grads."""
    dtype = _DTYPES.get(grads.dtype)
    if dtype is None or grads.dim() != 2 or not grads.is_cpu:
        raise _wrong("grads", "a (T, P) CPU tensor of float32, float64, bfloat16 or float16", grads)
    tasks, numel = grads.shape
    stride, along = grads.stride()
    if tasks < 1 or (numel > 1 and along != 1) or (tasks > 1 and stride < numel):
        raise _wrong("grads", "(T >= 1, P) with contiguous rows that do not overlap", grads)
    return dtype, tasks, numel, stride


def _check_segments(segments: Tensor, numel: int) -> int:
    """The number S of tensors. Their borders are read: they decide what memory is touched."""
    if (
        segments.dtype is not torch.int64
        or segments.dim() != 1
        or segments.numel() < 2
        or not segments.is_contiguous()
        or not segments.is_cpu
    ):
        raise _wrong("segments", "a contiguous int64 CPU tensor of shape (S + 1,)", segments)
    first, last = int(segments[0]), int(segments[-1])
    if first != 0 or last != numel or not bool((segments[1:] >= segments[:-1]).all()):
        raise ValueError(
            f"segments must rise from 0 to P = {numel}, got {first} to {last}"
            + ("" if first != 0 or last != numel else ", not sorted")
        )
    return segments.numel() - 1


def _pack(rule: Rule, step: int) -> bytes:
    global _packed
    last, at, packed = _packed
    if last is not rule or at != step:
        packed = _PACK(*rule.coefficients(step))
        _packed = rule, step, packed
    return packed


def _update(rule: Rule, step: Steps, grads: Tensor, state: tuple[Tensor, ...], isa: int) -> _Update:
    dtype, tasks, numel, stride = _check_grads(grads)
    names = rule.state_names
    if len(state) != len(names):
        raise ValueError(
            f"state must hold {len(names)} tensors ({', '.join(names)}), got {len(state)}"
        )
    maths = torch.float64 if dtype == 1 else torch.float32
    addresses = [0, 0, 0, 0, 0, 0]
    per_task = state[0].dim() == 2
    if per_task:
        for k, tensor in enumerate(state):
            if (
                tensor.dtype is not maths
                or tensor.shape != (tasks, numel)
                or (numel > 1 and tensor.stride(1) != 1)
                or (tasks > 1 and tensor.stride(0) < numel)
                or not tensor.is_cpu
            ):
                kind = str(maths).removeprefix("torch.")
                expected = f"a {kind} CPU tensor of shape ({tasks}, {numel}) with contiguous rows"
                raise _wrong(f"state[{k}] ({names[k]})", expected, tensor)
            addresses[2 * k] = tensor.data_ptr()
            addresses[2 * k + 1] = tensor.stride(0)
        if isinstance(step, int) or len(step) != tasks or min(step) < 0:
            raise ValueError(
                f"step must be a sequence of {tasks} numbers >= 0 where every task keeps its own "
                f"moments, got {step!r}"
            )
        coefficients = b"".join(_PACK(*rule.coefficients(t)) if t > 0 else _ABSENT for t in step)
    else:
        for k, tensor in enumerate(state):
            if (
                tensor.dtype is not maths
                or tensor.shape != (numel,)
                or not tensor.is_contiguous()
                or not tensor.is_cpu
            ):
                _check_vector(f"state[{k}] ({names[k]})", tensor, maths, numel)
            addresses[2 * k] = tensor.data_ptr()
        if not isinstance(step, int) or step < 1:
            raise ValueError(f"step must be an int >= 1 where moments are shared, got {step!r}")
        coefficients = _pack(rule, step)
    a, b, c, d, e, f = addresses
    return (
        rule.kind,
        dtype,
        per_task,
        tasks,
        numel,
        grads.data_ptr(),
        stride,
        coefficients,
        a,
        b,
        c,
        d,
        e,
        f,
        torch.get_num_threads(),
        isa,
    )


def search(
    rule: Rule,
    step: Steps,
    grads: Tensor,
    state: tuple[Tensor, ...],
    gram: Tensor,
    *,
    clippy: Clippy | None = None,
    params: Tensor | None = None,
    lr: float = 0.0,
    segments: Tensor | None = None,
    sigma: Tensor | None = None,
    isa: int = 0,
) -> None:
    """gram_ij = <u_i, u_j>, and sigma with Clippy; see `fastmto.ops`."""
    update = _update(rule, step, grads, state, isa)
    tasks, numel = update[3], update[4]
    _check_matrix("gram", gram, tasks, tasks)
    if clippy is None:
        _kernels.search(*update, gram.data_ptr())
        return
    if params is None or segments is None or sigma is None:
        raise ValueError("params, segments and sigma must be given with clippy")
    _check_vector("params", params, grads.dtype, numel)
    n_segments = _check_segments(segments, numel)
    _check_matrix("sigma", sigma, tasks, n_segments)
    _kernels.search_clipped(
        *update,
        gram.data_ptr(),
        clippy.lambda_rel,
        clippy.lambda_abs,
        lr,
        params.data_ptr(),
        segments.data_ptr(),
        n_segments,
        sigma.data_ptr(),
    )


def apply(
    rule: Rule,
    step: Steps,
    grads: Tensor,
    state: tuple[Tensor, ...],
    params: Tensor,
    weights: Tensor,
    lr: float,
    weight_decay: float = 0.0,
    *,
    segments: Tensor | None = None,
    sigma: Tensor | None = None,
    isa: int = 0,
) -> None:
    """The step of parameters and moments; see `fastmto.ops`."""
    update = _update(rule, step, grads, state, isa)
    tasks, numel = update[3], update[4]
    _check_vector("params", params, grads.dtype, numel)
    _check_vector("weights", weights, torch.float64, tasks)
    if sigma is None:
        _kernels.apply(*update, params.data_ptr(), weights.data_ptr(), lr, weight_decay, 0, 0, 0)
        return
    if segments is None:
        raise ValueError("segments must be given with sigma")
    n_segments = _check_segments(segments, numel)
    _check_matrix("sigma", sigma, tasks, n_segments)
    _kernels.apply(
        *update,
        params.data_ptr(),
        weights.data_ptr(),
        lr,
        weight_decay,
        segments.data_ptr(),
        n_segments,
        sigma.data_ptr(),
    )


def delayed(
    rule: Rule,
    step: Steps,
    grads: Tensor,
    state: tuple[Tensor, ...],
    params: Tensor,
    weights: Tensor,
    gram: Tensor,
    lr: float,
    weight_decay: float = 0.0,
    *,
    clippy: Clippy | None = None,
    segments: Tensor | None = None,
    sigma: Tensor | None = None,
    isa: int = 0,
) -> None:
    """search and apply; see `fastmto.ops`.

    With Clippy a tensor's factor is known only at its end, so that makes two passes; the factors
    are this step's, and stand in `sigma` afterwards. The results have the bits of `search` and
    `apply` called one after the other.
    """
    if clippy is not None:
        _check_vector("params", params, grads.dtype, grads.shape[-1])
        _check_vector("weights", weights, torch.float64, len(grads))
        search(
            rule,
            step,
            grads,
            state,
            gram,
            clippy=clippy,
            params=params,
            lr=lr,
            segments=segments,
            sigma=sigma,
            isa=isa,
        )
        apply(
            rule,
            step,
            grads,
            state,
            params,
            weights,
            lr,
            weight_decay,
            segments=segments,
            sigma=sigma,
            isa=isa,
        )
        return
    if sigma is not None:
        raise ValueError("clippy must be given with sigma")
    update = _update(rule, step, grads, state, isa)
    tasks, numel = update[3], update[4]
    _check_vector("params", params, grads.dtype, numel)
    _check_vector("weights", weights, torch.float64, tasks)
    _check_matrix("gram", gram, tasks, tasks)
    _kernels.delayed(
        *update, params.data_ptr(), weights.data_ptr(), lr, weight_decay, gram.data_ptr()
    )


def gram(grads: Tensor, gram: Tensor, *, isa: int = 0) -> None:
    """gram_ij = <g_i, g_j>; see `fastmto.ops`."""
    dtype, tasks, numel, stride = _check_grads(grads)
    _check_matrix("gram", gram, tasks, tasks)
    _kernels.gram(
        dtype,
        tasks,
        numel,
        grads.data_ptr(),
        stride,
        gram.data_ptr(),
        torch.get_num_threads(),
        isa,
    )


def combine(grads: Tensor, weights: Tensor, out: Tensor, *, isa: int = 0) -> None:
    """out = sum_i weights_i g_i; see `fastmto.ops`."""
    dtype, tasks, numel, stride = _check_grads(grads)
    _check_vector("weights", weights, torch.float64, tasks)
    _check_vector("out", out, grads.dtype, numel)
    _kernels.combine(
        dtype,
        tasks,
        numel,
        grads.data_ptr(),
        stride,
        weights.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
        isa,
    )


def perturb(
    params: Tensor,
    out: Tensor,
    *,
    scale: Tensor,
    direction: Tensor | None = None,
    seed: int | None = None,
    offset: int = 0,
    distribution: str = "gaussian",
    isa: int = 0,
) -> None:
    """out_r = params + scale_r u_r; see `fastmto.ops`."""
    if not params.is_cpu:
        raise _wrong("params", "on the CPU", params)
    perturbation.check(params, out, scale, direction, seed, offset, distribution)
    _kernels.perturb(
        _DTYPES[params.dtype],
        len(out),
        params.numel(),
        params.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        scale.data_ptr(),
        0 if seed is None else 1 + perturbation.DISTRIBUTIONS.index(distribution),
        0 if direction is None else direction.data_ptr(),
        direction.stride(0) if direction is not None and direction.dim() == 2 else 0,
        0 if seed is None else seed,
        0 if seed is None else offset,
        torch.get_num_threads(),
        isa,
    )


def all_finite(tensor: Tensor, *, isa: int = 0) -> bool:
    """Whether no element is NaN, infinite or too large to be squared; see `fastmto.ops`.

    Args:
        tensor: of a floating dtype of the ops; contiguous, or (T, P) with contiguous rows.
    """
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None or not tensor.is_cpu:
        raise _wrong("tensor", "a CPU tensor of float32, float64, bfloat16 or float16", tensor)
    if tensor.is_contiguous():
        rows, numel, stride = 1, tensor.numel(), 0
    elif tensor.dim() == 2 and (tensor.shape[1] == 1 or tensor.stride(1) == 1):
        rows, numel, stride = tensor.shape[0], tensor.shape[1], tensor.stride(0)
    else:
        raise _wrong("tensor", "contiguous, or two-dimensional with contiguous rows", tensor)
    return _kernels.all_finite(
        dtype, rows, numel, tensor.data_ptr(), stride, torch.get_num_threads(), isa
    )

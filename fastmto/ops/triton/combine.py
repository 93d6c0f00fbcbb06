"""Combine: one gradient out of the tasks', as one Triton launch.

    out = sum_i a_i g_i

A task of weight 0 takes no part, and its gradient is not read. Floor: T P elements read, P
written, with float32 4 (T+1) P bytes; 16-byte accesses when P and the row stride are multiples of
16 and the buffers are 16-byte aligned.
"""

# Triton's language is not Python's: kernels carry no types mypy knows.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .apply import tiling_for
from .launch import MAX_UNROLLED_T, Tiling, launch, programs_for, working_type


@triton.jit
def add_gradient(grads, weights, i, offsets, P, stride, total, DTYPE):
    """total + a_i g_i; without weight a task counts as having no coordinates."""
    a_i = tl.load(weights + i).to(DTYPE)
    end = tl.where(a_i != 0, P, 0)
    g_i = tl.load(grads + i * stride + offsets, mask=offsets < end, other=0.0).to(DTYPE)
    return total + a_i * g_i


@triton.jit
def combine_kernel(
    grads,  # (T, P), rows `stride` apart
    weights,  # (T,) float64
    out,  # (P,)
    P: tl.int64,
    stride: tl.int64,
    T: tl.constexpr,
    UNROLL: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < P
    total = tl.zeros((BLOCK,), DTYPE)
    if UNROLL:
        for i in tl.static_range(T):
            total = add_gradient(grads, weights, i, offsets, P, stride, total, DTYPE)
    else:
        for i in tl.range(0, T):
            total = add_gradient(grads, weights, i, offsets, P, stride, total, DTYPE)
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=mask)


def combine(grads: Tensor, weights: Tensor, out: Tensor, *, tiling: Tiling | None = None) -> None:
    """The contract's `combine` (ops/__init__.py). Arguments are taken as checked; `out` is
    written."""
    n_tasks, size = grads.shape
    if tiling is None:
        tiling = tiling_for(grads.element_size() == 8)
    launch(
        combine_kernel,
        (programs_for(size, tiling),),
        grads.device,
        tiling,
        grads,
        weights,
        out,
        size,
        grads.stride(0),
        T=n_tasks,
        UNROLL=n_tasks <= MAX_UNROLLED_T,
        DTYPE=working_type(grads),
        BLOCK=tiling.block,
    )

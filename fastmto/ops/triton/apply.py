"""Apply: move the parameters by the weighted updates, then the moments, as one Triton launch.

    params <- params - decay params - lr sum_i a_i sigma_i u_i
    moments <- the rule's step on g = sum_i a_i g_i, or task i's own moments on g_i

with u_i the rule's update of g_i with the old moments, formed again instead of being stored, and
sigma_i Clippy's factor of the coordinate's tensor, if given. Where moments are shared, a task of
weight 0 takes no part and its gradient is not read. Where `skip` says so nothing is written and no
gradient read.

Floor for N state tensors: with shared moments (T + N + 1) P elements read and (N + 1) P written,
4 (T+6) P bytes with Adam in float32; where every task keeps its own, (T + N T + 1) P read and
(N T + 1) P written, 4 (5 T+2) P bytes. Loads and stores are 16 bytes wide when P and the row
strides are multiples of 16 and the buffers are 16-byte aligned. sigma costs one cached load a
coordinate and task.
"""

# Triton's language is not Python's: kernels carry no types mypy knows.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .clippy import owners, shrunk, steps_for
from .launch import MAX_UNROLLED_T, Tiling, launch, programs_for, working_type
from .rules import (
    WIDTH,
    advance,
    coefficients,
    is_per_task,
    load_state,
    rates,
    row_starts,
    store_state,
    streams,
)


@triton.jit
def end_of_writes(skip, P):
    """P, or 0 where `skip` says that nothing is to be written."""
    end = P
    if skip is not None:
        end = tl.where(tl.load(skip) == 0, P, 0)
    return end


@triton.jit
def move(theta, offsets, mask, joint, lr, decay, DTYPE):
    """The parameters' step, given joint = sum_i a_i u_i."""
    old = tl.load(theta + offsets, mask=mask, other=0.0).to(DTYPE)
    new = old - (decay * old + lr * joint)
    tl.store(theta + offsets, new.to(theta.dtype.element_ty), mask=mask)


@triton.jit
def apply_kernel(
    grads,  # (T, P), rows `stride` apart
    s0,
    s1,
    s2,  # (P,) each, or (T, P) with rows q0 to q2 apart; None where the rule has fewer
    numbers,  # (1, WIDTH), or (T, WIDTH) where PER_TASK; float64
    P: tl.int64,
    stride: tl.int64,
    q0: tl.int64,
    q1: tl.int64,
    q2: tl.int64,
    theta,  # (P,) parameters
    weights,  # (T,) float64
    segments,  # (S + 1,) int64, with sigma
    sigma,  # (T, S) float64 or None
    skip,  # (1,) int32 or None
    S: tl.int64,
    KIND: tl.constexpr,
    T: tl.constexpr,
    PER_TASK: tl.constexpr,
    UNROLL: tl.constexpr,
    STEPS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = first + tl.arange(0, BLOCK)
    end = end_of_writes(skip, P)
    joint = tl.zeros((BLOCK,), DTYPE)
    g = tl.zeros((BLOCK,), DTYPE)
    state = ()
    c = ()
    moved = end
    if not PER_TASK:
        state = load_state(s0, s1, s2, (0, 0, 0), offsets, offsets < P, KIND)
        c, active = coefficients(numbers, None, DTYPE)
        moved = tl.where(active, end, 0)
    owner = offsets
    if sigma is not None:
        owner = owners(offsets, first, segments, P, S, STEPS, BLOCK)
    if UNROLL:
        for i in tl.static_range(T):
            joint, g = add_task(
                grads, s0, s1, s2, numbers, moved, stride, q0, q1, q2, weights, sigma, S,
                i, offsets, owner, joint, g, state, c, KIND, PER_TASK, DTYPE,
            )  # fmt: skip
    else:
        for i in tl.range(0, T):
            joint, g = add_task(
                grads, s0, s1, s2, numbers, moved, stride, q0, q1, q2, weights, sigma, S,
                i, offsets, owner, joint, g, state, c, KIND, PER_TASK, DTYPE,
            )  # fmt: skip
    lr, decay = rates(numbers, T if PER_TASK else 1, DTYPE)
    move(theta, offsets, offsets < moved, joint, lr, decay, DTYPE)
    if not PER_TASK:
        _u, new = advance(g, state, c, KIND)
        store_state(s0, s1, s2, (0, 0, 0), offsets, offsets < moved, new, KIND)


@triton.jit
def add_task(
    grads, s0, s1, s2, numbers, end, stride, q0, q1, q2, weights, sigma, S,
    i, offsets, owner, joint, g, state, c, KIND, PER_TASK, DTYPE,
):  # fmt: skip
    """joint + a_i sigma_i u_i and g + a_i g_i; moments of the task's own are written.

    A task that takes no part counts as having no coordinates.
    """
    a_i = tl.load(weights + i).to(DTYPE)
    if PER_TASK:
        c, active = coefficients(numbers + i * WIDTH, None, DTYPE)
        a_i = tl.where(active, a_i, 0.0)
        mask = offsets < tl.where(active, end, 0)
        starts = row_starts(i, q0, q1, q2)
        state = load_state(s0, s1, s2, starts, offsets, mask, KIND)
    else:
        mask = offsets < tl.where(a_i != 0, end, 0)
    g_i = tl.load(grads + (i * stride + offsets), mask=mask, other=0.0).to(DTYPE)
    u_i, new = advance(g_i, state, c, KIND)
    if PER_TASK:
        store_state(s0, s1, s2, starts, offsets, mask, new, KIND)
    u_i = shrunk(u_i, sigma, i, S, owner)
    return joint + tl.where(a_i != 0, a_i * u_i, 0.0), g + a_i * g_i


def tiling_for(double: bool) -> Tiling:
    """Eight coordinates a thread (four in float64): two 16-byte accesses a float32 array."""
    return Tiling(block=512 if double else 1024)


def apply(
    kind: int,
    numbers: Tensor,
    grads: Tensor,
    state: Sequence[Tensor],
    params: Tensor,
    weights: Tensor,
    *,
    segments: Tensor | None = None,
    sigma: Tensor | None = None,
    skip: Tensor | None = None,
    tiling: Tiling | None = None,
) -> None:
    """The contract's `apply` (ops/__init__.py).

    Arguments are taken as checked. `params` and `state` are written.
    """
    n_tasks, size = grads.shape
    per_task = is_per_task(state)
    if tiling is None:
        tiling = tiling_for(grads.element_size() == 8)
    launch(
        apply_kernel,
        (programs_for(size, tiling),),
        grads.device,
        tiling,
        *streams(numbers, grads, state),
        params,
        weights,
        segments,
        sigma,
        skip,
        0 if sigma is None else sigma.shape[1],
        KIND=kind,
        T=n_tasks,
        PER_TASK=per_task,
        UNROLL=n_tasks <= (2 if per_task else MAX_UNROLLED_T),
        STEPS=steps_for(sigma),
        DTYPE=working_type(grads),
        BLOCK=tiling.block,
    )

"""Clippy on the device: every task's factor for every tensor, and what other passes do with it.

    sigma_is = min(1, min_j (lambda_rel |theta_j| + lambda_abs) / (lr |u_ij|)),  j in tensor s

Source: Clippy, arXiv 2302.09178. One pass over the coordinates, before the one that uses sigma:
sigma is filled with 1 (a launch of T S numbers), then every program lowers the factors of the
tensors that its block touches by an atomic minimum. A minimum does not depend on the order, so the
bits repeat. A block inside one tensor takes one minimum a task; a block with borders finds every
coordinate's tensor and lowers one by one. Where lr |u| is not above the allowance nothing is
written. An update that is NaN does not count here: the Gram shows it.

Floor: (T + N + 1) P elements read for N state tensors, (T + N T + 1) P where every task keeps its
own. A Gram with Clippy is therefore three launches, the filling, this and the Gram itself,
which reads (T + N) P more (and looks sigma up, one cached load a coordinate and task): with Adam
in float32 4 (2 T+5) P bytes in all.

Which tensor a coordinate lies in is looked up in `segments` on the device, by bisection: the host
never reads it.
"""

# Triton's language is not Python's: kernels carry no types for mypy, tuples grow by concatenation.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment"
# ruff: noqa: RUF005

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Tiling, launch, programs_for, working_type
from .rules import LR, WIDTH, advance, coefficients, is_per_task, load_state, row_starts, streams


@triton.jit
def last_not_above(segments, p, low, S, STEPS: tl.constexpr):
    """The largest s < S with segments[s] <= p, from `low` on, where that holds.

    p and low are scalars or blocks, low of int32; low + 2^STEPS must reach S.
    """
    for k in tl.static_range(STEPS):
        middle = low + (1 << (STEPS - 1 - k))
        inside = middle < S
        border = tl.load(segments + middle, mask=inside, other=0)
        low = tl.where(inside & (border <= p), middle, low)
    return low


@triton.jit
def first_owner(segments, first, P, S, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """The tensor that owns coordinate `first`, and whether others own some of its block."""
    s = last_not_above(segments, first, tl.full((), 0, tl.int32), S, STEPS)
    last = tl.minimum(first + BLOCK, P) - 1
    return s, tl.load(segments + s + 1) <= last


@triton.jit
def owners(offsets, first, segments, P, S, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """The tensor that owns each of a block's coordinates `offsets`, int32."""
    s, mixed = first_owner(segments, first, P, S, STEPS, BLOCK)
    owner = tl.zeros(offsets.shape, tl.int32) + s
    if mixed:
        owner = last_not_above(segments, offsets, owner, S, STEPS)
    return owner


@triton.jit
def shrunk(u, sigma, row, S, owner):
    """sigma_is u_i; u where there is no sigma."""
    if sigma is not None:
        u = u * tl.load(sigma + row * S + owner).to(u.dtype)
    return u


def steps_for(sigma: Tensor | None) -> int:
    """Steps of a bisection among sigma's tensors."""
    return 0 if sigma is None else (sigma.shape[1] - 1).bit_length()


@triton.jit
def excess_of(
    grads, s0, s1, s2, numbers, P, stride, q0, q1, q2,
    i, offsets, inverse, state, c, T: tl.constexpr, KIND, PER_TASK, DTYPE,
):  # fmt: skip
    """|u_i| over its allowance; 0 where that is NaN, where task i takes no part or is none."""
    end = tl.where(i < T, P, 0)
    if PER_TASK:
        c, active = coefficients(numbers + i * WIDTH, i < T, DTYPE)
        end = tl.where(active, end, 0)
        starts = row_starts(i, q0, q1, q2)
        state = load_state(s0, s1, s2, starts, offsets, offsets < end, KIND)
    g_i = tl.load(grads + (i * stride + offsets), mask=offsets < end, other=0.0).to(DTYPE)
    u_i, _new = advance(g_i, state, c, KIND)
    excess = tl.abs(u_i) * inverse
    return tl.where(excess > 0, excess, 0.0)


@triton.jit
def lower(
    bits, numbers, i, segments, offsets, s, mixed, S, excess,
    T: tl.constexpr, PER_TASK, STEPS: tl.constexpr,
):  # fmt: skip
    """Lower task i's factors to what its `excess` at `offsets` asks for.

    Positive float64 numbers have the order of their bits read as integers.
    """
    row = i if PER_TASK else 0
    lr = tl.load(numbers + row * WIDTH + LR, mask=i < T, other=0.0)
    if mixed:
        # Looked up for every task again: rare, and nothing to keep in registers where not mixed.
        start = tl.zeros(offsets.shape, tl.int32) + s
        owner = last_not_above(segments, offsets, start, S, STEPS)
        ratios = lr * excess.to(tl.float64)
        factors = 1.0 / tl.where(ratios > 1, ratios, 1.0)
        of_each = factors.to(tl.int64, bitcast=True)
        tl.atomic_min(bits + i * S + owner, of_each, mask=ratios > 1, sem="relaxed")
    else:
        ratio = lr * tl.max(excess, axis=0).to(tl.float64)
        factor = 1.0 / tl.where(ratio > 1, ratio, 1.0)
        of_all = factor.to(tl.int64, bitcast=True)
        tl.atomic_min(bits + i * S + s, of_all, mask=ratio > 1, sem="relaxed")


@triton.jit
def factors_kernel(
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
    segments,  # (S + 1,) int64
    bits,  # (T, S) int64, the bits of sigma
    S: tl.int64,
    lambda_rel: tl.float64,
    lambda_abs: tl.float64,
    KIND: tl.constexpr,
    T: tl.constexpr,
    PER_TASK: tl.constexpr,
    GROUP: tl.constexpr,
    STEPS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = first + tl.arange(0, BLOCK)
    size = tl.abs(tl.load(theta + offsets, mask=offsets < P, other=0.0).to(DTYPE))
    state = ()
    c = ()
    end = P
    if not PER_TASK:
        c, active = coefficients(numbers, None, DTYPE)
        end = tl.where(active, P, 0)
        state = load_state(s0, s1, s2, (0, 0, 0), offsets, offsets < end, KIND)
    inverse = 1.0 / (tl.full((), lambda_rel, DTYPE) * size + tl.full((), lambda_abs, DTYPE))
    s, mixed = first_owner(segments, first, P, S, STEPS, BLOCK)
    for task in tl.range(0, T, GROUP):
        # The loads of several tasks before the first sum over threads, which holds up the next.
        excesses = ()
        for k in tl.static_range(GROUP):
            excess = excess_of(
                grads, s0, s1, s2, numbers, end, stride, q0, q1, q2,
                task + k, offsets, inverse, state, c, T, KIND, PER_TASK, DTYPE,
            )  # fmt: skip
            excesses = excesses + (excess,)
        for k in tl.static_range(GROUP):
            lower(
                bits, numbers, task + k, segments, offsets, s, mixed, S, excesses[k],
                T, PER_TASK, STEPS,
            )  # fmt: skip


def factors(
    kind: int,
    numbers: Tensor,
    grads: Tensor,
    state: Sequence[Tensor],
    params: Tensor,
    segments: Tensor,
    sigma: Tensor,
    clippy: Sequence[float],
    *,
    tiling: Tiling | None = None,
) -> None:
    """sigma <- Clippy's factors (ops/__init__.py). Arguments are taken as checked; `sigma` is
    written."""
    n_tasks, size = grads.shape
    if tiling is None:
        block = 1024 if n_tasks <= 2 else 512
        tiling = Tiling(block // 2 if grads.element_size() == 8 else block)
    sigma.fill_(1.0)
    lambda_rel, lambda_abs = clippy
    launch(
        factors_kernel,
        (programs_for(size, tiling),),
        grads.device,
        tiling,
        *streams(numbers, grads, state),
        params,
        segments,
        sigma.view(torch.int64),
        sigma.shape[1],
        lambda_rel,
        lambda_abs,
        KIND=kind,
        T=n_tasks,
        PER_TASK=is_per_task(state),
        GROUP=min(n_tasks, 2 if is_per_task(state) else 4),
        STEPS=steps_for(sigma),
        DTYPE=working_type(grads),
        BLOCK=tiling.block,
    )

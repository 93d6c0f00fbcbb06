"""The kernels of gram.py.

Precision and order: lanes accumulate `FLUSH` blocks in the working precision, then join a float64
sum of the program. Every program writes its sum to a workspace, T (T+1) / 2 numbers (or the next
power of 2) of a program with pairs, TILE^2 of a program and pair of tiles else; the program that
arrives last adds them up by their number, so which one that is does not show in the bits. The
arrival counter is an integer and is set back by the same program.

What that costs: after all others have ended, one program reads all sums of its pair alone. With 132
multiprocessors these are 2.2 MB at T = 32 and 4.3 MB at T = 64 in float32, up to 0.3 MB with pairs,
through one multiprocessor: little beside the pass where P is large, but not where T is large and P
is not. Sums in two levels would spread it.
"""

# Triton's language is not Python's: kernels carry no types for mypy, tuples grow by concatenation.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from .apply import end_of_writes, move
from .clippy import owners, shrunk
from .rules import (
    ACTIVE,
    NO_RULE,
    WIDTH,
    advance,
    coefficients,
    load_state,
    rates,
    row_starts,
    store_state,
)


@triton.jit
def sum_up(
    partial, arrived, total, index, LENGTH: tl.constexpr, ROWS: tl.constexpr, WAIT: tl.constexpr
):
    """Hand in this program's `total` (LENGTH,); the sum over programs, for the last one only.

    Returns:
        whether this is the last program, and the sum (meaningful if so).
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    tl.store(partial + program.to(tl.int64) * LENGTH + index, total)
    # Every thread's store must come before the arrival that publishes it.
    if WAIT is not None:
        # There the barrier does not wait for the stores of other waves.
        tl.inline_asm_elementwise(
            WAIT, "=v,v,~{memory}", [program], dtype=tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()
    is_last = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == programs - 1
    result = tl.zeros((LENGTH,), tl.float64)
    if is_last:
        rows = tl.arange(0, ROWS)
        for first in range(0, programs, ROWS):
            row = first + rows
            result += tl.sum(
                tl.load(
                    partial + row.to(tl.int64)[:, None] * LENGTH + index[None, :],
                    mask=(row < programs)[:, None],
                    other=0.0,
                    cache_modifier=".cg",  # written by other multiprocessors
                ),
                axis=0,
            )
        tl.store(arrived, 0)
    return is_last, result


@triton.jit
def update_row(
    grads, s0, s1, s2, numbers, limit, stride, q0, q1, q2, sigma, S,
    i, first, offsets, owner, state, c, end, KIND, PER_TASK, APPLY, DTYPE,
):  # fmt: skip
    """u_i and g_i at `offsets` from `first` on; with APPLY a task's own moments are written."""
    if PER_TASK:
        # Where the row lies depends on the block, if only for the compiler: it would keep the
        # numbers of all tasks in registers from block to block.
        row = tl.where(first < limit, i * WIDTH, 0)
        c, active = coefficients(numbers + row, None, DTYPE)
        limit = tl.where(active, limit, 0)
        end = tl.where(active, end, 0)
        starts = row_starts(i, q0, q1, q2)
        state = load_state(s0, s1, s2, starts, offsets, offsets < limit, KIND)
    g_i = tl.load(grads + (i * stride + offsets), mask=offsets < limit, other=0.0).to(DTYPE)
    u_i, new = advance(g_i, state, c, KIND)
    if PER_TASK and APPLY:
        store_state(s0, s1, s2, starts, offsets, offsets < end, new, KIND)
    return shrunk(u_i, sigma, i, S, owner), g_i


@triton.jit
def gram_pairs(
    grads,  # (T, P), rows `stride` apart
    s0,
    s1,
    s2,  # (P,) each, or (T, P) with rows q0 to q2 apart; None where the rule has fewer
    numbers,  # (1, WIDTH), or (T, WIDTH) where PER_TASK; float64; None without a rule
    P: tl.int64,
    stride: tl.int64,
    q0: tl.int64,
    q1: tl.int64,
    q2: tl.int64,
    theta,  # (P,) parameters, APPLY only
    weights,  # (T,) float64, APPLY only
    segments,  # (S + 1,) int64, with sigma
    sigma,  # (T, S) float64 or None
    skip,  # (1,) int32 or None, APPLY only
    S: tl.int64,
    gram,  # (T, T) float64
    partial,  # (programs, LENGTH) float64
    arrived,  # (1,) int32, 0
    KIND: tl.constexpr,
    T: tl.constexpr,
    PER_TASK: tl.constexpr,
    APPLY: tl.constexpr,
    STEPS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    FLUSH: tl.constexpr,
    LENGTH: tl.constexpr,  # T (T+1) / 2 or the next power of 2
    ROWS: tl.constexpr,
    WAIT: tl.constexpr,
):
    """gram_ij over pairs i >= j, number i (i+1) / 2 + j of LENGTH."""
    program = tl.program_id(0)
    programs = tl.num_programs(0).to(tl.int64)
    turns = tl.cdiv(tl.cdiv(P, BLOCK), programs).to(tl.int32)
    index = tl.arange(0, LENGTH)
    total = tl.zeros((LENGTH,), tl.float64)
    limit = P
    c = ()
    if not PER_TASK and KIND != NO_RULE:
        c, active = coefficients(numbers, None, DTYPE)
        limit = tl.where(active, P, 0)
    a = ()
    end = limit
    if APPLY:
        end = end_of_writes(skip, limit)
        for i in tl.static_range(T):
            a_i = tl.load(weights + i)
            if PER_TASK:
                a_i = tl.where(tl.load(numbers + i * WIDTH + ACTIVE) != 0, a_i, 0.0)
            a = a + (a_i.to(DTYPE),)
        lr, decay = rates(numbers, T if PER_TASK else 1, DTYPE)
    for first in range(0, turns, FLUSH):
        pairs = ()
        for _k in tl.static_range(T * (T + 1) // 2):
            pairs = pairs + (tl.zeros((BLOCK,), DTYPE),)
        for turn in range(first, min(first + FLUSH, turns)):
            start = (turn * programs + program) * BLOCK
            offsets = start + tl.arange(0, BLOCK)
            state = ()
            if not PER_TASK:
                state = load_state(s0, s1, s2, (0, 0, 0), offsets, offsets < limit, KIND)
            owner = offsets
            if sigma is not None:
                owner = owners(offsets, start, segments, P, S, STEPS, BLOCK)
            us = ()
            joint = tl.zeros((BLOCK,), DTYPE)
            g = tl.zeros((BLOCK,), DTYPE)
            for i in tl.static_range(T):
                u_i, g_i = update_row(
                    grads, s0, s1, s2, numbers, limit, stride, q0, q1, q2, sigma, S,
                    i, start, offsets, owner, state, c, end, KIND, PER_TASK, APPLY, DTYPE,
                )  # fmt: skip
                us = us + (u_i,)
                if APPLY:
                    joint += tl.where(a[i] != 0, a[i] * u_i, 0.0)
                    g += tl.where(a[i] != 0, a[i] * g_i, 0.0)
            summed = ()
            for i in tl.static_range(T):
                for j in tl.static_range(i + 1):
                    summed = summed + (pairs[i * (i + 1) // 2 + j] + us[i] * us[j],)
            pairs = summed
            if APPLY:
                move(theta, offsets, offsets < end, joint, lr, decay, DTYPE)
                if not PER_TASK:
                    _u, new = advance(g, state, c, KIND)
                    store_state(s0, s1, s2, (0, 0, 0), offsets, offsets < end, new, KIND)
        for k in tl.static_range(T * (T + 1) // 2):
            total += tl.where(index == k, tl.sum(pairs[k], axis=0).to(tl.float64), 0.0)
    is_last, result = sum_up(partial, arrived, total, index, LENGTH, ROWS, WAIT)
    if is_last:
        row = tl.zeros((LENGTH,), tl.int32)
        for k in tl.static_range(1, T):
            row += (index >= k * (k + 1) // 2).to(tl.int32)
        column = index - row * (row + 1) // 2
        valid = index < T * (T + 1) // 2
        tl.store(gram + row * T + column, result, mask=valid)
        tl.store(gram + column * T + row, result, mask=valid)


@triton.jit
def update_tile(
    grads, s0, s1, s2, numbers, limit, stride, q0, q1, q2, sigma, S,
    row, offsets, owner, state, c, T: tl.constexpr, KIND, PER_TASK, DTYPE,
):  # fmt: skip
    """u, g, the new moments and where they belong, of tasks `row` (R, 1) at `offsets` (1, B); the
    moments mean nothing where they are shared. Beyond the last task all is 0."""
    mask = (row < T) & (offsets < limit)
    starts = (0, 0, 0)
    if PER_TASK:
        c, active = coefficients(numbers + row * WIDTH, row < T, DTYPE)
        mask = mask & active
        starts = row_starts(row, q0, q1, q2)
        state = load_state(s0, s1, s2, starts, offsets, mask, KIND)
    g = tl.load(grads + (row * stride + offsets), mask=mask, other=0.0).to(DTYPE)
    u, new = advance(g, state, c, KIND)
    if sigma is not None:
        factor = tl.load(sigma + row * S + owner, mask=row < T, other=0.0)
        u = u * factor.to(DTYPE)
    return u, g, new, mask


@triton.jit
def gram_tiles(
    grads,  # (T, P), rows `stride` apart
    s0,
    s1,
    s2,  # (P,) each, or (T, P) with rows q0 to q2 apart; None where the rule has fewer
    numbers,  # (1, WIDTH), or (T, WIDTH) where PER_TASK; float64; None without a rule
    P: tl.int64,
    stride: tl.int64,
    q0: tl.int64,
    q1: tl.int64,
    q2: tl.int64,
    theta,  # (P,) parameters, APPLY only
    weights,  # (T,) float64, APPLY only
    segments,  # (S + 1,) int64, with sigma
    sigma,  # (T, S) float64 or None
    skip,  # (1,) int32 or None, APPLY only
    S: tl.int64,
    gram,  # (T, T) float64
    partial,  # (tile pairs, programs, LENGTH) float64
    arrived,  # (tile pairs,) int32, 0
    KIND: tl.constexpr,
    T: tl.constexpr,
    PER_TASK: tl.constexpr,
    APPLY: tl.constexpr,  # only with T <= TILE
    STEPS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    FLUSH: tl.constexpr,
    LENGTH: tl.constexpr,  # TILE TILE
    ROWS: tl.constexpr,
    WAIT: tl.constexpr,
    TILE: tl.constexpr,
):
    """gram's tile (i, j), i >= j, is number i (i+1) / 2 + j of the grid's second axis."""
    program = tl.program_id(0)
    programs = tl.num_programs(0).to(tl.int64)
    pair = tl.program_id(1).to(tl.int64)
    tile_i = pair * 0
    for k in tl.static_range(1, (T + TILE - 1) // TILE):
        tile_i += (pair >= k * (k + 1) // 2).to(tl.int64)
    tile_j = pair - tile_i * (tile_i + 1) // 2
    row_i = (tile_i * TILE + tl.arange(0, TILE))[:, None]
    row_j = (tile_j * TILE + tl.arange(0, TILE))[:, None]
    limit = P
    c = ()
    if not PER_TASK and KIND != NO_RULE:
        c, active = coefficients(numbers, None, DTYPE)
        limit = tl.where(active, P, 0)
    if APPLY:
        end = end_of_writes(skip, limit)
        a = tl.load(weights + row_i, mask=row_i < T, other=0.0)
        if PER_TASK:
            takes_part = tl.load(numbers + row_i * WIDTH + ACTIVE, mask=row_i < T, other=0.0)
            a = tl.where(takes_part != 0, a, 0.0)
        a = a.to(DTYPE)
        lr, decay = rates(numbers, T if PER_TASK else 1, DTYPE)
    turns = tl.cdiv(tl.cdiv(P, BLOCK), programs).to(tl.int32)
    total = tl.zeros((TILE, TILE), tl.float64)
    for first in range(0, turns, FLUSH):
        tile = tl.zeros((TILE, TILE), DTYPE)
        for turn in range(first, min(first + FLUSH, turns)):
            start = (turn * programs + program) * BLOCK
            offsets = (start + tl.arange(0, BLOCK))[None, :]
            state = ()
            if not PER_TASK:
                state = load_state(s0, s1, s2, (0, 0, 0), offsets, offsets < limit, KIND)
            owner = offsets
            if sigma is not None:
                owner = owners(offsets, start, segments, P, S, STEPS, BLOCK)
            u_i, g_i, new, mask = update_tile(
                grads, s0, s1, s2, numbers, limit, stride, q0, q1, q2, sigma, S,
                row_i, offsets, owner, state, c, T, KIND, PER_TASK, DTYPE,
            )  # fmt: skip
            if T <= TILE:
                u_j = u_i
            else:
                u_j, _g, _new, _mask = update_tile(
                    grads, s0, s1, s2, numbers, limit, stride, q0, q1, q2, sigma, S,
                    row_j, offsets, owner, state, c, T, KIND, PER_TASK, DTYPE,
                )  # fmt: skip
            tile = tl.dot(u_i, tl.trans(u_j), tile, input_precision="ieee", out_dtype=DTYPE)
            if APPLY:
                valid = offsets < end
                joint = tl.sum(tl.where(a != 0, a * u_i, 0.0), axis=0, keep_dims=True)
                move(theta, offsets, valid, joint, lr, decay, DTYPE)
                if PER_TASK:
                    starts = row_starts(row_i, q0, q1, q2)
                    store_state(s0, s1, s2, starts, offsets, mask & valid, new, KIND)
                else:
                    g = tl.sum(tl.where(a != 0, a * g_i, 0.0), axis=0, keep_dims=True)
                    _u, new = advance(g, state, c, KIND)
                    store_state(s0, s1, s2, (0, 0, 0), offsets, valid, new, KIND)
        total += tile.to(tl.float64)
    index = tl.arange(0, LENGTH)
    is_last, result = sum_up(
        partial + pair * programs * LENGTH,
        arrived + pair,
        tl.reshape(total, (LENGTH,)),
        index,
        LENGTH,
        ROWS,
        WAIT,
    )
    if is_last:
        row = tile_i * TILE + index // TILE
        column = tile_j * TILE + index % TILE
        # Only one of the two sums of a pair is used, so that gram is symmetric bit for bit.
        lower = (row < T) & (column <= row)
        tl.store(gram + row * T + column, result, mask=lower)
        tl.store(gram + column * T + row, result, mask=lower)

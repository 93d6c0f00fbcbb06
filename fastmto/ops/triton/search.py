"""Search, search with apply in the same pass ("delayed"), and the Gram of the gradients themselves,
as one Triton launch each.

    u_i = rule's update of g_i with the old moments, times Clippy's sigma_i of the coordinate's
    tensor if given;  gram_ij = sum_p u_ip u_jp   (never stored: u)

`gram` is the search of no rule: u_i = g_i, no state.

Floor for N state tensors: (T + N) P elements read, (T + N T) P where every task keeps its own, and
T^2 written; delayed also reads the P parameters and writes parameters and state. With Adam and
float32 that is 4 (T+2) P and 4 (T+6) P bytes, or 12 T P and 4 (5 T+2) P with moments of the tasks'
own. Where P and the row strides are multiples of 16 and the buffers 16-byte aligned, float32
gradients come 16 bytes at a time; where registers leave a thread two coordinates only, 8 (delayed
from T = 7, with Clippy or moments of the tasks' own any pass from T = 6), or one, 4 (both, T = 8).
Other sizes are right, with narrower accesses. Clippy's factors come from a pass of their own
before this one (triton_clippy.py).

Two formulations of the Gram:

    pairs   T <= 8: one accumulator a pair and lane, all in registers
    tiles   larger T: TILE x TILE blocks by `tl.dot` in full float32 (float64) precision, TF32
            off. Up to T = 64 (16 in float64) one tile holds all rows and every gradient is read
            once; above, a program serves one pair of row tiles, and with N tiles every gradient
            is read N + 1 times.

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
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment"
# ruff: noqa: RUF005

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .apply import apply, end_of_writes, move
from .clippy import owners, shrunk, steps_for
from .launch import (
    Tiling,
    lanes,
    launch,
    processors,
    programs_for,
    waiting,
    working_type,
    workspace,
)
from .rules import (
    ACTIVE,
    NO_RULE,
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

#: Largest T of the pairs formulation.
MAX_PAIRS_T = 8
#: Numbers the last program adds up at a time: 32 a thread of four warps.
MAX_SUMMED = 4096


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
def search_pairs(
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
def search_tiles(
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


@functools.cache
def tiling_for(
    n_tasks: int,
    double: bool,
    with_apply: bool,
    n_processors: int,
    per_task: bool = False,
    clipped: bool = False,
    n_lanes: int = 32,
) -> Tiling:
    """The default tiling.

    Pairs keep T (T+1) / 2 accumulators and about 2 T values a coordinate in registers, so a
    thread takes fewer coordinates the more tasks there are and the more is done with them, and the
    grid holds as many programs as the registers leave room for. No block of pairs is smaller than
    its program's threads, `n_lanes` a warp: else several would hold one coordinate, and with apply
    one could read what another has already written. Tiles wait in shared memory, those of the
    moments too where every task keeps its own.
    """
    heavy = with_apply or per_task or clipped
    if n_tasks > MAX_PAIRS_T:
        tile = 16 if n_tasks <= 16 or double else 32 if n_tasks <= 32 else 64
        warps = 8 if tile == 64 or (heavy and tile == 32) else 4
        block = 32 if double or per_task or clipped else 64
        if (per_task and double) or (heavy and n_tasks > tile):
            block = 16
        n_tiles = -(-n_tasks // tile)
        n_pairs = n_tiles * (n_tiles + 1) // 2
        # Many pairs fill the GPU with few programs each; more would only be more to add up.
        programs = 8 // warps * n_processors
        return Tiling(
            block,
            warps,
            programs=min(programs, -(-4 * programs // n_pairs)),
            registers=255,
            flush=64,
            tile=tile,
        )
    if n_tasks <= 2 and not (heavy or double):
        block = 1024
    elif n_tasks == MAX_PAIRS_T and per_task and clipped:
        block = 128
    elif n_tasks >= (6 if per_task or clipped else 7) and (heavy or double):
        block = 256
    else:
        block = 512
    shared_by, registers = (4, 128) if n_tasks <= (2 if clipped else 3) else (2, 255)
    if double:
        block //= 2
    warps = min(4, block // n_lanes)
    return Tiling(
        block,
        warps,
        programs=shared_by * (4 // warps) * n_processors,
        registers=registers,
        flush=32,
    )


def constants_for(tiling: Tiling, n_tasks: int, with_apply: bool) -> dict[str, Any]:
    """The constants of the kernel that `tiling` chooses, but for KIND and DTYPE."""
    tile = tiling.tile
    sums = n_tasks * (n_tasks + 1) // 2 if tile is None else tile * tile
    length = 1 << (sums - 1).bit_length()
    return {
        "T": n_tasks,
        "APPLY": with_apply,
        "BLOCK": tiling.block,
        "FLUSH": tiling.flush,
        "LENGTH": length,
        "ROWS": max(1, MAX_SUMMED // length),
        "WAIT": waiting(),
        **({} if tile is None else {"TILE": tile}),
    }


def _run(
    kind: int,
    numbers: Tensor | None,
    grads: Tensor,
    state: Sequence[Tensor],
    gram: Tensor,
    params: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    segments: Tensor | None = None,
    sigma: Tensor | None = None,
    skip: Tensor | None = None,
    tiling: Tiling,
) -> None:
    """Launch one pass: search, or with `params` and `weights` search and apply."""
    n_tasks, size = grads.shape
    constants = constants_for(tiling, n_tasks, params is not None)
    programs = programs_for(size, tiling)
    n_tiles = 1 if tiling.tile is None else -(-n_tasks // tiling.tile)
    n_pairs = n_tiles * (n_tiles + 1) // 2
    partial, arrived = workspace(grads.device, n_pairs * programs * constants["LENGTH"], n_pairs)
    launch(
        search_pairs if tiling.tile is None else search_tiles,
        (programs, n_pairs),
        grads.device,
        tiling,
        *streams(numbers, grads, state),
        params,
        weights,
        segments,
        sigma,
        skip,
        0 if sigma is None else sigma.shape[1],
        gram,
        partial,
        arrived,
        KIND=kind,
        PER_TASK=is_per_task(state),
        STEPS=steps_for(sigma),
        DTYPE=working_type(grads),
        **constants,
    )


def _default(
    grads: Tensor, state: Sequence[Tensor], with_apply: bool, sigma: Tensor | None = None
) -> Tiling:
    return tiling_for(
        grads.shape[0],
        grads.element_size() == 8,
        with_apply,
        processors(grads.device),
        is_per_task(state),
        sigma is not None,
        lanes(),
    )


def search(
    kind: int,
    numbers: Tensor,
    grads: Tensor,
    state: Sequence[Tensor],
    gram: Tensor,
    *,
    segments: Tensor | None = None,
    sigma: Tensor | None = None,
    tiling: Tiling | None = None,
) -> None:
    """The contract's `search` (ops/__init__.py), with the factors `sigma` made before.

    Arguments are taken as checked. `gram` is written.
    """
    if tiling is None:
        tiling = _default(grads, state, False, sigma)
    _run(kind, numbers, grads, state, gram, segments=segments, sigma=sigma, tiling=tiling)


def gram(grads: Tensor, gram: Tensor, *, tiling: Tiling | None = None) -> None:
    """The contract's `gram` (ops/__init__.py).

    Arguments are taken as checked. `gram` is written.
    """
    if tiling is None:
        tiling = _default(grads, (), False)
    _run(NO_RULE.value, None, grads, (), gram, tiling=tiling)


def delayed(
    kind: int,
    numbers: Tensor,
    grads: Tensor,
    state: Sequence[Tensor],
    params: Tensor,
    weights: Tensor,
    gram: Tensor,
    *,
    segments: Tensor | None = None,
    sigma: Tensor | None = None,
    skip: Tensor | None = None,
    tiling: Tiling | None = None,
) -> None:
    """The contract's `delayed` (ops/__init__.py), with the factors `sigma` made before.

    Where one row tile cannot hold all tasks this is search, then apply: programs of other tiles
    still read what apply writes; so it is with more than 32 tasks and moments of their own, for
    which a program has too few registers. Arguments are taken as checked; `params`, `state` and
    `gram` are written.
    """
    used = _default(grads, state, True, sigma) if tiling is None else tiling
    n_tasks = grads.shape[0]
    tile = used.tile or n_tasks
    rows, moved = (kind, numbers, grads, state), (params, weights)
    if n_tasks > tile or (tile > 32 and is_per_task(state)):
        search(*rows, gram, segments=segments, sigma=sigma, tiling=tiling)
        apply(*rows, *moved, segments=segments, sigma=sigma, skip=skip)
        return
    _run(*rows, gram, *moved, segments=segments, sigma=sigma, skip=skip, tiling=used)

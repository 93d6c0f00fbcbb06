"""Search, search with apply in the same pass ("delayed"), and the Gram of the gradients themselves,
as one Triton launch each.

    u_i = rule's update of g_i with the old moments;  gram_ij = sum_p u_ip u_jp   (never stored: u)

`gram` is the search of no rule: u_i = g_i, no state.

Floor: (T + N) P elements read for N state tensors, T^2 written; delayed also reads the P
parameters and writes parameters and state. With Adam and float32 that is 4 (T+2) P and 4 (T+6) P
bytes. Where P and the row stride are multiples of 16 and the buffers 16-byte aligned, gradients
come 16 bytes at a time (8 where registers leave a thread two coordinates only: delayed from
T = 7); other sizes are right, with narrower accesses.

Two formulations of the Gram:

    pairs   T <= 8: one accumulator a pair and lane, all in registers
    tiles   larger T: TILE x TILE blocks by `tl.dot` in full float32 (float64) precision, TF32
            off. Up to T = 64 (16 in float64) one tile holds all rows and every gradient is read
            once; above, a program serves one pair of row tiles, and with N tiles every gradient
            is read N + 1 times.

Precision and order: lanes accumulate `FLUSH` blocks in the working precision, then join a float64
sum of the program. Every program writes its sum to a workspace of O(programs T^2); the program
that arrives last adds them up by their number, so which one that is does not show in the bits.
The arrival counter is an integer and is set back by the same program.
"""

# Triton's language is not Python's: kernels carry no types for mypy, tuples grow by concatenation.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment"
# ruff: noqa: RUF005

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..rules import Rule
from .triton_apply import apply, move
from .triton_launch import Tiling, launch, processors, programs_for, working_type, workspace
from .triton_rules import NO_RULE, advance, coefficients, load_state, numbers

#: Largest T of the pairs formulation.
MAX_PAIRS_T = 8
#: Numbers the last program adds up at a time: 32 a thread of four warps.
MAX_SUMMED = 4096


@triton.jit
def sum_up(partial, arrived, total, index, LENGTH: tl.constexpr, ROWS: tl.constexpr):
    """Hand in this program's `total` (LENGTH,); the sum over programs, for the last one only.

    Returns:
        whether this is the last program, and the sum (meaningful if so).
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    tl.store(partial + program.to(tl.int64) * LENGTH + index, total)
    # Every thread's store must come before the arrival that publishes it.
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
def search_pairs(
    grads,  # (T, P), rows `stride` apart
    s0,
    s1,
    s2,  # (P,) each, None where the rule has fewer
    theta,  # (P,) parameters, APPLY only
    weights,  # (T,) float64, APPLY only
    gram,  # (T, T) float64
    partial,  # (programs, LENGTH) float64
    arrived,  # (1,) int32, 0
    P: tl.int64,
    stride: tl.int64,
    b1: tl.float64,
    d1: tl.float64,
    b2: tl.float64,
    d2: tl.float64,
    c1: tl.float64,
    c2: tl.float64,
    eps: tl.float64,
    mu: tl.float64,
    lr: tl.float64,
    keep: tl.float64,
    KIND: tl.constexpr,
    T: tl.constexpr,
    APPLY: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    FLUSH: tl.constexpr,
    LENGTH: tl.constexpr,  # T (T+1) / 2 or the next power of 2
    ROWS: tl.constexpr,
):
    """gram_ij over pairs i >= j, number i (i+1) / 2 + j of LENGTH."""
    c = numbers(b1, d1, b2, d2, c1, c2, eps, mu, DTYPE)
    program = tl.program_id(0)
    programs = tl.num_programs(0).to(tl.int64)
    turns = tl.cdiv(tl.cdiv(P, BLOCK), programs).to(tl.int32)
    index = tl.arange(0, LENGTH)
    total = tl.zeros((LENGTH,), tl.float64)
    a = ()
    if APPLY:
        for i in tl.static_range(T):
            a = a + (tl.load(weights + i).to(DTYPE),)
    for first in range(0, turns, FLUSH):
        pairs = ()
        for _k in tl.static_range(T * (T + 1) // 2):
            pairs = pairs + (tl.zeros((BLOCK,), DTYPE),)
        for turn in range(first, min(first + FLUSH, turns)):
            block = turn * programs + program
            offsets = block * BLOCK + tl.arange(0, BLOCK)
            mask = offsets < P
            state = load_state(s0, s1, s2, offsets, mask, KIND)
            us = ()
            joint = tl.zeros((BLOCK,), DTYPE)
            g = tl.zeros((BLOCK,), DTYPE)
            for i in tl.static_range(T):
                g_i = tl.load(grads + i * stride + offsets, mask=mask, other=0.0).to(DTYPE)
                u_i, _new = advance(g_i, state, c, KIND)
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
                move(theta, s0, s1, s2, offsets, mask, joint, g, state, c, lr, keep, KIND, DTYPE)
        for k in tl.static_range(T * (T + 1) // 2):
            total += tl.where(index == k, tl.sum(pairs[k], axis=0).to(tl.float64), 0.0)
    is_last, result = sum_up(partial, arrived, total, index, LENGTH, ROWS)
    if is_last:
        row = tl.zeros((LENGTH,), tl.int32)
        for k in tl.static_range(1, T):
            row += (index >= k * (k + 1) // 2).to(tl.int32)
        column = index - row * (row + 1) // 2
        valid = index < T * (T + 1) // 2
        tl.store(gram + row * T + column, result, mask=valid)
        tl.store(gram + column * T + row, result, mask=valid)


@triton.jit
def load_tile(grads, row, offsets, mask, stride, T: tl.constexpr, DTYPE):
    """Gradients of tasks `row` (R,) at `offsets` (B,) as (R, B); 0 beyond the last task."""
    return tl.load(
        grads + row.to(tl.int64)[:, None] * stride + offsets[None, :],
        mask=(row < T)[:, None] & mask[None, :],
        other=0.0,
    ).to(DTYPE)


@triton.jit
def search_tiles(
    grads,  # (T, P), rows `stride` apart
    s0,
    s1,
    s2,  # (P,) each, None where the rule has fewer
    theta,  # (P,) parameters, APPLY only
    weights,  # (T,) float64, APPLY only
    gram,  # (T, T) float64
    partial,  # (tile pairs, programs, LENGTH) float64
    arrived,  # (tile pairs,) int32, 0
    P: tl.int64,
    stride: tl.int64,
    b1: tl.float64,
    d1: tl.float64,
    b2: tl.float64,
    d2: tl.float64,
    c1: tl.float64,
    c2: tl.float64,
    eps: tl.float64,
    mu: tl.float64,
    lr: tl.float64,
    keep: tl.float64,
    KIND: tl.constexpr,
    T: tl.constexpr,
    APPLY: tl.constexpr,  # only with T <= TILE
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    FLUSH: tl.constexpr,
    LENGTH: tl.constexpr,  # TILE TILE
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """gram's tile (i, j), i >= j, is number i (i+1) / 2 + j of the grid's second axis."""
    c = numbers(b1, d1, b2, d2, c1, c2, eps, mu, DTYPE)
    program = tl.program_id(0)
    programs = tl.num_programs(0).to(tl.int64)
    pair = tl.program_id(1)
    tile_i = pair * 0
    for k in tl.static_range(1, (T + TILE - 1) // TILE):
        tile_i += (pair >= k * (k + 1) // 2).to(tl.int32)
    tile_j = pair - tile_i * (tile_i + 1) // 2
    row_i = tile_i * TILE + tl.arange(0, TILE)
    row_j = tile_j * TILE + tl.arange(0, TILE)
    if APPLY:
        a = tl.load(weights + row_i, mask=row_i < T, other=0.0).to(DTYPE)[:, None]
    turns = tl.cdiv(tl.cdiv(P, BLOCK), programs).to(tl.int32)
    total = tl.zeros((TILE, TILE), tl.float64)
    for first in range(0, turns, FLUSH):
        tile = tl.zeros((TILE, TILE), DTYPE)
        for turn in range(first, min(first + FLUSH, turns)):
            block = turn * programs + program
            offsets = block * BLOCK + tl.arange(0, BLOCK)
            mask = offsets < P
            state = load_state(s0, s1, s2, offsets[None, :], mask[None, :], KIND)
            g_i = load_tile(grads, row_i, offsets, mask, stride, T, DTYPE)
            u_i, _new = advance(g_i, state, c, KIND)
            if T <= TILE:
                u_j = u_i
            else:
                g_j = load_tile(grads, row_j, offsets, mask, stride, T, DTYPE)
                u_j, _new = advance(g_j, state, c, KIND)
            tile = tl.dot(u_i, tl.trans(u_j), tile, input_precision="ieee", out_dtype=DTYPE)
            if APPLY:
                joint = tl.sum(tl.where(a != 0, a * u_i, 0.0), axis=0, keep_dims=True)
                g = tl.sum(tl.where(a != 0, a * g_i, 0.0), axis=0, keep_dims=True)
                at, valid = offsets[None, :], mask[None, :]
                move(theta, s0, s1, s2, at, valid, joint, g, state, c, lr, keep, KIND, DTYPE)
        total += tile.to(tl.float64)
    index = tl.arange(0, LENGTH)
    is_last, result = sum_up(
        partial + pair * programs * LENGTH,
        arrived + pair,
        tl.reshape(total, (LENGTH,)),
        index,
        LENGTH,
        ROWS,
    )
    if is_last:
        row = tile_i * TILE + index // TILE
        column = tile_j * TILE + index % TILE
        # Only one of the two sums of a pair is used, so that gram is symmetric bit for bit.
        lower = (row < T) & (column <= row)
        tl.store(gram + row * T + column, result, mask=lower)
        tl.store(gram + column * T + row, result, mask=lower)


def tiling_for(n_tasks: int, double: bool, with_apply: bool, n_processors: int) -> Tiling:
    """The default tiling.

    Pairs keep T (T+1) / 2 accumulators and about 2 T values a coordinate in registers, so a
    thread takes fewer coordinates the more tasks there are, and the grid holds as many programs
    as the registers leave room for.
    """
    if n_tasks > MAX_PAIRS_T:
        if double:
            return Tiling(32, programs=2 * n_processors, registers=255, flush=64, tile=16)
        tile = 16 if n_tasks <= 16 else 32 if n_tasks <= 32 else 64
        if tile == 64:
            return Tiling(64, 8, programs=n_processors, registers=255, flush=64, tile=64)
        return Tiling(64, programs=2 * n_processors, registers=255, flush=64, tile=tile)
    if n_tasks <= 2 and not with_apply:
        block = 1024
    elif n_tasks >= 7 and (with_apply or double):
        block = 256
    else:
        block = 512
    shared_by, registers = (4, 128) if n_tasks <= 3 else (2, 255)
    return Tiling(
        block // 2 if double else block,
        programs=shared_by * n_processors,
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
        **({} if tile is None else {"TILE": tile}),
    }


def _run(
    rule: Rule | None,
    step: int,
    grads: Tensor,
    state: tuple[Tensor, ...],
    gram: Tensor,
    params: Tensor | None,
    weights: Tensor | None,
    lr: float,
    weight_decay: float,
    tiling: Tiling,
) -> None:
    """Launch one pass: search, or with `params` and `weights` search and apply.

    `rule` None: u_i = g_i.
    """
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
        grads,
        *state,
        *(None,) * (3 - len(state)),
        params,
        weights,
        gram,
        partial,
        arrived,
        size,
        grads.stride(0),
        *coefficients(rule, step),
        lr,
        1.0 - lr * weight_decay,
        KIND=NO_RULE if rule is None else rule.kind,
        DTYPE=working_type(grads),
        **constants,
    )


def _default(grads: Tensor, with_apply: bool) -> Tiling:
    double = grads.element_size() == 8
    return tiling_for(len(grads), double, with_apply, processors(grads.device))


def search(
    rule: Rule,
    step: int,
    grads: Tensor,
    state: tuple[Tensor, ...],
    gram: Tensor,
    *,
    tiling: Tiling | None = None,
) -> None:
    """The contract's `search` (ops/__init__.py) with state shared by the tasks and no Clippy.

    Arguments are taken as checked. `gram` is written.
    """
    if tiling is None:
        tiling = _default(grads, with_apply=False)
    _run(rule, step, grads, state, gram, None, None, 0.0, 0.0, tiling)


def gram(grads: Tensor, gram: Tensor, *, tiling: Tiling | None = None) -> None:
    """The contract's `gram` (ops/__init__.py).

    Arguments are taken as checked. `gram` is written.
    """
    if tiling is None:
        tiling = _default(grads, with_apply=False)
    _run(None, 1, grads, (), gram, None, None, 0.0, 0.0, tiling)


def delayed(
    rule: Rule,
    step: int,
    grads: Tensor,
    state: tuple[Tensor, ...],
    params: Tensor,
    weights: Tensor,
    gram: Tensor,
    lr: float,
    weight_decay: float = 0.0,
    *,
    tiling: Tiling | None = None,
) -> None:
    """The contract's `delayed` (ops/__init__.py) with state shared by the tasks and no Clippy.

    Where one row tile cannot hold all tasks this is search, then apply: programs of other tiles
    still read what apply writes. Arguments are taken as checked; `params`, `state` and `gram` are
    written.
    """
    if tiling is None:
        tiling = _default(grads, with_apply=True)
    if tiling.tile is not None and len(grads) > tiling.tile:
        search(rule, step, grads, state, gram, tiling=tiling)
        apply(rule, step, grads, state, params, weights, lr, weight_decay)
        return
    _run(rule, step, grads, state, gram, params, weights, lr, weight_decay, tiling)

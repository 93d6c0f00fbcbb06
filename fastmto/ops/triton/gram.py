"""The Gram of the updates, the same with apply in one pass, and the Gram of the gradients
themselves, as one Triton launch each.

    u_i = rule's update of g_i with the old moments, times Clippy's sigma_i of the coordinate's
    tensor if given;  gram_ij = sum_p u_ip u_jp   (never stored: u)

`gram` is that of no rule: u_i = g_i, no state.

Floor for N state tensors: (T + N) P elements read, (T + N T) P where every task keeps its own, and
T^2 written; with apply also the P parameters read, and parameters and state written. With Adam and
float32 that is 4 (T+2) P and 4 (T+6) P bytes, or 12 T P and 4 (5 T+2) P with moments of the tasks'
own. Where P and the row strides are multiples of 16 and the buffers 16-byte aligned, float32
gradients come 16 bytes at a time; where registers leave a thread two coordinates only, 8 (with
apply from T = 7, with Clippy or moments of the tasks' own any pass from T = 6), or one, 4 (both,
T = 8). Other sizes are right, with narrower accesses. Clippy's factors come from a pass of their
own before this one (clippy.py).

Two formulations of the Gram:

    pairs   T <= 8: one accumulator a pair and lane, all in registers
    tiles   larger T: TILE x TILE blocks by `tl.dot` in full float32 (float64) precision, TF32
            off. Up to T = 64 (16 in float64) one tile holds all rows and every gradient is read
            once; above, a program serves one pair of row tiles, and with N tiles every gradient
            is read N + 1 times.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .apply import apply
from .clippy import steps_for
from .gram_kernels import gram_pairs, gram_tiles
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
from .rules import NO_RULE, is_per_task, streams

#: Largest T of the pairs formulation.
MAX_PAIRS_T = 8
#: Numbers the last program adds up at a time: 32 a thread of four warps.
MAX_SUMMED = 4096


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
    """Launch one pass: the Gram, or with `params` and `weights` apply too."""
    n_tasks, size = grads.shape
    constants = constants_for(tiling, n_tasks, params is not None)
    programs = programs_for(size, tiling)
    n_tiles = 1 if tiling.tile is None else -(-n_tasks // tiling.tile)
    n_pairs = n_tiles * (n_tiles + 1) // 2
    partial, arrived = workspace(grads.device, n_pairs * programs * constants["LENGTH"], n_pairs)
    launch(
        gram_pairs if tiling.tile is None else gram_tiles,
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


def update_gram(
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
    """The contract's `update_gram` (ops/__init__.py), with the factors `sigma` made before.

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


def apply_and_gram(
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
    """The contract's `apply_and_gram` (ops/__init__.py), with the factors `sigma` made before.

    Where one row tile cannot hold all tasks this is `update_gram`, then `apply`: programs of other
    tiles still read what apply writes; so it is with more than 32 tasks and moments of their own,
    for which a program has too few registers. Arguments are taken as checked; `params`, `state`
    and `gram` are written.
    """
    used = _default(grads, state, True, sigma) if tiling is None else tiling
    n_tasks = grads.shape[0]
    tile = used.tile or n_tasks
    rows, moved = (kind, numbers, grads, state), (params, weights)
    if n_tasks > tile or (tile > 32 and is_per_task(state)):
        update_gram(*rows, gram, segments=segments, sigma=sigma, tiling=tiling)
        apply(*rows, *moved, segments=segments, sigma=sigma, skip=skip)
        return
    _run(*rows, gram, *moved, segments=segments, sigma=sigma, skip=skip, tiling=used)

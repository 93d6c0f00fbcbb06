"""What steers a step on the device, so that the host need not read it: the step's constants, the
count of steps and the check.

    step_constants  t_r = counts_r + 1;  c1 = 1 / (1 - b1^t),  c2 = 1 / sqrt(1 - b2^t)   (rules.py)
    count_step      counts_r += 1, if the step was made
    check    found <- 1 if any |g_ip| is not below the limit

The first two are one program each. Check reads T P elements and writes none where all is well:
16-byte loads when P and the row stride are multiples of 16 and the buffer is 16-byte aligned.

1 - b^t is formed from 1 - b by doubling t, 1 - b^2n = (1 - b^n) (2 - (1 - b^n)): every term is
positive, so nothing cancels and its relative error is a few roundings, while that of 1 - b**t is
eps / (1 - b^t). Only float64 products and sums are used, none contracted: the bits are the same on
every GPU.
"""

# Triton's language is not Python's: kernels carry no types for mypy.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...optim.rules import Hyper, Numbers
from .launch import Tiling, launch, programs_for, working_type

N_HYPER = tl.constexpr(len(Hyper._fields))
N_NUMBERS = tl.constexpr(len(Numbers._fields))
#: Rows that they take at a time.
LANES = Tiling(32, warps=1, fuse=False)


@triton.jit
def complement(b, t):
    """1 - b^t for b in [0, 1], t >= 0, elementwise (LANES,)."""
    power = 1.0 - b  # 1 - b^(2^k)
    whole = b * 0.0  # 1 - b^(the k lowest bits of t)
    left = t
    most = tl.max(t, axis=0)
    while most > 0:
        # 1 - (1 - x) (1 - y) = x + y (1 - x)
        whole = tl.where((left & 1) != 0, whole + power * (1.0 - whole), whole)
        power = power * (2.0 - power)
        left = left >> 1
        most = most >> 1
    return whole


@triton.jit(do_not_specialize=["R"])
def step_constants_kernel(
    hyper,  # (R, N_HYPER) float64
    counts,  # (R,) int64
    active,  # (R,) int32
    numbers,  # (R, N_NUMBERS) float64
    found,  # (1,) int32
    R: tl.int32,
    BLOCK: tl.constexpr,
):
    for first in range(0, R, BLOCK):
        r = first + tl.arange(0, BLOCK)
        inside = r < R
        takes_part = tl.load(active + r, mask=inside, other=0) != 0
        t = tl.where(takes_part, tl.load(counts + r, mask=inside, other=0) + 1, 0)
        row = hyper + r * N_HYPER
        b1 = tl.load(row, mask=takes_part, other=0.0)
        b2 = tl.load(row + 1, mask=takes_part, other=0.0)
        eps = tl.load(row + 2, mask=takes_part, other=0.0)
        mu = tl.load(row + 3, mask=takes_part, other=0.0)
        corrected = tl.load(row + 4, mask=takes_part, other=0.0) != 0.0
        lr = tl.load(row + 5, mask=takes_part, other=0.0)
        weight_decay = tl.load(row + 6, mask=takes_part, other=0.0)
        one = tl.where(takes_part, 1.0, b1 * 0.0)
        # Where it is not asked for 1 - b2^t may be 0.
        c1 = tl.where(corrected, one / tl.where(corrected, complement(b1, t), 1.0), 0.0)
        c2 = tl.where(corrected, one / tl.sqrt(tl.where(corrected, complement(b2, t), 1.0)), 0.0)
        to = numbers + r * N_NUMBERS
        tl.store(to, b1, mask=inside)
        tl.store(to + 1, one - b1, mask=inside)
        tl.store(to + 2, b2, mask=inside)
        tl.store(to + 3, one - b2, mask=inside)
        tl.store(to + 4, c1, mask=inside)
        tl.store(to + 5, c2, mask=inside)
        tl.store(to + 6, eps, mask=inside)
        tl.store(to + 7, mu, mask=inside)
        tl.store(to + 8, lr, mask=inside)
        tl.store(to + 9, lr * weight_decay, mask=inside)
        tl.store(to + 10, one, mask=inside)
    tl.store(found, 0)


@triton.jit(do_not_specialize=["R"])
def count_step_kernel(
    counts,  # (R,) int64
    active,  # (R,) int32
    found,  # (1,) int32
    tally,  # (2,) int64: steps made, steps skipped
    R: tl.int32,
    BLOCK: tl.constexpr,
):
    skipped = (tl.load(found) != 0).to(tl.int32)
    for first in range(0, R, BLOCK):
        r = first + tl.arange(0, BLOCK)
        inside = r < R
        made = inside & (tl.load(active + r, mask=inside, other=0) != 0) & (skipped == 0)
        tl.store(counts + r, tl.load(counts + r, mask=made, other=0) + 1, mask=made)
    tl.store(tally + skipped, tl.load(tally + skipped) + 1)


@triton.jit
def check_kernel(
    grads,  # (T, P), rows `stride` apart
    found,  # (1,) int32
    P: tl.int64,
    stride: tl.int64,
    LIMIT: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = grads + tl.program_id(1).to(tl.int64) * stride
    g = tl.load(row + offsets, mask=offsets < P, other=0.0).to(DTYPE)
    # NaN is not below anything.
    fine = tl.abs(g) < tl.full((), LIMIT, DTYPE)
    if tl.min(fine.to(tl.int32), axis=0) == 0:
        # Many programs may come here: all write the same.
        tl.store(found, 1)


def step_constants(
    hyper: Tensor, counts: Tensor, active: Tensor, numbers: Tensor, found: Tensor
) -> None:
    """The contract's `step_constants` (ops/__init__.py). Arguments are taken as checked; `numbers`
    and `found` are written."""
    launch(
        step_constants_kernel,
        (1,),
        hyper.device,
        LANES,
        hyper,
        counts,
        active,
        numbers,
        found,
        counts.shape[0],
        BLOCK=LANES.block,
    )


def count_step(counts: Tensor, active: Tensor, found: Tensor, tally: Tensor) -> None:
    """The contract's `count_step` (ops/__init__.py). Arguments are taken as checked; `counts` and
    `tally` are written."""
    launch(
        count_step_kernel,
        (1,),
        counts.device,
        LANES,
        counts,
        active,
        found,
        tally,
        counts.shape[0],
        BLOCK=LANES.block,
    )


def tiling_for(element_size: int) -> Tiling:
    """128 bytes of a row a thread: eight 16-byte loads under way."""
    return Tiling(16384 // element_size)


def check(grads: Tensor, found: Tensor, *, tiling: Tiling | None = None) -> None:
    """The contract's `check` (ops/__init__.py). Arguments are taken as checked; `found` is
    written."""
    n_tasks, size = grads.shape
    if size == 0:
        return
    if tiling is None:
        tiling = tiling_for(grads.element_size())
    launch(
        check_kernel,
        (programs_for(size, tiling), n_tasks),
        grads.device,
        tiling,
        grads,
        found,
        size,
        grads.stride(0),
        LIMIT=2.0**511 if grads.dtype == torch.float64 else 2.0**63,
        DTYPE=working_type(grads),
        BLOCK=tiling.block,
    )

"""What the small solvers on the device share: the checks of a Gram matrix and one sweep.

A solver is one program. T tasks are padded to TP = 16, 32 or 64; matrices (TP, TP) and vectors
(TP,) stay in its registers, in float64 throughout: what is solved may be as ill-conditioned as
float64 can tell, and the time is that of exchanges between threads, not of the arithmetic, which
data-center GPUs (sm_80, sm_90, sm_100) do at half the rate of float32; on others, with 1/64 of it,
it is right and slow. Matrices are symmetric, so every sum over one runs over axis 0: there a thread
adds its own registers.
"""

# Triton's language is not Python's: kernels carry no types for mypy.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...solvers import STATUSES
from .launch import Tiling, launch

#: Most tasks a program takes.
MAX_TASKS = 64

#: The number of a status in `info`: its place in fastmto.solvers.STATUSES.
SOLVED = tl.constexpr(STATUSES.index("solved"))
NOT_FINITE = tl.constexpr(STATUSES.index("not_finite"))
NOT_SYMMETRIC = tl.constexpr(STATUSES.index("not_symmetric"))
ZERO_UPDATE = tl.constexpr(STATUSES.index("zero_update"))
NOT_PSD = tl.constexpr(STATUSES.index("not_psd"))
NEAR_STATIONARY = tl.constexpr(STATUSES.index("near_stationary"))
MAX_ITERATIONS = tl.constexpr(STATUSES.index("max_iterations"))
#: No status yet.
RUNNING = tl.constexpr(-1)

EPS = tl.constexpr(2.0**-52)
#: Smallest normal and largest float64.
TINY = tl.constexpr(2.0**-1022)
HUGE = tl.constexpr((2.0 - 2.0**-52) * 2.0**1023)
#: A float32 Gram matrix can put the cosine of two equal updates this far above 1.
COSINE_SLACK = tl.constexpr(1e-3)
#: Relative to the lengths; float32 matrix products are symmetric to about 1e-6.
ASYMMETRY = tl.constexpr(1e-5)


@triton.jit
def take_apart(gram, tasks, TP: tl.constexpr, ZEROS: tl.constexpr):
    """Status, lengths (TP,) and cosines (TP, TP) of a Gram matrix (tasks, tasks).

    The status is RUNNING, or what csrc/solvers/gram.h names; the others mean nothing then. The
    halves are averaged. Cosines of a task with itself are 1, padding included, which is tied to
    nothing. With ZEROS updates of length zero are allowed: length and cosines with others 0.
    """
    i = tl.arange(0, TP)
    # Loaded as vectors: loads of rows and of columns would not agree on which thread holds what,
    # and the sums over axis 0 would cross threads.
    flat = tl.arange(0, TP * TP)
    row, column = flat // TP, flat % TP
    inside = (row < tasks) & (column < tasks)
    g = tl.reshape(tl.load(gram + row * tasks + column, mask=inside, other=0.0), (TP, TP))
    h = tl.reshape(tl.load(gram + column * tasks + row, mask=inside, other=0.0), (TP, TP))
    d = tl.load(gram + i * (tasks + 1), mask=i < tasks, other=1.0)
    is_zero = tl.abs(d) < TINY
    # A zero update counts as one of the largest length that is zero.
    floor = tl.sqrt(tl.minimum(tl.maximum(d, TINY), HUGE))
    lengths = floor[:, None] * floor[None, :]
    # The order in which a matrix with several defects is named.
    rank = tl.where(tl.abs(0.5 * g + 0.5 * h) <= lengths * (1.0 + COSINE_SLACK), 0, 1)
    rank = tl.where(tl.abs(g - h) <= lengths * ASYMMETRY, rank, 2)
    rank = tl.where(tl.abs(g) <= HUGE, rank, 5)
    of_task = tl.where(d <= -TINY, 3, 0)
    if not ZEROS:
        of_task = tl.where(is_zero, 4, of_task)
    worst = tl.maximum(tl.max(tl.max(rank, axis=0), axis=0), tl.max(of_task, axis=0))
    status = tl.where(worst == 0, RUNNING, NOT_PSD)
    status = tl.where(worst == 5, NOT_FINITE, status)
    status = tl.where(worst == 4, ZERO_UPDATE, status)
    status = tl.where(worst == 2, NOT_SYMMETRIC, status)
    length = tl.where(is_zero, 0.0, floor)
    s = tl.where(is_zero, 0.0, 1.0 / floor)
    # One factor at a time: the product of two may overflow.
    c = (0.5 * g + 0.5 * h) * s[:, None] * s[None, :]
    return status, length, tl.where(i[:, None] == i[None, :], 1.0, c)


@triton.jit
def row(a, k, index):
    """Row k of a (TP, TP) as (TP,)."""
    return tl.sum(tl.where(index[:, None] == k, a, 0.0), axis=0)


@triton.jit
def at(vector, k, index):
    """(TP,) of vector[k]: one exchange between threads, where a sum would take several."""
    return tl.gather(vector, index * 0 + k, 0)


@triton.jit
def sweep(a, v, k, inverse, index):
    """The sweep of a symmetric matrix on task k: v (TP,) its row k, inverse (TP,) of 1 / v_k.

    a_ij - v_i v_j / v_k, in row and column k v / v_k, and -1 / v_k where they cross. Swept on the
    tasks S, a holds -A_SS^-1, A_NS A_SS^-1 and the Schur complement A_NN - A_NS A_SS^-1 A_SN.
    """
    v = tl.where(index == k, -1.0, v)
    cross = (index[:, None] == k) | (index[None, :] == k)
    # The rows' factor waits for an exchange between threads, the columns' for the division.
    return tl.where(cross, 0.0, a) - v[:, None] * (v * inverse)[None, :]


@triton.jit
def report(info, status, iterations, residual, kappa):
    """Write info (4,)."""
    tl.store(info, status.to(tl.float64))
    tl.store(info + 1, iterations.to(tl.float64))
    tl.store(info + 2, residual)
    tl.store(info + 3, kappa)


def run(kernel: Any, gram: Tensor, weights: Tensor, info: Tensor, *args: Any) -> None:
    """Launch a solver on a Gram matrix (T, T), in the smallest size that holds it.

    Raises:
        ValueError: T above MAX_TASKS.
    """
    tasks = len(gram)
    if not 1 <= tasks <= MAX_TASKS:
        raise ValueError(f"gram must have 1 to {MAX_TASKS} tasks, got {tasks}")
    size = 16 if tasks <= 16 else 32 if tasks <= 32 else 64
    # Up to 32 tasks one warp: nothing but its own lanes is waited for.
    tiling = Tiling(size, warps=8 if size == 64 else 1)
    launch(kernel, (1,), gram.device, tiling, gram, weights, info, tasks, *args, TP=size)

"""MGDA's weights where the Gram matrix lies, as one Triton program.

    minimise w'G w   subject to   w >= 0, sum w = 1

Source: Desideri, C. R. Acad. Sci. 350 (2012); Sener & Koltun, arXiv 1810.04650, equation 4.

With the cosines C, x_i = w_i |g_i| up to a factor and b_i = min |g| / |g_i| this is

    minimise x'H x / 2 - b'x,   x >= 0,   H = C + b b'

(at x = tau v with b'v = 1 the least value over tau is -1/2 / (v'C v + 1)): bounded wherever 0 is,
and singular only where gradients are affinely dependent. It is the (G + s 11') of Wolfe's method
(Math. Programming 11, 1976) in units in which lengths of any spread cost no accuracy.

Active sets as Lawson & Hanson (1974, chapter 23), of which csrc/solvers/active_set.h has the rules:
the task with the largest gain enters; where that makes the minimiser on the set leave the orthant,
x stops at its border and the task there leaves. H is swept on the set, one sweep a task that
enters; when one leaves all sweeps are made anew, the largest pivot first, as undoing a sweep on a
small pivot would leave nothing but rounding. One step of refinement follows each solve.

The value w'G w is right to rounding, eps (sum_i w_i |g_i|)^2. Near Pareto stationarity it is that
small and says no more whether a step was one forwards; the conditions for a minimum still do.

All loops are bounded and end as soon as they may: which steps are made depends on the Gram matrix
only, nothing waits for the host, and the same input gives the same bits.
"""

# Triton's language is not Python's: kernels carry no types for mypy.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .small import (
    EPS,
    HUGE,
    MAX_ITERATIONS,
    NOT_PSD,
    RUNNING,
    SOLVED,
    report,
    row,
    run,
    sweep,
    take_apart,
)

#: Sweeps at most, for each task of the padded problem.
MAX_SWEEPS = tl.constexpr(64)
#: Steps that gain nothing before rounding is blamed.
PATIENCE = tl.constexpr(4)
#: A pivot below this times the order times the level of rounding is none.
DEPENDENT = tl.constexpr(16.0)
#: Indefiniteness beyond this is not rounding, not even that of a float32 Gram matrix.
INDEFINITE = tl.constexpr(1e-3)
#: Residual with which the bound of the loop may be reached.
ACCEPTED = tl.constexpr(1e-8)


@triton.jit
def product(matrix, vector):
    """matrix @ vector for a symmetric matrix."""
    return tl.sum(matrix * vector[:, None], axis=0)


@triton.jit
def violation(x, r, inside):
    """Largest violation of r <= 0 (= 0 where x > 0), relative to sum x."""
    worst = tl.max(tl.where(inside, tl.where(x > 0.0, tl.abs(r), r), 0.0), axis=0)
    total = tl.sum(x, axis=0)
    return tl.maximum(worst, 0.0) / tl.where(total > 0.0, total, 1.0)


@triton.jit
def of_two(gram, length, c, index):
    """The closed form: w ~ (b (b - cosine a), a (a - cosine b)), a and b the two lengths."""
    d = tl.load(gram + 3 - 3 * index, mask=index < 2, other=1.0)
    longest = tl.max(length, axis=0)
    own = length / longest
    other = tl.sqrt(tl.abs(d)) / longest
    cosine = tl.sum(tl.where(index[:, None] != index[None, :], c, 0.0), axis=0)
    w = tl.where(index < 2, tl.maximum(other * (other - cosine * own), 0.0), 0.0)
    whole = tl.sum(w, axis=0)
    even = tl.where(index < 2, w + 0.5, 0.0)
    return tl.where(whole > 0.0, w / tl.where(whole > 0.0, whole, 1.0), even)


@triton.jit(do_not_specialize=["tasks"])
def mgda_kernel(
    gram,  # (T, T) float64
    weights,  # (T,) float64
    info,  # (4,) float64
    tasks,  # T
    TP: tl.constexpr,
):
    i = tl.arange(0, TP)
    inside = i < tasks
    status, length, c = take_apart(gram, tasks, TP, ZEROS=True)
    positive = inside & (length > 0.0)
    zeros = tl.sum((inside & (length == 0.0)).to(tl.int32), axis=0)
    w = tl.where(inside & (length == 0.0), 1.0 / tl.maximum(zeros, 1).to(tl.float64), 0.0)
    status = tl.where((status == RUNNING) & (zeros > 0), SOLVED, status)
    if (status == RUNNING) & (tasks == 2):
        w = of_two(gram, length, c, i)
        status = tl.where(status == RUNNING, SOLVED, status)
    shortest = tl.min(tl.where(positive, length, HUGE), axis=0)
    b = tl.where(positive, shortest / tl.where(positive, length, 1.0), 0.0)
    h = c + b[:, None] * b[None, :]

    nothing = b * 0.0
    one = tl.full((), 1.0, tl.float64)
    a, pivots = h, 1.0 + b * b  # h swept on the tasks `swept`, and its diagonal
    members = i < 0
    swept = i < 0
    held = i < 0  # tasks that rounding keeps out
    entered = -1
    ridge = nothing  # what a dependent task has on its diagonal
    x, r = nothing, b
    level = one * EPS  # relative error of C
    reached = one * -HUGE  # b'x
    residual = one * 0.0
    sweeps = tl.full((), 0, tl.int32)
    stalled = sweeps
    while status == RUNNING:
        missing = members & (swept == 0)
        n_missing = tl.sum(missing.to(tl.int32), axis=0)
        n_swept = tl.sum(swept.to(tl.int32), axis=0)
        if n_missing > 0:
            candidates = tl.where(missing, pivots, -HUGE)
            # The largest pivot first; the task that enters comes last by itself.
            k = tl.argmax(candidates, axis=0)
            d = tl.max(candidates, axis=0)
            order = (n_swept + 1).to(tl.float64)
            if d < -(level * order * DEPENDENT):
                # C is not known better than this.
                level = -d / order
                status = tl.where(d < -INDEFINITE, NOT_PSD, status)
            own = tl.maximum(d, level * order * DEPENDENT)
            v = row(a, k, i)
            inverse = nothing + 1.0 / own
            a = sweep(a, v, k, inverse, i)
            pivots = tl.where(i == k, pivots, pivots - v * v * inverse)
            ridge = tl.where(i == k, own - d, ridge)
            swept = swept | (i == k)
            sweeps += 1
        if (n_missing <= 1) & (status == RUNNING):
            size = tl.sum(members.to(tl.int32), axis=0)
            z = tl.where(members, -product(a, tl.where(members, b, 0.0)), 0.0)
            rest = tl.where(members, b - product(h, z) - ridge * z, 0.0)
            z = tl.where(members, z - product(a, rest), 0.0)
            blocking = members & (z <= 0.0)
            n_blocking = tl.sum(blocking.to(tl.int32), axis=0)
            # Solved exactly the task that entered is positive: what let it in was rounding.
            refused = tl.sum((blocking & (i == entered)).to(tl.int32), axis=0) > 0
            leaving = members & (i == entered) & refused
            held = held | leaving
            if (n_blocking > 0) & (refused == 0):
                gap = tl.where(blocking, x - z, 1.0)
                reach = tl.where(blocking & (x > 0.0), x / tl.where(gap > 0.0, gap, 1.0), 0.0)
                reach = tl.where(blocking, reach, 2.0)
                part = tl.minimum(tl.min(reach, axis=0), 1.0)
                x = tl.where(members, x + part * (z - x), 0.0)
                leaving = members & ((i == tl.argmin(reach, axis=0)) | (x <= 0.0))
                x = tl.where(leaving, 0.0, x)
            entered = -1
            n_leaving = tl.sum(leaving.to(tl.int32), axis=0)
            if n_blocking == 0:
                x = z
                r = b - product(h, x)
                held = i < 0
                gain = tl.sum(x * b, axis=0)
                worst = violation(x, r, inside)
                # The value, or else the largest violation: what neither improves is rounding.
                stalled = tl.where(
                    (gain <= reached) & (worst >= residual) & (size > 0), stalled + 1, 0
                )
                status = tl.where(stalled == PATIENCE, SOLVED, status)
                reached = tl.maximum(gain, reached)
                residual = tl.where(stalled == 0, worst, residual)
            members = members & (leaving == 0)
            if (n_blocking == 0) | refused:
                noise = (b + tl.sum(x, axis=0)) * level * (8 + size).to(tl.float64)
                eligible = positive & (members == 0) & (held == 0) & (r > noise)
                gains = tl.where(eligible, r, 0.0)
                entered = tl.argmax(gains, axis=0)
                optimal = tl.max(gains, axis=0) <= 0.0
                status = tl.where(optimal, SOLVED, status)
                members = members | ((i == entered) & (status == RUNNING))
            if n_leaving > 0:
                a, pivots = h, 1.0 + b * b
                ridge = nothing
                swept = i < 0
        if (sweeps >= MAX_SWEEPS * TP) & (status == RUNNING):
            status = tl.where(status == RUNNING, MAX_ITERATIONS, status)

    if sweeps > 0:
        residual = violation(x, b - product(h, x), inside)
        square = tl.sum(x * (product(h, x) - b * tl.sum(b * x, axis=0)), axis=0)
        negative = square < tl.sum(x * x, axis=0) * (-INDEFINITE)
        status = tl.where((status == SOLVED) & negative, NOT_PSD, status)
        fine = (status == MAX_ITERATIONS) & (residual <= ACCEPTED) & (tl.sum(x, axis=0) > 0.0)
        status = tl.where(fine, SOLVED, status)
        w = x * b
        w = w / tl.sum(w, axis=0)
    tl.store(weights + i, w, mask=inside & (status == SOLVED))
    report(info, status, sweeps, residual, one * 0.0)


def mgda(gram: Tensor, weights: Tensor, info: Tensor) -> None:
    """`fastmto.solvers.mgda` on the device of gram; nothing is read there.

    A Gram matrix that float32 rounding made indefinite (rank far below T) can be solved here where
    the host, which takes the tasks in another order, meets a negative direction: not_psd.

    Args:
        gram: (T, T) float64, contiguous, T <= 64. Not modified.
        weights: (T,) float64, contiguous; written if and only if the status is "solved".
        info: (4,) float64, contiguous; written: number of the status in
            `fastmto.solvers.STATUSES`, sweeps, residual, 0.
        Arguments but for T are taken as checked.

    Raises:
        ValueError: T above 64.
    """
    run(mgda_kernel, gram, weights, info)

"""The exact bargaining solution where the Gram matrix lies, as one Triton program.

    a_i (G a)_i = p_i,   a > 0

Source: Nash-MTL, arXiv 2202.01017, Claim 3.1; PUB, arXiv 2410.05806, Claim 1.

The method of csrc/solvers/bargaining.cpp: damped Newton on the correlation matrix C. With
y = a |u|, scaled so that y'C y = T, r = p - y .* C y and M = diag(y) C diag(y):

    (diag(p) + M) z = r;   y <- y .* (1 + t z)

t = 1 near the solution, else from a line search. Instead of a Cholesky factor there is the inverse
of diag(p) + M, by one sweep a task without pivoting: its eigenvalues are at least min p where C is
positive semidefinite. The next step takes the inverse again where it is nearly right.

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
    NEAR_STATIONARY,
    NOT_PSD,
    RUNNING,
    SOLVED,
    at,
    report,
    row,
    run,
    sweep,
    take_apart,
)

#: Bounds of the loops.
MAX_NEWTON = tl.constexpr(100)
MAX_LINE_SEARCH = tl.constexpr(40)


@triton.jit
def line_search(p, z, z_min, alpha, beta, decrement):
    """Minimiser of t -> f(y (1 + t z)) on t > 0, 1 + t z > 0, by Newton in a shrinking bracket.

    f' = alpha t + beta - sum_i p_i z_i / (1 + t z_i);  f'(0) = -decrement < 0.
    """
    low = decrement * 0.0
    high = tl.where(z_min < 0.0, -1.0 / tl.minimum(z_min, -1e-300), HUGE)
    t = tl.minimum(1.0 / (1.0 + tl.sqrt(decrement)), 0.5 * high)
    turn = 0
    while turn < MAX_LINE_SEARCH:
        q = z / (1.0 + t * z)
        slope = alpha * t + beta - tl.sum(p * q, axis=0)
        curvature = tl.maximum(alpha, 0.0) + tl.sum(p * q * q, axis=0)
        turn += 1
        if tl.abs(slope) > 0.02 * decrement:
            low = tl.where(slope < 0.0, t, low)
            high = tl.where(slope < 0.0, high, t)
            following = t - slope / curvature
            following = tl.where(following > low, following, 0.5 * (low + t))
            bounded = tl.where(high < HUGE, 0.5 * t + 0.5 * high, 2.0 * t)
            t = tl.where(following < high, following, bounded)
        else:
            turn = MAX_LINE_SEARCH
    return t


@triton.jit
def eliminate(a, lowest, k, index):
    """`a` swept on k, and the elementwise minimum of `lowest` (TP,) and the pivot."""
    v = row(a, k, index)
    d = at(v, k, index)
    inverse = tl.where(d > 0.0, 1.0 / tl.where(d > 0.0, d, 1.0), 0.0)
    return sweep(a, v, k, inverse, index), tl.minimum(lowest, d)


@triton.jit(do_not_specialize=["tasks"])
def bargaining_kernel(
    gram,  # (T, T) float64
    weights,  # (T,) float64
    info,  # (4,) float64
    tasks,  # T
    preference,  # (T,) float64 or None
    tol: tl.float64,
    ridge: tl.float64,
    TP: tl.constexpr,
):
    i = tl.arange(0, TP)
    inside = i < tasks
    status, length, c = take_apart(gram, tasks, TP, ZEROS=False)
    diagonal = i[:, None] == i[None, :]
    c = tl.where(diagonal, c + ridge, c)
    y = tl.where(inside, 1.0, tl.zeros((TP,), tl.float64))
    if preference is None:
        p = y
        p_scale = tl.full((), 1.0, tl.float64)
    else:
        # In units of the largest: finite whatever the preferences.
        p = tl.load(preference + i, mask=inside, other=0.0)
        peak = tl.max(p, axis=0)
        p = p / peak
        mean = tl.sum(p, axis=0) / tasks
        p = p / mean
        p_scale = peak * mean
    p_inverse = tl.where(inside, 1.0 / tl.where(inside, p, 1.0), 0.0)
    # In place of p on the diagonal: padding has its own equation, with the answer 0.
    p_padded = tl.where(inside, p, 1.0)
    a = c
    one = tl.full((), 1.0, tl.float64)
    residual, kappa = one * 0.0, one * 0.0
    previous, last_move = one * HUGE, one * HUGE
    steps = tl.full((), 0, tl.int32)
    iterations = steps
    while status == RUNNING:
        w = y * tl.sum(c * y[:, None], axis=0)
        q = tl.sum(w, axis=0)
        y_sum = tl.sum(y, axis=0)
        # q = |sum y_i u_i / |u_i||^2 is known to within eps y_sum^2.
        indefinite = q < y_sum * y_sum * (-64.0 * EPS)
        # sqrt(T) / y_sum, scaled, bounds the distance of 0 from the hull of the unit updates.
        resolved = (q > 0.0) & (y_sum * y_sum * tasks * (8.0 * EPS) <= q)
        status = tl.where(resolved, status, tl.where(indefinite, NOT_PSD, NEAR_STATIONARY))
        ray2 = tasks / tl.where(resolved, q, 1.0)
        ray = tl.sqrt(ray2)
        y = y * ray
        w = w * ray2
        r = p - w
        if resolved:
            iterations = steps
            residual = tl.max(tl.abs(r) * p_inverse, axis=0)
            kappa = tl.max(y * p_inverse, axis=0) * (y_sum * ray)
            status = tl.where(steps == MAX_NEWTON, MAX_ITERATIONS, status)
            status = tl.where(residual <= tl.maximum(tol, kappa * (4.0 * EPS)), SOLVED, status)
        if status == RUNNING:
            # While the last inverse is nearly right, a step with it costs a fraction of a new one.
            reuse = (last_move < 1e-3) & (residual < 0.1 * previous)
            previous = residual
            definite = True
            if not reuse:
                a = c * y[:, None] * y[None, :]
                a = tl.where(diagonal, a + p_padded[:, None], a)
                lowest = p_padded
                if TP <= 32:
                    # One warp: a row known at compile time costs nothing to pick.
                    for k in tl.static_range(TP):
                        if k < tasks:
                            a, lowest = eliminate(a, lowest, k, i)
                else:
                    for k in range(tasks):
                        a, lowest = eliminate(a, lowest, k, i)
                definite = tl.min(lowest, axis=0) > 0.0
            z = -tl.sum(a * r[:, None], axis=0)
            z = tl.where(inside, z, 0.0)
            decrement = tl.sum(z * r, axis=0)
            z_min = tl.min(z, axis=0)
            t = one
            if (decrement >= 1e-2) | (z_min <= -0.5):
                definite = definite & (decrement > 0.0)
                if definite:
                    alpha = tl.sum(z * (r - p * z), axis=0)
                    beta = tl.sum(z * w, axis=0)
                    t = line_search(p, z, z_min, alpha, beta, decrement)
            if not reuse:
                last_move = tl.where(t == 1.0, tl.max(tl.abs(z), axis=0), HUGE)
            status = tl.where(definite, status, NOT_PSD)
            y = y * (1.0 + t * z)
            steps += 1
    length = tl.where(length > 0.0, length, 1.0)
    tl.store(weights + i, y / length * tl.sqrt(p_scale), mask=inside & (status == SOLVED))
    report(info, status, iterations, residual, kappa)


def bargaining(
    gram: Tensor,
    weights: Tensor,
    info: Tensor,
    *,
    preference: Tensor | None = None,
    tol: float = 1e-13,
    ridge: float = 0.0,
) -> None:
    """`fastmto.solvers.bargaining(gram, "exact")` on the device of gram; nothing is read there.

    Args:
        gram: (T, T) float64, contiguous, T <= 64. Not modified.
        weights: (T,) float64, contiguous; written if and only if the status is "solved".
        info: (4,) float64, contiguous; written: number of the status in
            `fastmto.solvers.STATUSES`, Newton steps, residual, kappa.
        preference: (T,) float64, contiguous, positive; None for 1 each.
        tol: largest residual; what rounding allows, 4 eps kappa, is added where that is more.
        ridge: G + ridge diag(G) takes the place of G.
        Arguments but for T are taken as checked.

    Raises:
        ValueError: T above 64.
    """
    run(bargaining_kernel, gram, weights, info, preference, tol, ridge)

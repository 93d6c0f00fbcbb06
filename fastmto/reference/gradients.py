"""Every gradient method on explicit gradients, in float64 and its paper's notation: the judge.

Gradients (T, P) in, direction (P,) out: one row g_i a task, rules written down as the papers state
them, by enumeration where that is exact. Slow (exponential in T for MGDA, CAGrad, UPGrad and
DualProj), plain, and sharing nothing with the solvers on the Gram matrix; in one file beside each
other, though it has more than 400 lines. For gradients that have an answer: there are no statuses
here.

Relatives of the fast path: `fastmto.weightings` (weights whose sum_i w_i g_i is the direction) and
`fastmto.balancers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


# Min-norm points and what is built on them.


def min_norm_point(points: Array) -> tuple[Array, Array]:
    """The shortest convex combination of the rows, by trying every support.

    For a support S the shortest point of the affine hull of its rows; where one of its weights
    is negative it is cut to 0, which leaves a convex combination, if not a good one.

    Args:
        points: (T, P).

    Returns:
        w (T,) on the simplex and w @ points (P,).
    """
    best_w, best = np.full(len(points), np.nan), np.full(points.shape[1], np.inf)
    for support in _supports(len(points)):
        w = np.zeros(len(points))
        w[support] = _shortest_affine(points[support]).clip(min=0.0)
        w /= w.sum()
        point = w @ points
        if point @ point < best @ best or np.isnan(best_w).any():
            best_w, best = w, point
    return best_w, best


def mgda(grads: Array) -> Array:
    """min ||sum_i w_i g_i||  s.t.  w >= 0, sum_i w_i = 1.

    Sener and Koltun, arXiv 1810.04650, equation 3 (Désidéri 2012).
    """
    return min_norm_point(grads)[1]


def normalised_mgda(grads: Array, losses: Array, normalization: str) -> Array:
    """sum_i w_i g_i with the w of MGDA on g_i / c_i.

    Code of Sener and Koltun: c_i is 1 ("none"), ||g_i|| ("l2"), the loss L_i ("loss"), or
    L_i ||g_i|| ("loss+"); w then weighs the losses as they are.
    """
    lengths = np.linalg.norm(grads, axis=1)
    c = {
        "none": np.ones(len(grads)),
        "l2": lengths,
        "loss": losses,
        "loss+": losses * lengths,
    }[normalization]
    w, _ = min_norm_point(grads / c[:, None])
    direction: Array = w @ grads
    return direction


def cagrad(grads: Array, c: float = 0.4, rescale: int = 0) -> Array:
    """max_d min_i <g_i, d>  s.t.  ||d - g_0|| <= c ||g_0||,  g_0 the mean of the gradients.

    Liu et al., arXiv 2110.14048, by the dual of its Algorithm 1: w minimises
    <g_w, g_0> + kappa ||g_w|| over the simplex, kappa = c ||g_0||, and
    d = g_0 + kappa g_w / ||g_w||. As kappa ||g_w|| = min_u (||g_w||^2 / u + kappa^2 u) / 2, the w
    of a fixed u > 0 is that of the min-norm point of the g_i + u g_0, and u is right where
    ||g_w|| = kappa u. At Pareto stationarity there may be none (g_w = 0): then no d gains more
    than 0 for all tasks, several gain 0, and the answer is the one of these nearest to g_0.

    `rescale`: the code's division of d by 1 + c^2 (1) or 1 + c (2).
    """
    g_0 = grads.mean(axis=0)
    kappa = c * float(np.linalg.norm(g_0))
    divisor = (1.0, 1.0 + c * c, 1.0 + c)[rescale]
    if kappa == 0.0:
        mean: Array = g_0 / divisor
        return mean
    w, shortest = min_norm_point(grads)
    lengths = np.linalg.norm(grads, axis=1)
    least, terms = float(np.linalg.norm(shortest)), float(w @ lengths)
    if least <= 1e-12 * terms:
        without_loss = dual_proj(grads)
        if np.linalg.norm(without_loss - g_0) <= kappa:
            nearest: Array = without_loss / divisor
            return nearest
        least = 1e-8 * terms  # ||g_w|| = kappa u has its root far from where g_w is only rounding

    def g_w(u: float) -> Array:
        w, _ = min_norm_point(grads + u * g_0)
        combined: Array = w @ grads
        return combined

    def excess(log_u: float) -> float:
        return float(np.log(np.linalg.norm(g_w(np.exp(log_u))) / kappa) - log_u)

    u = float(np.exp(_root(excess, np.log(least / kappa), np.log(lengths.max() / kappa))))
    direction: Array = (g_0 + g_w(u) / u) / divisor
    return direction


# Projections.


def project_on_dual_cone(x: Array, grads: Array) -> Array:
    """argmin_y ||y - x||  s.t.  <g_i, y> >= 0 for all i, by trying every active set.

    For an active set S, y is x without its part in the span of the g_i in S; y = x + sum_i
    lambda_i g_i is the projection where all <g_i, y> and all lambda_i are >= 0. Returned is the
    candidate that violates this least (rounding).
    """
    lengths = np.linalg.norm(grads, axis=1)
    units = grads[lengths > 0] / lengths[lengths > 0, None]  # a zero gradient asks for nothing
    best, least = x, -min((units @ x).min(initial=0.0), 0.0)
    for active in _supports(len(units)):
        rows = units[active]
        multipliers = np.linalg.lstsq(rows.T, -x, rcond=None)[0]
        y = x + multipliers @ rows
        violation = -min((units @ y).min(), multipliers.min(), 0.0)
        if violation < least:
            best, least = y, violation
    return best


def upgrad(grads: Array, preference: Array | None = None) -> Array:
    """sum_i pi(p_i g_i), pi the projection on the dual cone; p_i = 1/T by default.

    Quinton and Rey, arXiv 2406.16232, section 2.
    """
    p = np.full(len(grads), 1 / len(grads)) if preference is None else preference
    total: Array = np.sum(
        [p_i * project_on_dual_cone(g_i, grads) for p_i, g_i in zip(p, grads, strict=True)], axis=0
    )
    return total


def dual_proj(grads: Array, preference: Array | None = None) -> Array:
    """pi(sum_i p_i g_i), pi the projection on the dual cone; p_i = 1/T by default.

    Lopez-Paz and Ranzato, arXiv 1706.08840, equation 11.
    """
    p = np.full(len(grads), 1 / len(grads)) if preference is None else preference
    return project_on_dual_cone(p @ grads, grads)


def pcgrad(grads: Array, orders: Sequence[Sequence[int]] | NDArray[np.int64]) -> Array:
    """sum_i g_i^PC: g_i less its conflicting part with every g_j, in the order orders[i].

    Yu et al., arXiv 2001.06782, Algorithm 1.
    """
    total = np.zeros(grads.shape[1])
    for g_i, order in zip(grads, orders, strict=True):
        g_pc = g_i.copy()
        for j in order:
            g_j = grads[j]
            if g_pc @ g_j < 0:
                g_pc = g_pc - (g_pc @ g_j) / (g_j @ g_j) * g_j
        total += g_pc
    return total


# Systems of equations.


def imtl_g(grads: Array) -> Array:
    """Equal projections on all gradients: the closed form of IMTL-G.

    Liu et al., ICLR 2021, section 3.1, with u_i = g_i / ||g_i||:

        alpha_{2:T} = g_1 U' (D U')^{-1},  alpha_1 = 1 - sum alpha_{2:T}
        U' = [u_1 - u_2, ..., u_1 - u_T],  D' = [g_1 - g_2, ..., g_1 - g_T]

    Task 1 is the shortest gradient (any may be) and the rows of D are divided by the other
    lengths, so that gradients of very different lengths keep their digits. D U' is inverted on its
    range, for the direction of linearly dependent gradients.
    """
    lengths = np.linalg.norm(grads, axis=1)
    order = np.argsort(lengths)
    g, n = grads[order], lengths[order]
    u = g / n[:, None]
    U = u[0] - u[1:]
    D = (g[0] - g[1:]) / n[1:, None]
    scaled = np.linalg.pinv((D @ U.T).T, rcond=1e-12) @ (U @ g[0])  # alpha_t ||g_t||
    direction: Array = (1 - (scaled / n[1:]).sum()) * g[0] + scaled @ u[1:]
    return direction


def fairgrad(grads: Array, alpha: float = 1.0) -> Array:
    """sum_i a_i g_i with a > 0 and <g_i, sum_j a_j g_j> = a_i^(-1/alpha).

    Ban and Ji, arXiv 2402.15638, equation 4. In y_i = a_i ||g_i|| the solution minimises the
    convex

        ||sum_i y_i u_i||^2 / 2 - sum_i p_i phi(y_i),  phi'(y) = y^(-1/alpha),
        p_i = ||g_i||^(1/alpha - 1)

    by Newton steps in log y with backtracking on this function.
    """
    lengths = np.linalg.norm(grads, axis=1)
    u = grads / lengths[:, None]
    p = lengths ** (1 / alpha - 1)

    def objective(y: Array) -> float:
        d = y @ u
        phi = np.log(y) if alpha == 1 else y ** (1 - 1 / alpha) / (1 - 1 / alpha)
        return float(d @ d / 2 - p @ phi)

    y = p ** (alpha / (1 + alpha))
    best, least = y, np.inf
    for _ in range(300):
        d = y @ u
        pull = p * y ** (1 - 1 / alpha)  # y_i times p_i phi'(y_i)
        slope = y * (u @ d) - pull
        residual = float(np.abs(slope / pull).max())
        if residual < least:
            best, least = y, residual
        scaled = y[:, None] * u
        hessian = scaled @ scaled.T + np.diag(pull / alpha)
        step = -np.linalg.solve(hessian, slope)  # relative to y
        t = min(1.0, 0.9 / max(-float(step.min()), 1e-300))
        while residual > 1e-4 and objective(y * (1 + t * step)) > objective(y):
            t /= 2
        y = y * (1 + t * step)
        if residual < 1e-14:
            break
    direction: Array = best @ u
    return direction


def nash(grads: Array, max_norm: float | None = None) -> Array:
    """sum_i a_i g_i with a > 0 and <g_i, sum_j a_j g_j> = 1 / a_i, at most `max_norm` long.

    Navon et al., arXiv 2202.01017, Claim 3.1; the clip is the one of its code.
    """
    direction = fairgrad(grads, 1.0)
    length = float(np.linalg.norm(direction))
    return direction if max_norm is None else direction * min(1.0, max_norm / length)


def aligned_mtl(grads: Array, scale: str = "min", eps: float = 2.0**-52) -> Array:
    """The mean of the aligned gradients, the columns of sigma U V' for [g_1 ... g_T] = U S V'.

    Senushkin et al., arXiv 2305.19000, Algorithm 1; singular values with
    s^2 <= max(s^2) T eps count as 0. sigma is the least of the others ("min"), the lower middle
    one ("median"), or their root mean square ("rmse"). eps: that of the gradients' dtype.
    """
    u, s, vt = np.linalg.svd(grads.T, full_matrices=False)
    rank = int((s**2 > s.max() ** 2 * len(grads) * eps).sum())
    s = s[:rank]
    sigma = {"min": s.min(), "median": s[rank // 2], "rmse": np.sqrt((s**2).mean())}[scale]
    mean: Array = sigma * (u[:, :rank] @ vt[:rank]).mean(axis=1)
    return mean


# Methods that are no weights of a Gram matrix alone.


def graddrop(grads: Array, uniforms: Array, leak: float | Array = 0.0) -> Array:
    """Keep, at every coordinate, the gradients of one sign.

    Chen et al., arXiv 2010.06808, equation 1 and Algorithm 1 with f(p) = p:

        P = (1 + sum_i g_i / sum_i |g_i|) / 2                       (coordinate by coordinate)
        M_i = 1[P > U] 1[g_i > 0] + 1[P < U] 1[g_i < 0]
        d = sum_i (l_i + (1 - l_i) M_i) g_i

    Args:
        grads: (T, P).
        uniforms: U (P,), in [0, 1).
        leak: l in [0, 1], one number or (T,).
    """
    masks = graddrop_masks(grads, uniforms)
    leaks = np.broadcast_to(np.asarray(leak, dtype=np.float64), (len(grads),))[:, None]
    direction: Array = ((leaks + (1 - leaks) * masks) * grads).sum(axis=0)
    return direction


def graddrop_masks(grads: Array, uniforms: Array) -> Array:
    """M (T, P) of `graddrop`; where all gradients are 0 the purity P is 1/2."""
    total, size = grads.sum(axis=0), np.abs(grads).sum(axis=0)
    purity = 0.5 * (1 + np.divide(total, size, out=np.zeros_like(total), where=size > 0))
    kept = np.where(grads > 0, purity > uniforms, (grads < 0) & (purity < uniforms))
    masks: Array = kept.astype(np.float64)
    return masks


def graddrop_activations(
    grads: Array, activations: Array, uniforms: Array, leak: float | Array = 0.0
) -> Array:
    """GradDrop at a layer of activations: the masks are those of sum over the batch of sgn(A) g.

    Algorithm 1 of arXiv 2010.06808 in full.

    Args:
        grads: (T, B, F), gradients with respect to the activations.
        activations: A (B, F).
        uniforms: (F,).
        leak: as `graddrop`.

    Returns:
        (B, F), to be passed on to the layers below.
    """
    masks = graddrop_masks((np.sign(activations) * grads).sum(axis=1), uniforms)[:, None, :]
    leaks = np.broadcast_to(np.asarray(leak, dtype=np.float64), (len(grads),))[:, None, None]
    passed: Array = ((leaks + (1 - leaks) * masks) * grads).sum(axis=0)
    return passed


def db_mtl(
    grads: Array, losses: Array, average: Array, beta: float, eps: float = 1e-8
) -> tuple[Array, Array]:
    """One step of DB-MTL: gradients of log losses, averaged over time, made equally long.

    Lin et al., arXiv 2308.12029:

        g_i     = grad log(L_i + eps) = grad L_i / (L_i + eps)
        ghat_i <- beta ghat_i + (1 - beta) g_i
        d       = max_i ||ghat_i|| sum_i ghat_i / ||ghat_i||

    Args:
        grads: (T, P), of the losses as they are.
        losses: (T,), > 0.
        average: (T, P), ghat before the step; zeros at first.
        beta: of this step (the code: beta_0 / step^0.5, step counted from 1).

    Returns:
        d (P,) and ghat (T, P) after the step. A ghat_i that is 0 adds nothing to d.
    """
    g = grads / (losses + eps)[:, None]
    ghat = beta * average + (1 - beta) * g
    lengths = np.linalg.norm(ghat, axis=1)
    moving = lengths > 0
    direction: Array = lengths.max() * (ghat[moving] / lengths[moving, None]).sum(axis=0)
    return direction, ghat


class GradNormStep(NamedTuple):
    """What GradNorm computes in one step: `norms` G_i, `targets`, `loss`, `slope` dloss/dw."""

    norms: Array
    targets: Array
    loss: float
    slope: Array


def gradnorm(
    weights: Array, grads: Array, losses: Array, initial_losses: Array, alpha: float = 1.5
) -> GradNormStep:
    """The loss on the weights of GradNorm and its gradient.

    Chen et al., arXiv 1711.02257, equations 1 and 2 and section 3.2:

        G_i = w_i ||grad_W L_i||,   Gbar = mean_i G_i
        r_i = (L_i / L_i(0)) / mean_j (L_j / L_j(0))
        L_grad = sum_i |G_i - Gbar r_i^alpha|,   Gbar r_i^alpha taken as a constant

    After a step on w the weights are scaled to sum to T.

    Args:
        weights: w (T,).
        grads: (T, P), of the unweighted losses on the last shared layer W.
    """
    lengths = np.linalg.norm(grads, axis=1)
    norms = weights * lengths
    ratios = losses / initial_losses
    targets = norms.mean() * (ratios / ratios.mean()) ** alpha
    gaps = norms - targets
    return GradNormStep(norms, targets, float(np.abs(gaps).sum()), np.sign(gaps) * lengths)


# Tools.


def _supports(n: int) -> Iterator[list[int]]:
    """All non-empty subsets of range(n)."""
    for bits in range(1, 1 << n):
        yield [i for i in range(n) if bits >> i & 1]


def _shortest_affine(points: Array) -> Array:
    """Weights (S,) that sum to 1 of the shortest point of the affine hull of the rows."""
    lengths = np.linalg.norm(points, axis=1)
    first = int(lengths.argmin())  # differences to the shortest row lose the fewest digits
    others = [i for i in range(len(points)) if i != first]
    differences = points[others] - points[first]
    sizes = np.linalg.norm(differences, axis=1)
    sizes = np.where(sizes > 0, sizes, 1.0)
    moves = np.linalg.lstsq((differences / sizes[:, None]).T, -points[first], rcond=None)[0] / sizes
    weights = np.zeros(len(points))
    weights[others] = moves
    weights[first] = 1 - moves.sum()
    return weights


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """The root of a decreasing function in [low, high], by false positions (Illinois)."""
    f_low, f_high = function(low), function(high)
    if f_low <= 0 or f_high >= 0:  # the root is at an end, up to rounding
        return low if f_low <= 0 else high
    side = 0
    for _ in range(50):
        middle = (low * f_high - high * f_low) / (f_high - f_low)
        value = function(middle)
        if abs(value) < 1e-15 or high - low < 1e-15:
            return middle
        if value > 0:
            low, f_low = middle, value
            f_high = f_high / 2 if side > 0 else f_high
            side = 1
        else:
            high, f_high = middle, value
            f_low = f_low / 2 if side < 0 else f_low
            side = -1
    return (low + high) / 2

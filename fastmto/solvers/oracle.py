"""Slow references of the small solvers: cvxpy with Clarabel, osqp, numpy.

An optional extra: `pip install fastmto[oracle]`. Everything is stated in coordinates in which
Clarabel reaches its tolerance: the exact problem on the correlation matrix, the CCP's subproblem
with the exact solution as the unit, the quadratic programs in units of the longest gradient. SCS
misses the tolerance and OSQP cannot pose the bargaining problems.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np

try:
    # Its annotations are partial and differ between versions.
    cvxpy: Any = importlib.import_module("cvxpy")
except ImportError as error:
    raise ImportError(
        "fastmto.solvers.oracle needs cvxpy and clarabel: pip install fastmto[oracle]"
    ) from error

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

#: Clarabel's settings for reference solutions.
ACCURATE = {
    "tol_gap_abs": 1e-12,
    "tol_gap_rel": 1e-12,
    "tol_feas": 1e-12,
    "max_iter": 500,
}


def exact(gram: Array, preference: Array | None = None) -> Array:
    """argmin_a a'Ga/2 - sum_i p_i log a_i, so that a_i (G a)_i = p_i.

    Source: Nash-MTL, arXiv 2202.01017, Claim 3.1, in its convex form. Solved for y = a / s,
    s_i = 1/sqrt(G_ii), on C = diag(s) G diag(s).

    Args:
        gram: (T, T) float64, positive semidefinite with a positive diagonal.
        preference: (T,) positive; all 1 by default.

    Returns:
        a (T,) float64.

    Raises:
        RuntimeError: cvxpy did not report an optimum.
    """
    s = 1 / np.sqrt(np.diag(gram))
    p = np.ones(len(gram)) if preference is None else np.asarray(preference, dtype=np.float64)
    y = cvxpy.Variable(len(gram))
    # ||R y||^2 for C = R'R: a quadratic form of C itself would be checked for definiteness.
    energy = cvxpy.sum_squares(_root(s[:, None] * gram * s) @ y) / 2
    return s * _minimise(energy - p @ cvxpy.log(y), [], y)


def ccp_step(
    gram: Array, previous: Array, solution: Array, preference: Array | None = None
) -> Array:
    """One subproblem of the convex-concave procedure,

        argmin_a 1'Ga + phi'(b)'a   s.t.  a_i (G a)_i >= p_i, a >= 0
        phi'(b) = 1/b + G (1/(G b)),  b = previous

    Source: PUB, arXiv 2410.05806, equations 2-4. Solved for y = a / a* with a* = `solution`, and
    with the objective scaled to a largest coefficient of 1.

    Args:
        gram: (T, T) float64, positive semidefinite.
        previous: (T,) positive, the iterate to linearise at.
        solution: (T,) positive, the exact bargaining solution: the unit, nothing else.
        preference: (T,) positive; all 1 by default.

    Returns:
        a (T,) float64.

    Raises:
        RuntimeError: cvxpy did not report an optimum; an unbounded problem says so.
    """
    p = np.ones(len(gram)) if preference is None else np.asarray(preference, dtype=np.float64)
    m = solution[:, None] * gram * solution
    y = previous / solution
    c = m @ (1 / solution + 1 / (m @ y)) + 1 / y
    c /= np.abs(c).max()
    x = cvxpy.Variable(len(gram))
    # Both factors are concave in x, and the constraint is that of the geometric mean.
    constraints = [cvxpy.log(x) + cvxpy.log(m @ x) >= np.log(p)]
    return solution * _minimise(c @ x, constraints, x)


def ccp_published(gram: Array, steps: int = 20) -> Array:
    """The procedure as the published Nash-MTL and PUB code poses it to cvxpy: unwhitened, from
    a = 1, one compiled problem with parameters, `steps` solves at the solver's default tolerance.

    For timing: its results carry the solver's noise. The published solver (ECOS) is no longer
    part of cvxpy; here it is Clarabel.

    Args:
        gram: (T, T) float64.
        steps: outer steps.

    Returns:
        a (T,) float64, the iterate after the last step.

    Raises:
        RuntimeError: a subproblem without an optimum.
    """
    n = len(gram)
    g = cvxpy.Parameter((n, n), value=gram)
    slope = cvxpy.Parameter(n)
    x = cvxpy.Variable(n, nonneg=True)
    constraints = [-cvxpy.log(x[i]) - cvxpy.log(g[i] @ x) <= 0 for i in range(n)]
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum(g @ x) + slope @ x), constraints)
    a = np.ones(n)
    for _ in range(steps):
        slope.value = 1 / a + gram @ (1 / (gram @ a))
        problem.solve(solver=cvxpy.CLARABEL, warm_start=True)
        if x.value is None:
            raise RuntimeError(f"cvxpy: {problem.status}")
        a = np.asarray(x.value, dtype=np.float64)
    return a


def mgda(gram: Array) -> Array:
    """argmin_w w'Gw over the simplex.

    Source: Sener & Koltun, arXiv 1810.04650, equation 4.

    Args:
        gram: (T, T) float64, positive semidefinite.

    Returns:
        w (T,) float64.

    Raises:
        RuntimeError: cvxpy did not report an optimum.
    """
    w = cvxpy.Variable(len(gram))
    # The length, not its square: the value is then right to the tolerance where it is small.
    length = cvxpy.norm(_root(gram / np.diag(gram).max()) @ w)
    return _minimise(length, [w >= 0, cvxpy.sum(w) == 1], w)


def cagrad_dual(gram: Array, c: float) -> Array:
    """argmin_w <g_w, g0> + c |g0| |g_w| over the simplex.

    Source: CAGrad, arXiv 2110.14048, algorithm 1.

    Args:
        gram: (T, T) float64, positive semidefinite.
        c: >= 0.

    Returns:
        w (T,) float64.

    Raises:
        RuntimeError: cvxpy did not report an optimum.
    """
    root = _root(gram / np.diag(gram).max())
    g0 = root.mean(1)
    w = cvxpy.Variable(len(gram))
    objective = (root.T @ g0) @ w + c * np.linalg.norm(g0) * cvxpy.norm(root @ w)
    return _minimise(objective, [w >= 0, cvxpy.sum(w) == 1], w)


def cagrad_gain(gram: Array, c: float) -> float:
    """max_d min_i <g_i, d> subject to |d - g0| <= c |g0|.

    Source: CAGrad, arXiv 2110.14048, equation 2.

    Args:
        gram: (T, T) float64, positive semidefinite.
        c: >= 0.

    Returns:
        The largest smallest gain, in the units of the Gram matrix.

    Raises:
        RuntimeError: cvxpy did not report an optimum.
    """
    unit = float(np.diag(gram).max())
    root = _root(gram / unit)
    g0 = root.mean(1)
    d = cvxpy.Variable(len(root))
    gain = cvxpy.Variable(1)
    ball = cvxpy.norm(d - g0) <= c * np.linalg.norm(g0)
    return unit * float(_minimise(-gain[0], [root.T @ d >= gain, ball], gain)[0])


def dual_cone(gram: Array, reference: Array) -> Array:
    """argmin_v v'Gv subject to v >= reference.

    Source: Quinton & Rey, arXiv 2406.16232, proposition 1.

    Args:
        gram: (T, T) float64, positive semidefinite with a positive diagonal.
        reference: (T,).

    Returns:
        v (T,) float64.

    Raises:
        RuntimeError: cvxpy did not report an optimum.
    """
    s = 1 / np.sqrt(np.diag(gram))
    y = cvxpy.Variable(len(gram))
    energy = cvxpy.sum_squares(_root(s[:, None] * gram * s) @ y)
    return s * _minimise(energy, [y >= reference / s], y)


def dual_cone_osqp(gram: Array, reference: Array) -> Array:
    """As `dual_cone`, by OSQP (tolerance 1e-10, polished): a second opinion.

    Raises:
        RuntimeError: OSQP did not solve it.
    """
    # Optional extras, imported where they are used.
    osqp: Any = importlib.import_module("osqp")
    sparse: Any = importlib.import_module("scipy.sparse")
    s = 1 / np.sqrt(np.diag(gram))
    c = s[:, None] * gram * s
    n = len(gram)
    solver = osqp.OSQP()
    solver.setup(
        P=sparse.csc_matrix(np.triu((c + c.T) / 2)),
        q=np.zeros(n),
        A=sparse.identity(n, format="csc"),
        l=reference / s,
        u=np.full(n, np.inf),
        eps_abs=1e-10,
        eps_rel=1e-10,
        polishing=True,
        max_iter=200_000,
        verbose=False,
    )
    result = solver.solve(raise_error=False)
    if result.info.status != "solved":
        raise RuntimeError(f"osqp: {result.info.status}")
    return s * np.asarray(result.x, dtype=np.float64)


def imtl_g(gram: Array) -> Array:
    """The w of IMTL-G by its paper's closed form, which singles out the first task:

        w_2.. = g_1 U' (D U')^-1,  w_1 = 1 - sum w_2..
        D = (g_1 - g_i)_i,  U = (g_1/|g_1| - g_i/|g_i|)_i,  i = 2..T

    Source: Liu et al., ICLR 2021, equation 6.

    Args:
        gram: (T, T) float64, T >= 2.

    Returns:
        w (T,) float64.
    """
    n = len(gram)
    lengths = np.sqrt(np.diag(gram))
    others = np.hstack([np.ones((n - 1, 1)), -np.eye(n - 1)])
    units = others / lengths
    rest = np.linalg.solve((others @ gram @ units.T).T, units @ gram[0])
    return np.concatenate([[1 - rest.sum()], rest])


def aligned_mtl(gram: Array, scale: str = "min") -> Array:
    """sigma V diag(lambda)^-1/2 V' p with p = 1/T, by numpy's eigenvectors.

    Source: Senushkin et al., CVPR 2023, algorithm 1.

    Args:
        gram: (T, T) float64, positive semidefinite.
        scale: "min", "median" or "rmse": sigma^2 the smallest, the (lower) median or the mean of
            the eigenvalues above T eps max(lambda).

    Returns:
        w (T,) float64.
    """
    n = len(gram)
    values, vectors = np.linalg.eigh(gram)
    keep = values > values.max() * n * np.finfo(np.float64).eps
    values, vectors = values[keep], vectors[:, keep]
    squares = {"min": values[0], "median": values[(len(values) - 1) // 2], "rmse": values.mean()}
    w: Array = np.sqrt(squares[scale]) * vectors @ (vectors.mean(0) / np.sqrt(values))
    return w


def fairgrad(gram: Array, alpha: float) -> Array:
    """The a > 0 with (G a)_i = a_i^(-1/alpha), by undamped Newton in the logarithms of a and G a,
    from where alpha = 1 (bargaining) along a path of exponents.

    Source: Ban & Ji, arXiv 2402.15638, equation 4.

    Args:
        gram: (T, T) float64, positive semidefinite with a positive diagonal.
        alpha: > 0.

    Returns:
        a (T,) float64.

    Raises:
        RuntimeError: no convergence.
    """
    a = exact(gram)
    steps = 40
    for k in range(1, steps + 1):
        r = (1 / alpha) ** (k / steps)
        for _ in range(50):
            gains = gram @ a
            defect = r * np.log(a) + np.log(gains)
            move = np.linalg.solve(r * np.eye(len(a)) + gram * a / gains[:, None], -defect)
            a = a * np.exp(np.clip(move, -1, 1))
            if not (a > 0).all() or not (gram @ a > 0).all():
                raise RuntimeError("fairgrad: left the positive orthant")
            if np.abs(move).max() < 1e-13:
                break
    return a


def pcgrad(gradients: Array, orders: Any) -> Array:
    """The sum of the projected gradients, on the gradients themselves.

    Source: Yu et al., arXiv 2001.06782, algorithm 1.

    Args:
        gradients: (T, P) float64.
        orders: (T, T-1) integers, row i the order in which task i meets the others.

    Returns:
        (P,) float64.
    """
    projected = gradients.copy()
    for h, order in zip(projected, orders, strict=True):
        for j in order:
            inner = h @ gradients[j]
            if inner < 0:
                h -= inner / (gradients[j] @ gradients[j]) * gradients[j]
    total: Array = projected.sum(0)
    return total


def _root(c: Array) -> Array:
    """R with R'R = c for a positive semidefinite c."""
    values, vectors = np.linalg.eigh(c)
    root: Array = np.sqrt(np.clip(values, 0, None))[:, None] * vectors.T
    return root


def _minimise(objective: Any, constraints: list[Any], variable: Any) -> Array:
    problem = cvxpy.Problem(cvxpy.Minimize(objective), constraints)
    problem.solve(solver=cvxpy.CLARABEL, **ACCURATE)
    # "optimal_inaccurate": Clarabel cannot always certify 1e-12; the callers' tolerances are wider.
    if problem.status not in (cvxpy.OPTIMAL, cvxpy.OPTIMAL_INACCURATE):
        raise RuntimeError(f"cvxpy: {problem.status}")
    return np.asarray(variable.value, dtype=np.float64)

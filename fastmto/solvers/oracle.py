"""Slow references of the bargaining solvers, on cvxpy and Clarabel.

An optional extra: `pip install fastmto[oracle]`. Everything is stated in coordinates in which
Clarabel reaches its tolerance: the exact problem on the correlation matrix, the CCP's subproblem
with the exact solution as the unit. SCS misses the tolerance and OSQP cannot pose the problems.
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

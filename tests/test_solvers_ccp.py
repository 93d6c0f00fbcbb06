"""The convex-concave procedure: subproblems against cvxpy, optimality conditions, fixed points."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samplers import Sample, gram, samples
from scipy.optimize import nnls

from fastmto.solvers import STATUSES, bargaining, ccp_step

#: Exact (3.1623, .031623); the CCP's fixed point is somewhere else.
CONFLICT = np.array([[1.0, -90.0], [-90.0, 1e4]])


def slope(g: np.ndarray, previous: np.ndarray) -> np.ndarray:
    """Objective of the subproblem: G 1 + 1/b + G (1/(G b))."""
    return g.sum(0) + 1 / previous + g @ (1 / (g @ previous))


def reference_step(g: np.ndarray, previous: np.ndarray, unit: np.ndarray) -> np.ndarray | None:
    """The subproblem in 60-digit arithmetic, by following the central path of
    tau c'y - sum_i log(y_i (M y)_i - 1) to a gap of 1e-24; None where it is unbounded.

    In 60 digits nothing has to be arranged: y = a / unit only makes the start feasible.
    """
    mp = pytest.importorskip("mpmath", reason="mpmath (it comes with torch) is not installed")
    tasks = range(len(g))
    with mp.workdps(60):
        u = [mp.mpf(float(x)) for x in unit]
        m = mp.matrix([[u[i] * mp.mpf(float(g[i, j])) * u[j] for j in tasks] for i in tasks])
        b = mp.matrix([mp.mpf(float(previous[i])) / u[i] for i in tasks])
        s = m * b
        c = m * mp.matrix([1 / u[i] + 1 / s[i] for i in tasks])
        c += mp.matrix([1 / b[i] for i in tasks])
        y = mp.matrix([mp.mpf("1.5")] * len(g))
        tau = None
        for _ in range(2000):
            s = m * y
            value = mp.fdot(c, y)
            if value <= 0:
                return None
            tau = 2 * len(g) / value if tau is None else tau
            # Gradient and Hessian for relative changes of y.
            gradient = mp.matrix([tau * c[i] * y[i] for i in tasks])
            hessian = mp.zeros(len(g))
            for i in tasks:
                excess = y[i] * s[i] - 1
                jacobian = [y[i] * m[i, j] * y[j] for j in tasks]
                for j in tasks:
                    hessian[i, j] -= jacobian[j] / excess
                    hessian[j, i] -= jacobian[j] / excess
                jacobian[i] += y[i] * s[i]
                for j in tasks:
                    gradient[j] -= jacobian[j] / excess
                    for k in tasks:
                        hessian[j, k] += jacobian[j] * jacobian[k] / excess**2
            step = mp.lu_solve(hessian, -gradient)
            decrement = mp.sqrt(-mp.fdot(gradient, step))
            t = 1 if decrement < 0.25 else 1 / (1 + decrement)
            y = mp.matrix([y[i] * (1 + t * step[i]) for i in tasks])
            if decrement < 1e-3:
                if 2 * len(g) < 1e-24 * tau * value:
                    return np.array([float(y[i] * u[i]) for i in tasks])
                tau *= 100
    raise AssertionError("the reference did not converge")


def iterates(rng: np.random.Generator, solution: np.ndarray) -> np.ndarray:
    """A positive vector about as far from the solution as CCP iterates are."""
    return solution * np.exp(rng.normal(size=len(solution))) * rng.choice([0.1, 1.0, 10.0])


def outer_fixed_point(g: np.ndarray) -> np.ndarray:
    """lam* = 1 + (I + M)^-1 M (1/a*): the exact solution is a fixed point where it is >= 0."""
    a = bargaining(g).weights
    m = a[:, None] * g * a
    return 1 + np.linalg.solve(np.eye(len(g)) + m, m @ (1 / a))


@pytest.mark.parametrize("tasks", [1, 2, 3, 5, 8])
# cvxpy says so of answers whose certificate stays above 1e-12; the comparison decides.
@pytest.mark.filterwarnings("ignore:Solution may be inaccurate:UserWarning")
def test_subproblem_against_cvxpy(tasks: int) -> None:
    pytest.importorskip("cvxpy", reason="the oracle extra is not installed")
    from fastmto.solvers import oracle

    rng = np.random.default_rng(tasks)
    compared = 0
    for k in range(12):
        g = gram(rng, tasks, "full" if k % 2 else "low_rank", decades=0.4 * (k % 3))
        p = None if k < 8 else np.exp(rng.normal(size=tasks))
        exact = bargaining(g, preference=p)
        if not exact.ok:
            continue
        previous = iterates(rng, exact.weights)
        result = ccp_step(g, previous, p)
        if result.status == "unbounded":
            with pytest.raises(RuntimeError, match="unbounded"):
                oracle.ccp_step(g, previous, exact.weights, p)
            continue
        assert result.ok, result
        expected = oracle.ccp_step(g, previous, exact.weights, p)
        np.testing.assert_allclose(result.weights, expected, rtol=1e-5)
        c = slope(g, previous)
        assert c @ result.weights <= c @ expected * (1 + 1e-7)
        compared += 1
    assert compared >= 4


@pytest.mark.parametrize("decades", [1.0, 3.0, 6.0])
def test_iterates_of_spread_lengths_against_60_digits(decades: float) -> None:
    # The iterates from a = 1 run away from the exact solution, the (G a)_i far below the a_i:
    # where cvxpy's own answers are no longer good to 1e-5.
    rng = np.random.default_rng(int(decades))
    compared = 0
    for _ in range(40):
        g = gram(rng, int(rng.integers(2, 5)), decades=decades)
        g = (g + g.T) / 2
        a = np.ones(len(g))
        if compared >= 8 or (g @ a > 0).all():
            continue
        unit = bargaining(g).weights
        for _ in range(3):
            result = ccp_step(g, a)
            expected = reference_step(g, a, unit)
            if expected is None:
                assert result.status == "unbounded"
                break
            assert result.ok, result
            np.testing.assert_allclose(result.weights, expected, rtol=1e-8)
            compared += 1
            a = result.weights
    assert compared >= 8


@pytest.mark.parametrize("decades", [0.0, 1.0, 3.0, 6.0])
def test_spread_lengths_end_in_an_answer(decades: float) -> None:
    rng = np.random.default_rng(int(10 * decades))
    solved = 0
    for _ in range(300):
        tasks = int(rng.integers(2, 17))
        g = gram(rng, tasks, decades=decades)
        result = bargaining(g, "ccp")
        assert result.status in ("solved", "unbounded")
        assert result.ok or (g @ np.ones(tasks) <= 0).any()
        solved += result.ok
    assert solved >= 270


@pytest.mark.parametrize("tasks", [2, 3, 8, 20])
@pytest.mark.filterwarnings("ignore:Solution may be inaccurate:UserWarning")
def test_exact_against_cvxpy(tasks: int) -> None:
    pytest.importorskip("cvxpy", reason="the oracle extra is not installed")
    from fastmto.solvers import oracle

    rng = np.random.default_rng(100 + tasks)
    for kind in ("full", "aligned", "low_rank"):
        g = gram(rng, tasks, kind, decades=0.5)
        for p in (np.ones(tasks), np.exp(rng.normal(size=tasks))):
            ours = bargaining(g, preference=p)
            if not ours.ok:
                continue
            theirs = oracle.exact(g, p)

            def objective(a: np.ndarray, g: np.ndarray = g, p: np.ndarray = p) -> float:
                return float(a @ g @ a / 2 - p @ np.log(a))

            assert objective(ours.weights) <= objective(theirs) + 1e-7 * p.sum()
            # The weights of an interior-point method are worth the root of its gap.
            np.testing.assert_allclose(theirs, ours.weights, rtol=1e-3)


def test_cvxpy_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "cvxpy", None)
    monkeypatch.delitem(sys.modules, "fastmto.solvers.oracle", raising=False)
    with pytest.raises(ImportError, match=re.escape("pip install fastmto[oracle]")):
        import fastmto.solvers.oracle  # noqa: F401


@settings(max_examples=150, deadline=None)
@given(samples(24), st.integers(0, 2**32 - 1))
def test_subproblems_are_feasible_and_optimal(sample: Sample, seed: int) -> None:
    g = gram(np.random.default_rng(sample.seed), sample.tasks, sample.kind, min(sample.decades, 3))
    exact = bargaining(g)
    if not exact.ok or exact.kappa > 1e8:
        assert exact.ok or ccp_step(g, np.ones(len(g))).status == exact.status
        return
    rng = np.random.default_rng(seed)
    previous = iterates(rng, exact.weights)
    result = ccp_step(g, previous)
    c = slope(g, previous)
    if not result.ok:
        # Only a linearisation outside the domain can be unbounded.
        assert result.status == "unbounded"
        assert (g @ previous <= 1e-9 * (np.abs(g) @ previous)).any()
        return
    a = result.weights
    # Rounding a alone moves a constraint by this much where G a is a small difference.
    rounding = np.finfo(float).eps * (np.abs(g) @ a) / (g @ a)
    assert (a * (g @ a) >= 1 - 1e-6 - 16 * rounding).all()
    # Optimality: c = J'lam with lam >= 0, J the gradients of log a_i + log (G a)_i, and
    # lam_i = 0 where that has slack. In relative units (times a), by non-negative least squares.
    s = g @ a
    slack = np.log(a * s)
    near = slack < 1e-3
    scaled = ((np.diag(1 / a) + g / s[:, None]) * a)[near]
    top = np.abs(c * a).max()
    lam, distance = nnls(scaled.T, c * a / top)
    assert distance <= 1e-4
    assert lam @ np.abs(slack[near]) <= 1e-5 * lam.sum()


def test_fixed_point_is_not_the_exact_solution() -> None:
    assert outer_fixed_point(CONFLICT).min() < 0
    result = bargaining(CONFLICT, "ccp", max_steps=100)
    np.testing.assert_allclose(result.weights, [19.2025087607, 0.1733992825], rtol=1e-8)
    assert result.residual < 1e-8
    np.testing.assert_allclose(bargaining(CONFLICT).weights, [10**0.5, 10**-1.5], rtol=1e-12)


def test_fixed_point_criterion() -> None:
    rng = np.random.default_rng(5)
    seen = {True: 0, False: 0}
    for k in range(200):
        tasks = 2 + k % 4
        g = gram(rng, tasks, decades=1.0)
        exact = bargaining(g).weights
        start = bargaining(g, "ccp", warm_start=exact, max_steps=1)
        lam = outer_fixed_point(g)
        if abs(lam.min()) < 1e-6:
            continue
        stays = bool(lam.min() > 0)
        assert start.ok
        assert (start.residual < 1e-9) == stays
        seen[stays] += 1
    assert min(seen.values()) >= 5


def test_two_tasks_criterion_in_closed_form() -> None:
    rng = np.random.default_rng(6)
    for _ in range(50):
        n1, n2 = 10.0 ** rng.uniform(-2, 2, size=2)
        rho = rng.uniform(-0.99, 0.99)
        g = np.array([[n1 * n1, rho * n1 * n2], [rho * n1 * n2, n2 * n2]])
        root = np.sqrt(1 + rho) / 4
        expected = [
            1 + root * ((2 - rho) * n1 + rho * n2),
            1 + root * ((2 - rho) * n2 + rho * n1),
        ]
        np.testing.assert_allclose(outer_fixed_point(g), expected, rtol=1e-9)


def test_outer_loop_is_its_steps() -> None:
    a = np.ones(2)
    for steps in range(1, 6):
        a = ccp_step(CONFLICT, a).weights
        loop = bargaining(CONFLICT, "ccp", max_steps=steps)
        assert loop.iterations == steps
        np.testing.assert_allclose(loop.weights, a, rtol=1e-9)


def test_unbounded_first_subproblem_is_a_status() -> None:
    # (G 1)_1 < 0 and tiny: the linearised log-penalty pulls a to infinity.
    g = np.array([[1.0, -1.001], [-1.001, 4.0]])
    assert (g.sum(1) < 0).any()
    result = bargaining(g, "ccp")
    assert result.status == "unbounded"
    assert result.weights is None
    # (G 1)_1 = 0: there is no linearisation at all.
    assert bargaining(np.array([[1.0, -1.0], [-1.0, 4.0]]), "ccp").status == "unbounded"
    # From a point inside the domain the same matrix is fine.
    exact = bargaining(g).weights
    assert bargaining(g, "ccp", warm_start=exact).ok


def test_ccp_depends_on_the_lengths_and_exact_does_not() -> None:
    small = CONFLICT * 1e-4
    np.testing.assert_allclose(bargaining(small).weights, bargaining(CONFLICT).weights * 100)
    ratio = bargaining(small, "ccp").weights / bargaining(CONFLICT, "ccp").weights
    assert np.abs(ratio / 100 - 1).max() > 0.1


def test_preferences_and_ridge() -> None:
    g = np.array([[2.0, 0.5], [0.5, 1.0]])
    p = np.array([3.0, 0.5])
    a = bargaining(g, "ccp", preference=p).weights
    np.testing.assert_allclose(a * (g @ a), p, rtol=1e-8)
    ridged = bargaining(np.array([[1.0, -1.0], [-1.0, 1.0]]), "ccp", ridge=0.5)
    np.testing.assert_allclose(ridged.weights, [2**0.5, 2**0.5], rtol=1e-8)


@pytest.mark.parametrize("tasks", [40, 64, 80])
def test_many_tasks(tasks: int) -> None:
    rng = np.random.default_rng(tasks)
    g = gram(rng, tasks, "aligned")
    result = bargaining(g, "ccp")
    assert result.ok
    np.testing.assert_allclose(result.weights, bargaining(g).weights, rtol=1e-8)
    # The interior point at this size.
    g = gram(rng, tasks)
    exact = bargaining(g).weights
    step = ccp_step(g, exact * np.exp(rng.normal(size=tasks)))
    assert step.status in STATUSES
    if step.ok:
        assert (step.weights * (g @ step.weights) >= 1 - 1e-6).all()


def test_step_takes_tensors_and_refuses_bad_input() -> None:
    g = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    result = ccp_step(g, torch.ones(2))
    assert result.weights.dtype == torch.float32
    with pytest.raises(ValueError, match="previous must be positive"):
        ccp_step(g, [1.0, 0.0])
    with pytest.raises(ValueError, match=r"previous must have the shape \(2,\)"):
        ccp_step(g, [1.0])

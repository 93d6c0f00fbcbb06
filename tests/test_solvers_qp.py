"""The small solvers behind the baselines: optimality, oracles, planted solutions, hard Grams."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samplers import (
    INDEFINITE_KINDS,
    Sample,
    gram,
    hard,
    planted,
    planted_least_norm,
    samples,
    symmetric_matrices,
    updates,
)

from fastmto.reference import gradients as reference_gradients
from fastmto.solvers import (
    STATUSES,
    Result,
    aligned_mtl,
    bargaining,
    cagrad,
    dual_cone,
    fairgrad,
    imtl_g,
    mgda,
    pcgrad,
    simplex_projection,
    upgrad,
)

EPS = np.finfo(np.float64).eps

#: Relative to the lengths that are summed: rounding where tasks depend on each other.
KKT = 1e-9

ONE_GRAM: dict[str, Callable[[Any], Result[Any]]] = {
    "mgda": mgda,
    "cagrad": cagrad,
    "dual_cone": dual_cone,
    "upgrad": upgrad,
    "imtl_g": imtl_g,
    "aligned_mtl": aligned_mtl,
    "fairgrad": fairgrad,
    "pcgrad": lambda g: pcgrad(g, orders_of(len(g))),
}
#: Those whose problem has a solution for every Gram matrix.
ALWAYS = ("mgda", "cagrad", "dual_cone", "upgrad", "aligned_mtl", "pcgrad")


def orders_of(tasks: int, rng: np.random.Generator | None = None) -> np.ndarray:
    rows = [[j for j in range(tasks) if j != i] for i in range(tasks)]
    if rng is not None:
        rows = [list(rng.permutation(row)) for row in rows]
    return np.array(rows, dtype=np.int64).reshape(tasks, tasks - 1)


def wide(x: Any) -> np.ndarray:
    return np.asarray(x, dtype=np.longdouble)


def cosines(g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and cosines in long double; a zero gradient has length 0 and cosines 0."""
    n = np.sqrt(wide(np.diag(g)))
    s = np.divide(1, n, out=np.zeros_like(n), where=n > 0)
    c = (wide(g) + wide(g).T) / 2 * s[:, None] * s
    return n, c


def mgda_violation(g: np.ndarray, w: np.ndarray) -> float:
    """Of (G w)_i >= w'Gw, = where w_i > 0, relative to |g_i| sum_j w_j |g_j|."""
    n, c = cosines(g)
    y = wide(w) * n
    q = c @ y
    value = y @ q
    # A value that is rounding is 0.
    value = value if value > 64 * EPS * y.sum() ** 2 else 0.0
    slack = (q - value / n) / y.sum()
    return float(max(-slack.min(), np.abs(slack[w > 0]).max()))


def cone_violation(g: np.ndarray, v: np.ndarray, u: np.ndarray) -> float:
    """Of (G v)_i >= 0, = where v_i > u_i, relative to |g_i| sum_j |v_j| |g_j|."""
    n, c = cosines(g)
    y = wide(v) * n
    if not (y != 0).any():
        return 0.0
    slack = c @ y / np.abs(y).sum()
    moved = v > u
    return float(max(-slack.min(), np.abs(slack[moved]).max() if moved.any() else 0.0))


def cagrad_gap(g: np.ndarray, v: np.ndarray, c: float) -> tuple[float, float]:
    """Violation of <g_i, d> >= m (= where v_i > 1/T), and |d - g0| / (c |g0|)."""
    n, cos = cosines(g)
    tasks = len(v)
    y = wide(v) * n
    gains = n * (cos @ y)
    moved = v > (1 + 1e-12) / tasks
    shift = (wide(v) - wide(1) / tasks) * n
    mean = n / wide(tasks)
    radius = c * np.sqrt(mean @ cos @ mean)
    if not moved.any():
        return 0.0, 0.0
    m = gains[moved][np.argmin(n[moved])]
    slack = np.divide(gains - m, n, out=np.zeros_like(n), where=n > 0) / y.sum()
    violation = max(-slack.min(), np.abs(slack[moved]).max())
    return float(violation), float(np.sqrt(max(shift @ cos @ shift, 0)) / radius)


def test_values_of_the_oracle_file(shared_dir: Path) -> None:
    cases = json.loads((shared_dir / "oracles" / "bargaining.json").read_text())["other_methods"]
    solve = {
        "mgda": mgda,
        "upgrad_unregularised": upgrad,
        "imtl_g": imtl_g,
        "aligned_mtl_min": aligned_mtl,
    }
    compared = 0
    for case in cases:
        g = np.array(case["gram"], dtype=np.float64)
        for key, function in solve.items():
            if key not in case:
                continue
            np.testing.assert_allclose(function(g).weights, case[key], atol=1e-11, err_msg=key)
            compared += 1
        if "cagrad_c04_w" in case:
            moved = cagrad(g, 0.4).weights - 1 / len(g)
            np.testing.assert_allclose(moved / moved.sum(), case["cagrad_c04_w"], atol=1e-11)
            compared += 1
    assert compared >= 8


@pytest.fixture
def oracle() -> Any:
    pytest.importorskip("cvxpy", reason="the oracle extra is not installed")
    from fastmto.solvers import oracle

    return oracle


@pytest.mark.parametrize("tasks", [1, 2, 3, 5, 8, 13, 20])
@pytest.mark.filterwarnings("ignore:Solution may be inaccurate:UserWarning")
def test_objectives_against_cvxpy(tasks: int, oracle: Any) -> None:
    rng = np.random.default_rng(tasks)
    # Not "near_opposite", on which Clarabel gives up: there the optimality conditions decide.
    for kind in ("full", "low_rank", "aligned", "duplicates"):
        g = gram(rng, tasks, kind, decades=0.5)
        g = (g + g.T) / 2
        w, theirs = mgda(g).weights, oracle.mgda(g)
        unit = np.diag(g).max()
        assert w @ g @ w <= theirs @ g @ theirs + 1e-7 * unit
        for c in (0.2, 0.9):
            v = cagrad(g, c).weights
            assert (g @ v).min() >= oracle.cagrad_gain(g, c) - 1e-7 * unit
        if kind in ("full", "aligned"):
            # Unique; on singular dual cones Clarabel gives up as well.
            u = rng.uniform(-1, 2, size=tasks)
            v, theirs = dual_cone(g, u).weights, oracle.dual_cone(g, u)
            assert (v >= u).all()
            assert v @ g @ v <= theirs @ g @ theirs + 1e-7 * unit
            np.testing.assert_allclose(w, oracle.mgda(g), atol=1e-4)
            np.testing.assert_allclose(v, theirs, atol=1e-4 * np.abs(u).max())


@pytest.mark.parametrize("tasks", [2, 5, 12])
@pytest.mark.filterwarnings("ignore:Solution may be inaccurate:UserWarning")
def test_cagrad_against_its_dual(tasks: int, oracle: Any) -> None:
    rng = np.random.default_rng(50 + tasks)
    for c in (0.1, 0.4, 1.5):
        g = gram(rng, tasks, "full", decades=0.5)
        w = oracle.cagrad_dual(g, c)
        moved = cagrad(g, c).weights - 1 / tasks
        np.testing.assert_allclose(moved / moved.sum(), w, atol=1e-4)
        radius = c * np.sqrt(g.mean())
        np.testing.assert_allclose(moved.sum(), radius / np.sqrt(w @ g @ w), rtol=1e-5)


def test_cagrad_of_lengths_6_decades_apart() -> None:
    # The search once took a length just above the radius and answered with the mean gradient.
    rows = np.array([[-1.8e-6, 6e-7, -1.3e-6], [0.7, -0.8, 1.6], [-1.0, 2.3, -1.0]])
    result = cagrad(rows @ rows.T, 0.4)
    assert result.ok
    direction = result.weights @ rows
    np.testing.assert_allclose(direction, reference_gradients.cagrad(rows, 0.4), rtol=1e-9)
    assert (rows @ direction).min() == pytest.approx(3.0126836e-07, rel=1e-6)


@pytest.mark.parametrize("decades", range(0, 15, 2))
def test_cagrad_over_lengths_decades_apart(decades: int) -> None:
    """Optimal, at the radius, and the direction of the paper."""
    rng = np.random.default_rng(decades)
    for k in range(600):
        tasks = int(rng.integers(2, 5))
        rows = rng.normal(size=(tasks, tasks + 2 * (k % 2)))
        rows *= 10.0 ** rng.uniform(-decades, 0, size=(tasks, 1))
        c = float(rng.choice([0.1, 0.4, 1.5]))
        g = rows @ rows.T
        result = cagrad(g, c)
        assert result.ok
        violation, reached = cagrad_gap(g, result.weights, c)
        assert violation <= 1e-12
        assert reached == pytest.approx(1, abs=1e-6), (k, tasks)
        if k < 5:
            expected = reference_gradients.cagrad(rows, c)
            error = np.abs(result.weights @ rows - expected).max()
            assert error <= 1e-6 * np.abs(expected).max(), (k, tasks)


@pytest.mark.parametrize("tasks", [2, 6, 15])
def test_dual_cone_against_osqp(tasks: int, oracle: Any) -> None:
    pytest.importorskip("osqp", reason="the oracle extra is not installed")
    rng = np.random.default_rng(tasks)
    for _ in range(4):
        g = gram(rng, tasks, "full", decades=0.5)
        g = (g + g.T) / 2
        u = rng.uniform(0, 1, size=tasks)
        theirs = oracle.dual_cone_osqp(g, u)
        np.testing.assert_allclose(dual_cone(g, u).weights, theirs, atol=1e-6)
        summed = sum(oracle.dual_cone_osqp(g, one) for one in np.eye(tasks) / tasks)
        np.testing.assert_allclose(upgrad(g).weights, summed, atol=1e-6)


@pytest.mark.parametrize("tasks", [2, 3, 7, 20, 40, 64])
def test_linear_algebra_against_numpy(tasks: int, oracle: Any) -> None:
    rng = np.random.default_rng(tasks)
    for kind in ("full", "aligned", "low_rank", "duplicates", "float32"):
        for decades in (0.0, 1.0):
            g = gram(rng, tasks, kind, decades)
            g = (g + g.T) / 2
            for scale in ("min", "median", "rmse"):
                result = aligned_mtl(g, scale)
                theirs = oracle.aligned_mtl(g, scale)
                loss = 30 * tasks * EPS * result.kappa
                np.testing.assert_allclose(
                    result.weights, theirs, atol=(loss + 1e-13) * np.abs(theirs).max()
                )
            if kind in ("full", "aligned"):
                w = imtl_g(g).weights
                np.testing.assert_allclose(w, oracle.imtl_g(g), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("dtype", "gap"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 5e-2)]
)
def test_aligned_mtl_takes_rounding_for_no_component(dtype: torch.dtype, gap: float) -> None:
    """Eigenvalues 2, 1 and one at a ratio of `gap`, above and below the cut of the dtype."""
    eps = torch.finfo(dtype).eps
    assert 3 * eps < gap
    g = torch.diag(torch.tensor([2.0, 1.0, 2 * gap], dtype=torch.float64)).to(dtype)
    near = torch.diag(torch.tensor([2.0, 1.0, 4 * eps], dtype=torch.float64)).to(dtype)
    assert aligned_mtl(g).kappa == pytest.approx(1 / gap, rel=1e-2)
    assert aligned_mtl(near).kappa == pytest.approx(2)
    assert aligned_mtl(near).weights[2] == 0
    wide_near = near.double()
    if dtype != torch.float64:
        assert aligned_mtl(wide_near).kappa == pytest.approx(0.5 / eps)
    given = aligned_mtl(wide_near, "min", eps)
    np.testing.assert_array_equal(given.weights, aligned_mtl(wide_near, eps=eps).weights)
    np.testing.assert_allclose(given.weights, aligned_mtl(near).weights, rtol=1e-6)
    array = aligned_mtl(wide_near.numpy(), eps=eps)
    np.testing.assert_array_equal(array.weights, given.weights)
    if dtype == torch.float32:
        assert aligned_mtl(near.numpy()).kappa == pytest.approx(2)
    # The largest eigenvalue stays, and less than float64's rounding is not believed.
    assert aligned_mtl(wide_near, eps=0.9).weights[0] == pytest.approx(1 / 3)
    double = torch.diag(torch.tensor([2.0, 1.0, 4 * EPS], dtype=torch.float64))
    assert aligned_mtl(double, eps=0.0).kappa == pytest.approx(2)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 2.0, 10.0])
@pytest.mark.filterwarnings("ignore:Solution may be inaccurate:UserWarning")
def test_fairgrad_against_newton_in_logarithms(alpha: float, oracle: Any) -> None:
    for tasks in (1, 2, 3, 8, 20):
        g = gram(np.random.default_rng(tasks), tasks, "full", decades=0.5)
        g = (g + g.T) / 2
        np.testing.assert_allclose(fairgrad(g, alpha).weights, oracle.fairgrad(g, alpha), rtol=1e-9)


@pytest.mark.parametrize("tasks", [1, 2, 3, 9, 32])
def test_pcgrad_is_the_projected_gradients(tasks: int, oracle: Any) -> None:
    rng = np.random.default_rng(tasks)
    for kind in ("full", "low_rank", "near_opposite"):
        rows = updates(rng, tasks, kind) * 10.0 ** rng.uniform(-1, 1, size=(tasks, 1))
        orders = orders_of(tasks, rng)
        result = pcgrad(rows @ rows.T, orders)
        expected = oracle.pcgrad(rows, orders)
        got = result.weights @ rows
        np.testing.assert_allclose(got, expected, atol=1e-12 * np.abs(rows).max() * tasks**2)
        assert result.iterations <= tasks * (tasks - 1)


@pytest.mark.parametrize("tasks", [2, 3, 8, 17, 40, 64])
def test_planted_least_norm(tasks: int) -> None:
    rng = np.random.default_rng(tasks)
    for inside in {1, 2, (tasks + 1) // 2, tasks}:
        w = np.zeros(tasks)
        w[rng.permutation(tasks)[:inside]] = rng.dirichlet(np.ones(inside))
        g = planted_least_norm(rng, w, 2 * tasks + 3)
        result = mgda(g)
        np.testing.assert_allclose(result.weights, w, atol=1e-10)
        assert result.weights @ g @ result.weights == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 17, 64])
@pytest.mark.parametrize("alpha", [0.25, 1.0, 3.0])
def test_planted_fair_weights(tasks: int, alpha: float) -> None:
    rng = np.random.default_rng(tasks)
    for rank in {1, max(1, tasks // 4), tasks}:
        a = 10.0 ** rng.uniform(-1, 1, size=tasks)
        # a_i (G a)_i = a_i^(1 - 1/alpha)
        g = planted(rng, a, a ** (1 - 1 / alpha), rank)
        result = fairgrad(g, alpha)
        assert result.ok, result
        np.testing.assert_allclose(result.weights, a, rtol=1e-12 + 100 * EPS * result.kappa)


def test_fairgrad_at_1_is_bargaining() -> None:
    rng = np.random.default_rng(1)
    for tasks in (1, 2, 5, 16):
        g = gram(rng, tasks, decades=4)
        np.testing.assert_allclose(fairgrad(g).weights, bargaining(g).weights, rtol=1e-9)


def test_orthogonal_gradients() -> None:
    n = np.array([0.5, 1.0, 4.0])
    g = np.diag(n**2)
    np.testing.assert_allclose(mgda(g).weights, n**-2 / (n**-2).sum(), rtol=1e-14)
    np.testing.assert_allclose(imtl_g(g).weights, (1 / n) / (1 / n).sum(), rtol=1e-14)
    np.testing.assert_allclose(upgrad(g).weights, np.full(3, 1 / 3), rtol=1e-15)
    np.testing.assert_allclose(aligned_mtl(g).weights, 0.5 / n / 3, rtol=1e-14)
    np.testing.assert_allclose(aligned_mtl(g, "median").weights, 1 / n / 3, rtol=1e-14)
    rmse = np.sqrt((n**2).mean())
    np.testing.assert_allclose(aligned_mtl(g, "rmse").weights, rmse / n / 3, rtol=1e-14)
    np.testing.assert_allclose(fairgrad(g, 0.5).weights, n ** (-2 / 3), rtol=1e-12)
    np.testing.assert_allclose(pcgrad(g, orders_of(3)).weights, np.ones(3))


def test_two_tasks_in_closed_form() -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        n1, n2 = 10.0 ** rng.uniform(-3, 3, size=2)
        rho = rng.uniform(-0.999, 0.999)
        g = np.array([[n1 * n1, rho * n1 * n2], [rho * n1 * n2, n2 * n2]])
        first = np.clip((g[1, 1] - g[0, 1]) / (g[0, 0] + g[1, 1] - 2 * g[0, 1]), 0, 1)
        np.testing.assert_allclose(mgda(g).weights, [first, 1 - first], atol=1e-12)
        np.testing.assert_allclose(imtl_g(g).weights, np.array([n2, n1]) / (n1 + n2), rtol=1e-14)
        # Each is projected on the plane of the other where they conflict.
        pull = max(-rho, 0.0)
        expected = 0.5 + 0.5 * pull * np.array([n2 / n1, n1 / n2])
        np.testing.assert_allclose(upgrad(g).weights, expected, rtol=1e-12)


@settings(max_examples=250, deadline=None)
@given(samples(), st.integers(0, 2**32 - 1))
def test_optimality_on_any_gram(sample: Sample, seed: int) -> None:
    g = sample.gram
    tasks = len(g)
    rng = np.random.default_rng(seed)

    result = mgda(g)
    w = result.weights
    assert result.ok
    assert (w >= 0).all()
    assert w.sum() == pytest.approx(1, rel=1e-13)
    assert result.residual <= KKT
    # Rounding the weights moves w'Gw by eps (sum_i w_i |g_i|)^2, which the shortest feels most.
    lengths = np.sqrt(np.diag(g))
    assert mgda_violation(g, w) <= 1e-8 + 64 * tasks * EPS * (w @ lengths) / lengths.min()

    u = 10.0 ** rng.uniform(-2, 2, size=tasks)
    for reference in (None, u):
        result = dual_cone(g, reference)
        assert result.ok
        assert result.residual <= KKT
        lower = np.full(tasks, 1 / tasks) if reference is None else u
        assert (result.weights >= lower).all()
        assert cone_violation(g, result.weights, lower) <= 1e-8

    result = upgrad(g)
    assert result.ok
    assert result.residual <= KKT
    # No conflict is left.
    n, c = cosines(g)
    y = wide(result.weights) * n
    assert (c @ y).min() >= -KKT * y.sum()

    radius = float(rng.choice([0.1, 0.4, 1.5]))
    lengths = np.sqrt(np.diag(g))
    result = cagrad(g, radius)
    assert result.ok
    assert result.residual <= 1e-10
    violation, reached = cagrad_gap(g, result.weights, radius)
    assert violation <= 1e-8
    # |g0| and |d - g0| are known to within eps of the squares of the lengths they sum.
    n, c = cosines(g)
    mean = float(np.sqrt(max(n @ c @ n, 0))) / tasks
    if mean > 0:
        shift = (result.weights - 1 / tasks) @ lengths / (mean * radius)
        loss = 1e6 * EPS * (shift**2 + (lengths.mean() / mean) ** 2)
        assert reached <= 1 + 1e-9 + loss


@settings(max_examples=100, deadline=None)
@given(samples(kinds=INDEFINITE_KINDS))
def test_indefinite_by_rounding(sample: Sample) -> None:
    # The solution is that of a Gram matrix as near as the given one is to being one.
    g = sample.gram
    for name in ("mgda", "dual_cone", "upgrad"):
        result = ONE_GRAM[name](g)
        assert result.status in ("solved", "not_psd")
        assert not result.ok or np.isfinite(result.weights).all()
        assert not result.ok or result.residual <= 1e-2


@settings(max_examples=150, deadline=None)
@given(samples(), st.sampled_from([0.1, 0.5, 2.0, 7.0]))
def test_fairgrad_on_any_gram(sample: Sample, alpha: float) -> None:
    g = gram(np.random.default_rng(sample.seed), sample.tasks, sample.kind, min(sample.decades, 3))
    result = fairgrad(g, alpha)
    if not result.ok:
        assert result.status in ("near_stationary", "max_iterations")
        assert sample.kind in ("low_rank", "duplicates", "near_opposite")
        return
    a = wide(result.weights)
    assert (a > 0).all()
    gains = wide(g) @ a
    noise = 64 * EPS * result.kappa
    assert np.abs(a ** (1 / wide(alpha)) * gains - 1).max() <= 1e-10 + noise


@settings(max_examples=200, deadline=None)
@given(symmetric_matrices())
def test_any_matrix_ends_with_a_status(g: np.ndarray) -> None:
    for name, function in ONE_GRAM.items():
        result = function(g)
        assert result.status in STATUSES, name
        assert np.isfinite([result.residual, result.kappa]).all(), name
        assert (result.weights is None) != result.ok
        assert not result.ok or np.isfinite(result.weights).all(), name


@pytest.mark.parametrize("tasks", [11, 15, 20, 40, 64])
@pytest.mark.filterwarnings("ignore:Solution may be inaccurate:UserWarning")
def test_mgda_on_hard_grams(tasks: int, oracle: Any) -> None:
    for seed in range(4):
        g = hard(np.random.default_rng(seed), tasks)
        result = mgda(g)
        w = result.weights
        value = w @ g @ w
        # Far below the shortest gradient, and right.
        assert value < 0.05 * np.diag(g).min()
        assert mgda_violation(g, w) <= 1e-13
        theirs = oracle.mgda(g)
        assert value <= theirs @ g @ theirs * (1 + 1e-7)


@pytest.mark.parametrize("tasks", [65, 200, 600])
def test_many_tasks_on_the_heap(tasks: int) -> None:
    rng = np.random.default_rng(tasks)
    g = gram(rng, tasks, "full", decades=1)
    assert mgda_violation(g, mgda(g).weights) <= KKT
    v = dual_cone(g).weights
    assert cone_violation(g, v, np.full(tasks, 1 / tasks)) <= KKT
    assert cagrad_gap(g, cagrad(g).weights, 0.4)[0] <= KKT
    n, c = cosines(g)
    projections = c @ (imtl_g(g).weights * n)
    np.testing.assert_allclose((projections / projections[0]).astype(float), 1, rtol=1e-10)
    a = fairgrad(g, 2.0).weights
    np.testing.assert_allclose(a**0.5 * (g @ a), 1, rtol=1e-9)
    assert aligned_mtl(g).ok
    assert pcgrad(g, orders_of(tasks)).ok
    if tasks <= 200:
        y = wide(upgrad(g).weights) * n
        assert (c @ y).min() >= -KKT * y.sum()


@settings(max_examples=60, deadline=None)
@given(samples(16, ("full", "float32", "aligned")), st.integers(0, 2**32 - 1))
def test_scales(sample: Sample, seed: int) -> None:
    g = gram(np.random.default_rng(sample.seed), sample.tasks, sample.kind)
    tasks = len(g)
    rng = np.random.default_rng(seed)
    c = 2.0 ** rng.integers(-40, 41, size=tasks)
    scaled = c[:, None] * g * c
    u = rng.uniform(0.5, 1.5, size=tasks)
    # Each gradient by a factor of its own.
    v = dual_cone(g, u).weights
    np.testing.assert_allclose(dual_cone(scaled, u / c).weights, v / c, rtol=1e-11)
    np.testing.assert_allclose(upgrad(scaled, u / c).weights, upgrad(g, u).weights / c, rtol=1e-9)
    plain, other = imtl_g(g).weights / c, imtl_g(scaled).weights
    if plain is not None and abs(plain.sum()) > 1e-3 * np.abs(plain).sum():
        np.testing.assert_allclose(other, plain / plain.sum(), rtol=1e-9)
    # All by the same.
    k = 2.0**38
    for name in ("mgda", "cagrad", "upgrad", "imtl_g", "aligned_mtl", "pcgrad"):
        one, two = ONE_GRAM[name](g), ONE_GRAM[name](k * g)
        np.testing.assert_allclose(two.weights, one.weights, rtol=1e-13, err_msg=name)
    for alpha in (0.5, 2.0):
        one, two = fairgrad(g, alpha).weights, fairgrad(k * g, alpha).weights
        np.testing.assert_allclose(two, one * k ** (-1 / (1 + 1 / alpha)), rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(samples(20, ("full", "float32", "aligned")), st.randoms(use_true_random=False))
def test_order_of_the_tasks_does_not_matter(sample: Sample, random: Any) -> None:
    g = gram(np.random.default_rng(sample.seed), sample.tasks, sample.kind, 0.5)
    order = list(range(len(g)))
    random.shuffle(order)
    permuted = np.ascontiguousarray(g[np.ix_(order, order)])
    for name in ("mgda", "cagrad", "dual_cone", "upgrad", "imtl_g", "aligned_mtl", "fairgrad"):
        one, two = ONE_GRAM[name](g).weights, ONE_GRAM[name](permuted).weights
        scale = np.abs(one).max()
        np.testing.assert_allclose(two, one[order], atol=1e-8 * scale, err_msg=name)


def test_zero_gradients() -> None:
    g = gram(np.random.default_rng(4), 4)
    g[1] = g[:, 1] = 0
    np.testing.assert_array_equal(mgda(g).weights, [0, 1, 0, 0])
    for name in ("dual_cone", "upgrad"):
        weights = ONE_GRAM[name](g).weights
        assert weights[1] == 0.25
        others = [0, 2, 3]
        small = dual_cone(g[np.ix_(others, others)], np.full(3, 0.25)).weights
        if name == "dual_cone":
            np.testing.assert_allclose(weights[others], small, rtol=1e-12)
    assert cagrad(g).weights[1] == 0.25
    assert (g @ cagrad(g).weights).min() >= -1e-12 * np.abs(g).max()
    assert pcgrad(g, orders_of(4)).weights[1] == 1.0
    assert aligned_mtl(g).weights[1] == pytest.approx(0, abs=1e-15)
    for name in ("imtl_g", "fairgrad"):
        assert ONE_GRAM[name](g).status == "zero_update"
    g[2] = g[:, 2] = 0
    np.testing.assert_array_equal(mgda(g).weights, [0, 0.5, 0.5, 0])


@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
def test_all_zero(tasks: int) -> None:
    g = np.zeros((tasks, tasks))
    for name in ("mgda", "cagrad", "dual_cone", "upgrad", "aligned_mtl"):
        np.testing.assert_array_equal(ONE_GRAM[name](g).weights, np.full(tasks, 1 / tasks))
    np.testing.assert_array_equal(pcgrad(g, orders_of(tasks)).weights, np.ones(tasks))
    assert imtl_g(g).status == fairgrad(g).status == "zero_update"


def test_one_task() -> None:
    g = np.array([[4.0]])
    for name in ("mgda", "dual_cone", "upgrad", "imtl_g", "aligned_mtl", "pcgrad"):
        assert ONE_GRAM[name](g).weights == pytest.approx([1.0], rel=1e-15), name
    assert cagrad(g, 0.4).weights == pytest.approx([1.4], rel=1e-15)
    assert fairgrad(g, 1.0).weights == pytest.approx([0.5], rel=1e-15)


@pytest.mark.parametrize("tasks", [2, 3, 7])
def test_duplicates(tasks: int) -> None:
    g = np.full((tasks, tasks), 9.0)
    w = mgda(g).weights
    assert w @ g @ w == pytest.approx(9, rel=1e-14)
    d = cagrad(g, 0.5).weights
    assert d.sum() == pytest.approx(1.5, rel=1e-12)
    np.testing.assert_allclose(upgrad(g).weights, 1 / tasks, rtol=1e-14)
    np.testing.assert_allclose(aligned_mtl(g).weights, 1 / tasks, rtol=1e-13)
    np.testing.assert_allclose(pcgrad(g, orders_of(tasks)).weights, 1.0)
    if tasks == 2:
        np.testing.assert_allclose(imtl_g(g).weights, 0.5, rtol=1e-15)
    else:
        assert imtl_g(g).status == "singular"


def test_opposite_gradients() -> None:
    g = np.array([[1.0, -2.0], [-2.0, 4.0]])
    np.testing.assert_allclose(mgda(g).weights, [2 / 3, 1 / 3], rtol=1e-14)
    for name in ("dual_cone", "upgrad"):
        v = ONE_GRAM[name](g).weights
        assert np.abs(g @ v).max() <= 1e-13
    # The gain cannot rise above 0: d is the projection of g0, here 0.
    v = cagrad(g, 1.5).weights
    assert np.abs(g @ v).max() <= 1e-7
    assert fairgrad(g).status == "near_stationary"
    np.testing.assert_allclose(imtl_g(g).weights, [2 / 3, 1 / 3], rtol=1e-14)
    np.testing.assert_allclose(pcgrad(g, orders_of(2)).weights @ g, 0, atol=1e-13)


def test_cagrad_where_no_gain_is_left() -> None:
    # Three directions in a plane with 0 in their hull, the mean not 0.
    rows = np.array([[2.0, 0.0], [-1.0, 1.0], [-1.0, -0.5]])
    g = rows @ rows.T
    for c in (0.5, 1.0, 3.0):
        d = cagrad(g, c).weights @ rows
        g0 = rows.mean(0)
        gains = rows @ d
        assert np.linalg.norm(d - g0) <= c * np.linalg.norm(g0) * (1 + 1e-9)
        if c >= 1:
            # d = 0 is inside the ball and no d has gains > 0.
            np.testing.assert_allclose(gains, 0, atol=1e-7)
    # Its mean gradient is 0.
    rows = np.array([[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8]])
    np.testing.assert_allclose(cagrad(rows @ rows.T).weights, 1 / 3, rtol=1e-12)
    # No radius: the mean.
    np.testing.assert_array_equal(cagrad(gram(np.random.default_rng(0), 5), 0.0).weights, 0.2)


def test_singular_equal_projections() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(4, 3))
    assert imtl_g(rows @ rows.T).status == "singular"
    # sum v_i / |g_i| = 0: v = (1, 1, -...) by a third direction beyond the other two.
    c = np.array([[1.0, 0.0, 0.8], [0.0, 1.0, 0.59], [0.8, 0.59, 1.0]])
    v = np.linalg.solve(c, np.ones(3))
    assert v.min() < 0 < v.max()
    positive = v[v > 0].sum()
    n = np.where(v > 0, 1.0, -v[v < 0].sum() / positive)
    assert imtl_g(n[:, None] * c * n).status == "singular"


def test_what_is_wrong_is_named() -> None:
    eye = np.eye(3)
    cases = {
        "not_finite": [(0, 1, np.inf), (2, 2, np.nan), (0, 2, np.nan)],
        "not_psd": [(1, 1, -1.0)],
        "not_symmetric": [(0, 1, 0.1)],
    }
    for name, function in ONE_GRAM.items():
        for status, entries in cases.items():
            for i, j, value in entries:
                g = eye.copy()
                g[i, j] = value
                assert function(g).status == status, (name, status, value)
        assert function(np.array([[1.0, 2.0], [2.0, 1.0]])).status == "not_psd", name
        # A zero gradient with an inner product.
        zero = np.array([[0.0, 1.0], [1.0, 1.0]])
        expected = "zero_update" if name in ("imtl_g", "fairgrad") else "not_psd"
        assert function(zero).status == expected, name
    # Three directions of which each two are more than 120 degrees apart do not exist.
    apart = np.full((3, 3), -0.9) + 1.9 * np.eye(3)
    for name in ("mgda", "imtl_g", "aligned_mtl", "fairgrad"):
        assert ONE_GRAM[name](apart).status == "not_psd", name


@pytest.mark.parametrize("name", list(ONE_GRAM))
def test_arrays_and_tensors_of_all_kinds(name: str) -> None:
    function = ONE_GRAM[name]
    g = gram(np.random.default_rng(6), 3)
    g = (g + g.T) / 2
    before = g.copy()
    plain = function(g)
    assert isinstance(plain.weights, np.ndarray)
    assert plain.weights.dtype == np.float64
    t = torch.from_numpy(g)
    big = torch.zeros(6, 9, dtype=torch.float64)
    big[::2, ::3] = t
    for same in (t, t.clone().requires_grad_(), torch.nn.Parameter(t), big[::2, ::3], t.mT):
        result = function(same)
        assert result.weights.dtype == torch.float64
        assert not result.weights.requires_grad
        np.testing.assert_array_equal(result.weights.numpy(), plain.weights)
    for view in (np.asfortranarray(g), g.astype(np.float32)):
        np.testing.assert_allclose(function(view).weights, plain.weights, rtol=1e-4)
    for low in (torch.float32, torch.bfloat16, torch.float16):
        result = function(t.to(low))
        assert result.weights.dtype == torch.float32
        np.testing.assert_allclose(
            result.weights.numpy(), function(t.to(low).double().numpy()).weights, rtol=1e-6
        )
    strided = big.float()[::2, ::3]
    np.testing.assert_allclose(function(strided).weights.numpy(), plain.weights, rtol=1e-3)
    np.testing.assert_array_equal(g, before)
    # New memory each time.
    first, second = function(t).weights, function(t).weights
    first.fill_(7)
    np.testing.assert_array_equal(second.numpy(), plain.weights)


def test_lazily_negated_tensors() -> None:
    g = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    negated = torch.complex(torch.zeros_like(g), -g).conj().imag
    assert negated.is_neg()
    np.testing.assert_array_equal(mgda(negated).weights, mgda(g).weights)


def test_transforms_are_refused() -> None:
    grams = torch.eye(2).expand(3, 2, 2).clone()
    with pytest.raises(RuntimeError, match="data pointer"):
        torch.func.vmap(lambda g: mgda(g).weights)(grams)


class Sub(torch.Tensor):
    """A subclass, which goes through Python."""


def test_subclasses_of_tensors() -> None:
    t = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    result = mgda(t.as_subclass(Sub))
    torch.testing.assert_close(result.weights.as_subclass(torch.Tensor), mgda(t).weights)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_weights_come_back_to_the_device() -> None:
    t = torch.tensor([[2.0, 0.5], [0.5, 1.0]], device="cuda")
    for name, function in ONE_GRAM.items():
        weights = function(t).weights
        assert weights.device == t.device, name
        assert weights.dtype == torch.float32


@pytest.mark.parametrize("name", list(ONE_GRAM))
def test_bad_grams_are_refused(name: str) -> None:
    function = {**ONE_GRAM, "pcgrad": lambda g: pcgrad(g, [[1], [0]])}[name]
    for bad in (np.ones((2, 3)), torch.ones(2, 3), np.ones(4), torch.ones(4), torch.ones(1, 1, 1)):
        with pytest.raises(ValueError, match=r"gram must have the shape \(T, T\)"):
            function(bad)
    for empty in (np.ones((0, 0)), torch.ones(0, 0)):
        with pytest.raises(ValueError, match="gram must have the shape"):
            function(empty)
    with pytest.raises(TypeError, match="gram must be a numpy array or a tensor, got list"):
        function([[1.0]])
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(ValueError, match="floating dtype"):
            function(torch.ones(2, 2, dtype=dtype))
    with pytest.raises(ValueError, match="gram must have a floating dtype, got int64"):
        function(np.ones((2, 2), dtype=np.int64))
    with pytest.raises(ValueError, match="dense tensor"):
        function(torch.eye(2).to_sparse())


def test_bad_arguments_are_refused() -> None:
    g = torch.eye(3, dtype=torch.float64)
    for c in (-0.1, float("nan"), 1e7):
        with pytest.raises(ValueError, match="c must lie in"):
            cagrad(g, c)
    for alpha in (0.0, -1.0, 1e3):
        with pytest.raises(ValueError, match="alpha must lie in"):
            fairgrad(g, alpha)
    with pytest.raises(ValueError, match="scale must be 'min', 'median' or 'rmse', got 'max'"):
        aligned_mtl(g, "max")
    for eps in (-1e-9, 1.0, float("nan")):
        with pytest.raises(ValueError, match="eps must lie in"):
            aligned_mtl(g, "min", eps)
    with pytest.raises(ValueError, match=r"reference must have the shape \(3,\)"):
        dual_cone(g, [1.0, 2.0])
    with pytest.raises(ValueError, match="preference must be finite"):
        upgrad(g, np.array([1.0, np.nan, 1.0]))
    with pytest.raises(ValueError, match="reference must be T numbers"):
        dual_cone(g, "abc")
    for orders in ([[1, 2], [0, 2], [0, 0]], [[1, 2], [0, 2], [0, 2]], [[1, 2]], [[1], [0], [0]]):
        with pytest.raises(ValueError, match=r"orders must have the shape \(3, 2\)"):
            pcgrad(g, orders)
    with pytest.raises(ValueError, match="orders must hold integers"):
        pcgrad(g, np.ones((3, 2)))


def test_vectors_of_all_kinds() -> None:
    g = gram(np.random.default_rng(8), 3)
    u = np.array([0.2, 1.0, 0.5])
    expected = dual_cone(g, u).weights
    for same in (list(u), tuple(u), torch.tensor(u), u[::-1][::-1]):
        np.testing.assert_array_equal(dual_cone(g, same).weights, expected)
    orders = orders_of(3)
    expected = pcgrad(g, orders).weights
    for same in (orders.tolist(), torch.from_numpy(orders), orders.astype(np.int32)):
        np.testing.assert_array_equal(pcgrad(g, same).weights, expected)
    # Tasks that the reference leaves out, or pushes.
    v = dual_cone(g, [0.0, -1.0, 1.0]).weights
    assert cone_violation(g, v, np.array([0.0, -1.0, 1.0])) <= KKT


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=40),
    st.sampled_from([1.0, 1e-3, 1e3]),
)
def test_simplex_projection(values: list[float], unit: float) -> None:
    v = np.array(values) * unit if max(map(abs, values)) < 1e100 else np.array(values)
    result = simplex_projection(v)
    w = result.weights
    assert result.ok
    assert (w >= 0).all()
    assert w.sum() == pytest.approx(1, rel=1e-12)
    assert result.residual <= 1e-12
    # Optimal: v - w is one number where w > 0, and no more elsewhere.
    theta = v.max() - w[np.argmax(v)]
    inside = w > 0
    scale = 1 + np.abs(v[inside]).max()
    np.testing.assert_allclose((v - w)[inside], theta, atol=1e-12 * scale)
    assert (v[~inside] <= theta + 1e-12 * scale).all()


def test_simplex_projection_by_hand() -> None:
    np.testing.assert_allclose(simplex_projection(np.array([0.3, 2, 1.9])).weights, [0, 0.55, 0.45])
    np.testing.assert_allclose(simplex_projection(torch.full((4,), 5.0)).weights, [0.25] * 4)
    np.testing.assert_array_equal(simplex_projection(np.array([3.0])).weights, [1.0])
    w = np.array([0.2, 0.8])
    np.testing.assert_allclose(simplex_projection(w).weights, w, rtol=1e-15)
    big = np.random.default_rng(0).normal(size=1000)
    assert simplex_projection(big).weights.sum() == pytest.approx(1, rel=1e-12)
    assert simplex_projection(np.array([1.0, np.nan])).status == "not_finite"
    assert simplex_projection(np.array([1.0, np.inf])).weights is None
    with pytest.raises(ValueError, match=r"vector must have the shape \(T,\)"):
        simplex_projection(np.ones((2, 2)))
    with pytest.raises(TypeError, match="vector must be a numpy array or a tensor"):
        simplex_projection([1.0])


def test_results_repeat_bit_for_bit() -> None:
    for tasks in (2, 5, 8, 21, 64, 80):
        g = gram(np.random.default_rng(tasks), tasks, decades=1)
        for name, function in ONE_GRAM.items():
            first = function(g)
            assert name not in ALWAYS or first.ok
            np.testing.assert_array_equal(function(g.copy()).weights, first.weights)

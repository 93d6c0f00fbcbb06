"""The transcriptions that judge the weightings, by the equations that define each method."""

from __future__ import annotations

import numpy as np
import pytest
from gradient_cases import KINDS, REGULAR, Case, cases

from fastmto.reference import gradients as reference


def terms(w: np.ndarray, grads: np.ndarray) -> float:
    """The size of what sum_i w_i g_i adds up, which its rounding is relative to."""
    return float((np.abs(w) * np.linalg.norm(grads, axis=1)).sum())


@pytest.mark.parametrize("case", cases(), ids=str)
def test_mgda_satisfies_its_optimality_conditions(case: Case) -> None:
    grads = case.grads
    w, point = reference.min_norm_point(grads)
    assert (w >= 0).all()
    assert w.sum() == pytest.approx(1, rel=1e-14)
    # <g_i, d> >= ||d||^2 for every i.
    slack = grads @ point - point @ point
    allowed = 1e-14 * terms(w, grads) * np.linalg.norm(grads, axis=1)
    assert (slack >= -allowed).all()


@pytest.mark.parametrize("kind", ["none", "l2", "loss", "loss+"])
def test_mgda_normalises_only_to_find_the_weights(kind: str) -> None:
    grads, losses = Case(3, "full", decades=1.0).grads, np.array([0.5, 2.0, 7.0])
    lengths = np.linalg.norm(grads, axis=1)
    divisors = {"none": 1.0, "l2": lengths, "loss": losses, "loss+": losses * lengths}[kind]
    normalised = grads / np.broadcast_to(divisors, 3)[:, None]
    w = np.linalg.lstsq(grads.T, reference.normalised_mgda(grads, losses, kind), rcond=None)[0]
    np.testing.assert_allclose(w @ normalised, reference.mgda(normalised), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("c", [0.1, 0.4, 1.5])
@pytest.mark.parametrize("case", [c for c in cases(REGULAR, (2, 3, 5)) if c.decades <= 3], ids=str)
def test_cagrad_has_no_gap_between_its_primal_and_its_dual(case: Case, c: float) -> None:
    grads = case.grads
    lengths = np.linalg.norm(grads, axis=1)
    g_0 = grads.mean(axis=0)
    d = reference.cagrad(grads, c)
    kappa = c * np.linalg.norm(g_0)
    assert np.linalg.norm(d - g_0) == pytest.approx(kappa, rel=1e-10)
    # The dual's w is a multiple of what d adds to the mean.
    shares = np.linalg.lstsq((grads / lengths[:, None]).T, (d - g_0) / kappa, rcond=None)[0]
    w = shares / lengths / (shares / lengths).sum()
    assert w.min() >= -1e-9
    dual = (w @ grads) @ g_0 + kappa * np.linalg.norm(w @ grads)
    primal = (grads @ d).min()
    assert primal <= dual + 1e-12 * terms(w, grads) * np.linalg.norm(d)
    assert primal == pytest.approx(dual, rel=1e-9, abs=1e-11 * terms(w, grads) * np.linalg.norm(d))
    np.testing.assert_allclose(reference.cagrad(grads, c, rescale=1), d / (1 + c**2), rtol=1e-12)
    np.testing.assert_allclose(reference.cagrad(grads, c, rescale=2), d / (1 + c), rtol=1e-12)


def test_cagrad_without_radius_is_the_mean() -> None:
    grads = Case(3, "full").grads
    np.testing.assert_array_equal(reference.cagrad(grads, 0.0), grads.mean(axis=0))


@pytest.mark.parametrize("case", cases(), ids=str)
def test_the_projection_on_the_dual_cone_is_one(case: Case) -> None:
    grads = case.grads
    units = grads / np.linalg.norm(grads, axis=1)[:, None]
    x = grads.mean(axis=0)
    y = reference.project_on_dual_cone(x, grads)
    # Gradients that are opposite up to an angle e >= 1e-5 lose a factor of 1/e.
    length = np.linalg.norm(x)
    slack = (1e-9 if case.kind == "near_opposite" else 1e-12) * length
    assert (units @ y).min() >= -slack
    # y is the projection on a cone: x - y is orthogonal to y, and no point of the cone is nearer.
    assert abs((x - y) @ y) <= slack * length
    np.testing.assert_allclose(reference.project_on_dual_cone(y, grads), y, atol=slack)
    np.testing.assert_allclose(reference.dual_proj(grads), y, atol=slack)


def test_upgrad_is_the_mean_where_nothing_conflicts() -> None:
    grads = np.abs(Case(5, "full").grads)
    np.testing.assert_allclose(reference.upgrad(grads), grads.mean(axis=0), rtol=1e-14)
    p = np.array([1.0, 0.0, 2.0, 0.0, 3.0])
    np.testing.assert_allclose(reference.upgrad(grads, p), p @ grads, rtol=1e-14)
    np.testing.assert_allclose(reference.dual_proj(grads, p), p @ grads, rtol=1e-14)


def test_pcgrad_by_hand() -> None:
    grads = np.array([[1.0, 0.0], [-1.0, 1.0], [0.0, -2.0]])
    # 1 meets 2 (conflict: (1/2, 1/2)), then 3 (conflict: (1/2, 0)); 2 meets 3 ((-1, 0)), then 1
    # ((0, 0)); 3 meets 1 (no conflict), then 2 ((0, -2) + (-1, 1)).
    orders = [[1, 2], [2, 0], [0, 1]]
    np.testing.assert_allclose(reference.pcgrad(grads, orders), [-0.5, -1.0], rtol=1e-15)


@pytest.mark.parametrize("case", cases(REGULAR), ids=str)
def test_imtl_g_projects_equally_on_all(case: Case) -> None:
    grads = case.grads
    lengths = np.linalg.norm(grads, axis=1)
    d = reference.imtl_g(grads)
    projections = grads @ d / lengths
    np.testing.assert_allclose(projections, projections[0], rtol=1e-10)
    # The weights sum to 1: d lies in the affine hull of the gradients.
    scaled = np.linalg.lstsq((grads / lengths[:, None]).T, d, rcond=None)[0]
    assert (scaled / lengths).sum() == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("case", [c for c in cases(REGULAR) if c.decades <= 3], ids=str)
def test_fairgrad_satisfies_its_equation(case: Case, alpha: float) -> None:
    grads = case.grads
    d = reference.fairgrad(grads, alpha)
    a = (grads @ d) ** -alpha
    np.testing.assert_allclose(a @ grads, d, atol=1e-9 * terms(a, grads))


def test_nash_has_the_length_it_says() -> None:
    grads = Case(5, "conflicting", decades=3.0).grads
    assert np.linalg.norm(reference.nash(grads)) == pytest.approx(np.sqrt(5), rel=1e-12)
    assert np.linalg.norm(reference.nash(grads, max_norm=1.0)) == pytest.approx(1, rel=1e-12)
    np.testing.assert_array_equal(reference.nash(grads, max_norm=3.0), reference.nash(grads))


@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
@pytest.mark.parametrize("kind", KINDS)
def test_aligned_mtl_aligns(kind: str, scale: str) -> None:
    grads = Case(5, kind).grads
    values = np.linalg.svd(grads, compute_uv=False)
    values = values[values > 1e-7 * values[0]]
    sigma = {
        "min": values[-1],
        "median": values[len(values) // 2],
        "rmse": np.sqrt((values**2).mean()),
    }[scale]
    # The mean of the columns of sigma U V' has the length sigma ||V' 1/T||.
    _, _, v = np.linalg.svd(grads.T, full_matrices=False)
    expected = sigma * np.linalg.norm(v[: len(values)].sum(axis=1)) / 5
    assert np.linalg.norm(reference.aligned_mtl(grads, scale)) == pytest.approx(expected, rel=1e-9)


def test_graddrop_by_hand() -> None:
    grads = np.array([[1.0, 1.0, -1.0, 0.0], [3.0, -3.0, -2.0, 0.0]])
    # Purities: 1, 1/4, 0, 1/2.
    below = reference.graddrop(grads, np.array([0.9, 0.2, 0.9, 0.1]))
    np.testing.assert_array_equal(below, [4.0, 1.0, -3.0, 0.0])
    above = reference.graddrop(grads, np.array([0.9, 0.3, 0.1, 0.9]))
    np.testing.assert_array_equal(above, [4.0, -3.0, -3.0, 0.0])
    leaking = reference.graddrop(grads, np.array([0.9, 0.3, 0.1, 0.9]), np.array([0.5, 0.0]))
    np.testing.assert_array_equal(leaking, [4.0, -2.5, -3.0, 0.0])
    everything = reference.graddrop(grads, np.array([0.9, 0.3, 0.1, 0.9]), 1.0)
    np.testing.assert_array_equal(everything, grads.sum(axis=0))


def test_graddrop_at_activations_decides_by_the_batch() -> None:
    rng = np.random.default_rng(0)
    grads, uniforms = rng.normal(size=(3, 4, 5)), rng.uniform(size=5)
    ones = np.ones((4, 5))
    passed = reference.graddrop_activations(grads, ones, uniforms, 0.25)
    masks = reference.graddrop_masks(grads.sum(axis=1), uniforms)
    for i in range(5):
        kept = 0.25 + 0.75 * masks[:, i]
        np.testing.assert_allclose(passed[:, i], kept @ grads[:, :, i], rtol=1e-14)
    # The sign of an activation turns its gradient's sign into that of its contribution.
    signs = np.where(rng.uniform(size=(4, 5)) < 0.5, -1.0, 1.0)
    turned = reference.graddrop_activations(grads * signs, 2 * signs, uniforms, 0.25)
    np.testing.assert_allclose(turned, passed * signs, rtol=1e-14)


def test_db_mtl_averages_and_makes_equally_long() -> None:
    grads, losses = Case(3, "full", decades=2.0).grads, np.array([0.1, 1.0, 50.0])
    first, average = reference.db_mtl(grads, losses, np.zeros_like(grads), beta=0.9, eps=0.0)
    logs = grads / losses[:, None]
    np.testing.assert_allclose(average, 0.1 * logs, rtol=1e-12)
    lengths = np.linalg.norm(average, axis=1)
    expected = sum(lengths.max() * row / n for row, n in zip(average, lengths, strict=True))
    np.testing.assert_allclose(first, expected, rtol=1e-13)
    _, average = reference.db_mtl(2 * grads, losses, average, beta=0.5, eps=0.0)
    np.testing.assert_allclose(average, 0.05 * logs + logs, rtol=1e-12)
    silent = np.array([[0.0, 0.0], [3.0, 4.0]])
    direction, _ = reference.db_mtl(silent, np.ones(2), silent * 0, beta=0.0, eps=0.0)
    np.testing.assert_allclose(direction, [3.0, 4.0], rtol=1e-15)


def test_gradnorm_slope_is_the_derivative() -> None:
    grads = Case(3, "full", decades=1.0).grads
    w, losses, initial = np.array([0.5, 1.0, 1.5]), np.array([1.0, 2.0, 3.0]), np.full(3, 4.0)
    step = reference.gradnorm(w, grads, losses, initial)
    lengths = np.linalg.norm(grads, axis=1)
    np.testing.assert_allclose(step.norms, w * lengths, rtol=1e-15)
    ratios = losses / 4 / 0.5
    np.testing.assert_allclose(step.targets, (w * lengths).mean() * ratios**1.5, rtol=1e-14)
    # With the targets held constant.
    for i in range(3):
        moved = w + 1e-6 * np.eye(3)[i]
        slope = (np.abs(moved * lengths - step.targets).sum() - step.loss) / 1e-6
        assert step.slope[i] == pytest.approx(slope, rel=1e-6)

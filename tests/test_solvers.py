"""Exact bargaining: oracles, planted solutions, invariances, hard Gram matrices, bad input."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samplers import INDEFINITE_KINDS, KINDS, Sample, gram, planted, samples, symmetric_matrices

from fastmto.reference import updates as reference
from fastmto.solvers import STATUSES, Result, bargaining

EPS = np.finfo(np.float64).eps

#: The oracle file's words -> our names.
STATUS_OF = {
    "no solution: Pareto stationary": "near_stationary",
    "a task with a zero update": "zero_update",
    "not finite": "not_finite",
    "not positive semidefinite, no solution": "not_psd",
}


def residual(g: np.ndarray, a: np.ndarray, p: np.ndarray | float = 1.0) -> float:
    """max_i |a_i (G a)_i / p_i - 1|, in long double."""
    wide = g.astype(np.longdouble)
    return float(np.abs(a * (wide @ a.astype(np.longdouble)) / p - 1).max())


def assert_solution(g: np.ndarray, result: Result[Any], p: np.ndarray | float = 1.0) -> None:
    """Positive, finite, and exact to 1e-8 or what the rounding of the matrix is worth."""
    a = result.weights
    assert result.ok
    assert result.status == "solved"
    assert np.isfinite(a).all()
    assert (a > 0).all()
    # The solver rounds the cosines: 4 eps, amplified by kappa.
    assert residual(g, a, p) <= 1e-8 * max(1.0, 16 * EPS * result.kappa / 1e-8)


def oracles(shared_dir: Path, section: str) -> list[dict[str, Any]]:
    cases = json.loads((shared_dir / "oracles" / "bargaining.json").read_text())[section]
    assert len(cases) >= 6
    return [{**c, "gram": np.array([[float(x) for x in row] for row in c["gram"]])} for c in cases]


def test_oracle_weights(shared_dir: Path) -> None:
    for case in oracles(shared_dir, "bargaining"):
        result = bargaining(case["gram"])
        assert result.ok, case["name"]
        expected = [float(w) for w in case["weights"]]
        np.testing.assert_allclose(
            result.weights, expected, rtol=case["rtol"], err_msg=case["name"]
        )


def test_oracle_statuses(shared_dir: Path) -> None:
    for case in oracles(shared_dir, "status"):
        for method in ("exact", "ccp"):
            result = bargaining(case["gram"], method)
            assert result.status == STATUS_OF[case["status"]], (case["name"], method)
            assert result.weights is None
            assert not result.ok


@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 7, 8, 9, 16, 17, 31, 40, 64])
def test_planted_solutions(tasks: int) -> None:
    rng = np.random.default_rng(tasks)
    for preferred in (False, True):
        for decades in (0, 6):
            a = 10.0 ** rng.uniform(-decades, decades, size=tasks)
            p = 10.0 ** rng.uniform(-1, 1, size=tasks) if preferred else np.ones(tasks)
            for rank in {1, max(1, tasks // 4), tasks}:
                g = planted(rng, a, p, rank)
                result = bargaining(g, preference=p if preferred else None)
                assert_solution(g, result, p)
                np.testing.assert_allclose(result.weights, a, rtol=1e-12 + 100 * EPS * result.kappa)


@pytest.mark.parametrize("tasks", [65, 100, 257, 512])
def test_many_tasks_on_the_heap(tasks: int) -> None:
    rng = np.random.default_rng(tasks)
    a = 10.0 ** rng.uniform(-3, 3, size=tasks)
    result = bargaining(planted(rng, a, np.ones(tasks), tasks // 2))
    assert result.ok
    np.testing.assert_allclose(result.weights, a, rtol=1e-9)


@settings(max_examples=300, deadline=None)
@given(samples(kinds=KINDS + INDEFINITE_KINDS))
def test_hard_grams_are_solved_or_named(sample: Sample) -> None:
    g = sample.gram
    result = bargaining(g)
    assert result.status in STATUSES
    assert result.iterations <= 100
    assert np.isfinite([result.residual, result.kappa]).all()
    if result.ok:
        assert_solution(g, result)
        assert result.residual <= max(1e-13, 4 * EPS * result.kappa)
        assert result.kappa >= 0.999
    else:
        # Only these kinds can be Pareto stationary, or indefinite by their rounding.
        assert result.weights is None
        assert sample.kind.endswith(("low_rank", "duplicates", "near_opposite"))
        assert result.status in ("near_stationary", "not_psd")


@settings(max_examples=300, deadline=None)
@given(symmetric_matrices())
def test_any_matrix_ends_with_a_status(g: np.ndarray) -> None:
    for method in ("exact", "ccp"):
        result = bargaining(g, method)
        assert result.status in STATUSES
        assert np.isfinite([result.residual, result.kappa]).all()
        if result.ok:
            assert np.isfinite(result.weights).all()
            assert (result.weights > 0).all()
        else:
            assert result.weights is None


@pytest.mark.parametrize("kind", ["full", "aligned", "float32"])
@pytest.mark.parametrize("tasks", [2, 3, 8, 20])
def test_agrees_with_the_plain_reference(tasks: int, kind: str) -> None:
    rng = np.random.default_rng(7 * tasks)
    for _ in range(5):
        g = gram(rng, tasks, kind, decades=2)
        expected = reference.bargaining(torch.from_numpy(g)).numpy()
        result = bargaining(g)
        np.testing.assert_allclose(result.weights, expected, rtol=1e-11 * result.kappa)


@settings(max_examples=60, deadline=None)
@given(samples(20), st.integers(0, 2**32 - 1))
def test_lengths_of_the_updates_only_rescale(sample: Sample, seed: int) -> None:
    g = gram(np.random.default_rng(sample.seed), sample.tasks, sample.kind)
    # Powers of two: the scaled matrix is exactly that of the scaled updates.
    c = 2.0 ** np.random.default_rng(seed).integers(-40, 41, size=len(g))
    plain, scaled = bargaining(g), bargaining(c[:, None] * g * c)
    assert plain.status == scaled.status
    if plain.ok:
        np.testing.assert_allclose(scaled.weights, plain.weights / c, rtol=20 * EPS * plain.kappa)


@settings(max_examples=60, deadline=None)
@given(samples(20), st.randoms(use_true_random=False))
def test_order_of_the_tasks_does_not_matter(sample: Sample, random: Any) -> None:
    g = gram(np.random.default_rng(sample.seed), sample.tasks, sample.kind, 0.5)
    order = list(range(len(g)))
    random.shuffle(order)
    result, permuted = bargaining(g), bargaining(np.ascontiguousarray(g[np.ix_(order, order)]))
    if result.ok and result.kappa < 1e12:
        assert permuted.ok
        np.testing.assert_allclose(
            permuted.weights, result.weights[order], rtol=1e-11 + 20 * EPS * result.kappa
        )


@settings(max_examples=60, deadline=None)
@given(samples(30), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1.0, 8.0, 150.0]))
def test_warm_start_changes_the_way_only(sample: Sample, seed: int, decades: float) -> None:
    g = sample.gram
    rng = np.random.default_rng(seed)
    cold = bargaining(g)
    start = 10.0 ** rng.uniform(-decades, decades, size=len(g))
    if cold.ok:
        start *= cold.weights
    warm = bargaining(g, warm_start=start)
    assert warm.status == cold.status
    if cold.ok:
        np.testing.assert_allclose(warm.weights, cold.weights, rtol=1e-11 + 20 * EPS * cold.kappa)
        if decades == 0.0:
            assert warm.iterations == 0


def test_preferences() -> None:
    rng = np.random.default_rng(3)
    for tasks in (1, 2, 3, 8, 33):
        g = gram(rng, tasks)
        for spread in (0.1, 1.0, 4.0):
            p = 10.0 ** rng.uniform(-spread, spread, size=tasks)
            result = bargaining(g, preference=p)
            assert residual(g, result.weights, p) <= 1e-8
            doubled = bargaining(g, preference=2 * p)
            np.testing.assert_allclose(doubled.weights, np.sqrt(2) * result.weights, rtol=1e-11)
        equal = bargaining(g, preference=np.full(tasks, 1.0))
        np.testing.assert_allclose(equal.weights, bargaining(g).weights, rtol=1e-11)


def test_preferred_task_gets_more() -> None:
    g = np.array([[1.0, 0.3], [0.3, 1.0]])
    a = bargaining(g, preference=[4.0, 1.0]).weights
    assert a is not None
    assert a[0] > a[1]
    assert bargaining(np.array([[4.0]]), preference=[9.0]).weights == pytest.approx([1.5])


def test_closed_forms() -> None:
    assert bargaining(np.array([[4.0]])).weights == pytest.approx([0.5], rel=1e-15)
    rho = 0.25
    g = np.array([[4.0, 2 * rho * 3], [2 * rho * 3, 9.0]])
    expected = np.array([1 / 2, 1 / 3]) / np.sqrt(1 + rho)
    np.testing.assert_allclose(bargaining(g).weights, expected, rtol=1e-15)


def test_ridge_gives_stationary_tasks_weights() -> None:
    g = np.array([[1.0, -0.5, -0.5], [-0.5, 1.0, -0.5], [-0.5, -0.5, 1.0]])
    assert bargaining(g).status == "near_stationary"
    result = bargaining(g, ridge=1e-4)
    assert_solution(g + 1e-4 * np.eye(3), result)
    g = np.array([[4.0, -4.0], [-4.0, 4.0]])
    assert_solution(g + 0.01 * np.diag(np.diag(g)), bargaining(g, ridge=0.01))


def test_kappa_is_the_distance_to_stationarity() -> None:
    assert bargaining(np.eye(5)).kappa == pytest.approx(5)
    near = np.array([[1.0, -1 + 2**-20], [-1 + 2**-20, 1.0]])
    assert bargaining(near).kappa == pytest.approx(2**21)


def test_what_is_wrong_is_named() -> None:
    eye = np.eye(3)
    cases = {
        "not_finite": [(0, 1, np.inf), (2, 2, np.nan)],
        "zero_update": [(1, 1, 0.0), (1, 1, 1e-320)],
        "not_psd": [(1, 1, -1.0)],
        "not_symmetric": [(0, 1, 0.1)],
    }
    for status, entries in cases.items():
        for i, j, value in entries:
            g = eye.copy()
            g[i, j] = value
            assert bargaining(g).status == status, (status, value)
    assert bargaining(np.array([[1.0, 2.0], [2.0, 1.0]])).status == "not_psd"
    # A cosine a little above 1 is a rounded Gram matrix, not an error.
    assert bargaining(np.array([[1.0, 1.0001], [1.0001, 1.0]])).ok


def test_gram_is_not_modified_and_results_repeat_bit_for_bit() -> None:
    for tasks in (2, 5, 8, 21, 64, 80):
        g = gram(np.random.default_rng(tasks), tasks, decades=1)
        before = g.copy()
        first = bargaining(g)
        assert np.array_equal(g, before)
        assert np.array_equal(first.weights, bargaining(g).weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tensors(dtype: torch.dtype) -> None:
    g = torch.tensor([[4.0, 1.0], [1.0, 9.0]], dtype=dtype, requires_grad=True)
    result = bargaining(g)
    assert isinstance(result.weights, torch.Tensor)
    assert result.weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not result.weights.requires_grad
    np.testing.assert_allclose(
        result.weights.numpy(), bargaining(np.array([[4.0, 1.0], [1.0, 9.0]])).weights, rtol=1e-6
    )
    assert bargaining(torch.zeros(2, 2, dtype=dtype)).weights is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_tensor_comes_back_to_its_device() -> None:
    result = bargaining(torch.eye(3, device="cuda"))
    assert result.weights is not None
    assert result.weights.device.type == "cuda"


def test_arrays_of_other_layouts_and_dtypes() -> None:
    g = gram(np.random.default_rng(0), 6, decades=1)
    expected = bargaining(g).weights
    for other in (np.asfortranarray(g), np.repeat(g, 2, axis=1)[:, ::2], g.astype(np.longdouble)):
        np.testing.assert_array_equal(bargaining(other).weights, expected)
    assert bargaining(g.astype(np.float32)).weights.dtype == np.float64
    np.testing.assert_array_equal(
        bargaining(g, preference=[1] * 6, warm_start=torch.ones(6)).weights,
        bargaining(g, preference=np.ones(6), warm_start=np.ones(6)).weights,
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"gram": np.ones((2, 3))}, ValueError, r"gram must have the shape \(T, T\).*\(2, 3\)"),
        ({"gram": np.ones(4)}, ValueError, r"gram must have the shape .*\(4,\)"),
        ({"gram": np.ones((0, 0))}, ValueError, "gram must have the shape"),
        ({"gram": np.ones((2, 2), dtype=np.int64)}, ValueError, "gram must have a floating dtype"),
        ({"gram": np.ones((2, 2), dtype=complex)}, ValueError, "gram must have a floating dtype"),
        ({"gram": torch.ones(2, 2, dtype=torch.int32)}, ValueError, "gram must be a dense tensor"),
        ({"gram": torch.eye(2).to_sparse()}, ValueError, "gram must be a dense tensor"),
        ({"gram": [[1.0]]}, TypeError, "gram must be a numpy array or a tensor, got list"),
        ({"method": "nash"}, ValueError, "method must be 'exact' or 'ccp', got 'nash'"),
        ({"method": None}, ValueError, "method must be"),
        ({"preference": np.ones(3)}, ValueError, r"preference must have the shape \(2,\)"),
        ({"preference": np.array([1.0, 0.0])}, ValueError, "preference must be positive"),
        ({"preference": [1.0, float("nan")]}, ValueError, "preference must be positive"),
        ({"preference": ["a", "b"]}, ValueError, "preference must be T numbers"),
        ({"warm_start": [1.0, -1.0]}, ValueError, "warm_start must be positive"),
        ({"warm_start": np.ones((2, 1))}, ValueError, "warm_start must have the shape"),
        ({"tol": 0.0}, ValueError, "tol must lie in"),
        ({"tol": float("nan")}, ValueError, "tol must lie in"),
        ({"tol": "1"}, TypeError, "real number"),
        ({"ridge": -1.0}, ValueError, "ridge must lie in"),
        ({"method": "ccp", "max_steps": 0}, ValueError, "max_steps must lie in"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bargaining(**{"gram": np.eye(2), **arguments})


def test_result_is_a_value() -> None:
    result = bargaining(np.eye(2))
    for twin in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        assert twin.ok
        assert np.array_equal(twin.weights, result.weights)
        assert (twin.status, twin.iterations, twin.residual, twin.kappa) == (
            result.status,
            result.iterations,
            result.residual,
            result.kappa,
        )
    assert "status='solved'" in repr(result)
    with pytest.raises(AttributeError):
        result.status = "other"  # type: ignore[misc]
    failed = Result(None, "not_psd", 3, 0.5, 2.0)
    assert not failed.ok


def test_every_kind_is_sampled_with_solutions() -> None:
    rng = np.random.default_rng(0)
    for kind in KINDS:
        solved = [bargaining(gram(rng, 4, kind)).ok for _ in range(20)]
        assert any(solved), kind

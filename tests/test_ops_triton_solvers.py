"""The solvers on the device against those on the host: on a GPU where there is one, else
interpreted."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import samplers
import torch
from samplers import Array

from fastmto import solvers
from fastmto.solvers import STATUSES

pytest.importorskip("triton")

from fastmto.ops import cpu
from fastmto.ops.triton import backend as gpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = float(np.finfo(np.float64).eps)
#: Some of every padded size, at both ends of each; the interpreter needs seconds for 64.
TASKS = (1, 2, 3, 8, 17, 33)
ORACLE_STATUS = {
    "no solution: Pareto stationary": "near_stationary",
    "a task with a zero update": "zero_update",
    "not finite": "not_finite",
    "not positive semidefinite, no solution": "not_psd",
}


class Outcome(NamedTuple):
    """What a solver on the device wrote."""

    weights: Array
    status: str
    iterations: int
    residual: float
    kappa: float


def solved_on_device(solver: Callable[..., None], gram: Array, **options: Any) -> Outcome:
    """Solve on poisoned outputs, twice: the same bits, and weights only from a solved problem.

    Interpreted, larger problems are solved once.
    """
    device_gram = torch.tensor(np.asarray(gram, dtype=np.float64), device=DEVICE)
    before = device_gram.clone()
    runs = []
    for poison in (torch.nan, -1.0)[: 2 if DEVICE.type == "cuda" or len(gram) <= 8 else 1]:
        weights = torch.full((len(gram),), poison, dtype=torch.float64, device=DEVICE)
        info = torch.full((4,), poison, dtype=torch.float64, device=DEVICE)
        solver(device_gram, weights, info, **options)
        runs.append((weights, info))
    (first, info), (again, same) = runs[0], runs[-1]
    status = STATUSES[int(info[0])]
    assert info.isfinite().all()
    assert torch.equal(info, same)
    if status == "solved":
        assert torch.equal(first, again)
    else:
        assert first.isnan().all()
        assert again is first or (again == -1).all()
    assert torch.equal(device_gram.nan_to_num(7), before.nan_to_num(7))
    _, iterations, residual, kappa = info.tolist()
    return Outcome(first.cpu().numpy(), status, int(iterations), residual, kappa)


def check_bargaining(gram: Array, **options: Any) -> Outcome:
    """The host's status, and its weights within what rounding of the cosines allows."""
    host = solvers.bargaining(gram, **options)
    if "preference" in options:
        options["preference"] = torch.tensor(options["preference"], device=DEVICE)
    done = solved_on_device(gpu.bargaining, gram, **options)
    assert done.status == host.status
    if host.weights is not None:
        # Both stop at a residual of 1e-13 or, where that is more, at what rounding allows.
        close = 2e-13 + 8 * EPS * host.kappa
        np.testing.assert_allclose(done.weights, host.weights, rtol=close)
        assert done.residual <= max(1e-13, 4.1 * EPS * done.kappa)
        np.testing.assert_allclose(done.kappa, host.kappa, rtol=close)
        # Rounding ends the two ways at different steps where kappa is large.
        assert abs(done.iterations - host.iterations) <= (0 if host.kappa < 1e4 else 4)
    return done


def lengths_of(gram: Array) -> Array:
    root: Array = np.sqrt(np.diag(gram))
    return root


def kkt(gram: Array, w: Array) -> float:
    """Largest violation of (G w)_i >= w'G w, = where w_i > 0, relative to |g_i| sum_j w_j |g_j|."""
    lengths = lengths_of(gram)
    product = gram @ w
    short = (w @ product - product) / (lengths * (w @ lengths))
    return float(max(short.max(), np.abs(short[w > 0]).max()))


def check_mgda(gram: Array, exact: float = 1e-13, value: float = 1e-15) -> Outcome:
    """A point of the simplex with the host's status and value, and the KKT conditions."""
    done, host = solved_on_device(gpu.mgda, gram), solvers.mgda(gram)
    assert done.status == host.status
    if host.weights is not None:
        w, lengths = done.weights, lengths_of(gram)
        assert (w >= 0).all()
        assert abs(w.sum() - 1) <= 8 * EPS
        # Both are as good as rounding of the cosines lets them be, and no better.
        level = value * max(w @ lengths, host.weights @ lengths) ** 2
        assert w @ gram @ w <= host.weights @ gram @ host.weights + level
        assert done.residual <= exact
        assert kkt(gram, w) <= 10 * max(exact, kkt(gram, host.weights))
        assert done.kappa == 0
    return done


def seeded(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


CASES = [
    (tasks, number, kind)
    for tasks, (number, kind) in itertools.product(TASKS, enumerate(samplers.KINDS))
    # What a second size of the same padding would only repeat.
    if tasks < 33 or kind in ("full", "low_rank", "near_opposite", "float32")
]


@pytest.mark.parametrize(("tasks", "number", "kind"), CASES)
def test_bargaining_of_sampled_grams(tasks: int, number: int, kind: str) -> None:
    decades = (0.0, 12.0)[number % 2]
    check_bargaining(samplers.gram(seeded(tasks, number), tasks, kind, decades))


@pytest.mark.parametrize(("tasks", "number", "kind"), CASES)
def test_mgda_of_sampled_grams(tasks: int, number: int, kind: str) -> None:
    decades = (12.0, 0.0)[number % 2]
    check_mgda(samplers.gram(seeded(tasks, number), tasks, kind, decades), exact=1e-11)


@pytest.mark.parametrize("tasks", [2, 5, 16, 33])
def test_bargaining_of_planted_solutions(tasks: int) -> None:
    rng = seeded(tasks)
    weights = 10.0 ** rng.uniform(-6, 6, size=tasks)
    powers = rng.uniform(0.1, 5.0, size=tasks)
    for p in (np.ones(tasks), powers):
        gram = samplers.planted(rng, weights, p, rank=max(1, tasks // 4))
        done = check_bargaining(gram, **({} if p is not powers else {"preference": p}))
        np.testing.assert_allclose(done.weights, weights, rtol=2e-13 + 64 * EPS * done.kappa)


@pytest.mark.parametrize("tasks", [3, 8, 20, 40])
def test_mgda_of_planted_solutions(tasks: int) -> None:
    rng = seeded(tasks)
    weights = np.where(rng.random(tasks) < 0.5, rng.random(tasks), 0.0)
    weights[0] = 0.3
    weights /= weights.sum()
    gram = samplers.planted_least_norm(rng, weights, 2 * tasks + 2)
    done = check_mgda(gram)
    np.testing.assert_allclose(done.weights, weights, atol=1e-12)


@pytest.mark.parametrize("tasks", [3, 8, 17])
def test_mgda_where_lengths_differ_and_directions_nearly_cancel(tasks: int) -> None:
    for decades in (1.5, 12.0):
        check_mgda(samplers.hard(seeded(tasks), tasks, decades))


def test_most_tasks() -> None:
    """Every row of the largest size in use."""
    gram = samplers.gram(seeded(64), 64, "aligned", 3.0)
    check_bargaining(gram)
    check_mgda(gram)


def test_bargaining_near_conflict() -> None:
    for gap in (1e-2, 1e-6, 1e-12):
        check_bargaining(np.array([[1.0, gap - 1], [gap - 1, 1.0]]))
        gram = np.full((6, 6), (gap - 1) / 5)
        np.fill_diagonal(gram, 1.0)
        done = check_bargaining(gram)
        np.testing.assert_allclose(done.weights, gap**-0.5, rtol=2e-13 + 8 * EPS * done.kappa)


def test_bargaining_with_a_ridge_has_a_solution() -> None:
    gram = np.array([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 1e6]])
    assert check_bargaining(gram).status == "near_stationary"
    assert check_bargaining(gram, ridge=1e-3).status == "solved"


def test_oracle_weights(shared_dir: Path) -> None:
    cases = json.loads((shared_dir / "oracles" / "bargaining.json").read_text())
    assert len(cases["bargaining"]) >= 6
    for case in cases["bargaining"]:
        done = check_bargaining(np.array(case["gram"], dtype=np.float64))
        expected = [float(w) for w in case["weights"]]
        np.testing.assert_allclose(done.weights, expected, rtol=case["rtol"], err_msg=case["name"])
    for case in cases["other_methods"]:
        done = check_mgda(np.array(case["gram"], dtype=np.float64))
        np.testing.assert_allclose(done.weights, case["mgda"], atol=2e-12, err_msg=case["name"])


# What the interpreter's numpy says of NaN and infinity.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("i", "j", "value", "status"),
    [
        (0, 1, np.inf, "not_finite"),
        (2, 2, np.nan, "not_finite"),
        (1, 1, 0.0, "zero_update"),
        (1, 1, 1e-320, "zero_update"),
        (1, 1, -1.0, "not_psd"),
        (0, 1, 0.1, "not_symmetric"),
    ],
)
def test_what_is_wrong_is_named(i: int, j: int, value: float, status: str) -> None:
    gram = np.eye(3)
    gram[i, j] = value
    assert check_bargaining(gram).status == status
    assert check_mgda_status(gram) == ("solved" if status == "zero_update" else status)


def check_mgda_status(gram: Array) -> str:
    done, host = solved_on_device(gpu.mgda, gram), solvers.mgda(gram)
    assert done.status == host.status
    if host.weights is not None:
        np.testing.assert_allclose(done.weights, host.weights, rtol=4 * EPS)
    return done.status


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_oracle_statuses(shared_dir: Path) -> None:
    cases = json.loads((shared_dir / "oracles" / "bargaining.json").read_text())["status"]
    assert len(cases) >= 6
    for case in cases:
        gram = np.array([[float(x) for x in row] for row in case["gram"]])
        assert check_bargaining(gram).status == ORACLE_STATUS[case["status"]], case["name"]


def test_indefinite_matrices_are_refused() -> None:
    gram = np.full((3, 3), -0.9)
    np.fill_diagonal(gram, 1.0)
    assert check_bargaining(gram).status == "not_psd"
    assert check_mgda(gram).status == "not_psd"
    two = np.array([[1.0, 2.0], [2.0, 1.0]])
    assert check_bargaining(two).status == "not_psd"
    assert check_mgda(two).status == "not_psd"
    # A cosine a little above 1 is a rounded Gram matrix, not an error.
    rounded = np.array([[1.0, 1.0001], [1.0001, 1.0]])
    assert check_bargaining(rounded).status == "solved"
    assert check_mgda(rounded).status == "solved"


def test_mgda_of_zero_updates_shares_the_weight_among_them() -> None:
    gram = np.diag([1.0, 0.0, 4.0, 0.0])
    assert check_mgda_status(gram) == "solved"


def test_mgda_of_pareto_stationary_tasks_finds_the_combination() -> None:
    gram = np.array([[1.0, -0.5, -0.5], [-0.5, 1.0, -0.5], [-0.5, -0.5, 1.0]])
    np.testing.assert_allclose(check_mgda(gram).weights, 1 / 3, rtol=1e-14)


SOLVERS = pytest.mark.parametrize("solver", [gpu.bargaining, gpu.mgda])


@SOLVERS
@pytest.mark.parametrize("tasks", [0, 65])
def test_other_numbers_of_tasks_are_refused(solver: Callable[..., None], tasks: int) -> None:
    gram = torch.eye(tasks, dtype=torch.float64)
    outputs = torch.zeros(tasks, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"1 to 64 tasks, got .*{tasks}"):
        solver(gram, *outputs)


@SOLVERS
@pytest.mark.parametrize(
    ("place", "bad", "message"),
    [
        (0, torch.ones(3), r"gram must be \(T, T\) .* got \(3,\)"),
        (0, torch.ones(3, 4).double(), r"gram must have shape \(3, 3\)"),
        (0, torch.eye(3), "gram must be torch.float64"),
        (0, torch.eye(6).double()[::2, ::2], "gram must be contiguous"),
        (1, torch.ones(4).double(), r"weights must have shape \(3,\)"),
        (1, torch.ones(3), "weights must be torch.float64"),
        (1, torch.ones(6).double()[::2], "weights must be contiguous"),
        (2, torch.ones(3).double(), r"info must have shape \(4,\)"),
        (2, torch.ones(4, dtype=torch.float64, device="meta"), "info must be on"),
    ],
)
def test_wrong_arguments_are_named(
    solver: Callable[..., None], place: int, bad: torch.Tensor, message: str
) -> None:
    arguments = [torch.eye(3).double(), torch.ones(3).double(), torch.ones(4).double()]
    arguments[place] = bad
    with pytest.raises(ValueError, match=f"^{message}"):
        solver(*arguments)


@pytest.mark.parametrize("name", ["bargaining", "mgda"])
@pytest.mark.parametrize("tasks", [1, 2, 5, 20])
def test_backends_write_alike(name: str, tasks: int) -> None:
    """Also where there is no solution: then the weights stay as they are on both."""
    grams = [samplers.gram(seeded(tasks, k), tasks, "full", 6.0) for k in range(2)]
    for gram in (*grams, np.full((tasks, tasks), np.nan), -np.eye(tasks)):
        written = []
        for module, device in ((gpu, DEVICE), (cpu, torch.device("cpu"))):
            weights, info = (torch.full((n,), -7.0, dtype=torch.float64) for n in (tasks, 4))
            weights, info = weights.to(device), info.to(device)
            getattr(module, name)(torch.tensor(gram, device=device), weights, info)
            written.append((weights.cpu(), info.cpu()))
        (ours, told), (theirs, expected) = written
        assert told[0] == expected[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        solved = STATUSES[int(told[0])] == "solved"
        assert solved == (gram is grams[0] or gram is grams[1])
        assert solved != bool((ours == -7.0).all())
        if solved and name == "bargaining":
            torch.testing.assert_close(told[3], expected[3], rtol=1e-9, atol=0)


def test_wrong_preferences_are_named() -> None:
    arguments = torch.eye(3).double(), torch.ones(3).double(), torch.ones(4).double()
    for bad in (torch.ones(2).double(), torch.ones(3), torch.ones(6).double()[::2]):
        with pytest.raises(ValueError, match=r"^preference must"):
            gpu.bargaining(*arguments, preference=bad)

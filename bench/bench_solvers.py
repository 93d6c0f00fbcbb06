"""The small solvers through their public Python functions, beside the peers.

    pytest bench/bench_solvers.py --benchmark-columns=median,min

Correctness is asserted before anything is timed. `extra_info` has the microseconds a call and

- for bargaining at T = 2, 3 and 8, how many times longer cvxpy (Clarabel; the published ECOS is no
  longer part of it) takes for the published 20 outer steps on the same Gram matrix;
- for each weighting, called on CPU tensors, how many times longer TorchJD's own takes on the same
  tensors, as the median over rounds in which both have their turn: 8 Gram matrices one after the
  other, as in training (its NashMTL starts from its last weights), on one thread, which is best for
  both; skipped without torchjd or a solver it calls;
- the value w'Gw of TorchJD's and of our MGDA on hard Gram matrices, over the least one (cvxpy).
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastmto import solvers, weightings
from fastmto.solvers import bargaining

#: Microseconds a call that the exact solve must not exceed, by number of tasks.
TARGETS = {2: 1.0, 8: 3.0, 64: 60.0}
RATIO = 10_000
PEERS = (2, 3, 8)

#: A figure a weighting must reach beside TorchJD's, from this many tasks on.
FASTER = {
    "NashMTL": (1000, 2),
    "CAGrad": (100, 2),
    "MGDA": (100, 3),
    "UPGrad": (10, 2),
    "IMTLG": (10, 2),
    "AlignedMTL": (10, 2),
}
ROUNDS = 15


def make_gram(tasks: int, family: str, seed: int = 0) -> np.ndarray:
    """easy: random updates; conflict: two of them at 1 + cos = 1e-4."""
    rng = np.random.default_rng(tasks + 1000 * seed)
    rows = rng.normal(size=(tasks, 2 * tasks + 5))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    if family == "conflict":
        side = rows[1] - (rows[1] @ rows[0]) * rows[0]
        side /= np.linalg.norm(side)
        rho = -1 + 1e-4
        rows[1] = rho * rows[0] + np.sqrt(1 - rho * rho) * side
    rows *= np.exp(rng.normal(size=(tasks, 1)) / 2)
    return np.ascontiguousarray(rows @ rows.T)


def assert_exact(gram: np.ndarray, weights: np.ndarray) -> None:
    np.testing.assert_allclose(weights * (gram @ weights), 1, rtol=1e-8)


def microseconds(benchmark: Any) -> float:
    return float(benchmark.stats.stats.median * 1e6)


@pytest.mark.parametrize("family", ["easy", "conflict"])
@pytest.mark.parametrize("tasks", [2, 3, 8, 20, 40, 64])
def test_exact(benchmark: Any, tasks: int, family: str) -> None:
    gram = make_gram(tasks, family)
    result = bargaining(gram)
    assert_exact(gram, result.weights)
    benchmark.pedantic(
        bargaining, args=(gram,), rounds=300, iterations=200 if tasks <= 8 else 20, warmup_rounds=20
    )
    us = microseconds(benchmark)
    benchmark.extra_info.update(us=round(us, 3), newton_steps=result.iterations)
    if family == "easy" and tasks in TARGETS:
        benchmark.extra_info["target_us"] = TARGETS[tasks]
        assert us <= TARGETS[tasks]


@pytest.mark.parametrize("tasks", [2, 3, 8, 20, 40, 64])
def test_ccp(benchmark: Any, tasks: int) -> None:
    # Equal directions in part, so that all constraints stay active: the usual, short way.
    gram = make_gram(tasks, "easy")
    lengths = np.sqrt(np.diag(gram))
    gram = 0.5 * gram + 0.5 * np.outer(lengths, lengths)
    result = bargaining(gram, "ccp")
    assert_exact(gram, result.weights)
    benchmark.pedantic(bargaining, args=(gram, "ccp"), rounds=100, iterations=20, warmup_rounds=10)
    benchmark.extra_info.update(us=round(microseconds(benchmark), 3), outer_steps=result.iterations)


@pytest.mark.parametrize("tasks", PEERS)
@pytest.mark.filterwarnings("ignore:Solution may be inaccurate:UserWarning")
# cvxpy reports the parameter product of the published form on some versions.
@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem:UserWarning")
def test_against_cvxpy(benchmark: Any, tasks: int) -> None:
    pytest.importorskip("cvxpy", reason="the oracle extra is not installed")
    from fastmto.solvers import oracle

    gram = make_gram(tasks, "easy")
    lengths = np.sqrt(np.diag(gram))
    gram = 0.5 * gram + 0.5 * np.outer(lengths, lengths)
    assert_exact(gram, bargaining(gram).weights)
    np.testing.assert_allclose(oracle.ccp_published(gram), bargaining(gram).weights, rtol=1e-2)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        oracle.ccp_published(gram)
        times.append(time.perf_counter() - start)
    peer = statistics.median(times) * 1e6
    benchmark.pedantic(bargaining, args=(gram,), rounds=300, iterations=200, warmup_rounds=20)
    ratio = peer / microseconds(benchmark)
    benchmark.extra_info.update(
        us=round(microseconds(benchmark), 3), cvxpy_us=round(peer), times_faster=round(ratio)
    )
    assert ratio >= RATIO


@pytest.mark.parametrize("tasks", [2, 3, 8, 20, 64])
@pytest.mark.parametrize(
    "name", ["mgda", "cagrad", "dual_cone", "upgrad", "imtl_g", "aligned_mtl", "fairgrad"]
)
def test_baselines(benchmark: Any, name: str, tasks: int) -> None:
    gram = torch.from_numpy(make_gram(tasks, "easy"))
    solve = getattr(solvers, name)
    assert solve(gram).ok
    assert solve(gram).residual <= 1e-12
    iterations = 200 if tasks <= 8 else 10
    benchmark.pedantic(solve, args=(gram,), rounds=50, iterations=iterations, warmup_rounds=5)
    benchmark.extra_info.update(us=round(microseconds(benchmark), 3))


def seconds(
    call: Callable[[torch.Tensor], Any], grams: Sequence[torch.Tensor], calls: int
) -> float:
    """Seconds a call, over `calls` of them on these matrices in turn."""
    given = [grams[k % len(grams)] for k in range(calls)]
    start = time.perf_counter()
    for gram in given:
        call(gram)
    return (time.perf_counter() - start) / calls


def peer(name: str, tasks: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """TorchJD's weighting of this name; skips where it, or a solver it calls, is missing."""
    aggregation = pytest.importorskip("torchjd.aggregation", reason="torchjd is not installed")
    options: dict[str, Any] = {}
    if name == "CAGrad":
        options["c"] = 0.4
    try:
        weighting = getattr(aggregation, f"{name}Weighting", None)
        if weighting is not None:
            return weighting(**options)
        module = importlib.import_module("torchjd.aggregation._nash_mtl")
        # The defaults of its aggregator.
        return module._NashMTLWeighting(
            n_tasks=tasks, max_norm=1.0, update_weights_every=1, optim_niter=20
        )
    except ImportError as error:
        pytest.skip(f"torchjd lacks what its {name} calls: {error}")


@pytest.mark.parametrize("tasks", [2, 3, 8, 20])
@pytest.mark.parametrize("name", list(FASTER))
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_beside_torchjd(
    request: pytest.FixtureRequest, benchmark: Any, name: str, tasks: int
) -> None:
    grams = [torch.from_numpy(make_gram(tasks, "easy", seed)) for seed in range(8)]
    ours, theirs = getattr(weightings, name)(), peer(name, tasks)
    # TorchJD's NashMTL takes the gradients, of which it forms the Gram matrix itself.
    given = [torch.linalg.cholesky(gram) for gram in grams] if name == "NashMTL" else grams
    assert all(torch.isfinite(ours(gram)).all() for gram in grams)
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)
    seconds(ours, grams, 200)
    slow = seconds(theirs, given, 8)
    calls = max(8, int(1e-3 / slow))
    rounds = 3 if slow > 0.01 else ROUNDS
    pairs = [(seconds(ours, grams, 104), seconds(theirs, given, calls)) for _ in range(rounds)]
    benchmark.pedantic(ours, args=(grams[0],), rounds=20, iterations=100)
    us, peer_us = (statistics.median(times) * 1e6 for times in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    least, since = FASTER[name]
    benchmark.extra_info.update(
        us=round(us, 3), torchjd_us=round(peer_us, 1), times_faster=round(ratio)
    )
    if tasks >= since:
        benchmark.extra_info["least"] = least
        assert ratio >= least


@pytest.mark.parametrize("tasks", [3, 8, 11, 15, 20, 40])
@pytest.mark.filterwarnings("ignore:Solution may be inaccurate:UserWarning")
def test_least_norm_of_hard_grams(benchmark: Any, tasks: int) -> None:
    pytest.importorskip("cvxpy", reason="the oracle extra is not installed")
    from fastmto.solvers import oracle

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from samplers import hard

    theirs = peer("MGDA", tasks)
    off, peer_off = [], []
    for seed in range(10):
        gram = hard(np.random.default_rng(seed), tasks)
        least = oracle.mgda(gram)
        value = least @ gram @ least
        w = solvers.mgda(gram).weights
        p = theirs(torch.from_numpy(gram)).numpy()
        off.append(w @ gram @ w / value)
        peer_off.append(p @ gram @ p / value)
    assert max(off) <= 1 + 1e-7
    gram = torch.from_numpy(gram)
    benchmark.pedantic(solvers.mgda, args=(gram,), rounds=50, iterations=20)
    benchmark.extra_info.update(
        us=round(microseconds(benchmark), 3),
        ours_over_least=max(off),
        torchjd_over_least_median=statistics.median(peer_off),
        torchjd_over_least_worst=max(peer_off),
    )

"""Whole training steps with every balancer, and what a gradient-level search adds in P and T.

The model and data are those of bench_step.py. A contestant and its base make steps in turns, one
by one, so that both see the same minutes of the machine; a ratio is the median over the pairs.
"""

from __future__ import annotations

import copy
import importlib.util
import statistics
import time

import pytest
import torch
from bench_step import Bare, Plain, problem
from conftest import n_sets, take_turns

import fastmto
from fastmto import ops

PAIRS = 40
#: Weights from the losses' values: one backward, beside equal weighting.
LOSS_LEVEL = [
    "ls", "si", "rlw", "dwa", "uncertainty", "banditmtl", "imtl_l", "gradnorm", "famo", "ldc_mtl",
]  # fmt: skip
#: Weights from per-task gradients at every step, beside the bare loop of T backwards.
GRADIENT_LEVEL = [
    "mgda", "pcgrad", "graddrop", "cagrad", "imtl_g", "imtl", "nashmtl", "upgrad", "dualproj",
    "fairgrad", "aligned_mtl", "db_mtl",
]  # fmt: skip


class Balanced:
    """Forward, a balancer, torch's fused Adam, and the forward after the step where one is due."""

    def __init__(self, model, losses, name: str) -> None:
        self.model, self.losses = model, losses
        self.balancer = fastmto.get(name, n_tasks=2)
        self.shared, self.heads = model.shared_parameters(), model.task_parameters()
        learned = [{"params": self.balancer.parameters()}] if self.balancer.parameters() else []
        self.optimizer = torch.optim.Adam(
            [{"params": list(model.parameters())}, *learned], fused=True
        )
        self.update = self.balancer.update if self.balancer.needs_update else None

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.balancer.backward(
            self.losses(self.model),
            shared_parameters=self.shared,
            task_specific_parameters=self.heads,
            last_shared_parameters=self.shared[-1:],
        )
        self.optimizer.step()
        if self.update is not None:
            with torch.no_grad():
                after = self.losses(self.model)
            self.update(torch.stack(after))


class PlainWithForward(Plain):
    """Equal weighting that also looks at the losses after the step, as FAMO has to."""

    def step(self) -> None:
        super().step()
        with torch.no_grad():
            self.losses(self.model)


class TorchJD:
    """T backwards and NashMTL by TorchJD, as its documentation shows."""

    def __init__(self, model, losses) -> None:
        from torchjd.aggregation import NashMTL
        from torchjd.autojac import backward, jac_to_grad

        self.model, self.losses = model, losses
        self.shared, self.heads = model.shared_parameters(), model.task_parameters()
        self.backward, self.jac_to_grad = backward, jac_to_grad
        self.aggregator = NashMTL(n_tasks=2)
        self.optimizer = torch.optim.Adam(model.parameters(), fused=True)

    def step(self) -> None:
        self.optimizer.zero_grad()
        losses = self.losses(self.model)
        for loss, head in zip(losses, self.heads, strict=True):
            for p, g in zip(head, torch.autograd.grad(loss, head, retain_graph=True), strict=True):
                p.grad = g
        self.backward(losses, inputs=self.shared, parallel_chunk_size=1)
        self.jac_to_grad(self.shared, self.aggregator)
        self.optimizer.step()


def paired(base, contestant, pairs: int = PAIRS) -> tuple[float, float, float]:
    """Milliseconds of a step of either, and the median ratio contestant / base."""
    times: list[tuple[float, float]] = []
    for turn in range(pairs + 3):
        laps = {}
        for who in (base, contestant) if turn % 2 else (contestant, base):
            start = time.perf_counter()
            who.step()
            laps[id(who)] = time.perf_counter() - start
        if turn >= 3:
            times.append((laps[id(base)], laps[id(contestant)]))
    return (
        1e3 * statistics.median(a for a, _ in times),
        1e3 * statistics.median(b for _, b in times),
        statistics.median(b / a for a, b in times),
    )


def record(benchmark, base, contestant, pairs: int = PAIRS) -> float:
    base_ms, ours_ms, ratio = paired(base, contestant, pairs)
    benchmark.extra_info.update(base_ms=base_ms, step_ms=ours_ms, ratio=ratio)
    benchmark.pedantic(contestant.step, rounds=3, iterations=1)
    return ratio


@pytest.mark.parametrize("name", LOSS_LEVEL)
def test_loss_level_over_equal_weights(benchmark, name: str) -> None:
    model, losses = problem(4096)
    contestant = Balanced(copy.deepcopy(model), losses, name)
    plain = PlainWithForward if contestant.update is not None else Plain
    record(benchmark, plain(copy.deepcopy(model), losses, fused=True), contestant)
    assert contestant.balancer.stats["skipped"] == 0
    assert contestant.balancer.stats["searches"] == contestant.balancer.stats["steps"]


@pytest.mark.parametrize("name", GRADIENT_LEVEL)
def test_gradient_level_over_bare_backwards(benchmark, name: str) -> None:
    model, losses = problem(4096)
    contestant = Balanced(copy.deepcopy(model), losses, name)
    record(benchmark, Bare(copy.deepcopy(model), losses), contestant)
    assert contestant.balancer.stats["held"] == contestant.balancer.stats["skipped"] == 0


@pytest.mark.filterwarnings("ignore")  # cvxpy's, about inaccurate solutions
@pytest.mark.skipif(importlib.util.find_spec("torchjd") is None, reason="torchjd is not installed")
def test_torchjd_nashmtl_over_bare_backwards(benchmark) -> None:
    model, losses = problem(4096)
    contestant = TorchJD(copy.deepcopy(model), losses)
    record(benchmark, Bare(copy.deepcopy(model), losses), contestant, pairs=15)
    assert all(p.grad is not None for p in contestant.shared)


@pytest.mark.parametrize("numel", [1_000_000, 10_000_000])
@pytest.mark.parametrize("n_tasks", [2, 4, 8, 16, 32])
def test_pcgrad_over_gram_and_combine(benchmark, n_tasks: int, numel: int) -> None:
    """All of PCGrad behind the backwards, beside its two passes over memory."""
    if n_tasks * numel > 160_000_000:
        numel = 160_000_000 // n_tasks
    x = torch.nn.Parameter(torch.zeros(numel))
    rows = torch.randn(n_tasks, numel)
    balancer = fastmto.get("pcgrad")
    balancer.backward([(x * row).sum() for row in rows], shared_parameters=[x])
    buffers, everyone = balancer._buffers, list(range(n_tasks))
    weights = balancer.weights
    expected = weights.float() @ rows
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    backend = ops.backend(x.device)
    gram = torch.zeros(n_tasks, n_tasks, dtype=torch.float64)
    out = torch.empty_like(buffers.joint_rows[0])

    def ours(_: int) -> None:
        found = balancer._weigh(buffers, everyone, None)[1]
        balancer._join(buffers, everyone, found)

    def passes(_: int) -> None:
        backend.gram(buffers.task_rows[0], gram)
        backend.combine(buffers.task_rows[0], weights, out)

    times = take_turns({"ours": ours, "passes": passes}, n_sets(4 * numel))
    benchmark.extra_info.update(
        n_tasks=n_tasks,
        numel=numel,
        ours_ms=1e3 * times.best("ours"),
        ratio=times.ratio("ours", "passes"),
        ns_per_task_and_parameter=1e9 * times.best("ours") / n_tasks / numel,
    )
    benchmark.pedantic(ours, args=(0,), rounds=1)

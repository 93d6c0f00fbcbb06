"""Whole training steps: PUB beside plain training with torch's own Adam, on the same model.

The model is the census MMOE (549,760 shared parameters, T = 2) with larger batches; the data is
random, of census' shape. Contestants take turns, round by round, so that a slow minute of the
machine hits them alike; ratios are medians of the rounds' ratios.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

import fastmto
from fastmto.experiments.models import MMOE

FIELD_SIZES = [15] * 16 + [16] * 16  # 32 fields, 496 values
BATCHES = [1024, 4096]
CYCLE = 10  # steps from search to search
ROUNDS = 9


def problem(batch: int) -> tuple[MMOE, Callable[[MMOE], list[torch.Tensor]]]:
    torch.manual_seed(0)
    model = MMOE(7, FIELD_SIZES, [1, 1])
    assert sum(p.numel() for p in model.shared_parameters()) == 549_760
    dense = torch.rand(batch, 7)
    offsets = torch.tensor([0, *FIELD_SIZES]).cumsum(0)[:-1]
    ids = torch.stack([torch.randint(0, n, (batch,)) for n in FIELD_SIZES], dim=1) + offsets
    labels = [(torch.rand(batch) < p).float() for p in (0.06, 0.43)]

    def losses(model: MMOE) -> list[torch.Tensor]:
        logits = model(dense, ids)
        return [
            functional.binary_cross_entropy_with_logits(z, y)
            for z, y in zip(logits, labels, strict=True)
        ]

    return model, losses


class Plain:
    """Forward, one backward of the summed losses, torch's Adam."""

    def __init__(self, model: MMOE, losses, **kwargs) -> None:
        self.model, self.losses = model, losses
        self.optimizer = torch.optim.Adam(model.parameters(), **kwargs)
        self.total = self.passes = 0.0

    def step(self) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        sum(self.losses(self.model)).backward()
        self.passes += time.perf_counter() - start
        self.optimizer.step()
        self.total += time.perf_counter() - start


class Bare:
    """Forward, T backwards, fused Adam on their sum: the least that a search costs."""

    def __init__(self, model: MMOE, losses) -> None:
        self.model, self.losses = model, losses
        self.shared = model.shared_parameters()
        self.heads = model.task_parameters()
        self.optimizer = torch.optim.Adam(model.parameters(), fused=True)

    def step(self) -> None:
        self.optimizer.zero_grad()
        losses = self.losses(self.model)
        for i, (loss, head) in enumerate(zip(losses, self.heads, strict=True)):
            grads = torch.autograd.grad(loss, self.shared + head, retain_graph=i < len(losses) - 1)
            for p, g in zip(self.shared + head, grads, strict=True):
                if p.grad is None:
                    p.grad = g
                else:
                    p.grad += g
        self.optimizer.step()


class Balanced:
    """Forward and fastmto, with the seconds spent outside forward and backward passes."""

    def __init__(self, model: MMOE, losses, **kwargs) -> None:
        self.model, self.losses = model, losses
        self.optimizer = fastmto.PUB(model.shared_parameters(), model.task_parameters(), **kwargs)
        self.total = self.passes = 0.0

    def step(self) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        losses = self.losses(self.model)
        self.passes += time.perf_counter() - start
        self.optimizer.backward(losses)
        self.optimizer.step()
        self.total += time.perf_counter() - start

    def timed_grad(self, grad):
        def wrapper(*args, **kwargs):
            start = time.perf_counter()
            result = grad(*args, **kwargs)
            self.passes += time.perf_counter() - start
            return result

        return wrapper


def seconds(contestant, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        contestant.step()
    return (time.perf_counter() - start) / steps


def rounds(contestants: dict[str, object], steps: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for contestant in contestants.values():
        seconds(contestant, 2)
    for r in range(ROUNDS):
        names = list(contestants) if r % 2 else list(contestants)[::-1]
        for name in names:
            times[name].append(seconds(contestants[name], steps))
    return times


def ratio(times: dict[str, list[float]], a: str, b: str) -> float:
    return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))


@pytest.mark.parametrize("batch", BATCHES)
def test_pub_step(benchmark, batch: int, monkeypatch) -> None:
    model, losses = problem(batch)

    def contestants() -> dict[str, object]:
        return {
            "adam": Plain(copy.deepcopy(model), losses, foreach=False, fused=False),
            "adam_foreach": Plain(copy.deepcopy(model), losses, foreach=True),
            "adam_fused": Plain(copy.deepcopy(model), losses, fused=True),
            "bare_T_backwards": Bare(copy.deepcopy(model), losses),
            "pub_every_10": Balanced(copy.deepcopy(model), losses, update_weights_every=CYCLE),
            "pub_every_1": Balanced(copy.deepcopy(model), losses, update_weights_every=1),
        }

    field = contestants()
    for name in ("pub_every_10", "pub_every_1"):  # right before fast
        pub = field[name]
        pub.step()
        assert pub.optimizer.stats["searches"] == 1
        assert pub.optimizer.stats["held"] == pub.optimizer.stats["skipped"] == 0
    times = rounds(field, CYCLE)
    info = {f"{name}_ms": 1e3 * statistics.median(ts) for name, ts in times.items()}
    info["pub_every_10_vs_adam_fused"] = ratio(times, "pub_every_10", "adam_fused")
    # With nothing but the T - 1 further backwards of every tenth step.
    floor = 1 + (ratio(times, "bare_T_backwards", "adam_fused") - 1) / CYCLE
    info["floor_of_pub_every_10_vs_adam_fused"] = floor
    info["pub_every_1_vs_bare_T_backwards"] = ratio(times, "pub_every_1", "bare_T_backwards")
    for name in ("pub_every_10", "pub_every_1"):
        pub = field[name]
        pub.total = pub.passes = 0.0
        with monkeypatch.context() as patch:
            patch.setattr(torch.autograd, "grad", pub.timed_grad(torch.autograd.grad))
            seconds(pub, 2 * CYCLE)
        info[f"{name}_share_outside_passes"] = 1 - pub.passes / pub.total
    plain = field["adam_fused"]
    plain.total = plain.passes = 0.0
    seconds(plain, 2 * CYCLE)
    info["adam_fused_share_outside_passes"] = 1 - plain.passes / plain.total
    benchmark.extra_info.update(info, batch=batch)
    benchmark.pedantic(field["pub_every_10"].step, rounds=CYCLE, iterations=1)


def test_memory_of_a_search_step(benchmark) -> None:
    """After the first step, a step allocates nothing of size P beside autograd's gradients."""
    n, tasks = 1 << 22, 2
    shared = torch.nn.Parameter(torch.zeros(n))
    optimizer = fastmto.PUB([shared], [[] for _ in range(tasks)], update_weights_every=1)
    scales = [torch.randn(n) for _ in range(tasks)]

    def backward() -> None:
        optimizer.backward([(shared * s).sum() for s in scales])

    for _ in range(2):
        backward()
        optimizer.step()
    backward()
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    allocated = max((event.cpu_memory_usage for event in profile.events()), default=0)
    assert allocated < 1 << 14, f"{allocated} bytes in one step"
    benchmark.extra_info.update(
        bytes_allocated_by_a_step=allocated, buffer_bytes=optimizer.gradients.rows[0].nbytes
    )
    backward()
    benchmark.pedantic(optimizer.step, rounds=1)

"""The update-level optimizers on a GPU: nothing waits, and graphs make the eager steps' bits."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from problems import Net, batch, net
from torch import Tensor

import fastmto
from fastmto.weightings import MGDA

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CONFIGURATIONS: list[dict[str, Any]] = [
    {},
    {"update_weights_every": 1},
    {"update_weights_every": 2, "delayed": True},
    {"update_weights_every": 2, "clippy": True},
    {"update_weights_every": 2, "adatask": True},
    {"update_weights_every": 2, "adatask": True, "clippy": True},
    {"update_weights_every": 2, "weighting": MGDA()},
    {"update_weights_every": 3, "between": "per_task", "scale": "sum"},
]


def on_gpu(seed: int = 0, n_tasks: int = 3) -> Net:
    return net(seed, n_tasks=n_tasks).cuda()


def batches(n: int) -> list[Tensor]:
    return [batch(t).cuda() for t in range(n)]


def pub(model: Net, **options: Any) -> fastmto.PUB:
    return fastmto.PUB(model.trunk.parameters(), model.head_parameters(), 0.01, **options)


def train(model: Net, optimizer: fastmto.PUB, data: list[Tensor]) -> None:
    for x in data:
        optimizer.zero_grad()
        optimizer.backward(model.losses(x))
        optimizer.step()


@contextmanager
def no_waiting() -> Iterator[None]:
    """What makes the host wait for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_same(a: Net, b: Net, x: fastmto.PUB, y: fastmto.PUB) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
        for name, value in x.state[p].items():
            assert torch.equal(value, y.state[q][name]), name
    assert torch.equal(x.weights, y.weights)
    assert x.stats == y.stats


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_a_step_waits_for_nothing(options: dict[str, Any]) -> None:
    model, data = on_gpu(), batches(14)
    optimizer = pub(model, **copy.deepcopy(options))
    assert optimizer.capturable
    train(model, optimizer, data[:3])
    with no_waiting():
        train(model, optimizer, data[3:])
    assert optimizer.stats["steps"] == 14
    assert optimizer.stats["held"] == optimizer.stats["skipped"] == 0
    assert optimizer.result.status == "solved"


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_who_decides_makes_no_difference_but_rounding(options: dict[str, Any]) -> None:
    models, data = (on_gpu(), on_gpu()), batches(8)
    optimizers = [
        pub(model, capturable=capturable, **copy.deepcopy(options))
        for model, capturable in zip(models, (True, False), strict=True)
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, data)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(optimizers[0].weights, optimizers[1].weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_graphs_make_the_steps_of_eager_training(options: dict[str, Any]) -> None:
    models, data = (on_gpu(), on_gpu()), batches(40)
    eager, optimizer = (pub(m, **copy.deepcopy(options)) for m in models)
    graphed = fastmto.GraphedStep(optimizer, models[1].losses, eager_steps=2)
    for t, x in enumerate(data):
        for one in (eager, optimizer):
            for group in one.param_groups:
                group["lr"] = 0.01 / (1 + t // 10)
        losses = models[0].losses(x)
        eager.zero_grad()
        eager.backward(losses)
        eager.step()
        made = graphed(x)
        assert [loss.item() for loss in made] == [loss.item() for loss in losses]
    assert_same(*models, eager, optimizer)


def test_a_search_and_its_move_in_one_graph_of_the_users() -> None:
    models, data = (on_gpu(), on_gpu()), batches(12)
    eager, optimizer = (pub(m, update_weights_every=1) for m in models)
    static, side = data[0].clone(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for x in data[:3]:
            static.copy_(x)
            train(models[1], optimizer, [static])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train(models[1], optimizer, [static])
    for x in data[3:]:
        static.copy_(x)
        with no_waiting():
            graph.replay()
    train(models[0], eager, data)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(eager.weights, optimizer.weights)
    assert optimizer.stats["steps"] == eager.stats["steps"] == 12
    assert optimizer.state_dict()["fastmto"]["steps"] == 12
    resumed = pub(models[1], update_weights_every=1)
    resumed.load_state_dict(optimizer.state_dict())
    train(models[1], resumed, data[:1])
    train(models[0], eager, data[:1])
    assert torch.equal(resumed.weights, eager.weights)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model, data = on_gpu(), batches(4)
    optimizer = pub(model, update_weights_every=2)
    train(model, optimizer, data[:3])
    before = [p.detach().clone() for p in model.parameters()]
    for factor in (torch.nan, torch.inf):
        losses = model.losses(data[3])
        optimizer.zero_grad()
        with no_waiting():
            optimizer.backward([losses[0] * factor, *losses[1:]])
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    assert optimizer.stats["skipped"] == 2


def test_float16_autocast_with_a_scaler() -> None:
    model, data = on_gpu(), batches(1)
    optimizer = pub(model, update_weights_every=3)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**32)
    first = sum(loss.item() for loss in model.losses(data[0]))
    for _ in range(60):
        with torch.autocast("cuda", torch.float16):
            losses = model.losses(data[0])
        optimizer.zero_grad()
        optimizer.backward(losses, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    assert sum(loss.item() for loss in model.losses(data[0])) < 0.9 * first
    assert optimizer.stats["skipped"] >= 1  # the scale has come down to what float16 holds
    assert scaler.get_scale() < 2.0**32


def test_learning_rates_on_the_device() -> None:
    models, data = (on_gpu(), on_gpu()), batches(6)
    rate = torch.tensor(0.01, device="cuda", dtype=torch.float64)
    there, here = pub(models[0]), pub(models[1])
    for group in there.param_groups:
        group["lr"] = rate
    for t, x in enumerate(data):
        rate.fill_(0.01 / (t + 1))
        for group in here.param_groups:
            group["lr"] = 0.01 / (t + 1)
        train(models[0], there, [x])
        train(models[1], here, [x])
    assert_same(*models, there, here)

"""Every method on a GPU: nothing synchronizes, and graphs make the eager steps' bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from balancer_cases import BalancerCase, same
from levels import (
    ON_DEVICE,
    UPDATES,
    Driver,
    absent_at,
    assert_close_run,
    assert_same,
    drive,
    every,
    is_exact,
)
from problems import batch
from torch import Tensor

import fastmto

DEVICE = "cuda"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
close = torch.testing.assert_close
NASH, MGDA = BalancerCase("nashmtl", level="gradient"), BalancerCase("mgda", level="gradient")
OPTIMIZERS = [*UPDATES[:2], *UPDATES[4:8], UPDATES[13], every(3, between="per_task", scale="sum")]


def batches(n: int) -> list[Tensor]:
    return [batch(t).to(DEVICE) for t in range(n)]


@contextmanager
def no_waiting() -> Iterator[None]:
    """What makes the host wait for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def whole_step(one: Driver, x: Tensor, set_to_none: bool = True) -> None:
    """zero_grad, forward, backward and the optimizer's step."""
    one.zero_grad(set_to_none=set_to_none)
    losses = one.model.losses(x)
    one.z = x
    one.info = one.backward(losses)
    one.optimizer.step()


@pytest.mark.parametrize(
    ("row", "options"),
    [(row, {}) for row in OPTIMIZERS]
    + [
        (row, {"update_weights_every": n, "passes": passes})
        for row in ON_DEVICE
        for n in (1, 3)
        for passes in ("loop", "batched")
    ],
    ids=str,
)
def test_a_step_waits_for_nothing_and_is_the_host_s(row, options):
    update = row.level == "update"
    dtype = torch.float32 if update else torch.float64
    there = drive(row, dtype, DEVICE, **options)
    here = drive(row, dtype, DEVICE, capturable=False, **options)
    for step in range(14 if update else 6):
        told = here.step(step, absent_at(step))
        there.zero_grad()
        losses = there._present(step, absent_at(step))
        with no_waiting() if step >= 3 or (step and not update) else nullcontext():
            info = there.backward(losses, step)
            if update:
                there.move()
        if update:
            continue
        there.move()
        assert info.weights.is_cuda
        close(there.loss, here.loss, rtol=1e-6, atol=1e-9)
        close(info.weights.cpu(), told.weights.cpu(), rtol=1e-6, atol=1e-9)
        assert_same(there.grads, here.grads, rtol=1e-6, atol=1e-9)
    if update:
        assert there.method.capturable
        assert there.stats["steps"] == 14
        assert there.stats["held"] == there.stats["skipped"] == 0
        assert there.method.result.status == "solved"
        assert_close_run(there, here, 1e-4, 1e-5)
        close(there.weights, here.weights, rtol=1e-4, atol=1e-5)
    else:
        exact = is_exact(row, options)
        assert there.counts(exact) == here.counts(exact)


@pytest.mark.parametrize("row", OPTIMIZERS, ids=str)
def test_graphs_make_the_steps_of_eager_training(row):
    eager, one = (drive(row, device=DEVICE) for _ in range(2))
    graphed = fastmto.GraphedStep(one.optimizer, one.model.losses, eager_steps=2)
    for t, x in enumerate(batches(40)):
        for each in (eager, one):
            for group in each.optimizer.param_groups:
                group["lr"] = 0.01 / (1 + t // 10)
        losses = eager.model.losses(x)
        eager.zero_grad()
        eager.backward(losses)
        eager.move()
        made = graphed(x)
        assert [loss.item() for loss in made] == [loss.item() for loss in losses]
    assert same(eager.settled(), one.settled())
    assert eager.stats == one.stats


class Captured:
    """A step of a driver as a CUDA graph; the driver has made some on a side stream before."""

    def __init__(self, one: Driver, x: Tensor, set_to_none: bool = True) -> None:
        self.x = x.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            whole_step(one, self.x, set_to_none)
        self.loss, self.info = one.loss, one.info

    def __call__(self, x: Tensor) -> None:
        self.x.copy_(x)
        with no_waiting():
            self.graph.replay()


def warmed_up(row, data, set_to_none=True, **options) -> tuple[Driver, Driver]:
    """Two drivers that have made a step on each batch, the second on a side stream."""
    pair = [drive(row, device=DEVICE, **options) for _ in range(2)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for one, stream in zip(pair, (torch.cuda.current_stream(), side), strict=True):
        if row.level != "update":
            one.optimizer = torch.optim.Adam(one.parameters, lr=1e-2, capturable=True)
        with torch.cuda.stream(stream):
            for x in data:
                whole_step(one, x, set_to_none)
    torch.cuda.current_stream().wait_stream(side)
    return pair[0], pair[1]


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("row", [every(1), NASH, MGDA], ids=str)
def test_a_captured_search_has_the_bits_of_an_eager_one(row, set_to_none):
    """A search and its move in one graph of the user's."""
    options = {} if row.level == "update" else {"passes": "loop"}
    data = batches(12)
    eager, graphed = warmed_up(row, data[:3], set_to_none, **options)
    captured = Captured(graphed, data[3], set_to_none)
    for x in data[3:]:
        captured(x)
        whole_step(eager, x, set_to_none)
        assert torch.equal(graphed.weights, eager.weights)
        assert_same(graphed.parameters, eager.parameters)
        if row.level != "update":
            assert torch.equal(captured.loss, eager.loss)
            assert torch.equal(captured.info.weights, eager.info.weights)
            assert captured.info.status == eager.info.status
            assert_same(graphed.grads, eager.grads)
    if row.level == "update":
        assert graphed.stats["steps"] == eager.stats["steps"] == 12
        assert graphed.method.state_dict()["fastmto"]["steps"] == 12
        resumed = drive(row, device=DEVICE)
        resumed.load(graphed.state())
        for one in (resumed, eager):
            whole_step(one, data[0])
        assert torch.equal(resumed.weights, eager.weights)


def test_captured_searches_and_the_steps_between_share_the_weights():
    """A graph of each kind: the one between goes by the weights that the other found last."""
    every_third, data = 3, batches(15)
    options = {"update_weights_every": every_third, "passes": "loop"}
    eager, graphed = warmed_up(NASH, data[:6], **options)  # two of each kind
    graphs = [Captured(graphed, data[0]), Captured(graphed, data[0])]
    for step in range(6, 15):
        graphs[step % every_third != 0](data[step])
        whole_step(eager, data[step])
        assert_same(graphed.parameters, eager.parameters)
    assert torch.equal(graphed.method.state_dict()["weights"], eager.weights)


def test_a_gradient_that_is_not_finite_changes_nothing():
    one = drive(every(2), device=DEVICE)
    one.run(range(3))
    before = one.settled()
    for factor in (torch.nan, torch.inf):
        one.factor = factor
        one.zero_grad()
        losses = one.losses(3)
        with no_waiting():
            one.backward(losses)
            one.move()
    assert same(before, one.settled())
    assert one.stats["skipped"] == 2


SCALED = [(BalancerCase(key), n) for key in ("nashmtl", "mgda", "uncertainty") for n in (1, 3)]


@pytest.mark.parametrize(("row", "n"), [*SCALED, (every(3), 3)], ids=str)
def test_nothing_waits_but_the_scaler(row, n):
    """float16 autocast from a scale that is too large: the scaler brings it down."""
    options = {} if row.level == "update" else {"update_weights_every": n}
    one = drive(row, device=DEVICE, scale=2.0**32 if row.level == "update" else 2.0**24, **options)
    start = one.scaler.get_scale()
    first = last = 0.0
    for step in range(80):
        with torch.autocast(DEVICE, torch.float16):
            losses = one.losses(step % 2)
        found = row.level != "update" and one.method._found
        with no_waiting() if found and step > 1 else nullcontext():
            one.backward(losses, step % 2)
        if step == 0 and row.level != "update":
            # Learnable parameters go to the losses' device at the first backward.
            every_one = [*one.parameters, *one.method.parameters()]
            one.optimizer = torch.optim.Adam(every_one, lr=0.01)
        one.move()
        one.zero_grad()
        last = sum(loss.item() for loss in losses)
        first = first or last
    assert one.scaler.get_scale() < start
    assert one.weights.isfinite().all()
    assert last < (0.9 if row.level == "update" else 0.7) * first
    assert row.level != "update" or one.stats["skipped"] >= 1


def test_learning_rates_on_the_device():
    there, here = (drive(UPDATES[0], device=DEVICE) for _ in range(2))
    rate = torch.tensor(0.01, device=DEVICE, dtype=torch.float64)
    for group in there.optimizer.param_groups:
        group["lr"] = rate
    for t, x in enumerate(batches(6)):
        rate.fill_(0.01 / (t + 1))
        for group in here.optimizer.param_groups:
            group["lr"] = 0.01 / (t + 1)
        for one in (there, here):
            whole_step(one, x)
    assert same(there.settled(), here.settled())
    assert there.stats == here.stats

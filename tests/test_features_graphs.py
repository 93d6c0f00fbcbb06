"""CUDA graphs without a GPU: what a capture bakes in, what a replay shares with eager steps."""

from __future__ import annotations

import copy
import gc
import importlib
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from balancer_cases import same
from levels import ON_DEVICE, REGULAR, UPDATES, Driver, Linear, Update, drive, every, on_device
from problems import batch, net
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastmto
from fastmto.engine import device
from fastmto.optim.graphed import Graph

close = torch.testing.assert_close
NASH = ON_DEVICE[0]
#: Modules that ask whether a graph is being captured.
ASK = (
    "engine.device",
    "engine.heads",
    "engine.search",
    "optim.update_balancer",
    "balancers.gradient_balancer",
)


@contextmanager
def a_capture(captures: bool = True) -> Iterator[None]:
    """As if a CUDA graph were being captured."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ASK if captures else ():
            module = importlib.import_module(f"fastmto.{name}")
            patch.setattr(module, "capturing", lambda device: True)
        yield


def test_what_a_graph_would_bake_in_is_refused_in_a_capture():
    one = drive(on_device(every(1)))
    one.run(range(2))
    with a_capture():
        one.step(3)
        one.optimizer.param_groups[0]["lr"] = 0.5
        with pytest.raises(RuntimeError, match="must not change in the step that is captured"):
            one.step(3)
    one.optimizer.refresh()
    with a_capture():
        one.step(4)


def test_a_capture_of_what_is_not_capturable_is_refused():
    one = drive(Update(), capturable=False)
    one.step(0)
    with a_capture(), pytest.raises(RuntimeError, match="cannot be captured: capturable is False"):
        one.backward(one.losses(1))


def test_constants_are_bounded_but_for_those_of_graphs():
    cpu = torch.device("cpu")
    constants = device.Constants(torch.int64)
    first = constants((0, 1), cpu)
    assert first.tolist() == [0, 1]
    with a_capture():
        assert constants((0, 1), cpu) is first
        with pytest.raises(RuntimeError, match="must not change in the step that is captured"):
            constants((0, 2), cpu)
    second = constants((5,), cpu)
    for k in range(2 * constants.MOST):
        constants((k, k), cpu)
    assert constants((0, 1), cpu) is first
    assert constants((5,), cpu) is not second
    assert len(constants._recent) <= constants.MOST


class Recorded(fastmto.GraphedStep):
    """Graphs without a GPU: a capture leaves all tensors as they were, a replay makes the step on
    the tensors alone, with the host's books as they were."""

    captures = 0

    def _on_stream(self, step: Any) -> Any:
        return step()

    def _capture(self, step: Any) -> Any:
        optimizer = self._optimizer
        tensors = [
            *(p.data for group in optimizer.param_groups for p in group["params"]),
            *(m for s in optimizer.state.values() for m in s.values()),
            *(getattr(optimizer._search.device, n) for n in ("weights", "raw", "info", "outcomes")),
            *(getattr(optimizer._level.clock, n) for n in ("counts", "numbers", "found", "tally")),
        ]
        before = [t.clone() for t in tensors]
        phase, gradients = optimizer._search.steps, copy.copy(optimizer.gradients.__dict__)
        with a_capture():  # nothing is copied to the device, and nothing is asked
            losses = step()
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
        made: list[Tensor] = list(losses)

        def replay() -> None:
            books = dict(optimizer._counted), optimizer._search.steps
            now = copy.copy(optimizer.gradients.__dict__)
            optimizer._search.steps = phase
            optimizer.gradients.__dict__.update(gradients)
            with a_capture():
                again = step()
            optimizer.gradients.__dict__.update(now)
            for there, now in zip(made, again, strict=True):
                there.copy_(now)
            optimizer._counted.update(books[0])
            optimizer._search.steps = books[1]
            optimizer._pending.clear()

        self.captures += 1
        return Graph(replay, made)


@pytest.fixture
def graphed(monkeypatch: pytest.MonkeyPatch):
    """Builds a driver of an optimizer and its `Recorded` steps."""

    def build(row: Update, losses: Any = None, **options: Any) -> tuple[Driver, Recorded]:
        monkeypatch.setattr(fastmto.PUB, "device", torch.device("cuda"))
        one = drive(on_device(row), **options)
        return one, Recorded(one.optimizer, losses or one.model.losses, eager_steps=1)

    return build


@pytest.mark.parametrize("row", UPDATES[:8], ids=str)
def test_graphs_make_the_steps_that_eager_training_makes(row, graphed):
    eager = drive(on_device(row))
    one, step = graphed(row)
    for t in range(25):
        for each in (eager, one):
            each.optimizer.param_groups[0]["lr"] = 0.01 / (1 + t // 5)
        losses = step(batch(t))
        expected = eager.model.losses(batch(t))
        assert [x.item() for x in losses] == [x.item() for x in expected]
        eager.zero_grad()
        eager.backward(expected)
        eager.move()
    assert same(eager.settled(), one.settled())
    assert eager.counts(False) == one.counts(False)
    assert step.captures == (1 if row.options.get("update_weights_every") == 1 else 2)


def test_graphs_wait_until_weights_are_found(graphed):
    factor = torch.tensor(torch.nan)
    one, step = graphed(Update(), lambda x: [loss * factor for loss in one.model.losses(x)])
    for t in range(4):
        step(batch(t))
    assert one.stats["skipped"] == 4
    factor.fill_(1.0)
    for t in range(4):
        step(batch(t))
    assert one.stats["steps"] == 4
    assert one.stats["held"] == 0
    assert step.captures == 1


def test_a_graph_is_not_misled_by_a_pending_backward(graphed):
    eager = drive(on_device(every(2)))
    one, step = graphed(every(2))
    for t in range(8):
        if t > 3:
            one.backward(one.model.losses(batch(50)))  # to look at gradients
        step(batch(t))
        eager.zero_grad()
        eager.backward(eager.model.losses(batch(t)))
        eager.move()
        with pytest.raises(RuntimeError, match="call backward"):
            one.optimizer.step()
    assert same(eager.settled()["model"], one.settled()["model"])


def test_graphs_are_made_anew_for_new_buffers(monkeypatch):
    monkeypatch.setattr(fastmto.PUB, "device", torch.device("cuda"))
    model = net(1)
    heads = [p for head in model.head_parameters() for p in head]
    optimizer = fastmto.PUB(model.trunk.parameters(), heads, update_weights_every=1)
    optimizer._settings["capturable"] = True
    fresh = copy.deepcopy(optimizer.state_dict())
    step = Recorded(optimizer, model.losses, eager_steps=1)
    for _ in range(2):
        for t in range(3):
            step(batch(t))
        assert optimizer.stats["steps"] == 3
        optimizer.load_state_dict(fresh)
    assert step.captures == 2


def test_a_capture_that_fails_leaves_the_books_as_they_were(graphed):
    fails = []

    def losses(x: Tensor) -> list[Tensor]:
        if fails:
            raise ArithmeticError
        return one.model.losses(x)

    one, step = graphed(every(1), losses)
    step(batch(0))
    before = one.stats, one.optimizer._search.steps
    fails.append(True)
    with pytest.raises(ArithmeticError):
        step(batch(1))
    assert (one.stats, one.optimizer._search.steps) == before
    fails.clear()
    step(batch(1))
    assert one.stats["steps"] == 2


def test_graphed_step_names_what_is_wrong(graphed):
    one = drive(Update())
    losses = one.model.losses
    with pytest.raises(ValueError, match=r"^optimizer must be a PUB or AdaTask, got Adam"):
        fastmto.GraphedStep(torch.optim.Adam(one.parameters), losses)
    with pytest.raises(ValueError, match=r"^optimizer must be capturable.* cpu"):
        fastmto.GraphedStep(drive(on_device(Update())).optimizer, losses)
    good, step = graphed(Update())
    with pytest.raises(ValueError, match=r"capturable is False"):
        fastmto.GraphedStep(drive(Update(), capturable=False).optimizer, losses)
    with pytest.raises(ValueError, match=r"^eager_steps"):
        fastmto.GraphedStep(good.optimizer, losses, eager_steps=0)
    with pytest.raises(ValueError, match=r"^batch must hold at least one"):
        step()
    step(batch(0))
    with pytest.raises(ValueError, match=r"^batch must be of the first call's"):
        step(batch(0, n=7))


class Recorder(TorchDispatchMode):
    """The operations of a step, to be run again on the same memory as a CUDA graph runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def recorded(one: Linear, rows) -> tuple[Recorder, Any, Tensor]:
    """A step on losses whose gradients are `rows`; what it did, its Info and its gradient."""
    with Recorder() as recorder:
        info = one.step(rows)
    assert one.x.grad is not None
    return recorder, info, one.x.grad


def test_replays_share_the_weights_whatever_was_captured_last():
    one = Linear(NASH, n_tasks=3)
    balancer = one.method
    rows = torch.tensor([*REGULAR, [1.0, 1.0]], dtype=torch.float64)
    one.step(rows)
    one.step([rows[0], rows[1], None])
    all_three, info, _ = recorded(one, rows)
    recorded(one, [rows[0], rows[1], None])
    before = balancer.weights.clone()
    rows.mul_(10.0)
    all_three.replay()
    assert torch.equal(balancer.weights, info.weights)
    assert torch.equal(balancer.state_dict()["weights"], info.weights)
    close(info.weights[:2], before[:2] / 10, rtol=0.5, atol=0)


def test_a_step_between_captured_first_tells_the_weights_it_goes_by():
    one, other = (Linear(NASH, update_weights_every=2) for _ in range(2))
    balancer = one.method
    rows = torch.tensor(REGULAR, dtype=torch.float64)
    for _ in range(3):
        one.step(rows)
    between, told, grad = recorded(one, rows)
    search, info, _ = recorded(one, rows)
    assert told.gram is None
    rows.mul_(10.0)
    search.replay()
    between.replay()
    assert torch.equal(told.weights, info.weights)
    assert torch.equal(told.weights, balancer.weights)
    close(grad, info.weights @ rows, rtol=1e-12, atol=0)
    # A state that is loaded, and a reset, reach replays as well.
    other.step([[5.0, 1.0], [0.0, 3.0]])
    expected = other.method.weights.clone()
    balancer.load_state_dict(other.method.state_dict())
    between.replay()
    assert torch.equal(told.weights, expected)
    close(grad, expected @ rows, rtol=1e-12, atol=0)
    balancer.reset()
    between.replay()
    close(grad, told.weights @ rows, rtol=1e-12, atol=0)


@pytest.mark.parametrize("change", ["another batch size", "load_state_dict", "reset", "tasks"])
@pytest.mark.parametrize("captures", [True, False])
def test_what_a_capture_used_outlives_the_next_buffers(change, captures):
    n_tasks = None if change == "tasks" else 2
    balancer = fastmto.get("nashmtl", n_tasks, capturable=True, level="features")
    w = nn.Parameter(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))

    def step(batch_size: int, n_tasks: int = 2) -> None:
        w.grad = None
        z = torch.linspace(-1, 1, 3 * batch_size).view(batch_size, 3) @ w
        balancer.backward([(z - k).square().sum() for k in range(n_tasks)], [w], [], features=z)

    step(8)
    with a_capture(captures):
        step(8)
        step(8)
    buffers, search = balancer._gradient_level, balancer._search.device
    used = [weakref.ref(x) for x in (buffers.gradients.rows[0], buffers._grams, search.weights)]
    del buffers, search
    if change == "load_state_dict":
        balancer.load_state_dict(balancer.state_dict())
    elif change != "another batch size":
        balancer.reset()
    step(5, 3 if change == "tasks" else 2)
    gc.collect()
    # The weights stay where they are unless there are others.
    alive = [captures, captures, captures or change != "tasks"]
    assert [x() is not None for x in used] == alive
    assert len(balancer._captured) == 2 * captures
    assert copy.deepcopy(balancer)._captured == []


def test_a_capture_reads_nothing_and_keeps_nothing():
    """Before weights are found a step reads whether they are; not while a graph is captured, when
    nothing has been computed yet, nor is anything kept that only a replay will fill."""
    one = Linear(NASH, n_tasks=3, preference=[1.0, 2.0, 3.0])
    rows = [*REGULAR, [1.0, 1.0]]
    for _ in range(2):
        one.step([[1.0, 0.0], [-1.0, 0.0], None])  # no weights
    one.step([None, [1.0, 0.0], [-1.0, 0.0]])
    with a_capture():
        one.step([None, rows[0], rows[1]], reads=False)
        assert not one.method._found
        with pytest.raises(RuntimeError, match="must not change in the step that is captured"):
            one.step([rows[0], None, rows[1]])
    one.step([rows[0], None, rows[1]])
    assert one.method._found

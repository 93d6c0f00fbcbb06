"""Steps that are decided on the device: nothing is read, and the bits are those of the host's."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from problems import Net, batch, gradients, linear_loss, net, parameters
from reads import NothingGoesToTheHost, NothingIsRead
from torch import Tensor, nn

import fastmto
from fastmto import ops
from fastmto.engine import device, heads, search
from fastmto.optim import update_balancer as optim
from fastmto.optim.graphed import Graph
from fastmto.optim.rules import AdaGrad, RMSProp
from fastmto.weightings import MGDA, Bargaining, Constant

CONFIGURATIONS: list[dict[str, Any]] = [
    {},
    {"update_weights_every": 1},
    {"update_weights_every": 3},
    {"update_weights_every": 3, "between": "per_task"},
    {"update_weights_every": 2, "delayed": True},
    {"update_weights_every": 2, "clippy": True},
    {"update_weights_every": 2, "adatask": True},
    {"update_weights_every": 2, "adatask": True, "clippy": True, "delayed": True},
    {"update_weights_every": 2, "scale": "rms"},
    {"update_weights_every": 2, "scale": "sum", "max_weight": 1.1},
    {"update_weights_every": 2, "scale": "none", "max_weight": None, "weight_decay": 0.1},
    {"update_weights_every": 2, "rule": AdaGrad()},
    {"update_weights_every": 2, "rule": RMSProp(momentum=0.9, centered=True)},
    {"update_weights_every": 2, "weighting": MGDA()},
    {"update_weights_every": 2, "weighting": Constant([0.5, 2.0])},
    {"update_weights_every": 2, "weighting": Bargaining(preference=[1.0, 3.0])},
    {"weighting": None},
]


def pub(model: Net, capturable: bool | None = True, **options: Any) -> fastmto.PUB:
    options = {"lr": 0.01, "capturable": capturable, **options}
    return fastmto.PUB(model.trunk.parameters(), model.head_parameters(), **options)


def train(model: Net, optimizer: fastmto.PUB, steps: Sequence[int]) -> None:
    for t in steps:
        optimizer.zero_grad()
        optimizer.backward(model.losses(batch(t)))
        optimizer.step()


def assert_same(a: Net, b: Net, x: fastmto.PUB, y: fastmto.PUB, rtol: float = 0) -> None:
    """Parameters, moments, weights and counts: bit for bit, or within rtol."""
    close = {"rtol": rtol, "atol": rtol}
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, **close)
        for name, value in x.state[p].items():
            torch.testing.assert_close(value, y.state[q][name], **close)
    torch.testing.assert_close(x.weights, y.weights, **close)
    stats = x.stats, y.stats
    for one in stats:
        del one["backwards"]  # the heads may get one of their own
    assert stats[0] == stats[1]


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_the_bits_are_those_of_a_step_that_is_decided_on_the_host(options: dict[str, Any]) -> None:
    models = net(), net()
    there = pub(models[0], True, **copy.deepcopy(options))
    here = pub(models[1], False, **copy.deepcopy(options))
    train(models[0], there, range(2))
    with NothingIsRead(), NothingGoesToTheHost():
        train(models[0], there, range(2, 12))
    train(models[1], here, range(12))
    assert there.capturable
    assert not here.capturable
    # Weights that may be 0 cannot be divided out of the heads' gradients, which rounds.
    rtol = 1e-5 if isinstance(there.weighting, MGDA | Constant) else 0
    assert_same(*models, there, here, rtol)
    if there.weighting is not None:
        assert there.stats["searches"] > 1
        torch.testing.assert_close(there.gram, here.gram, rtol=rtol, atol=rtol)


def test_a_task_of_weight_zero_keeps_its_head_learning() -> None:
    shared, heads = nn.Parameter(torch.ones(3)), [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = fastmto.PUB(
        [shared], [[h] for h in heads], 0.1, weighting=Constant([1, 0]), capturable=True
    )
    d = torch.tensor([1.0, 2.0, -1.0])
    for _ in range(4):
        before = heads[1].detach().clone()
        optimizer.zero_grad()
        pieces = [(shared * d).sum(), (shared * d.flip(0)).sum()]
        optimizer.backward([x + (h * 3.0).sum() for x, h in zip(pieces, heads, strict=True)])
        assert heads[1].grad.tolist() == [3, 3]
        optimizer.step()
        assert (heads[1] < before).all()
        assert optimizer.weights[1] == 0
    assert ((shared < 1) == (d > 0)).all()


def test_several_dtypes_groups_and_tasks() -> None:
    def build(capturable: bool) -> tuple[list[nn.Parameter], fastmto.PUB]:
        shared = [*parameters(0, torch.float32), *parameters(1, torch.bfloat16, [(9,)])]
        heads = [parameters(10 + i, torch.float32, [(3,)]) for i in range(5)]
        groups = [{"params": shared[:4], "lr": 0.1}, {"params": shared[4:], "eps": 1e-4}]
        optimizer = fastmto.PUB(groups, heads, 0.02, update_weights_every=2, capturable=capturable)
        for t in range(6):
            given = gradients(t, shared, 5)
            losses = [
                linear_loss([*shared, *head], [*g, *gradients(50 + t, head, 1)[0]])
                for head, g in zip(heads, given, strict=True)
            ]
            if t == 3:
                losses[1] = None
            if t == 4:
                losses[0] = losses[3] = None
            optimizer.zero_grad()
            optimizer.backward(losses)
            optimizer.step()
        return [*shared, *(p for head in heads for p in head)], optimizer

    (ps, there), (qs, here) = build(True), build(False)
    assert all(torch.equal(p, q) for p, q in zip(ps, qs, strict=True))
    assert torch.equal(there.weights, here.weights)
    assert there.stats == here.stats
    assert there.stats["absent"] == 3


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted() -> None:
    model = net()
    optimizer = pub(model, update_weights_every=2)
    train(model, optimizer, range(3))
    before = copy.deepcopy(optimizer.state_dict())
    params = [p.detach().clone() for p in model.parameters()]
    for task in (0, 1, 0):  # between two searches, in a search, between
        losses = model.losses(batch(9))
        losses[task] = losses[task] * torch.nan
        optimizer.zero_grad()
        with NothingIsRead(), NothingGoesToTheHost():
            optimizer.backward(losses)
            optimizer.step()
    for p, q in zip(params, model.parameters(), strict=True):
        assert torch.equal(p, q)
    after = optimizer.state_dict()
    for key, moments in before["state"].items():
        assert all(torch.equal(m, after["state"][key][name]) for name, m in moments.items())
    assert torch.equal(after["fastmto"]["weights"], before["fastmto"]["weights"])
    assert after["fastmto"]["counts"] == before["fastmto"]["counts"]
    assert optimizer.stats["skipped"] == 3
    assert optimizer.stats["steps"] == 3
    assert optimizer.stats["held"] == 0
    train(model, optimizer, range(10, 14))
    assert optimizer.stats["steps"] == 7


def test_a_search_without_an_answer_holds_the_weights() -> None:
    shared = [nn.Parameter(torch.zeros(4))]
    optimizer = fastmto.PUB(shared, [[], []], update_weights_every=1, capturable=True)
    d = torch.tensor([1.0, 2.0, -1.0, 0.5])

    def step(one: Tensor, other: Tensor) -> None:
        optimizer.zero_grad()
        optimizer.backward([(shared[0] * one).sum(), (shared[0] * other).sum()])
        optimizer.step()

    step(d, -d)
    assert optimizer.stats["held"] == 1
    assert optimizer.weights.tolist() == [1, 1]
    assert optimizer.result.status == "near_stationary"
    assert optimizer.result.weights is None
    step(d, torch.tensor([1.0, -1.0, 1.0, 3.0]))
    assert optimizer.stats["held"] == 1
    assert optimizer.result.status == "solved"
    found = optimizer.weights
    assert not torch.equal(found, torch.ones(2, dtype=torch.float64))
    raw = optimizer.result.weights
    torch.testing.assert_close(raw * (optimizer.gram @ raw), torch.ones(2, dtype=torch.float64))
    # Under AdaGrad opposite gradients stay opposite updates; here moments have made them differ.
    step(torch.zeros(4), torch.zeros(4))
    assert optimizer.stats["steps"] == 3


@pytest.mark.parametrize("capturable", [True, False])
def test_weights_that_float32_cannot_tell_from_noise_are_held(capturable: bool) -> None:
    d = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=torch.float64)
    for dtype, held in ((torch.float64, 0), (torch.float32, 1)):
        shared = nn.Parameter(torch.zeros(4, dtype=dtype))
        optimizer = fastmto.PUB(
            [shared], [[], []], update_weights_every=1, rule=RMSProp(eps=1e3), capturable=capturable
        )
        # Updates whose sum is 2e-5 of their length: kappa is about 1e9.
        other = -d + torch.tensor([4e-5, 0, 0, 0], dtype=torch.float64)
        optimizer.backward([(shared * g.to(dtype)).sum() for g in (d, other)])
        if held and not capturable:
            with pytest.warns(RuntimeWarning, match="near_stationary"):
                optimizer.step()
        else:
            optimizer.step()
        assert optimizer.stats["held"] == held
        assert (optimizer.weights.tolist() == [1, 1]) == (held == 1)
        if capturable:
            assert optimizer.result.status == ("near_stationary" if held else "solved")


def test_the_first_search_is_repeated_until_one_finds_weights() -> None:
    shared = [nn.Parameter(torch.zeros(4))]
    optimizer = fastmto.PUB(shared, [[], []], update_weights_every=5, capturable=True)
    d = torch.tensor([1.0, 2.0, -1.0, 0.5])
    for other in (-d, d.flip(0), d.flip(0), d.flip(0)):
        optimizer.backward([(shared[0] * d).sum(), (shared[0] * other).sum()])
        optimizer.step()
    assert optimizer.stats["searches"] == 2
    assert optimizer.stats["held"] == 1


@pytest.mark.parametrize("to", [True, False])
@pytest.mark.parametrize("options", CONFIGURATIONS[1:9], ids=str)
def test_resumes_bit_for_bit_whoever_decides(options: dict[str, Any], to: bool) -> None:
    whole, part = net(), net()
    uninterrupted, first = pub(whole, **options), pub(part, **options)
    train(whole, uninterrupted, range(9))
    train(part, first, range(4))
    rest = net(1)
    rest.load_state_dict(part.state_dict())
    resumed = pub(rest, to, **options)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    assert resumed.stats == first.stats
    train(rest, resumed, range(4, 9))
    assert_same(whole, rest, uninterrupted, resumed)


def test_what_needs_the_host_is_refused_by_name() -> None:
    model = net()
    assert not pub(model, None).capturable
    cases: list[tuple[dict[str, Any], str]] = [
        ({"weighting": "ccp"}, "weighting .* is found on the host"),
        ({"weighting": lambda gram: gram.diagonal()}, "weighting .* is found on the host"),
        ({"weighting": Bargaining(warm_start=True)}, "weighting .* is found on the host"),
        ({"on_failure": "raise"}, "on_failure"),
        ({"on_nonfinite": "raise"}, "on_nonfinite"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=f"^capturable must be None or False here: {message}"):
            pub(net(), True, **options)
    half = parameters(0, torch.float16)
    with pytest.raises(ValueError, match="float16 parameters"):
        fastmto.PUB(half, [[], []], capturable=True)
    assert fastmto.PUB(half, [[], []], between="per_task", capturable=True).capturable
    many = [[] for _ in range(65)]
    with pytest.raises(ValueError, match="65 tasks is found on the host"):
        fastmto.PUB(parameters(0, torch.float32), many, capturable=True)


def test_learning_rates_of_a_schedule_reach_the_device() -> None:
    models = net(), net()
    optimizers = [pub(models[k], capturable=k == 0, update_weights_every=2) for k in range(2)]
    for model, optimizer in zip(models, optimizers, strict=True):
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for t in range(5):
            train(model, optimizer, [t])
            schedule.step()
    assert_same(*models, *optimizers)


@pytest.mark.parametrize("capturable", [True, False])
def test_compiled_training_makes_the_same_steps(capturable: bool) -> None:
    """Two steps in one compiled function: graphs end at `backward` and `step`, not in them."""
    models = net(), net()
    optimizers = [pub(m, capturable, update_weights_every=2) for m in models]

    def step(model: Net, optimizer: fastmto.PUB, x: Tensor) -> None:
        optimizer.zero_grad()
        optimizer.backward(model.losses(x))
        optimizer.step()

    def two_steps(model: Net, optimizer: fastmto.PUB, x: Tensor) -> None:
        step(model, optimizer, x)
        step(model, optimizer, x + 1)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(two_steps, backend="aot_eager")
    for t in range(4):
        compiled(models[0], optimizers[0], batch(t))
        two_steps(models[1], optimizers[1], batch(t))
    assert_same(*models, *optimizers)
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert len(breaks) >= 2
    ends = ("Optimizer.zero_grad", "UpdateBalancer.backward", "UpdateBalancer.step")
    assert all(any(end in why for end in ends) for why in breaks)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


@contextmanager
def a_capture() -> Iterator[None]:
    """As if a CUDA graph were being captured."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (device, optim, heads, search):
            patch.setattr(module, "capturing", lambda device: True)
        yield


def test_what_a_graph_would_bake_in_is_refused_in_a_capture() -> None:
    model = net()
    optimizer = pub(model, update_weights_every=1)
    train(model, optimizer, range(2))
    with a_capture():
        train(model, optimizer, [2])
        optimizer.param_groups[0]["lr"] = 0.5
        with pytest.raises(RuntimeError, match="must not change in the step that is captured"):
            train(model, optimizer, [3])
    optimizer.refresh()
    with a_capture():
        train(model, optimizer, [4])


class Recorded(fastmto.GraphedStep):
    """Graphs without a GPU: a capture leaves all tensors as they were, a replay makes the step on
    the tensors alone, with the host's books as they were."""

    def _on_stream(self, step: Any) -> Any:
        return step()

    def _capture(self, step: Any) -> Any:
        optimizer, model = self._optimizer, self.model
        tensors = [
            *(p.data for p in model.parameters()),
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

        self.captures = getattr(self, "captures", 0) + 1
        return Graph(replay, made)


@pytest.mark.parametrize("options", CONFIGURATIONS[:8], ids=str)
def test_graphs_make_the_steps_that_eager_training_makes(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    eager, model = net(), net()
    plain, optimizer = pub(eager, **options), pub(model, **options)
    monkeypatch.setattr(fastmto.PUB, "device", torch.device("cuda"))
    Recorded.model = model
    graphed = Recorded(optimizer, model.losses, eager_steps=1)
    for t in range(25):
        for one in (plain, optimizer):
            one.param_groups[0]["lr"] = 0.01 / (1 + t // 5)
        losses = graphed(batch(t))
        expected = eager.losses(batch(t))
        assert [x.item() for x in losses] == [x.item() for x in expected]
        train(eager, plain, [t])
    assert_same(eager, model, plain, optimizer)
    every = options.get("update_weights_every", 10)
    assert graphed.captures == (1 if every == 1 else 2)


def graphed_pub(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Net, fastmto.PUB]:
    model = net()
    optimizer = pub(model, **options)
    monkeypatch.setattr(fastmto.PUB, "device", torch.device("cuda"))
    Recorded.model = model
    return model, optimizer


def test_graphs_wait_until_weights_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = graphed_pub(monkeypatch)
    factor = torch.tensor(torch.nan)
    graphed = Recorded(
        optimizer, lambda x: [loss * factor for loss in model.losses(x)], eager_steps=1
    )
    for t in range(4):
        graphed(batch(t))
    assert optimizer.stats["skipped"] == 4
    factor.fill_(1.0)
    for t in range(4):
        graphed(batch(t))
    assert optimizer.stats["steps"] == 4
    assert optimizer.stats["held"] == 0
    assert graphed.captures == 1


def test_a_graph_is_not_misled_by_a_pending_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = net()
    plain = pub(eager, update_weights_every=2)
    model, optimizer = graphed_pub(monkeypatch, update_weights_every=2)
    graphed = Recorded(optimizer, model.losses, eager_steps=1)
    for t in range(8):
        if t > 3:
            optimizer.backward(model.losses(batch(50)))  # to look at gradients
        graphed(batch(t))
        train(eager, plain, [t])
        with pytest.raises(RuntimeError, match="call backward"):
            optimizer.step()
    for p, q in zip(eager.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_graphs_are_made_anew_for_new_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    heads = [p for head in model.head_parameters() for p in head]
    optimizer = fastmto.PUB(model.trunk.parameters(), heads, update_weights_every=1)
    optimizer._settings["capturable"] = True
    monkeypatch.setattr(fastmto.PUB, "device", torch.device("cuda"))
    Recorded.model = model
    fresh = copy.deepcopy(optimizer.state_dict())
    graphed = Recorded(optimizer, model.losses, eager_steps=1)
    for _ in range(2):
        for t in range(3):
            graphed(batch(t))
        assert optimizer.stats["steps"] == 3
        optimizer.load_state_dict(fresh)
    assert graphed.captures == 2


def test_a_capture_that_fails_leaves_the_books_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, optimizer = graphed_pub(monkeypatch, update_weights_every=1)
    fails = []

    def losses(x: Tensor) -> list[Tensor]:
        if fails:
            raise ArithmeticError
        return model.losses(x)

    graphed = Recorded(optimizer, losses, eager_steps=1)
    graphed(batch(0))
    before = optimizer.stats, optimizer._search.steps
    fails.append(True)
    with pytest.raises(ArithmeticError):
        graphed(batch(1))
    assert (optimizer.stats, optimizer._search.steps) == before
    fails.clear()
    graphed(batch(1))
    assert optimizer.stats["steps"] == 2


def test_a_capture_of_what_is_not_capturable_is_refused() -> None:
    model = net()
    optimizer = pub(model, False)
    train(model, optimizer, [0])
    with a_capture(), pytest.raises(RuntimeError, match="cannot be captured: capturable is False"):
        optimizer.backward(model.losses(batch(1)))


def test_constants_are_bounded_but_for_those_of_graphs() -> None:
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


def test_options_are_checked_by_name() -> None:
    for options in (
        {"capturable": "no"},
        {"clippy": 3},
        {"adatask": "x"},
        {"delayed": 1},
        {"max_weight": "a"},
    ):
        (name,) = options
        with pytest.raises(ValueError, match=f"^{name} must be"):
            pub(net(), **{"capturable": None, **options})


@pytest.mark.parametrize("capturable", [True, False])
def test_a_preference_for_more_tasks_than_there_are_is_refused(capturable: bool) -> None:
    model = net()
    optimizer = pub(model, weighting=Bargaining(preference=[1.0, 2.0, 3.0]), capturable=capturable)
    with pytest.raises(ValueError, match="the 3 tasks of preference, got tasks"):
        train(model, optimizer, range(1))


def test_graphed_step_names_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    with pytest.raises(ValueError, match=r"^optimizer must be a PUB or AdaTask, got Adam"):
        fastmto.GraphedStep(torch.optim.Adam(model.parameters()), model.losses)
    with pytest.raises(ValueError, match=r"^optimizer must be capturable.* cpu"):
        fastmto.GraphedStep(pub(model), model.losses)
    monkeypatch.setattr(fastmto.PUB, "device", torch.device("cuda"))
    with pytest.raises(ValueError, match=r"capturable is False"):
        fastmto.GraphedStep(pub(net(), False), model.losses)
    with pytest.raises(ValueError, match=r"^eager_steps"):
        fastmto.GraphedStep(pub(net()), model.losses, eager_steps=0)
    graphed = Recorded(pub(model), model.losses)
    with pytest.raises(ValueError, match=r"^batch must hold at least one"):
        graphed()
    graphed(batch(0))
    with pytest.raises(ValueError, match=r"^batch must be of the first call's"):
        graphed(batch(0, n=7))


@pytest.mark.parametrize("options", CONFIGURATIONS[2:8] + CONFIGURATIONS[12:14], ids=str)
def test_whole_steps_on_the_kernels_for_gpus(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimizer over the Triton backend, interpreted, beside the CPU's kernels."""
    pytest.importorskip("triton")
    models = net(), net()
    here, there = (pub(m, **copy.deepcopy(options)) for m in models)
    train(models[0], here, range(5))
    gpu = ops.backend(torch.device("cuda"))
    used = []

    def module(name: str) -> Any:
        used.append(name)
        return gpu

    monkeypatch.setattr(ops, "_module", module)
    train(models[1], there, range(5))
    monkeypatch.undo()
    assert used
    assert here.stats == there.stats
    torch.testing.assert_close(here.weights, there.weights, rtol=1e-4, atol=1e-5)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)

"""MARIGOLD in training: optimizers, flat buffers, resuming, the toy problem, real data."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from marigold_cases import Quadratics, Smooth, parameter
from torch import Tensor, nn

import fastmto
from fastmto import MARIGOLD
from fastmto.engine.flat import FlatParameters, buffer_of
from fastmto.experiments import toy
from fastmto.experiments.arguments import DEFAULTS
from fastmto.experiments.data import load_census
from fastmto.experiments.models import MMOE
from fastmto.experiments.train import evaluate, task_losses

CASE = Quadratics()
#: Every kind of state: mirror, projected, reuse, FAMO, random directions, known vectors, averages.
KINDS = [
    {},
    {"estimator": "forward", "lambda_update": "projected", "update_every": 2},
    {"estimator": "reuse"},
    {"criterion": "famo"},
    {"estimator": "directions", "ema": 0.8},
    {"estimator": "span", "criterion": "bargaining", "span_refresh": 3},
    {"estimator": "span", "span": "steps"},
    {"log_losses": True, "preference": [1.0, 2.0, 3.0]},
]


def step(model: Smooth, balancer: MARIGOLD, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    balancer.backward(model.losses(), model.shared(), closure=model.losses)
    optimizer.step()
    balancer.update(model.losses())


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=5e-3, fused=True),
        lambda p: torch.optim.Adam(p, lr=5e-3, foreach=True),
        lambda p: torch.optim.RMSprop(p, lr=2e-3),
        lambda p: fastmto.ClippyAdam(p, lr=5e-3),
    ],
)
@pytest.mark.parametrize("estimator", ["central", "reuse"])
def test_any_optimizer_trains(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], estimator: str
) -> None:
    model = Smooth(dtype=torch.float32)
    first = float(sum(model.losses()).detach())
    optimizer = make(list(model.parameters()))
    balancer = MARIGOLD(estimator=estimator)
    for _ in range(60):
        step(model, balancer, optimizer)
    assert float(sum(model.losses()).detach()) < 0.8 * first
    assert balancer.stats["dropped"] == balancer.stats["held"] == 0
    assert float(balancer.lambda_.sum()) == pytest.approx(1)


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_is_exact(kind: dict) -> None:
    """A state taken mid-run continues bit for bit, through a file and on another balancer."""
    model = Smooth()
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    balancer = MARIGOLD(**kind)
    for _ in range(5):
        step(model, balancer, adam)
    file = io.BytesIO()
    torch.save((model.state_dict(), adam.state_dict(), balancer.state_dict()), file)
    for _ in range(5):
        step(model, balancer, adam)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    again = Smooth(seed=1)
    again.x, again.targets = model.x, model.targets
    other = torch.optim.Adam(again.parameters(), lr=1e-2)
    resumed = MARIGOLD(**kind)
    for one, state in zip((again, other, resumed), states, strict=True):
        one.load_state_dict(state)
    for _ in range(5):
        step(again, resumed, other)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(balancer.lambda_, resumed.lambda_)
    assert torch.equal(balancer.weights, resumed.weights)
    assert balancer.stats == resumed.stats


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_run_twice_is_the_same(kind: dict) -> None:
    ends = []
    for _ in range(2):
        model = Smooth(dtype=torch.float32)
        adam = torch.optim.Adam(model.parameters(), lr=1e-2)
        balancer = MARIGOLD(**kind)
        for _ in range(4):
            step(model, balancer, adam)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


def test_states_that_do_not_fit() -> None:
    theta = parameter((1.0, 2.0))
    mirror = MARIGOLD()
    mirror.backward(CASE(theta), [theta], closure=lambda: CASE(theta))
    state = mirror.state_dict()
    with pytest.raises(ValueError, match="must be of the same rule for lambda"):
        MARIGOLD(lambda_update="projected").load_state_dict(state)
    with pytest.raises(ValueError, match="state must hold"):
        MARIGOLD().load_state_dict({**state, "state": {"rule": {}}})
    span = MARIGOLD(estimator="span")
    span.backward(CASE(theta), [theta], closure=lambda: CASE(theta))
    resumed = MARIGOLD(estimator="span")
    resumed.load_state_dict(span.state_dict())
    wide = parameter((1.0, 2.0, 3.0))
    losses = lambda: torch.stack([wide.square().sum(), wide.sum()])  # noqa: E731
    with pytest.raises(ValueError, match="must be of 3 shared parameters, got vectors of 2"):
        resumed.backward(losses(), [wide], closure=losses)


def test_copies_pickles_and_reset() -> None:
    theta = parameter((1.0, 2.0))
    balancer = MARIGOLD()
    for _ in range(3):
        balancer.backward(CASE(theta), [theta], closure=lambda: CASE(theta))
    for twin in (copy.deepcopy(balancer), pickle.loads(pickle.dumps(balancer))):
        assert torch.equal(twin.lambda_, balancer.lambda_)
        assert twin._probe.copies is None
        twin.backward(CASE(theta), [theta], closure=lambda: CASE(theta))
    balancer.reset()
    assert balancer.n_tasks is None
    assert set(balancer.stats.values()) == {0}


@pytest.mark.parametrize("estimator", ["forward", "central", "directions", "span"])
def test_parameters_in_a_flat_buffer(estimator: str) -> None:
    """As the update-level optimizers lay them out: the same numbers, and nobody moves out."""
    ends = []
    for flat in (False, True):
        model = Smooth()
        buffer = FlatParameters(model.shared()) if flat else None
        for evaluation in ("sequential", "batched"):
            closure = fastmto.FunctionalClosure(model, lambda model: model.losses())
            balancer = MARIGOLD(estimator=estimator, evaluation=evaluation)
            model.zero_grad()
            _, info = balancer.backward(model.losses(), model.shared(), closure=closure)
            ends.append(info.next_lambda)
        if buffer is not None:
            buffer.check("shared parameter")
            (copies,) = [balancer._probe.copies]
            assert buffer_of(copies.layouts[0]) is buffer.data
    assert all(torch.allclose(end, ends[0], rtol=1e-6) for end in ends[1:])


def test_frozen_rows_of_neighbours_are_no_flat_buffer() -> None:
    """Views of one tensor at other places than a layout's are gathered."""
    storage = torch.randn(2, 32, dtype=torch.float64)
    a, b = nn.Parameter(storage[1]), nn.Parameter(storage[0])
    losses = lambda: torch.stack([a.square().sum() + b.sum(), (a * b).sum()])  # noqa: E731
    balancer = MARIGOLD(estimator="directions", criterion=lambda gram: torch.ones(2))
    _, info = balancer.backward(losses(), [a, b], closure=losses)
    assert buffer_of(balancer._probe.copies.layouts[0]) is None
    assert info.gram.isfinite().all()


@pytest.mark.parametrize("start", toy.STARTS)
def test_toy_ends_on_the_pareto_front(start: str) -> None:
    """s = 1: every start goes down the valley to |x1| <= 7, where the front is x2 = -8.36."""
    x = nn.Parameter(torch.tensor(toy.STARTS[start]))
    adam = torch.optim.Adam([x], lr=0.1)
    balancer = MARIGOLD()
    losses = lambda: toy.losses(x)  # noqa: E731
    for _ in range(500):
        adam.zero_grad()
        balancer.backward(losses(), [x], closure=losses)
        adam.step()
    x1, x2 = x.tolist()
    assert abs(x1) < 7.1
    assert x2 == pytest.approx(toy.OPTIMUM_POINT[1], abs=1.2)
    rows = [torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in losses()]
    g = torch.stack(rows)
    shares = torch.linspace(0, 1, 1001)[:, None]
    closest = (shares * g[0] + (1 - shares) * g[1]).norm(dim=1).min()
    assert float(closest) < 0.3  # nearly Pareto stationary; at the starts it is up to 1


def test_the_pages_blocks_run_in_their_order() -> None:
    page = Path(__file__).resolve().parent.parent / "docs" / "marigold.md"
    blocks = re.findall(r"^```py(?:thon)?\n(.*?)^```", page.read_text(), re.M | re.S)
    assert len(blocks) == 4
    exec(compile("\n".join(blocks), str(page), "exec"), {})


@pytest.mark.slow
def test_census_is_not_behind_equal_weighting(shared_dir: Path) -> None:
    """Three epochs of an MMOE on Census-Income KDD: mean AUC of both tasks."""
    data = load_census(shared_dir / "data" / "census_income_kdd")
    defaults = DEFAULTS["census"]
    scores = {}
    for name in ("equal", "marigold"):
        torch.manual_seed(0)
        model = MMOE(
            data.n_dense, data.field_sizes, [task.n_outputs for task in data.tasks],
            **defaults.sizes["mmoe"],
        )  # fmt: skip
        adam = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-6, fused=True)
        balancer = MARIGOLD(update_every=5) if name == "marigold" else None
        shared = model.shared_parameters()
        order = torch.Generator().manual_seed(0)
        for _ in range(3):
            for index in torch.split(torch.randperm(len(data.train), generator=order), 1024):
                batch = data.train.rows(index)

                def losses(model: MMOE = model, batch=batch) -> Tensor:
                    return task_losses(model, data.tasks, batch)

                adam.zero_grad()
                if balancer is None:
                    losses().sum().backward()
                else:
                    balancer.backward(losses(), shared, closure=losses)
                adam.step()
        model.eval()
        found = evaluate(model, data.tasks, data.test)
        scores[name] = sum(found.values()) / len(found)
    assert scores["marigold"] >= scores["equal"] - 5e-4

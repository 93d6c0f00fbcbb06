"""What the two levels once did differently, asked of both."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from levels import BALANCERS, UPDATES, drive
from problems import batch, net
from torch import Tensor, nn

import fastmto


class Pub:
    """PUB with the names of a balancer's call."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.optimizer: fastmto.PUB | None = None

    def step(self, losses: list[Tensor | None], shared: Any, heads: Any) -> Tensor:
        if self.optimizer is None:
            self.optimizer = fastmto.PUB(shared, heads, **self.options)
        self.optimizer.zero_grad()
        self.optimizer.backward(losses)
        self.optimizer.step()
        assert self.optimizer.weights is not None
        return self.optimizer.weights


class Nash:
    def __init__(self, **options: Any) -> None:
        self.balancer = fastmto.get("nashmtl", **options)

    def step(self, losses: list[Tensor | None], shared: Any, heads: Any) -> Tensor:
        return self.balancer.backward(losses, shared, heads)[1].weights


both = pytest.mark.parametrize("kind", [Pub, Nash])


@both
def test_a_parameter_in_neither_list_is_warned_about_with_its_shape(kind: Any) -> None:
    model = net()
    stranger = nn.Parameter(torch.ones(5))
    losses = [loss * stranger.sum() for loss in model.losses(batch(0))]
    with pytest.warns(RuntimeWarning, match=r"neither in shared_parameters.*\(5,\)"):
        kind().step(losses, model.trunk.parameters(), model.head_parameters())


@both
def test_a_task_that_comes_late_gets_a_weight_at_once(kind: Any) -> None:
    options = {"scale": "none", "max_weight": None} if kind is Pub else {"max_norm": None}
    model = net()
    method = kind(update_weights_every=100, **options)
    heads = model.head_parameters()
    for t in range(3):
        losses = model.losses(batch(t))
        first = method.step([*losses[:-1], None], model.trunk.parameters(), heads)
    assert first[-1] == 1.0
    late = method.step(model.losses(batch(4)), model.trunk.parameters(), heads)
    assert late[-1] != 1.0
    assert late[-1] / late[0] < 30


@both
def test_searches_without_an_answer_warn_by_one_text(kind: Any) -> None:
    shared = nn.Parameter(torch.tensor([1.0, 2.0]))
    method = kind(update_weights_every=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(10):
            shared.grad = None
            size = 1.0 + t
            losses = [shared.sum() * size, -shared.sum() * size]
            method.step(losses, [shared], [[], []])
    texts = [str(w.message) for w in caught if "weights held" in str(w.message)]
    assert len(texts) == 10
    assert len(set(texts)) == 1


@both
@pytest.mark.parametrize(
    "weighting", ["cagrad", "upgrad", fastmto.weightings.MGDA(), lambda gram: 1 / gram.diagonal()]
)
def test_weightings_are_names_objects_and_functions(kind: Any, weighting: Any) -> None:
    model = net()
    if kind is Nash:
        method: Any = Nash()
        method.balancer = fastmto.balancers.GramBalancer(weighting)
    else:
        method = Pub(weighting=weighting)
    weights = method.step(model.losses(batch(0)), model.trunk.parameters(), model.head_parameters())
    assert weights.isfinite().all()
    assert (weights >= 0).all()


def test_every_row_of_the_suite_is_of_one_level() -> None:
    assert {row.level for row in UPDATES} == {"update"}
    assert {row.level for row in BALANCERS} <= {"loss", "gradient", "direction", "marigold"}
    assert drive(UPDATES[0]).parameters

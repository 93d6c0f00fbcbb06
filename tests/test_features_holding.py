"""Searches without an answer, steps that are not finite, late tasks: what holds, where the device
decides and where the host does."""

from __future__ import annotations

import math

import pytest
import torch
from balancer_cases import same
from levels import HELD, ON_DEVICE, REGULAR, UPDATES, Linear, T, Update, drive, every, on_device
from torch import nn

import fastmto
from fastmto.optim.rules import RMSProp
from fastmto.weightings import Constant

close = torch.testing.assert_close
NASH = ON_DEVICE[0]
OPPOSITE = HELD["near_stationary"]


@pytest.mark.parametrize("status", HELD)
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_search_without_an_answer_holds_the_last_weights(status, max_norm):
    options = {"max_norm": max_norm, "on_nonfinite": "ignore"}
    pairs = []
    for capturable in (True, False):
        one = Linear(NASH, capturable=capturable, **options)
        one.step(REGULAR)
        if capturable:
            info = one.step(HELD[status], reads=False)
        else:
            with pytest.warns(RuntimeWarning, match="weights held"):
                info = one.step(HELD[status])
        assert info.status == status
        pairs.append((one.method, one.x.grad.clone(), info.weights.clone()))
        assert one.method.stats["held"] == 1
        assert one.step(REGULAR, reads=not capturable).status == "solved"
        assert one.method.stats["held"] == 1
    (there, grad, weights), (here, expected, told) = pairs
    assert torch.equal(weights, told)
    assert torch.equal(grad.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert there.stats == here.stats


def test_an_optimizer_s_search_without_an_answer_holds_the_weights():
    one = Linear(every(1), 4)
    optimizer = one.method
    d = torch.tensor([1.0, 2.0, -1.0, 0.5])
    one.step([d, -d])
    assert optimizer.stats["held"] == 1
    assert optimizer.weights.tolist() == [1, 1]
    assert optimizer.result.status == "near_stationary"
    assert optimizer.result.weights is None
    one.step([d, torch.tensor([1.0, -1.0, 1.0, 3.0])])
    assert optimizer.stats["held"] == 1
    assert optimizer.result.status == "solved"
    assert not torch.equal(optimizer.weights, torch.ones(2, dtype=torch.float64))
    raw = optimizer.result.weights
    close(raw * (optimizer.gram @ raw), torch.ones(2, dtype=torch.float64))
    # Under AdaGrad opposite gradients stay opposite updates; here moments have made them differ.
    one.step(torch.zeros(2, 4))
    assert optimizer.stats["steps"] == 3


@pytest.mark.parametrize("row", [NASH, Update()], ids=str)
def test_weights_are_searched_for_at_once_until_some_are_found(row):
    one = Linear(row, update_weights_every=10)
    for k in range(3):
        assert one.step([[1.0, 0.2], [-1.0, -0.2]]).result.status == "near_stationary"
        assert one.method.stats["held"] == k + 1
    first = 2 if row.level == "update" else 1  # when weights are known to have been found
    infos = [one.step(REGULAR, reads=k < first) for k in range(4)]
    assert infos[0].result.status == "solved"
    assert row.level == "update" or [info.gram is None for info in infos] == [False, *[True] * 3]
    assert one.method.stats["searches"] == 4
    assert one.method.stats["held"] == 3


def test_a_late_task_is_searched_for_at_once():
    one = Linear(NASH, n_tasks=3, update_weights_every=10)
    rows = [*REGULAR, [1.0, 1.0]]
    one.step([*REGULAR, None])
    assert one.step([*REGULAR, None], reads=False).gram is None
    assert one.step(rows, reads=False).gram.shape == (3, 3)
    assert one.step(rows, reads=False).gram is None


@pytest.mark.parametrize("capturable", [True, False])
def test_weights_that_float32_cannot_tell_from_noise_are_held(capturable):
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


def test_float32_gradients_that_are_noise_hold_the_last_weights():
    """kappa above what a Gram matrix of float32 gradients can tell."""
    g = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0))
    x = nn.Parameter(torch.zeros(20_000))
    balancer = fastmto.get("nashmtl", capturable=True)
    balancer.backward([(x * g[0]).sum(), (x * g[1]).sum()], [x], [])
    first = balancer.weights.clone()
    rows = [g[0], -0.3 * g[0] + 1e-5 * g[1]]
    _, info = balancer.backward([(x * row).sum() for row in rows], [x], [])
    assert info.status == "near_stationary"
    assert info.result.kappa > 1e7
    assert info.result.weights is None
    assert torch.equal(info.weights / first, (info.weights / first)[:1].expand(2))  # bounded
    assert balancer.stats["held"] == 1


def test_a_balanced_gradient_that_is_not_finite_goes_through():
    one = Linear(NASH)
    before = one.step(REGULAR).weights.clone()
    info = one.step(HELD["not_finite"], reads=False)
    assert not one.x.grad.isfinite().all()
    assert info.skipped is None
    assert torch.equal(one.method.weights, before)
    assert one.step(REGULAR, reads=False).status == "solved"
    assert one.x.grad.isfinite().all()


@pytest.mark.parametrize("row", UPDATES, ids=str)
def test_an_optimizer_s_step_that_is_not_finite_changes_nothing_and_is_counted(row):
    one = drive(on_device(row))
    one.run(range(3))
    before = one.settled()
    for step in range(3):  # between two searches, in a search, between
        one.factor = math.nan
        one.step(step, reads=False)
    assert same(before, one.settled())
    assert one.stats["skipped"] == 3
    assert one.stats["steps"] == 3
    assert one.stats["held"] == 0
    one.factor = 1.0
    for step in range(10, 14):
        one.step(step)
    assert one.stats["steps"] == 7


@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("rows", [[-1.0, -0.2], [math.inf, 0.0]], ids=["held", "overflow"])
def test_a_late_task_without_weights_stands_with_the_mean_of_the_others(capturable, rows):
    """Its initial weight of 1 would be 2000 times theirs."""
    if not capturable and math.inf in rows:
        pytest.skip("the host skips such a step and searches in the next one")
    one = Linear(NASH, n_tasks=3, capturable=capturable, update_weights_every=100)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4) if math.inf in rows else None
    large = [[1e3, 200.0], [100.0, 2e3]]
    first = one.step([*large, None], scaler=scaler).weights.clone()
    one.step([*large, None], scaler=scaler)
    late = [*large[:1], None, [1e3 * r for r in rows]]
    if capturable:
        info = one.step(late, reads=False, scaler=scaler)
    else:
        with pytest.warns(RuntimeWarning, match="weights held"):
            info = one.step(late)
    assert info.status == ("not_finite" if scaler else "near_stationary")
    # Held, they are brought down by one factor to the bound on the joint gradient.
    close(info.weights[2] / info.weights[0], first[:2].mean() / first[0], rtol=1e-12, atol=0)
    assert scaler is None or torch.equal(info.weights[:2], first[:2])


def test_an_info_keeps_what_it_said():
    one = drive(on_device(NASH), torch.float64)
    told = []
    for step in range(3):
        info = one.step(step)
        assert info.weights.dtype == torch.float64
        told.append((info, info.weights.clone(), info.gram.clone(), info.result.iterations))
    for info, weights, gram, iterations in told:
        assert torch.equal(info.weights, weights)
        assert torch.equal(info.gram, gram)
        assert info.result.iterations == iterations
        assert info.status == "solved"
    assert not torch.equal(told[0][1], told[1][1])
    assert info["cosines"].diagonal().allclose(torch.ones(T, dtype=torch.float64))


def test_a_held_count_is_part_of_the_state():
    one, other = Linear(NASH), Linear(NASH)
    for rows in (REGULAR, OPPOSITE, HELD["zero_update"]):
        one.step(rows)
    assert one.method.stats["held"] == 2
    other.method.load_state_dict(one.method.state_dict())
    other.step(HELD["zero_update"])
    assert other.method.stats["held"] == 3
    other.method.reset()
    assert set(other.method.stats.values()) == {0}


def test_weights_may_be_set():
    for capturable in (True, False):
        one = Linear(NASH, capturable=capturable, update_weights_every=2)
        one.step(REGULAR)
        one.method.weights = torch.tensor([9.0, 4.0], dtype=torch.float64)
        one.step(REGULAR)
        assert torch.equal(one.x.grad, torch.tensor([9.4, 9.8], dtype=torch.float64))


def test_no_task_reaches_what_is_shared():
    one = drive(on_device(NASH), torch.float64)
    first = one.step(0).weights.clone()
    one.zero_grad()
    losses = [sum(p.sum() for p in head) for head in one.heads]
    info = one.backward(losses, features=torch.zeros(0))
    assert torch.equal(info.weights, first)
    assert one.stats["untouched"] == T


def test_a_task_of_weight_zero_keeps_its_head_learning():
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

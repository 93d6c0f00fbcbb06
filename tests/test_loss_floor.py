"""`loss_floor`: what methods with a logarithm, a power or a reciprocal of a loss see at 0."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmto

close = torch.testing.assert_close
FLOOR = 0.25


def losses_of(x: nn.Parameter, values: list[float]) -> list[Tensor]:
    """Losses of these values whose gradients are the unit vectors times 1, 2, ..."""
    return [value + (k + 1) * (x[k] - x.detach()[k]) for k, value in enumerate(values)]


def step(balancer: fastmto.balancers.Balancer, values: list[float]) -> tuple[Tensor, Tensor]:
    """The weights of a step and its gradient."""
    x = nn.Parameter(torch.zeros(len(values), dtype=torch.float64))
    _, info = balancer.backward(
        losses_of(x, values), [x], [], last_shared_parameters=[x], features=None
    )
    assert x.grad is not None
    return info.weights.double(), x.grad


NAMES: dict[str, dict[str, Any]] = {
    "si": {},
    "gradnorm": {},
    "famo": {},
    "ldc_mtl": {"normalization": "log", "n_tasks": 2},
    "db_mtl": {"beta": 0.0},
    "mgda": {"normalization": "loss"},
}


@pytest.mark.parametrize("low", [0.0, -1.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_low_loss_is_refused_and_the_message_says_what_bounds_it(name: str, low: float) -> None:
    with pytest.raises(ValueError, match=r"losses\[1\].*loss_floor="):
        step(fastmto.get(name, **NAMES[name]), [1.0, low])


@pytest.mark.parametrize("low", [0.0, -1.0, 0.1])
@pytest.mark.parametrize("name", NAMES)
def test_the_formula_sees_the_floor_and_the_gradient_is_the_loss_s(name: str, low: float) -> None:
    floored = step(fastmto.get(name, loss_floor=FLOOR, **NAMES[name]), [1.0, low])
    at_floor = step(fastmto.get(name, loss_floor=FLOOR, **NAMES[name]), [1.0, FLOOR])
    plain = step(fastmto.get(name, **NAMES[name]), [1.0, FLOOR])
    for value, floor, expected in zip(floored, at_floor, plain, strict=True):
        close(value, expected, rtol=1e-12, atol=0)
        close(floor, expected, rtol=1e-12, atol=0)


def test_si_at_zero() -> None:
    weights, grad = step(fastmto.get("si", loss_floor=FLOOR), [2.0, 0.0])
    close(weights, torch.tensor([0.5, 4.0]).double())
    close(grad, torch.tensor([0.5, 8.0]).double())


def test_famo_moves_by_the_floored_distances() -> None:
    balancer = fastmto.get("famo", min_losses=[1.0, 1.0], loss_floor=FLOOR, lr=0.1, gamma=0.0)
    weights, _ = step(balancer, [2.0, 1.0])
    close(weights, torch.tensor([0.2, 0.8]).double())  # l = 1 and .25
    balancer.update([torch.tensor(1.5), torch.tensor(0.0)])
    delta = torch.tensor([math.log(1 / 0.5), 0.0]).double()
    z = torch.tensor([0.5, 0.5]).double()
    direction = (z * (delta - (z * delta).sum())).sign()
    logits = balancer.state_dict()["state"]["logits"]
    close(logits.double(), -0.1 * direction, rtol=1e-5, atol=0)  # Adam's first step


def test_gradnorm_s_first_loss_may_be_zero() -> None:
    balancer = fastmto.get("gradnorm", loss_floor=FLOOR)
    step(balancer, [0.0, 1.0])
    close(balancer.state_dict()["state"]["initial"].double(), torch.tensor([FLOOR, 1.0]).double())
    step(balancer, [0.0, 0.0])
    assert torch.isfinite(balancer.weights).all()


def test_dwa_divides_by_no_less_than_the_floor() -> None:
    balancer = fastmto.get("dwa", loss_floor=FLOOR, window=1, temp=1.0)
    for values in ([1.0, 1.0], [1.0, 0.0]):
        step(balancer, values)
    weights, _ = step(balancer, [1.0, 1.0])
    ratios = torch.tensor([1.0, FLOOR]).double()
    close(weights, 2 * ratios.softmax(0), rtol=1e-6, atol=0)
    plain = fastmto.get("dwa", window=1)
    step(plain, [1.0, 1.0])
    with pytest.raises(ValueError, match="loss_floor="):
        step(plain, [1.0, 0.0])


@pytest.mark.parametrize("floor", [0.0, -1.0, math.nan])
def test_a_floor_is_positive(floor: float) -> None:
    with pytest.raises(ValueError, match="loss_floor must be"):
        fastmto.get("si", loss_floor=floor)

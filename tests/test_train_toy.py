"""The toy problem's formulas at known points, and a run on it."""

from __future__ import annotations

import math

import pytest
import torch

import fastmto
from fastmto import toy
from fastmto.train import SummedLosses


def by_hand(x1: float, x2: float, s: float) -> tuple[float, float]:
    """The formulas with Python's floats, written out once more."""
    t = math.tanh(x2)
    c1, c2 = max(math.tanh(x2 / 2), 0), max(-math.tanh(x2 / 2), 0)
    f1 = c1 * (math.log(max(abs(0.5 * (-x1 - 7) + t), 5e-6)) + 6)
    f1 += c2 * (((7 - x1) ** 2 + 0.1 * (x2 + 8) ** 2) / 10 - 20)
    f2 = c1 * (math.log(max(abs(0.5 * (-x1 + 3) - t + 2), 5e-6)) + 6)
    f2 += c2 * (((x1 + 7) ** 2 + 0.1 * (x2 + 8) ** 2) / 10 - 20)
    return s * f1, f2


@pytest.mark.parametrize("s", [1.0, 0.1])
@pytest.mark.parametrize("point", [*toy.STARTS.values(), (-5.0, 50.0), (3.0, -8.3552)])
def test_losses_at_points(point: tuple[float, float], s: float) -> None:
    got = toy.losses(torch.tensor(point, dtype=torch.float64), s)
    assert got.tolist() == pytest.approx(by_hand(*point, s), abs=1e-12)


def test_the_logarithm_is_cut_off() -> None:
    x = torch.tensor([-5.0, 50.0], dtype=torch.float64)  # |(-x1 - 7)/2 + 1| = 0
    assert float(toy.losses(x)[0]) == pytest.approx(math.log(5e-6) + 6)


def test_the_optimum_is_pareto_stationary_and_balanced() -> None:
    x = torch.tensor(toy.OPTIMUM_POINT, dtype=torch.float64, requires_grad=True)
    losses = toy.losses(x)
    assert losses.tolist() == pytest.approx(toy.OPTIMUM, abs=1e-4)
    gradients = [torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in losses]
    assert torch.allclose(gradients[0] + gradients[1], torch.zeros(2).double(), atol=1e-4)


def test_many_points_at_once() -> None:
    points = torch.tensor(list(toy.STARTS.values()), dtype=torch.float64)
    assert torch.equal(toy.losses(points)[2], toy.losses(points[2]))


def adam(shared: list[torch.nn.Parameter], heads: list[list[torch.nn.Parameter]]) -> SummedLosses:
    assert heads == [[], []]
    return SummedLosses(torch.optim.Adam(shared, lr=3e-2), 2)


def test_run_records_the_way() -> None:
    way = toy.run(adam, "B", steps=25, s=0.1, every=10)
    assert way.points.shape == (4, 2)  # the start, 10, 20 and 25
    assert way.points[0].tolist() == [0.0, 0.0]
    assert torch.equal(way.losses, toy.losses(way.points, 0.1))
    assert way.losses[-1].sum() < way.losses[0].sum()


def test_equal_weights_end_where_the_public_code_does() -> None:
    # From B at s = .1: (-.380, -19.828), here with a thirty times larger step.
    way = toy.run(adam, "B", steps=2500, s=0.1, every=2500)
    assert way.losses[-1].tolist() == pytest.approx([-0.380, -19.828], abs=5e-3)


def test_an_unknown_start() -> None:
    with pytest.raises(ValueError, match="start must be one of A, B, C, D, E or a point, got 'F'"):
        toy.run(adam, "F", steps=1)


# At the optimum the updates oppose each other exactly: keeping the last weights is right there.
@pytest.mark.filterwarnings("ignore:no new task weights")
@pytest.mark.parametrize("start", toy.STARTS)
def test_pub_reaches_the_optimum_from_every_start(start: str) -> None:
    """PUB's figure, s = 1, with the paper's literal weights at every step."""

    def pub(shared: list[torch.nn.Parameter], heads: list[list[torch.nn.Parameter]]) -> fastmto.PUB:
        return fastmto.PUB(shared, heads, lr=5e-2, update_weights_every=1, scale="none")

    way = toy.run(pub, start, steps=600, every=600)
    assert way.losses[-1].tolist() == pytest.approx(toy.OPTIMUM, abs=0.3)
    assert way.points[-1].tolist() == pytest.approx(toy.OPTIMUM_POINT, abs=0.2)

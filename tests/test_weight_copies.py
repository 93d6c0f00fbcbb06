"""Copies of weights that outlive a change of the weights: no method may look at them."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fastmto

ESTIMATORS = ["forward", "central", "directions", "span"]


class World:
    """Three regressions on one trunk, under autocast to bfloat16 or not."""

    def __init__(self, trunk: nn.Module | None = None) -> None:
        torch.manual_seed(0)
        self.trunk = trunk or nn.Sequential(nn.Linear(16, 32), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(32, 1) for _ in range(3))
        self.x, self.targets = torch.randn(64, 16), torch.randn(3, 64, 1)
        self.optimizer = torch.optim.SGD([*self.trunk.parameters(), *self.heads.parameters()], 0.1)

    def losses(self) -> list[Tensor]:
        z = self.trunk(self.x)
        return [
            (head(z).float() - y).square().mean() * scale
            for head, y, scale in zip(self.heads, self.targets, (1, 3, 9), strict=True)
        ]

    def own_block(self) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return self.losses()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_marigold_inside_one_autocast_block(estimator: str) -> None:
    ends = []
    for block in (True, False):
        world = World()
        balancer = fastmto.MARIGOLD(3, estimator=estimator)
        for _ in range(3):
            world.optimizer.zero_grad()
            losses = world.losses if block else world.own_block
            with torch.autocast("cpu", torch.bfloat16) if block else nullcontext():
                _, info = balancer.backward(losses(), world.trunk.parameters(), closure=losses)
            world.optimizer.step()
        ends.append(info.next_lambda)
    assert torch.equal(*ends)
    assert not torch.allclose(ends[0], torch.full((3,), 1 / 3).double(), atol=1e-3)


@pytest.mark.parametrize("name", ["famo", "marigold"])
def test_update_in_the_block_of_the_backward(name: str) -> None:
    """After the optimizer's step the next forward in the same block sees what it made."""
    ends = []
    for block in (True, False):
        world = World()
        options = {"estimator": "reuse"} if name == "marigold" else {}
        balancer = fastmto.get(name, 3, **options)
        for _ in range(5):
            world.optimizer.zero_grad()
            losses = world.losses if block else world.own_block
            with torch.autocast("cpu", torch.bfloat16) if block else nullcontext():
                balancer.backward(losses(), world.trunk.parameters())
                world.optimizer.step()
                with torch.no_grad():
                    balancer.update(losses())
        ends.append(balancer.state_dict())
    first, second = (end["state"]["logits" if name == "famo" else "lambda"] for end in ends)
    assert torch.equal(first, second)
    assert first.std() > 1e-3


def test_pub_steps_inside_one_autocast_block() -> None:
    ends = []
    for block in (True, False):
        world = World()
        heads = [head.parameters() for head in world.heads]
        optimizer = fastmto.PUB(world.trunk.parameters(), heads, 0.1, update_weights_every=2)
        losses = world.losses if block else world.own_block
        with torch.autocast("cpu", torch.bfloat16) if block else nullcontext():
            for _ in range(4):
                optimizer.zero_grad()
                optimizer.backward(losses())
                optimizer.step()
        ends.append([p.detach().clone() for p in world.trunk.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


def test_parametrized_weights_that_are_cached() -> None:
    ends = []
    for cached in (True, False):
        torch.manual_seed(1)
        trunk = nn.Sequential(nn.Linear(16, 32), nn.Tanh())
        parametrizations.weight_norm(trunk[0])
        world = World(trunk)
        balancer = fastmto.MARIGOLD(3)
        for _ in range(3):
            world.optimizer.zero_grad()
            with parametrize.cached() if cached else nullcontext():
                _, info = balancer.backward(
                    world.losses(), world.trunk.parameters(), closure=world.losses
                )
            world.optimizer.step()
        ends.append(info.next_lambda)
    assert torch.equal(*ends)
    assert ends[0].std() > 1e-3


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_closure_that_computes_with_copies_is_refused(estimator: str) -> None:
    world = World()
    frozen = {name: p.detach().clone() for name, p in world.trunk.named_parameters()}

    def closure() -> list[Tensor]:
        z = torch.func.functional_call(world.trunk, frozen, (world.x,))
        return [head(z).square().mean() for head in world.heads]

    before = [p.detach().clone() for p in world.trunk.parameters()]
    balancer = fastmto.MARIGOLD(3, estimator=estimator)
    for _ in range(1 if estimator == "span" else 0):
        # The first joint gradient is the one that it goes along.
        balancer.backward(world.losses(), world.trunk.parameters(), closure=world.losses)
    losses, shared = closure_losses(world, frozen), world.trunk.parameters()
    with pytest.raises(RuntimeError, match="bit for bit, wherever the shared parameters are"):
        balancer.backward(losses, shared, closure=closure)
    assert all(torch.equal(p, q) for p, q in zip(before, world.trunk.parameters(), strict=True))


def closure_losses(world: World, frozen: dict[str, Tensor]) -> list[Tensor]:
    """Losses with the values of the closure's, attached to the parameters."""
    attached = {name: frozen[name] + (p - p.detach()) for name, p in world.trunk.named_parameters()}
    z = torch.func.functional_call(world.trunk, attached, (world.x,))
    return [head(z).square().mean() for head in world.heads]


def test_a_step_too_small_for_the_forward_pass_is_no_copy() -> None:
    world = World()
    balancer = fastmto.MARIGOLD(3, relative_step=1e-6, forward_dtype=torch.float32)
    _, info = balancer.backward(
        world.own_block(), world.trunk.parameters(), closure=world.own_block
    )
    assert torch.isfinite(info.derivatives).all()

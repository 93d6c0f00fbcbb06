"""Copies of weights that outlive a change of the weights: no method may look at them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch._inductor.config
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


def test_marigold_in_a_block_that_is_switched_off_inside_another() -> None:
    """The outer block keeps the copies that the closure's own block makes."""
    world = World()
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        _, info = fastmto.MARIGOLD(3).backward(
            world.own_block(), world.trunk.parameters(), closure=world.own_block
        )
    assert (info.derivatives > 0).all()


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_hooks_that_keep_a_computed_weight(norm) -> None:
    """The derivatives are right, and the weight kept is the one of the losses' graph again."""
    trunk = nn.Sequential(nn.Linear(16, 32), nn.Tanh())
    world = World(norm(trunk[0]) and trunk)
    shared = list(world.trunk.parameters())
    losses = world.losses()
    weight = trunk[0].weight
    rows = [torch.autograd.grad(x, shared, retain_graph=True) for x in losses]
    g = torch.stack([torch.cat([x.flatten() for x in row]) for row in rows]).double()
    _, info = fastmto.MARIGOLD(3).backward(losses, shared, closure=world.losses)
    assert trunk[0].weight is weight
    if norm is nn.utils.weight_norm:  # every training forward moves spectral norm's vectors
        assert torch.allclose(info.derivatives, g @ g.mean(0), rtol=1e-2)
    assert (info.derivatives > 0).all()


def test_a_closure_in_inference_mode() -> None:
    ends = []
    for inference in (True, False):
        world = World()

        def closure(world: World = world, inference: bool = inference) -> list[Tensor]:
            with torch.inference_mode() if inference else nullcontext():
                return world.losses()

        for estimator in ESTIMATORS:
            _, info = fastmto.MARIGOLD(3, estimator=estimator).backward(
                world.losses(), world.trunk.parameters(), closure=closure
            )
            ends.append(info.next_lambda)
    for a, b in zip(ends[:4], ends[4:], strict=True):
        assert torch.equal(a, b)


def functional_copies(trunk: nn.Module) -> Callable[[Tensor], Tensor]:
    frozen = {name: p.detach().clone() for name, p in trunk.named_parameters()}
    return lambda x: torch.func.functional_call(trunk, frozen, (x,))


def stacked_state(trunk: nn.Module) -> Callable[[Tensor], Tensor]:
    stacked, _ = torch.func.stack_module_state([trunk])
    call = lambda values, x: torch.func.functional_call(trunk, values, (x,))  # noqa: E731
    return lambda x: torch.vmap(call, in_dims=(0, None))(stacked, x)[0]


def frozen_graph(trunk: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.jit.freeze(torch.jit.script(copy.deepcopy(trunk).eval()))


def inference_copy(trunk: nn.Module) -> Callable[[Tensor], Tensor]:
    with torch.inference_mode():
        return copy.deepcopy(trunk)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("copies", [functional_copies, stacked_state, frozen_graph, inference_copy])
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_closure_that_computes_with_copies_is_refused(copies, estimator: str) -> None:
    world = World()
    before = [p.detach().clone() for p in world.trunk.parameters()]
    forward = copies(world.trunk)

    def closure() -> list[Tensor]:
        z = forward(world.x)
        return [head(z).square().mean() for head in world.heads]

    balancer = fastmto.MARIGOLD(3, estimator=estimator)
    if estimator == "span":
        # The first joint gradient is the one that it goes along.
        balancer.backward(world.losses(), world.trunk.parameters(), closure=world.losses)
    # Losses with the values of the closure's, attached to the parameters.
    nothing = sum((p - p.detach()).sum() for p in world.trunk.parameters())
    losses = [loss.detach() + (k + 1) * nothing for k, loss in enumerate(closure())]
    with pytest.raises(RuntimeError, match="bit for bit, wherever the shared parameters are"):
        balancer.backward(losses, world.trunk.parameters(), closure=closure)
    assert all(torch.equal(p, q) for p, q in zip(before, world.trunk.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:Using `torch.compile")
@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_with_frozen_weights_is_refused(in_place: bool) -> None:
    world = World()
    losses, shared = world.losses(), list(world.trunk.parameters())
    if in_place:
        world.trunk.compile()
    else:
        world.trunk = torch.compile(world.trunk)
    with (
        torch._inductor.config.patch(freezing=True),
        pytest.raises(RuntimeError, match="freezing must be False where a closure calls a comp"),
    ):
        fastmto.MARIGOLD(3).backward(losses, shared, closure=world.losses)


def test_a_step_too_small_for_the_forward_pass_is_no_copy() -> None:
    world = World()
    balancer = fastmto.MARIGOLD(3, relative_step=1e-6, forward_dtype=torch.float32)
    _, info = balancer.backward(
        world.own_block(), world.trunk.parameters(), closure=world.own_block
    )
    assert torch.isfinite(info.derivatives).all()

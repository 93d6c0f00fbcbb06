"""Balancers with a GradScaler: scaled once, unscaled once, and what overflows is skipped."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from balancer_cases import CASES, BalancerCase, World, same
from torch import Tensor, nn

import fastmto
from fastmto.balancers import Balancer, Info
from fastmto.errors import NonFiniteError

MORE = [
    BalancerCase("mgda_ub", level="gradient"),
    BalancerCase("nashmtl", {"capturable": True}, "capturable", level="gradient"),
    BalancerCase("nashmtl", {"heads": "weighted"}, "weighted heads", level="gradient"),
    BalancerCase("nashmtl", {"level": "features"}, "features", level="gradient"),
    BalancerCase("nashmtl", {"passes": "batched"}, "batched", level="gradient"),
    BalancerCase("marigold", {"estimator": "forward"}, "forward"),
    BalancerCase("marigold", {"estimator": "central"}, "central"),
    BalancerCase("marigold", {"estimator": "reuse"}, "reuse"),
    BalancerCase("marigold", {"estimator": "directions"}, "directions"),
    BalancerCase("marigold", {"estimator": "span", "span": "steps"}, "steps"),
    BalancerCase("marigold", {"estimator": "span", "span_refresh": 2}, "gradients"),
]
ALL = [*CASES, *MORE]
GRADIENT_LEVEL = [case for case in ALL if case.level == "gradient"]


class Scaled(World):
    """A world whose steps go through a scaler, if there is one.

    Args:
        balancer: to be called.
        scale: the scaler starts with; None: no scaler.
        options: of the scaler.
    """

    def __init__(self, balancer: Balancer, scale: float | None, **options: Any) -> None:
        super().__init__(balancer, dtype=torch.float32)
        self.scaler = scale and torch.amp.GradScaler("cpu", init_scale=scale, **options)
        if self.scaler:
            self.scaler.scale(torch.ones(()))  # the scale exists from now on
        self.factor = 1.0
        self.kick = 0.0

    def losses(self, step: int) -> list[Tensor]:
        """The first task's is multiplied by `factor`, and `kick` is added to its gradients on the
        features and on its head."""
        self.z = self.model.trunk(self.data(step))
        losses = [
            (head(self.z.tanh()) - i - 1).pow(2).mean() + 0.1
            for i, head in enumerate(self.model.heads)
        ]
        first = self.factor * losses[0]
        for x in (self.z, *self.model.heads[0].parameters()) if self.kick else ():
            first = first + self.kick * (x - x.detach()).sum()
        return [first, *losses[1:]]

    def backward(self, losses: list[Tensor | None], step: int):
        return self.balancer.backward(
            losses, **self.arguments(step), features=self.z, scaler=self.scaler
        )

    def step(self, step: int, absent: tuple[int, ...] = ()):
        self.optimizer.zero_grad()
        losses = [None if i in absent else loss for i, loss in enumerate(self.losses(step))]
        returned = self.backward(losses, step)
        self.finish(step, absent)
        return returned

    def finish(self, step: int, absent: tuple[int, ...] = ()) -> None:
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.balancer.needs_update:
            with torch.no_grad():
                losses = [None if i in absent else loss for i, loss in enumerate(self.losses(step))]
                self.balancer.update(losses)

    def snapshot(self) -> dict[str, Any]:
        """What a skipped step leaves alone, without its count."""
        state = copy.deepcopy(self.balancer.state_dict())
        state["stats"].pop("skipped")
        if "gram" in state["state"]:  # MARIGOLD has NaN where it knows nothing
            state["state"]["gram"].nan_to_num_(-1.0)
        state["state"].pop("heads", None)  # whose they are is found whatever their gradients
        return {"model": copy.deepcopy(self.model.state_dict()), "balancer": state}


def assert_same_state(a: Scaled, b: Scaled) -> None:
    assert same(a.snapshot(), b.snapshot())
    assert same(a.optimizer.state_dict(), b.optimizer.state_dict())
    assert a.balancer.stats == b.balancer.stats


def assert_close(a: Scaled, b: Scaled, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    for x, y in zip(a.parameters, b.parameters, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


def _divides(case: BalancerCase, info: Info) -> bool:
    """Whether weights are divided out of gradients that may be of float16."""
    return "capturable" not in case.options and bool((info.weights.abs() >= 2.0**-6).all())


@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize("every", [1, 3])
def test_a_power_of_two_changes_no_bit(case, every):
    plain = Scaled(case.build(update_weights_every=every), None)
    # The scale doubles after every second step.
    scaled = Scaled(case.build(update_weights_every=every), 2.0**8, growth_interval=2)
    for step in range(7):
        absent = (1,) if step == 4 else ()
        loss, info = plain.step(step, absent)
        other, told = scaled.step(step, absent)
        if every > 1 and case.level == "gradient" and not _divides(case, info):
            # Between two searches the heads then get a backward of their own.
            assert_close(plain, scaled)
            return
        assert torch.equal(loss, other)
        assert torch.equal(info.weights, told.weights)
        assert same(info.gram, told.gram)
        assert told.skipped is None
    assert scaled.scaler.get_scale() == 2.0**11
    assert_same_state(plain, scaled)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_any_scale_changes_rounding_only(case):
    plain = Scaled(case.build(), None)
    scaled = Scaled(case.build(), 1000.3)
    for world in (plain, scaled):
        for step in range(2):
            world.step(step)
    assert_close(plain, scaled, 1e-3, 1e-4)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_grad_is_left_scaled_and_is_unscaled_once(case):
    scale = 2.0**10
    plain, scaled = Scaled(case.build(), None), Scaled(case.build(), scale)
    for world in (plain, scaled):
        world.optimizer.zero_grad()
        world.backward(world.losses(0), 0)
    every = [*plain.parameters, *plain.balancer.parameters()]
    other = [*scaled.parameters, *scaled.balancer.parameters()]
    for p, q in zip(every, other, strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            assert torch.equal(scale * p.grad, q.grad)
    # Unscaled by hand, for clipping: `step` does not do it again.
    scaled.scaler.unscale_(scaled.optimizer)
    for world in (plain, scaled):
        torch.nn.utils.clip_grad_norm_(world.parameters, 0.01)
        world.finish(0)
    assert_same_state(plain, scaled)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_two_backwards_add_up(case):
    plain, scaled = Scaled(case.build(), None), Scaled(case.build(), 2.0**10)
    for world in (plain, scaled):
        world.optimizer.zero_grad()
        for step in range(2):
            if world.balancer.needs_update and step:
                continue
            world.backward(world.losses(step), step)
        world.finish(0)
    assert_same_state(plain, scaled)


@pytest.mark.parametrize("case", GRADIENT_LEVEL, ids=str)
@pytest.mark.parametrize("at", [0, 2, 3])
@pytest.mark.parametrize("every", [1, 3])
def test_an_overflow_is_the_scaler_s_to_skip(case, at, every):
    """In the first search, in a later one, and between two."""
    options = {"update_weights_every": every}
    plain = Scaled(case.build(**options), None)
    scaled = Scaled(case.build(**options), 2.0**120, backoff_factor=2.0**-100)
    for step in range(at):
        plain.step(step)
        scaled.scaler.update(2.0**20)
        scaled.step(step)
    scaled.scaler.update(2.0**120)
    scaled.kick = 2.0**40
    before = scaled.snapshot()
    if at == 0:
        before["balancer"]["state"].pop("smoothed", None)  # None; zeros once P is known
    _, info = scaled.step(at)
    scaled.kick = 0.0
    assert not all(p.grad.isfinite().all() for p in scaled.parameters if p.grad is not None)
    searched = every == 1 or at % 3 == 0
    after = scaled.snapshot()
    if at == 0:
        after["balancer"]["state"].pop("smoothed", None)
    assert same(before["model"], after["model"])
    if "capturable" in case.options:
        # Without a look the host counts it.
        assert same(before["balancer"]["weights"], after["balancer"]["weights"])
        assert (info.status == "not_finite") == searched
        assert scaled.balancer.stats["skipped"] == searched
    else:
        assert same(before["balancer"], after["balancer"])
        assert "is not finite" in info.skipped
        assert scaled.balancer.stats["skipped"] == 1
    assert scaled.scaler.get_scale() == 2.0**20
    if "capturable" in case.options and at > 0:
        scaled.balancer._steps -= 1
    plain.step(at)
    _, info = scaled.step(at)
    assert info.skipped is None
    torch.testing.assert_close(plain.balancer.weights, scaled.balancer.weights)
    assert_close(plain, scaled)
    if every == 1:
        assert same(plain.snapshot()["model"], scaled.snapshot()["model"])


@pytest.mark.parametrize("case", [c for c in ALL if c.level == "loss"], ids=str)
def test_an_overflow_leaves_loss_level_methods_able_to_go_on(case):
    scaled = Scaled(case.build(), 2.0**20, backoff_factor=2.0**-100)
    scaled.step(0)
    scaled.scaler.update(2.0**120)
    scaled.kick = 2.0**40
    before = scaled.snapshot()
    scaled.step(1)
    scaled.kick = 0.0
    assert not all(p.grad.isfinite().all() for p in scaled.parameters if p.grad is not None)
    after = scaled.snapshot()
    assert same(before["model"], after["model"])
    assert scaled.scaler.get_scale() == 2.0**20
    if case.key == "marigold":
        assert same(before["balancer"]["weights"], after["balancer"]["weights"])
        assert same(before["balancer"]["state"]["lambda"], after["balancer"]["state"]["lambda"])
    for step in range(1, 4):
        _, info = scaled.step(step)
        assert info.weights.isfinite().all()
    assert not same(after["model"], scaled.snapshot()["model"])
    assert all(p.isfinite().all() for p in scaled.parameters)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_loss_that_is_not_finite_reaches_the_scaler(case):
    if "capturable" in case.options:
        pytest.skip("looks at no loss")
    scaled = Scaled(case.build(), 2.0**10)
    scaled.step(0)
    before = scaled.snapshot()
    scaled.factor = math.nan
    _, info = scaled.step(1) if not scaled.balancer.needs_update else _without_update(scaled, 1)
    assert "is not finite" in info.skipped
    after = scaled.snapshot()
    assert same(before, after)
    assert scaled.balancer.stats["skipped"] == 1
    assert scaled.scaler.get_scale() == 2.0**9
    strict = Scaled(case.build(on_nonfinite="raise"), 2.0**10)
    strict.factor = math.nan
    with pytest.raises(NonFiniteError, match="is not finite"):
        strict.backward(strict.losses(0), 0)
    assert all(p.grad is None for p in strict.parameters)


@pytest.mark.parametrize("why", ["loss", "masked loss", "gradient", "good"])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_an_optimizer_for_every_part_skips_as_well(case, why):
    """The trunk's, each head's and one for what the method learns: all of them, or none."""
    if "capturable" in case.options and "loss" in why:
        pytest.skip("looks at no loss")
    scaled = Scaled(case.build(), 2.0**10)
    model, balancer = scaled.model, scaled.balancer
    parts = [list(model.trunk.parameters()), *map(list, model.head_parameters())]
    parts += [balancer.parameters()] if balancer.parameters() else []
    optimizers = [torch.optim.Adam(part, lr=0.01) for part in parts]
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses = scaled.losses(step)
        last = step == 2
        if last and why == "loss":
            losses[0] = losses[0] * math.nan
        elif last and why == "masked loss":  # whose backward is zeros
            losses[0] = torch.where(torch.tensor(True), torch.tensor(math.nan), losses[0])
        elif last and why == "gradient":
            losses[0] = losses[0] + (scaled.z - scaled.z.detach()).sum() * 2.0**120
        before = [[p.detach().clone() for p in part] for part in parts]
        arguments = scaled.arguments(step)
        heads = map(iter, arguments.pop("task_specific_parameters"))  # as `module.parameters()`
        _, info = scaled.balancer.backward(
            losses,
            **arguments,
            task_specific_parameters=list(heads),
            features=scaled.z,
            scaler=scaled.scaler,
        )
        for optimizer in optimizers:
            scaled.scaler.step(optimizer)
        scaled.scaler.update()
        if scaled.balancer.needs_update and not (last and why != "good"):
            with torch.no_grad():
                scaled.balancer.update(scaled.losses(step))
    still = [
        all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
        for a, b in zip(before, parts, strict=True)
    ]
    skips = why != "good"
    if why == "gradient" and case.level == "loss" and case.key != "marigold":
        # Nobody but the scaler looks at it: what it does not reach moves.
        assert info.skipped is None
        assert still[:2] == [True, False]
        return
    assert still == [skips] * len(parts)
    if "capturable" not in case.options:
        assert (info.skipped is not None) == skips


def test_a_step_for_the_scaler_to_skip_writes_to_what_it_would_have_moved():
    """Not to what is in neither list, nor to inputs."""
    encoder = nn.Linear(6, 6)
    scaled = Scaled(fastmto.get("nashmtl", 3), 2.0**8)
    x = scaled.data(0).requires_grad_()
    scaled.data = lambda step: encoder(x)
    with pytest.warns(RuntimeWarning, match="neither in shared_parameters"):
        scaled.step(0)
    for factor, kick in ((math.inf, 0.0), (1.0, 2.0**120)):
        scaled.factor, scaled.kick = factor, kick
        _, info = scaled.step(1)
        assert "is not finite" in info.skipped
        assert all(p.grad.isnan().all() for p in scaled.parameters)
        assert x.grad is None
        assert all(p.grad is None for p in encoder.parameters())


@pytest.mark.parametrize("listed", [True, False])
def test_features_without_a_trunk_have_nan_behind_them(listed):
    """`shared_parameters` and the heads left out, their gradients are those of the graph."""
    scaled = Scaled(fastmto.get("nashmtl", 3, level="features"), 2.0**8)
    frozen = scaled.model.heads[1].bias.requires_grad_(False)
    scaled.factor = math.nan
    losses = scaled.losses(0)
    arguments = scaled.arguments(0) if listed else {}
    _, info = scaled.balancer.backward(
        losses, **{**arguments, "features": scaled.z}, scaler=scaled.scaler
    )
    assert "is not finite" in info.skipped
    assert frozen.grad is None
    for p in scaled.parameters:
        assert p is frozen or p.grad.isnan().all()


def test_what_is_in_grad_already_becomes_nan_in_place():
    """But for a sparse gradient, which cannot show NaN everywhere."""
    table = nn.Embedding(8, 2, sparse=True)
    w = nn.Parameter(torch.ones(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    balancer = fastmto.get("ls", 2)
    held = []
    for factor in (1.0, math.nan):
        z = table(torch.tensor([1, 2])) * w
        balancer.backward([z.sum() * factor, z.square().sum()], scaler=scaler)
        held.append(w.grad)
    assert held[0] is held[1]
    assert w.grad.isnan().all()
    assert table.weight.grad.isnan().all()


@pytest.mark.parametrize("scaler", [True, 1024.0, "cuda"])
@pytest.mark.parametrize("key", ["ls", "nashmtl", "marigold", "pub"])
def test_a_scaler_is_a_scaler(key, scaler):
    x = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"scaler must be a torch\.amp\.GradScaler or None, got"):
        fastmto.get(key).backward([x.sum(), x.square().sum()], [x], [], scaler=scaler)
    assert x.grad is None


def _without_update(world: Scaled, step: int):
    world.optimizer.zero_grad()
    returned = world.backward(world.losses(step), step)
    world.scaler.step(world.optimizer)
    world.scaler.update()
    return returned


@pytest.mark.parametrize("policy", [None, "skip", "raise", "ignore"])
@pytest.mark.parametrize("key", ["nashmtl", "graddrop", "db_mtl"])
def test_overflows_reach_the_scaler_whatever_the_policy(key, policy):
    scaled = Scaled(fastmto.get(key, 3, on_nonfinite=policy), 2.0**20)
    scaled.step(0)
    scaled.scaler.update(2.0**127)
    scaled.kick = 2.0**40
    before = scaled.snapshot()
    scaled.step(1)
    assert same(before, scaled.snapshot())


@pytest.mark.parametrize(("capturable", "every"), [(True, 1), (False, 1), (False, 2)])
def test_a_head_s_overflow_stops_the_whole_step(capturable, every):
    """The first task's own head alone overflows; weights and state stay with the parameters."""
    options = {"capturable": capturable, "update_weights_every": every}
    scaled = Scaled(fastmto.get("nashmtl", 3, **options), 2.0**10)
    scaled.step(0)
    before = scaled.snapshot()
    losses = scaled.losses(1)
    bias = scaled.model.heads[0].bias
    losses[0] = losses[0] + (bias - bias.detach()).sum() * 2.0**120
    scaled.optimizer.zero_grad()
    _, info = scaled.backward(losses, 1)
    assert all(p.grad.isfinite().logical_not().any() for p in scaled.parameters)
    scaled.finish(1)
    after = scaled.snapshot()
    assert same(before["model"], after["model"])
    assert same(before["balancer"]["weights"], after["balancer"]["weights"])
    assert scaled.balancer.stats["skipped"] == 1
    assert info.status == ("not_finite" if capturable else None)


def test_nothing_shows_nan_after_an_overflow():
    """What lies between the tensors in the buffers is never looked at by chance."""
    for capturable in (True, False):
        scaled = Scaled(fastmto.get("nashmtl", 3, capturable=capturable), 2.0**10)
        for step in range(3):
            scaled.kick = 2.0**120 if step == 1 else 0.0  # the loss stays finite
            _, info = scaled.step(step)
            if step == 1:
                assert (info.status if capturable else info.skipped).startswith(
                    "not_finite" if capturable else "the gradient of"
                )
        assert scaled.balancer.stats["skipped"] == 1
        assert all(p.grad.isfinite().all() for p in scaled.parameters)


def test_gradients_that_the_scale_alone_can_carry():
    """Too small for float16 features: unscaled they are 0."""
    x = nn.Parameter(torch.ones(4))
    rows = torch.tensor([[1.0, 0.5, 0.0, 0.0], [0.2, 1.0, 0.3, 0.0]])

    def losses():
        half = x.to(torch.float16)  # its gradient is float16 on the way
        return [(half.float() * row * 2.0**-28).sum() for row in rows]

    balancer = fastmto.get("nashmtl")
    with pytest.warns(RuntimeWarning, match="weights held"):
        balancer.backward(losses(), [x], [])
    assert not x.grad.any()
    x.grad = None
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    balancer = fastmto.get("nashmtl")
    _, info = balancer.backward(losses(), [x], [], scaler=scaler)
    assert info.status == "solved"
    gram = (2.0**-28 * rows.double()) @ (2.0**-28 * rows.double()).T
    torch.testing.assert_close(info.gram, gram, rtol=1e-2, atol=0)
    torch.testing.assert_close(
        x.grad / 2.0**20, info.weights.float() @ (2.0**-28 * rows), rtol=1e-2, atol=0
    )


@pytest.mark.parametrize("key", ["ls", "nashmtl", "imtl", "marigold"])
def test_a_disabled_scaler_is_none(key):
    plain, disabled = Scaled(fastmto.get(key, 3), None), Scaled(fastmto.get(key, 3), None)
    disabled.scaler = torch.amp.GradScaler("cpu", enabled=False)
    for world in (plain, disabled):
        for step in range(2):
            world.step(step)
    assert_same_state(plain, disabled)


@pytest.mark.parametrize("key", ["ls", "gradnorm", "nashmtl", "mgda_ub", "db_mtl", "marigold"])
def test_trains_in_float16_autocast(key):
    world = Scaled(fastmto.get(key, 3), 2.0**16)
    first = last = 0.0
    for step in range(40):
        world.optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            losses = world.losses(step % 2)
            arguments = {**world.arguments(step % 2), "features": world.z}
        last = float(sum(loss.detach().float() for loss in losses))
        first = first or last
        world.balancer.backward(losses, **arguments, scaler=world.scaler)
        world.scaler.step(world.optimizer)
        world.scaler.update()
    assert last < 0.7 * first


def test_pub_steps_inside_and_refuses_a_scaler():
    x = nn.Parameter(torch.ones(2))
    scaler = torch.amp.GradScaler("cpu")
    losses = [x.sum(), (2 * x).square().sum()]
    with pytest.raises(ValueError, match="scaler must be None for this class"):
        fastmto.get("pub").backward(losses, [x], [], scaler=scaler)
    off = torch.amp.GradScaler("cpu", enabled=False)
    fastmto.get("pub").backward(losses, [x], [], scaler=off)
    assert not torch.equal(x.detach(), torch.ones(2))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("key", ["nashmtl", "mgda", "uncertainty"])
def test_a_gpu_waits_for_nothing_but_the_scaler(key, every):
    """float16 autocast from a scale that is too large: the scaler brings it down."""
    balancer = fastmto.get(key, 3, update_weights_every=every)
    world = World(balancer, dtype=torch.float32)
    world.model.cuda()
    parameters = [*world.model.parameters(), *(p for p in balancer.parameters())]
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**24)
    first = last = 0.0
    optimizer = None
    for step in range(80):
        with torch.autocast("cuda", torch.float16):
            z = world.model.trunk(world.data(step % 2).cuda())
            losses = [
                (head(z.tanh()) - i - 1).float().pow(2).mean() + 0.1
                for i, head in enumerate(world.model.heads)
            ]
        found = balancer._found
        if found and step > 1:
            torch.cuda.set_sync_debug_mode("error")
        try:
            balancer.backward(losses, **world.arguments(0), scaler=scaler)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        # Learnable parameters go to the losses' device at the first backward.
        optimizer = optimizer or torch.optim.Adam(parameters, lr=0.01)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        last = sum(loss.item() for loss in losses)
        first = first or last
    assert scaler.get_scale() < 2.0**24
    assert balancer.weights.isfinite().all()
    assert last < 0.7 * first

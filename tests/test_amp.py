"""A GradScaler with the update-level optimizers: unscaled once, overflows skipped."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from problems import Net, batch, net, parameters
from torch import Tensor, nn

import fastmto
from fastmto.weightings import MGDA

CONFIGURATIONS: list[dict[str, Any]] = [
    {"update_weights_every": 2},
    {"update_weights_every": 3, "clippy": True},
    {"update_weights_every": 2, "adatask": True},
    {"update_weights_every": 2, "delayed": True},
    {"update_weights_every": 2, "weighting": MGDA()},
]


def scaler_of(scale: float, **options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, **options)


def pub(model: Net, **options: Any) -> fastmto.PUB:
    return fastmto.PUB(model.trunk.parameters(), model.head_parameters(), 0.01, **options)


def assert_same(a: Net, b: Net, x: fastmto.PUB, y: fastmto.PUB) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
        for name, value in x.state[p].items():
            assert torch.equal(value, y.state[q][name]), name
    assert torch.equal(x.weights, y.weights)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_powers_of_two_leave_no_trace(options: dict[str, Any], capturable: bool) -> None:
    """The scale is divided out exactly once, of what is shared and of the heads."""
    models = net(), net()
    scaled, plain = (pub(m, capturable=capturable, **copy.deepcopy(options)) for m in models)
    # The scale grows on the way.
    scaler = scaler_of(2.0**12, growth_interval=4)
    for t in range(12):
        scaled.zero_grad()
        scaled.backward(models[0].losses(batch(t)), scaler=scaler)
        assert scaler.step(scaled) is None
        scaler.update()
        plain.zero_grad()
        plain.backward(models[1].losses(batch(t)))
        plain.step()
    assert scaler.get_scale() == 2.0**15
    close = capturable or isinstance(scaled.weighting, MGDA)  # how heads get theirs rounds there
    if not close:
        assert_same(*models, scaled, plain)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("where", ["search", "between", "head"])
def test_an_overflow_skips_the_step_and_lowers_the_scale(where: str, capturable: bool) -> None:
    model = net()
    optimizer = pub(model, update_weights_every=2, capturable=capturable, on_nonfinite="skip")
    scaler = scaler_of(2.0**10)

    def step(factor: float) -> None:
        optimizer.zero_grad()
        losses = model.losses(batch(0))
        if where == "head":
            # Beyond float32 with the scale, on one head alone.
            head = model.heads[1]
            losses[1] = losses[1] + (head.bias * factor).sum() * (1 if factor == 1 else 1e30)
        else:
            losses[1] = losses[1] * factor
        optimizer.backward(losses, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()

    for _ in range(2 if where != "between" else 3):
        step(1.0)
    before = copy.deepcopy(optimizer.state_dict())
    params = [p.detach().clone() for p in model.parameters()]
    scale = scaler.get_scale()
    huge = 1e7 if where == "head" else 1e36
    if capturable:
        step(huge)
    else:
        with pytest.warns(RuntimeWarning, match="step skipped"):
            step(huge)
    assert scaler.get_scale() == scale / 2
    assert all(torch.equal(p, q) for p, q in zip(params, model.parameters(), strict=True))
    after = optimizer.state_dict()
    for key, moments in before["state"].items():
        assert all(torch.equal(m, after["state"][key][name]) for name, m in moments.items())
    assert torch.equal(before["fastmto"]["weights"], after["fastmto"]["weights"])
    assert before["fastmto"]["counts"] == after["fastmto"]["counts"]
    assert optimizer.stats["skipped"] == 1
    step(1.0)
    assert optimizer.stats["skipped"] == 1
    assert scaler.get_scale() == scale / 2


def test_a_loss_that_is_not_finite_is_an_overflow() -> None:
    model = net()
    optimizer, scaler = pub(model), scaler_of(2.0**10)
    losses = model.losses(batch(0))
    with pytest.warns(RuntimeWarning, match="step skipped"):
        optimizer.backward([losses[0], losses[1] * torch.inf], scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.stats["steps"] == 0


def test_heads_that_were_unscaled_to_be_clipped_are_not_unscaled_again() -> None:
    models = net(), net()
    scaled, plain = (pub(m, update_weights_every=2) for m in models)
    scaler = scaler_of(2.0**12)
    for t in range(5):
        scaled.zero_grad()
        scaled.backward(models[0].losses(batch(t)), scaler=scaler)
        scaler.unscale_(scaled)
        nn.utils.clip_grad_norm_(models[0].heads.parameters(), 0.01)
        scaler.step(scaled)
        scaler.update()
        plain.zero_grad()
        plain.backward(models[1].losses(batch(t)))
        nn.utils.clip_grad_norm_(models[1].heads.parameters(), 0.01)
        plain.step()
    assert_same(*models, scaled, plain)


@pytest.mark.parametrize("capturable", [False, True])
def test_what_a_scaler_found_is_believed_even_if_it_was_mended(capturable: bool) -> None:
    model = net()
    optimizer, scaler = pub(model, capturable=capturable), scaler_of(2.0**4)
    params = [p.detach().clone() for p in model.parameters()]
    optimizer.backward(model.losses(batch(0)), scaler=scaler)
    model.heads[0].bias.grad.fill_(torch.inf)
    scaler.unscale_(optimizer)
    model.heads[0].bias.grad.fill_(0.0)
    if capturable:
        scaler.step(optimizer)
    else:
        with pytest.warns(RuntimeWarning, match="step skipped"):
            scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**3
    assert all(torch.equal(p, q) for p, q in zip(params, model.parameters(), strict=True))


def test_gradients_of_two_backwards_are_unscaled_together() -> None:
    models = net(), net()
    scaled, plain = (pub(m) for m in models)
    scaler = scaler_of(2.0**12)
    for t in range(3):
        for k in range(2):
            scaled.backward(models[0].losses(batch(10 * t + k)), scaler=scaler)
            plain.backward(models[1].losses(batch(10 * t + k)))
        scaler.step(scaled)
        scaler.update()
        plain.step()
    assert_same(*models, scaled, plain)


def test_a_disabled_scaler_changes_nothing() -> None:
    models = net(), net()
    scaled, plain = (pub(m) for m in models)
    scaler = scaler_of(2.0**12, enabled=False)
    for t in range(3):
        scaled.backward(models[0].losses(batch(t)), scaler=scaler)
        scaler.step(scaled)
        scaler.update()
        plain.backward(models[1].losses(batch(t)))
        plain.step()
    assert_same(*models, scaled, plain)


def test_without_heads_the_scaler_still_learns_of_it() -> None:
    shared = nn.Parameter(torch.ones(3))
    optimizer, scaler = fastmto.PUB([shared], [[], []]), scaler_of(4.0)
    d = torch.tensor([1.0, 2.0, -1.0])
    for factor, scale in ((1.0, 4.0), (1e38, 2.0)):
        losses: list[Tensor] = [(shared * d).sum() * factor, (shared * d.flip(0)).sum()]
        optimizer.backward(losses, scaler=scaler)
        if factor == 1.0:
            scaler.step(optimizer)
        else:
            with pytest.warns(RuntimeWarning, match="step skipped"):
                scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale
    assert optimizer.stats["steps"] == 1


def test_misuse_is_named_and_changes_nothing() -> None:
    model = net()
    optimizer, scaler = pub(model), scaler_of(2.0**4)
    params = [p.detach().clone() for p in model.parameters()]
    optimizer.backward(scaler.scale(torch.stack(model.losses(batch(0)))))
    with pytest.raises(RuntimeError, match=r"^PUB.backward must be given the GradScaler"):
        scaler.step(optimizer)
    optimizer.zero_grad()
    optimizer.backward(model.losses(batch(0)), scaler=scaler)
    with pytest.raises(RuntimeError, match=r"^the gradients are scaled: call scaler.step"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"^scaler must be the same"):
        optimizer.backward(model.losses(batch(0)))
    with pytest.raises(
        ValueError, match=r"^scaler must be a torch.amp.GradScaler or None, got bool"
    ):
        optimizer.backward(model.losses(batch(0)), scaler=True)
    half = fastmto.PUB(parameters(0, torch.float16), [[], []])
    with pytest.raises(ValueError, match=r"^scaler must be None with float16 parameters"):
        half.backward([p.sum() for p in half.param_groups[0]["params"][:2]], scaler=scaler)
    assert all(torch.equal(p, q) for p, q in zip(params, model.parameters(), strict=True))


@pytest.mark.parametrize("unscales", [False, True])
def test_an_error_under_a_scaler_leaves_nothing_behind(unscales: bool) -> None:
    """torch forgets what it hung on an optimizer only after a step that returns."""
    models = net(), net()
    scaled, plain = (pub(m, on_nonfinite="raise", update_weights_every=2) for m in models)
    scaler = scaler_of(2.0**10)
    bad = models[0].losses(batch(9))
    scaled.backward([bad[0] * 1e36, bad[1]], scaler=scaler)
    with pytest.raises(fastmto.errors.NonFiniteError):
        scaler.step(scaled)
    scaler.update()
    assert not hasattr(scaled, "found_inf")
    assert not hasattr(scaled, "grad_scale")
    for t in range(4):
        scaled.zero_grad()
        plain.zero_grad()
        plain.backward(models[1].losses(batch(t)))
        plain.step()
        if t == 2:  # one step without the scaler
            scaled.backward(models[0].losses(batch(t)))
            scaled.step()
            continue
        scaled.backward(models[0].losses(batch(t)), scaler=scaler)
        if unscales:
            scaler.unscale_(scaled)
        scaler.step(scaled)
        scaler.update()
    assert_same(*models, scaled, plain)


def test_a_step_within_an_error_handler_is_a_step() -> None:
    model = net()
    optimizer, scaler = pub(model), scaler_of(4.0)
    try:
        raise ArithmeticError
    except ArithmeticError:
        optimizer.backward(model.losses(batch(0)), scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.stats["steps"] == 1


def test_float16_autocast_trains() -> None:
    model = net()
    optimizer, scaler = pub(model, update_weights_every=3), scaler_of(2.0**10)
    first = sum(loss.item() for loss in model.losses(batch(0)))
    for _ in range(40):
        with torch.autocast("cpu", torch.float16):
            losses = model.losses(batch(0))
        optimizer.zero_grad()
        optimizer.backward(losses, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    assert sum(loss.item() for loss in model.losses(batch(0))) < 0.9 * first
    assert optimizer.stats["skipped"] == 0

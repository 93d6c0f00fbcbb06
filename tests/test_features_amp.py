"""A GradScaler with every method: scaled once, unscaled once, and what overflows is skipped."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from balancer_cases import BalancerCase, same
from levels import (
    BALANCERS,
    SOME_UPDATES,
    Update,
    assert_close_run,
    assert_same_run,
    drive,
    every,
    on_device,
)
from problems import parameters
from torch import nn

import fastmto
from fastmto.errors import NonFiniteError

ON_HOST = [*(row for row in BALANCERS if "capturable" not in row.options), *SOME_UPDATES]
ROWS = [*BALANCERS, *SOME_UPDATES, *map(on_device, (SOME_UPDATES[k] for k in (0, 2, 3, 4, 5)))]
every_row = pytest.mark.parametrize("row", ROWS, ids=str)
SOME = [row for row in ROWS if row.key in ("ls", "nashmtl", "imtl", "marigold", "pub")]
some_rows = pytest.mark.parametrize("row", SOME, ids=str)
every_balancer = pytest.mark.parametrize("row", BALANCERS, ids=str)
#: Rows with how often they search: an optimizer's row says it itself.
PACED = [(row, {"update_weights_every": n}) for row in BALANCERS for n in (1, 3)]
PACED += [(row, {}) for row in ROWS if row.level == "update"]
NASH = BalancerCase("nashmtl", level="gradient")


def paced(rows):
    ids = [f"{row}-{options.get('update_weights_every', '')}" for row, options in rows]
    return pytest.mark.parametrize(("row", "options"), rows, ids=ids)


def decides_on_device(row) -> bool:
    return bool(row.options.get("capturable"))


def rounds(row, options, info) -> bool:
    """Whether heads get a backward of their own with a scaler: weights are divided out of
    gradients that may be of float16."""
    if isinstance(row, Update):
        return decides_on_device(row) or not row.exact
    if options["update_weights_every"] == 1 or row.level != "gradient":
        return False
    return decides_on_device(row) or not bool((info.weights.abs() >= 2.0**-6).all())


@paced(PACED)
def test_a_power_of_two_changes_no_bit(row, options):
    plain = drive(row, **options)
    # The scale doubles after every second step.
    scaled = drive(row, scale=2.0**8, scaling={"growth_interval": 2}, **options)
    exact = True
    for step in range(7):
        absent = (1,) if step == 4 else ()
        info, told = plain.step(step, absent), scaled.step(step, absent)
        exact = exact and not rounds(row, options, info)
        assert told.skipped is None
        if exact:
            assert same(plain.loss, scaled.loss)
            assert torch.equal(info.weights, told.weights)
            assert same(info.gram, told.gram)
    assert scaled.scaler.get_scale() == 2.0**11
    if exact:
        assert_same_run(plain, scaled)
    assert_close_run(plain, scaled)


@every_row
def test_any_scale_changes_rounding_only(row):
    plain, scaled = drive(row), drive(row, scale=1000.3)
    for one in (plain, scaled):
        one.run(range(2))
    assert_close_run(plain, scaled, 1e-3, 1e-4)


@every_row
def test_grad_is_left_scaled_and_is_unscaled_once(row):
    scale = 2.0**10
    plain, scaled = drive(row), drive(row, scale=scale)
    for step in range(4 if row in SOME_UPDATES and row.exact else 1):
        for one in (plain, scaled):
            one.zero_grad()
            one.backward(one.losses(step), step)
        learned = [
            m.parameters() if row.level != "update" else [] for m in (plain.method, scaled.method)
        ]
        for p, q in zip(
            [*plain.parameters, *learned[0]], [*scaled.parameters, *learned[1]], strict=True
        ):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                assert torch.equal(scale * p.grad, q.grad)
        # Unscaled by hand, for clipping: `step` does not do it again.
        scaled.scaler.unscale_(scaled.optimizer)
        for one in (plain, scaled):
            # The shared parameters' updates are not made from `.grad`.
            clips = one.model.heads if row.level == "update" else one.model
            nn.utils.clip_grad_norm_(clips.parameters(), 0.01)
            one.finish(step)
    assert_same_run(plain, scaled)


@every_row
def test_two_backwards_add_up(row):
    plain, scaled = drive(row), drive(row, scale=2.0**10)
    for first in (0, 2, 4) if row.level == "update" and not decides_on_device(row) else (0,):
        for one in (plain, scaled):
            one.zero_grad()
            one.backward(one.losses(first), first)
            if not getattr(one.method, "needs_update", False):
                one.backward(one.losses(first + 1), first + 1)
            one.finish(first)
    if row.level == "update" and rounds(row, {}, None):
        assert_close_run(plain, scaled)
    else:
        assert_same_run(plain, scaled)


@pytest.mark.parametrize("at", [0, 2, 3])
@paced([(row, options) for row, options in PACED if row.level != "loss"])
def test_an_overflow_is_the_scaler_s_to_skip(row, options, at):
    """In the first search, in a later one, and between two."""
    plain = drive(row, **options)
    scaled = drive(row, scale=2.0**120, scaling={"backoff_factor": 2.0**-100}, **options)
    for step in range(at):
        plain.step(step)
        scaled.scaler.update(2.0**20)
        scaled.step(step)
    scaled.scaler.update(2.0**120)
    scaled.kick = 2.0**40
    before, settled = scaled.snapshot(), scaled.settled()
    info = scaled.step(at)
    scaled.kick = 0.0
    assert not all(g.isfinite().all() for g in scaled.grads if g is not None)
    assert same(settled, scaled.settled())
    assert scaled.scaler.get_scale() == 2.0**20
    if decides_on_device(row):
        # A balancer without a look counts what a search saw.
        searched = row.level == "update" or options["update_weights_every"] == 1 or at % 3 == 0
        assert row.level == "update" or (info.status == "not_finite") == searched
        assert scaled.stats["skipped"] == searched
        scaled.step_back(at > 0)
    else:
        assert same(before, scaled.snapshot())
        assert "is not finite" in info.skipped
        assert scaled.stats["skipped"] == 1
    plain.step(at)
    assert scaled.step(at).skipped is None
    torch.testing.assert_close(plain.weights, scaled.weights, rtol=1e-5, atol=1e-6)
    assert_close_run(plain, scaled)
    if options == {"update_weights_every": 1} or (row in SOME_UPDATES and row.exact):
        assert same(plain.snapshot()["model"], scaled.snapshot()["model"])


@pytest.mark.parametrize("row", [row for row in BALANCERS if row.level == "loss"], ids=str)
def test_an_overflow_leaves_loss_level_methods_able_to_go_on(row):
    scaled = drive(row, scale=2.0**20, scaling={"backoff_factor": 2.0**-100})
    scaled.step(0)
    scaled.scaler.update(2.0**120)
    scaled.kick = 2.0**40
    before = scaled.snapshot()
    scaled.step(1)
    scaled.kick = 0.0
    assert not all(g.isfinite().all() for g in scaled.grads if g is not None)
    after = scaled.snapshot()
    assert same(before["model"], after["model"])
    assert scaled.scaler.get_scale() == 2.0**20
    if row.key == "marigold":
        assert same(before["method"]["weights"], after["method"]["weights"])
        assert same(before["method"]["state"]["lambda"], after["method"]["state"]["lambda"])
    for step in range(1, 4):
        assert scaled.step(step).weights.isfinite().all()
    assert not same(after["model"], scaled.snapshot()["model"])
    assert all(p.isfinite().all() for p in scaled.parameters)


@pytest.mark.parametrize("row", ON_HOST, ids=str)
def test_a_loss_that_is_not_finite_reaches_the_scaler(row):
    scaled = drive(row, scale=2.0**10)
    scaled.step(0)
    before = scaled.snapshot()
    scaled.factor = math.nan
    scaled.finish = lambda *_: scaled.move()  # a method's `update` would meet the loss again
    assert "is not finite" in scaled.step(1).skipped
    assert same(before, scaled.snapshot())
    assert scaled.stats["skipped"] == 1
    assert scaled.scaler.get_scale() == 2.0**9
    assert row.level != "update" or scaled.grads == [None] * len(scaled.grads)
    strict = drive(row, scale=2.0**10, on_nonfinite="raise")
    strict.factor = math.nan
    with pytest.raises(NonFiniteError, match="is not finite"):
        strict.backward(strict.losses(0), 0)
    assert strict.grads == [None] * len(strict.grads)


@pytest.mark.parametrize("why", ["loss", "masked loss", "gradient", "good"])
@every_balancer
def test_an_optimizer_for_every_part_skips_as_well(row, why):
    """The trunk's, each head's and one for what the method learns: all of them, or none."""
    if "capturable" in row.options and "loss" in why:
        pytest.skip("looks at no loss")
    scaled = drive(row, scale=2.0**10)
    learned = scaled.method.parameters()
    parts = [scaled.shared, *scaled.heads, *([learned] if learned else [])]
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
        heads = [iter(head) for head in scaled.heads]  # as `module.parameters()`
        info = scaled.backward(losses, step, task_specific_parameters=heads)
        for optimizer in optimizers:
            scaled.scaler.step(optimizer)
        scaled.scaler.update()
        if scaled.method.needs_update and not (last and why != "good"):
            with torch.no_grad():
                scaled.method.update(scaled.losses(step))
    still = [
        all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
        for a, b in zip(before, parts, strict=True)
    ]
    skips = why != "good"
    if why == "gradient" and row.level == "loss" and row.key != "marigold":
        # Nobody but the scaler looks at it: what it does not reach moves.
        assert info.skipped is None
        assert still[:2] == [True, False]
        return
    assert still == [skips] * len(parts)
    if "capturable" not in row.options:
        assert (info.skipped is not None) == skips


def test_a_step_for_the_scaler_to_skip_writes_to_what_it_would_have_moved():
    """Not to what is in neither list, nor to inputs."""
    encoder = nn.Linear(6, 6)
    scaled = drive(NASH, scale=2.0**8)
    x = scaled.data(0).requires_grad_()
    scaled.data = lambda step: encoder(x)
    with pytest.warns(RuntimeWarning, match="neither in shared_parameters"):
        scaled.step(0)
    for factor, kick in ((math.inf, 0.0), (1.0, 2.0**120)):
        scaled.factor, scaled.kick = factor, kick
        assert "is not finite" in scaled.step(1).skipped
        assert all(grad.isnan().all() for grad in scaled.grads)
        assert x.grad is None
        assert all(p.grad is None for p in encoder.parameters())


@pytest.mark.parametrize("listed", [True, False])
def test_features_without_a_trunk_have_nan_behind_them(listed):
    """`shared_parameters` and the heads left out, their gradients are those of the graph."""
    scaled = drive(NASH, scale=2.0**8, level="features")
    frozen = scaled.model.heads[1].bias.requires_grad_(False)
    scaled.factor = math.nan
    losses = scaled.losses(0)
    arguments = scaled.arguments(0) if listed else {"features": scaled.z}
    _, info = scaled.method.backward(losses, **arguments, scaler=scaled.scaler)
    assert "is not finite" in info.skipped
    assert frozen.grad is None
    assert all(p is frozen or p.grad.isnan().all() for p in scaled.parameters)


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


@pytest.mark.parametrize("policy", [None, "skip", "raise", "ignore"])
@pytest.mark.parametrize("key", ["nashmtl", "graddrop", "db_mtl"])
def test_overflows_reach_the_scaler_whatever_the_policy(key, policy):
    scaled = drive(BalancerCase(key), scale=2.0**20, on_nonfinite=policy)
    scaled.step(0)
    scaled.scaler.update(2.0**127)
    scaled.kick = 2.0**40
    before = scaled.snapshot()
    scaled.step(1)
    assert same(before, scaled.snapshot())


@paced(
    [
        (on_device(NASH), {"update_weights_every": 1}),
        (NASH, {"update_weights_every": 1}),
        (NASH, {"update_weights_every": 2}),
        *((row, {}) for row in (every(1), every(2), on_device(every(1)), on_device(every(2)))),
    ]
)
def test_a_head_s_overflow_stops_the_whole_step(row, options):
    """The first task's own head alone overflows; weights and state stay with the parameters."""
    scaled = drive(row, scale=2.0**10, **options)
    scaled.step(0)
    before = scaled.settled()
    scaled.kick, scaled.kicked = 2.0**120, lambda: [scaled.model.heads[0].bias]
    info = scaled.step(1)
    if row.level == "gradient":
        assert all(grad.isfinite().logical_not().any() for grad in scaled.grads)
        assert info.status == ("not_finite" if decides_on_device(row) else None)
    assert same(before, scaled.settled())
    assert scaled.stats["skipped"] == 1
    scaled.kick = 0.0
    scaled.step(1)
    assert scaled.stats["skipped"] == 1
    assert scaled.scaler.get_scale() == 2.0**9
    assert not same(before, scaled.settled())


@pytest.mark.parametrize("row", [NASH, on_device(NASH)], ids=str)
def test_nothing_shows_nan_after_an_overflow(row):
    """What lies between the tensors in the buffers is never looked at by chance."""
    scaled = drive(row, scale=2.0**10)
    for step in range(3):
        scaled.kick = 2.0**120 if step == 1 else 0.0  # the loss stays finite
        info = scaled.step(step)
        if step == 1 and decides_on_device(row):
            assert info.status == "not_finite"
        elif step == 1:
            assert info.skipped.startswith("the gradient of")
    assert scaled.stats["skipped"] == 1
    assert all(grad.isfinite().all() for grad in scaled.grads)


def test_gradients_that_the_scale_alone_can_carry():
    """Too small for float16 features: unscaled they are 0."""
    x = nn.Parameter(torch.ones(4))
    rows = torch.tensor([[1.0, 0.5, 0.0, 0.0], [0.2, 1.0, 0.3, 0.0]])

    def losses():
        half = x.to(torch.float16)  # its gradient is float16 on the way
        return [(half.float() * row * 2.0**-28).sum() for row in rows]

    with pytest.warns(RuntimeWarning, match="weights held"):
        fastmto.get("nashmtl").backward(losses(), [x], [])
    assert not x.grad.any()
    x.grad = None
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    _, info = fastmto.get("nashmtl").backward(losses(), [x], [], scaler=scaler)
    assert info.status == "solved"
    gram = (2.0**-28 * rows.double()) @ (2.0**-28 * rows.double()).T
    torch.testing.assert_close(info.gram, gram, rtol=1e-2, atol=0)
    torch.testing.assert_close(
        x.grad / 2.0**20, info.weights.float() @ (2.0**-28 * rows), rtol=1e-2, atol=0
    )


@some_rows
def test_a_disabled_scaler_is_none(row):
    plain, disabled = drive(row), drive(row)
    disabled.scaler = torch.amp.GradScaler("cpu", enabled=False)
    for one in (plain, disabled):
        one.run(range(3))
    assert_same_run(plain, disabled)


AUTOCAST = ["ls", "gradnorm", "nashmtl", "mgda_ub", "db_mtl", "marigold"]


@pytest.mark.parametrize("row", [*map(BalancerCase, AUTOCAST), every(3), Update()], ids=str)
def test_trains_in_float16_autocast(row):
    scaled = drive(row, scale=2.0**10)
    first = last = 0.0
    for step in range(40):
        scaled.zero_grad()
        with torch.autocast("cpu", torch.float16):
            losses = scaled.losses(step % 2)
        last = float(sum(loss.detach().float() for loss in losses))
        first = first or last
        scaled.backward(losses, step % 2)
        scaled.move()
    assert last < 0.7 * first
    assert scaled.stats["skipped"] == 0


@pytest.mark.parametrize("scaler", [True, 1024.0, "cuda"])
@pytest.mark.parametrize(
    "row", [*map(BalancerCase, ("ls", "nashmtl", "marigold", "pub")), Update()], ids=str
)
def test_a_scaler_is_a_scaler(row, scaler):
    one = drive(row)
    with pytest.raises(ValueError, match=r"scaler must be a torch\.amp\.GradScaler or None, got"):
        one.backward(one.losses(0), scaler=scaler)
    assert one.grads == [None] * len(one.grads)


def test_the_balancer_pub_steps_inside_and_refuses_a_scaler():
    one = drive(BalancerCase("pub"))
    with pytest.raises(ValueError, match="scaler must be None for this class"):
        one.backward(one.losses(0), scaler=torch.amp.GradScaler("cpu"))
    before = copy.deepcopy(one.model.state_dict())
    one.backward(one.losses(0), scaler=torch.amp.GradScaler("cpu", enabled=False))
    assert not same(before, one.model.state_dict())


@pytest.mark.parametrize("row", [Update(), on_device(Update())], ids=str)
def test_what_a_scaler_found_is_believed_whatever_the_gradients_say(row):
    scaled = drive(row, scale=2.0**4)
    before = scaled.settled()

    def finish(*_):
        scaled.scaler.unscale_(scaled.optimizer)
        for found in scaled.scaler._found_inf_per_device(scaled.optimizer).values():
            found.fill_(1.0)
        scaled.move()

    scaled.finish = finish
    assert (scaled.step(0).skipped is None) == decides_on_device(row)
    assert scaled.scaler.get_scale() == 2.0**3
    assert scaled.stats["skipped"] == 1
    assert same(before, scaled.settled())


def test_without_heads_the_scaler_still_learns_of_it():
    shared = nn.Parameter(torch.ones(3))
    optimizer = fastmto.PUB([shared], [[], []])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    d = torch.tensor([1.0, 2.0, -1.0])
    for factor, scale in ((1.0, 4.0), (1e38, 2.0)):
        optimizer.backward([(shared * d).sum() * factor, (shared * d.flip(0)).sum()], scaler=scaler)
        if factor == 1.0:
            scaler.step(optimizer)
        else:
            with pytest.warns(RuntimeWarning, match="step skipped"):
                scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale
    assert optimizer.stats["steps"] == 1


def test_misuse_of_an_optimizer_is_named_and_changes_nothing():
    scaled = drive(Update(), scale=2.0**4)
    optimizer, scaler = scaled.optimizer, scaled.scaler
    before = scaled.settled()
    optimizer.backward(scaler.scale(torch.stack(scaled.losses(0))))
    with pytest.raises(RuntimeError, match=r"^PUB.backward must be given the GradScaler"):
        scaler.step(optimizer)
    optimizer.zero_grad()
    scaled.backward(scaled.losses(0))
    with pytest.raises(RuntimeError, match=r"^the gradients are scaled: call scaler.step"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"^scaler must be the same"):
        optimizer.backward(scaled.losses(0))
    half = fastmto.PUB(parameters(0, torch.float16), [[], []])
    with pytest.raises(ValueError, match=r"^scaler must be None with float16 parameters"):
        half.backward([p.sum() for p in half.param_groups[0]["params"][:2]], scaler=scaler)
    assert same(before, scaled.settled())


@pytest.mark.parametrize("unscales", [False, True])
def test_an_error_under_a_scaler_leaves_nothing_behind(unscales):
    """torch forgets what it hung on an optimizer only after a step that returns."""
    row = every(2, on_nonfinite="raise")
    scaled, plain = drive(row, scale=2.0**10), drive(row)
    scaled.factor = 1e36
    with pytest.raises(NonFiniteError):
        scaled.step(9)
    scaled.factor = 1.0
    scaled.scaler.update()
    assert not hasattr(scaled.optimizer, "found_inf")
    assert not hasattr(scaled.optimizer, "grad_scale")
    scaler = scaled.scaler
    for t in range(4):
        plain.step(t)
        scaled.scaler = None if t == 2 else scaler  # one step without the scaler
        scaled.zero_grad()
        scaled.backward(scaled.losses(t))
        if unscales and scaled.scaler:
            scaler.unscale_(scaled.optimizer)
        scaled.move()
    assert same(plain.settled(), scaled.settled())


@some_rows
def test_a_step_within_an_error_handler_is_a_step(row):
    scaled = drive(row, scale=4.0)
    try:
        raise ArithmeticError
    except ArithmeticError:
        scaled.step(0)
    assert scaled.stats["steps"] == 1

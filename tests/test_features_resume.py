"""Stopping and resuming, by every method: nothing is lost, and the resumed run is the uninterrupted
one."""

from __future__ import annotations

import copy
import dataclasses
import io

import pytest
import torch
from balancer_cases import same
from levels import (
    BALANCERS,
    ON_DEVICE,
    UPDATES,
    Driver,
    Update,
    assert_same_run,
    drive,
    every,
    is_exact,
    on_device,
)
from problems import batch, net

import fastmto
from fastmto.weightings import Bargaining, Equal

OPTIMIZERS = [
    *(UPDATES[k] for k in (0, 2, 3, 4, 5, 6, 12, 17)),
    every(2, weighting=Bargaining(warm_start=True)),
]
#: Rows, their dtype, whether the device decides before and after, and the step between.
RUNS = [
    (dataclasses.replace(row, flat=flat), torch.float32, None, None, stop)
    for row in OPTIMIZERS
    for flat in (False, True)
    for stop in (1, 5, 6)
]
RUNS += [(row, torch.bfloat16, None, None, stop) for row in (every(3),) for stop in (1, 5, 6)]
RUNS += [(row, torch.float32, None, None, 4) for row in BALANCERS]
RUNS += [
    (row, torch.float32, True, to, 4)
    for row in (*UPDATES[1:9], *ON_DEVICE[:1], *ON_DEVICE[4:5], *ON_DEVICE[6:])
    for to in (True, False)
]


def trained(row, dtype, capturable, steps) -> tuple[Driver, torch.optim.lr_scheduler.LRScheduler]:
    options = {} if capturable is None else {"capturable": capturable}
    if row.level != "update":
        options["update_weights_every"] = 3 if is_exact(row, {"update_weights_every": 3}) else 1
    one = drive(row, dtype, **options)
    schedule = torch.optim.lr_scheduler.StepLR(one.optimizer, 4, 0.5)
    go(one, schedule, steps)
    return one, schedule


def go(one: Driver, schedule, steps) -> None:
    for step in steps:
        one.run([step])
        schedule.step()


def assert_resumed(whole: Driver, resumed: Driver) -> None:
    assert_same_run(whole, resumed)
    rates = [[group["lr"] for group in one.optimizer.param_groups] for one in (whole, resumed)]
    assert rates[0] == rates[1]


@pytest.mark.parametrize(("row", "dtype", "first", "then", "stop"), RUNS, ids=str)
def test_resuming_from_a_file_repeats_the_uninterrupted_run(row, dtype, first, then, stop):
    one, schedule = trained(row, dtype, first, range(stop))
    file = io.BytesIO()
    torch.save([one.state(), schedule.state_dict()], file)
    file.seek(0)
    state, rates = torch.load(file)
    last = 12 if row.level == "update" else 9
    go(one, schedule, range(stop, last))
    # It may have been used before.
    resumed, again = trained(row, dtype, then, range(20, 22))
    resumed.load(state)
    again.load_state_dict(rates)
    go(resumed, again, range(stop, last))
    assert_resumed(one, resumed)


COPIED = [OPTIMIZERS[k] for k in (1, 5, 8)]
COPIED += [on_device(ON_DEVICE[0]), *BALANCERS[::6]]


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
@pytest.mark.parametrize("row", COPIED, ids=str)
def test_a_copy_goes_its_own_way(row, how):
    one = drive(row)
    one.run(range(5))
    twin = one.twin(how)
    assert_same_run(one, twin)
    before = twin.snapshot()
    one.run(range(5, 9))
    assert same(before, twin.snapshot())
    twin.run(range(5, 9))
    assert_same_run(one, twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clippy_adam_resumes_and_copies(dtype: torch.dtype) -> None:
    def build_clippy():
        model = net(n_tasks=1).to(dtype)
        return model, fastmto.ClippyAdam(model.parameters(), 0.1)

    def go(model, optimizer, steps) -> None:
        for t in steps:
            optimizer.zero_grad()
            model.losses(batch(t).to(dtype))[0].backward()
            optimizer.step()

    model, optimizer = build_clippy()
    go(model, optimizer, range(4))
    twin, resumed = build_clippy()
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copies = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin, resumed), copies):
        go(m, o, range(4, 8))
    for p, q, r in zip(model.parameters(), twin.parameters(), copies[0].parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


def stepped(*args, n_tasks=2, width=8, model=None, **options):
    """A model, and its optimizer after one step."""
    model = model or net(n_tasks=n_tasks, width=width)
    given = args or (model.head_parameters(),)
    optimizer = fastmto.PUB(model.trunk.parameters(), *given, **options)
    optimizer.backward(model.losses(batch(0)))
    optimizer.step()
    return model, optimizer


def assert_refused(optimizer, state, match) -> None:
    """Nothing has changed then, and training goes on."""
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(state)
    assert same(before, optimizer.state_dict())


def test_a_state_before_the_first_step_can_be_loaded():
    one = drive(Update(flat=True))
    one.load(one.state())
    assert one.method.n_tasks is None
    one.step(0)
    assert one.method.n_tasks == 3


def test_states_of_something_else_are_refused_and_change_nothing():
    one = drive(Update())
    one.run(range(3))
    two = net(n_tasks=2)
    for state, match in [
        (torch.optim.Adam(one.parameters).state_dict(), "must come from a fastmto optimizer"),
        (
            fastmto.PUB(two.trunk.parameters(), two.head_parameters()).state_dict(),
            "must be of 3 tasks, got one of 2",
        ),
        (stepped(n_tasks=3, width=9)[1].state_dict(), "must hold"),
        (stepped(n_tasks=3, adatask=True)[1].state_dict(), "must hold"),
        (stepped(n_tasks=3, rule="rmsprop")[1].state_dict(), "must hold"),
        (one.state()["method"] | {"fastmto": {"version": 1}}, "^state_dict must be of version"),
        (one.state()["method"] | {"fastmto": {"version": None}}, "^state_dict must be of version"),
    ]:
        assert_refused(one.method, state, match)
    assert len(one.method.state_dict()["state"]) == len(one.parameters)
    one.step(3)


def test_a_state_with_other_moments_is_refused():
    model, twin = net(), net()
    heavy = fastmto.rules.RMSProp(momentum=0.9)
    plain = fastmto.PUB(model.trunk.parameters(), model.head_parameters(), rule="rmsprop")
    other = fastmto.PUB(twin.trunk.parameters(), twin.head_parameters(), rule=heavy)
    assert_refused(plain, other.state_dict(), "must hold the moments")


@pytest.mark.parametrize(
    ("mine", "theirs", "match"),
    [
        ({}, {"flat": True}, "groups of tasks"),
        ({"flat": True}, {}, "groups of tasks"),
        ({"weighting": Equal()}, {"weighting": Bargaining()}, "keeps no state"),
        ({}, {"weighting": Equal()}, "must hold 'last'"),
    ],
    ids=str,
)
def test_a_state_of_another_form_of_heads_or_weighting_changes_nothing(mine, theirs, match):
    def make(flat=False, **options):
        model = net()
        a, b = model.head_parameters()
        heads = [{"params": a}, {"params": b}] if flat else [a, b]
        return stepped(heads, model=model, **options)

    (model, optimizer), (_, other) = make(**mine), make(**theirs)
    assert_refused(optimizer, other.state_dict(), match)
    optimizer.zero_grad()
    optimizer.backward(model.losses(batch(0)))
    optimizer.step()


def test_a_state_from_before_the_first_step_starts_anew():
    one, other = (drive(Update(flat=True)) for _ in range(2))
    start = one.state()
    one.run(range(3))
    one.load(start)
    assert one.method.n_tasks is None
    assert one.stats["steps"] == 0
    for each in (one, other):
        each.run(range(4))
    assert_same_run(one, other)
    assert len(one.method.state_dict()["state"]) == len(one.parameters)


def test_names_survive_and_must_agree():
    model = net()
    heads = model.head_parameters()
    named = fastmto.PUB(model.trunk.parameters(), dict(zip("ab", heads, strict=True)))
    x, y = model.losses(batch(0))
    named.backward({"a": x, "b": y})
    named.step()
    state = copy.deepcopy(named.state_dict())
    state["fastmto"]["names"] = None
    named.load_state_dict(state)
    x, y = model.losses(batch(0))
    before = [p.detach().clone() for p in heads[1]]
    named.zero_grad()
    named.backward({"b": None, "a": x})
    named.step()
    assert all(torch.equal(p, q) for p, q in zip(heads[1], before, strict=True))
    state["fastmto"]["names"] = ["b", "a"]
    assert_refused(named, state, r"must be of \['a', 'b'\], got one of \['b', 'a'\]")


def test_the_state_shows_the_moments_torchs_way():
    one = drive(Update())
    one.run(range(2))
    for p in (one.model.trunk[0].weight, one.model.heads[0].weight):
        assert set(one.method.state[p]) == {"exp_avg", "exp_avg_sq"}
        assert one.method.state[p]["exp_avg"].shape == p.shape


@pytest.mark.parametrize("shape", [(), (1,)])
def test_learning_rates_in_tensors_are_loaded_into_these_tensors(shape):
    model = net()
    rates = [torch.full(shape, 0.01), torch.full(shape, 0.02)]
    layers = (model.trunk[0], model.trunk[2])
    groups = [
        {"params": list(layer.parameters()), "lr": rate}
        for layer, rate in zip(layers, rates, strict=True)
    ]
    optimizer = fastmto.PUB(groups, model.head_parameters())
    optimizer.backward(model.losses(batch(0)))
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for rate in rates:
        rate.fill_(0.5)
    optimizer.load_state_dict(saved)
    assert all(g["lr"] is r for g, r in zip(optimizer.param_groups[:2], rates, strict=True))
    assert [float(rate) for rate in rates] == pytest.approx([0.01, 0.02])


def test_one_tensor_for_several_groups_is_parted_where_their_rates_differ():
    model = net()
    rate = torch.tensor(0.1)
    optimizer = fastmto.PUB(model.trunk.parameters(), model.head_parameters(), rate)
    saved = copy.deepcopy(optimizer.state_dict())
    for k, group in enumerate(saved["param_groups"]):
        group["lr"] = torch.tensor(0.1 * (k + 1))
    optimizer.load_state_dict(saved)
    assert [float(g["lr"]) for g in optimizer.param_groups] == pytest.approx([0.1, 0.2, 0.3])
    assert optimizer.param_groups[0]["lr"] is rate


def test_a_state_of_db_mtl_by_fastmto_0_1_0_goes_on():
    """It held the smoothed gradients in flat rows, one for each dtype, gaps between tensors and
    all."""
    models = [net() for _ in range(2)]
    ours, old = fastmto.get("db_mtl"), fastmto.get("db_mtl")

    def step(balancer, model, t):
        model.zero_grad()
        balancer.backward(model.losses(batch(t)), model.trunk.parameters(), model.head_parameters())

    for t in range(3):
        step(ours, models[0], t)
    state = ours.state_dict()
    state["state"]["smoothed"] = [row.clone() for row in ours._smoothed]
    assert [row.dim() for row in state["state"]["smoothed"]] == [2]
    old.load_state_dict(state)
    for t in range(3, 6):
        step(ours, models[0], t)
        step(old, models[1], t)
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(p.grad, q.grad)

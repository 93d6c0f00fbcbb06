"""Stopping and resuming: nothing is lost, and the resumed run is the uninterrupted one."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from problems import batch, net

import fastmto
from fastmto.weightings import Bargaining, Equal

SETTINGS = {
    "default": {},
    "every3": {"update_weights_every": 3},
    "clippy": {"update_weights_every": 3, "clippy": True},
    "adatask": {"update_weights_every": 3, "adatask": True},
    "delayed": {"update_weights_every": 3, "delayed": True},
    "per_task": {"update_weights_every": 4, "between": "per_task"},
    "rmsprop": {"rule": fastmto.rules.RMSProp(momentum=0.9, centered=True)},
    "warm": {"weighting": Bargaining(warm_start=True), "update_weights_every": 2},
    "bfloat16": {"update_weights_every": 3},
}


def build(name: str, flat_heads: bool):
    model = net(n_tasks=3)
    if name == "bfloat16":
        model = model.bfloat16()
    heads = model.head_parameters()
    tasks = [p for head in heads for p in head] if flat_heads else heads
    settings = copy.deepcopy(SETTINGS[name])
    optimizer = fastmto.PUB(model.trunk.parameters(), tasks, 0.01, **settings)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
    return model, optimizer, schedule


def run(model, optimizer, schedule, steps) -> None:
    for t in steps:
        losses = model.losses(batch(t).to(model.trunk[0].weight.dtype))
        if t % 5 == 1:
            losses[1] = None
        optimizer.zero_grad()
        optimizer.backward(losses)
        optimizer.step()
        schedule.step()


def assert_equal(a, b, model_a, model_b) -> None:
    for (name, p), q in zip(model_a.named_parameters(), model_b.parameters(), strict=True):
        assert torch.equal(p, q), name
        for key, value in a.state[p].items():
            other = b.state[q][key]
            same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
            assert same, (name, key)
    assert torch.equal(a.weights, b.weights)
    assert a.stats == b.stats
    assert [g["lr"] for g in a.param_groups] == [g["lr"] for g in b.param_groups]


@pytest.mark.parametrize("flat_heads", [False, True])
@pytest.mark.parametrize("stop", [1, 5, 6])
@pytest.mark.parametrize("name", SETTINGS)
def test_resuming_from_a_file_repeats_the_uninterrupted_run(
    name: str, stop: int, flat_heads: bool
) -> None:
    model, optimizer, schedule = build(name, flat_heads)
    run(model, optimizer, schedule, range(stop))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), schedule.state_dict()], file)
    run(model, optimizer, schedule, range(stop, 12))

    twin, resumed, again = build(name, flat_heads)
    run(twin, resumed, again, range(20, 23))  # it may have been used before
    file.seek(0)
    states = torch.load(file)
    for thing, state in zip((twin, resumed, again), states, strict=True):
        thing.load_state_dict(state)
    run(twin, resumed, again, range(stop, 12))
    assert_equal(optimizer, resumed, model, twin)


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
@pytest.mark.parametrize("name", ["every3", "adatask", "warm"])
def test_a_copy_of_model_and_optimizer_goes_its_own_way(name: str, how: str) -> None:
    model, optimizer, schedule = build(name, False)
    run(model, optimizer, schedule, range(5))
    if how == "pickle":
        twin, copied = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        twin, copied = copy.deepcopy((model, optimizer))
    assert_equal(optimizer, copied, model, twin)
    untouched = [p.detach().clone() for p in twin.parameters()]
    plain = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    run(model, optimizer, plain, range(5, 9))
    for p, q in zip(twin.parameters(), untouched, strict=True):
        assert torch.equal(p, q)
    run(twin, copied, torch.optim.lr_scheduler.LambdaLR(copied, lambda epoch: 1.0), range(5, 9))
    assert_equal(optimizer, copied, model, twin)


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


def test_a_state_before_the_first_step_can_be_loaded() -> None:
    model, optimizer, _ = build("default", True)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.n_tasks is None
    optimizer.backward(model.losses(batch(0)))
    optimizer.step()
    assert optimizer.n_tasks == 3


def test_states_of_something_else_are_refused_and_change_nothing() -> None:
    model, optimizer, schedule = build("default", False)
    run(model, optimizer, schedule, range(3))
    good = copy.deepcopy(optimizer.state_dict())
    adam = torch.optim.Adam(model.parameters())
    two = net(n_tasks=2)
    other = fastmto.PUB(two.trunk.parameters(), two.head_parameters())
    wide = net(n_tasks=3, width=9)
    wider = fastmto.PUB(wide.trunk.parameters(), wide.head_parameters())
    wider.backward(wide.losses(batch(0)))
    wider.step()
    ada, adatask, _ = build("adatask", False)
    adatask.backward(ada.losses(batch(0)))
    adatask.step()
    balls = net(n_tasks=3)
    heavy = fastmto.PUB(balls.trunk.parameters(), balls.head_parameters(), rule="rmsprop")
    heavy.backward(balls.losses(batch(0)))
    heavy.step()
    for state, match in [
        (adam.state_dict(), "must come from a fastmto optimizer"),
        (other.state_dict(), "must be of 3 tasks, got one of 2"),
        (wider.state_dict(), "must hold"),
        (adatask.state_dict(), "must hold"),
        (heavy.state_dict(), "must hold"),
    ]:
        with pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    for key, state in good["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after["state"][key][name]))
    assert after["param_groups"] == good["param_groups"]
    assert torch.equal(after["fastmto"]["weights"], good["fastmto"]["weights"])


def test_a_state_with_other_moments_is_refused() -> None:
    model, twin = net(), net()
    plain = fastmto.PUB(model.trunk.parameters(), model.head_parameters(), rule="rmsprop")
    heavy = fastmto.PUB(
        twin.trunk.parameters(), twin.head_parameters(), rule=fastmto.rules.RMSProp(momentum=0.9)
    )
    groups = copy.deepcopy(plain.param_groups)
    with pytest.raises(ValueError, match="must hold the moments"):
        plain.load_state_dict(heavy.state_dict())
    assert [g["momentum"] for g in plain.param_groups] == [g["momentum"] for g in groups]


def test_a_state_of_another_form_of_heads_or_weighting_changes_nothing() -> None:
    def make(form, **kwargs):
        model = net()
        a, b = model.head_parameters()
        tasks = {"lists": [a, b], "flat": [{"params": a}, {"params": b}]}[form]
        return model, fastmto.PUB(model.trunk.parameters(), tasks, **kwargs)

    def go(model, optimizer) -> None:
        optimizer.backward(model.losses(batch(0)))
        optimizer.step()

    for mine, theirs, match in [
        (make("lists"), make("flat"), "groups of tasks"),
        (make("flat"), make("lists"), "groups of tasks"),
        (make("lists", weighting=Equal()), make("lists", weighting=Bargaining()), "keeps no state"),
        (make("lists"), make("lists", weighting=lambda g: g[0]), "must hold 'last'"),
    ]:
        go(*mine)
        go(*theirs)
        model, optimizer = mine
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(theirs[1].state_dict())
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        assert after["fastmto"]["stats"] == before["fastmto"]["stats"]
        go(model, optimizer)


def test_a_state_from_before_the_first_step_starts_anew() -> None:
    model, optimizer, _ = build("default", True)
    fresh = copy.deepcopy(optimizer.state_dict())
    start = copy.deepcopy(model.state_dict())
    run(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0), range(3))
    model.load_state_dict(start)
    optimizer.load_state_dict(fresh)
    assert optimizer.n_tasks is None
    assert optimizer.stats["steps"] == 0
    twin, other, _ = build("default", True)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)
    run(model, optimizer, constant, range(4))
    run(twin, other, torch.optim.lr_scheduler.LambdaLR(other, lambda t: 1.0), range(4))
    assert_equal(optimizer, other, model, twin)
    assert len(optimizer.state_dict()["state"]) == len(list(model.parameters()))


def test_names_survive_and_must_agree() -> None:
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
    named.backward({"b": None, "a": x})
    named.step()
    assert all(torch.equal(p, q) for p, q in zip(heads[1], before, strict=True))
    state["fastmto"]["names"] = ["b", "a"]
    with pytest.raises(ValueError, match=r"must be of \['a', 'b'\], got one of \['b', 'a'\]"):
        named.load_state_dict(state)


def test_the_state_shows_the_moments_torchs_way() -> None:
    model, optimizer, schedule = build("default", False)
    run(model, optimizer, schedule, range(2))
    weight = model.trunk[0].weight
    state = optimizer.state[weight]
    assert set(state) == {"exp_avg", "exp_avg_sq"}
    assert state["exp_avg"].shape == weight.shape
    head = optimizer.state[model.heads[0].weight]
    assert head["exp_avg"].shape == model.heads[0].weight.shape


def test_a_state_of_another_version_changes_nothing() -> None:
    model = net()
    optimizer = fastmto.PUB(model.trunk.parameters(), model.head_parameters())
    optimizer.backward(model.losses(batch(0)))
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    for version in (1, None):
        old = copy.deepcopy(before)
        old["fastmto"] = {"version": version}
        with pytest.raises(ValueError, match=r"^state_dict must be of version 2, got"):
            optimizer.load_state_dict(old)
    after = optimizer.state_dict()
    assert after["state"].keys() == before["state"].keys()
    assert len(before["state"]) == len(list(model.parameters()))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_learning_rates_in_tensors_are_loaded_into_these_tensors(shape: tuple[int, ...]) -> None:
    model = net()
    rates = [torch.full(shape, 0.01), torch.full(shape, 0.02)]
    groups = [
        {"params": list(model.trunk[0].parameters()), "lr": rates[0]},
        {"params": list(model.trunk[2].parameters()), "lr": rates[1]},
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


def test_one_tensor_for_several_groups_is_parted_where_their_rates_differ() -> None:
    model = net()
    rate = torch.tensor(0.1)
    optimizer = fastmto.PUB(model.trunk.parameters(), model.head_parameters(), rate)
    saved = copy.deepcopy(optimizer.state_dict())
    for k, group in enumerate(saved["param_groups"]):
        group["lr"] = torch.tensor(0.1 * (k + 1))
    optimizer.load_state_dict(saved)
    assert [float(g["lr"]) for g in optimizer.param_groups] == pytest.approx([0.1, 0.2, 0.3])
    assert optimizer.param_groups[0]["lr"] is rate

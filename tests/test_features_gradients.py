"""What users do with gradients, by every method: use a graph again, add a loss of their own, change
`.grad`, freeze, accumulate."""

from __future__ import annotations

import io

import pytest
import torch
from balancer_cases import same
from levels import (
    BALANCERS,
    PENDING,
    SOME_UPDATES,
    UPDATES,
    Driver,
    Linear,
    assert_close_run,
    assert_same,
    assert_same_run,
    drive,
    every,
    family,
    rows_for,
)
from problems import batch, net
from torch import Tensor, nn

import fastmto
from fastmto.ops.rules import Adam
from fastmto.reference import updates as reference

EVERY_ROW = [*SOME_UPDATES, *BALANCERS]
GRADIENT_LEVEL = [row for row in BALANCERS if row.level == "gradient"]
HAS_ADATASK = [row for row in UPDATES if row.options.get("adatask") or row.kind is fastmto.AdaTask]


def test_the_rows_are_all_methods_there_are():
    assert {row.key for row in EVERY_ROW} == set(fastmto.available())


def paced(row, n: int = 2) -> dict[str, int]:
    """Searches every n-th step; an optimizer's row says it itself."""
    return {} if row.level == "update" else {"update_weights_every": n}


def taken(one: Driver, step: int, **options) -> list[Tensor]:
    """`backward` alone; the losses."""
    one.zero_grad()
    losses = one.losses(step)
    one.backward(losses, step, **options)
    return losses


@pytest.mark.parametrize("row", rows_for("retain_graph", EVERY_ROW))
def test_a_graph_that_is_retained_can_be_used_again(row):
    """In a search and between two; the step has the bits of one that lets the graph go."""
    one, plain = (drive(row, **paced(row)) for _ in range(2))
    for step in range(2):
        losses = taken(one, step, retain_graph=True)
        taken(plain, step)
        assert_same(one.grads, plain.grads)
        again = torch.autograd.grad(sum(losses), one.parameters)
        assert all(grad.isfinite().all() for grad in again)
        one.finish(step)
        plain.finish(step)
    assert_same_run(one, plain)
    losses = taken(one, 2)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(sum(losses), one.parameters)


def extra_of(one: Driver) -> Tensor:
    """A loss beside the tasks' on their own graph, the shared parameters and the heads."""
    return 0.3 * one.z.square().mean() + 0.1 * sum(p.square().sum() for p in one.parameters)


@pytest.mark.parametrize("row", rows_for("unbalanced", BALANCERS))
def test_an_unbalanced_loss_is_added_to_the_balanced_gradient(row):
    one, plain = (drive(row, torch.float64, **paced(row)) for _ in range(2))
    for step in range(2):
        plain.zero_grad()
        told = plain.backward(plain.losses(step), step)
        plain.losses(step)  # a graph of its own
        expected = torch.autograd.grad(extra_of(plain), plain.parameters)
        one.zero_grad()
        losses = one.losses(step)
        info = one.backward(losses, step, unbalanced=extra_of(one))
        assert torch.equal(info.weights, told.weights)
        assert same(info.gram, told.gram)
        for p, q, g in zip(one.parameters, plain.parameters, expected, strict=True):
            torch.testing.assert_close(p.grad, q.grad + g, rtol=1e-12, atol=1e-14)
        for each, grads in ((one, plain.grads), (plain, plain.grads)):
            for p, g in zip(each.parameters, grads, strict=True):
                p.grad = g  # both go on from the same point
            each.finish(step)
    assert one.stats["searches"] == plain.stats["searches"]


@pytest.mark.parametrize("row", HAS_ADATASK, ids=str)
def test_an_unbalanced_loss_needs_moments_that_adatask_has_not(row):
    one = drive(row)
    losses = one.losses(0)
    with pytest.raises(ValueError, match="unbalanced must be None with adatask"):
        one.backward(losses, unbalanced=extra_of(one))


@pytest.mark.parametrize("row", BALANCERS, ids=str)
def test_clipping_of_balanced_gradients_takes_effect(row):
    one = drive(row)
    one.optimizer = torch.optim.SGD(one.parameters, lr=0.5)
    taken(one, 0)
    before = [p.detach().clone() for p in one.parameters]
    nn.utils.clip_grad_norm_(one.parameters, 0.01)
    norm = torch.cat([grad.flatten() for grad in one.grads]).norm()
    torch.testing.assert_close(norm, torch.tensor(0.01), rtol=1e-3, atol=0)
    one.move()
    for p, q, grad in zip(one.parameters, before, one.grads, strict=True):
        assert torch.equal(p, q - 0.5 * grad)


def _assign(one: Driver) -> None:
    one.shared[0].grad = torch.ones_like(one.shared[0])


CHANGES = {
    "clip_grad_norm_": lambda one: nn.utils.clip_grad_norm_(one.parameters, 1e-3),
    "clip_grad_value_": lambda one: nn.utils.clip_grad_value_(one.parameters, 1e-6),
    "mul_": lambda one: one.shared[1].grad.mul_(0.5),
    "another tensor": _assign,
    "a backward of one's own": lambda one: sum(p.square().sum() for p in one.shared).backward(),
    "a head's backward": lambda one: sum(p.square().sum() for p in one.parameters).backward(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("row", SOME_UPDATES, ids=str)
def test_a_changed_grad_is_named_and_changes_nothing(row, at, change):
    """In a search and between two: `step` says what to use in its place."""
    one, plain = drive(row), drive(row)
    for each in (one, plain):
        each.run(range(at))
    taken(one, at)
    before = one.settled()
    CHANGES[change](one)
    with pytest.raises(RuntimeError, match=r"(?s)clip_norm=.*unbalanced="):
        one.move()
    assert same(before, one.settled())
    one.step(at)
    plain.step(at)
    if at == 0 and plain.method.weighting is None:
        # Only from the second backward on it is known which heads are whose.
        assert_close_run(plain, one)
    else:
        assert same(plain.settled(), one.settled())


@pytest.mark.parametrize("row", UPDATES, ids=str)
def test_a_backward_of_one_s_own_before_is_named(row):
    one = drive(row)
    before = one.settled()
    one.zero_grad()
    sum(p.square().sum() for p in one.parameters).backward()
    with pytest.raises(RuntimeError, match="unbalanced="):
        one.backward(one.losses(0))
    assert same(before, one.settled())
    one.step(0)


@pytest.mark.parametrize("row", [row for row in UPDATES if not row.options.get("adatask")], ids=str)
def test_a_changed_grad_is_named_without_heads_as_well(row):
    one = Linear(row, n_tasks=3)
    x = one.x
    rows = torch.tensor([[1.0, 0.2], [0.1, 2.0], [1.0, 1.0]], dtype=torch.float64)
    one.method.backward(list(rows @ x))
    nn.utils.clip_grad_norm_([x], 0.01)
    with pytest.raises(RuntimeError, match=r"(?s)clip_norm=.*unbalanced="):
        one.method.step()
    assert not x.any()


#: What is frozen: a shared tensor, a shared layer, a whole head.
PARTS = {
    "shared": lambda one: [one.shared[1]],
    "layer": lambda one: one.shared[2:],
    "head": lambda one: one.heads[1],
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("row", rows_for("freezing", EVERY_ROW))
def test_a_frozen_parameter_and_its_moments_are_unchanged(row, part):
    """Frozen at construction, brought back, frozen in training, brought back."""
    if row.key == "gradnorm" and part == "layer":
        pytest.skip("needs the last shared layer")
    one = drive(row, frozen=PARTS[part], **paced(row))
    members, others = PARTS[part](one), []
    others = [p for p in one.parameters if all(p is not q for q in members)]
    for step, frozen in enumerate((True, True, False, False, False, True, True, False)):
        for p in members:
            p.requires_grad_(not frozen)
        before = [
            (p.detach().clone(), {k: v.clone() for k, v in one.optimizer.state[p].items()})
            for p in members
        ]
        kept = [p.detach().clone() for p in others]
        one.step(step)
        still = [
            torch.equal(p, value) and same(dict(one.optimizer.state[p]), moments)
            for p, (value, moments) in zip(members, before, strict=True)
        ]
        assert still == [frozen] * len(members)
        assert not any(torch.equal(p, q) for p, q in zip(others, kept, strict=True))
        assert not frozen or all(p.grad is None for p in members)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("row", rows_for("freezing", [*SOME_UPDATES, *GRADIENT_LEVEL]))
def test_what_is_frozen_from_the_start_is_as_if_it_were_not_listed(row, part):
    """The other parameters, weights and Gram matrices are those without it."""
    one = drive(row, frozen=PARTS[part], **paced(row))
    plain = drive(row, frozen=PARTS[part], leave_out=True, **paced(row))
    for step in range(5):
        info, told = one.step(step), plain.step(step)
        torch.testing.assert_close(info.weights, told.weights, rtol=1e-4, atol=1e-6)
    assert_same(one.parameters, plain.parameters, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("row", rows_for("freezing", [every(1, max_weight=None)]))
def test_frozen_in_training_the_rest_follows_the_reference(row):
    one = drive(row, torch.float64)
    one.run(range(3))
    optimizer, frozen = one.method, one.shared[1]
    frozen.requires_grad_(False)
    left = [p for p in one.shared if p is not frozen]
    ref = reference.ReferencePUB([p.detach().clone() for p in left], 3, Adam(), 0.01)
    ref.t = 3
    ref.state = [[{k: v.clone() for k, v in optimizer.state[p].items()} for p in left]]
    for step in range(3, 7):
        losses = one.losses(step)
        grads = [torch.autograd.grad(loss, left, retain_graph=True) for loss in losses]
        gram = ref.gram(grads)
        weights = reference.scale_weights(reference.bargaining(gram), gram, "mean_norm", 0)
        one.step(step)
        ref.step(grads, weights)
        torch.testing.assert_close(optimizer.weights, weights, rtol=1e-8, atol=0)
        for k, p in enumerate(left):
            torch.testing.assert_close(p.detach(), ref.theta[k], rtol=1e-9, atol=1e-11)
            for name, value in ref.state[0][k].items():
                torch.testing.assert_close(optimizer.state[p][name], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("row", [UPDATES[0], UPDATES[1], UPDATES[6], UPDATES[-1]], ids=str)
def test_a_new_task_brings_its_head(row):
    """`add_param_group` between two steps: what is there stays, the new task is searched for."""
    model = net(1, n_tasks=3)
    optimizer = row.build(model.trunk.parameters(), model.head_parameters()[:2])
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))

    def step(n_tasks: int) -> None:
        optimizer.zero_grad()
        optimizer.backward(model.losses(x)[:n_tasks])
        optimizer.step()

    for _ in range(3):
        step(2)
    first = optimizer.weights
    moments = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    optimizer.add_param_group({"params": model.head_parameters()[2], "task": 2})
    assert optimizer.n_tasks == 3
    assert torch.equal(optimizer.weights[:2], first)
    for p, state in moments.items():
        for k, v in state.items():
            now = optimizer.state[p][k]
            assert torch.equal(now[: len(v)] if now.shape != v.shape else now, v)
    searches = optimizer.stats["searches"]
    before = model.heads[2].weight.detach().clone()
    step(3)
    assert optimizer.stats["searches"] == searches + (optimizer.weighting is not None)
    assert not torch.equal(before, model.heads[2].weight)


#: Features of different batches cannot be added up.
ACCUMULATES = [
    row for row in GRADIENT_LEVEL if row.options.get("level") != "features" and row.key != "mgda_ub"
]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("row", [*SOME_UPDATES, *ACCUMULATES], ids=str)
def test_two_micro_batches_are_one_batch(row, n):
    """One solve over the summed gradients: that of the summed losses."""
    parts, whole = (drive(row, torch.float64, **paced(row, n)) for _ in range(2))
    for step in range(4):
        parts.zero_grad()
        more = {} if row.level == "update" else {"accumulate": True}
        parts.backward(parts.losses(step), step, **more)
        info = parts.backward(parts.losses(step + 10), step)
        whole.zero_grad()
        first, second = whole.losses(step), whole.losses(step + 10)
        told = whole.backward([a + b for a, b in zip(first, second, strict=True)], step)
        assert_same(parts.grads, whole.grads, rtol=1e-9, atol=1e-11)
        for one in (parts, whole):
            one.move()
        if row.level != "update":
            assert_same([info.weights, info.gram], [told.weights, told.gram], rtol=1e-8, atol=1e-11)
        assert_same([parts.weights], [whole.weights], rtol=1e-7, atol=1e-9)
    assert_same(parts.parameters, whole.parameters, rtol=1e-6, atol=1e-8)
    assert parts.counts(False) == whole.counts(False)


@pytest.mark.parametrize("stop", [2, 3])
@pytest.mark.parametrize("row", [*SOME_UPDATES, *GRADIENT_LEVEL], ids=str)
def test_resumes_in_the_middle_of_all_of_it(row, stop):
    """Clipping, warm-up, an unbalanced loss, accumulation, a frozen layer: bit for bit."""
    update, adatask = row.level == "update", row in HAS_ADATASK
    options = {"clip_norm": 0.5, "warmup_steps": 5} if update else paced(row, 3)
    if update and row.kind is fastmto.AdaTask:
        options = {}
    freezes = ("freezing", family(row)) not in PENDING

    def start() -> Driver:
        return drive(row, **options)

    def go(one: Driver, steps) -> None:
        for step in steps:
            for p in one.shared[2:]:
                p.requires_grad_(not freezes or step not in (2, 3))
            one.zero_grad()
            if update or row in ACCUMULATES:
                more = {} if update else {"accumulate": True}
                one.backward(one.losses(step + 10), step, **more)
            losses = one.losses(step)
            extra = {} if adatask else {"unbalanced": 0.1 * one.z.square().mean()}
            one.backward(losses, step, **extra)
            one.move()

    whole, first = start(), start()
    go(whole, range(9))
    go(first, range(stop))
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    resumed = start()
    resumed.load(torch.load(file))
    go(resumed, range(stop, 9))
    assert_same_run(whole, resumed)


def test_zeros_in_grad_are_nothing_to_lose():
    """`zero_grad(set_to_none=False)` of the model, before the first step and between steps."""
    models = net(), net()
    ours, plain = (fastmto.PUB(m.trunk.parameters(), m.head_parameters()) for m in models)
    for p in models[0].parameters():
        p.grad = torch.zeros_like(p)
    for t in range(3):
        models[0].zero_grad(set_to_none=False)
        plain.zero_grad()
        for model, optimizer in zip(models, (ours, plain), strict=True):
            optimizer.backward(model.losses(batch(t)))
            optimizer.step()
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(p, q)
    sum(models[0].losses(batch(4))).backward()
    with pytest.raises(RuntimeError, match="unbalanced="):
        ours.backward(models[0].losses(batch(4)))


def test_what_cannot_accumulate_says_so():
    model, x = net(), batch(0)
    z = model.trunk(x)
    losses = [head(z).square().mean() for head in model.heads]
    heads = model.head_parameters()
    with pytest.raises(ValueError, match="accumulate must be False with level='features'"):
        fastmto.get("mgda_ub").backward(
            losses, model.trunk.parameters(), heads, features=z, accumulate=True
        )
    for name in ("ls", "famo", "marigold"):
        with pytest.raises(ValueError, match="accumulate must be False for"):
            fastmto.get(name).backward(
                losses, model.trunk.parameters(), closure=lambda: losses, accumulate=True
            )
    assert all(p.grad is None for p in model.parameters())

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from problems import Net, batch, net
from reads import NothingGoesToTheHost
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fastmto
from fastmto.engine import heads as heads_module
from fastmto.engine.flat import FlatLayout
from fastmto.engine.gradients import TaskGradients
from fastmto.engine.heads import UNKNOWN, UNUSED, USED
from fastmto.engine.losses import as_list, first_nonfinite


def build(owners: str = "given", n_tasks: int = 2):
    model = net(n_tasks=n_tasks)
    if owners == "given":
        heads = [FlatLayout(hs) for hs in model.head_parameters()]
        numbers: list[int | None] = list(range(n_tasks))
    else:
        heads = [FlatLayout([p]) for hs in model.head_parameters() for p in hs]
        numbers = [None] * len(heads)
    layout = FlatLayout(list(model.trunk.parameters()))
    return model, layout, TaskGradients([layout], heads, numbers, n_tasks)


def head_grad(gradients, model, p):
    heads = [q for hs in model.head_parameters() for q in hs]
    views = [view for head in gradients.head_views for view in head]
    return next(view for view, q in zip(views, heads, strict=True) if q is p)


def expected(model, x, i):
    shared, heads = list(model.trunk.parameters()), model.head_parameters()[i]
    grads = torch.autograd.grad(model.losses(x)[i], [*shared, *heads])
    return grads[: len(shared)], grads[len(shared) :]


def check_rows(model, layout, gradients, xs, weights=None) -> None:
    for i in range(2):
        total = [sum(g) for g in zip(*(expected(model, x, i)[0] for x in xs), strict=True)]
        for view, g in zip(layout.views(gradients.rows[0][i]), total, strict=True):
            torch.testing.assert_close(view, g)
        for p, *gs in zip(
            model.head_parameters()[i], *(expected(model, x, i)[1] for x in xs), strict=True
        ):
            torch.testing.assert_close(head_grad(gradients, model, p), sum(gs))


@pytest.mark.parametrize("owners", ["given", "found"])
def test_rows_and_heads_hold_each_tasks_own_gradient(owners: str) -> None:
    model, layout, gradients = build(owners)
    for seed in (1, 2):  # the second time owners are known
        gradients.clear()
        gradients.per_task(model.losses(batch(seed)))
        check_rows(model, layout, gradients, [batch(seed)])
    assert gradients.ownership.owners == ([0, 1] if owners == "given" else [0, 0, 1, 1])
    assert gradients.backwards == 4


def test_micro_batches_add_up_until_cleared() -> None:
    model, layout, gradients = build()
    gradients.per_task(model.losses(batch(1)))
    gradients.per_task(model.losses(batch(2)))
    check_rows(model, layout, gradients, [batch(1), batch(2)])


def test_a_task_absent_from_the_first_micro_batch_joins_in_the_second() -> None:
    model, layout, gradients = build()
    gradients.rows[0].fill_(float("nan"))
    first, second = model.losses(batch(1)), model.losses(batch(2))
    gradients.per_task([first[0], None])
    assert gradients.took_part == [True, False]
    gradients.per_task(second)
    assert gradients.took_part == [True, True]
    for view, g in zip(
        layout.views(gradients.rows[0][1]), expected(model, batch(2), 1)[0], strict=True
    ):
        torch.testing.assert_close(view, g)


def test_the_graph_is_freed_after_the_last_backward() -> None:
    model, _, gradients = build()
    losses = model.losses(batch(1))
    gradients.per_task(losses)
    with pytest.raises(RuntimeError, match="second time"):
        losses[0].backward()


@pytest.mark.parametrize("weights", [[0.5, 2.0], [1.0, 0.0], [3.0, 1e-7], [3.0, 1e-13]])
def test_weighted_is_the_joint_gradient_and_heads_get_their_own_back(weights) -> None:
    model, layout, gradients = build()
    gradients.per_task(model.losses(batch(0)))  # so that tasks are known
    gradients.clear()
    before = gradients.backwards
    for seed in (1, 2):
        gradients.weighted(model.losses(batch(seed)), weights)
    joint = [
        sum(w * g for w, g in zip((weights * 2), gs, strict=True))
        for gs in zip(
            *(expected(model, batch(seed), i)[0] for seed in (1, 2) for i in range(2)), strict=True
        )
    ]
    for view, g in zip(layout.views(gradients.rows[0][0]), joint, strict=True):
        torch.testing.assert_close(view, g)
    for i in range(2):
        for p, *gs in zip(
            model.head_parameters()[i],
            *(expected(model, batch(seed), i)[1] for seed in (1, 2)),
            strict=True,
        ):
            torch.testing.assert_close(
                head_grad(gradients, model, p), sum(gs), rtol=1e-5, atol=1e-7
            )
    usual = min(weights) > 1e-12
    assert gradients.backwards - before == (2 if usual else 4)


def test_weighted_before_any_other_backward_still_finds_the_owners() -> None:
    model, layout, gradients = build("found")
    gradients.weighted(model.losses(batch(1)), [0.5, 2.0])
    assert gradients.ownership.owners == [0, 0, 1, 1]
    joint = [
        0.5 * a + 2.0 * b
        for a, b in zip(
            expected(model, batch(1), 0)[0], expected(model, batch(1), 1)[0], strict=True
        )
    ]
    for view, g in zip(layout.views(gradients.rows[0][0]), joint, strict=True):
        torch.testing.assert_close(view, g)


def test_a_task_that_does_not_reach_the_trunk_has_a_zero_row_and_a_trained_head() -> None:
    model, layout, gradients = build()
    for view in layout.views(gradients.rows[0][1]):
        view.fill_(float("nan"))
    own = model.heads[1].weight.pow(2).sum()
    gradients.per_task([model.losses(batch(1))[0], own])
    assert gradients.reached_shared == [True, False]
    assert gradients.took_part == [True, True]
    assert float(gradients.rows[0][1].abs().sum()) == 0
    weight = model.heads[1].weight
    torch.testing.assert_close(head_grad(gradients, model, weight), 2 * weight.detach())


@pytest.mark.parametrize("owners", ["given", "found"])
def test_stacked_losses_are_taken_apart(owners: str) -> None:
    """No zeros go down the other tasks' graphs: out of reach stays out of reach."""
    model, layout, gradients = build(owners)
    own = model.heads[1].weight.pow(2).sum()
    losses = torch.stack([model.losses(batch(1))[0], own])
    gradients.per_task(as_list(losses, 2, None)[0])
    assert gradients.reached_shared == [True, False]
    assert gradients.has_grad[-1] == (owners == "given")  # task 1 does not use its bias
    for view, g in zip(
        layout.views(gradients.rows[0][0]), expected(model, batch(1), 0)[0], strict=True
    ):
        torch.testing.assert_close(view, g)
    with pytest.raises(RuntimeError, match="second time"):
        losses.sum().backward()


def test_losses_stacked_and_scaled_connect_all_tasks_and_still_find_owners() -> None:
    model, _, gradients = build("found")
    gradients.per_task(list((2 * torch.stack(model.losses(batch(1)))).unbind()))
    assert gradients.ownership.owners == [0, 0, 1, 1]


def test_a_zero_initialised_head_belongs_to_the_only_task_that_reaches_it() -> None:
    model, _, gradients = build("found")
    for head in model.heads:
        nn.init.zeros_(head.weight)
    gradients.per_task([(0 * loss).sum() for loss in model.losses(batch(1))])
    assert gradients.ownership.owners == [0, 0, 1, 1]


def test_a_head_that_two_tasks_train_is_refused_and_nothing_is_settled() -> None:
    model, _, gradients = build()
    losses = model.losses(batch(1))
    losses[1] = losses[1] + model.heads[0].weight.sum()
    with pytest.raises(ValueError, match=r"one task each.*\[0, 1\].*\(1, 8\).*shared_parameters"):
        gradients.per_task(losses)
    assert gradients.ownership.inspected == [UNKNOWN, UNKNOWN]


def test_a_head_reached_with_zeros_only_waits_for_its_owner() -> None:
    model, _, gradients = build("found")
    gradients.per_task(list((0 * torch.stack(model.losses(batch(1)))).unbind()))
    assert gradients.ownership.owners == [None] * 4
    gradients.clear()
    gradients.per_task(list((1 * torch.stack(model.losses(batch(1)))).unbind()))
    assert gradients.ownership.owners == [0, 0, 1, 1]
    assert gradients.has_grad == [True] * 4


def test_a_head_that_joins_later_is_found() -> None:
    model, _, gradients = build("found")
    heads = [p for hs in model.head_parameters() for p in hs]
    gradients.per_task([model.losses(batch(1))[0], model.trunk[0].weight.sum()])
    assert gradients.ownership.owners == [0, 0, None, None]
    gradients.clear()
    gradients.per_task(model.losses(batch(1)))
    assert gradients.ownership.owners == [0, 0, 1, 1]
    torch.testing.assert_close(
        head_grad(gradients, model, heads[2]), expected(model, batch(1), 1)[1][0]
    )
    assert len(heads) == 4


def joint_losses(
    model: Net, x: Tensor, *, bad: int | None = None, gate: float = 1.0
) -> list[Tensor]:
    """Losses of one tensor of predictions, so that every task reaches every head, others' by
    zeros. `bad`: a task with a target that is NaN; `gate`: a factor of the last task's head."""
    z = model.trunk(x).tanh()
    factors = torch.tensor([1.0] * (len(model.heads) - 1) + [gate])
    predictions = torch.cat([head(z) for head in model.heads], 1) * factors
    targets = x[:, : len(model.heads)].clone()
    if bad is not None:
        targets[3, bad] = math.nan
    return list((predictions + z[:, :1] - targets).pow(2).mean(0).unbind())


FILLS: dict[str, Callable[[TaskGradients, list[Any]], None]] = {
    "loop": lambda gradients, losses: gradients.per_task(losses),
    "batched": lambda gradients, losses: gradients.per_task(losses, at_once=2),
    "weighted": lambda gradients, losses: gradients.weighted(losses, [0.5, 2.0]),
}


def check_joint_heads(model: Net, gradients: TaskGradients, x: Tensor) -> None:
    heads = [p for hs in model.head_parameters() for p in hs]
    own = torch.autograd.grad(sum(joint_losses(model, x)), heads)
    for p, g in zip(heads, own, strict=True):
        torch.testing.assert_close(head_grad(gradients, model, p), g)


@pytest.mark.parametrize("owners", ["given", "found"])
@pytest.mark.parametrize("fill", FILLS)
def test_gradients_that_are_not_finite_tell_nothing_about_owners(fill: str, owners: str) -> None:
    model, _, gradients = build(owners)
    before = list(gradients.ownership.owners)
    FILLS[fill](gradients, joint_losses(model, batch(1), bad=0))  # 0 * NaN on every head
    assert gradients.ownership.owners == before
    assert gradients.ownership.inspected == [UNKNOWN, UNKNOWN]
    assert gradients.has_grad == ([True] * 2 if owners == "given" else [True, True, False, False])
    assert not gradients.head_rows[0].isfinite().all()
    assert not gradients.rows[0][0].isfinite().all()
    gradients.clear()
    FILLS[fill](gradients, joint_losses(model, batch(2)))
    assert gradients.ownership.owners == ([0, 1] if owners == "given" else [0, 0, 1, 1])
    assert gradients.ownership.inspected == [USED, USED]
    check_joint_heads(model, gradients, batch(2))


@pytest.mark.parametrize("bad", [None, 1])
@pytest.mark.parametrize("fill", FILLS)
def test_a_head_is_not_given_to_a_stranger_while_its_own_task_is_absent(
    fill: str, bad: int | None
) -> None:
    model, _, gradients = build("found")
    FILLS[fill](gradients, [joint_losses(model, batch(1), bad=bad)[0], None])
    assert gradients.ownership.owners == ([0, 0] if bad is None else [None, None]) + [None, None]
    gradients.clear()
    FILLS[fill](gradients, joint_losses(model, batch(2)))
    assert gradients.ownership.owners == [0, 0, 1, 1]
    check_joint_heads(model, gradients, batch(2))


@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("listed", [True, False])
def test_a_first_step_that_overflows_on_a_head_alone_is_skipped(
    listed: bool, capturable: bool
) -> None:
    """Also where it is not known yet whose the head is: a GradScaler has to learn of it."""
    models = net(), net()
    optimizers = []
    for model in models:
        heads = model.head_parameters()
        given = heads if listed else [p for head in heads for p in head]
        optimizers.append(fastmto.PUB(model.trunk.parameters(), given, capturable=capturable))
    hook = models[0].heads[1].weight.register_hook(lambda grad: grad * math.inf)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=100)
    optimizers[0].backward(joint_losses(models[0], batch(0)), scaler=scaler)
    with nullcontext() if capturable else pytest.warns(RuntimeWarning, match="step skipped"):
        scaler.step(optimizers[0])
    scaler.update()
    hook.remove()
    assert scaler.get_scale() == 128
    assert optimizers[0].stats["skipped"] == 1
    for t in range(1, 4):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            optimizer.backward(joint_losses(model, batch(t)))
            optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_weighted_head_that_overflows_before_it_is_known_whose_it_is() -> None:
    model = net()
    model.heads[1].weight.register_hook(lambda grad: grad * math.inf)
    balancer = fastmto.get("nashmtl", 2, heads="weighted")
    heads = [p for head in model.head_parameters() for p in head]
    balancer.backward(model.losses(batch(0)), model.trunk.parameters(), heads)
    assert not model.heads[1].weight.grad.isfinite().all()


@pytest.mark.parametrize("capturable", [True, False])
def test_a_run_resumes_exactly_while_it_is_unknown_whose_a_head_is(capturable: bool) -> None:
    def step(model: Net, optimizer: fastmto.PUB, t: int) -> None:
        optimizer.zero_grad()
        optimizer.backward(joint_losses(model, batch(t), gate=float(t > 1)))
        optimizer.step()

    def build(model: Net) -> fastmto.PUB:
        options = {"update_weights_every": 4, "capturable": capturable}
        return fastmto.PUB(model.trunk.parameters(), model.heads.parameters(), 0.01, **options)

    model, rest = net(), net(1)
    optimizer, resumed = build(model), build(rest)
    for t in range(2):
        step(model, optimizer, t)
    assert optimizer.gradients.ownership.owners == [0, 0, None, None]
    rest.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for t in range(2, 6):
        step(model, optimizer, t)
        step(rest, resumed, t)
        assert resumed.gradients.ownership.owners == [
            0,
            0,
            1,
            1,
        ]
    for p, q in zip(model.parameters(), rest.parameters(), strict=True):
        assert torch.equal(p, q)
    assert optimizer.stats == resumed.stats


@contextmanager
def a_capture() -> Iterator[None]:
    """As if a CUDA graph were being captured."""
    with pytest.MonkeyPatch.context() as patch, NothingGoesToTheHost():
        patch.setattr(heads_module, "capturing", lambda device: True)
        yield


@pytest.mark.parametrize("owner", [1, None])
def test_a_head_that_is_never_reached_costs_and_reads_nothing(owner: int | None) -> None:
    model, spare = net(), nn.Linear(2, 2)
    model.heads[1].requires_grad_(False)
    heads = [FlatLayout(model.head_parameters()[0]), FlatLayout(list(spare.parameters()))]
    gradients = TaskGradients(
        [FlatLayout(list(model.trunk.parameters()))], heads, [0, owner], n_tasks=2
    )
    gradients.per_task(model.losses(batch(0)))
    counts = []
    with a_capture():
        for t in range(6):
            gradients.clear()
            before = gradients.backwards
            if t % 2:
                gradients.weighted(model.losses(batch(t)), [0.5, 2.0])
            else:
                gradients.per_task(model.losses(batch(t)))
            counts.append(gradients.backwards - before)
    assert counts == [2, 1, 2, 1, 2, 1]
    assert gradients.ownership.owners == [0, owner]
    assert gradients.ownership.inspected == [USED, UNUSED]


def test_a_head_out_of_use_is_looked_at_once() -> None:
    model, _, gradients = build()
    known = []
    for used in (True, True, False, False, False, True, False):
        losses = model.losses(batch(1))
        if not used:
            losses[1] = model.trunk(batch(1)).sum()
        gradients.clear()
        gradients.per_task(losses)
        known.append(gradients.ownership.inspected[1])
    assert known == [USED, USED, UNKNOWN, UNUSED, UNUSED, USED, UNKNOWN]
    assert gradients.ownership.inspected[0] == USED


def test_what_is_not_known_under_a_capture_is_named() -> None:
    model, _, gradients = build()
    with (
        a_capture(),
        pytest.raises(RuntimeError, match=r"not known yet: which of them tasks \[0\] use\. A step"),
    ):
        gradients.per_task([model.losses(batch(1))[0], None])
    model, _, gradients = build("found")
    for _ in range(3):  # one head has gradients of 0, whose reach tells nothing
        gradients.clear()
        gradients.per_task(joint_losses(model, batch(1), gate=0.0))
    losses = joint_losses(model, batch(1), gate=0.0)
    named = r"which of them tasks \[0, 1\] use and whose those of shapes \[\(1, 8\), \(1,\)\] are"
    with a_capture(), pytest.raises(RuntimeError, match=named):
        gradients.per_task(losses)


class Reads(TorchFunctionMode):
    """Counts how often the host waits."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in NothingGoesToTheHost.WAITS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("owners", ["given", "found"])
def test_owners_are_found_by_reading_once(owners: str) -> None:
    model, _, gradients = build(owners, n_tasks=3)
    losses = joint_losses(model, batch(1))
    with Reads() as reads:
        gradients.per_task(losses)
    assert reads.count == 1
    assert all(known == USED for known in gradients.ownership.inspected)


def test_heads_of_no_elements_and_of_several_dtypes() -> None:
    trunk, empty = nn.Parameter(torch.ones(3)), nn.Parameter(torch.empty(0))
    narrow, wide = (nn.Parameter(torch.ones(2, dtype=d)) for d in (torch.bfloat16, torch.float64))
    heads = [FlatLayout([p]) for p in (empty, narrow, wide)]
    gradients = TaskGradients([FlatLayout([trunk])], heads, [None] * 3, 2)
    tiny = torch.finfo(torch.float64).tiny
    loss = trunk.sum() + empty.sum() + narrow.sum()
    gradients.per_task([loss, trunk.sum() + (wide * tiny).sum()])
    assert gradients.ownership.owners == [None, 0, 1]
    assert gradients.head_views[2][0].tolist() == [tiny, tiny]


def test_head_gradients_have_their_own_memory() -> None:
    """Autograd hands out one tensor for both operands of a sum."""
    trunk, a, b = (nn.Parameter(torch.ones(3)) for _ in range(3))
    gradients = TaskGradients([FlatLayout([trunk])], [FlatLayout([a, b])], [0], 1)
    gradients.per_task([((trunk + a + b) * 2).sum()])
    first, second = gradients.head_views[0]
    assert first.data_ptr() != second.data_ptr()
    first.zero_()
    assert torch.equal(second, torch.full((3,), 2.0))


def test_sparse_gradients_are_refused_by_name() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    gradients = TaskGradients([FlatLayout([table.weight])], [], [], 1)
    with pytest.raises(
        RuntimeError, match=r"shared parameter 0 \(shape \(5, 3\)\) has a sparse.*sparse=False"
    ):
        gradients.per_task([table(torch.tensor([1, 2])).sum()])


def test_losses_come_as_tensor_list_tuple_or_names() -> None:
    a, b = torch.ones((), requires_grad=True), torch.ones(1, requires_grad=True)
    assert as_list([a, b], 2, None) == ([a, b], None)
    assert as_list((a, None), 2, None) == ([a, None], None)
    values, names = as_list({"x": a, "y": b}, None, None)
    assert values == [a, b]
    assert names == ["x", "y"]
    assert as_list({"y": b}, 2, ["x", "y"]) == ([None, b], ["x", "y"])
    both = torch.stack([a, b.sum()])
    assert [v.item() for v in as_list(both, 2, None)[0] if v is not None] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("losses", "match"),
    [
        ([torch.ones((), requires_grad=True)], r"losses must hold 2 tasks, got 1"),
        (
            [torch.ones(2, requires_grad=True)] * 2,
            r"losses\[0\] must be a scalar, got shape \(2,\)",
        ),
        ([1.0, 2.0], r"losses\[0\] must be a scalar tensor, got float"),
        ([torch.ones(()), None], r"losses\[0\] is not attached to a graph"),
        ([None, None], r"at least one task"),
        (3.0, r"losses must be a tensor \(T,\), a sequence or a dict, got float"),
        (
            [torch.ones((), dtype=torch.complex64, requires_grad=True), None],
            r"losses\[0\] must be of a real floating dtype, got torch.complex64",
        ),
        (torch.ones(2, 2, requires_grad=True), r"shape \(T,\).*\(2, 2\)"),
        (torch.ones((), requires_grad=True), r"shape \(T,\).*\(\)"),
        ({"a": torch.ones((), requires_grad=True)}, r"losses must name 2 tasks, got \['a'\]"),
    ],
)
def test_losses_that_are_wrong_are_named(losses, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        as_list(losses, 2, None)


def test_unknown_names_are_refused() -> None:
    a = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match=r"of \['x', 'y'\], got also \['z'\]"):
        as_list({"x": a, "z": a}, 2, ["x", "y"])
    with pytest.raises(ValueError, match=r"losses\['x'\] must be a scalar tensor"):
        as_list({"x": "1"}, 2, ["x", "y"])


def test_the_first_nonfinite_loss_is_found() -> None:
    good, bad = torch.tensor(1.0), torch.tensor(float("inf"))
    assert first_nonfinite([good, None]) is None
    assert first_nonfinite([None, good, bad]) == 2
    assert first_nonfinite([torch.tensor(float("nan"))]) == 0

"""The update-level optimizers in lockstep with the float64 reference, and their policies."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pytest
import torch
from problems import batch, gradients, linear_loss, net, parameters
from torch import Tensor, nn

import fastmto
from fastmto.errors import NonFiniteError, SolverError
from fastmto.optim.rules import AdaGrad, Adam, Clippy, RMSProp, Rule
from fastmto.optim.update_balancer import UpdateBalancer
from fastmto.reference import updates as reference

RULES = [
    Adam(),
    Adam(betas=(0.5, 0.9), eps=1e-3),
    AdaGrad(initial_accumulator_value=0.1),
    RMSProp(),
    RMSProp(momentum=0.9, centered=True),
]
MODIFIERS = [{}, {"clippy": True}, {"adatask": True}, {"clippy": Clippy(0.1, 0.2), "adatask": True}]


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    # Weights of a Gram with a relative error eps are off by eps * kappa; 20 steps add up.
    return {
        torch.float64: {"rtol": 1e-9, "atol": 1e-11},
        torch.float32: {"rtol": 2e-4, "atol": 2e-5},
        torch.bfloat16: {"rtol": 6e-2, "atol": 6e-2},
        torch.float16: {"rtol": 2e-2, "atol": 2e-2},
    }[dtype]


class Lockstep:
    """An optimizer and its references, one for the shared parameters and one a head."""

    def __init__(
        self, rule: Rule, dtype: torch.dtype, n_tasks: int, every: int, between: str, **kwargs
    ) -> None:
        self.every, self.between, self.n_tasks = every, between, n_tasks
        self.shared = parameters(0, dtype)
        self.heads = [parameters(10 + i, dtype, [(3,), (2, 2)]) for i in range(n_tasks)]
        lr, wd = 0.05, 0.1
        clippy = Clippy() if kwargs.get("clippy") is True else kwargs.get("clippy")
        common = {"rule": rule, "lr": lr, "weight_decay": wd, "clippy": clippy}
        values = [p.detach().clone() for p in self.shared]
        adatask = kwargs.get("adatask", False)
        self.reference = reference.ReferencePUB(values, n_tasks, adatask=adatask, **common)
        self.head_references = [
            reference.ReferencePUB([p.detach().clone() for p in head], 1, **common)
            for head in self.heads
        ]
        self.optimizer = fastmto.PUB(
            self.shared,
            self.heads,
            lr,
            rule=rule,
            weight_decay=wd,
            update_weights_every=every,
            between=between,
            max_weight=None,
            **kwargs,
        )
        self.weights = torch.ones(n_tasks, dtype=torch.float64)

    def step(self, t: int) -> None:
        shared = gradients(1000 + t, self.shared, self.n_tasks)
        heads = [gradients(2000 + t, head, 1)[0] for head in self.heads]
        losses = [
            linear_loss([*self.shared, *head], [*g, *hg])
            for head, g, hg in zip(self.heads, shared, heads, strict=True)
        ]
        self.optimizer.zero_grad()
        self.optimizer.backward(losses)
        self.optimizer.step()
        searches = t % self.every == 0
        if searches:
            gram = self.reference.gram(shared)
            a = reference.bargaining(gram)
            numel = sum(p.numel() for p in self.shared)
            self.weights = reference.scale_weights(a, gram, "mean_norm", numel)
        if searches or self.between == "per_task":
            self.reference.step(shared, self.weights)
        else:
            joint = [
                sum(a * g.double() for a, g in zip(self.weights.tolist(), gs, strict=True))
                for gs in zip(*shared, strict=True)
            ]
            self.reference.step([joint], torch.ones(1, dtype=torch.float64))
        for ref, g in zip(self.head_references, heads, strict=True):
            ref.step([g], torch.ones(1, dtype=torch.float64))

    def check(self, dtype: torch.dtype) -> None:
        tol = tolerance(dtype)
        torch.testing.assert_close(
            self.optimizer.weights, self.weights, rtol=10 * tol["rtol"], atol=tol["atol"]
        )
        pairs = [(self.shared, self.reference)]
        pairs += list(zip(self.heads, self.head_references, strict=True))
        for params, ref in pairs:
            for k, p in enumerate(params):
                torch.testing.assert_close(p.detach().double(), ref.theta[k], **tol)
                state = self.optimizer.state[p]
                for name in ref.rule.state_names:
                    owners = [s[k][name] for s in ref.state]
                    expected = torch.stack(owners) if ref.adatask else owners[0]
                    scale = float(expected.abs().max()) or 1.0
                    torch.testing.assert_close(
                        state[name].double() / scale, expected / scale, **tol
                    )


@pytest.mark.parametrize("modifiers", MODIFIERS, ids=lambda m: "+".join(m) or "plain")
@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.name}{r.kind}")
def test_twenty_steps_in_lockstep_with_the_reference(rule: Rule, modifiers: dict) -> None:
    pair = Lockstep(rule, torch.float64, 3, every=1, between="per_task", **modifiers)
    for t in range(20):
        pair.step(t)
        pair.check(torch.float64)


@pytest.mark.parametrize("modifiers", MODIFIERS[:3], ids=lambda m: "+".join(m) or "plain")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lockstep_in_lower_precision(dtype: torch.dtype, modifiers: dict) -> None:
    # Few steps in 16 bit: the parameters themselves round at every step.
    pair = Lockstep(Adam(), dtype, 2, every=1, between="per_task", **modifiers)
    for t in range(20 if dtype == torch.float32 else 2):
        pair.step(t)
        pair.check(dtype)


@pytest.mark.parametrize("between", ["weighted", "per_task"])
@pytest.mark.parametrize("modifiers", MODIFIERS[:2], ids=lambda m: "+".join(m) or "plain")
def test_lockstep_with_a_search_every_third_step(between: str, modifiers: dict) -> None:
    pair = Lockstep(Adam(), torch.float64, 3, every=3, between=between, **modifiers)
    for t in range(20):
        pair.step(t)
        pair.check(torch.float64)
    assert pair.optimizer.stats["searches"] == 7
    expected = 20 * 3 if between == "per_task" else 7 * 3 + 13
    assert pair.optimizer.stats["backwards"] == expected


def quadratic_losses(shared: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
    flat = torch.cat([p.flatten() for p in shared])
    return [(flat - t).pow(2).sum() for t in targets]


def test_delayed_steps_with_the_weights_of_the_search_before() -> None:
    shared = parameters(0, torch.float64)
    optimizer = fastmto.PUB(
        shared, [[], []], 0.05, update_weights_every=1, delayed=True, max_weight=None
    )
    ref = reference.ReferencePUB([p.detach().clone() for p in shared], 2, Adam(), 0.05)
    numel = sum(p.numel() for p in shared)
    held = None
    for t in range(10):
        grads = gradients(t, shared, 2)
        optimizer.zero_grad()
        optimizer.backward([linear_loss(shared, g) for g in grads])
        optimizer.step()
        gram = ref.gram(grads)
        new = reference.scale_weights(reference.bargaining(gram), gram, "mean_norm", numel)
        ref.step(grads, new if held is None else held)
        held = new
        torch.testing.assert_close(optimizer.weights, new, rtol=1e-9, atol=0)
        for p, theta in zip(shared, ref.theta, strict=True):
            torch.testing.assert_close(p.detach(), theta, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("scale", ["mean_norm", "rms", "sum", "none"])
def test_scale_does_what_it_says(scale: str) -> None:
    shared = parameters(0, torch.float64)
    grads = gradients(1, shared, 3)
    optimizer = fastmto.PUB(shared, [[], [], []], scale=scale, max_weight=None)
    ref = reference.ReferencePUB([p.detach().clone() for p in shared], 3, Adam(), 1e-3)
    us = torch.stack([torch.cat([u.flatten() for u in row]) for row in ref.updates(grads)])
    optimizer.backward([linear_loss(shared, g) for g in grads])
    optimizer.step()
    a = optimizer.weights
    length = float((a @ us).norm())
    expected = {
        "mean_norm": float(us.norm(dim=1).mean()),
        "rms": sum(p.numel() for p in shared) ** 0.5,
        "none": 3**0.5,
    }
    if scale == "sum":
        assert float(a.sum()) == pytest.approx(3, rel=1e-12)
    else:
        assert length == pytest.approx(expected[scale], rel=1e-9)
    c = a * (us @ us.T @ a)
    torch.testing.assert_close(c, c.mean().expand(3), rtol=1e-9, atol=0)


def test_max_weight_bounds_and_counts() -> None:
    shared = parameters(0, torch.float64)
    optimizer = fastmto.PUB(shared, [[], []], scale="none", max_weight=0.01)
    optimizer.backward([linear_loss(shared, g) for g in gradients(1, shared, 2)])
    optimizer.step()
    assert optimizer.weights.tolist() == [0.01, 0.01]
    assert optimizer.stats["capped"] == 1


def test_groups_have_their_own_rates_and_dtypes_and_one_gram() -> None:
    a, b = parameters(0, torch.float64), parameters(1, torch.float64)
    c = parameters(2, torch.float32)
    optimizer = fastmto.PUB(
        [{"params": a, "lr": 0.1}, {"params": [*b, *c], "betas": (0.5, 0.9), "weight_decay": 0.3}],
        [[], []],
        update_weights_every=1,
    )
    assert len(optimizer.gradients.rows) == 3
    refs = [
        reference.ReferencePUB([p.detach().clone() for p in params], 2, rule, lr, wd)
        for params, rule, lr, wd in (
            (a, Adam(), 0.1, 0.0),
            (b, Adam((0.5, 0.9)), 1e-3, 0.3),
            (c, Adam((0.5, 0.9)), 1e-3, 0.3),
        )
    ]
    for t in range(5):
        grads = [gradients(t, params, 2) for params in (a, b, c)]
        joint = [[*x, *y, *z] for x, y, z in zip(*grads, strict=True)]
        optimizer.backward([linear_loss([*a, *b, *c], g) for g in joint])
        optimizer.step()
        gram = sum(ref.gram(g) for ref, g in zip(refs, grads, strict=True))
        weights = reference.scale_weights(reference.bargaining(gram), gram, "mean_norm", 0)
        for ref, g in zip(refs, grads, strict=True):
            ref.step(g, weights)
        torch.testing.assert_close(optimizer.weights, weights, rtol=1e-5, atol=0)
        for params, ref in zip((a, b, c), refs, strict=True):
            for p, theta in zip(params, ref.theta, strict=True):
                torch.testing.assert_close(p.detach().double(), theta, rtol=1e-4, atol=1e-5)


def test_one_task_is_plain_adamw() -> None:
    model, twin = net(n_tasks=1), net(n_tasks=1)
    ours = fastmto.PUB(model.trunk.parameters(), model.head_parameters(), 0.01, weight_decay=0.1)
    torchs = torch.optim.AdamW(twin.parameters(), 0.01, weight_decay=0.1)
    for t in range(15):
        ours.zero_grad()
        ours.backward(model.losses(batch(t)))
        ours.step()
        torchs.zero_grad()
        twin.losses(batch(t))[0].backward()
        torchs.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_one_task_between_searches_is_weighted_once() -> None:
    shared = parameters(0, torch.float64)
    optimizer = fastmto.PUB(shared, [[]], 0.01, rule=RMSProp(eps=0.1), scale="rms", max_weight=None)
    ref = reference.ReferencePUB([p.detach().clone() for p in shared], 1, RMSProp(eps=0.1), 0.01)
    for t in range(3):
        grads = gradients(t, shared, 1)
        if t == 0:
            gram = ref.gram(grads)
            numel = sum(p.numel() for p in shared)
            a = reference.scale_weights(reference.bargaining(gram), gram, "rms", numel)
            ref.step(grads, a)
        else:
            ref.step([[float(a) * g for g in grads[0]]], torch.ones(1, dtype=torch.float64))
        optimizer.backward([linear_loss(shared, grads[0])])
        optimizer.step()
    for p, theta in zip(shared, ref.theta, strict=True):
        torch.testing.assert_close(p.detach(), theta, rtol=1e-9, atol=1e-11)


def test_heads_train_as_plain_adam_whatever_the_weights() -> None:
    model = net()
    copies = [[nn.Parameter(p.detach().clone()) for p in head] for head in model.head_parameters()]
    optimizer = fastmto.PUB(model.trunk.parameters(), model.head_parameters(), 0.01)
    torchs = torch.optim.Adam([p for head in copies for p in head], 0.01)
    for t in range(25):
        optimizer.zero_grad()
        losses = model.losses(batch(t))
        own = [
            torch.autograd.grad(loss, head, retain_graph=True)
            for loss, head in zip(losses, model.head_parameters(), strict=True)
        ]
        optimizer.backward(losses)
        optimizer.step()
        for head, grads in zip(copies, own, strict=True):
            for p, g in zip(head, grads, strict=True):
                p.grad = g
        torchs.step()
        for head, expected in zip(model.head_parameters(), copies, strict=True):
            for p, q in zip(head, expected, strict=True):
                torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_adatask_alone_is_the_sum_of_separate_adams() -> None:
    shared = parameters(0, torch.float64)
    ref = reference.ReferencePUB(
        [p.detach().clone() for p in shared], 2, Adam(), 0.05, adatask=True
    )
    optimizer = fastmto.AdaTask(shared, [[], []], 0.05)
    for t in range(10):
        grads = gradients(t, shared, 2)
        optimizer.backward([linear_loss(shared, g) for g in grads])
        optimizer.step()
        ref.step(grads, torch.ones(2, dtype=torch.float64))
    for p, theta in zip(shared, ref.theta, strict=True):
        torch.testing.assert_close(p.detach(), theta, rtol=1e-9, atol=1e-11)
    assert optimizer.weights.tolist() == [1, 1]
    assert optimizer.stats["searches"] == 0


def test_clippy_adam_follows_the_reference() -> None:
    params = parameters(0, torch.float64)
    refs = reference.ReferencePUB(
        [p.detach().clone() for p in params], 1, Adam(), 0.5, 0.01, clippy=Clippy()
    )
    optimizer = fastmto.ClippyAdam(params, 0.5, weight_decay=0.01)
    for t in range(20):
        (grads,) = gradients(t, params, 1)
        optimizer.zero_grad()
        linear_loss(params, grads).backward()
        optimizer.step()
        refs.step([grads], torch.ones(1, dtype=torch.float64))
        for k, p in enumerate(params):
            torch.testing.assert_close(p.detach(), refs.theta[k], rtol=1e-9, atol=1e-11)
            for name, value in refs.state[0][k].items():
                torch.testing.assert_close(optimizer.state[p][name], value, rtol=1e-9, atol=1e-11)


def test_any_callable_can_weigh() -> None:
    shared = parameters(0, torch.float64)
    seen = []

    def mean(gram: Tensor) -> Tensor:
        seen.append(gram)
        return torch.full((len(gram),), 0.25, dtype=torch.float64)

    optimizer = fastmto.PUB(shared, [[], []], weighting=mean, scale="none")
    optimizer.backward([linear_loss(shared, g) for g in gradients(0, shared, 2)])
    optimizer.step()
    assert optimizer.weights.tolist() == [0.25, 0.25]
    assert seen[0].dtype == torch.float64
    assert torch.equal(seen[0], optimizer.gram)


def test_ccp_is_the_other_named_weighting() -> None:
    shared = parameters(0, torch.float64)
    optimizer = fastmto.PUB(shared, [[], []], weighting="ccp", scale="none", max_weight=None)
    optimizer.backward([linear_loss(shared, g) for g in gradients(0, shared, 2)])
    optimizer.step()
    a, gram = optimizer.weights, optimizer.gram
    assert bool((a * (gram @ a) >= 1 - 1e-6).all())


def run(optimizer: UpdateBalancer, model, seeds, drop=None) -> None:
    for t in seeds:
        losses: list = model.losses(batch(t))
        if drop is not None:
            losses[drop] = None
        optimizer.zero_grad()
        optimizer.backward(losses)
        optimizer.step()


def snapshot(optimizer: UpdateBalancer, model) -> list[Tensor]:
    states = [v for p in model.parameters() for v in optimizer.state[p].values()]
    tensors = [*model.parameters(), *(s for s in states if isinstance(s, Tensor))]
    return [t.detach().clone() for t in (*tensors, optimizer.weights)]


def assert_same(before: list[Tensor], after: list[Tensor]) -> None:
    assert len(before) == len(after)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("poison", ["nan loss", "inf loss", "gradient", "head gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(poison: str, every: int) -> None:
    model = net()
    optimizer = fastmto.PUB(
        model.trunk.parameters(), model.head_parameters(), update_weights_every=every
    )
    run(optimizer, model, range(3))
    before = snapshot(optimizer, model)
    losses = model.losses(batch(3))
    if poison == "nan loss":
        losses[1] = losses[1] * float("nan")
    elif poison == "inf loss":
        losses[0] = losses[0] / 0
    elif poison == "gradient":  # the loss is finite, its gradient is not
        losses[1] = losses[1] + (model.trunk[0].weight[0, 0] * 0).sqrt()
    else:
        losses[1] = losses[1] + (model.heads[1].weight[0, 0] * 0).sqrt()
    optimizer.zero_grad()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.backward(losses)
        optimizer.step()
    assert ["step skipped" in str(w.message) for w in caught] == [True]
    assert_same(before, snapshot(optimizer, model))
    assert optimizer.stats["skipped"] == 1
    assert optimizer.stats["steps"] == 3
    run(optimizer, model, range(4, 6))
    assert optimizer.stats["steps"] == 5
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("adatask", [False, True])
def test_a_gradient_too_large_to_be_squared_is_refused(every: int, adatask: bool) -> None:
    """Its moment would be infinite in float32, and the parameter dead for good."""
    model = net()
    optimizer = fastmto.PUB(
        model.trunk.parameters(),
        model.head_parameters(),
        update_weights_every=every,
        adatask=adatask,
    )
    run(optimizer, model, range(3))
    before = snapshot(optimizer, model)
    losses = model.losses(batch(3))
    optimizer.zero_grad()
    optimizer.backward([losses[0] * 1e25, losses[1]])
    with pytest.warns(RuntimeWarning, match="too large to be squared"):
        optimizer.step()
    assert_same(before, snapshot(optimizer, model))
    assert optimizer.stats["skipped"] == 1
    run(optimizer, model, range(4, 6))


def test_not_finite_raises_where_asked() -> None:
    model = net()
    optimizer = fastmto.PUB(model.trunk.parameters(), model.head_parameters(), on_nonfinite="raise")
    losses = model.losses(batch(0))
    with pytest.raises(NonFiniteError, match=r"losses\[0\] is not finite"):
        optimizer.backward([losses[0] * float("nan"), losses[1]])
    losses = model.losses(batch(0))
    losses[1] = losses[1] + (model.trunk[0].weight[0, 0] * 0).sqrt()
    optimizer.backward(losses)
    with pytest.raises(NonFiniteError, match="gradient"):
        optimizer.step()
    assert optimizer.stats["steps"] == 0


def test_opposite_tasks_hold_the_weights_or_raise() -> None:
    for policy in ("hold", "raise"):
        shared = parameters(0, torch.float64)
        optimizer = fastmto.PUB(shared, [[], []], on_failure=policy, update_weights_every=1)
        grads = gradients(0, shared, 1)[0]
        before = [p.detach().clone() for p in shared]
        optimizer.backward([linear_loss(shared, grads), -linear_loss(shared, grads)])
        if policy == "hold":
            with pytest.warns(RuntimeWarning, match="the last ones stay"):
                optimizer.step()
            assert optimizer.weights.tolist() == [1.0, 1.0]
            assert optimizer.stats["held"] == 1
            assert optimizer.stats["steps"] == 1
        else:
            with pytest.raises(SolverError):
                optimizer.step()
            assert optimizer.stats["steps"] == 0
            for p, q in zip(shared, before, strict=True):
                assert torch.equal(p, q)


def test_identical_tasks_share_the_step_equally() -> None:
    shared = parameters(0, torch.float64)
    optimizer = fastmto.PUB(shared, [[], []])
    grads = gradients(0, shared, 1)[0]
    optimizer.backward([linear_loss(shared, grads), linear_loss(shared, grads)])
    optimizer.step()
    assert optimizer.weights.tolist() == pytest.approx([0.5, 0.5], rel=1e-9)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("rule", ["adam", "adagrad", "rmsprop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_scales_far_apart_still_train(rule: str, scale: float, dtype: torch.dtype) -> None:
    model = net().to(dtype)
    optimizer = fastmto.PUB(
        model.trunk.parameters(), model.head_parameters(), 0.01, rule=rule, update_weights_every=2
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in range(10):
            losses = model.losses(batch(t).to(dtype))
            optimizer.zero_grad()
            optimizer.backward([losses[0], losses[1] * scale])
            optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert bool((optimizer.weights > 0).all())


@pytest.mark.parametrize("kwargs", [{}, {"adatask": True}, {"update_weights_every": 1}])
def test_an_absent_task_keeps_head_weight_and_own_moments(kwargs: dict) -> None:
    model = net(n_tasks=3)
    optimizer = fastmto.PUB(model.trunk.parameters(), model.head_parameters(), **kwargs)
    run(optimizer, model, range(2))
    head = [p.detach().clone() for p in model.head_parameters()[1]]
    weight = float(optimizer.weights[1])
    rows = [
        optimizer.state[p][name][1].clone()
        for p in model.trunk.parameters()
        for name in ("exp_avg", "exp_avg_sq")
        if kwargs.get("adatask")
    ]
    trunk = [p.detach().clone() for p in model.trunk.parameters()]
    run(optimizer, model, range(2, 12), drop=1)
    assert optimizer.stats["absent"] == 10
    assert float(optimizer.weights[1]) == weight
    for p, q in zip(model.head_parameters()[1], head, strict=True):
        assert torch.equal(p, q)
    after = [
        optimizer.state[p][name][1]
        for p in model.trunk.parameters()
        for name in ("exp_avg", "exp_avg_sq")
        if kwargs.get("adatask")
    ]
    assert_same(rows, after)
    assert not torch.equal(trunk[0], next(iter(model.trunk.parameters())))
    run(optimizer, model, range(12, 14))


def test_an_absent_task_is_no_part_of_the_joint_step() -> None:
    """With task 1 absent, the step is the one of an optimizer that never knew it."""
    shared, others = parameters(0, torch.float64), parameters(0, torch.float64)
    three = fastmto.PUB(shared, [[], [], []], update_weights_every=1)
    two = fastmto.PUB(others, [[], []], update_weights_every=1)
    for t in range(3):
        g = gradients(t, shared, 3)
        three.backward([linear_loss(shared, g[0]), None, linear_loss(shared, g[2])])
        three.step()
        two.backward([linear_loss(others, g[0]), linear_loss(others, g[2])])
        two.step()
        assert three.gram.shape == (2, 2)
        for p, q in zip(shared, others, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=0)


def test_a_task_off_the_shared_parameters_trains_its_head_only() -> None:
    model = net()
    optimizer = fastmto.PUB(model.trunk.parameters(), model.head_parameters())
    before = model.heads[1].weight.detach().clone()
    for t in range(3):
        optimizer.zero_grad()
        optimizer.backward([model.losses(batch(t))[0], (model.heads[1].weight - 1).pow(2).sum()])
        optimizer.step()
    assert optimizer.stats["untouched"] == 3
    assert optimizer.weights.tolist() == [1.0, 1.0]
    assert not torch.equal(before, model.heads[1].weight)


def test_head_gradients_of_any_layout_are_taken() -> None:
    """sum() gives an expanded gradient, a transposed use a transposed one."""
    trunk, head = nn.Parameter(torch.ones(3)), nn.Parameter(torch.arange(6.0).view(2, 3))
    bias = nn.Parameter(torch.zeros(4))
    twins = [nn.Parameter(p.detach().clone()) for p in (head, bias)]
    optimizer = fastmto.PUB([trunk], [[head, bias]], 0.1)
    torchs = torch.optim.Adam(twins, 0.1)
    for _ in range(3):
        for (h, b), step in (((head, bias), optimizer), (twins, torchs)):
            step.zero_grad()
            loss = (h.T @ torch.tensor([1.0, 2.0])).pow(2).sum() + b.sum() + trunk.sum()
            optimizer.backward([loss]) if step is optimizer else loss.backward()
            step.step()
    torch.testing.assert_close(head, twins[0])
    torch.testing.assert_close(bias, twins[1])


def test_no_loss_on_the_shared_parameters_is_an_error() -> None:
    model = net()
    optimizer = fastmto.PUB(model.trunk.parameters(), model.head_parameters())
    with pytest.raises(RuntimeError, match="no loss reaches the shared parameters"):
        optimizer.backward([head.weight.sum() for head in model.heads])
    with pytest.raises(RuntimeError, match="call backward"):
        optimizer.step()


def test_a_batch_whose_only_task_has_no_shared_part_trains_that_head() -> None:
    model = net()
    optimizer = fastmto.PUB(model.trunk.parameters(), model.head_parameters())
    run(optimizer, model, range(2))
    trunk = [p.detach().clone() for p in model.trunk.parameters()]
    head = model.heads[1].weight.detach().clone()
    for _ in range(10):
        with pytest.warns(RuntimeWarning, match="no task of this step reaches"):
            optimizer.backward([None, model.heads[1].weight.pow(2).sum()])
        optimizer.step()
    assert_same(trunk, [p.detach() for p in model.trunk.parameters()])
    assert not torch.equal(head, model.heads[1].weight)
    run(optimizer, model, range(2))


def test_shared_parameters_out_of_reach_are_named_once() -> None:
    model, unused = net(), nn.Parameter(torch.zeros(2))
    optimizer = fastmto.PUB([*model.trunk.parameters(), unused], model.head_parameters())
    with pytest.warns(RuntimeWarning, match=r"shared_parameters \[4\].*use_reentrant=False"):
        optimizer.backward(model.losses(batch(0)))
    optimizer.step()
    run(optimizer, model, range(2))


def test_another_backward_into_the_shared_parameters_is_not_lost_in_silence() -> None:
    model = net()
    optimizer = fastmto.PUB(model.trunk.parameters(), model.head_parameters())
    model.trunk[0].weight.sum().backward()
    with pytest.raises(RuntimeError, match=r"has a \.grad from another backward"):
        optimizer.backward(model.losses(batch(0)))
    optimizer.zero_grad()
    run(optimizer, model, range(2))


def test_a_search_without_weights_is_tried_again_until_the_first_success() -> None:
    """Zero-initialised heads: no gradient reaches the trunk in the first step."""
    model = net()
    for head in model.heads:
        nn.init.zeros_(head.weight)
    optimizer = fastmto.PUB(model.trunk.parameters(), model.head_parameters())
    with pytest.warns(RuntimeWarning, match="the last ones stay"):
        run(optimizer, model, [0])
    run(optimizer, model, [1, 2])
    assert optimizer.stats["held"] == 1
    assert optimizer.stats["searches"] == 2
    assert optimizer.weights.tolist() != [1.0, 1.0]


def test_a_head_that_was_converted_is_named_before_anything_moves() -> None:
    model = net()
    optimizer = fastmto.PUB(model.trunk.parameters(), model.head_parameters())
    run(optimizer, model, [0])
    head = model.heads[1]
    head.double()
    losses = [
        head(z.to(head.weight.dtype)).sum() for z, head in ((torch.zeros(4, 8), model.heads[0]),)
    ]
    with pytest.raises(RuntimeError, match=r"a task parameter of shape .*build"):
        optimizer.backward([losses[0], losses[0]])


def test_wrong_hyperparameters_of_a_group_are_refused_at_construction() -> None:
    model = net()
    heads = [[{"params": head, "betas": (2.0, 0.9)}] for head in model.head_parameters()]
    with pytest.raises(ValueError, match=r"betas\[0\] must lie in \[0, 1\), got 2.0"):
        fastmto.PUB(model.trunk.parameters(), heads)
    with pytest.raises(ValueError, match="betas must be a pair"):
        fastmto.PUB([{"params": list(model.trunk.parameters()), "betas": 0.9}], heads[:1])


def test_momentum_cannot_be_switched_on_later() -> None:
    model = net()
    optimizer = fastmto.PUB(model.trunk.parameters(), model.head_parameters(), rule="rmsprop")
    run(optimizer, model, [0])
    before = snapshot(optimizer, model)
    for group in optimizer.param_groups:
        group["momentum"] = 0.9
    optimizer.backward(model.losses(batch(1)))
    with pytest.raises(RuntimeError, match="cannot be switched on"):
        optimizer.step()
    assert_same(before, snapshot(optimizer, model))


def test_step_needs_backward_and_zero_grad_takes_it_back() -> None:
    model = net()
    optimizer = fastmto.PUB(model.trunk.parameters(), model.head_parameters())
    with pytest.raises(RuntimeError, match="call backward"):
        optimizer.step()
    optimizer.backward(model.losses(batch(0)))
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="call backward"):
        optimizer.step()


def test_closure() -> None:
    model = net()
    optimizer = fastmto.PUB(model.trunk.parameters(), model.head_parameters())

    def closure() -> float:
        optimizer.zero_grad()
        losses = model.losses(batch(0))
        optimizer.backward(losses)
        return sum(loss.item() for loss in losses)

    first = optimizer.step(closure)
    for _ in range(30):
        last = optimizer.step(closure)
    assert last < first


def test_two_micro_batches_are_one_batch() -> None:
    whole, parts = net(), net()
    optimizers = [
        fastmto.PUB(m.trunk.parameters(), m.head_parameters(), update_weights_every=2)
        for m in (whole, parts)
    ]
    for t in range(6):
        x = batch(t)
        optimizers[0].zero_grad()
        optimizers[0].backward(whole.losses(x))
        optimizers[0].step()
        optimizers[1].zero_grad()
        for half in (x[:8], x[8:]):
            optimizers[1].backward([loss / 2 for loss in parts.losses(half)])
        optimizers[1].step()
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_named_tasks_keep_their_order_and_may_stay_away() -> None:
    model = net()
    heads = {"click": list(model.heads[0].parameters()), "buy": list(model.heads[1].parameters())}
    optimizer = fastmto.PUB(model.trunk.parameters(), heads)
    a, b = model.losses(batch(0))
    optimizer.backward({"buy": b, "click": a})
    optimizer.step()
    before = [p.detach().clone() for p in heads["buy"]]
    optimizer.backward({"click": model.losses(batch(1))[0]})
    optimizer.step()
    assert_same(before, [p.detach() for p in heads["buy"]])
    with pytest.raises(ValueError, match="got also"):
        optimizer.backward({"clikc": model.losses(batch(1))[0]})


def test_a_stale_graph_is_refused_by_autograd() -> None:
    model = net()
    optimizer = fastmto.PUB(model.trunk.parameters(), model.head_parameters())
    stale = model.losses(batch(0))
    optimizer.backward(model.losses(batch(1)))
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(stale).backward()


def test_a_schedule_reaches_all_groups() -> None:
    model = net()
    optimizer = fastmto.PUB(model.trunk.parameters(), model.head_parameters(), 1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.0 if epoch else 1e-3)
    run(optimizer, model, [0])
    schedule.step()
    before = [p.detach().clone() for p in model.parameters()]
    run(optimizer, model, [1])
    assert_same(before, [p.detach() for p in model.parameters()])


def test_repr_names_what_matters() -> None:
    model = net()
    optimizer = fastmto.PUB(model.trunk.parameters(), model.head_parameters(), clippy=True)
    text = repr(optimizer)
    for part in ("PUB(", "tasks=2", "shared=128 parameters", "Adam(", "Clippy(", "lr: 0.001"):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"lr": -1.0}, "lr must be finite and >= 0, got -1.0"),
        ({"weight_decay": float("nan")}, "weight_decay must be finite"),
        ({"rule": "sgd"}, "rule must be one of adam, adagrad, rmsprop"),
        ({"scale": "norm"}, "scale must be one of mean_norm"),
        ({"between": "often"}, "between must be one of weighted"),
        ({"weighting": "mgdaa"}, "weighting must be one of bargaining, ccp"),
        ({"weighting": 3}, "weighting must be .* a callable"),
        ({"update_weights_every": 0}, "update_weights_every must be an integer >= 1, got 0"),
        ({"update_weights_every": 2.5}, "update_weights_every must be an integer"),
        ({"max_weight": 0}, "max_weight must be positive or None"),
        ({"adatask": True, "between": "weighted"}, "between must be 'per_task' with adatask"),
        ({"on_failure": "ignore"}, "on_failure must be one of hold, raise"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite must be one of skip, raise"),
    ],
)
def test_arguments_that_are_wrong_are_named(arguments: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        fastmto.PUB(parameters(0, torch.float32), [[], []], **arguments)


def test_parameters_that_are_wrong_are_named() -> None:
    good = nn.Parameter(torch.zeros(3))
    inner = nn.Parameter(torch.zeros(3)) + 1
    base = nn.Parameter(torch.zeros(4, 4))
    overlapping = nn.Parameter(base.data[1])
    cases = [
        (([], [[]]), "shared_parameters must hold at least one"),
        (([inner], [[]]), r"shared_parameters\[0\].*must be a Parameter or a leaf"),
        (([good], [[inner]]), r"task_parameters\[0\]\[0\].*must be a Parameter or a leaf"),
        (([good], {"a": [inner]}), r"task_parameters\['a'\]\[0\]"),
        (([good, good], [[]]), "listed once"),
        (([good], [[good]]), "listed once"),
        (([good, base, overlapping], [[]]), "share memory"),
        (([nn.Parameter(torch.zeros(3, dtype=torch.complex64))], [[]]), "real floating dtype"),
        (([good.data * 2], [[]]), "leaf that requires grad"),
        ((["w"], [[]]), r"shared_parameters\[0\] must be a parameter, got str"),
        ((good, [[]]), "shared_parameters must be an iterable, got Parameter"),
        (([nn.Parameter(torch.zeros(4, 6)[:, :3])], [[]]), "without gaps"),
        (([{"lr": 1.0}], [[]]), "must have the key 'params'"),
        (([good], [[nn.Parameter(torch.zeros(1, device="meta"))]]), "one device"),
    ]
    for (shared, tasks), match in cases:
        with pytest.raises(ValueError, match=match):
            fastmto.PUB(shared, tasks)


def test_groups_cannot_be_added_later() -> None:
    optimizer = fastmto.PUB(parameters(0, torch.float32), [[]])
    with pytest.raises(RuntimeError, match="build a new optimizer"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_a_weighting_may_write_into_its_gram_but_must_return_weights() -> None:
    shared = parameters(0, torch.float64)
    grads = gradients(0, shared, 2)
    optimizer = fastmto.PUB(shared, [[], []], weighting=lambda gram: gram.fill_(1.0)[0])
    optimizer.backward([linear_loss(shared, g) for g in grads])
    optimizer.step()
    assert not torch.equal(optimizer.gram, torch.ones(2, 2, dtype=torch.float64))
    optimizer.zero_grad()
    optimizer = fastmto.PUB(shared, [[], []], weighting=lambda gram: None)
    optimizer.backward([linear_loss(shared, g) for g in grads])
    with pytest.raises(ValueError, match="weighting must return weights, got NoneType"):
        optimizer.step()


def test_a_rate_that_goes_wrong_later_is_refused_before_anything_moves() -> None:
    model = net()
    optimizer = fastmto.PUB(model.trunk.parameters(), model.head_parameters())
    run(optimizer, model, [0])
    before = snapshot(optimizer, model)
    optimizer.param_groups[-1]["lr"] = float("nan")
    optimizer.backward(model.losses(batch(1)))
    with pytest.raises(ValueError, match="lr must be finite"):
        optimizer.step()
    assert_same(before, snapshot(optimizer, model))


def test_a_model_whose_parameters_were_replaced_is_noticed() -> None:
    model = net()
    optimizer = fastmto.PUB(model.trunk.parameters(), model.head_parameters())
    run(optimizer, model, range(2))
    model.trunk.load_state_dict(net(seed=1).trunk.state_dict(), assign=True)
    with pytest.raises(RuntimeError, match=r"replaced \(load_state_dict\(..., assign=True\)"):
        optimizer.backward(model.losses(batch(2)))


def test_clippy_adam_checks_gradients_and_groups_before_anything_moves() -> None:
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = fastmto.ClippyAdam([a, b], 0.1)
    a.grad, b.grad = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    with pytest.raises(NonFiniteError, match=r"gradient of a parameter of shape \(3,\)"):
        optimizer.step()
    assert torch.equal(a, torch.ones(3))
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = fastmto.ClippyAdam([a, table.weight], 0.1)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()
    assert torch.equal(a, torch.ones(3))
    with pytest.raises(ValueError, match="without gaps"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4)[::2])]})
    with pytest.raises(ValueError, match="listed once"):
        optimizer.add_param_group({"params": [a]})
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4))], "lr": 0.5})
    assert len(optimizer.param_groups) == 2


def test_a_weighting_of_the_wrong_shape_is_refused_before_anything_moves() -> None:
    shared = parameters(0, torch.float64)
    optimizer = fastmto.PUB(shared, [[], []], weighting=lambda gram: torch.ones(3))
    before = [p.detach().clone() for p in shared]
    optimizer.backward([linear_loss(shared, g) for g in gradients(0, shared, 2)])
    with pytest.raises(ValueError, match=r"weights of shape \(2,\), got \(3,\)"):
        optimizer.step()
    assert_same(before, [p.detach() for p in shared])


def test_bfloat16_autocast_works() -> None:
    model = net()
    optimizer = fastmto.PUB(model.trunk.parameters(), model.head_parameters(), 0.01)
    first = sum(loss.item() for loss in model.losses(batch(0)))
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16):
            losses = model.losses(batch(0))
        optimizer.zero_grad()
        optimizer.backward(losses)
        optimizer.step()
    assert sum(loss.item() for loss in model.losses(batch(0))) < 0.9 * first


@pytest.mark.parametrize("kwargs", [{}, {"clippy": True}, {"delayed": True}, {"adatask": True}])
def test_a_step_allocates_nothing_of_the_size_of_the_parameters(kwargs: dict) -> None:
    numel, shared = 1 << 16, nn.Parameter(torch.zeros(1 << 16))
    optimizer = fastmto.PUB([shared], [[], []], update_weights_every=1, **kwargs)
    directions = [torch.randn(numel), torch.randn(numel)]
    for _ in range(2):
        optimizer.backward([(shared * d).sum() for d in directions])
        optimizer.step()
    assert [rows.shape for rows in optimizer.gradients.rows] == [(2, numel)]
    optimizer.backward([(shared * d).sum() for d in directions])
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    assert sum(max(e.self_cpu_memory_usage, 0) for e in profile.events()) < numel / 16


@pytest.mark.parametrize(
    "weighting",
    [
        fastmto.weightings.MGDA(),
        fastmto.weightings.CAGrad(),
        fastmto.weightings.IMTLG(),
        fastmto.weightings.UPGrad(),
        fastmto.weightings.DualProj(),
        fastmto.weightings.NashMTL(),
        fastmto.weightings.FairGrad(alpha=2.0),
        fastmto.weightings.AlignedMTL(),
        fastmto.weightings.PCGrad(seed=1),
    ],
    ids=lambda weighting: type(weighting).__name__,
)
def test_every_weighting_balances_updates(weighting) -> None:
    """The joint update is sum_i w_i u_i with the weighting's w of the updates' Gram matrix."""
    model = net(0, n_tasks=3).double()
    trunk = list(model.trunk.parameters())
    optimizer = fastmto.PUB(
        trunk, model.head_parameters(), lr=1e-2, weighting=weighting, update_weights_every=1,
        scale="none", max_weight=None,
    )  # fmt: skip
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)).double()
    losses = model.losses(x)
    # Adam's first update of g is g / (|g| + eps).
    rows = torch.stack(
        [
            torch.cat([
                (g / (g.abs() + 1e-8)).flatten()
                for g in torch.autograd.grad(loss, trunk, retain_graph=True)
            ])
            for loss in losses
        ]
    )  # fmt: skip
    before = torch.cat([p.detach().flatten() for p in trunk])
    weighting.reset()
    expected = weighting(rows @ rows.T)
    weighting.reset()
    optimizer.backward(losses)
    optimizer.step()
    assert optimizer.stats["held"] == 0
    moved = torch.cat([p.detach().flatten() for p in trunk]) - before
    torch.testing.assert_close(optimizer.weights, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(moved, -1e-2 * expected @ rows, rtol=1e-6, atol=1e-9)


def test_weights_whose_sum_is_not_positive_cannot_be_scaled_to_sum_to_t() -> None:
    shared = [nn.Parameter(torch.ones(3))]
    optimizer = fastmto.PUB(
        shared, [[], []], weighting=lambda gram: [-1.0, 0.5], scale="sum", on_failure="raise"
    )
    optimizer.backward([linear_loss(shared, g) for g in gradients(0, shared, 2)])
    with pytest.raises(SolverError, match="the weights or their scale are not finite"):
        optimizer.step()

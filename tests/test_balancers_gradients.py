"""Gradient-level balancers: gradients taken, joined and delivered; what goes wrong on the way."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from problems import gradients, linear_loss, net, parameters
from torch import Tensor, nn

import fastmto
from fastmto.balancers.gradient_balancer import GradientBalancer
from fastmto.engine.flat import FlatLayout
from fastmto.errors import NonFiniteError, SolverError
from fastmto.reference import gradients as reference

T = 3
#: Methods whose joint gradient is sum_i weights_i g_i.
WEIGHTED = [
    "mgda",
    "pcgrad",
    "cagrad",
    "imtl_g",
    "imtl",
    "nashmtl",
    "upgrad",
    "dualproj",
    "fairgrad",
    "aligned_mtl",
]
ALL = [*WEIGHTED, "mgda_ub", "graddrop", "db_mtl"]
close = torch.testing.assert_close


def explicit(model, x: Tensor, tasks=range(T)) -> list[list[Tensor]]:
    """Every task's gradients on the trunk, by plain autograd."""
    losses = model.losses(x)
    shared = list(model.trunk.parameters())
    return [torch.autograd.grad(losses[i], shared, retain_graph=True) for i in tasks]


def own_heads(model, x: Tensor) -> list[list[Tensor]]:
    losses = model.losses(x)
    return [
        torch.autograd.grad(losses[i], head, retain_graph=True)
        for i, head in enumerate(model.head_parameters())
    ]


def data(seed: int = 0, rows: int = 16) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)).double()


def model_of(seed: int = 0):
    return net(seed, n_tasks=T).double()


def call(balancer, model, x, losses=None, **kwargs):
    losses = model.losses(x) if losses is None else losses
    kwargs.setdefault("task_specific_parameters", model.head_parameters())
    return balancer.backward(losses, shared_parameters=model.trunk.parameters(), **kwargs)


def grads(parameters) -> list[Tensor]:
    return [p.grad.clone() for p in parameters]


class Still(fastmto.weightings.Weighting):
    """Fixed weights through the whole Gram path."""

    def __init__(self, *weights: float) -> None:
        self.weights = weights

    def __call__(self, gram, tasks=None):
        indices = range(len(self.weights)) if tasks is None else tasks
        return torch.tensor([self.weights[i] for i in indices], dtype=gram.dtype)


class Fixed(fastmto.balancers.GramBalancer):
    key = "fixed"

    def __init__(self, *weights: float, **options) -> None:
        super().__init__(Still(*weights), **options)


class Failing(fastmto.balancers.GramBalancer):
    """Fails in the searches it is told to."""

    key = "failing"

    def __init__(self, *fails: bool, **options) -> None:
        self.fails = list(fails)
        super().__init__(Still(1.0, 2.0, 3.0), **options)

    def _solve(self, gram, active, batch):
        if self.fails.pop(0):
            raise SolverError("no weights today", "near_stationary")
        return super()._solve(gram, active, batch)


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("given", ["owned", "flat", "walked"])
def test_grad_is_the_weighted_sum_and_heads_get_their_own(name, given):
    model, x = model_of(), data()
    heads = {
        "owned": model.head_parameters(),
        "flat": [p for head in model.head_parameters() for p in head],
        "walked": None,
    }[given]
    balancer = fastmto.get(name, n_tasks=T)
    loss, info = call(balancer, model, x, task_specific_parameters=heads)
    weights = info.weights
    expected = explicit(model, x)
    for k, p in enumerate(model.trunk.parameters()):
        close(p.grad, sum(w * g[k] for w, g in zip(weights, expected, strict=True)))
    for head, own in zip(model.head_parameters(), own_heads(model, x), strict=True):
        for p, g in zip(head, own, strict=True):
            close(p.grad, g)  # imtl's scales are exp(0) = 1 in the first step
    values = torch.stack(model.losses(x)).detach()
    close(loss, weights @ values)
    flat = torch.stack([torch.cat([g.flatten() for g in gs]) for gs in expected])
    close(info.gram, flat @ flat.T)
    close(
        info["cosines"], torch.nn.functional.normalize(flat) @ torch.nn.functional.normalize(flat).T
    )
    assert info.status == "solved"
    assert info.passes == "loop"
    assert balancer.stats["backwards"] == T


def test_heads_with_the_weighted_loss():
    model, x = model_of(), data()
    call(Fixed(1.0, 0.5, 0.25, heads="weighted"), model, x)
    for w, head, own in zip(
        (1.0, 0.5, 0.25), model.head_parameters(), own_heads(model, x), strict=True
    ):
        for p, g in zip(head, own, strict=True):
            close(p.grad, w * g)


@pytest.mark.parametrize("at_once", [1, 2, 3, 8])
@pytest.mark.parametrize("given", [True, False])
def test_batched_backward_gives_the_loop(at_once, given):
    x, shared, tasks = data(), [], []
    for passes in ("loop", "batched"):
        model = model_of()
        balancer = fastmto.get("nashmtl", passes=passes, at_once=at_once)
        for step in range(2):
            losses = model.losses(x)
            if step == 1:
                losses[1] = None
            model.zero_grad()
            heads = model.head_parameters() if given else None
            _, info = call(balancer, model, x, losses, task_specific_parameters=heads)
            shared.append(grads(model.trunk.parameters()))
            tasks.append([p.grad for p in model.heads.parameters()])
    assert info.passes == ("loop" if at_once == 1 else f"batched ({min(at_once, 2)} at once)")
    assert balancer.stats["backwards"] == {1: 5, 2: 3, 3: 2, 8: 2}[at_once]
    for loop, batched in ((0, 2), (1, 3)):
        close(shared[loop], shared[batched])
        for a, b in zip(tasks[loop], tasks[batched], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                close(a, b)


class NoBatching(torch.autograd.Function):
    """A backward that vmap cannot follow."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return torch.as_tensor(grad.numpy() * 2)


def test_a_model_that_cannot_be_batched():
    model, x = model_of(), data()

    def losses():
        return [NoBatching.apply(loss) for loss in model.losses(x)]

    with pytest.raises(RuntimeError):
        call(fastmto.get("nashmtl", passes="batched"), model, x, losses())
    assert all(p.grad is None for p in model.parameters())
    # What "auto" does on an accelerator, seen here by taking the choice by hand.
    balancer = fastmto.get("nashmtl", passes="auto")
    balancer._batches = lambda buffers: True
    with pytest.warns(RuntimeWarning, match="batched backward failed"):
        _, info = call(balancer, model, x, losses())
    assert info.passes.startswith("loop (batched failed: ")
    expected = explicit(model, x)
    for k, p in enumerate(model.trunk.parameters()):
        close(p.grad, 2 * sum(w * g[k] for w, g in zip(info.weights, expected, strict=True)))
    _, info = call(balancer, model, x, losses())  # no second attempt, no second warning
    assert info.passes.startswith("loop (batched failed: ")


def test_gradients_add_up_over_calls_and_on_foreign_grads():
    model, x, y = model_of(), data(0), data(1)
    balancer = Fixed(1.0, 2.0, 3.0)
    call(balancer, model, x)
    first = grads(model.parameters())
    model.zero_grad()
    call(balancer, model, y)
    second = grads(model.parameters())
    call(balancer, model, x)
    close(grads(model.parameters()), [a + b for a, b in zip(first, second, strict=True)])
    model.zero_grad(set_to_none=False)
    call(balancer, model, x)
    close(grads(model.parameters()), first)
    model.zero_grad()
    sum(p.sum() for p in model.parameters()).backward()
    call(balancer, model, y)
    close(grads(model.parameters()), [1 + g for g in second])


def test_an_accumulated_gradient_outlives_the_next_step():
    model, x = model_of(), data()
    balancer = Fixed(1.0, 2.0, 3.0)
    call(balancer, model, x)
    held = grads(model.parameters())
    kept = [p.grad for p in model.parameters()]
    call(balancer, model, x)  # moves the old sums into memory of their own before it writes
    close(grads(model.parameters()), [2 * g for g in held])
    assert all(p.grad is not g for p, g in zip(model.parameters(), kept, strict=True))


@pytest.mark.parametrize("name", [*ALL, "fixed"])
def test_one_backward_between_searches(name):
    model, x = model_of(), data()
    options = {"level": "features"} if name == "mgda_ub" else {}
    balancer = (
        Fixed(0.5, 2.0, 1.0, update_weights_every=3)
        if name == "fixed"
        else fastmto.get(name, update_weights_every=3, **options)
    )
    counts = []
    for _step in range(4):
        model.zero_grad()
        before = balancer.stats["backwards"]
        z = model.trunk(x)
        losses = [
            (head(z.tanh()) - i - x.sum(1, keepdim=True)).pow(2).mean()
            for i, head in enumerate(model.heads)
        ]
        _, info = call(balancer, model, x, losses, features=z)
        counts.append(balancer.stats["backwards"] - before)
        if counts[-1] < T:
            weights = info.weights
            assert info.gram is None
            assert info.result is None
            shared = list(model.trunk.parameters())
            z = model.trunk(x)
            losses = [
                (head(z.tanh()) - i - x.sum(1, keepdim=True)).pow(2).mean()
                for i, head in enumerate(model.heads)
            ]
            total = sum(w * loss for w, loss in zip(weights.tolist(), losses, strict=True))
            close(grads(shared), list(torch.autograd.grad(total, shared, retain_graph=True)))
            for i, head in enumerate(model.head_parameters()):
                factor = 1 / losses[i].detach() if name == "db_mtl" else 1
                own = torch.autograd.grad(losses[i], head, retain_graph=True)
                close(grads(head), [factor * g for g in own])
    extra = name == "mgda_ub"
    assert counts == [T + extra, 1 + extra, 1 + extra, T + extra]
    assert balancer.stats["searches"] == 2


def test_features_level_is_the_gram_there_and_one_pass_through_the_trunk():
    model, x = model_of(), data()

    def forward():
        z = model.trunk(x)
        return z, [
            (head(z.tanh()) * (i + 1) - 1).pow(2).mean() for i, head in enumerate(model.heads)
        ]

    z, losses = forward()
    rows = torch.stack(
        [torch.autograd.grad(loss, z, retain_graph=True)[0].flatten() for loss in losses]
    )
    balancer = fastmto.get("mgda_ub")
    _, info = call(balancer, model, x, losses, features=z)
    close(info.gram, rows @ rows.T)
    assert balancer.stats["backwards"] == T + 1
    z, losses = forward()
    total = sum(w * loss for w, loss in zip(info.weights.tolist(), losses, strict=True))
    shared = list(model.trunk.parameters())
    close(grads(shared), list(torch.autograd.grad(total, shared, retain_graph=True)))
    # Several tensors, another batch size, no list of the trunk's parameters.
    for rows in (16, 5):
        model.zero_grad()
        h = model.trunk[0](data(3, rows)).tanh()
        features = list(h.unbind(1))
        losses = [head(torch.stack(features, 1)).pow(2).mean() for head in model.heads]
        _, info = balancer.backward(losses, features=features)
        h = model.trunk[0](data(3, rows)).tanh()
        losses = [head(h).pow(2).mean() for head in model.heads]
        total = sum(w * loss for w, loss in zip(info.weights.tolist(), losses, strict=True))
        first = list(model.trunk[0].parameters())
        close(grads(first), list(torch.autograd.grad(total, first)))
        assert model.heads[0].weight.grad is not None


def test_what_is_missing_is_named():
    model, x = model_of(), data()
    with pytest.raises(ValueError, match=r"shared_parameters must be given to NashMTL.backward"):
        fastmto.get("nashmtl").backward(model.losses(x))
    with pytest.raises(ValueError, match=r"features must be given to MGDAUB.backward"):
        call(fastmto.get("mgda_ub"), model, x)
    with pytest.raises(ValueError, match=r"features\[0\] \(shape \(2,\)\) requires no grad"):
        call(fastmto.get("mgda_ub"), model, x, features=torch.ones(2))
    model.trunk.requires_grad_(False)
    with pytest.raises(ValueError, match=r"shared_parameters must hold at least one .* frozen"):
        call(fastmto.get("cagrad"), model, x)
    model.trunk.requires_grad_(True)
    with pytest.raises(ValueError, match="must hold 2 tasks, got 3"):
        call(fastmto.get("cagrad", n_tasks=2), model, x)
    with pytest.raises(ValueError, match="one iterable of parameters, or 3 of them"):
        call(fastmto.get("cagrad"), model, x, task_specific_parameters=model.head_parameters()[:2])
    stranger = nn.Parameter(torch.zeros(3).double())
    with (
        pytest.warns(RuntimeWarning, match="10 parameters that are neither in shared_parameters"),
        pytest.raises(RuntimeError, match="no loss reaches shared_parameters"),
    ):
        fastmto.get("cagrad").backward(model.losses(x), [stranger], [])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("passes", ["loop", "batched"])
def test_a_task_that_does_not_touch_what_is_shared(passes):
    model, x = model_of(), data()
    losses = model.losses(x)
    losses[1] = model.heads[1].bias.pow(2).sum() * 3
    balancer = fastmto.get("nashmtl", passes=passes)
    _, info = call(balancer, model, x, losses)
    assert info.gram.shape == (2, 2)
    assert balancer.weights[1] == 1.0
    assert balancer.stats["untouched"] == 1
    close(model.heads[1].bias.grad, 6 * model.heads[1].bias.detach())
    assert model.heads[1].weight.grad is None
    expected = explicit(model, x, [0, 2])
    for k, p in enumerate(model.trunk.parameters()):
        close(p.grad, info.weights[0] * expected[0][k] + info.weights[2] * expected[1][k])


@pytest.mark.parametrize("name", ALL)
def test_absent_tasks_by_name(name):
    model, x = model_of(), data()
    balancer = fastmto.get(name, n_tasks=T)
    names = ["click", "buy", "like"]
    z = model.trunk(x)
    losses = [(head(z.tanh()) - i).pow(2).mean() for i, head in enumerate(model.heads)]
    call(balancer, model, x, dict(zip(names, losses, strict=True)), features=z)
    kept = balancer.weights.clone()
    model.zero_grad()
    z = model.trunk(data(1))
    losses = [(head(z.tanh()) - i).pow(2).mean() for i, head in enumerate(model.heads)]
    _, info = call(balancer, model, x, {"like": losses[2], "click": losses[0]}, features=z)
    assert info.tasks == names
    assert info.weights[1] == kept[1]
    assert balancer.stats["absent"] == 1
    assert model.heads[1].weight.grad is None
    with pytest.raises(ValueError, match=r"got also \['buyy'\]"):
        call(balancer, model, x, {"buyy": losses[0]}, features=z)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite(name, bad):
    """The loss is finite, its gradient is not: nothing is written."""

    class Break(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * bad

    model, x = model_of(), data()

    def broken():
        z = model.trunk(x)
        losses = [(head(z.tanh()) - i).pow(2).mean() for i, head in enumerate(model.heads)]
        losses[1] = (model.heads[1](Break.apply(z).tanh()) - 1).pow(2).mean()
        return z, losses

    balancer = fastmto.get(name, n_tasks=T)
    before = copy.deepcopy(balancer.state_dict())
    z, losses = broken()
    with pytest.warns(RuntimeWarning, match=r"step skipped: the gradient of losses\[1\]"):
        _, info = call(balancer, model, x, losses, features=z)
    assert info.skipped == "the gradient of losses[1] is not finite"
    assert balancer.stats["skipped"] == 1
    assert balancer.stats["steps"] == 0
    assert all(p.grad is None for p in model.parameters())
    after = balancer.state_dict()
    assert torch.equal(before["weights"], after["weights"])
    z, losses = broken()
    with pytest.raises(NonFiniteError, match=r"losses\[1\]"):
        call(fastmto.get(name, n_tasks=T, on_nonfinite="raise"), model, x, losses, features=z)
    assert all(p.grad is None for p in model.parameters())


def test_a_search_without_answer_is_held_or_raised():
    model, x = model_of(), data()
    balancer = Failing(True, False, True, update_weights_every=2)
    seen = []
    for step in range(4):
        model.zero_grad()
        if step in (0, 2):
            with pytest.warns(RuntimeWarning, match="weights held: near_stationary"):
                _, info = call(balancer, model, x)
            assert info.status == "near_stationary"
        else:
            _, info = call(balancer, model, x)
        seen.append(info.weights.tolist())
        expected = explicit(model, x)
        for k, p in enumerate(model.trunk.parameters()):
            close(p.grad, sum(w * g[k] for w, g in zip(seen[-1], expected, strict=True)))
    # The first search is made again until it succeeds; the phase is that of the steps made.
    assert seen == [[1.0] * 3, [1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
    assert balancer.stats["held"] == 2
    assert balancer.stats["searches"] == 3
    model.zero_grad()
    with pytest.raises(SolverError, match="no weights today"):
        call(Failing(True, on_failure="raise"), model, x)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_resumes_bit_for_bit(name, how):
    def steps(balancer, model, optimizer, first, last):
        for step in range(first, last):
            x = data(step)
            optimizer.zero_grad()
            z = model.trunk(x)
            losses = [
                (head(z.tanh()) - (i + 1) * x[:, :1].sin()).pow(2).mean() + 0.1
                for i, head in enumerate(model.heads)
            ]
            if step == 2:
                losses[0] = None
            call(balancer, model, x, losses, features=z)
            optimizer.step()

    def start():
        model = model_of()
        balancer = fastmto.get(name, n_tasks=T, update_weights_every=2)
        learned = [{"params": balancer.parameters()}] if balancer.parameters() else []
        optimizer = torch.optim.Adam(
            [{"params": list(model.parameters())}, *learned], lr=1e-2, foreach=False
        )
        return model, balancer, optimizer

    model, balancer, optimizer = start()
    steps(balancer, model, optimizer, 0, 7)
    other, resumed, adam = start()
    steps(resumed, other, adam, 0, 4)
    if how == "state_dict":
        saved = pickle.loads(
            pickle.dumps((other.state_dict(), resumed.state_dict(), adam.state_dict()))
        )
        other, resumed, adam = start()
        other.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        adam.load_state_dict(saved[2])
    elif not resumed.parameters():
        resumed = (
            copy.deepcopy(resumed) if how == "deepcopy" else pickle.loads(pickle.dumps(resumed))
        )
    steps(resumed, other, adam, 4, 7)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(balancer.weights, resumed.weights)
    assert balancer.stats == resumed.stats


def test_a_state_of_something_else_is_refused():
    state = fastmto.get("nashmtl", n_tasks=T).state_dict()
    with pytest.raises(ValueError, match="must be of the method 'cagrad', got 'nashmtl'"):
        fastmto.get("cagrad", n_tasks=T).load_state_dict(state)
    with pytest.raises(ValueError, match="must be of 2 tasks, got 3"):
        fastmto.get("nashmtl", n_tasks=2).load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", WEIGHTED)
def test_odd_tensors_of_many_shapes(name, dtype):
    shared = parameters(0, dtype)
    shared.append(nn.Parameter(torch.randn(4, 6).double()))  # a second dtype
    gap = nn.Parameter(torch.randn(6, 6).to(dtype)[:, ::2])  # with gaps
    shared.append(gap)
    explicit = [
        [(g / 100).to(p.dtype) for g, p in zip(gs, shared, strict=True)]
        for gs in gradients(1, shared, 2)
    ]
    wide = [p.double() for p in shared]
    losses = [linear_loss(wide, [g.double() for g in gs]) for gs in explicit]
    _, info = fastmto.get(name).backward(losses, shared_parameters=shared)
    rows = torch.stack([torch.cat([g.double().flatten() for g in gs]) for gs in explicit])
    torch.testing.assert_close(info.gram, rows @ rows.T, rtol=1e-5, atol=0)
    for k, p in enumerate(shared):
        expected = sum(
            w * gs[k].double() for w, gs in zip(info.weights.tolist(), explicit, strict=True)
        )
        assert p.grad.shape == p.shape
        assert p.grad.dtype == p.dtype
        close(p.grad, expected.to(p.dtype))


def test_mgda_normalizations():
    model, x = model_of(), data()
    losses = torch.stack(model.losses(x)).detach()
    flat = torch.stack([torch.cat([g.flatten() for g in gs]) for gs in explicit(model, x)])
    lengths = flat.norm(dim=1)
    divisors = {
        "none": torch.ones(T),
        "l2": lengths,
        "loss": losses,
        "loss+": losses * lengths,
    }
    for normalization, divisor in divisors.items():
        _, info = call(fastmto.get("mgda", normalization=normalization), model, x)
        g = flat / divisor[:, None]
        joint = info.weights @ g
        close(info.weights.sum(), torch.ones(()).double())
        # The shortest vector of the hull: no gradient is shorter along it.
        assert ((g @ joint - joint @ joint) >= -1e-10 * (joint @ joint)).all()
    shifted = model.losses(x)
    shifted[1] = shifted[1] - 100
    with pytest.raises(ValueError, match=r"losses\[1\] must be positive: normalization='loss'"):
        call(fastmto.get("mgda", normalization="loss"), model, x, shifted)
    with pytest.raises(ValueError, match="normalization must be one of"):
        fastmto.get("mgda", normalization="loss-")


def test_imtl_learns_its_scales():
    model, x = model_of(), data()
    balancer = fastmto.get("imtl", n_tasks=T)
    with torch.no_grad():
        for scale, value in zip(balancer.parameters(), (0.5, -1.0, 0.25), strict=True):
            scale.fill_(value)
    factors = torch.stack(balancer.parameters()).detach().double().exp()
    losses = torch.stack(model.losses(x)).detach()
    _, info = call(balancer, model, x)
    flat = torch.stack([torch.cat([g.flatten() for g in gs]) for gs in explicit(model, x)])
    scaled = factors[:, None] * flat
    joint = info.weights @ flat
    projections = scaled @ joint / scaled.norm(dim=1)
    close(projections, projections[:1].expand(T))
    close((info.weights / factors).sum(), torch.ones(()).double())
    close(torch.stack(grads(balancer.parameters())), (factors * losses - 1).float())
    for i, (head, own) in enumerate(zip(model.head_parameters(), own_heads(model, x), strict=True)):
        close(grads(head), [factors[i] * g for g in own])
    with pytest.raises(ValueError, match="n_tasks must be given"):
        fastmto.get("imtl").parameters()


def test_db_mtl_refuses_losses_without_logarithm():
    model, x = model_of(), data()
    losses = model.losses(x)
    losses[2] = losses[2] - 100
    with pytest.raises(ValueError, match=r"losses\[2\] must be positive: its logarithm is taken"):
        call(fastmto.get("db_mtl"), model, x, losses)
    assert all(p.grad is None for p in model.parameters())


def test_pub_is_the_optimizer_behind_the_same_call():
    ours, reference, x = model_of(), model_of(), data()
    balancer = fastmto.get("pub", lr=1e-2, update_weights_every=2)
    adam = torch.optim.Adam(ours.parameters(), lr=1.0)
    optimizer = fastmto.PUB(
        reference.trunk.parameters(), reference.head_parameters(), lr=1e-2, update_weights_every=2
    )
    for step in range(5):
        adam.zero_grad()
        call(balancer, ours, data(step))
        adam.step()  # finds no gradients
        optimizer.zero_grad()
        optimizer.backward(reference.losses(data(step)))
        optimizer.step()
        if step == 2:  # from here on a resumed one
            state = pickle.loads(pickle.dumps(balancer.state_dict()))
            balancer = fastmto.get("pub", lr=1e-2, update_weights_every=2)
            balancer.load_state_dict(state)
    for a, b in zip(ours.parameters(), reference.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(balancer.weights, optimizer.weights)
    with pytest.raises(ValueError, match=r"shared_parameters must be given to PUB\.backward"):
        fastmto.get("pub").backward(ours.losses(x))


def test_arguments_out_of_range():
    for options, message in [
        ({"level": "trunk"}, "level must be one of parameters, features, got 'trunk'"),
        ({"heads": "mine"}, "heads must be one of own, weighted"),
        ({"passes": "vmap"}, "passes must be one of auto, loop, batched"),
        ({"at_once": 0}, "at_once must be an integer >= 1 or None, got 0"),
        ({"on_failure": "ignore"}, "on_failure must be one of hold, raise"),
        ({"on_nonfinite": "hold"}, "on_nonfinite must be one of skip, raise, ignore"),
        ({"update_weights_every": 0}, "update_weights_every must be an integer >= 1, got 0"),
        ({"n_tasks": 0}, "n_tasks must be an integer >= 1 or None, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            fastmto.get("nashmtl", **options)
    with pytest.raises(TypeError, match="colour"):
        fastmto.get("nashmtl", colour="red")


def test_bases_are_abstract_and_balancers_say_what_they_are():
    with pytest.raises(TypeError, match="abstract"):
        GradientBalancer()
    assert repr(fastmto.get("graddrop", n_tasks=2)) == (
        "GradDrop(n_tasks=2, leak=None, seed=0, update_weights_every=1)"
    )


def test_a_grad_whose_data_was_replaced():
    """The manual clipping and all-reduce idiom does not cut the buffers off."""
    model, balancer = model_of(), Fixed(1.0, 2.0, 3.0)
    for step in range(3):
        model.zero_grad()
        call(balancer, model, data(step))
        expected = explicit(model, data(step))
        for k, p in enumerate(model.trunk.parameters()):
            close(p.grad, sum((i + 1) * g[k] for i, g in enumerate(expected)))
            p.grad.data = p.grad.data * 0.5


@pytest.mark.parametrize("given", ["walked", "reordered"])
def test_a_copy_finds_the_heads_of_a_run_that_began_with_an_absent_task(given):
    model, x = model_of(), data()
    balancer = fastmto.get("nashmtl", update_weights_every=5)
    heads = [p for head in model.head_parameters() for p in head]
    call(balancer, model, x, [*model.losses(x)[:2], None], task_specific_parameters=None)
    state = pickle.loads(pickle.dumps(balancer.state_dict()))
    resumed = fastmto.get("nashmtl", update_weights_every=5)
    resumed.load_state_dict(state)
    own = own_heads(model, x)
    for other in (copy.deepcopy(balancer), resumed):
        for _step in range(2):
            model.zero_grad()
            listed = None if given == "walked" else heads[::-1]
            call(other, model, x, task_specific_parameters=listed)
            for head, expected in zip(model.head_parameters(), own, strict=True):
                close(grads(head), list(expected))


def test_heads_whose_first_gradients_are_zero():
    """One vector of losses connects every head to every task; zeros do not tell whose it is."""
    torch.manual_seed(0)
    trunk = nn.Linear(4, 6)
    heads = nn.ModuleList(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)) for _ in "ab")
    for head in heads:
        nn.init.zeros_(head[2].weight)
    sgd = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], lr=0.1)
    balancer = fastmto.get("upgrad", update_weights_every=5)
    x, y = torch.randn(8, 4), torch.randn(8, 2)
    for step in range(4):
        sgd.zero_grad()
        losses = (torch.cat([head(trunk(x)) for head in heads], 1) - y).pow(2).mean(0)
        balancer.backward(losses, trunk.parameters(), heads.parameters())
        if step:
            own = torch.autograd.grad(
                (torch.cat([head(trunk(x)) for head in heads], 1) - y).pow(2).mean(0).sum(),
                list(heads.parameters()),
            )
            close(grads(heads.parameters()), list(own))
        sgd.step()
    assert balancer.stats["searches"] == 1


def test_losses_in_another_order_do_not_pass():
    model, x = model_of(), data()
    balancer = Fixed(1.0, 2.0, 3.0)
    call(balancer, model, x)
    model.zero_grad()
    call(balancer, model, x, model.losses(x)[::-1])  # noticed here, looked into in the next
    with pytest.raises(ValueError, match=r"tasks \[0, 2\] have gradients on a head"):
        call(balancer, model, x, model.losses(x)[::-1])
    with pytest.raises(ValueError, match="losses must stay a sequence of 3 tasks"):
        call(balancer, model, x, dict(zip("abc", model.losses(x), strict=True)))


def test_heads_of_named_tasks():
    model, x = model_of(), data()
    losses = dict(zip("abc", model.losses(x), strict=True))
    heads = dict(zip("abc", model.head_parameters(), strict=True))
    balancer = Fixed(1.0, 2.0, 3.0)
    call(balancer, model, x, losses, task_specific_parameters=dict(reversed(heads.items())))
    for head, own in zip(model.head_parameters(), own_heads(model, x), strict=True):
        close(grads(head), list(own))
    with pytest.raises(ValueError, match="task_specific_parameters must name tasks as losses"):
        call(
            balancer,
            model,
            x,
            dict(zip("abc", model.losses(x), strict=True)),
            task_specific_parameters={"d": heads["a"]},
        )


def test_features_that_would_count_twice_or_not_at_all():
    model, x = model_of(), data()
    balancer = fastmto.get("mgda_ub")
    h = model.trunk[0](x).tanh()
    z = model.trunk[2](h)
    losses = [head(z).pow(2).mean() for head in model.heads]
    with pytest.raises(ValueError, match=r"features\[0\] is computed from another"):
        balancer.backward(losses, features=[z, h])
    around = [loss + model.trunk[0].bias.sum() for loss in losses]
    with pytest.raises(ValueError, match="is reached without passing through them"):
        balancer.backward(around, model.trunk.parameters(), features=z)
    cut = z.detach().requires_grad_()
    with pytest.raises(ValueError, match=r"features\[0\] is a leaf"):
        balancer.backward(
            [head(cut).sum() for head in model.heads], model.trunk.parameters(), features=cut
        )
    # Without the trunk's parameters the joint gradient stays there, for a pass of one's own.
    losses = [head(cut).sum() for head in model.heads]
    _, info = balancer.backward(losses, features=cut)
    close(
        cut.grad,
        sum(
            w * torch.autograd.grad(head(cut).sum(), cut)[0]
            for w, head in zip(info.weights.tolist(), model.heads, strict=True)
        ),
    )
    with pytest.raises(ValueError, match="level must be 'features', got 'parameters'"):
        fastmto.get("mgda_ub", level="parameters")
    with pytest.raises(ValueError, match="level must be 'parameters': features of different"):
        fastmto.get("db_mtl", level="features")


def test_parameters_that_are_listed_wrongly():
    model, x = model_of(), data()
    shared = list(model.trunk.parameters())
    with pytest.raises(ValueError, match=r"must be listed once.* shape \(8, 6\) is there twice"):
        fastmto.get("cagrad").backward(model.losses(x), [*shared, shared[0]], [])
    with pytest.raises(ValueError, match="must be listed once"):
        fastmto.get("cagrad").backward(model.losses(x), shared, shared[:1])
    # Generators, exhausted after the first step: their parameters are then in no list.
    heads = [head.parameters() for head in model.heads]
    balancer = fastmto.get("cagrad")
    call(balancer, model, x, task_specific_parameters=heads)
    with pytest.warns(RuntimeWarning, match="reach 6 parameters that are neither") as caught:
        call(balancer, model, x, task_specific_parameters=heads)
    assert caught[0].filename == __file__


def test_a_reentrant_checkpoint_is_refused():
    model, x = model_of(), data().requires_grad_()
    z = torch.utils.checkpoint.checkpoint(model.trunk[0], x, use_reentrant=True)
    losses = [head(model.trunk[2](z)).sum() for head in model.heads]
    with pytest.raises(RuntimeError, match="with use_reentrant=False"):
        fastmto.get("cagrad").backward(losses, model.trunk.parameters())


def test_a_late_task_is_searched_for_at_once():
    model, x = model_of(), data()
    balancer = fastmto.get("mgda", update_weights_every=100)
    call(balancer, model, x, [*model.losses(x)[:2], None])
    assert balancer.weights[2] == 1.0
    call(balancer, model, x)
    assert balancer.stats["searches"] == 2
    close(balancer.weights.sum(), torch.ones(()).double())
    call(balancer, model, x)
    assert balancer.stats["searches"] == 2


def test_an_absent_task_of_imtl_stands_still():
    model, x = model_of(), data()
    balancer = fastmto.get("imtl", n_tasks=T)
    adam = torch.optim.Adam(balancer.parameters(), lr=0.1)
    for step in range(4):
        adam.zero_grad()
        model.zero_grad()
        losses = model.losses(x)
        if step > 1:
            losses[1] = None
        call(balancer, model, x, losses)
        adam.step()
        if step == 1:
            kept = balancer.parameters()[1].clone()
    assert torch.equal(balancer.parameters()[1], kept)


def test_parameters_converted_or_frozen_between_steps():
    model, x = model_of(), data()
    balancer = Fixed(1.0, 2.0, 3.0)
    call(balancer, model, x, task_specific_parameters=None)
    model.zero_grad()
    model.float()
    call(balancer, model, x, model.losses(x.float()), task_specific_parameters=None)
    assert model.trunk[0].weight.grad.dtype == torch.float32
    model.zero_grad()
    model.heads[0].requires_grad_(False)
    call(balancer, model, x, model.losses(x.float()), task_specific_parameters=None)
    assert model.heads[0].weight.grad is None
    assert model.heads[1].weight.grad is not None


def test_the_joint_gradient_between_searches_is_looked_at():
    model, x = model_of(), data()
    balancer = Fixed(1.0, 2.0, 3.0, update_weights_every=2)
    call(balancer, model, x)
    model.zero_grad()
    losses = model.losses(x)
    losses[0].register_hook(lambda grad: grad * float("inf"))
    with pytest.warns(RuntimeWarning, match="gradient of the weighted losses is not finite") as w:
        call(balancer, model, x, losses)
    assert w[0].filename == __file__
    assert all(p.grad is None for p in model.parameters())


def test_pub_wants_the_same_parameters_at_every_call():
    model, other, x = model_of(), model_of(1), data()
    balancer = fastmto.get("pub")
    call(balancer, model, x)
    with pytest.raises(ValueError, match="must be those of the first call"):
        call(balancer, other, x)
    with pytest.raises(ValueError, match="task_specific_parameters must be given"):
        call(fastmto.get("pub"), model, x, task_specific_parameters=None)


def flat_grads(model) -> np.ndarray:
    return torch.cat([p.grad.flatten() for p in model.trunk.parameters()]).numpy()


REFERENCES = {
    "mgda": reference.mgda,
    "cagrad": lambda g: reference.cagrad(g, 0.4, 1),
    "imtl_g": reference.imtl_g,
    "nashmtl": lambda g: reference.nash(g, 1.0),
    "upgrad": reference.upgrad,
    "dualproj": reference.dual_proj,
    "fairgrad": reference.fairgrad,
    "aligned_mtl": reference.aligned_mtl,
}


@pytest.mark.parametrize("name", REFERENCES)
def test_the_joint_gradient_is_the_papers(name):
    """From losses to `.grad`, beside the paper's equations on explicit gradients."""
    model = model_of()
    balancer = fastmto.get(name)
    for seed in range(3):
        model.zero_grad()
        call(balancer, model, data(seed))
        rows = torch.stack(
            [torch.cat([g.flatten() for g in gs]) for gs in explicit(model, data(seed))]
        )
        expected = REFERENCES[name](rows.numpy())
        np.testing.assert_allclose(flat_grads(model), expected, rtol=1e-7, atol=1e-9)


def test_aligned_mtl_of_proportional_float32_gradients():
    """Their rounding is no principal component: the rule with the rows' eps decides."""
    size = 20_000
    for seed in range(20):
        rows = torch.randn(3, size, generator=torch.Generator().manual_seed(seed))
        rows[2] = rows[0] * (0.3 + 0.01 * seed)
        x = nn.Parameter(torch.zeros(size))
        balancer = fastmto.get("aligned_mtl")
        balancer.backward([(x * row).sum() for row in rows], [x])
        expected = reference.aligned_mtl(rows.double().numpy(), eps=float(np.finfo(np.float32).eps))
        error = np.linalg.norm(x.grad.numpy() - expected) / np.linalg.norm(expected)
        assert error < 1e-3, (seed, error)


def test_pcgrad_is_the_papers_in_some_order():
    model, x = model_of(), data()
    call(fastmto.get("pcgrad", seed=3), model, x)
    rows = torch.stack([torch.cat([g.flatten() for g in gs]) for gs in explicit(model, x)]).numpy()
    others = [[j for j in range(T) if j != i] for i in range(T)]
    orders = itertools.product(*(itertools.permutations(o) for o in others))
    distances = [np.abs(reference.pcgrad(rows, o) - flat_grads(model)).max() for o in orders]
    assert min(distances) < 1e-12


@pytest.mark.parametrize("leak", [None, [0.0, 0.3, 1.0]])
def test_graddrop_is_the_papers(leak):
    model, x = model_of(), data()
    balancer = fastmto.get("graddrop", seed=5, leak=leak)
    for step in range(3):
        model.zero_grad()
        call(balancer, model, x)
        shared = list(model.trunk.parameters())
        rows = [torch.cat([g.flatten() for g in gs]).numpy() for gs in explicit(model, x)]
        # The random numbers are drawn for the places between parameters as well.
        generator = torch.Generator().manual_seed(5)
        layout = FlatLayout(shared)
        for _ in range(step + 1):
            uniforms = torch.rand(len(layout), dtype=torch.float64, generator=generator)
        drawn = torch.cat([u.flatten() for u in layout.views(uniforms)]).numpy()
        expected = reference.graddrop(
            np.stack(rows), drawn, 0.0 if leak is None else np.array(leak)
        )
        np.testing.assert_allclose(flat_grads(model), expected, rtol=1e-12, atol=1e-15)
    kept = sum((flat_grads(model) == row).sum() for row in rows)
    if leak is None:
        assert kept > 0  # some coordinates hold one task's gradient alone


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_db_mtl_is_the_papers(decay):
    model = model_of()
    balancer = fastmto.get("db_mtl", beta=0.9, decay=decay)
    average = np.zeros((T, sum(p.numel() for p in model.trunk.parameters())))
    for step in range(1, 6):
        model.zero_grad()
        x = data(step)
        losses = torch.stack(model.losses(x)).detach().numpy()
        call(balancer, model, x)
        rows = [torch.cat([g.flatten() for g in gs]).numpy() for gs in explicit(model, x)]
        expected, average = reference.db_mtl(
            np.stack(rows), losses, average, 0.9 / step**decay, eps=0.0
        )
        np.testing.assert_allclose(flat_grads(model), expected, rtol=1e-10, atol=1e-13)
        for loss, head, own in zip(
            losses, model.head_parameters(), own_heads(model, x), strict=True
        ):
            close(grads(head), [g / loss for g in own])


def test_nashmtl_bounds_a_held_step_too():
    """Weights found for tiny gradients, held for large opposite ones."""
    x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    balancer = fastmto.get("nashmtl", max_norm=1.0)

    def step(rows):
        x.grad = None
        losses = [(x * torch.tensor(row, dtype=torch.float64)).sum() for row in rows]
        return balancer.backward(losses, [x], [])[1]

    step([[1e-6, 0.0], [0.0, 1e-6]])
    close(x.grad.norm(), torch.ones(()).double())
    with pytest.warns(RuntimeWarning, match="weights held"):
        info = step([[3.0, 0.0], [-1.0, 0.0]])
    assert info.status == "near_stationary"
    assert 0.5 < float(x.grad.norm()) < 1 + 1e-9


def test_methods_say_whether_they_need_an_update():
    needing = [key for key in fastmto.available() if fastmto.get(key, 2).needs_update]
    assert needing == ["famo"]
    assert fastmto.get("marigold", 2, estimator="reuse").needs_update


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("passes", ["loop", "batched"])
def test_a_gpu_gives_what_the_cpu_gives(name, passes):
    results = []
    for device in ("cpu", "cuda"):
        model, x = model_of().to(device), data().to(device)
        options = {"device": device} if name == "imtl" else {}
        balancer = fastmto.get(name, n_tasks=T, passes=passes, **options)
        for _step in range(2):
            model.zero_grad()
            z = model.trunk(x)
            losses = [(head(z.tanh()) - i).pow(2).mean() for i, head in enumerate(model.heads)]
            call(balancer, model, x, losses, features=z)
        results.append([p.grad.cpu() for p in model.parameters()])
    assert all(g.isfinite().all() for g in results[1])
    if name != "graddrop":  # whose random numbers are the device's
        for a, b in zip(*results, strict=True):
            close(a, b, rtol=1e-7, atol=1e-9)


def test_heads_that_have_a_factor_of_their_own_take_no_weights():
    for name in ("imtl", "db_mtl"):
        with pytest.raises(ValueError, match="heads must be 'own'"):
            fastmto.get(name, 2, heads="weighted")


def test_nashmtl_as_published_can_be_asked_for():
    balancer = fastmto.get("nashmtl", method="ccp", warm_start=True, max_steps=20)
    assert balancer.weighting.warm_start
    assert balancer.weighting.method == "ccp"


@pytest.mark.parametrize("name", ["nashmtl", "fairgrad"])
def test_opposite_float32_gradients_have_no_weights_but_noise(name):
    """g and -c g: whether rounding makes the cosine -1 or just not is chance."""
    statuses = set()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x = nn.Parameter(torch.zeros(20_000))
        g = torch.randn(20_000, generator=generator)
        balancer = fastmto.get(name)
        with pytest.warns(RuntimeWarning, match="weights held"):
            _, info = balancer.backward([(x * g).sum(), (x * (-0.3 * g)).sum()], [x], [])
        statuses.add(info.status)
        assert info.weights[0] == info.weights[1]  # the first ones, held; Nash-MTL bounds them
    assert statuses <= {"near_stationary", "not_psd"}

"""Loss-level balancers: against the papers' equations, against the peers, shared properties."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import sys
import types
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from balancer_cases import CASES, BalancerCase, World, every_case, same
from scipy.optimize import minimize
from torch import Tensor, nn

import fastmto
from fastmto.balancers import (
    DWA,
    FAMO,
    IMTLL,
    LDCMTL,
    LS,
    RLW,
    SI,
    BanditMTL,
    GradNorm,
    Uncertainty,
)
from fastmto.balancers.banditmtl import _exponent as exponent
from fastmto.balancers.gradnorm import LEAST_WEIGHT
from fastmto.engine.per_task import TaskAdam
from fastmto.errors import NonFiniteError
from fastmto.reference import losses as ref

T = 3
STEPS = 24
TIGHT = 1e-12
close = torch.testing.assert_close
losses_cases = pytest.mark.parametrize(
    "case", [case for case in CASES if case.level == "loss"], ids=str
)


def values(losses: list[Tensor], tasks) -> np.ndarray:
    return np.array([losses[i].item() for i in tasks])


def at(numbers, dtype=torch.float64) -> list[Tensor]:
    """Losses of these values, each with a graph of its own."""
    return [nn.Parameter(torch.tensor(float(x), dtype=dtype)) * 1 for x in numbers]


def absent_at(step: int) -> list[int]:
    """Every third step one task is missing, every fifth two are."""
    if step % 5 == 4:
        return [step % T, (step + 1) % T]
    return [step % T] if step % 3 == 2 else []


# Lockstep with the papers' equations


def lockstep(world: World, weights, gradient=None, after=None, missing: bool = True) -> None:
    """Weights, `.grad` and learnables of `STEPS` steps beside the reference.

    Args:
        world: around a balancer of T tasks.
        weights: losses (n,), tasks, step -> the weights (n,) of the reference.
        gradient: losses, tasks -> the reference's gradient on the learnables, checked.
        after: losses after the step, tasks -> None; the reference's `update`.
        missing: whether tasks are missing at some steps.
    """
    moved = []
    for step in range(STEPS):
        absent = absent_at(step) if missing else []
        tasks = [i for i in range(T) if i not in absent]
        before = values(world.losses(step), tasks)
        expected = weights(before, tasks, step)
        _, info = world.call(step, absent=absent)
        close(info.weights[tasks], torch.tensor(expected), rtol=TIGHT, atol=TIGHT)
        padded = np.zeros(T)
        padded[tasks] = expected
        world.expect_weighted(step, padded, 1e-11)
        moved.append(expected)
        if gradient is not None:
            own = gradient(before, tasks)
            for i, scalar in enumerate(world.balancer.parameters()):
                if i in tasks:
                    wanted = torch.tensor(own[tasks.index(i)], dtype=torch.float64)
                    close(scalar.grad, wanted, rtol=TIGHT, atol=TIGHT)
                else:
                    assert scalar.grad is None
        world.finish(step, absent=absent)
        if after is not None:
            after(values(world.losses(step), tasks), tasks)
    assert len({tuple(w.round(6)) for w in moved}) > 2 or isinstance(world.balancer, LS)


class Follow:
    """A reference whose learnables are put where the optimizer moved the balancer's."""

    def __init__(self, reference, name: str, world: World) -> None:
        self.reference, self.name, self.world = reference, name, world

    def weights(self, losses, tasks, step):
        scalars = [p.item() for p in self.world.balancer.parameters()]
        setattr(self.reference, self.name, np.array(scalars))
        return self.reference.weights(losses, tasks)


def test_ls_weights_are_one_or_given() -> None:
    lockstep(World(LS()), lambda losses, tasks, step: np.ones(len(tasks)))
    given = np.array([0.5, 2.0, -1.0])
    lockstep(World(LS(task_weights=given)), lambda losses, tasks, step: given[tasks])


def test_si_against_the_reference() -> None:
    reference = ref.SI()
    lockstep(World(SI()), lambda losses, tasks, step: reference.weights(losses, tasks))


def test_rlw_against_the_reference() -> None:
    generator = torch.Generator().manual_seed(5)
    reference = ref.RLW()

    def weights(losses, tasks, step):
        z = torch.randn(T, generator=generator, dtype=torch.float64)
        return reference.weights(z.numpy(), tasks)

    lockstep(World(RLW(seed=5)), weights)


def test_dwa_with_a_window_against_the_reference() -> None:
    reference = ref.DWA(T, temp=0.7, window=3)
    lockstep(
        World(DWA(temp=0.7, window=3)),
        lambda losses, tasks, step: reference.weights(losses, tasks),
    )


def test_dwa_with_epochs_of_changing_length_against_the_reference() -> None:
    reference = ref.DWA(T, temp=2.0, window=None)
    world = World(DWA(window=None))

    def after(losses, tasks):
        if world.balancer.stats["steps"] in (2, 3, 7, 8, 13, 20):
            reference.end_epoch()
            world.balancer.end_epoch()

    lockstep(world, lambda losses, tasks, step: reference.weights(losses, tasks), after=after)


@pytest.mark.parametrize("init", [0.0, -0.5])
def test_uncertainty_against_the_reference(init: float) -> None:
    world = World(Uncertainty(T, init=init, dtype=torch.float64))
    reference = ref.Uncertainty(T, init)
    follow = Follow(reference, "s", world)
    lockstep(world, follow.weights, reference.gradient)


def test_imtl_l_against_the_reference() -> None:
    world = World(IMTLL(T, dtype=torch.float64))
    reference = ref.IMTLL(T)
    follow = Follow(reference, "s", world)
    lockstep(world, follow.weights, reference.gradient)


@pytest.mark.parametrize("eta", [0.02, 0.5])
@pytest.mark.parametrize("rho", [1e-3, 0.3, 5.0])
def test_banditmtl_against_the_reference(eta: float, rho: float) -> None:
    reference = ref.BanditMTL(T, eta, rho)
    lockstep(
        World(BanditMTL(eta=eta, rho=rho)),
        lambda losses, tasks, step: reference.weights(losses, tasks),
    )


@pytest.mark.parametrize("lr", [0.025, 0.4])
def test_gradnorm_against_the_reference(lr: float) -> None:
    world = World(GradNorm(lr=lr, alpha=1.5))
    reference = ref.GradNorm(T, 1.5, lr, LEAST_WEIGHT)
    last = list(world.model.trunk[2].parameters())

    def weights(losses, tasks, step):
        g = [
            torch.cat(
                [x.flatten() for x in torch.autograd.grad(loss, last, retain_graph=True)]
            ).numpy()
            for i, loss in enumerate(world.losses(step))
            if i in tasks
        ]
        return reference.weights(losses, tasks, g)

    lockstep(world, weights)
    assert reference.w.sum() == pytest.approx(T)


@pytest.mark.parametrize("gamma", [0.0, 0.01])
def test_famo_against_the_reference(gamma: float) -> None:
    minima = [-1.0, 0.0, -0.25]
    world = World(FAMO(lr=0.1, gamma=gamma, min_losses=minima))
    reference = ref.FAMO(T, 0.1, gamma, np.array(minima))
    lockstep(
        world,
        lambda losses, tasks, step: reference.weights(losses, tasks),
        after=reference.update,
    )


@pytest.mark.parametrize("normalization", ["identical", "rescaled", "log"])
@pytest.mark.parametrize("tau", ["sigma", "one"])
@pytest.mark.parametrize("sigma", ["softmax", "sigmoid"])
def test_ldc_mtl_against_the_reference(sigma: str, tau: str, normalization: str) -> None:
    options = {"penalty": 0.3, "sigma": sigma, "tau": tau, "normalization": normalization}
    world = World(LDCMTL(T, dtype=torch.float64, **options))
    reference = ref.LDCMTL(T, **options)
    follow = Follow(reference, "W", world)
    lockstep(world, follow.weights, reference.gradient)


def test_the_references_gradients_are_those_of_their_objectives() -> None:
    generator = torch.Generator().manual_seed(0)
    for sigma in ("softmax", "sigmoid"):
        for tau in ("sigma", "one"):
            losses = torch.rand(5, generator=generator, dtype=torch.float64) + 0.1
            losses.requires_grad_()
            w = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
            s = w.softmax(0) if sigma == "softmax" else w.sigmoid()
            total = 1.0 if sigma == "softmax" else s.sum().detach()
            terms = s * losses if tau == "sigma" else losses
            objective = (s * losses).sum() / total + 0.7 * (terms[:-1] - terms[1:]).abs().sum()
            by_losses, by_w = torch.autograd.grad(objective, [losses, w])
            reference = ref.LDCMTL(5, 0.7, sigma, tau, "identical")
            reference.W = w.detach().numpy()
            weights = reference.weights(losses.detach().numpy(), range(5))
            np.testing.assert_allclose(weights, by_losses.numpy(), rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(reference.dJ_dW, by_w.numpy(), rtol=1e-12, atol=1e-14)
    losses = torch.tensor([0.3, 2.0], dtype=torch.float64)
    for reference, objective in [
        (ref.Uncertainty(2), lambda s: ((-s).exp() * losses + s).sum() / 2),
        (ref.IMTLL(2), lambda s: (s.exp() * losses - s).sum()),
    ]:
        reference.s = np.array([0.4, -1.0])
        s = torch.tensor(reference.s, requires_grad=True)
        (wanted,) = torch.autograd.grad(objective(s), [s])
        np.testing.assert_allclose(reference.gradient(losses.numpy(), [0, 1]), wanted.numpy())


# What the papers say of their methods


def test_banditmtl_follows_the_variance_for_small_balls() -> None:
    """max_p sum p_i L_i over the ball is mean + sqrt(2 rho Var) up to O(rho)."""
    rho = 1e-6
    balancer = BanditMTL(eta=1e4, rho=rho)  # one long step of mirror ascent reaches the maximum
    losses = np.array([0.3, 1.0, 0.2, 2.5])
    balancer.backward(at(losses))
    balancer.backward(at(losses))
    worst = float(balancer.weights.numpy() @ losses)
    assert worst - losses.mean() == pytest.approx(np.sqrt(2 * rho * losses.var()), rel=5e-3)


def test_banditmtl_step_is_the_projection_in_the_kl_divergence() -> None:
    """The paper's proximal problem, solved by a general solver."""
    eta, rho, losses = 0.5, 0.2, np.array([0.3, 4.0, 0.2, 2.5])
    balancer = BanditMTL(eta=eta, rho=rho)
    balancer.backward(at(losses))
    balancer.backward(at(losses))
    p = balancer.weights.numpy()
    q = np.full(4, 0.25)
    found = minimize(
        lambda x: -eta * x @ losses + (x * np.log(x / q)).sum(),
        q,
        bounds=[(1e-9, 1)] * 4,
        constraints=[
            {"type": "eq", "fun": lambda x: x.sum() - 1},
            {"type": "ineq", "fun": lambda x: rho - (x * np.log(4 * x)).sum()},
        ],
        options={"ftol": 1e-14, "maxiter": 500},
    )
    np.testing.assert_allclose(p, found.x, atol=1e-5)
    assert (p * np.log(4 * p)).sum() == pytest.approx(rho, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_banditmtl_exponent_is_the_largest_inside_the_ball(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (2, 3, 14, 64):
        for scale in (1e-3, 1.0, 30.0):
            for rho in (1e-3, 0.3, 10.0):
                x = scale * torch.randn(n, generator=generator, dtype=torch.float64)
                s = exponent(x.to(dtype), rho).double()
                p = (s * x).softmax(0)
                kl = (p * (n * p).clamp(min=1e-300).log()).sum().item()
                full = x.softmax(0)
                if (full * (n * full).clamp(min=1e-300).log()).sum() <= rho:
                    assert s.item() == 1.0
                else:
                    accuracy = 3e-3 if dtype == torch.float32 else 1e-9
                    assert kl == pytest.approx(rho, rel=accuracy), (n, scale, rho)


def test_banditmtl_default_ball_leaves_weight_on_all_tasks() -> None:
    for n, rho in [(2, np.log(2) / 2), (3, np.log(3) / 2), (14, 1.2)]:
        balancer = BanditMTL()
        for _ in range(50):
            balancer.backward(at([1.0] * (n - 1) + [9.0]))
        p = balancer.weights.numpy()
        assert (p * np.log(n * p)).sum() == pytest.approx(rho, rel=1e-9)
        assert p.min() > 0


def test_famo_weights_sum_to_one_and_shift_from_a_task_that_falls() -> None:
    balancer = FAMO(gamma=0.0)
    for _ in range(10):
        balancer.backward(at([1.0, 1.0]))
        balancer.update(torch.tensor([0.5, 0.9], dtype=torch.float64))
    _, info = balancer.backward(at([1.0, 1.0]))
    assert info.weights.sum().item() == pytest.approx(1)
    assert info.weights[0] < 0.45


def test_gradnorm_brings_weighted_gradients_to_one_length() -> None:
    """At equal progress the targets are the mean length."""
    balancer = GradNorm(lr=0.02, update_weights_every=1)
    p = nn.Parameter(torch.ones(4, dtype=torch.float64))
    scales = torch.tensor([1.0, 3.0, 10.0])
    for _ in range(400):
        balancer.backward([(p * s).sum() for s in scales], last_shared_parameters=[p])
    lengths = balancer.weights * scales
    assert lengths.max() / lengths.min() < 1.15
    assert balancer.weights.sum().item() == pytest.approx(3)


def test_gradnorm_keeps_weights_positive_and_their_sum() -> None:
    balancer = GradNorm(lr=0.9)
    p = nn.Parameter(torch.ones(2, dtype=torch.float64))
    for _ in range(60):
        balancer.backward([(p * s).sum() for s in (1e-4, 1.0, 1e4)], last_shared_parameters=[p])
        assert balancer.weights.min() > 0
        assert balancer.weights.sum().item() == pytest.approx(3)


def test_imtl_l_and_uncertainty_reach_the_balance_of_fixed_losses() -> None:
    """w_i L_i = 1 and 1/2, the optimum of the learnables."""
    for balancer, product in [
        (IMTLL(2, dtype=torch.float64), 1.0),
        (Uncertainty(2, dtype=torch.float64), 0.5),
    ]:
        optimizer = torch.optim.SGD(balancer.parameters(), lr=0.3)
        for _ in range(300):
            optimizer.zero_grad()
            balancer.backward(at([0.2, 5.0]))
            optimizer.step()
        np.testing.assert_allclose(
            balancer.weights.numpy() * np.array([0.2, 5.0]), product, rtol=1e-6
        )


def test_dwa_never_stays_at_equal_weights() -> None:
    """By default it needs no word about epochs."""
    balancer = DWA()
    for step in range(51):
        _, info = balancer.backward(at([1.0, 0.97**step]))
        if step < 50:
            assert torch.equal(info.weights, torch.ones(2, dtype=torch.float64))
    assert info.weights[0] > 1.05


def test_dwa_says_that_its_epochs_are_windows() -> None:
    with pytest.raises(RuntimeError, match=r"end_epoch\(\) needs DWA\(window=None\).*window=25"):
        DWA().end_epoch()
    balancer = DWA(window=None)
    balancer.end_epoch()
    balancer.backward(at([1.0, 2.0]))
    balancer.end_epoch()
    balancer.end_epoch()  # an empty epoch is none
    balancer.backward(at([2.0, 2.0]))
    balancer.end_epoch()
    _, info = balancer.backward(at([1.0, 1.0]))
    wanted = 2 * torch.tensor([2.0, 1.0], dtype=torch.float64).div(2).softmax(0)
    close(info.weights, wanted)


def test_dwa_counts_steps_between_searches() -> None:
    each, held = DWA(window=2), DWA(window=2, update_weights_every=4)
    for step in range(13):
        for balancer in (each, held):
            balancer.backward(at([1 + step, 2.0, 3 - step / 10]))
        if step % 4 == 0:
            assert torch.equal(held.weights, each.weights)
    assert same(held._state(), each._state())


def test_dwa_names_a_task_whose_mean_is_not_positive() -> None:
    balancer = DWA(window=2)
    balancer.backward({"click": at([1.0])[0], "buy": at([0.0])[0]})
    with pytest.raises(ValueError, match=r"losses\['buy'\] must have a mean > 0 over an epoch"):
        balancer.backward({"click": at([1.0])[0], "buy": at([0.0])[0]})
    batch = DWA(window=None)
    batch.backward(at([1.0, -1.0]))
    with pytest.raises(ValueError, match=r"losses\[1\] must have a mean > 0"):
        batch.end_epoch()


def test_rlw_has_its_own_generator() -> None:
    balancer = RLW(seed=1)
    first = [balancer.backward(at([1.0, 2.0]))[1].weights for _ in range(3)]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    balancer.backward(at([1.0, 2.0]))
    assert torch.equal(before, torch.get_rng_state())
    again = RLW(seed=1)
    assert all(torch.equal(w, again.backward(at([1.0, 2.0]))[1].weights) for w in first)
    assert not torch.equal(first[0], RLW(seed=2).backward(at([1.0, 2.0]))[1].weights)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_task_adam_is_torch_adam_on_each_present_task(decay: float) -> None:
    ours = TaskAdam(T, lr=0.1, weight_decay=decay)
    values = torch.zeros(T, dtype=torch.float64)
    scalars = [nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(T)]
    theirs = torch.optim.Adam(scalars, lr=0.1, weight_decay=decay)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        tasks = [i for i in range(T) if i not in absent_at(step)]
        gradients = torch.randn(len(tasks), generator=generator, dtype=torch.float64)
        values[tasks] = ours.step(values[tasks], gradients, tasks)
        theirs.zero_grad()
        for i, gradient in zip(tasks, gradients, strict=True):
            scalars[i].grad = gradient
        theirs.step()
        close(values, torch.stack([p.detach() for p in scalars]), rtol=TIGHT, atol=TIGHT)


# update(), the method that needs losses after the step


def test_famo_warns_when_update_was_forgotten() -> None:
    balancer = FAMO()
    balancer.backward(at([1.0, 2.0]))
    with pytest.warns(RuntimeWarning, match=r"no update\(losses\) since its last search"):
        balancer.backward(at([1.0, 2.0]))


def test_famo_update_comes_after_a_backward() -> None:
    with pytest.raises(RuntimeError, match=r"update\(losses\) must come after backward"):
        FAMO(2).update(torch.tensor([1.0, 2.0]))


def test_famo_update_changes_nothing_between_searches_or_twice() -> None:
    balancer = FAMO(update_weights_every=2)
    balancer.backward(at([1.0, 2.0]))
    balancer.update(torch.tensor([0.5, 1.9]))
    state = balancer.state_dict()["state"]
    balancer.update(torch.tensor([0.1, 1.9]))
    balancer.backward(at([1.0, 2.0]))
    balancer.update(torch.tensor([0.1, 1.9]))
    assert same(state, balancer.state_dict()["state"])


def test_famo_update_refuses_what_backward_refuses() -> None:
    balancer = FAMO(min_losses=[0.0, -1.0])
    balancer.backward({"click": at([1.0])[0], "buy": at([-0.5])[0]})
    with pytest.raises(ValueError, match=r"losses\['buy'\] must be > -1: FAMO"):
        balancer.update({"click": torch.tensor(1.0), "buy": torch.tensor(-1.0)})
    with pytest.raises(ValueError, match="losses must hold 2 tasks, got 3"):
        balancer.update(torch.ones(3))
    before = balancer.state_dict()["state"]["logits"]
    with pytest.warns(RuntimeWarning, match=r"update: losses\['buy'\] is not finite"):
        balancer.update({"click": torch.tensor(1.0), "buy": torch.tensor(torch.nan)})
    assert torch.equal(before, balancer.state_dict()["state"]["logits"])
    assert balancer.stats["skipped"] == 1
    strict = FAMO(on_nonfinite="raise")
    strict.backward(at([1.0, 2.0]))
    with pytest.raises(NonFiniteError, match=r"update: losses\[0\] is not finite"):
        strict.update(torch.tensor([torch.inf, 1.0]))


def test_famo_skipped_steps_leave_update_without_effect() -> None:
    balancer = FAMO()
    balancer.backward(at([1.0, 2.0]))
    balancer.update(torch.tensor([0.5, 1.9]))
    state = balancer.state_dict()["state"]
    with pytest.warns(RuntimeWarning, match="step skipped"):
        balancer.backward(at([torch.nan, 2.0]))
    balancer.update(torch.tensor([0.1, 1.9]))
    assert same(state, balancer.state_dict()["state"])
    fresh = FAMO(2)
    with pytest.warns(RuntimeWarning, match="step skipped"):
        fresh.backward(at([torch.nan, 2.0]))
    fresh.update(torch.tensor([0.1, 1.9]))  # the loop of a user whose first step was skipped


# What all of them share


@losses_cases
@pytest.mark.parametrize("every", [1, 3])
def test_grad_is_that_of_the_weighted_losses(case: BalancerCase, every: int) -> None:
    world = World(case.build(update_weights_every=every))
    for step in range(5):
        loss, info = world.call(step)
        world.expect_weighted(step, info.weights.tolist(), 1e-11)
        total = sum(w * x for w, x in zip(info.weights, world.losses(step), strict=True))
        close(loss, total.detach())
        assert not loss.requires_grad
        assert not info.weights.requires_grad
        world.finish(step)


@every_case
def test_backward_adds_to_grad(case: BalancerCase) -> None:
    once, twice = World(case.build()), World(case.build())
    once.call(0)
    for p in twice.parameters:
        p.grad = torch.full_like(p, 0.5)
    twice.balancer.backward(twice.losses(0), **twice.arguments(0))
    for p, q in zip(once.parameters, twice.parameters, strict=True):
        close(q.grad, p.grad + 0.5)


@every_case
def test_weights_are_held_between_searches(case: BalancerCase) -> None:
    every, n = World(case.build(update_weights_every=3)), 7
    previous = None
    for step in range(n):
        _, info = every.call(step)
        learning = [p.grad is not None for p in every.balancer.parameters()]
        assert all(learning) if step % 3 == 0 else not any(learning)
        if step % 3:
            assert torch.equal(info.weights, previous)
        previous = info.weights
        every.finish(step)
    stats = every.balancer.stats
    assert (stats["steps"], stats["searches"]) == (n, 3)
    if case.level == "loss":
        partial = 3 * T if case.key == "gradnorm" else 0
        assert stats["backwards"] == n + partial


@every_case
@pytest.mark.parametrize("every", [1, 3])
def test_resume_is_exact(case: BalancerCase, every: int, tmp_path: Path) -> None:
    form = dict_of("a", "b", "c")
    whole, first = (World(case.build(update_weights_every=every)) for _ in range(2))
    weights = whole.run(range(11), form=form)
    first.run(range(5), form=form)
    torch.save(first.state(), tmp_path / "state.pt")
    first.run(range(5, 7), form=form)  # the saved state is a copy
    second = World(case.build(update_weights_every=every))
    second.load(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(second.run(range(5, 11), form=form), weights[5:])
    assert same(second.state(), whole.state())


@every_case
def test_resume_finds_the_number_of_tasks(case: BalancerCase) -> None:
    world = World(case.build())
    world.run(range(4))
    if not world.balancer.parameters():
        other = World(case.build(None))
        other.load(world.state())
        assert other.balancer.n_tasks == T
        assert same(world.run([4, 5]), other.run([4, 5]))
    with pytest.raises(ValueError, match="of the method"):
        (SI() if case.key == "ls" else LS()).load_state_dict(world.balancer.state_dict())


@every_case
def test_reset_starts_again(case: BalancerCase) -> None:
    world = World(case.build())
    start = world.state()
    weights = world.run(range(6))
    world.load(start | {"balancer": world.state()["balancer"]})
    learnables = world.balancer.parameters()
    world.balancer.reset()
    assert all(p is q for p, q in zip(learnables, world.balancer.parameters(), strict=True))
    assert world.balancer.stats["steps"] == 0
    assert same(world.run(range(6)), weights)


def dict_of(*names: str):
    """Losses as a dict of named tasks, absent ones left out."""

    def form(losses):
        return {name: x for name, x in zip(names, losses, strict=True) if x is not None}

    return form


@every_case
def test_named_and_stacked_losses_are_the_listed_ones(case: BalancerCase) -> None:
    listed, named, shuffled, stacked = (World(case.build()) for _ in range(4))
    turn = iter(range(1000))

    def reordered(losses):
        items = list(dict_of("a", "b", "c")(losses).items())
        return dict(items[::-1] if next(turn) else items)  # the first dict says the order

    weights = listed.run(range(5))
    assert same(named.run(range(5), form=dict_of("a", "b", "c")), weights)
    assert same(shuffled.run(range(5), form=reordered), weights)
    assert named.balancer.names == ["a", "b", "c"]
    for a, b in zip(weights, stacked.run(range(5), form=torch.stack), strict=True):
        close(a, b)


@every_case
def test_absent_tasks_keep_their_state(case: BalancerCase) -> None:
    world = World(case.build())
    names = dict_of("a", "b", "c")
    world.run(range(4), form=names)
    before = world.state()
    world.run(range(4, 7), form=names, absent=[1])
    after = world.state()
    assert torch.equal(before["balancer"]["weights"][1], after["balancer"]["weights"][1])
    for key, value in task_entries(before["balancer"]["state"], 1).items():
        assert same(value, task_entries(after["balancer"]["state"], 1)[key]), key
    assert world.balancer.stats["absent"] == 3
    head = world.model.head_parameters()[1]
    assert all(p.grad is None or not p.grad.any() for p in head)
    # ... and it takes part again.
    _, info = world.call(7, form=names)
    assert info.weights.isfinite().all()


def task_entries(state, task: int, path: str = "") -> dict[str, object]:
    """Everything in a method's state that belongs to one task."""
    found: dict[str, object] = {}
    for key, value in state.items():
        name = f"{path}{key}"
        if isinstance(value, dict):
            found |= task_entries(value, task, f"{name}.")
        elif isinstance(value, Tensor) and value.dim() and value.shape[-1] == T:
            found[name] = value[..., task].clone()
        elif isinstance(value, list) and len(value) == T:
            found[name] = value[task]
    for moving in ("counts", "sums"):  # DWA's epochs end at the same time for all
        found.pop(moving, None)
    return found


@losses_cases
def test_absent_tasks_leave_the_others_their_gradients(case: BalancerCase) -> None:
    world = World(case.build())
    world.run(range(4))
    for step, absent in [(4, [0]), (5, [0, 2]), (6, [])]:
        _, info = world.call(step, absent=absent)
        weights = [0.0 if i in absent else w for i, w in enumerate(info.weights.tolist())]
        world.expect_weighted(step, weights, 1e-11)
        world.finish(step, absent=absent)


@every_case
def test_a_task_absent_at_first_joins_later(case: BalancerCase) -> None:
    world = World(case.build(update_weights_every=2))
    world.run([0, 1], absent=[2])
    world.run([2, 3])
    weights = world.run([4, 5], absent=[0])
    assert all(w.isfinite().all() for w in weights)


@every_case
def test_the_order_of_tasks_does_not_matter(case: BalancerCase) -> None:
    if not case.equivariant:
        pytest.skip("depends on the order, as documented")
    order = [2, 0, 1]
    options = dict(case.options)
    if "min_losses" in options:
        options["min_losses"] = [options["min_losses"][i] for i in order]
    world, turned = World(case.build()), World(case.build(**options), order=order)
    for a, b in zip(world.run(range(6)), turned.run(range(6)), strict=True):
        close(a[order], b, rtol=1e-9, atol=1e-12)


@every_case
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_losses_that_are_not_finite(case: BalancerCase, bad: float) -> None:
    world = World(case.build())
    world.run(range(3))
    before = world.balancer.state_dict()
    losses = world.losses(3)
    losses[1] = losses[1] * bad
    world.optimizer.zero_grad()
    with pytest.warns(RuntimeWarning, match=r"step skipped: losses\[1\] is not finite"):
        _, info = world.balancer.backward(losses, **world.arguments(3))
    assert info.skipped == "losses[1] is not finite"
    assert all(p.grad is None for p in [*world.parameters, *world.balancer.parameters()])
    after = world.balancer.state_dict()
    assert (after["stats"].pop("skipped"), before["stats"].pop("skipped")) == (1, 0)
    assert same(before, after)

    strict = World(case.build(on_nonfinite="raise"))
    losses = dict_of("a", "b", "c")(strict.losses(0))
    losses["c"] = losses["c"] * bad
    with pytest.raises(NonFiniteError, match=r"losses\['c'\] is not finite"):
        strict.balancer.backward(losses, **strict.arguments(0))
    assert all(p.grad is None for p in strict.parameters)

    blind = World(case.build(on_nonfinite="ignore"))
    losses = blind.losses(0)
    losses[0] = losses[0] * bad
    searching = case.level == "gradient" and case.key not in ("graddrop", "db_mtl")
    held = pytest.warns(RuntimeWarning, match="weights held: not_finite")
    with held if searching else nullcontext():
        blind.balancer.backward(losses, **blind.arguments(0))
    assert blind.balancer.stats["steps"] == 1


@losses_cases
def test_low_losses_are_named_where_a_logarithm_is_taken(case: BalancerCase) -> None:
    world = World(case.build())
    names = dict_of("a", "b", "c")
    losses = names([loss * 0 - 1.0 if i == 2 else loss for i, loss in enumerate(world.losses(0))])
    if case.low is None:
        world.balancer.backward(losses, **world.arguments(0))
        return
    before = world.balancer.state_dict()
    with pytest.raises(ValueError, match=r"losses\['c'\].*" + case.low):
        world.balancer.backward(losses, **world.arguments(0))
    assert all(p.grad is None for p in [*world.parameters, *world.balancer.parameters()])
    assert same(before | {"names": None}, world.balancer.state_dict() | {"names": None})


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_of_float32_at_least(case: BalancerCase, dtype: torch.dtype) -> None:
    world = World(case.build(), dtype=dtype)
    for w in world.run(range(3)):
        assert w.dtype == (torch.float32 if case.level == "loss" else torch.float64)
        assert w.isfinite().all()
    assert all(p.grad.dtype == dtype for p in world.parameters)


@every_case
def test_one_task(case: BalancerCase) -> None:
    options = {k: v[:1] for k, v in case.options.items() if isinstance(v, list)}
    world = World(case.build(1, **options), n_tasks=1)
    weights = world.run(range(5))
    assert all(w.shape == (1,) and w.isfinite().all() for w in weights)


@losses_cases
def test_nothing_waits_for_an_accelerator(case: BalancerCase) -> None:
    """Tensors on "meta" have no values: reading one raises."""
    kwargs = {"device": "meta"} if case.build().parameters() else {}
    balancer = case.build(update_weights_every=2, **kwargs)
    with torch.device("meta"):
        trunk, heads = nn.Linear(4, 4), [nn.Linear(4, 1) for _ in range(T)]
        for step in range(6):
            z = trunk(torch.ones(2, 4)).tanh()
            losses: list[Tensor | None] = [head(z).square().mean() for head in heads]
            if step in (2, 3):
                losses[1] = None
            _, info = balancer.backward(losses, last_shared_parameters=trunk.parameters())
            assert info.weights.device.type == "meta"
            if hasattr(balancer, "update"):
                balancer.update([None if x is None else x.detach() for x in losses])
    assert trunk.weight.grad is not None
    assert balancer.stats["searches"] == 3


@every_case
def test_repr_and_pickle(case: BalancerCase) -> None:
    world = World(case.build())
    world.run(range(3))
    assert repr(world.balancer).startswith(f"{type(world.balancer).__name__}(n_tasks=3")
    if case.key != "rlw":  # torch's generators are not picklable before 2.6
        copied = pickle.loads(pickle.dumps(world.balancer))
        assert same(copied.state_dict(), world.balancer.state_dict())


@losses_cases
def test_info_of_loss_level_methods(case: BalancerCase) -> None:
    world = World(case.build())
    _, info = world.call(0, form=dict_of("a", "b", "c"))
    assert info["tasks"] == ["a", "b", "c"]
    assert info.gram is info.cosines is info.status is info.result is info.skipped is None
    shown = info.weights.clone()
    world.finish(0)
    world.call(1, absent=[1])
    assert torch.equal(info.weights, shown)  # a step shows its own weights for good


# Bad input


@every_case
def test_wrong_counts(case: BalancerCase) -> None:
    world = World(case.build())
    losses = world.losses(0)
    for given, message in [
        (losses[:2], "losses must hold 3 tasks, got 2"),
        ([None] * 3, "losses must hold at least one task"),
        ([losses[0].detach(), *losses[1:]], r"losses\[0\] is not attached to a graph"),
        ([torch.ones(2, requires_grad=True), *losses[1:]], r"losses\[0\] must be a scalar"),
    ]:
        with pytest.raises(ValueError, match=message):
            world.balancer.backward(given, **world.arguments(0))
    assert world.balancer.stats["steps"] == 0
    assert all(p.grad is None for p in world.parameters)


@pytest.mark.parametrize("key", ["uncertainty", "imtl_l", "ldc_mtl"])
def test_learnable_methods_need_the_number_of_tasks(key: str) -> None:
    with pytest.raises(ValueError, match=r"n_tasks must be given: .* learnable parameters"):
        fastmto.get(key)
    assert len(fastmto.get(key, 4).parameters()) == 4
    assert all(p.device.type == "meta" for p in fastmto.get(key, 2, device="meta").parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LS(2, task_weights=[1.0]), "task_weights must hold 2 weights, got 1"),
        (lambda: LS(task_weights=[1.0, np.nan]), "task_weights must be finite numbers"),
        (lambda: RLW(seed=-1), "seed must be an integer >= 0"),
        (lambda: DWA(temp=0), r"temp must be a finite number in \(0, inf\], got 0"),
        (lambda: DWA(window=0), "window must be an integer >= 1 or None, got 0"),
        (lambda: BanditMTL(eta=0.0), "eta must be a finite number"),
        (lambda: BanditMTL(rho=-1.0), "rho must be a finite number"),
        (lambda: GradNorm(alpha=-1), "alpha must be a finite number"),
        (lambda: GradNorm(lr=0), "lr must be a finite number"),
        (lambda: GradNorm(3, initial_losses=[1.0]), "initial_losses must hold 3 losses, got 1"),
        (lambda: GradNorm(initial_losses=[1.0, 0.0]), r"initial_losses\[1\] must be a finite"),
        (lambda: FAMO(lr=0), "lr must be a finite number"),
        (lambda: FAMO(gamma=-0.1), "gamma must be a finite number"),
        (lambda: FAMO(min_losses=[np.nan]), r"min_losses\[0\] must be a finite number"),
        (lambda: FAMO(2, min_losses=[0.0] * 3), "min_losses must hold 2 numbers, got 3"),
        (lambda: LDCMTL(2, penalty=-1), "penalty must be a finite number"),
        (lambda: LDCMTL(2, sigma="relu"), "sigma must be one of softmax, sigmoid, got 'relu'"),
        (lambda: LDCMTL(2, tau="two"), "tau must be one of sigma, one, got 'two'"),
        (lambda: LDCMTL(2, normalization="no"), "normalization must be one of identical"),
        (lambda: Uncertainty(2, init=np.inf), "init must be a finite number"),
        (lambda: IMTLL(2, init=1e3), "init must be a finite number"),
        (lambda: SI(0), "n_tasks must be an integer >= 1"),
        (lambda: SI(update_weights_every=0), "update_weights_every must be an integer >= 1"),
        (lambda: SI(on_nonfinite="stop"), "on_nonfinite must be one of skip, raise, ignore"),
    ],
)
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_gradnorm_asks_for_the_last_shared_layer() -> None:
    p = nn.Parameter(torch.ones(2))
    for given in (None, []):
        with pytest.raises(ValueError, match="last_shared_parameters must be given: GradNorm"):
            GradNorm().backward([p.sum(), p.sum()], last_shared_parameters=given)
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    with pytest.raises(ValueError, match=r"last_shared_parameters\[1\] must require grad"):
        GradNorm().backward([p.sum(), p.sum()], last_shared_parameters=[p, frozen])
    assert p.grad is None


def test_gradnorm_counts_tasks_that_do_not_reach_the_layer() -> None:
    p, q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    balancer = GradNorm()
    _, info = balancer.backward([p.sum(), q.sum()], last_shared_parameters=[p])
    assert balancer.stats["untouched"] == 1
    assert info.weights.isfinite().all()


def test_gradnorm_takes_zero_losses_after_the_first() -> None:
    p = nn.Parameter(torch.ones(2))
    balancer = GradNorm()
    balancer.backward([p.sum(), 2 * p.sum()], last_shared_parameters=[p])
    balancer.backward([p.sum() * 0, 2 * p.sum()], last_shared_parameters=[p])
    with pytest.raises(ValueError, match=r"losses\[0\] must be >= 0: GradNorm takes a power"):
        balancer.backward([-p.sum(), 2 * p.sum()], last_shared_parameters=[p])
    assert balancer.weights.isfinite().all()


# Beside the peers


@pytest.fixture(scope="module")
def libmtl():
    """LibMTL's weightings. Its top module wants torchvision, so an empty one stands for it."""
    spec = importlib.util.find_spec("LibMTL")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("LibMTL is not installed")
    before = {name for name in sys.modules if name.split(".")[0] == "LibMTL"}
    if "LibMTL" not in sys.modules:
        package = types.ModuleType("LibMTL")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["LibMTL"] = package
    yield importlib.import_module("LibMTL.weighting")
    for name in list(sys.modules):
        if name.split(".")[0] == "LibMTL" and name not in before:
            del sys.modules[name]


def peer_of(libmtl, name: str):
    """A LibMTL weighting as its trainer sets it up."""
    weighting = getattr(libmtl, name)()
    weighting.task_num, weighting.device, weighting.rep_grad = T, torch.device("cpu"), False
    weighting.init_param()
    return weighting.double()


@pytest.fixture(scope="module")
def scalarization():
    return pytest.importorskip("torchjd.scalarization", reason="torchjd >= 0.18 is not installed")


def peer_weights(combine, losses: np.ndarray) -> np.ndarray:
    """The weights that a peer's scalar of the losses has."""
    given = torch.tensor(losses, requires_grad=True)
    (grad,) = torch.autograd.grad(combine(given), [given])
    return grad.numpy()


RUN = [np.array([1.0, 2.0, 0.5]) * 0.9**k * np.array([1.0, 1.02**k, 0.97**k]) for k in range(12)]


def test_torchjd_imtl_l_and_uncertainty(scalarization) -> None:
    for ours, theirs in [
        (IMTLL(T, dtype=torch.float64), scalarization.IMTLL(T).double()),
        (Uncertainty(T, dtype=torch.float64), scalarization.UW(T).double()),
    ]:
        mine = torch.optim.Adam(ours.parameters(), lr=0.1)
        its = torch.optim.Adam(theirs.parameters(), lr=0.1)
        for losses in RUN:
            mine.zero_grad()
            its.zero_grad()
            given = torch.tensor(losses, requires_grad=True)
            theirs(given).backward()
            _, info = ours.backward(at(losses))
            close(info.weights, given.grad, rtol=1e-10, atol=1e-12)
            mine.step()
            its.step()


def test_torchjd_dwa(scalarization) -> None:
    ours, theirs = DWA(window=3), scalarization.DWA()
    for k, losses in enumerate(RUN):
        _, info = ours.backward(at(losses))
        np.testing.assert_allclose(info.weights.numpy(), peer_weights(theirs, losses))
        if k % 3 == 2:
            theirs.step()


def test_torchjd_famo(scalarization) -> None:
    """The same but for the 1e-8 that TorchJD adds to the losses."""
    minima = torch.tensor([-1.0, 0.0, 0.0], dtype=torch.float64)
    ours = FAMO(gamma=1e-3, min_losses=minima.tolist())
    theirs = scalarization.FAMO(T, min_losses=minima).double()
    for before, after in pairwise(RUN):
        _, info = ours.backward(at(before))
        np.testing.assert_allclose(info.weights.numpy(), peer_weights(theirs, before), rtol=1e-6)
        ours.update(torch.tensor(after))
        theirs.update(torch.tensor(after))


def test_torchjd_geometric_mean(scalarization) -> None:
    """Its weights are ours times the geometric mean over T."""
    losses = RUN[3]
    _, info = SI().backward(at(losses))
    theirs = peer_weights(scalarization.GeometricMean(), losses)
    factor = np.exp(np.log(losses).mean()) / T
    np.testing.assert_allclose(theirs, info.weights.numpy() * factor, rtol=1e-12)


def test_torchjd_random(scalarization) -> None:
    """Same rule without the factor T."""
    torch.manual_seed(5)
    theirs = peer_weights(scalarization.Random(), RUN[0])
    _, info = RLW(seed=5).backward(at(RUN[0]))
    np.testing.assert_allclose(T * theirs, info.weights.numpy(), rtol=1e-12)


def test_libmtl_equal_weights(libmtl) -> None:
    theirs = peer_of(libmtl, "EW").backward(torch.tensor(RUN[0], requires_grad=True))
    _, info = LS().backward(at(RUN[0]))
    np.testing.assert_array_equal(theirs, info.weights.numpy())


def test_libmtl_uncertainty(libmtl) -> None:
    theirs, ours = peer_of(libmtl, "UW"), Uncertainty(T, init=-0.5, dtype=torch.float64)
    weights = theirs.backward(torch.tensor(RUN[2], requires_grad=True))
    _, info = ours.backward(at(RUN[2]))
    np.testing.assert_allclose(info.weights.numpy(), weights, rtol=1e-12)
    close(torch.stack([p.grad for p in ours.parameters()]), theirs.loss_scale.grad)


def test_libmtl_dwa(libmtl) -> None:
    """It balances from the third epoch on; its weights are of float32."""
    theirs, ours = peer_of(libmtl, "DWA"), DWA(window=None)
    theirs.train_loss_buffer = np.stack(RUN, axis=1)
    for epoch, losses in enumerate(RUN):
        theirs.epoch = epoch
        weights = theirs.backward(torch.tensor(losses, requires_grad=True), T=2.0)
        _, info = ours.backward(at(losses))
        np.testing.assert_allclose(info.weights.numpy(), weights, rtol=1e-6)
        ours.end_epoch()


def test_libmtl_rlw(libmtl) -> None:
    """Same rule without the factor T."""
    generator = torch.Generator().manual_seed(7)
    z = torch.randn(T, generator=generator, dtype=torch.float64)
    theirs = peer_of(libmtl, "RLW")
    theirs.distribution = types.SimpleNamespace(sample=lambda: z)
    weights = theirs.backward(torch.tensor(RUN[0], requires_grad=True), dist="Normal")
    _, info = RLW(seed=7).backward(at(RUN[0]))
    np.testing.assert_allclose(info.weights.numpy(), T * weights, rtol=1e-12)


def test_libmtl_geometric_mean(libmtl) -> None:
    """Its gradients; the weights that it reports are others."""
    given = torch.tensor(RUN[4], requires_grad=True)
    peer_of(libmtl, "GLS").backward(given)
    _, info = SI().backward(at(RUN[4]))
    factor = np.exp(np.log(RUN[4]).mean()) / T
    close(given.grad, info.weights * factor)


def test_libmtl_gradnorm(libmtl) -> None:
    """Its gradient is ours, through w = T softmax(v)."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(T, 5, generator=generator, dtype=torch.float64)
    first, losses = RUN[0], RUN[5] * np.array([0.3, 1.0, 1.7])
    p = nn.Parameter(torch.ones(5, dtype=torch.float64))
    ours = GradNorm(initial_losses=first.tolist())
    ours.backward(
        [(p * row).sum() + x - row.sum() for row, x in zip(rows, losses, strict=True)],
        last_shared_parameters=[p],
    )
    by_weight = ours.state_dict()["state"]["adam"]["state"][0] / 0.1  # Adam's first moment
    theirs = peer_of(libmtl, "GradNorm")
    theirs.epoch, theirs.train_loss_buffer = 1, first[:, None]
    theirs._get_grads = lambda losses, mode: rows
    theirs._backward_new_grads = lambda weights, grads: None
    theirs.backward(torch.tensor(losses), alpha=1.5)
    z = torch.full((T,), 1 / T, dtype=torch.float64)
    close(theirs.loss_scale.grad, T * z * (by_weight - (z * by_weight).sum()), rtol=1e-6, atol=0)


def test_dwa_goes_on_after_an_epoch_that_was_refused() -> None:
    balancer = fastmto.get("dwa", 2, window=3)
    epochs = [[1.0, 2.0], [1.0, 1.0], [-9.0, 1.0], [2.0, 1.0]] + [[1.0, 1.0]] * 4
    refused = 0
    for losses in epochs:
        try:
            balancer.backward(at(losses))
        except ValueError:
            refused += 1
    assert refused == 1
    assert balancer._epochs == [2, 2]
    close(balancer._means, torch.tensor([[4 / 3, 4 / 3], [1.0, 1.0]]).to(balancer._means.dtype))


def test_a_backward_that_raises_changes_nothing() -> None:
    for key in ("famo", "banditmtl", "imtl_l"):
        balancer = fastmto.get(key, 2)
        losses = [loss.square() for loss in at([1.0, 2.0])]
        torch.stack(losses).sum().backward()
        before = balancer.state_dict()
        with pytest.raises(RuntimeError, match="second time"):
            balancer.backward(losses)
        assert same(before | {"names": None}, balancer.state_dict() | {"names": None})


def test_a_state_with_missing_parts_is_refused() -> None:
    state = fastmto.get("dwa", 2).state_dict()
    del state["state"]["sums"]
    with pytest.raises(ValueError, match=r"state must hold .*'sums'"):
        fastmto.get("dwa", 2).load_state_dict(state)

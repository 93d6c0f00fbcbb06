"""MARIGOLD: exact cases, lockstep with the reference, limits, guarantees, FAMO."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from marigold_cases import Quadratics, Smooth, parameter

import fastmto
from fastmto import MARIGOLD
from fastmto.errors import SolverError
from fastmto.marigold.simplex_rules import Projected
from fastmto.reference import marigold as reference_marigold
from fastmto.solvers import simplex_projection

CASE = Quadratics()
START = (1.0, 2.0)


def backward(balancer: MARIGOLD, theta: torch.nn.Parameter, f=CASE):
    theta.grad = None
    return balancer.backward(f(theta), shared_parameters=[theta], closure=lambda: f(theta))


def test_the_case_itself() -> None:
    theta = torch.tensor(START, dtype=torch.float64)
    assert CASE(theta).tolist() == [3, 3.5]
    assert CASE.gradients(theta).tolist() == [[2, 2], [-2, 3]]


@pytest.mark.parametrize(
    ("estimator", "y"), [("forward", (5.3125, 8.4375)), ("central", (5.0, 7.5))]
)
def test_exact_derivatives(estimator: str, y: tuple[float, float]) -> None:
    theta = parameter(START)
    loss, info = backward(MARIGOLD(estimator=estimator, mu=0.1), theta)
    assert theta.grad.tolist() == [0, 2.5]  # d at lambda = (.5, .5)
    assert info.derivatives.tolist() == pytest.approx(y, abs=1e-12)
    assert info.weights.tolist() == [0.5, 0.5]
    assert info.step == pytest.approx(0.25)
    assert float(loss) == pytest.approx(3.25)


@pytest.mark.parametrize("step_size", [None, 0.1])
def test_exact_reuse(step_size: float | None) -> None:
    theta = parameter(START)
    balancer = MARIGOLD(estimator="reuse", step_size=step_size)
    balancer.backward(CASE(theta), [theta])
    torch.optim.SGD([theta], lr=0.1).step()
    balancer.update(CASE(theta))
    assert balancer.last_derivatives.tolist() == pytest.approx((4.6875, 6.5625), abs=1e-12)


def test_exact_steps_of_lambda() -> None:
    balancer = MARIGOLD(lambda_update="projected", lambda_step=0.05)
    backward(balancer, parameter(START))
    assert balancer.lambda_.tolist() == pytest.approx((0.5625, 0.4375), abs=1e-9)
    balancer = MARIGOLD(lambda_update="mirror", lambda_step=0.1, ema=0.0)
    backward(balancer, parameter(START))
    assert balancer.lambda_.tolist() == pytest.approx((0.5621765, 0.4378235), abs=5e-8)


def test_exact_gram_criteria() -> None:
    """The span of the gradients is the whole plane: G_hat = G up to the differences' rounding."""
    nash = MARIGOLD(criterion="bargaining", estimator="span", difference="central")
    _, info = backward(nash, parameter(START))
    assert torch.allclose(info.gram, torch.tensor([[8.0, 2], [2, 13]]).double(), rtol=1e-8)
    assert nash.lambda_.tolist() == pytest.approx((0.323272180108, 0.253595562242), rel=1e-8)
    mgda = MARIGOLD(criterion="mgda", estimator="span", difference="central")
    theta = parameter(START)
    backward(mgda, theta)
    assert mgda.lambda_.tolist() == pytest.approx((11 / 17, 6 / 17), rel=1e-8)
    backward(mgda, theta)
    assert float(theta.grad.square().sum()) == pytest.approx(100 / 17, rel=1e-8)


def test_the_step_is_made_with_the_lambda_of_before() -> None:
    theta = parameter(START)
    balancer = MARIGOLD(lambda_update="projected", lambda_step=0.05)
    _, first = backward(balancer, theta)
    assert first.weights.tolist() == [0.5, 0.5]
    assert torch.equal(first.next_lambda, balancer.lambda_)
    _, second = backward(balancer, theta)
    assert torch.equal(second.weights, first.next_lambda)
    assert torch.equal(balancer.weights, first.next_lambda)


@pytest.mark.parametrize("rule", ["mirror", "projected"])
@pytest.mark.parametrize("estimator", ["forward", "central", "reuse"])
def test_lockstep_with_the_reference(estimator: str, rule: str) -> None:
    """20 steps: parameters and the whole state of lambda."""
    settings = {"mirror": (0.9, 2.0), "projected": (0.0, 1.0)}[rule]
    reference = reference_marigold.Marigold(
        CASE, torch.tensor(START).double(), estimator, 1e-2, 0.1, rule, *settings
    )
    theta = parameter(START)
    sgd = torch.optim.SGD([theta], lr=0.1)
    mu = None if estimator == "reuse" else 1e-2
    balancer = MARIGOLD(estimator=estimator, mu=mu, lambda_update=rule)
    for _ in range(20):
        sgd.zero_grad()
        balancer.backward(CASE(theta), [theta], closure=lambda: CASE(theta))
        sgd.step()
        if estimator == "reuse":
            balancer.update(CASE(theta))
        reference.step()
        assert torch.allclose(theta.detach(), reference.theta, rtol=1e-9)
        assert torch.allclose(balancer.lambda_, reference.lambda_, rtol=1e-7)
        state = balancer.state_dict()["state"]["rule"]
        assert torch.allclose(state["average"], reference.average, rtol=1e-7)
        assert state["bound"] == pytest.approx(reference.bound, rel=1e-8)


HULL = Quadratics([(1, 1)] * 3, [(0, 0), (2, 0), (0, 2)])
FROM = (3.0, 2.0)
#: The projection of the start on the hull of the centres, on the edge from (2, 0) to (0, 2).
LIMIT = torch.tensor([1.5, 0.5], dtype=torch.float64)


@pytest.mark.parametrize("rule", ["mirror", "projected"])
@pytest.mark.parametrize("estimator", ["forward", "central"])
def test_equal_curvature_follows_mgda_to_its_limit(estimator: str, rule: str) -> None:
    """H_i = I: with lambda where MGDA's is, theta_t = p + (1 - eta)^t (theta_0 - p)."""
    theta = parameter(FROM)
    sgd = torch.optim.SGD([theta], lr=0.1)
    balancer = MARIGOLD(estimator=estimator, lambda_update=rule)
    for _ in range(300):
        backward(balancer, theta, HULL)
    for t in range(1, 81):
        backward(balancer, theta, HULL)
        sgd.step()
        expected = LIMIT + 0.9**t * (torch.tensor(FROM) - LIMIT)
        assert torch.allclose(theta.detach(), expected, atol=2e-3)
    assert torch.allclose(theta.detach(), LIMIT, atol=2e-3)


@pytest.mark.parametrize("estimator", ["central", "reuse"])
def test_coupled_training_reaches_mgdas_limit(estimator: str) -> None:
    """From equal weights, while theta moves: what lambda is late goes to 0 with the rate eta."""
    errors = []
    for eta in (0.04, 0.01):
        reference = reference_marigold.Marigold(
            HULL, torch.tensor(FROM).double(), estimator, 1e-4, eta
        )
        theta = parameter(FROM)
        sgd = torch.optim.SGD([theta], lr=eta)
        balancer = MARIGOLD(estimator=estimator)
        for _ in range(round(6 / eta)):
            sgd.zero_grad()
            balancer.backward(HULL(theta), [theta], closure=lambda theta=theta: HULL(theta))
            sgd.step()
            if estimator == "reuse":
                balancer.update(HULL(theta))
            reference.step()
        assert torch.allclose(theta.detach(), reference.theta, atol=1e-4)
        errors.append(float((theta.detach() - LIMIT).norm()))
    assert errors[0] < 0.15
    assert errors[1] < 0.4 * errors[0]


def min_norm(gram: torch.Tensor) -> float:
    """MGDA's optimum Phi* by projected gradient descent, long enough to be exact to 1e-10."""
    lambda_ = torch.full((len(gram),), 1 / len(gram), dtype=torch.float64)
    bound = float(torch.linalg.eigvalsh(gram)[-1])
    for _ in range(5000):
        lambda_ = simplex_projection(lambda_ - gram @ lambda_ / bound).weights
    return float(lambda_ @ gram @ lambda_) / 2


@pytest.mark.parametrize("mu", [0.01, 0.1, 0.3])
def test_fixed_point_guarantee(mu: float) -> None:
    """Phi(lambda_hat) - Phi* <= max_j bias_j - min_j bias_j where biased descent settles."""
    f = Quadratics([(2, 1), (1, 3), (4, 1)], [(0, 0), (3, 1), (-1, 3)])
    theta = parameter((1.0, 2.0))
    balancer = MARIGOLD(estimator="forward", mu=mu, lambda_update="projected")
    for _ in range(500):
        backward(balancer, theta, f)
    g = f.gradients(theta)
    gram = g @ g.T
    lambda_ = balancer.lambda_
    bias = balancer.last_derivatives - gram @ balancer.weights
    gap = float(lambda_ @ gram @ lambda_) / 2 - min_norm(gram)
    assert float((balancer.weights - lambda_).abs().max()) < 1e-9  # it has settled
    assert -1e-9 <= gap <= float(bias.max() - bias.min()) + 1e-9


def test_bias_bounds_as_mu_shrinks() -> None:
    """Forward falls like mu, central like mu^2, until rounding: Lemma 3.1's kind of bound."""
    model = Smooth()
    errors: dict[str, list[float]] = {"forward": [], "central": []}
    mus = [0.1, 0.05, 0.025, 0.0125]
    rows = [torch.autograd.grad(loss, model.shared(), retain_graph=True) for loss in model.losses()]
    g = torch.stack([torch.cat([x.reshape(-1) for x in row]) for row in rows])
    y = g @ g.mean(0)
    for estimator, found in errors.items():
        for mu in mus:
            balancer = MARIGOLD(estimator=estimator, mu=mu)
            _, info = balancer.backward(model.losses(), model.shared(), closure=model.losses)
            found.append(float((info.derivatives - y).norm() / y.norm()))
    slopes = {
        name: math.log(found[0] / found[-1]) / math.log(mus[0] / mus[-1])
        for name, found in errors.items()
    }
    assert slopes["forward"] == pytest.approx(1, abs=0.1)
    assert slopes["central"] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(
    ("estimator", "dtype", "bound"),
    [("forward", torch.float32, 1e-2), ("central", torch.float32, 1e-3),
     ("forward", torch.float64, 1e-6), ("central", torch.float64, 1e-8)],
)  # fmt: skip
def test_default_steps_give_accurate_derivatives(estimator, dtype, bound) -> None:
    model = Smooth(dtype=dtype)
    balancer = MARIGOLD(estimator=estimator)
    _, info = balancer.backward(model.losses(), model.shared(), closure=model.losses)
    rows = [torch.autograd.grad(loss, model.shared(), retain_graph=True) for loss in model.losses()]
    g = torch.stack([torch.cat([x.reshape(-1) for x in row]) for row in rows]).double()
    y = g @ g.mean(0)
    assert float((info.derivatives - y).norm() / y.norm()) < bound


@pytest.mark.parametrize("gamma", [0.0, 1e-2])
@pytest.mark.parametrize("minima", [None, [-1.0, -0.5, -2.0]])
def test_famo_is_a_special_case(gamma: float, minima: list[float] | None) -> None:
    """The same trajectory as the FAMO balancer: reuse, on log f, with FAMO's own step."""
    ours, theirs = Smooth(), Smooth()
    marigold = MARIGOLD(criterion="famo", famo_gamma=gamma, min_losses=minima)
    famo = fastmto.balancers.FAMO(gamma=gamma, min_losses=minima)
    for model, balancer in ((ours, marigold), (theirs, famo)):
        adam = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(50):
            adam.zero_grad()
            balancer.backward(model.losses())
            adam.step()
            balancer.update(model.losses())
    assert float((marigold.weights - 1 / 3).abs().max()) > 1e-2  # the weights did move
    assert torch.allclose(marigold.weights, famo.weights, rtol=1e-9)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-12)


def test_preference_sets_the_rates_of_descent() -> None:
    """At MGDA's solution for f_i / p_i every task descends at a rate proportional to p_i."""
    preference = [1.0, 3.0]
    theta = parameter(START)
    balancer = MARIGOLD(preference=preference, lambda_update="projected")
    for _ in range(500):
        backward(balancer, theta)
    rates = CASE.gradients(theta) @ theta.grad
    assert float(rates[1] / rates[0]) == pytest.approx(3, rel=1e-4)
    equal = MARIGOLD(preference=[2.0, 2.0], lambda_step=0.1, ema=0.0)
    backward(equal, theta)
    assert equal.lambda_.tolist() == pytest.approx((0.5621765, 0.4378235), abs=5e-8)


def test_log_losses_make_scales_irrelevant() -> None:
    """log f: multiplying a loss by a constant changes nothing but its weight."""

    def scaled(theta: torch.Tensor) -> torch.Tensor:
        return CASE(theta) * torch.tensor([100.0, 1.0]).double()

    first, second = parameter(START), parameter(START)
    plain, other = MARIGOLD(log_losses=True), MARIGOLD(log_losses=True)
    for _ in range(3):
        backward(plain, first)
        backward(other, second, scaled)
    assert torch.allclose(plain.lambda_, other.lambda_, rtol=1e-9)
    assert torch.allclose(first.grad, second.grad, rtol=1e-9)


def test_update_every() -> None:
    theta = parameter(START)
    balancer = MARIGOLD(update_every=3)
    assert balancer.update_weights_every == balancer.update_every == 3
    seen = []
    for _ in range(7):
        _, info = backward(balancer, theta)
        seen.append(info.evaluations)
    assert seen == [2, 0, 0, 2, 0, 0, 2]
    assert balancer.stats["searches"] == 3
    assert balancer.stats["evaluations"] == 6
    assert balancer.stats["backwards"] == balancer.stats["steps"] == 7
    assert MARIGOLD(update_weights_every=4).update_every == 4


def test_absent_tasks_keep_still() -> None:
    f = Quadratics([(2, 1), (1, 3), (4, 1)], [(0, 0), (3, 1), (-1, 3)])
    theta = parameter(START)
    for rule in ("mirror", "projected"):
        balancer = MARIGOLD(3, lambda_update=rule)

        def some() -> list[torch.Tensor | None]:
            losses = f(theta)
            return [losses[0], None, losses[2]]

        backward(balancer, theta, f)
        before = balancer.lambda_
        average = balancer.state_dict()["state"]["rule"]["average"]
        theta.grad = None
        _, info = balancer.backward(some(), [theta], closure=some)
        assert info.derivatives.shape == (2,)
        assert balancer.lambda_[1] == before[1]
        assert not torch.equal(balancer.lambda_, before)
        assert float(balancer.lambda_.sum()) == pytest.approx(1, abs=1e-12)
        assert balancer.state_dict()["state"]["rule"]["average"][1] == average[1]


@pytest.mark.parametrize("step", [1e-2, 0.3, 1e300])
@pytest.mark.parametrize("total", [1.0, 0.5, 1e-300])
def test_projected_descent_keeps_the_sum_of_the_present_tasks(total: float, step: float) -> None:
    """The nearest point of that sum: what is taken off is the same wherever something is left."""
    before = torch.tensor([0.25 * total, 1 - total, 0.75 * total], dtype=torch.float64)
    y = torch.tensor([2.0, 1.0], dtype=torch.float64)
    after = Projected(3, 1.0, step, 0.0).move(before, y, 1.0, [0, 2])
    assert after[1] == before[1]
    assert float(after[[0, 2]].sum()) == pytest.approx(total, rel=1e-12)
    assert bool((after >= 0).all())
    taken = (before - after)[[0, 2]] - step * y
    if step < total / 2:  # both stay above 0
        assert float(taken[0]) == pytest.approx(float(taken[1]), rel=1e-12)
    else:
        assert after[[0, 2]].tolist() == pytest.approx([0, total], rel=1e-12)


def test_a_step_too_long_for_float64_is_refused() -> None:
    y = torch.tensor([1e10, 2e10], dtype=torch.float64)
    with pytest.raises(SolverError, match="lambda_step must leave lambda finite"):
        Projected(2, 1.0, 1e300, 0.0).move(torch.tensor([0.5, 0.5]).double(), y, 1.0, [0, 1])


def test_named_tasks() -> None:
    theta = parameter(START)

    def named() -> dict[str, torch.Tensor]:
        a, b = CASE(theta)
        return {"a": a, "b": b}

    balancer = MARIGOLD(estimator="central", mu=0.1)
    _, info = balancer.backward(named(), [theta], closure=named)
    assert info.tasks == ["a", "b"]
    assert info.derivatives.tolist() == pytest.approx((5, 7.5))


def test_only_this_backwards_gradient_is_d() -> None:
    theta = parameter(START)
    balancer = MARIGOLD(estimator="central", mu=0.1)
    held = theta.grad = torch.tensor([100.0, -50.0], dtype=torch.float64)
    _, info = balancer.backward(CASE(theta), [theta], closure=lambda: CASE(theta))
    assert info.derivatives.tolist() == pytest.approx((5, 7.5))
    assert theta.grad is held
    assert held.tolist() == [100, -47.5]


def test_at_a_stationary_point_nothing_moves() -> None:
    f = Quadratics([(1, 1)] * 2, [(-1, 0), (1, 0)])
    theta = parameter((0.0, 0.0))
    balancer = MARIGOLD()
    _, info = backward(balancer, theta, f)
    assert balancer.stats["stationary"] == 1
    assert info.evaluations == 0
    assert balancer.lambda_.tolist() == [0.5, 0.5]


def test_info_and_repr() -> None:
    balancer = MARIGOLD(estimator="forward")
    _, info = backward(balancer, parameter(START))
    assert info.evaluation == info["evaluation"] == "sequential"
    assert set(info) >= {"weights", "derivatives", "next_lambda", "dropped", "estimator"}
    assert info.dropped is None
    assert repr(balancer).startswith("MARIGOLD(n_tasks=2, criterion='mgda', estimator='forward'")
    assert copy.deepcopy(balancer).lambda_.tolist() == balancer.lambda_.tolist()

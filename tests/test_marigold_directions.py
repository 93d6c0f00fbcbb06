"""Gram matrices from random directions (unbiased, of known variance) and from known vectors."""

from __future__ import annotations

import math

import pytest
import torch
from marigold_cases import Smooth, parameter

from fastmto import MARIGOLD, FunctionalClosure
from fastmto.marigold.estimators import directions_gram, span_gram
from fastmto.marigold.perturb import Copies
from fastmto.reference import marigold as reference_marigold

DISTRIBUTIONS = ["gaussian", "rademacher", "sphere"]


def rows(n_tasks: int, p: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    g = torch.randn(n_tasks, p, generator=generator, dtype=torch.float64)
    return g + 0.5 * torch.randn(1, p, generator=generator, dtype=torch.float64)


def draws(count: int, p: int, distribution: str, seed: int = 7) -> torch.Tensor:
    """u (count, P), as the copies are displaced by them."""
    theta = torch.nn.Parameter(torch.zeros(p, dtype=torch.float64))
    copies = Copies([theta], 1)
    u = torch.empty(count, p, dtype=torch.float64)
    (row,) = copies.stacked()
    for r in range(count):
        copies.displace_at_random(0, [1.0], seed, r, distribution)
        u[r] = row[0]
    return u


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_unbiased_and_of_the_known_variance(distribution: str) -> None:
    """Mean and variance of every entry over 20,000 draws, within 5 standard errors."""
    count, p = 20_000, 17
    g = rows(3, p)
    y = draws(count, p, distribution) @ g.T
    single = y[:, :, None] * y[:, None, :]  # G_hat of one direction each
    gram = g @ g.T
    variance = reference_marigold.directions_variance(g, distribution)
    assert ((single.mean(0) - gram).abs() <= 5 * (variance / count).sqrt()).all()
    fourth = ((single - gram) ** 2 - variance).square().mean(0)
    observed = ((single - gram) ** 2).mean(0)
    assert ((observed - variance).abs() <= 5 * (fourth / count).sqrt()).all()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_balancer_is_unbiased(distribution: str) -> None:
    """The mean of its Gram matrices over 150 estimates of 8 directions, on linear losses."""
    p, estimates, count = 11, 150, 8
    g = rows(2, p)
    theta = parameter([0.1 * k for k in range(p)])
    balancer = MARIGOLD(
        criterion=lambda gram: torch.ones(len(gram)) / len(gram),
        estimator="directions",
        n_directions=count,
        distribution=distribution,
        mu=1e-3,
    )
    total = torch.zeros(2, 2, dtype=torch.float64)
    for _ in range(estimates):
        _, info = balancer.backward(g @ theta, [theta], closure=lambda: g @ theta)
        assert info.evaluations == count + 1  # the losses at theta, too: nothing was recorded
        total += info.gram
    variance = reference_marigold.directions_variance(g, distribution) / (estimates * count)
    assert ((total / estimates - g @ g.T).abs() <= 5 * variance.sqrt()).all()


def test_directions_are_what_their_names_say() -> None:
    p = 33
    assert draws(3, p, "rademacher").abs().eq(1).all()
    assert torch.allclose(
        draws(3, p, "sphere").norm(dim=1), torch.full((3,), math.sqrt(p)).double()
    )
    gaussian = draws(3000, p, "gaussian")
    assert float(gaussian.mean().abs()) < 5 / math.sqrt(gaussian.numel())
    assert float(gaussian.square().mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / 99_000))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_same_seed_gives_the_same_directions(distribution: str) -> None:
    first = draws(4, 50, distribution)
    assert torch.equal(first, draws(4, 50, distribution))
    assert not torch.equal(first, draws(4, 50, distribution, seed=8))
    assert len({tuple(row.tolist()) for row in first}) == 4


def test_groups_of_another_dtype_have_directions_of_their_own() -> None:
    a = torch.nn.Parameter(torch.zeros(64))
    b = torch.nn.Parameter(torch.zeros(64, dtype=torch.float64))
    copies = Copies([a, b], 1)
    copies.displace_at_random(0, [1.0], 7, 0, "gaussian")
    first, second = (rows[0].double() for rows in copies.stacked())
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.5


def test_gram_of_directions_in_the_papers_notation() -> None:
    g, u = rows(3, 20), draws(6, 20, "gaussian")
    assert torch.allclose(
        directions_gram(u @ g.T), reference_marigold.directions_gram(g, u), rtol=1e-12
    )
    assert int(torch.linalg.matrix_rank(directions_gram(u[:2] @ g.T))) == 2


def test_gram_of_a_span() -> None:
    """G_hat is the projection's: at most G, exact where the gradients are in the span."""
    g, v = rows(3, 20), rows(4, 20) * torch.logspace(-3, 3, 4).double()[:, None]
    found = span_gram(v @ g.T, v @ v.T)
    assert torch.allclose(found, reference_marigold.span_gram(g, v), rtol=1e-6, atol=1e-9)
    assert float(torch.linalg.eigvalsh(g @ g.T - found)[0]) >= -1e-9
    inside = torch.cat([v, v.sum(0, keepdim=True)])  # a vector too many
    combined = torch.tensor([[1.0, 0, 2, 0], [0, 1, 0, 1], [3, 0, 0, 0]]).double() @ v
    gram = combined @ combined.T
    found = span_gram(inside @ combined.T, inside @ inside.T)
    scale = gram.diagonal().sqrt()
    assert float(((found - gram) / scale[:, None] / scale).abs().max()) < 1e-8


def exact_gram(model: Smooth) -> torch.Tensor:
    grads = [
        torch.autograd.grad(loss, model.shared(), retain_graph=True) for loss in model.losses()
    ]
    g = torch.stack([torch.cat([x.reshape(-1) for x in row]) for row in grads])
    return g @ g.T


def relative(found: torch.Tensor, gram: torch.Tensor) -> float:
    scale = gram.diagonal().sqrt()
    return float(((found - gram) / scale[:, None] / scale).abs().max())


def test_old_gradients_go_on_spanning_the_new_ones() -> None:
    """Relative error of G_hat after theta moved by 1e-2 of its length: about 1e-4, no variance."""
    model = Smooth()
    balancer = MARIGOLD(estimator="span", difference="central")
    shared = model.shared()
    balancer.backward(model.losses(), shared, closure=model.losses)
    assert balancer.stats["backwards"] == 4  # three for the span, one for the step
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        length = math.sqrt(sum(float(p.square().sum()) for p in shared))
        moves = [torch.randn(p.shape, generator=generator).double() for p in shared]
        total = math.sqrt(sum(float(m.square().sum()) for m in moves))
        for p, move in zip(shared, moves, strict=True):
            p += 1e-2 * length / total * move
    _, info = balancer.backward(model.losses(), shared, closure=model.losses)
    assert balancer.stats["backwards"] == 5
    gram = exact_gram(model)
    assert 1e-7 < relative(info.gram, gram) < 2e-3
    assert float(torch.linalg.eigvalsh(gram - info.gram)[0]) > -1e-9
    for _ in range(100):  # until the refresh
        _, info = balancer.backward(model.losses(), shared, closure=model.losses)
    assert balancer.stats["backwards"] == 5 + 100 + 3
    assert relative(info.gram, gram) < 1e-8


def test_past_steps_as_a_span() -> None:
    model = Smooth()
    balancer = MARIGOLD(estimator="span", span="steps", n_directions=4, difference="central")
    sgd = torch.optim.SGD(model.shared(), lr=0.05)
    counts = []
    for _ in range(6):
        sgd.zero_grad()
        _, info = balancer.backward(model.losses(), model.shared(), closure=model.losses)
        counts.append(info.evaluations)
        gram = exact_gram(model)
        assert float(torch.linalg.eigvalsh(gram - info.gram)[0]) > -1e-6
        sgd.step()
    assert counts == [2, 4, 6, 8, 8, 8]
    assert balancer.stats["backwards"] == 6


@pytest.mark.parametrize("criterion", ["mgda", "bargaining", "imtl_g", "cagrad", "fairgrad"])
def test_criteria_on_the_estimated_gram(criterion: str) -> None:
    """With an exact span lambda is what the criterion's weighting says for the true Gram."""
    model = Smooth()
    balancer = MARIGOLD(criterion=criterion, estimator="span", difference="central")
    _, info = balancer.backward(model.losses(), model.shared(), closure=model.losses)
    exact = balancer._weighting(exact_gram(model))
    assert torch.allclose(info.next_lambda, exact, rtol=1e-5)
    assert info.status == "solved"
    _, info = balancer.backward(model.losses(), model.shared(), closure=model.losses)
    assert torch.allclose(info.weights, exact, rtol=1e-5)


def test_a_callable_criterion() -> None:
    model = Smooth()
    balancer = MARIGOLD(criterion=lambda gram: 1 / gram.diagonal(), estimator="span")
    _, info = balancer.backward(model.losses(), model.shared(), closure=model.losses)
    assert torch.allclose(info.next_lambda, 1 / info.gram.diagonal())
    wrong = MARIGOLD(criterion=lambda gram: gram, estimator="span")
    with pytest.raises(ValueError, match="criterion must return 3 finite weights"):
        wrong.backward(model.losses(), model.shared(), closure=model.losses)


def test_bargaining_with_a_preference() -> None:
    model = Smooth()
    balancer = MARIGOLD(
        criterion="bargaining", estimator="span", preference=[1.0, 2.0, 3.0], difference="central"
    )
    balancer.backward(model.losses(), model.shared(), closure=model.losses)
    a = balancer.lambda_
    assert (a * (exact_gram(model) @ a)).tolist() == pytest.approx([1, 2, 3], rel=1e-5)


def test_average_of_grams() -> None:
    model = Smooth()
    plain = MARIGOLD(estimator="directions", n_directions=3, criterion=lambda g: torch.ones(3))
    mixed = MARIGOLD(
        estimator="directions", n_directions=3, criterion=lambda g: torch.ones(3), ema=0.75
    )
    found = [
        [b.backward(model.losses(), model.shared(), closure=model.losses)[1].gram for _ in "ab"]
        for b in (plain, mixed)
    ]
    assert torch.equal(found[0][0], found[1][0])
    assert torch.allclose(found[1][1], 0.75 * found[0][0] + 0.25 * found[0][1], rtol=1e-12)


def test_too_few_directions_hold_the_weights() -> None:
    """R = 1 for three tasks: a Gram matrix of rank 1 has no bargaining solution."""
    model = Smooth()
    options = {"criterion": "bargaining", "estimator": "directions", "n_directions": 1}
    balancer = MARIGOLD(**options)
    with pytest.warns(RuntimeWarning, match="weights held"):
        _, info = balancer.backward(model.losses(), model.shared(), closure=model.losses)
    assert balancer.stats["held"] == 1
    assert info.status != "solved"
    assert balancer.lambda_.tolist() == pytest.approx([1 / 3] * 3)
    from fastmto.errors import SolverError

    with pytest.raises(SolverError):
        MARIGOLD(**options, on_failure="raise").backward(
            model.losses(), model.shared(), closure=model.losses
        )


def test_default_number_of_directions() -> None:
    model = Smooth()
    balancer = MARIGOLD(estimator="directions")
    _, info = balancer.backward(model.losses(), model.shared(), closure=model.losses)
    assert info.evaluations == 4 * 3 + 1
    with balancer.recording():
        losses = model.losses()
    _, info = balancer.backward(losses, model.shared(), closure=model.losses)
    assert info.evaluations == 4 * 3
    central = MARIGOLD(estimator="directions", difference="central")
    _, info = central.backward(model.losses(), model.shared(), closure=model.losses)
    assert info.evaluations == 2 * 4 * 3


@pytest.mark.parametrize("evaluation", ["sequential", "batched"])
@pytest.mark.parametrize("estimator", ["directions", "span"])
@pytest.mark.parametrize("record", [False, True])
def test_dropout(estimator: str, evaluation: str, record: bool) -> None:
    """Forward differences find what central ones do, also where the given losses have other masks:
    masks that differ between the two sides of a difference would give entries of 1e6 and more."""
    grams = []
    for difference in ("forward", "central"):
        model = Smooth()
        model.trunk.insert(2, torch.nn.Dropout(0.5))
        closure = FunctionalClosure(model, lambda model: model.losses())
        balancer = MARIGOLD(estimator=estimator, difference=difference, evaluation=evaluation)
        torch.manual_seed(0)
        if record:
            with balancer.recording():
                losses = closure()
        else:
            losses = closure()
        _, info = balancer.backward(losses, model.shared(), closure=closure)
        grams.append(info.gram)
    assert float(grams[1].diagonal().max()) < 10
    assert relative(*grams) < 1e-4

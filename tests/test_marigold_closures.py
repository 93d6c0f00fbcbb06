"""What an evaluation leaves behind (nothing), and closures that do what they must not."""

from __future__ import annotations

import random

import pytest
import torch
from marigold_cases import Quadratics, Smooth, parameter
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastmto
from fastmto import MARIGOLD, FunctionalClosure
from fastmto.marigold.perturb import Copies

ESTIMATORS = ["forward", "central", "directions", "span"]


class Dropping(nn.Module):
    """A trunk with dropout and BatchNorm, two heads."""

    def __init__(self, dropout: float = 0.5, norm: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers: list[nn.Module] = [nn.Linear(4, 24)]
            if norm:
                layers.append(nn.BatchNorm1d(24))
            layers += [nn.Tanh(), nn.Dropout(dropout)]
            self.trunk = nn.Sequential(*layers)
            self.heads = nn.ModuleList(nn.Linear(24, 1) for _ in range(2))
            self.x = torch.randn(16, 4)

    def losses(self) -> list[Tensor]:
        z = self.trunk(self.x)
        return [(head(z) - i).pow(2).mean() for i, head in enumerate(self.heads)]


def bits(tensors) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_everything_is_as_before(estimator: str) -> None:
    """Parameters and their memory, gradients, buffers, random numbers, bit for bit."""
    model = Dropping()
    shared = list(model.trunk.parameters())
    losses = model.losses()
    before, pointers = bits(model.parameters()), [p.data_ptr() for p in model.parameters()]
    buffers, state = bits(model.buffers()), torch.get_rng_state()
    balancer = MARIGOLD(estimator=estimator)
    balancer.backward(losses, shared, closure=model.losses)
    assert balancer.stats["evaluations"] > 0
    for p, value, pointer in zip(model.parameters(), before, pointers, strict=True):
        assert torch.equal(p, value)
        assert p.data_ptr() == pointer
    for buffer, value in zip(model.buffers(), buffers, strict=True):
        assert torch.equal(buffer, value)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_gradient_is_that_of_a_plain_backward() -> None:
    model, plain = Smooth(), Smooth()
    MARIGOLD().backward(model.losses(), model.shared(), closure=model.losses)
    (sum(plain.losses()) / 3).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-12)


@pytest.mark.parametrize("at", [1, 2])
def test_a_closure_that_raises(at: int) -> None:
    """In the first or the second evaluation: everything back, lambda as it was."""
    model = Dropping()
    shared = list(model.trunk.parameters())
    losses = model.losses()
    before, buffers, state = bits(shared), bits(model.buffers()), torch.get_rng_state()
    calls = 0

    def closure() -> list[Tensor]:
        nonlocal calls
        calls += 1
        found = model.losses()
        if calls == at:
            raise KeyError("in the middle")
        return found

    balancer = MARIGOLD(2)
    with pytest.raises(KeyError, match="in the middle"):
        balancer.backward(losses, shared, closure=closure)
    assert all(torch.equal(p, value) for p, value in zip(shared, before, strict=True))
    assert all(torch.equal(b, value) for b, value in zip(model.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert balancer.lambda_.tolist() == [0.5, 0.5]
    assert balancer.stats["steps"] == 0
    _, info = balancer.backward(model.losses(), shared, closure=model.losses)  # goes on
    assert info.derivatives.isfinite().all()


def masks(model: Dropping, balancer: MARIGOLD, record: bool) -> list[Tensor]:
    """The dropout masks of the losses and of the evaluations of one step."""
    seen: list[Tensor] = []

    def remember(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        seen.append((output == 0) & (inputs[0] != 0))

    handle = model.trunk[-1].register_forward_hook(remember)
    if record:
        with balancer.recording():
            losses = model.losses()
    else:
        losses = model.losses()
    balancer.backward(losses, list(model.trunk.parameters()), closure=model.losses)
    handle.remove()
    return seen


def test_dropout_masks_are_the_same_in_an_estimate() -> None:
    torch.manual_seed(0)
    model, balancer = Dropping(), MARIGOLD()
    base, plus, minus = masks(model, balancer, record=False)
    assert torch.equal(plus, minus)
    assert not torch.equal(base, plus)
    base, plus, minus = masks(model, balancer, record=True)
    assert torch.equal(base, plus)
    assert torch.equal(plus, minus)
    after = model.losses()  # the masks of training go on changing
    assert not torch.equal(after[0], model.losses()[0])


def test_forward_differences_need_recording_where_losses_are_random() -> None:
    torch.manual_seed(0)
    model = Dropping(norm=False)
    shared = list(model.trunk.parameters())
    balancer = MARIGOLD(estimator="forward", debug=True)
    with pytest.raises(ValueError, match=r"closure must give the same losses.*recording\(\)"):
        balancer.backward(model.losses(), shared, closure=model.losses)
    with balancer.recording():
        losses = model.losses()
    _, info = balancer.backward(losses, shared, closure=model.losses)
    assert info.derivatives.abs().max() < 100  # not the noise of masks divided by mu


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_loss_under_autocast_keeps_its_precision(estimator: str) -> None:
    torch.manual_seed(0)
    model, balancer = Dropping(dropout=0.0, norm=False), MARIGOLD(estimator=estimator)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [loss.float() for loss in model.losses()]
        loss, _ = balancer.backward(losses, list(model.trunk.parameters()), closure=model.losses)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(sum(losses).detach()) / 2, rel=1e-6)


def test_replaying_for_reuse() -> None:
    torch.manual_seed(0)
    model = Dropping(dropout=0.3)
    balancer = MARIGOLD(estimator="reuse")
    shared = list(model.trunk.parameters())
    sgd = torch.optim.SGD(shared, lr=1e-5)
    with balancer.recording():
        losses = model.losses()
    balancer.backward(losses, shared)
    sgd.step()
    buffers, state = bits(model.buffers()), torch.get_rng_state()
    with balancer.replaying():
        after = model.losses()
    assert all(torch.equal(b, value) for b, value in zip(model.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert not after[0].requires_grad
    assert float(losses[0].detach() - after[0]) < 1e-3  # the same masks: only the tiny step differs
    balancer.update(after)
    d = torch.cat([p.grad.reshape(-1) for p in shared]).double()
    derivatives = balancer.last_derivatives
    assert float(derivatives.mean()) == pytest.approx(float(d @ d), rel=0.05)
    with (
        pytest.raises(RuntimeError, match=r"replaying\(\) needs recording\(\)"),
        balancer.replaying(),
    ):
        pass


def test_spectral_norm_and_replaced_buffers_come_back() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.utils.spectral_norm(nn.Linear(3, 3))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return self.layer(x)

    torch.manual_seed(0)
    model = Counting()
    x = torch.randn(5, 3)

    def losses() -> list[Tensor]:
        z = model(x)
        return [z.pow(2).mean(), (z - 1).pow(2).mean()]

    found = losses()
    before = bits(model.buffers())
    MARIGOLD().backward(found, list(model.parameters()), closure=losses)
    assert float(model.calls) == 1
    assert all(torch.equal(b, value) for b, value in zip(model.buffers(), before, strict=True))


def test_a_functional_closure_needs_no_hook() -> None:
    """Buffers are found by the module: compiled models, which global hooks disturb, are fine."""
    model = Dropping()
    compiled = torch.compile(model.trunk, backend="eager")

    def losses(model: nn.Module) -> list[Tensor]:
        z = compiled(model.x)
        return [(head(z) - i).pow(2).mean() for i, head in enumerate(model.heads)]

    plain, functional = [], []
    for found, run in ((plain, model.losses), (functional, FunctionalClosure(model, losses))):
        torch.manual_seed(0)
        balancer = MARIGOLD()
        with balancer.recording():
            given = run()
        before = bits(model.buffers())
        _, info = balancer.backward(given, list(model.trunk.parameters()), closure=run)
        assert all(torch.equal(b, v) for b, v in zip(model.buffers(), before, strict=True))
        found.append(info.derivatives)
    assert torch.allclose(plain[0], functional[0], rtol=1e-4)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_batched_equals_sequential(estimator: str) -> None:
    model = Smooth()
    closure = FunctionalClosure(model, lambda model: model.losses())
    assert torch.equal(torch.stack(closure()), torch.stack(model.losses()))
    found = []
    for evaluation in ("sequential", "batched"):
        balancer = MARIGOLD(estimator=estimator, evaluation=evaluation)
        _, info = balancer.backward(model.losses(), model.shared(), closure=closure)
        assert info.evaluation == evaluation
        found.append((info.derivatives if info.gram is None else info.gram, info.evaluations))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-6)
    assert found[0][1] == found[1][1]


def test_batched_draws_the_sequential_masks() -> None:
    torch.manual_seed(0)
    model = Dropping(norm=False)
    closure = FunctionalClosure(model, lambda model: model.losses())
    found = []
    for evaluation in ("sequential", "batched"):
        balancer = MARIGOLD(evaluation=evaluation)
        torch.manual_seed(5)
        with balancer.recording():
            losses = model.losses()
        _, info = balancer.backward(losses, list(model.trunk.parameters()), closure=closure)
        found.append(info.derivatives)
    assert torch.allclose(*found, rtol=1e-3)


def test_what_cannot_be_batched_says_so() -> None:
    model = Dropping()
    shared = list(model.trunk.parameters())
    before = bits(model.parameters())
    balancer = MARIGOLD(evaluation="batched")
    with pytest.raises(ValueError, match=r"closure must be a fastmto\.FunctionalClosure"):
        balancer.backward(model.losses(), shared, closure=model.losses)
    losses = model.losses()
    buffers = bits(model.buffers())
    with pytest.raises(RuntimeError, match="use evaluation='sequential'"):
        balancer.backward(
            losses, shared, closure=FunctionalClosure(model, lambda model: model.losses())
        )
    assert all(torch.equal(p, v) for p, v in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(b, v) for b, v in zip(model.buffers(), buffers, strict=True))
    stranger = FunctionalClosure(Smooth(), lambda model: model.losses())
    with pytest.raises(ValueError, match=r"shared_parameters\[0\].*must be a parameter of"):
        balancer.backward(model.losses(), shared, closure=stranger)


CASE = Quadratics()


def test_a_closure_with_another_number_of_losses() -> None:
    theta = parameter((1.0, 2.0))
    for wrong in (lambda: CASE(theta)[:1], lambda: [CASE(theta)[0]] * 3, lambda: CASE(theta).sum()):
        with pytest.raises(ValueError, match="closure's losses must be like those given"):
            MARIGOLD().backward(CASE(theta), [theta], closure=wrong)
    with pytest.raises(ValueError, match=r"must hold the tasks.*losses\[1\] is None"):
        MARIGOLD().backward(CASE(theta), [theta], closure=lambda: [CASE(theta)[0], None])


def test_a_closure_that_is_not_deterministic() -> None:
    theta = parameter((1.0, 2.0))
    numbers = random.Random(0)
    for estimator in ESTIMATORS:
        balancer = MARIGOLD(estimator=estimator, debug=True)
        with pytest.raises(ValueError, match=r"closure must give the same losses.*losses\[0\]"):
            balancer.backward(
                CASE(theta), [theta], closure=lambda: CASE(theta) * (1 + numbers.random())
            )
        fine = MARIGOLD(estimator=estimator, debug=True)
        _, info = fine.backward(CASE(theta), [theta], closure=lambda: CASE(theta))
        assert info.evaluations == fine.stats["evaluations"]


def test_a_closure_that_moves_parameters() -> None:
    theta = parameter((1.0, 2.0))

    def moves() -> Tensor:
        theta.add_(1.0)
        return CASE(theta)

    def replaces() -> Tensor:
        theta.data = torch.zeros(2, dtype=torch.float64)
        return CASE(theta)

    for closure in (moves, replaces):
        with pytest.raises(ValueError, match=r"closure must only compute losses.*\[0\]"):
            MARIGOLD().backward(CASE(theta), [theta], closure=closure)
        assert theta.tolist() == [1, 2]


def test_a_closure_that_makes_an_optimizers_step() -> None:
    theta = parameter((1.0, 2.0))
    sgd = torch.optim.SGD([theta], lr=0.1)

    def steps() -> Tensor:
        sgd.step()
        return CASE(theta)

    with pytest.raises(ValueError, match="closure must only compute losses"):
        MARIGOLD().backward(CASE(theta), [theta], closure=steps)
    assert theta.tolist() == [1, 2]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_losses_that_are_not_finite_drop_the_estimate(estimator: str, bad: float) -> None:
    theta = parameter((1.0, 2.0))
    balancer = MARIGOLD(estimator=estimator)
    backward = lambda closure: balancer.backward(CASE(theta), [theta], closure=closure)  # noqa: E731
    backward(lambda: CASE(theta))
    before = balancer.lambda_
    with pytest.warns(RuntimeWarning, match="estimate dropped: a displaced loss is not finite"):
        _, info = backward(lambda: CASE(theta) * torch.tensor([1.0, bad]))
    assert info.dropped == "a displaced loss is not finite"
    assert balancer.stats["dropped"] == 1
    assert balancer.stats["steps"] == 2
    assert torch.equal(balancer.lambda_, before)
    _, info = backward(lambda: CASE(theta))
    assert info.dropped is None


def test_a_gradient_that_is_not_finite_drops_the_estimate() -> None:
    theta = parameter((0.0, 1.0))

    def losses() -> Tensor:
        return torch.stack([theta[0].sqrt(), theta[1]])  # the slope of the root is infinite

    balancer = MARIGOLD()
    with pytest.warns(RuntimeWarning, match="estimate dropped: the gradient is not finite"):
        balancer.backward(losses(), [theta], closure=losses)
    assert balancer.stats["evaluations"] == 0


def test_losses_that_are_not_finite_after_the_step() -> None:
    theta = parameter((1.0, 2.0))
    balancer = MARIGOLD(estimator="reuse", step_size=0.1)
    balancer.backward(CASE(theta), [theta])
    with pytest.warns(RuntimeWarning, match="estimate dropped"):
        balancer.update([torch.tensor(float("nan")), torch.tensor(1.0)])
    assert balancer.lambda_.tolist() == [0.5, 0.5]
    strict = MARIGOLD(estimator="reuse", step_size=0.1, on_nonfinite="raise")
    strict.backward(CASE(theta), [theta])
    with pytest.raises(fastmto.errors.NonFiniteError, match="update: a loss is not finite"):
        strict.update([torch.tensor(float("nan")), torch.tensor(1.0)])


def test_a_step_below_the_parameters_resolution() -> None:
    theta = parameter((1.0, 2.0), torch.float32)
    f = lambda: (theta - 3.0) ** 2  # noqa: E731
    with pytest.raises(
        ValueError, match=r"relative_step must be at least 4.77e-07 here, got 1e-08"
    ):
        MARIGOLD(relative_step=1e-8).backward(f(), [theta], closure=f)
    with pytest.raises(ValueError, match=r"mu must be at least \d.*below the resolution of"):
        MARIGOLD(mu=1e-9).backward(f(), [theta], closure=f)
    named = 5.3e-7
    _, info = MARIGOLD(relative_step=named).backward(f(), [theta], closure=f)
    assert info.step == pytest.approx(named * 5**0.5)


def test_realised_steps_are_used() -> None:
    """Near the resolution displaced parameters are rounded; the derivative does not suffer."""
    theta = parameter((1000.0, 1.0), torch.float32)
    g = torch.tensor([[1.0, 2.0], [3.0, -1.0]])

    def losses() -> Tensor:
        return (g.double() * (theta.double() - torch.tensor([1000.0, 1.0]))).sum(1)

    for estimator in ("forward", "central"):
        balancer = MARIGOLD(estimator=estimator, relative_step=5e-7)
        _, info = balancer.backward(losses(), [theta], closure=losses)
        d = g.mean(0).double()
        assert (info.derivatives @ torch.ones(2).double() / 2) == pytest.approx(float(d @ d))


def test_half_precision_parameters_are_refused() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        theta = parameter((1.0, 2.0), dtype)
        f = lambda theta=theta: theta**2  # noqa: E731
        with pytest.raises(ValueError, match=r"shared_parameters\[0\].*must be float32 or float64"):
            MARIGOLD().backward(f(), [theta], closure=f)
        assert theta.grad is None


def test_autocast_takes_its_own_steps() -> None:
    model = Smooth(dtype=torch.float32)

    def losses() -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model.losses()

    for estimator, relative in (("forward", 2e-3), ("central", 1e-2)):
        balancer = MARIGOLD(estimator=estimator)
        _, info = balancer.backward(losses(), model.shared(), closure=losses)
        length = sum(float(p.detach().square().sum()) for p in model.shared()) ** 0.5
        assert info.step == pytest.approx(relative * length, rel=1e-5)
    rows = [torch.autograd.grad(loss, model.shared(), retain_graph=True) for loss in model.losses()]
    g = torch.stack([torch.cat([x.reshape(-1) for x in row]) for row in rows]).double()
    y = g @ g.mean(0)
    assert float((info.derivatives - y).norm() / y.norm()) < 0.05  # central, last


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "nash"}, "criterion must be one of"),
        ({"criterion": 3}, "criterion must be a name or a callable"),
        ({"estimator": "secant"}, "estimator must be one of forward, central, reuse"),
        ({"criterion": "bargaining"}, "estimator must be 'directions' or 'span'"),
        ({"criterion": "famo", "estimator": "central"}, "estimator must be 'reuse'"),
        ({"lambda_update": "newton"}, "lambda_update must be one of"),
        ({"evaluation": "auto"}, "evaluation must be one of sequential, batched"),
        ({"mu": 0.1, "relative_step": 0.1}, "mu and relative_step exclude each other"),
        ({"mu": 0.0}, "mu must be a finite number"),
        ({"beta": -1.0}, "beta must be a finite number"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\)"),
        ({"n_directions": 0}, "n_directions must be an integer >= 1"),
        ({"seed": -1}, r"seed must be an integer in \[0, 2\^31\)"),
        ({"preference": [1.0, 0.0]}, "preference must be a finite number"),
        ({"n_tasks": 3, "preference": [1.0, 2.0]}, "preference must hold 3 numbers, got 2"),
        ({"preference": [1.0], "criterion": "famo"}, "preference must be None"),
        ({"min_losses": [0.0]}, "min_losses must be None without log_losses"),
        ({"update_every": 2, "update_weights_every": 3}, "are the same thing, got 2 and 3"),
        ({"update_every": 0}, "update_weights_every must be an integer >= 1"),
        ({"forward_dtype": torch.int8}, "forward_dtype must be one of"),
        ({"beta": 1.0, "lambda_step": 0.1}, "beta and lambda_step exclude each other"),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MARIGOLD(**options)


DIRECTIONS, SPAN = {"estimator": "directions"}, {"estimator": "span"}
REUSE, FAMO = {"estimator": "reuse"}, {"criterion": "famo"}
STEPS = {**SPAN, "span": "steps"}


@pytest.mark.parametrize(
    ("name", "value", "used", "unused"),
    [
        ("lambda_update", "mirror", [{}, REUSE], [DIRECTIONS, SPAN, FAMO]),
        ("beta", 1.0, [{}, REUSE], [DIRECTIONS, SPAN, FAMO]),
        ("lambda_step", 0.1, [{}, REUSE], [DIRECTIONS, SPAN, FAMO]),
        ("ema", 0.5, [{}, REUSE, DIRECTIONS, SPAN], [FAMO]),
        ("famo_lr", 0.1, [FAMO], [{}, REUSE, DIRECTIONS]),
        ("famo_gamma", 0.0, [FAMO], [{}, REUSE, DIRECTIONS]),
        ("step_size", 0.1, [REUSE], [{}, DIRECTIONS, SPAN, FAMO]),
        ("relative_step", 0.1, [{}, DIRECTIONS, SPAN], [REUSE, FAMO]),
        ("mu", 0.1, [{}, DIRECTIONS, SPAN], [REUSE, FAMO]),
        ("forward_dtype", torch.float32, [{}, DIRECTIONS, SPAN], [REUSE, FAMO]),
        ("evaluation", "sequential", [{}, DIRECTIONS, SPAN], [REUSE, FAMO]),
        ("debug", True, [{}, DIRECTIONS, SPAN], [REUSE, FAMO]),
        ("difference", "forward", [DIRECTIONS, SPAN], [{}, REUSE]),
        ("on_failure", "hold", [DIRECTIONS, SPAN], [{}, REUSE, FAMO]),
        ("distribution", "sphere", [DIRECTIONS], [{}, SPAN]),
        ("seed", 0, [DIRECTIONS], [{}, SPAN, REUSE]),
        ("n_directions", 4, [DIRECTIONS, STEPS], [{}, SPAN, REUSE]),
        ("span", "steps", [SPAN], [{}, DIRECTIONS]),
        ("span_refresh", 10, [SPAN], [{}, DIRECTIONS, STEPS]),
    ],
)
def test_arguments_that_would_do_nothing(
    name: str, value: object, used: list[dict], unused: list[dict]
) -> None:
    for options in used:
        assert getattr(MARIGOLD(**options, **{name: value}).options, name) == value
    for options in unused:
        with pytest.raises(ValueError, match=f"{name} belongs to .*got {name}="):
            MARIGOLD(**options, **{name: value})


def test_calls_that_lack_something() -> None:
    theta = parameter((1.0, 2.0))
    with pytest.raises(ValueError, match=r"shared_parameters must be given to MARIGOLD\.backward"):
        MARIGOLD().backward(CASE(theta), closure=lambda: CASE(theta))
    with pytest.raises(ValueError, match=r"closure must be given to MARIGOLD\.backward"):
        MARIGOLD().backward(CASE(theta), [theta])
    with pytest.raises(ValueError, match="shared_parameters must hold at least one"):
        MARIGOLD().backward(CASE(theta), [], closure=lambda: CASE(theta))
    with pytest.raises(RuntimeError, match="must come after backward"):
        MARIGOLD(2, estimator="reuse").update(CASE(theta))
    other = parameter((1.0, 2.0))
    with pytest.raises(RuntimeError, match="no loss reaches shared_parameters"):
        MARIGOLD().backward(CASE(theta), [other], closure=lambda: CASE(theta))
    assert other.grad is None
    frozen = torch.ones(2)
    with pytest.raises(ValueError, match="requires no grad"):
        MARIGOLD().backward(CASE(theta), [frozen], closure=lambda: CASE(theta))
    with pytest.raises(RuntimeError, match="lambda_ needs the number of tasks"):
        _ = MARIGOLD().lambda_


def test_update_does_nothing_where_there_is_nothing_to_do() -> None:
    theta = parameter((1.0, 2.0))
    for balancer in (MARIGOLD(), MARIGOLD(estimator="reuse", update_every=2)):
        for _ in range(2):
            balancer.backward(CASE(theta), [theta], closure=lambda: CASE(theta))
            theta.data -= 0.1 * theta.grad
            balancer.update(CASE(theta))
            before = balancer.lambda_
            balancer.update(CASE(theta))
            assert torch.equal(balancer.lambda_, before)


def test_a_forgotten_update_is_said_and_counted() -> None:
    theta = parameter((1.0, 2.0))
    balancer = MARIGOLD(estimator="reuse", update_every=2)
    balancer.backward(CASE(theta), [theta])
    with pytest.warns(RuntimeWarning, match=r"found no update\(losses\)"):
        balancer.backward(CASE(theta), [theta])
    assert balancer.stats["held"] == 1


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    losses = lambda: list(table(torch.tensor([1, 2])).sum(1))  # noqa: E731
    with pytest.raises(RuntimeError, match="sparse gradient"):
        MARIGOLD().backward(losses(), list(table.parameters()), closure=losses)
    assert table.weight.grad is None


def test_parameters_of_several_dtypes_and_shapes() -> None:
    """Transposed, scalar, empty and float64 parameters are displaced alike."""
    torch.manual_seed(0)
    a = nn.Parameter(torch.randn(4, 3).T)
    b = nn.Parameter(torch.randn((), dtype=torch.float64))
    c = nn.Parameter(torch.randn(0, 2))
    e = nn.Parameter(torch.randn(5))  # not used by any loss

    def losses() -> list[Tensor]:
        z = a.double().sin().sum() * b
        return [z, (z - 1) ** 2 + c.sum().double()]

    before = bits([a, b, c, e])
    _, info = MARIGOLD().backward(losses(), [a, b, c, e], closure=losses)
    assert info.derivatives.isfinite().all()
    rows = [torch.autograd.grad(x, [a, b], retain_graph=True) for x in losses()]
    g = torch.stack([torch.cat([x.reshape(-1).double() for x in row]) for row in rows])
    assert info.derivatives.tolist() == pytest.approx((g @ g.mean(0)).tolist(), rel=1e-3)
    assert all(torch.equal(p, v) for p, v in zip([a, b, c, e], before, strict=True))


class Allocations(TorchDispatchMode):
    """Counts new storages of at least `least` elements."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.sizes = least, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {
            x.untyped_storage().data_ptr()
            for x in tree_leaves((args, kwargs))
            if isinstance(x, Tensor)
        }
        for x in tree_leaves(result):
            large = isinstance(x, Tensor) and x.numel() >= self.least
            if large and x.untyped_storage().data_ptr() not in given:
                self.sizes.append(x.numel())
        return result


@pytest.mark.parametrize("estimator", ["forward", "central", "directions", "reuse"])
def test_no_memory_beyond_one_copy(estimator: str) -> None:
    """Sequential: one row of displaced parameters at the first estimate, then nothing any more."""
    theta = nn.Parameter(torch.linspace(-1, 1, 200_000))
    small = [torch.arange(0, 200_000, 7), torch.arange(3, 200_000, 11)]

    def losses() -> Tensor:
        return torch.stack([theta[index].square().mean() for index in small])

    for distribution in ("gaussian", "sphere"):
        options = {"distribution": distribution} if estimator == "directions" else {}
        balancer = MARIGOLD(estimator=estimator, **options)
        counts = []
        for _ in range(3):
            theta.grad = None
            with Allocations(150_000) as plain:
                losses().sum().backward()
            theta.grad = None
            with Allocations(150_000) as ours:
                balancer.backward(losses(), [theta], closure=losses)
                theta.data.sub_(theta.grad, alpha=0.1)
                balancer.update(losses())
            counts.append(len(ours.sizes) - len(plain.sizes))
        assert counts == [1, 0, 0]


def test_copies_are_kept_between_steps() -> None:
    theta = parameter((1.0, 2.0))
    balancer = MARIGOLD()
    balancer.backward(CASE(theta), [theta], closure=lambda: CASE(theta))
    first = balancer._probe.copies
    balancer.backward(CASE(theta), [theta], closure=lambda: CASE(theta))
    assert balancer._probe.copies is first
    assert first.n_rows == 1  # sequential: one copy of the parameters and no more
    assert isinstance(first, Copies)
    assert sum(rows.shape[0] for rows in first.rows) == 1

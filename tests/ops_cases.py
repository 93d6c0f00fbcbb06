"""Cases for the ops of every backend: random inputs, what the float64 reference says, tolerances.

`build` makes the inputs of a `Case`; the `expected_*` functions evaluate the contract of
`fastmto.ops` with `reference.updates` in float64 on exactly those (already rounded) inputs. Beside
every value they return its magnitude: the same expression with all terms made positive, which is
what rounding errors are relative to when terms cancel. `close` compares within

    c eps(maths) magnitude + half a unit of the stored dtype,

where maths is float32 but for float64 inputs. A Gram entry's magnitude is ||u_i|| ||u_j||, which
grows as P, so the bound on it is no looser than c eps sqrt(P) relative to a typical sum.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastmto.ops.rules import AdaGrad, Adam, Clippy, RMSProp, Rule
from fastmto.reference.updates import State, advance, clippy_factor

RULES: dict[str, Rule] = {
    "adam": Adam(),
    "adagrad": AdaGrad(),
    "rmsprop": RMSProp(),
    "rmsprop_momentum": RMSProp(momentum=0.9),
    "rmsprop_centered": RMSProp(centered=True),
    "rmsprop_centered_momentum": RMSProp(momentum=0.9, centered=True),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TASKS = (1, 2, 3, 8, 32)
#: The Gram of the gradients serves balancers of more tasks.
GRAM_TASKS = (*TASKS, 64)

#: Factor c of the tolerance; every op has a handful of roundings a term.
FACTOR = 16.0
#: Unit of the maths, by the dtype of grads.
EPS = {dtype: 2.0 ** (-52 if dtype is torch.float64 else -23) for dtype in DTYPES}
#: Half a unit in the last place of a stored value, relative, and absolute at the small end.
HALF_ULP = {
    torch.float64: (2.0**-53, 2.0**-1074),
    torch.float32: (2.0**-24, 2.0**-149),
    torch.bfloat16: (2.0**-8, 2.0**-133),
    torch.float16: (2.0**-11, 2.0**-25),
}


@dataclass(frozen=True)
class Case:
    """What an op is asked: T = n_tasks, P = numel.

    `padding` elements lie between the rows of grads (and of AdaTask's state); `sizes` are the
    tensors' sizes (None: some small ones and one large); `step` 0 in a sequence is a task that
    takes no part; 0 alone means that none does.
    """

    rule: Rule
    n_tasks: int = 2
    numel: int = 1003
    dtype: torch.dtype = torch.float32
    clippy: Clippy | None = None
    adatask: bool = False
    padding: int = 0
    step: int | Sequence[int] = 7
    lr: float = 1e-2
    weight_decay: float = 0.0
    scale: float = 1.0
    weights: Sequence[float] | None = None
    sizes: Sequence[int] | None = None
    seed: int = 0


@dataclass
class Inputs:
    """Tensors of one call, as `fastmto.ops` takes them."""

    rule: Rule
    step: int | list[int]
    grads: Tensor  # (T, P)
    state: list[Tensor]  # (P,) or (T, P) each
    params: Tensor  # (P,)
    weights: Tensor  # (T,)
    segments: Tensor  # (S + 1,)
    numbers: Tensor  # (1, 11), or (T, 11) with per_task: those of rule, step, lr and weight_decay
    clippy: Clippy | None
    lr: float
    weight_decay: float

    @property
    def kind(self) -> int:
        return self.rule.kind

    @property
    def lambdas(self) -> tuple[float, float] | None:
        """Clippy as the ops take it."""
        return None if self.clippy is None else (self.clippy.lambda_rel, self.clippy.lambda_abs)

    @property
    def n_tasks(self) -> int:
        return len(self.grads)

    @property
    def steps(self) -> list[int]:
        return self.step if isinstance(self.step, list) else [self.step] * self.n_tasks

    @property
    def per_task(self) -> bool:
        return isinstance(self.step, list)

    def clone(self) -> Inputs:
        """A copy whose tensors an op may write; padding is kept."""
        return replace(
            self,
            grads=_like(self.grads),
            state=[_like(s) for s in self.state],
            params=self.params.clone(),
        )

    def to(self, device: torch.device | str) -> Inputs:
        return replace(
            self,
            grads=_like(self.grads, device),
            state=[_like(s, device) for s in self.state],
            params=self.params.to(device),
            weights=self.weights.to(device),
            segments=self.segments.to(device),
            numbers=self.numbers.to(device),
        )

    def poisoned_gram(self) -> Tensor:
        shape = (self.n_tasks, self.n_tasks)
        return torch.full(shape, torch.nan, dtype=torch.float64, device=self.grads.device)

    def poisoned_sigma(self) -> Tensor:
        shape = (self.n_tasks, len(self.segments) - 1)
        return torch.full(shape, torch.nan, dtype=torch.float64, device=self.grads.device)


def numbers_of(
    rule: Rule, step: int | Sequence[int], lr: float = 0.0, weight_decay: float = 0.0
) -> Tensor:
    """`numbers` as the ops take them: one row, or one a task where `step` is a sequence."""
    steps = [step] if isinstance(step, int) else step
    rows = [rule.numbers(t, lr, weight_decay) for t in steps]
    return torch.tensor(rows, dtype=torch.float64)


def _rows(values: Tensor, padding: int, device: torch.device | str | None = None) -> Tensor:
    """`values` (n, P) with NaN between its rows."""
    n, numel = values.shape
    buffer = torch.full(
        (n, numel + padding), torch.nan, dtype=values.dtype, device=device or values.device
    )
    rows = buffer[:, :numel]
    rows.copy_(values)
    return rows


def _like(tensor: Tensor, device: torch.device | str | None = None) -> Tensor:
    if tensor.dim() == 1:
        return tensor.to(device or tensor.device, copy=True)
    return _rows(tensor, tensor.stride(0) - tensor.shape[1], device)


def _sizes(case: Case) -> list[int]:
    if case.sizes is not None:
        return list(case.sizes)
    small = [1, 17, 64, 5]
    if case.numel <= 2 * sum(small):
        return [case.numel]
    return [*small, case.numel - sum(small) - 3, 3]


def build(case: Case) -> Inputs:
    """The inputs of `case`: old moments far from cancellation (v >= 2 q^2), a tenth of the
    coordinates never touched by any task."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tasks, numel = case.n_tasks, case.numel
    maths = torch.float64 if case.dtype is torch.float64 else torch.float32
    touched = (torch.rand(numel, generator=generator) > 0.1).double()
    grads = _rows((case.scale * normal(tasks, numel) * touched).to(case.dtype), case.padding)
    owners = tasks if case.adatask else 1
    v = (0.5 + normal(owners, numel) ** 2) * touched * case.scale**2
    made = {
        "exp_avg": v.sqrt() * 0.6 * torch.sin(normal(owners, numel)),
        "exp_avg_sq": v,
        "sum": v,
        "square_avg": v,
        "grad_avg": v.sqrt() * 0.6 * torch.sin(normal(owners, numel)),
        "momentum_buffer": normal(owners, numel) * touched,
    }
    state = [
        _rows(made[name].to(maths), case.padding) if case.adatask else made[name][0].to(maths)
        for name in case.rule.state_names
    ]
    if case.weights is None:
        weights = 0.5 + torch.rand(tasks, generator=generator, dtype=torch.float64)
    else:
        weights = torch.tensor(case.weights, dtype=torch.float64)
    if isinstance(case.step, int):
        step: int | list[int] = [case.step + i for i in range(tasks)] if case.adatask else case.step
    else:
        step = list(case.step)
    bounds = torch.tensor([0, *_sizes(case)], dtype=torch.int64).cumsum(0)
    assert int(bounds[-1]) == numel
    return Inputs(
        rule=case.rule,
        step=step,
        grads=grads,
        state=state,
        params=normal(numel).to(case.dtype),
        weights=weights,
        segments=bounds,
        numbers=numbers_of(case.rule, step, case.lr, case.weight_decay),
        clippy=case.clippy,
        lr=case.lr,
        weight_decay=case.weight_decay,
    )


def _old(inputs: Inputs, task: int) -> State:
    return {
        name: (s[task] if inputs.per_task else s).double()
        for name, s in zip(inputs.rule.state_names, inputs.state, strict=True)
    }


def _absolute(state: State) -> State:
    return {name: x.abs() for name, x in state.items()}


def expected_updates(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """u_i (T, P) and their magnitudes; rows of absent tasks are 0."""
    us = torch.zeros(inputs.grads.shape, dtype=torch.float64)
    magnitudes = torch.zeros_like(us)
    for i, t in enumerate(inputs.steps):
        if t > 0:
            g, old = inputs.grads[i].double(), _old(inputs, i)
            us[i] = advance(inputs.rule, t, g, old)[0]
            magnitudes[i] = advance(inputs.rule, t, g.abs(), _absolute(old))[0]
    return us, magnitudes


def _spread(inputs: Inputs, sigma: Tensor | None) -> Tensor | float:
    """sigma (T, S) as (T, P)."""
    if sigma is None:
        return 1.0
    return sigma.cpu().repeat_interleave(inputs.segments.cpu().diff(), dim=1)


def expected_sigma(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Clippy's factors (T, S) bracketed: for the updates lengthened and shortened by their
    rounding errors."""
    assert inputs.clippy is not None
    us, magnitudes = expected_updates(inputs)
    error = FACTOR * EPS[inputs.grads.dtype] * magnitudes
    bounds = inputs.segments.tolist()
    brackets = torch.empty(2, inputs.n_tasks, len(bounds) - 1, dtype=torch.float64)
    for i in range(inputs.n_tasks):
        for s, (lo, hi) in enumerate(itertools.pairwise(bounds)):
            theta = inputs.params[lo:hi].double()
            long = us[i, lo:hi].abs() + error[i, lo:hi]
            short = (us[i, lo:hi].abs() - error[i, lo:hi]).clamp(min=0)
            brackets[0, i, s] = clippy_factor(inputs.clippy, inputs.lr, theta, long)
            brackets[1, i, s] = clippy_factor(inputs.clippy, inputs.lr, theta, short)
    return brackets[0], brackets[1]


def expected_gram(inputs: Inputs, sigma: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """G (T, T) of the updates, shrunk by `sigma` (T, S) where given, and ||u_i|| ||u_j||."""
    us, magnitudes = expected_updates(inputs)
    factor = _spread(inputs, sigma)
    us, magnitudes = us * factor, magnitudes * factor
    norms = magnitudes.norm(dim=1)
    return us @ us.T, norms[:, None] * norms


def expected_gradient_gram(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """<g_i, g_j> (T, T) and ||g_i|| ||g_j||."""
    g = inputs.grads.double()
    norms = g.norm(dim=1)
    return g @ g.T, norms[:, None] * norms


def expected_combine(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """sum_i a_i g_i (P,) over the tasks with a_i != 0."""
    total = torch.zeros(inputs.grads.shape[1], dtype=torch.float64)
    magnitude = torch.zeros_like(total)
    for a, g in zip(inputs.weights.tolist(), inputs.grads, strict=True):
        if a != 0:
            total += a * g.double()
            magnitude += abs(a) * g.double().abs()
    return total, magnitude


@dataclass
class Applied:
    """What `apply` leaves, each with its magnitude."""

    params: tuple[Tensor, Tensor]
    state: list[tuple[Tensor, Tensor]]


def _moments(
    rule: Rule, t: int, g: tuple[Tensor, Tensor], old: State
) -> list[tuple[Tensor, Tensor]]:
    """The moments after one step on g, whose rounding error is relative to g[1]."""
    new = advance(rule, max(t, 1), g[0], old)[1]
    magnitudes = advance(rule, max(t, 1), g[1], _absolute(old))[1]
    if isinstance(rule, RMSProp) and rule.momentum > 0:
        variance = new["square_avg"] - new["grad_avg"] ** 2 if rule.centered else new["square_avg"]
        d = variance.clamp(min=0).sqrt() + rule.eps
        relative = 1 + (1 - rule.alpha) * (g[1] / d) ** 2
        magnitudes["momentum_buffer"] = (
            rule.momentum * old["momentum_buffer"].abs() + g[1] / d * relative
        )
    return [(new[name], magnitudes[name]) for name in rule.state_names]


def expected_apply(inputs: Inputs, sigma: Tensor | None = None) -> Applied:
    """Parameters and moments after the step with `inputs.weights`, u_i shrunk by `sigma`."""
    us, magnitudes = expected_updates(inputs)
    factor = _spread(inputs, sigma)
    us, magnitudes = us * factor, magnitudes * factor
    theta = inputs.params.double()
    step, size = torch.zeros_like(theta), torch.zeros_like(theta)
    for i, a in enumerate(inputs.weights.tolist()):
        if a != 0 and inputs.steps[i] > 0:
            step += a * us[i]
            size += abs(a) * magnitudes[i]
    keep = 1 - inputs.lr * inputs.weight_decay if any(inputs.steps) else 1.0
    params = keep * theta - inputs.lr * step
    if not inputs.per_task and any(inputs.steps):
        state = _moments(inputs.rule, inputs.steps[0], expected_combine(inputs), _old(inputs, 0))
    elif not inputs.per_task:
        state = [(s.double(), s.double().abs()) for s in inputs.state]
    else:
        rows: list[list[tuple[Tensor, Tensor]]] = []
        for i, t in enumerate(inputs.steps):
            old = _old(inputs, i)
            if t == 0:
                rows.append([(old[name], old[name].abs()) for name in inputs.rule.state_names])
            else:
                g = inputs.grads[i].double()
                rows.append(_moments(inputs.rule, t, (g, g.abs()), old))
        state = [
            (torch.stack([r[k][0] for r in rows]), torch.stack([r[k][1] for r in rows]))
            for k in range(len(inputs.rule.state_names))
        ]
    return Applied((params, theta.abs() + inputs.lr * size), state)


def close(
    actual: Tensor,
    expected: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    *,
    factor: float = FACTOR,
    name: str = "value",
) -> None:
    """Assert |actual - expected| within the tolerance of the module's docstring.

    Args:
        actual: what the op wrote.
        expected: the value and its magnitude, float64.
        dtype: of grads, which decides the maths; the stored dtype is that of `actual`.
    """
    value, magnitude = expected
    relative, absolute = HALF_ULP[actual.dtype]
    error = (actual.detach().cpu().double() - value).abs()
    bound = factor * EPS[dtype] * magnitude + 2 * relative * value.abs() + 2 * absolute
    wrong = ~(error <= bound)
    if wrong.any():
        worst = int(torch.where(wrong, error / bound, 0).nan_to_num(torch.inf).argmax())
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} wrong; worst at {worst}: "
            f"{actual.flatten()[worst].item()!r} for {value.flatten()[worst].item()!r}, "
            f"bound {bound.flatten()[worst].item():.3g}"
        )


def close_applied(
    params: Tensor, state: Sequence[Tensor], expected: Applied, inputs: Inputs
) -> None:
    """Assert that parameters and every moment are as `expected`."""
    dtype = inputs.grads.dtype
    close(params, expected.params, dtype, name="params")
    for name, actual, value in zip(inputs.rule.state_names, state, expected.state, strict=True):
        close(actual, value, dtype, name=name)

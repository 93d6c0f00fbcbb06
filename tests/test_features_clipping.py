"""Clipping, warm-up and an unbalanced loss inside PUB, in lockstep with the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from problems import gradients, linear_loss, net, parameters
from torch import Tensor, nn

import fastmto
from fastmto.optim.rules import AdaGrad, Adam, Clippy, RMSProp, Rule
from fastmto.reference import updates as reference

RULES = [Adam(), AdaGrad(initial_accumulator_value=0.1), RMSProp(momentum=0.9, centered=True)]
MODIFIERS = [{}, {"clippy": Clippy()}, {"adatask": True}, {"clippy": Clippy(), "adatask": True}]
#: Norms are about 1e4 in even steps and 1e2 in odd ones.
OPTIONS = [
    {"clip_norm": 2000.0},
    {"clip_task_norm": 50.0},
    {"warmup_steps": 5},
    {"unbalanced": True},
    {"clip_norm": 100.0, "clip_task_norm": 150.0, "warmup_steps": 3},
    {"clip_norm": 500.0, "warmup_steps": 3, "unbalanced": True},
]
T = 3


def length(rows: Sequence[Sequence[Tensor]]) -> float:
    """The norm over all tensors, by sums of squares in float64."""
    return math.sqrt(sum(float(g.double().square().sum()) for row in rows for g in row))


def scaled(row: Sequence[Tensor], factor: float) -> list[Tensor]:
    return [factor * g.double() for g in row]


class Reference:
    """PUB on explicit gradients: the shared parameters, and a plain optimizer for every head."""

    def __init__(self, shared, heads, rule: Rule, every: int, per_task: bool, options) -> None:
        options = dict(options)
        self.every, self.per_task, self.lr = every, per_task, 0.05
        self.clip_norm = options.pop("clip_norm", math.inf)
        self.clip_task_norm = options.pop("clip_task_norm", math.inf)
        self.warmup_steps = options.pop("warmup_steps", 1)
        clippy, adatask = options.pop("clippy", None), options.pop("adatask", False)
        common = {"rule": rule, "lr": self.lr, "weight_decay": 0.1, "clippy": clippy}
        values = [p.detach().clone() for p in shared]
        self.shared = reference.ReferencePUB(values, T, adatask=adatask, **common)
        self.heads = [
            reference.ReferencePUB([p.detach().clone() for p in head], 1, **common)
            for head in heads
        ]
        self.weights = torch.ones(T, dtype=torch.float64)
        self.factors: list[float] = []

    def step(self, t: int, g: list, h: list, extra: list[Tensor] | None) -> None:
        """Args:
        t: number of the step, from 0.
        g, h: the tasks' gradients on the shared parameters and on their own heads.
        extra: an unbalanced loss's on the shared parameters.
        """
        for i in range(T):
            f = min(1.0, self.clip_task_norm / length([g[i], h[i]]))
            g[i], h[i] = scaled(g[i], f), scaled(h[i], f)
        beside = [] if extra is None else [scaled(extra, 1.0)]
        rows = [*g, *beside]
        weights = [*self.weights.tolist(), *[1.0] * len(beside)]
        f = min(1.0, self.clip_norm / length([joined(rows, weights), *h]))
        self.factors.append(f)
        g, h, rows = ([scaled(row, f) for row in each] for each in (g, h, rows))
        for one in (self.shared, *self.heads):
            one.lr = self.lr * min(1.0, (t + 1) / self.warmup_steps)
        searches = t % self.every == 0
        if searches:
            gram = self.shared.gram(g)
            self.weights = reference.scale_weights(reference.bargaining(gram), gram, "mean_norm", 0)
        weights = [*self.weights.tolist(), *[1.0] * len(beside)]
        if searches or self.per_task:
            self.shared.step(rows, torch.tensor(weights, dtype=torch.float64))
        else:
            self.shared.step([joined(rows, weights)], torch.ones(1, dtype=torch.float64))
        for head, row in zip(self.heads, h, strict=True):
            head.step([row], torch.ones(1, dtype=torch.float64))


def joined(rows: Sequence[Sequence[Tensor]], weights: Sequence[float]) -> list[Tensor]:
    return [
        sum(a * g.double() for a, g in zip(weights, column, strict=True))
        for column in zip(*rows, strict=True)
    ]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o))
@pytest.mark.parametrize("modifiers", MODIFIERS, ids=lambda m: "+".join(m) or "plain")
@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_lockstep_with_the_reference(rule: Rule, modifiers: dict, options: dict, every: int):
    options = dict(options)
    unbalanced = options.pop("unbalanced", False)
    if unbalanced and modifiers.get("adatask"):
        pytest.skip("the unbalanced loss has no moments with adatask")
    shared = parameters(0, torch.float64)
    heads = [parameters(10 + i, torch.float64, [(3,), (2, 2)]) for i in range(T)]
    per_task = bool(modifiers.get("adatask")) or "clip_task_norm" in options
    given: dict[str, Any] = {**modifiers, **options}
    expected = Reference(shared, heads, rule, every, per_task, given)
    optimizer = fastmto.PUB(
        shared,
        heads,
        0.05,
        rule=rule,
        weight_decay=0.1,
        update_weights_every=every,
        max_weight=None,
        **given,
    )
    for t in range(9):
        size = 1.0 if t % 2 == 0 else 1e-2
        g = [scaled(row, size) for row in gradients(1000 + t, shared, T)]
        h = [scaled(gradients(2000 + t, head, 1)[0], size) for head in heads]
        extra = scaled(gradients(3000 + t, shared, 1)[0], 10 * size) if unbalanced else None
        losses = [
            linear_loss([*shared, *head], [*gi, *hi])
            for head, gi, hi in zip(heads, g, h, strict=True)
        ]
        more = {} if extra is None else {"unbalanced": linear_loss(shared, extra)}
        optimizer.zero_grad()
        optimizer.backward(losses, **more)
        optimizer.step()
        expected.step(t, g, h, extra)
        torch.testing.assert_close(optimizer.weights, expected.weights, rtol=1e-8, atol=1e-11)
        pairs = [(shared, expected.shared), *zip(heads, expected.heads, strict=True)]
        for members, ref in pairs:
            for k, p in enumerate(members):
                torch.testing.assert_close(p.detach(), ref.theta[k], rtol=1e-9, atol=1e-11)
                for name in rule.state_names:
                    owners = [s[k][name] for s in ref.state]
                    value = torch.stack(owners) if ref.adatask else owners[0]
                    size = float(value.abs().max()) or 1.0
                    torch.testing.assert_close(
                        optimizer.state[p][name] / size, value / size, rtol=1e-9, atol=1e-11
                    )
    if options == {"clip_norm": 2000.0}:
        assert min(expected.factors) < 1 == max(expected.factors)


def test_one_task_is_adam_with_torch_s_clipping() -> None:
    """An oracle of the norm that is not ours."""
    model, twin = (net(n_tasks=1).double() for _ in range(2))
    ours = fastmto.PUB(
        model.trunk.parameters(), model.head_parameters(), 0.01, clip_norm=0.1, warmup_steps=4
    )
    torchs = torch.optim.AdamW(twin.parameters(), 0.01, weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LambdaLR(torchs, lambda t: min(1, (t + 1) / 4))
    for t in range(10):
        x = torch.randn(12, 6, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        ours.zero_grad()
        ours.backward(model.losses(x))
        ours.step()
        torchs.zero_grad()
        twin.losses(x)[0].backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        torchs.step()
        warmup.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_norm": 0.0}, "clip_norm must"),
        ({"clip_norm": -1.0}, "clip_norm must"),
        ({"clip_norm": math.nan}, "clip_norm must"),
        ({"clip_task_norm": "a"}, "clip_task_norm must"),
        ({"clip_task_norm": 1.0, "between": "weighted"}, "between must be 'per_task'"),
        ({"warmup_steps": -1}, "warmup_steps must"),
        ({"warmup_steps": 1.5}, "warmup_steps must"),
    ],
    ids=str,
)
def test_what_is_out_of_range_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        fastmto.PUB(parameters(0, torch.float64), [[], []], **options)

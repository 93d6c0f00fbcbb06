"""Descending on the toy problem with any optimizer, and those that `fastmto toy` compares.

Settings are those of the released code of FAMO, where most results in the literature come from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastmto

from ..optimizers import METHOD_LR, Balanced, Balancer
from .problem import STARTS, ShiftedLosses, losses

#: What the released code sets otherwise than the methods' defaults here.
OPTIONS: dict[str, dict[str, Any]] = {"famo": {"gamma": 0.0}}
#: Length to which the released code cuts the joint gradient; its CAGrad is T times ours.
CUT_LENGTHS = {"pcgrad": 1.0, "graddrop": 1.0, "cagrad": 0.5}

MakeOptimizer = Callable[[list[torch.nn.Parameter], list[list[torch.nn.Parameter]]], Balancer]


@dataclass(frozen=True)
class Trajectory:
    """Where a run went.

    Args:
        points: (n, 2), the start first.
        losses: (n, 2), at those points.
        steps: how many were made.
        seconds: of processor time that they took.
        stats: the optimizer's counts.
    """

    points: Tensor
    losses: Tensor
    steps: int
    seconds: float
    stats: dict[str, int]


class Adam:
    """`torch.optim.Adam(fused=True)` bit for bit, without its bookkeeping.

    That takes five times as long as the step of two numbers itself.

    Args:
        groups: parameters and their learning rate.
    """

    def __init__(self, groups: Sequence[tuple[Sequence[Tensor], float]]) -> None:
        self._slots = [
            (p, torch.zeros_like(p), torch.zeros_like(p), torch.zeros(()), lr)
            for parameters, lr in groups
            for p in parameters
        ]

    def zero_grad(self) -> None:
        for slot in self._slots:
            slot[0].grad = None

    def step(self) -> None:
        with torch.no_grad():
            for p, exp_avg, exp_avg_sq, step, lr in self._slots:
                if p.grad is None:
                    continue
                step.add_(1)
                torch._fused_adam_(
                    [p], [p.grad], [exp_avg], [exp_avg_sq], [], [step],
                    lr=lr, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8, amsgrad=False,
                    maximize=False,
                )  # fmt: skip


class _Cut(Balanced):
    """Cuts the joint gradient to a length before the step, as the released code does."""

    def __init__(self, length: float, x: Tensor, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._length = length
        self._x = x

    def step(self) -> None:
        grad = self._x.grad
        assert grad is not None
        length = math.hypot(*grad.tolist())
        if length > self._length:
            grad.mul_(self._length / length)
        super().step()


def method(name: str, lr: float = 1e-3) -> MakeOptimizer:
    """What `run` needs to build a method, searching at every step, with torch's fused Adam.

    Settings are those of FAMO's released code (`OPTIONS`, `CUT_LENGTHS`), and the methods'
    defaults where it has none. "pub" is `fastmto.PUB` with the paper's literal weights.

    Args:
        name: one of `fastmto.available()`.
        lr: Adam's.

    Raises:
        ValueError: an unknown name.
    """
    if name not in fastmto.available():
        raise ValueError(f"name must be one of {', '.join(fastmto.available())}, got {name!r}")

    def make(shared: list[torch.nn.Parameter], heads: list[list[torch.nn.Parameter]]) -> Balancer:
        if name == "pub":
            return fastmto.PUB(shared, heads, lr, update_weights_every=1, scale="none")
        balancer = fastmto.get(name, len(heads), update_weights_every=1, **OPTIONS.get(name, {}))
        adam = Adam([(shared, lr), (balancer.parameters(), METHOD_LR)])
        if name in CUT_LENGTHS:
            (x,) = shared
            return _Cut(CUT_LENGTHS[name], x, balancer, adam, shared, heads, shared)
        return Balanced(balancer, adam, shared, heads, shared)

    return make


def run(
    optimizer_factory: MakeOptimizer,
    start: str | Sequence[float],
    steps: int,
    s: float = 1.0,
    *,
    dtype: torch.dtype = torch.float32,
    every: int = 1,
    on_steps: Callable[[int], None] | None = None,
) -> Trajectory:
    """Descends from a start and records the way.

    The optimizer sees f1 + 21 s and f2 + 21, which have the same gradients and are positive
    everywhere, so that methods that take logarithms of losses have some.

    Args:
        optimizer_factory: called with the shared parameters, one tensor (2,), and two empty lists
            of task parameters; returns the optimizer.
        start: "A" to "E", or a point.
        steps: number of optimizer steps.
        s: factor of the first task.
        dtype: the parameters'.
        every: steps between two recorded points; the last point is always recorded.
        on_steps: called after every recorded point with the number of steps since the last.

    Raises:
        ValueError: an unknown start.
    """
    if isinstance(start, str):
        if start not in STARTS:
            raise ValueError(f"start must be one of {', '.join(STARTS)} or a point, got {start!r}")
        start = STARTS[start]
    x = torch.nn.Parameter(torch.tensor(start, dtype=dtype))
    optimizer = optimizer_factory([x], [[], []])
    balanced = optimizer if isinstance(optimizer, Balanced) else None

    shifted = ShiftedLosses(s, dtype)

    def evaluate() -> list[Tensor]:
        return shifted(x.detach())

    points = [x.detach().clone()]
    recorded = 0
    began = time.process_time()
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        # The representation is the point itself; a node of its own where it is asked for.
        features = x.view_as(x) if balanced is not None and balanced.at_features else None
        here = x if features is None else features
        values = shifted(here)
        if balanced is None:
            optimizer.backward(values)
        else:
            balanced.backward(values, features, evaluate)
        optimizer.step()
        if balanced is not None and balanced.looks_back:
            balanced.update(evaluate())
        if step % every == 0 or step == steps:
            points.append(x.detach().clone())
            if on_steps is not None:
                on_steps(step - recorded)
            recorded = step
    seconds = time.process_time() - began
    trajectory = torch.stack(points)
    return Trajectory(trajectory, losses(trajectory, s), steps, seconds, dict(optimizer.stats))

"""The two-task toy problem of the balancing literature, with the paper's five starts.

Source: CAGrad (Liu et al., NeurIPS 2021), kept by Nash-MTL, FAMO and PUB. Two parameters
x = (x1, x2), both shared, and two losses with valleys, a cliff of logarithms and conflicting
minima:

    t = tanh(x2), c1 = max(tanh(x2/2), 0), c2 = max(-tanh(x2/2), 0)
    b = (x2 + 8)^2 / 10
    f1 = s [ c1 (ln max(|(-x1 - 7)/2 + t|, 5e-6) + 6) + c2 (((7 - x1)^2 + b)/10 - 20) ]
    f2 =     c1 (ln max(|(-x1 + 3)/2 - t + 2|, 5e-6) + 6) + c2 (((x1 + 7)^2 + b)/10 - 20)

The literature unbalances the tasks with s = 0.1; PUB's figure has s = 1. The Pareto front is the
segment x2 = -8.3552, |x1| <= 7.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

STARTS = {
    "A": (-8.5, 7.5),
    "B": (0.0, 0.0),
    "C": (9.0, 9.0),
    "D": (-7.5, -0.5),
    "E": (9.0, -1.0),
}
#: The balanced point of the Pareto front at s = 1 and its losses, PUB's L*.
OPTIMUM_POINT = (0.0, -8.3552)
OPTIMUM = (-15.0916, -15.0916)


class Balancer(Protocol):
    """The three calls of a fastmto optimizer."""

    def zero_grad(self) -> object:
        """Clears the gradients."""

    def backward(self, losses: Tensor) -> object:
        """Replaces `loss.backward()`."""

    def step(self) -> object:
        """Moves the parameters."""


def losses(x: Tensor, s: float = 1.0) -> Tensor:
    """f1 and f2 at `x`.

    Args:
        x: (..., 2) floating point.
        s: factor of the first task.

    Returns:
        (..., 2), differentiable.
    """
    x1, x2 = x.unbind(-1)
    t = x2.tanh()
    half = (x2 / 2).tanh()
    c1, c2 = half.clamp(min=0), (-half).clamp(min=0)
    bowl = (x2 + 8) ** 2 / 10
    f1 = c1 * (((-x1 - 7) / 2 + t).abs().clamp(min=5e-6).log() + 6)
    f1 = f1 + c2 * (((7 - x1) ** 2 + bowl) / 10 - 20)
    f2 = c1 * (((-x1 + 3) / 2 - t + 2).abs().clamp(min=5e-6).log() + 6)
    f2 = f2 + c2 * (((x1 + 7) ** 2 + bowl) / 10 - 20)
    return torch.stack([s * f1, f2], dim=-1)


@dataclass(frozen=True)
class Trajectory:
    """Where a run went.

    Args:
        points: (n, 2), the start first.
        losses: (n, 2), at those points.
    """

    points: Tensor
    losses: Tensor


def run(
    optimizer_factory: Callable[
        [list[torch.nn.Parameter], list[list[torch.nn.Parameter]]], Balancer
    ],
    start: str | Sequence[float],
    steps: int,
    s: float = 1.0,
    *,
    dtype: torch.dtype = torch.float32,
    every: int = 1,
) -> Trajectory:
    """Descends from a start and records the way.

    Args:
        optimizer_factory: called with the shared parameters, one tensor (2,), and two empty lists
            of task parameters; returns the optimizer.
        start: "A" to "E", or a point.
        steps: number of optimizer steps.
        s: factor of the first task.
        dtype: the parameters'.
        every: steps between two recorded points; the last point is always recorded.

    Raises:
        ValueError: an unknown start.
    """
    if isinstance(start, str):
        if start not in STARTS:
            raise ValueError(f"start must be one of {', '.join(STARTS)} or a point, got {start!r}")
        start = STARTS[start]
    x = torch.nn.Parameter(torch.tensor(start, dtype=dtype))
    optimizer = optimizer_factory([x], [[], []])
    points = [x.detach().clone()]
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        optimizer.backward(losses(x, s))
        optimizer.step()
        if step % every == 0 or step == steps:
            points.append(x.detach().clone())
    trajectory = torch.stack(points)
    return Trajectory(trajectory, losses(trajectory, s))

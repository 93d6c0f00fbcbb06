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

import math

import torch
from torch import Tensor

STARTS = {
    "A": (-8.5, 7.5),
    "B": (0.0, 0.0),
    "C": (9.0, 9.0),
    "D": (-7.5, -0.5),
    "E": (9.0, -1.0),
}
#: x2 and the largest |x1| of the Pareto front.
FRONT = (-8.3552, 7.0)
#: The balanced point of the Pareto front at s = 1 and its losses, PUB's L*.
OPTIMUM_POINT = (0.0, -8.3552)
OPTIMUM = (-15.0916, -15.0916)
#: What is added to (f1 / s, f2) before an optimizer sees them, FAMO's bound on the losses.
SHIFT = 21.0
#: Inside the logarithms; below it they are cut off.
CUT = 5e-6


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
    f1 = c1 * (((-x1 - 7) / 2 + t).abs().clamp(min=CUT).log() + 6)
    f1 = f1 + c2 * (((7 - x1) ** 2 + bowl) / 10 - 20)
    f2 = c1 * (((-x1 + 3) / 2 - t + 2).abs().clamp(min=CUT).log() + 6)
    f2 = f2 + c2 * (((x1 + 7) ** 2 + bowl) / 10 - 20)
    return torch.stack([s * f1, f2], dim=-1)


def _point(x1: float, x2: float, s: float) -> tuple[list[float], list[list[float]]]:
    """The losses at a point and their gradients, by hand: autograd on 2 numbers takes ages."""
    t, half = math.tanh(x2), math.tanh(x2 / 2)
    c1, c2 = max(half, 0.0), max(-half, 0.0)
    # At 0 both parts count, as in torch's clamp.
    slope = (1 - half * half) / 2
    d1, d2 = slope if half >= 0 else 0.0, -slope if half <= 0 else 0.0
    bowl, dbowl = (x2 + 8) ** 2 / 10, (x2 + 8) / 5
    values, gradients = [], []
    for scale, center, inside, dt in (
        (s, 7.0, (-x1 - 7) / 2 + t, 1 - t * t),
        (1.0, -7.0, (-x1 + 3) / 2 - t + 2, t * t - 1),
    ):
        log = math.log(max(abs(inside), CUT)) + 6
        dlog = 1 / inside if abs(inside) >= CUT else 0.0
        square = ((center - x1) ** 2 + bowl) / 10 - 20
        values.append(scale * (c1 * log + c2 * square))
        gradients.append(
            [
                scale * (-c1 * dlog / 2 - c2 * (center - x1) / 5),
                scale * (d1 * log + c1 * dlog * dt + d2 * square + c2 * dbowl / 10),
            ]
        )
    return values, gradients


class ShiftedLosses:
    """f1 + 21 s and f2 + 21 at one tensor, with the smallest graph that has their gradients.

    A dot product with the gradient, whose value is then set: two nodes, both native, in place of
    some thirty. The rows are written anew by every call, so that a graph is good until the next.

    Args:
        s: factor of the first task.
        dtype: of the losses.
    """

    def __init__(self, s: float, dtype: torch.dtype) -> None:
        self._s = s
        rows = torch.empty(2, 2, dtype=dtype)
        self._gradients = rows.numpy()  # writing here costs a tenth of building a tensor
        self._rows = rows.unbind()
        self._shifts = (SHIFT * s, SHIFT)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """The two scalars at x (2,), attached to its graph if it has one."""
        x1, x2 = x.tolist()
        (f1, f2), self._gradients[...] = _point(x1, x2, self._s)
        values = (f1 + self._shifts[0], f2 + self._shifts[1])
        if not x.requires_grad:
            return [torch.scalar_tensor(value, dtype=x.dtype) for value in values]
        losses = []
        for row, value in zip(self._rows, values, strict=True):
            loss = torch.dot(row, x)
            loss.detach().fill_(value)
            losses.append(loss)
        return losses

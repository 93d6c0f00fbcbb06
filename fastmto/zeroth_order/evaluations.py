"""The losses at several displaced points, under the same circumstances."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..task_gradients import Losses
from .functional import FunctionalClosure
from .perturb import Copies
from .replay import RandomState, Replay

#: A repeated evaluation may differ by this many eps of the forward pass, relative: accelerators
#: may sum in another order each time.
REPEATS_WITHIN = 64


@dataclass
class Along:
    """The point theta + scale * direction."""

    direction: Sequence[Tensor | None]
    scale: float

    def write(self, copies: Copies, row: int) -> float:
        """Make `row` the point.

        Returns:
            <row - theta, direction>: how far it really lies along the direction.
        """
        copies.displace(row, self.direction, self.scale)
        return copies.along(row, self.direction)


@dataclass
class Random:
    """The point theta + scale * u, u the random direction number `index` of `seed`."""

    scale: float
    seed: int
    index: int
    distribution: str

    def write(self, copies: Copies, row: int) -> float:
        """Make `row` the point; returns NaN."""
        copies.displace_at_random(row, self.scale, self.seed, self.index, self.distribution)
        return math.nan


@dataclass
class Evaluated:
    """What the evaluations of an estimate found.

    Attributes:
        values: (R, n) float64 on the CPU.
        along: of each point, what its `write` returned.
    """

    values: Tensor
    along: list[float]


class Evaluations:
    """Evaluates a closure at points of one estimate.

    Args:
        closure: the user's.
        read: makes (n,) losses of what it returns.
        copies: of the shared parameters; with as many rows as points to evaluate them in one
            batch, with one row to evaluate them in sequence.
        start: the random numbers' state to start from; None: the present one.
    """

    def __init__(
        self,
        closure: Callable[[], Losses],
        read: Callable[[Losses], Tensor],
        copies: Copies,
        start: RandomState | None,
    ) -> None:
        self._closure, self._read, self._copies = closure, read, copies
        self._replay = Replay(start, [layout.device for layout in copies.layouts])
        #: Evaluations so far.
        self.count = 0

    def _at(self, row: int) -> Tensor:
        with self._replay():
            losses = self._read(self._copies.evaluate(row, self._closure))
        self.count += 1
        return losses

    def sequential(self, points: Sequence[Along | Random]) -> Evaluated:
        """One point after the other in row 0."""
        along, values = [], []
        for point in points:
            along.append(point.write(self._copies, 0))
            values.append(self._at(0))
        return Evaluated(torch.stack(values).to("cpu", torch.float64), along)

    def batched(self, points: Sequence[Along | Random]) -> Evaluated:
        """All points in one forward; the closure is a `FunctionalClosure`.

        Raises:
            RuntimeError: the model cannot be vectorised.
        """
        assert isinstance(self._closure, FunctionalClosure)
        along = [point.write(self._copies, row) for row, point in enumerate(points)]
        with self._replay(), torch.no_grad():
            values = self._closure.batched(
                self._copies.parameters, self._copies.stacked(), self._read
            )
        self.count += len(points)
        return Evaluated(values.to("cpu", torch.float64), along)

    def repeat(self, point: Along | Random | None, first: Tensor, eps: float) -> int | None:
        """Evaluate once more, and compare.

        Args:
            point: where; None: at the parameters themselves.
            first: (n,) float64, the losses known for this point.
            eps: of the forward pass.

        Returns:
            The first task whose loss is another now; None if there is none.
        """
        if point is None:
            self._copies.displace(0, [None] * len(self._copies.parameters), 0.0)
        else:
            point.write(self._copies, 0)
        self.again = self._at(0).to("cpu", torch.float64)
        same = (self.again - first).abs() <= REPEATS_WITHIN * eps * first.abs()
        differ = (~same & first.isfinite()).nonzero()
        return int(differ[0]) if len(differ) else None

"""The losses at several displaced points, under the same circumstances."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.losses import Losses
from .functional import FunctionalClosure
from .perturb import Copies, Vector
from .replay import RandomState, Replay

#: A repeated evaluation may differ by this many eps of the forward pass, relative: accelerators
#: may sum in another order each time.
REPEATS_WITHIN = 64


@dataclass
class Along:
    """The points theta + scale_k * direction_k.

    Args:
        directions: fewer than scales are taken in turn.
        scales: one a point.
    """

    directions: Sequence[Vector]
    scales: Sequence[float]

    def __len__(self) -> int:
        return len(self.scales)

    def _direction(self, k: int) -> Vector:
        return self.directions[k % len(self.directions)]

    def write(self, copies: Copies, row: int, k: int) -> float:
        """Make `row` the point k.

        Returns:
            <row - theta, direction>: how far it really lies along the direction.
        """
        return copies.displace(row, self._direction(k), self.scales[k])

    def write_all(self, copies: Copies) -> list[float]:
        """Make row k the point k, for all k."""
        if len(self.directions) > 1:
            return [self.write(copies, k, k) for k in range(len(self))]
        copies.displace_all(self.directions[0], self.scales)
        return [copies.along(k, self.directions[0]) for k in range(len(self))]


@dataclass
class Random:
    """The points theta + scale * u_k for each scale, u_k the random directions number `first`
    to `first + count - 1` of `seed`."""

    scales: Sequence[float]
    seed: int
    first: int
    count: int
    distribution: str

    def __len__(self) -> int:
        return len(self.scales) * self.count

    def write(self, copies: Copies, row: int, k: int) -> float:
        """Make `row` the point k; returns NaN."""
        scale = self.scales[k // self.count]
        offset = self.first + k % self.count
        copies.displace_at_random(row, [scale], self.seed, offset, self.distribution)
        return math.nan

    def write_all(self, copies: Copies) -> list[float]:
        """Make row k the point k, for all k."""
        for k, scale in enumerate(self.scales):
            copies.displace_at_random(
                k * self.count, [scale] * self.count, self.seed, self.first, self.distribution
            )
        return [math.nan] * len(self)


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
        module = closure.module if isinstance(closure, FunctionalClosure) else None
        self._replay = Replay(start, [layout.device for layout in copies.layouts], module)
        #: Evaluations so far.
        self.count = 0

    def _at(self, row: int) -> Tensor:
        losses = self._replay.run(lambda: self._read(self._copies.evaluate(row, self._closure)))
        self.count += 1
        return losses

    def undisplaced(self) -> Tensor:
        """(n,) float64 on the CPU, the losses at the parameters themselves; takes row 0."""
        self._copies.take(0)
        return self._at(0).to("cpu", torch.float64)

    def once(self, points: Along | Random) -> Tensor:
        """(n,) float64 on the CPU, the losses at the first point; takes row 0."""
        points.write(self._copies, 0, 0)
        return self._at(0).to("cpu", torch.float64)

    def sequential(self, points: Along | Random) -> Evaluated:
        """One point after the other in row 0."""
        along, values = [], []
        for k in range(len(points)):
            along.append(points.write(self._copies, 0, k))
            values.append(self._at(0))
        return Evaluated(torch.stack(values).to("cpu", torch.float64), along)

    def batched(self, points: Along | Random) -> Evaluated:
        """All points in one forward; the closure is a `FunctionalClosure`.

        Raises:
            RuntimeError: the model cannot be vectorised.
        """
        assert isinstance(self._closure, FunctionalClosure)
        along = points.write_all(self._copies)
        copies, batched = self._copies, self._closure.batched
        with torch.no_grad():
            values = self._replay.run(
                lambda: batched(copies.parameters, copies.stacked(), self._read)
            )
        self.count += len(points)
        return Evaluated(values.to("cpu", torch.float64), along)

    def repeat(self, points: Along | Random | None, first: Tensor, eps: float) -> int | None:
        """Evaluate once more, and compare.

        Args:
            points: at the first of them; None: at the parameters themselves.
            first: (n,) float64, the losses known for this point.
            eps: of the forward pass.

        Returns:
            The first task whose loss is another now; None if there is none.
        """
        if points is None:
            self.again = self.undisplaced()
        else:
            self.again = self.once(points)
        same = (self.again - first).abs() <= REPEATS_WITHIN * eps * first.abs()
        differ = (~same & first.isfinite()).nonzero()
        return int(differ[0]) if len(differ) else None

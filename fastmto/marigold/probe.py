"""One estimate: where to evaluate the losses, and what they say there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.losses import Losses
from .estimators import directions_gram, narrowest, relative_steps, span_gram
from .evaluations import Along, Evaluated, Evaluations, Random
from .joint import Joint
from .known_vectors import KnownVectors
from .options import Options
from .perturb import Copies, check_step
from .replay import RandomState

#: A displacement this many times as long as the step chosen changes any loss that sees it.
FAR = 1e4


@dataclass
class Point:
    """The losses of one call of `backward`, and how to compute them elsewhere.

    Attributes:
        losses: the n present tasks', attached to their graphs when the point was made.
        values: theirs (n,), float64 on the CPU.
        shared: the parameters to displace.
        closure: the user's.
        read: makes (n,) losses of what it returns.
        transform: f (..., n) -> F (..., n), the losses that are balanced.
        label: what messages call the k-th present task.
        start: the random numbers that evaluations start from; None: the present ones.
    """

    losses: list[Tensor]
    values: Tensor
    shared: list[Tensor]
    closure: Callable[[], Losses]
    read: Callable[[Losses], Tensor]
    transform: Callable[[Tensor], Tensor]
    label: Callable[[int], str]
    start: RandomState | None


class Probe:
    """Makes the estimates of one balancer.

    Args:
        options: the balancer's.

    Attributes:
        copies: displaced parameters, kept between estimates; None before the first.
        precision: of the forward pass, found at the first estimate.
        count: evaluations of the last estimate.
        step: h, the length of its displacements.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self.copies: Copies | None = None
        self.precision = options.forward_dtype
        self.count = 0
        self.step = 0.0

    def along(self, point: Point, joint: Joint) -> Tensor:
        """y (n,): derivatives of the F_j along d, by a forward or central difference."""
        central = self._options.estimator == "central"
        copies = self.copies_for(point.shared, 2 if central else 1)
        mu = self._mu(point, copies, joint.length, central)
        points = Along([joint.direction], [mu, -mu] if central else [mu])
        found, base = self._evaluate(point, copies, points, central)
        ahead, behind = (*found.along, 0.0)[:2]
        change = found.values[0] - (found.values[1] if central else base)
        return change * (joint.length**2 / (ahead - behind))

    def random_gram(self, point: Point, first: int, count: int) -> Tensor:
        """G_hat (n, n) of the F_j from `count` random directions, those from number `first` on."""
        options = self._options
        central = options.difference == "central"
        copies = self.copies_for(point.shared, 2 * count if central else count)
        mu = self._mu(point, copies, math.sqrt(copies.numel), central)  # E ||u||^2 = P
        points = Random(
            [mu, -mu] if central else [mu], options.seed, first, count, options.distribution
        )
        found, base = self._evaluate(point, copies, points, central)
        # What rounding makes of mu u is the direction; its mean product is still the identity.
        shift = torch.tensor(points.scales, dtype=torch.float64).repeat_interleave(count)
        return directions_gram(self._slopes(base, found, shift, central))

    def span_gram(self, point: Point, known: KnownVectors) -> Tensor:
        """G_hat (n, n) of the F_j from the vectors that are not zero."""
        inner = known.inner()
        used = (inner.diagonal() > 0).nonzero().flatten()
        if len(used) == 0:
            return torch.zeros(len(point.values), len(point.values), dtype=torch.float64)
        inner = inner[used][:, used]
        squares = inner.diagonal()
        central = self._options.difference == "central"
        copies = self.copies_for(point.shared, len(used) * (2 if central else 1))
        # mu: of vectors of length 1.
        mu = self._mu(point, copies, 1.0, central)
        scales = torch.cat([mu / squares.sqrt(), -mu / squares.sqrt()][: 2 if central else 1])
        points = Along([known.vectors[k] for k in used.tolist()], scales.tolist())
        found, base = self._evaluate(point, copies, points, central)
        shift = torch.tensor(found.along, dtype=torch.float64) / squares.repeat(2 if central else 1)
        return span_gram(self._slopes(base, found, shift, central), inner)

    def copies_for(self, shared: list[Tensor], points: int) -> Copies:
        """The buffers for an estimate: those of the last one if they fit."""
        n_rows = points if self._options.evaluation == "batched" else 1
        copies = self.copies
        # `shared` is the copies' own list where they were found to fit.
        if copies is None or copies.parameters is not shared or copies.n_rows != n_rows:
            copies = self.copies = Copies(shared, n_rows)
        return copies

    def _mu(self, point: Point, copies: Copies, unit: float, central: bool) -> float:
        """h / unit; h, the length of a displacement by mu times a vector of length `unit`, is
        checked against the parameters' resolution."""
        self.count = 0
        length = copies.norm()
        dtype = copies.coarsest
        if self.precision is None:
            self.precision = narrowest(point.losses, dtype)
        mu = self._options.mu
        if mu is not None:
            self.step = mu * unit
            check_step(self.step, length, dtype, "mu", unit)
            return mu
        relative = self._options.relative_step
        if relative is None:
            relative = relative_steps("central" if central else "forward", self.precision)
        scale = length or 1.0
        self.step = relative * scale
        check_step(self.step, length, dtype, "relative_step", scale)
        return self.step / unit

    def _evaluate(
        self, point: Point, copies: Copies, points: Along | Random, central: bool
    ) -> tuple[Evaluated, Tensor]:
        """F at all points, and (n,) what forward differences subtract.

        Gram matrices take squares of differences: masks of dropout that the given losses do not
        share would leave nothing of them, so where nothing was recorded the losses at the
        parameters themselves are evaluated, too.
        """
        evaluations = Evaluations(point.closure, point.read, copies, point.start)
        base = None
        try:
            if self._options.by_gram and not central and point.start is None:
                base = evaluations.undisplaced()
            if self._options.evaluation == "batched":
                found = evaluations.batched(points)
            else:
                found = evaluations.sequential(points)
            self._check_displaced(point, evaluations, points, found.values, base)
            if self._options.debug:
                known = found.values[0] if central else base
                self._repeat(point, evaluations, points if central else None, known)
        finally:
            self.count = evaluations.count
        base = point.values if base is None else base
        return Evaluated(point.transform(found.values), found.along), point.transform(base)

    def _check_displaced(
        self,
        point: Point,
        evaluations: Evaluations,
        points: Along | Random,
        values: Tensor,
        base: Tensor | None,
    ) -> None:
        """Refuse a closure that does not see displaced parameters.

        Losses that are the same bit for bit at all points may be those of a step too small for the
        forward pass. A step so long that it cannot be, at the cost of one evaluation, tells.
        """
        known = values[0] if len(points) > 1 else point.values if base is None else base
        if not all(torch.equal(row, known) for row in reversed(values.unbind())):
            return
        far = dataclasses.replace(points, scales=[FAR * scale for scale in points.scales])
        if torch.equal(evaluations.once(far), known):
            raise RuntimeError(
                "closure returns the same losses, bit for bit, wherever the shared parameters are: "
                "it does not compute with them, but with copies of their values (a compiled model "
                "with frozen weights, tensors that were cached or computed outside of it)"
            )

    def _repeat(
        self,
        point: Point,
        evaluations: Evaluations,
        points: Along | Random | None,
        known: Tensor | None,
    ) -> None:
        """One evaluation more, at the first of `points` or at the parameters themselves, to compare
        with the losses known there; None: the given ones."""
        first = point.values if known is None else known
        eps = torch.finfo(self.precision or torch.float32).eps
        k = evaluations.repeat(points, first, eps)
        if k is not None:
            was = "given to backward as" if known is None else "evaluated to"
            raise ValueError(
                "closure must give the same losses whenever it is called at the same parameters: "
                f"{point.label(k)} was {was} {float(first[k]):.9g}, then evaluated to "
                f"{float(evaluations.again[k]):.9g}. Another batch, another autocast, random "
                "numbers of other generators than torch's, or losses given to backward that were "
                "not computed inside recording()?"
            )

    def _slopes(self, base: Tensor, found: Evaluated, shift: Tensor, central: bool) -> Tensor:
        """(R, n) derivatives along R vectors.

        Args:
            base: (n,), F at the parameters themselves, for a forward difference.
            shift: (R,) or, central, (2 R,): what the points are displaced by, in units of the
                vectors; the minus side last, as in `found`.
        """
        if central:
            plus, minus = found.values.chunk(2)
            ahead, behind = shift.chunk(2)
            return (plus - minus) / (ahead - behind)[:, None]
        return (found.values - base) / shift[:, None]

"""Explicit gradients for the tests of the weightings and balancers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from samplers import updates

Array = NDArray[np.float64]

#: Linearly independent for T <= 8, with an angle between any gradient and the span of the others.
REGULAR = ("full", "conflicting", "aligned")
#: Linearly dependent, or nearly.
SINGULAR = ("low_rank", "duplicates", "near_opposite", "stationary")
KINDS = (*REGULAR, *SINGULAR)
TASKS = (1, 2, 3, 5, 8)


def gradients(rng: np.random.Generator, tasks: int, kind: str) -> Array:
    """Rows (T, 2 T + 3) of the kind named, of length about sqrt(2 T)."""
    rows = updates(rng, tasks, kind)
    if kind == "conflicting" and tasks > 1:
        rows -= 0.95 * rows.mean(axis=0)  # most cosines are negative
    elif kind == "near_opposite" and tasks > 1:
        # A Gram matrix sees the square of this angle.
        rows[1] = -rows[0] + 10.0 ** rng.uniform(-5, -1) * rng.normal(size=rows.shape[1])
    elif kind == "stationary" and tasks > 1:
        # 0 is inside the convex hull: positive weights that give it exist.
        weights = rng.uniform(0.5, 2.0, size=tasks)
        rows[-1] = -(weights[:-1] @ rows[:-1]) / weights[-1]
    return rows


@dataclass(frozen=True)
class Case:
    """Gradients that print as what it takes to make them again.

    Attributes:
        decades: task i is scaled by 10^U(-decades, decades).
        scale: all tasks are.
    """

    tasks: int
    kind: str
    decades: float = 0.0
    scale: float = 1.0
    seed: int = 0

    @property
    def grads(self) -> Array:
        rng = np.random.default_rng([self.seed, self.tasks, KINDS.index(self.kind)])
        rows = gradients(rng, self.tasks, self.kind)
        scales = self.scale * 10.0 ** rng.uniform(-self.decades, self.decades, size=self.tasks)
        scaled: Array = scales[:, None] * rows
        return scaled

    def __str__(self) -> str:
        return f"{self.kind}-{self.tasks}-{self.decades:g}-{self.scale:g}-{self.seed}"


def cases(kinds: tuple[str, ...] = KINDS, tasks: tuple[int, ...] = TASKS) -> list[Case]:
    """Lengths together, apart by up to 6 and 24 decades, tiny and huge ones among them."""
    spreads = [(0.0, 1.0), (3.0, 1e-9), (12.0, 1.0)]
    return [
        Case(n, kind, decades, scale) for kind in kinds for n in tasks for decades, scale in spreads
    ]

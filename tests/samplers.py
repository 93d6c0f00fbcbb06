"""Gram matrices for the tests of the solvers: samplers and hypothesis strategies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

Array = NDArray[np.float64]

KINDS = ("full", "low_rank", "duplicates", "near_opposite", "aligned", "float32", "float16")
#: Indefinite by the rounding of their products: a solution need not be the only one.
INDEFINITE_KINDS = ("float32_low_rank", "float32_near_opposite")


def updates(rng: np.random.Generator, tasks: int, kind: str) -> Array:
    """Rows of the kind named, of length about sqrt(2 T)."""
    rows = rng.normal(size=(tasks, 2 * tasks + 3))
    kind = kind.removeprefix("float32_")
    if kind == "low_rank":
        rank = max(1, tasks // 3)
        rows = rng.normal(size=(tasks, rank)) @ rng.normal(size=(rank, 2 * tasks + 3))
    elif kind == "duplicates":
        rows = rows[rng.integers(0, max(1, tasks // 2), size=tasks)]
    elif kind == "near_opposite" and tasks > 1:
        rows[1] = -rows[0] + 10.0 ** rng.uniform(-9, -1) * rows[1]
    elif kind == "aligned":
        rows = rows[:1] + 0.1 * rows
    return rows


def gram_of(rows: Array, kind: str) -> Array:
    """U U^T; the kinds named "float..." take it from rounded rows in float32."""
    if kind.startswith("float"):
        rounded = rows.astype(np.float16 if kind == "float16" else np.float32).astype(np.float32)
        return (rounded @ rounded.T).astype(np.float64)
    return rows @ rows.T


def gram(rng: np.random.Generator, tasks: int, kind: str = "full", decades: float = 0.0) -> Array:
    """A Gram matrix of the kind named, task i's update scaled by 10^U(-decades, decades)."""
    g = gram_of(updates(rng, tasks, kind), kind)
    scales = 10.0 ** rng.uniform(-decades, decades, size=tasks)
    scaled: Array = scales[:, None] * g * scales
    return scaled


def planted(rng: np.random.Generator, a: Array, p: Array, rank: int) -> Array:
    """A Gram matrix whose bargaining solution for the preferences p is a.

    M = pp'/sum(p) + B with B PSD and B 1 = 0 has M 1 = p; so G = diag(1/a) M diag(1/a) has
    a_i (G a)_i = p_i. B has the given rank.
    """
    tasks = len(a)
    factors = rng.normal(size=(tasks, rank))
    factors -= factors.mean(0)
    m = np.outer(p, p) / p.sum() + factors @ factors.T
    g: Array = m / np.outer(a, a)
    return (g + g.T) / 2


@dataclass(frozen=True)
class Sample:
    """A Gram matrix that prints as what it takes to make it again."""

    tasks: int
    kind: str
    decades: float
    seed: int

    @property
    def gram(self) -> Array:
        return gram(np.random.default_rng(self.seed), self.tasks, self.kind, self.decades)


def samples(max_tasks: int = 64, kinds: tuple[str, ...] = KINDS) -> st.SearchStrategy[Sample]:
    """Gram matrices of 1 to `max_tasks` tasks of these kinds, updates over up to 24 decades."""
    return st.builds(
        Sample,
        tasks=st.integers(1, max_tasks),
        kind=st.sampled_from(kinds),
        decades=st.sampled_from([0.0, 0.5, 3.0, 12.0]),
        seed=st.integers(0, 2**32 - 1),
    )


def symmetric_matrices(max_tasks: int = 8) -> st.SearchStrategy[Array]:
    """Symmetric matrices of arbitrary floats, NaN and infinity included."""

    def build(tasks: int) -> st.SearchStrategy[Array]:
        entries = tasks * (tasks + 1) // 2
        return st.lists(st.floats(width=64), min_size=entries, max_size=entries).map(
            lambda values: _symmetric(values, tasks)
        )

    return st.integers(1, max_tasks).flatmap(build)


def _symmetric(values: list[float], tasks: int) -> Array:
    matrix = np.zeros((tasks, tasks))
    matrix[np.triu_indices(tasks)] = values
    return np.where(np.triu(np.ones_like(matrix)) > 0, matrix, matrix.T)


def hard(rng: np.random.Generator, tasks: int, decades: float = 1.5) -> Array:
    """Conflicts between gradients of very different lengths: what Frank-Wolfe creeps on.

    Every gradient has a common part of 3 % of it against which the others nearly cancel, and a
    length of 10^U(-decades, decades): the least norm is far below that of every gradient.
    """
    rows = rng.normal(size=(tasks, tasks + 2))
    rows -= rows.mean(0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows[:, 0] += 0.03
    rows *= 10.0 ** rng.uniform(-decades, decades, size=(tasks, 1))
    product: Array = rows @ rows.T
    return product


def planted_least_norm(rng: np.random.Generator, weights: Array, size: int) -> Array:
    """A Gram matrix of which these weights (some 0) give the point of least norm, and no others.

    Rows e + r_i with <e, r_i> = 0 and sum_i w_i r_i = 0 where w_i > 0, else (1 + gap) e + r_i.
    """
    rows = rng.normal(size=(len(weights), size))
    rows[:, 0] = 0
    active = weights > 0
    rows[active] -= weights[active] @ rows[active]
    rows[:, 0] = np.where(active, 1.0, 1.0 + rng.uniform(0.1, 1.0, size=len(weights)))
    product: Array = rows @ rows.T
    return product

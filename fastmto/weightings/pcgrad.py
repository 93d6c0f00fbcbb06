"""Projecting conflicting gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..solvers import Result, pcgrad
from .base import SolverWeighting

if TYPE_CHECKING:
    from numpy.typing import NDArray


class PCGrad(SolverWeighting):
    """The sum of the gradients, each freed of its conflicts with the others one by one.

    Source: Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, arXiv 2001.06782,
    Algorithm 1: for every task i, g = g_i meets the other tasks j in random order, and

        g <- g - (<g, g_j> / ||g_j||^2) g_j   where <g, g_j> < 0

    The direction is the sum of the T results. All of this is linear in the gradients, so the Gram
    matrix suffices. Every task meets the others in an order of its own, drawn at every call.

    Scaling: g -> c g leaves the weights as they are. A projection does not depend on the lengths,
    so for given orders g_i -> c_i g_i makes the contribution of task i c_i times as long.

    Peers: the sum is the paper's and theirs. TorchJD draws the orders from torch's global
    generator, LibMTL from Python's. LibMTL also lets g meet g_i itself, which for T >= 3 may
    project once more: after two projections <g, g_i> < 0 is possible.

    Args:
        seed: of the generator of the orders, an integer >= 0. The generator is part of
            `state_dict`.

    Raises:
        ValueError: a seed that is none.

    Example: `weights = fastmto.weightings.PCGrad(seed=1)(gram)`.
    """

    @property
    def positive(self) -> bool:
        return True  # >= 1: a projection adds positive multiples

    def __init__(self, seed: int = 0) -> None:
        if type(seed) is not int or seed < 0:
            raise ValueError(f"seed must be an integer >= 0, got {seed!r}")
        self.seed = seed
        self._generator = np.random.Generator(np.random.PCG64(seed))
        self._others = _others(1)

    def orders(self, n_tasks: int) -> NDArray[np.int64]:
        """Draw the orders of one call: (T, T - 1), row i a permutation of the tasks but i."""
        if len(self._others) != n_tasks:
            self._others = _others(n_tasks)
        if n_tasks < 3:  # there is only one order
            return self._others
        return self._generator.permuted(self._others, axis=1)

    def _solve(self, gram: Tensor, tasks: Sequence[int] | None) -> Result[Tensor]:
        return pcgrad(gram, self.orders(gram.shape[0]))

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state) != {"generator"}:
            raise ValueError(f"state must hold 'generator', got {sorted(state)}")
        self._generator.bit_generator.state = state["generator"]

    def reset(self) -> None:
        super().reset()
        self._generator = np.random.Generator(np.random.PCG64(self.seed))

    def __repr__(self) -> str:
        return f"PCGrad(seed={self.seed})"


def _others(n_tasks: int) -> NDArray[np.int64]:
    """(T, T - 1): row i holds the tasks but i, increasing."""
    columns = np.arange(n_tasks - 1)
    return columns + (columns >= np.arange(n_tasks)[:, None])

"""Weights that do not look at the Gram matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.device import Constants
from .base import DeviceSolver, Weighting, check_tasks


class Constant(Weighting):
    """The same weights at every step, whatever the Gram matrix.

    Args:
        weights: one finite number >= 0 per task.

    Raises:
        ValueError: no weights, or one that is negative or not finite.

    Example: `weights = fastmto.weightings.Constant([1.0, 0.5])(gram)`.
    """

    def __init__(self, weights: Sequence[float] | Tensor) -> None:
        self.weights = [float(w) for w in weights]
        if not self.weights or not all(w >= 0 and math.isfinite(w) for w in self.weights):
            raise ValueError(f"weights must be finite numbers >= 0, got {self.weights}")

    @property
    def positive(self) -> bool:
        return all(w > 0 for w in self.weights)

    def __call__(self, gram: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        return torch.tensor(self._of(gram, tasks), dtype=gram.dtype, device=gram.device)

    def device_solver(self, n_tasks: int) -> DeviceSolver:
        constants = Constants(torch.float64)

        def solve(gram: Tensor, weights: Tensor, info: Tensor, tasks: Sequence[int] | None) -> None:
            weights.copy_(constants(self._of(gram, tasks), gram.device))
            info.zero_()  # solved

        return solve

    def _of(self, gram: Tensor, tasks: Sequence[int] | None) -> list[float]:
        """The weights of the tasks of this call."""
        indices = check_tasks(gram, tasks)
        if (tasks is None and len(gram) != len(self.weights)) or max(indices) >= len(self.weights):
            raise ValueError(
                f"gram must have {len(self.weights)} tasks, one per weight, got tasks {indices}"
            )
        return [self.weights[i] for i in indices]

    def __repr__(self) -> str:
        return f"Constant({self.weights})"


class Equal(Weighting):
    """Weight 1 for every task: the sum of the losses.

    Example: `weights = fastmto.weightings.Equal()(gram)`.
    """

    @property
    def positive(self) -> bool:
        return True

    def __call__(self, gram: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        if tasks is not None:
            check_tasks(gram, tasks)
        return torch.ones(len(gram), dtype=gram.dtype, device=gram.device)

    def device_solver(self, n_tasks: int) -> DeviceSolver:
        def solve(gram: Tensor, weights: Tensor, info: Tensor, tasks: Sequence[int] | None) -> None:
            weights.fill_(1.0)
            info.zero_()  # solved

        return solve

    def __repr__(self) -> str:
        return "Equal()"

"""Linear scalarisation: equal or given weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine.batch import Batch
from ..engine.per_task import like, take
from .loss_balancer import LossBalancer


class LS(LossBalancer):
    """Linear scalarisation: minimise sum_i w_i L_i with fixed weights.

    LibMTL's EW and nash-mtl's LS are the same with equal weights (w_i = 1); TorchJD's Mean has
    w_i = 1/T.

    Args:
        n_tasks: T; None: the number of `task_weights`, or found at the first backward.
        task_weights: T finite weights; None: 1 each.
        update_weights_every, on_nonfinite: see `Balancer`.

    Raises:
        ValueError: weights that are not finite, or not T of them.

    Example:
        >>> import torch, fastmto
        >>> trunk, heads = torch.nn.Linear(4, 8), [torch.nn.Linear(8, 1) for _ in range(2)]
        >>> balancer = fastmto.balancers.LS(task_weights=[1.0, 0.5])
        >>> losses = [head(trunk(torch.ones(3, 4))).exp().mean() for head in heads]
        >>> loss, info = balancer.backward(losses, trunk.parameters())
        >>> info.weights.shape
        torch.Size([2])
    """

    key = "ls"

    def __init__(
        self,
        n_tasks: int | None = None,
        *,
        task_weights: Sequence[float] | None = None,
        update_weights_every: int = 1,
        on_nonfinite: str | None = None,
    ) -> None:
        self._task_weights: list[float] | None = None
        if task_weights is not None:
            self._task_weights = [float(weight) for weight in task_weights]
            if not self._task_weights or not all(map(math.isfinite, self._task_weights)):
                raise ValueError(f"task_weights must be finite numbers, got {task_weights}")
            if n_tasks is None:
                n_tasks = len(self._task_weights)
        super().__init__(
            n_tasks, update_weights_every=update_weights_every, on_nonfinite=on_nonfinite
        )

    def _set_tasks(self, n_tasks: int) -> None:
        super()._set_tasks(n_tasks)
        if self._task_weights is not None:
            if len(self._task_weights) != n_tasks:
                raise ValueError(
                    f"task_weights must hold {n_tasks} weights, got {len(self._task_weights)}"
                )
            self.weights = torch.tensor(self._task_weights, dtype=torch.float64)

    def _weigh(self, batch: Batch, losses: Tensor) -> Tensor:
        assert self.weights is not None
        return like(take(self.weights, batch.tasks), losses)

    def _options(self) -> dict[str, Any]:
        return {"task_weights": self._task_weights}

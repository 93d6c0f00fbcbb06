"""What a training run needs to know about a data set: its tasks, its rows, its three parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .. import metrics


@dataclass(frozen=True)
class Task:
    """One task: a binary label judged by AUC, or one class of several judged by accuracy.

    Args:
        name: shown in tables and plots.
        n_outputs: logits the model gives for this task; 1 means a binary label.
    """

    name: str
    n_outputs: int = 1

    @property
    def metric(self) -> str:
        """Name of the figure that `score` returns; larger is better for both."""
        return "AUC" if self.n_outputs == 1 else "accuracy"

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean loss of a batch: binary cross-entropy or cross-entropy, in nats.

        Args:
            output: (B,) logits of a binary task or (B, n_outputs) logits.
            target: (B,) int64 labels.
        """
        if self.n_outputs == 1:
            return torch.nn.functional.binary_cross_entropy_with_logits(
                output, target.to(output.dtype)
            )
        return torch.nn.functional.cross_entropy(output, target)

    def score(self, output: Tensor, target: Tensor) -> float:
        """The task's metric over a whole part of the data, in [0, 1].

        Args:
            output: (N,) or (N, n_outputs) logits.
            target: (N,) int64 labels.
        """
        if self.n_outputs == 1:
            return metrics.auc(target, output)
        return float((output.argmax(dim=1) == target).double().mean())


@dataclass(frozen=True)
class Split:
    """One part of a data set, as tensors of N rows on one device.

    Args:
        dense: (N, D) float32, D may be 0.
        categorical: (N, F) int32 row numbers of one embedding table for all fields, F may be 0.
        targets: (N, T) int64.
    """

    dense: Tensor
    categorical: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        rows = {len(self.dense), len(self.categorical), len(self.targets)}
        if len(rows) != 1 or self.targets.ndim != 2:
            raise ValueError(
                "dense, categorical and targets (N, T) must have the same number of rows, got "
                f"shapes {tuple(self.dense.shape)}, {tuple(self.categorical.shape)}, "
                f"{tuple(self.targets.shape)}"
            )

    def __len__(self) -> int:
        return len(self.targets)

    def _each(self, function: Callable[[Tensor], Tensor]) -> Split:
        return Split(function(self.dense), function(self.categorical), function(self.targets))

    def rows(self, index: Tensor) -> Split:
        """The rows of `index` (B,) int64, copied."""
        return self._each(partial(torch.index_select, dim=0, index=index))

    def to(self, device: torch.device) -> Split:
        """The same rows on `device`."""
        return self._each(lambda tensor: tensor.to(device))


@dataclass(frozen=True)
class MultiTaskData:
    """A data set ready for training.

    Args:
        name: shown in tables and plots.
        tasks: T of them, in the order of the columns of `Split.targets`.
        field_sizes: number of known values of each categorical field; the embedding table has
            their sum as rows, and ids equal to that sum stand for "never seen in training".
        train, validation, test: the parts.
    """

    name: str
    tasks: tuple[Task, ...]
    field_sizes: tuple[int, ...]
    train: Split
    validation: Split
    test: Split

    @property
    def n_dense(self) -> int:
        """Number of dense columns."""
        return self.train.dense.shape[1]

    def to(self, device: torch.device) -> MultiTaskData:
        """The same data with all parts on `device`."""
        return MultiTaskData(
            self.name,
            self.tasks,
            self.field_sizes,
            self.train.to(device),
            self.validation.to(device),
            self.test.to(device),
        )

"""What every model here shares: the input layer, the towers, and who owns which parameter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers `widths[0] -> widths[1] -> ...`, a ReLU after each."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers)


def tower(widths: Sequence[int], n_outputs: int) -> nn.Sequential:
    """`mlp(widths)` and a last linear layer to the logits."""
    return nn.Sequential(*mlp(widths), nn.Linear(widths[-1], n_outputs))


class TabularEncoder(nn.Module):
    """Dense columns and categorical fields -> one vector per row.

    One embedding table holds all fields; ids are already offset by field. The id after the last
    row stands for values that training never saw and reads a zero vector, not an untrained random
    one. The dense columns become one more vector of the same width by a linear layer.

    Args:
        n_dense: number of dense columns D, may be 0.
        field_sizes: known values of each of the F categorical fields, may be empty.
        embedding: width of a vector.

    Raises:
        ValueError: no input at all, or a size that is not positive.
    """

    def __init__(self, n_dense: int, field_sizes: Sequence[int], embedding: int) -> None:
        super().__init__()
        if n_dense < 0 or embedding < 1 or any(size < 1 for size in field_sizes):
            raise ValueError(
                "n_dense must be >= 0, embedding and every field size >= 1, got "
                f"{n_dense}, {embedding}, {list(field_sizes)}"
            )
        if n_dense == 0 and not field_sizes:
            raise ValueError("a model needs dense columns or categorical fields, got neither")
        self.dense = nn.Linear(n_dense, embedding) if n_dense else None
        self.table = nn.Embedding(sum(field_sizes), embedding) if field_sizes else None
        if self.table is not None:
            # torch's default, N(0, 1), would drown the dense vector and the first layer.
            nn.init.xavier_normal_(self.table.weight)
        self.width = embedding * (len(field_sizes) + (self.dense is not None))

    def forward(self, dense: Tensor, categorical: Tensor) -> Tensor:
        """Encodes a batch.

        Args:
            dense: (B, D) floating point.
            categorical: (B, F) int32 or int64 rows of the table, or its length for "unseen".

        Returns:
            (B, width).
        """
        parts = []
        if self.table is not None:
            weight = self.table.weight
            with_unseen = torch.cat([weight, weight.new_zeros(1, weight.shape[1])])
            parts.append(functional.embedding(categorical, with_unseen).flatten(1))
        if self.dense is not None:
            parts.append(self.dense(dense))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class MultiTaskModel(nn.Module):
    """A model of T tasks: a trunk that all share, then one head per task.

    A subclass implements `represent` and `heads`, which share no tensor but the representation,
    `task_modules` and `last_shared_parameters`; whatever is in no task's modules is shared.
    """

    def represent(self, dense: Tensor, categorical: Tensor) -> list[Tensor]:
        """The shared representation: all that the heads see of the trunk.

        None of the tensors is computed from another of them, so that the gradients of a loss by
        all of them, sent on through the trunk, add up to its gradient by the shared parameters.

        Args:
            dense: (B, D) floating point.
            categorical: (B, F) int32 or int64.
        """
        raise NotImplementedError

    def heads(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Logits of each task: (B,) for one output, (B, n_outputs) for several."""
        raise NotImplementedError

    def forward(self, dense: Tensor, categorical: Tensor) -> list[Tensor]:
        """`heads(represent(dense, categorical))`."""
        return self.heads(self.represent(dense, categorical))

    def task_modules(self) -> list[list[nn.Module]]:
        """For each task, the modules that only its loss reaches."""
        raise NotImplementedError

    def last_shared_parameters(self) -> list[nn.Parameter]:
        """Those of the last layer that all tasks share."""
        raise NotImplementedError

    def task_parameters(self) -> list[list[nn.Parameter]]:
        """One list per task, in the tasks' order."""
        return [
            [parameter for module in modules for parameter in module.parameters()]
            for modules in self.task_modules()
        ]

    def shared_parameters(self) -> list[nn.Parameter]:
        """The parameters that several tasks' losses reach."""
        own = {id(parameter) for task in self.task_parameters() for parameter in task}
        return [parameter for parameter in self.parameters() if id(parameter) not in own]


def count(parameters: Iterable[nn.Parameter]) -> int:
    """Number of elements."""
    return sum(parameter.numel() for parameter in parameters)

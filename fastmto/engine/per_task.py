"""Small state with one entry a task: reading and writing some of its entries, Adam on it.

Nothing here synchronizes with the device, with all tasks present or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def take(state: Tensor, tasks: Sequence[int]) -> Tensor:
    """Entries (n,) of `tasks` (increasing); `state` (T,) itself where that is all of them."""
    if len(tasks) == len(state):
        return state
    # Indexing by a list would copy the list to the device, and synchronize.
    return torch.stack([state[i] for i in tasks])


def put(state: Tensor, tasks: Sequence[int], values: Tensor) -> Tensor:
    """`state` (T,) with the entries of `tasks` replaced; `state` itself is left as it was."""
    if len(tasks) == len(state):
        return values
    new = state.clone()
    for i, value in zip(tasks, values.unbind(), strict=True):
        new[i] = value
    return new


def like(state: Tensor, losses: Tensor) -> Tensor:
    """`state` with the dtype and on the device of `losses`."""
    return state.to(losses.device, losses.dtype)


class TaskAdam:
    """Adam on a vector with one entry per task; absent tasks' moments and counts are unchanged.

    Source: Kingma & Ba 2015, Algorithm 1; weight decay is added to the gradient, as in
    `torch.optim.Adam`.

    Args:
        n_tasks: T.
        lr: learning rate.
        weight_decay: times the value, added to the gradient.
    """

    betas = (0.9, 0.999)
    eps = 1e-8

    def __init__(self, n_tasks: int, lr: float, weight_decay: float = 0.0) -> None:
        self.lr = lr
        self.weight_decay = weight_decay
        #: (3, T): first moments, second moments, number of steps.
        self.state = torch.zeros(3, n_tasks, dtype=torch.float64)

    def step(self, values: Tensor, gradients: Tensor, tasks: Sequence[int]) -> Tensor:
        """The values (n,) of `tasks` after one step; `values` and `gradients` are (n,)."""
        beta1, beta2 = self.betas
        moments = like(self.state, values)
        first, second, count = (take(row, tasks) for row in moments.unbind())
        if self.weight_decay:
            gradients = gradients + self.weight_decay * values
        first = beta1 * first + (1 - beta1) * gradients
        second = beta2 * second + (1 - beta2) * gradients * gradients
        count = count + 1
        new = (first, second, count)
        self.state = torch.stack(
            [put(row, tasks, part) for row, part in zip(moments.unbind(), new, strict=True)]
        )
        length = (second / (1 - beta2**count)).sqrt() + self.eps
        return values - self.lr * (first / (1 - beta1**count)) / length

    def state_dict(self) -> dict[str, Tensor]:
        return {"state": self.state.clone()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.state = state_dict["state"].clone()

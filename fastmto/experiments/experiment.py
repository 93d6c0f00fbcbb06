"""What `fastmto train` and `fastmto compare` run: a data set, a model and how to train it."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastmto

from .data.base import MultiTaskData
from .models import MMOE, PLE, SharedBottom
from .models.base import MultiTaskModel, count
from .optimizers import balancer
from .records import TrainResult
from .train import one_step, train, waiting


@dataclass(frozen=True)
class Experiment:
    """Everything but the data's rows, the balancer and the seed.

    Args:
        data: name of the data set.
        model: "shared_bottom", "mmoe" or "ple".
        sizes: constructor arguments of the model.
        epochs, batch_size, lr, weight_decay: of the training.
        update_weights_every: steps between two searches; None: the methods' own
            (`fastmto.experiments.optimizers.search_every`).
    """

    data: str
    model: str
    sizes: dict[str, Any]
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    update_weights_every: int | None

    def n_steps(self, data: MultiTaskData) -> int:
        """Steps of one run."""
        return self.epochs * -(-len(data.train) // self.batch_size)

    def build(self, data: MultiTaskData, seed: int) -> MultiTaskModel:
        """The model on the data's device, as the seed starts it."""
        kind = {"mmoe": MMOE, "ple": PLE, "shared_bottom": SharedBottom}[self.model]
        n_outputs = [task.n_outputs for task in data.tasks]
        torch.manual_seed(seed)
        model: MultiTaskModel = kind(data.n_dense, data.field_sizes, n_outputs, **self.sizes)
        return model.to(data.train.targets.device)

    def train(
        self,
        data: MultiTaskData,
        name: str,
        seed: int,
        on_step: Callable[[Tensor], None] | None = None,
    ) -> TrainResult:
        """One run, from the start."""
        return train(
            self.build(data, seed),
            data,
            self._balancer(name),
            epochs=self.epochs,
            batch_size=self.batch_size,
            seed=seed,
            name=name,
            on_step=on_step,
        )

    def steps_alone(self, data: MultiTaskData, name: str, seed: int, n_steps: int) -> None:
        """The first steps of a run, without probes, logs or evaluation beside them."""
        model = self.build(data, seed)
        optimizer = self._balancer(name)(model)
        device = data.train.targets.device
        order = torch.Generator().manual_seed(seed)
        batches = torch.split(torch.randperm(len(data.train), generator=order), self.batch_size)
        for step in range(n_steps):
            index = batches[step % len(batches)].to(device)
            one_step(
                model,
                data.tasks,
                optimizer,
                lambda index=index: data.train.rows(index),  # type: ignore[misc]
                waiting(device),
            )

    def _balancer(self, name: str) -> Any:
        return balancer(
            name,
            lr=self.lr,
            weight_decay=self.weight_decay,
            update_weights_every=self.update_weights_every,
        )

    def title(self, data: MultiTaskData) -> str:
        """What it is, in a line."""
        model = self.build(data, 0)
        return (
            f"{data.name}, {self.model}: {count(model.parameters()):,} parameters, "
            f"{count(model.shared_parameters()):,} of them shared; "
            f"{self.epochs} epochs of {len(data.train):,} rows, batch {self.batch_size}"
        )

    def as_json(self, data: MultiTaskData) -> dict[str, Any]:
        """What it is, as plain numbers and text."""
        model = self.build(data, 0)
        return {
            **asdict(self),
            "parameters": count(model.parameters()),
            "shared_parameters": count(model.shared_parameters()),
            "device": str(data.train.targets.device),
            "rows": {part: len(getattr(data, part)) for part in ("train", "validation", "test")},
            "tasks": {task.name: task.metric for task in data.tasks},
        }


def environment() -> dict[str, Any]:
    """Versions and machine."""
    return {
        "fastmto": fastmto.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
    }

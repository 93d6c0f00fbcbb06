"""A training run as one readable function.

    model = MMOE(data.n_dense, data.field_sizes, [task.n_outputs for task in data.tasks])
    result = train(model, data, balancer("pub", lr=1e-3), epochs=3, batch_size=1024)
    result.epochs[-1].test, result.timing.balancing_share

Where the time goes is measured beside it; records.py says how.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .data.base import MultiTaskData, Split, Task
from .models.base import MultiTaskModel
from .optimizers import Balanced, Balancer, MakeBalancer, SummedLosses
from .records import Epoch, Steps, TrainResult, timing

#: Steps between two probes of what a plain step costs.
PROBE_EVERY = 20
#: Rows scored at once.
_EVALUATION_ROWS = 8192


def task_losses(model: MultiTaskModel, tasks: tuple[Task, ...], batch: Split) -> Tensor:
    """The losses (T,) of a batch, attached to the graph."""
    return _losses(model, tasks, batch)[0]


def _losses(
    model: MultiTaskModel, tasks: tuple[Task, ...], batch: Split
) -> tuple[Tensor, list[Tensor]]:
    """The losses (T,) of a batch and the shared representation they go through."""
    features = model.represent(batch.dense, batch.categorical)
    outputs = model.heads(features)
    losses = torch.stack(
        [
            task.loss(output, target)
            for task, output, target in zip(tasks, outputs, batch.targets.unbind(1), strict=True)
        ]
    )
    return losses, features


def evaluate(model: MultiTaskModel, tasks: tuple[Task, ...], split: Split) -> dict[str, float]:
    """Each task's metric over a whole part; NaN for a task whose outputs are not finite."""
    chunks = []
    with torch.inference_mode():
        for start in range(0, len(split), _EVALUATION_ROWS):
            end = start + _EVALUATION_ROWS
            chunks.append(model(split.dense[start:end], split.categorical[start:end]))
    scores = {}
    for task, parts, target in zip(
        tasks, zip(*chunks, strict=True), split.targets.unbind(1), strict=True
    ):
        output = torch.cat(parts)
        finite = bool(output.isfinite().all())
        scores[task.name] = task.score(output, target) if finite else math.nan
    return scores


class _PlainProbe:
    """Plain steps beside the run, that touch neither the model nor its optimizer."""

    def __init__(
        self, model: MultiTaskModel, tasks: tuple[Task, ...], synchronize: Callable[[], None]
    ) -> None:
        self._model = model
        self._tasks = tasks
        self._synchronize = synchronize
        self._parameters = list(model.parameters())
        self._copies = [p.detach().clone() for p in self._parameters]
        self._adam = torch.optim.Adam(self._copies, fused=True)

    def measure(self, batch: Split) -> tuple[float, float]:
        """Seconds of one backward of the summed losses and of one fused Adam step."""
        self._plain_step(batch)
        return self._plain_step(batch)

    def _plain_step(self, batch: Split) -> tuple[float, float]:
        losses = task_losses(self._model, self._tasks, batch)
        clock = _Clock(self._synchronize)
        gradients = torch.autograd.grad(losses.sum(), self._parameters)
        backward = clock.lap()
        for copy, gradient in zip(self._copies, gradients, strict=True):
            copy.grad = gradient
        clock.lap()
        self._adam.step()
        return backward, clock.lap()


def one_step(
    model: MultiTaskModel,
    tasks: tuple[Task, ...],
    optimizer: Balancer,
    fetch: Callable[[], Split],
    synchronize: Callable[[], None],
) -> tuple[Split, Tensor, tuple[float, float, float]]:
    """One training step.

    Args:
        model, tasks: what is trained.
        optimizer: over the model.
        fetch: gives the batch.
        synchronize: as `waiting` gives it.

    Returns:
        The batch, its losses (T,), detached, and the seconds of forward, backward and update.
    """
    clock = _Clock(synchronize)
    batch = fetch()
    losses, features = _losses(model, tasks, batch)
    forward = clock.lap()
    optimizer.zero_grad()
    if isinstance(optimizer, Balanced):
        optimizer.backward(losses, features, lambda: task_losses(model, tasks, batch))
    else:
        optimizer.backward(losses)
    backward = clock.lap()
    optimizer.step()
    if isinstance(optimizer, Balanced) and optimizer.looks_back:
        with torch.no_grad():
            optimizer.update(task_losses(model, tasks, batch))
    return batch, losses.detach(), (forward, backward, clock.lap())


class _Clock:
    """Seconds between laps, the device's queue emptied at each (nothing to empty on a CPU)."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self._synchronize = synchronize
        self._last = 0.0
        self.lap()

    def lap(self) -> float:
        self._synchronize()
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds


def waiting(device: torch.device) -> Callable[[], None]:
    """What waits until a device's queue is empty; nothing on a CPU."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def train(
    model: MultiTaskModel,
    data: MultiTaskData,
    make_balancer: MakeBalancer,
    *,
    epochs: int,
    batch_size: int,
    seed: int = 0,
    name: str = "",
    on_step: Callable[[Tensor], None] | None = None,
) -> TrainResult:
    """Trains `model` on `data.train`, and scores it on the other parts after every epoch.

    The same seed gives the same batches, whatever the balancer. On a CUDA device the queue is
    emptied around the phases of every step, so that they can be told apart: slower than an
    untimed loop.

    Args:
        model: on the data's device; trained in place.
        data: the parts.
        make_balancer: builds the optimizer over the model, e.g. `balancer("pub", lr=1e-3)`.
        epochs: passes over the training part.
        batch_size: rows per step; the last batch of an epoch may be smaller.
        seed: of the batches' order.
        name: of the balancer, for tables and plots.
        on_step: called after every step with its losses (T,), detached.

    Raises:
        ValueError: epochs or batch_size below 1.
    """
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be >= 1, got {epochs} and {batch_size}")
    device = data.train.targets.device
    synchronize = waiting(device)
    optimizer = make_balancer(model)
    summed = optimizer.optimizer if isinstance(optimizer, SummedLosses) else None
    plain = isinstance(summed, torch.optim.Adam) and summed.defaults["fused"] is True
    probe = None if plain else _PlainProbe(model, data.tasks, synchronize)
    order = torch.Generator().manual_seed(seed)

    log: list[tuple[Tensor, Tensor, int, tuple[float, float, float]]] = []
    probes: list[tuple[float, float]] = []
    records: list[Epoch] = []
    for _ in range(epochs):
        first = len(log)
        model.train()
        for index in torch.split(torch.randperm(len(data.train), generator=order), batch_size):
            before = optimizer.stats["backwards"]

            def fetch(index: Tensor = index) -> Split:
                return data.train.rows(index.to(device))

            batch, losses, lap = one_step(model, data.tasks, optimizer, fetch, synchronize)
            weights = optimizer.weights
            assert weights is not None
            backwards = optimizer.stats["backwards"] - before
            log.append((losses, weights.detach().clone(), backwards, lap))
            if on_step is not None:
                on_step(losses)
            if probe is not None and len(log) % PROBE_EVERY == 1:
                probes.append(probe.measure(batch))
        model.eval()
        means = torch.stack([losses for losses, *_ in log[first:]]).double().mean(dim=0).tolist()
        records.append(
            Epoch(
                train_losses=dict(zip((task.name for task in data.tasks), means, strict=True)),
                validation=evaluate(model, data.tasks, data.validation),
                test=evaluate(model, data.tasks, data.test),
                seconds=sum(sum(lap) for *_, lap in log[first:]),
            )
        )

    losses_log, weights_log, counts, laps = zip(*log, strict=True)
    forward, backward, update = np.array(laps).T
    steps = Steps(
        losses=torch.stack(losses_log).double().cpu().numpy(),
        weights=torch.stack(weights_log).double().cpu().numpy(),
        backwards=np.array(counts),
        forward=forward,
        backward=backward,
        update=update,
        probes=np.array(probes).reshape(-1, 2),
    )
    return TrainResult(
        name=name,
        tasks=data.tasks,
        epochs=records,
        steps=steps,
        timing=timing(steps, plain),
        stats=dict(optimizer.stats),
        settings=repr(optimizer),
    )

"""A training run as one readable function, with an honest account of where the time goes.

    model = MMOE(data.n_dense, data.field_sizes, [task.n_outputs for task in data.tasks])
    result = train(model, data, balancer("pub", lr=1e-3), epochs=3, batch_size=1024)
    result.epochs[-1].test, result.timing.balancing_share

**What counts as balancing.** Equal weighting pays one forward, one backward of the summed loss and
one step of torch's fused Adam. Balancing is everything else of a step, measured in the same run:

    balancing = (backward + optimizer step) - (one plain backward + one plain Adam step)

The plain figures come from probes: every `PROBE_EVERY` steps two plain steps are made beside the
run, on copies of the parameters, and the second one is timed (the first brings caches to the state
of a plain run); their time is counted nowhere else. All figures are lower quartiles: what a phase
takes when nothing else disturbs it, because on a busy machine a few stalls outweigh hundreds of
searches and even the median can be one. They are taken apart for steps with one and with several
backward passes and put together by their numbers; a step is the sum of its phases. The share may
come out slightly below 0, by noise or where the optimizer's step is quicker than torch's. A second
forward of the same batch, where a method wants the losses after the step, counts as update.
`Epoch.seconds` is the plain sum of all steps, stalls and all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import balancers
from ..balancers import registry
from ..engine.losses import Losses
from ..optim.adatask import AdaTask
from ..optim.clippy_adam import ClippyAdam
from ..optim.pub import PUB
from .data.base import MultiTaskData, Split, Task
from .models.base import MultiTaskModel

#: Steps between two probes of what a plain step costs.
PROBE_EVERY = 20
#: Rows scored at once.
_EVALUATION_ROWS = 8192

#: Learning rate of a method's own parameters, that of the nash-mtl family's trainers.
METHOD_LR = 0.025
#: Steps between two searches of weights, where a search costs more than the step itself.
SEARCH_EVERY = 10
#: What `balancer` knows beside `fastmto.available()`.
EXTRA_BALANCERS = ("equal", "pub_clippy", "pub_adatask", "adatask", "clippy")

Floats = npt.NDArray[np.float64]


class Balancer(Protocol):
    """What `train` asks of an optimizer; `fastmto.PUB` and `fastmto.AdaTask` have it."""

    @property
    def stats(self) -> dict[str, int]:
        """Counts of what happened; "steps" and "backwards" among them."""

    @property
    def weights(self) -> Tensor | None:
        """Task weights (T,) of the last step."""

    def zero_grad(self) -> None:
        """Clears the gradients."""

    def backward(self, losses: Tensor) -> None:
        """Takes the losses (T,) in place of `loss.backward()`."""

    def step(self) -> Any:
        """Moves the parameters."""


class SummedLosses:
    """Equal weighting: any torch optimizer on the sum of the losses, as a `Balancer`.

    Args:
        optimizer: over all parameters.
        n_tasks: T.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, n_tasks: int) -> None:
        self.optimizer = optimizer
        self.weights = torch.ones(n_tasks, dtype=torch.float64)
        self.stats = {"steps": 0, "backwards": 0}

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def backward(self, losses: Tensor) -> None:
        torch.autograd.backward(losses.sum())
        self.stats["backwards"] += 1

    def step(self) -> None:
        self.optimizer.step()
        self.stats["steps"] += 1

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"


class Balanced:
    """A method of `fastmto.available()` before any torch optimizer, as a `Balancer`.

    Args:
        balancer: the method.
        optimizer: over the model's and the method's parameters.
        shared_parameters, task_parameters, last_shared_parameters: of the model.

    Attributes:
        looks_back: whether the method wants `update(losses)` after every step.
        at_features: whether the method compares gradients at the features.
    """

    def __init__(
        self,
        balancer: balancers.Balancer,
        optimizer: torch.optim.Optimizer,
        shared_parameters: Iterable[Tensor],
        task_parameters: Iterable[Iterable[Tensor]],
        last_shared_parameters: Iterable[Tensor] | None = None,
    ) -> None:
        self.balancer = balancer
        self.optimizer = optimizer
        self._shared = list(shared_parameters)
        self._heads = [list(head) for head in task_parameters]
        self._last_shared = None if last_shared_parameters is None else list(last_shared_parameters)
        self.looks_back = balancer.needs_update
        self.at_features = getattr(balancer, "level", None) == "features"

    @property
    def stats(self) -> dict[str, int]:
        return self.balancer.stats

    @property
    def weights(self) -> Tensor | None:
        return self.balancer.weights

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def backward(
        self,
        losses: Losses,
        features: Tensor | Sequence[Tensor] | None = None,
        closure: Callable[[], Losses] | None = None,
    ) -> None:
        """As the method's `backward`, which also gets the parameters."""
        self.balancer.backward(
            losses, self._shared, self._heads, self._last_shared, features, closure
        )

    def step(self) -> None:
        self.optimizer.step()

    def update(self, losses: Losses) -> None:
        """Tells the method the losses after the step; for methods that look back."""
        self.balancer.update(losses)  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.balancer!r}, {self.optimizer!r})"


MakeBalancer = Callable[[MultiTaskModel], Balancer]


def balancer_names() -> list[str]:
    """The names that `balancer` takes."""
    return ["equal", *registry.available(), *EXTRA_BALANCERS[1:]]


def search_every(name: str) -> int:
    """Steps between two searches of a method of `fastmto.available()`, unless told otherwise.

    1 for methods whose weights come from the losses, which a search costs nothing; else
    `SEARCH_EVERY`.
    """
    by_losses = issubclass(registry.method(name), balancers.LossBalancer)
    return 1 if by_losses else SEARCH_EVERY


def balancer(
    name: str, *, lr: float, weight_decay: float = 0.0, update_weights_every: int | None = None
) -> MakeBalancer:
    """What `train` needs to build a balancer by name, with the library's other defaults.

    Args:
        name: "equal" (torch's fused Adam on the summed losses, whose decay is the classical one);
            a name of `fastmto.available()` (the method, then the same fused Adam; its own
            parameters, if it has any, with learning rate `METHOD_LR` and no decay); "clippy"
            (`ClippyAdam` on the summed losses), "adatask", "pub_clippy" or "pub_adatask". "pub"
            is `fastmto.PUB`.
        lr: learning rate.
        weight_decay: the optimizer's.
        update_weights_every: steps between two searches of weights, where there are searches;
            None: `search_every`.

    Raises:
        ValueError: an unknown name.
    """
    every = update_weights_every

    def equal(model: MultiTaskModel) -> Balancer:
        adam = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
        return SummedLosses(adam, len(model.task_parameters()))

    def clippy(model: MultiTaskModel) -> Balancer:
        adam = ClippyAdam(model.parameters(), lr=lr, weight_decay=weight_decay)
        return SummedLosses(adam, len(model.task_parameters()))

    def adatask(model: MultiTaskModel) -> Balancer:
        return AdaTask(
            model.shared_parameters(), model.task_parameters(), lr=lr, weight_decay=weight_decay
        )

    def pub(*, clippy: bool = False, adatask: bool = False) -> MakeBalancer:
        return lambda model: PUB(
            model.shared_parameters(),
            model.task_parameters(),
            lr=lr,
            weight_decay=weight_decay,
            update_weights_every=every or SEARCH_EVERY,
            clippy=clippy,
            adatask=adatask,
        )

    def by_name(model: MultiTaskModel) -> Balancer:
        heads = model.task_parameters()
        method = registry.get(name, len(heads), update_weights_every=every or search_every(name))
        parameters = list(model.parameters())
        own = method.parameters()
        for parameter in own:
            parameter.data = parameter.data.to(parameters[0].device)
        groups: list[dict[str, Any]] = [{"params": parameters}]
        if own:
            groups.append({"params": own, "lr": METHOD_LR, "weight_decay": 0.0})
        adam = torch.optim.Adam(groups, lr=lr, weight_decay=weight_decay, fused=True)
        return Balanced(
            method, adam, model.shared_parameters(), heads, model.last_shared_parameters()
        )

    makers: dict[str, MakeBalancer] = {
        **dict.fromkeys(registry.available(), by_name),
        "equal": equal,
        "clippy": clippy,
        "adatask": adatask,
        "pub": pub(),
        "pub_clippy": pub(clippy=True),
        "pub_adatask": pub(adatask=True),
    }
    if name not in makers:
        raise ValueError(f"balancer must be one of {', '.join(balancer_names())}, got {name!r}")
    return makers[name]


@dataclass(frozen=True)
class Epoch:
    """One pass over the training part.

    Args:
        train_losses: mean loss of each task over the epoch's batches, taken while training.
        validation, test: each task's metric after the epoch, NaN where the model's outputs are.
        seconds: spent in steps; probes and evaluation left out.
    """

    train_losses: dict[str, float]
    validation: dict[str, float]
    test: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Steps:
    """Every step of a run, n of them.

    Args:
        losses: (n, T).
        weights: (n, T), those the step was made with, or took up for the next ones.
        backwards: (n,) number of backward passes.
        forward, backward, update: (n,) seconds; forward includes fetching the batch and the
            losses, update is `optimizer.step()` and, for methods that look back, a second forward.
        probes: (k, 2) seconds of plain backwards and plain Adam steps.
    """

    losses: Floats
    weights: Floats
    backwards: npt.NDArray[np.int64]
    forward: Floats
    backward: Floats
    update: Floats
    probes: Floats


@dataclass(frozen=True)
class Timing:
    """Typical times of a step in milliseconds; see the module's docstring.

    Args:
        step, forward, backward, update: of a step, step being the sum of the others.
        plain_backward, plain_update: what equal weighting would have paid.
        balancing_share: balancing time / step time.
    """

    step: float
    forward: float
    backward: float
    update: float
    plain_backward: float
    plain_update: float
    balancing_share: float

    @property
    def relative(self) -> float:
        """Step time over that of equal weighting in the same run."""
        return self.step / (self.forward + self.plain_backward + self.plain_update)


@dataclass(frozen=True)
class TrainResult:
    """What a run was and did.

    Args:
        name: of the balancer.
        tasks: T tasks.
        epochs: one record each.
        steps: the log of every step.
        timing: where a step's time goes.
        stats: the balancer's counters at the end.
        settings: the balancer as it prints itself, all hyperparameters included.
    """

    name: str
    tasks: tuple[Task, ...]
    epochs: list[Epoch]
    steps: Steps
    timing: Timing
    stats: dict[str, int]
    settings: str


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
        synchronize: waits for the device.

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


def _timing(steps: Steps, plain: bool) -> Timing:
    """Lower quartiles over the steps of one and of several backwards, joined by their numbers.

    Args:
        steps: the log; its first tenth, up to 10 steps, is warming up and left out.
        plain: the run itself is equal weighting with torch's fused Adam.
    """
    warm = slice(min(10, len(steps.forward) // 10), None)
    forward, backward, update = (
        1e3 * t[warm] for t in (steps.forward, steps.backward, steps.update)
    )
    several = steps.backwards[warm] > 1

    def typical(values: Floats) -> float:
        kinds = [kind for kind in (values[several], values[~several]) if len(kind)]
        return sum(float(np.quantile(kind, 0.25)) * len(kind) for kind in kinds) / len(values)

    phases = typical(forward), typical(backward), typical(update)
    if plain:
        plain_backward, plain_update = phases[1:]
    else:
        plain_backward, plain_update = (1e3 * np.quantile(steps.probes, 0.25, axis=0)).tolist()
    return Timing(
        step=sum(phases),
        forward=phases[0],
        backward=phases[1],
        update=phases[2],
        plain_backward=plain_backward,
        plain_update=plain_update,
        balancing_share=(phases[1] + phases[2] - plain_backward - plain_update) / sum(phases),
    )


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
        batch_size: rows a step; the last batch of an epoch may be smaller.
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

    losses_log: list[Tensor] = []
    weights_log: list[Tensor] = []
    laps: list[tuple[float, float, float]] = []
    backwards: list[int] = []
    probes: list[tuple[float, float]] = []
    records: list[Epoch] = []
    for _ in range(epochs):
        first = len(laps)
        model.train()
        for index in torch.split(torch.randperm(len(data.train), generator=order), batch_size):
            before = optimizer.stats["backwards"]

            def fetch(index: Tensor = index) -> Split:
                return data.train.rows(index.to(device))

            batch, losses, lap = one_step(model, data.tasks, optimizer, fetch, synchronize)
            laps.append(lap)
            backwards.append(optimizer.stats["backwards"] - before)
            losses_log.append(losses)
            weights = optimizer.weights
            assert weights is not None
            weights_log.append(weights.detach().clone())
            if on_step is not None:
                on_step(losses)
            if probe is not None and len(laps) % PROBE_EVERY == 1:
                probes.append(probe.measure(batch))
        model.eval()
        means = torch.stack(losses_log[first:]).double().mean(dim=0).tolist()
        records.append(
            Epoch(
                train_losses=dict(zip((task.name for task in data.tasks), means, strict=True)),
                validation=evaluate(model, data.tasks, data.validation),
                test=evaluate(model, data.tasks, data.test),
                seconds=sum(sum(lap) for lap in laps[first:]),
            )
        )

    seconds = np.array(laps)
    steps = Steps(
        losses=torch.stack(losses_log).double().cpu().numpy(),
        weights=torch.stack(weights_log).double().cpu().numpy(),
        backwards=np.array(backwards),
        forward=seconds[:, 0],
        backward=seconds[:, 1],
        update=seconds[:, 2],
        probes=np.array(probes).reshape(-1, 2),
    )
    return TrainResult(
        name=name,
        tasks=data.tasks,
        epochs=records,
        steps=steps,
        timing=_timing(steps, plain),
        stats=dict(optimizer.stats),
        settings=repr(optimizer),
    )


def as_json(result: TrainResult, max_points: int = 1000) -> dict[str, Any]:
    """A run as plain lists and numbers; NaN becomes None, which JSON can say.

    Args:
        result: the run.
        max_points: at most so many steps are kept, evenly spaced, the first one among them.
    """
    log = result.steps
    n = len(log.forward)
    stride = -(-n // max_points)
    return {
        "balancer": result.name,
        "epochs": [
            {
                "train_losses": _plain(epoch.train_losses),
                "validation": _plain(epoch.validation),
                "test": _plain(epoch.test),
                "seconds": epoch.seconds,
            }
            for epoch in result.epochs
        ],
        "timing_ms": {
            key: value for key, value in vars(result.timing).items() if key != "balancing_share"
        },
        "balancing_share": result.timing.balancing_share,
        "relative_step": result.timing.relative,
        "stats": result.stats,
        "settings": result.settings,
        "steps": {
            "number": list(range(1, n + 1, stride)),
            "losses": [_finite(row) for row in log.losses[::stride].tolist()],
            "weights": [_finite(row) for row in log.weights[::stride].tolist()],
            "backwards": log.backwards[::stride].tolist(),
            "forward_ms": (1e3 * log.forward[::stride]).tolist(),
            "backward_ms": (1e3 * log.backward[::stride]).tolist(),
            "update_ms": (1e3 * log.update[::stride]).tolist(),
        },
    }


def _finite(values: list[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def _plain(scores: Mapping[str, float]) -> dict[str, float | None]:
    return {key: value if math.isfinite(value) else None for key, value in scores.items()}

"""The account of a training run: every step's losses, weights and times, every epoch's scores.

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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .data.base import Task

Floats = npt.NDArray[np.float64]


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

    def as_json(self, max_points: int = 1000) -> dict[str, Any]:
        """Plain lists and numbers.

        Args:
            max_points: at most so many steps are kept, evenly spaced, the first one among them.
        """
        log = self.steps
        n = len(log.forward)
        stride = -(-n // max_points)
        return {
            "balancer": self.name,
            "epochs": [
                {
                    "train_losses": plain(epoch.train_losses),
                    "validation": plain(epoch.validation),
                    "test": plain(epoch.test),
                    "seconds": epoch.seconds,
                }
                for epoch in self.epochs
            ],
            "timing_ms": {
                key: value for key, value in vars(self.timing).items() if key != "balancing_share"
            },
            "balancing_share": self.timing.balancing_share,
            "relative_step": self.timing.relative,
            "stats": self.stats,
            "settings": self.settings,
            "steps": {
                "number": list(range(1, n + 1, stride)),
                "losses": plain(log.losses[::stride].tolist()),
                "weights": plain(log.weights[::stride].tolist()),
                "backwards": log.backwards[::stride].tolist(),
                "forward_ms": (1e3 * log.forward[::stride]).tolist(),
                "backward_ms": (1e3 * log.backward[::stride]).tolist(),
                "update_ms": (1e3 * log.update[::stride]).tolist(),
            },
        }


def timing(steps: Steps, plain: bool) -> Timing:
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


def plain(value: Any) -> Any:
    """The same as JSON can say it: NaN and infinity become None, in lists and dicts as well."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Balancers over several seeds: metrics, step time and peak memory in one table.

Every balancer runs in a process of its own, so that its peak memory is its own:

- *step time* is relative to equal weighting in the same run: `Timing.relative`, lower quartiles of
  the run's own phases and of the plain steps that are made beside it; the mean over
  the seeds.
- *peak memory* is taken over `MEMORY_STEPS` first steps, searches included, before the runs whose
  probes, logs and evaluation would add to it. On a CPU: the largest resident set of the process,
  with Python, torch and the data (as far as they were read; the file is mapped) in it, as the
  system counts it: compare it with that of "equal". On a CUDA device: what torch's allocator gave
  out at most, model and data included.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .data.base import MultiTaskData, Split, Task
from .experiment import Experiment
from .records import TrainResult, plain
from .workers import Workers, tick

#: More than two searches, where weights are searched every 10 steps.
MEMORY_STEPS = 25


@dataclass
class Compared:
    """One balancer's runs.

    Attributes:
        name: of the balancer.
        seeds: of the finished runs.
        results: the finished runs.
        peak: bytes; None where it was not measured or the system does not tell.
        failure: why there are no more runs; None where there are all or the user ended them.
    """

    name: str
    seeds: list[int] = field(default_factory=list)
    results: list[TrainResult] = field(default_factory=list)
    peak: int | None = None
    failure: str | None = None

    def scores(self, task: str | None = None) -> list[float]:
        """Test metric of a task after the last epoch, one per seed; None: the mean over tasks."""
        tests = [result.epochs[-1].test for result in self.results]
        if task is None:
            return [sum(test.values()) / len(test) for test in tests]
        return [test[task] for test in tests]

    @property
    def relative_step(self) -> float:
        """Step time over that of equal weighting, mean over the seeds; NaN without runs."""
        return spread([result.timing.relative for result in self.results])[0]

    @property
    def step_ms(self) -> float:
        """Milliseconds per step, mean over the seeds; NaN without runs."""
        return spread([result.timing.step for result in self.results])[0]

    def as_json(self) -> dict[str, Any]:
        """Plain numbers; runs as `TrainResult.as_json` gives them."""
        return {
            "balancer": self.name,
            "peak_bytes": self.peak,
            "failure": self.failure,
            "relative_step": self.relative_step if self.results else None,
            "test": {
                task.name: {"mean": plain(mean), "std": plain(std)}
                for task in (self.results[0].tasks if self.results else ())
                for mean, std in [spread(self.scores(task.name))]
            },
            "runs": [
                {"seed": seed, **result.as_json()}
                for seed, result in zip(self.seeds, self.results, strict=True)
            ],
        }


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; NaN where there are too few values."""
    if not values:
        return math.nan, math.nan
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1))


def save_data(data: MultiTaskData, path: Path) -> None:
    """Write a data set so that `load_data` of another process can map it."""
    parts = {name: vars(getattr(data, name)) for name in ("train", "validation", "test")}
    tasks = [(task.name, task.n_outputs) for task in data.tasks]
    torch.save(
        {"name": data.name, "tasks": tasks, "field_sizes": list(data.field_sizes), **parts}, path
    )


def load_data(path: Path) -> MultiTaskData:
    """Map what `save_data` wrote: pages are read as they are needed."""
    saved = torch.load(path, mmap=True, weights_only=True)
    return MultiTaskData(
        name=saved["name"],
        tasks=tuple(Task(*task) for task in saved["tasks"]),
        field_sizes=tuple(saved["field_sizes"]),
        **{part: Split(**saved[part]) for part in ("train", "validation", "test")},
    )


def peak_memory(device: torch.device) -> int | None:
    """Bytes that this process has needed at most; see the module. None: the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss, which a child inherits from the process that started it.
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        return int(found[1]) * 1024 if found else None
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def _measure_peak(
    experiment: Experiment, path: Path, device: str, name: str, seed: int
) -> int | None:
    """A job: peak memory of the first steps."""
    data = load_data(path).to(torch.device(device))
    experiment.steps_alone(data, name, seed, MEMORY_STEPS)
    return peak_memory(torch.device(device))


def _train(experiment: Experiment, path: Path, device: str, name: str, seed: int) -> TrainResult:
    """A job: one run."""
    data = load_data(path).to(torch.device(device))
    return experiment.train(data, name, seed, on_step=lambda losses: tick())


def compare(
    experiment: Experiment,
    balancers: Sequence[str],
    data_of_seed: dict[int, Path],
    device: str,
    threads: int | None,
    on_progress: Callable[[str, int], None],
    on_result: Callable[[list[Compared]], None],
) -> None:
    """Run every balancer with every seed, one after the other.

    Args:
        experiment: what to train and how.
        balancers: names.
        data_of_seed: seed -> file written by `save_data`.
        device: of the runs.
        threads: of torch in a run.
        on_progress: hears the balancer and the number of its steps so far, a few times a second.
        on_result: gets what there is after every run; the same list, longer.
    """
    compared: list[Compared] = []
    for name in balancers:
        compared.append(Compared(name))
        own = compared[-1]
        with Workers(1, threads) as workers:
            try:
                jobs = [_measure_peak, *([_train] * len(data_of_seed))]
                seeds = [next(iter(data_of_seed)), *data_of_seed]
                for number, (job, seed) in enumerate(zip(jobs, seeds, strict=True)):
                    future = workers.submit(job, experiment, data_of_seed[seed], device, name, seed)
                    for done in workers.finished(
                        [future],
                        lambda steps, name=name: on_progress(name, steps),  # type: ignore[misc]
                    ):
                        result = done.result()
                    if number == 0:
                        own.peak = result
                    else:
                        own.seeds.append(seed)
                        own.results.append(result)
                        on_result(compared)
            # One method's failure is a line of the table.
            except (RuntimeError, ValueError) as error:
                own.failure = f"{type(error).__name__}: {error}"
                on_result(compared)

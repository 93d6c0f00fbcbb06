"""Every method from every start, in parallel processes, beside the released code's results."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..records import plain
from ..workers import Workers, tick
from .descent import Trajectory, method, run
from .problem import STARTS

#: Final (f1, f2) from the five starts by FAMO's released code, s = 0.1, Adam with 1e-3, 50,000
#: steps. From C, LS sticks and CAGrad is still crossing a valley: where, depends on rounding.
REFERENCE: dict[str, tuple[tuple[float, float] | None, ...]] = {
    "ls": ((-0.380, -19.828), (-0.380, -19.828), None, (-0.380, -19.828), (-0.380, -19.828)),
    "mgda": (
        (-1.184, -17.517), (-1.991, -2.757), (-1.999, -0.451), (-0.748, -19.198), (-1.999, -0.411),
    ),
    "pcgrad": (
        (-0.755, -19.181), (-0.922, -18.679), (-1.771, -11.493), (-0.851, -18.912),
        (-1.949, -6.175),
    ),
    "cagrad": ((-0.380, -19.828), (-0.380, -19.828), None, (-0.380, -19.828), (-0.380, -19.828)),
    "famo": (
        (-1.389, -16.164), (-1.520, -14.983), (-1.559, -14.564), (-1.367, -16.332),
        (-1.723, -12.342),
    ),
    "nashmtl": (
        (-1.019, -18.309), (-1.509, -15.092), (-1.833, -10.137), (-0.945, -18.597),
        (-1.954, -5.862),
    ),
}  # fmt: skip


@dataclass
class Row:
    """One method's runs.

    Attributes:
        name: of the method.
        runs: start -> where the run went; of the finished runs.
        failure: why a run is missing; None where none failed.
    """

    name: str
    runs: dict[str, Trajectory] = field(default_factory=dict)
    failure: str | None = None

    @property
    def microseconds(self) -> float:
        """Processor time per step, mean over the finished runs."""
        runs = self.runs.values()
        return 1e6 * sum(run.seconds for run in runs) / sum(run.steps for run in runs)

    @property
    def held(self) -> int:
        """Searches without answer that kept the last weights, and steps that were skipped."""
        return sum(run.stats[key] for run in self.runs.values() for key in ("held", "skipped"))

    def final(self, start: str) -> tuple[float, float]:
        """f1 and f2 at the end of a finished run."""
        f1, f2 = self.runs[start].losses[-1].tolist()
        return f1, f2

    def differences(self) -> tuple[float, float] | None:
        """Largest |f1| and |f2| between here and `REFERENCE`; None where that lacks the method."""
        pairs = [
            (self.final(start), known)
            for start, known in zip(STARTS, REFERENCE.get(self.name, ()), strict=False)
            if known is not None and start in self.runs
        ]
        if not pairs:
            return None
        first, second = (max(abs(ours[i] - known[i]) for ours, known in pairs) for i in range(2))
        return first, second

    def as_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "method": self.name,
            "failure": self.failure,
            "runs": {
                start: {
                    "final": plain(run.losses[-1].tolist()),
                    "points": plain(run.points.tolist()),
                    "losses": plain(run.losses.tolist()),
                    "steps": run.steps,
                    "seconds": run.seconds,
                    "stats": run.stats,
                }
                for start, run in self.runs.items()
            },
        }


def processors() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_reference(s: float, lr: float, steps: int) -> bool:
    """Whether these are the settings of `REFERENCE`."""
    return (s, lr, steps) == (0.1, 1e-3, 50_000)


def _job(name: str, start: str, s: float, lr: float, steps: int) -> Trajectory:
    """A job: one run in float64, about 500 of its points recorded."""
    return run(
        method(name, lr),
        start,
        steps,
        s,
        dtype=torch.float64,
        every=max(1, steps // 500),
        on_steps=tick,
    )


def run_all(
    names: Sequence[str],
    s: float,
    lr: float,
    steps: int,
    processes: int,
    on_progress: Callable[[int], None],
    on_result: Callable[[list[Row]], None],
) -> None:
    """Every method from every start, in parallel processes.

    Args:
        names: of `fastmto.available()`.
        s, lr, steps: as for `run` and `method`.
        processes: runs at a time.
        on_progress: hears of the steps made by all runs so far, a few times a second.
        on_result: gets what there is after every run; rows in the order of `names`.
    """
    rows = {name: Row(name) for name in names}
    with Workers(min(processes, len(names) * len(STARTS)), threads=1) as workers:
        jobs = {
            workers.submit(_job, name, start, s, lr, steps): (name, start)
            for name in names
            for start in STARTS
        }
        for job in workers.finished(jobs, on_progress):
            name, start = jobs[job]
            try:
                rows[name].runs[start] = job.result()
            # One method's failure is a line of the table.
            except (RuntimeError, ValueError) as error:
                rows[name].failure = f"from {start}: {type(error).__name__}: {error}"
            on_result([row for row in rows.values() if row.runs or row.failure])

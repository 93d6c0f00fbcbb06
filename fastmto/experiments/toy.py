"""The two-task toy problem of the balancing literature, with the paper's five starts.

Source: CAGrad (Liu et al., NeurIPS 2021), kept by Nash-MTL, FAMO and PUB. Two parameters
x = (x1, x2), both shared, and two losses with valleys, a cliff of logarithms and conflicting
minima:

    t = tanh(x2), c1 = max(tanh(x2/2), 0), c2 = max(-tanh(x2/2), 0)
    b = (x2 + 8)^2 / 10
    f1 = s [ c1 (ln max(|(-x1 - 7)/2 + t|, 5e-6) + 6) + c2 (((7 - x1)^2 + b)/10 - 20) ]
    f2 =     c1 (ln max(|(-x1 + 3)/2 - t + 2|, 5e-6) + 6) + c2 (((x1 + 7)^2 + b)/10 - 20)

The literature unbalances the tasks with s = 0.1; PUB's figure has s = 1. The Pareto front is the
segment x2 = -8.3552, |x1| <= 7.

`run` descends with any optimizer, `method` builds those that `fastmto toy` compares, set as in
the released code of FAMO, where most results in the literature come from.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..balancers import registry
from ..optim.pub import PUB
from .train import METHOD_LR, Balanced, Balancer
from .workers import Workers, tick

STARTS = {
    "A": (-8.5, 7.5),
    "B": (0.0, 0.0),
    "C": (9.0, 9.0),
    "D": (-7.5, -0.5),
    "E": (9.0, -1.0),
}
#: x2 and the largest |x1| of the Pareto front.
FRONT = (-8.3552, 7.0)
#: The balanced point of the Pareto front at s = 1 and its losses, PUB's L*.
OPTIMUM_POINT = (0.0, -8.3552)
OPTIMUM = (-15.0916, -15.0916)
#: What is added to (f1 / s, f2) before an optimizer sees them, FAMO's bound on the losses.
SHIFT = 21.0
#: Inside the logarithms; below it they are cut off.
CUT = 5e-6

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
#: What the released code sets otherwise than the methods' defaults here.
OPTIONS: dict[str, dict[str, Any]] = {"famo": {"gamma": 0.0}}
#: Length to which the released code cuts the joint gradient; its CAGrad is T times ours.
CUT_LENGTHS = {"pcgrad": 1.0, "graddrop": 1.0, "cagrad": 0.5}


MakeOptimizer = Callable[[list[torch.nn.Parameter], list[list[torch.nn.Parameter]]], Balancer]


def losses(x: Tensor, s: float = 1.0) -> Tensor:
    """f1 and f2 at `x`.

    Args:
        x: (..., 2) floating point.
        s: factor of the first task.

    Returns:
        (..., 2), differentiable.
    """
    x1, x2 = x.unbind(-1)
    t = x2.tanh()
    half = (x2 / 2).tanh()
    c1, c2 = half.clamp(min=0), (-half).clamp(min=0)
    bowl = (x2 + 8) ** 2 / 10
    f1 = c1 * (((-x1 - 7) / 2 + t).abs().clamp(min=CUT).log() + 6)
    f1 = f1 + c2 * (((7 - x1) ** 2 + bowl) / 10 - 20)
    f2 = c1 * (((-x1 + 3) / 2 - t + 2).abs().clamp(min=CUT).log() + 6)
    f2 = f2 + c2 * (((x1 + 7) ** 2 + bowl) / 10 - 20)
    return torch.stack([s * f1, f2], dim=-1)


@dataclass(frozen=True)
class Trajectory:
    """Where a run went.

    Args:
        points: (n, 2), the start first.
        losses: (n, 2), at those points.
        steps: how many were made.
        seconds: of processor time that they took.
        stats: the optimizer's counts.
    """

    points: Tensor
    losses: Tensor
    steps: int
    seconds: float
    stats: dict[str, int]


def _point(x1: float, x2: float, s: float) -> tuple[list[float], list[list[float]]]:
    """The losses at a point and their gradients, by hand: autograd on 2 numbers takes ages."""
    t, half = math.tanh(x2), math.tanh(x2 / 2)
    c1, c2 = max(half, 0.0), max(-half, 0.0)
    # At 0 both parts count, as in torch's clamp.
    slope = (1 - half * half) / 2
    d1, d2 = slope if half >= 0 else 0.0, -slope if half <= 0 else 0.0
    bowl, dbowl = (x2 + 8) ** 2 / 10, (x2 + 8) / 5
    values, gradients = [], []
    for scale, center, inside, dt in (
        (s, 7.0, (-x1 - 7) / 2 + t, 1 - t * t),
        (1.0, -7.0, (-x1 + 3) / 2 - t + 2, t * t - 1),
    ):
        log = math.log(max(abs(inside), CUT)) + 6
        dlog = 1 / inside if abs(inside) >= CUT else 0.0
        square = ((center - x1) ** 2 + bowl) / 10 - 20
        values.append(scale * (c1 * log + c2 * square))
        gradients.append(
            [
                scale * (-c1 * dlog / 2 - c2 * (center - x1) / 5),
                scale * (d1 * log + c1 * dlog * dt + d2 * square + c2 * dbowl / 10),
            ]
        )
    return values, gradients


class ShiftedLosses:
    """f1 + 21 s and f2 + 21 at one tensor, with the smallest graph that has their gradients.

    A dot product with the gradient, whose value is then set: two nodes, both native, in place of
    some thirty. The rows are written anew by every call, so that a graph is good until the next.

    Args:
        s: factor of the first task.
        dtype: of the losses.
    """

    def __init__(self, s: float, dtype: torch.dtype) -> None:
        self._s = s
        rows = torch.empty(2, 2, dtype=dtype)
        self._gradients = rows.numpy()  # writing here costs a tenth of building a tensor
        self._rows = rows.unbind()
        self._shifts = (SHIFT * s, SHIFT)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """The two scalars at x (2,), attached to its graph if it has one."""
        x1, x2 = x.tolist()
        values, self._gradients[...] = _point(x1, x2, self._s)
        losses = []
        for row, value, shift in zip(self._rows, values, self._shifts, strict=True):
            loss = torch.dot(row, x)
            loss.detach().fill_(value + shift)
            losses.append(loss)
        return losses


class Adam:
    """`torch.optim.Adam(fused=True)` bit for bit, without its bookkeeping.

    That takes five times as long as the step of two numbers itself.

    Args:
        groups: parameters and their learning rate.
    """

    def __init__(self, groups: Sequence[tuple[Sequence[Tensor], float]]) -> None:
        self._slots = [
            (p, torch.zeros_like(p), torch.zeros_like(p), torch.zeros(()), lr)
            for parameters, lr in groups
            for p in parameters
        ]

    def zero_grad(self) -> None:
        for slot in self._slots:
            slot[0].grad = None

    @torch.no_grad()
    def step(self) -> None:
        for p, exp_avg, exp_avg_sq, step, lr in self._slots:
            if p.grad is None:
                continue
            step += 1
            torch._fused_adam_(
                [p], [p.grad], [exp_avg], [exp_avg_sq], [], [step],
                lr=lr, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8, amsgrad=False,
                maximize=False,
            )  # fmt: skip


class _Cut(Balanced):
    """Cuts the joint gradient to a length before the step, as the released code does."""

    def __init__(self, length: float, x: Tensor, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._length = length
        self._x = x

    def step(self) -> None:
        grad = self._x.grad
        assert grad is not None
        length = math.hypot(*grad.tolist())
        if length > self._length:
            grad.mul_(self._length / length)
        super().step()


def method(name: str, lr: float = 1e-3) -> MakeOptimizer:
    """What `run` needs to build a method, searching at every step, with torch's fused Adam.

    Settings are those of FAMO's released code (`OPTIONS`, `CUT_LENGTHS`), and the methods'
    defaults where it has none. "pub" is `fastmto.PUB` with the paper's literal weights.

    Args:
        name: one of `fastmto.available()`.
        lr: Adam's.

    Raises:
        ValueError: an unknown name.
    """
    if name not in registry.available():
        raise ValueError(f"name must be one of {', '.join(registry.available())}, got {name!r}")

    def make(shared: list[torch.nn.Parameter], heads: list[list[torch.nn.Parameter]]) -> Balancer:
        if name == "pub":
            return PUB(shared, heads, lr, update_weights_every=1, scale="none")
        balancer = registry.get(name, len(heads), update_weights_every=1, **OPTIONS.get(name, {}))
        adam = Adam([(shared, lr), (balancer.parameters(), METHOD_LR)])
        if name in CUT_LENGTHS:
            (x,) = shared
            return _Cut(CUT_LENGTHS[name], x, balancer, adam, shared, heads, shared)
        return Balanced(balancer, adam, shared, heads, shared)

    return make


def run(
    optimizer_factory: MakeOptimizer,
    start: str | Sequence[float],
    steps: int,
    s: float = 1.0,
    *,
    dtype: torch.dtype = torch.float32,
    every: int = 1,
    on_steps: Callable[[int], None] | None = None,
) -> Trajectory:
    """Descends from a start and records the way.

    The optimizer sees f1 + 21 s and f2 + 21, which have the same gradients and are positive
    everywhere, so that methods that take logarithms of losses have some.

    Args:
        optimizer_factory: called with the shared parameters, one tensor (2,), and two empty lists
            of task parameters; returns the optimizer.
        start: "A" to "E", or a point.
        steps: number of optimizer steps.
        s: factor of the first task.
        dtype: the parameters'.
        every: steps between two recorded points; the last point is always recorded.
        on_steps: called after every recorded point with the number of steps since the last.

    Raises:
        ValueError: an unknown start.
    """
    if isinstance(start, str):
        if start not in STARTS:
            raise ValueError(f"start must be one of {', '.join(STARTS)} or a point, got {start!r}")
        start = STARTS[start]
    x = torch.nn.Parameter(torch.tensor(start, dtype=dtype))
    optimizer = optimizer_factory([x], [[], []])
    balanced = optimizer if isinstance(optimizer, Balanced) else None

    shifted = ShiftedLosses(s, dtype)

    def evaluate() -> list[Tensor]:
        return shifted(x.detach())

    points = [x.detach().clone()]
    recorded = 0
    began = time.process_time()
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        # The representation is the point itself; a node of its own where it is asked for.
        features = x.view_as(x) if balanced is not None and balanced.at_features else None
        here = x if features is None else features
        values = shifted(here)
        if balanced is None:
            optimizer.backward(torch.stack(values))
        else:
            balanced.backward(values, features, evaluate)
        optimizer.step()
        if balanced is not None and balanced.looks_back:
            balanced.update(evaluate())
        if step % every == 0 or step == steps:
            points.append(x.detach().clone())
            if on_steps is not None:
                on_steps(step - recorded)
            recorded = step
    seconds = time.process_time() - began
    trajectory = torch.stack(points)
    return Trajectory(trajectory, losses(trajectory, s), steps, seconds, dict(optimizer.stats))


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
        """Processor time a step, mean over the finished runs."""
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
                    "final": _plain(run.losses)[-1],
                    "points": _plain(run.points),
                    "losses": _plain(run.losses),
                    "steps": run.steps,
                    "seconds": run.seconds,
                    "stats": run.stats,
                }
                for start, run in self.runs.items()
            },
        }


def _plain(rows: Tensor) -> list[list[float | None]]:
    """(n, 2) as lists; NaN becomes None, which JSON can say."""
    return [[x if math.isfinite(x) else None for x in row] for row in rows.tolist()]


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
            except (
                RuntimeError,
                ValueError,
            ) as error:  # one method's failure is a line of the table
                rows[name].failure = f"from {start}: {type(error).__name__}: {error}"
            on_result([row for row in rows.values() if row.runs or row.failure])


def table(rows: Sequence[Row], reference: bool) -> str:
    """Final losses of every method from every start, and what a step costs, as text.

    Args:
        rows: the runs.
        reference: whether the settings are those of `REFERENCE`.
    """
    from .compare import columns

    head = ["method", *STARTS, "held", "us a step*"] + (["difference**"] if reference else [])
    lines = [head]
    for row in rows:
        cells = [
            "{:.3f},{:.3f}".format(*row.final(start)) if start in row.runs else "-"
            for start in STARTS
        ]
        cells += [str(row.held), f"{row.microseconds:.0f}" if row.runs else "-"]
        if reference:
            gaps = row.differences()
            cells.append("" if gaps is None else "{:.3f},{:.3f}".format(*gaps))
        lines.append([row.name, *cells])
    return columns(lines)

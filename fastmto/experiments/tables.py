"""The tables that the commands print, as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .compare import Compared, spread
from .records import TrainResult
from .toy import STARTS, Row

_TRAIN_FOOTNOTE = """
* share of a step beyond what equal weighting pays: one forward, one backward of the summed loss
  and one step of torch's fused Adam, timed beside the same run; "ms a step" and this share are
  of undisturbed steps (lower quartiles), "total s" is the sum of all steps"""
_COMPARE_FOOTNOTE = """
*  step time over that of equal weighting, timed beside the same run; of undisturbed steps (lower
   quartiles), mean over the seeds
** """
_MEMORY = {
    "cpu": """largest resident set of the balancer's own process in its first steps, with Python and
   torch in it: the difference to equal weighting is the method's""",
    "cuda": "the most that torch's allocator gave out in the first steps, model and data included",
}
_TOY_FOOTNOTE = "\n*  processor time per step, forward and Adam included"
_REFERENCE_FOOTNOTE = """
** largest difference in f1 and f2 to FAMO's released code at these settings, where it has the
   method; from C, LS and CAGrad are left out"""


def train_table(results: Sequence[TrainResult]) -> str:
    """The comparison as text: test metrics after the last epoch and the cost of a step."""
    tasks = results[0].tasks
    baseline = next((result for result in results if result.name == "equal"), None)
    head = ["balancer", *(f"{task.name} {task.metric}" for task in tasks), "mean"]
    head += ["total s", "ms a step", "balancing*"]
    rows = [head]
    for result in results:
        scores = list(result.epochs[-1].test.values())
        share = "-" if result is baseline else f"{100 * result.timing.balancing_share:.1f} %"
        rows.append(
            [
                result.name,
                *(f"{score:.4f}" for score in [*scores, sum(scores) / len(scores)]),
                f"{sum(epoch.seconds for epoch in result.epochs):.1f}",
                f"{result.timing.step:.2f}",
                share,
            ]
        )
    return columns(rows) + _TRAIN_FOOTNOTE


def compare_table(compared: Sequence[Compared], device: str) -> str:
    """Metric mean and standard deviation of each task, step time and peak memory, as text.

    Args:
        compared: the balancers' runs.
        device: type of the device that they ran on, "cpu" or "cuda".
    """
    tasks = next((own.results[0].tasks for own in compared if own.results), ())
    rows = [
        [
            "balancer",
            *(f"{task.name} {task.metric}" for task in tasks),
            "mean",
            "ms a step",
            "x equal*",
            "peak MB**",
        ]
    ]
    for own in compared:
        cells = [_plus_minus(own.scores(task.name)) for task in tasks]
        rows.append(
            [
                own.name,
                *cells,
                _plus_minus(own.scores()),
                f"{own.step_ms:.2f}",
                f"{own.relative_step:.2f}",
                "-" if own.peak is None else f"{own.peak / 1e6:.0f}",
            ]
        )
    return columns(rows) + _COMPARE_FOOTNOTE + _MEMORY[device]


def toy_table(rows: Sequence[Row], reference: bool) -> str:
    """Final losses of every method from every start, and what a step costs, as text.

    Args:
        rows: the runs.
        reference: whether the settings are those of `REFERENCE`.
    """
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
    return columns(lines) + _TOY_FOOTNOTE + (_REFERENCE_FOOTNOTE if reference else "")


def _plus_minus(values: Sequence[float]) -> str:
    mean, std = spread(values)
    return f"{mean:.4f}" if math.isnan(std) else f"{mean:.4f} ±{std:.4f}"


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text under a head, in columns as wide as they need."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)

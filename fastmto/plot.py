"""One picture of a comparison: losses, task weights and test metrics over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .train import Floats, TrainResult

#: A colour a balancer, from the Okabe-Ito palette (told apart by colour-blind readers too).
_COLORS = ("#555555", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
#: A line style a task, in the panel where all tasks meet.
_STYLES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))


def _smooth(values: Floats, width: int) -> tuple[Floats, Floats]:
    """Means of consecutive runs of `width` steps and the middle step number of each."""
    n = max(1, len(values) // width)
    runs = np.array_split(np.arange(len(values)), n)
    steps = np.array([run.mean() + 1 for run in runs])
    return steps, np.array([values[run].mean() for run in runs])


def save_plot(results: Sequence[TrainResult], title: str, path: str | Path) -> None:
    """Draws the runs of one comparison and writes the picture.

    Top row: each task's training loss, averaged over short runs of steps. Bottom row: the task
    weights as the optimizers used them, and the test metric after every epoch.

    Args:
        results: runs of the same tasks, at least one.
        title: of the picture.
        path: where to; its suffix decides the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    tasks = results[0].tasks
    n_columns = max(2, len(tasks))
    figure = Figure(figsize=(5.2 * n_columns, 7.6), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=11)
    # Two cells a task above, half of the cells for each panel below.
    grid = figure.add_gridspec(2, 2 * n_columns)
    wide = 2 * n_columns // len(tasks)
    top = [figure.add_subplot(grid[0, i * wide : (i + 1) * wide]) for i in range(len(tasks))]
    weights_axes = figure.add_subplot(grid[1, :n_columns])
    metric_axes = figure.add_subplot(grid[1, n_columns:])

    def color(run: int, task: int) -> tuple[float, float, float]:
        """The run's colour, lighter from task to task."""
        fade = 0.55 * task / max(1, len(tasks) - 1)
        red, green, blue = (c + fade * (1 - c) for c in to_rgb(_COLORS[run % len(_COLORS)]))
        return red, green, blue

    for run, result in enumerate(results):
        n_steps = len(result.steps.losses)
        for i, (axes, task) in enumerate(zip(top, tasks, strict=True)):
            style = _STYLES[i % len(_STYLES)]
            axes.plot(
                *_smooth(result.steps.losses[:, i], max(1, n_steps // 150)),
                color=color(run, 0),
                linewidth=1.3,
            )
            weights_axes.plot(
                np.arange(1, n_steps + 1),
                result.steps.weights[:, i],
                color=color(run, i),
                linestyle=style,
                linewidth=1.2,
            )
            metric_axes.plot(
                np.arange(1, len(result.epochs) + 1),
                [epoch.test[task.name] for epoch in result.epochs],
                color=color(run, i),
                linestyle=style,
                marker="o",
                markersize=3.5,
                linewidth=1.3,
            )
    for axes, task in zip(top, tasks, strict=True):
        axes.set_title(f"training loss: {task.name}")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel("cross-entropy (nats)")
        axes.set_xlabel("step")
    weights_axes.set_title("task weights")
    weights_axes.set_ylabel("weight")
    weights_axes.set_xlabel("step")
    weights_axes.set_ylim(0, 1.05 * weights_axes.get_ylim()[1])
    metrics = " / ".join(dict.fromkeys(task.metric for task in tasks))
    metric_axes.set_title(f"test {metrics}")
    metric_axes.set_ylabel(metrics)
    metric_axes.set_xlabel("epoch")
    metric_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles = [
        Line2D([], [], color=color(run, 0), linewidth=4, label=result.name)
        for run, result in enumerate(results)
    ] + [
        Line2D([], [], color="black", linestyle=_STYLES[i % len(_STYLES)], label=task.name)
        for i, task in enumerate(tasks)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)

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
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    tasks = results[0].tasks
    n_columns = max(2, len(tasks))
    figure = Figure(figsize=(5.2 * n_columns, 7.4), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=13)
    grid = figure.add_gridspec(2, 2 * n_columns)
    top = [
        figure.add_subplot(
            grid[0, 2 * i * n_columns // len(tasks) : 2 * (i + 1) * n_columns // len(tasks)]
        )
        for i in range(len(tasks))
    ]
    weights_axes = figure.add_subplot(grid[1, :n_columns])
    metric_axes = figure.add_subplot(grid[1, n_columns:])

    for number, result in enumerate(results):
        color = _COLORS[number % len(_COLORS)]
        n_steps = len(result.steps.losses)
        for i, (axes, task) in enumerate(zip(top, tasks, strict=True)):
            axes.plot(
                *_smooth(result.steps.losses[:, i], max(1, n_steps // 150)),
                color=color,
                linewidth=1.4,
                label=result.name,
            )
            style = _STYLES[i % len(_STYLES)]
            weights_axes.plot(
                np.arange(1, n_steps + 1),
                result.steps.weights[:, i],
                color=color,
                linestyle=style,
                linewidth=1.0,
            )
            metric_axes.plot(
                np.arange(1, len(result.epochs) + 1),
                [epoch.test[task.name] for epoch in result.epochs],
                color=color,
                linestyle=style,
                marker="o",
                markersize=3.5,
                linewidth=1.3,
            )
    for axes, task in zip(top, tasks, strict=True):
        axes.set_title(f"training loss: {task.name}")
        axes.set_yscale("log")
        axes.set_ylabel("cross-entropy (nats)")
        axes.set_xlabel("step")
        axes.legend(frameon=False)
    handles = [
        Line2D([], [], color=_COLORS[i % len(_COLORS)], label=result.name)
        for i, result in enumerate(results)
    ] + [
        Line2D([], [], color="black", linestyle=_STYLES[i % len(_STYLES)], label=task.name)
        for i, task in enumerate(tasks)
    ]
    weights_axes.set_title("task weights")
    weights_axes.set_ylabel("weight")
    weights_axes.set_xlabel("step")
    metrics = " / ".join(dict.fromkeys(task.metric for task in tasks))
    metric_axes.set_title(f"test {metrics}")
    metric_axes.set_ylabel(metrics)
    metric_axes.set_xlabel("epoch")
    metric_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (weights_axes, metric_axes):
        axes.legend(handles=handles, frameon=False, ncols=2, fontsize=9)
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)

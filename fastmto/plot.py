"""One picture of a comparison: losses, task weights and test metrics over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .train import Floats, TrainResult

#: A colour a balancer, from the Okabe-Ito palette (told apart by colour-blind readers too).
_COLORS = ("#555555", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
#: A line style a task, in the panel of weights, where all tasks meet.
_STYLES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))


def _smooth(values: Floats, width: int) -> tuple[Floats, Floats]:
    """Means of consecutive runs of `width` steps and the middle step number of each."""
    n = max(1, len(values) // width)
    runs = np.array_split(np.arange(len(values)), n)
    steps = np.array([run.mean() + 1 for run in runs])
    return steps, np.array([values[run].mean() for run in runs])


def save_plot(results: Sequence[TrainResult], title: str, path: str | Path) -> None:
    """Draws the runs of one comparison and writes the picture.

    A column a task: its training loss, averaged over short runs of steps, and below it its test
    metric after every epoch. At the bottom the task weights as the optimizers used them.

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
    figure = Figure(figsize=(max(7.0, 5.2 * len(tasks)), 9.6), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid = figure.add_gridspec(3, len(tasks), height_ratios=(1.15, 1, 1))
    weights_axes = figure.add_subplot(grid[2, :])
    weights_axes.set(title="task weights", xlabel="step", ylabel="weight")

    def color(run: int, task: int = 0) -> tuple[float, float, float]:
        """The run's colour, lighter from task to task."""
        fade = 0.5 * task / max(1, len(tasks) - 1)
        red, green, blue = (c + fade * (1 - c) for c in to_rgb(_COLORS[run % len(_COLORS)]))
        return red, green, blue

    for i, task in enumerate(tasks):
        style = _STYLES[i % len(_STYLES)]
        loss_axes = figure.add_subplot(grid[0, i])
        metric_axes = figure.add_subplot(grid[1, i])
        for run, result in enumerate(results):
            n_steps = len(result.steps.losses)
            loss_axes.plot(
                *_smooth(result.steps.losses[:, i], max(1, n_steps // 150)),
                color=color(run),
                linewidth=1.2,
            )
            metric_axes.plot(
                np.arange(1, len(result.epochs) + 1),
                [epoch.test[task.name] for epoch in result.epochs],
                color=color(run),
                marker="o",
                markersize=3.5,
                linewidth=1.2,
            )
            weights_axes.plot(
                np.arange(1, n_steps + 1),
                result.steps.weights[:, i],
                color=color(run, i),
                linestyle=style,
                linewidth=1.2,
            )
        loss_axes.set(title=f"{task.name}: training loss", xlabel="step", ylabel="nats")
        loss_axes.set_yscale("log")
        loss_axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        loss_axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        loss_axes.yaxis.set_minor_formatter(NullFormatter())
        metric_axes.set(title=f"{task.name}: test {task.metric}", xlabel="epoch")
        metric_axes.set_ylabel(task.metric)
        metric_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    weights_axes.set_ylim(0, 1.05 * weights_axes.get_ylim()[1])
    handles = [
        Line2D([], [], color=color(run), linewidth=4, label=result.name)
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

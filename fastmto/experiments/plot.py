"""The pictures of the commands: runs over time, balancers beside each other, ways on the toy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .compare import Compared
from .records import Floats, TrainResult
from .toy import FRONT, STARTS, Row, losses

#: A colour per balancer, from the Okabe-Ito palette (told apart by colour-blind readers too).
_COLORS = ("#555555", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
#: A line style per task, in the panel of weights, where all tasks meet.
_STYLES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))


def _smooth(values: Floats, width: int) -> tuple[Floats, Floats]:
    """Means of consecutive runs of `width` steps and the middle step number of each."""
    n = max(1, len(values) // width)
    runs = np.array_split(np.arange(len(values)), n)
    steps = np.array([run.mean() + 1 for run in runs])
    return steps, np.array([values[run].mean() for run in runs])


def save_plot(results: Sequence[TrainResult], title: str, path: str | Path) -> None:
    """Draws the runs of one comparison and writes the picture.

    A column per task: its training loss, averaged over short runs of steps, and below it its test
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


def save_comparison(compared: Sequence[Compared], title: str, path: str | Path) -> None:
    """Draws one comparison over seeds and writes the picture.

    A panel per task with every seed's test metric, their mean and standard deviation; then step
    time over equal weighting and peak memory. A line per balancer.

    Args:
        compared: at least one of them with runs.
        title: of the picture.
        path: where to; its suffix decides the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    from .compare import spread

    rows = [own for own in compared if own.results]
    tasks = rows[0].results[0].tasks
    n_panels = len(tasks) + 2
    figure = Figure(
        figsize=(3.2 * n_panels + 1, max(2.6, 0.32 * len(rows) + 1.6)),
        dpi=120,
        layout="constrained",
    )
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(1, n_panels, sharey=True)
    places = np.arange(len(rows))
    for axes, task in zip(panels, tasks, strict=False):
        for place, own in zip(places, rows, strict=True):
            scores = own.scores(task.name)
            mean, std = spread(scores)
            color = _COLORS[place % len(_COLORS)]
            axes.plot(scores, [place] * len(scores), "o", color=color, alpha=0.35, markersize=4)
            axes.errorbar(
                mean, place, xerr=None if np.isnan(std) else std, fmt="D", color=color,
                markersize=5, capsize=3,
            )  # fmt: skip
        axes.set(title=f"{task.name}: test {task.metric}", xlabel=task.metric)
    steps, memory = panels[-2:]
    colors = [_COLORS[place % len(_COLORS)] for place in places]
    steps.barh(places, [own.relative_step for own in rows], color=colors, height=0.6)
    steps.axvline(1, color="black", linewidth=0.8)
    steps.set(title="step time", xlabel="times equal weighting")
    memory.barh(places, [(own.peak or 0) / 1e6 for own in rows], color=colors, height=0.6)
    memory.set(title="peak memory", xlabel="MB")
    panels[0].set_yticks(places, [own.name for own in rows])
    panels[0].invert_yaxis()
    for axes in panels:
        axes.grid(alpha=0.25, axis="x")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def save_toy(rows: Sequence[Row], s: float, title: str, path: str | Path) -> None:
    """Draws the ways of all methods on the toy problem in the plane of the two losses.

    A panel per method: the Pareto front in grey, every start as a dot, its way in the start's
    colour, and where it ended as a ring.

    Args:
        rows: the runs.
        s: factor of the first task.
        title: of the picture.
        path: where to; its suffix decides the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = [row for row in rows if row.runs]
    n_columns = min(6, len(rows))
    n_lines = -(-len(rows) // n_columns)
    figure = Figure(
        figsize=(max(5.0, 2.7 * n_columns), 2.6 * n_lines + 1.2), dpi=120, layout="constrained"
    )
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(n_lines, n_columns, sharex=True, sharey=True, squeeze=False)
    x2, width = FRONT
    x1 = torch.linspace(-width, width, 200, dtype=torch.float64)
    front = losses(torch.stack([x1, torch.full_like(x1, x2)], dim=1), s).numpy()
    colors = dict(zip(STARTS, _COLORS[1:], strict=True))
    for axes, row in zip(panels.flat, rows, strict=False):
        axes.plot(*front.T, color="#BBBBBB", linewidth=5, solid_capstyle="round")
        for start, run in row.runs.items():
            way = run.losses.numpy()
            axes.plot(*way.T, color=colors[start], linewidth=1.1)
            axes.plot(*way[0], "o", color="black", markersize=4)
            axes.plot(*way[-1], "o", color=colors[start], markersize=7, fillstyle="none")
        axes.set_title(row.name, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels.flat[len(rows) :]:
        axes.set_axis_off()
    for axes in panels[:, 0]:
        axes.set_ylabel("f2")
    for axes in panels[-1]:
        axes.set_xlabel("f1")
    handles = [Line2D([], [], color="#BBBBBB", linewidth=5, label="Pareto front")] + [
        Line2D([], [], color=color, label=f"from {start}") for start, color in colors.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path)

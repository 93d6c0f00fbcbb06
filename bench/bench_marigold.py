"""Step time of MARIGOLD in the number of tasks, beside plain training, FAMO, MGDA and NashMTL.

    python bench/bench_marigold.py          # the table, and docs/marigold_steps.png

A shared trunk with T light heads: three layers of 512 on a batch of 1024, a head a linear layer to
one output. Plain training is a forward, one backward of the summed losses and torch's fused Adam.
Everyone balances at every step; the extra forward that reuse and FAMO need is a part of their step.
Everyone makes a step in every round; times are lower quartiles over the rounds of the processor
time of one thread, so that waiting for a busy machine does not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastmto
from fastmto import MARIGOLD
from fastmto.balancers import FAMO, MGDA, NashMTL

TASKS = (2, 4, 8, 16, 32, 64)
ROUNDS = 25
WARM_UP = 3
#: Rounds of the gradient-level methods, whose steps take up to T backwards.
SLOW_ROUNDS = 5
WIDTH, BATCH = 512, 1024
#: Aims: times plain training.
AIMS = {"reuse": 1.4, "central": 2.2}
#: Step times in T may differ by this much from their mean.
FLAT = 0.1
OURS = {
    "reuse": {"estimator": "reuse"},
    "reuse, eta given": {"estimator": "reuse", "step_size": 1e-4},
    "forward": {"estimator": "forward"},
    "central": {"estimator": "central"},
}
PEERS = {"FAMO": FAMO, "MGDA": MGDA, "NashMTL": NashMTL}


class Problem:
    """A trunk and T heads with their own optimizer."""

    def __init__(self, n_tasks: int) -> None:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Linear(WIDTH, WIDTH), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(n_tasks))
        self.x = torch.randn(BATCH, WIDTH)
        self.targets = torch.randn(n_tasks, BATCH, 1)
        self.shared = list(self.trunk.parameters())
        self.head_parameters = [list(head.parameters()) for head in self.heads]
        self.optimizer = torch.optim.Adam(
            [*self.shared, *self.heads.parameters()], lr=1e-4, fused=True
        )

    def losses(self) -> list[Tensor]:
        z = self.trunk(self.x)
        return [
            nn.functional.mse_loss(head(z), target)
            for head, target in zip(self.heads, self.targets, strict=True)
        ]


class Plain(Problem):
    def step(self) -> None:
        self.optimizer.zero_grad()
        torch.stack(self.losses()).sum().backward()
        self.optimizer.step()


class Balanced(Problem):
    def __init__(self, n_tasks: int, balancer: fastmto.balancers.Balancer) -> None:
        super().__init__(n_tasks)
        self.balancer = balancer
        estimator = getattr(balancer, "estimator", None)
        updates = estimator == "reuse" or isinstance(balancer, FAMO)
        self.update = balancer.update if updates else None

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.balancer.backward(
            self.losses(),
            shared_parameters=self.shared,
            task_specific_parameters=self.head_parameters,
            closure=self.losses,
        )
        self.optimizer.step()
        if self.update is not None:
            with torch.no_grad():
                self.update(self.losses())


def contestants(n_tasks: int) -> dict[str, Balanced]:
    rows = {f"MARIGOLD {name}": MARIGOLD(**options) for name, options in OURS.items()}
    rows |= {name: peer() for name, peer in PEERS.items()}
    return {name: Balanced(n_tasks, balancer) for name, balancer in rows.items()}


def in_turns(contestants: dict[str, Problem], rounds: int) -> dict[str, float]:
    """Milliseconds of a step of everyone: lower quartiles over the rounds."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + WARM_UP):
        for name in contestants if turn % 2 else reversed(contestants):
            start = time.process_time()
            contestants[name].step()
            if turn >= WARM_UP:
                times[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.quantiles(laps, n=4)[0] for name, laps in times.items()}


@pytest.mark.parametrize("n_tasks", TASKS)
@pytest.mark.parametrize("name", OURS)
def test_step(benchmark, name: str, n_tasks: int) -> None:
    torch.set_num_threads(1)
    ours = Balanced(n_tasks, MARIGOLD(**OURS[name]))
    found = in_turns({"plain": Plain(n_tasks), "ours": ours}, ROUNDS)
    ratio = found["ours"] / found["plain"]
    benchmark.extra_info.update(base_ms=found["plain"], step_ms=found["ours"], ratio=ratio)
    benchmark.pedantic(ours.step, rounds=3, iterations=1)
    assert ours.balancer.stats["dropped"] == 0
    assert ratio < 3  # the aims are figures, not bounds of a shared machine


Figures = dict[str, dict[int, dict[str, float]]]


def measure(tasks: tuple[int, ...], rounds: int) -> Figures:
    """Milliseconds and ratios to plain training by contestant and T."""
    found: Figures = {}
    for n_tasks in tasks:
        everyone = contestants(n_tasks)
        plain = Plain(n_tasks)
        heavy = {name: everyone.pop(name) for name in ("MGDA", "NashMTL")}
        for rows, times in (({"plain": plain, **everyone}, rounds), (heavy, SLOW_ROUNDS)):
            laps = in_turns({"plain": plain, **rows}, times)
            for name in rows:
                figures = {"ms": laps[name], "ratio": laps[name] / laps["plain"]}
                found.setdefault(name, {})[n_tasks] = figures
                print(f"T = {n_tasks:2}  {name:18} {figures}", flush=True)
    return found


def plot(found: Figures, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2))
    for name, points in found.items():
        style = "-" if name.startswith("MARIGOLD") else "--" if name != "plain" else ":"
        axes.plot(
            list(points), [point["ratio"] for point in points.values()], style, marker="o", ms=3,
            label=name,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="tasks T", ylabel="step time / plain training")
    axes.set_xticks(list(found["plain"]), [str(t) for t in found["plain"]])
    axes.minorticks_off()
    ticks = [1, 1.4, 2.2, 4, 8, 16, 32, 64]
    axes.set_yticks(ticks, [str(t) for t in ticks])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def table(found: Figures) -> str:
    tasks = list(found["plain"])
    lines = ["| | " + " | ".join(f"T = {t}" for t in tasks) + " | flat within |"]
    lines.append("|---|" + "---|" * (len(tasks) + 1))
    for name, points in found.items():
        ratios = [point["ratio"] for point in points.values()]
        mean = sum(ratios) / len(ratios)
        spread = max(abs(r - mean) for r in ratios) / mean
        cells = [f"{p['ratio']:.2f} ({p['ms']:.1f} ms)" for p in points.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {100 * spread:.0f} % |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, nargs="+", default=TASKS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path)
    root = Path(__file__).resolve().parent.parent
    parser.add_argument("--plot", type=Path, default=root / "docs" / "marigold_steps.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(tuple(options.tasks), options.rounds)
    print(table(found))
    plot(found, options.plot)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Step time of MARIGOLD in the number of tasks, beside plain training, FAMO, MGDA and NashMTL.

    python bench/bench_marigold.py          # the table, and docs/marigold_steps.png

A shared trunk with T light heads: three layers of 512 on a batch of 512, a head a linear layer to
one output. Plain training is a forward, one backward of the summed losses and torch's fused Adam.
Everyone balances at every step; the extra forward that reuse and FAMO need is a part of their step.
Contestants and plain training make steps in turns; a ratio is the median over the pairs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastmto
from fastmto import MARIGOLD
from fastmto.balancers import FAMO, MGDA, NashMTL

TASKS = (2, 4, 8, 16, 32, 64)
PAIRS = 25
WIDTH, BATCH = 512, 512
#: Aims: times plain training.
AIMS = {"reuse": 1.4, "central": 2.2}
#: Step times in T may differ by this much from their mean.
FLAT = 0.1
OURS = {
    "reuse": {"estimator": "reuse"},
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


@pytest.mark.parametrize("n_tasks", TASKS)
@pytest.mark.parametrize("name", OURS)
def test_step(benchmark, name: str, n_tasks: int) -> None:
    from bench_balancers import record

    ours = Balanced(n_tasks, MARIGOLD(**OURS[name]))
    ratio = record(benchmark, Plain(n_tasks), ours, PAIRS)
    assert ours.balancer.stats["dropped"] == 0
    assert ratio < 3  # the aims are figures, not bounds of a shared machine


def measure(tasks: tuple[int, ...], pairs: int) -> dict[str, dict[int, dict[str, float]]]:
    """Milliseconds and ratios to plain training by contestant and T."""
    from bench_balancers import paired

    found: dict[str, dict[int, dict[str, float]]] = {"plain": {}}
    for n_tasks in tasks:
        plain = Plain(n_tasks)
        bases = []
        for name, contestant in contestants(n_tasks).items():
            fewer = max(5, pairs * 8 // n_tasks) if name in ("MGDA", "NashMTL") else pairs
            base_ms, step_ms, ratio = paired(plain, contestant, min(pairs, fewer))
            bases.append(base_ms)
            found.setdefault(name, {})[n_tasks] = {"ms": step_ms, "ratio": ratio}
            print(f"T = {n_tasks:2}  {name:18} {step_ms:8.2f} ms  {ratio:6.2f} x plain", flush=True)
        found["plain"][n_tasks] = {"ms": sorted(bases)[len(bases) // 2], "ratio": 1.0}
    return found


def plot(found: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
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


def table(found: dict[str, dict[int, dict[str, float]]]) -> str:
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
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    root = Path(__file__).resolve().parent.parent
    parser.add_argument("--plot", type=Path, default=root / "docs" / "marigold_steps.png")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(tuple(options.tasks), options.pairs)
    print(table(found))
    plot(found, options.plot)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

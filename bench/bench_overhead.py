"""The fixed cost of a step: balancing beside a model so small that kernels cost next to nothing.

    python bench/bench_overhead.py                          # a table; --json FILE for the numbers
    python bench/bench_overhead.py --tree OTHER/CHECKOUT    # both builds by turns, in one run

Trunk 8-64-64 and two-layer heads (P about 1e4), batch 64, one thread. Contestants take turns round
by round, so that a slow minute of the machine hits them alike; a figure is the median of the
rounds, and a ratio that of two medians. Each contestant is over the training that it cannot do
without: one backward, or T of them, and torch's fused Adam, and the extra forwards of its method.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastmto

#: Contestant -> (what it is over, the ratio aimed at).
ROWS = {
    "PUB, weighted step": ("plain", 1.10),
    "PUB, search": ("T backwards", 1.15),
    "PUB with Clippy, search": ("T backwards", 1.25),
    "NashMTL, between": ("plain", 1.10),
    "NashMTL, search": ("T backwards", 1.15),
    "LS": ("plain", 1.05),
    "DWA": ("plain", 1.05),
    "RLW": ("plain", 1.05),
    "UW": ("plain", 1.05),
    "FAMO": ("plain + forward", 1.10),
    "MARIGOLD, central": ("plain + 2 forwards", 1.25),
}
NEVER = 10**9  # steps to a second search


class World:
    """The model, its batch and its losses; the same in all contestants."""

    def __init__(self, n_tasks: int) -> None:
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1)) for _ in range(n_tasks)
        )
        self.x, self.targets = torch.randn(64, 8), torch.randn(n_tasks, 64, 1)
        self.shared = list(self.trunk.parameters())
        self.owned = [list(head.parameters()) for head in self.heads]

    def losses(self) -> list[Tensor]:
        z = self.trunk(self.x)
        return [
            (head(z) - y).square().mean() for head, y in zip(self.heads, self.targets, strict=True)
        ]

    def parameters(self) -> list[nn.Parameter]:
        return [*self.trunk.parameters(), *self.heads.parameters()]

    def adam(self, more: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam([*self.parameters(), *more], lr=1e-3, fused=True)


def plain(n_tasks: int, forwards: int = 0) -> tuple[World, Callable[[], None]]:
    world = World(n_tasks)
    optimizer = world.adam([])

    def step() -> None:
        optimizer.zero_grad()
        sum(world.losses()).backward()
        optimizer.step()
        with torch.no_grad():
            for _ in range(forwards):
                world.losses()

    return world, step


def backwards(n_tasks: int) -> tuple[World, Callable[[], None]]:
    """T backward passes, each to the shared parameters and its head, and fused Adam."""
    world = World(n_tasks)
    optimizer = world.adam([])

    def step() -> None:
        optimizer.zero_grad()
        losses = world.losses()
        for i, loss in enumerate(losses):
            inputs = [*world.shared, *world.owned[i]]
            grads = torch.autograd.grad(loss, inputs, retain_graph=i < n_tasks - 1)
            for p, grad in zip(inputs, grads, strict=True):
                p.grad = grad
        optimizer.step()

    return world, step


def pub(n_tasks: int, **options: Any) -> tuple[World, Callable[[], None]]:
    world = World(n_tasks)
    optimizer = fastmto.PUB(world.shared, world.owned, lr=1e-3, **options)

    def step() -> None:
        optimizer.zero_grad()
        optimizer.backward(world.losses())
        optimizer.step()

    return world, step


def balancer(n_tasks: int, name: str, **options: Any) -> tuple[World, Callable[[], None]]:
    world = World(n_tasks)
    method = fastmto.get(name, n_tasks, **options)
    optimizer = world.adam(method.parameters())
    call = {"closure": world.losses} if name == "marigold" else {}

    def step() -> None:
        optimizer.zero_grad()
        method.backward(world.losses(), world.shared, world.owned, **call)
        optimizer.step()
        if method.needs_update:
            with torch.no_grad():
                method.update(world.losses())

    return world, step


def contestants(n_tasks: int) -> dict[str, tuple[World, Callable[[], None]]]:
    return {
        "plain": plain(n_tasks),
        "T backwards": backwards(n_tasks),
        "plain + forward": plain(n_tasks, 1),
        "plain + 2 forwards": plain(n_tasks, 2),
        "PUB, weighted step": pub(n_tasks, update_weights_every=NEVER),
        "PUB, search": pub(n_tasks, update_weights_every=1),
        "PUB with Clippy, search": pub(n_tasks, update_weights_every=1, clippy=True),
        "NashMTL, between": balancer(n_tasks, "nashmtl", update_weights_every=NEVER),
        "NashMTL, search": balancer(n_tasks, "nashmtl"),
        "LS": balancer(n_tasks, "ls"),
        "DWA": balancer(n_tasks, "dwa"),
        "RLW": balancer(n_tasks, "rlw"),
        "UW": balancer(n_tasks, "uncertainty"),
        "FAMO": balancer(n_tasks, "famo"),
        "MARIGOLD, central": balancer(n_tasks, "marigold", estimator="central"),
    }


def check(n_tasks: int, worlds: dict[str, tuple[World, Callable[[], None]]]) -> None:
    """What is timed trains: every loss falls, and equal weights are plain training bit for bit."""
    for name, (world, step) in worlds.items():
        before = sum(world.losses()).item()
        for _ in range(20):
            step()
        if not sum(world.losses()).item() < before:
            raise AssertionError(f"{name} does not train: {before} before 20 steps")
    for p, q in zip(worlds["plain"][0].parameters(), worlds["LS"][0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert n_tasks == len(worlds["plain"][0].heads)


def measure(n_tasks: int, rounds: int) -> dict[str, float]:
    """Median microseconds of a step of every contestant."""
    torch.set_num_threads(1)
    worlds = contestants(n_tasks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        check(n_tasks, worlds)
        times: dict[str, list[float]] = {name: [] for name in worlds}
        for _ in range(rounds):
            for name, (_, step) in worlds.items():
                start = time.perf_counter()
                step()
                times[name].append(1e6 * (time.perf_counter() - start))
    return {name: statistics.median(each) for name, each in times.items()}


def by_turns(tree: str, n_tasks: int, rounds: int, turns: int) -> list[dict[str, float]]:
    """The medians of this build and of another checkout's, in processes that take turns."""
    here = Path(__file__).resolve().parent.parent
    found: list[list[dict[str, float]]] = [[], []]
    for _ in range(turns):
        for each, root in zip(found, (here, Path(tree).resolve()), strict=True):
            command = [sys.executable, __file__, "--one", str(n_tasks), "--rounds", str(rounds)]
            environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
            run = subprocess.run(
                command, env=environment, cwd=root, check=True, capture_output=True, text=True
            )
            each.append(json.loads(run.stdout))
    return [
        {name: statistics.median(turn[name] for turn in each) for name in each[0]} for each in found
    ]


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Markdown, a row for each contestant and a column for each T, this build first."""
    columns = [f"T = {t}" for t in results]
    lines = [
        f"| | over | {' | '.join(columns)} | aim |",
        f"|---|---|{'---|' * (len(columns) + 1)}",
    ]
    for name, (over, aim) in ROWS.items():
        cells = [
            " (".join(f"{us[name] / us[over]:.2f}" for us in each) + ")" * (len(each) > 1)
            for each in results.values()
        ]
        lines.append(f"| {name} | {over} | {' | '.join(cells)} | {aim:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 3, 8])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--tree", help="another checkout, built in place; its ratios in brackets")
    parser.add_argument("--turns", type=int, default=3, help="processes of each build with --tree")
    parser.add_argument("--json", type=Path, help="where to write the medians, in microseconds")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(measure(args.one, args.rounds)))
        return
    results = {
        str(t): by_turns(args.tree, t, args.rounds, args.turns)
        if args.tree
        else [measure(t, args.rounds)]
        for t in args.tasks
    }
    print(table(results))
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

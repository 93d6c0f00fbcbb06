"""The length of PUB's joint step: the experiment behind the default of `scale`.

    python bench/scale.py digits
    python bench/scale.py census --root DIR
    python bench/scale.py toy

prints the table of docs/scale.md. Methods are compared at several learning rates, because much of
a method's early edge is a longer step.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import fastmto
from fastmto.experiments import toy
from fastmto.experiments.arguments import DEFAULTS
from fastmto.experiments.data import load_census, load_digits
from fastmto.experiments.models import MMOE, SharedBottom
from fastmto.experiments.optimizers import balancer
from fastmto.experiments.train import train

RUNS: list[tuple[str, str | None, float]] = [
    ("equal weights", None, 0.5),
    ("equal weights", None, 1.0),
    ("equal weights", None, 2.0),
    ("PUB", "mean_norm", 0.5),
    ("PUB", "mean_norm", 1.0),
    ("PUB", "mean_norm", 2.0),
    ("PUB", "sum", 1.0),
    ("PUB", "rms", 0.25),
    ("PUB", "rms", 0.5),
    ("PUB", "rms", 1.0),
    ("PUB", "none", 1.0),
]


def make(scale: str | None, lr: float, weight_decay: float) -> Callable:
    if scale is None:
        return balancer("equal", lr=lr, weight_decay=weight_decay)
    return lambda model: fastmto.PUB(
        model.shared_parameters(),
        model.task_parameters(),
        lr,
        weight_decay=weight_decay,
        scale=scale,
    )


def compare(name: str, root: Path | None, seeds: int) -> None:
    defaults = DEFAULTS[name]
    if defaults.threads is not None:
        torch.set_num_threads(defaults.threads)
    data = None if name == "digits" else load_census(root)
    print("| method | scale | lr | " + " | ".join(f"metric {i}" for i in (1, 2)) + " | mean |")
    print("|---|---|---|---|---|---|")
    for method, scale, factor in RUNS:
        scores = []
        for seed in range(seeds):
            parts = load_digits(seed) if data is None else data
            torch.manual_seed(seed)
            outputs = [task.n_outputs for task in parts.tasks]
            kind = MMOE if defaults.model == "mmoe" else SharedBottom
            model = kind(
                parts.n_dense, parts.field_sizes, outputs, **defaults.sizes[defaults.model]
            )
            result = train(
                model,
                parts,
                make(scale, factor * defaults.lr, defaults.weight_decay),
                epochs=defaults.epochs,
                batch_size=defaults.batch_size,
                seed=seed,
            )
            last = list(result.epochs[-1].test.values())
            scores.append([*last, statistics.mean(last)])
        cells = [
            f"{statistics.mean(column):.4f} ± {statistics.stdev(column):.4f}"
            for column in zip(*scores, strict=True)
        ]
        lr = f"{factor * defaults.lr:g}"
        print(f"| {method} | {scale or '-'} | {lr} | " + " | ".join(cells) + " |", flush=True)


def toy_table(steps: int) -> None:
    torch.set_num_threads(1)
    print("| scale | " + " | ".join(toy.STARTS) + " |")
    print("|---|" + "---|" * len(toy.STARTS))
    for scale in ("none", "mean_norm"):
        cells = []
        for start in toy.STARTS:
            way = toy.run(
                lambda shared, tasks, scale=scale: fastmto.PUB(
                    shared, tasks, 1e-3, update_weights_every=1, scale=scale
                ),
                start,
                steps,
                dtype=torch.float64,
                every=1000,
            )
            f1, f2 = way.losses[-1].tolist()
            near = max(abs(f1 - toy.OPTIMUM[0]), abs(f2 - toy.OPTIMUM[1])) < 0.3
            cells.append(f"{f1:.2f}, {f2:.2f}{' ✓' if near else ''}")
        print(f"| {scale} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("digits", "census", "toy"))
    parser.add_argument("--root", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50_000)
    options = parser.parse_args()
    warnings.simplefilter("once")
    if options.what == "toy":
        toy_table(options.steps)
    else:
        compare(options.what, options.root, options.seeds)


if __name__ == "__main__":
    main()

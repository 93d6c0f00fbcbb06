"""Every kernel, the solvers and whole training steps on one GPU, in under ten minutes.

    python bench/gpu.py                  # all; writes results/gpu-<device>.json and the README
    python bench/gpu.py --quick          # a look, about a minute; writes nothing
    python bench/gpu.py --only search    # the passes, solvers or models named; writes nothing
    python bench/gpu.py --floors         # bytes every pass must move; needs no GPU
    python bench/gpu.py --from FILE      # keeps a run that wrote --json FILE; needs no GPU

Everything is checked against the float64 reference (kernels), its equations (solvers) or its own
counts (steps) before it is timed. Inputs are random and rotate past the L2 cache; times are of CUDA
events around graphs of many calls, medians of rounds; the bandwidth is measured in the same run.
`us`, `ms`, `MB` and `GB_per_s` in names are units; GB_per_s counts the bytes of the floor
(gpu_floors.py); `x_over_ours` is how many times longer x takes.

Exit status: 0; 1 where a result was wrong or something failed; 2 without a GPU; 130 after Ctrl-C,
which keeps what is finished.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_floors
import gpu_maths
import gpu_report
import numpy as np
import torch
import triton
from gpu_kernels import Case, measure, measure_bandwidth
from gpu_solvers import FAMILIES, measure_solver
from gpu_steps import BATCH, ROUNDS, SIZES, measure_model
from gpu_timer import CpuTimer, CudaTimer, Progress

import fastmto

SOLVERS = ("bargaining", "mgda")
NAMES = (*gpu_floors.TRAFFIC, *SOLVERS, *SIZES)
RESULTS = Path(__file__).parent / "results"
#: Passes that are measured with bfloat16 gradients and parameters too, at the largest P of all T.
HALF = ("search", "apply")


@dataclass(frozen=True)
class Plan:
    """What is run.

    Args:
        sizes: P, largest first: a compiled function is made for the first it sees.
        tasks: T of the passes at every P.
        largest: P of a last round at T = 2 only, or None.
        solver_tasks: T of the solvers.
        models: sizes by model.
        batch, rounds: of the training steps.
        compiles: how the plain maths of a pass is compiled; None leaves the compiled peer out.
        bandwidth_numel: P of the copy.
        seconds: no case is begun after that; torch.compile has two thirds of it.
    """

    sizes: tuple[int, ...]
    tasks: tuple[int, ...]
    largest: int | None
    solver_tasks: tuple[int, ...]
    models: dict[str, dict[str, Any]]
    batch: int
    rounds: int
    compiles: Callable[..., Any] | None
    bandwidth_numel: int
    seconds: float

    def cases(self, name: str) -> list[Case]:
        """Those of a pass, T by T."""
        found = []
        for n_tasks in self.tasks:
            if self.largest is not None and n_tasks == 2:
                found.append(Case(name, n_tasks, self.largest))
            found += [Case(name, n_tasks, numel) for numel in self.sizes]
            if name in HALF:
                found.append(Case(name, n_tasks, self.sizes[0], "bfloat16"))
        return found


def compiles(maths: Callable[..., object]) -> Callable[..., object]:
    """torch.compile, whose memory of what it compiled before is bounded."""
    torch.compiler.reset()
    return torch.compile(maths)


FULL = Plan(
    sizes=(10**8, 10**7, 10**6),
    tasks=(2, 8, 3, 32),
    largest=10**9,
    solver_tasks=(2, 8, 16, 32, 64),
    models=SIZES,
    batch=BATCH,
    rounds=ROUNDS,
    compiles=compiles,
    bandwidth_numel=2 * 10**8,
    seconds=540,
)
QUICK = Plan(
    sizes=(10**8,),
    tasks=(2, 8),
    largest=None,
    solver_tasks=(2, 32),
    models={"mmoe": SIZES["mmoe"]},
    batch=BATCH,
    rounds=5,
    compiles=None,
    bandwidth_numel=2 * 10**8,
    seconds=120,
)


def run(
    plan: Plan,
    only: tuple[str, ...],
    timer: CpuTimer,
    results: dict[str, Any],
    save: Callable[[], object] = lambda: None,
) -> None:
    """Everything of the plan that `only` names; fills `results`, whatever ends it.

    Args:
        plan: what to run.
        only: names of `NAMES`.
        timer: on the device.
        results: gets "bandwidth" and the rows "solvers", "steps" and "passes", see
            `measure_solver`, `measure_model` and `measure`.
        save: called whenever there is something new in it.
    """
    start = time.monotonic()
    solvers = [
        (name, n_tasks, family)
        for name in SOLVERS
        if name in only
        for n_tasks in plan.solver_tasks
        for family in FAMILIES
    ]
    models = [name for name in plan.models if name in only]
    passes = [case for name in gpu_floors.TRAFFIC if name in only for case in plan.cases(name)]
    results.update(solvers=[], steps=[], passes=[])
    results["seconds"] = 0.0
    progress = Progress(1 + len(solvers) + len(models) + len(passes))

    def note(row: dict[str, Any], what: object) -> None:
        if row["status"] != "ok":
            progress.say(f"{what}: {row['status']}: {row['note']}")

    def advance() -> None:
        results["seconds"] = time.monotonic() - start
        save()
        progress.advance()

    def late(share: float = 1.0) -> bool:
        return time.monotonic() - start > share * plan.seconds

    try:
        progress.at("bandwidth")
        results["bandwidth"] = bandwidth = measure_bandwidth(timer, plan.bandwidth_numel)
        advance()
        for name, n_tasks, family in solvers:
            progress.at(f"{name} {family} T={n_tasks}")
            row = measure_solver(name, n_tasks, family, timer)
            note(row, f"{name} {family} T={n_tasks}")
            results["solvers"].append(row)
            advance()
        for name in models:
            progress.at(f"step of {name}")
            rows = measure_model(
                name, timer, sizes=plan.models[name], batch=plan.batch, rounds=plan.rounds
            )
            for row in rows:
                note(row, f"{name} {row['contestant']}")
            results["steps"] += rows
            timer.release()
            advance()
        compiled: tuple[object, Callable[..., object] | None] = (None, None)
        for case in passes:
            progress.at(str(case))
            kind = (case.name, case.n_tasks, case.dtype)
            if compiled[0] != kind:
                compiled = kind, None
                if plan.compiles is not None and not late(2 / 3):
                    compiled = kind, plan.compiles(gpu_maths.fused(case.name))
            row = measure(case, timer, bandwidth=bandwidth, compiled=compiled[1], late=late())
            note(row, case)
            results["passes"].append(row)
            timer.release()
            advance()
    finally:
        progress.close()


def environment(timer: CpuTimer) -> dict[str, Any]:
    """The device and the versions."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "fastmto": fastmto.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if timer.device.type != "cuda":
        return {"device": "cpu", **found}
    properties = torch.cuda.get_device_properties(timer.device)
    return {
        "device": properties.name,
        "memory_GB": properties.total_memory / 1e9,
        "l2_MB": properties.L2_cache_size / 1e6,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "driver": driver(),
        **found,
    }


def driver() -> str | None:
    """The driver's version, where its own tool says it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    said = subprocess.run(
        [tool, "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return said.stdout.splitlines()[0].strip() if said.returncode == 0 else None


def results_path(device: str) -> Path:
    """Where the figures of a device stand."""
    return RESULTS / f"gpu-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def as_text(results: dict[str, Any]) -> str:
    """The figures as JSON."""
    return json.dumps(results, indent=1, allow_nan=False) + "\n"


def _keep(results: dict[str, Any], report: str) -> None:
    results_path(results["device"]).write_text(as_text(results))
    gpu_report.write("figures", report)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="the largest P and few T, no torch.compile")
    add(
        "--only",
        action="append",
        choices=NAMES,
        metavar="NAME",
        help=f"one of {', '.join(NAMES)}; may be given several times",
    )
    add("--no-write", action="store_true", help="only print")
    add("--json", type=Path, metavar="FILE", help="also write the figures to FILE, as they come")
    add("--floors", action="store_true", help="print the table of byte floors, and no more")
    add("--from", dest="earlier", type=Path, metavar="FILE", help="figures of an earlier run")
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    whole = not (options.quick or options.only)
    write = whole and not options.no_write
    if options.floors:
        print(gpu_floors.table())
        if write:
            gpu_report.write("floors", gpu_floors.table())
        return 0
    if options.earlier is not None:
        earlier = json.loads(options.earlier.read_text())
        report = gpu_report.tables(earlier)
        print(report)
        if write:
            _keep(earlier, report)
        return 0
    if not torch.cuda.is_available():
        print(
            "bench/gpu.py needs a GPU, and torch sees none here; --floors and --from work without",
            file=sys.stderr,
        )
        return 2

    timer = CudaTimer()
    results: dict[str, Any] = environment(timer)
    only = tuple(options.only or NAMES)

    def save() -> None:
        if options.json is not None:
            options.json.write_text(as_text(results))

    interrupted = False
    try:
        run(QUICK if options.quick else FULL, only, timer, results, save)
    except KeyboardInterrupt:
        interrupted = True
    report = gpu_report.tables(results)
    print(report)
    if write and not interrupted:
        _keep(results, report)
    if interrupted:
        return 130
    rows = [*results["solvers"], *results["steps"], *results["passes"]]
    return int(any(row["status"] in ("wrong", "failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())

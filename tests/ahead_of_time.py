"""Compiling the Triton kernels without a GPU, in processes that do not interpret them."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
#: The GPU that every configuration is compiled for; for the others it is those that differ most.
WHOLE = "cuda:90"
#: Backend and architecture of the GPUs that kernels are built for.
CUDA = ("cuda:80", "cuda:90", "cuda:100")
HIP = ("hip:gfx942",)


def _run(target: str, cache: Path) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(HERE.parent), *filter(None, [environment.get("PYTHONPATH")])]
    )
    done = subprocess.run(
        [sys.executable, str(HERE / "aot.py"), target],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"compiling for {target} failed:\n{done.stderr[-4000:]}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@functools.cache
def _started(root: Path) -> dict[str, Future[dict[str, Any]]]:
    """A process a target, as many at a time as there are processors."""
    pool = ThreadPoolExecutor(os.cpu_count())
    # The one that takes longest first.
    targets = sorted((*CUDA, *HIP), key=lambda target: target != WHOLE)
    return {
        target: pool.submit(_run, target, root / target.replace(":", "_")) for target in targets
    }


def compiled(target: str, caches: pytest.TempPathFactory) -> dict[str, Any]:
    """What aot.py reports of every kernel for one of the targets; the first call starts all."""
    return _started(caches.getbasetemp() / "triton")[target].result()

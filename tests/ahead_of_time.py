"""Compiling Triton kernels without a GPU, in a process that does not interpret them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent


def compiled(script: str, arch: int, cache: pytest.TempPathFactory) -> dict[str, Any]:
    """What a script of this folder reports of every kernel it compiles for sm_`arch`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(HERE.parent), *filter(None, [environment.get("PYTHONPATH")])]
    )
    done = subprocess.run(
        [sys.executable, str(HERE / script), str(arch)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report: dict[str, Any] = json.loads(done.stdout)
    return report

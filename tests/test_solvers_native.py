"""The contract of the C++ header: no allocation, no stray writes, no use of old memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_contract_of_the_header(tmp_path: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C++ compiler and GNU ld")
    binary = tmp_path / "solver_contract"
    solvers = ROOT / "csrc" / "solvers"
    subprocess.run(
        [
            *compiler.split(),
            *("-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-Wl,--wrap=malloc"),
            f"-I{solvers}",
            str(ROOT / "tests" / "native" / "solver_contract.cpp"),
            *(str(path) for path in sorted(solvers.glob("*.cpp")) if path.stem != "bindings"),
            *("-o", str(binary)),
        ],
        check=True,
        timeout=600,
    )
    done = subprocess.run([binary], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) == 13 * 9 * 14 * 2

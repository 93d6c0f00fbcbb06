"""Compile the solvers on the device for one GPU architecture without a GPU; print JSON.

Run as `python tests/aot_solvers.py 90`, as aot.py is: test_ops_triton_solvers.py does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from aot import NamedArchitecture, described

from fastmto.ops import triton_launch, triton_small
from fastmto.ops.triton_bargaining import bargaining
from fastmto.ops.triton_launch import Tiling
from fastmto.ops.triton_mgda import mgda


def compiled(solver: Callable[..., None], tasks: int, **options: Any) -> dict[str, Any]:
    """What comes out for this number of tasks; the launcher runs up to the launch."""
    found: dict[str, Any] = {}

    def record(
        kernel: Any,
        grid: tuple[int, ...],
        device: torch.device,
        tiling: Tiling,
        *args: Any,
        **constants: Any,
    ) -> None:
        made = kernel.warmup(*args, grid=grid, **constants, **triton_launch.options(tiling))
        found.update(described(made), exchanges=made.asm["ptx"].count("shfl.sync"))

    triton_small.launch = record
    weights = torch.ones(tasks, dtype=torch.float64)
    solver(torch.eye(tasks, dtype=torch.float64), weights, torch.ones(4).double(), **options)
    return found


if __name__ == "__main__":
    triton.runtime.driver.set_active(NamedArchitecture(int(sys.argv[1])))
    kernels = {}
    for tasks in (8, 32, 64):
        powers = torch.ones(tasks, dtype=torch.float64)
        kernels[f"bargaining T={tasks}"] = compiled(bargaining, tasks)
        kernels[f"bargaining T={tasks} preference"] = compiled(bargaining, tasks, preference=powers)
        kernels[f"mgda T={tasks}"] = compiled(mgda, tasks)
    sys.stdout.write(json.dumps(kernels))

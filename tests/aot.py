"""Compile the Triton kernels for one GPU architecture without a GPU; print what came out as JSON.

Run as `python tests/aot.py 90` without TRITON_INTERPRET and with a fresh TRITON_CACHE_DIR:
test_triton_aot.py does. The launchers run as they are, on CPU tensors, up to the point where
Triton would start the compiled kernel: a driver that only names the architecture stands in.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from fastmto.ops import (
    triton_apply,
    triton_combine,
    triton_launch,
    triton_perturb,
    triton_search,
)
from fastmto.ops.triton_launch import Tiling
from fastmto.rules import AdaGrad, Adam, RMSProp, Rule

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
#: Coordinates and row stride, a multiple of 16, as FlatParameters makes them.
NUMEL = 4096


class NamedArchitecture:
    """What Triton asks a driver for before it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def described(made: Any) -> dict[str, Any]:
    """Registers, local and shared memory of a compiled kernel, and its memory instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing about registers: {usage}")
    ptx = made.asm["ptx"]
    return {
        "registers": int(found[1]),
        "stack": int(found[2]) + int(found[3]),
        "shared": made.metadata.shared,
        "loads": re.findall(r"(?:ld\.global|cp\.async\.c[ag]\.shared\.global)\S*.*", ptx),
        "stores": re.findall(r"st\.global\S*", ptx),
        "fused": re.findall(r"\bfma\.\S+", ptx),
        "rounded": re.findall(r"\b(?:mul|add|sub|sqrt|div)\.\S*f(?:32|64)", ptx),
        "order": re.findall(r"bar\.sync|atom\S*|st\.global|ld\.global\.cg", ptx),
        "signature": made.src.signature,
    }


class Recorder:
    """Stands in for `triton_launch.launch`: compiles, does not start."""

    def __init__(self) -> None:
        self.kernels: dict[str, dict[str, Any]] = {}
        self.name = ""

    def __call__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        device: torch.device,
        tiling: Tiling,
        *args: Any,
        **constants: Any,
    ) -> None:
        made = kernel.warmup(*args, grid=grid, **constants, **triton_launch.options(tiling))
        self.kernels[self.name] = described(made)


def compile_all(record: Recorder) -> None:
    """Call the launchers for all that is tried; none of them is told it is not for real."""
    single, half, double = torch.float32, torch.bfloat16, torch.float64
    adam = Adam()
    others = (AdaGrad(), RMSProp(), RMSProp(momentum=0.9, centered=True))
    for dtype, n_tasks in (
        (single, 1),
        (single, 2),
        (single, 3),
        (single, 8),
        (single, 32),
        (single, 64),
        (half, 2),
        (half, 8),
        (double, 2),
        (double, 8),
    ):
        record.name = f"gram {dtype} T={n_tasks}"
        triton_search.gram(
            torch.zeros(n_tasks, NUMEL, dtype=dtype), torch.zeros(n_tasks, n_tasks, dtype=double)
        )
    for dtype in (single, double):
        params, rows = torch.zeros(NUMEL, dtype=dtype), torch.zeros(8, NUMEL, dtype=dtype)
        scale = torch.ones(8, dtype=double)
        for distribution in triton_perturb.KERNELS:
            record.name = f"perturb {dtype} {distribution}"
            triton_perturb.perturb(params, rows, scale, None, 2**64 - 1, 1, distribution)
        for direction in (params, rows):
            record.name = f"perturb {dtype} given {direction.dim()}"
            triton_perturb.perturb(params, rows, scale, direction, None, 0, "")
    configurations: list[tuple[torch.dtype, int, Rule, tuple[str, ...]]] = [
        (single, 2, adam, ("search", "delayed", "apply", "combine")),
        (single, 3, adam, ("search", "delayed")),
        (single, 8, adam, ("search", "delayed", "apply", "combine")),
        (single, 32, adam, ("search", "delayed", "apply", "combine")),
        (single, 128, adam, ("search",)),
        *((single, 2, rule, ("search", "delayed", "apply")) for rule in others),
        (half, 2, adam, ("search", "apply", "combine")),
        (half, 8, adam, ("delayed",)),
        (double, 2, adam, ("search", "apply")),
        (double, 8, adam, ("delayed",)),
    ]
    for dtype, n_tasks, rule, passes in configurations:
        maths = double if dtype == double else single
        grads = torch.zeros(n_tasks, NUMEL, dtype=dtype)
        state = tuple(torch.zeros(NUMEL, dtype=maths) for _ in rule.state_names)
        params = torch.zeros(NUMEL, dtype=dtype)
        weights = torch.ones(n_tasks, dtype=double)
        gram = torch.zeros(n_tasks, n_tasks, dtype=double)
        for name in passes:
            record.name = f"{name} {dtype} T={n_tasks} kind={rule.kind}"
            if name == "search":
                triton_search.search(rule, 3, grads, state, gram)
            elif name == "delayed":
                triton_search.delayed(rule, 3, grads, state, params, weights, gram, 0.1, 0.01)
            elif name == "apply":
                triton_apply.apply(rule, 3, grads, state, params, weights, 0.1, 0.01)
            else:
                triton_combine.combine(grads, weights, params)


if __name__ == "__main__":
    triton.runtime.driver.set_active(NamedArchitecture(int(sys.argv[1])))
    recorder = Recorder()
    for module in (triton_search, triton_apply, triton_combine, triton_perturb):
        module.launch = recorder
    compile_all(recorder)
    sys.stdout.write(json.dumps(recorder.kernels))

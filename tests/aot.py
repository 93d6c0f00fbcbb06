"""Compile the Triton kernels for one GPU architecture without a GPU; print what came out as JSON.

Run as `python tests/aot.py 90` without TRITON_INTERPRET and with a fresh TRITON_CACHE_DIR:
test_triton_aot.py does.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastmto.ops import triton_apply, triton_combine, triton_search
from fastmto.ops.triton_launch import Tiling, options
from fastmto.ops.triton_rules import N_STATES

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compiled(
    kernel: Any, dtype: torch.dtype, tiling: Tiling, constants: dict[str, Any], arch: int
) -> dict[str, Any]:
    """Compile as the launchers would for aligned buffers, P and stride multiples of 16."""
    double = dtype == torch.float64
    maths = "fp64" if double else "fp32"
    constants = {**constants, "DTYPE": tl.float64 if double else tl.float32}
    types = {
        **dict.fromkeys(("grads", "params", "out"), "*" + TYPES[dtype]),
        **dict.fromkeys(("s0", "s1", "s2"), "*" + maths),
        **dict.fromkeys(("weights", "gram", "partial"), "*fp64"),
        "arrived": "*i32",
    }
    absent = {"s0", "s1", "s2"} - {f"s{k}" for k in range(N_STATES[constants.get("KIND", 0)])}
    if not constants.get("APPLY", True):
        absent |= {"params", "weights"}
    signature, values, attributes = {}, {}, {}
    for k, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants or name in absent:
            signature[name] = "constexpr"
            values[(k,)] = constants.get(name)
        else:
            # Numbers have the type their annotation names, as in a launch.
            signature[name] = types.get(name) or parameter.annotation_type
            if signature[name] != "fp64":
                attributes[(k,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options(tiling))
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
        "order": re.findall(r"bar\.sync|atom\S*|st\.global|ld\.global\.cg", ptx),
    }


def cases(arch: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and result of every kernel that is tried."""
    single, half, double = torch.float32, torch.bfloat16, torch.float64
    for dtype, n_tasks, kind, with_apply in (
        *((single, t, 0, a) for t in (2, 3, 8, 32) for a in (False, True)),
        *((single, 2, kind, a) for kind in (1, 2, 5) for a in (False, True)),
        (half, 2, 0, False),
        (half, 8, 0, True),
        (double, 2, 0, False),
        (double, 8, 0, True),
        (single, 128, 0, False),
    ):
        is_double = dtype == double
        tiling = triton_search.tiling_for(n_tasks, is_double, with_apply, 132)
        kernel = triton_search.search_pairs if tiling.tile is None else triton_search.search_tiles
        constants = triton_search.constants_for(tiling, n_tasks, with_apply)
        name = f"{'delayed' if with_apply else 'search'} {dtype} T={n_tasks} kind={kind}"
        yield name, compiled(kernel, dtype, tiling, {**constants, "KIND": kind}, arch)
    for dtype, n_tasks, kind in (
        *((single, t, 0) for t in (2, 8, 32)),
        *((single, 2, kind) for kind in (1, 2, 5)),
        (half, 2, 0),
        (double, 2, 0),
    ):
        tiling = triton_apply.tiling_for(dtype == double)
        constants = {
            "T": n_tasks,
            "UNROLL": n_tasks <= triton_apply.MAX_UNROLLED_T,
            "BLOCK": tiling.block,
        }
        name = f"{dtype} T={n_tasks} kind={kind}"
        apply = triton_apply.apply_kernel
        yield f"apply {name}", compiled(apply, dtype, tiling, {**constants, "KIND": kind}, arch)
        if kind == 0:
            combine = triton_combine.combine_kernel
            yield f"combine {name}", compiled(combine, dtype, tiling, constants, arch)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dict(cases(int(sys.argv[1])))))

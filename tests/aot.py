"""Compile every Triton kernel for one GPU without a GPU; print what came out as JSON.

Run as `python tests/aot.py cuda:90` or `python tests/aot.py hip:gfx942`, without TRITON_INTERPRET
and with a fresh TRITON_CACHE_DIR: test_triton_aot.py does. The ops of the GPU backend run as they
are, on CPU tensors, up to the point where Triton would start the compiled kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import generated_code
import torch
import triton
import triton.language as tl
from ahead_of_time import WHOLE
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastmto.ops.triton import backend as gpu
from fastmto.optim.rules import AdaGrad, Adam, RMSProp, Rule

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
#: Coordinates and row stride, a multiple of 16, as FlatParameters makes them.
NUMEL = 4096
#: Kernels' names of memory with P elements or more.
STREAMS = ("grads", "s0", "s1", "s2", "theta", "out", "direction")
single, half, double = torch.float32, torch.bfloat16, torch.float64


class NamedTarget:
    """What Triton asks a driver for before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def described_cuda(made: Any) -> dict[str, Any]:
    """Registers and local memory of a kernel, and its memory and floating-point instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing about registers: {usage}")
    ptx, signature = made.asm["ptx"], made.src.signature
    parameters = [
        name if kind.startswith("*") else ""
        for name, kind in signature.items()
        if kind != "constexpr"
    ]
    narrow, looked_at = generated_code.narrow_offsets(made.asm["ttgir"], STREAMS)
    return {
        "registers": int(found[1]),
        "spilled": int(found[2]) + int(found[3]),
        "accesses": generated_code.accesses(ptx, parameters),
        "narrow": narrow,
        "looked_at": looked_at,
        "fused": re.findall(r"\bfma\.\S+", ptx),
        "rounded": re.findall(r"\b(?:mul|add|sub|sqrt|div)\.\S*f(?:32|64)", ptx),
        "order": re.findall(r"bar\.sync|atom\S*|st\.global|ld\.global\.cg", ptx),
        "exchanges": ptx.count("shfl.sync"),
    }


def described_hip(made: Any) -> dict[str, Any]:
    """Registers and scratch memory of a kernel, how often it forms an address in 32 bits, and the
    order of what moves and waits for memory."""
    code = made.asm["amdgcn"]
    numbers = {name: int(n) for name, n in re.findall(r"\.(\w+):\s+(\d+)$", code, re.MULTILINE)}
    return {
        "registers": numbers["vgpr_count"],
        "spilled": numbers["private_segment_fixed_size"],
        "narrow": len(re.findall(r"\bbuffer_(?:load|store)", code)),
        "order": re.findall(
            r"^\s*((?:buffer|global)_(?:store|atomic)\S*|s_barrier|buffer_wbl2|"
            r"s_waitcnt .*\bvmcnt\(0\))",
            code,
            re.MULTILINE,
        ),
    }


class Recorder:
    """Stands in for `JITFunction.run`: compiles, does not start."""

    def __init__(self, backend: str) -> None:
        self.kernels: dict[str, dict[str, Any]] = {}
        self.case = ""
        self._run = JITFunction.run
        self._described = described_cuda if backend == "cuda" else described_hip

    def __call__(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        del warmup
        made = self._run(kernel, *args, grid=grid, warmup=True, **options)
        self.kernels[f"{self.case} | {kernel.fn.__name__}"] = {
            "shared": made.metadata.shared,
            "signature": made.src.signature,
            **self._described(made),
        }


@triton.jit
def narrow_block(grads, out, P, BLOCK: tl.constexpr):
    """Wrong: the block's first coordinate in 32 bits."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < P
    tl.store(out + offsets, tl.load(grads + offsets, mask=mask), mask=mask)


@triton.jit
def narrow_late(grads, out, P: tl.int64, BLOCK: tl.constexpr):
    """Wrong: made wide after the product."""
    offsets = (tl.program_id(0) * BLOCK).to(tl.int64) + tl.arange(0, BLOCK)
    mask = offsets < P
    tl.store(out + offsets, tl.load(grads + offsets, mask=mask), mask=mask)


@triton.jit
def narrow_turns(grads, out, P: tl.int64, BLOCK: tl.constexpr):
    """Wrong: 32 bits for the place in a loop, though the program's own place has 64."""
    first = tl.program_id(0).to(tl.int64) * 1000 * BLOCK
    for turn in range(1000):
        offsets = first + turn * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < P
        tl.store(out + offsets, tl.load(grads + offsets, mask=mask), mask=mask)


@triton.jit
def narrow_carried(grads, out, P: tl.int64, BLOCK: tl.constexpr):
    """Wrong: a 32-bit offset that grows from turn to turn."""
    offsets = tl.program_id(0) + tl.arange(0, BLOCK)
    for _turn in range(tl.cdiv(P, BLOCK)):
        mask = offsets < P
        tl.store(out + offsets, tl.load(grads + offsets, mask=mask), mask=mask)
        offsets += BLOCK


@triton.jit
def wide_block(grads, out, P: tl.int64, BLOCK: tl.constexpr):
    """Right."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < P
    tl.store(out + offsets, tl.load(grads + offsets, mask=mask), mask=mask)


def compile_controls(record: Recorder) -> None:
    """Kernels by which the inspection of addresses is itself tested."""
    for kernel in (narrow_block, narrow_late, narrow_turns, narrow_carried, wide_block):
        record.case = "control"
        kernel[(4,)](torch.zeros(NUMEL), torch.zeros(NUMEL), NUMEL, BLOCK=1024)


def compile_without_a_rule(record: Recorder, whole: bool) -> None:
    grams = [(single, 8), (single, 32)]
    if whole:
        grams += [*((single, n) for n in (1, 2, 3, 64)), (half, 2), (half, 8), (double, 8)]
    for dtype, n_tasks in grams:
        record.case = f"gram {dtype} T={n_tasks}"
        gpu.gram(
            torch.zeros(n_tasks, NUMEL, dtype=dtype), torch.zeros(n_tasks, n_tasks, dtype=double)
        )
    for dtype, n_tasks in ((single, 2), (single, 8), (single, 32), (half, 2), (double, 2)):
        record.case = f"combine {dtype} T={n_tasks}"
        out = torch.zeros(NUMEL, dtype=dtype)
        gpu.combine(torch.zeros(n_tasks, NUMEL, dtype=dtype), torch.ones(n_tasks).double(), out)
    for dtype in (single, half, torch.float16, double):
        record.case = f"check {dtype}"
        gpu.check(torch.zeros(2, NUMEL, dtype=dtype), torch.zeros(1, dtype=torch.int32))
    for dtype in (single, double):
        params, rows = torch.zeros(NUMEL, dtype=dtype), torch.zeros(8, NUMEL, dtype=dtype)
        scale = torch.ones(8, dtype=double)
        for distribution in ("gaussian", "rademacher"):
            record.case = f"perturb {dtype} {distribution}"
            gpu.perturb(
                params, rows, scale=scale, seed=2**64 - 1, offset=1, distribution=distribution
            )
        record.case = f"perturb {dtype} given"
        gpu.perturb(params, rows, scale=scale, direction=rows.clone())


def compile_past_two_gigabytes(record: Recorder) -> None:
    """AMD's compiler takes 32-bit offsets to tensors it is told are small; these are not.

    Their memory is never touched.
    """
    grads = torch.empty(1, 2**30 + 16, dtype=half)
    record.case = "large combine"
    gpu.combine(grads, torch.ones(1, dtype=double), torch.empty(2**30 + 16, dtype=half))
    record.case = "large check"
    gpu.check(grads, torch.zeros(1, dtype=torch.int32))


def compile_control(record: Recorder) -> None:
    for rows in (1, 3):
        numbers = gpu_numbers(Adam(), rows)
        counts, active = torch.zeros(rows, dtype=torch.int64), torch.ones(rows, dtype=torch.int32)
        found, tally = torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
        record.case = f"step_constants R={rows}"
        gpu.step_constants(torch.zeros(rows, 7, dtype=double), counts, active, numbers, found)
        record.case = f"count_step R={rows}"
        gpu.count_step(counts, active, found, tally)


def compile_solvers(record: Recorder, whole: bool) -> None:
    for n_tasks in (8, 32, 64) if whole else (32,):
        gram, weights = torch.eye(n_tasks, dtype=double), torch.ones(n_tasks, dtype=double)
        info = torch.zeros(4, dtype=double)
        if n_tasks == 8:
            record.case = f"bargaining T={n_tasks}"
            gpu.bargaining(gram, weights, info)
        else:
            record.case = f"bargaining T={n_tasks} preference"
            gpu.bargaining(gram, weights, info, preference=torch.ones(n_tasks, dtype=double))
            record.case = f"mgda T={n_tasks}"
            gpu.mgda(gram, weights, info)


def gpu_numbers(rule: Rule, rows: int) -> Tensor:
    return torch.tensor([rule.numbers(3, 0.1, 0.01)] * rows, dtype=double)


def compile_rules(record: Recorder, whole: bool) -> None:
    adam, adagrad, rmsprop = Adam(), AdaGrad(), RMSProp(momentum=0.9, centered=True)
    gram, both, moved = ("update_gram",), ("apply_and_gram",), ("apply",)
    every = (*gram, *both, *moved)
    configurations: list[tuple[str, torch.dtype, int, Rule, tuple[str, ...]]] = [
        ("", single, 2, adam, every),
        ("", single, 8, adam, gram + both),
        ("", single, 32, adam, every),
        ("", double, 16, adam, both),
        ("adatask", single, 8, adam, both + moved),
        ("clippy", single, 2, adam, moved),
        ("clippy", single, 8, adam, gram),
        ("both", half, 2, adam, both),
    ]
    if whole:
        configurations += [
            ("", single, 3, adam, both),
            ("", single, 8, adam, moved),
            ("", single, 64, adam, both),
            ("", single, 128, adam, gram),
            *(("", single, 2, rule, both) for rule in (adagrad, RMSProp())),
            ("", single, 2, rmsprop, both + moved),
            ("", half, 2, adam, every),
            ("", half, 8, adam, both),
            ("", half, 16, adam, both),
            ("", double, 2, adam, gram + moved),
            ("", double, 8, adam, both),
            ("adatask", single, 2, adam, every),
            ("adatask", single, 32, adam, gram),
            ("adatask", half, 2, adam, gram),
            ("adatask", double, 2, adam, both),
            ("clippy", single, 2, adam, both),
            ("clippy", single, 8, adam, both),
            ("clippy", single, 32, adam, gram),
            ("clippy", single, 2, rmsprop, both),
            ("clippy", half, 2, adam, gram),
            ("clippy", double, 2, adam, both),
            ("both", single, 2, adam, moved),
        ]
    for modifier, dtype, n_tasks, rule, passes in configurations:
        for name in passes:
            record.case = f"{name} {dtype} T={n_tasks} kind={rule.kind} {modifier}".strip()
            compile_pass(name, dtype, n_tasks, rule, modifier)


def compile_one_coordinate(record: Recorder) -> None:
    """One coordinate in one tensor: nothing to bisect, and sizes that Triton may make constants."""
    for n_tasks in (2, 9):
        record.case = f"one T={n_tasks}"
        compile_pass("apply_and_gram", single, n_tasks, Adam(), "clippy", numel=1)


def compile_pass(
    name: str,
    dtype: torch.dtype,
    n_tasks: int,
    rule: Rule,
    modifier: str,
    numel: int = NUMEL,
) -> None:
    maths = double if dtype == double else single
    own, clipped = modifier in ("adatask", "both"), modifier in ("clippy", "both")
    shape = (n_tasks, numel) if own else (numel,)
    numbers = gpu_numbers(rule, n_tasks if own else 1)
    grads = torch.zeros(n_tasks, numel, dtype=dtype)
    state = [torch.zeros(shape, dtype=maths) for _ in rule.state_names]
    params = torch.zeros(numel, dtype=dtype)
    weights = torch.ones(n_tasks, dtype=double)
    gram = torch.zeros(n_tasks, n_tasks, dtype=double)
    skip = torch.zeros(1, dtype=torch.int32)
    factors: dict[str, Any] = {}
    if clipped:
        borders = [0, 1, 65, 2000, numel] if numel > 2000 else [0, numel]
        factors["segments"] = torch.tensor(borders)
        factors["sigma"] = torch.ones(n_tasks, len(borders) - 1, dtype=double)
    if name == "update_gram":
        changes = {**factors, "clippy": (0.5, 0.01), "params": params} if clipped else {}
        gpu.update_gram(rule.kind, numbers, grads, state, gram, **changes)
    elif name == "apply":
        gpu.apply(rule.kind, numbers, grads, state, params, weights, **factors, skip=skip)
    else:
        if clipped:
            factors["clippy"] = (0.5, 0.01)
        gpu.apply_and_gram(
            rule.kind, numbers, grads, state, params, weights, gram, **factors, skip=skip
        )


def main(target: str) -> None:
    backend, arch = target.split(":")
    if backend == "hip":
        # What torch says on a machine with such a GPU.
        torch.version.hip = "6"
        named = NamedTarget(GPUTarget("hip", arch, 64))
    else:
        named = NamedTarget(GPUTarget("cuda", int(arch), 32))
    triton.runtime.driver.set_active(named)
    record = Recorder(backend)
    JITFunction.run = lambda kernel, *args, **options: record(kernel, *args, **options)
    whole = target == WHOLE
    if whole:
        compile_controls(record)
        compile_one_coordinate(record)
    if backend == "hip":
        compile_past_two_gigabytes(record)
    compile_without_a_rule(record, whole)
    compile_control(record)
    compile_solvers(record, whole)
    compile_rules(record, whole)
    sys.stdout.write(json.dumps(record.kernels))


if __name__ == "__main__":
    main(sys.argv[1])

"""What the Triton launchers share: working precision, workspaces, grid sizes."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..device import capturing

#: Up to this many tasks a loop over them is unrolled whole.
MAX_UNROLLED_T = 8


class Tiling(NamedTuple):
    """How a pass is cut up; the defaults are the launchers', others are for tests and tuning.

    block      coordinates a program takes at a time, a power of 2
    warps      warps a program
    programs   most programs along P; None: one a block
    registers  most registers a thread, so that as many programs as planned share a multiprocessor
    fuse       let the compiler contract products and sums; not where every bit is promised
    flush      blocks summed in the working precision before they join a float64 sum
    tile       rows of a Gram tile; None: pairs
    """

    block: int
    warps: int = 4
    programs: int | None = None
    registers: int | None = None
    flush: int = 1
    tile: int | None = None
    fuse: bool = True


def working_type(grads: Tensor) -> Any:
    """Triton's name of the precision the maths runs in: float64 for float64, else float32."""
    return tl.float64 if grads.dtype == torch.float64 else tl.float32


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the interpreter's CPU, which runs programs one by one."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def programs_for(n_coordinates: int, tiling: Tiling) -> int:
    """Programs along P: one a block, up to the tiling's bound, at least one."""
    blocks = max(1, -(-n_coordinates // tiling.block))
    return blocks if tiling.programs is None else min(blocks, tiling.programs)


_workspaces: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}


def workspace(device: torch.device, n_sums: int, n_counters: int) -> tuple[Tensor, Tensor]:
    """Scratch of a reduction: (n_sums,) float64, any content, and (n_counters,) int32 zeros.

    Kept from call to call, one pair a device and stream (passes on one stream never overlap);
    it grows when a call needs more. Every pass leaves the counters at 0. While a CUDA graph is
    captured, a new pair out of the graph's own memory, whose counters every replay zeroes: a kept
    one could be replaced, or shared with a graph that is replayed on another stream.
    """
    if capturing(device):
        return _pair(device, n_sums, n_counters)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    held = _workspaces.get((device, stream))
    if held is None or held[0].numel() < n_sums or held[1].numel() < n_counters:
        sums = max(n_sums, held[0].numel() if held else 0)
        counters = max(n_counters, held[1].numel() if held else 0)
        held = _workspaces[device, stream] = _pair(device, sums, counters)
    return held


def _pair(device: torch.device, n_sums: int, n_counters: int) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(n_sums, dtype=torch.float64, device=device),
        torch.zeros(n_counters, dtype=torch.int32, device=device),
    )


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    tiling: Tiling,
    *args: Any,
    **constants: Any,
) -> None:
    """Run `kernel` on the current stream of `device`.

    A kernel must not name a parameter `params`, `options` or `specialization`: Triton's generated
    binder uses these names itself, and would pass its own dictionary.
    """
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[grid](*args, **constants, **options(tiling))


def options(tiling: Tiling) -> dict[str, Any]:
    """Triton's compiler options. Contraction to fused multiply-adds is asked for by name, as its
    default changes with Triton's versions. The bound on registers is NVIDIA's only."""
    return {
        "num_warps": tiling.warps,
        **({} if torch.version.hip else {"maxnreg": tiling.registers}),
        "enable_fp_fusion": tiling.fuse,
    }

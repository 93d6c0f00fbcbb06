"""What the Triton launchers share: working precision, workspaces, grid sizes."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import capturing, current

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


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the interpreter's CPU, which runs programs one by one."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def lanes() -> int:
    """Most threads a warp has: AMD's have 64, or 32."""
    return 64 if torch.version.hip else 32


def waiting() -> str | None:
    """The instruction by which an AMD warp waits until its stores have arrived.

    None on NVIDIA, where a barrier orders the stores of all threads, and for the interpreter.
    """
    if not torch.version.hip or triton.knobs.runtime.interpret:
        return None
    return _waiting_on(str(triton.runtime.driver.active.get_current_target().arch))


def _waiting_on(architecture: str) -> str:
    if architecture.startswith("gfx9"):
        return "s_waitcnt vmcnt(0)"
    return "s_wait_storecnt 0x0" if architecture >= "gfx12" else "s_waitcnt_vscnt null, 0x0"


def programs_for(n_coordinates: int, tiling: Tiling) -> int:
    """Programs along P: one a block, up to the tiling's bound, at least one."""
    blocks = max(1, -(-n_coordinates // tiling.block))
    return blocks if tiling.programs is None else min(blocks, tiling.programs)


#: Counters that are set aside on a device for the passes of CUDA graphs.
RESERVED = 16384

_workspaces: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}
#: What is left of the counters set aside: zeros that nobody has.
_reserves: dict[torch.device, Tensor] = {}


def workspace(device: torch.device, n_sums: int, n_counters: int) -> tuple[Tensor, Tensor]:
    """Scratch of a reduction: (n_sums,) float64, any content, and (n_counters,) int32 zeros.

    Kept from call to call, one pair a device and stream (passes on one stream never overlap);
    it grows when a call needs more. Every pass leaves the counters at 0.

    While a CUDA graph is captured, a new pair: a kept one could be replaced, or shared with a graph
    that is replayed on another stream. The sums lie in the graph's own memory. The counters come
    out of those set aside by the first call outside a capture, and stay the captured pass's for
    good; without such a call, or when none are left, they lie in the graph's memory as well, and
    every replay zeroes them first.
    """
    if capturing(device):
        return _sums(device, n_sums), _own_counters(device, n_counters)
    if device not in _reserves:
        _reserves[device] = _counters(device, RESERVED)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    held = _workspaces.get((device, stream))
    if held is None or held[0].numel() < n_sums or held[1].numel() < n_counters:
        most_sums = max(n_sums, held[0].numel() if held else 0)
        most_counters = max(n_counters, held[1].numel() if held else 0)
        held = _sums(device, most_sums), _counters(device, most_counters)
        _workspaces[device, stream] = held
    return held


def _sums(device: torch.device, n: int) -> Tensor:
    return torch.empty(n, dtype=torch.float64, device=device)


def _counters(device: torch.device, n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int32, device=device)


def _own_counters(device: torch.device, n: int) -> Tensor:
    """n counters or a few more, at an address that is a multiple of 16 as other calls' are: a
    kernel compiled for these would have to be compiled again, in the midst of a capture."""
    n += -n % 4
    left = _reserves.get(device)
    if left is None or left.numel() < n:
        return _counters(device, n)
    own, _reserves[device] = left[:n], left[n:]
    return own


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
    with current(device):
        kernel[grid](*args, **constants, **options(tiling))


def options(tiling: Tiling) -> dict[str, Any]:
    """Triton's compiler options. Contraction to fused multiply-adds is asked for by name, as its
    default changes with Triton's versions. The bound on registers is NVIDIA's only."""
    return {
        "num_warps": tiling.warps,
        **({} if torch.version.hip else {"maxnreg": tiling.registers}),
        "enable_fp_fusion": tiling.fuse,
    }

"""The same circumstances for every evaluation of a closure: random numbers and module buffers.

Losses at two points can be compared only if nothing but the parameters differs. `Replay` starts
every evaluation from the same state of torch's random number generators, so that dropout draws the
same masks, and puts back every buffer that a module's forward changed: running statistics of
BatchNorm, the vectors of spectral norm, counters. Afterwards generators and buffers are as if
nothing had been evaluated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook


class RandomState:
    """The state of torch's CPU generator and of those of CUDA devices, at construction.

    Generators of the caller's own, Python's `random` and NumPy's are not included.

    Args:
        devices: whose CUDA generators belong to it; None: every device, once CUDA is in use.
    """

    def __init__(self, devices: Sequence[torch.device] | None = None) -> None:
        if devices is None:
            count = torch.cuda.device_count() if torch.cuda.is_initialized() else 0  # type: ignore[no-untyped-call]
            indices = list(range(count))
        else:
            cuda = [d for d in devices if d.type == "cuda"]
            indices = [torch.cuda.current_device() if d.index is None else d.index for d in cuda]
        self._cpu = torch.get_rng_state()
        self._cuda = {i: torch.cuda.get_rng_state(i) for i in dict.fromkeys(indices)}

    def restore(self) -> None:
        """Make the generators continue from here."""
        torch.set_rng_state(self._cpu)
        for index, state in self._cuda.items():
            torch.cuda.set_rng_state(state, index)


class Replay:
    """Evaluations under the same circumstances.

    Buffers are copied before an evaluation and written back after it: those of `module` where it
    is given; otherwise those of every module whose forward is called, found by a hook on all
    modules. What a closure changes in other ways (a module's `forward` called directly, attributes
    that are no buffers) is not seen. The hook does not go well with `torch.compile`, which warns.

    Args:
        start: the generators' state that every evaluation starts from; None: the present one.
        devices: as `RandomState`.
        module: that holds every module of the closure; None: not known.
    """

    def __init__(
        self,
        start: RandomState | None = None,
        devices: Sequence[torch.device] | None = None,
        module: nn.Module | None = None,
    ) -> None:
        self._now = RandomState(devices)
        self._start = start or self._now
        self._module = module
        self._seen: dict[tuple[int, str], tuple[nn.Module, Tensor, Tensor]] = {}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Around one evaluation."""
        self._start.restore()
        hook = None
        if self._module is None:
            hook = register_module_forward_pre_hook(self._remember)
        else:
            for module in self._module.modules():
                self._remember(module)
        try:
            yield
        finally:
            if hook is not None:
                hook.remove()
            self._put_back()
            self._now.restore()

    def _remember(self, module: nn.Module, _: Any = None) -> None:
        for name, buffer in module._buffers.items():
            if buffer is not None and (id(module), name) not in self._seen:
                self._seen[id(module), name] = module, buffer, buffer.clone()

    @torch.no_grad()
    def _put_back(self) -> None:
        for (_, name), (module, buffer, value) in self._seen.items():
            # Not asked whether it changed: BatchNorm writes without counting a version. By .data,
            # because nothing that autograd may have saved is another now.
            buffer.data.copy_(value)
            if module._buffers.get(name) is not buffer:
                module._buffers[name] = buffer
        self._seen = {}

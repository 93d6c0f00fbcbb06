"""The same circumstances for every evaluation of a closure: random numbers and module buffers.

Losses at two points can be compared only if nothing but the parameters differs. `Replay` starts
every evaluation from the same state of torch's random number generators, so that dropout draws the
same masks, and puts back every buffer that a module's forward changed: running statistics of
BatchNorm, the vectors of spectral norm, counters. Afterwards generators and buffers are as if
nothing had been evaluated.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

Result = TypeVar("Result")


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


def _is_compiled(module: nn.Module) -> bool:
    """Whether a module came from torch.compile(module), or module.compile() was called."""
    return module._compiled_call_impl is not None or isinstance(
        module, torch._dynamo.eval_frame.OptimizedModule
    )


class Replay:
    """Evaluations under the same circumstances.

    Buffers are copied before an evaluation and written back after it, and tensors that a module's
    own hooks keep in attributes are the same ones again: those of `module` where it
    is given; otherwise those of every module whose forward is called, found by a hook on all
    modules. What a closure changes in other ways (a module's `forward` called directly, attributes
    that are no buffers) is not seen. Modules that other threads call are left alone; torch's
    generators belong to the process, and what another thread draws meanwhile is drawn again. The
    hook does not go well with `torch.compile`, which warns.

    Args:
        start: the generators' state that every evaluation starts from; None: the present one.
        devices: as `RandomState`.
        module: that holds every module of the closure; None: not known.

    Raises:
        RuntimeError: by an evaluation, of a compiled module whose weights the compiler freezes.
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
        self._attributes: dict[nn.Module, dict[str, Tensor]] = {}
        self._hook: RemovableHandle | None = None
        inductor: Any = sys.modules.get("torch._inductor.config")
        self._freezes = inductor is not None and inductor.freezing
        self._thread = get_ident()

    def run(self, compute: Callable[[], Result]) -> Result:
        """One evaluation; an interrupt (Ctrl-C) leaves nothing behind, wherever it comes."""
        try:
            try:
                self.begin()
                return compute()
            finally:
                self.end()
        except BaseException:
            self.end()  # the interrupt may have come in the line above
            raise

    def begin(self) -> None:
        """Before an evaluation."""
        self._start.restore()
        if self._module is None:
            self._hook = register_module_forward_pre_hook(self._remember)
        else:
            for module in self._module.modules():
                self._remember(module)

    def end(self) -> None:
        """After an evaluation; called again it changes nothing."""
        if self._hook is not None:
            self._hook.remove()
        if self._seen or self._attributes:
            self._put_back()
        self._now.restore()

    def _remember(self, module: nn.Module, _: Any = None) -> None:
        if self._freezes and _is_compiled(module) and not self._elsewhere():
            raise RuntimeError(
                "torch._inductor.config.freezing must be False where a closure calls a compiled "
                f"module ({type(module).__name__}): with it the compiler keeps the weights as they "
                "were when it first computed without gradients, and no displaced one is seen"
            )
        parallel = isinstance(module, nn.DataParallel)
        if not (module._buffers or module._forward_pre_hooks or parallel):
            return
        if self._elsewhere():
            return
        # The replicas of DataParallel run in threads of their own, with the module's buffers.
        for part in module.modules() if parallel else (module,):
            for name, buffer in part._buffers.items():
                if buffer is not None and (id(part), name) not in self._seen:
                    self._seen[id(part), name] = part, buffer, buffer.clone()
            if part._forward_pre_hooks and part not in self._attributes:
                # Old-style weight_norm and spectral_norm keep the weight that they computed here.
                tensors = {k: v for k, v in vars(part).items() if isinstance(v, Tensor)}
                self._attributes[part] = tensors

    def _elsewhere(self) -> bool:
        """Whether this is a model that another thread trains; torch.compile cannot trace that."""
        return not torch.compiler.is_compiling() and get_ident() != self._thread

    @torch.no_grad()
    def _put_back(self) -> None:
        for (_, name), (module, buffer, value) in self._seen.items():
            # Not asked whether it changed: BatchNorm writes without counting a version. By .data,
            # because nothing that autograd may have saved is another now.
            buffer.data.copy_(value)
            if module._buffers.get(name) is not buffer:
                module._buffers[name] = buffer
        for module, tensors in self._attributes.items():
            vars(module).update(tensors)
        self._seen, self._attributes = {}, {}

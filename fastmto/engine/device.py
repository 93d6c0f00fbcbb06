"""What the host does beside a GPU without waiting for it, and beside a compiler."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Method = TypeVar("Method", bound=Callable[..., Any])


class _Uncompiled:
    """A method until the class that has it is complete."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method

    def __set_name__(self, owner: type, name: str) -> None:
        setattr(owner, name, self._method)
        _uncompiled.append((owner, name, self._method))


_uncompiled: list[tuple[type, str, Callable[..., Any]]] = []


def uncompiled(method: Method) -> Method:
    """Marks a method at which torch.compile ends one graph and begins the next.

    For what walks the autograd graph or keeps books in Python, neither of which can be traced, and
    for what writes to memory that parameters show: traced together with a use of these parameters,
    torch 2.13 fails ("non-differentiable view input mutations").

    A class with such methods calls `tell_compiler` first thing when an object is built.
    """
    return cast(Method, _Uncompiled(method))


def tell_compiler() -> None:
    """Have torch.compile leave alone what is marked `uncompiled`.

    Not at import: the compiler's own import takes seconds, and torch's optimizers import it when
    they are built. Not later: then it could happen within what is compiled, and torch's optimizers
    have wrapped their `step` by then.
    """
    while _uncompiled:
        owner, name, method = _uncompiled.pop()
        setattr(owner, name, _boundary(method))


def _boundary(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that is called as it is, unless the compiler is at work around the call."""
    disable: Any = torch.compiler.disable
    reason = "it keeps books in Python"
    apart = disable(method, reason=reason)
    # None outside of what is compiled: then nothing has to be switched off, which costs as much as
    # a small model's layer.
    at_work: Any = torch._C._dynamo.eval_frame.get_eval_frame_callback

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if at_work() is None:
            return method(*args, **kwargs)
        return apart(*args, **kwargs)

    boundary: Callable[..., Any] = disable(call, recursive=False, reason=reason)
    return boundary


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which a GPU is torch's current one; it costs little where it is already."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the device's current stream."""
    if device.type != "cuda":
        return False
    with current(device):
        return torch.cuda.is_current_stream_capturing()


def upload(target: Tensor, values: object) -> None:
    """target <- values of the host, without waiting for the device.

    Raises:
        RuntimeError: while a CUDA graph is captured, which would replay these values for ever.
    """
    on_gpu = target.device.type == "cuda"
    if capturing(target.device):
        raise RuntimeError(
            "learning rates, hyperparameters and the set of tasks must not change in the step that "
            "is captured: make one such step before the capture"
        )
    # From pinned memory, which torch keeps until the copy is over.
    target.copy_(torch.tensor(values, dtype=target.dtype, pin_memory=on_gpu), non_blocking=True)


class Constants:
    """Short vectors of the host's, brought to a device once.

    The last `MOST` are kept, and for good those that a CUDA graph was captured with: it goes on
    reading their memory.

    Args:
        dtype: of the vectors on the device.
    """

    MOST = 256

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._recent: dict[tuple[torch.device, tuple[float, ...]], Tensor] = {}
        self._captured: dict[tuple[torch.device, tuple[float, ...]], Tensor] = {}

    def __call__(self, values: Iterable[float], device: torch.device) -> Tensor:
        """The vector (n,) on the device; not to be written.

        Raises:
            RuntimeError: a new vector, while a CUDA graph is captured.
        """
        key = device, tuple(values)
        vector = self._captured.get(key, self._recent.get(key))
        if vector is None:
            vector = torch.empty(len(key[1]), dtype=self._dtype, device=device)
            upload(vector, key[1])
            if len(self._recent) >= self.MOST:
                self._recent.clear()
            self._recent[key] = vector
        if capturing(device):
            self._captured[key] = vector
        return vector

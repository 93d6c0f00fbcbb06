"""What the host does beside a GPU without waiting for it, and beside a compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

Args = ParamSpec("Args")
Returned = TypeVar("Returned")


class Uncompiled(Generic[Args, Returned]):
    """A method at which torch.compile ends one graph and begins the next.

    For what walks the autograd graph or keeps books in Python, neither of which can be traced, and
    for what writes to memory that parameters show: traced together with a use of these parameters,
    torch 2.13 fails ("non-differentiable view input mutations").

    Decorates; a class with such methods calls `Uncompiled.prepare()` when it is built, outside of
    what is compiled. Not at import: the compiler's own import takes seconds, and torch's optimizers
    import it when they are built.
    """

    _all: ClassVar[list[Uncompiled[Any, Any]]] = []

    def __init__(self, function: Callable[Args, Returned]) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._prepared = False
        self._all.append(self)

    @classmethod
    def prepare(cls) -> None:
        """Tell the compiler of all of them."""
        disable: Any = torch.compiler.disable
        for one in cls._all:
            if not one._prepared:
                one._function = disable(one._function, reason="it keeps books in Python")
                one._prepared = True

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        return self if owner is None else functools.partial(self._function, owner)

    def __call__(self, *args: Args.args, **options: Args.kwargs) -> Returned:
        return self._function(*args, **options)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the device's current stream."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
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

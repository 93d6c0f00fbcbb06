"""How an op becomes a torch operator with a backend for every device."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar, cast

import torch

#: Device type -> module of this package and key of torch's dispatcher; AMD's GPUs are "cuda" too.
#: A new backend is a file and a row here.
BACKENDS = {"cpu": ("cpu", "CPU"), "cuda": ("triton.backend", "CUDA")}
#: All ops by name.
OPS: dict[str, Any] = {}

Function = TypeVar("Function", bound=Callable[..., None])
_library: Any = torch.library.Library("fastmto", "DEF")  # type: ignore[no-untyped-call]


@functools.cache
def _module(device_type: str) -> ModuleType:
    return importlib.import_module(f".{BACKENDS[device_type][0]}", __package__)


def backend(device: torch.device) -> ModuleType:
    """The module that serves tensors on `device`.

    Raises:
        ValueError: no backend for this type of device.
        ImportError: the backend needs Triton, which is not installed.
    """
    if device.type not in BACKENDS:
        raise ValueError(f"device must be one of {', '.join(BACKENDS)}, got {device}")
    return _module(device.type)


def op(
    *writes: str, scratch: bool = False, unsigned: tuple[str, ...] = ()
) -> Callable[[Function], Function]:
    """Make `torch.ops.fastmto.<name>` of a function that is a signature and a docstring.

    Args:
        writes: the arguments that the op writes.
        scratch: it keeps scratch memory from call to call, which must not come from the pool of a
            CUDA graph that torch.compile makes.
        unsigned: keyword arguments that are natural numbers below 2^64, which an operator's
            integers of 64 bits with a sign cannot say.
    """

    def register(function: Function) -> Function:
        name = function.__name__
        tags = [torch.Tag.needs_exact_strides]
        if scratch and hasattr(torch.Tag, "cudagraph_unsafe"):
            tags.append(torch.Tag.cudagraph_unsafe)
        schema = torch.library.infer_schema(function, mutates_args=writes)
        # Numbers of rules and seeds are never symbols of a compiled graph.
        _library.define(name + schema.replace("SymInt", "int"), tags=tuple(tags))
        for device_type, (_, key) in BACKENDS.items():

            def call(*args: Any, _device_type: str = device_type, **options: Any) -> None:
                for k in unsigned:
                    if options.get(k):
                        options[k] %= 1 << 64
                getattr(_module(_device_type), name)(*args, **options)

            _library.impl(name, call, key)
        torch.library.register_fake(f"fastmto::{name}", lambda *args, **options: None, lib=_library)
        OPS[name] = operator = getattr(torch.ops.fastmto, name).default
        if not unsigned:
            operator.__doc__ = function.__doc__
            return cast(Function, operator)

        @functools.wraps(function)
        def signed(*args: Any, **options: Any) -> None:
            for k in unsigned:
                if options.get(k):
                    options[k] = _signed(k, options[k])
            operator(*args, **options)

        return cast(Function, signed)

    return register


def _signed(name: str, value: int) -> int:
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{name} must be an integer from 0 to 2^64 - 1, got {value}")
    return value - (1 << 64) if value >> 63 else value

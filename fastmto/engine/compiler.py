"""What is left to Python when torch.compile is at work."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

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

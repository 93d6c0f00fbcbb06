"""A guard against reading what a device computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
#: What hands numbers to the host, or has a result whose shape depends on them.
READING = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.unique_dim.default,
    aten._unique2.default,
}


class NothingIsRead(TorchDispatchMode):
    """Within it an operation that would make the host wait for a GPU raises AssertionError.

    Copies to the CPU cannot be told on a CPU; the tests on a GPU have torch tell them.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping | None = None
    ) -> Any:
        assert func not in READING, f"{func} reads from the device"
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            kinds = {None if i is None else i.dtype for i in args[1]}
            assert torch.bool not in kinds, f"{func} with a mask reads from the device"
        return func(*args, **(kwargs or {}))


class NothingGoesToTheHost(TorchFunctionMode):
    """Refuses calls that would wait for a device, as copies from the host's memory do, and leave
    no trace below Python where the device is a CPU. What goes through pinned memory may."""

    WAITS = (
        torch.tensor,
        torch.as_tensor,
        *(
            getattr(Tensor, name)
            for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")
        ),
    )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping | None = None
    ) -> Any:
        pinned = func is torch.tensor and "pin_memory" in (kwargs or {})
        assert pinned or func not in self.WAITS, f"{func} waits for the device"
        assert "cpu" not in args[1:], f"{func} to the host"
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_is_read(reads: bool = False) -> Iterator[None]:
    """Both guards; neither if it `reads`."""
    if reads:
        yield
        return
    with NothingIsRead(), NothingGoesToTheHost():
        yield

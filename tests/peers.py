"""The peer packages as the integration tests need them; tests skip where one is missing."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

PAGE = Path(__file__).resolve().parent.parent / "docs" / "integrations.md"


def documented(module: str) -> str:
    """The example of docs/integrations.md that imports a module, which needs its peer."""
    blocks = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    (block,) = [block for block in blocks if module in block]
    return block


def torchjd() -> ModuleType:
    """TorchJD, with the integration importable."""
    return pytest.importorskip("torchjd", reason="the torchjd extra is not installed")


def libmtl() -> ModuleType:
    """LibMTL 1.1.5 as published, importable.

    It takes one function from a module that torchvision dropped in 0.13, for the weights of
    ResNets that no test needs: an empty module stands in for it during the import.
    """
    if find_spec("LibMTL") is None:
        pytest.skip("the libmtl extra is not installed")
    if "LibMTL" not in sys.modules:
        names = ("torchvision", "torchvision.models", "torchvision.models.utils")
        before = {name: sys.modules.get(name) for name in names}
        for name in names:
            sys.modules[name] = types.ModuleType(name)
        sys.modules[names[-1]].load_state_dict_from_url = None
        try:
            import LibMTL  # noqa: F401
        finally:
            for name, module in before.items():
                if module is None:
                    del sys.modules[name]
                else:
                    sys.modules[name] = module
    return sys.modules["LibMTL"]


class CpuTorch:
    """`torch` for LibMTL's trainer, which asks for "cuda:0" whatever the machine has."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def device(name: str) -> torch.device:
        return torch.device("cpu")


def keep_grads(model: Any) -> None:
    """LibMTL 1.1.5 writes into `.grad` after `zero_grad`, which before torch 2 kept it."""
    for parameter in model.get_share_params():
        if parameter.grad is not None:
            parameter.grad.zero_()


class Loader:
    """Batches as LibMTL 1.1.5 reads them: its trainer calls `.next()` of the iterator."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Batches:
        return Batches(self.batches)


class Batches:
    def __init__(self, batches: list[Any]) -> None:
        self._left = iter(batches)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._left)

    next = __next__


class Vision(ModuleType):
    """A torchvision of which only names are wanted."""

    __version__ = "0"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


@contextmanager
def torchvision(names: bool) -> Iterator[None]:
    """A CUDA build of torchvision beside a CPU build of torch fails when it is imported, which ends
    other packages' imports: it is hidden, or replaced by names."""
    with pytest.MonkeyPatch.context() as patch:
        for part in ("", ".transforms", ".models") if names else ("",):
            module = f"torchvision{part}"
            patch.setitem(sys.modules, module, Vision(module) if names else None)
        yield


def lightning() -> ModuleType:
    """Lightning, whose metrics want no more of torchvision than names."""
    with torchvision(names=True):
        return pytest.importorskip("lightning", reason="the ecosystem extra is not installed")

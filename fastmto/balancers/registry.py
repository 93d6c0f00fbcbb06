"""Balancers by name: `get`, `method` and `available`."""

from __future__ import annotations

from typing import Any, cast

from .. import balancers
from ..methods import available, find
from . import Balancer

__all__ = ["available", "get", "method"]


def get(name: str, n_tasks: int | None = None, **options: Any) -> Balancer:
    """A balancer by name.

    Args:
        name: one of `available()`; upper case, "-" and "_" do not matter, and the names that
            TorchJD, LibMTL and the nash-mtl family use are known as well ("UW", "scaleinvls",
            "Nash_MTL", "EW", ...). "imtl" is both parts of the paper; the nash-mtl family's is
            "imtl_g".
        n_tasks: T; None: found at the first backward.
        options: the method's own arguments.

    Raises:
        ValueError: an unknown name.
        TypeError: an argument that the method does not have.

    Example: `balancer = fastmto.get("nashmtl", n_tasks=2, update_weights_every=10)`.
    """
    return method(name)(n_tasks, **options)


def method(name: str) -> type[Balancer]:
    """The class of a balancer by name; as `get`."""
    return cast(type[Balancer], getattr(balancers, find(name).name))

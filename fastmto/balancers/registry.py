"""Balancers by name: `get` and `available`."""

from __future__ import annotations

from typing import Any, cast

from .. import balancers
from . import Balancer

#: Key of a method -> its class in `fastmto.balancers`.
METHODS = {
    "ls": "LS",
    "si": "SI",
    "rlw": "RLW",
    "dwa": "DWA",
    "uncertainty": "Uncertainty",
    "banditmtl": "BanditMTL",
    "imtl_l": "IMTLL",
    "gradnorm": "GradNorm",
    "famo": "FAMO",
    "ldc_mtl": "LDCMTL",
    "mgda": "MGDA",
    "mgda_ub": "MGDAUB",
    "pcgrad": "PCGrad",
    "graddrop": "GradDrop",
    "cagrad": "CAGrad",
    "imtl_g": "IMTLG",
    "imtl": "IMTL",
    "nashmtl": "NashMTL",
    "upgrad": "UPGrad",
    "dualproj": "DualProj",
    "fairgrad": "FairGrad",
    "aligned_mtl": "AlignedMTL",
    "db_mtl": "DBMTL",
    "pub": "PUB",
    "marigold": "MARIGOLD",
}

#: Other libraries' spellings, without case, "-" and "_" -> key. Spellings that differ from a key
#: only in those need no entry.
ALIASES = {
    "ew": "ls",
    "equal": "ls",
    "sum": "ls",
    "scaleinvls": "si",
    "random": "rlw",
    "uw": "uncertainty",
    "nash": "nashmtl",
    "aligned": "aligned_mtl",
    "ldc": "ldc_mtl",
}


def available() -> list[str]:
    """The keys that `get` takes."""
    return list(METHODS)


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
    """
    return method(name)(n_tasks, **options)


def method(name: str) -> type[Balancer]:
    """The class of a balancer by name; as `get`."""
    if not isinstance(name, str):
        raise ValueError(f"name must be a string, got {name!r}")
    plain = _plain(name)
    key = ALIASES.get(plain) or {_plain(key): key for key in METHODS}.get(plain)
    if key is None:
        raise ValueError(f"name must be one of {', '.join(METHODS)}, got {name!r}")
    return cast(type[Balancer], getattr(balancers, METHODS[key]))


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")

"""Weightings: Gram matrix of the tasks in, task weights out; one class a file.

A weighting is any callable Gram (T, T) -> weights (T,). The classes here take a Gram matrix of
any floating dtype and device and give weights like it, computed in float64.
"""

from __future__ import annotations

from .aligned_mtl import AlignedMTL
from .bargaining import Bargaining
from .base import Weighting
from .cagrad import CAGrad
from .constant import Constant, Equal
from .dualproj import DualProj
from .fairgrad import FairGrad
from .imtl_g import IMTLG
from .mgda import MGDA
from .nashmtl import NashMTL
from .pcgrad import PCGrad
from .upgrad import UPGrad

__all__ = [
    "IMTLG",
    "MGDA",
    "AlignedMTL",
    "Bargaining",
    "CAGrad",
    "Constant",
    "DualProj",
    "Equal",
    "FairGrad",
    "NashMTL",
    "PCGrad",
    "UPGrad",
    "Weighting",
]

"""Weightings: Gram matrix of the tasks in, task weights out; one class a file.

    weights = fastmto.weightings.CAGrad(c=0.4)(gram)        # (T, T) -> (T,), same dtype and device

The direction they stand for is sum_i weights_i g_i of the rows g_i whose Gram matrix it is:
gradients (the balancers), or updates (`fastmto.PUB(weighting=...)`).
"""

from __future__ import annotations

from .aligned_mtl import AlignedMTL
from .bargaining import Bargaining
from .base import DeviceSolver, SolverWeighting, Weighting
from .cagrad import CAGrad
from .constant import Constant, Equal
from .dualproj import DualProj
from .fairgrad import FairGrad
from .imtl_g import IMTLG
from .mgda import MGDA
from .named import Function, as_weighting
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
    "DeviceSolver",
    "DualProj",
    "Equal",
    "FairGrad",
    "Function",
    "NashMTL",
    "PCGrad",
    "SolverWeighting",
    "UPGrad",
    "Weighting",
    "as_weighting",
]

"""Balancers: one call in place of `loss.backward()`, any torch optimizer after it."""

from __future__ import annotations

from .aligned_mtl import AlignedMTL
from .base import Balancer, Info
from .cagrad import CAGrad
from .db_mtl import DBMTL
from .dualproj import DualProj
from .fairgrad import FairGrad
from .graddrop import GradDrop
from .gradient_balancer import GradientBalancer, GramBalancer
from .imtl import IMTL
from .imtl_g import IMTLG
from .mgda import MGDA
from .mgda_ub import MGDAUB
from .nashmtl import NashMTL
from .pcgrad import PCGrad
from .pub import PUB
from .upgrad import UPGrad

__all__ = [
    "DBMTL",
    "IMTL",
    "IMTLG",
    "MGDA",
    "MGDAUB",
    "PUB",
    "AlignedMTL",
    "Balancer",
    "CAGrad",
    "DualProj",
    "FairGrad",
    "GradDrop",
    "GradientBalancer",
    "GramBalancer",
    "Info",
    "NashMTL",
    "PCGrad",
    "UPGrad",
]

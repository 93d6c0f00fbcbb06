"""Balancers: one call in place of `loss.backward()`, any torch optimizer after it."""

from __future__ import annotations

from ..engine.balancer import Balancer, Info
from ..marigold.balancer import MARIGOLD, MarigoldInfo
from .aligned_mtl import AlignedMTL
from .banditmtl import BanditMTL
from .cagrad import CAGrad
from .db_mtl import DBMTL
from .dualproj import DualProj
from .dwa import DWA
from .fairgrad import FairGrad
from .famo import FAMO
from .graddrop import GradDrop
from .gradient_balancer import GradientBalancer, GramBalancer
from .gradnorm import GradNorm
from .imtl import IMTL
from .imtl_g import IMTLG
from .imtl_l import IMTLL
from .ldc_mtl import LDCMTL
from .loss_balancer import LearningBalancer, LossBalancer
from .ls import LS
from .mgda import MGDA
from .mgda_ub import MGDAUB
from .nashmtl import NashMTL
from .pcgrad import PCGrad
from .pub import PUB
from .rlw import RLW
from .si import SI
from .uncertainty import Uncertainty
from .upgrad import UPGrad

__all__ = [
    "DBMTL",
    "DWA",
    "FAMO",
    "IMTL",
    "IMTLG",
    "IMTLL",
    "LDCMTL",
    "LS",
    "MARIGOLD",
    "MGDA",
    "MGDAUB",
    "PUB",
    "RLW",
    "SI",
    "AlignedMTL",
    "Balancer",
    "BanditMTL",
    "CAGrad",
    "DualProj",
    "FairGrad",
    "GradDrop",
    "GradNorm",
    "GradientBalancer",
    "GramBalancer",
    "Info",
    "LearningBalancer",
    "LossBalancer",
    "MarigoldInfo",
    "NashMTL",
    "PCGrad",
    "UPGrad",
    "Uncertainty",
]

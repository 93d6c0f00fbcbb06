"""Balancers: one call in place of `loss.backward()`, any torch optimizer after it."""

from __future__ import annotations

from ..engine.balancer import Balancer
from ..engine.batch import Info
from ..marigold.balancer import MARIGOLD
from ..marigold.info import MarigoldInfo
from . import gram_methods
from .banditmtl import BanditMTL
from .db_mtl import DBMTL
from .dwa import DWA
from .famo import FAMO
from .graddrop import GradDrop
from .gradient_balancer import GradientBalancer
from .gradnorm import GradNorm
from .gram_balancer import GramBalancer
from .gram_methods import *  # noqa: F403
from .imtl import IMTL
from .imtl_l import IMTLL
from .ldc_mtl import LDCMTL
from .loss_balancer import LearningBalancer, LossBalancer
from .ls import LS
from .pub import PUB
from .rlw import RLW
from .si import SI
from .uncertainty import Uncertainty

__all__ = [
    "DBMTL",
    "DWA",
    "FAMO",
    "IMTL",
    "IMTLL",
    "LDCMTL",
    "LS",
    "MARIGOLD",
    "PUB",
    "RLW",
    "SI",
    "Balancer",
    "BanditMTL",
    "GradDrop",
    "GradNorm",
    "GradientBalancer",
    "GramBalancer",
    "Info",
    "LearningBalancer",
    "LossBalancer",
    "MarigoldInfo",
    "Uncertainty",
]
__all__ += gram_methods.__all__

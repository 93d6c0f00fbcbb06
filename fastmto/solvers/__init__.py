"""Small problems on the Gram matrix of the tasks: Gram in, weights out.

All return a `Result`. The fastest way to call them is with a contiguous float64 or float32 CPU
tensor or float64 array as the Gram matrix, and None or such arrays as vectors; see `convert`.

`oracle` (slow references, an optional extra) is a submodule and not imported here.
"""

from __future__ import annotations

from ._solvers import STATUSES, Result
from .aligned_mtl import aligned_mtl
from .bargaining import bargaining, ccp_step
from .cagrad import cagrad
from .dual_cone import dual_cone, upgrad
from .fairgrad import fairgrad
from .imtl_g import imtl_g
from .mgda import mgda
from .pcgrad import pcgrad
from .simplex import simplex_projection

__all__ = [
    "STATUSES",
    "Result",
    "aligned_mtl",
    "bargaining",
    "cagrad",
    "ccp_step",
    "dual_cone",
    "fairgrad",
    "imtl_g",
    "mgda",
    "pcgrad",
    "simplex_projection",
    "upgrad",
]

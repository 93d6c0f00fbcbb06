"""Small problems on the Gram matrix of the tasks: Gram in, weights out.

`oracle` (slow references, an optional extra) is a submodule and not imported here.
"""

from __future__ import annotations

from .._solvers import STATUSES, Result
from .bargaining import bargaining, ccp_step

__all__ = ["STATUSES", "Result", "bargaining", "ccp_step"]

"""The two-task toy problem of the literature: formulas, descents, a table of all methods."""

from .descent import CUT_LENGTHS, OPTIONS, Adam, Trajectory, method, run
from .problem import FRONT, OPTIMUM, OPTIMUM_POINT, SHIFT, STARTS, ShiftedLosses, losses
from .rows import REFERENCE, Row, is_reference, processors, run_all

__all__ = [
    "CUT_LENGTHS", "FRONT", "OPTIMUM", "OPTIMUM_POINT", "OPTIONS", "REFERENCE", "SHIFT", "STARTS",
    "Adam", "Row", "ShiftedLosses", "Trajectory", "is_reference", "losses", "method", "processors",
    "run", "run_all",
]  # fmt: skip

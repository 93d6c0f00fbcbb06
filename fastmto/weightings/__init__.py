"""Weightings: Gram matrix of the tasks in, task weights out; one class a file.

A weighting is any callable Gram (T, T) float64 -> weights (T,). The classes here are those with
hyperparameters or state.
"""

from __future__ import annotations

from .bargaining import Bargaining
from .base import Weighting
from .constant import Constant, Equal
from .nashmtl import NashMTL

__all__ = ["Bargaining", "Constant", "Equal", "NashMTL", "Weighting"]

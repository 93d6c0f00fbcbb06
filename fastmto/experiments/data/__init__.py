"""Data sets as tensors: embedded digits and Census-Income KDD."""

from __future__ import annotations

from .base import MultiTaskData, Split, Task
from .census import load_census
from .digits import load_digits

__all__ = ["MultiTaskData", "Split", "Task", "load_census", "load_digits"]

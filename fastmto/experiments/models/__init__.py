"""Small multi-task models that know their shared and their task-specific parameters."""

from __future__ import annotations

from .base import MultiTaskModel, TabularEncoder
from .mmoe import MMOE
from .ple import PLE
from .shared_bottom import SharedBottom

__all__ = ["MMOE", "PLE", "MultiTaskModel", "SharedBottom", "TabularEncoder"]

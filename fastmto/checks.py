"""Checks of arguments, with messages that name the argument."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a value that is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_initialized(name: str, p: torch.Tensor) -> None:
    """Refuse a parameter of a lazy module that has not seen a batch yet."""
    if torch.nn.parameter.is_lazy(p):
        raise ValueError(
            f"{name} must have a shape, got an {type(p).__name__} of a lazy module: run one "
            "forward pass before it is given to an optimizer or a balancer"
        )


def check_scaler(scaler: object) -> torch.amp.GradScaler | None:
    """A GradScaler that is in use; None for None and for one that is disabled."""
    if scaler is None:
        return None
    if not isinstance(scaler, torch.amp.GradScaler):
        raise ValueError(
            f"scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__}"
        )
    return scaler if scaler.is_enabled() else None


def check_number(
    name: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False
) -> float:
    """`value` as a float, refused outside [low, high] ((low, high] with `open_low`)."""
    inside = isinstance(value, int | float) and math.isfinite(value)
    if not inside or not low <= value <= high or (open_low and value == low):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}]"
        raise ValueError(f"{name} must be a finite number in {interval}, got {value!r}")
    return float(value)

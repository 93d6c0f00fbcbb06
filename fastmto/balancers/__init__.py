"""Balancers: one call in place of `loss.backward()`, any torch optimizer after it."""

from __future__ import annotations

from .base import Balancer, Info

__all__ = ["Balancer", "Info"]

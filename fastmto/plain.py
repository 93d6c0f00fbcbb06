"""The plain rule on single parameters: task-specific ones in every balancer, all in ClippyAdam."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import Parameter

from . import ops
from .flat import as_vector, laid_like
from .rules import Clippy, Rule


class GroupRules:
    """The rule with a param group's hyperparameters, built anew only when they change."""

    def __init__(self, rule: Rule) -> None:
        self._type = type(rule)
        self._names = [field.name for field in dataclasses.fields(rule)]
        self._known: dict[tuple[Any, ...], Rule] = {}

    def __call__(self, group: Mapping[str, Any]) -> Rule:
        values = tuple(tuple(v) if isinstance(v := group[n], list) else v for n in self._names)
        if values not in self._known:
            self._known[values] = self._type(*values)
        return self._known[values]


class PlainSteps:
    """The plain rule on single parameters with their `.grad`: T = 1, weight 1.

    Args:
        backend: the ops of the parameters' device.
        clippy: bound the updates by it.
        device: of the parameters.
    """

    def __init__(self, backend: ops.Backend, clippy: Clippy | None, device: torch.device) -> None:
        self._ops = backend
        self._clippy = clippy
        self._one = torch.ones(1, dtype=torch.float64, device=device)
        self._sigma = torch.ones(1, 1, dtype=torch.float64, device=device)
        self._gram = torch.zeros(1, 1, dtype=torch.float64, device=device)

    def step(
        self, rule: Rule, group: Mapping[str, Any], p: Parameter, state: dict[str, Any]
    ) -> None:
        """Move `p` and its `state` (filled at the first step) by one step of `rule`."""
        assert p.grad is not None
        if not state:
            dtype = state_dtype(p.dtype)
            state["step"] = 0
            for name in rule.state_names:
                state[name] = torch.full_like(p, rule.initial(name), dtype=dtype)
        state["step"] += 1
        arguments = rule, state["step"], as_vector(laid_like(p.grad, p))[None]
        moments = tuple(as_vector(state[name]) for name in rule.state_names)
        vector, lr = as_vector(p), float(group["lr"])
        segments = sigma = None
        if self._clippy is not None:
            segments, sigma = torch.tensor([0, p.numel()]), self._sigma
            self._ops.search(
                *arguments,
                moments,
                self._gram,
                clippy=self._clippy,
                params=vector,
                lr=lr,
                segments=segments,
                sigma=sigma,
            )
        decay = float(group["weight_decay"])
        self._ops.apply(
            *arguments, moments, vector, self._one, lr, decay, segments=segments, sigma=sigma
        )

    def adopt(self, p: Parameter, saved: Mapping[str, Any]) -> dict[str, Any]:
        """A saved state of `p` as `step` wants it: own memory, laid out like `p`."""
        state: dict[str, Any] = {}
        for name, value in saved.items():
            if name == "step":
                state[name] = int(value)
            else:
                state[name] = torch.empty_like(p, dtype=state_dtype(p.dtype)).copy_(value)
        return state


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Moments are float32, or float64 for float64 parameters."""
    return torch.float64 if dtype == torch.float64 else torch.float32

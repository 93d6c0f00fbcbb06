"""A rule with a param group's hyperparameters, and the plain rule on single parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import ops
from .errors import NonFiniteError
from .flat import as_vector, laid_like
from .rules import Clippy, Rule


class GroupRules:
    """The rule with a param group's hyperparameters, built anew only when they change."""

    def __init__(self, rule: Rule) -> None:
        self._type = type(rule)
        self._names = [field.name for field in dataclasses.fields(rule)]
        self._known: dict[tuple[Any, ...], Rule] = {}

    def __call__(self, group: Mapping[str, Any]) -> Rule:
        """The rule of `group`.

        Raises:
            ValueError: a hyperparameter is out of its range.
        """
        values = tuple(tuple(v) if isinstance(v := group[n], list) else v for n in self._names)
        rule = self._known.get(values)
        if rule is None:
            if len(self._known) > 64:  # a schedule makes a new one every step
                self._known.clear()
            rule = self._known[values] = self._type(*values)
        return rule


def check_state_names(rule: Rule, names: Collection[str]) -> None:
    """Refuse a rule that needs other moments than those it has been kept with.

    Raises:
        RuntimeError: a hyperparameter that decides which moments exist has been changed.
    """
    if tuple(names) != rule.state_names:
        raise RuntimeError(
            f"{rule} needs the moments {', '.join(rule.state_names)}, but the optimizer was built "
            f"with {', '.join(names)}: momentum and centered cannot be switched on or off later"
        )


class PlainSteps:
    """The plain rule on single parameters: T = 1, weight 1.

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

    def check(self, p: Parameter, grad: Tensor) -> None:
        """Refuse a gradient that `step` could not take.

        Raises:
            NonFiniteError: it is NaN, infinite or too large to be squared.
            RuntimeError: it is sparse.
        """
        named = f"the gradient of a parameter of shape {tuple(p.shape)}"
        if grad.layout is not torch.strided:
            raise RuntimeError(f"{named} is sparse ({grad.layout}): build it with sparse=False")
        if not self._ops.all_finite(as_vector(laid_like(grad, p))):
            raise NonFiniteError(f"{named} is not finite; the step was not made")

    def step(
        self,
        rule: Rule,
        group: Mapping[str, Any],
        p: Parameter,
        grad: Tensor,
        state: dict[str, Any],
    ) -> None:
        """Move `p` and its `state` (filled at the first step) by one step of `rule`."""
        if not state:
            state["step"] = 0
            for name in rule.state_names:
                state[name] = torch.full_like(
                    p, rule.initial(name), dtype=state_dtype(p.dtype), requires_grad=False
                )
        check_state_names(rule, [name for name in state if name != "step"])
        state["step"] += 1
        vector, lr = as_vector(p), float(group["lr"])
        arguments = (
            rule,
            state["step"],
            as_vector(laid_like(grad, p))[None],
            tuple(as_vector(state[name]) for name in rule.state_names),
        )
        segments = sigma = None
        if self._clippy is not None:
            segments, sigma = torch.tensor([0, p.numel()]), self._sigma
            self._ops.search(
                *arguments,
                self._gram,
                clippy=self._clippy,
                params=vector,
                lr=lr,
                segments=segments,
                sigma=sigma,
            )
        decay = float(group["weight_decay"])
        self._ops.apply(*arguments, vector, self._one, lr, decay, segments=segments, sigma=sigma)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Moments are float32, or float64 for float64 parameters."""
    return torch.float64 if dtype == torch.float64 else torch.float32

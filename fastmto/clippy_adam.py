"""ClippyAdam: Adam whose updates are bounded tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import ops
from .groups import Parameters, check_distinct, check_lr, groups_of
from .plain import GroupRules, PlainSteps
from .rules import Adam, Clippy


class ClippyAdam(torch.optim.Optimizer):
    """Adam with Clippy: a tensor's update shrinks until no element moves too far.

    Source: Clippy (Tang et al., arXiv 2302.09178), as PUB's baseline "ClippyAdam".

        sigma = min(1, min_j (lambda_rel |theta_j| + lambda_abs) / (lr |u_j|))
        theta <- (1 - lr weight_decay) theta - lr sigma u

    A plain torch optimizer: `loss.backward()`, `step()`. A step with a NaN or infinite gradient
    raises before anything moves.

    Args:
        params: parameters or param groups of one device.
        lr: learning rate, >= 0.
        betas, eps: as in `fastmto.rules.Adam`.
        weight_decay: decoupled.
        clippy: the bound's hyperparameters.

    Raises:
        ValueError: an argument out of its range, or a parameter that cannot be trained.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        clippy: Clippy | None = None,
    ) -> None:
        rule = Adam((betas[0], betas[1]), eps)
        check_lr(lr, weight_decay)
        groups = groups_of("params", params, None)
        self._rule, self._clippy = rule, clippy or Clippy()
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, **rule.hyperparameters()})
        self._build()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, with the checks of construction.

        Raises:
            ValueError: a parameter that cannot be trained, is listed twice or on another device.
        """
        (group,) = groups_of("params", [param_group], None)
        check_distinct([*self.param_groups, group])
        super().add_param_group(group)

    def _build(self) -> None:
        device = self.param_groups[0]["params"][0].device
        self._rules = GroupRules(self._rule)
        self._plain = PlainSteps(ops.on(device), self._clippy, device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a `.grad`.

        Args:
            closure: evaluated first, with grad enabled.

        Returns:
            What the closure returned.

        Raises:
            NonFiniteError: a gradient is NaN, infinite or too large to be squared.
            RuntimeError: a sparse gradient.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        jobs = [
            (self._rules(group), group, p, p.grad)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        for _, _, p, grad in jobs:
            self._plain.check(p, grad)
        for rule, group, p, grad in jobs:
            self._plain.step(rule, group, p, grad, self.state[p])
        torch.autograd.graph.increment_version([p for _, _, p, _ in jobs])
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "rule": self._rule, "clippy": self._clippy}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "rule" in state:
            self._rule, self._clippy = state.pop("rule"), state.pop("clippy")
        super().__setstate__(state)
        self._build()

"""ClippyAdam: Adam whose updates are bounded tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import ops
from ..engine.flat import as_vector, laid_like, state_dtype
from ..errors import NonFiniteError
from ..ops.device import Constants
from ..ops.rules import Adam, Clippy, Rule
from .group_rules import GroupRules, check_state_names
from .groups import Parameters, check_distinct, check_lr, groups_of


class ClippyAdam(torch.optim.Optimizer):
    """Adam with Clippy: a tensor's update shrinks until no element moves too far.

    Source: Clippy (Tang et al., arXiv 2302.09178), as PUB's baseline "ClippyAdam".

        sigma = min(1, min_j (lambda_rel |theta_j| + lambda_abs) / (lr |u_j|))
        theta <- (1 - lr weight_decay) theta - lr sigma u

    A plain torch optimizer: `loss.backward()`, `step()`. A step with a NaN or infinite gradient
    raises before anything moves, which is why a step synchronizes with a GPU once.

    Args:
        params: parameters or param groups of one device.
        lr: learning rate, >= 0.
        betas, eps: as in `fastmto.rules.Adam`.
        weight_decay: decoupled.
        clippy: the bound's hyperparameters.

    Raises:
        ValueError: an argument out of its range, or a parameter that cannot be trained.

    Example:
        >>> import torch, fastmto
        >>> layer = torch.nn.Linear(4, 1)
        >>> optimizer = fastmto.ClippyAdam(layer.parameters(), lr=1e-2)
        >>> layer(torch.ones(3, 4)).mean().backward()
        >>> optimizer.step()
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
        ops.backend(device)  # a device without one is refused here
        self._one = torch.ones(1, dtype=torch.float64, device=device)
        self._sigma = torch.ones(1, 1, dtype=torch.float64, device=device)
        self._gram = torch.zeros(1, 1, dtype=torch.float64, device=device)
        self._found = torch.zeros(1, dtype=torch.int32, device=device)
        self._segments = Constants(torch.int64)

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
        self._found.zero_()
        for _, group, p, grad in jobs:
            check_lr(group["lr"], group["weight_decay"])
            self._check(p, grad)
        if self._found.item():
            raise NonFiniteError(self._culprit([grad for _, _, _, grad in jobs]))
        numbers = [
            rule.numbers(self._count(rule, p), float(group["lr"]), float(group["weight_decay"]))
            for rule, group, p, _ in jobs
        ]
        rows = torch.tensor(numbers, dtype=torch.float64).to(self._found.device)
        for (rule, _, p, grad), row in zip(jobs, rows, strict=True):
            self._move(rule, row[None], p, grad)
        torch.autograd.graph.increment_version([p for _, _, p, _ in jobs])
        return result

    def _check(self, p: Parameter, grad: Tensor) -> None:
        """Refuse a sparse gradient; found if one is not finite."""
        if grad.layout is not torch.strided:
            raise RuntimeError(f"{_name(p)} is sparse ({grad.layout}): build it with sparse=False")
        ops.check(as_vector(laid_like(grad, p))[None], self._found)

    def _culprit(self, grads: Sequence[Tensor]) -> str:
        """Which gradient it was."""
        for grad in grads:
            self._found.zero_()
            ops.check(grad.detach().reshape(1, -1), self._found)
            if self._found.item():
                break
        return f"{_name(grad)} is not finite; the step was not made"

    def _count(self, rule: Rule, p: Parameter) -> int:
        """The number of the step being made of a parameter; its state is filled at the first."""
        state = self.state[p]
        if not state:
            state["step"] = 0
            for name in rule.state_names:
                state[name] = torch.full_like(
                    p, rule.initial(name), dtype=state_dtype(p.dtype), requires_grad=False
                )
        check_state_names(rule, [name for name in state if name != "step"])
        state["step"] += 1
        return int(state["step"])

    def _move(self, rule: Rule, numbers: Tensor, p: Parameter, grad: Tensor) -> None:
        """One step of one parameter and its moments."""
        segments = self._segments((0, p.numel()), p.device)
        grads = as_vector(laid_like(grad, p))[None]
        state = [as_vector(self.state[p][name]) for name in rule.state_names]
        clippy = (self._clippy.lambda_rel, self._clippy.lambda_abs)
        bounds = {"segments": segments, "sigma": self._sigma}
        params = as_vector(p)
        ops.update_gram(
            rule.kind, numbers, grads, state, self._gram, clippy=clippy, params=params, **bounds
        )
        ops.apply(rule.kind, numbers, grads, state, params, self._one, **bounds)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would round the moments to the parameters' dtype."""
        super().load_state_dict(state_dict)
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip(keys, params, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if name != "step":
                    own = torch.empty_like(p, dtype=state_dtype(p.dtype), requires_grad=False)
                    self.state[p][name] = own.copy_(value)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "rule": self._rule, "clippy": self._clippy}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "rule" in state:
            self._rule, self._clippy = state.pop("rule"), state.pop("clippy")
        super().__setstate__(state)
        self._build()


def _name(tensor: Tensor) -> str:
    return f"the gradient of a parameter of shape {tuple(tensor.shape)}"

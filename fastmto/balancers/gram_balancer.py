"""Gradient-level methods whose weights come from the Gram matrix alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..engine.batch import Batch
from ..engine.gradient_level import GradientLevel
from ..engine.search import Decision
from ..weightings import DeviceSolver, Weighting, as_weighting
from ..weightings.base import DecidesOnHost
from .gradient_balancer import GradientBalancer, GradientOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


class GramBalancer(DecidesOnHost, GradientBalancer):
    """Base of the methods whose weights come from the Gram matrix of the gradients.

    Args:
        weighting: a `fastmto.weightings.Weighting`, any callable Gram (n, n) -> weights (n,), or
            the name of a method in `fastmto.weightings`.
        n_tasks, options: as `GradientBalancer`.
    """

    STEPS = frozenset({"_decide", "_solve", "_join"})
    weighting: Weighting

    def __init__(
        self,
        weighting: Weighting | str | Callable[[Tensor], Tensor],
        n_tasks: int | None = None,
        **options: Unpack[GradientOptions],
    ) -> None:
        # A weighting that needs the losses is called with them by the method that has it.
        if not isinstance(weighting, Weighting):
            weighting = as_weighting(weighting)
        self.weighting = weighting
        super().__init__(n_tasks, **options)

    def reset(self) -> None:
        self.weighting.reset()
        super().reset()

    def device_solver(self, n_tasks: int) -> DeviceSolver | None:
        """What finds the weights on the device; None where a subclass does more than its weighting
        and has not said how that is done there."""
        return self.weighting.device_solver(n_tasks)

    def _why_on_host(self, n_tasks: int, level: GradientLevel | None) -> str | None:
        obstacles = {
            f"the weights of {n_tasks} tasks by {self.weighting!r} are found on the host": (
                self.device_solver(n_tasks) is None
            ),
            f"on_failure={self.on_failure!r} has to look": self.on_failure != "hold",
            f"on_nonfinite={self.on_nonfinite!r} has to look": (
                self.on_nonfinite not in (None, "ignore")
            ),
            "small weights of float16 gradients have to be known with update_weights_every > 1": (
                self.update_weights_every > 1
                and level is not None
                and torch.float16 in level.dtypes
            ),
            "task-specific parameters lie on another device than what is shared": (
                level is not None and any(p.device != level.device for _, p in level.heads)
            ),
        }
        return next((why for why, stands in obstacles.items() if stands), None)

    def _take_over(self, old: GradientLevel | None, new: GradientLevel) -> None:
        search = self._search
        n_tasks = len(search.last)
        wanted = new.device.type != "cpu" if self.capturable is None else self.capturable
        why = self._why_on_host(n_tasks, new) if wanted else "it is not wanted"
        if self.capturable:
            self._refuse_capturable(why)
        super()._take_over(old, new)
        solver = self.device_solver(n_tasks) if why is None else None
        search.decide_on(None if solver is None else new.device)
        search.place({x.dtype for x in new.layouts}, numel=new.numel, solver=solver)

    def _divides(self, batch: Batch) -> bool:
        # On the device nobody sees which weights are 0; with a scaler activations are of 16 bits.
        return self._search.device is None or (self.weighting.positive and batch.seed is None)

    def _decide(self, batch: Batch, level: GradientLevel, active: list[int]) -> Decision:
        scaled = batch.seed is not None
        on_device = self._search.device is not None
        looks = self.on_nonfinite != "ignore" or scaled
        decision = self._search.solve(
            level.gram(),
            active,
            weigh=lambda gram, tasks: self._solve(gram, active, batch),
            label=self._label if looks else None,
            finite=level.finite_heads() if scaled and on_device else None,
            scaled=scaled,
        )
        self._join(level, active, decision.joint)
        return decision

    def _weigh(self, level: GradientLevel, active: list[int], batch: Batch) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} decides by `_solve`")

    def _solve(self, gram: Tensor, active: list[int], batch: Batch) -> Tensor:
        """The weights (n,) of the active tasks from their Gram matrix (n, n), float64."""
        everyone = len(active) == len(self._search.last)
        return self.weighting(gram, None if everyone else active)

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "weighting": self.weighting.state_dict()}

    def _load(self, state: Mapping[str, Any]) -> None:
        self.weighting.load_state_dict(state["weighting"])
        super()._load(state)

    def _options(self) -> dict[str, Any]:
        return {"weighting": self.weighting, **super()._options()}

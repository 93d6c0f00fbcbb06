"""Nash bargaining weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..ops.device import Constants
from ..solvers import Result, bargaining
from .base import DeviceSolver, SolverWeighting, as_preference, check_tasks, of_tasks

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Bargaining(SolverWeighting):
    """The Nash bargaining weights, exact or by the papers' procedure:

        find a > 0 with   a_i (G a)_i = p_i

    Sources: Nash-MTL, arXiv 2202.01017, Claim 3.1; PUB, arXiv 2410.05806, Claim 1 ("exact") and
    equations 2-4 ("ccp"). `fastmto.solvers.bargaining` states both problems and how they differ.

    Args:
        method: "exact" or "ccp".
        preference: one bargaining power p > 0 per task; equal by default.
        tol, max_steps, ridge: as `fastmto.solvers.bargaining`.
        warm_start: start from the last weights wherever all tasks of the call have some. It saves
            0-2 Newton steps and lets the weights depend, within `tol`, on the calls before; with
            "ccp" the last weights are the first iterate, as in the published code. They are part
            of `state_dict`.

    Raises:
        ValueError: an argument out of range.

    Example: `weights = fastmto.weightings.Bargaining(preference=[1.0, 2.0])(gram)`.
    """

    @property
    def positive(self) -> bool:
        return True

    def __init__(
        self,
        method: str = "exact",
        preference: Sequence[float] | Tensor | None = None,
        tol: float = 1e-13,
        max_steps: int = 20,
        ridge: float = 0.0,
        warm_start: bool = False,
    ) -> None:
        self.preference = as_preference(preference, positive=True)
        self.method = method
        self.tol = tol
        self.max_steps = max_steps
        self.ridge = ridge
        self.warm_start = warm_start
        self._last: dict[int, float] = {}
        # A solve of one task has no numbers that could fail: what it refuses is an argument.
        one = torch.ones(1, 1, dtype=torch.float64)
        bargaining(one, method, None, None, tol, max_steps, ridge)

    def _powers(self, gram: Tensor, tasks: Sequence[int] | None) -> NDArray[np.float64] | None:
        """The bargaining powers of the tasks of this call; None for 1 each."""
        return None if self.preference is None else of_tasks(self.preference, gram, tasks)

    def _solve(self, gram: Tensor, tasks: Sequence[int] | None) -> Result[Tensor]:
        start = None
        if self.warm_start:
            indices = check_tasks(gram, tasks)
            if all(i in self._last for i in indices):
                start = [self._last[i] for i in indices]
        powers = self._powers(gram, tasks)
        result = bargaining(gram, self.method, powers, start, self.tol, self.max_steps, self.ridge)
        if self.warm_start and result.weights is not None:
            self._last.update(zip(indices, result.weights.tolist(), strict=True))
        return result

    def device_solver(self, n_tasks: int) -> DeviceSolver | None:
        if self.method != "exact" or self.warm_start or n_tasks > ops.MAX_SOLVED_TASKS:
            return None
        constants = Constants(torch.float64)

        def solve(gram: Tensor, weights: Tensor, info: Tensor, tasks: Sequence[int] | None) -> None:
            powers = self._powers(gram, tasks)
            p = None if powers is None else constants(powers.tolist(), gram.device)
            ops.bargaining(gram, weights, info, preference=p, tol=self.tol, ridge=self.ridge)

        return solve

    def state_dict(self) -> dict[str, Any]:
        return {"last": dict(self._last)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state) != {"last"}:
            raise ValueError(f"state must hold 'last', got {sorted(state)}")
        self._last = {int(i): float(a) for i, a in state["last"].items()}

    def reset(self) -> None:
        super().reset()
        self._last = {}

    def _options(self) -> list[str]:
        options = [f"method={self.method!r}"]
        if self.preference is not None:
            options.append(f"preference={self.preference.tolist()}")
        for name, default in (("tol", 1e-13), ("max_steps", 20), ("ridge", 0.0)):
            value = getattr(self, name)
            if value != default:
                options.append(f"{name}={value!r}")
        if self.warm_start:
            options.append("warm_start=True")
        return options

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._options())})"

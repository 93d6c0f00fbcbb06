"""Nash bargaining weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import SolverError
from ..solvers import Result, bargaining
from .base import Weighting, check_tasks


class Bargaining(Weighting):
    """a > 0 with a_i (G a)_i = p_i, or the papers' procedure for it.

    Sources: Nash-MTL, arXiv 2202.01017, Claim 3.1; PUB, arXiv 2410.05806, Claim 1 ("exact") and
    equations 2-4 ("ccp"). `fastmto.solvers.bargaining` states both problems and how they differ.

    Args:
        method: "exact" or "ccp".
        preference: one bargaining power p > 0 a task; equal by default.
        tol, max_steps, ridge: as `fastmto.solvers.bargaining`.
        warm_start: start from the last weights wherever all tasks of the call have some. It saves
            0-2 Newton steps and lets the weights depend, within `tol`, on the calls before; with
            "ccp" the last weights are the first iterate, as in the published code. They are part
            of `state_dict`.

    Attributes:
        result: the last `Result` with its status, residual and kappa; None before the first call.
            A diagnostic only: not part of the state.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        method: str = "exact",
        preference: Sequence[float] | Tensor | None = None,
        tol: float = 1e-13,
        max_steps: int = 20,
        ridge: float = 0.0,
        warm_start: bool = False,
    ) -> None:
        self.preference = None if preference is None else [float(p) for p in preference]
        if self.preference is not None and not all(
            p > 0 and math.isfinite(p) for p in self.preference
        ):
            raise ValueError(f"preference must be positive and finite, got {self.preference}")
        self.method = method
        self.tol = tol
        self.max_steps = max_steps
        self.ridge = ridge
        self.warm_start = warm_start
        self.result: Result[Tensor] | None = None
        self._last: dict[int, float] = {}
        # A solve of one task has no numbers that could fail: what it refuses is an argument.
        self._solve(torch.ones(1, 1, dtype=torch.float64), None, None)

    def _solve(
        self, gram: Tensor, preference: Sequence[float] | None, start: Sequence[float] | None
    ) -> Result[Tensor]:
        return bargaining(
            gram, self.method, preference, start, self.tol, self.max_steps, self.ridge
        )

    def __call__(self, gram: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        indices = check_tasks(gram, tasks)
        preference = start = None
        if self.preference is not None:
            if (tasks is None and len(gram) != len(self.preference)) or max(indices) >= len(
                self.preference
            ):
                raise ValueError(
                    f"gram must be of the {len(self.preference)} tasks of preference, "
                    f"got tasks {indices}"
                )
            preference = [self.preference[i] for i in indices]
        if self.warm_start and all(i in self._last for i in indices):
            start = [self._last[i] for i in indices]
        result = self._solve(gram.detach().double(), preference, start)
        self.result = result
        if result.weights is None:
            raise SolverError(
                f"no bargaining weights for the Gram matrix of {len(gram)} tasks: {result.status} "
                f"(kappa {result.kappa:.3g}, {result.iterations} iterations)",
                result.status,
            )
        if self.warm_start:
            self._last.update(zip(indices, result.weights.tolist(), strict=True))
        return result.weights.cpu()

    def state_dict(self) -> dict[str, Any]:
        return {"last": dict(self._last)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state) != {"last"}:
            raise ValueError(f"state must hold 'last', got {sorted(state)}")
        self._last = {int(i): float(a) for i, a in state["last"].items()}

    def reset(self) -> None:
        self._last = {}
        self.result = None

    def __repr__(self) -> str:
        options = [f"method={self.method!r}"]
        if self.preference is not None:
            options.append(f"preference={self.preference}")
        for name, default in (("tol", 1e-13), ("max_steps", 20), ("ridge", 0.0)):
            value = getattr(self, name)
            if value != default:
                options.append(f"{name}={value!r}")
        if self.warm_start:
            options.append("warm_start=True")
        return f"Bargaining({', '.join(options)})"

"""How MARIGOLD's task weights move on the simplex: mirror descent, projected descent, FAMO's Adam.

All state is float64 on the CPU, one entry a task. A rule is told the derivatives y of the tasks
that are present; the weights and the state of the others keep still, and so does the sum of the
weights of those present.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine.per_task import TaskAdam, put, take
from ..errors import SolverError
from ..solvers import simplex_projection


class SimplexRule(ABC):
    """Base of the rules.

    Args:
        n_tasks: T.
    """

    def __init__(self, n_tasks: int) -> None:
        self.n_tasks = n_tasks

    @abstractmethod
    def move(self, lambda_: Tensor, y: Tensor, squared: float, tasks: Sequence[int]) -> Tensor:
        """Take up the derivatives of a step.

        Args:
            lambda_: (T,) float64, the weights as this rule left them; not modified.
            y: (n,) float64, dPhi/dlambda_j of the n present tasks.
            squared: ||d||^2 > 0.
            tasks: their indices.

        Returns:
            (T,), the next weights, new memory.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to continue exactly from here, copied."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""


class Descent(SimplexRule):
    """What mirror and projected descent share: the average of y and the running bound L_hat.

    Args:
        n_tasks: T.
        beta: step times L_hat.
        step: the step itself, in place of beta / L_hat; None: beta / L_hat.
        ema: in [0, 1): y is replaced by its moving average, starting from 0.

    Attributes:
        average: (T,), of y.
        bound: L_hat, the largest bound seen.
    """

    def __init__(self, n_tasks: int, beta: float, step: float | None, ema: float) -> None:
        super().__init__(n_tasks)
        self.beta, self.step, self.ema = beta, step, ema
        self.average = torch.zeros(n_tasks, dtype=torch.float64)
        self.bound = 0.0

    @abstractmethod
    def _bound(self, y: Tensor, squared: float) -> float:
        """What this y says about the criterion's smoothness."""

    def _displacement(self, y: Tensor, squared: float, tasks: Sequence[int]) -> Tensor:
        """step * EMA(y) (n,)."""
        self.bound = max(self.bound, self._bound(y, squared))
        average = torch.lerp(y, take(self.average, tasks), self.ema)
        self.average = put(self.average, tasks, average)
        step = self.step
        if step is None:
            step = self.beta / self.bound if self.bound > 0 else 0.0
        return step * average

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average.clone(), "bound": self.bound}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.average, self.bound = state["average"].clone(), state["bound"]


class Mirror(Descent):
    """logits -= beta EMA(y) / L_hat, lambda = softmax(logits); L_hat = max_j y_j^2 / ||d||^2.

    The bound is one of max_j G_jj = max_ij |G_ij|, the smoothness of the criterion in the norm
    that belongs to the softmax (the sum of absolute values). The logits kept are log lambda, which
    goes on where lambda itself underflows.
    """

    def __init__(self, n_tasks: int, beta: float, step: float | None, ema: float) -> None:
        super().__init__(n_tasks, beta, step, ema)
        self.logits = torch.full((n_tasks,), -math.log(n_tasks), dtype=torch.float64)

    def _bound(self, y: Tensor, squared: float) -> float:
        return float(y.abs().max()) ** 2 / squared

    def move(self, lambda_: Tensor, y: Tensor, squared: float, tasks: Sequence[int]) -> Tensor:
        before = take(self.logits, tasks)
        logits = (before - self._displacement(y, squared, tasks)).log_softmax(0)
        if len(tasks) < self.n_tasks:
            logits = logits + before.logsumexp(0)  # the sum over these tasks stays
        self.logits = put(self.logits, tasks, logits)
        return self.logits.exp()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "logits": self.logits.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.logits = state["logits"].clone()


class Projected(Descent):
    """lambda <- Proj(lambda - beta EMA(y) / L_hat) onto the simplex; L_hat = ||y||^2 / ||d||^2.

    ||y||^2 / ||d||^2 = lambda'G^2 lambda / lambda'G lambda is a Rayleigh quotient of G: at most
    lambda_max(G), and at least max_j y_j^2 / ||d||^2, which alone misses lambda_max by a factor
    of up to T when the gradients agree, and then the descent never settles.
    """

    def _bound(self, y: Tensor, squared: float) -> float:
        return float(y @ y) / squared

    def move(self, lambda_: Tensor, y: Tensor, squared: float, tasks: Sequence[int]) -> Tensor:
        own = take(lambda_, tasks)
        everyone = len(tasks) == self.n_tasks
        total = 1.0 if everyone else float(own.sum())
        shifted = own - self._displacement(y, squared, tasks)
        if total == 0:
            return put(lambda_, tasks, own)
        # A common shift does not matter, and what lies `total` below the largest comes out as 0:
        # so nothing overflows in the division.
        scaled = (shifted - shifted.max()).clamp_min(-total) / total
        result = simplex_projection(scaled)
        if result.weights is None:
            raise SolverError(
                f"lambda_step must leave lambda finite, got {shifted.tolist()} to project",
                result.status,
            )
        return put(lambda_, tasks, total * result.weights)


class FamoRule(SimplexRule):
    """FAMO's: Adam on the logits xi, with the gradient J'y + gamma xi, J that of the softmax.

    Source: FAMO (Liu et al., NeurIPS 2023), Algorithm 1 and its released code. Absent tasks keep
    their logits; the softmax is over those present.

    Args:
        n_tasks: T.
        lr, gamma: learning rate and weight decay of the logits.
    """

    def __init__(self, n_tasks: int, lr: float, gamma: float) -> None:
        super().__init__(n_tasks)
        self.logits = torch.zeros(n_tasks, dtype=torch.float64)
        self._adam = TaskAdam(n_tasks, lr, gamma)

    def move(self, lambda_: Tensor, y: Tensor, squared: float, tasks: Sequence[int]) -> Tensor:
        own = take(self.logits, tasks)
        z = own.softmax(0)
        gradient = z * (y - (z * y).sum())
        self.logits = put(self.logits, tasks, self._adam.step(own, gradient, tasks))
        return self.logits.softmax(0)

    def state_dict(self) -> dict[str, Any]:
        return {"logits": self.logits.clone(), "adam": self._adam.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.logits = state["logits"].clone()
        self._adam.load_state_dict(state["adam"])

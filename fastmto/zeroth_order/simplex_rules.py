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

from ..balancers.per_task import TaskAdam
from .estimators import simplex_projection


class SimplexRule(ABC):
    """Base of the rules.

    Attributes:
        lambda_: (T,) weights >= 0 that sum to 1; replaced at every move, never changed in place.

    Args:
        n_tasks: T.
    """

    def __init__(self, n_tasks: int) -> None:
        self.lambda_ = torch.full((n_tasks,), 1 / n_tasks, dtype=torch.float64)

    @abstractmethod
    def move(self, y: Tensor, squared: float, tasks: Sequence[int]) -> None:
        """Take up the derivatives of a step.

        Args:
            y: (n,) float64, dPhi/dlambda_j of the n present tasks.
            squared: ||d||^2 > 0.
            tasks: their indices.
        """

    def set(self, lambda_: Tensor) -> None:
        """Put the weights where a criterion says they belong."""
        self.lambda_ = lambda_

    def state_dict(self) -> dict[str, Any]:
        return {"lambda": self.lambda_.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.lambda_ = state["lambda"].clone()

    def _mass(self, tasks: Sequence[int]) -> float:
        return 1.0 if len(tasks) == len(self.lambda_) else float(self.lambda_[list(tasks)].sum())


class Descent(SimplexRule):
    """What mirror and projected descent share: the average of y and the running bound L_hat.

    Args:
        n_tasks: T.
        beta: step times L_hat.
        step: the step itself, in place of beta / L_hat; None: beta / L_hat.
        ema: in [0, 1): y is replaced by its moving average, starting from 0.
    """

    def __init__(self, n_tasks: int, beta: float, step: float | None, ema: float) -> None:
        super().__init__(n_tasks)
        self.beta, self.step, self.ema = beta, step, ema
        self.average = torch.zeros(n_tasks, dtype=torch.float64)
        #: L_hat, the largest bound seen.
        self.bound = 0.0

    @abstractmethod
    def _bound(self, y: Tensor, squared: float) -> float:
        """A lower bound of the criterion's smoothness."""

    def _displacement(self, y: Tensor, squared: float, tasks: Sequence[int]) -> Tensor:
        """step * EMA(y) (n,)."""
        self.bound = max(self.bound, self._bound(y, squared))
        average = self.average.clone()
        average[list(tasks)] = self.ema * average[list(tasks)] + (1 - self.ema) * y
        self.average = average
        step = self.step
        if step is None:
            step = self.beta / self.bound if self.bound > 0 else 0.0
        return step * average[list(tasks)]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "average": self.average.clone(), "bound": self.bound}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.average, self.bound = state["average"].clone(), state["bound"]


class Mirror(Descent):
    """logits -= beta EMA(y) / L_hat, lambda = softmax(logits); L_hat = max_j y_j^2 / ||d||^2.

    The bound is that of max_j G_jj = max_ij |G_ij|, the smoothness of the criterion in the norm
    that belongs to the softmax (the sum of absolute values).
    """

    def __init__(self, n_tasks: int, beta: float, step: float | None, ema: float) -> None:
        super().__init__(n_tasks, beta, step, ema)
        self.logits = self.lambda_.log()

    def _bound(self, y: Tensor, squared: float) -> float:
        return float(y.abs().max()) ** 2 / squared

    def move(self, y: Tensor, squared: float, tasks: Sequence[int]) -> None:
        rows = list(tasks)
        own = self.logits[rows] - self._displacement(y, squared, tasks)
        logits = self.logits.clone()
        # Logarithms of lambda itself: those of absent tasks stay right without being touched.
        logits[rows] = own.log_softmax(0) + math.log(self._mass(tasks))
        self.logits = logits
        self.lambda_ = logits.exp()

    def set(self, lambda_: Tensor) -> None:
        super().set(lambda_)
        self.logits = lambda_.log()

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

    def move(self, y: Tensor, squared: float, tasks: Sequence[int]) -> None:
        rows = list(tasks)
        own = self.lambda_[rows] - self._displacement(y, squared, tasks)
        mass = self._mass(tasks)
        lambda_ = self.lambda_.clone()
        if mass > 0:
            lambda_[rows] = simplex_projection(own, mass)
        self.lambda_ = lambda_


class FamoRule(SimplexRule):
    """FAMO's: Adam on the logits xi, with the gradient J'y + gamma xi, J that of the softmax.

    Source: FAMO (Liu et al., NeurIPS 2023), Algorithm 1 and its released code.

    Args:
        n_tasks: T.
        lr, gamma: learning rate and weight decay of the logits.
    """

    def __init__(self, n_tasks: int, lr: float, gamma: float) -> None:
        super().__init__(n_tasks)
        self.logits = torch.zeros(n_tasks, dtype=torch.float64)
        self._adam = TaskAdam(n_tasks, lr, gamma)

    def move(self, y: Tensor, squared: float, tasks: Sequence[int]) -> None:
        rows = list(tasks)
        own = self.logits[rows]
        z = own.softmax(0)
        gradient = z * (y - (z * y).sum())
        logits = self.logits.clone()
        logits[rows] = self._adam.step(own, gradient, tasks)
        self.logits = logits
        self.lambda_ = logits.softmax(0)

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "logits": self.logits.clone(),
            "adam": self._adam.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.logits = state["logits"].clone()
        self._adam.load_state_dict(state["adam"])

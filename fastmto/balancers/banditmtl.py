"""BanditMTL: an adversary chooses the task weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..checks import check_number
from ..engine.batch import Batch
from ..engine.per_task import like, put, take
from .loss_balancer import LossBalancer

#: Points at which the exponent is tried at once, a power of 2, and how often the interval shrinks.
POINTS = 256
ROUNDS = {torch.float32: 3, torch.float64: 7}


class BanditMTL(LossBalancer):
    """BanditMTL: mirror ascent on the weights inside a KL ball around equal weights.

    Source: Mao et al., "BanditMTL: Bandit-based Multi-task Learning for Text Classification",
    ACL 2021. The adversarial form of the mean loss with a variance penalty:

        min_theta max_{p in P} sum_i p_i L_i,    P = {p in simplex : sum_i p_i log(T p_i) <= rho}
            ~ (1/T) sum_i L_i + sqrt(2 rho Var(L))        for small rho

    A step moves the model with w = p and then p by mirror ascent with the entropy as mirror map,
    whose projection on P has one multiplier lambda >= 0:

        q_i = p_i exp(eta L_i)
        p_i <- q_i^(1/(1+lambda)) / sum_j q_j^(1/(1+lambda)),
        lambda = 0 if that is in P, else such that sum_i p_i log(T p_i) = rho

    The exponent 1/(1+lambda) in (0, 1] is found to the last bits of the dtype by trying
    `POINTS` values at once, again and again: no value is read, and rho binds exactly. The released
    code bisects lambda and has rho = 1.2, eta = 0.5; it divides the weighted sum by T, here the
    weights sum to 1.

    With rho >= log T the ball holds the whole simplex and nothing keeps p from the task with the
    largest loss. The method favours the tasks with large losses: bring losses to one scale first.

    With absent tasks the step is made on the conditional distribution of the present ones, whose
    total mass stays; their weights are that distribution and sum to 1.

    Args:
        n_tasks: T; None: found at the first backward.
        eta: step of the mirror ascent, > 0, in units of 1 / loss.
        rho: radius of the ball, > 0; None: 1.2, but at most half of log T, the largest possible.
        update_weights_every, on_nonfinite: see `Balancer`.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> import torch, fastmto
        >>> trunk, heads = torch.nn.Linear(4, 8), [torch.nn.Linear(8, 1) for _ in range(2)]
        >>> balancer = fastmto.balancers.BanditMTL()
        >>> losses = [head(trunk(torch.ones(3, 4))).exp().mean() for head in heads]
        >>> loss, info = balancer.backward(losses, trunk.parameters())
        >>> info.weights.shape
        torch.Size([2])
    """

    key = "banditmtl"

    def __init__(
        self,
        n_tasks: int | None = None,
        *,
        eta: float = 0.5,
        rho: float | None = None,
        update_weights_every: int = 1,
        on_nonfinite: str | None = None,
    ) -> None:
        self.eta = check_number("eta", eta, 0, open_low=True)
        self.rho = None if rho is None else check_number("rho", rho, 0, open_low=True)
        super().__init__(
            n_tasks, update_weights_every=update_weights_every, on_nonfinite=on_nonfinite
        )

    def _set_tasks(self, n_tasks: int) -> None:
        super()._set_tasks(n_tasks)
        self.weights = torch.full((n_tasks,), 1 / n_tasks, dtype=torch.float64)
        self._log_p = self.weights.log()

    def _weigh(self, batch: Batch, losses: Tensor) -> Tensor:
        return take(like(self._log_p, losses), batch.tasks).softmax(0)

    def _learn(self, batch: Batch, losses: Tensor, weights: Tensor) -> None:
        every = like(self._log_p, losses)
        log_p = take(every, batch.tasks)
        n = len(batch.tasks)
        rho = min(1.2, math.log(n) / 2) if self.rho is None else self.rho
        log_q = (log_p + self.eta * losses).log_softmax(0)
        new = (_exponent(log_q, rho) * log_q).log_softmax(0)
        if n < len(every):
            new = new + log_p.logsumexp(0)
        self._log_p = put(every, batch.tasks, new)

    def _state(self) -> dict[str, Any]:
        return {"log_p": self._log_p.clone()}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._log_p = state["log_p"].clone()

    def _options(self) -> dict[str, Any]:
        return {"eta": self.eta, "rho": self.rho}


def _exponent(log_q: Tensor, rho: float) -> Tensor:
    """The largest s in [0, 1] with KL(q^s / sum q^s || uniform) <= rho; KL grows with s.

    Args:
        log_q: (n,).
        rho: >= 0.

    Returns:
        a scalar tensor.
    """
    steps = torch.arange(POINTS, device=log_q.device, dtype=log_q.dtype)
    low = log_q.new_zeros(())
    log_n = math.log(len(log_q))
    for k in range(1, ROUNDS[log_q.dtype] + 1):
        width = float(POINTS) ** -k
        s = low + width * (steps + 1)
        log_p = (s[:, None] * log_q).log_softmax(1)
        inside = (log_p.exp() * log_p).sum(1) <= rho - log_n
        # What lies inside is a run from the start, up to rounding at its end.
        low = low + width * inside.sum()
    return low.clamp(max=1.0)

"""Uncertainty weighting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_number
from ..engine.batch import Batch
from .loss_balancer import LearningBalancer


class Uncertainty(LearningBalancer):
    """Uncertainty weighting: learnable noise levels of the tasks.

    Source: Kendall, Gal & Cipolla, CVPR 2018, equation 7 and section 3.2, with
    s_i = log sigma_i^2:

        minimise sum_i (1/2) (exp(-s_i) L_i + s_i)        over the model and s
        w_i = (1/2) exp(-s_i)                             dJ/ds_i = (1/2) - w_i L_i

    The factor 1/2 is that of the paper's regression likelihood and is used for every task, as in
    nash-mtl, LibMTL (UW) and TorchJD (UW). Without it the objective is twice as large, with the
    same minimisers, and Adam runs the same but for its eps. The paper's classification likelihood
    has 1 in place of the first 1/2, which moves s_i by log 2. LibMTL starts at s_i = -0.5.

    Balances positive losses: for a loss that stays <= 0, s_i decreases without end.

    Args:
        n_tasks: T, needed.
        init: initial s_i.
        device, dtype: of the s_i, see `LearningBalancer`.
        update_weights_every, on_nonfinite: see `Balancer`.

    Raises:
        ValueError: without `n_tasks`, or an argument out of range.

    Example:
        >>> import torch, fastmto
        >>> trunk, heads = torch.nn.Linear(4, 8), [torch.nn.Linear(8, 1) for _ in range(2)]
        >>> balancer = fastmto.balancers.Uncertainty(n_tasks=2)
        >>> losses = [head(trunk(torch.ones(3, 4))).exp().mean() for head in heads]
        >>> loss, info = balancer.backward(losses, trunk.parameters())
        >>> info.weights.shape
        torch.Size([2])
        >>> len(balancer.parameters())  # learned noise levels, for the optimizer
        2
    """

    key = "uncertainty"

    def __init__(
        self,
        n_tasks: int | None = None,
        *,
        init: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        update_weights_every: int = 1,
        on_nonfinite: str | None = None,
    ) -> None:
        super().__init__(
            n_tasks,
            init=check_number("init", init, -80, 80),
            device=device,
            dtype=dtype,
            update_weights_every=update_weights_every,
            on_nonfinite=on_nonfinite,
        )

    def _set_tasks(self, n_tasks: int) -> None:
        super()._set_tasks(n_tasks)
        self.weights = torch.full((n_tasks,), -self._init, dtype=torch.float64).exp() / 2

    def _weigh(self, batch: Batch, losses: Tensor) -> Tensor:
        return (-self._learned(batch, losses)).exp() / 2

    def _learn(self, batch: Batch, losses: Tensor, weights: Tensor) -> None:
        self._add_gradients(batch, 0.5 - weights * losses)

    def _options(self) -> dict[str, Any]:
        return {"init": self._init}

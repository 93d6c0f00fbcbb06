"""The loss balance of impartial multi-task learning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_number
from ..engine.batch import Batch
from .loss_balancer import LearningBalancer


class IMTLL(LearningBalancer):
    """IMTL-L: learnable scales that bring all scaled losses to 1.

    Source: Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021, section 3.2, base e:

        minimise sum_i (exp(s_i) L_i - s_i)         over the model and s
        w_i = exp(s_i)                              dJ/ds_i = w_i L_i - 1

    TorchJD's IMTLL is the same; LibMTL has it inside IMTL, before IMTL-G.

    Balances positive losses: for a loss that stays <= 0, s_i increases without end.

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
        >>> balancer = fastmto.balancers.IMTLL(n_tasks=2)
        >>> losses = [head(trunk(torch.ones(3, 4))).exp().mean() for head in heads]
        >>> loss, info = balancer.backward(losses, trunk.parameters())
        >>> info.weights.shape
        torch.Size([2])
        >>> len(balancer.parameters())  # learned scales, for the optimizer
        2
    """

    key = "imtl_l"

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
        self.weights = torch.full((n_tasks,), self._init, dtype=torch.float64).exp()

    def _weigh(self, batch: Batch, losses: Tensor) -> Tensor:
        return self._learned(batch, losses).exp()

    def _learn(self, batch: Batch, losses: Tensor, weights: Tensor) -> None:
        self._add_gradients(batch, weights * losses - 1)

    def _options(self) -> dict[str, Any]:
        return {"init": self._init}

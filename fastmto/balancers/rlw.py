"""Random loss weighting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..engine.batch import Batch
from ..engine.per_task import take
from .loss_balancer import LossBalancer


class RLW(LossBalancer):
    """Random loss weighting: new random weights at every search.

    Source: Lin et al., "Reasonable Effectiveness of Random Weighting", TMLR 2022
    (arXiv 2111.10603), with the normal distribution.

        w = n softmax(z), z ~ N(0, I)

    with n the number of present tasks, so that weights average 1 like those of equal weighting.
    The paper, LibMTL and TorchJD (Random) leave the factor n out. T numbers are drawn at every
    search, whoever is absent; the softmax is over the present tasks.

    Args:
        n_tasks: T; None: found at the first backward.
        seed: of the method's own generator, which is not torch's global one.
        update_weights_every, on_nonfinite: see `Balancer`.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> import torch, fastmto
        >>> trunk, heads = torch.nn.Linear(4, 8), [torch.nn.Linear(8, 1) for _ in range(2)]
        >>> balancer = fastmto.balancers.RLW()
        >>> losses = [head(trunk(torch.ones(3, 4))).exp().mean() for head in heads]
        >>> loss, info = balancer.backward(losses, trunk.parameters())
        >>> info.weights.shape
        torch.Size([2])
    """

    key = "rlw"

    def __init__(
        self,
        n_tasks: int | None = None,
        *,
        seed: int = 0,
        update_weights_every: int = 1,
        on_nonfinite: str | None = None,
    ) -> None:
        if type(seed) is not int or seed < 0:
            raise ValueError(f"seed must be an integer >= 0, got {seed!r}")
        self.seed = seed
        super().__init__(
            n_tasks, update_weights_every=update_weights_every, on_nonfinite=on_nonfinite
        )

    def _set_tasks(self, n_tasks: int) -> None:
        super()._set_tasks(n_tasks)
        self._n = n_tasks
        self._generator = torch.Generator().manual_seed(self.seed)

    def _weigh(self, batch: Batch, losses: Tensor) -> Tensor:
        # Drawn in float64 on the CPU: the same weights whatever the device and dtype.
        z = torch.randn(self._n, generator=self._generator, dtype=torch.float64)
        weights = len(batch.tasks) * take(z, batch.tasks).softmax(0)
        return weights.to(losses.device, losses.dtype, non_blocking=True)

    def _state(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._generator.set_state(state["generator"].cpu())

    def _options(self) -> dict[str, Any]:
        return {"seed": self.seed}

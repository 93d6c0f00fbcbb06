"""Scale-invariant weights."""

from __future__ import annotations

from torch import Tensor

from ..engine.batch import Batch
from .loss_balancer import LossBalancer


class SI(LossBalancer):
    """Scale-invariant baseline: minimise sum_i log L_i.

    Source: the SI row of Nash-MTL's tables (Navon et al., ICML 2022).

        w_i = 1 / L_i

    The loss that `backward` returns, sum_i w_i L_i, is therefore the number of present tasks.
    A loss that may reach 0 needs `loss_floor`.

    Beside the peers: TorchJD's GeometricMean and LibMTL's GLS minimise (prod_i L_i)^(1/T), whose
    gradient is the same times GM / T, GM being the geometric mean of the losses.

    Raises:
        ValueError: a loss that is not positive (see `LossBalancer`).

    Example:
        >>> import torch, fastmto
        >>> trunk, heads = torch.nn.Linear(4, 8), [torch.nn.Linear(8, 1) for _ in range(2)]
        >>> balancer = fastmto.balancers.SI()
        >>> losses = [head(trunk(torch.ones(3, 4))).exp().mean() for head in heads]
        >>> loss, info = balancer.backward(losses, trunk.parameters())
        >>> info.weights.shape
        torch.Size([2])
    """

    key = "si"

    def _weigh(self, batch: Batch, losses: Tensor) -> Tensor:
        self._refuse_low(batch, "takes its logarithm")
        return self._floored(losses).reciprocal()

"""IMTL: IMTL-L on the losses' scales and IMTL-G on the gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import weightings
from .base import Batch
from .gradient_balancer import GradientOptions, GramBalancer, _Flat

if TYPE_CHECKING:
    from typing_extensions import Unpack


class IMTL(GramBalancer):
    """IMTL: learned scales of the losses, and equal projections of the scaled losses' gradients.

    Source: Liu et al., Towards Impartial Multi-task Learning, ICLR 2021, Algorithm 1 (IMTL). The
    losses become exp(s_i) L_i - s_i; s learns by its gradient exp(s_i) L_i - 1, the heads by
    exp(s_i) dL_i, and the shared parameters by the IMTL-G combination of exp(s_i) g_i. The paper
    takes the gradients at the shared representation: `level="features"`.

    Args:
        n_tasks: T; needed for `parameters`, (T,) float32 scales s to give to the optimizer.
        device: of s.
        options: as `GradientBalancer`.
    """

    key = "imtl"

    def __init__(
        self,
        n_tasks: int | None = None,
        *,
        device: torch.device | str | None = None,
        **options: Unpack[GradientOptions],
    ) -> None:
        self._device = device
        self._scales: Parameter | None = None
        super().__init__(weightings.IMTLG(), n_tasks, **options)

    def _set_tasks(self, n_tasks: int) -> None:
        super()._set_tasks(n_tasks)
        if self._scales is None:
            self._scales = Parameter(torch.zeros(n_tasks, device=self._device))
        with torch.no_grad():  # in place: an optimizer may hold it
            self._scales.zero_()

    @property
    def scales(self) -> Parameter:
        """s, (T,)."""
        if self._scales is None:
            raise ValueError("n_tasks must be given where s is asked for before the first step")
        return self._scales

    def parameters(self) -> list[Parameter]:
        return [self.scales]

    def _weigh(self, flat: _Flat, active: list[int], batch: Batch) -> tuple[Tensor, Tensor]:
        gram, weights = super()._weigh(flat, active, batch)
        # Only now: a step that is skipped or held leaves no gradient here either.
        tasks = torch.tensor(batch.tasks, device=self.scales.device)
        losses = batch.losses.to(self.scales.device)
        grad = torch.zeros_like(self.scales)
        grad[tasks] = (self.scales.detach()[tasks].exp() * losses - 1).to(grad.dtype)
        self.scales.grad = grad if self.scales.grad is None else self.scales.grad + grad
        return gram, weights

    def _solve(self, gram: Tensor, active: list[int], batch: Batch) -> Tensor:
        factors = self._factors()[active]
        scaled = gram * factors[:, None] * factors
        return super()._solve(scaled, active, batch) * factors

    def _factors(self) -> Tensor:
        return self.scales.detach().to("cpu", torch.float64).exp()

    def _head_weights(self, batch: Batch) -> list[float]:
        return self._factors().tolist()

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "scales": self.scales.detach().clone()}

    def _load(self, state: Mapping[str, Any]) -> None:
        if "scales" not in state or state["scales"].shape != self.scales.shape:
            raise ValueError(f"state must hold 'scales' of {len(self.scales)} tasks")
        super()._load({k: v for k, v in state.items() if k != "scales"})
        with torch.no_grad():
            self.scales.copy_(state["scales"])

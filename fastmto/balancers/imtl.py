"""IMTL: IMTL-L on the losses' scales and IMTL-G on the gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import weightings
from ..engine.batch import Batch
from ..engine.gradient_level import GradientLevel
from ..engine.search import Decision
from .gradient_balancer import GradientOptions
from .gram_balancer import GramBalancer

if TYPE_CHECKING:
    from typing_extensions import Unpack


class IMTL(GramBalancer):
    """IMTL: learned scales of the losses, and equal projections of the scaled losses' gradients.

    Source: Liu et al., Towards Impartial Multi-task Learning, ICLR 2021, Algorithm 1 (IMTL). The
    losses become exp(s_i) L_i - s_i; s learns by its gradient exp(s_i) L_i - 1, the heads by
    exp(s_i) dL_i, and the shared parameters by the IMTL-G combination of exp(s_i) g_i. The paper
    takes the gradients at the shared representation: `level="features"`.

    Args:
        n_tasks: T; needed before `parameters`, the T scalars s_i to give to the optimizer.
        device: of s.
        options: as `GradientBalancer`.

    Example:
        >>> import torch, fastmto
        >>> trunk, heads = torch.nn.Linear(4, 8), [torch.nn.Linear(8, 1) for _ in range(2)]
        >>> balancer = fastmto.balancers.IMTL(n_tasks=2)
        >>> losses = [head(trunk(torch.ones(3, 4))).exp().mean() for head in heads]
        >>> owned = [head.parameters() for head in heads]
        >>> loss, info = balancer.backward(losses, trunk.parameters(), owned)
        >>> info.weights.shape
        torch.Size([2])
        >>> len(balancer.parameters())  # learned scales, for the optimizer
        2
    """

    key = "imtl"

    def __init__(
        self,
        n_tasks: int | None = None,
        *,
        device: torch.device | str | None = None,
        **options: Unpack[GradientOptions],
    ) -> None:
        if options.get("heads", "own") != "own":
            raise ValueError(
                f"heads must be 'own': they learn by exp(s_i) L_i, got {options['heads']!r}"
            )
        self._device = device
        self._scales: list[Parameter] = []
        super().__init__(weightings.IMTLG(), n_tasks, **options)

    def _set_tasks(self, n_tasks: int) -> None:
        super()._set_tasks(n_tasks)
        if not self._scales:
            self._scales = [Parameter(torch.zeros((), device=self._device)) for _ in range(n_tasks)]
        with torch.no_grad():  # in place, also by `reset`: an optimizer may hold them
            for scale in self._scales:
                scale.zero_()
                scale.grad = None

    def parameters(self) -> list[Parameter]:
        """T scalars s_i; an absent task's gets no gradient."""
        if not self._scales:
            raise ValueError("n_tasks must be given where parameters() is asked for before a step")
        return list(self._scales)

    def _decide(self, batch: Batch, level: GradientLevel, active: list[int]) -> Decision:
        decision = super()._decide(batch, level, active)
        if decision.status is None:
            # A step that is skipped or held leaves no gradient here either.
            self._add_gradients(batch)
        return decision

    def _add_gradients(self, batch: Batch) -> None:
        """The gradient exp(s_i) L_i - 1 of every present task's scale."""
        factors = self._factors()
        for i, loss in self._losses(batch).items():
            scale = self._scales[i]
            grad = torch.full_like(scale, float(factors[i]) * loss - 1)
            if batch.seed is not None:
                grad *= batch.seed.to(grad.device)
            scale.grad = grad if scale.grad is None else scale.grad + grad

    def _solve(self, gram: Tensor, active: list[int], batch: Batch) -> Tensor:
        factors = self._factors()[active]
        scaled = gram * factors[:, None] * factors
        return super()._solve(scaled, active, batch) * factors

    def _factors(self) -> Tensor:
        """exp(s) (T,), float64 on the CPU."""
        return torch.stack([s.detach() for s in self._scales]).to("cpu", torch.float64).exp()

    def _head_weights(self, batch: Batch) -> list[float]:
        return self._factors().tolist()

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "scales": [float(s.detach()) for s in self._scales]}

    def _load(self, state: Mapping[str, Any]) -> None:
        if len(state["scales"]) != len(self._scales):
            raise ValueError(f"state must hold 'scales' of {len(self._scales)} tasks")
        super()._load(state)
        with torch.no_grad():
            for scale, value in zip(self._scales, state["scales"], strict=True):
                scale.fill_(value)

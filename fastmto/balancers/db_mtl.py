"""DB-MTL: logarithms of the losses, and smoothed gradients brought to the largest length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import NonFiniteError, SolverError
from .base import Batch, check_number
from .gradient_balancer import GradientBalancer, GradientOptions, _Flat

if TYPE_CHECKING:
    from typing_extensions import Unpack


class DBMTL(GradientBalancer):
    """DB-MTL: gradients of the log losses, smoothed, all brought to the largest length.

    Source: Lin et al., Dual-Balancing for Multi-Task Learning, arXiv 2308.12029, Algorithm 1. In
    search k (from 1), for every task,

        e_i <- b_k e_i + (1 - b_k) grad log L_i,    b_k = beta / k^decay
        d   =  sum_i a_i e_i,                       a_i = max_j ||e_j|| / ||e_i||

    e starts at 0, as in the paper. Heads learn by grad log L_i. Between two searches the weight of
    L_i is what it was in the last one, a_i / L_i; e then stands still, and so it does for a task
    that is absent. e takes T vectors of the size of what is shared, in float32 (float64 for
    float64), and is part of `state_dict`.

    Args:
        beta: forgetting rate in [0, 1).
        decay: how fast it falls, >= 0. The paper tunes both.
        n_tasks, options: as `GradientBalancer`.
    """

    key = "db_mtl"

    def __init__(
        self,
        n_tasks: int | None = None,
        *,
        beta: float = 0.9,
        decay: float = 0.0,
        **options: Unpack[GradientOptions],
    ) -> None:
        self.beta = check_number("beta", beta, 0, 1)
        if beta == 1:
            raise ValueError("beta must be less than 1, got 1")
        self.decay = check_number("decay", decay, 0)
        super().__init__(n_tasks, **options)

    def reset(self) -> None:
        self._smoothed: list[Tensor] | None = None
        self._count = 0
        super().reset()

    def _flat_built(self, flat: _Flat) -> None:
        super()._flat_built(flat)
        kept, self._smoothed = self._smoothed, flat.task_state()
        if kept is None:
            return
        if [x.shape for x in kept] != [x.shape for x in self._smoothed]:
            if self.level == "features":
                return  # another batch size: there is nothing to go on from
            raise ValueError(
                f"{flat.label} must be laid out as before: the smoothed gradients have shapes "
                f"{[tuple(x.shape) for x in kept]}, not {[tuple(x.shape) for x in self._smoothed]}"
            )
        for new, old in zip(self._smoothed, kept, strict=True):
            new.copy_(old)

    def _weigh(self, flat: _Flat, active: list[int], batch: Batch) -> tuple[Tensor | None, Tensor]:
        assert self._smoothed is not None
        values = self._positive_losses(batch, "its logarithm is taken")
        for i in active:
            if self.on_nonfinite != "ignore" and not flat.finite(i):
                raise NonFiniteError(f"the gradient of {self._label(i)} is not finite")
        self._count += 1
        beta = self.beta / self._count**self.decay
        squares = torch.zeros(len(active), dtype=torch.float64)
        for rows, smoothed in zip(flat.task_rows, self._smoothed, strict=True):
            for k, i in enumerate(active):
                smoothed[i].mul_(beta).add_(rows[i], alpha=(1 - beta) / values[i])
                squares[k] += float(torch.linalg.vector_norm(smoothed[i])) ** 2
        lengths = squares.sqrt()
        if not bool((lengths > 0).all()):
            bad = active[int((lengths == 0).nonzero()[0])]
            raise SolverError(f"the gradient of {self._label(bad)} is zero", "zero_update")
        self._factors = lengths.max() / lengths
        return None, self._factors / torch.tensor([values[i] for i in active]).double()

    def _join(self, flat: _Flat, active: list[int], weights: Tensor) -> None:
        assert self._smoothed is not None
        factors = torch.zeros_like(weights)
        factors[active] = self._factors
        flat.combine(self._smoothed, active, factors)

    def _head_weights(self, batch: Batch) -> list[float]:
        assert self.weights is not None
        factors = [1.0] * len(self.weights)
        for i, value in self._positive_losses(batch, "its logarithm is taken").items():
            factors[i] = 1 / value
        return factors

    def _state(self) -> dict[str, Any]:
        smoothed = self._smoothed and [x.clone() for x in self._smoothed]
        return {**super()._state(), "smoothed": smoothed, "count": self._count}

    def _load(self, state: Mapping[str, Any]) -> None:
        if "smoothed" not in state or "count" not in state:
            raise ValueError(f"state must hold 'smoothed' and 'count', got {sorted(state)}")
        super()._load({k: v for k, v in state.items() if k not in ("smoothed", "count")})
        saved = state["smoothed"]
        self._smoothed = None if saved is None else [x.clone() for x in saved]
        self._count = int(state["count"])

    def _options(self) -> dict[str, Any]:
        return {"beta": self.beta, "decay": self.decay, **super()._options()}

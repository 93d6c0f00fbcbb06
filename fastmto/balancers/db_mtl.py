"""DB-MTL: logarithms of the losses, and smoothed gradients brought to the largest length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import check_number
from ..engine.batch import Batch
from ..engine.gradient_level import GradientLevel
from ..errors import NonFiniteError
from .gradient_balancer import GradientBalancer, GradientOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


class DBMTL(GradientBalancer):
    """DB-MTL: gradients of the log losses, smoothed, all brought to the largest length.

    Source: Lin et al., Dual-Balancing for Multi-Task Learning, arXiv 2308.12029, Algorithm 1. In
    search k (from 1), for every task,

        e_i <- b_k e_i + (1 - b_k) grad log L_i,    b_k = beta / k^decay
        d   =  sum_i a_i e_i,                       a_i = max_j ||e_j|| / ||e_i||

    e starts at 0, as in the paper. Heads learn by grad log L_i. Between two searches the weight of
    L_i is what it was in the last one, a_i / L_i; e is unchanged then, as it is for a task
    that is absent. e takes T vectors of the size of what is shared, in float32 (float64 for
    float64), and is part of `state_dict`.

    Args:
        beta: forgetting rate in [0, 1).
        decay: how fast it falls, >= 0. The paper tunes both.
        n_tasks, options: as `GradientBalancer`.

    Example:
        >>> import torch, fastmto
        >>> trunk, heads = torch.nn.Linear(4, 8), [torch.nn.Linear(8, 1) for _ in range(2)]
        >>> balancer = fastmto.balancers.DBMTL()
        >>> losses = [head(trunk(torch.ones(3, 4))).exp().mean() for head in heads]
        >>> owned = [head.parameters() for head in heads]
        >>> loss, info = balancer.backward(losses, trunk.parameters(), owned)
        >>> info.weights.shape
        torch.Size([2])
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
        if options.get("level", "parameters") != "parameters":
            raise ValueError(
                "level must be 'parameters': features of different batches cannot be smoothed, "
                f"got {options['level']!r}"
            )
        if options.get("heads", "own") != "own":
            raise ValueError(
                f"heads must be 'own': they learn by log L_i, got {options['heads']!r}"
            )
        super().__init__(n_tasks, **options)

    def reset(self) -> None:
        self._smoothed: list[Tensor] | None = None
        #: Of parameters that are frozen now, or of a loaded state until a call shows whose it is.
        self._parked: dict[Tensor, Tensor] = {}
        self._last_given: list[Tensor] = []
        self._count = 0
        super().reset()

    def _take_over(self, old: GradientLevel | None, new: GradientLevel) -> None:
        rows = new.task_state()
        kept = self._pieces(old)
        shapes = [tuple(p.shape) for p in self._given]
        if kept and not any(p in kept for p in self._given):
            # Of a loaded state or another model: in the order of the parameters.
            got = [tuple(e.shape) for e in kept.values()]
            if got == [tuple(row.shape) for row in rows]:
                # fastmto 0.1.0 saved the rows themselves.
                for row, old_row in zip(rows, kept.values(), strict=True):
                    row.copy_(old_row)
                kept = {}
            elif [shape[1:] for shape in got] != shapes:
                raise ValueError(
                    "shared_parameters must be laid out as before: the smoothed gradients have "
                    f"the shapes {got}, (T, *shape) of each parameter; these have {shapes}"
                )
            else:
                kept = dict(zip(self._given, kept.values(), strict=True))
        for p, piece in zip(new.targets, new.stacked_views(rows), strict=True):
            if p in kept:
                piece.copy_(kept.pop(p))
        self._parked = {p: e.clone() for p, e in kept.items()}
        self._smoothed, self._last_given = rows, self._given

    def _pieces(self, level: GradientLevel | None) -> dict[Tensor, Tensor]:
        """The smoothed gradients (T, *shape) of every shared parameter, those that are frozen now
        included, in the order of the parameters."""
        if level is None or self._smoothed is None:
            return self._parked
        known = dict(zip(level.targets, level.stacked_views(self._smoothed), strict=True))
        known |= self._parked
        return {p: known[p] for p in self._last_given if p in known}

    def _weigh(self, level: GradientLevel, active: list[int], batch: Batch) -> Tensor:
        assert self._smoothed is not None
        values = self._positive_losses(batch, "its logarithm is taken")
        if self.on_nonfinite != "ignore" or batch.seed is not None:
            for i in active:
                if not level.finite(i):
                    raise NonFiniteError(f"the gradient of {self._label(i)} is not finite")
        self._count += 1
        beta = self.beta / self._count**self.decay
        squares = torch.zeros(len(active), dtype=torch.float64)
        for rows, smoothed in zip(level.task_rows, self._smoothed, strict=True):
            if batch.seed is not None:
                rows /= batch.seed
            for k, i in enumerate(active):
                smoothed[i].mul_(beta).add_(rows[i], alpha=(1 - beta) / values[i])
                squares[k] += float(torch.linalg.vector_norm(smoothed[i])) ** 2
        lengths = squares.sqrt()
        # A task whose gradient is zero adds nothing, whatever its weight.
        self._factors = torch.where(lengths > 0, lengths.max() / lengths, 1.0)
        return self._factors / torch.tensor([values[i] for i in active]).double()

    def _join(self, level: GradientLevel, active: list[int], weights: Tensor) -> None:
        assert self._smoothed is not None
        factors = torch.zeros_like(weights)
        factors[active] = self._factors
        level.combine(self._smoothed, factors)
        if level.seed is not None:
            for row in level.joint_rows:
                row *= level.seed

    def _head_weights(self, batch: Batch) -> list[float]:
        assert self.weights is not None
        factors = [1.0] * len(self.weights)
        for i, value in self._positive_losses(batch, "its logarithm is taken").items():
            factors[i] = 1 / value
        return factors

    def _state(self) -> dict[str, Any]:
        pieces = self._pieces(self._gradient_level)
        smoothed = [e.clone() for e in pieces.values()] if pieces else None
        return {**super()._state(), "smoothed": smoothed, "count": self._count}

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        saved = state["smoothed"] or []
        self._smoothed = None
        self._parked = {torch.empty(0): e.clone() for e in saved}
        self._count = int(state["count"])

    def __getstate__(self) -> dict[str, Any]:
        """Copies are of another model's parameters."""
        kept = self._pieces(self._gradient_level)
        parked = {torch.empty(0): e.clone() for e in kept.values()}
        return {**super().__getstate__(), "_smoothed": None, "_parked": parked, "_last_given": []}

    def _options(self) -> dict[str, Any]:
        return {"beta": self.beta, "decay": self.decay, **super()._options()}

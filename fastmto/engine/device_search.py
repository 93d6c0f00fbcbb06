"""A search for weights that stays on the device: decisions are tensors, nothing is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..solvers import STATUSES, Result
from ..weightings import DeviceSolver
from ..weightings.base import is_solved, result_of
from .device import Constants

NOT_FINITE = STATUSES.index("not_finite")


@dataclass(frozen=True)
class Found:
    """What a search says; all on the device.

    Attributes:
        weights: (T,) float64, the weights from now on.
        joint: (T,), what the tasks' gradients are multiplied by in this step: 0 for tasks that take
            no part, NaN where the step is not finite and a scaler is to find that.
        gram: (n, n) of the tasks that take part.
        solution: (n,), the weighting's, if it has one.
        info: (4,), see `fastmto.weightings.Weighting.device_solver`.
        taken: whether the weights are the solver's, a boolean.
        poison: NaN where a scaler is to find that the step is not finite, else 1.
    """

    weights: Tensor
    joint: Tensor
    gram: Tensor
    solution: Tensor
    info: Tensor
    taken: Tensor
    poison: Tensor

    def result(self) -> Result[Tensor]:
        """The solver's result; waits for the device."""
        return result_of(self.info, self.solution)


class DeviceSearch:
    """Finds weights, keeps the last ones and counts, where the Gram matrix lies.

    Every step of a captured CUDA graph reads and writes the same `weights` and `tally`.

    Args:
        solver: of a weighting.
        weights: (T,) to start with; copied.
        device: of the Gram matrices.

    Attributes:
        weights: (T,) float64, the last weights; written in place.
        tally: (2,) int64, searches that held the last weights and steps that are not finite.
    """

    def __init__(self, solver: DeviceSolver, weights: Tensor, device: torch.device) -> None:
        self._solver = solver
        self._indices = Constants(torch.int64)
        self.weights = weights.to(device, torch.float64, copy=True)
        self.tally = torch.zeros(2, dtype=torch.int64, device=device)

    def __call__(
        self,
        gram: Tensor,
        active: Sequence[int],
        settled: Sequence[int] = (),
        *,
        most_kappa: float,
        hold: Callable[[Tensor, Tensor], Tensor],
        heads_finite: Tensor | None,
    ) -> Found:
        """New weights for the active tasks, or the last ones.

        Args:
            gram: (T, T).
            active: the n tasks that take part, increasing.
            settled: where the last weights of some mean nothing, the tasks whose weights do.
            most_kappa: solutions of a larger kappa are not taken.
            hold: Gram matrix (n, n) and last weights (n,) -> the weights where none are found.
            heads_finite: whether the heads' gradients are finite, a boolean on the device; given
                where a step that is not finite must change nothing.
        """
        everyone = len(active) == len(gram)
        index = None if everyone else self._indices(active, gram.device)
        last = self.weights
        if settled:
            known = self._indices(settled, gram.device)
            means = torch.zeros_like(last, dtype=torch.bool).index_fill(0, known, True)
            last = torch.where(means, last, last.index_select(0, known).mean())
        if index is not None:
            gram = gram.index_select(0, index).index_select(1, index)
            last = last.index_select(0, index)
        raw, info = torch.ones_like(last), last.new_zeros(4)
        self._solver(gram, raw, info, None if everyone else active)
        status, taken = info[0], is_solved(info, raw, most_kappa)
        weights = torch.where(taken, raw, hold(gram, last))
        skipped = torch.zeros_like(taken)
        if heads_finite is not None:
            skipped = ~(gram.diagonal().isfinite().all() & heads_finite)
            status.copy_(torch.where(skipped, NOT_FINITE, status))
            taken = taken & ~skipped
            weights = torch.where(skipped, last, weights)
        self.tally.add_(torch.stack((~taken & ~skipped, skipped)))
        poison = torch.where(skipped, torch.nan, torch.ones_like(status))
        joint = weights * poison
        if index is not None:
            joint = torch.zeros_like(self.weights).index_copy(0, index, joint)
            weights = self.weights.index_copy(0, index, weights)
        self.weights.copy_(weights)
        return Found(weights, joint, gram, raw, info, taken, poison)

"""Nash-MTL: the bargaining solution between the tasks' gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import weightings
from ..weightings.base import joint_length
from .gradient_balancer import GradientOptions, GramBalancer

if TYPE_CHECKING:
    from typing_extensions import Unpack


class NashMTL(GramBalancer):
    """Nash-MTL: the bargaining solution between the tasks' gradients, G a = 1/a.

    Source: Navon et al., Multi-Task Learning as a Bargaining Game, ICML 2022, arXiv 2202.01017,
    Claim 3.1 and Algorithm 1. The bound `max_norm` is on the joint gradient of a search, also of
    one that holds the last weights; between two searches the weights stand as they were found.

    Args:
        max_norm, method, preference, tol, max_steps, ridge, warm_start: as
            `fastmto.weightings.NashMTL`.
        n_tasks, options: as `GradientBalancer`.
    """

    key = "nashmtl"

    def __init__(
        self,
        n_tasks: int | None = None,
        *,
        max_norm: float | None = 1.0,
        method: str = "exact",
        preference: Sequence[float] | None = None,
        tol: float = 1e-13,
        max_steps: int = 20,
        ridge: float = 0.0,
        warm_start: bool = False,
        **options: Unpack[GradientOptions],
    ) -> None:
        weighting = weightings.NashMTL(
            max_norm, method, preference, tol, max_steps, ridge, warm_start
        )
        self.max_norm = max_norm
        super().__init__(weighting, n_tasks, **options)

    def _hold(self, gram: Tensor, weights: Tensor) -> Tensor:
        """The last weights are as large as the gradients they were found for were small."""
        if not self.max_norm:
            return weights
        length = joint_length(gram, weights)
        long = (length > self.max_norm) & length.isfinite()
        return torch.where(long, weights * (self.max_norm / length), weights)

"""PCGrad: each gradient loses its component against every gradient it conflicts with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import weightings
from .gradient_balancer import GradientOptions, GramBalancer

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PCGrad(GramBalancer):
    """PCGrad: each gradient loses its component against every gradient it conflicts with.

    Source: Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020, arXiv 2001.06782,
    Algorithm 1. The projections are linear in the gradients, so they are made on the Gram matrix;
    the joint gradient is the sum of the projected ones.

    Args:
        seed: of the random orders in which a task meets the others.
        n_tasks, options: as `GradientBalancer`.
    """

    key = "pcgrad"

    def __init__(
        self,
        n_tasks: int | None = None,
        *,
        seed: int = 0,
        **options: Unpack[GradientOptions],
    ) -> None:
        super().__init__(weightings.PCGrad(seed), n_tasks, **options)

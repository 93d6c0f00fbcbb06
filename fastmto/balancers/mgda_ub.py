"""MGDA-UB: MGDA at the shared representation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .gradient_balancer import GradientOptions
from .mgda import MGDA

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MGDAUB(MGDA):
    """MGDA-UB: MGDA on the gradients at the shared representation, one pass through the trunk.

    Source: Sener and Koltun, Multi-Task Learning as Multi-Objective Optimization, NeurIPS 2018,
    arXiv 1810.04650, section 3.3: the length of the joint gradient at the features bounds that at
    the parameters. It is `MGDA(level="features")`; `backward` needs `features=`.

    Args:
        n_tasks, normalization, options: as `MGDA`.
    """

    key = "mgda_ub"

    def __init__(
        self,
        n_tasks: int | None = None,
        *,
        normalization: str = "none",
        **options: Unpack[GradientOptions],
    ) -> None:
        if options.setdefault("level", "features") != "features":
            raise ValueError(f"level must be 'features', got {options['level']!r}; see MGDA")
        super().__init__(n_tasks, normalization=normalization, **options)

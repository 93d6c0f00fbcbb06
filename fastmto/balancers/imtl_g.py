"""IMTL-G: the joint gradient projects equally on every task's gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import weightings
from .gradient_balancer import GradientOptions, GramBalancer

if TYPE_CHECKING:
    from typing_extensions import Unpack


class IMTLG(GramBalancer):
    """IMTL-G: the joint gradient projects equally on every task's gradient.

    Source: Liu et al., Towards Impartial Multi-task Learning, ICLR 2021, equation 4. The weights
    sum to one. The paper takes the gradients at the shared representation to save passes:
    `level="features"`.

    Args:
        n_tasks, options: as `GradientBalancer`.
    """

    key = "imtl_g"

    def __init__(
        self,
        n_tasks: int | None = None,
        **options: Unpack[GradientOptions],
    ) -> None:
        super().__init__(weightings.IMTLG(), n_tasks, **options)

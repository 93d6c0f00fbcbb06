"""Nash-MTL: bargaining weights with the published clip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .bargaining import Bargaining
from .base import DeviceSolver, joint_length

if TYPE_CHECKING:
    from numpy.typing import NDArray


class NashMTL(Bargaining):
    """The Nash bargaining solution of the tasks' gradients, its length clipped.

    Source: Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022, arXiv 2202.01017,
    Claim 3.1 and Algorithm 1: a > 0 with

        G a = 1/a

    Scaling: the direction does not depend on the lengths of the gradients with "exact":
    g_i -> c_i g_i gives a_i -> a_i / c_i. The length of sum_i a_i g_i is always sqrt(T), whatever
    the gradients (sqrt(sum_i p_i) with a preference).

    Conventions: the published code clips the joint gradient of the shared parameters to
    `max_norm=1`, which with the exact solution of T >= 2 tasks always applies: then the step has
    length `max_norm`. A Gram matrix knows this length, so here the clip is in the weights,

        w = a min(1, max_norm / ||sum_i a_i g_i||)

    (the code adds 1e-6 to the norm, and leaves the gradients of the heads unclipped; weights
    apply to a whole loss). The code iterates a convex-concave procedure, at most 20 times from
    its last weights, which need not reach the solution (see `Bargaining`): to reproduce that take
    `method="ccp", warm_start=True`.

    Peers: TorchJD and LibMTL are ports of this code: CCP by cvxpy and ECOS, at most 20 steps,
    stopping on a residual that mixes the normalised and the raw Gram matrix, and keeping the old
    weights where the solver fails.

    Args:
        max_norm: largest length of the joint gradient; 0 or None: no clip.
        method, preference, tol, max_steps, ridge, warm_start: as `Bargaining`; max_steps=20 is
            the published number.

    Attributes:
        result: with "ccp" or a ridge its weights are those before the clip.

    Raises:
        ValueError: an argument out of range.

    Example: `weights = fastmto.weightings.NashMTL(max_norm=None)(gram)`.
    """

    def __init__(
        self,
        max_norm: float | None = 1.0,
        method: str = "exact",
        preference: Sequence[float] | Tensor | None = None,
        tol: float = 1e-13,
        max_steps: int = 20,
        ridge: float = 0.0,
        warm_start: bool = False,
    ) -> None:
        if max_norm is not None and not 0 <= max_norm < math.inf:
            raise ValueError(f"max_norm must be finite and >= 0, or None, got {max_norm!r}")
        super().__init__(method, preference, tol, max_steps, ridge, warm_start)
        self.max_norm = max_norm or None

    @property
    def _clips_before(self) -> bool:
        """Whether the length is known before the weights: ||sum_i a_i g_i||^2 = sum_i p_i."""
        return self.max_norm is not None and self.method == "exact" and self.ridge == 0.0

    def _powers(self, gram: Tensor, tasks: Sequence[int] | None) -> NDArray[np.float64] | None:
        powers = super()._powers(gram, tasks)
        if not self._clips_before:
            return powers
        assert self.max_norm is not None
        most, n = self.max_norm**2, len(gram)
        total = float(n if powers is None else powers.sum())
        if total <= most:
            return powers
        # Powers of c^2 p have the solution c a: the clip costs nothing.
        return np.full(n, most / n) if powers is None else powers * (most / total)

    def __call__(self, gram: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        weights = super().__call__(gram, tasks)
        if self.max_norm is None or self._clips_before:
            return weights
        assert self.result is not None
        assert self.result.weights is not None
        a = self.result.weights.to("cpu", torch.float64)
        length = float(joint_length(gram.detach().to("cpu", torch.float64), a))
        return weights if length <= self.max_norm else weights * (self.max_norm / length)

    def device_solver(self, n_tasks: int) -> DeviceSolver | None:
        solve = super().device_solver(n_tasks)
        if solve is None:
            return None

        def clipped(
            gram: Tensor, weights: Tensor, info: Tensor, tasks: Sequence[int] | None
        ) -> None:
            solve(gram, weights, info, tasks)
            if self.max_norm is not None and not self._clips_before:
                weights.mul_((self.max_norm / joint_length(gram, weights)).clamp(max=1.0))

        return clipped

    def hold(self, gram: Tensor, weights: Tensor) -> Tensor:
        """The last weights, clipped: small gradients, for which they may be, have large ones."""
        if not self.max_norm:
            return weights
        length = joint_length(gram, weights)
        long = (length > self.max_norm) & length.isfinite()
        return torch.where(long, weights * (self.max_norm / length), weights)

    def _options(self) -> list[str]:
        return [f"max_norm={self.max_norm!r}", *super()._options()]

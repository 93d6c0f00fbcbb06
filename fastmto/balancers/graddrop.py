"""GradDrop: coordinates keep the gradients of one sign, drawn by how pure the sign is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..engine.batch import Batch
from ..engine.gradient_level import GradientLevel
from ..errors import NonFiniteError
from .gradient_balancer import GradientBalancer, GradientOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: Coordinates worked on at once, so that the temporaries stay in the cache.
CHUNK = 1 << 16


class GradDrop(GradientBalancer):
    """GradDrop: coordinates keep the gradients of one sign, drawn by how pure the sign is.

    Source: Chen et al., Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign
    Dropout, NeurIPS 2020, arXiv 2010.06808, equation 1 and Algorithm 1, per coordinate:

        P    = (1 + sum_i g_i / sum_i |g_i|) / 2
        mask = g_i > 0 where P > U, g_i < 0 where P < U, U uniform in [0, 1)
        d    = sum_i (leak_i + (1 - leak_i) mask_i) g_i

    The paper masks the gradients at a layer's activations, summed over the batch; as in the other
    libraries, the coordinates here are those of the parameters (or, with `level="features"`, the
    single activations). Between two searches of weights the step is the plain sum.

    Args:
        leak: (T,) numbers in [0, 1], how much of a task's gradient is never masked; 0 by default.
        seed: of the random numbers.
        n_tasks, options: as `GradientBalancer`.

    Example:
        >>> import torch, fastmto
        >>> trunk, heads = torch.nn.Linear(4, 8), [torch.nn.Linear(8, 1) for _ in range(2)]
        >>> balancer = fastmto.balancers.GradDrop()
        >>> losses = [head(trunk(torch.ones(3, 4))).exp().mean() for head in heads]
        >>> owned = [head.parameters() for head in heads]
        >>> loss, info = balancer.backward(losses, trunk.parameters(), owned)
        >>> info.weights.shape
        torch.Size([2])
    """

    key = "graddrop"

    def __init__(
        self,
        n_tasks: int | None = None,
        *,
        leak: Sequence[float] | None = None,
        seed: int = 0,
        **options: Unpack[GradientOptions],
    ) -> None:
        self.leak = None if leak is None else [float(x) for x in leak]
        if self.leak is not None and not all(0 <= x <= 1 for x in self.leak):
            raise ValueError(f"leak must be numbers in [0, 1], got {self.leak}")
        if type(seed) is not int or seed < 0:
            raise ValueError(f"seed must be an integer >= 0, got {seed!r}")
        self.seed = seed
        super().__init__(n_tasks, **options)

    def reset(self) -> None:
        self._generator: torch.Generator | None = None
        self._generator_state: Tensor | None = None
        super().reset()

    def _set_tasks(self, n_tasks: int) -> None:
        if self.leak is not None and len(self.leak) != n_tasks:
            raise ValueError(f"leak must hold {n_tasks} numbers, one per task, got {self.leak}")
        super()._set_tasks(n_tasks)

    def _weigh(self, level: GradientLevel, active: list[int], batch: Batch) -> Tensor:
        if self._looks_at(batch) or batch.seed is not None:
            for i in active:
                if not level.finite(i):
                    raise NonFiniteError(f"the gradient of {self._label(i)} is not finite")
        return torch.ones(len(active), dtype=torch.float64)

    def _join(self, level: GradientLevel, active: list[int], weights: Tensor) -> None:
        generator = self._random(level.device)
        leak = None if self.leak is None else [self.leak[i] for i in active]
        for rows, out in zip(level.task_rows, level.joint_rows, strict=True):
            maths = torch.float64 if rows.dtype == torch.float64 else torch.float32
            kept = None if leak is None else torch.tensor(leak, dtype=maths, device=rows.device)
            for start in range(0, rows.shape[1], CHUNK):
                part = rows[:, start : start + CHUNK]
                grads = (part if len(active) == len(rows) else part[active]).to(maths)
                uniform = torch.rand(
                    grads.shape[1], dtype=maths, device=rows.device, generator=generator
                )
                purity = (1 + grads.sum(dim=0) / grads.abs().sum(dim=0)) / 2
                masked = torch.where(purity > uniform, grads.clamp(min=0), 0.0)
                masked += torch.where(purity < uniform, grads.clamp(max=0), 0.0)
                if kept is not None:
                    masked = torch.lerp(masked, grads, kept[:, None])
                out[start : start + CHUNK] = masked.sum(dim=0)

    def _random(self, device: torch.device) -> torch.Generator:
        if self._generator is None:
            self._generator = torch.Generator(device).manual_seed(self.seed)
            if self._generator_state is not None:
                self._generator.set_state(self._generator_state)
        return self._generator

    def _state(self) -> dict[str, Any]:
        state = self._generator_state if self._generator is None else self._generator.get_state()
        return {**super()._state(), "generator": state}

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        saved = state["generator"]
        self._generator = None
        self._generator_state = None if saved is None else saved.to("cpu", copy=True)

    def __getstate__(self) -> dict[str, Any]:
        state = self._generator_state if self._generator is None else self._generator.get_state()
        return {**super().__getstate__(), "_generator": None, "_generator_state": state}

    def _options(self) -> dict[str, Any]:
        return {"leak": self.leak, "seed": self.seed, **super()._options()}

"""Problems for the tests of MARIGOLD: quadratics of known answers, a smooth network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class Quadratics:
    """f_i = (theta - c_i)' H_i (theta - c_i) / 2 with diagonal H_i, by default the spec's."""

    def __init__(
        self,
        curvatures: Sequence[Sequence[float]] = ((2, 1), (1, 3)),
        centres: Sequence[Sequence[float]] = ((0, 0), (3, 1)),
    ) -> None:
        self.h = torch.tensor(curvatures, dtype=torch.float64)
        self.c = torch.tensor(centres, dtype=torch.float64)

    def __call__(self, theta: Tensor) -> Tensor:
        return ((theta - self.c) ** 2 * self.h).sum(1) / 2

    def gradients(self, theta: Tensor) -> Tensor:
        return (theta.detach() - self.c) * self.h


def parameter(values: Sequence[float], dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def linear_losses(theta: Tensor, g: Tensor) -> Callable[[], Tensor]:
    """Losses whose gradients are the rows of `g` wherever theta is."""
    return lambda: g @ theta.reshape(-1)


class Smooth(nn.Module):
    """A tanh trunk and linear heads; T regressions on fixed targets. Everything is shared here
    but the heads."""

    def __init__(self, n_tasks: int = 3, width: int = 16, dtype=torch.float64, seed=0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.trunk = nn.Sequential(
                nn.Linear(5, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
            )
            self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(n_tasks))
            self.x = torch.randn(32, 5)
            self.targets = (
                torch.randn(n_tasks, 32, 1) * torch.logspace(-0.5, 0.5, n_tasks)[:, None, None]
            )
        self.to(dtype)
        self.x, self.targets = self.x.to(dtype), self.targets.to(dtype)

    def losses(self) -> list[Tensor]:
        z = self.trunk(self.x)
        return [
            (head(z) - target).pow(2).mean()
            for head, target in zip(self.heads, self.targets, strict=True)
        ]

    def shared(self) -> list[nn.Parameter]:
        return list(self.trunk.parameters())

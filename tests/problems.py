"""Small multi-task problems whose gradients are known exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

#: Many small tensors, odd sizes, a scalar and a matrix whose axes lie the other way round.
SHAPES = [(7,), (3, 5), (), (1,), (17, 3), (2, 3, 4)]


def parameters(seed: int, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES):
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    params.append(nn.Parameter(torch.randn(5, 4, generator=generator).to(dtype).T))
    return params


def gradients(seed: int, params: Sequence[Tensor], n_tasks: int) -> list[list[Tensor]]:
    """g[i][k], with tasks of very different scales that agree only partly."""
    generator = torch.Generator().manual_seed(seed)
    common = [torch.randn(p.shape, generator=generator) for p in params]
    return [
        [
            ((0.3 * c + torch.randn(p.shape, generator=generator)) * 10.0 ** (2 * i)).to(p.dtype)
            for c, p in zip(common, params, strict=True)
        ]
        for i in range(n_tasks)
    ]


def linear_loss(params: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """A loss whose gradient on `params` is `grads`, wherever the parameters are."""
    return torch.stack([(p * g).sum() for p, g in zip(params, grads, strict=True)]).sum()


class Net(nn.Module):
    """A trunk and one head a task; task i's loss is a regression on its own target."""

    def __init__(self, n_tasks: int = 2, width: int = 8) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width))
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(n_tasks))

    def losses(self, x: Tensor) -> list[Tensor]:
        z = self.trunk(x).tanh()
        return [
            (head(z) - (i + 1) * torch.sin(x.sum(1, keepdim=True) * (i + 1))).pow(2).mean()
            for i, head in enumerate(self.heads)
        ]

    def head_parameters(self) -> list[list[nn.Parameter]]:
        return [list(head.parameters()) for head in self.heads]


def net(seed: int = 0, **kwargs: int) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(**kwargs)


def batch(seed: int, n: int = 16) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))

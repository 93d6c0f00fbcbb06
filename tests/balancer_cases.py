"""What the tests of all balancers share: a list of cases and a small world to run them in.

A balancer joins the tests of shared properties with a row in `CASES`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from problems import net
from torch import Tensor

import fastmto
from fastmto.balancers import Balancer, Info


@dataclass(frozen=True)
class BalancerCase:
    """A balancer and what it claims.

    Attributes:
        key: of the method.
        options: its hyperparameters.
        label: tells cases of one method apart.
        level: "loss": `.grad` is the gradient of sum_i w_i L_i everywhere; "gradient": on the
            shared parameters only.
        equivariant: tasks in another order get their weights in that order.
        low: what a loss-level method says of a loss of -1, None where it is welcome.
    """

    key: str
    options: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    level: str = "loss"
    equivariant: bool = True
    low: str | None = None

    def build(self, n_tasks: int | None = 3, **kwargs: Any) -> Balancer:
        options = {**self.options, **kwargs}
        balancer = fastmto.get(self.key, n_tasks, **options)
        return balancer

    def __str__(self) -> str:
        return f"{self.key}-{self.label}" if self.label else self.key


CASES = [
    BalancerCase("ls"),
    BalancerCase("ls", {"task_weights": [0.5, 2.0, -1.0]}, "given", equivariant=False),
    BalancerCase("si", low="must be > 0: SI takes its logarithm"),
    BalancerCase("rlw", {"seed": 3}, equivariant=False),
    BalancerCase("dwa", {"window": 2}),
    BalancerCase("uncertainty"),
    BalancerCase("banditmtl"),
    BalancerCase("banditmtl", {"rho": 0.05, "eta": 2.0}, "tight"),
    BalancerCase("imtl_l", {"init": -1.0}),
    BalancerCase("gradnorm", low="must be > 0: GradNorm divides by a task's first loss"),
    BalancerCase("famo", low="must be > 0: FAMO takes the logarithm"),
    BalancerCase("famo", {"min_losses": [-2.0, -1.5, -1.0], "gamma": 0.0}, "shifted", low="-1"),
    BalancerCase("ldc_mtl", equivariant=False),
    BalancerCase(
        "ldc_mtl",
        {"sigma": "softmax", "normalization": "rescaled", "penalty": 0.05},
        "softmax",
        equivariant=False,
        low="must be > 0: LDCMTL divides by a task's first loss",
    ),
    BalancerCase(
        "ldc_mtl",
        {"tau": "one", "normalization": "log"},
        "log",
        equivariant=False,
        low="must be > 0: LDCMTL takes its logarithm",
    ),
    BalancerCase("mgda", level="gradient"),
    BalancerCase("mgda", {"normalization": "loss+"}, "loss+", level="gradient"),
    BalancerCase("pcgrad", level="gradient", equivariant=False),
    BalancerCase("graddrop", level="gradient"),
    BalancerCase("cagrad", level="gradient"),
    BalancerCase("imtl_g", level="gradient"),
    BalancerCase("imtl", level="gradient"),
    BalancerCase("nashmtl", level="gradient"),
    BalancerCase("upgrad", level="gradient"),
    BalancerCase("dualproj", level="gradient"),
    BalancerCase("fairgrad", {"alpha": 0.5}, level="gradient"),
    BalancerCase("aligned_mtl", level="gradient"),
    BalancerCase("db_mtl", level="gradient"),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


class World:
    """A small model with T tasks, its data, an optimizer, and the loop around a balancer.

    Args:
        balancer: to be called.
        n_tasks: T.
        dtype: of model and data.
        order: tasks in this order; None: 0, 1, ...
    """

    def __init__(
        self,
        balancer: Balancer,
        n_tasks: int = 3,
        dtype: torch.dtype = torch.float64,
        order: Sequence[int] | None = None,
    ) -> None:
        self.balancer = balancer
        self.model = net(1, n_tasks=n_tasks).to(dtype)
        self.order = list(range(n_tasks)) if order is None else list(order)
        self.dtype = dtype
        parameters = [*self.model.parameters(), *balancer.parameters()]
        # Momentum: a parameter that wrongly gets a zero gradient moves on.
        self.optimizer = torch.optim.Adam(parameters, lr=0.01)

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.model.parameters())

    def data(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(100 + step)
        return torch.randn(12, 6, generator=generator, dtype=torch.float64).to(self.dtype)

    def losses(self, step: int) -> list[Tensor]:
        """Positive, of different sizes."""
        losses = self.model.losses(self.data(step))
        return [losses[i] for i in self.order]

    def arguments(self, step: int) -> dict[str, Any]:
        heads = self.model.head_parameters()
        return {
            "shared_parameters": list(self.model.trunk.parameters()),
            "task_specific_parameters": [heads[i] for i in self.order],
            "last_shared_parameters": list(self.model.trunk[2].parameters()),
            "closure": lambda: self.losses(step),
        }

    def call(
        self,
        step: int,
        form: Callable[[list[Tensor | None]], Any] = list,
        absent: Sequence[int] = (),
    ) -> tuple[Tensor, Info]:
        """`backward` after `zero_grad`; `form` turns the list of losses into what is given."""
        self.optimizer.zero_grad()
        losses = [None if i in absent else loss for i, loss in enumerate(self.losses(step))]
        return self.balancer.backward(form(losses), **self.arguments(step))

    def finish(
        self,
        step: int,
        form: Callable[[list[Tensor | None]], Any] = list,
        absent: Sequence[int] = (),
    ) -> None:
        """The optimizer's step, and `update` where there is one."""
        self.optimizer.step()
        if hasattr(self.balancer, "update"):
            with torch.no_grad():
                losses = [None if i in absent else loss for i, loss in enumerate(self.losses(step))]
                self.balancer.update(form(losses))

    def run(self, steps: Sequence[int], **kwargs: Any) -> list[Tensor]:
        """Steps of the loop; the weights of each."""
        weights = []
        for step in steps:
            _, info = self.call(step, **kwargs)
            weights.append(info.weights.clone())
            self.finish(step, **kwargs)
        return weights

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "balancer": self.balancer.state_dict(),
            }
        )

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.balancer.load_state_dict(state["balancer"])
        self.optimizer.load_state_dict(state["optimizer"])

    def gradients(self, step: int) -> list[list[Tensor]]:
        """Every task's gradient on every parameter, by plain autograd."""
        rows = []
        for loss in self.losses(step):
            grads = torch.autograd.grad(loss, self.parameters, retain_graph=True, allow_unused=True)
            rows.append(
                [
                    torch.zeros_like(p) if g is None else g
                    for p, g in zip(self.parameters, grads, strict=True)
                ]
            )
        return rows

    def expect_weighted(self, step: int, weights: Sequence[float], tolerance: float) -> None:
        """`.grad` is sum_i weights_i g_i."""
        rows = self.gradients(step)
        for k, p in enumerate(self.parameters):
            total = sum(w * row[k] for w, row in zip(weights, rows, strict=True))
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(grad, total, rtol=tolerance, atol=tolerance)


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit, through dicts and lists."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)

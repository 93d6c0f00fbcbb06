"""Gradient normalisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..checks import check_number
from ..engine.batch import Batch
from ..engine.graph import graph_root
from ..engine.per_task import TaskAdam, like, put, take
from .loss_balancer import LossBalancer

#: Weights are kept above this: at 0 a task would be lost, below it unlearned.
LEAST_WEIGHT = 1e-3


class GradNorm(LossBalancer):
    """GradNorm: weights that bring the tasks' weighted gradients to lengths set by their progress.

    Source: Chen et al., ICML 2018, equations 1 and 2 and Algorithm 1. On the last shared layer W:

        G_i = ||grad_W w_i L_i||      r_i = (L_i / L_i(0)) / mean_j(L_j / L_j(0))
        minimise over w   sum_i |G_i - mean_j(G_j) r_i^alpha|,   the target held constant
            d/dw_i = sign(G_i - mean_j(G_j) r_i^alpha) ||grad_W L_i||
        then w <- w T / sum_j w_j

    A step moves the model with the weights as they are and then the weights, by the method's own
    Adam. L_i(0) is the first loss seen of task i; the paper also takes log C for the
    cross-entropy of C classes: `initial_losses`. Deviation: weights are kept above
    `LEAST_WEIGHT`, which the paper leaves to the learning rate. LibMTL has w = T softmax(v)
    instead, the first epoch's mean as L_i(0), all shared parameters as W and the user's optimizer.

    Means run over the present tasks, whose weights keep their sum.

    Cost: at every search one partial backward a present task, from its loss down to W, besides
    the one backward of the weighted sum. On the two-task census MMOE (one-layer experts, batch
    1024, one thread) a step with a search takes 1.3 plain steps where W is the experts' bias, 1.65
    where it is the whole layer; with `update_weights_every=25` that is 1.01 and 1.03 by arithmetic.

    Args:
        n_tasks: T; None: found at the first backward.
        alpha: strength of the restoring force, >= 0.
        lr: of the weights' Adam, > 0.
        initial_losses: T losses L_i(0) > 0; None: the first seen.
        update_weights_every, on_nonfinite, loss_floor: see `Balancer`.

    `backward` needs `last_shared_parameters`.

    Raises:
        ValueError: an argument out of range or missing; a first loss that is not positive or a
            later one that is negative (see `LossBalancer`).

    Example:
        >>> import torch, fastmto
        >>> trunk, heads = torch.nn.Linear(4, 8), [torch.nn.Linear(8, 1) for _ in range(2)]
        >>> balancer = fastmto.balancers.GradNorm()
        >>> losses = [head(trunk(torch.ones(3, 4))).exp().mean() for head in heads]
        >>> loss, info = balancer.backward(losses, last_shared_parameters=trunk.parameters())
        >>> info.weights.shape
        torch.Size([2])
    """

    key = "gradnorm"

    def __init__(
        self,
        n_tasks: int | None = None,
        *,
        alpha: float = 1.5,
        lr: float = 0.025,
        initial_losses: list[float] | None = None,
        update_weights_every: int = 1,
        on_nonfinite: str | None = None,
        loss_floor: float | None = None,
    ) -> None:
        self.alpha = check_number("alpha", alpha, 0)
        self.lr = check_number("lr", lr, 0, open_low=True)
        self.initial_losses = None
        if initial_losses is not None:
            self.initial_losses = [
                check_number(f"initial_losses[{i}]", loss, 0, open_low=True)
                for i, loss in enumerate(initial_losses)
            ]
            n_tasks = len(self.initial_losses) if n_tasks is None else n_tasks
        super().__init__(
            n_tasks,
            update_weights_every=update_weights_every,
            on_nonfinite=on_nonfinite,
            loss_floor=loss_floor,
        )

    def _set_tasks(self, n_tasks: int) -> None:
        super()._set_tasks(n_tasks)
        self._initial = torch.ones(n_tasks, dtype=torch.float64)
        self._seen = [False] * n_tasks
        if self.initial_losses is not None:
            if len(self.initial_losses) != n_tasks:
                raise ValueError(
                    f"initial_losses must hold {n_tasks} losses, got {len(self.initial_losses)}"
                )
            self._initial = torch.tensor(self.initial_losses, dtype=torch.float64)
            self._seen = [True] * n_tasks
        self._w = torch.ones(n_tasks, dtype=torch.float64)
        self._adam = TaskAdam(n_tasks, self.lr)

    def _weigh(self, batch: Batch, losses: Tensor) -> Tensor:
        if not batch.last_shared:
            raise ValueError(
                "last_shared_parameters must be given: GradNorm compares the lengths of the "
                f"tasks' gradients on them, got {batch.last_shared}"
            )
        for k, parameter in enumerate(batch.last_shared):
            if not parameter.requires_grad:
                raise ValueError(f"last_shared_parameters[{k}] must require grad, got a frozen one")
        if all(self._seen[task] for task in batch.tasks):
            self._refuse_low(batch, "takes a power of it", or_equal=False)
        else:
            self._refuse_low(batch, "divides by a task's first loss")
        # While the graph is there: the backward of the weighted losses frees it.
        self._measured = self._lengths(batch, losses)
        return take(like(self._w, losses), batch.tasks)

    def _learn(self, batch: Batch, losses: Tensor, weights: Tensor) -> None:
        losses = self._floored(losses)
        initial = like(self._initial, losses)
        for task, loss in zip(batch.tasks, losses.unbind(), strict=True):
            if not self._seen[task]:
                initial = put(initial, [task], loss.reshape(1))
                self._seen[task] = True
        self._initial = initial
        lengths = self._measured
        progress = losses / take(initial, batch.tasks)
        rates = progress / progress.mean()
        own = weights * lengths
        target = own.mean() * rates**self.alpha
        gradient = (own - target).sign() * lengths
        before = like(self._adam.state, losses)
        moved = self._adam.step(weights, gradient, batch.tasks).clamp(min=LEAST_WEIGHT)
        moved = moved * (weights.sum() / moved.sum())
        if batch.seed is not None:
            # Lengths that overflow by the scale teach nothing.
            finite = lengths.isfinite().all()
            moved = torch.where(finite, moved, weights)
            self._adam.state = torch.where(finite, self._adam.state, before)
        self._w = put(like(self._w, losses), batch.tasks, moved)

    def _lengths(self, batch: Batch, losses: Tensor) -> Tensor:
        """||grad_W L_i|| of the present tasks (n,)."""
        assert batch.last_shared is not None
        lengths = []
        for value in batch.present:
            grads = torch.autograd.grad(
                graph_root(value),
                batch.last_shared,
                torch.ones_like(value)
                if batch.seed is None
                else batch.seed.to(value).expand_as(value),
                retain_graph=True,
                allow_unused=True,
            )
            self._counted["backwards"] += 1
            parts = [
                torch.linalg.vector_norm(grad, dtype=losses.dtype)
                for grad in grads
                if grad is not None
            ]
            if not parts:
                self._counted["untouched"] += 1
                parts = [losses.new_zeros(())]
            lengths.append(torch.linalg.vector_norm(torch.stack(parts)))
        stacked = torch.stack(lengths)
        return stacked if batch.seed is None else stacked / batch.seed

    def _state(self) -> dict[str, Any]:
        return {
            "w": self._w.clone(),
            "initial": self._initial.clone(),
            "seen": list(self._seen),
            "adam": self._adam.state_dict(),
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self._w = state["w"].clone()
        self._initial = state["initial"].clone()
        self._seen = list(state["seen"])
        self._adam.load_state_dict(state["adam"])

    def _options(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "lr": self.lr, "initial_losses": self.initial_losses}

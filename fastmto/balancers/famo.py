"""Fast adaptive multitask optimization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_number
from ..engine.batch import Batch
from ..engine.compiler import uncompiled
from ..engine.losses import Losses, as_list, first_nonfinite
from ..engine.per_task import TaskAdam, like, put, take
from ..errors import NonFiniteError, warn
from .loss_balancer import LossBalancer


class FAMO(LossBalancer):
    """FAMO: all losses shall fall at the same rate; the weights learn from how much they fell.

    Source: Liu et al., NeurIPS 2023, Algorithm 1. With l_i = L_i - min_i and logits xi:

        z = softmax(xi),   c = 1 / sum_i (z_i / l_i)
        w_i = c z_i / l_i                     (sum_i w_i = 1; the model moves along the gradient of
                                              c sum_i z_i log l_i)
        xi <- xi - lr (J_z(xi)' delta + gamma xi),    delta_i = log l_i(before) - log l_i(after)

    where J_z' delta = z * (delta - z.delta). As in the released code, Adam makes the last step,
    with gamma as its weight decay. The released code adds 1e-8 to l_i, as TorchJD's FAMO does; here
    no loss may reach its minimum. Its famo.py also cuts the shared gradient to length 1 (its
    weight_methods.py does so before there is one, to no effect): `torch.nn.utils.clip_grad_norm_`
    is yours to call.

    **`update(losses)` belongs to the method**: call it after the optimizer's step with the losses
    on the same batch, or, where a second forward is too dear and the batches are alike, with the
    next batch's losses before its backward. Without it the weights never change; a search that
    finds no update since the last one warns.

    The softmax and c are over the present tasks; `update` moves the logits of tasks that were
    present at the last search and are given now.

    Args:
        n_tasks: T; None: found at the first backward.
        lr: of the logits' Adam, > 0.
        gamma: weight decay of the logits, >= 0. The paper's experiments take 0.001 and 0.01, the
            toy problem 0.
        min_losses: T numbers min_i below all losses, where losses can be <= 0; None: 0.
        update_weights_every, on_nonfinite, loss_floor: see `Balancer`; the floor is of l_i. Between
            searches `update` changes nothing.

    Raises:
        ValueError: an argument out of range; a loss that is not above its minimum (see
            `LossBalancer`).

    Example:
        >>> import torch, fastmto
        >>> trunk, heads = torch.nn.Linear(4, 8), [torch.nn.Linear(8, 1) for _ in range(2)]
        >>> balancer = fastmto.balancers.FAMO()
        >>> losses = [head(trunk(torch.ones(3, 4))).exp().mean() for head in heads]
        >>> loss, info = balancer.backward(losses, trunk.parameters())
        >>> info.weights.shape
        torch.Size([2])
        >>> balancer.update([loss.detach() for loss in losses])  # after the optimizer's step
    """

    key = "famo"

    def __init__(
        self,
        n_tasks: int | None = None,
        *,
        lr: float = 0.025,
        gamma: float = 0.01,
        min_losses: Sequence[float] | None = None,
        update_weights_every: int = 1,
        on_nonfinite: str | None = None,
        loss_floor: float | None = None,
    ) -> None:
        self.lr = check_number("lr", lr, 0, open_low=True)
        self.gamma = check_number("gamma", gamma, 0)
        self.min_losses: list[float] | None = None
        if min_losses is not None:
            self.min_losses = [
                check_number(f"min_losses[{i}]", float(low), -float("inf"))
                for i, low in enumerate(min_losses)
            ]
            n_tasks = len(self.min_losses) if n_tasks is None else n_tasks
        super().__init__(
            n_tasks,
            update_weights_every=update_weights_every,
            on_nonfinite=on_nonfinite,
            loss_floor=loss_floor,
        )

    def _set_tasks(self, n_tasks: int) -> None:
        super()._set_tasks(n_tasks)
        self.weights = torch.full((n_tasks,), 1 / n_tasks, dtype=torch.float64)
        if self.min_losses is not None and len(self.min_losses) != n_tasks:
            raise ValueError(f"min_losses must hold {n_tasks} numbers, got {len(self.min_losses)}")
        self._minima = torch.tensor(self.min_losses or [0.0] * n_tasks, dtype=torch.float64)
        self._logits = torch.zeros(n_tasks, dtype=torch.float64)
        self._adam = TaskAdam(n_tasks, self.lr, self.gamma)
        self._before = torch.zeros(n_tasks, dtype=torch.float64)  # log l at the last search
        self._pending: list[int] = []  # the tasks of a search whose update is still to come

    def _weigh(self, batch: Batch, losses: Tensor) -> Tensor:
        self._refuse_low(batch, "takes the logarithm of its distance to that", self.min_losses)
        if self._pending:
            warn(
                "FAMO found no update(losses) since its last search: its weights cannot change "
                "without; call it after the optimizer's step"
            )
        z = take(like(self._logits, losses), batch.tasks).softmax(0)
        ratios = z / self._above(losses, batch.tasks)
        return ratios / ratios.sum()

    def _learn(self, batch: Batch, losses: Tensor, weights: Tensor) -> None:
        logs = self._above(losses, batch.tasks).log()
        self._before = put(like(self._before, losses), batch.tasks, logs)
        self._pending = batch.tasks

    def _above(self, losses: Tensor, tasks: Sequence[int]) -> Tensor:
        """l_i = L_i - min_i (n,)."""
        if self.min_losses is None:
            return self._floored(losses)
        self._minima = like(self._minima, losses)
        return self._floored(losses - take(self._minima, tasks))

    @property
    def needs_update(self) -> bool:
        return True

    @uncompiled
    def update(self, losses: Losses) -> None:
        """Move the logits by how far the losses fell since the last search.

        Does nothing after a step that did not search or was skipped.

        Args:
            losses: as in `backward`, after the optimizer's step; graphs are not needed.

        Raises:
            RuntimeError: there was no backward yet.
            ValueError: wrong losses, or one that is not above its minimum.
            NonFiniteError: with `on_nonfinite="raise"`.
        """
        if not self._found and not self._counted["skipped"]:
            raise RuntimeError("update(losses) must come after backward(losses), got no backward")
        values, _ = as_list(losses, self.n_tasks, self.names, attached=False)
        tasks = [i for i in self._pending if values[i] is not None]
        if not tasks:
            return
        kept = [value if i in tasks else None for i, value in enumerate(values)]
        batch = Batch(kept, None, None, None, None, None)
        if self._looks_at(batch):
            bad = first_nonfinite(kept)
            if bad is not None:
                self._pending = []
                what = f"update: {self._label(bad)} is not finite"
                self._counted["skipped"] += 1
                if self.on_nonfinite == "raise":
                    raise NonFiniteError(f"{what}; the logits stay")
                warn(f"{what}; the logits stay (stats['skipped'])")
                return
        self._refuse_low(batch, "takes the logarithm of its distance to that", self.min_losses)
        with torch.no_grad():
            after = batch.losses
            logits = like(self._logits, after)
            own = take(logits, tasks)
            delta = take(like(self._before, after), tasks) - self._above(after, tasks).log()
            z = own.softmax(0)
            gradient = z * (delta - (z * delta).sum())
            self._logits = put(logits, tasks, self._adam.step(own, gradient, tasks))
        self._pending = []

    def _state(self) -> dict[str, Any]:
        return {
            "logits": self._logits.clone(),
            "adam": self._adam.state_dict(),
            "before": self._before.clone(),
            "pending": list(self._pending),
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self._logits = state["logits"].clone()
        self._adam.load_state_dict(state["adam"])
        self._before = state["before"].clone()
        self._pending = list(state["pending"])

    def _options(self) -> dict[str, Any]:
        return {"lr": self.lr, "gamma": self.gamma, "min_losses": self.min_losses}

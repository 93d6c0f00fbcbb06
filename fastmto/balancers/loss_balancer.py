"""Balancers that weigh the losses by their values and make one backward of the weighted sum."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..engine.balancer import Balancer
from ..engine.batch import Batch, Info
from ..engine.per_task import like, put


class LossBalancer(Balancer):
    """Base of the loss-level methods: one backward of sum_i w_i L_i through the whole graph.

    Heads get the gradient of the weighted sum, like everything else. A subclass defines `_weigh`,
    `_learn` if the search also changes what later searches say, and `_observe` if it looks at the
    losses of every step.

    Methods that take a logarithm or a reciprocal of a loss call `_refuse_low`: a loss too low for
    it is a ValueError that names the task, unless `loss_floor` bounds what they see. The losses
    are read on CPUs always and on accelerators with `on_nonfinite="skip"` or "raise", where they
    are read anyway; otherwise the weights become what the arithmetic says, mostly NaN.
    """

    def _backward(self, batch: Batch, searches: bool) -> tuple[Tensor, Info]:
        assert self.weights is not None
        if batch.accumulate:
            raise ValueError(
                f"accumulate must be False for {type(self).__name__}, which weighs losses, not "
                "gradients: call backward for every micro-batch, .grad adds up"
            )
        losses = batch.losses
        with torch.no_grad():
            weights = self._weigh(batch, losses) if searches else like(self._current(batch), losses)
            self._observe(batch, losses)
        seeds = weights if batch.seed is None else weights * batch.seed
        roots = batch.present
        starts = [
            seed.to(loss.dtype).expand_as(loss)
            for seed, loss in zip(seeds.unbind(), roots, strict=True)
        ]
        if batch.unbalanced is not None:
            one = torch.ones_like(batch.unbalanced)
            starts.append(one if batch.seed is None else one * batch.seed)
            roots = [*roots, batch.unbalanced]
        torch.autograd.backward(roots, starts, retain_graph=batch.retain_graph)
        self._counted["backwards"] += 1
        with torch.no_grad():
            if searches:
                self._learn(batch, losses, weights)
                self._keep(batch, weights)
                self._found = True
                self._counted["searches"] += 1
            return (weights * losses).sum(), Info(self.weights, self.names)

    @abstractmethod
    def _weigh(self, batch: Batch, losses: Tensor) -> Tensor:
        """The weights of the present tasks; called in `no_grad`.

        Args:
            batch: the call.
            losses: (n,) values of the present tasks `batch.tasks`, detached.

        Returns:
            (n,) of the dtype and on the device of `losses`.
        """

    def _learn(self, batch: Batch, losses: Tensor, weights: Tensor) -> None:
        """Move the method's own state, or add to the `.grad` of its own parameters.

        Called after the backward with what `_weigh` returned, in `no_grad`.
        """
        return None

    def _observe(self, batch: Batch, losses: Tensor) -> None:
        """See the losses of every step, searching or not; called in `no_grad`, before the
        backward."""
        return None

    def _keep(self, batch: Batch, weights: Tensor) -> None:
        """Remember the weights of the present tasks; absent ones keep theirs."""
        assert self.weights is not None
        # `put` leaves the old weights alone: an Info may still show them.
        self.weights = put(like(self.weights, weights), batch.tasks, weights)

    def _reads(self, batch: Batch) -> bool:
        """Whether values may be read: free on CPUs, elsewhere where the user asked for it."""
        return batch.present[0].device.type == "cpu" or self._looks_at(batch)

    def _refuse_low(
        self,
        batch: Batch,
        why: str,
        bounds: Sequence[float] | None = None,
        *,
        or_equal: bool = True,
    ) -> None:
        """Refuse losses that are not above a bound.

        Args:
            batch: the call.
            why: what the method does with the loss, for the message.
            bounds: T lower bounds; None: 0.
            or_equal: refuse a loss at its bound, too.

        Raises:
            ValueError: naming the task.
        """
        if self.loss_floor is not None or not self._reads(batch):
            return
        for task, loss in zip(batch.tasks, batch.present, strict=True):
            value = loss.item()
            bound = 0.0 if bounds is None else bounds[task]
            # NaN passes: it is the business of on_nonfinite.
            if value < bound or (or_equal and value == bound):
                sign = ">" if or_equal else ">="
                raise ValueError(
                    f"{self._label(task)} must be {sign} {bound:g}: {type(self).__name__} {why}, "
                    f"got {value:g}; loss_floor= bounds what it sees"
                )


class LearningBalancer(LossBalancer):
    """Base of methods that learn one scalar a task together with the model.

    The user's optimizer moves the scalars: `parameters()` goes into it, possibly as a group with
    its own learning rate. `_learn` adds their gradients, written out by hand, to `.grad`. Between
    two searches, and for absent tasks, no gradient is added: with gradients set to None by
    `zero_grad()` (torch's default) torch's optimizers leave those scalars alone.

    Args:
        n_tasks: T; needed, because the optimizer wants the parameters before the first backward.
        init: initial value of the scalars.
        device, dtype: of the scalars, as for `torch.nn` modules; without `device` they follow the
            losses to their device at the first backward. Give `device` to load the state of an
            optimizer on that device before.

    Raises:
        ValueError: without `n_tasks`, or an argument out of range.
    """

    def __init__(
        self,
        n_tasks: int | None,
        *,
        init: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        update_weights_every: int,
        on_nonfinite: str | None,
        loss_floor: float | None = None,
    ) -> None:
        if n_tasks is None:
            raise ValueError(
                f"n_tasks must be given: {type(self).__name__} has learnable parameters, which "
                "the optimizer needs before the first backward"
            )
        self._init = init
        self._device, self._dtype = device, dtype
        self._scalars: list[Parameter] = []
        super().__init__(
            n_tasks,
            update_weights_every=update_weights_every,
            on_nonfinite=on_nonfinite,
            loss_floor=loss_floor,
        )

    def _set_tasks(self, n_tasks: int) -> None:
        super()._set_tasks(n_tasks)
        if not self._scalars:
            self._scalars = [
                Parameter(torch.empty((), device=self._device, dtype=self._dtype))
                for _ in range(n_tasks)
            ]
        # Filled in place, also by `reset`: an optimizer may hold them.
        with torch.no_grad():
            for scalar in self._scalars:
                scalar.fill_(self._init)
                scalar.grad = None

    def parameters(self) -> list[Parameter]:
        """T scalars, one per task."""
        return list(self._scalars)

    def _learned(self, batch: Batch, losses: Tensor) -> Tensor:
        """The scalars (n,) of the present tasks, detached, like `losses`."""
        for scalar in self._scalars:
            if scalar.device != losses.device:
                scalar.data = scalar.data.to(losses.device)
                scalar.grad = None
        return like(torch.stack([self._scalars[i].detach() for i in batch.tasks]), losses)

    def _add_gradients(self, batch: Batch, gradients: Tensor) -> None:
        """Add (n,) gradients to the present tasks' scalars, scaled as the others are."""
        if batch.seed is not None:
            gradients = gradients * batch.seed
        for task, gradient in zip(batch.tasks, gradients.unbind(), strict=True):
            scalar = self._scalars[task]
            own = gradient.to(scalar.dtype)
            scalar.grad = own if scalar.grad is None else scalar.grad + own

    def _state(self) -> dict[str, Any]:
        return {"scalars": torch.stack([scalar.detach() for scalar in self._scalars])}

    def _load(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for scalar, value in zip(self._scalars, state["scalars"].unbind(), strict=True):
                scalar.copy_(value)

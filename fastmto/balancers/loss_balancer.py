"""Balancers that weigh the losses by their values and make one backward of the weighted sum."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from .base import Balancer, Batch, Info


class LossBalancer(Balancer):
    """Base of the loss-level methods: one backward of sum_i w_i L_i through the whole graph.

    Heads get the gradient of the weighted sum, like everything else. A subclass defines `_weigh`,
    and `_learn` if it has learnable parameters.
    """

    def _backward(self, batch: Batch, searches: bool) -> tuple[Tensor, Info]:
        assert self.weights is not None
        losses = batch.losses
        if searches:
            with torch.no_grad():
                weights = self._weigh(batch, losses)
                self._learn(batch, losses)
            self._keep(batch, weights)
            self._found = True
            self.stats["searches"] += 1
        else:
            weights = self._current(batch).to(losses.device, losses.dtype)
        torch.autograd.backward(
            batch.present,
            [
                weight.to(loss.dtype).expand_as(loss)
                for weight, loss in zip(weights, batch.present, strict=True)
            ],
        )
        self.stats["backwards"] += 1
        return weights @ losses, Info(self.weights, self.names)

    @abstractmethod
    def _weigh(self, batch: Batch, losses: Tensor) -> Tensor:
        """The weights of the present tasks; called in `no_grad`.

        Args:
            batch: the call.
            losses: (n,) values of the present tasks `batch.tasks`, detached.

        Returns:
            (n,) of the dtype and on the device of `losses`.
        """

    def _learn(self, batch: Batch, losses: Tensor) -> None:
        """Add to the `.grad` of the method's own parameters; called after `_weigh`."""
        return None

    def _keep(self, batch: Batch, weights: Tensor) -> None:
        """Remember the weights of the present tasks; absent ones keep theirs."""
        assert self.weights is not None
        if self.weights.device != weights.device or self.weights.dtype != weights.dtype:
            self.weights = self.weights.to(weights.device, weights.dtype)
        if len(weights) == len(self.weights):
            self.weights = weights.detach()
        else:
            kept = self.weights.clone()  # an Info may still show the old ones
            kept[batch.tasks] = weights.detach()
            self.weights = kept

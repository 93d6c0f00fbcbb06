"""Dynamic weight average."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..checks import check_number
from ..engine.batch import Batch
from ..engine.per_task import like, put, take
from .loss_balancer import LossBalancer


class DWA(LossBalancer):
    """Dynamic weight average: more weight for tasks whose loss falls slowly.

    Source: Liu, Johns & Davison, CVPR 2019, equation 7.

        w_i(e) = n exp(r_i / temp) / sum_j exp(r_j / temp),    r_i = L_i(e-1) / L_i(e-2)

    with L_i(e) the mean loss of task i in epoch e and n the number of present tasks; the sums run
    over the present tasks. A task has r_i = 1 until two of its epochs are over, so that w = 1 in
    the first two epochs, as in the paper.

    What an epoch is: `window` steps, 25 by default, so that the method balances without being told
    about epochs; nash-mtl has 25, too, as two sliding windows, of which the older one still holds
    the ones it started with when the first ratios are taken. With `window=None` an epoch ends when
    you call `end_epoch()`, as in the paper, LibMTL and TorchJD. Every step counts, also those
    between two searches. A mean is over the steps at which the task was present; a task absent for
    a whole epoch keeps its last two means.

    Args:
        n_tasks: T; None: found at the first backward.
        temp: temperature > 0.
        window: steps an epoch, or None for epochs ended by `end_epoch()`.
        update_weights_every, on_nonfinite, loss_floor: see `Balancer`.

    Raises:
        ValueError: an argument out of range, or at the end of an epoch a mean loss that is not
            positive (see `LossBalancer`).

    Example:
        >>> import torch, fastmto
        >>> trunk, heads = torch.nn.Linear(4, 8), [torch.nn.Linear(8, 1) for _ in range(2)]
        >>> balancer = fastmto.balancers.DWA()
        >>> losses = [head(trunk(torch.ones(3, 4))).exp().mean() for head in heads]
        >>> loss, info = balancer.backward(losses, trunk.parameters())
        >>> info.weights.shape
        torch.Size([2])
    """

    key = "dwa"

    def __init__(
        self,
        n_tasks: int | None = None,
        *,
        temp: float = 2.0,
        window: int | None = 25,
        update_weights_every: int = 1,
        on_nonfinite: str | None = None,
        loss_floor: float | None = None,
    ) -> None:
        self.temp = check_number("temp", temp, 0, open_low=True)
        if window is not None and (type(window) is not int or window < 1):
            raise ValueError(f"window must be an integer >= 1 or None, got {window!r}")
        self.window = window
        super().__init__(
            n_tasks,
            update_weights_every=update_weights_every,
            on_nonfinite=on_nonfinite,
            loss_floor=loss_floor,
        )

    def reset(self) -> None:
        self._sums: Tensor | None = None
        super().reset()

    def _set_tasks(self, n_tasks: int) -> None:
        super()._set_tasks(n_tasks)
        # Per task: the running epoch's sum, and the means of the last two epochs, 1 before.
        self._sums = torch.zeros(n_tasks, dtype=torch.float64)
        self._means = torch.ones(2, n_tasks, dtype=torch.float64)  # older, newer
        self._counts = [0] * n_tasks  # steps in the running epoch
        self._epochs = [0] * n_tasks  # epochs that are over
        self._elapsed = 0

    def end_epoch(self) -> None:
        """End the epoch; only with `window=None`. Synchronizes where values are read.

        Raises:
            RuntimeError: the epochs are `window` steps long.
            ValueError: a mean loss that is not positive; the epoch goes on.
        """
        if self.window is not None:
            raise RuntimeError(
                f"end_epoch() needs DWA(window=None): epochs end every window={self.window} steps"
            )
        if self._sums is not None:
            reads = self._sums.device.type == "cpu" or self.on_nonfinite in ("skip", "raise")
            with torch.no_grad():
                self._close(reads)

    def _weigh(self, batch: Batch, losses: Tensor) -> Tensor:
        older, newer = like(self._means, losses).unbind()
        # Tasks with fewer than two epochs have 1 / 1.
        ratios = take(newer / older, batch.tasks)
        return len(batch.tasks) * (ratios / self.temp).softmax(0)

    def _observe(self, batch: Batch, losses: Tensor) -> None:
        assert self._sums is not None
        before = self._sums, list(self._counts), self._elapsed
        sums = like(self._sums, losses)
        self._sums = put(sums, batch.tasks, take(sums, batch.tasks) + losses)
        for task in batch.tasks:
            self._counts[task] += 1
        self._elapsed += 1
        if self._elapsed == self.window:
            try:
                self._close(self._reads(batch))
            except ValueError:
                self._sums, self._counts, self._elapsed = before  # the step is not made
                raise

    def _close(self, reads: bool) -> None:
        """Turn the running sums into the newest means."""
        assert self._sums is not None
        seen = [task for task, count in enumerate(self._counts) if count]
        if seen:
            counts = self._sums.new_tensor([self._counts[task] for task in seen])
            newest = self._floored(take(self._sums, seen) / counts)
            if reads:
                for task, mean in zip(seen, newest.tolist(), strict=True):
                    if mean <= 0:
                        raise ValueError(
                            f"{self._label(task)} must have a mean > 0 over an epoch: DWA divides "
                            f"by it, got {mean:g}; loss_floor= bounds what it sees"
                        )
            older, newer = like(self._means, newest).unbind()
            # A first mean fills both rows: the task's ratio is 1 until there is a second.
            first = [task for task in seen if self._epochs[task] == 0]
            again = [task for task in seen if self._epochs[task] > 0]
            every = put(newer, seen, newest)
            older = _moved(older, newer, again)
            older = _moved(older, every, first)
            self._means = torch.stack([older, every])
        for task in seen:
            self._epochs[task] += 1
        self._sums = torch.zeros_like(self._sums)
        self._counts = [0] * len(self._counts)
        self._elapsed = 0

    def _state(self) -> dict[str, Any]:
        assert self._sums is not None
        return {
            "sums": self._sums.clone(),
            "means": self._means.clone(),
            "counts": list(self._counts),
            "epochs": list(self._epochs),
            "elapsed": self._elapsed,
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self._sums = state["sums"].clone()
        self._means = state["means"].clone()
        self._counts = list(state["counts"])
        self._epochs = list(state["epochs"])
        self._elapsed = state["elapsed"]

    def _options(self) -> dict[str, Any]:
        return {"temp": self.temp, "window": self.window}


def _moved(state: Tensor, source: Tensor, tasks: list[int]) -> Tensor:
    """`state` with the entries of `tasks` taken from `source`."""
    return put(state, tasks, take(source, tasks)) if tasks else state

"""Training steps as CUDA graphs: launched by one call, without Python between the kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .optim import UpdateBalancer
from .task_gradients import Losses


class GraphedStep:
    """A whole training step (forward, backward, balancing, moving) as CUDA graphs.

        graphed = fastmto.GraphedStep(optimizer, lambda x, y: model_losses(x, y))
        for x, y in batches:
            losses = graphed(x, y)

    stands for

        optimizer.zero_grad()
        losses = compute_losses(x, y)
        optimizer.backward(losses)
        optimizer.step()

    and makes the same steps, bit for bit. A step with a search of weights and one without are two
    graphs. The first `eager_steps` of each kind run as they are; the next is captured, and from
    then on it is replayed. Learning rates and other numbers of the param groups may change between
    calls, by a scheduler or by hand.

    What holds for CUDA graphs holds here: `compute_losses` must do the same for every batch, on
    tensors of the same shapes, without waiting for the device; what it draws at random comes from
    torch's default generator; the model may not be replaced, but its parameters may be loaded in
    place. No GradScaler: use bfloat16 autocast, which needs none.

    Args:
        optimizer: `PUB` or `AdaTask` whose parameters are on a GPU and whose step is capturable.
        compute_losses: batch -> losses, as `optimizer.backward` takes them.
        eager_steps: of each kind, >= 1: they allocate and compile what a capture may not.

    Raises:
        ValueError: an argument out of range, an optimizer that cannot be captured.
    """

    def __init__(
        self,
        optimizer: UpdateBalancer,
        compute_losses: Callable[..., Losses],
        *,
        eager_steps: int = 2,
    ) -> None:
        if not isinstance(optimizer, UpdateBalancer):
            raise ValueError(
                f"optimizer must be a PUB or AdaTask, got {type(optimizer).__name__}; capture "
                "other optimizers with torch.cuda.graph"
            )
        _check_capturable(optimizer)
        if type(eager_steps) is not int or eager_steps < 1:
            raise ValueError(f"eager_steps must be an integer >= 1, got {eager_steps!r}")
        self._optimizer = optimizer
        self._compute_losses = compute_losses
        self._eager_steps = eager_steps
        self._batch: tuple[Tensor, ...] | None = None
        self._stream: torch.cuda.Stream | None = None  # of what is captured, and before it
        self._made: Counter[tuple[bool, bool]] = Counter()  # eager steps of each kind
        self._graphs: dict[tuple[bool, bool], _Graph] = {}

    def __call__(self, *batch: Tensor) -> Losses:
        """Make one step.

        Args:
            batch: tensors of the shapes, dtypes and device of the first call's; copied, so they
                need not be those that were captured.

        Returns:
            The losses of the step, detached. Once captured they stand in memory that the next call
            writes again: clone what you keep.

        Raises:
            ValueError: a batch of other shapes, dtypes or device.
        """
        optimizer = self._optimizer
        static = self._take(batch)
        kind = optimizer.kind_next
        graph = self._graphs.get(kind)
        if graph is not None:
            optimizer.refresh()
            graph.replay()
            optimizer.count_again(graph.counted)
            return graph.losses
        if self._made[kind] < self._eager_steps:
            self._made[kind] += 1
            return self._on_stream(lambda: self._step(static))
        _check_capturable(optimizer)  # the number of tasks is known by now
        before = optimizer.counted
        graph = self._graphs[kind] = self._capture(lambda: self._step(static))
        graph.counted = {k: n - before[k] for k, n in optimizer.counted.items()}
        graph.replay()  # the capture itself has computed nothing
        return graph.losses

    def _take(self, batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Copy the batch to where the graphs read it."""
        if not batch:
            raise ValueError("batch must hold at least one tensor, got none")
        if self._batch is None:
            self._batch = tuple(x.clone() for x in batch)
            return self._batch
        told, known = ([(x.shape, x.dtype, x.device) for x in xs] for xs in (batch, self._batch))
        if told != known:
            raise ValueError(f"batch must be of the first call's {known}, got {told}")
        for static, x in zip(self._batch, batch, strict=True):
            static.copy_(x, non_blocking=True)
        return self._batch

    def _step(self, batch: Sequence[Tensor]) -> Losses:
        optimizer = self._optimizer
        optimizer.zero_grad()
        losses = self._compute_losses(*batch)
        optimizer.backward(losses)
        optimizer.step()
        return _detached(losses)

    def _capture(self, step: Callable[[], Losses]) -> _Graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            losses = step()
        return _Graph(graph.replay, losses)

    def _on_stream(self, step: Callable[[], Losses]) -> Losses:
        """Run a step where it will be captured, as the kernels' scratch goes by streams."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            losses = step()
        current.wait_stream(self._stream)
        return losses


class _Graph:
    """A captured step.

    Attributes:
        replay: makes it again.
        losses: where its losses stand.
        counted: what the step adds to the optimizer's counts on the host.
    """

    def __init__(self, replay: Callable[[], Any], losses: Losses) -> None:
        self.replay = replay
        self.losses = losses
        self.counted: dict[str, int] = {}


def _check_capturable(optimizer: UpdateBalancer) -> None:
    if optimizer.device.type != "cuda" or optimizer.capturable is False:
        raise ValueError(
            "optimizer must be capturable, with parameters on a GPU; here they are on "
            f"{optimizer.device}, and capturable is {optimizer.capturable}"
        )


def _detached(losses: Losses) -> Losses:
    """The losses without their graph, in the same container."""
    if isinstance(losses, Tensor):
        return losses.detach()
    if hasattr(losses, "items"):
        return {k: None if x is None else x.detach() for k, x in losses.items()}
    return [None if x is None else x.detach() for x in losses]

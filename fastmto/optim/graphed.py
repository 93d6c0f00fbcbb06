"""Training steps as CUDA graphs: launched by one call, without Python between the kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..engine.losses import Losses
from .update_balancer import UpdateBalancer


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
        self._gradients = optimizer.gradients  # what the graphs write to
        self._made: Counter[tuple[bool, bool]] = Counter()  # eager steps of each kind
        self._graphs: dict[tuple[bool, bool], Graph] = {}

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
        optimizer, static = self._optimizer, self._take(batch)
        optimizer._pending.clear()  # the step begins with zero_grad()
        if optimizer.gradients is not self._gradients:
            # A state from before the first step was loaded: the graphs' memory is not its any more.
            self._gradients = optimizer.gradients
            self._graphs.clear()
            self._made.clear()
        searches = optimizer.searches_next
        kind = searches, searches and optimizer._is_delayed()
        graph = self._graphs.get(kind)
        if graph is not None:
            optimizer.refresh()
            graph.replay()
            graph.books.add_to(optimizer)
            return graph.losses
        # Until weights are found it is not known what a step will be.
        if self._made[kind] < self._eager_steps or not optimizer._has_settled():
            self._made[kind] += 1
            losses = self._on_stream(lambda: self._step(static))
            self._gradients = optimizer.gradients
            return losses
        _check_capturable(optimizer)  # the number of tasks is known by now
        optimizer.refresh()
        before = Books.of(optimizer)
        try:
            graph = self._capture(lambda: self._step(static))
        except BaseException:
            before.put_into(optimizer)
            optimizer.zero_grad()
            raise
        graph.books = Books.of(optimizer).since(before)
        self._graphs[kind] = graph
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

    def _capture(self, step: Callable[[], Losses]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        # Other threads (those that pin a loader's memory) may go on meanwhile.
        mode = "thread_local"
        with (
            torch.cuda.device(self._optimizer.device),
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode=mode),
        ):
            losses = step()
        return Graph(graph.replay, losses)

    def _on_stream(self, step: Callable[[], Losses]) -> Losses:
        """Run a step where it will be captured, as the kernels' scratch goes by streams."""
        device = self._optimizer.device
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        current = torch.cuda.current_stream(device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            losses = step()
        current.wait_stream(self._stream)
        return losses


@dataclass
class Books:
    """The counts that an optimizer keeps on the host, and its phase of the search."""

    counted: dict[str, int]
    phase: int

    @classmethod
    def of(cls, optimizer: UpdateBalancer) -> Books:
        return cls(dict(optimizer._counted), optimizer._search.steps)

    def since(self, before: Books) -> Books:
        counted = {name: n - before.counted[name] for name, n in self.counted.items()}
        return Books(counted, self.phase - before.phase)

    def put_into(self, optimizer: UpdateBalancer) -> None:
        optimizer._counted.update(self.counted)
        optimizer._search.steps = self.phase

    def add_to(self, optimizer: UpdateBalancer) -> None:
        for name, more in self.counted.items():
            optimizer._counted[name] += more
        optimizer._search.steps += self.phase


@dataclass
class Graph:
    """A captured step.

    Attributes:
        replay: makes it again.
        losses: where its losses stand.
        books: what the step adds to the optimizer's counts on the host.
    """

    replay: Callable[[], Any]
    losses: Losses
    books: Books = field(default_factory=lambda: Books({}, 0))


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
    detached = [None if x is None else x.detach() for x in losses]
    return tuple(detached) if isinstance(losses, tuple) else detached

"""One call of a balancer as the methods see it, and what it found out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .losses import Losses

#: Dtypes that losses are weighed in; narrower ones become float32.
WIDE = (torch.float32, torch.float64)

Parameters = Iterable[Tensor]
#: Task-specific parameters: all of them in one iterable, or one iterable a task, in order or named.
TaskParameters = Iterable[Tensor] | Sequence[Iterable[Tensor]] | Mapping[str, Iterable[Tensor]]


@dataclass
class Batch:
    """One call of `backward`, as the methods see it.

    Attributes:
        values: T scalar losses attached to their graphs; None for an absent task.
        tasks: indices of the n present tasks, increasing.
        shared: shared parameters, in a list; None where not given.
        heads: task-specific parameters as given.
        last_shared: parameters of the last shared layer, in a list; None where not given.
        features: the shared representation, one tensor or several in a list; None if not given.
        closure: recomputes the losses; None where not given.
        seed: the scale of a GradScaler, a scalar on the losses' device; None without one.
        listed: what gradients are compared at, and the heads' parameters with their tasks, once
            somebody looked: the iterables given may be gone through once only.
    """

    values: list[Tensor | None]
    shared: list[Tensor] | None
    heads: TaskParameters | None
    last_shared: list[Tensor] | None
    features: list[Tensor] | None
    closure: Callable[[], Losses] | None
    seed: Tensor | None = None
    unbalanced: Tensor | None = None
    retain_graph: bool = False
    accumulate: bool = False
    listed: tuple[list[Tensor], list[tuple[int | None, Tensor]]] | None = None

    def __post_init__(self) -> None:
        self.tasks = [i for i, value in enumerate(self.values) if value is not None]
        #: The n present losses' values, if the host has read them.
        self.read: list[float] = []

    @property
    def keeps_graph(self) -> bool:
        """Whether the graph is needed after the tasks' backward passes."""
        return self.retain_graph or self.unbalanced is not None

    @functools.cached_property
    def present(self) -> list[Tensor]:
        """The n losses that are there."""
        return [value for value in self.values if value is not None]

    @functools.cached_property
    def losses(self) -> Tensor:
        """Their values (n,), detached, of at least float32."""
        with torch.no_grad():
            stacked = torch.stack([x if x.dim() == 0 else x.reshape(()) for x in self.present])
        return stacked if stacked.dtype in WIDE else stacked.float()


class Info(Mapping[str, Any]):
    """What a call of `backward` found out; nothing is copied or synchronized until it is read.

    Keys, also attributes:
        weights: (T,), the weights that the losses of this step got.
        tasks: names of the tasks, None where they have none.
        gram: (n, n) float64, inner products of the n tasks' gradients; None between two
            searches and for methods without one.
        cosines: (n, n), cosines of the tasks' gradients, computed from `gram` when read; a task
            without gradient has NaN.
        status: how the small solver ended ("solved", ...); None where none was called.
        result: the solver's `fastmto.solvers.Result`; None where none was called.
        passes: how per-task gradients were taken ("loop", "batched (T at once)", ...); None
            where none were.
        skipped: why the step was skipped; None where it was not, and where that is decided on a
            device: `status` says "not_finite" there.

    Args:
        result: or a function that makes it, called whenever it is read.
        status: None: that of the result.
    """

    _KEYS: ClassVar[tuple[str, ...]] = (
        "weights", "tasks", "gram", "cosines", "status", "result", "passes", "skipped",
    )  # fmt: skip

    def __init__(
        self,
        weights: Tensor | None,
        tasks: list[str] | None = None,
        gram: Tensor | None = None,
        result: Any | Callable[[], Any] = None,
        status: str | None = None,
        passes: str | None = None,
        skipped: str | None = None,
    ) -> None:
        self.weights = weights
        self.tasks = tasks
        self.gram = gram
        self.answer(result, status)
        self.passes = passes
        self.skipped = skipped

    @property
    def result(self) -> Any:
        return self._result() if callable(self._result) else self._result

    @property
    def status(self) -> str | None:
        return getattr(self.result, "status", None) if self._status is None else self._status

    def answer(self, result: Any = None, status: str | None = None) -> None:
        """Take what the solver said."""
        self._result = result
        self._status = status

    @property
    def cosines(self) -> Tensor | None:
        if self.gram is None:
            return None
        lengths = self.gram.diagonal().sqrt()
        return self.gram / lengths[:, None] / lengths

    def __getitem__(self, key: str) -> Any:
        if key not in self._KEYS:
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._KEYS)

    def __len__(self) -> int:
        return len(self._KEYS)

    def __repr__(self) -> str:
        return f"Info({', '.join(f'{k}={self[k]!r}' for k in self._KEYS if k != 'cosines')})"


def as_tensors(name: str, tensors: Tensor | Iterable[Tensor] | None) -> list[Tensor] | None:
    """A tensor or an iterable of tensors as a list."""
    if tensors is None:
        return None
    listed = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    for k, tensor in enumerate(listed):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}[{k}] must be a tensor, got {type(tensor).__name__}")
    return listed

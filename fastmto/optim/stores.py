"""The memory of the update level: the clock, flat stores, and the runs that passes go over."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import ops
from ..engine.flat import FlatParameters, own_storage, state_dtype
from ..ops.device import Constants, upload
from ..ops.rules import Clippy, Hyper, Numbers, Rule


class Clock:
    """The steps made, and the numbers of the step being made, as rows on the device.

    Args:
        rows: R, all stores' rows together.
        device: where they live.

    Attributes:
        counts: steps made, (R,) int64.
        numbers: of the step being made, (R, 11) float64, by the op `step_constants`.
        found: (1,) int32; not 0 where the step being made is not finite.
        tally: (2,) int64, steps made and steps skipped.
        hyper: what numbers are made of, (R, 7) float64.
        active: which rows take part, (R,) int32.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.counts = torch.zeros(rows, dtype=torch.int64, device=device)
        self.numbers = torch.zeros(rows, len(Numbers._fields), dtype=torch.float64, device=device)
        self.found = torch.zeros(1, dtype=torch.int32, device=device)
        self.tally = torch.zeros(2, dtype=torch.int64, device=device)
        self.hyper = torch.zeros(rows, len(Hyper._fields), dtype=torch.float64, device=device)
        self._known: Sequence[Hyper] = ()
        self._patterns = Constants(torch.int32)
        self.active = self.counts.new_zeros(rows, dtype=torch.int32)

    def pattern(self, active: Sequence[bool]) -> Tensor:
        """Which rows take part, (R,) int32 on the device; CUDA graphs keep those that they were
        captured with."""
        return self._patterns(active, self.counts.device)

    def set(self, hyper: Sequence[Hyper]) -> None:
        """Say what the steps from now on are made with; a copy to the device if that is new. CUDA
        graphs see it, in the memory that they read."""
        if hyper != self._known:
            upload(self.hyper, hyper)
            self._known = hyper

    def set_lr(self, rows: slice, lr: Tensor) -> None:
        """A learning rate that lives on the device."""
        self.hyper[rows, Hyper._fields.index("lr")] = lr

    def start(self) -> None:
        """numbers <- those of the coming step."""
        ops.step_constants(self.hyper, self.counts, self.active, self.numbers, self.found)

    def finish(self) -> None:
        """Count the step where it was made."""
        ops.count_step(self.counts, self.active, self.found, self.tally)


class Store:
    """A flat buffer of parameters with its gradients, moments and rows of the clock.

    Args:
        number: of the param group. Groups are held by number: `load_state_dict` may put other
            values into them.
        parameters: of one dtype on one device; their storage moves into the buffer.
        owner: "shared", the number of a task, or None for a head whose task is to be found.
    """

    def __init__(self, number: int, parameters: Sequence[Parameter], owner: int | str | None):
        self.number = number
        self.owner = owner
        self.flat = FlatParameters(parameters)
        self._moments: dict[str, Tensor] = {}
        self.clock_rows = 1
        #: The rows of the clock; `UpdateLevel.allocate` sets them.
        self.rows = slice(0, 0)
        self.runs: list[Run] = []

    def allocate(self, rule: Rule, grads: Tensor, clock_rows: int | None) -> None:
        """Make the moments; those that are there already are kept.

        Args:
            rule: says which moments there are.
            grads: the rows of gradients.
            clock_rows: T if every task keeps moments of its own, (T, P) each; None: (P,).
        """
        self.stacked = clock_rows is not None
        self.clock_rows = clock_rows or 1
        self.state_names = rule.state_names
        self.grads = grads
        old, self._moments = self._moments, {}
        for name in rule.state_names:
            rows = self.flat.rows(self.clock_rows, state_dtype(self.flat.dtype), rule.initial(name))
            if name in old:
                rows[: len(old[name])].copy_(old[name])
            self._moments[name] = rows

    @property
    def state(self) -> list[Tensor]:
        """The moments as the ops take them: (P,), or (T, P) if every task keeps its own."""
        return [m if self.stacked else m[0] for m in self._moments.values()]

    def state_views(self) -> list[dict[str, Tensor]]:
        """The moments of every parameter, shaped like it (with a leading T if stacked)."""
        views = {
            name: self.flat.stacked_views(m)
            if self.stacked
            else [own_storage(view) for view in self.flat.views(m[0])]
            for name, m in self._moments.items()
        }
        return [dict(zip(views, each, strict=True)) for each in zip(*views.values(), strict=True)]

    def split(self, clock: Clock) -> None:
        """Find the runs of parameters that are not frozen."""
        frozen = [not p.requires_grad for p in self.flat.parameters]
        self.runs = []
        for is_frozen, members in itertools.groupby(range(len(frozen)), frozen.__getitem__):
            if not is_frozen:
                numbers = list(members)
                self.runs.append(Run(self, clock, numbers[0], numbers[-1] + 1))


class Run:
    """The passes over neighbouring parameters [first, last) of a store.

    Attributes:
        kind: the rule's number; set before every step.
    """

    def __init__(self, store: Store, clock: Clock, first: int, last: int) -> None:
        flat = store.flat
        self.store = store
        self.parameters = flat.parameters[first:last]
        start, stop = flat.offsets[first], flat.offsets[last]
        self.segments = flat.segments[first : last + 1] - start
        self.params = flat.data[start:stop]
        self.grads = store.grads[:, start:stop]
        self.state = [m[..., start:stop] for m in store.state]
        self.numbers = clock.numbers[store.rows]
        self.found = clock.found
        self.kind = -1
        n = len(self.grads)
        self._gram = torch.zeros(n * n, dtype=torch.float64, device=flat.device)
        self.sigma = torch.ones(n, last - first, dtype=torch.float64, device=flat.device)

    def gram(self, rows: int) -> Tensor:
        """Where `search` and `delayed` put the Gram matrix of the first `rows` rows."""
        return self._gram[: rows * rows].view(rows, rows)

    def search(self, rows: int, clippy: Clippy | None) -> None:
        """The Gram matrix of the updates, and Clippy's factors; found if not finite."""
        params = None if clippy is None else self.params
        ops.update_gram(
            *self._update(rows),
            self.gram(rows),
            clippy=bounds_of(clippy),
            params=params,
            **self._factors(rows, clippy),
        )
        ops.check(self.gram(rows), self.found)

    def check(self, rows: int) -> None:
        """found if a gradient is not finite."""
        ops.check(self.grads[:rows], self.found)

    def apply(self, rows: int, clippy: Clippy | None, weights: Tensor) -> None:
        """Move the parameters, then the moments, unless found."""
        ops.apply(
            *self._update(rows),
            self.params,
            weights,
            skip=self.found,
            **self._factors(rows, clippy),
        )

    def delayed(self, rows: int, clippy: Clippy | None, weights: Tensor) -> None:
        """`apply` and `search` in one pass."""
        ops.apply_and_gram(
            *self._update(rows),
            self.params,
            weights,
            self.gram(rows),
            clippy=bounds_of(clippy),
            skip=self.found,
            **self._factors(rows, clippy),
        )

    def _update(self, rows: int) -> tuple[int, Tensor, Tensor, list[Tensor]]:
        """What all passes over updates take first."""
        return self.kind, self.numbers, self.grads[:rows], self.state

    def _factors(self, rows: int, clippy: Clippy | None) -> dict[str, Any]:
        """Where Clippy's factors stand, if there are any."""
        if clippy is None:
            return {}
        return {"segments": self.segments, "sigma": self.sigma[:rows]}


def bounds_of(clippy: Clippy | None) -> tuple[float, float] | None:
    return None if clippy is None else (clippy.lambda_rel, clippy.lambda_abs)

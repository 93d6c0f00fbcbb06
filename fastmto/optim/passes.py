"""What a step does to memory: buffers, the passes over them, and the clock that counts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..engine.device import Constants, upload
from ..engine.flat import FlatParameters, state_dtype
from .rules import Clippy, Hyper, Numbers, Rule


class Clock:
    """The steps made, and the numbers of the step being made, as rows on the device.

    Args:
        rows: R, all buffers' rows together.
        device: where they live.

    Attributes:
        counts: steps made, (R,) int64.
        numbers: of the step being made, (R, 11) float64, by the op `clock`.
        found: (1,) int32; not 0 where the step being made is not finite.
        tally: (2,) int64, steps made and steps skipped.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.counts = torch.zeros(rows, dtype=torch.int64, device=device)
        self.numbers = torch.zeros(rows, len(Numbers._fields), dtype=torch.float64, device=device)
        self.found = torch.zeros(1, dtype=torch.int32, device=device)
        self.tally = torch.zeros(2, dtype=torch.int64, device=device)
        self._hyper = torch.zeros(rows, len(Hyper._fields), dtype=torch.float64, device=device)
        self._known: Sequence[Hyper] = ()
        self._patterns = Constants(torch.int32)
        self._active = self.counts.new_zeros(rows, dtype=torch.int32)

    def set(self, hyper: Sequence[Hyper], active: Sequence[bool] | None) -> None:
        """Say what the steps from now on are made with; a copy to the device if that is new.

        `active` None: the rows that are. CUDA graphs see new hyperparameters, in the memory that
        they read; of the rows, each keeps those it was captured with.
        """
        if hyper != self._known:
            upload(self._hyper, hyper)
            self._known = hyper
        if active is not None:
            self._active = self._patterns(active, self.counts.device)

    def set_lr(self, rows: slice, lr: Tensor) -> None:
        """A learning rate that lives on the device."""
        self._hyper[rows, Hyper._fields.index("lr")] = lr

    def start(self) -> None:
        """numbers <- those of the coming step."""
        ops.clock(self._hyper, self.counts, self._active, self.numbers, self.found)

    def finish(self) -> None:
        """Count the step where it was made."""
        ops.advance(self.counts, self._active, self.found, self.tally)


class Buffer:
    """A flat buffer of parameters with everything the passes over it touch.

    Args:
        number: of the param group.
        flat: the parameters.
        grads: (T, P); T = 1 for a head.
        rule: says which moments there are.
        adatask: every row keeps its own moments.
    """

    def __init__(
        self,
        number: int,
        flat: FlatParameters,
        grads: Tensor,
        rule: Rule,
        *,
        adatask: bool = False,
    ) -> None:
        self.number = number
        self.flat = flat
        self.grads = grads
        self.state_names = rule.state_names
        n_tasks = len(grads)
        self.clock_rows = n_tasks if adatask else 1
        self._adatask = adatask
        self._moments = {
            name: flat.rows(self.clock_rows, state_dtype(flat.dtype), rule.initial(name))
            for name in rule.state_names
        }
        #: The moments as the ops take them: (P,), or (T, P) with adatask.
        self.state = [m if adatask else m[0] for m in self._moments.values()]
        self._gram = torch.zeros(n_tasks * n_tasks, dtype=torch.float64, device=flat.device)
        self.sigma = torch.ones(
            n_tasks, len(flat.parameters), dtype=torch.float64, device=flat.device
        )
        #: The rows of the clock, and their numbers; `bind` sets them.
        self.rows = slice(0, 0)

    def bind(self, clock: Clock, first: int) -> int:
        """Take rows of the clock from `first` on; returns the first row that is left."""
        self.rows = slice(first, first + self.clock_rows)
        self.numbers = clock.numbers[self.rows]
        return self.rows.stop

    def gram(self, rows: int) -> Tensor:
        """Room for the Gram of the first `rows` rows."""
        return self._gram[: rows * rows].view(rows, rows)

    def state_views(self) -> list[dict[str, Tensor]]:
        """The moments of every parameter, shaped like it (with a leading T for adatask)."""
        views = {
            name: self.flat.stacked_views(m) if self._adatask else self.flat.views(m[0])
            for name, m in self._moments.items()
        }
        return [dict(zip(views, each, strict=True)) for each in zip(*views.values(), strict=True)]


@dataclass
class Pass:
    """The passes of one step over one buffer: its first `rows` rows of gradients."""

    buffer: Buffer
    kind: int
    rows: int
    clippy: Clippy | None
    found: Tensor

    def search(self) -> None:
        """The Gram of the updates into the buffer's, and Clippy's factors; found if not finite."""
        gram = self.buffer.gram(self.rows)
        params = None if self.clippy is None else self.buffer.flat.data
        bounds = self._bounds
        ops.search(*self._update, gram, clippy=bounds, params=params, **self._factors)
        ops.check(gram, self.found)

    def check(self) -> None:
        """found if a gradient is not finite."""
        ops.check(self.buffer.grads[: self.rows], self.found)

    def apply(self, weights: Tensor) -> None:
        """Move the parameters, then the moments, unless found."""
        flat = self.buffer.flat
        ops.apply(*self._update, flat.data, weights, skip=self.found, **self._factors)
        # The kernels write behind autograd's back: an older graph must not be used any more.
        torch.autograd.graph.increment_version(flat.parameters)

    def delayed(self, weights: Tensor) -> None:
        """`apply` and `search` in one pass."""
        flat, gram, bounds = self.buffer.flat, self.buffer.gram(self.rows), self._bounds
        ops.delayed(
            *self._update, flat.data, weights, gram, clippy=bounds, skip=self.found, **self._factors
        )
        torch.autograd.graph.increment_version(flat.parameters)

    @property
    def _update(self) -> tuple[int, Tensor, Tensor, list[Tensor]]:
        """What all passes over updates take first."""
        buffer = self.buffer
        return self.kind, buffer.numbers, buffer.grads[: self.rows], buffer.state

    @property
    def _factors(self) -> dict[str, Tensor]:
        """Where Clippy's factors stand, if there are any."""
        if self.clippy is None:
            return {}
        return {"segments": self.buffer.flat.segments, "sigma": self.buffer.sigma[: self.rows]}

    @property
    def _bounds(self) -> tuple[float, float] | None:
        return None if self.clippy is None else (self.clippy.lambda_rel, self.clippy.lambda_abs)

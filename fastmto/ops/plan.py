"""Whole steps on the CPU by two native calls.

The ops of `fastmto.ops` check their tensors at every call and go through torch's dispatcher. In an
optimizer's step the tensors are those of the step before: a `Plan` takes their addresses once. Its
steps have the bits of the ops one after the other.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _kernels
from .cpu import _DTYPES


@dataclass
class PlannedRun:
    """The tensors of one run of parameters, as the ops take them (see `fastmto.ops`).

    Attributes:
        shared: whether the tasks share it; else it has one row of gradients and the weight 1.
        numbers: (R, 11), rows of the clock.
        grads: (rows, P).
        state: (P,) each, or (T, P) if every task keeps its own.
        params: (P,).
        segments: (S + 1,).
        sigma: (rows, S).
        gram: room for (rows, rows).
    """

    shared: bool
    numbers: Tensor
    grads: Tensor
    state: Sequence[Tensor]
    params: Tensor
    segments: Tensor
    sigma: Tensor
    gram: Tensor


#: Integers of 64 bits in the struct `Run` of csrc/kernels/kernels.h.
_FIELDS = 19


class Plan:
    """The passes of a step over some runs of parameters on the CPU.

    Args:
        runs: all there are; a step goes over some of them. Their tensors must stay where they are,
            and are kept alive.
        clock: the tensors hyper, counts, numbers, found and tally of the ops `clock` and `advance`.
        clippy: (lambda_rel, lambda_abs), or None.
    """

    def __init__(
        self,
        runs: Sequence[PlannedRun],
        clock: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        clippy: tuple[float, float] | None,
    ) -> None:
        self._kept = runs, clock
        self._records = array("q")
        for run in runs:
            self._records.extend(_record(run))
        self._address = self._records.buffer_info()[0]
        self._n_runs = len(runs)
        self._clippy = (0, 0.0, 0.0) if clippy is None else (1, *clippy)
        hyper, counts, numbers, found, tally = (tensor.data_ptr() for tensor in clock)
        self._before = len(clock[1]), hyper, counts
        self._after = numbers, found, tally

    def set_kind(self, run: int, kind: int) -> None:
        """Set the rule of a run: the number of its element formula."""
        self._records[run * _FIELDS] = kind

    def look(
        self, takes_part: array[int], active: Tensor, rows: int, *, gram: Tensor | None = None
    ) -> bool:
        """Begin a step: ops `clock`, then `check` or `search` on the runs that take part.

        Args:
            takes_part: a byte for each run.
            active: (R,) int32, which rows of the clock take part.
            rows: of gradients of the shared runs.
            gram: (rows, rows) float64 <- the sum of the shared runs' Gram matrices of updates.
                None: the step does not search, and only what Clippy needs is searched.

        Returns:
            Whether something is not finite; then the clock's `found` is not 0.
        """
        room = 0 if gram is None else gram.data_ptr()
        return _kernels.look(  # type: ignore[call-arg]
            *self._call(takes_part, active, rows), gram is not None, room
        )

    def move(
        self,
        takes_part: array[int],
        active: Tensor,
        rows: int,
        weights: Tensor,
        *,
        gram: Tensor | None = None,
    ) -> None:
        """End a step: op `apply` on the runs that take part, then `advance`.

        Args:
            takes_part, active, rows: as in `look`.
            weights: (rows,) float64 on the CPU, contiguous, of the shared runs' rows.
            gram: as in `look`; given, the shared runs' op is `delayed`.
        """
        room = 0 if gram is None else gram.data_ptr()
        call = self._call(takes_part, active, rows)
        _kernels.move(*call, weights.data_ptr(), gram is not None, room)  # type: ignore[call-arg]

    def _call(self, takes_part: array[int], active: Tensor, rows: int) -> tuple[Any, ...]:
        return (
            self._address,
            takes_part.buffer_info()[0],
            self._n_runs,
            rows,
            *self._clippy,
            torch.get_num_threads(),
            *self._before,
            active.data_ptr(),
            *self._after,
        )


def _record(run: PlannedRun) -> list[int]:
    """The struct `Run`."""
    stacked = run.state[0].dim() == 2
    moments = [x for m in run.state for x in (m.data_ptr(), m.stride(0) if stacked else 0)]
    moments += [0] * (6 - len(moments))
    return [
        -1,  # the kind; `set_kind` sets it
        _DTYPES[run.grads.dtype],
        stacked,
        run.shared,
        run.params.numel(),
        run.grads.data_ptr(),
        run.grads.stride(0),
        run.numbers.data_ptr(),
        *moments,
        run.params.data_ptr(),
        run.segments.data_ptr(),
        len(run.segments) - 1,
        run.sigma.data_ptr(),
        run.gram.data_ptr(),
    ]

"""Plans: the passes of a step on the CPU, checked once and then called without any checks.

Beside a small model a step's fixed cost is what it asks of every tensor at every step. A plan asks
at construction, keeps the addresses and the tensors that own them, and goes over all buffers in one
call. It runs the same kernels as the ops of `fastmto.ops`, and gives their bits.

The ops remain the way on GPUs, under `torch.compile` and while a CUDA graph is captured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from . import _kernels
from . import cpu_checks as checks


class _Addresses:
    """A base of what keeps addresses: a copy would go on with the memory of the original."""

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} cannot be copied or pickled: build a new one")


@dataclass(frozen=True, eq=False)
class Entry:
    """Neighbouring parameters of one rule, with all that a step reads and writes of them. Tensors
    are as `fastmto.ops` describes them, on the CPU.

    Args:
        kind: number of the rule's element formula.
        row: the first of its rows in the table of step counts. It has one, or T if every task
            keeps its own moments. Several entries may have the same row.
        params: (P,).
        grads: (rows, P); every step says how many of the rows of shared entries take part. A
            head has one.
        state: of the rule, (P,) each, or (T, P).
        segments: (S + 1,), with Clippy.
        sigma: (rows, S), with Clippy.
    """

    kind: int
    row: int
    params: Tensor
    grads: Tensor
    state: list[Tensor]
    segments: Tensor | None = None
    sigma: Tensor | None = None


class Plan(_Addresses):
    """The steps of an update-level optimizer on the CPU.

    A step is two calls, over the shared entries and the heads that take part:

        look    `step_constants`; then for every entry `check`, or, with Clippy or in a search of
                weights, `update_gram` and `check` of its Gram
        move    `apply` with the weights, or `apply_and_gram`; a head's weight is 1; `count_step`

        plan = Plan(hyper, counts, tally, shared, heads, clippy=None)
        if not plan.look(n_tasks, active, searches=True):
            plan.move(solve(plan.gram(n_tasks)))  # weights by the Gram matrix of the updates
        if not plan.look(1, active, searches=False):
            plan.move([1.0])  # the joint gradient is in the first row

    The caller tells autograd that parameters have changed. Not for several threads at once. A
    parameter whose storage is replaced needs a new plan.

    Args:
        hyper: (R, 7) float64, rows of `fastmto.optim.rules.Hyper`; read at every step.
        counts: (R,) int64, the steps made; counted up by every step, where its row is active.
        tally: (2,) int64; the first counts all steps.
        shared: entries whose rows of gradients belong to the tasks.
        heads: entries of one row, which take part if their row of the table is active.
        clippy: (lambda_rel, lambda_abs), or None. With it every entry needs segments and sigma.
        isa: of the kernels, for tests.

    Raises:
        ValueError: a tensor of the wrong dtype, shape, layout or device.
    """

    def __init__(
        self,
        hyper: Tensor,
        counts: Tensor,
        tally: Tensor,
        shared: Sequence[Entry],
        heads: Sequence[Entry],
        *,
        clippy: tuple[float, float] | None = None,
        isa: int = 0,
    ) -> None:
        rows = counts.numel()
        numbers = torch.zeros(rows, checks.NUMBERS, dtype=torch.float64)
        checks.check_table(hyper, counts, numbers)
        checks.check_vector("tally", tally, torch.int64, 2)
        for entry in heads:
            if len(entry.grads) != 1:
                raise ValueError(f"heads must have one row of grads, got {len(entry.grads)}")
        most = max((len(entry.grads) for entry in shared), default=1)
        room = torch.zeros(most * most, dtype=torch.float64)
        self._grams = [room[: n * n].view(n, n) for n in range(most + 1)]
        # The addresses below are of these.
        self._tensors = hyper, counts, tally, numbers, room, tuple(shared), tuple(heads)
        self._plan = _kernels.Plan(
            rows,
            hyper.data_ptr(),
            counts.data_ptr(),
            numbers.data_ptr(),
            tally.data_ptr(),
            room.data_ptr(),
            clippy is not None,
            *(clippy or (0.0, 0.0)),
            tuple(_addresses(entry, numbers, clippy, isa) for entry in shared),
            tuple(_addresses(entry, numbers, clippy, isa) for entry in heads),
        )

    def look(self, rows: int, active: Sequence[bool], *, searches: bool) -> bool:
        """Begin a step.

        Args:
            rows: R', how many rows of the shared entries' gradients take part, the first ones; 0:
                none, and the shared parameters do not move. All of them where every task keeps its
                own moments.
            active: which rows of the table take part; a list or tuple of length R. A row that is
                not active is not counted; its head, or its task, does not move.
            searches: make the Gram matrix of the updates; see `gram`.

        Returns:
            Whether something was found that is not finite. Then there is nothing to `move`.
        """
        return self._plan.look(rows, active, searches, torch.get_num_threads())

    def move(self, weights: Sequence[float], *, searches: bool = False) -> None:
        """Move parameters and moments and count the step that `look` began.

        Args:
            weights: of the rows, a list or tuple of length R'; 0 for a task that does not take
                part.
            searches: make the Gram matrix of the updates on the way.

        Raises:
            RuntimeError: no `look`, or one that found something.
        """
        self._plan.move(weights, searches, torch.get_num_threads())

    def gram(self, rows: int) -> Tensor:
        """Where the last call with `searches` put the Gram matrix (rows, rows) of the updates,
        summed over the shared entries: float64, overwritten by the next step."""
        return self._grams[rows]


def _addresses(
    entry: Entry, numbers: Tensor, clippy: tuple[float, float] | None, isa: int
) -> tuple[int, ...]:
    """An entry as the kernels take it, checked."""
    stacked = bool(entry.state) and entry.state[0].dim() == 2
    n_rows = len(entry.grads) if stacked else 1
    if not 0 <= entry.row <= len(numbers) - n_rows:
        raise ValueError(
            f"row must be one of the table's {len(numbers)}, with {n_rows} from it on, got "
            f"{entry.row}"
        )
    rows = numbers[entry.row : entry.row + n_rows]
    update = checks.check_update(entry.kind, rows, entry.grads, entry.state, isa)
    numel = entry.grads.shape[1]
    checks.check_vector("params", entry.params, entry.grads.dtype, numel)
    if clippy is None:
        return (*update, entry.params.data_ptr(), 0, 0, 0)
    if entry.segments is None or entry.sigma is None:
        raise ValueError("segments and sigma must be given with clippy")
    n_segments = checks.check_segments(entry.segments, numel)
    checks.check_matrix("sigma", entry.sigma, len(entry.grads), n_segments)
    segments, sigma = entry.segments.data_ptr(), entry.sigma.data_ptr()
    return (*update, entry.params.data_ptr(), segments, n_segments, sigma)


class GradientPlan(_Addresses):
    """The passes of a gradient-level balancer on the CPU.

    Args:
        rows: of every layout (T + 1, P): the tasks' gradients, and a last row for their sum.

    Raises:
        ValueError: a tensor of the wrong dtype, shape, layout or device.
    """

    def __init__(self, rows: Sequence[Tensor]) -> None:
        self._n_tasks = len(rows[0]) - 1
        if any(len(each) != self._n_tasks + 1 for each in rows):
            raise ValueError(
                f"rows must be as many in every layout, got {[len(each) for each in rows]}"
            )
        self._tensors = tuple(rows)
        self._tasks = [_matrix(each[:-1]) for each in rows]
        self._joint = [each[-1].data_ptr() for each in rows]
        self._rows = [[_matrix(row[None]) for row in each] for each in rows]

    def gram(self) -> Tensor:
        """Inner products (T, T) of the tasks' gradients, summed over the layouts: float64, new
        memory. The op `gram`."""
        threads, total = torch.get_num_threads(), None
        for tasks in self._tasks:
            gram = torch.empty(self._n_tasks, self._n_tasks, dtype=torch.float64)
            _kernels.gram(*tasks, gram.data_ptr(), threads, 0)
            total = gram if total is None else total + gram
        assert total is not None
        return total

    def combine(self, weights: Tensor) -> None:
        """Last row <- sum_i weights_i g_i. The op `combine`.

        Args:
            weights: (T,) float64, contiguous, on the CPU.
        """
        checks.check_vector("weights", weights, torch.float64, self._n_tasks)
        threads, address = torch.get_num_threads(), weights.data_ptr()
        for tasks, out in zip(self._tasks, self._joint, strict=True):
            _kernels.combine(*tasks, address, out, threads, 0)

    def finite(self, row: int) -> bool:
        """Whether a row of all layouts is finite, T for the last. The op `check`."""
        threads = torch.get_num_threads()
        return all(_kernels.all_finite(*rows[row], threads, 0) for rows in self._rows)


def _matrix(grads: Tensor) -> tuple[int, int, int, int, int]:
    """Rows of gradients as the kernels take them, checked."""
    dtype, rows, numel, stride = checks.check_grads(grads)
    return dtype, rows, numel, grads.data_ptr(), stride

"""The update level: flat parameters, gradients and moments, and the passes of a step over them.

    gram()   Gram matrix of the tasks' updates, all shared buffers added up
    move()   parameters -= lr sum_i w_i u_i, then the moments: the only writer of both

A `Store` is one flat buffer of a param group and dtype with everything that belongs to it. The
passes go over a store's `Run`s: the parts of it whose parameters are not frozen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import ops
from ..engine.flat import own_storage
from ..engine.gradients import TaskGradients
from ..ops.plan import Entry, Plan
from ..ops.rules import Clippy, Hyper
from .group_rules import GroupRules, check_state_names
from .groups import check_lr
from .stores import Clock, Run, Store, bounds_of


@dataclass
class Passes:
    """What takes part in a step; settled once for each pattern of tasks and heads.

    Attributes:
        shared, heads: runs.
        rows: of gradients of the shared runs.
        active: which rows of the clock take part, (R,) int32.
        parameters: of all runs.
        pattern: `active` as booleans, for the plan.
        planned_rows: `rows`, or 0 where no task reaches the shared parameters; for the plan.
    """

    shared: list[Run]
    heads: list[Run]
    rows: int
    active: Tensor
    parameters: list[Parameter]
    pattern: list[bool]
    planned_rows: int


class UpdateLevel:
    """All stores of an optimizer, and the passes of a step over them.

    Args:
        groups: torch's param groups with the key "task"; read again at every step.
        rules: of the groups.
        clippy: bounds of the updates, or None.
        adatask: every task keeps its own moments.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        rules: GroupRules,
        clippy: Clippy | None,
        adatask: bool,
    ) -> None:
        self.clock: Clock
        self.groups = groups
        self.rules = rules
        self.clippy = clippy
        self.adatask = adatask
        self.shared: list[Store] = []
        self.heads: list[Store] = []
        self.has_frozen = False
        self._trainable: list[bool] = []
        self._planned = False
        for number in range(len(groups)):
            self.add(number)
        self.device = self.shared[0].flat.device
        ops.backend(self.device)  # a device without one is refused here
        self.forget()

    def add(self, number: int) -> None:
        """Lay out a param group."""
        group = self.groups[number]
        self.rules(group)  # wrong hyperparameters are refused here, not in a step
        task, members = group["task"], group["params"]
        stores = self.shared if task == "shared" else self.heads
        # Parameters of unknown tasks may belong to several: a buffer for each.
        kinds = [[p] for p in members]
        if task is not None:
            dtypes = dict.fromkeys(p.dtype for p in members)
            kinds = [[p for p in members if p.dtype == dtype] for dtype in dtypes]
        stores += [Store(number, each, task) for each in kinds]
        #: All parameters, store by store, and where they were put.
        self.parameters = [p for store in self.stores for p in store.flat.parameters]
        self._pointers = [p.data_ptr() for p in self.parameters]

    def forget(self) -> None:
        """As freshly built: T is unknown again."""
        self.gradients: TaskGradients | None = None
        for store in self.stores:
            store._moments = {}

    @property
    def stores(self) -> list[Store]:
        return [*self.shared, *self.heads]

    @property
    def numel(self) -> int:
        """The number of shared parameters."""
        return sum(store.flat.numel for store in self.shared)

    @property
    def dtypes(self) -> set[torch.dtype]:
        return {store.flat.dtype for store in self.stores}

    @property
    def shared_dtypes(self) -> set[torch.dtype]:
        return {store.flat.dtype for store in self.shared}

    def allocate(self, n_tasks: int, *, spare: int = 0) -> TaskGradients:
        """Make what depends on T: gradients, moments, the clock. Called again for more tasks or
        rows, it keeps moments, counts and gradients.

        Args:
            n_tasks: T.
            spare: rows of gradients beyond T.
        """
        gradients = TaskGradients(
            [store.flat for store in self.shared],
            [store.flat for store in self.heads],
            [None if isinstance(s.owner, str) else s.owner for s in self.heads],
            n_tasks,
            spare=spare,
        )
        old, counts = self.gradients, {}
        if old is not None:
            gradients.take_over(old)
            counts = {id(s): self.clock.counts[s.rows].tolist() for s in self.stores if s._moments}
        for store, rows in zip(self.stores, [*gradients.rows, *gradients.head_rows], strict=True):
            stacked = n_tasks if self.adatask and store.owner == "shared" else None
            store.allocate(self.rules(self.groups[store.number]), rows, stacked)
        self.clock = Clock(sum(s.clock_rows for s in self.stores), self.device)
        first = 0
        for store in self.stores:
            store.rows = slice(first, first + store.clock_rows)
            first = store.rows.stop
            known = counts.get(id(store), [])
            for row, count in enumerate(known[: store.clock_rows]):
                self.clock.counts[store.rows.start + row] = count
        #: What `.grad` shows: of the shared parameters the first row, of each head its gradient.
        self.shown = [own_storage(view) for view in gradients.views(0)]
        self.head_shown = [[own_storage(x) for x in views] for views in gradients.head_views]
        self.one = torch.ones(1, dtype=torch.float64, device=self.device)
        self.gradients = gradients
        self._trainable = []  # the runs of before show other memory
        self.refreeze()
        return gradients

    def refreeze(self) -> None:
        """Bring the runs up to date with the parameters' `requires_grad`."""
        trainable = [p.requires_grad for p in self.parameters]
        if trainable == self._trainable:
            return
        self._trainable = trainable
        self.has_frozen = not all(trainable)
        if self.gradients is not None:
            self.gradients.refreeze()
            for store in self.stores:
                store.split(self.clock)
            self._passes: dict[tuple[Any, ...], Passes] = {}
            self._known: list[Any] | None = None
            self._plan = self._new_plan() if self._planned else None

    def _new_plan(self) -> Plan:
        shared, heads = (
            [
                Entry(
                    # What else a rule says may change, but not its formula.
                    kind=self.rules(self.groups[store.number]).kind,
                    row=store.rows.start,
                    params=run.params,
                    grads=run.grads,
                    state=run.state,
                    segments=run.segments,
                    sigma=run.sigma,
                )
                for store in stores
                for run in store.runs
            ]
            for stores in (self.shared, self.heads)
        )
        clock = self.clock
        bounds = bounds_of(self.clippy)
        return Plan(clock.hyper, clock.counts, clock.tally, shared, heads, clippy=bounds)

    def check(self) -> None:
        """Refuse to go on with parameters whose storage was replaced; see `FlatParameters`."""
        for p, pointer in zip(self.parameters, self._pointers, strict=True):
            if p.data_ptr() != pointer:
                for store in self.stores:
                    kind = "shared" if store.owner == "shared" else "task"
                    store.flat.check(f"{kind} parameter")

    def moments(self) -> Mapping[Parameter, dict[str, Tensor]]:
        """Every parameter's piece of the moments, as torch's `state` has them."""
        return {
            p: state
            for store in self.stores
            for p, state in zip(store.flat.parameters, store.state_views(), strict=True)
        }

    def decide_on_host(self) -> None:
        """The host decides: on a CPU a step is two native calls then (`ops.plan`), in place of a
        torch operator for every pass and run."""
        self._planned = self.device.type == "cpu"

    def passes(self, rows: int, *, reached: bool, lr_factor: float = 1.0) -> Passes:
        """The passes of the coming step; the clock is set.

        Args:
            rows: of gradients of the shared parameters that take part.
            reached: whether any task reaches the shared parameters.
            lr_factor: times every learning rate.
        """
        gradients = self.gradients
        assert gradients is not None
        has_grad = gradients.has_grad
        on_tasks = gradients.reached_shared if self.adatask else [True]
        key = rows, reached, *on_tasks, *has_grad
        passes = self._passes.get(key)
        if passes is None:
            passes = self._passes[key] = self._settle(rows, reached, on_tasks, has_grad)
        self.set_clock(passes.active, lr_factor)
        return passes

    def _settle(
        self, rows: int, reached: bool, on_tasks: list[bool], has_grad: list[bool]
    ) -> Passes:
        shared = [run for store in self.shared for run in store.runs] if reached else []
        heads = [
            run for store, on in zip(self.heads, has_grad, strict=True) if on for run in store.runs
        ]
        pattern = [*on_tasks * len(self.shared), *has_grad]
        active = self.clock.pattern(pattern)
        parameters = [p for run in (*shared, *heads) for p in run.parameters]
        return Passes(shared, heads, rows, active, parameters, pattern, rows if reached else 0)

    def set_clock(self, active: Tensor | None, lr_factor: float = 1.0) -> None:
        """Tell the clock the param groups' hyperparameters, and which of its rows take part; None:
        as before."""
        if active is not None:
            self.clock.active = active
        values = self._values(lr_factor)
        if values is not None and values == self._known:
            return
        self._known = values
        hyper: list[Hyper] = []
        rates: list[tuple[slice, Tensor]] = []
        for store in self.stores:
            group = self.groups[store.number]
            rule = self.rules(group)
            check_state_names(rule, store.state_names)
            lr, weight_decay = group["lr"], group["weight_decay"]
            on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
            if on_device:
                rates.append((store.rows, lr * lr_factor if lr_factor != 1.0 else lr))
            check_lr(0.0 if on_device else lr, weight_decay)
            # -1 stands for a rate that the host does not know.
            known = -1.0 if on_device else float(lr) * lr_factor
            hyper += [rule.hyper(known, float(weight_decay))] * store.clock_rows
            for run in store.runs:
                run.kind = rule.kind
        self.clock.set(hyper)
        for rows, rate in rates:
            self.clock.set_lr(rows, rate)

    def _values(self, lr_factor: float) -> list[Any] | None:
        """What the param groups say now; None if a tensor says it, which is to be read."""
        values: list[Any] = [lr_factor]
        for group in self.groups:
            if isinstance(group["lr"], Tensor):
                return None
            values += (group["lr"], group["weight_decay"])
            values += [group[name] for name in self.rules.names]
        return values

    def look(self, passes: Passes, *, searches: bool, overflow: Tensor | None, reads: bool) -> bool:
        """Begin the step; if it `searches` the Gram matrices are made on the way.

        Args:
            passes: of `passes`.
            searches: whether the step searches before it moves.
            overflow: not 0 where a GradScaler saw gradients that are not finite.
            reads: whether to say what was found; else it stands in the clock's `found`.

        Returns:
            False if something is not finite, and the host reads it.
        """
        if self._plan is not None:
            found = self._plan.look(passes.planned_rows, passes.pattern, searches=searches)
            return not found and (overflow is None or not overflow.item())
        self.clock.start()
        if overflow is not None:
            self.clock.found.logical_or_(overflow != 0)
        clipped = self.clippy is not None
        for run in passes.shared:
            run.search(passes.rows, self.clippy) if clipped or searches else run.check(passes.rows)
        for run in passes.heads:
            run.search(1, self.clippy) if clipped else run.check(1)
        return not (reads and self.clock.found.item())

    def gram(self, passes: Passes, n_tasks: int) -> Tensor:
        """Gram matrix (T, T) of the tasks' updates, float64 on the device, new memory."""
        if self._plan is not None:
            return self._plan.gram(passes.rows)[:n_tasks, :n_tasks].clone()
        grams = [run.gram(passes.rows) for run in passes.shared]
        return sum(grams[1:], grams[0])[:n_tasks, :n_tasks].clone()

    def move(self, passes: Passes, weights: Tensor, *, searches: bool = False) -> None:
        """Move parameters, then moments, unless the step is not finite.

        Args:
            passes: of `passes`.
            weights: (rows,) of the shared parameters' rows; a head's row has the weight 1.
            searches: make the Gram matrix of the updates on the way.
        """
        if self._plan is not None:
            of_rows = weights.tolist() if passes.planned_rows else []
            self._plan.move(of_rows, searches=searches)
        else:
            for run in passes.shared:
                (run.delayed if searches else run.apply)(passes.rows, self.clippy, weights)
            for run in passes.heads:
                run.apply(1, self.clippy, self.one)
            self.clock.finish()
        # The kernels write behind autograd's back: an older graph must not be used any more.
        torch.autograd.graph.increment_version(passes.parameters)

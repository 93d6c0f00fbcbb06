"""Balancers that look at the tasks' gradients of what the tasks share.

One step, T backward passes when weights are searched and one when they are not:

    losses -> rows g_i (T, P) in a flat buffer -> Gram matrix -> weights -> sum_i w_i g_i -> .grad

The rows are passed over twice, by one Gram and one combine; a gradient is copied once, from
autograd's tensor into its row. `.grad` of the shared parameters then shows the flat buffer itself.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import ops
from ..errors import NonFiniteError, SolverError
from ..flat import FlatLayout, is_dense
from ..group_rules import state_dtype
from ..task_gradients import TaskGradients, leaves
from ..weightings import Weighting
from .base import Balancer, Batch, Info, TaskParameters, as_tensors, check_choice, warn

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: Tasks a batched backward takes at once where nobody said otherwise.
AT_ONCE = 8


class GradientOptions(TypedDict, total=False):
    """The keyword arguments that all gradient-level methods have; see `GradientBalancer`."""

    update_weights_every: int
    level: str
    heads: str
    passes: str
    at_once: int | None
    on_failure: str
    on_nonfinite: str | None


class GradientBalancer(Balancer):
    """Base of the gradient-level methods.

    A subclass defines `_weigh`, the weights from the rows, and `_join`, their joint gradient, if
    that is not sum_i w_i g_i.

    Args:
        n_tasks, update_weights_every, on_nonfinite: as `Balancer`.
        level: where gradients are compared: at the shared "parameters", or at the shared
            "features", as MGDA-UB does: T passes through the heads, then one pass through the
            trunk with sum_i w_i dL_i/dfeatures.
        heads: what task-specific parameters get: the gradient of their "own" loss, as if trained
            alone, or that of the "weighted" one.
        passes: how the T gradients are taken: in a "loop", one backward after the other;
            "batched", `at_once` tasks a backward by vmap through autograd; "auto": the loop on
            CPUs, where it is 1.5 to 5 times as fast, else batched, and the loop for good once
            batching has failed. `Info.passes` tells. Peak memory over the graph: loop T + 2
            vectors of P, batched T + 1 + 2 at_once and at_once times the activations' gradients;
            at the features P is their size.
        at_once: tasks a batched backward; at most 8 by default.
        on_failure: what a search without an answer does: "hold" the last weights (a warning,
            `stats["held"]`) or "raise" SolverError before anything is written.

    The `.grad` that `backward` leaves shows a buffer which the next step uses again: clone it to
    keep it. What is still in `.grad` when `backward` is called again is kept and added to.
    Parameters are differentiated with `torch.autograd.grad`: hooks that wait for an accumulated
    gradient do not fire.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        n_tasks: int | None = None,
        *,
        update_weights_every: int = 1,
        level: str = "parameters",
        heads: str = "own",
        passes: str = "auto",
        at_once: int | None = None,
        on_failure: str = "hold",
        on_nonfinite: str | None = None,
    ) -> None:
        check_choice("level", level, ("parameters", "features"))
        check_choice("heads", heads, ("own", "weighted"))
        check_choice("passes", passes, ("auto", "loop", "batched"))
        check_choice("on_failure", on_failure, ("hold", "raise"))
        if at_once is not None and (type(at_once) is not int or at_once < 1):
            raise ValueError(f"at_once must be an integer >= 1 or None, got {at_once!r}")
        self.level = level
        self.heads = heads
        self.passes = passes
        self.at_once = at_once
        self.on_failure = on_failure
        super().__init__(
            n_tasks, update_weights_every=update_weights_every, on_nonfinite=on_nonfinite
        )

    def reset(self) -> None:
        self._flat: _Flat | None = None
        self._seen: dict[str, Any] = {}  # what a loaded state knew of the heads' owners
        self._cannot_batch: str | None = None
        super().reset()

    def _backward(self, batch: Batch, searches: bool) -> tuple[Tensor, Info]:
        assert self.weights is not None
        flat = self._flat_for(batch)
        gradients = flat.gradients
        gradients.clear()
        before = gradients.backwards
        gram = passes = status = None
        if not searches:
            gradients.weighted(batch.values, self.weights.tolist(), row=flat.joint)
        else:
            passes = self._per_task(batch, flat)
            active = [i for i in batch.tasks if gradients.touched[i]]
            self.stats["untouched"] += len(batch.tasks) - len(active)
            if not any(gradients.reached):
                raise RuntimeError(
                    f"no loss reaches {flat.label}: they are not what the model computes with"
                )
            weights = self.weights.clone()
            try:
                if active:
                    gram, found = self._weigh(flat, active, batch)
                    weights[active] = found.to("cpu", torch.float64)
                    self._found = True
            except NonFiniteError as error:
                return self._refuse(batch, str(error))
            except SolverError as error:
                if self.on_failure == "raise":
                    raise
                status = error.status
                self.stats["held"] += 1
                warn(f"weights held: {error} (stats['held'])")
            self.weights = weights
            self.stats["searches"] += 1
            if status is None:
                self._join(flat, active, weights)
            else:
                flat.combine(flat.task_rows, active, weights)
        self.stats["backwards"] += gradients.backwards - before
        flat.deliver(self._head_weights(batch))
        if self.level == "features":
            self.stats["backwards"] += 1
        info = Info(
            self.weights,
            self.names,
            gram=gram,
            status=status,
            result=None if gram is None else self._result(),
            passes=passes,
        )
        return self._weighted_sum(batch), info

    def _per_task(self, batch: Batch, flat: _Flat) -> str:
        """Fill the rows; returns how."""
        retain = self.level == "features"  # the trunk behind them is still to come
        at_once = min(self.at_once or AT_ONCE, len(batch.tasks))
        if at_once == 1 or not self._batches(flat):
            flat.gradients.per_task(batch.values, retain=retain)
            return "loop"
        if self._cannot_batch is None:
            try:
                # The graph has to outlive an attempt that may fail.
                keep = retain or self.passes == "auto"
                flat.gradients.per_task(batch.values, at_once=at_once, retain=keep)
                return f"batched ({at_once} at once)"
            except RuntimeError as error:
                if self.passes == "batched":
                    raise
                self._cannot_batch = str(error).splitlines()[0]
                warn(f"batched backward failed, from now on in a loop: {self._cannot_batch}")
                flat.gradients.clear()
        flat.gradients.per_task(batch.values, retain=retain)
        return f"loop (batched failed: {self._cannot_batch})"

    def _batches(self, flat: _Flat) -> bool:
        """Whether to try a batched backward."""
        return self.passes == "batched" or (self.passes == "auto" and flat.device.type != "cpu")

    @abstractmethod
    def _weigh(self, flat: _Flat, active: list[int], batch: Batch) -> tuple[Tensor | None, Tensor]:
        """The Gram matrix, if the method has one, and the weights (n,) of the active tasks.

        Args:
            flat: the rows.
            active: the n tasks that are present and touch what is shared.
            batch: the call.

        Raises:
            NonFiniteError: a gradient is not finite.
            SolverError: there are no weights.
        """

    def _join(self, flat: _Flat, active: list[int], weights: Tensor) -> None:
        """Write the joint gradient into the joint rows; one pass over the tasks' rows.

        Args:
            weights: (T,) float64 on the CPU; those of tasks not in `active` do not count.
        """
        flat.combine(flat.task_rows, active, weights)

    def _head_weights(self, batch: Batch) -> list[float] | None:
        """What every task's own gradient is multiplied by on its heads; None for 1."""
        assert self.weights is not None
        return self.weights.tolist() if self.heads == "weighted" else None

    def _positive_losses(self, batch: Batch, why: str) -> dict[int, float]:
        """The present tasks' losses, refused where one is not positive; waits for the device."""
        losses = dict(zip(batch.tasks, batch.losses.tolist(), strict=True))
        for i, loss in losses.items():
            if loss <= 0:
                raise ValueError(f"{self._label(i)} must be positive: {why}; got {loss:g}")
        return losses

    def _result(self) -> Any:
        """The solver's result of the last search, if there is a solver."""
        return None

    def _flat_for(self, batch: Batch) -> _Flat:
        """The buffers for the tensors of this call: those of the last one if they fit."""
        assert self.weights is not None
        if self.level == "features":
            name, inputs = "features", batch.features
        else:
            name, inputs = "shared_parameters", batch.shared
        if not inputs:
            raise ValueError(
                f"{name} must be given to {type(self).__name__}.backward"
                + (" with level='features'" if name == "features" else "")
                + f", got {'nothing in it' if inputs is not None else None}"
            )
        for k, tensor in enumerate(inputs):
            if not tensor.requires_grad:
                raise ValueError(f"{name}[{k}] (shape {tuple(tensor.shape)}) requires no grad")
            if not tensor.is_floating_point() or tensor.device != inputs[0].device:
                raise ValueError(
                    f"{name} must be of real floating dtypes on one device, got {tensor.dtype} on "
                    f"{tensor.device} beside {inputs[0].device}"
                )
        flat = self._flat
        heads = heads_of(batch, inputs, len(self.weights))
        if batch.heads is None and flat is not None:
            heads = flat.with_known(heads)
        if flat is None or not flat.fits(inputs, heads, by_shape=self.level == "features"):
            flat = _Flat(inputs, heads, len(self.weights), name)
            self._flat_built(flat)
            self._flat = flat
        flat.keep_old_grads()
        flat.bind(inputs, batch.shared)
        return flat

    def _flat_built(self, flat: _Flat) -> None:
        """New buffers: take over what is known about the heads. Subclasses add their own."""
        old = self._owners()
        same = self._flat is None or self._flat.same_heads(flat)
        if same and old and len(old["owners"]) == len(flat.gradients.owners):
            flat.gradients.owners = list(old["owners"])
            flat.gradients.inspected = list(old["inspected"])
            flat.gradients.reaches = list(old["reaches"])

    def _owners(self) -> dict[str, Any]:
        if self._flat is None:
            return self._seen
        gradients = self._flat.gradients
        return {
            "owners": list(gradients.owners),
            "inspected": list(gradients.inspected),
            "reaches": list(gradients.reaches),
        }

    def _state(self) -> dict[str, Any]:
        return {"heads": copy.deepcopy(self._owners())}

    def _load(self, state: Mapping[str, Any]) -> None:
        if "heads" not in state:
            raise ValueError(f"state must hold 'heads', got {sorted(state)}")
        self._flat = None
        self._seen = copy.deepcopy(state["heads"])

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold no gradients: the buffers show another model's parameters."""
        return {**self.__dict__, "_flat": None, "_seen": self._owners()}

    def _options(self) -> dict[str, Any]:
        options = {"level": (self.level, "parameters"), "heads": (self.heads, "own")}
        return {k: value for k, (value, default) in options.items() if value != default}


class GramBalancer(GradientBalancer):
    """Base of the methods whose weights come from the Gram matrix of the gradients.

    Args:
        weighting: Gram (n, n) -> weights (n,).
        n_tasks, options: as `GradientBalancer`.
    """

    def __init__(
        self,
        weighting: Weighting,
        n_tasks: int | None = None,
        **options: Unpack[GradientOptions],
    ) -> None:
        self.weighting = weighting
        super().__init__(n_tasks, **options)

    def reset(self) -> None:
        self.weighting.reset()
        super().reset()

    def _weigh(self, flat: _Flat, active: list[int], batch: Batch) -> tuple[Tensor, Tensor]:
        gram = flat.gram(active)
        if self.on_nonfinite != "ignore" and not bool(gram.diagonal().isfinite().all()):
            bad = int((~gram.diagonal().isfinite()).nonzero()[0])
            raise NonFiniteError(f"the gradient of {self._label(active[bad])} is not finite")
        return gram, self._solve(gram, active, batch)

    def _solve(self, gram: Tensor, active: list[int], batch: Batch) -> Tensor:
        """The weights (n,) of the active tasks from their Gram matrix (n, n), float64."""
        assert self.weights is not None
        everyone = len(active) == len(self.weights)
        return self.weighting(gram, None if everyone else active)

    def _result(self) -> Any:
        return getattr(self.weighting, "result", None)

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "weighting": self.weighting.state_dict()}

    def _load(self, state: Mapping[str, Any]) -> None:
        if "weighting" not in state:
            raise ValueError(f"state must hold 'weighting', got {sorted(state)}")
        self.weighting.load_state_dict(state["weighting"])
        super()._load({k: v for k, v in state.items() if k != "weighting"})

    def _options(self) -> dict[str, Any]:
        return {"weighting": self.weighting, **super()._options()}


class _Flat:
    """The buffers of one set of tensors: T task rows, a joint row, the heads' gradients.

    Args:
        inputs: shared parameters or features.
        heads: lists of task-specific parameters with their task, None where it is to be found.
        n_tasks: T.
        label: what the inputs are called in messages.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor],
        heads: Sequence[tuple[int | None, list[Tensor]]],
        n_tasks: int,
        label: str,
    ) -> None:
        self.label = label
        self.joint = n_tasks
        dtypes = list(dict.fromkeys(x.dtype for x in inputs))
        self._places = [[k for k, x in enumerate(inputs) if x.dtype == d] for d in dtypes]
        self._templates = [_template(x) for x in inputs]
        self._order = [k for members in self._places for k in members]
        self.layouts = [FlatLayout([self._templates[k] for k in m]) for m in self._places]
        self._heads = [(owner, list(members)) for owner, members in heads]
        self.gradients = TaskGradients(
            self.layouts,
            [FlatLayout(cast(list[Parameter], members)) for _, members in heads],
            [owner for owner, _ in heads],
            n_tasks,
            spare=1,
        )
        self.task_rows = [rows[:n_tasks] for rows in self.gradients.rows]
        self.joint_rows = [rows[n_tasks] for rows in self.gradients.rows]
        self.device = self.layouts[0].device
        self._backend = ops.on(self.device)
        self._grams = torch.zeros(
            len(dtypes), n_tasks, n_tasks, dtype=torch.float64, device=self.device
        )
        self._targets: list[Tensor] = []

    def fits(
        self,
        inputs: Sequence[Tensor],
        heads: Sequence[tuple[int | None, list[Tensor]]],
        *,
        by_shape: bool,
    ) -> bool:
        """Whether these are the tensors (or, `by_shape`, tensors laid out alike) of the last."""
        if by_shape:
            alike = len(inputs) == len(self._templates) and all(
                (x.shape, x.dtype, x.device) == (t.shape, t.dtype, t.device)
                for x, t in zip(inputs, self._templates, strict=True)
            )
        else:
            alike = _same(inputs, self._inputs)
        return alike and self._heads_are(heads)

    def same_heads(self, other: _Flat) -> bool:
        """Whether the other buffers are of the same heads."""
        return self._heads_are(other._heads)

    def with_known(
        self, heads: list[tuple[int | None, list[Tensor]]]
    ) -> list[tuple[int | None, list[Tensor]]]:
        """The heads known so far and then the new ones: an absent task does not lose its own."""
        known = {id(members[0]) for _, members in self._heads}
        return self._heads + [head for head in heads if id(head[1][0]) not in known]

    def _heads_are(self, heads: Sequence[tuple[int | None, list[Tensor]]]) -> bool:
        return len(heads) == len(self._heads) and all(
            owner == old_owner and _same(members, old)
            for (owner, members), (old_owner, old) in zip(heads, self._heads, strict=True)
        )

    def bind(self, inputs: Sequence[Tensor], trunk: Sequence[Tensor] | None) -> None:
        """Differentiate by `inputs`; for features, `trunk` is where their gradient goes."""
        self._inputs = list(inputs)
        self._trunk = trunk
        self._targets = [inputs[k] for k in self._order]
        self.gradients.rebind(self._targets)

    def gram(self, active: Sequence[int]) -> Tensor:
        """Inner products (n, n) of the active tasks' rows, float64 on the CPU, new memory."""
        for rows, out in zip(self.task_rows, self._grams, strict=True):
            self._backend.gram(rows, out)
        gram = self._grams.sum(dim=0).cpu()
        if len(active) < len(gram):
            gram = gram[list(active)][:, list(active)]
        return gram

    def combine(self, rows: Sequence[Tensor], active: Sequence[int], weights: Tensor) -> None:
        """joint row = sum over the active tasks of weights_i rows_i."""
        applied = torch.zeros_like(weights)
        applied[list(active)] = weights[list(active)]
        applied = applied.to(self.device)
        for task_rows, out in zip(rows, self.joint_rows, strict=True):
            self._backend.combine(task_rows, applied, out)

    def finite(self, task: int) -> bool:
        """Whether a task's gradient is finite; waits for the device."""
        return all(self._backend.all_finite(rows[task]) for rows in self.task_rows)

    def task_state(self) -> list[Tensor]:
        """Zeros like the task rows, in the precision that state is kept in."""
        return [layout.rows(self.joint, state_dtype(layout.dtype)) for layout in self.layouts]

    def joint_views(self) -> list[Tensor]:
        """The joint gradient, one tensor an input."""
        return self.gradients.views(self.joint)

    def keep_old_grads(self) -> None:
        """A `.grad` that still shows these buffers gets memory of its own before they change."""
        shown = [*zip(self._targets, self.joint_views(), strict=False)]
        for (_, members), views in zip(self._heads, self.gradients.head_views, strict=True):
            shown += zip(members, views, strict=True)
        for p, view in shown:
            if p.is_leaf and p.grad is not None and p.grad.data_ptr() == view.data_ptr():
                p.grad = p.grad.clone()

    def deliver(self, head_weights: Sequence[float] | None) -> None:
        """Bring the joint row and the heads' gradients into `.grad`."""
        gradients = self.gradients
        hits = [
            (p, view)
            for p, view, hit in zip(self._targets, self.joint_views(), gradients.hits, strict=True)
            if hit
        ]
        if self.label == "features":
            if hits:
                torch.autograd.backward(
                    [z for z, _ in hits],
                    [view for _, view in hits],
                    inputs=self._trunk,
                )
        else:
            _add(hits)
        for h, ((_, members), filled) in enumerate(zip(self._heads, gradients.filled, strict=True)):
            if not filled:
                continue
            if head_weights is not None:
                owner = gradients.owners[h]
                assert owner is not None
                gradients.head_rows[h].mul_(head_weights[owner])
            _add(zip(members, gradients.head_views[h], strict=True))


def _add(grads: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Add gradients to `.grad`; where there is none, it becomes the given tensor."""
    held, added = [], []
    for p, grad in grads:
        if p.grad is None:
            p.grad = grad
        else:
            held.append(p.grad)
            added.append(grad)
    if held:
        torch._foreach_add_(held, added)


def _template(tensor: Tensor) -> Parameter:
    """What a layout has to know of a tensor; one without gaps stands in for one with."""
    plain = tensor.detach()
    if not is_dense(plain):
        plain = torch.empty_like(plain, memory_format=torch.contiguous_format)
    return cast(Parameter, plain)


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def heads_of(
    batch: Batch, inputs: Sequence[Tensor], n_tasks: int
) -> list[tuple[int | None, list[Tensor]]]:
    """Task-specific parameters by task, or each for itself where its task is not known."""
    given: TaskParameters | None = batch.heads
    if given is None:
        beyond = inputs if batch.features is None else [*inputs, *batch.features]
        shared = {id(p) for p in (*inputs, *(batch.shared or ()))}
        return [(None, [p]) for p in leaves(batch.present, beyond) if id(p) not in shared]
    listed = list(given)
    if all(isinstance(entry, Tensor) for entry in listed):
        flat = cast(list[Tensor], listed)
        return [(None, [p]) for p in flat if p.requires_grad]
    if len(listed) != n_tasks:
        raise ValueError(
            f"task_specific_parameters must be one iterable of parameters, or {n_tasks} of them, "
            f"one a task, got {len(listed)} entries"
        )
    # A parameter each, so that one which its task did not reach keeps no gradient.
    heads: list[tuple[int | None, list[Tensor]]] = []
    for i, entry in enumerate(listed):
        members = as_tensors(f"task_specific_parameters[{i}]", entry) or []
        heads += [(i, [p]) for p in members if p.requires_grad]
    return heads

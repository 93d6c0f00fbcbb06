"""The buffers behind the gradient-level balancers, and what is asked of the tensors in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import ops
from ..errors import warn
from .balancer import Batch, as_tensors
from .flat import FlatLayout, is_dense, state_dtype
from .gradients import TaskGradients, graph_nodes, leaves, reaches

#: A task-specific parameter with its task, None where that is to be found.
Head = tuple[int | None, Tensor]


class Buffers:
    """Flat buffers for one set of tensors: T task rows, a joint row, the heads' gradients.

    Args:
        inputs: shared parameters or features.
        heads: task-specific parameters.
        n_tasks: T.
        at_features: the inputs are features: other tensors of the same shapes come every step.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor],
        heads: Sequence[Head],
        n_tasks: int,
        *,
        at_features: bool = False,
    ) -> None:
        self.at_features = at_features
        self.joint = n_tasks
        self.heads = list(heads)
        dtypes = list(dict.fromkeys(x.dtype for x in inputs))
        self._order = [k for d in dtypes for k, x in enumerate(inputs) if x.dtype == d]
        self._specs = _specs([*inputs, *(p for _, p in heads)])
        self._inputs = list(inputs)
        self.layouts = [FlatLayout([_template(x) for x in inputs if x.dtype == d]) for d in dtypes]
        self.gradients = TaskGradients(
            self.layouts,
            [FlatLayout([cast(Parameter, p)]) for _, p in heads],
            [owner for owner, _ in heads],
            n_tasks,
            spare=1,
        )
        self.task_rows = [rows[:n_tasks] for rows in self.gradients.rows]
        self.joint_rows = [rows[n_tasks] for rows in self.gradients.rows]
        self.device = self.layouts[0].device
        self.dtypes = {*dtypes, *(p.dtype for _, p in heads)}
        #: Whether sums over gradients run in float32.
        self.narrow = any(d != torch.float64 for d in dtypes)
        ops.backend(self.device)  # raises where there is none
        self._grams = torch.zeros(
            len(dtypes), n_tasks, n_tasks, dtype=torch.float64, device=self.device
        )
        self.bind(inputs, None, None)

    def fits(self, inputs: Sequence[Tensor], heads: Sequence[Head]) -> bool:
        """Whether these are the tensors the buffers were made for, laid out as then.

        At the features other tensors will do, if they are laid out alike.
        """
        return (
            len(inputs) == len(self._inputs)
            and len(heads) == len(self.heads)
            and (self.at_features or all(x is y for x, y in zip(inputs, self._inputs, strict=True)))
            and self.same_heads(heads)
            and _specs([*inputs, *(p for _, p in heads)]) == self._specs
        )

    def same_heads(self, heads: Sequence[Head]) -> bool:
        """Whether these are the heads, in the same order."""
        return len(heads) == len(self.heads) and all(
            i == j and p is q for (i, p), (j, q) in zip(heads, self.heads, strict=True)
        )

    def bind(
        self, inputs: Sequence[Tensor], trunk: Sequence[Tensor] | None, seed: Tensor | None
    ) -> None:
        """Differentiate by `inputs`; for features, `trunk` is where their gradient goes. All
        gradients of this call are `seed` times too large, if there is one."""
        self._inputs = list(inputs)
        self._trunk = trunk
        self.seed = seed
        self._targets = [inputs[k] for k in self._order]
        self.gradients.rebind(self._targets)

    def gram(self) -> Tensor:
        """Inner products (T, T) of the tasks' gradients, float64 on the device, new memory."""
        for rows, out in zip(self.task_rows, self._grams, strict=True):
            ops.gram(rows, out)
        gram = self._grams.sum(dim=0)
        return gram if self.seed is None else gram / self.seed.double().square()

    def host_gram(self, active: Sequence[int]) -> Tensor:
        """`gram` of the active tasks (n, n), on the CPU."""
        gram = self.gram().cpu()
        if len(active) < len(gram):
            gram = gram[list(active)][:, list(active)]
        return gram

    def combine(self, rows: Sequence[Tensor], weights: Tensor) -> None:
        """joint row = sum_i weights_i rows_i.

        Args:
            rows: (T, P), one a layout.
            weights: (T,) float64.
        """
        weights = weights.to(self.device)
        for task_rows, out in zip(rows, self.joint_rows, strict=True):
            if task_rows.dtype == out.dtype:
                ops.combine(task_rows, weights, out)
            else:  # 16-bit parameters beside rows of state
                wide = torch.empty_like(out, dtype=task_rows.dtype)
                ops.combine(task_rows, weights, wide)
                out.copy_(wide)

    def finite(self, row: int) -> bool:
        """Whether a row of gradients is finite; waits for the device."""
        return bool(self._finite(rows[row : row + 1] for rows in self.gradients.rows))

    def finite_heads(self) -> Tensor:
        """Whether the heads' gradients are finite, a boolean on the device."""
        heads = zip(self.gradients.head_rows, self.gradients.filled, strict=True)
        return self._finite(rows for rows, on in heads if on)

    def _finite(self, grads: Iterable[Tensor]) -> Tensor:
        found: dict[torch.device, Tensor] = {}  # heads may lie on other devices
        for rows in grads:
            if rows.device not in found:
                found[rows.device] = torch.zeros(1, dtype=torch.int32, device=rows.device)
            ops.check(rows, found[rows.device])
        zero = torch.zeros(1, dtype=torch.int32, device=self.device)
        return sum((x.to(self.device) for x in found.values()), zero)[0] == 0

    def task_state(self) -> list[Tensor]:
        """Zeros like the task rows, in the precision that state is kept in."""
        return [layout.rows(self.joint, state_dtype(layout.dtype)) for layout in self.layouts]

    def keep_old_grads(self) -> None:
        """A `.grad` that still shows these buffers gets memory of its own before they change."""
        shown = [(p, views[0]) for (_, p), views in zip(self.heads, self._head_views, strict=True)]
        if not self.at_features:
            shown += zip(self._targets, self._joint_views, strict=True)
        for p, view in shown:
            if p.grad is not None and p.grad.data_ptr() == view.data_ptr():
                p.grad = p.grad.clone()

    def deliver(self, head_weights: Sequence[float | Tensor] | None) -> None:
        """Bring the joint row and the heads' gradients into `.grad`."""
        gradients = self.gradients
        hits = [
            (p, view)
            for p, view, hit in zip(self._targets, self._joint_views, gradients.hits, strict=True)
            if hit
        ]
        if not self.at_features:
            _add(hits)
        elif hits:
            torch.autograd.backward(
                [z for z, _ in hits], [view for _, view in hits], inputs=self._trunk
            )
        filled = [h for h, on in enumerate(gradients.filled) if on]
        if head_weights is not None:
            for h in filled:
                owner = gradients.owners[h]
                if owner is None:  # not finite, so that it is not known whose
                    continue
                for view in self._head_views[h]:  # what lies between tensors stays 0
                    view.mul_(head_weights[owner])
        _add((self.heads[h][1], self._head_views[h][0]) for h in filled)

    @property
    def _joint_views(self) -> list[Tensor]:
        return self.gradients.views(self.joint)

    @property
    def _head_views(self) -> list[list[Tensor]]:
        return self.gradients.head_views

    def known_heads(self) -> dict[str, Any]:
        """What is known of the heads' tasks, for a `state_dict`."""
        gradients = self.gradients
        return {
            "shapes": [tuple(p.shape) for _, p in self.heads],
            "owners": list(gradients.owners),
            "inspected": list(gradients.inspected),
            "reaches": list(gradients.reaches),
        }

    def take_known_heads(self, known: Mapping[str, Any]) -> None:
        """Take over `known_heads` of earlier buffers, if it is of heads like these."""
        if known and known["shapes"] == [tuple(p.shape) for _, p in self.heads]:
            self.gradients.owners = list(known["owners"])
            self.gradients.inspected = list(known["inspected"])
            self.gradients.reaches = list(known["reaches"])


def _add(grads: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Add gradients to `.grad`; where there is none, it shows the given tensor's memory."""
    held, added = [], []
    for p, grad in grads:
        if p.grad is None:
            p.grad = grad.detach()  # an object of its own: the user may change its `.data`
        else:
            held.append(p.grad)
            added.append(grad)
    if held:
        with torch.no_grad():
            torch._foreach_add_(held, added)


def _specs(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    return [(x.shape, x.dtype, x.device, x.stride()) for x in tensors]


def _template(tensor: Tensor) -> Parameter:
    """What a layout has to know of a tensor; one without gaps stands in for one with."""
    plain = tensor.detach()
    if not is_dense(plain):
        plain = torch.empty_like(plain, memory_format=torch.contiguous_format)
    return cast(Parameter, plain)


def heads_of(
    batch: Batch, inputs: Sequence[Tensor], names: Sequence[str] | None, n_tasks: int
) -> list[Head]:
    """Task-specific parameters with their tasks: those given, or those that the graph shows.

    Raises:
        ValueError: something else than the call's docstring allows.
    """
    given = batch.heads
    if given is None:
        beyond = inputs if batch.features is None else [*inputs, *batch.features]
        shared = {id(p) for p in (*inputs, *(batch.shared or ()))}
        return [(None, p) for p in leaves(batch.present, beyond) if id(p) not in shared]
    if isinstance(given, Mapping):
        unknown = [name for name in given if names is None or name not in names]
        if names is None or unknown:
            raise ValueError(
                "task_specific_parameters must name tasks as losses does, got "
                f"{list(given)} with losses of {'no names' if names is None else list(names)}"
            )
        given = [given.get(name, ()) for name in names]
    listed = list(given)
    if all(isinstance(entry, Tensor) for entry in listed):
        return [(None, p) for p in cast(list[Tensor], listed) if p.requires_grad]
    if len(listed) != n_tasks:
        raise ValueError(
            f"task_specific_parameters must be one iterable of parameters, or {n_tasks} of them, "
            f"one a task, got {len(listed)} entries"
        )
    # A parameter each, so that one which its task did not reach keeps no gradient.
    heads: list[Head] = []
    for i, entry in enumerate(listed):
        members = as_tensors(f"task_specific_parameters[{i}]", entry) or []
        heads += [(i, p) for p in members if p.requires_grad]
    return heads


def check_inputs(name: str, inputs: Sequence[Tensor]) -> None:
    """Refuse what cannot be differentiated by, or lies on several devices."""
    for k, tensor in enumerate(inputs):
        if not tensor.requires_grad:
            raise ValueError(f"{name}[{k}] (shape {tuple(tensor.shape)}) requires no grad")
        if not tensor.is_floating_point() or tensor.device != inputs[0].device:
            raise ValueError(
                f"{name} must be of real floating dtypes on one device, got {tensor.dtype} on "
                f"{tensor.device} beside {inputs[0].device}"
            )


def survey(batch: Batch, inputs: Sequence[Tensor], heads: Sequence[Head]) -> None:
    """Look at the graph once, when buffers are made, for what would go wrong in silence.

    Raises:
        ValueError: a parameter listed twice; features that are cut off from the shared parameters,
            lie behind one another, or that a loss goes round on its way to these.
        RuntimeError: a reentrant checkpoint, which hides parameters from `torch.autograd.grad`.
    """
    at_features = batch.features is not None and inputs is batch.features
    trunk = batch.shared or [] if at_features else []
    seen: set[int] = set()
    for p in (*inputs, *trunk, *(p for _, p in heads)):
        if id(p) in seen:
            raise ValueError(
                "a parameter must be listed once, in shared_parameters or in "
                f"task_specific_parameters; one of shape {tuple(p.shape)} is there twice"
            )
        seen.add(id(p))
    if at_features:
        for k, z in enumerate(inputs):
            others = [x for x in inputs if x is not z]
            if z.is_leaf and trunk:
                raise ValueError(
                    f"features[{k}] is a leaf: no shared parameter lies behind it (leave "
                    "shared_parameters out to get the joint gradient in its .grad)"
                )
            if others and reaches(z, others):
                raise ValueError(
                    f"features[{k}] is computed from another of the features: its gradient would "
                    "count twice; give the one nearer to the losses"
                )
    reached = leaves(batch.present, inputs)
    rounds = [p for p in reached if any(p is q for q in trunk)]
    if rounds:
        raise ValueError(
            "features must be all that the losses see of the shared parameters; one of shape "
            f"{tuple(rounds[0].shape)} is reached without passing through them"
        )
    unlisted = [tuple(p.shape) for p in reached if id(p) not in seen]
    if unlisted:
        warn(
            f"the losses reach {len(unlisted)} parameters that are neither in shared_parameters "
            f"nor in task_specific_parameters and get no gradient; shapes {unlisted[:5]}"
        )
    if any("CheckpointFunctionBackward" in n.name() for n in graph_nodes(batch.present, inputs)):
        raise RuntimeError(
            "a reentrant checkpoint hides parameters from the balancer: call "
            "torch.utils.checkpoint.checkpoint with use_reentrant=False"
        )
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1:
        warn(
            "gradient-level balancers do not reduce gradients between processes: every rank "
            "weighs its own"
        )

"""The gradient level: per-task rows, their Gram matrix, and the joint gradient in `.grad`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import ops
from ..ops.plan import GradientPlan
from .flat import FlatLayout, is_dense, own_storage, state_dtype
from .gradients import TaskGradients
from .survey import Head


class GradientLevel:
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
        self._pointers: list[int] = []  # of all tensors, when they were last looked at
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
        self.numel = sum(layout.numel for layout in self.layouts)
        self.dtypes = {*dtypes, *(p.dtype for _, p in heads)}
        #: The passes: torch operators, or on a CPU where the host decides the functions behind
        #: them, which cost a call less; over the task rows a plan there.
        self.ops: Any = ops
        self._plan: GradientPlan | None = None
        ops.backend(self.device)  # raises where there is none
        self._found = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._joint_views = [own_storage(view) for view in self.gradients.views(self.joint)]
        self._head_views = [[own_storage(x) for x in v] for v in self.gradients.head_views]
        self._grams = torch.zeros(
            len(dtypes), n_tasks, n_tasks, dtype=torch.float64, device=self.device
        )
        self.bind(inputs, None, None)

    def fits(self, inputs: Sequence[Tensor], heads: Sequence[Head]) -> bool:
        """Whether these are the tensors the buffers were made for, laid out as then.

        At the features other tensors will do, if they are laid out alike.
        """
        if len(inputs) != len(self._inputs) or not self.same_heads(heads):
            return False
        same = all(x is y for x, y in zip(inputs, self._inputs, strict=True))
        if not same and not self.at_features:
            return False
        tensors = [*inputs, *(p for _, p in heads)]
        pointers = [x.data_ptr() for x in tensors]
        if same and pointers == self._pointers:
            return True
        self._pointers = pointers
        return _specs(tensors) == self._specs

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
        self.targets = [inputs[k] for k in self._order]
        self.gradients.rebind(self.targets)

    def gram(self) -> Tensor:
        """Inner products (T, T) of the tasks' gradients, float64 on the device, new memory."""
        if self._plan is not None:
            gram = self._plan.gram()
        else:
            for rows, out in zip(self.task_rows, self._grams, strict=True):
                self.ops.gram(rows, out)
            gram = self._grams.sum(dim=0) if len(self._grams) > 1 else self._grams[0].clone()
        return gram if self.seed is None else gram / self.seed.double().square()

    def combine(self, rows: Sequence[Tensor], weights: Tensor) -> None:
        """joint row = sum_i weights_i rows_i.

        Args:
            rows: (T, P), one a layout.
            weights: (T,) float64.
        """
        weights = weights.to(self.device)
        if self._plan is not None and rows is self.task_rows:
            self._plan.combine(weights)
            return
        for task_rows, out in zip(rows, self.joint_rows, strict=True):
            if task_rows.dtype == out.dtype:
                self.ops.combine(task_rows, weights, out)
            else:  # 16-bit parameters beside rows of state
                wide = torch.empty_like(out, dtype=task_rows.dtype)
                self.ops.combine(task_rows, weights, wide)
                out.copy_(wide)

    def finite(self, row: int) -> bool:
        """Whether a row of gradients is finite; synchronizes with the device."""
        if self._plan is not None:
            return self._plan.finite(row)
        self._found.zero_()
        for rows in self.gradients.rows:
            self.ops.check(rows[row : row + 1], self._found)
        return not self._found.item()

    def finite_heads(self) -> Tensor:
        """Whether the heads' gradients are finite, a boolean on the device."""
        heads = zip(self.gradients.head_rows, self.gradients.has_grad, strict=True)
        return self._finite(rows for rows, on in heads if on)

    def _finite(self, grads: Iterable[Tensor]) -> Tensor:
        found: dict[torch.device, Tensor] = {}  # heads may lie on other devices
        for rows in grads:
            if rows.device not in found:
                found[rows.device] = torch.zeros(1, dtype=torch.int32, device=rows.device)
            self.ops.check(rows, found[rows.device])
        if list(found) == [self.device]:
            return found[self.device][0] == 0
        zero = torch.zeros(1, dtype=torch.int32, device=self.device)
        return sum((x.to(self.device) for x in found.values()), zero)[0] == 0

    def decide_on_host(self) -> None:
        """The passes are not captured and not compiled."""
        if self.device.type == "cpu":
            self.ops = ops.backend(self.device)
            self._plan = GradientPlan(self.gradients.rows)

    def task_state(self) -> list[Tensor]:
        """Zeros like the task rows, in the precision that state is kept in."""
        return [layout.rows(self.joint, state_dtype(layout.dtype)) for layout in self.layouts]

    def stacked_views(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """The pieces (T, *shape) of rows like the task rows, one for each of `targets`."""
        each = zip(self.layouts, rows, strict=True)
        return [view for layout, own in each for view in layout.stacked_views(own)]

    def keep_old_grads(self) -> None:
        """A `.grad` that still shows these buffers gets memory of its own before they change."""
        shown = [(p, views[0]) for (_, p), views in zip(self.heads, self._head_views, strict=True)]
        if not self.at_features:
            shown += zip(self.targets, self._joint_views, strict=True)
        for p, view in shown:
            if p.grad is not None and p.grad.data_ptr() == view.data_ptr():
                p.grad = p.grad.clone()

    def deliver(
        self, head_weights: Sequence[float | Tensor] | None, *, retain: bool = False
    ) -> None:
        """Bring the joint row and the heads' gradients into `.grad`.

        Args:
            head_weights: (T,), what the heads' gradients are multiplied by; None: 1.
            retain: keep the graph behind the features.
        """
        gradients = self.gradients
        hits = [
            (p, view)
            for p, view, hit in zip(
                self.targets, self._joint_views, gradients.reached_now, strict=True
            )
            if hit
        ]
        if not self.at_features:
            _add(hits)
        elif hits:
            torch.autograd.backward(
                [z for z, _ in hits],
                [view for _, view in hits],
                inputs=self._trunk,
                retain_graph=retain,
            )
        filled = [h for h, on in enumerate(gradients.has_grad) if on]
        if head_weights is not None:
            for h in filled:
                owner = gradients.ownership.owners[h]
                if owner is None:  # not finite, so that it is not known whose
                    continue
                for view in self._head_views[h]:  # what lies between tensors stays 0
                    view.mul_(head_weights[owner])
        _add((self.heads[h][1], self._head_views[h][0]) for h in filled)

    def known_heads(self) -> dict[str, Any]:
        """What is known of the heads' tasks, for a `state_dict`."""
        shapes = [tuple(p.shape) for _, p in self.heads]
        return {"shapes": shapes, **self.gradients.ownership.state()}

    def take_known_heads(self, known: Mapping[str, Any]) -> None:
        """Take over `known_heads` of earlier buffers, if it is of heads like these."""
        if known and known["shapes"] == [tuple(p.shape) for _, p in self.heads]:
            self.gradients.ownership.load(known)


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

"""losses (T,) -> per-task gradients (T, P) in flat buffers.

T losses cost T backward passes and no more: each gives the task's row of the shared gradients
and the gradients of its own head. The graph is freed after the last.

More than 400 lines, because every way of taking a backward shares the books of one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .flat import FlatLayout
from .graph import graph_root, reaches
from .heads import USED, HeadGrads, Ownership

#: A head's own gradient is read off a weighted backward by dividing by the task's weight. Under
#: these weights the weighted gradient could underflow, and the task gets its own backward.
SMALLEST_WEIGHT = {torch.float16: 2.0**-6}
SMALLEST_WEIGHT_ELSE = 2.0**-40


@dataclass
class _Inputs:
    """What one backward differentiates by: settled once for each set of heads.

    Attributes:
        tensors: shared parameters, then those of the heads; frozen ones are left out.
        shared: number of the shared parameter of each of the first tensors.
        heads: head and number within it of each of the others.
        targets: where the gradients go, by the row of the shared parameters.
    """

    tensors: list[Tensor]
    shared: list[int]
    heads: list[tuple[int, int]]
    targets: dict[int, list[Tensor]]


class TaskGradients:
    """The gradients of one step: T rows over the shared parameters, one row per head.

    Every backward pass of a balancer goes through here. Filled by `per_task` or `weighted`
    (again, before `clear`: gradients add up), read by the optimizer, forgotten by `clear`.

    Args:
        layouts: of the shared parameters, one per param group and dtype.
        heads: layouts of task-specific parameters, each of one task.
        owners: the task each head belongs to; None: to be found, see `Ownership`.
        n_tasks: T.
        spare: rows beyond T, for the caller.

    Attributes:
        rows: per-task gradients, one buffer (T + spare, P) per layout. `weighted` puts the joint
            gradient into the row it is told, 0 by default.
        head_rows: the heads' own gradients, one buffer (1, P) per head.
        head_views: the pieces of `head_rows`, shaped like the parameters.
        ownership: whose the heads are.
        has_grad: whether each head has a gradient.
        took_part: whether each task was present.
        reached_shared: whether each task reached the shared parameters.
        ever_reached: whether each shared parameter was ever reached by a task.
        reached_now: whether each shared parameter was reached since `clear`.
        backwards: number of backward passes so far.
    """

    def __init__(
        self,
        layouts: Sequence[FlatLayout],
        heads: Sequence[FlatLayout],
        owners: Sequence[int | None],
        n_tasks: int,
        spare: int = 0,
    ) -> None:
        self.rows = [layout.rows(n_tasks + spare) for layout in layouts]
        self.head_rows = [head.rows(1) for head in heads]
        self.backwards = 0
        self.shared: list[Tensor] = [p for layout in layouts for p in layout.parameters]
        self._heads = [head.parameters for head in heads]
        shapes = [[p.shape for p in members] for members in self._heads]
        self.ownership = Ownership(owners, shapes, n_tasks)
        self.ever_reached = [False] * len(self.shared)
        dtypes = {layout.dtype for layout in (*layouts, *heads)}
        self._floor = max(SMALLEST_WEIGHT.get(d, SMALLEST_WEIGHT_ELSE) for d in dtypes)
        self._views = [
            [
                view
                for rows, layout in zip(self.rows, layouts, strict=True)
                for view in layout.views(rows[i])
            ]
            for i in range(n_tasks + spare)
        ]
        self.head_views = [
            head.views(rows[0]) for head, rows in zip(heads, self.head_rows, strict=True)
        ]
        self._seed: Tensor | None = None
        self._inputs: dict[tuple[bool, tuple[int, ...]], _Inputs] = {}
        self._starts: dict[tuple[object, ...], Tensor] = {}
        self.clear()

    def clear(self) -> None:
        """Forget the gradients: the next backward starts afresh."""
        self._written: set[int] = set()  # rows that hold gradients
        n_tasks = len(self.ownership.inspected)
        self.took_part = [False] * n_tasks
        self.reached_shared = [False] * n_tasks
        self.has_grad = [False] * len(self._heads)
        self.reached_now = [False] * len(self.shared)

    def rebind(self, shared: Sequence[Tensor]) -> None:
        """Differentiate by these tensors, shaped like the layouts', from now on."""
        if all(new is old for new, old in zip(shared, self.shared, strict=True)):
            return
        self.shared = list(shared)
        self._inputs.clear()

    def take_over(self, old: TaskGradients) -> None:
        """Continue where gradients of fewer tasks, heads or rows stood."""
        self.ownership.load(old.ownership.state())
        self.backwards = old.backwards
        self._written = set(old._written)
        for name in ("took_part", "reached_shared", "has_grad", "reached_now", "ever_reached"):
            known = getattr(old, name)
            getattr(self, name)[: len(known)] = known
        pairs = [*zip(self.rows, old.rows, strict=True)]
        pairs += zip(self.head_rows, old.head_rows, strict=False)  # new heads come last
        for rows, known_rows in pairs:
            rows[: len(known_rows)].copy_(known_rows)

    def views(self, row: int) -> list[Tensor]:
        """The pieces of a row, one per shared parameter, shaped like it."""
        return self._views[row]

    def per_task(
        self,
        losses: Sequence[Tensor | None],
        *,
        at_once: int = 1,
        retain: bool = False,
        seed: Tensor | None = None,
    ) -> None:
        """The gradients of every present task, each into its own row; absent tasks' rows are 0.

        Args:
            losses: of the T tasks.
            at_once: tasks per backward pass: 1 is one after the other; more are batched (vmap
                through autograd), if the model allows it.
            retain: keep the graph.
            seed: a scalar that all gradients of this call are multiplied by, on the way: the
                scale of a GradScaler. None: 1.

        Raises:
            RuntimeError: an operation of the model cannot be batched; nothing has been taken.
        """
        self._seed = seed
        for i, loss in enumerate(losses):
            if loss is None and i not in self._written:
                torch._foreach_zero_(self._views[i])
                self._written.add(i)
        present = [(i, loss) for i, loss in enumerate(losses) if loss is not None]
        fresh: list[tuple[int, HeadGrads]] = []
        for start in range(0, len(present), at_once):
            some = present[start : start + at_once]
            keep = retain or start + at_once < len(present)
            if at_once == 1:
                ((i, loss),) = some
                fresh += self._one_task(i, loss, row=i, retain=keep)
            else:
                fresh += self._batched(some, retain=keep)
        self._settle(fresh)

    def weighted(
        self,
        losses: Sequence[Tensor | None],
        weights: Sequence[float] | Tensor,
        *,
        row: int = 0,
        seed: Tensor | None = None,
        divides: bool = True,
        retain: bool = False,
    ) -> None:
        """One backward of sum_i weights_i L_i into `row`; heads get weights_i divided out again.

        Tasks of (nearly) no weight and tasks that are UNKNOWN take a backward of their own.

        Args:
            losses: of the T tasks.
            weights: of the T tasks. A tensor (T,) is not read.
            row: where the joint gradient goes.
            seed, retain: as in `per_task`.
            divides: whether the weights are such that they can be divided out. If they are not
                (a tensor with zeros), the heads get a backward of their own, down to the heads.
        """
        self._seed = seed
        present = [(i, loss) for i, loss in enumerate(losses) if loss is not None]
        shares: Sequence[float | Tensor]
        if isinstance(weights, Tensor):
            small = [False] * len(losses)
            shares = weights.unbind()
        else:
            # Under a GradScaler activations are likely of 16 bits, whatever the parameters are.
            floor = self._floor if seed is None else SMALLEST_WEIGHT[torch.float16]
            small = [abs(a) < floor for a in weights]
            shares = weights
        inspected = self.ownership.inspected
        apart = [i for i, _ in present if small[i] or not inspected[i]]
        joint = {i: loss for i, loss in present if i not in apart}
        if joint:
            self._joint_pass(joint, shares, row, divides, retain=retain or bool(apart))
        elif row not in self._written:
            torch._foreach_zero_(self._views[row])
            self._written.add(row)
        fresh: list[tuple[int, HeadGrads]] = []
        for i, loss in present:
            if i in apart:
                keep = retain or i != apart[-1]
                fresh += self._one_task(i, loss, row=row, retain=keep, weight=shares[i])
        self._settle(fresh)

    def extra(
        self, loss: Tensor, *, row: int, seed: Tensor | None = None, retain: bool = False
    ) -> None:
        """Add the gradient of a loss that is no task's to a row, and to the heads it reaches.

        Args:
            loss: a scalar.
            row: where the gradient of the shared parameters goes.
            seed, retain: as in `per_task`.
        """
        self._seed = seed
        heads = range(len(self._heads))
        grads, head_grads = self._backward([loss], [1.0], heads, retain=retain)
        self._take([], grads, row=row)
        for h, own in head_grads.items():
            self._take_head(h, own)

    def refreeze(self) -> None:
        """Look at the parameters' `requires_grad` again: frozen ones have no gradients, and their
        pieces of the rows are 0."""
        self._inputs.clear()
        for views in self._views:
            for view, p in zip(views, self.shared, strict=True):
                if not p.requires_grad:
                    view.zero_()

    def _joint_pass(
        self,
        joint: dict[int, Tensor],
        shares: Sequence[float | Tensor],
        row: int,
        divides: bool,
        *,
        retain: bool,
    ) -> None:
        """One backward of the weighted losses of tasks whose heads are known."""
        owners = self.ownership.owners
        heads = [h for h, owner in enumerate(owners) if owner in joint]
        values = list(joint.values())
        if not divides and heads:
            ones = [1.0] * len(values)
            _, own = self._backward(values, ones, heads, retain=True, shared=False)
            for h, grads in own.items():
                self._take_head(h, grads)
            heads = []
        weights = [shares[i] for i in joint]
        inputs = self._inputs_for(heads)
        flat = self._differentiate(values, weights, inputs, retain=retain)
        if self._take_at_once(list(joint), flat, inputs, heads, row):
            for h in heads:
                self.head_rows[h].mul_(1 / shares[owners[h]])  # type: ignore[index]
            return
        grads, head_grads = self._sorted(flat, inputs, heads)
        self._take(list(joint), grads, row=row)
        for h, own_grads in head_grads.items():
            owner = owners[h]
            assert owner is not None
            self._take_head(h, own_grads, 1 / shares[owner])

    def _one_task(
        self,
        i: int,
        loss: Tensor,
        *,
        row: int,
        retain: bool,
        weight: float | Tensor = 1.0,
    ) -> list[tuple[int, HeadGrads]]:
        """One backward of task i. Gradients of heads whose owner is to be found or checked are
        returned; the others are taken."""
        ownership = self.ownership
        seen = ownership.inspected[i]
        heads = ownership.of([i])
        inputs = self._inputs_for(heads)
        flat = self._differentiate([loss], [1.0], inputs, retain=retain)
        known = seen and all(ownership.owners[h] == i for h in heads)
        plain = not isinstance(weight, Tensor) and weight == 1.0
        if known and plain and self._take_at_once([i], flat, inputs, heads, row):
            ownership.reaches[i] = True
            if inputs.heads:
                ownership.inspected[i] = USED
            return []
        grads, head_grads = self._sorted(flat, inputs, heads)
        ownership.reaches[i] = any(grad is not None for grad in grads)
        self._take([i], grads, row=row, weight=weight)
        return self._take_known(i, head_grads) if seen else [(i, head_grads)]

    def _take_at_once(
        self,
        tasks: Sequence[int],
        flat: Sequence[Tensor | None],
        inputs: _Inputs,
        heads: Sequence[int],
        row: int,
    ) -> bool:
        """Take the gradients of a backward by one copy; False if some are missing or are to be
        added to others."""
        grads = [grad for grad in flat if grad is not None]
        if (
            row in self._written
            or not inputs.shared
            or len(grads) < len(flat)
            or any(self.has_grad[h] for h in heads)
        ):
            return False
        torch._foreach_copy_(self._targets(inputs, row), grads)
        self._note(tasks, inputs.shared, row)
        for h in heads:
            self.has_grad[h] = True
        return True

    def _take_known(self, i: int, head_grads: HeadGrads) -> list[tuple[int, HeadGrads]]:
        """Take task i's gradients on the heads known to be its own; the others are returned."""
        owners = self.ownership.owners
        own = {h: head_grads.pop(h) for h in list(head_grads) if owners[h] == i}
        for h, grads in own.items():
            self._take_head(h, grads)
        self.ownership.note(i, own)
        return [(i, head_grads)] if head_grads else []

    def _batched(
        self, some: Sequence[tuple[int, Tensor]], *, retain: bool
    ) -> list[tuple[int, HeadGrads]]:
        """`_one_task` for several tasks in one batched backward."""
        ownership = self.ownership
        heads = ownership.of([i for i, _ in some])
        losses = [loss for _, loss in some]
        unit = torch.eye(len(some), dtype=losses[0].dtype, device=losses[0].device)
        grads, head_grads = self._backward(
            losses,
            [unit[k].to(loss.dtype).reshape(-1, *loss.shape) for k, loss in enumerate(losses)],
            heads,
            retain=retain,
            batched=True,
        )
        fresh: list[tuple[int, HeadGrads]] = []
        trainable = [p for p in self.shared if p.requires_grad]
        for k, (i, loss) in enumerate(some):
            # Batched, a task that does not reach a parameter has zeros there: the graph tells.
            ownership.reaches[i] = reaches(loss, trainable)
            mine = [_row(grad, k) if ownership.reaches[i] else None for grad in grads]
            self._take([i], mine, row=i)
            own: HeadGrads = {h: [_row(grad, k) for grad in head_grads[h]] for h in heads}
            fresh += self._take_known(i, own) if ownership.inspected[i] else [(i, own)]
        return fresh

    def _backward(
        self,
        losses: Sequence[Tensor],
        weights: Sequence[float | Tensor],
        heads: Sequence[int],
        *,
        retain: bool,
        batched: bool = False,
        shared: bool = True,
    ) -> tuple[list[Tensor | None], HeadGrads]:
        """The gradients of sum_i weights_i losses_i on the shared parameters (if `shared`) and
        on heads; None where no loss reaches.

        `batched`: of n such sums, weights being a tensor (n, *shape of the loss) for each loss;
        the gradients have a leading n.
        """
        inputs = self._inputs_for(heads, shared=shared)
        flat = self._differentiate(losses, weights, inputs, retain=retain, batched=batched)
        return self._sorted(flat, inputs, heads)

    def _inputs_for(self, heads: Sequence[int], *, shared: bool = True) -> _Inputs:
        key = shared, tuple(heads)
        inputs = self._inputs.get(key)
        if inputs is None:
            trunk = [k for k, p in enumerate(self.shared) if shared and p.requires_grad]
            own = [(h, k) for h in heads for k, p in enumerate(self._heads[h]) if p.requires_grad]
            tensors = [self.shared[k] for k in trunk] + [self._heads[h][k] for h, k in own]
            inputs = self._inputs[key] = _Inputs(tensors, trunk, own, {})
        return inputs

    def _targets(self, inputs: _Inputs, row: int) -> list[Tensor]:
        """Where the gradients by `inputs` go."""
        targets = inputs.targets.get(row)
        if targets is None:
            views = self._views[row]
            targets = [views[k] for k in inputs.shared]
            targets += [self.head_views[h][k] for h, k in inputs.heads]
            inputs.targets[row] = targets
        return targets

    def _differentiate(
        self,
        losses: Sequence[Tensor],
        weights: Sequence[float | Tensor],
        inputs: _Inputs,
        *,
        retain: bool,
        batched: bool = False,
    ) -> tuple[Tensor | None, ...]:
        self.backwards += 1
        if not inputs.tensors:
            return ()
        grads = torch.autograd.grad(
            losses if batched else [graph_root(loss) for loss in losses],  # type: ignore[arg-type]
            inputs.tensors,
            [self._start(loss, a) for loss, a in zip(losses, weights, strict=True)],
            retain_graph=retain,
            allow_unused=True,
            is_grads_batched=batched,
        )
        for k, grad in enumerate(grads):
            if grad is not None and grad.layout is not torch.strided:
                n = len(inputs.shared)
                kind = f"shared parameter {inputs.shared[k]}" if k < n else "a task parameter"
                raise RuntimeError(
                    f"{kind} (shape {tuple(inputs.tensors[k].shape)}) has a sparse gradient "
                    f"({grad.layout}); per-task gradients must be dense: build the embedding with "
                    "sparse=False"
                )
        return grads

    def _sorted(
        self, flat: Sequence[Tensor | None], inputs: _Inputs, heads: Sequence[int]
    ) -> tuple[list[Tensor | None], HeadGrads]:
        """Gradients by parameter: of the shared ones in order, and of each head."""
        grads: list[Tensor | None] = [None] * len(self.shared)
        for k, grad in zip(inputs.shared, flat, strict=False):
            grads[k] = grad
        own: dict[int, list[Tensor | None]] = {h: [None] * len(self._heads[h]) for h in heads}
        for (h, k), grad in zip(inputs.heads, flat[len(inputs.shared) :], strict=True):
            own[h][k] = grad
        return grads, dict(own.items())

    def _start(self, loss: Tensor, weight: float | Tensor) -> Tensor:
        """What the backward of a loss starts with: its weight times the seed, of its dtype."""
        if isinstance(weight, float):
            if self._seed is None and loss.device.type == "cpu":
                key = weight, loss.dtype, loss.shape
                start = self._starts.get(key)
                if start is None:
                    if len(self._starts) > 256:
                        self._starts.clear()
                    start = self._starts[key] = torch.full_like(loss, weight)
                return start
            weight = torch.full_like(loss, weight)
        if self._seed is not None:
            weight = weight * self._seed
        # Batched, a weight has an axis more than the loss.
        return weight.to(loss.dtype) if weight.dim() > loss.dim() else weight.to(loss).view_as(loss)

    def _take(
        self,
        tasks: Sequence[int],
        grads: Sequence[Tensor | None],
        *,
        row: int,
        weight: float | Tensor = 1.0,
    ) -> None:
        """Bring gradients of the shared parameters into a row, or add them to what it holds."""
        add = row in self._written
        if not add and (isinstance(weight, Tensor) or weight != 1.0):
            torch._foreach_zero_(self._views[row])
            add = True
        _write(self._views[row], grads, add=add, weight=weight)
        self._note(tasks, [k for k, grad in enumerate(grads) if grad is not None], row)

    def _note(self, tasks: Sequence[int], reached: Sequence[int], row: int) -> None:
        """Remember which tasks and shared parameters had gradients."""
        self._written.add(row)
        for k in reached:
            self.ever_reached[k] = self.reached_now[k] = True
        for i in tasks:
            self.took_part[i] = True
            if reached and (len(tasks) == 1 or self.ownership.reaches[i]):
                self.reached_shared[i] = True

    def _take_head(
        self, h: int, grads: Sequence[Tensor | None], factor: float | Tensor = 1.0
    ) -> None:
        """Take `factor` times a head's gradients; a head out of reach keeps none."""
        if all(grad is None for grad in grads):
            return
        _write(self.head_views[h], grads, add=self.has_grad[h], weight=factor)
        if not self.has_grad[h] and (isinstance(factor, Tensor) or factor != 1.0):
            self.head_rows[h].mul_(factor)
        self.has_grad[h] = True

    def _settle(self, fresh: Sequence[tuple[int, HeadGrads]]) -> None:
        """Find or check the owner of every head in `fresh`, then take the gradients."""
        for h, own in self.ownership.settle(fresh, self.rows[0].device):
            self._take_head(h, own)


def _row(grad: Tensor | None, k: int) -> Tensor | None:
    return None if grad is None else grad[k]


def _write(
    views: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    *,
    add: bool,
    weight: float | Tensor = 1.0,
) -> None:
    """Bring one backward's gradients into a row: the one copy they make.

    Args:
        views: pieces of the row, shaped like the parameters; written.
        grads: the gradients; None stands for zero.
        add: add weight times the gradients to what is there instead of replacing it.
    """
    targets, sources = [], []
    for view, grad in zip(views, grads, strict=True):
        if grad is not None:
            targets.append(view)
            sources.append(grad)
        elif not add:
            view.zero_()
    if not targets or (isinstance(weight, float) and weight == 0.0):
        return
    if not add:
        torch._foreach_copy_(targets, sources)
    elif isinstance(weight, Tensor):
        torch._foreach_add_(targets, torch._foreach_mul(sources, weight))
    else:
        torch._foreach_add_(targets, sources, alpha=weight)

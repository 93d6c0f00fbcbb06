"""losses (T,) -> per-task gradients (T, P) in flat buffers.

T losses cost T backward passes and no more: each gives the task's row of the shared gradients
and the gradients of its own head. The graph is freed after the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import Parameter

from .device import capturing
from .flat import FlatLayout

Losses = Tensor | Sequence[Tensor | None] | Mapping[str, Tensor | None]

#: A head's own gradient is read off a weighted backward by dividing by the task's weight. Under
#: these weights the weighted gradient could underflow, and the task gets its own backward.
SMALLEST_WEIGHT = {torch.float16: 2.0**-6}
SMALLEST_WEIGHT_ELSE = 2.0**-40

#: What is known of a task's heads: nothing until its gradients on all heads were looked at, then
#: whether its last own backward reached any of its own.
UNKNOWN, UNUSED, USED = range(3)


def as_list(
    losses: Losses,
    n_tasks: int | None,
    names: Sequence[str] | None,
    *,
    attached: bool = True,
) -> tuple[list[Tensor | None], list[str] | None]:
    """The losses in task order, None for a task absent from this batch, and the tasks' names.

    Args:
        losses: T scalars: a tensor (T,), a list or tuple, or a dict of named tasks. In a dict,
            names left out are absent tasks.
        n_tasks: T where it is known.
        names: the tasks' names where they are known.
        attached: whether the losses must be attached to a graph.

    Raises:
        ValueError: the wrong number of losses, an unknown name, a loss that is no scalar tensor
            or is not attached to a graph, or no loss at all.
    """
    if isinstance(losses, Mapping):
        if names is None:
            names = list(losses)
            if n_tasks is not None and len(names) != n_tasks:
                raise ValueError(f"losses must name {n_tasks} tasks, got {names}")
        unknown = [name for name in losses if name not in names]
        if unknown:
            raise ValueError(f"losses must name tasks of {list(names)}, got also {unknown}")
        values = [losses.get(name) for name in names]
    elif isinstance(losses, Tensor):
        if losses.dim() != 1:
            raise ValueError(
                "losses must be a tensor of shape (T,), a sequence or a dict, got a tensor of "
                f"shape {tuple(losses.shape)}"
            )
        values = list(losses.unbind())
    elif isinstance(losses, Sequence):
        values = list(losses)
    else:
        raise ValueError(
            f"losses must be a tensor (T,), a sequence or a dict, got {type(losses).__name__}"
        )
    if n_tasks is not None and len(values) != n_tasks:
        raise ValueError(f"losses must hold {n_tasks} tasks, got {len(values)}")
    for i, loss in enumerate(values):
        if loss is None:
            continue
        label = f"losses[{names[i]!r}]" if isinstance(losses, Mapping) and names else f"losses[{i}]"
        if not isinstance(loss, Tensor):
            raise ValueError(f"{label} must be a scalar tensor, got {type(loss).__name__}")
        if loss.numel() != 1:
            raise ValueError(f"{label} must be a scalar, got shape {tuple(loss.shape)}")
        if not loss.is_floating_point():
            raise ValueError(f"{label} must be of a real floating dtype, got {loss.dtype}")
        if attached and not loss.requires_grad:
            raise ValueError(
                f"{label} is not attached to a graph: nothing it was computed from requires grad; "
                "a task that is absent from this batch is None"
            )
    if all(loss is None for loss in values):
        raise ValueError(f"losses must hold at least one task, got none of {len(values)}")
    return values, list(names) if names is not None else None


def first_nonfinite(losses: Sequence[Tensor | None]) -> int | None:
    """Index of the first NaN or infinite loss, None if there is none. Waits for the device."""
    for i, loss in enumerate(losses):
        if loss is not None and not math.isfinite(loss.item()):
            return i
    return None


#: Gradients of one backward on heads: number of the layout -> one entry a parameter.
HeadGrads = dict[int, Sequence[Tensor | None]]


class TaskGradients:
    """The gradients of one step: T rows over the shared parameters, one row a head.

    Every backward pass of a balancer goes through here. Filled by `per_task` or `weighted`
    (again, before `clear`: gradients add up), read by the optimizer, forgotten by `clear`.

    Args:
        layouts: of the shared parameters, one a param group and dtype.
        heads: layouts of task-specific parameters, each of one task.
        owners: the task each head belongs to. None is found out at the first own backward of a
            task that moves the head; until then it is left alone. Given owners are checked at
            the tasks' first backward. Neither happens by gradients that are not finite.
        n_tasks: T.
        spare: rows beyond T, for the caller.

    Attributes:
        rows: per-task gradients, one buffer (T + spare, P) a layout. `weighted` puts the joint
            gradient into the row it is told, 0 by default.
        head_rows: the heads' own gradients, one buffer (1, P) a head.
        filled: whether each head has a gradient.
        present: whether each task took part.
        touched: whether each task reached the shared parameters.
        reached: whether each shared parameter was ever reached by a task.
        hits: whether each shared parameter was reached since `clear`.
        owners: the task each head belongs to, as far as is known.
        inspected: UNKNOWN, UNUSED or USED for each task. A task that is UNKNOWN takes a backward
            of its own, which waits for the device.
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
        self.owners = list(owners)
        self.inspected = [UNKNOWN] * n_tasks
        self.reaches = [True] * n_tasks  # whether a task's last own backward reached the rows
        self.backwards = 0
        self._seed: Tensor | None = None
        self._shared: list[Tensor] = [p for layout in layouts for p in layout.parameters]
        self._heads = [head.parameters for head in heads]
        self.reached = [False] * len(self._shared)
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
        self.clear()

    def clear(self) -> None:
        """Forget the gradients: the next backward starts afresh."""
        self._empty = True
        self.present = [False] * len(self.inspected)
        self.touched = [False] * len(self.inspected)
        self.filled = [False] * len(self._heads)
        self.hits = [False] * len(self._shared)

    def rebind(self, shared: Sequence[Tensor]) -> None:
        """Differentiate by these tensors, shaped like the layouts', from now on."""
        self._shared = list(shared)

    def views(self, row: int) -> list[Tensor]:
        """The pieces of a row, one a shared parameter, shaped like it."""
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
            at_once: tasks a backward pass: 1 is one after the other; more are batched (vmap
                through autograd), where the model allows it.
            retain: keep the graph.
            seed: a scalar that all gradients of this call are multiplied by, on the way: the
                scale of a GradScaler. None: 1.

        Raises:
            RuntimeError: an operation of the model cannot be batched; nothing has been taken.
        """
        for i, loss in enumerate(losses):
            if loss is None and self._empty:
                _write(self._views[i], [None] * len(self._shared), add=False)
        present = [(i, loss) for i, loss in enumerate(losses) if loss is not None]
        self._seed = seed
        fresh: list[tuple[int, HeadGrads]] = []
        for start in range(0, len(present), at_once):
            some = present[start : start + at_once]
            keep = retain or start + at_once < len(present)
            if at_once == 1:
                ((i, loss),) = some
                fresh += self._one_task(i, loss, row=i, add=not self._empty, retain=keep)
            else:
                fresh += self._batched(some, add=not self._empty, retain=keep)
        self._settle_owners(fresh)
        self._empty = False

    def weighted(
        self,
        losses: Sequence[Tensor | None],
        weights: Sequence[float] | Tensor,
        *,
        row: int = 0,
        seed: Tensor | None = None,
        divides: bool = True,
        retain: bool = False,
        unbalanced: Tensor | None = None,
    ) -> None:
        """One backward of sum_i weights_i L_i into `row`; heads get weights_i divided out again.

        Tasks of (nearly) no weight and tasks that are UNKNOWN take a backward of their own.

        Args:
            losses: of the T tasks.
            weights: of the T tasks. A tensor (T,) is not read.
            row: where the joint gradient goes.
            seed: as in `per_task`.
            divides: whether the weights are such that they can be divided out. Where they are not
                (a tensor with zeros), the heads get a backward of their own, down to the heads.
        """
        present = [(i, loss) for i, loss in enumerate(losses) if loss is not None]
        self._seed = seed
        shares: Sequence[float | Tensor]
        if isinstance(weights, Tensor):
            small = [False] * len(losses)
            shares = weights.unbind()
        else:
            # Under a GradScaler activations are likely of 16 bits, whatever the parameters are.
            floor = self._floor if seed is None else SMALLEST_WEIGHT[torch.float16]
            small = [abs(a) < floor for a in weights]
            shares = weights
        apart = [i for i, _ in present if small[i] or not self.inspected[i]]
        joint = {i: loss for i, loss in present if i not in apart}
        add = not self._empty
        if joint:
            heads = [h for h, owner in enumerate(self.owners) if owner in joint]
            values = list(joint.values())
            own_pass: HeadGrads = {}
            if not divides and heads:
                ones = [1.0] * len(values)
                _, own_pass = self._backward(values, ones, heads, retain=True, shared=False)
            grads, head_grads = self._backward(
                values,
                [shares[i] for i in joint],
                heads if divides else [],
                retain=bool(apart) or retain or unbalanced is not None,
            )
            self._take(list(joint), grads, row=row, add=add)
            for h, own in head_grads.items():
                owner = self.owners[h]
                assert owner is not None
                self._take_head(h, own, 1 / shares[owner])
            for h, own in own_pass.items():
                self._take_head(h, own)
        elif not add:
            _write(self._views[row], [None] * len(self._shared), add=False)
        fresh: list[tuple[int, HeadGrads]] = []
        for i, loss in present:
            if i in apart:
                keep = retain or unbalanced is not None or i != apart[-1]
                fresh += self._one_task(i, loss, row=row, add=True, retain=keep, weight=shares[i])
        self._settle_owners(fresh)
        self._empty = False
        if unbalanced is not None:
            self.extra(unbalanced, row=row, seed=seed, retain=retain)

    @property
    def shared(self) -> list[Tensor]:
        return self._shared

    def take_over(self, old: TaskGradients) -> None:
        n = len(old.inspected)
        self.owners[: len(old.owners)] = [
            a if b is None else b for a, b in zip(old.owners, self.owners)
        ]
        self.inspected[:n] = old.inspected
        self.reaches[:n] = old.reaches
        self.reached = list(old.reached)
        self.backwards = old.backwards
        self._empty = old._empty
        self.present[:n] = old.present
        self.touched[:n] = old.touched
        self.filled[: len(old.filled)] = old.filled
        self.hits = list(old.hits)
        for new, rows in zip([*self.rows, *self.head_rows], [*old.rows, *old.head_rows]):
            new[: len(rows)].copy_(rows)

    def extra(self, loss, *, row, seed=None, retain=False) -> None:
        self._seed = seed
        heads = list(range(len(self._heads)))
        grads, head_grads = self._backward([loss], [1.0], heads, retain=retain)
        _write(self._views[row], grads, add=not self._empty and row == 0)
        self.hits = [a or b is not None for a, b in zip(self.hits, grads, strict=True)]
        for h, own in head_grads.items():
            self._take_head(h, own)

    def _one_task(
        self,
        i: int,
        loss: Tensor,
        *,
        row: int,
        add: bool,
        retain: bool,
        weight: float | Tensor = 1.0,
    ) -> list[tuple[int, HeadGrads]]:
        """One backward of task i. Gradients of heads whose owner is to be found or checked are
        returned; the others are taken."""
        seen = self.inspected[i]
        heads = [h for h, owner in enumerate(self.owners) if owner in (i, None) or not seen]
        grads, head_grads = self._backward([loss], [1.0], heads, retain=retain)
        self._take([i], grads, row=row, add=add, weight=weight)
        self.reaches[i] = any(grad is not None for grad in grads)
        return self._take_known(i, head_grads) if seen else [(i, head_grads)]

    def _take_known(self, i: int, head_grads: HeadGrads) -> list[tuple[int, HeadGrads]]:
        """Take task i's gradients on the heads known to be its own; the others are returned."""
        own = {h: head_grads.pop(h) for h in list(head_grads) if self.owners[h] == i}
        for h, grads in own.items():
            self._take_head(h, grads)
        if any(grad is not None for grads in own.values() for grad in grads):
            self.inspected[i] = USED
        elif own and self.inspected[i] == USED:
            # Another order of tasks or heads? The next backward looks at all of them.
            self.inspected[i] = UNKNOWN
        return [(i, head_grads)] if head_grads else []

    def _batched(
        self, some: Sequence[tuple[int, Tensor]], *, add: bool, retain: bool
    ) -> list[tuple[int, HeadGrads]]:
        """`_one_task` for several tasks in one batched backward."""
        tasks = [i for i, _ in some]
        heads = [
            h
            for h, owner in enumerate(self.owners)
            if owner is None or owner in tasks or not all(self.inspected[i] for i in tasks)
        ]
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
        for k, (i, loss) in enumerate(some):
            # Batched, a task that does not reach a parameter has zeros there: the graph tells.
            self.reaches[i] = reaches(loss, self._shared)
            mine = [_row(grad, k) if self.reaches[i] else None for grad in grads]
            self._take([i], mine, row=i, add=add)
            own: HeadGrads = {h: [_row(grad, k) for grad in head_grads[h]] for h in heads}
            fresh += self._take_known(i, own) if self.inspected[i] else [(i, own)]
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
    ) -> tuple[Sequence[Tensor | None], HeadGrads]:
        """The gradients of sum_i weights_i losses_i on the shared parameters (where `shared`) and
        on heads; None where no loss reaches.

        `batched`: of n such sums, weights being a tensor (n, *shape of the loss) for each loss;
        the gradients have a leading n.
        """
        trunk = self._shared if shared else []
        inputs = [*trunk, *(p for h in heads for p in self._heads[h])]
        grads = torch.autograd.grad(
            losses if batched else [graph_root(loss) for loss in losses],  # type: ignore[arg-type]
            inputs,
            [self._start(loss, a) for loss, a in zip(losses, weights, strict=True)],
            retain_graph=retain,
            allow_unused=True,
            is_grads_batched=batched,
        )
        self.backwards += 1
        for k, (p, grad) in enumerate(zip(inputs, grads, strict=True)):
            if grad is not None and grad.layout is not torch.strided:
                kind = f"shared parameter {k}" if k < len(trunk) else "a task parameter"
                raise RuntimeError(
                    f"{kind} (shape {tuple(p.shape)}) has a sparse gradient ({grad.layout}); "
                    "per-task gradients must be dense: build the embedding with sparse=False"
                )
        start = len(trunk)
        head_grads: HeadGrads = {}
        for h in heads:
            head_grads[h] = grads[start : start + len(self._heads[h])]
            start += len(self._heads[h])
        return grads[: len(trunk)], head_grads

    def _start(self, loss: Tensor, weight: float | Tensor) -> Tensor:
        """What the backward of a loss starts with: its weight times the seed, of its dtype."""
        if isinstance(weight, float):
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
        add: bool,
        weight: float | Tensor = 1.0,
    ) -> None:
        _write(self._views[row], grads, add=add, weight=weight)
        hits = [grad is not None for grad in grads]
        self.reached = [a or b for a, b in zip(self.reached, hits, strict=True)]
        self.hits = [a or b for a, b in zip(self.hits, hits, strict=True)]
        for i in tasks:
            self.present[i] = True
            self.touched[i] |= any(hits) and (self.reaches[i] or len(tasks) == 1)

    def _take_head(
        self, h: int, grads: Sequence[Tensor | None], factor: float | Tensor = 1.0
    ) -> None:
        """Take `factor` times a head's gradients; a head out of reach keeps none."""
        if all(grad is None for grad in grads):
            return
        _write(self.head_views[h], grads, add=self.filled[h], weight=factor)
        if not self.filled[h] and (isinstance(factor, Tensor) or factor != 1.0):
            self.head_rows[h].mul_(factor)
        self.filled[h] = True

    def _settle_owners(self, fresh: Sequence[tuple[int, HeadGrads]]) -> None:
        """Find or check the owner of every head in `fresh`, then take the gradients."""
        if not fresh:
            return
        sizes = self._sizes(fresh)
        # One that is not finite reaches every head of a joint graph, as 0 times infinity is NaN.
        finite = all(math.isfinite(size) for size in sizes.values())
        owners = list(self.owners)
        tasks = [i for i, _ in fresh]
        away = any(not known for i, known in enumerate(self.inspected) if i not in tasks)
        waiting: set[int] = set()
        for h, members in enumerate(self._heads if finite else []):
            reached = [i for i in tasks if (i, h) in sizes]
            moved = [i for i in reached if sizes[i, h] > 0]
            owner = owners[h]
            if owner is None:
                # Reached with zeros only (a stack of losses connects everything): wait and see.
                alone = len(reached) == 1 and not away
                owner = owners[h] = moved[0] if moved else reached[0] if alone else None
            if owner is None:
                waiting.update(reached)
                continue
            strangers = [i for i in moved if i != owner]
            if strangers:
                raise ValueError(
                    f"task-specific parameters must belong to one task each, but tasks "
                    f"{sorted({owner, *strangers})} have gradients on a head of shapes "
                    f"{[tuple(p.shape) for p in members]}; list what they share in "
                    "shared_parameters"
                )
        self.owners = owners
        for i, head_grads in fresh:
            if i in waiting:
                self.inspected[i] = UNKNOWN
            elif finite and len(head_grads) == len(self._heads):
                used = any(owners[h] == i and (i, h) in sizes for h in head_grads)
                self.inspected[i] = USED if used else UNUSED
            for h, own in head_grads.items():
                # What is not finite is taken from anyone: the step must not pass for a good one.
                lost = owners[h] is None and not math.isfinite(sizes.get((i, h), 0.0))
                if owners[h] == i or lost:
                    self._take_head(h, own)

    def _sizes(self, fresh: Sequence[tuple[int, HeadGrads]]) -> dict[tuple[int, int], float]:
        """How large the gradient of a task is on a head, for each head it reaches. Waits for the
        device, once; not at all where no head is reached.

        Raises:
            RuntimeError: while a CUDA graph is captured.
        """
        grads = [
            (i, h, grad)
            for i, head_grads in fresh
            for h, own in head_grads.items()
            for grad in own
            if grad is not None and grad.numel()
        ]
        if not grads:
            return {}
        if capturing(self.rows[0].device):
            tasks = sorted({i for i, _, _ in grads if not self.inspected[i]})
            heads = sorted({h for _, h, _ in grads if self.owners[h] is None})
            shapes = [tuple(p.shape) for h in heads for p in self._heads[h]]
            unknown = [f"which of them tasks {tasks} use"] if tasks else []
            unknown += [f"whose those of shapes {shapes} are"] if shapes else []
            raise RuntimeError(
                "it must be known whose the task-specific parameters are before a step is "
                "captured, as finding out waits for the device; not known yet: "
                f"{' and '.join(unknown)}. A step before it tells, if its gradients are finite and "
                "not all zero there"
            )
        norms = [torch.linalg.vector_norm(grad, math.inf).double() for _, _, grad in grads]
        sizes: dict[tuple[int, int], float] = {}
        read = torch.stack([norm.to(norms[0].device) for norm in norms]).tolist()
        for (i, h, _), size in zip(grads, read, strict=True):
            sizes[i, h] = sizes.get((i, h), 0.0) + size  # a sum keeps a NaN, max() may not
        return sizes


def graph_root(loss: Tensor) -> Tensor | GradientEdge:
    """Where the backward of `loss` starts: for an entry of `torch.stack(losses)`, at the scalar
    that was stacked. The stack itself would send zeros down every other task's graph."""
    unbind = loss.grad_fn
    if unbind is None or unbind.name() != "UnbindBackward0":
        return loss
    ((stack, _),) = unbind.next_functions
    if stack is None or stack.name() != "StackBackward0":
        return loss
    node, output = stack.next_functions[loss.output_nr]
    return loss if node is None else GradientEdge(node, output)


def _row(grad: Tensor | None, k: int) -> Tensor | None:
    return None if grad is None else grad[k]


#: An output of a node of the graph.
_Edge = tuple[Node, int]


def _edge(tensor: Tensor | GradientEdge) -> _Edge:
    edge = tensor if isinstance(tensor, GradientEdge) else get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _walk(losses: Sequence[Tensor], stop: Set[_Edge]) -> Iterator[_Edge]:
    """The edges of the graph behind the losses; it is not followed through `stop`."""
    waiting = [_edge(graph_root(loss)) for loss in losses]
    seen = {node for node, _ in waiting}
    yield from waiting
    while waiting:
        node, output = waiting.pop()
        if (node, output) in stop:
            continue
        for behind, nr in node.next_functions:
            if behind is None:
                continue
            edge = (behind, nr)
            yield edge
            if edge not in stop and behind not in seen:
                seen.add(behind)
                waiting.append(edge)


def graph_nodes(losses: Sequence[Tensor], beyond: Sequence[Tensor]) -> set[Node]:
    """The nodes that the losses are computed by, up to the tensors `beyond` of the graph."""
    stop = {_edge(x) for x in beyond}
    return {edge[0] for edge in _walk(losses, stop) if edge not in stop}


def reaches(loss: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether the graph of a loss leads to any of the tensors."""
    stop = {_edge(x) for x in inputs}
    return any(edge in stop for edge in _walk([loss], stop))


def leaves(losses: Sequence[Tensor], beyond: Sequence[Tensor]) -> list[Parameter]:
    """The `torch.nn.Parameter`s that the losses are computed from, in the graph's order, up to
    the tensors `beyond` of the graph."""
    return [leaf for leaf in graph_leaves(losses, beyond) if isinstance(leaf, Parameter)]


def graph_leaves(losses: Sequence[Tensor], beyond: Sequence[Tensor]) -> list[Tensor]:
    """The same of all leaf tensors."""
    stop = {_edge(x) for x in beyond}
    return [
        node.variable
        for node, nr in dict.fromkeys(_walk(losses, stop))
        if (node, nr) not in stop and hasattr(node, "variable")
    ]


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

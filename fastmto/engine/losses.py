"""The losses of a step: T scalars, in whichever container they come."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

Losses = Tensor | Sequence[Tensor | None] | Mapping[str, Tensor | None]


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
    named = False
    values: list[Tensor | None]
    if isinstance(losses, list | tuple):
        values = list(losses)
    elif isinstance(losses, Tensor):
        if losses.dim() != 1:
            raise ValueError(
                "losses must be a tensor of shape (T,), a sequence or a dict, got a tensor of "
                f"shape {tuple(losses.shape)}"
            )
        values = list(losses.unbind())
    elif isinstance(losses, Mapping):
        named = True
        if names is None:
            names = list(losses)
            if n_tasks is not None and len(names) != n_tasks:
                raise ValueError(f"losses must name {n_tasks} tasks, got {names}")
        unknown = [name for name in losses if name not in names]
        if unknown:
            raise ValueError(f"losses must name tasks of {list(names)}, got also {unknown}")
        values = [losses.get(name) for name in names]
    elif isinstance(losses, Sequence):
        values = list(losses)
    else:
        raise ValueError(
            f"losses must be a tensor (T,), a sequence or a dict, got {type(losses).__name__}"
        )
    if n_tasks is not None and len(values) != n_tasks:
        raise ValueError(f"losses must hold {n_tasks} tasks, got {len(values)}")
    absent = 0
    for i, loss in enumerate(values):
        if loss is None:
            absent += 1
            continue
        what = what_is_wrong(loss, attached)
        if what is not None:
            raise ValueError(f"losses[{(names[i] if named and names else i)!r}] {what}")
    if absent == len(values):
        raise ValueError(f"losses must hold at least one task, got none of {len(values)}")
    return values, names if names is None or isinstance(names, list) else list(names)


def what_is_wrong(loss: object, attached: bool) -> str | None:
    """Why a loss cannot be used, as the end of a message; None if it can."""
    if not isinstance(loss, Tensor):
        return f"must be a scalar tensor, got {type(loss).__name__}"
    if loss.numel() != 1:
        return f"must be a scalar, got shape {tuple(loss.shape)}"
    if not loss.is_floating_point():
        return f"must be of a real floating dtype, got {loss.dtype}"
    if attached and not loss.requires_grad:
        return (
            "is not attached to a graph: nothing it was computed from requires grad; a task that "
            "is absent from this batch is None"
        )
    return None


def first_nonfinite(losses: Sequence[Tensor | None]) -> int | None:
    """Index of the first NaN or infinite loss, None if there is none. Synchronizes with the
    device."""
    for i, loss in enumerate(losses):
        if loss is not None and not math.isfinite(loss.item()):
            return i
    return None

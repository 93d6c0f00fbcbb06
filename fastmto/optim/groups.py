"""From what a caller passes as parameters to torch param groups, checked."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..checks import check_initialized
from ..engine.flat import is_dense

Parameters = Iterable[Parameter] | Iterable[Mapping[str, Any]]
TaskParameters = Iterable[Parameters] | Mapping[str, Parameters] | Parameters


def check_lr(lr: float, weight_decay: float) -> None:
    """Raise ValueError unless both are finite and at least 0."""
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not 0.0 <= float(value) < math.inf:
            raise ValueError(f"{name} must be finite and >= 0, got {value!r}")


def check_parameter(label: str, p: object) -> Parameter:
    """`p`, if an optimizer here can hold it.

    Raises:
        ValueError: naming `label` and what is wrong with it.
    """
    if not isinstance(p, Tensor):
        raise ValueError(f"{label} must be a parameter, got {type(p).__name__}")
    check_initialized(label, p)
    shape = tuple(p.shape)
    if not p.is_floating_point():
        raise ValueError(f"{label} (shape {shape}) must be of a real floating dtype, got {p.dtype}")
    # A frozen Parameter may be listed: it is unchanged until it requires grad.
    if not p.is_leaf or not (p.requires_grad or isinstance(p, Parameter)):
        raise ValueError(
            f"{label} (shape {shape}) must be a Parameter or a leaf that requires grad"
        )
    if p.layout is not torch.strided or not is_dense(p):
        raise ValueError(
            f"{label} (shape {shape}) must fill its memory without gaps or overlaps, got "
            f"{p.layout} with strides {p.stride() if p.layout is torch.strided else None}"
        )
    return p  # type: ignore[return-value]


def param_groups(
    shared: Parameters, tasks: TaskParameters
) -> tuple[list[dict[str, Any]], int | None, list[str] | None]:
    """torch param groups with the key "task" ("shared", a task's number, or None for a head
    whose task is not known yet), the number of tasks and their names where they are given."""
    groups = groups_of("shared_parameters", shared, "shared")
    if not any(group["params"] for group in groups):
        raise ValueError("shared_parameters must hold at least one parameter, got none")
    names: list[str] | None = None
    n_tasks: int | None = None
    if isinstance(tasks, Mapping) and "params" not in tasks:
        names = list(tasks)
        entries: list[Any] = list(tasks.values())
    else:
        entries = [tasks] if isinstance(tasks, Mapping) else _listed("task_parameters", tasks)
    if names is None and all(isinstance(e, Tensor | Mapping) for e in entries):
        groups += groups_of("task_parameters", entries, None) if entries else []
    else:
        n_tasks = len(entries)
        for i, entry in enumerate(entries):
            label = f"task_parameters[{names[i]!r}]" if names else f"task_parameters[{i}]"
            groups += groups_of(label, entry, i)
    check_distinct(groups)
    return groups, n_tasks, names


def more_heads(
    given: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    n_tasks: int | None,
    names: list[str] | None,
) -> tuple[dict[str, Any], int | None, list[str] | None]:
    """A param group of task-specific parameters to be added, checked; T and the names with it.

    Raises:
        ValueError: no such task, or a parameter that cannot be added.
        RuntimeError: the group is of shared parameters.
    """
    task = given.get("task")
    if task == "shared" or "task" not in given:
        raise RuntimeError(
            "add_param_group takes task-specific parameters, with the key 'task': the buffers of "
            "shared parameters are laid out at construction; build a new optimizer with all of "
            f"them; got {sorted(given)}"
        )
    if isinstance(task, str):
        if names is None:
            raise ValueError(f"task must be a number where tasks have no names, got {task!r}")
        names = names if task in names else [*names, task]
        task = names.index(task)
        most = task
    else:
        most = -1 if n_tasks is None else n_tasks - (names is not None)
    if type(task) is not int or not 0 <= task <= most:
        allowed = "a number from 0 to T" if names is None else f"one of {names} or a new name"
        raise ValueError(f"task must be {allowed}, with T = {n_tasks}, got {given['task']!r}")
    entry = {k: v for k, v in given.items() if k != "task"}
    (group,) = groups_of("param_group", entry, task)
    check_distinct([*groups, group])
    return group, None if n_tasks is None else max(n_tasks, task + 1), names


def _listed(label: str, values: Any) -> list[Any]:
    if isinstance(values, Tensor) or not isinstance(values, Iterable):
        raise ValueError(f"{label} must be an iterable, got {type(values).__name__}")
    return list(values)


def groups_of(label: str, entries: Any, task: int | str | None) -> list[dict[str, Any]]:
    """Param groups of parameters, or of dicts with "params" and their own hyperparameters."""
    entries = [entries] if isinstance(entries, Mapping) else _listed(label, entries)
    if entries and all(isinstance(e, Mapping) for e in entries):
        groups = [dict(entry) for entry in entries]
    else:
        groups = [{"params": entries}]
    for g, group in enumerate(groups):
        where = label if len(groups) == 1 else f"{label}[{g}]"
        if "params" not in group:
            raise ValueError(f"{where} must have the key 'params', got {sorted(group)}")
        members = group["params"]
        members = [members] if isinstance(members, Tensor) else _listed(where, members)
        group["params"] = [check_parameter(f"{where}[{k}]", p) for k, p in enumerate(members)]
        check_lr(group.get("lr", 0.0), group.get("weight_decay", 0.0))
        group["task"] = task
    return groups


def check_distinct(groups: Sequence[Mapping[str, Any]]) -> None:
    """No parameter twice, no two sharing memory, all on one device."""
    seen: dict[int, str] = {}
    spans = []
    first: Parameter | None = None
    for group in groups:
        kind = "shared_parameters" if group["task"] == "shared" else "task_parameters"
        for p in group["params"]:
            label = f"{kind} (shape {tuple(p.shape)})"
            if id(p) in seen:
                raise ValueError(f"every parameter must be listed once, got one twice: {label} "
                                 f"and {seen[id(p)]}")  # fmt: skip
            seen[id(p)] = label
            first = p if first is None else first
            if p.device != first.device:
                raise ValueError(
                    f"all parameters must be on one device, got {first.device} and {p.device}"
                )
            if p.numel():
                spans.append((p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), label))
    spans.sort()
    for (_, end, label), (start, _, other) in itertools.pairwise(spans):
        if start < end:
            raise ValueError(f"parameters must not share memory, but {label} and {other} do")

"""Checkpoints of the update-level optimizers: what is saved, and how it is checked and loaded."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..ops.device import upload

if TYPE_CHECKING:
    from .update_balancer import UpdateBalancer

#: Of the state under the key "fastmto".
VERSION = 2


def save(optimizer: UpdateBalancer) -> dict[str, Any]:
    """What belongs under the key "fastmto" of a `state_dict`."""
    search, level = optimizer._search, optimizer._level
    weighting, gradients = search.weighting, level.gradients
    known = gradients is not None
    return {
        "version": VERSION,
        "steps": optimizer._phase(),
        "found": known and search.has_found(),
        "searched": sorted(search.searched),
        "names": optimizer._known["names"],
        "weights": optimizer.weights,
        "gram": optimizer.gram,
        "stats": optimizer.stats,
        "weighting": None if weighting is None else weighting.state_dict(),
        "counts": level.clock.counts.tolist() if known else None,
        "owners": list(gradients.ownership.owners) if gradients is not None else None,
        "inspected": list(gradients.ownership.inspected) if gradients is not None else None,
        "reaches": list(gradients.ownership.reaches) if gradients is not None else None,
        "reached": list(gradients.ever_reached) if gradients is not None else None,
    }


def load(optimizer: UpdateBalancer, state_dict: dict[str, Any]) -> None:
    """Continue from a `state_dict`.

    Raises:
        ValueError: a state of another optimizer, number of tasks or shape of parameters; nothing
            has been changed then.
    """
    saved = state_dict.get("fastmto")
    if saved is None:
        raise ValueError(
            "state_dict must come from a fastmto optimizer: it has no key 'fastmto', only "
            f"{sorted(state_dict)}"
        )
    if saved.get("version") != VERSION:
        raise ValueError(f"state_dict must be of version {VERSION}, got {saved.get('version')!r}")
    n_tasks = None if saved["weights"] is None else len(saved["weights"])
    if None not in (n_tasks, optimizer.n_tasks) and n_tasks != optimizer.n_tasks:
        raise ValueError(
            f"state_dict must be of {optimizer.n_tasks} tasks, got one of {n_tasks} tasks"
        )
    own_names = optimizer._known["names"]
    if None not in (own_names, saved["names"]) and own_names != saved["names"]:
        raise ValueError(f"state_dict must be of {own_names}, got one of {saved['names']}")
    entries = _match(optimizer, state_dict, n_tasks)
    search, level = optimizer._search, optimizer._level
    if search.weighting is not None:
        # Into a copy first: what it refuses, it refuses before anything has changed.
        copy.deepcopy(search.weighting).load_state_dict(saved["weighting"] or {})
        search.weighting.load_state_dict(saved["weighting"] or {})
    _load_groups(optimizer, state_dict["param_groups"])
    optimizer._pending.clear()
    optimizer._known["names"] = own_names or saved["names"]
    optimizer._known["first"] = saved["steps"]
    if n_tasks is None:  # from before the first step
        search.forget()
        level.forget()
        for moments in optimizer.state.values():
            moments.clear()
        optimizer._counted.update(dict.fromkeys(optimizer._counted, 0))
        return
    gradients = level.gradients or optimizer._set_tasks(n_tasks)
    gradients.clear()
    gradients.ownership.owners = list(saved["owners"])
    gradients.ownership.inspected = list(saved["inspected"])
    gradients.ownership.reaches = list(saved["reaches"])
    gradients.ever_reached = list(saved["reached"])
    optimizer._bind_state()
    for p, moments in entries:
        for name, value in moments.items():
            optimizer.state[p][name].copy_(value)
    upload(level.clock.counts, saved["counts"])
    level.clock.tally.zero_()
    # A map_location moves every tensor of a file.
    search.weights = saved["weights"].to("cpu", copy=True)
    search.steps = saved["steps"]
    search.found = saved["found"]
    # Fastmto 0.1.0 did not save it.
    search.searched = set(saved.get("searched", range(n_tasks) if saved["found"] else ()))
    search.forget_counts()
    search.gram = None if saved["gram"] is None else saved["gram"].to("cpu", copy=True)
    optimizer._counted.update(saved["stats"])


def _load_groups(optimizer: UpdateBalancer, groups: Sequence[dict[str, Any]]) -> None:
    """Take over the hyperparameters, into the dicts and tensors that are there: the level and
    wrappers hold the dicts, and CUDA graphs read the tensors of learning rates."""
    kept: set[int] = set()
    for group, loaded in zip(optimizer.param_groups, groups, strict=True):
        rate, new = group["lr"], loaded["lr"]
        values = {k: v for k, v in loaded.items() if k not in ("params", "lr")}
        group.update(copy.deepcopy(values))
        if not isinstance(rate, Tensor):
            group["lr"] = copy.deepcopy(new)
            continue
        value = torch.as_tensor(new, dtype=rate.dtype, device=rate.device).detach()
        if id(rate) in kept and not torch.equal(rate.detach().view(()), value.view(())):
            group["lr"] = value.clone()  # one tensor for several groups, whose rates differ
            continue
        kept.add(id(rate))
        rate.detach().copy_(value.view_as(rate))


def _match(
    optimizer: UpdateBalancer, state_dict: dict[str, Any], n_tasks: int | None
) -> list[tuple[Parameter, dict[str, Any]]]:
    """The saved state of every parameter, its names and shapes checked."""
    groups, own = state_dict["param_groups"], optimizer.param_groups
    sizes = [len(g["params"]) for g in groups], [len(g["params"]) for g in own]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"state_dict must have param groups of {sizes[1]} parameters, got {sizes[0]}"
        )
    tasks = [g["task"] for g in groups], [g["task"] for g in own]
    if tasks[0] != tasks[1]:
        raise ValueError(f"state_dict must have groups of tasks {tasks[1]}, got {tasks[0]}")
    entries = []
    for saved, group in zip(groups, own, strict=True):
        rule = optimizer._rules(group)
        names = optimizer._rules({**group, **saved}).state_names
        if names != rule.state_names:
            raise ValueError(f"state_dict must hold the moments {rule.state_names}, got {names}")
        stacked = optimizer._settings["adatask"] and group["task"] == "shared"
        for key, p in zip(saved["params"], group["params"], strict=True):
            moments = state_dict["state"].get(key, {})
            shape = (n_tasks, *p.shape) if stacked else tuple(p.shape)
            got = {k: tuple(v.shape) for k, v in moments.items()}
            expected = dict.fromkeys(rule.state_names, shape)
            if (moments or n_tasks is not None) and got != expected:
                raise ValueError(f"state_dict must hold {expected} for parameter {key}, got {got}")
            entries.append((p, moments))
    return entries


def unpickled(saved: dict[str, Any]) -> dict[str, Any]:
    """torch's part of a pickled optimizer."""
    return {
        "state": defaultdict(dict),
        "param_groups": saved["param_groups"],
        "defaults": saved["defaults"],
    }

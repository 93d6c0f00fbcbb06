"""What a call lists, held against the graph: which parameters, whose heads, what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import Parameter

from ..checks import check_initialized
from ..errors import warn
from .batch import Batch, as_tensors
from .graph import graph_nodes, leaves, reaches

#: A task-specific parameter with its task, None where that is to be found.
Head = tuple[int | None, Tensor]


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
            f"one per task, got {len(listed)} entries"
        )
    # A parameter each, so that one which its task did not reach keeps no gradient.
    heads: list[Head] = []
    for i, entry in enumerate(listed):
        for p in [entry] if isinstance(entry, Tensor) else entry:
            if not isinstance(p, Tensor):
                as_tensors(f"task_specific_parameters[{i}]", [p])  # raises
            if p.requires_grad:
                heads.append((i, p))
    return heads


def trainable(name: str, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that gradients can be taken of; frozen parameters are left out.

    Raises:
        ValueError: none is left, a tensor inside the graph that requires no grad, tensors of other
            dtypes than real floating ones or on several devices.
    """
    kept = [x for x in inputs if x.requires_grad or not isinstance(x, Parameter)]
    if not kept:
        raise ValueError(
            f"{name} must hold at least one tensor that requires grad, got {len(inputs)} frozen "
            "parameters"
        )
    for k, tensor in enumerate(inputs):
        check_initialized(f"{name}[{k}]", tensor)
        if not tensor.requires_grad and not isinstance(tensor, Parameter):
            raise ValueError(f"{name}[{k}] (shape {tuple(tensor.shape)}) requires no grad")
        if not tensor.is_floating_point() or tensor.device != inputs[0].device:
            raise ValueError(
                f"{name} must be of real floating dtypes on one device, got {tensor.dtype} on "
                f"{tensor.device} beside {inputs[0].device}"
            )
    return kept


def survey(
    present: Sequence[Tensor],
    inputs: Sequence[Tensor],
    listed: Sequence[Tensor],
    *,
    heads_name: str = "task_specific_parameters",
    trunk: Sequence[Tensor] | None = None,
) -> None:
    """Look at the graph once, when buffers are made, for what would go wrong in silence.

    Args:
        present: the losses of the tasks that take part.
        inputs: what gradients are compared at: shared parameters, or features.
        listed: every parameter that is listed anywhere, `inputs` included.
        heads_name: of the argument with task-specific parameters, for messages.
        trunk: at the features, the shared parameters behind them, as far as they are given.

    Raises:
        ValueError: a parameter listed twice; features that are cut off from the shared parameters,
            lie behind one another, or that a loss goes round on its way to these.
        RuntimeError: a reentrant checkpoint, which hides parameters from `torch.autograd.grad`.
    """
    seen: set[int] = set()
    for p in listed:
        if id(p) in seen:
            raise ValueError(
                f"a parameter must be listed once, in shared_parameters or in "
                f"{heads_name}; one of shape {tuple(p.shape)} is there twice"
            )
        seen.add(id(p))
    if trunk is not None:
        _survey_features(inputs, trunk)
    reached = leaves(present, inputs)
    rounds = [p for p in reached if any(p is q for q in trunk or ())]
    if rounds:
        raise ValueError(
            "features must be all that the losses see of the shared parameters; one of shape "
            f"{tuple(rounds[0].shape)} is reached without passing through them"
        )
    unlisted = [tuple(p.shape) for p in reached if id(p) not in seen]
    if unlisted:
        warn(
            f"the losses reach {len(unlisted)} parameters that are neither in shared_parameters "
            f"nor in {heads_name} and get no gradient; shapes {unlisted[:5]}"
        )
    if any("CheckpointFunctionBackward" in n.name() for n in graph_nodes(present, inputs)):
        raise RuntimeError(
            "a reentrant checkpoint hides parameters from the balancer: call "
            "torch.utils.checkpoint.checkpoint with use_reentrant=False"
        )
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1:
        warn(
            "gradients are not reduced between processes: every rank weighs its own tasks, and "
            "the ranks' parameters drift apart"
        )


def _survey_features(features: Sequence[Tensor], trunk: Sequence[Tensor]) -> None:
    """Features must lie in front of the shared parameters, and none behind another."""
    for k, z in enumerate(features):
        others = [x for x in features if x is not z]
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

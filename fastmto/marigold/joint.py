"""The gradient of one backward, apart from what `.grad` already held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .perturb import norm


@dataclass
class Joint:
    """d = sum_i w_i grad f_i on the shared parameters.

    Attributes:
        direction: one entry a shared parameter; None where no loss reaches it. They may be the
            parameters' `.grad` themselves: to be read before anyone else can change them. Without
            the seed.
        length: ||d||.
    """

    direction: list[Tensor | None]
    length: float


def backward(
    losses: Sequence[Tensor],
    weights: Tensor,
    seed: Tensor | None = None,
    *,
    retain: bool = False,
) -> None:
    """One backward of the weighted losses; adds to `.grad` of everything they reach.

    Args:
        losses: n scalars attached to their graphs.
        weights: (n,) on their device.
        seed: a scalar that all gradients are multiplied by, on the way.
        retain: keep the graph.
    """
    if seed is not None:
        weights = weights * seed
    torch.autograd.backward(
        losses,
        [
            weight
            if weight.dtype == loss.dtype and not loss.dim()
            else weight.to(loss.dtype).expand_as(loss)
            for weight, loss in zip(weights.unbind(), losses, strict=True)
        ],
        retain_graph=retain,
    )


def joint_backward(
    losses: Sequence[Tensor],
    weights: Tensor,
    shared: Sequence[Tensor],
    seed: Tensor | None = None,
    *,
    retain: bool = False,
) -> Joint:
    """`backward`, and the gradient that it alone added to the shared parameters.

    Where `.grad` was None nothing is copied; otherwise the gradient is added to the tensor that
    was there, as autograd does. If the backward raises, `.grad` of the shared parameters is as
    before.

    Raises:
        RuntimeError: no loss reaches the shared parameters, or a gradient is sparse.
    """
    old = [p.grad for p in shared]
    for p in shared:
        p.grad = None
    direction: list[Tensor | None] = []
    try:
        backward(losses, weights, seed, retain=retain)
        direction = [p.grad for p in shared]
        for k, (p, g) in enumerate(zip(shared, direction, strict=True)):
            if g is not None and g.layout is not torch.strided:
                direction = []
                raise RuntimeError(
                    f"shared_parameters[{k}] (shape {tuple(p.shape)}) has a sparse gradient "
                    f"({g.layout}); a direction must be dense: build the embedding with "
                    "sparse=False"
                )
    finally:
        _put_back(shared, old, direction)
    reached = [g for g in direction if g is not None]
    if not reached:
        raise RuntimeError(
            "no loss reaches shared_parameters: they are not what the model computes with"
        )
    if seed is not None:
        direction = [None if g is None else g / seed for g in direction]
    return Joint(direction, norm([g for g in direction if g is not None]))


@torch.no_grad()
def _put_back(
    shared: Sequence[Tensor], old: Sequence[Tensor | None], new: Sequence[Tensor | None]
) -> None:
    """`.grad` = old + new, in the old tensors where there are some; new is empty on failure."""
    held, added = [], []
    for k, (p, before) in enumerate(zip(shared, old, strict=True)):
        fresh = new[k] if new else None
        if before is None:
            p.grad = fresh
            continue
        if fresh is not None:
            held.append(before)
            added.append(fresh)
        p.grad = before
    if held:
        torch._foreach_add_(held, added)

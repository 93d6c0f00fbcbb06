"""Gradient clipping inside the update level: of the joint gradient, and task by task."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..checks import check_number
from .update_level import Passes, UpdateLevel


class Clipping:
    """Bounds of gradients' lengths, before any update is formed of them.

    With h_i the gradients of task i's own parameters and w the weights before this step's search:

        g_i, h_i <- f_i g_i, f_i h_i   f_i = min(1, clip_task_norm / sqrt(|g_i|^2 + |h_i|^2))
        g_i, h_i <- f g_i, f h_i       f   = min(1, clip_norm / sqrt(|sum_i w_i g_i|^2
                                                                     + sum_i |h_i|^2))

    The second norm is the one that `torch.nn.utils.clip_grad_norm_` takes of the joint gradient in
    training with one loss; an unbalanced loss has the weight 1 in it. Norms are sums in float64;
    nothing is read from a GPU.

    Args:
        clip_norm: largest norm of the joint gradient, > 0; None: not clipped.
        clip_task_norm: largest norm of a task's gradient, likewise.

    Raises:
        ValueError: a bound out of range.
    """

    def __init__(self, clip_norm: float | None, clip_task_norm: float | None) -> None:
        for name, value in (("clip_norm", clip_norm), ("clip_task_norm", clip_task_norm)):
            if value is not None:
                check_number(name, value, 0, open_low=True)
        self.clip_norm = clip_norm
        self.clip_task_norm = clip_task_norm

    def clip(self, level: UpdateLevel, passes: Passes, weights: Tensor, n_tasks: int) -> None:
        """Scale the rows of gradients in place.

        Args:
            weights: (rows,) of the joint gradient.
            n_tasks: T; rows beyond are of an unbalanced loss, which is no task.
        """
        if self.clip_task_norm is not None:
            squares = _gram(level, passes).diagonal()[:n_tasks].clone()
            owners = _owners(level, passes)
            for owner, square in zip(owners, _head_squares(passes), strict=True):
                if owner is not None:
                    squares[owner] += square
            factors = (self.clip_task_norm / squares.sqrt()).clamp(max=1.0)
            for run in passes.shared:
                grads = run.grads[:n_tasks]
                grads.mul_(factors.to(grads.dtype)[:, None])
            for owner, run in zip(owners, passes.heads, strict=True):
                if owner is not None:
                    run.grads.mul_(factors[owner].to(run.grads.dtype))
        if self.clip_norm is not None:
            square = (weights[:, None] * _gram(level, passes) * weights).sum().clamp(min=0.0)
            square = sum(_head_squares(passes), square)
            factor = (self.clip_norm / square.sqrt()).clamp(max=1.0)
            for run in passes.shared:
                run.grads[: passes.rows].mul_(factor.to(run.grads.dtype))
            for run in passes.heads:
                run.grads.mul_(factor.to(run.grads.dtype))


def _gram(level: UpdateLevel, passes: Passes) -> Tensor:
    """Gram matrix (rows, rows) of the rows of gradients, float64."""
    total = torch.zeros(passes.rows, passes.rows, dtype=torch.float64, device=level.device)
    for run in passes.shared:
        gram = torch.empty_like(total)
        ops.gram(run.grads[: passes.rows], gram)
        total += gram
    return total


def _head_squares(passes: Passes) -> list[Tensor]:
    """The squared norm of every head's gradient, float64."""
    return [
        torch.linalg.vector_norm(run.grads, dtype=torch.float64).square() for run in passes.heads
    ]


def _owners(level: UpdateLevel, passes: Passes) -> list[int | None]:
    """The task of every head run."""
    assert level.gradients is not None
    owners = {id(s): o for s, o in zip(level.heads, level.gradients.ownership.owners, strict=True)}
    return [owners[id(run.store)] for run in passes.heads]

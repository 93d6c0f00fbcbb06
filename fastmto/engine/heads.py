"""Whose the task-specific parameters are: what was given, or what the gradients showed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.device import capturing

#: What is known of a task's heads: nothing until its gradients on all heads were looked at, then
#: whether its last own backward reached any of its own.
UNKNOWN, UNUSED, USED = range(3)

#: Gradients of one backward on heads: number of the head -> one entry per parameter.
HeadGrads = dict[int, Sequence[Tensor | None]]


class Ownership:
    """The owner of every head, and what is known of every task.

    Owners that were not given are found at the first own backward of a task that moves the head;
    until then a head is left alone. Given owners are checked at the tasks' first backward. Neither
    happens by gradients that are not finite.

    Args:
        owners: the task of each head, None if it is to be found.
        shapes: of the parameters of each head, for messages.
        n_tasks: T.

    Attributes:
        owners: the task each head belongs to, as far as is known.
        inspected: UNKNOWN, UNUSED or USED per task. A task that is UNKNOWN takes a backward of its
            own, which synchronizes with the device.
        reaches: per task, whether its last own backward reached the shared parameters.
    """

    def __init__(
        self, owners: Sequence[int | None], shapes: Sequence[Sequence[torch.Size]], n_tasks: int
    ) -> None:
        self.owners = list(owners)
        self.inspected = [UNKNOWN] * n_tasks
        self.reaches = [True] * n_tasks
        self._shapes = [[tuple(shape) for shape in head] for head in shapes]

    def state(self) -> dict[str, list[Any]]:
        """What is known, for a `state_dict`."""
        return {
            "owners": list(self.owners),
            "inspected": list(self.inspected),
            "reaches": list(self.reaches),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over a `state` of as many heads and tasks, or of the first of them."""
        for name in ("owners", "inspected", "reaches"):
            own, known = getattr(self, name), state[name]
            own[: len(known)] = known

    def of(self, tasks: Sequence[int]) -> list[int]:
        """The heads that a backward of these tasks looks at: their own, those without an owner,
        and all of them while one of the tasks is UNKNOWN."""
        everything = not all(self.inspected[i] for i in tasks)
        return [h for h, i in enumerate(self.owners) if everything or i is None or i in tasks]

    def note(self, task: int, own: HeadGrads) -> None:
        """Remember whether a task that is not UNKNOWN reached its own heads."""
        if any(grad is not None for grads in own.values() for grad in grads):
            self.inspected[task] = USED
        elif own and self.inspected[task] == USED:
            # Another order of tasks or heads? The next backward looks at all of them.
            self.inspected[task] = UNKNOWN

    def settle(
        self, fresh: Sequence[tuple[int, HeadGrads]], device: torch.device
    ) -> list[tuple[int, Sequence[Tensor | None]]]:
        """Find or check the owner of every head in `fresh`.

        Args:
            fresh: tasks with their gradients on heads.
            device: of the shared parameters.

        Returns:
            Heads with the gradients that they are to take.

        Raises:
            ValueError: several tasks have gradients on a head; nothing has changed.
            RuntimeError: while a CUDA graph is captured.
        """
        if not fresh:
            return []
        sizes = self._sizes(fresh, device)
        # One that is not finite reaches every head of a joint graph, as 0 times infinity is NaN.
        finite = all(math.isfinite(size) for size in sizes.values())
        owners = list(self.owners)
        tasks = [i for i, _ in fresh]
        away = any(not known for i, known in enumerate(self.inspected) if i not in tasks)
        waiting: set[int] = set()
        for h in range(len(owners) if finite else 0):
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
                    f"{self._shapes[h]}; list what they share in shared_parameters"
                )
        self.owners = owners
        taken = []
        for i, head_grads in fresh:
            if i in waiting:
                self.inspected[i] = UNKNOWN
            elif finite and len(head_grads) == len(owners):
                used = any(owners[h] == i and (i, h) in sizes for h in head_grads)
                self.inspected[i] = USED if used else UNUSED
            for h, own in head_grads.items():
                # What is not finite is taken from anyone: the step must not pass for a good one.
                lost = owners[h] is None and not math.isfinite(sizes.get((i, h), 0.0))
                if owners[h] == i or lost:
                    taken.append((h, own))
        return taken

    def _sizes(
        self, fresh: Sequence[tuple[int, HeadGrads]], device: torch.device
    ) -> dict[tuple[int, int], float]:
        """How large the gradient of a task is on a head, for each head it reaches. Synchronizes
        with the device once; not at all if no head is reached."""
        grads = [
            (i, h, grad)
            for i, head_grads in fresh
            for h, own in head_grads.items()
            for grad in own
            if grad is not None and grad.numel()
        ]
        if not grads:
            return {}
        if capturing(device):
            tasks = sorted({i for i, _, _ in grads if not self.inspected[i]})
            heads = sorted({h for _, h, _ in grads if self.owners[h] is None})
            shapes = [shape for h in heads for shape in self._shapes[h]]
            unknown = [f"which of them tasks {tasks} use"] if tasks else []
            unknown += [f"whose those of shapes {shapes} are"] if shapes else []
            raise RuntimeError(
                "it must be known whose the task-specific parameters are before a step is "
                "captured, as finding out synchronizes with the device; not known yet: "
                f"{' and '.join(unknown)}. A step before it tells, if its gradients are finite and "
                "not all zero on them"
            )
        norms = [torch.linalg.vector_norm(grad, math.inf).double() for _, _, grad in grads]
        sizes: dict[tuple[int, int], float] = {}
        read = torch.stack([norm.to(norms[0].device) for norm in norms]).tolist()
        for (i, h, _), size in zip(grads, read, strict=True):
            sizes[i, h] = sizes.get((i, h), 0.0) + size  # a sum keeps a NaN, max() may not
        return sizes

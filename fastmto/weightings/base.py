"""The interface of weightings that know the tasks they are called for, or keep state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor


class Weighting(ABC):
    """A callable Gram -> weights.

    Subclasses define `__call__`, and `state_dict`, `load_state_dict` and `reset` if they keep
    anything from one call to the next that later weights depend on.
    """

    @abstractmethod
    def __call__(self, gram: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """Weights of the tasks of this Gram matrix.

        Args:
            gram: (T, T) float64 on the CPU, inner products of the tasks' updates or gradients;
                not modified.
            tasks: which tasks the rows are, as T increasing indices; None for 0..T-1. A task that
                is absent from a batch is left out of the Gram matrix.

        Returns:
            (T,) float64 on the CPU, new memory.

        Raises:
            SolverError: there are no weights for this Gram matrix.
        """

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to continue exactly from here."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, got {sorted(state)}")

    def reset(self) -> None:
        """Forget everything, as before the first call."""
        return None


def check_tasks(gram: Tensor, tasks: Sequence[int] | None) -> list[int]:
    """`tasks` with its default, checked against the Gram matrix."""
    indices = list(range(len(gram))) if tasks is None else [int(i) for i in tasks]
    if len(indices) != len(gram) or len(set(indices)) != len(indices):
        raise ValueError(
            f"tasks must hold {len(gram)} different indices, one a row of gram, got {indices}"
        )
    return indices

"""The interface of the weightings, and what those that call a solver share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..errors import SolverError
from ..solvers import STATUSES, Result

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Above it, weights found from a Gram matrix of float32 numbers are noise: cosines have an error of
#: about 1e-8, and weights are off by kappa times that.
KAPPA_LIMIT_FLOAT32 = 1e7

#: gram (n, n), weights (n,), info (4,), tasks or None; see `DecidesOnHost.device_solver`.
DeviceSolver: TypeAlias = Callable[[Tensor, Tensor, Tensor, "Sequence[int] | None"], None]


class DecidesOnHost:
    """Base of what finds weights on the host, and on a device if its class says how.

    `device_solver` says how the `STEPS` of its own class are done on a device. A subclass that
    overrides one of these and not `device_solver` does something else, so it gets the one of this
    class: it decides on the host.
    """

    #: The methods that a device solver stands for.
    STEPS: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for base in cls.__mro__:
            if "device_solver" in vars(base):
                return
            if not cls.STEPS.isdisjoint(vars(base)):
                cls.device_solver = DecidesOnHost.device_solver  # type: ignore[method-assign]
                return

    def device_solver(self, n_tasks: int) -> DeviceSolver | None:
        """What finds the weights on the device of the Gram matrix, without synchronizing.

        Args:
            n_tasks: T, the most tasks that it will be called with.

        Returns:
            None where the weights need the host. Else a function of

                gram (n, n)   float64, contiguous; not modified
                weights (n,)  float64 on its device <- what a call would return, where there is one
                info (4,)     float64 on its device <- number of the status in
                              `fastmto.solvers.STATUSES`, iterations, residual, kappa
                tasks         as in a call

            It sets no `result`. Options that are per task are brought to the device at the first
            call with tasks like these and kept by the function: keep that.
        """
        return None


class Weighting(DecidesOnHost, ABC):
    """A callable Gram -> weights.

    Subclasses define `__call__` (or `_solve`, see `SolverWeighting`); `state_dict`,
    `load_state_dict` and `reset` if later weights depend on something that is kept from one call to
    the next; `device_solver` if their weights can be found on a device; `positive` and `hold` where
    the defaults are not right.

    Attributes:
        result: the last solver `Result` with its status, iterations and residual; None before the
            first call and where no solver is called. A diagnostic only: not part of the state.
        rounding: relative rounding of the rows that the Gram matrices are taken from, where these
            are of a wider dtype; set by the caller. None: that of the Gram matrix' dtype.
    """

    STEPS = frozenset({"__call__", "_solve", "_powers"})
    result: Result[Tensor] | None = None
    rounding: float | None = None

    @property
    def needs_losses(self) -> str:
        """Why a call needs `losses=`, the losses (n,) of the tasks, positive; "" if it does not."""
        return ""

    @property
    def positive(self) -> bool:
        """Whether all weights are > 0 by construction, whatever the Gram matrix."""
        return False

    @abstractmethod
    def __call__(self, gram: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """Weights of the tasks of this Gram matrix.

        Args:
            gram: (T, T) of any floating dtype on any device, inner products of the tasks' updates
                or gradients; not modified. The weights are found in float64 on the host: a Gram
                matrix on an accelerator is synchronized with.
            tasks: which tasks the rows are, as T different indices >= 0; None for 0..T-1. A task
                that is absent from a batch is left out of the Gram matrix; options that are per
                task (a preference, ...) follow `tasks`.

        Returns:
            (T,) of the Gram matrix' dtype and on its device, new memory, without a graph.

        Raises:
            SolverError: there are no weights for this Gram matrix; `status` says why.
            ValueError: a shape, or tasks that do not fit.
        """

    def hold(self, gram: Tensor, weights: Tensor) -> Tensor:
        """The weights (n,) of a search without an answer, from the last ones.

        Args:
            gram: (n, n) of the search, on any device; it may be not finite. Only tensor operations,
                which do not synchronize.
            weights: (n,) float64 beside it, the last ones; not modified.
        """
        return weights

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to continue exactly from here."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, got {sorted(state)}")

    def reset(self) -> None:
        """Forget everything, as before the first call."""
        self.result = None


class SolverWeighting(Weighting):
    """A weighting whose weights are one call of a solver.

    Subclasses define `_solve`. With `tasks=None` and a float32 or float64 Gram matrix a call costs
    nothing but the solver's.
    """

    @abstractmethod
    def _solve(self, gram: Tensor, tasks: Sequence[int] | None) -> Result[Tensor]:
        """The solver's answer; `tasks`, where given, fit the Gram matrix."""

    def __call__(self, gram: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        if tasks is not None:
            check_tasks(gram, tasks)
        self.result = result = self._solve(gram, tasks)
        weights = result.weights
        if weights is None:
            raise SolverError(
                f"no {type(self).__name__} weights for the Gram matrix of {len(gram)} tasks: "
                f"{result.status} (kappa {result.kappa:.3g}, {result.iterations} iterations)",
                result.status,
            )
        return weights if weights.dtype is gram.dtype else _rounded(weights, gram.dtype)


def _rounded(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights in a dtype that is narrower than what the solver returns."""
    rounded = weights.to(dtype)
    if not bool(rounded.isfinite().all()):
        raise SolverError(f"the weights {weights.tolist()} do not fit into {dtype}", "not_finite")
    return rounded


def check_tasks(gram: Tensor, tasks: Sequence[int] | None) -> list[int]:
    """`tasks` with its default, checked against the Gram matrix."""
    indices = list(range(len(gram))) if tasks is None else [int(i) for i in tasks]
    if len(indices) != len(gram) or len(set(indices)) != len(indices) or min(indices) < 0:
        raise ValueError(
            f"tasks must hold {len(gram)} different indices, one per row of gram, got {indices}"
        )
    return indices


def as_preference(
    preference: Sequence[float] | Tensor | None, positive: bool
) -> NDArray[np.float64] | None:
    """The option `preference`, one number per task, checked; None stays None.

    Args:
        positive: whether 0 is refused.
    """
    if preference is None:
        return None
    values = [float(p) for p in preference]
    bound = "positive" if positive else ">= 0, not all of them 0,"
    fits = all(math.isfinite(p) and (p > 0 or (p == 0 and not positive)) for p in values)
    if not fits or not any(values):
        raise ValueError(f"preference must be {bound} and finite, got {values}")
    return np.array(values)


def of_tasks(
    preference: NDArray[np.float64], gram: Tensor, tasks: Sequence[int] | None
) -> NDArray[np.float64]:
    """The entries of `preference` for the tasks of this call."""
    if tasks is None and len(gram) == len(preference):
        return preference
    if tasks is not None and max(tasks) < len(preference):
        return preference[list(tasks)]
    raise ValueError(
        f"gram must be of the {len(preference)} tasks of preference, "
        f"got tasks {check_tasks(gram, tasks)}"
    )


SOLVED, NEAR_STATIONARY = (STATUSES.index(name) for name in ("solved", "near_stationary"))


def is_solved(info: Tensor, weights: Tensor, most_kappa: float) -> Tensor:
    """Whether weights that a device solver found are to be used, a boolean on the device.

    Args:
        info: (4,), as the solver wrote it; a solution of a larger kappa than `most_kappa` gets the
            status "near_stationary".
        weights: finite if they are to be used.
    """
    status = info[0]
    far = (status == SOLVED) & (info[3] > most_kappa)
    status.copy_(torch.where(far, NEAR_STATIONARY, status))
    return (status == SOLVED) & weights.isfinite().all()


def result_of(info: Tensor, weights: Tensor) -> Result[Tensor]:
    """What a device solver wrote, as a solver on the host returns it; synchronizes."""
    number, iterations, residual, kappa = info.tolist()
    status = STATUSES[int(number)]
    solution = weights if status == "solved" else None
    return Result(solution, status, int(iterations), residual, kappa)


def joint_length(gram: Tensor, weights: Tensor) -> Tensor:
    """||sum_i weights_i g_i||, a scalar; not by the BLAS, whose bits depend on the alignment."""
    return (weights[:, None] * gram * weights).sum().clamp(min=0.0).sqrt()

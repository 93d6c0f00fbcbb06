"""From a Gram matrix to task weights that can be used: the search of both levels.

    level.gram() -> Search.solve -> Decision -> level.deliver

Everything between a Gram matrix and the weights is decided in this file, once for the update
level and the gradient level: when to search, what late tasks get, what a solver's failure does,
the scale and the bound of the weights, the counts and the state.

The host decides (`solve`), or tensors on the device do (`_on_device`): then nothing is read, and a
step can be captured in a CUDA graph. One file of more than 400 lines, because both have to say the
same and are read side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteError, SolverError, warn
from ..ops.device import Constants, capturing
from ..solvers import STATUSES, Result
from ..weightings import DeviceSolver, Weighting
from ..weightings.base import KAPPA_LIMIT_FLOAT32, is_solved, joint_length, result_of

SCALES = ("mean_norm", "rms", "sum", "none")
NOT_FINITE = STATUSES.index("not_finite")
#: Places in `OnDevice.outcomes`.
FOUND, HELD, CAPPED, SEARCHED, SKIPPED = range(5)


@dataclass
class Decision:
    """What a search says.

    Attributes:
        weights: (T,) float64, the task weights from now on; a later search leaves them unchanged.
        joint: (T,) float64, the factors of the tasks' rows in this step: 0 for tasks that take no
            part, NaN where a GradScaler is to find that the step is not finite.
        gram: (n, n) of the n tasks that take part; None for methods without one.
        result: the solver's result, or a function that reads it from the device.
        status: why the last weights were held; None if they were not, and on the device.
        poison: on the device, NaN where a GradScaler is to skip the step, else 1.
    """

    weights: Tensor
    joint: Tensor
    gram: Tensor | None = None
    result: Any = None
    status: str | None = None
    poison: Tensor | None = None


class OnDevice:
    """The memory of a search that is decided on the device. CUDA graphs read and write it, so it
    stays where it is: what their replays find is what is shown.

    Attributes:
        weights: (T,) float64.
        outcomes: (5,) int64, counts of searches by what became of them.
        gram, raw, info: of the last search: Gram matrix, solution and diagnostics.
    """

    def __init__(self, weights: Tensor, device: torch.device) -> None:
        n_tasks = len(weights)
        self.weights = weights.to(device, torch.float64, copy=True)
        self.outcomes = torch.zeros(5, dtype=torch.int64, device=device)
        self.gram = self.weights.new_zeros(n_tasks * n_tasks)
        self.raw = self.weights.new_zeros(n_tasks)
        self.info = self.weights.new_full((4,), math.nan)  # no solve yet
        self.indices = Constants(torch.int64)
        self.masks = Constants(torch.bool)


class Search:
    """Finds task weights, keeps the last ones, and counts.

    Args:
        weighting: Gram matrix -> weights; None for methods that find their weights otherwise.
        every: steps between two searches.
        on_failure: "hold" the last weights, or "raise" SolverError.
        scale: what the weights are multiplied by, one of `SCALES`; see docs/scale.md.
        max_weight: bound of the scaled weights; None: none.

    Attributes:
        device: where a device decides, its memory; else None.
        searched: tasks that a search has given a weight.
        steps: the phase of the search.
        counts: searches, held and capped, as far as the host decides them.
        gram: (n, n) of the last search, if there was one.
    """

    def __init__(
        self,
        weighting: Weighting | None,
        *,
        every: int = 1,
        on_failure: str = "hold",
        scale: str = "none",
        max_weight: float | None = None,
    ) -> None:
        self.weighting = weighting
        self.every = every
        self.on_failure = on_failure
        self.scale = scale
        self.max_weight = max_weight
        self.device: OnDevice | None = None
        self._weights: Tensor | None = None
        self._solver: DeviceSolver | None = None
        self._kappa_limit = math.inf
        self._numel = 0
        self.forget()

    def forget(self) -> None:
        """As freshly built; T and the weights are unknown again."""
        self._weights = None
        self.searched: set[int] = set()
        self.steps = 0
        self.gram: Tensor | None = None
        self.found = False
        self.forget_counts()

    def forget_counts(self) -> None:
        """Start counting again, and forget the last solve's diagnostics."""
        self.counts = dict.fromkeys(("searches", "held", "capped"), 0)
        if self.device is not None:
            self.device.outcomes.zero_()
            self.device.info.fill_(math.nan)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles decide on the host until they are placed."""
        return {
            **self.__dict__,
            "_weights": self.on_host(),
            "gram": None if self.gram is None else self.gram.cpu(),
            "counts": self.counted,
            "device": None,
            "_solver": None,
        }

    @property
    def weights(self) -> Tensor | None:
        """(T,) float64, the last weights: on the CPU, replaced by every search, or on the device
        that decides, written in place. None until T is known."""
        if self._weights is None or self.device is None:
            return self._weights
        return self.device.weights

    @weights.setter
    def weights(self, weights: Tensor) -> None:
        if self.device is not None and len(self.device.weights) == len(weights):
            self.device.weights.copy_(weights)  # replays of a CUDA graph go by them, too
        else:
            self.device = None
        self._weights = weights

    @property
    def last(self) -> Tensor:
        """`weights` where T is known."""
        assert self._weights is not None
        return self._weights if self.device is None else self.device.weights

    def on_host(self) -> Tensor | None:
        """A copy of the weights on the CPU; synchronizes with a device that decides."""
        return None if self._weights is None else self.last.to("cpu", copy=True)

    def place(
        self, dtypes: Collection[torch.dtype], *, numel: int, solver: DeviceSolver | None
    ) -> None:
        """Say what the Gram matrices are made of, and who decides. T is known.

        Args:
            dtypes: of what Gram matrices are sums over. Unless all are float64, solutions of a
                kappa above `KAPPA_LIMIT_FLOAT32` are noise, and are refused.
            numel: number of shared parameters, for the scale "rms".
            solver: finds the weights on the device; None: the host decides.
        """
        self._numel = numel
        narrow = any(dtype != torch.float64 for dtype in dtypes)
        self._kappa_limit = KAPPA_LIMIT_FLOAT32 if narrow else math.inf
        self._solver = solver
        if self.weighting is not None:
            # Gram matrices are float64, the rounding in them that of the rows.
            self.weighting.rounding = max(torch.finfo(dtype).eps for dtype in dtypes)

    def decide_on(self, device: torch.device | None) -> None:
        """Decide on this device from now on; None: on the host. T is known."""
        if self.device is not None and device == self.device.weights.device:
            return
        if self.device is not None:
            self.counts, self._weights = self.counted, self.device.weights.cpu()
            self.gram = None if self.gram is None else self.gram.cpu()
            self.device = None
        if device is not None:
            self.device = OnDevice(self.last, device)

    @property
    def counted(self) -> dict[str, int]:
        """searches, held and capped, the device's included; synchronizes with it."""
        counted = dict(self.counts)
        if self.device is not None:
            _, held, capped, searches, _ = self.device.outcomes.tolist()
            for name, more in (("held", held), ("capped", capped), ("searches", searches)):
                counted[name] += more
        return counted

    @property
    def skipped(self) -> int:
        """Searches that were not finite, as the device found; synchronizes with it."""
        return 0 if self.device is None else int(self.device.outcomes[SKIPPED])

    @property
    def result(self) -> Result[Tensor] | None:
        """How the last solve ended, its weights before `scale`; None if no solver was called.
        Synchronizes with a device that decides."""
        if self.gram is None or self.device is None:
            return getattr(self.weighting, "result", None)
        if math.isnan(float(self.device.info[0])):
            return None
        return result_of(self.device.info, self.device.raw[: len(self.gram)].cpu())

    def has_found(self) -> bool:
        """Whether any search has found weights. Synchronizes with a device until one has.

        Raises:
            RuntimeError: while a CUDA graph is captured, if that is not known yet.
        """
        if not self.found and self.device is not None:
            if capturing(self.device.weights.device):
                raise RuntimeError(
                    "make steps until weights were found before the one that is captured: only "
                    "then is it known whether that step searches (optimizer.searches_next)"
                )
            self.found = bool(self.device.outcomes[FOUND] > 0)
        return self.found

    def is_due(self, tasks: Collection[int] = ()) -> bool:
        """Whether the coming step searches.

        Args:
            tasks: those that are expected to reach the shared parameters. One that no search has
                given a weight is searched for at once: its initial weight would stand among
                weights of another scale.
        """
        return (
            self.steps % self.every == 0
            or not self.has_found()
            or not self.searched.issuperset(tasks)
        )

    def joint(self, active: Sequence[int]) -> Tensor:
        """(T,), the last weights with 0 for tasks that are not active."""
        if len(active) == len(self.last):
            return self.last
        if self.device is None:
            return only(active, self.last)
        mask = [i in active for i in range(len(self.last))]
        return torch.where(self.device.masks(mask, self.last.device), self.last, 0.0)

    def solve(
        self,
        gram: Tensor,
        active: Sequence[int],
        *,
        weigh: Callable[[Tensor, Sequence[int] | None], Tensor] | None = None,
        label: Callable[[int], str] | None = None,
        finite: Tensor | None = None,
        scaled: bool = False,
    ) -> Decision:
        """New weights for the active tasks, or the last ones if none are found.

        Nothing of this object has changed when it raises.

        Args:
            gram: (T, T) float64, where the level computed it; not modified.
            active: the n tasks that take part, increasing.
            weigh: Gram matrix (n, n), tasks -> weights (n,), in place of the weighting; it is
                called on the host.
            label: names a task in messages. Given, the host refuses a task whose gradient is not
                finite.
            finite: on the device: whether the step is finite as far as others have found. A step
                that is not leaves the weights unchanged.
            scaled: whether a GradScaler is to find steps that are not finite.

        Raises:
            NonFiniteError: a diagonal entry of the Gram matrix is not finite.
            SolverError: there are no weights, with `on_failure="raise"`.
        """
        if self.device is not None:
            return self._on_device(self.device, gram, list(active), finite, scaled)
        everyone = len(active) == len(self.last)
        gram = gram.cpu()
        if not everyone:
            gram = gram[list(active)][:, list(active)]
        if label is not None:
            for i, square in zip(active, gram.diagonal().tolist(), strict=True):
                if not math.isfinite(square):
                    raise NonFiniteError(f"the gradient of {label(i)} is not finite")
        try:
            found = self._find(gram, None if everyone else active, weigh)
        except SolverError as error:
            decision = self.hold(error, active, gram)
        else:
            decision = self.take(active, found)
        decision.gram = self.gram = gram
        decision.result = getattr(self.weighting, "result", None)
        return decision

    def take(self, active: Sequence[int], found: Tensor) -> Decision:
        """Weights (n,) that the host found become the active tasks' weights."""
        found = found.to("cpu", torch.float64)
        if self.max_weight is not None and max(found.tolist()) > self.max_weight:
            found = found.clamp(max=self.max_weight)
            self.counts["capped"] += 1
        weights = self._weights = self._with(active, found)
        self.found = True
        self.searched.update(active)
        self.counts["searches"] += 1
        return Decision(weights, self.joint(active))

    def hold(
        self, error: SolverError, active: Sequence[int], gram: Tensor | None = None
    ) -> Decision:
        """The last weights stand, or `error` is raised.

        Active tasks that no search has given a weight stand with the mean of those that have one.
        """
        if self.on_failure == "raise":
            raise error
        self.counts["held"] += 1
        self.counts["searches"] += 1
        # No numbers in the text: Python shows a warning of one text once.
        warn(f"weights held: {error.status}; the last ones stay (stats['held'])")
        weights = self.last.clone()
        settled = self._settled(active)
        if settled:
            weights[[i for i in active if i not in settled]] = weights[settled].mean()
        self._weights = weights
        if gram is not None and self._bounds_held:
            assert self.weighting is not None
            held = self.weighting.hold(gram, weights[list(active)])
            weights = self._weights = self._with(active, held)
        return Decision(weights, self.joint(active), status=error.status)

    def _with(self, active: Sequence[int], new: Tensor) -> Tensor:
        """The last weights (T,) with those of the active tasks replaced; new memory."""
        if len(active) == len(self.last):
            return new.clone()
        weights = self.last.clone()
        weights[list(active)] = new
        return weights

    @property
    def _bounds_held(self) -> bool:
        """Whether held weights are the weighting's, whose bounds hold for them too."""
        return self.weighting is not None and self.scale == "none"

    def _settled(self, active: Sequence[int]) -> list[int]:
        """The tasks with weights of a search, if there are such and active ones without."""
        return sorted(self.searched) if not self.searched.issuperset(active) else []

    def _find(
        self,
        gram: Tensor,
        tasks: Sequence[int] | None,
        weigh: Callable[[Tensor, Sequence[int] | None], Tensor] | None,
    ) -> Tensor:
        """The scaled weights (n,) of a Gram matrix, float64 on the CPU.

        Raises:
            SolverError: there are none, or they are noise or not finite.
        """
        weigh = weigh or self.weighting
        assert weigh is not None
        weights = weigh(gram, tasks).to("cpu", torch.float64)
        kappa = getattr(getattr(self.weighting, "result", None), "kappa", 0.0)
        if kappa > self._kappa_limit:
            raise SolverError(
                f"no weights by {self.weighting!r}: nearer to Pareto stationarity (kappa "
                f"{kappa:.3g}) than a Gram matrix of float32 numbers tells",
                "near_stationary",
            )
        if self.scale != "none":
            weights = weights * self._factor(weights, gram)
        if not all(map(math.isfinite, weights.tolist())):
            raise SolverError("the weights or their scale are not finite", "not_finite")
        return weights

    def _factor(self, weights: Tensor, gram: Tensor) -> Tensor:
        """What brings weights to their scale; not finite if nothing does."""
        if self.scale == "sum":
            total = weights.sum()
            return torch.where(total > 0, len(weights) / total, math.inf)
        length = joint_length(gram, weights)
        if self.scale == "mean_norm":
            return gram.diagonal().sqrt().mean() / length
        return math.sqrt(self._numel) / length

    def _on_device(
        self,
        device: OnDevice,
        gram: Tensor,
        active: list[int],
        finite: Tensor | None,
        scaled: bool,
    ) -> Decision:
        """`solve` without reading anything; on the device nothing is raised or warned about."""
        assert self._solver is not None
        everyone = len(active) == len(gram)
        last = device.weights
        settled = self._settled(active)
        if settled:
            known = device.indices(settled, gram.device)
            has_weight = torch.zeros_like(last, dtype=torch.bool).index_fill(0, known, True)
            last = torch.where(has_weight, last, last.index_select(0, known).mean())
        if not everyone:
            index = device.indices(active, gram.device)
            gram = gram.index_select(0, index).index_select(1, index)
            last = last.index_select(0, index)
        raw, info = torch.ones_like(last), last.new_zeros(4)
        self._solver(gram, raw, info, None if everyone else active)
        weights = raw if self.scale == "none" else raw * self._factor(raw, gram)
        taken = is_solved(info, weights, self._kappa_limit)
        held = last
        if self._bounds_held:
            assert self.weighting is not None
            held = self.weighting.hold(gram, last)
        capped = torch.zeros_like(taken)
        if self.max_weight is not None:
            capped = taken & (weights > self.max_weight).any()
            weights = weights.clamp(max=self.max_weight)
        weights = torch.where(taken, weights, held)
        if scaled:
            own = gram.diagonal().isfinite().all()
            finite = own if finite is None else finite & own
        if finite is None:
            finite = torch.ones_like(taken)
        else:
            info[0].copy_(torch.where(finite, info[0], NOT_FINITE))
            weights = torch.where(finite, weights, last)
            taken = taken & finite
        device.outcomes.add_(
            torch.stack((taken, ~taken & finite, capped & finite, finite, ~finite))
        )
        poison = torch.where(finite, torch.ones_like(info[0]), torch.nan) if scaled else None
        joint = weights if poison is None else weights * poison
        if not everyone:
            joint = torch.zeros_like(device.weights).index_copy(0, index, joint)
            weights = device.weights.index_copy(0, index, weights)
        device.weights.copy_(weights)
        n = len(active)
        self.gram = device.gram[: n * n].view(n, n).copy_(gram)
        device.raw[:n].copy_(raw)
        device.info.copy_(info)
        if not capturing(gram.device):
            self.has_found()
        if self.found:
            self.searched.update(active)
        return Decision(weights, joint, gram, lambda: result_of(info, raw), poison=poison)


def only(tasks: Sequence[int], weights: Tensor) -> Tensor:
    """`weights` (T,) with 0 for all but some tasks."""
    if len(tasks) == len(weights):
        return weights
    kept = torch.zeros_like(weights)
    kept[list(tasks)] = weights[list(tasks)]
    return kept

"""Balancers that look at the tasks' gradients of what the tasks share.

One step, T backward passes when weights are searched and one when they are not:

    losses -> rows g_i (T, P) in a flat buffer -> Gram matrix -> weights -> sum_i w_i g_i -> .grad

The rows are passed over twice, by one Gram and one combine; a gradient is copied once, from
autograd's tensor into its row. `.grad` of the shared parameters then shows the flat buffer itself.
Where a method is capturable, what is decided on the way is decided on the device
(device_search.py).
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from ..checks import check_choice
from ..engine.balancer import Balancer, Batch, Info
from ..engine.buffers import Buffers, Head, check_inputs, heads_of, survey
from ..engine.device import capturing
from ..engine.device_search import DeviceSearch
from ..engine.gradients import graph_leaves
from ..errors import NonFiniteError, SolverError, warn
from ..weightings import Bargaining, DeviceSolver, Equal, Weighting
from ..weightings.base import MOST_KAPPA, speaks_for

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: Tasks a batched backward takes at once where nobody said otherwise.
AT_ONCE = 8
HEADS_NOT_FINITE = "the gradient of a task-specific parameter is not finite"


class GradientOptions(TypedDict, total=False):
    """The keyword arguments that all gradient-level methods have; see `GradientBalancer`."""

    update_weights_every: int
    level: str
    heads: str
    passes: str
    at_once: int | None
    on_failure: str
    on_nonfinite: str | None
    capturable: bool | None


class GradientBalancer(Balancer):
    """Base of the gradient-level methods.

    A subclass defines `_weigh`, the weights from the rows, and `_join`, their joint gradient, if
    that is not sum_i w_i g_i.

    Args:
        n_tasks, update_weights_every, on_nonfinite: as `Balancer`.
        level: where gradients are compared: at the shared "parameters", or at the shared
            "features", as MGDA-UB does: T passes through the heads, then one pass through the
            trunk with sum_i w_i dL_i/dfeatures.
        heads: what task-specific parameters get: the gradient of their "own" loss, as if trained
            alone, or that of the "weighted" one.
        passes: how the T gradients are taken: in a "loop", one backward after the other;
            "batched", `at_once` tasks a backward by vmap through autograd; "auto": the loop on
            CPUs, where it is 1.5 to 5 times as fast, else batched, and the loop for good if the
            first attempt at batching fails. `Info.passes` tells. Peak memory beside the graph:
            loop T + 2 vectors of P, batched T + 1 + 3 at_once and at_once times the activations'
            gradients, and one more where `.grad` is not None when `backward` is called; at the
            features P is their size.
        at_once: tasks a batched backward; at most 8 by default.
        on_failure: what a search without an answer does: "hold" the last weights (a warning,
            `stats["held"]`) or "raise" SolverError before anything is written.
        capturable: once weights have been found, nothing that the device computes is read: a step
            waits for nothing and can be captured in a CUDA graph, after a few steps that were not.
            `weights` is then a tensor on the device which every search writes to, `Info` and
            `stats` wait for it when they are asked, and searches without an answer are counted,
            not warned about; `Info` shows their Gram matrix as well, a status for every weighting,
            and in `result` the weights as they are used. None: on accelerators, where the method
            can. That is where the weighting is solved on the device (bargaining by "exact" from no
            earlier weights, MGDA without the losses, weights that do not depend on the Gram matrix;
            at most 64 tasks; a subclass that overrides a call or a search decides on the host),
            with on_failure="hold" and on_nonfinite None or "ignore": without a scaler a gradient
            that is not finite goes through. Not for float16 with `update_weights_every` > 1, whose
            small weights have to be known, nor for heads on another device than what is shared.

    The `.grad` that `backward` leaves shows a buffer which the next step uses again: clone it to
    keep it. What is still in `.grad` when `backward` is called again is kept and added to; every
    call is a step of `update_weights_every`. A task whose first search is still to come is
    searched for at once (capturable: once, whether weights are found then or not); as long as there
    are none for it, its weight is the mean of those found for others.

    Gradients are taken by `torch.autograd.grad`: hooks that wait for an accumulated gradient do
    not fire, and nothing is reduced between the processes of a DistributedDataParallel model,
    about which a warning is given. With a GradScaler give losses as they are: weights that do not
    depend on the losses' scale would undo it. A `state_dict` does not say whose the heads are where
    the graph was walked for them: the first steps after it is loaded find out again, by a backward
    a task.

    What `on_nonfinite` looks at: the losses, the tasks' gradients in a search, the joint gradient
    between two searches; not the heads' gradients. With a scaler a search always looks at the
    tasks' and the heads' gradients, and where one is not finite `.grad` holds NaN and the weights
    stay, and so does all other state where the host decides. What overflows later, in the joint
    gradient or on its way from the features, is found by the scaler alone: weights and state have
    moved by then. Steps that the scaler skips count for `update_weights_every` wherever the host
    does not look: capturable, between two searches on accelerators, or if `on_nonfinite="ignore"`
    there.

    CUDA graphs that were captured go by the weights of the last search, whichever graph or eager
    step made it, and by those of `reset` and `load_state_dict`. The balancer keeps the memory that
    they use as long as it lives. Capture again for other tensors or tasks.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        n_tasks: int | None = None,
        *,
        update_weights_every: int = 1,
        level: str = "parameters",
        heads: str = "own",
        passes: str = "auto",
        at_once: int | None = None,
        on_failure: str = "hold",
        on_nonfinite: str | None = None,
        capturable: bool | None = None,
    ) -> None:
        check_choice("level", level, ("parameters", "features"))
        check_choice("heads", heads, ("own", "weighted"))
        check_choice("passes", passes, ("auto", "loop", "batched"))
        check_choice("on_failure", on_failure, ("hold", "raise"))
        if at_once is not None and (type(at_once) is not int or at_once < 1):
            raise ValueError(f"at_once must be an integer >= 1 or None, got {at_once!r}")
        self.level = level
        self.heads = heads
        self.passes = passes
        self.at_once = at_once
        if capturable is not None and type(capturable) is not bool:
            raise ValueError(f"capturable must be True, False or None, got {capturable!r}")
        self.on_failure = on_failure
        self.capturable = capturable
        self._captured: list[object] = []  # whose memory CUDA graphs go on using
        super().__init__(
            n_tasks, update_weights_every=update_weights_every, on_nonfinite=on_nonfinite
        )
        if capturable:
            self._refuse_capturable(self._why_on_host(1 if n_tasks is None else n_tasks, None))

    def reset(self) -> None:
        self._buffers: Buffers | None = None
        self._known_heads: dict[str, Any] = {}  # of a loaded state
        self._searched: set[int] = set()  # tasks that a search gave a weight
        self._batchable: bool | None = None
        self._why_loop = ""
        super().reset()

    def _backward(self, batch: Batch, searches: bool) -> tuple[Tensor, Info]:
        assert self.weights is not None
        buffers = self._buffers_for(batch)
        if capturing(buffers.device):
            self._captured += [x for x in self._memory() if all(x is not y for y in self._captured)]
        gradients = buffers.gradients
        gradients.clear()
        # A task that came late would stand with its initial weight among balanced ones.
        late = [i for i in batch.tasks if gradients.reaches[i] and i not in self._searched]
        if not searches and not late:
            return self._between(batch, buffers)
        before = gradients.backwards
        passes = self._per_task(batch, buffers)
        if not any(gradients.reached):
            raise RuntimeError(
                f"no loss reaches {self._shared_name}: they are not what the model computes with"
            )
        active = [i for i in batch.tasks if gradients.touched[i]]
        try:
            info, head_weights = self._search(batch, buffers, active)
        except NonFiniteError as error:
            return self._refuse(batch, str(error), scaled=True)
        info.passes = passes
        self._counted["searches"] += 1
        self._counted["untouched"] += len(batch.tasks) - len(active)
        self._counted["backwards"] += gradients.backwards - before
        return self._deliver(batch, buffers, head_weights), info

    def _search(
        self, batch: Batch, buffers: Buffers, active: list[int]
    ) -> tuple[Info, Sequence[float | Tensor] | None]:
        """New weights, or the last ones; the joint rows are written with them.

        Returns:
            What is known but for the passes, and what heads' gradients are multiplied by.

        Raises:
            NonFiniteError: a gradient is not finite; nothing has changed.
            SolverError: there are no weights, with `on_failure="raise"`; likewise.
        """
        assert self.weights is not None
        if batch.seed is not None and not bool(buffers.finite_heads()):
            raise NonFiniteError(HEADS_NOT_FINITE)
        gram = status = None
        weights = self.weights.clone()
        try:
            if active:
                gram, found = self._weigh(buffers, active, batch)
                weights[active] = found.to("cpu", torch.float64)
                self._join(buffers, active, weights)
        except SolverError as error:
            if self.on_failure == "raise":
                raise
            status = error.status
            self._counted["held"] += 1
            warn(f"weights held: {error} (stats['held'])")
            settled = self._settled(active)
            if settled:
                weights[[i for i in active if i not in settled]] = weights[settled].mean()
            weights = self._held(buffers, active, weights)
            buffers.combine(buffers.task_rows, _only(active, weights))
        else:
            self._found = True
            self._searched.update(active)
        self.weights = weights
        result = None if gram is None else self._result()
        return Info(weights, self.names, gram, result, status), self._head_weights(batch)

    def _settled(self, active: list[int]) -> list[int]:
        """The tasks with weights of a search, if there are such and active ones without: those
        stand with the mean of these until they are given one, as their initial weight is of no
        known scale."""
        return sorted(self._searched) if not self._searched.issuperset(active) else []

    def _between(self, batch: Batch, buffers: Buffers) -> tuple[Tensor, Info]:
        """A step without a search: one backward of the weighted losses."""
        before = buffers.gradients.backwards
        buffers.gradients.weighted(
            batch.values,
            self._last_weights(),
            row=buffers.joint,
            seed=batch.seed,
            divides=self._divides(batch),
        )
        if self._looks_at(batch):
            if not buffers.finite(buffers.joint):
                what = "the gradient of the weighted losses is not finite"
                return self._refuse(batch, what, scaled=True)
            if batch.seed is not None and not bool(buffers.finite_heads()):
                return self._refuse(batch, HEADS_NOT_FINITE, scaled=True)
        self._counted["backwards"] += buffers.gradients.backwards - before
        assert self.weights is not None
        info = Info(self.weights.clone(), self.names)
        return self._deliver(batch, buffers, self._head_weights(batch)), info

    def _moved(self, batch: Batch) -> list[Tensor]:
        inputs, heads = self._listed(batch)
        trunk: Sequence[Tensor] = inputs
        if self._shared_name == "features":
            trunk = graph_leaves(inputs, ()) if batch.shared is None else batch.shared
        return [p for p in (*trunk, *(p for _, p in heads)) if p.requires_grad]

    def _deliver(
        self, batch: Batch, buffers: Buffers, head_weights: Sequence[float | Tensor] | None
    ) -> Tensor:
        """Write `.grad`; returns the weighted sum of the losses."""
        buffers.deliver(head_weights)
        self._counted["backwards"] += buffers.at_features
        return self._weighted_sum(batch)

    def _per_task(self, batch: Batch, buffers: Buffers) -> str:
        """Fill the rows; returns how."""
        gradients = buffers.gradients
        at_once = min(self.at_once or AT_ONCE, len(batch.tasks))
        if at_once == 1 or not self._batches(buffers):
            gradients.per_task(batch.values, seed=batch.seed)
            return "loop"
        if self._batchable is not False:
            try:
                # The graph has to outlive an attempt that may fail.
                retain = self.passes == "auto" and self._batchable is None
                gradients.per_task(batch.values, at_once=at_once, retain=retain, seed=batch.seed)
                self._batchable = True
                return f"batched ({at_once} at once)"
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                if self.passes == "batched" or self._batchable:
                    raise
                self._batchable = False
                self._why_loop = str(error).splitlines()[0]
                warn(f"batched backward failed, from now on in a loop: {self._why_loop}")
                gradients.clear()
        gradients.per_task(batch.values, seed=batch.seed)
        return f"loop (batched failed: {self._why_loop})"

    def _batches(self, buffers: Buffers) -> bool:
        """Whether to try a batched backward."""
        return self.passes == "batched" or (self.passes == "auto" and buffers.device.type != "cpu")

    @abstractmethod
    def _weigh(
        self, buffers: Buffers, active: list[int], batch: Batch
    ) -> tuple[Tensor | None, Tensor]:
        """The Gram matrix, if the method has one, and the weights (n,) of the active tasks.

        Args:
            buffers: the rows.
            active: the n tasks that are present and touch what is shared.
            batch: the call.

        Raises:
            NonFiniteError: a gradient is not finite.
            SolverError: there are no weights.
        """

    def _join(self, buffers: Buffers, active: list[int], weights: Tensor) -> None:
        """Write the joint gradient into the joint rows; one pass over the tasks' rows.

        Args:
            weights: (T,) float64 on the CPU; those of tasks not in `active` do not count.
        """
        buffers.combine(buffers.task_rows, _only(active, weights))

    def _last_weights(self) -> Sequence[float] | Tensor:
        """The weights (T,) of the last search, as `TaskGradients.weighted` takes them."""
        assert self.weights is not None
        weights: list[float] = self.weights.tolist()
        return weights

    def _divides(self, batch: Batch) -> bool:
        """Whether the heads' own gradients can be had by dividing the last weights out."""
        return True

    def _held(self, buffers: Buffers, active: list[int], weights: Tensor) -> Tensor:
        """The weights (T,) of a search without an answer, from the last ones."""
        return weights

    def _head_weights(self, batch: Batch) -> Sequence[float | Tensor] | None:
        """What every task's own gradient is multiplied by on its heads; None for 1."""
        return list(self._last_weights()) if self.heads == "weighted" else None

    def _why_on_host(self, n_tasks: int, buffers: Buffers | None) -> str | None:
        """Why a search has to read what the device computes; None where it has not.

        Args:
            n_tasks: T.
            buffers: of all gradients; None where they are not known yet.
        """
        return f"{type(self).__name__} decides on the host"

    def _refuse_capturable(self, why: str | None) -> None:
        if why is not None:
            raise ValueError(f"capturable must be None or False: {why}")

    def _looks_at(self, batch: Batch) -> bool:
        return not self.capturable and super()._looks_at(batch)

    def _positive_losses(self, batch: Batch, why: str) -> dict[int, float]:
        """The present tasks' losses, refused where one is not positive; waits for the device."""
        losses = dict(zip(batch.tasks, batch.losses.tolist(), strict=True))
        for i, loss in losses.items():
            if loss <= 0:
                raise ValueError(f"{self._label(i)} must be positive: {why}; got {loss:g}")
        return losses

    def _result(self) -> Any:
        """The solver's result of the last search, if there is a solver."""
        return None

    @property
    def _shared_name(self) -> str:
        return "features" if self.level == "features" else "shared_parameters"

    def _listed(self, batch: Batch) -> tuple[list[Tensor], list[Head]]:
        """What the call's gradients are compared at, and its task-specific parameters."""
        if batch.listed is not None:
            return batch.listed
        assert self.weights is not None
        name = self._shared_name
        inputs = batch.features if name == "features" else batch.shared
        if not inputs:
            raise ValueError(
                f"{name} must be given to {type(self).__name__}.backward"
                + (" with level='features'" if name == "features" else "")
                + f", got {inputs}"
            )
        check_inputs(name, inputs)
        if name == "features" and batch.shared is not None:
            check_inputs("shared_parameters", batch.shared)
        heads = heads_of(batch, inputs, self.names, len(self.weights))
        old = self._buffers
        if old is not None and batch.heads is None:
            # The heads of tasks that are absent now are not in the graph.
            known = [(i, p) for i, p in old.heads if p.requires_grad]
            ids = {id(p) for _, p in known}
            heads = known + [(i, p) for i, p in heads if id(p) not in ids]
        batch.listed = inputs, heads
        return batch.listed

    def _buffers_for(self, batch: Batch) -> Buffers:
        """The buffers for the tensors of this call: those of the last one if they fit."""
        assert self.weights is not None
        inputs, heads = self._listed(batch)
        old = self._buffers
        if old is None or not old.fits(inputs, heads):
            survey(batch, inputs, heads)
            new = Buffers(inputs, heads, len(self.weights), at_features=inputs is batch.features)
            self._take_over(old, new)
            if old is not None and old.same_heads(heads):
                new.take_known_heads(old.known_heads())
            elif old is None and batch.heads is not None:
                new.take_known_heads(self._known_heads)
            self._heads_given = batch.heads is not None
            self._buffers = old = new
        old.keep_old_grads()
        old.bind(inputs, batch.shared, batch.seed)
        return old

    def _memory(self) -> list[object]:
        """What holds the memory that a step writes to and that outlives it."""
        return [self._buffers]

    def _take_over(self, old: Buffers | None, new: Buffers) -> None:
        """Bring state of the rows' size into new buffers; raises before it changes anything."""
        return None

    def _heads_for_state(self) -> dict[str, Any]:
        """What is known of the heads. Where the graph was walked for them, their order depends on
        what came when, and the next run has to find out for itself."""
        if self._buffers is None:
            return copy.deepcopy(self._known_heads)
        return self._buffers.known_heads() if self._heads_given else {}

    def _state(self) -> dict[str, Any]:
        return {"heads": self._heads_for_state(), "searched": sorted(self._searched)}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._buffers = None
        self._known_heads = copy.deepcopy(state["heads"])
        self._searched = set(state["searched"])

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold no gradients: the buffers show another model's parameters."""
        known = self._heads_for_state()
        return {**self.__dict__, "_buffers": None, "_captured": [], "_known_heads": known}

    def _options(self) -> dict[str, Any]:
        options = {"level": (self.level, "parameters"), "heads": (self.heads, "own")}
        return {k: value for k, (value, default) in options.items() if value != default}


class GramBalancer(GradientBalancer):
    """Base of the methods whose weights come from the Gram matrix of the gradients.

    Args:
        weighting: Gram (n, n) -> weights (n,).
        n_tasks, options: as `GradientBalancer`.
    """

    def __init__(
        self,
        weighting: Weighting,
        n_tasks: int | None = None,
        **options: Unpack[GradientOptions],
    ) -> None:
        self.weighting = weighting
        self._weights: Tensor | None = None  # while none are on a device
        self._device_search: DeviceSearch | None = None
        super().__init__(n_tasks, **options)

    def reset(self) -> None:
        self.weighting.reset()
        self._forget_tally()
        super().reset()

    @property
    def weights(self) -> Tensor | None:
        search = self._device_search
        return self._weights if search is None or self._weights is None else search.weights

    @weights.setter
    def weights(self, weights: Tensor | None) -> None:
        search = self._device_search
        self._weights = weights
        if search is None or weights is None:
            return
        if len(weights) == len(search.weights):
            search.weights.copy_(weights)  # replays of a CUDA graph go by them, too
        else:
            self._device_search = None

    def _forget_tally(self) -> None:
        if self._device_search is not None:
            self._device_search.tally.zero_()

    @property
    def stats(self) -> dict[str, int]:
        counted = dict(self._counted)
        if self._device_search is not None:
            for name, more in zip(
                ("held", "skipped"), self._device_search.tally.tolist(), strict=True
            ):
                counted[name] += more
        return counted

    def _solver(self, n_tasks: int) -> DeviceSolver | None:
        """What finds the weights on the device; None where a subclass does more than its weighting
        and has not said how that is done there."""
        speaks = speaks_for(self, "_device_solver", ("_weigh", "_solve", "_join", "_held"))
        return self._device_solver(n_tasks) if speaks else None

    def _device_solver(self, n_tasks: int) -> DeviceSolver | None:
        """The function for `_solver`, of this class's searches."""
        return self.weighting.device_solver(n_tasks)

    def _why_on_host(self, n_tasks: int, buffers: Buffers | None) -> str | None:
        obstacles = {
            f"the weights of {n_tasks} tasks by {self.weighting!r} are found on the host": (
                self._solver(n_tasks) is None
            ),
            f"on_failure={self.on_failure!r} has to look": self.on_failure != "hold",
            f"on_nonfinite={self.on_nonfinite!r} has to look": (
                self.on_nonfinite not in (None, "ignore")
            ),
            "small weights of float16 gradients have to be known with update_weights_every > 1": (
                self.update_weights_every > 1
                and buffers is not None
                and torch.float16 in buffers.dtypes
            ),
            "task-specific parameters lie on another device than what is shared": (
                buffers is not None and any(p.device != buffers.device for _, p in buffers.heads)
            ),
        }
        return next((why for why, stands in obstacles.items() if stands), None)

    def _take_over(self, old: Buffers | None, new: Buffers) -> None:
        assert self.weights is not None
        n_tasks, search = len(self.weights), self._device_search
        wanted = new.device.type != "cpu" if self.capturable is None else self.capturable
        why = self._why_on_host(n_tasks, new) if wanted else "it is not wanted"
        if self.capturable:
            self._refuse_capturable(why)
        super()._take_over(old, new)
        if why is None and search is not None and search.weights.device == new.device:
            return
        if search is not None:
            self._counted, self._weights = self.stats, search.weights.cpu()
        solver = self._solver(n_tasks) if why is None else None
        self._device_search = solver and DeviceSearch(solver, self.weights, new.device)

    def _memory(self) -> list[object]:
        return [*super()._memory(), self._device_search]

    def _last_weights(self) -> Sequence[float] | Tensor:
        search = self._device_search
        return super()._last_weights() if search is None else search.weights

    def _divides(self, batch: Batch) -> bool:
        # On the device nobody sees which weights are 0; with a scaler activations are of 16 bits.
        return self._device_search is None or (
            isinstance(self.weighting, Bargaining | Equal) and batch.seed is None
        )

    def _search(
        self, batch: Batch, buffers: Buffers, active: list[int]
    ) -> tuple[Info, Sequence[float | Tensor] | None]:
        search = self._device_search
        if search is None or not active:
            return super()._search(batch, buffers, active)
        scaled = batch.seed is not None
        found = search(
            buffers.gram(),
            active,
            self._settled(active),
            most_kappa=MOST_KAPPA if buffers.narrow else math.inf,
            hold=self._hold,
            heads_finite=buffers.finite_heads() if scaled else None,
        )
        buffers.combine(buffers.task_rows, found.joint)
        if not self._found and not capturing(buffers.device):
            self._found = bool(found.taken)  # a search a step until there are weights
        if self._found:
            self._searched.update(active)
        info = Info(found.weights, self.names, found.gram, found.result)
        factors = self._head_weights(batch)
        if scaled:
            factors = [a * found.poison for a in factors or [1.0] * len(found.weights)]
        return info, factors

    def _weigh(self, buffers: Buffers, active: list[int], batch: Batch) -> tuple[Tensor, Tensor]:
        gram = buffers.host_gram(active)
        looks = self.on_nonfinite != "ignore" or batch.seed is not None
        if looks and not bool(gram.diagonal().isfinite().all()):
            bad = int((~gram.diagonal().isfinite()).nonzero()[0])
            raise NonFiniteError(f"the gradient of {self._label(active[bad])} is not finite")
        weights = self._solve(gram, active, batch)
        kappa = getattr(self._result(), "kappa", 0.0)
        if buffers.narrow and kappa > MOST_KAPPA:
            raise SolverError(
                f"no {type(self).__name__} weights: nearer to Pareto stationarity (kappa "
                f"{kappa:.3g}) than a Gram matrix of {buffers.layouts[0].dtype} gradients tells",
                "near_stationary",
            )
        return gram, weights

    def _solve(self, gram: Tensor, active: list[int], batch: Batch) -> Tensor:
        """The weights (n,) of the active tasks from their Gram matrix (n, n), float64."""
        assert self.weights is not None
        everyone = len(active) == len(self.weights)
        return self.weighting(gram, None if everyone else active)

    def _result(self) -> Any:
        return getattr(self.weighting, "result", None)

    def _held(self, buffers: Buffers, active: list[int], weights: Tensor) -> Tensor:
        weights[active] = self._hold(buffers.host_gram(active), weights[active])
        return weights

    def _hold(self, gram: Tensor, weights: Tensor) -> Tensor:
        """The weights (n,) of a search without an answer, from the last ones, by operations that
        read nothing.

        Args:
            gram: (n, n) of the search.
            weights: (n,) float64 beside it; not modified.
        """
        return weights

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "weighting": self.weighting.state_dict()}

    def _load(self, state: Mapping[str, Any]) -> None:
        self.weighting.load_state_dict(state["weighting"])
        super()._load(state)
        self._forget_tally()

    def __getstate__(self) -> dict[str, Any]:
        state = {**super().__getstate__(), "_device_search": None, "_counted": self.stats}
        if self.weights is not None:
            state["_weights"] = self.weights.to("cpu", copy=True)
        return state

    def _options(self) -> dict[str, Any]:
        return {"weighting": self.weighting, **super()._options()}


def _only(tasks: Sequence[int], weights: Tensor) -> Tensor:
    """`weights` (T,) with 0 for all but some tasks."""
    kept = torch.zeros_like(weights)
    kept[list(tasks)] = weights[list(tasks)]
    return kept

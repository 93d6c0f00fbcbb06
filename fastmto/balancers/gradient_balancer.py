"""Balancers that look at the tasks' gradients of what the tasks share.

One step, T backward passes when weights are searched and one when they are not:

    losses -> rows g_i (T, P) in a flat buffer -> Gram matrix -> weights -> sum_i w_i g_i -> .grad

The rows are passed over twice, by one Gram and one combine; a gradient is copied once, from
autograd's tensor into its row. `.grad` of the shared parameters then shows the flat buffer itself.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from ..checks import check_choice
from ..errors import NonFiniteError, SolverError, warn
from ..weightings import Weighting
from .base import Balancer, Batch, Info
from .buffers import Buffers, check_inputs, heads_of, survey

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: Relative error of the cosines of float32 gradients; weights are off by kappa times that.
GRAM_ERROR = 1e-8
#: Tasks a batched backward takes at once where nobody said otherwise.
AT_ONCE = 8


class GradientOptions(TypedDict, total=False):
    """The keyword arguments that all gradient-level methods have; see `GradientBalancer`."""

    update_weights_every: int
    level: str
    heads: str
    passes: str
    at_once: int | None
    on_failure: str
    on_nonfinite: str | None


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

    The `.grad` that `backward` leaves shows a buffer which the next step uses again: clone it to
    keep it. What is still in `.grad` when `backward` is called again is kept and added to; every
    call is a step of `update_weights_every`. A task whose first search is still to come is
    searched for at once.

    Gradients are taken by `torch.autograd.grad`: hooks that wait for an accumulated gradient do
    not fire, and nothing is reduced between the processes of a DistributedDataParallel model,
    about which a warning is given. Give losses as they are, not scaled by a GradScaler: weights
    that do not depend on the losses' scale undo it.

    What `on_nonfinite` looks at: the losses, the tasks' gradients in a search, the joint gradient
    between two searches; not the heads' gradients.

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
        self.on_failure = on_failure
        super().__init__(
            n_tasks, update_weights_every=update_weights_every, on_nonfinite=on_nonfinite
        )

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
        gram = status = None
        weights = self.weights.clone()
        try:
            if active:
                gram, found = self._weigh(buffers, active, batch)
                weights[active] = found.to("cpu", torch.float64)
                self._join(buffers, active, weights)
        except NonFiniteError as error:
            return self._refuse(batch, str(error))
        except SolverError as error:
            if self.on_failure == "raise":
                raise
            status = error.status
            self.stats["held"] += 1
            warn(f"weights held: {error} (stats['held'])")
            weights = self._held(buffers, active, weights)
            buffers.combine(buffers.task_rows, active, weights)
        else:
            self._found = True
            self._searched.update(active)
        self.weights = weights
        self.stats["searches"] += 1
        self.stats["untouched"] += len(batch.tasks) - len(active)
        self.stats["backwards"] += gradients.backwards - before
        result = None if gram is None else self._result()
        info = Info(self.weights, self.names, gram, result, status, passes)
        return self._deliver(batch, buffers), info

    def _between(self, batch: Batch, buffers: Buffers) -> tuple[Tensor, Info]:
        """A step without a search: one backward of the weighted losses."""
        assert self.weights is not None
        before = buffers.gradients.backwards
        buffers.gradients.weighted(batch.values, self.weights.tolist(), row=buffers.joint)
        if self._looks_at(batch) and not buffers.finite(buffers.joint):
            return self._refuse(batch, "the gradient of the weighted losses is not finite")
        self.stats["backwards"] += buffers.gradients.backwards - before
        return self._deliver(batch, buffers), Info(self.weights, self.names)

    def _deliver(self, batch: Batch, buffers: Buffers) -> Tensor:
        """Write `.grad`; returns the weighted sum of the losses."""
        buffers.deliver(self._head_weights(batch))
        self.stats["backwards"] += buffers.at_features
        return self._weighted_sum(batch)

    def _per_task(self, batch: Batch, buffers: Buffers) -> str:
        """Fill the rows; returns how."""
        gradients = buffers.gradients
        at_once = min(self.at_once or AT_ONCE, len(batch.tasks))
        if at_once == 1 or not self._batches(buffers):
            gradients.per_task(batch.values)
            return "loop"
        if self._batchable is not False:
            try:
                # The graph has to outlive an attempt that may fail.
                retain = self.passes == "auto" and self._batchable is None
                gradients.per_task(batch.values, at_once=at_once, retain=retain)
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
        gradients.per_task(batch.values)
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
        buffers.combine(buffers.task_rows, active, weights)

    def _held(self, buffers: Buffers, active: list[int], weights: Tensor) -> Tensor:
        """The weights (T,) of a search without an answer, from the last ones."""
        return weights

    def _head_weights(self, batch: Batch) -> list[float] | None:
        """What every task's own gradient is multiplied by on its heads; None for 1."""
        assert self.weights is not None
        return self.weights.tolist() if self.heads == "weighted" else None

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

    def _buffers_for(self, batch: Batch) -> Buffers:
        """The buffers for the tensors of this call: those of the last one if they fit."""
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
        if old is None or not old.fits(inputs, heads):
            survey(batch, inputs, heads)
            new = Buffers(inputs, heads, len(self.weights), at_features=name == "features")
            self._take_over(old, new)
            if old is not None and old.same_heads(heads):
                new.take_known_heads(old.known_heads())
            elif old is None and batch.heads is not None:
                new.take_known_heads(self._known_heads)
            self._listed = batch.heads is not None
            self._buffers = old = new
        old.keep_old_grads()
        old.bind(inputs, batch.shared)
        return old

    def _take_over(self, old: Buffers | None, new: Buffers) -> None:
        """Bring state of the rows' size into new buffers; raises before it changes anything."""
        return None

    def _heads_for_state(self) -> dict[str, Any]:
        """What is known of the heads. Where the graph was walked for them, their order depends on
        what came when, and the next run has to find out for itself."""
        if self._buffers is None:
            return copy.deepcopy(self._known_heads)
        return self._buffers.known_heads() if self._listed else {}

    def _state(self) -> dict[str, Any]:
        return {"heads": self._heads_for_state(), "searched": sorted(self._searched)}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._buffers = None
        self._known_heads = copy.deepcopy(state["heads"])
        self._searched = set(state["searched"])

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold no gradients: the buffers show another model's parameters."""
        return {**self.__dict__, "_buffers": None, "_known_heads": self._heads_for_state()}

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
        super().__init__(n_tasks, **options)

    def reset(self) -> None:
        self.weighting.reset()
        super().reset()

    def _weigh(self, buffers: Buffers, active: list[int], batch: Batch) -> tuple[Tensor, Tensor]:
        gram = buffers.gram(active)
        if self.on_nonfinite != "ignore" and not bool(gram.diagonal().isfinite().all()):
            bad = int((~gram.diagonal().isfinite()).nonzero()[0])
            raise NonFiniteError(f"the gradient of {self._label(active[bad])} is not finite")
        weights = self._solve(gram, active, batch)
        kappa = getattr(self._result(), "kappa", 0.0)
        if buffers.narrow and kappa * GRAM_ERROR > 0.1:
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

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "weighting": self.weighting.state_dict()}

    def _load(self, state: Mapping[str, Any]) -> None:
        self.weighting.load_state_dict(state["weighting"])
        super()._load(state)

    def _options(self) -> dict[str, Any]:
        return {"weighting": self.weighting, **super()._options()}

"""Balancers that look at the tasks' gradients of what the tasks share.

One step, T backward passes when weights are searched and one when they are not:

    losses -> rows g_i (T, P) in a flat buffer -> Gram matrix -> weights -> sum_i w_i g_i -> .grad

The rows are passed over twice, by one Gram and one combine; a gradient is copied once, from
autograd's tensor into its row. `.grad` of the shared parameters then shows the flat buffer itself.
Where a method is capturable, what is decided on the way is decided on the device
(engine/search.py).

The step is `_backward`. More than 400 lines for one class: a third of them are its docstring.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from ..checks import check_choice
from ..engine.balancer import Balancer
from ..engine.batch import Batch, Info
from ..engine.gradient_level import GradientLevel
from ..engine.graph import graph_leaves
from ..engine.search import Decision, Search, only
from ..engine.survey import Head, heads_of, survey, trainable
from ..errors import NonFiniteError, SolverError, warn
from ..ops.device import capturing
from ..weightings import Weighting

if TYPE_CHECKING:
    pass

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
    loss_floor: float | None
    capturable: bool | None


class GradientBalancer(Balancer):
    """Base of the gradient-level methods.

    A subclass defines `_weigh`, the weights from the rows, and `_join`, their joint gradient, if
    that is not sum_i w_i g_i.

    Args:
        n_tasks, update_weights_every, on_nonfinite, loss_floor: as `Balancer`.
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
            does not synchronize and can be captured in a CUDA graph, after a few that were not.
            `weights` is then a tensor on the device which every search writes to, `Info` and
            `stats` synchronize when they are read, and searches without an answer are counted,
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

    #: Gram matrix -> weights, for the methods that have one.
    weighting: Weighting | None = None

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
        loss_floor: float | None = None,
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
        self._search = Search(self.weighting, every=update_weights_every, on_failure=on_failure)
        super().__init__(
            n_tasks,
            update_weights_every=update_weights_every,
            on_nonfinite=on_nonfinite,
            loss_floor=loss_floor,
        )
        if capturable:
            self._refuse_capturable(self._why_on_host(1 if n_tasks is None else n_tasks, None))

    def reset(self) -> None:
        self._gradient_level: GradientLevel | None = None
        self._given: list[Tensor] = []  # what the last call compared gradients at
        self._known_heads: dict[str, Any] = {}  # of a loaded state
        self._batchable: bool | None = None
        self._why_loop = ""
        self._forget_pending()
        super().reset()

    def _forget_pending(self) -> None:
        """Forget what `backward(..., accumulate=True)` took."""
        #: What the pending gradients are: None, "per_task", "weighted" or "refused".
        self._pending: str | None = None
        self._summed: dict[int, Tensor] = {}  # the pending calls' losses by task

    # The phase, the weights and whether there are any are the search's.

    @property
    def weights(self) -> Tensor | None:
        return self._search.weights

    @weights.setter
    def weights(self, weights: Tensor | None) -> None:
        if weights is None:
            self._search.forget()
        else:
            self._search.weights = weights

    @property
    def _steps(self) -> int:
        return self._search.steps

    @_steps.setter
    def _steps(self, steps: int) -> None:
        self._search.steps = steps

    @property
    def _found(self) -> bool:
        return self._search.found

    @_found.setter
    def _found(self, found: bool) -> None:
        self._search.found = found

    @property
    def stats(self) -> dict[str, int]:
        search, counted = self._search, dict(self._counted)
        for name in ("searches", "held"):
            counted[name] += search.counted[name]
        counted["skipped"] += search.skipped
        return counted

    def _backward(self, batch: Batch, searches: bool) -> tuple[Tensor, Info]:
        """The step: losses -> rows -> Gram matrix -> weights -> joint row -> `.grad`."""
        if batch.accumulate and self.level == "features":
            raise ValueError(
                "accumulate must be False with level='features': the features of two micro-batches "
                "are other tensors, whose gradients cannot be added"
            )
        level = self._level_for(batch)
        gradients = level.gradients
        if self._pending is None:
            gradients.clear()
            tasks = [i for i in batch.tasks if gradients.ownership.reaches[i]]
            self._pending = "per_task" if self._search.is_due(tasks) else "weighted"
        if self._pending == "refused":
            return self._end_refused(batch)
        before = gradients.backwards
        try:
            if self._pending == "weighted":
                passes = None
                self._take_weighted(batch, level)
            else:
                passes = self._take_per_task(batch, level)
            if batch.accumulate:
                self._counted["backwards"] += gradients.backwards - before
                return self._accumulated(batch, passes)
            if self._pending == "weighted":
                self._check_between(batch, level)
                info = Info(self._search.last.clone(), self.names)
                head_weights = self._head_weights(batch)
            else:
                info, head_weights = self._searched(batch, level)
                info.passes = passes
        except NonFiniteError as error:
            self._forget_pending()
            return self._refuse(batch, str(error), scaled=True)
        except BaseException:
            self._forget_pending()
            raise
        self._forget_pending()
        self._counted["backwards"] += gradients.backwards - before
        return self._deliver(batch, level, head_weights), info

    def _take_weighted(self, batch: Batch, level: GradientLevel) -> None:
        """Between two searches: one backward of the weighted losses into the joint row."""
        level.gradients.weighted(
            batch.values,
            self._last_weights(),
            row=level.joint,
            seed=batch.seed,
            divides=self._divides(batch),
            retain=batch.keeps_graph,
        )

    def _check_between(self, batch: Batch, level: GradientLevel) -> None:
        """Refuse a step between two searches that is not finite, if anybody looks."""
        if self._looks_at(batch):
            if not level.finite(level.joint):
                raise NonFiniteError("the gradient of the weighted losses is not finite")
            if batch.seed is not None and not bool(level.finite_heads()):
                raise NonFiniteError(HEADS_NOT_FINITE)

    def _searched(
        self, batch: Batch, level: GradientLevel
    ) -> tuple[Info, Sequence[float | Tensor] | None]:
        """New weights, or the last ones; the joint row is written with them.

        Returns:
            What is known but for the passes, and what heads' gradients are multiplied by.

        Raises:
            NonFiniteError: a gradient is not finite; nothing has changed.
            SolverError: there are no weights, with `on_failure="raise"`; likewise.
        """
        gradients = level.gradients
        if not any(gradients.ever_reached):
            raise RuntimeError(
                f"no loss reaches {self._shared_name}: they are not what the model computes with"
            )
        active = [i for i, on in enumerate(gradients.reached_shared) if on]
        if (
            self._search.device is None
            and batch.seed is not None
            and not bool(level.finite_heads())
        ):
            raise NonFiniteError(HEADS_NOT_FINITE)
        if active:
            decision = self._decide(batch, level, active)
        else:
            decision = Decision(self._search.last, self._search.joint(active))
            self._search.counts["searches"] += 1
        self._counted["untouched"] += len(batch.tasks) - len(active)
        info = Info(decision.weights, self.names, decision.gram, decision.result, decision.status)
        factors = self._head_weights(batch)
        if decision.poison is not None:
            factors = [a * decision.poison for a in factors or [1.0] * len(decision.weights)]
        return info, factors

    def _decide(self, batch: Batch, level: GradientLevel, active: list[int]) -> Decision:
        """The decision of the search; the joint row is written."""
        try:
            weights = self._weigh(level, active, batch)
        except SolverError as error:
            decision = self._search.hold(error, active)
            level.combine(level.task_rows, decision.joint)
            return decision
        decision = self._search.take(active, weights)
        self._join(level, active, decision.weights)
        return decision

    def _accumulated(self, batch: Batch, passes: str | None) -> tuple[Tensor, Info]:
        """End a call that only adds to the pending gradients."""
        for i, loss in zip(batch.tasks, batch.losses.unbind(), strict=True):
            self._summed[i] = loss + self._summed[i] if i in self._summed else loss
        if batch.unbalanced is not None:
            self._backward_unbalanced(batch)
        info = Info(self._search.last.clone(), self.names, passes=passes)
        return self._weighted_sum(batch), info

    def _end_refused(self, batch: Batch) -> tuple[Tensor, Info]:
        """A later call of an accumulated step that was refused."""
        if not batch.accumulate:
            self._forget_pending()
        skipped = "an earlier call of this accumulated step is not finite"
        return self._weighted_sum(batch), Info(self.weights, self.names, skipped=skipped)

    def _refuse(self, batch: Batch, what: str, *, scaled: bool = False) -> tuple[Tensor, Info]:
        self._forget_pending()
        if batch.accumulate:
            self._pending = "refused"
        return super()._refuse(batch, what, scaled=scaled)

    def _moved(self, batch: Batch) -> list[Tensor]:
        inputs, heads = self._listed(batch)
        trunk: Sequence[Tensor] = inputs
        if self._shared_name == "features":
            trunk = graph_leaves(inputs, ()) if batch.shared is None else batch.shared
        return [p for p in (*trunk, *(p for _, p in heads)) if p.requires_grad]

    def _deliver(
        self, batch: Batch, level: GradientLevel, head_weights: Sequence[float | Tensor] | None
    ) -> Tensor:
        """Write `.grad`; returns the weighted sum of the losses."""
        level.deliver(head_weights, retain=batch.keeps_graph)
        self._counted["backwards"] += level.at_features
        if batch.unbalanced is not None:
            self._backward_unbalanced(batch)
        return self._weighted_sum(batch)

    def _backward_unbalanced(self, batch: Batch) -> None:
        """Add the gradient of the loss beside the balanced ones to `.grad`."""
        assert batch.unbalanced is not None
        torch.autograd.backward(batch.unbalanced, batch.seed, retain_graph=batch.retain_graph)
        self._counted["backwards"] += 1

    def _take_per_task(self, batch: Batch, level: GradientLevel) -> str:
        """Fill the rows; returns how."""
        gradients = level.gradients
        keep = batch.keeps_graph
        at_once = min(self.at_once or AT_ONCE, len(batch.tasks))
        if at_once == 1 or not self._batches(level):
            gradients.per_task(batch.values, seed=batch.seed, retain=keep)
            return "loop"
        if self._batchable is not False:
            try:
                # The graph has to outlive an attempt that may fail.
                retain = keep or (self.passes == "auto" and self._batchable is None)
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
                if self._summed:
                    raise  # the rows of earlier micro-batches may be half written
                gradients.clear()
        gradients.per_task(batch.values, seed=batch.seed, retain=keep)
        return f"loop (batched failed: {self._why_loop})"

    def _batches(self, level: GradientLevel) -> bool:
        """Whether to try a batched backward."""
        return self.passes == "batched" or (self.passes == "auto" and level.device.type != "cpu")

    @abstractmethod
    def _weigh(self, level: GradientLevel, active: list[int], batch: Batch) -> Tensor:
        """The weights (n,) of the active tasks.

        Args:
            level: the rows.
            active: the n tasks that are present and touch what is shared.
            batch: the call.

        Raises:
            NonFiniteError: a gradient is not finite.
            SolverError: there are no weights.
        """

    def _join(self, level: GradientLevel, active: list[int], weights: Tensor) -> None:
        """Write the joint gradient into the joint rows; one pass over the tasks' rows.

        Args:
            weights: (T,) float64 on the CPU; those of tasks not in `active` do not count.
        """
        level.combine(level.task_rows, only(active, weights))

    def _last_weights(self) -> Sequence[float] | Tensor:
        """The weights (T,) of the last search, as `TaskGradients.weighted` takes them: on a device
        that decides they are not read."""
        weights = self._search.last
        return weights if self._search.device is not None else weights.tolist()

    def _divides(self, batch: Batch) -> bool:
        """Whether the heads' own gradients can be had by dividing the last weights out."""
        return True

    def _head_weights(self, batch: Batch) -> Sequence[float | Tensor] | None:
        """What every task's own gradient is multiplied by on its heads; None for 1."""
        return list(self._last_weights()) if self.heads == "weighted" else None

    def _why_on_host(self, n_tasks: int, level: GradientLevel | None) -> str | None:
        """Why a search has to read what the device computes; None where it has not.

        Args:
            n_tasks: T.
            level: of all gradients; None where they are not known yet.
        """
        return f"{type(self).__name__} decides on the host"

    def _refuse_capturable(self, why: str | None) -> None:
        if why is not None:
            raise ValueError(f"capturable must be None or False: {why}")

    def _looks_at(self, batch: Batch) -> bool:
        return not self.capturable and super()._looks_at(batch)

    def _losses(self, batch: Batch) -> dict[int, float]:
        """The losses of the tasks that take part in the step, all calls of an accumulated step
        added up; synchronizes with a device."""
        losses = dict(zip(batch.tasks, batch.losses.tolist(), strict=True))
        for i, loss in self._summed.items():
            losses[i] = losses.get(i, 0.0) + float(loss)
        return losses

    def _positive_losses(self, batch: Batch, why: str) -> dict[int, float]:
        """`_losses`, not below `loss_floor`, or refused if one is not positive."""
        losses, floor = self._losses(batch), self.loss_floor
        if floor is not None:
            return {i: max(loss, floor) for i, loss in losses.items()}
        for i, loss in losses.items():
            if loss <= 0:
                raise ValueError(
                    f"{self._label(i)} must be positive: {why}; got {loss:g}; loss_floor= bounds "
                    "what the method sees"
                )
        return losses

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
        self._given = inputs  # frozen ones included
        inputs = trainable(name, inputs)
        if name == "features" and batch.shared is not None:
            batch.shared = trainable("shared_parameters", batch.shared)
        heads = heads_of(batch, inputs, self.names, len(self.weights))
        old = self._gradient_level
        if old is not None and batch.heads is None:
            # The heads of tasks that are absent now are not in the graph.
            known = [(i, p) for i, p in old.heads if p.requires_grad]
            ids = {id(p) for _, p in known}
            heads = known + [(i, p) for i, p in heads if id(p) not in ids]
        batch.listed = inputs, heads
        return batch.listed

    def _level_for(self, batch: Batch) -> GradientLevel:
        """The level for the tensors of this call: that of the last one if it fits."""
        inputs, heads = self._listed(batch)
        old = self._gradient_level
        if old is None or not old.fits(inputs, heads):
            if self._pending is not None:
                raise ValueError(
                    "the parameters must stay the same in all calls of an accumulated step; call "
                    "backward without accumulate=True before they change"
                )
            at_features = inputs is batch.features or self._shared_name == "features"
            trunk = batch.shared or [] if at_features else None
            listed = [*inputs, *(trunk or ()), *(p for _, p in heads)]
            survey(batch.present, inputs, listed, trunk=trunk)
            new = GradientLevel(inputs, heads, len(self._search.last), at_features=at_features)
            self._take_over(old, new)
            if self._search.device is None:
                new.decide_on_host()
            if old is not None and old.same_heads(heads):
                new.take_known_heads(old.known_heads())
            elif old is None and batch.heads is not None:
                new.take_known_heads(self._known_heads)
            self._heads_given = batch.heads is not None
            self._gradient_level = old = new
        if self._pending is None:
            old.keep_old_grads()
        old.bind(inputs, batch.shared, batch.seed)
        if capturing(old.device):
            kept = self._captured
            kept += [x for x in (old, self._search.device) if all(x is not y for y in kept)]
        return old

    def _take_over(self, old: GradientLevel | None, new: GradientLevel) -> None:
        """Bring state of the rows' size into new level; raises before it changes anything."""
        return None

    def _heads_for_state(self) -> dict[str, Any]:
        """What is known of the heads. Where the graph was walked for them, their order depends on
        what came when, and the next run has to find out for itself."""
        if self._gradient_level is None:
            return copy.deepcopy(self._known_heads)
        return self._gradient_level.known_heads() if self._heads_given else {}

    def _state(self) -> dict[str, Any]:
        return {"heads": self._heads_for_state(), "searched": sorted(self._search.searched)}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._gradient_level = None
        self._known_heads = copy.deepcopy(state["heads"])
        self._search.searched = set(state["searched"])
        self._search.forget_counts()
        self._forget_pending()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold no gradients: the level shows another model's parameters."""
        known = self._heads_for_state()
        return {
            **self.__dict__,
            "_gradient_level": None,
            "_given": [],
            "_captured": [],
            "_known_heads": known,
        }

    def _options(self) -> dict[str, Any]:
        options = {"level": (self.level, "parameters"), "heads": (self.heads, "own")}
        return {k: value for k, (value, default) in options.items() if value != default}

"""MARIGOLD: task weights from losses at displaced parameters, at a cost that T does not change.

Longer than other files because a third of it says what the arguments are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.balancer import Balancer
from ..engine.batch import Batch, Info
from ..engine.compiler import uncompiled
from ..engine.losses import Losses, as_list
from ..engine.per_task import put
from ..engine.survey import trainable
from ..errors import NonFiniteError, SolverError, warn
from ..weightings import Weighting
from .functional import FunctionalClosure
from .info import MarigoldInfo
from .joint import Joint, backward, joint_backward
from .known_vectors import KnownVectors
from .options import DIRECTIONS_A_TASK, GramCriterion, Options
from .perturb import Copies, check_displaceable
from .probe import Point, Probe
from .replay import RandomState, Replay
from .upper_level import UpperLevel, weighting_of

#: What `MARIGOLD.stats` counts beyond the base's.
STATS = ("evaluations", "dropped", "stationary")


@dataclass
class _Reuse:
    """What `update` needs of the step before it."""

    tasks: list[int]
    values: Tensor
    length: float
    copies: Copies | None


class MARIGOLD(Balancer):
    """MARIGOLD: bi-level balancing with zeroth-order estimates; no task gradient is ever needed.

    Source: Feed m Birds with One Scone, arXiv 2603.07389. *The paper's*: balancing is a bi-level
    problem, its upper level a criterion Phi over the task weights lambda, its lower level training
    on the weighted loss; both run coupled, and the upper level is solved by a zeroth-order method.
    *Ours*, because only the abstract and the outline are public: everything below that makes an
    algorithm of it (estimators, step sizes, the rules for lambda, criteria beyond MGDA's).

    With d = sum_i lambda_i grad f_i, the gradient of one backward, and
    Phi = ||sum_i lambda_i grad f_i||^2 / 2 (MGDA's criterion),

        dPhi/dlambda_j = <grad f_j, d> = y_j

    is a derivative of f_j along one direction, the same for all tasks: one forward pass at
    theta + mu d estimates all T of them.

        losses -> backward with lambda_t: .grad -> losses at theta +- mu d -> y -> lambda_{t+1}

    **The step is made with lambda_t; what is found at theta_t gives lambda_{t+1}** (this is the
    coupling, and it is why one backward is enough). The first step has equal weights.

    `.grad` gets the gradient of sum_i w_i f_i, heads included, by one backward; w = lambda unless
    `preference` or `log_losses` says otherwise. It sums to 1, not to T. d is the gradient of this
    backward on `shared_parameters` alone, whatever `.grad` held before.
    With a GradScaler d is a copy without the scale (P more memory), and no evaluation sees the
    scale; a d that is not finite is left to the scaler, counted in `stats["skipped"]`.

    Estimators (`docs/marigold.md` has errors and costs):
        "forward"     (f_j(theta + mu d) - f_j(theta)) / mu: one evaluation of the closure.
        "central"     (f_j(theta + mu d) - f_j(theta - mu d)) / (2 mu): two.
        "reuse"       the training step itself, (f_j(theta_t) - f_j(theta_{t+1})) / eta, from
                      `update(losses_after_step)`: no closure, one forward of the user's. With an
                      optimizer other than SGD it measures along the step that was made; what the
                      heads gain by moving in that step counts, too, as in FAMO.
        "directions"  a Gram matrix from R random directions: unbiased, noisy, of rank <= R.
        "span"        a Gram matrix from directions in the span of known vectors.
    The last two make no use of d: the criterion is solved on the estimated Gram matrix.

    Every evaluation of an estimate sees the same batch, the same random numbers (torch's CPU and
    CUDA generators) and the same module buffers, and leaves generators, buffers and parameters as
    they were, also when the closure raises (`fastmto.marigold`). Dropout draws the same masks
    in the given losses, too, if they are computed inside `recording()`; "forward" and "reuse" need
    that wherever losses are random. "directions" and "span" do not: with difference="forward" they
    evaluate the losses at theta, too, where nothing was recorded.

    Args (None is the default of all that belong to one estimator or criterion; given with another,
    they are refused):
        n_tasks: T; None: found at the first backward.
        criterion: "mgda"; with "directions" or "span" also "bargaining", "imtl_g", "cagrad",
            "fairgrad", or any callable Gram (n, n) -> weights (n,), such as a
            `fastmto.weightings` instance. "famo": FAMO as a special case, which is the estimator
            "reuse" on log f with FAMO's own step of the logits.
        estimator: see above.
        update_every: steps between two estimates, N >= 1; `update_weights_every` is the same.
        lambda_update: "mirror" (the default; logits -= beta EMA(y)/L_hat, lambda their softmax) or
            "projected" (lambda <- Proj(lambda - beta y/L_hat)); for "mgda" with d-based
            estimators, like `beta` and `lambda_step`.
        beta: None: 2 for mirror, 1 for projected.
        lambda_step: a step in place of beta/L_hat.
        ema: factor of the moving average, of y (None: 0.9 for mirror, 0 for projected), or of the
            estimated Gram matrices ("directions", "span"; None: 0).
        relative_step: h/||theta||, h = mu ||v||; None: by the table in
            `fastmto.marigold.estimators`, for the precision of the forward pass. Where all
            parameters are 0, h itself.
        mu: mu itself, in place of `relative_step`.
        forward_dtype: the precision of the forward pass; None: that of the narrowest tensor
            in the graph of the first losses, so that autocast is seen.
        step_size: eta for "reuse", e.g. SGD's learning rate. None: measured, as the length of the
            actual step over ||d||, from a copy of the shared parameters.
        n_directions: R for "directions", None: 4 T; the vectors kept for span="steps", None: T.
        distribution: of the directions: "gaussian" (the default), "rademacher" or "sphere" (of
            radius sqrt(P)).
        difference: for "directions" and "span": "forward" (the default), R evaluations and,
            unless the losses were computed inside `recording()`, one at theta; or "central", 2 R.
        seed: of the directions, 0 <= seed < 2^31, None: 0; they are regenerated from it, never
            stored.
        span: what the known vectors are: "gradients" (the default), the tasks' gradients at the
            last refresh (T backwards then; T vectors are kept), or "steps", the last
            `n_directions` joint gradients (as many vectors are kept; no extra backward).
        span_refresh: estimates between two refreshes of the gradients; None: 100.
        preference: T numbers > 0, relative. d then is MGDA's for the losses f_i / p_i: at the
            optimum all tasks with weight descend at rates proportional to p_i. With
            "bargaining" the bargaining powers; not for "famo" nor for callables.
        log_losses: balance log(f_i - min_i) in place of f_i.
        min_losses: T numbers min_i below all losses, for `log_losses` and "famo"; None: 0.
        famo_lr, famo_gamma: learning rate and weight decay of FAMO's logits; None: 0.025, 0.01.
        evaluation: "sequential" (the default), one row of displaced parameters at a time
            (memory P), or "batched", all rows in one forward by `torch.func.vmap` (memory R P or
            2 P), which needs a `fastmto.FunctionalClosure`. One is never silently changed for the
            other.
        debug: evaluate once more in every estimate, at a known point; a closure that does not
            give the same losses is refused.
        on_failure: "hold" (the default) or "raise", when the criterion finds no weights for an
            estimated Gram.
        on_nonfinite: as `Balancer`. A displaced loss or a d that is not finite never
            stops a step: the estimate is dropped and counted, lambda keeps its value.

    Attributes:
        options: the settings as they came out.
        last_derivatives: y (n,) of the last estimate along d; None before.
        lambda_: (T,) float64, the simplex weights that the next step is made with.
        weights: (T,) what the losses were multiplied by in the last step.
        stats: beyond `Balancer`'s: evaluations of the closure, dropped estimates, stationary
            points (d = 0, where y = 0 for all tasks and lambda stays).

    Raises:
        ValueError: an argument out of range, one that contradicts another, or one that the
            estimator and the criterion make no use of.
    """

    key = "marigold"

    def __init__(
        self,
        n_tasks: int | None = None,
        *,
        criterion: str | GramCriterion = "mgda",
        estimator: str | None = None,
        update_every: int | None = None,
        lambda_update: str | None = None,
        beta: float | None = None,
        lambda_step: float | None = None,
        ema: float | None = None,
        relative_step: float | None = None,
        mu: float | None = None,
        forward_dtype: torch.dtype | None = None,
        step_size: float | None = None,
        n_directions: int | None = None,
        distribution: str | None = None,
        difference: str | None = None,
        seed: int | None = None,
        span: str | None = None,
        span_refresh: int | None = None,
        preference: Sequence[float] | None = None,
        log_losses: bool = False,
        min_losses: Sequence[float] | None = None,
        famo_lr: float | None = None,
        famo_gamma: float | None = None,
        evaluation: str | None = None,
        debug: bool = False,
        on_failure: str | None = None,
        update_weights_every: int | None = None,
        on_nonfinite: str | None = None,
    ) -> None:
        if None not in (update_every, update_weights_every) and (
            update_every != update_weights_every
        ):
            raise ValueError(
                "update_every and update_weights_every are the same thing, got "
                f"{update_every!r} and {update_weights_every!r}"
            )
        every = update_weights_every if update_every is None else update_every
        self.options = Options.given(
            criterion,
            estimator=estimator,
            lambda_update=lambda_update,
            beta=beta,
            lambda_step=lambda_step,
            ema=ema,
            relative_step=relative_step,
            mu=mu,
            forward_dtype=forward_dtype,
            step_size=step_size,
            n_directions=n_directions,
            distribution=distribution,
            difference=difference,
            seed=seed,
            span=span,
            span_refresh=span_refresh,
            preference=preference,
            log_losses=log_losses,
            min_losses=min_losses,
            famo_lr=famo_lr,
            famo_gamma=famo_gamma,
            evaluation=evaluation,
            debug=debug,
            on_failure=on_failure,
        )
        self._weighting = weighting_of(self.options)
        super().__init__(
            self.options.n_tasks(n_tasks),
            update_weights_every=1 if every is None else every,
            on_nonfinite=on_nonfinite,
        )

    @property
    def estimator(self) -> str:
        """The name of the estimator."""
        assert self.options.estimator is not None
        return self.options.estimator

    @property
    def update_every(self) -> int:
        """Steps between two estimates."""
        return self.update_weights_every

    @property
    def needs_update(self) -> bool:
        return self.estimator == "reuse"

    def reset(self) -> None:
        self._probe = Probe(self.options)
        self._recorded: RandomState | None = None
        self._reuse: _Reuse | None = None
        self.last_derivatives: Tensor | None = None
        if isinstance(self._weighting, Weighting):
            self._weighting.reset()
        super().reset()
        self._counted.update(dict.fromkeys(STATS, 0))

    def _set_tasks(self, n_tasks: int) -> None:
        super()._set_tasks(n_tasks)
        self.options.n_tasks(n_tasks)
        self._upper = UpperLevel(n_tasks, self.options, self._weighting)
        self.weights = self._upper.lambda_.clone()
        self._estimates = 0  # estimates begun: they number the random directions
        self._known = KnownVectors()
        self._refreshed = 0  # the estimate that last took the tasks' gradients

    @property
    def lambda_(self) -> Tensor:
        """(T,) float64, the weights that the next step is made with."""
        if self.weights is None:
            raise RuntimeError("lambda_ needs the number of tasks: give n_tasks, or call backward")
        return self._upper.lambda_

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Around the computation of the losses: the evaluations of this step start from the same
        random numbers, and so draw the same dropout masks.

            with balancer.recording():
                losses = task_losses(model, batch)
        """
        self._recorded = RandomState()
        yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Around the computation of the losses for `update`: the random numbers of `recording`,
        afterwards those and all module buffers as before; no graph is built.

        Raises:
            RuntimeError: nothing was recorded for this step.
        """
        if self._recorded is None:
            raise RuntimeError("replaying() needs recording() around the losses of this step")
        replay = Replay(self._recorded)
        try:
            replay.begin()
            with torch.no_grad():
                yield
        finally:
            replay.end()

    def _backward(self, batch: Batch, searches: bool) -> tuple[Tensor, Info]:
        self._check(batch)
        if self._reuse is not None:
            self._reuse = None
            self._counted["held"] += 1
            warn(
                "MARIGOLD found no update(losses) since its last search: with estimator='reuse' "
                "its weights cannot change without; call it after the optimizer's step "
                "(stats['held'])"
            )
        losses = batch.losses
        # Reading the losses waits for the device: not between two estimates.
        reads = searches or self.options.log_losses
        values = losses.to("cpu", torch.float64) if reads else torch.empty(0)
        own = self._upper.loss_weights(batch.tasks, values, self._label)
        weights = own.to(losses.device, losses.dtype, non_blocking=True)
        joint = self._joint_gradient(batch, weights, searches)
        assert self.weights is not None
        if batch.seed is not None and joint is not None and not math.isfinite(joint.length):
            self._recorded = None
            loss, told = self._refuse(batch, "the gradient is not finite", scaled=True)
            return loss, MarigoldInfo(self.weights, self.names, skipped=told.skipped)
        self.weights = put(self.weights, batch.tasks, own.clone())
        info = MarigoldInfo(self.weights, self.names)
        info.estimator = self.estimator
        if searches:
            self._search(batch, values, joint, info)
        if batch.unbalanced is not None:
            # Last: the direction of the search may be `.grad` itself.
            backward(
                [batch.unbalanced],
                torch.ones(1, dtype=batch.unbalanced.dtype, device=batch.unbalanced.device),
                batch.seed,
                retain=batch.retain_graph,
            )
            self._counted["backwards"] += 1
        info.next_lambda = self._upper.lambda_
        if self._reuse is None:
            self._recorded = None
        return (weights * losses).sum(), info  # a product that autocast leaves alone

    def _check(self, batch: Batch) -> None:
        """Refuse a call that the estimator cannot work with, before anything is written."""
        needs_shared = not self.options.famo
        if batch.shared is None and needs_shared:
            raise ValueError(
                "shared_parameters must be given to MARIGOLD.backward with "
                f"estimator={self.estimator!r}"
            )
        if batch.accumulate:
            raise ValueError(
                "accumulate must be False for MARIGOLD, which evaluates losses: call backward for "
                "every micro-batch, .grad adds up"
            )
        if batch.shared is not None:
            copies = self._probe.copies
            fit = copies is not None and copies.fit(batch.shared)
            if not fit:
                batch.shared = trainable("shared_parameters", batch.shared)
                check_displaceable(batch.shared)
                fit = copies is not None and copies.fit(batch.shared)
            if copies is not None and fit:
                batch.shared = copies.parameters
        if batch.closure is None and self.estimator != "reuse":
            raise ValueError(
                "closure must be given to MARIGOLD.backward with "
                f"estimator={self.estimator!r}: it recomputes the losses on the same batch"
            )
        if self.options.evaluation == "batched" and not isinstance(
            batch.closure, FunctionalClosure
        ):
            raise ValueError(
                "closure must be a fastmto.FunctionalClosure with evaluation='batched', got "
                f"{type(batch.closure).__name__}"
            )

    def _joint_gradient(self, batch: Batch, weights: Tensor, searches: bool) -> Joint | None:
        """The backward of the step; its gradient where an estimate needs it."""
        shared = batch.shared
        if searches and self.estimator == "span":
            assert shared is not None
            self._known.bind(shared)
            old = self._estimates - self._refreshed >= self.options.span_refresh
            if self.options.span == "gradients" and (len(self._known) == 0 or old):
                self._known.take_gradients(
                    batch.present, batch.tasks, len(self._upper.lambda_), shared
                )
                self._counted["backwards"] += len(batch.tasks)
                self._refreshed = self._estimates
        self._counted["backwards"] += 1
        if searches and shared is not None:
            keep = batch.keeps_graph
            return joint_backward(batch.present, weights, shared, batch.seed, retain=keep)
        backward(batch.present, weights, batch.seed, retain=batch.keeps_graph)
        return None

    def _search(
        self, batch: Batch, values: Tensor, joint: Joint | None, info: MarigoldInfo
    ) -> None:
        """Estimate, then move lambda; for "reuse", remember what `update` will need."""
        self._counted["searches"] += 1
        self._estimates += 1
        length = 1.0 if joint is None else joint.length
        if not math.isfinite(length):
            self._drop("the gradient is not finite", info)
        elif self.estimator == "reuse":
            copies = None
            if not self.options.famo and self.options.step_size is None:
                assert batch.shared is not None
                copies = self._probe.copies_for(batch.shared, 1)
                copies.take(0)
            start = self._upper.transformed(batch.tasks, values)
            self._reuse = _Reuse(batch.tasks, start, length, copies)
        elif length == 0 and not self.options.by_gram:
            self._counted["stationary"] += 1
            self._found = True
        else:
            assert joint is not None
            self._estimate(batch, self._point(batch, values), joint, info)

    def _point(self, batch: Batch, values: Tensor) -> Point:
        tasks, shared, closure = batch.tasks, batch.shared, batch.closure
        assert shared is not None
        assert closure is not None
        return Point(
            batch.present,
            values,
            shared,
            closure,
            read=lambda losses: self._read(losses, tasks, "closure's losses"),
            transform=lambda losses: self._upper.transformed(tasks, losses),
            label=lambda k: self._label(tasks[k]),
            start=self._recorded,
        )

    def _estimate(self, batch: Batch, point: Point, joint: Joint, info: MarigoldInfo) -> None:
        """Evaluate the closure at displaced parameters, and move lambda by what it gives."""
        probe, options, n_tasks = self._probe, self.options, len(self._upper.lambda_)
        try:
            if self.estimator == "directions":
                count = options.n_directions or DIRECTIONS_A_TASK * n_tasks
                found = probe.random_gram(point, (self._estimates - 1) * count, count)
            elif self.estimator == "span":
                if options.span == "steps":
                    most = options.n_directions or n_tasks
                    self._known.append(joint.direction, point.shared, most)
                found = probe.span_gram(point, self._known)
            else:
                found = probe.along(point, joint)
        finally:
            self._counted["evaluations"] += probe.count
        info.evaluation, info.evaluations = options.evaluation, probe.count
        info.step = probe.step
        if not math.isfinite(float(found.abs().max())):
            self._drop("a displaced loss is not finite", info)
        elif options.by_gram:
            self._solve(found, batch.tasks, info)
        else:
            info.derivatives = found
            self._move(found, joint.length**2, batch.tasks)

    def _drop(self, why: str, info: MarigoldInfo | None) -> None:
        self._counted["dropped"] += 1
        if info is not None:
            info.dropped = why
        warn(f"estimate dropped: {why}; lambda keeps its value (stats['dropped'])")

    def _move(self, y: Tensor, squared: float, tasks: list[int]) -> None:
        """lambda by the derivatives y (n,)."""
        self._upper.move(y, squared, tasks)
        self._found = True
        self.last_derivatives = y

    def _solve(self, gram: Tensor, tasks: list[int], info: MarigoldInfo) -> None:
        """lambda where the criterion says for the Gram matrix, averaged with earlier ones."""
        info.gram = self._upper.average(gram, tasks)
        try:
            self._upper.solve(info.gram, tasks)
        except SolverError as error:
            if self.options.on_failure == "raise":
                raise
            self._counted["held"] += 1
            info.answer(status=error.status)
            warn(f"weights held: {error.status}; the last ones stay (stats['held'])")
            return
        info.answer(getattr(self._weighting, "result", None))
        self._found = True

    @uncompiled
    def update(self, losses: Losses) -> None:
        """Take the losses after the optimizer's step on the same batch, for estimator="reuse".

        Does nothing after a step that made no estimate or was skipped, and with the other
        estimators: a loop that calls it works with all of them.

        Args:
            losses: as in `backward`; graphs are not needed. Compute them inside `replaying()`
                where losses are random or running statistics must not move. Tasks of the step
                before must all be there.

        Raises:
            RuntimeError: there was no backward yet.
            ValueError: wrong losses.
            NonFiniteError: a loss is not finite, with `on_nonfinite="raise"`.
        """
        if self.weights is None or self._estimates == 0:
            raise RuntimeError("update(losses) must come after backward(losses), got no backward")
        if self._reuse is None:
            return
        before, self._reuse, self._recorded = self._reuse, None, None
        values = self._read(losses, before.tasks, "losses").to("cpu", torch.float64)
        if self.on_nonfinite == "raise" and not bool(values.isfinite().all()):
            raise NonFiniteError("update: a loss is not finite; lambda keeps its value")
        if before.length == 0:
            self._counted["stationary"] += 1
            self._found = True
            return
        change = before.values - self._upper.transformed(before.tasks, values)
        eta = 1.0 if self.options.famo else self.options.step_size
        if eta is None:
            assert before.copies is not None
            eta = before.copies.distance(0) / before.length
        if eta == 0:
            self._drop("the optimizer's step moved no shared parameter", None)
        elif not bool(change.isfinite().all()):
            self._drop("a loss after the step is not finite", None)
        else:
            self._move(change / eta, before.length**2, before.tasks)

    def _read(self, returned: Losses, tasks: list[int], what: str) -> Tensor:
        """(n,) of the present tasks from what a closure returned."""
        assert self.weights is not None
        n_tasks = len(self.weights)
        if isinstance(returned, Tensor) and returned.shape == (n_tasks,):
            picked = returned if len(tasks) == n_tasks else returned[tasks]
            return picked.detach()
        try:
            values, _ = as_list(returned, n_tasks, self.names, attached=False)
        except ValueError as error:
            raise ValueError(f"{what} must be like those given to backward: {error}") from error
        found = [values[i] for i in tasks]
        missing = [self._label(i) for i, value in zip(tasks, found, strict=True) if value is None]
        if missing:
            raise ValueError(
                f"{what} must hold the tasks given to backward, but {', '.join(missing)} is None"
            )
        with torch.no_grad():
            return torch.stack(
                [x if x.dim() == 0 else x.reshape(()) for x in found if x is not None]
            )

    def _state(self) -> dict[str, Any]:
        return {
            **self._upper.state_dict(),
            "estimates": self._estimates,
            "refreshed": self._refreshed,
            "known": self._known.state_dict(),
            "precision": self._probe.precision,
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self._upper.load_state_dict(state)
        self._estimates = state["estimates"]
        self._refreshed = state["refreshed"]
        self._known.load_state_dict(state["known"])
        self._probe.precision = state["precision"]
        self._reuse = None
        self._recorded = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold no buffers: they belong to another model's parameters."""
        probe = Probe(self.options)
        probe.precision = self._probe.precision
        return {**self.__dict__, "_probe": probe, "_reuse": None, "_recorded": None}

    def _options(self) -> dict[str, Any]:
        names = ["criterion", "estimator", "lambda_update", "evaluation"]
        if self.estimator == "directions":
            names += ["n_directions", "distribution"]
        return {name: getattr(self.options, name) for name in names}

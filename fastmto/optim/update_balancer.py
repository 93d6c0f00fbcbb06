"""The update-level optimizer: losses -> gradients -> Gram matrix -> weights -> parameters.

`UpdateBalancer` is the chain; `PUB` and `AdaTask` are configurations of it. Its step is `_step`.
More than 400 lines for one class: half of them are the arguments, properties and docstrings of
torch's optimizer protocol; memory, gradients, search, clipping and checkpoints have files of their
own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, check_scaler
from ..engine.caches import forget_weight_copies
from ..engine.compiler import tell_compiler, uncompiled
from ..engine.gradients import TaskGradients
from ..engine.graph import leaves
from ..engine.losses import Losses, as_list, first_nonfinite, what_is_wrong
from ..engine.search import SCALES, Search
from ..engine.survey import survey
from ..errors import NonFiniteError, warn
from ..ops.device import capturing
from ..ops.rules import Clippy, Rule, as_rule
from ..solvers import Result
from ..weightings import DeviceSolver, Weighting, as_weighting
from . import state
from .clipping import Clipping
from .group_rules import GroupRules
from .groups import Parameters, TaskParameters, check_lr, more_heads, param_groups
from .pending import Pending
from .update_level import UpdateLevel

GramWeighting = Weighting | Callable[[Tensor], Tensor]

STATS = ("steps", "searches", "backwards", "held", "capped", "skipped", "absent", "untouched")


class UpdateBalancer(torch.optim.Optimizer):
    """Base of the optimizers that balance per-task *updates* of the shared parameters.

    One step, after T backward passes (`rules` defines u_i, `ops` the passes over memory):

        gram_ij = <u_i, u_j>            every `update_weights_every` steps
        a       = weighting(gram), scaled, bounded
        theta  <- (1 - lr wd) theta - lr sum_i a_i u_i
        moments take one step of the rule on sum_i a_i g_i

    Arguments are those of `PUB`; `weighting=None` keeps all weights at 1.

    There is one flow, and two ways to decide in it. Where the host decides (on CPUs), it reads
    whether the gradients are finite and what the solver found. Where the step is `capturable`,
    these decisions are tensors on the device, which the ops that follow look at.

    The objects that change from step to step (`_level`, `_search`, `_pending`, `_counted`) are
    never replaced: wrappers that copy the attributes of an optimizer, as Lightning's do, share
    them.
    """

    #: Makes a GradScaler leave the unscaling to `step`: it sees the heads' gradients only.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        shared_parameters: Parameters,
        task_parameters: TaskParameters,
        lr: float = 1e-3,
        *,
        rule: str | Rule = "adam",
        weight_decay: float = 0.0,
        weighting: str | GramWeighting | None = "bargaining",
        update_weights_every: int = 10,
        scale: str = "mean_norm",
        max_weight: float | None = 10.0,
        between: str | None = None,
        clippy: bool | Clippy = False,
        adatask: bool = False,
        delayed: bool = False,
        clip_norm: float | None = None,
        clip_task_norm: float | None = None,
        warmup_steps: int = 0,
        on_failure: str = "hold",
        on_nonfinite: str = "skip",
        capturable: bool | None = None,
    ) -> None:
        tell_compiler()
        groups, n_tasks, names = param_groups(shared_parameters, task_parameters)
        clipping = Clipping(clip_norm, clip_task_norm)
        needs_tasks = adatask or clip_task_norm is not None
        between = between or ("per_task" if needs_tasks else "weighted")
        check_choice("scale", scale, SCALES)
        check_choice("between", between, ("weighted", "per_task"))
        check_choice("on_failure", on_failure, ("hold", "raise"))
        check_choice("on_nonfinite", on_nonfinite, ("skip", "raise"))
        if needs_tasks and between == "weighted":
            why = "adatask" if adatask else "clip_task_norm"
            raise ValueError(
                f"between must be 'per_task' with {why}, which needs every task's gradient at "
                "every step; got 'weighted'"
            )
        for name, value, least in (
            ("update_weights_every", update_weights_every, 1),
            ("warmup_steps", warmup_steps, 0),
        ):
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        if max_weight is not None and not (isinstance(max_weight, int | float) and max_weight > 0):
            raise ValueError(f"max_weight must be positive or None, got {max_weight!r}")
        for name, flag in (("adatask", adatask), ("delayed", delayed)):
            if not isinstance(flag, bool):
                raise ValueError(f"{name} must be True or False, got {flag!r}")
        if not isinstance(clippy, bool | Clippy):
            raise ValueError(f"clippy must be True, False or a Clippy, got {clippy!r}")
        if capturable is not None and not isinstance(capturable, bool):
            raise ValueError(f"capturable must be None, True or False, got {capturable!r}")
        self._settings: dict[str, Any] = {
            "weighting": None if weighting is None else as_weighting(weighting),
            "update_weights_every": update_weights_every,
            "scale": scale,
            "max_weight": max_weight,
            "between": between,
            "clippy": Clippy() if clippy is True else clippy or None,
            "adatask": adatask,
            "delayed": delayed,
            "clip_norm": clip_norm,
            "clip_task_norm": clip_task_norm,
            "warmup_steps": warmup_steps,
            "on_failure": on_failure,
            "on_nonfinite": on_nonfinite,
            "capturable": capturable,
        }
        self._rule = as_rule(rule)
        check_lr(lr, weight_decay)
        defaults = {"lr": lr, "weight_decay": weight_decay, **self._rule.hyperparameters()}
        super().__init__(groups, defaults)
        self._build(n_tasks, names, clipping)

    def _build(self, n_tasks: int | None, names: list[str] | None, clipping: Clipping) -> None:
        """Lay out stores and state for the param groups as they stand, at step 0."""
        settings = self._settings
        self._clipping = clipping
        self._rules = GroupRules(self._rule)
        self._level = UpdateLevel(
            self.param_groups, self._rules, settings["clippy"], settings["adatask"]
        )
        self._search = Search(
            settings["weighting"],
            every=settings["update_weights_every"],
            on_failure=settings["on_failure"],
            scale=settings["scale"],
            max_weight=settings["max_weight"],
        )
        self._pending = Pending()
        self._counted: dict[str, int] = dict.fromkeys(STATS, 0)
        #: What is known of the tasks, in one object: wrappers share it.
        self._known: dict[str, Any] = {"names": names, "capturable": None, "first": 0}
        if n_tasks is not None:
            self._set_tasks(n_tasks)

    def _set_tasks(self, n_tasks: int) -> TaskGradients:
        """Allocate what depends on T: gradients, moments, weights."""
        capturable, solver = self._decider(n_tasks)
        search, level = self._search, self._level
        if not capturable:
            level.decide_on_host()
        gradients = level.allocate(n_tasks)
        search.weights = torch.ones(n_tasks, dtype=torch.float64, device="cpu")
        search.place(level.shared_dtypes, numel=level.numel, solver=solver)
        search.decide_on(level.device if capturable else None)
        self._known["capturable"] = capturable
        self._bind_state()
        return gradients

    def _bind_state(self) -> None:
        """Show every parameter's piece of the moments in `self.state`, torch's way."""
        for p, moments in self._level.moments().items():
            self.state[p].update(moments)

    def _decider(self, n_tasks: int) -> tuple[bool, DeviceSolver | None]:
        """Whether no step reads what the device computes, and what finds the weights there.

        Raises:
            ValueError: none should, and one has to.
        """
        given: bool | None = self._settings["capturable"]
        if given is False or (given is None and self._level.device.type == "cpu"):
            return False, None
        weighting = self.weighting
        solver = None if weighting is None else weighting.device_solver(n_tasks)
        half = torch.float16 in self._level.dtypes
        obstacles = {
            f"weighting {weighting!r} of {n_tasks} tasks is found on the host": (
                weighting is not None and solver is None
            ),
            "on_failure='raise' has to look": (
                weighting is not None and self._settings["on_failure"] == "raise"
            ),
            "on_nonfinite='raise' has to look": self._settings["on_nonfinite"] == "raise",
            "float16 parameters with between='weighted' need weights that can be looked at": (
                half and self._settings["between"] == "weighted" and weighting is not None
            ),
        }
        found = [what for what, stands in obstacles.items() if stands]
        if found and given:
            raise ValueError(f"capturable must be None or False here: {found[0]}")
        return (False, None) if found else (True, solver)

    # What users read.

    @property
    def n_tasks(self) -> int | None:
        """T; None before the first backward where `task_parameters` was one flat iterable."""
        return None if self._search.weights is None else len(self._search.weights)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self._level.device

    @property
    def capturable(self) -> bool | None:
        """Whether no step reads what the device computes; None until T is known."""
        capturable: bool | None = self._known["capturable"]
        return capturable

    @property
    def gradients(self) -> TaskGradients | None:
        """The gradients between `backward` and `step`; None until T is known."""
        return self._level.gradients

    @property
    def weights(self) -> Tensor | None:
        """Last task weights (T,), float64 on the CPU; None until T is known. Synchronizes with a
        device."""
        return self._search.on_host()

    @property
    def gram(self) -> Tensor | None:
        """Gram matrix (n, n) of the last search, over the n tasks that took part; float64, CPU.
        Synchronizes with a device."""
        return None if self._search.gram is None else self._search.gram.cpu()

    @property
    def result(self) -> Result[Tensor] | None:
        """How the last solve ended, with weights before `scale`; None if no solver was called.
        Synchronizes with a device."""
        return self._search.result

    @property
    def stats(self) -> dict[str, int]:
        """Counts of what happened, the unusual above all; see `PUB`. Synchronizes with a device."""
        counted = dict(self._counted)
        for name, more in self._search.counted.items():
            counted[name] += more
        if self.capturable:
            counted["steps"] += int(self._level.clock.tally[0])
            counted["skipped"] += int(self._level.clock.tally[1])
        return counted

    @property
    def weighting(self) -> Weighting | None:
        """What turns Gram matrices into weights; `weighting.result` has the last solve's
        diagnostics."""
        return self._search.weighting

    # The step.

    @uncompiled
    def backward(
        self,
        losses: Losses,
        *,
        unbalanced: Tensor | None = None,
        scaler: torch.amp.GradScaler | None = None,
        retain_graph: bool = False,
    ) -> None:
        """Compute the gradients of a step; takes the place of `loss.backward()`.

        T backward passes on a step that searches weights (and on every step with
        `between="per_task"`), one of sum_i a_i L_i otherwise. Called again before `step`, it
        adds its gradients to the first call's.

        Args:
            losses: T scalars: a tensor (T,), a list, a tuple or a dict of named tasks. None, or
                a name left out of the dict, is a task absent from this batch: its head, its
                weight and its own moments are unchanged.
            unbalanced: a scalar loss beside the tasks', such as a regularizer. Its gradient joins
                the tasks' with weight 1: its update is added to the joint update, its gradient to
                that of the moments and of the heads. It takes no part in the search. One backward
                pass more; not with `adatask`, whose moments are all some task's.
            scaler: multiplies the gradients of these backward passes by its scale, on the way;
                the losses come as they are. `scaler.step(optimizer)` then divides it out again,
                once, and `scaler.update()` learns of gradients that were not finite.
            retain_graph: keep the graph for another backward.

        Raises:
            ValueError: the wrong number of losses, a loss that is no scalar or not attached to
                a graph, a task-specific parameter that several tasks use, two scalers in a step.
            RuntimeError: no loss reaches the shared parameters, a sparse gradient, a parameter
                that was moved after construction, a `.grad` that another backward wrote.
            NonFiniteError: a loss is NaN or infinite, with `on_nonfinite="raise"`; with "skip"
                the step is skipped and counted.
        """
        values, names = as_list(losses, self.n_tasks, self._known["names"])
        wrong = None if unbalanced is None else what_is_wrong(unbalanced, attached=True)
        if wrong is not None:
            raise ValueError(f"unbalanced {wrong}")
        scaler = check_scaler(scaler)
        level, pending = self._level, self._pending
        if pending.kind is not None and scaler is not pending.scaler:
            raise ValueError("scaler must be the same in all backward calls of a step")
        seed = self._seed(scaler)
        level.check()
        pending.check_untouched(level)
        gradients = level.gradients or self._set_tasks(len(values))
        self._known["names"] = names
        if not self.capturable and capturing(self._level.device):
            raise RuntimeError(
                f"a step of this {type(self).__name__} cannot be captured: capturable is False"
            )
        if pending.kind == "refused":
            return
        if pending.kind is None:
            gradients.clear()
            level.refreeze()
            pending.begin("per_task" if self._takes_tasks(values) else "weighted", scaler)
        try:
            self._take(values, unbalanced, seed, retain_graph)
        except BaseException:
            pending.clear()
            raise

    def _take(
        self,
        values: list[Tensor | None],
        unbalanced: Tensor | None,
        seed: Tensor | None,
        retain_graph: bool,
    ) -> None:
        """The backward passes, and what they left in `.grad`."""
        level, pending = self._level, self._pending
        if self._refuses(values, unbalanced):
            return
        if unbalanced is not None and pending.kind == "per_task":
            self._make_room_for_unbalanced()
        gradients = level.gradients
        assert gradients is not None
        n_tasks, before = len(values), gradients.backwards
        if pending.kind == "per_task":
            gradients.per_task(values, seed=seed, retain=retain_graph or unbalanced is not None)
            if unbalanced is not None:
                gradients.extra(unbalanced, row=n_tasks, seed=seed, retain=retain_graph)
                pending.extra = True
        else:
            weights = self._search.last
            gradients.weighted(
                values,
                weights if self.capturable else weights.tolist(),
                seed=seed,
                divides=self._divides(pending.scaler),
                retain=retain_graph or unbalanced is not None,
            )
            if unbalanced is not None:
                gradients.extra(unbalanced, row=0, seed=seed, retain=retain_graph)
        self._counted["backwards"] += gradients.backwards - before
        if not any(gradients.ever_reached):
            raise RuntimeError(
                "no loss reaches the shared parameters: they are not what the model computes with"
            )
        if self._search.steps == 0:
            self._survey(values)
        if not any(gradients.reached_shared):
            self._check_replaced(values)
            warn("no task of this step reaches the shared parameters (stats['untouched'])")
        pending.show(level)

    def _refuses(self, values: list[Tensor | None], unbalanced: Tensor | None) -> bool:
        """Whether a loss is not finite, where the host looks: reading losses would stall an
        accelerator, where the gradients tell, in `step`."""
        if self.capturable or self._level.device.type != "cpu":
            return False
        bad = first_nonfinite([*values, unbalanced])
        if bad is None:
            return False
        self._pending.kind = "refused"
        self._refuse(f"{'unbalanced' if bad == len(values) else f'losses[{bad}]'} is not finite")
        return True

    def _survey(self, values: list[Tensor | None]) -> None:
        """At the first step: what the graph says of the parameters that were listed."""
        level, gradients = self._level, self._level.gradients
        assert gradients is not None
        shared = [p for store in level.shared for p in store.flat.parameters]
        missed = [
            k
            for k, (p, on) in enumerate(zip(shared, gradients.ever_reached, strict=True))
            if p.requires_grad and not on
        ]
        if missed:
            warn(
                f"no task of the first step reaches shared_parameters {missed}: unused, or hidden "
                "by a checkpoint (which needs use_reentrant=False); their gradient is zero"
            )
        trained = [p for p in shared if p.requires_grad]
        heads = [p for store in level.heads for p in store.flat.parameters]
        present = [loss for loss in values if loss is not None]
        survey(present, trained, [*shared, *heads], heads_name="task_parameters")

    def _check_replaced(self, values: list[Tensor | None]) -> None:
        """Refuse losses that are computed from other parameters in the place of the shared ones."""
        level = self._level
        listed = {id(p) for p in level.parameters}
        present = [loss for loss in values if loss is not None]
        strangers = {tuple(p.shape) for p in leaves(present, ()) if id(p) not in listed}
        shapes = {tuple(p.shape) for store in level.shared for p in store.flat.parameters}
        if strangers & shapes:
            raise RuntimeError(
                "no loss reaches the shared parameters, but others of the same shapes: the model's "
                "parameters were replaced (load_state_dict(..., assign=True), a new layer). Load "
                "in place, or build the optimizer after they are"
            )

    def _make_room_for_unbalanced(self) -> None:
        """A row of gradients beyond T, from the first unbalanced loss on."""
        level = self._level
        assert level.gradients is not None
        if self._settings["adatask"]:
            raise ValueError(
                "unbalanced must be None with adatask: every gradient needs a task's moments; make "
                "the loss a part of the tasks' losses"
            )
        if len(level.gradients.rows[0]) == self.n_tasks:
            self._pending.forget_shown(level)
            level.allocate(self.n_tasks, spare=1)
            self._bind_state()

    def _seed(self, scaler: torch.amp.GradScaler | None) -> Tensor | None:
        """A GradScaler's scale, on the device."""
        if scaler is None:
            return None
        if torch.float16 in self._level.dtypes:
            raise ValueError(
                "scaler must be None with float16 parameters, whose gradients a GradScaler does "
                "not unscale: keep float32 parameters and use autocast"
            )
        scale: Tensor = scaler.scale(torch.ones((), device=self._level.device))
        return scale

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of `backward`, as torch's optimizers do."""
        self._pending.clear()
        if self._level.gradients is not None:
            self._level.gradients.clear()
        super().zero_grad(set_to_none)
        self._pending.remember()

    def _takes_tasks(self, values: Sequence[Tensor | None] | None = None) -> bool:
        """Whether the coming step takes every task's gradient."""
        return self._settings["between"] == "per_task" or self._searches(values)

    def _searches(self, values: Sequence[Tensor | None] | None = None) -> bool:
        """Whether the coming step looks for new weights.

        Args:
            values: its losses; None: all tasks are expected.
        """
        if self.weighting is None:
            return False
        gradients = self._level.gradients
        if gradients is None:
            return True
        present = (
            range(len(gradients.ownership.reaches))
            if values is None
            else [i for i, value in enumerate(values) if value is not None]
        )
        return self._search.is_due([i for i in present if gradients.ownership.reaches[i]])

    def _has_settled(self) -> bool:
        """Whether the steps to come depend on nothing that is still to be found."""
        return self.weighting is None or self._search.has_found()

    def _is_delayed(self) -> bool:
        """Whether a search comes with the move, by the weights of the search before."""
        return bool(self._settings["delayed"]) and self._search.has_found()

    def _divides(self, scaler: torch.amp.GradScaler | None) -> bool:
        """Whether the heads' own gradients can be had by dividing a weight out that is not read."""
        positive = self.weighting is None or self.weighting.positive
        return not self.capturable or (positive and scaler is None)

    @property
    def searches_next(self) -> bool:
        """Whether the next step looks for new weights."""
        return self._pending.kind is None and self._searches()

    @uncompiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Search weights if it is time, move the parameters, then the moments.

        A step whose losses or gradients are not finite changes nothing (`on_nonfinite`).

        Args:
            closure: evaluated first, with grad enabled; must call this optimizer's `backward`.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: no `backward` since the last step; a `.grad` that was changed since; a
                GradScaler that `backward` was not given, or one that was and does not make this
                call.
            SolverError: no weights were found, with `on_failure="raise"`.
            NonFiniteError: a gradient is NaN or infinite, with `on_nonfinite="raise"`.
        """
        try:
            result = None
            if closure is not None:
                with torch.enable_grad():
                    result = closure()
            self._step()
            return result
        except BaseException:
            # A GradScaler takes these back only from a step that returns.
            for name in ("found_inf", "grad_scale"):
                self.__dict__.pop(name, None)
            raise

    def _step(self) -> None:
        """The step on one screen."""
        level, search, pending = self._level, self._search, self._pending
        if pending.kind is None:
            raise RuntimeError("step() needs gradients: call backward(losses) of this optimizer")
        overflow = pending.unscale(self)  # what a GradScaler saw
        kind, extra = pending.kind, pending.extra
        pending.clear()
        if kind == "refused":
            return
        gradients = level.gradients
        assert gradients is not None
        active = [i for i, on in enumerate(gradients.reached_shared) if on]
        n_tasks = len(gradients.reached_shared)
        searches = bool(active) and kind == "per_task" and self._searches()
        # Before the first weights are found there are none to go by.
        delayed = searches and self._is_delayed()
        rows = 1 if kind == "weighted" else n_tasks + extra
        passes = level.passes(rows, reached=bool(active) or extra, lr_factor=self._lr_factor())
        weights = level.one if kind == "weighted" else self._joint(active, extra)
        self._clipping.clip(level, passes, weights, n_tasks)
        if not level.look(
            passes,
            searches=searches and not delayed,
            overflow=overflow,
            reads=not self.capturable,
        ):
            self._refuse("a gradient or an update is not finite, or too large to be squared")
            return
        if searches and not delayed:
            finite = level.clock.found[0] == 0 if self.capturable else None
            search.solve(level.gram(passes, n_tasks), active, finite=finite)
            weights = self._joint(active, extra)
        level.move(passes, weights, searches=delayed)
        forget_weight_copies()
        self._count(n_tasks, searches)
        if delayed:
            finite = level.clock.found[0] == 0 if self.capturable else None
            search.solve(level.gram(passes, n_tasks), active, finite=finite)

    def _joint(self, active: Sequence[int], extra: bool) -> Tensor:
        """(rows,) the weights of the rows: 0 for tasks that take no part, 1 for an unbalanced
        loss."""
        joint = self._search.joint(active).to(self._level.device)
        return torch.cat([joint, self._level.one]) if extra else joint

    def _lr_factor(self) -> float:
        """What learning rates are multiplied by while they warm up."""
        steps: int = self._settings["warmup_steps"]
        return min(1.0, (self._search.steps + 1) / steps) if steps else 1.0

    def _count(self, n_tasks: int, searches: bool) -> None:
        gradients = self._level.gradients
        assert gradients is not None
        self._search.steps += 1
        if not self.capturable:
            self._counted["steps"] += 1
        present = gradients.took_part.count(True)
        self._counted["absent"] += n_tasks - present
        self._counted["untouched"] += present - gradients.reached_shared.count(True)

    def _phase(self) -> int:
        """The steps that the search phase goes by, those that CUDA graphs made included."""
        if self._level.gradients is None or not self.capturable:
            return self._search.steps
        return int(self._known["first"]) + int(self._level.clock.tally.sum())

    def refresh(self) -> None:
        """Bring changed learning rates and hyperparameters to the device, where the replay of a
        CUDA graph reads them."""
        self._level.set_clock(None, self._lr_factor())

    def _refuse(self, what: str) -> None:
        """Skip this step, parameters and state unchanged, or raise."""
        self._counted["skipped"] += 1
        if self._settings["on_nonfinite"] == "raise":
            raise NonFiniteError(f"{what}; the step was not made")
        warn(f"step skipped: {what} (stats['skipped'])")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add task-specific parameters between two steps: a new head of a task, or a new task.

        Moments, weights and counts of what is there already are unchanged. A new task has the
        number T, and the next step in which it takes part searches.

        Args:
            param_group: torch's, with the key "task": the number of a task from 0 to T, or a name,
                new or known, where tasks have names.

        Raises:
            ValueError: no such task, or a parameter that cannot be added.
            RuntimeError: shared parameters, whose buffers are laid out at construction; or
                gradients of a `backward` are pending.
        """
        if not hasattr(self, "_level"):
            super().add_param_group(param_group)
            return
        if self._pending.kind is not None:
            raise RuntimeError("call step() or zero_grad() before add_param_group()")
        self._pending.forget_shown(self._level)
        group, n_tasks, names = more_heads(
            param_group, self.param_groups, self.n_tasks, self._known["names"]
        )
        super().add_param_group(group)
        self._level.add(len(self.param_groups) - 1)
        self._known["names"] = names
        if n_tasks is None:
            return
        old, search = self.weights, self._search
        self._level.allocate(n_tasks)
        self._bind_state()
        if old is not None and len(old) < n_tasks:
            search.decide_on(None)
            search.weights = torch.cat([old, torch.ones(n_tasks - len(old), dtype=old.dtype)])
            capturable, solver = self._decider(n_tasks)
            level = self._level
            search.place(level.shared_dtypes, numel=level.numel, solver=solver)
            search.decide_on(level.device if capturable else None)
            self._known["capturable"] = capturable

    def state_dict(self) -> dict[str, Any]:
        """torch's `state_dict`, with the balancing under the key "fastmto".

        Taken between steps, it resumes the run bit for bit: parameters' moments, weights, step,
        search phase, counts and the weighting's own state.
        """
        return {**super().state_dict(), "fastmto": state.save(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`; gradients not yet applied are forgotten.

        Raises:
            ValueError: a state of another optimizer, number of tasks or shape of parameters;
                nothing has been changed then.
        """
        state.load(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "settings": self._settings,
            "rule": self._rule,
            "defaults": self.defaults,
            "param_groups": self.param_groups,
            "state_dict": self.state_dict(),
            "names": self._known["names"],
            "n_tasks": self.n_tasks,
        }

    def __setstate__(self, saved: dict[str, Any]) -> None:
        if "settings" not in saved:  # torch's load_state_dict comes through here as well
            super().__setstate__(saved)
            return
        tell_compiler()
        self._settings = saved["settings"]
        self._rule = saved["rule"]
        super().__setstate__(state.unpickled(saved))
        settings = self._settings
        clipping = Clipping(settings["clip_norm"], settings["clip_task_norm"])
        self._build(saved["n_tasks"], saved["names"], clipping)
        self.load_state_dict(saved["state_dict"])

    def __repr__(self) -> str:
        """The balancing in one line, then torch's listing of the param groups."""
        settings = {k: v for k, v in self._settings.items() if v not in (None, False, 0)}
        level = self._level
        buffers = len(level.shared)
        return (
            f"{type(self).__name__}(tasks={self.n_tasks}, shared={level.numel} parameters in "
            f"{buffers} buffer{'s' * (buffers != 1)}, heads={len(level.heads)} buffers, "
            f"rule={self._rule}, "
            + ", ".join(f"{k}={v!r}" for k, v in settings.items())
            + ")\n"
            + super().__repr__()
        )

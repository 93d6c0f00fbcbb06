"""The update-level optimizer: losses -> gradients -> Gram -> weights -> parameters.

`UpdateBalancer` is the chain; `PUB` and `AdaTask` are configurations of it.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from .. import ops
from ..checks import check_choice, check_scaler
from ..engine.device import Constants, capturing, tell_compiler, uncompiled, upload
from ..engine.flat import FlatParameters
from ..engine.gradients import Losses, TaskGradients, as_list, first_nonfinite
from ..errors import NonFiniteError, SolverError, warn
from ..solvers import Result
from ..weightings import Bargaining, DeviceSolver, Weighting
from ..weightings.base import MOST_KAPPA, is_solved, joint_length, result_of
from .group_rules import GroupRules, check_state_names
from .groups import Parameters, TaskParameters, check_lr, param_groups
from .passes import Buffer, Clock, Pass
from .rules import Clippy, Hyper, Rule, as_rule

GramWeighting = Weighting | Callable[[Tensor], Tensor]

SCALES = ("mean_norm", "rms", "sum", "none")
#: Of the state under the key "fastmto".
VERSION = 2
#: Places in `_outcomes`, the counts of searches that are kept on the device.
FOUND, HELD, CAPPED, SEARCHED = range(4)
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
        on_failure: str = "hold",
        on_nonfinite: str = "skip",
        capturable: bool | None = None,
    ) -> None:
        tell_compiler()
        groups, n_tasks, names = param_groups(shared_parameters, task_parameters)
        between = between or ("per_task" if adatask else "weighted")
        check_choice("scale", scale, SCALES)
        check_choice("between", between, ("weighted", "per_task"))
        check_choice("on_failure", on_failure, ("hold", "raise"))
        check_choice("on_nonfinite", on_nonfinite, ("skip", "raise"))
        if adatask and between == "weighted":
            raise ValueError(
                "between must be 'per_task' with adatask, whose moments need every task's "
                "gradient at every step; got 'weighted'"
            )
        if type(update_weights_every) is not int or update_weights_every < 1:
            raise ValueError(
                f"update_weights_every must be an integer >= 1, got {update_weights_every!r}"
            )
        if max_weight is not None and not (isinstance(max_weight, int | float) and max_weight > 0):
            raise ValueError(f"max_weight must be positive or None, got {max_weight!r}")
        for name, value in (("adatask", adatask), ("delayed", delayed)):
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be True or False, got {value!r}")
        if not isinstance(clippy, bool | Clippy):
            raise ValueError(f"clippy must be True, False or a Clippy, got {clippy!r}")
        if capturable is not None and not isinstance(capturable, bool):
            raise ValueError(f"capturable must be None, True or False, got {capturable!r}")
        self._settings: dict[str, Any] = {
            "weighting": _as_weighting(weighting),
            "update_weights_every": update_weights_every,
            "scale": scale,
            "max_weight": max_weight,
            "between": between,
            "clippy": Clippy() if clippy is True else clippy or None,
            "adatask": adatask,
            "delayed": delayed,
            "on_failure": on_failure,
            "on_nonfinite": on_nonfinite,
            "capturable": capturable,
        }
        self._rule = as_rule(rule)
        check_lr(lr, weight_decay)
        defaults = {"lr": lr, "weight_decay": weight_decay, **self._rule.hyperparameters()}
        super().__init__(groups, defaults)
        self._build(n_tasks, names)

    def _build(self, n_tasks: int | None, names: list[str] | None) -> None:
        """Lay out buffers and state for the param groups as they stand, at step 0."""
        self._names = names
        self._rules = GroupRules(self._rule)
        # Groups are held by number: load_state_dict puts new dicts in place of the old ones.
        self._shared: list[tuple[int, FlatParameters]] = []
        self._heads: list[tuple[int, FlatParameters]] = []
        owners: list[int | None] = []
        for number, group in enumerate(self.param_groups):
            self._rules(group)  # wrong hyperparameters are refused here, not in a step
            for members in _buffers(group["params"], apart=group["task"] is None):
                if group["task"] == "shared":
                    self._shared.append((number, FlatParameters(members)))
                else:
                    self._heads.append((number, FlatParameters(members)))
                    owners.append(group["task"])
        self._owners = owners
        self._numel = sum(flat.numel for _, flat in self._shared)
        narrow = any(flat.dtype != torch.float64 for _, flat in self._shared)
        self._most_kappa = MOST_KAPPA if narrow else math.inf
        self._device = self._shared[0][1].device
        ops.backend(self._device)  # a device without one is refused here
        self._steps = self._first = 0  # of the search phase; at construction or loading
        self._found = False  # whether any search has found weights, as far as is known
        self._pending: str | None = None  # None, "per_task", "weighted" or "refused"
        self._scaler: torch.amp.GradScaler | None = None  # of the gradients that are pending
        self._counted: dict[str, int] = dict.fromkeys(STATS, 0)
        self._gram: Tensor | None = None
        self._weights: Tensor | None = None
        #: Whether no step reads what the device computes; None until T is known.
        self.capturable: bool | None = None
        #: The gradients between `backward` and `step`; None until T is known.
        self.gradients: TaskGradients | None = None
        if n_tasks is not None:
            self._set_tasks(n_tasks)

    def _set_tasks(self, n_tasks: int) -> TaskGradients:
        """Allocate what depends on T: gradients, moments, weights."""
        self.capturable, self._solver = self._decider(n_tasks)
        gradients = TaskGradients(
            [flat for _, flat in self._shared],
            [flat for _, flat in self._heads],
            self._owners,
            n_tasks,
        )
        self._weights = self._float64(torch.ones, n_tasks, on_host=not self.capturable)
        self._applied = self._float64(torch.ones, n_tasks)
        self._one = self._float64(torch.ones, 1)
        self._raw = self._float64(torch.zeros, n_tasks)
        self._info = self._float64(torch.zeros, 4).fill_(math.nan)  # no solve yet
        self._gram_room = self._float64(torch.zeros, n_tasks * n_tasks)
        self._outcomes = torch.zeros(4, dtype=torch.int64, device=self._device)
        self._indices, self._masks = Constants(torch.int64), Constants(torch.bool)
        adatask = self._settings["adatask"]
        self._buffers = [
            Buffer(number, flat, grads, self._rules(self.param_groups[number]), adatask=adatask)
            for (number, flat), grads in zip(self._shared, gradients.rows, strict=True)
        ]
        self._head_buffers = [
            Buffer(number, flat, grads, self._rules(self.param_groups[number]))
            for (number, flat), grads in zip(self._heads, gradients.head_rows, strict=True)
        ]
        buffers = [*self._buffers, *self._head_buffers]
        self._clock = Clock(sum(b.clock_rows for b in buffers), self._device)
        first = 0
        for buffer in buffers:
            first = buffer.bind(self._clock, first)
        self._bind_state()
        self.gradients = gradients
        return gradients

    def _float64(self, fill: Any, size: int, *, on_host: bool = False) -> Tensor:
        tensor: Tensor = fill(size, dtype=torch.float64, device="cpu" if on_host else self._device)
        return tensor

    def _decider(self, n_tasks: int) -> tuple[bool, DeviceSolver | None]:
        """Whether no step reads what the device computes, and what finds the weights there.

        Raises:
            ValueError: none should, and one has to.
        """
        given: bool | None = self._settings["capturable"]
        if given is False or (given is None and self._device.type == "cpu"):
            return False, None
        weighting = self.weighting
        solver = None
        if isinstance(weighting, Weighting):
            solver = weighting.device_solver(n_tasks)
        half = any(flat.dtype == torch.float16 for _, flat in (*self._shared, *self._heads))
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

    def _bind_state(self) -> None:
        """Show every parameter's piece of the moments in `self.state`, torch's way."""
        for buffer in (*self._buffers, *self._head_buffers):
            for p, state in zip(buffer.flat.parameters, buffer.state_views(), strict=True):
                self.state[p].update(state)

    @property
    def n_tasks(self) -> int | None:
        """T; None before the first backward where `task_parameters` was one flat iterable."""
        return None if self._weights is None else len(self._weights)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self._device

    @property
    def weights(self) -> Tensor | None:
        """Last task weights (T,), float64 on the CPU; None until T is known. Waits for a device."""
        return None if self._weights is None else self._weights.to("cpu", copy=True)

    @property
    def gram(self) -> Tensor | None:
        """Gram matrix (n, n) of the last search, over the n tasks that took part; float64, CPU.
        Waits for a device."""
        return None if self._gram is None else self._gram.cpu()

    @property
    def result(self) -> Result[Tensor] | None:
        """How the last solve ended, with weights before `scale`; None where no solver was asked.
        Waits for a device."""
        if self._gram is None or self._solver is None:
            return getattr(self.weighting, "result", None)
        if math.isnan(float(self._info[0])):
            return None
        return result_of(self._info, self._raw[: len(self._gram)].cpu())

    @property
    def stats(self) -> dict[str, int]:
        """Counts of what happened, the unusual above all; see `PUB`. Waits for a device."""
        counted = dict(self._counted)
        if self.gradients is not None and self.capturable:
            counted["steps"] += int(self._clock.tally[0])
            counted["skipped"] += int(self._clock.tally[1])
            _, *there = self._outcomes.tolist()
            for name, more in zip(("held", "capped", "searches"), there, strict=True):
                counted[name] += more
        return counted

    @property
    def weighting(self) -> GramWeighting | None:
        """What turns Grams into weights; `weighting.result` has the last solve's diagnostics."""
        weighting: GramWeighting | None = self._settings["weighting"]
        return weighting

    @uncompiled
    def backward(self, losses: Losses, *, scaler: torch.amp.GradScaler | None = None) -> None:
        """Compute the gradients of a step; takes the place of `loss.backward()`.

        T backward passes on a step that searches weights (and on every step with
        `between="per_task"`), one of sum_i a_i L_i otherwise. Called again before `step`, it
        adds its gradients to the first call's.

        Args:
            losses: T scalars: a tensor (T,), a list, a tuple or a dict of named tasks. None, or
                a name left out of the dict, is a task absent from this batch: its head, its
                weight and its own moments keep still.
            scaler: multiplies the gradients of these backward passes by its scale, on the way;
                the losses come as they are. `scaler.step(optimizer)` then divides it out again,
                once, and `scaler.update()` learns of gradients that were not finite.

        Raises:
            ValueError: the wrong number of losses, a loss that is no scalar or not attached to
                a graph, a task-specific parameter that several tasks use, two scalers in a step.
            RuntimeError: no loss reaches the shared parameters, a sparse gradient, a parameter
                that was moved or frozen after construction.
            NonFiniteError: a loss is NaN or infinite, with `on_nonfinite="raise"`; with "skip"
                the step is skipped and counted.
        """
        values, names = as_list(losses, self.n_tasks, self._names)
        scaler = check_scaler(scaler)
        if self._pending is not None and scaler is not self._scaler:
            raise ValueError("scaler must be the same in all backward calls of a step")
        seed = self._seed(scaler)
        for _, flat in self._shared:
            flat.check("shared parameter", grads=False)
        for _, flat in self._heads:
            flat.check("task parameter", grads=True)
        gradients = self.gradients or self._set_tasks(len(values))
        self._names = names
        if not self.capturable and capturing(self._device):
            raise RuntimeError(
                f"a step of this {type(self).__name__} cannot be captured: capturable is False"
            )
        if self._pending == "refused":
            return
        if self._pending is None:
            gradients.clear()
        self._pending = None
        self._scaler = scaler
        # Reading losses would stall an accelerator; there the gradients tell, in `step`.
        looks = self._device.type == "cpu" and not self.capturable
        bad = first_nonfinite(values) if looks else None
        if bad is not None:
            self._refuse(f"losses[{bad}] is not finite")
            self._pending = "refused"
            return
        before = gradients.backwards
        if self._settings["between"] == "per_task" or self._searches():
            gradients.per_task(values, seed=seed)
            pending = "per_task"
        else:
            assert self._weights is not None
            weights = self._weights if self.capturable else self._weights.tolist()
            gradients.weighted(values, weights, seed=seed, divides=self._divides(scaler))
            pending = "weighted"
        self._counted["backwards"] += gradients.backwards - before
        if not any(gradients.reached):
            raise RuntimeError(
                "no loss reaches the shared parameters: they are not what the model computes with"
            )
        if self._steps == 0 and not all(gradients.reached):
            missed = [k for k, on in enumerate(gradients.reached) if not on]
            warn(
                f"no task of the first step reaches shared_parameters {missed}: unused, or hidden "
                "by a checkpoint (which needs use_reentrant=False); their gradient is zero"
            )
        for (_, flat), views, filled in zip(
            self._heads, gradients.head_views, gradients.filled, strict=True
        ):
            for p, view in zip(flat.parameters, views, strict=True):
                p.grad = view if filled else None
        if not any(gradients.touched):
            warn("no task of this step reaches the shared parameters (stats['untouched'])")
        self._pending = pending

    def _seed(self, scaler: torch.amp.GradScaler | None) -> Tensor | None:
        """A GradScaler's scale, on the device."""
        if scaler is None:
            return None
        if any(flat.dtype == torch.float16 for _, flat in (*self._shared, *self._heads)):
            raise ValueError(
                "scaler must be None with float16 parameters, whose gradients a GradScaler does "
                "not unscale: keep float32 parameters and use autocast"
            )
        scale: Tensor = scaler.scale(torch.ones((), device=self._device))
        return scale

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of `backward`, as torch's optimizers do."""
        self._pending = self._scaler = None
        if self.gradients is not None:
            self.gradients.clear()
        super().zero_grad(set_to_none)

    def _searches(self) -> bool:
        """Whether the coming step looks for new weights."""
        if self.weighting is None:
            return False
        every: int = self._settings["update_weights_every"]
        return self._steps % every == 0 or not self._has_found()

    def _has_settled(self) -> bool:
        """Whether the steps to come depend on nothing that is still to be found."""
        return self.weighting is None or self._has_found()

    def _is_delayed(self) -> bool:
        """Whether a search comes with the move, by the weights of the search before."""
        return bool(self._settings["delayed"]) and self._has_found()

    def _divides(self, scaler: torch.amp.GradScaler | None) -> bool:
        """Whether the heads' own gradients can be had by dividing a weight out that is not read."""
        positive = isinstance(self.weighting, Bargaining | None)
        return not self.capturable or (positive and scaler is None)

    @property
    def searches_next(self) -> bool:
        """Whether the next step looks for new weights."""
        return self._pending is None and self._searches()

    def _has_found(self) -> bool:
        """Whether any search has found weights. Waits for a device until one has.

        Raises:
            RuntimeError: while a CUDA graph is captured, where that is not known yet.
        """
        if not self._found and self.capturable:
            if capturing(self._device):
                raise RuntimeError(
                    "make steps until weights were found before the one that is captured: only "
                    "then is it known whether that step searches (optimizer.searches_next)"
                )
            self._found = bool(self._outcomes[FOUND] > 0)
        return self._found

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
            RuntimeError: no `backward` since the last step; a GradScaler that `backward` was not
                given, or one that was and does not make this call.
            SolverError: no weights were found, with `on_failure="raise"`.
            NonFiniteError: a gradient is NaN or infinite, with `on_nonfinite="raise"`.
        """
        try:
            return self._step(closure)
        except BaseException:
            # A GradScaler takes these back only from a step that returns.
            for name in ("found_inf", "grad_scale"):
                self.__dict__.pop(name, None)
            raise

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        if self._pending is None:
            raise RuntimeError("step() needs gradients: call backward(losses) of this optimizer")
        self._unscale()
        pending, self._pending = self._pending, None
        if pending == "refused":
            return result
        assert self.gradients is not None
        reached = any(self.gradients.touched)
        searches = reached and pending == "per_task" and self._searches()
        # Before the first weights are found there are none to go by.
        delayed = searches and self._is_delayed()
        clipped = self._settings["clippy"] is not None
        rows = 1 if pending == "weighted" else len(self.gradients.touched)
        shared, heads = self._passes(rows)
        if not reached:
            shared = []
        self._clock.start()
        overflow = getattr(self, "found_inf", None)  # what a GradScaler saw; 0 without gradients
        if isinstance(overflow, Tensor):
            self._clock.found.logical_or_(overflow != 0)
        for one in shared:
            one.search() if clipped or (searches and not delayed) else one.check()
        for one in heads:
            one.search() if clipped else one.check()
        if not self.capturable and self._clock.found.item():
            self._refuse("a gradient or an update is not finite, or too large to be squared")
            return result
        if searches and not delayed:
            self._balance()
        weights = self._one if pending == "weighted" else self._joint_weights()
        for one in shared:
            one.delayed(weights) if delayed else one.apply(weights)
        for one in heads:
            one.apply(self._one)
        self._clock.finish()
        self._count(searches)
        if delayed:
            self._balance()
        return result

    def _unscale(self) -> None:
        """Divide a GradScaler's scale out of the gradients, which tells it what is not finite.

        Nothing has changed when this raises.
        """
        called = hasattr(self, "found_inf")
        scaler = self._scaler
        if scaler is None and called:
            raise RuntimeError(
                f"{type(self).__name__}.backward must be given the GradScaler that steps it: "
                "optimizer.backward(losses, scaler=scaler), with losses that are not scaled"
            )
        if scaler is None:
            return
        if not called:
            raise RuntimeError(
                "the gradients are scaled: call scaler.step(optimizer) in place of optimizer.step()"
            )
        assert self.gradients is not None
        n_rows = 1 if self._pending == "weighted" else len(self.gradients.touched)
        scaled = [row for rows in self.gradients.rows for row in rows[:n_rows]]
        if self._pending == "refused":
            scaled = [torch.full((1,), math.inf, device=self._device)]  # like the loss
        # Without a scale the caller has unscaled the heads, by `scaler.unscale_(optimizer)`.
        elif self.grad_scale is not None:  # type: ignore[attr-defined]
            filled = zip(self.gradients.head_rows, self.gradients.filled, strict=True)
            scaled += [rows[0] for rows, on in filled if on]
        # The scaler knows it by its identity until the next step.
        self._carrier = _Carrier(scaled)
        scaler.unscale_(self._carrier)  # type: ignore[arg-type]
        self._scaler = None

    def _passes(self, rows: int) -> tuple[list[Pass], list[Pass]]:
        """The passes over the shared buffers and over the heads that have a gradient; sets the
        clock."""
        assert self.gradients is not None
        filled = self.gradients.filled
        on_tasks = self.gradients.touched if self._settings["adatask"] else [True]
        kinds = self._set_clock([*on_tasks * len(self._buffers), *filled])
        clippy, found = self._settings["clippy"], self._clock.found
        shared = [Pass(b, kinds[b.number], rows, clippy, found) for b in self._buffers]
        heads = [
            Pass(b, kinds[b.number], 1, clippy, found)
            for b, on in zip(self._head_buffers, filled, strict=True)
            if on
        ]
        return shared, heads

    def _set_clock(self, active: Sequence[bool] | None) -> dict[int, int]:
        """Tell the clock the param groups' hyperparameters, and which of its rows take part; None:
        as before. Returns the rules' kinds by number of group."""
        hyper: list[Hyper] = []
        kinds = {}
        rates: list[tuple[slice, Tensor]] = []
        for buffer in (*self._buffers, *self._head_buffers):
            group = self.param_groups[buffer.number]
            rule = self._rules(group)
            check_state_names(rule, buffer.state_names)
            lr, weight_decay = group["lr"], group["weight_decay"]
            there = isinstance(lr, Tensor) and lr.device.type != "cpu"
            if there:
                rates.append((buffer.rows, lr))
            check_lr(0.0 if there else lr, weight_decay)
            # -1 stands for a rate that the host does not know.
            known = rule.hyper(-1.0 if there else float(lr), float(weight_decay))
            hyper += [known] * buffer.clock_rows
            kinds[buffer.number] = rule.kind
        self._clock.set(hyper, active)
        for rows, rate in rates:
            self._clock.set_lr(rows, rate)
        return kinds

    def _joint_weights(self) -> Tensor:
        """The weights with 0 for tasks that do not take part, on the parameters' device."""
        assert self.gradients is not None
        assert self._weights is not None
        touched = self.gradients.touched
        if not self.capturable:
            active = torch.tensor(touched)
            return self._applied.copy_(torch.where(active, self._weights, 0.0))
        if all(touched):
            return self._weights
        return torch.where(self._masks(touched, self._device), self._weights, 0.0)

    def _balance(self) -> None:
        """New weights for the tasks that took part, or the old ones where there are none."""
        assert self.gradients is not None
        assert self._weights is not None
        active = [i for i, on in enumerate(self.gradients.touched) if on]
        gram = sum(b.gram(len(self._weights)) for b in self._buffers)
        assert isinstance(gram, Tensor)
        if self._solver is not None:
            self._balance_there(gram, active)
            return
        self._gram = gram.cpu()[active][:, active]
        try:
            weights = self._weigh(self._gram, active)
        except SolverError as error:
            if self._settings["on_failure"] == "raise":
                raise
            self._counted["held"] += 1
            # No numbers in the text: Python shows a warning of one text once.
            warn(f"no new task weights ({error.status}), the last ones stay (stats['held'])")
            return
        self._found = True
        bound = self._settings["max_weight"]
        if bound is not None and bool((weights > bound).any()):
            self._counted["capped"] += 1
            weights = weights.clamp(max=bound)
        self._weights = self._weights.index_put((torch.tensor(active),), weights)

    def _balance_there(self, gram: Tensor, active: list[int]) -> None:
        """`_balance` where the Gram matrix lies: decisions are tensors, and nothing is read."""
        assert self._weights is not None
        assert self._solver is not None
        everyone, n = len(active) == len(gram), len(active)
        if not everyone:
            index = self._indices(active, self._device)
            gram = gram.index_select(0, index).index_select(1, index)
        # In place, as are the weights: what CUDA graphs write is what is shown.
        self._gram = gram = self._gram_room[: n * n].view(n, n).copy_(gram)
        raw = self._raw[:n]
        self._solver(gram, raw, self._info, active)
        weights = raw * self._factor(raw, gram)
        finite = self._clock.found[0] == 0
        ok = finite & is_solved(self._info, weights, self._most_kappa)
        capped = torch.zeros_like(ok)
        if self._settings["max_weight"] is not None:
            bound = self._settings["max_weight"]
            capped = (weights > bound).any()
            weights = weights.clamp(max=bound)
        if not everyone:
            weights = self._weights.index_copy(0, index, weights)
        self._weights.copy_(torch.where(ok, weights, self._weights))
        self._outcomes.add_(torch.stack((ok, finite & ~ok, ok & capped, finite)))

    def _factor(self, weights: Tensor, gram: Tensor) -> Tensor | float:
        """What brings weights to their scale; not finite where nothing does."""
        scale = self._settings["scale"]
        if scale == "none":
            return 1.0
        if scale == "sum":
            total = weights.sum()
            return torch.where(total > 0, len(weights) / total, math.inf)
        length = joint_length(gram, weights)
        if scale == "mean_norm":
            return gram.diagonal().sqrt().mean() / length
        return math.sqrt(self._numel) / length

    def _weigh(self, gram: Tensor, active: list[int]) -> Tensor:
        """weighting(gram), of the chosen scale.

        Raises:
            SolverError: no weights, weights that are noise or not finite, or a joint update of
                length 0.
        """
        weighting = self.weighting
        assert weighting is not None
        copied = gram.clone()  # a caller's function may write into what it gets
        raw = weighting(copied, active) if isinstance(weighting, Weighting) else weighting(copied)
        if not isinstance(raw, Tensor | Sequence | np.ndarray):
            raise ValueError(f"weighting must return weights, got {type(raw).__name__}")
        weights = torch.as_tensor(raw, dtype=torch.float64, device="cpu")
        if weights.shape != (len(gram),):
            raise ValueError(
                f"weighting must return weights of shape ({len(gram)},), got {tuple(weights.shape)}"
            )
        kappa = getattr(getattr(weighting, "result", None), "kappa", 0.0)
        if kappa > self._most_kappa:
            raise SolverError(
                f"kappa {kappa:.3g}: nearer to Pareto stationarity than a Gram matrix of float32 "
                "updates tells",
                "near_stationary",
            )
        weights = weights * self._factor(weights, gram)
        if not bool(weights.isfinite().all()):
            raise SolverError("the weights or their scale are not finite", "not_finite")
        return weights

    def _count(self, searched: bool) -> None:
        assert self.gradients is not None
        present, touched = self.gradients.present, self.gradients.touched
        self._steps += 1
        if not self.capturable:
            self._counted["steps"] += 1
            self._counted["searches"] += searched
        self._counted["absent"] += present.count(False)
        self._counted["untouched"] += present.count(True) - touched.count(True)

    def _phase(self) -> int:
        """The steps that the search phase goes by, those that CUDA graphs made included."""
        if self.gradients is None or not self.capturable:
            return self._steps
        return self._first + int(self._clock.tally.sum())

    def refresh(self) -> None:
        """Bring changed learning rates and hyperparameters to the device, where the replay of a
        CUDA graph reads them."""
        self._set_clock(None)

    def _refuse(self, what: str) -> None:
        """Skip this step, parameters and state untouched, or raise."""
        self._counted["skipped"] += 1
        if self._settings["on_nonfinite"] == "raise":
            raise NonFiniteError(f"{what}; the step was not made")
        warn(f"step skipped: {what} (stats['skipped'])")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only for construction: the buffers' layout is settled there.

        Raises:
            RuntimeError: always, once the optimizer is built.
        """
        if hasattr(self, "_shared"):
            raise RuntimeError(
                f"{type(self).__name__} cannot take another param group: its buffers are laid "
                "out at construction; build a new optimizer with all parameters"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """torch's `state_dict`, with the balancing under the key "fastmto".

        Taken between steps, it resumes the run bit for bit: parameters' moments, weights, step,
        search phase, counts and the weighting's own state.
        """
        weighting = self.weighting
        gradients = self.gradients
        return {
            **super().state_dict(),
            "fastmto": {
                "version": VERSION,
                "steps": self._phase(),
                "found": self._has_found() if gradients is not None else False,
                "names": self._names,
                "weights": self.weights,
                "gram": self.gram,
                "stats": self.stats,
                "weighting": weighting.state_dict() if isinstance(weighting, Weighting) else None,
                "counts": None if gradients is None else self._clock.counts.tolist(),
                "owners": None if gradients is None else list(gradients.owners),
                "inspected": None if gradients is None else list(gradients.inspected),
                "reaches": None if gradients is None else list(gradients.reaches),
                "reached": None if gradients is None else list(gradients.reached),
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`; gradients not yet applied are forgotten.

        Raises:
            ValueError: a state of another optimizer, number of tasks or shape of parameters;
                nothing has been changed then.
        """
        saved = state_dict.get("fastmto")
        if saved is None:
            raise ValueError(
                "state_dict must come from a fastmto optimizer: it has no key 'fastmto', only "
                f"{sorted(state_dict)}"
            )
        if saved.get("version") != VERSION:
            raise ValueError(
                f"state_dict must be of version {VERSION}, got {saved.get('version')!r}"
            )
        n_tasks = None if saved["weights"] is None else len(saved["weights"])
        if None not in (n_tasks, self.n_tasks) and n_tasks != self.n_tasks:
            raise ValueError(
                f"state_dict must be of {self.n_tasks} tasks, got one of {n_tasks} tasks"
            )
        if None not in (self._names, saved["names"]) and self._names != saved["names"]:
            raise ValueError(f"state_dict must be of {self._names}, got one of {saved['names']}")
        entries = self._match_state(state_dict, n_tasks)
        weighting = self.weighting
        if isinstance(weighting, Weighting):
            # Into a copy first: what it refuses, it refuses before anything has changed.
            weighting = copy.deepcopy(weighting)
            weighting.load_state_dict(saved["weighting"] or {})
        rates = [group["lr"] for group in self.param_groups]
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self._keep_rates(rates)
        names = self._names or saved["names"]
        if n_tasks is None:  # from before the first step
            self._build(None, names)
            return
        self._pending = self._scaler = None
        gradients = self.gradients or self._set_tasks(n_tasks)
        gradients.clear()
        gradients.owners = list(saved["owners"])
        gradients.inspected = list(saved["inspected"])
        gradients.reaches = list(saved["reaches"])
        gradients.reached = list(saved["reached"])
        self._bind_state()
        for p, state in entries:
            for name, value in state.items():
                self.state[p][name].copy_(value)
        self._steps = self._first = saved["steps"]
        self._found = saved["found"]
        upload(self._clock.counts, saved["counts"])
        self._names = names
        assert self._weights is not None
        # A map_location moves every tensor of a file.
        self._weights.copy_(saved["weights"])
        self._gram = None
        if saved["gram"] is not None:
            n = len(saved["gram"])
            self._gram = self._gram_room[: n * n].view(n, n).copy_(saved["gram"])
        self._info.fill_(math.nan)
        self._counted = dict(saved["stats"])
        self._clock.tally.zero_()
        self._outcomes.zero_()
        self._settings["weighting"] = weighting

    def _keep_rates(self, rates: Sequence[float | Tensor]) -> None:
        """Bring loaded learning rates into the tensors that held them: CUDA graphs read these."""
        kept: set[int] = set()
        for group, rate in zip(self.param_groups, rates, strict=True):
            if not isinstance(rate, Tensor):
                continue
            loaded = torch.as_tensor(group["lr"], dtype=rate.dtype, device=rate.device).detach()
            if id(rate) in kept and not torch.equal(rate.detach().view(()), loaded.view(())):
                group["lr"] = loaded.clone()  # one tensor for several groups, whose rates differ
                continue
            kept.add(id(rate))
            group["lr"] = rate
            rate.detach().copy_(loaded.view_as(rate))

    def _match_state(
        self, state_dict: dict[str, Any], n_tasks: int | None
    ) -> list[tuple[Parameter, dict[str, Any]]]:
        """The saved state of every parameter, its names and shapes checked."""
        groups = state_dict["param_groups"]
        sizes = [len(g["params"]) for g in groups], [len(g["params"]) for g in self.param_groups]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"state_dict must have param groups of {sizes[1]} parameters, got {sizes[0]}"
            )
        tasks = [g["task"] for g in groups], [g["task"] for g in self.param_groups]
        if tasks[0] != tasks[1]:
            raise ValueError(f"state_dict must have groups of tasks {tasks[1]}, got {tasks[0]}")
        entries = []
        for saved, group in zip(groups, self.param_groups, strict=True):
            rule = self._rules(group)
            names = self._rules({**group, **saved}).state_names
            if names != rule.state_names:
                raise ValueError(
                    f"state_dict must hold the moments {rule.state_names}, got {names}"
                )
            stacked = self._settings["adatask"] and group["task"] == "shared"
            for key, p in zip(saved["params"], group["params"], strict=True):
                state = state_dict["state"].get(key, {})
                shape = (n_tasks, *p.shape) if stacked else tuple(p.shape)
                got = {k: tuple(v.shape) for k, v in state.items()}
                expected = dict.fromkeys(rule.state_names, shape)
                if (state or n_tasks is not None) and got != expected:
                    raise ValueError(
                        f"state_dict must hold {expected} for parameter {key}, got {got}"
                    )
                entries.append((p, state))
        return entries

    def __getstate__(self) -> dict[str, Any]:
        return {
            "settings": self._settings,
            "rule": self._rule,
            "defaults": self.defaults,
            "param_groups": self.param_groups,
            "state_dict": self.state_dict(),
            "names": self._names,
            "n_tasks": self.n_tasks,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "settings" not in state:  # torch's load_state_dict comes through here as well
            super().__setstate__(state)
            return
        tell_compiler()
        self._settings = state["settings"]
        self._rule = state["rule"]
        super().__setstate__(
            {
                "state": defaultdict(dict),
                "param_groups": state["param_groups"],
                "defaults": state["defaults"],
            }
        )
        self._build(state["n_tasks"], state["names"])
        self.load_state_dict(state["state_dict"])

    def __repr__(self) -> str:
        """The balancing in one line, then torch's listing of the param groups."""
        settings = {k: v for k, v in self._settings.items() if v not in (None, False)}
        buffers = len(self._shared)
        return (
            f"{type(self).__name__}(tasks={self.n_tasks}, shared={self._numel} parameters in "
            f"{buffers} buffer{'s' * (buffers != 1)}, heads={len(self._heads)} buffers, "
            f"rule={self._rule}, "
            + ", ".join(f"{k}={v!r}" for k, v in settings.items())
            + ")\n"
            + super().__repr__()
        )


class _Carrier:
    """Gradients in the shape in which a GradScaler looks for them: an optimizer's parameters."""

    def __init__(self, grads: Sequence[Tensor]) -> None:
        self.param_groups = [{"params": [grad.detach() for grad in grads]}]
        for param, grad in zip(self.param_groups[0]["params"], grads, strict=True):
            param.grad = grad


def _buffers(members: Sequence[Parameter], *, apart: bool) -> list[list[Parameter]]:
    """What goes into one buffer each: a dtype, or, `apart`, a parameter."""
    if apart:
        return [[p] for p in members]
    return [[p for p in members if p.dtype == t] for t in dict.fromkeys(p.dtype for p in members)]


def _as_weighting(weighting: str | GramWeighting | None) -> GramWeighting | None:
    if isinstance(weighting, str):
        check_choice("weighting", weighting, ("bargaining", "ccp"))
        return Bargaining(method="exact" if weighting == "bargaining" else "ccp")
    if weighting is not None and not callable(weighting):
        raise ValueError(
            "weighting must be 'bargaining', 'ccp' or a callable Gram -> weights, got "
            f"{weighting!r}"
        )
    return weighting

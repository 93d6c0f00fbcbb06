"""The update-level optimizer: losses -> gradients -> Gram -> weights -> parameters.

`UpdateBalancer` is the chain; `PUB` and `AdaTask` are configurations of it.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from . import ops
from .errors import NonFiniteError, SolverError, warn
from .flat import FlatParameters
from .group_rules import GroupRules, check_state_names, state_dtype
from .groups import Parameters, TaskParameters, check_lr, param_groups
from .rules import Clippy, Rule, as_rule
from .task_gradients import Losses, TaskGradients, as_list, first_nonfinite
from .weightings import Bargaining, Weighting

GramWeighting = Weighting | Callable[[Tensor], Tensor]

SCALES = ("mean_norm", "rms", "sum", "none")
STATS = ("steps", "searches", "backwards", "held", "capped", "skipped", "absent", "untouched")


class UpdateBalancer(torch.optim.Optimizer):
    """Base of the optimizers that balance per-task *updates* of the shared parameters.

    One step, after T backward passes (`rules` defines u_i, `ops` the passes over memory):

        gram_ij = <u_i, u_j>            every `update_weights_every` steps
        a       = weighting(gram), scaled, bounded
        theta  <- (1 - lr wd) theta - lr sum_i a_i u_i
        moments take one step of the rule on sum_i a_i g_i

    Arguments are those of `PUB`; `weighting=None` keeps all weights at 1.
    """

    #: Makes a GradScaler hand its scale to `step`, which refuses it: left alone, the scaler would
    #: unscale the heads' gradients and not the shared ones, in silence.
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
    ) -> None:
        groups, n_tasks, names = param_groups(shared_parameters, task_parameters)
        between = between or ("per_task" if adatask else "weighted")
        _check_choice("scale", scale, SCALES)
        _check_choice("between", between, ("weighted", "per_task"))
        _check_choice("on_failure", on_failure, ("hold", "raise"))
        _check_choice("on_nonfinite", on_nonfinite, ("skip", "raise"))
        if adatask and between == "weighted":
            raise ValueError(
                "between must be 'per_task' with adatask, whose moments need every task's "
                "gradient at every step; got 'weighted'"
            )
        if type(update_weights_every) is not int or update_weights_every < 1:
            raise ValueError(
                f"update_weights_every must be an integer >= 1, got {update_weights_every!r}"
            )
        if max_weight is not None and not max_weight > 0:
            raise ValueError(f"max_weight must be positive or None, got {max_weight!r}")
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
        self._device = self._shared[0][1].device
        self._ops = ops.on(self._device)
        self._steps = 0
        self._found = False  # whether any search has found weights
        self._pending: str | None = None  # None, "per_task", "weighted" or "refused"
        #: Counts of what happened, the unusual above all; see `PUB`.
        self.stats: dict[str, int] = dict.fromkeys(STATS, 0)
        #: Gram matrix (n, n) of the last search, over the n tasks that took part; float64, CPU.
        self.gram: Tensor | None = None
        #: Last task weights (T,), float64 on the CPU; None until the number of tasks is known.
        self.weights: Tensor | None = None
        #: The gradients between `backward` and `step`; None until T is known.
        self.gradients: TaskGradients | None = None
        if n_tasks is not None:
            self._set_tasks(n_tasks)

    def _set_tasks(self, n_tasks: int) -> TaskGradients:
        """Allocate what depends on T: gradients, moments, weights."""
        self.gradients = TaskGradients(
            [flat for _, flat in self._shared],
            [flat for _, flat in self._heads],
            self._owners,
            n_tasks,
        )
        self.weights = torch.ones(n_tasks, dtype=torch.float64)
        self._applied = torch.ones(n_tasks, dtype=torch.float64, device=self._device)
        self._one = torch.ones(1, dtype=torch.float64, device=self._device)
        self._task_steps = [0] * n_tasks  # steps each task took part in
        self._head_steps = [0] * len(self._heads)
        adatask = self._settings["adatask"]
        self._buffers = [
            Buffer(number, flat, grads, self._rules(self.param_groups[number]), adatask=adatask)
            for (number, flat), grads in zip(self._shared, self.gradients.rows, strict=True)
        ]
        self._head_buffers = [
            Buffer(number, flat, grads, self._rules(self.param_groups[number]))
            for (number, flat), grads in zip(self._heads, self.gradients.head_rows, strict=True)
        ]
        self._bind_state()
        return self.gradients

    def _bind_state(self) -> None:
        """Show every parameter's piece of the moments in `self.state`, torch's way."""
        for buffer in (*self._buffers, *self._head_buffers):
            for p, state in zip(buffer.flat.parameters, buffer.state_views(), strict=True):
                self.state[p].update(state)

    @property
    def n_tasks(self) -> int | None:
        """T; None before the first backward where `task_parameters` was one flat iterable."""
        return None if self.weights is None else len(self.weights)

    @property
    def weighting(self) -> GramWeighting | None:
        """What turns Grams into weights; `weighting.result` has the last solve's diagnostics."""
        weighting: GramWeighting | None = self._settings["weighting"]
        return weighting

    def backward(self, losses: Losses) -> None:
        """Compute the gradients of a step; takes the place of `loss.backward()`.

        T backward passes on a step that searches weights (and on every step with
        `between="per_task"`), one of sum_i a_i L_i otherwise. Called again before `step`, it
        adds its gradients to the first call's.

        Args:
            losses: T scalars: a tensor (T,), a list, a tuple or a dict of named tasks. None, or
                a name left out of the dict, is a task absent from this batch: its head, its
                weight and its own moments keep still.

        Raises:
            ValueError: the wrong number of losses, a loss that is no scalar or not attached to
                a graph, a task-specific parameter that several tasks use.
            RuntimeError: no loss reaches the shared parameters, a sparse gradient, a parameter
                that was moved or frozen after construction.
            NonFiniteError: a loss is NaN or infinite, with `on_nonfinite="raise"`; with "skip"
                the step is skipped and counted.
        """
        values, names = as_list(losses, self.n_tasks, self._names)
        for _, flat in self._shared:
            flat.check("shared parameter", grads=False)
        for _, flat in self._heads:
            flat.check("task parameter", grads=True)
        gradients = self.gradients or self._set_tasks(len(values))
        self._names = names
        if self._pending == "refused":
            return
        if self._pending is None:
            gradients.clear()
        self._pending = None
        # Reading losses would stall an accelerator; there the gradients tell, in `step`.
        bad = first_nonfinite(values) if self._device.type == "cpu" else None
        if bad is not None:
            self._refuse(f"losses[{bad}] is not finite")
            self._pending = "refused"
            return
        before = gradients.backwards
        if self._settings["between"] == "per_task" or self._searches():
            gradients.per_task(values)
            pending = "per_task"
        else:
            assert self.weights is not None
            gradients.weighted(values, self.weights.tolist())
            pending = "weighted"
        self.stats["backwards"] += gradients.backwards - before
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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of `backward`, as torch's optimizers do."""
        self._pending = None
        if self.gradients is not None:
            self.gradients.clear()
        super().zero_grad(set_to_none)

    def _searches(self) -> bool:
        """Whether the coming step looks for new weights."""
        if self.weighting is None:
            return False
        every: int = self._settings["update_weights_every"]
        return self._steps % every == 0 or not self._found

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Search weights if it is time, move the parameters, then the moments.

        A step whose losses or gradients are not finite changes nothing (`on_nonfinite`).

        Args:
            closure: evaluated first, with grad enabled; must call this optimizer's `backward`.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: no `backward` since the last step, or a GradScaler.
            SolverError: no weights were found, with `on_failure="raise"`.
            NonFiniteError: a gradient is NaN or infinite, with `on_nonfinite="raise"`.
        """
        if hasattr(self, "found_inf"):
            raise RuntimeError(
                f"{type(self).__name__} does not work with a GradScaler; use bfloat16 autocast, "
                "which needs none"
            )
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        pending, self._pending = self._pending, None
        if pending is None:
            raise RuntimeError("step() needs gradients: call backward(losses) of this optimizer")
        if pending == "refused":
            return result
        assert self.gradients is not None
        reached = any(self.gradients.touched)
        searches = reached and pending == "per_task" and self._searches()
        # Before the first weights are found there are none to go by.
        delayed = searches and self._settings["delayed"] and self._found
        rows = 1 if pending == "weighted" else len(self._task_steps)
        step, filled = self._op_step(), self.gradients.filled
        shared = [self._pass(b, step, rows) for b in self._buffers] if reached else []
        heads = [
            self._pass(buffer, steps + 1, 1)
            for buffer, steps, on in zip(self._head_buffers, self._head_steps, filled, strict=True)
            if on
        ]
        if (searches and not delayed) or self._settings["clippy"] is not None:
            for one in shared:
                one.search()
        if self._settings["clippy"] is not None:
            for one in heads:
                one.search()
        if not all(one.finite() for one in (*shared, *heads)):
            self._refuse("a gradient or an update is not finite, or too large to be squared")
            return result
        if searches and not delayed:
            self._balance()
        weights = self._one if pending == "weighted" else self._joint_weights()
        for one in shared:
            one.delayed(weights) if delayed else one.apply(weights)
        for one in heads:
            one.apply(self._one)
        self._count(searches)
        if delayed:
            self._balance()
        return result

    def _pass(self, buffer: Buffer, step: ops.Steps, rows: int) -> Pass:
        group = self.param_groups[buffer.number]
        check_lr(group["lr"], group["weight_decay"])
        rule = self._rules(group)
        check_state_names(rule, buffer.state_names)
        rates = float(group["lr"]), float(group["weight_decay"])
        return Pass(self._ops, buffer, rule, step, rows, *rates, self._settings["clippy"])

    def _op_step(self) -> ops.Steps:
        if not self._settings["adatask"]:
            return self._steps + 1
        assert self.gradients is not None
        active = self.gradients.touched
        return [n + 1 if on else 0 for n, on in zip(self._task_steps, active, strict=True)]

    def _joint_weights(self) -> Tensor:
        """The weights with 0 for tasks that do not take part, on the parameters' device."""
        assert self.gradients is not None
        assert self.weights is not None
        active = torch.tensor(self.gradients.touched)
        return self._applied.copy_(torch.where(active, self.weights, 0.0))

    def _balance(self) -> None:
        """New weights for the tasks that took part, or the old ones where there are none."""
        assert self.gradients is not None
        assert self.weights is not None
        active = [i for i, on in enumerate(self.gradients.touched) if on]
        gram = sum(b.gram(len(self.weights)) for b in self._buffers)
        assert isinstance(gram, Tensor)
        self.gram = gram.cpu()[active][:, active]
        try:
            weights = self._weigh(self.gram, active)
        except SolverError as error:
            if self._settings["on_failure"] == "raise":
                raise
            self.stats["held"] += 1
            # No numbers in the text: Python shows a warning of one text once.
            warn(f"no new task weights ({error.status}), the last ones stay (stats['held'])")
            return
        self._found = True
        bound = self._settings["max_weight"]
        if bound is not None and bool((weights > bound).any()):
            self.stats["capped"] += 1
            weights = weights.clamp(max=bound)
        self.weights = self.weights.index_put((torch.tensor(active),), weights)

    def _weigh(self, gram: Tensor, active: list[int]) -> Tensor:
        """weighting(gram), of the chosen scale.

        Raises:
            SolverError: no weights, weights that are not finite, or a joint update of length 0.
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
        scale = self._settings["scale"]
        length = math.sqrt(max(float(weights @ gram @ weights), 0.0))
        if scale == "sum":
            factor = len(weights) / float(weights.sum()) if weights.sum() > 0 else math.inf
        elif scale == "none":
            factor = 1.0
        elif length > 0:
            mean = float(gram.diagonal().sqrt().mean())
            factor = (mean if scale == "mean_norm" else math.sqrt(self._numel)) / length
        else:
            factor = math.inf
        weights = weights * factor
        if not bool(weights.isfinite().all()):
            raise SolverError("the weights or their scale are not finite", "not_finite")
        return weights

    def _count(self, searched: bool) -> None:
        assert self.gradients is not None
        active = self.gradients.touched
        self._steps += 1
        self._task_steps = [n + on for n, on in zip(self._task_steps, active, strict=True)]
        filled = self.gradients.filled
        self._head_steps = [n + on for n, on in zip(self._head_steps, filled, strict=True)]
        self.stats["steps"] += 1
        self.stats["searches"] += searched
        self.stats["absent"] += self.gradients.present.count(False)
        self.stats["untouched"] += self.gradients.present.count(True) - active.count(True)

    def _refuse(self, what: str) -> None:
        """Skip this step, parameters and state untouched, or raise."""
        self.stats["skipped"] += 1
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
                "version": 1,
                "steps": self._steps,
                "found": self._found,
                "names": self._names,
                "weights": None if self.weights is None else self.weights.clone(),
                "gram": self.gram,
                "stats": dict(self.stats),
                "weighting": weighting.state_dict() if isinstance(weighting, Weighting) else None,
                "task_steps": None if gradients is None else list(self._task_steps),
                "head_steps": None if gradients is None else list(self._head_steps),
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
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        names = self._names or saved["names"]
        if n_tasks is None:  # from before the first step
            self._build(None, names)
            return
        self._pending = None
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
        self._steps = saved["steps"]
        self._found = saved["found"]
        self._task_steps = list(saved["task_steps"])
        self._head_steps = list(saved["head_steps"])
        self._names = names
        # A map_location moves every tensor of a file; these live on the CPU.
        self.weights = saved["weights"].to("cpu", copy=True)
        self.gram = None if saved["gram"] is None else saved["gram"].to("cpu", copy=True)
        self.stats = dict(saved["stats"])
        self._settings["weighting"] = weighting

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


class Buffer:
    """A flat buffer of parameters with everything the passes over it touch.

    Args:
        number: of the param group.
        flat: the parameters.
        grads: (T, P); T = 1 for a head.
        rule: says which moments there are.
        adatask: every row keeps its own moments.
    """

    def __init__(
        self,
        number: int,
        flat: FlatParameters,
        grads: Tensor,
        rule: Rule,
        *,
        adatask: bool = False,
    ) -> None:
        self.number = number
        self.flat = flat
        self.grads = grads
        self.state_names = rule.state_names
        n_tasks = len(grads)
        self._adatask = adatask
        self._moments = {
            name: flat.rows(n_tasks if adatask else 1, state_dtype(flat.dtype), rule.initial(name))
            for name in rule.state_names
        }
        #: The moments as the ops take them: (P,), or (T, P) with adatask.
        self.state = tuple(m if adatask else m[0] for m in self._moments.values())
        self._gram = torch.zeros(n_tasks * n_tasks, dtype=torch.float64, device=flat.device)
        self.sigma = torch.ones(
            n_tasks, len(flat.parameters), dtype=torch.float64, device=flat.device
        )

    def gram(self, rows: int) -> Tensor:
        """Room for the Gram of the first `rows` rows."""
        return self._gram[: rows * rows].view(rows, rows)

    def state_views(self) -> list[dict[str, Tensor]]:
        """The moments of every parameter, shaped like it (with a leading T for adatask)."""
        views = {
            name: self.flat.stacked_views(m) if self._adatask else self.flat.views(m[0])
            for name, m in self._moments.items()
        }
        return [dict(zip(views, each, strict=True)) for each in zip(*views.values(), strict=True)]


@dataclass
class Pass:
    """The passes of one step over one buffer: its first `rows` rows of gradients."""

    backend: ops.Backend
    buffer: Buffer
    rule: Rule
    step: ops.Steps
    rows: int
    lr: float
    weight_decay: float
    clippy: Clippy | None
    searched: bool = False

    def search(self) -> None:
        """The Gram of the updates into the buffer's, and Clippy's factors."""
        buffer = self.buffer
        self.backend.search(
            self.rule,
            self.step,
            buffer.grads[: self.rows],
            buffer.state,
            buffer.gram(self.rows),
            clippy=self.clippy,
            params=buffer.flat.data,
            lr=self.lr,
            segments=buffer.flat.segments,
            sigma=buffer.sigma[: self.rows],
        )
        self.searched = True

    def finite(self) -> bool:
        """Whether gradients and updates are finite; after a search the Gram's diagonal tells."""
        if self.searched:
            return bool(self.buffer.gram(self.rows).diagonal().isfinite().all())
        return self.backend.all_finite(self.buffer.grads[: self.rows])

    def apply(self, weights: Tensor) -> None:
        """Move the parameters, then the moments."""
        buffer = self.buffer
        self.backend.apply(
            self.rule,
            self.step,
            buffer.grads[: self.rows],
            buffer.state,
            buffer.flat.data,
            weights,
            self.lr,
            self.weight_decay,
            segments=buffer.flat.segments,
            sigma=None if self.clippy is None else buffer.sigma[: self.rows],
        )
        # The kernels write behind autograd's back: an older graph must not be used any more.
        torch.autograd.graph.increment_version(buffer.flat.parameters)

    def delayed(self, weights: Tensor) -> None:
        """`apply` and `search` in one pass."""
        buffer = self.buffer
        self.backend.delayed(
            self.rule,
            self.step,
            buffer.grads[: self.rows],
            buffer.state,
            buffer.flat.data,
            weights,
            buffer.gram(self.rows),
            self.lr,
            self.weight_decay,
            clippy=self.clippy,
            segments=buffer.flat.segments,
            sigma=None if self.clippy is None else buffer.sigma[: self.rows],
        )
        torch.autograd.graph.increment_version(buffer.flat.parameters)


def _buffers(members: Sequence[Parameter], *, apart: bool) -> list[list[Parameter]]:
    """What goes into one buffer each: a dtype, or, `apart`, a parameter."""
    if apart:
        return [[p] for p in members]
    return [[p for p in members if p.dtype == t] for t in dict.fromkeys(p.dtype for p in members)]


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _as_weighting(weighting: str | GramWeighting | None) -> GramWeighting | None:
    if isinstance(weighting, str):
        _check_choice("weighting", weighting, ("bargaining", "ccp"))
        return Bargaining(method="exact" if weighting == "bargaining" else "ccp")
    if weighting is not None and not callable(weighting):
        raise ValueError(
            "weighting must be 'bargaining', 'ccp' or a callable Gram -> weights, got "
            f"{weighting!r}"
        )
    return weighting

"""What every balancer has: the call, the tasks' names, the phase, the state.

    balancer = fastmto.balancers.NashMTL(update_weights_every=10)
    optimizer.zero_grad()
    loss, info = balancer.backward(losses, shared_parameters=..., task_specific_parameters=...)
    optimizer.step()                                    # any torch optimizer

`Balancer.backward` checks the losses and keeps the books; a subclass says in `_backward` where the
gradients come from. Two families do: `LossBalancer` (loss_balancer.py: weights from the losses'
values, one backward) and `GradientBalancer` (gradient_balancer.py: from per-task gradients).
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from ..checks import check_choice, check_number, check_scaler
from ..errors import NonFiniteError, warn
from .batch import WIDE, Batch, Info, Parameters, TaskParameters, as_tensors
from .caches import forget_weight_copies
from .compiler import tell_compiler, uncompiled
from .graph import graph_leaves
from .losses import Losses, as_list, what_is_wrong
from .per_task import take

#: What `Balancer.stats` counts.
STATS = ("steps", "searches", "backwards", "held", "skipped", "absent", "untouched")


class Balancer(ABC):
    """Base of all balancers.

    Args:
        n_tasks: T; None: found at the first backward.
        update_weights_every: steps between two searches of weights, N >= 1. The steps between
            make one backward of the losses weighted as the last search said.
        loss_floor: for methods that take a logarithm, a power or the reciprocal of a loss: their
            formulas see max(loss, loss_floor), while the gradient stays that of the loss, times
            the weight. None: a loss at which the formula is not defined is refused by a ValueError.
        on_nonfinite: what a NaN or infinite loss does, and for gradient-level methods a gradient
            (`GradientBalancer` says which are looked at): "skip" the step (no gradient
            is written, a warning, `stats["skipped"]`), "raise" NonFiniteError before anything is
            written, or "ignore" (it goes through). None: "skip" on CPUs, where looking costs
            nothing; on accelerators, where reading a loss would synchronize, "ignore"
            for the losses and "skip" for a Gram matrix that is read anyway.

    With a GradScaler (`backward(..., scaler=scaler)`, of losses that are not scaled) `.grad` is
    left scaled: `scaler.unscale_(optimizer)` or `scaler.step(optimizer)` divides the scale out,
    once. Nothing else that comes out is scaled. A step that is not finite then is the scaler's to
    skip: a NaN or infinite loss with "skip" puts NaN into the `.grad` of all that the step would
    have moved, is counted in `stats["skipped"]` and changes nothing else here, without a warning.
    Gradient-level methods do the same for gradients ("raise", too, is about losses alone, as
    gradients may overflow by the scale). What loss-level methods learn comes from the losses, which
    are not scaled, and does not depend on what the scaler finds. Learnable parameters belong into
    the model's optimizer: `scaler.step` refuses an optimizer without any gradient, and they have
    none in a step that does not search.

    Attributes:
        weights: (T,) weights of the tasks after the last step; None before T is known.
        names: of the tasks, once a dict of losses said them.
        stats: counts of what happened: steps made, searches, backwards (passes through the
            graph, partial ones included), held (searches without answer that kept the last
            weights), skipped steps, absent tasks, tasks that did not touch what is shared.
            Capturable methods count held searches and skipped steps on the device, so that reading
            waits for it; a step skipped there is one of the steps as well, and replays of a CUDA
            graph count nothing else.

    Raises:
        ValueError: an argument out of range.
    """

    #: The name of the method for `fastmto.get`.
    key: ClassVar[str]

    def __init__(
        self,
        n_tasks: int | None = None,
        *,
        update_weights_every: int = 1,
        on_nonfinite: str | None = None,
        loss_floor: float | None = None,
    ) -> None:
        if loss_floor is not None:
            loss_floor = check_number("loss_floor", loss_floor, 0, open_low=True)
        self.loss_floor = loss_floor
        if n_tasks is not None and (type(n_tasks) is not int or n_tasks < 1):
            raise ValueError(f"n_tasks must be an integer >= 1 or None, got {n_tasks!r}")
        if type(update_weights_every) is not int or update_weights_every < 1:
            raise ValueError(
                f"update_weights_every must be an integer >= 1, got {update_weights_every!r}"
            )
        if on_nonfinite is not None:
            check_choice("on_nonfinite", on_nonfinite, ("skip", "raise", "ignore"))
        self.update_weights_every = update_weights_every
        self.on_nonfinite = on_nonfinite
        self._given_tasks = n_tasks
        tell_compiler()
        self.reset()

    def __setstate__(self, state: dict[str, Any]) -> None:
        tell_compiler()
        self.__dict__.update(state)

    def reset(self) -> None:
        """Forget everything learned and counted, as freshly built."""
        self.names: list[str] | None = None
        self.weights: Tensor | None = None
        self._counted: dict[str, int] = dict.fromkeys(STATS, 0)
        self._steps = 0
        self._found = False  # whether any search has found weights
        if self._given_tasks is not None:
            self._set_tasks(self._given_tasks)

    def _set_tasks(self, n_tasks: int) -> None:
        """Allocate what depends on T. Subclasses extend it."""
        self.weights = torch.ones(n_tasks, dtype=torch.float64, device="cpu")

    @property
    def n_tasks(self) -> int | None:
        """T; None where it was not given and no losses were seen yet."""
        return None if self.weights is None else len(self.weights)

    @property
    def stats(self) -> dict[str, int]:
        return self._counted

    @property
    def needs_update(self) -> bool:
        """Whether `update(losses)` belongs after the optimizer's step."""
        return False

    def parameters(self) -> list[Parameter]:
        """Learnable parameters of the method, for the user's optimizer; [] for most methods.

        Raises:
            ValueError: there are some, but T is not known yet.
        """
        return []

    @uncompiled
    def backward(
        self,
        losses: Losses,
        shared_parameters: Parameters | None = None,
        task_specific_parameters: TaskParameters | None = None,
        last_shared_parameters: Parameters | None = None,
        features: Tensor | Sequence[Tensor] | None = None,
        closure: Callable[[], Losses] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        *,
        unbalanced: Tensor | None = None,
        retain_graph: bool = False,
        accumulate: bool = False,
    ) -> tuple[Tensor, Info]:
        """Add the balanced gradients to `.grad`; takes the place of `loss.backward()`.

        All methods take the same arguments and ignore those that they do not need.

        Args:
            losses: T scalars attached to their graphs: a tensor (T,), a list, a tuple or a dict
                of named tasks. None, or a name left out of the dict, is a task absent from this
                batch: its weight and the method's state about it are unchanged.
            shared_parameters: what the tasks share; needed by gradient-level methods.
            task_specific_parameters: the heads', in one iterable, or one iterable a task, or a
                dict of those for named tasks. None: gradient-level methods walk the graph for all
                other `torch.nn.Parameter`s, at every step.
            last_shared_parameters: of the last shared layer, for GradNorm.
            features: the shared representation (any shape, one tensor or several), for methods
                that balance there.
            closure: recomputes the losses on the same batch, for methods that evaluate them
                elsewhere.
            scaler: its scale multiplies the gradients on their way through the graph; see
                `Balancer`. Give the losses as they are, not `scaler.scale(loss)`.
            unbalanced: a scalar loss beside the tasks', such as a regularizer. Its gradient is
                added to `.grad` of all that it reaches, with weight 1; it takes no part in the
                weights, nor in the loss that is returned.
            retain_graph: keep the graph for another backward.
            accumulate: a micro-batch of a larger batch, for gradient-level methods: its tasks'
                gradients are added to those of the calls before. The next call without
                `accumulate` finds one set of weights for the sum, and writes `.grad`; losses that
                a method looks at are sums as well.

        Returns:
            The weighted sum of the losses, a detached scalar, and `Info`.

        Raises:
            ValueError: a wrong number of losses, a loss that is no scalar or not attached to a
                graph, something that the method needs is missing, `accumulate` with a method that
                does not look at gradients.
            NonFiniteError: with `on_nonfinite="raise"`.
            SolverError: no weights, with `on_failure="raise"` (gradient-level methods).
        """
        if isinstance(losses, Mapping) and self.names is None and self._steps:
            raise ValueError(
                f"losses must stay a sequence of {self.n_tasks} tasks, as in the steps before: "
                "names of a dict could mean another order"
            )
        values, names = as_list(losses, self.n_tasks, self.names)
        wrong = None if unbalanced is None else what_is_wrong(unbalanced, attached=True)
        if wrong is not None:
            raise ValueError(f"unbalanced {wrong}")
        if self.weights is None:
            self._set_tasks(len(values))
        self.names = names
        batch = Batch(
            values,
            as_tensors("shared_parameters", shared_parameters),
            task_specific_parameters,
            as_tensors("last_shared_parameters", last_shared_parameters),
            as_tensors("features", features),
            closure,
            unbalanced=unbalanced,
            retain_graph=retain_graph,
            accumulate=accumulate,
        )
        scaler = check_scaler(scaler)
        if scaler is not None:
            batch.seed = scaler.scale(torch.ones((), device=batch.present[0].device))
        if self._looks_at(batch):
            for i, loss in zip(batch.tasks, batch.present, strict=True):
                batch.read.append(loss.item())
                if not math.isfinite(batch.read[-1]):
                    return self._refuse(batch, f"{self._label(i)} is not finite")
            if unbalanced is not None and not math.isfinite(unbalanced.item()):
                return self._refuse(batch, "unbalanced is not finite")
        searches = not self._found or self._steps % self.update_weights_every == 0
        loss, info = self._backward(batch, searches)
        forget_weight_copies()  # those of the weights that the optimizer is about to step
        if info.skipped is None and not accumulate:
            self._steps += 1
            self._counted["steps"] += 1
            self._counted["absent"] += len(values) - len(batch.tasks)
        return loss, info

    @abstractmethod
    def _backward(self, batch: Batch, searches: bool) -> tuple[Tensor, Info]:
        """Write the gradients; new weights first where `searches`."""

    def _looks_at(self, batch: Batch) -> bool:
        """Whether the losses are read before they are used."""
        if self.on_nonfinite is None:
            return batch.present[0].device.type == "cpu"
        return self.on_nonfinite != "ignore"

    def _refuse(self, batch: Batch, what: str, *, scaled: bool = False) -> tuple[Tensor, Info]:
        """Skip this step with nothing written, or raise; a scaler gets NaN to find.

        Args:
            batch: the call.
            what: is not finite.
            scaled: whether the scale of a scaler may be to blame, which is no reason to raise.
        """
        self._counted["skipped"] += 1
        if self.on_nonfinite == "raise" and not (scaled and batch.seed is not None):
            raise NonFiniteError(f"{what}; no gradient was written")
        if batch.seed is None:
            warn(f"step skipped: {what} (stats['skipped'])")
        else:
            # Every optimizer has to find some: `scaler.step` looks at each for itself.
            for p in (*self._moved(batch), *self.parameters()):
                if p.grad is not None and p.grad.layout is torch.strided:
                    p.grad.fill_(math.nan)
                else:
                    p.grad = torch.full_like(p, math.nan)
        return self._weighted_sum(batch), Info(self.weights, self.names, skipped=what)

    def _moved(self, batch: Batch) -> Iterable[Tensor]:
        """What the step writes a `.grad` of, but for the method's own parameters."""
        return graph_leaves(batch.present, ())

    def _floored(self, losses: Tensor) -> Tensor:
        """What a formula sees of losses, or of their distances to a minimum."""
        return losses if self.loss_floor is None else losses.clamp(min=self.loss_floor)

    def _weighted_sum(self, batch: Batch) -> Tensor:
        weights = self._current(batch)
        if len(batch.read) == len(batch.tasks) and weights.device.type == "cpu":
            total = sum(map(operator.mul, weights.tolist(), batch.read))
            dtype = batch.present[0].dtype
            dtype = dtype if dtype in WIDE else torch.float32
            return torch.tensor(total, dtype=dtype, device=batch.present[0].device)
        losses = batch.losses
        weights = weights.to(losses.device, losses.dtype, non_blocking=True)
        return (weights * losses).sum()  # a product that autocast leaves alone

    def _current(self, batch: Batch) -> Tensor:
        """The weights (n,) of the present tasks as they stand."""
        assert self.weights is not None
        return take(self.weights, batch.tasks)

    def _label(self, task: int) -> str:
        """How messages call a task."""
        return f"losses[{task}]" if self.names is None else f"losses[{self.names[task]!r}]"

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to continue exactly from here, between two steps."""
        return {
            "method": self.key,
            "steps": self._steps,
            "found": self._found,
            "names": self.names,
            "weights": None if self.weights is None else self.weights.to("cpu", copy=True),
            "stats": dict(self.stats),
            "state": {} if self.weights is None else self._state(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`.

        Raises:
            ValueError: it is another method's, or of another number of tasks or other names.
        """
        method = state_dict.get("method")
        if method != self.key:
            raise ValueError(f"state_dict must be of the method {self.key!r}, got {method!r}")
        weights = state_dict["weights"]
        if None not in (self.n_tasks, weights) and len(weights) != self.n_tasks:
            raise ValueError(f"state_dict must be of {self.n_tasks} tasks, got {len(weights)}")
        names = state_dict["names"]
        if None not in (self.names, names) and self.names != names:
            raise ValueError(f"state_dict must be of the tasks {self.names}, got {names}")
        if weights is None:
            self.reset()
            return
        if self.weights is None:
            self._set_tasks(len(weights))
        assert self.weights is not None
        expected, got = set(self._state()), set(state_dict["state"])
        if expected != got:
            raise ValueError(f"state must hold {sorted(expected)}, got {sorted(got)}")
        self._load(state_dict["state"])
        self.weights = weights.to("cpu", copy=True)  # a map_location moves every tensor of a file
        self.names = None if names is None else list(names)
        self._counted = dict(state_dict["stats"])
        self._steps = state_dict["steps"]
        self._found = state_dict["found"]

    def _state(self) -> dict[str, Any]:
        """The method's own part of `state_dict`, copied; T is known."""
        return {}

    def _load(self, state: Mapping[str, Any]) -> None:
        """Take over a `_state`, whose keys were checked; raises ValueError before it changes
        anything. T is known."""
        return None

    def _options(self) -> dict[str, Any]:
        """Hyperparameters of the method for `repr`."""
        return {}

    def __repr__(self) -> str:
        options = {"n_tasks": self.n_tasks, **self._options()}
        options["update_weights_every"] = self.update_weights_every
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in options.items())})"

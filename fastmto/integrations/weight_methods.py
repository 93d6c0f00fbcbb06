"""`WeightMethods`, as the trainers of the nash-mtl, FAMO and FairGrad repositories call it.

    weight_method = WeightMethods("nashmtl", n_tasks=2, device=device, update_weights_every=10)
    optimizer = torch.optim.Adam([
        dict(params=model.parameters(), lr=1e-3),
        dict(params=weight_method.parameters(), lr=0.025),
    ])
    loss, extra_outputs = weight_method.backward(losses=losses, shared_parameters=..., ...)
    optimizer.step()
    weight_method.method.update(new_losses.detach())          # FAMO

In a trainer: `from fastmto.integrations.weight_methods import METHODS, WeightMethods`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..balancers import GradientBalancer, GramBalancer, Info, registry
from ..checks import check_choice, check_number
from ..weightings import Weighting

#: The family's value of an argument and T -> the balancer's options.
Translation = Callable[[Any, int], Mapping[str, Any]]
#: Weights (n,) and values (n,) of the losses -> factor of the weights.
Factor = Callable[[Tensor, Tensor], Tensor | float]
#: The weighted loss and the extra outputs.
Returned = tuple[Tensor, dict[str, Any]]


@dataclass(frozen=True)
class Convention:
    """How the family calls and scales a method; called with a number of tasks, a `Method`.

    Attributes:
        key: of the balancer, as `fastmto.get`.
        options: of the balancer, before what the caller gives.
        arguments: translations of the family's arguments; others are the balancer's own.
        logarithms: the losses' logarithms take the losses' place.
        mean: the losses are divided by T.
        factor: of the weights of a search.
        max_norm: default length at which the shared parameters' gradient is cut; 0: not at all.
    """

    key: str
    options: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Translation] = field(default_factory=dict)
    logarithms: bool = False
    mean: bool = False
    factor: Factor | None = None
    max_norm: float = 0.0

    def __call__(
        self, n_tasks: int, device: torch.device | str | None = None, **arguments: Any
    ) -> Method:
        cls = registry.method(self.key)
        options = dict(self.options)
        if "device" in inspect.signature(cls).parameters:
            options["device"] = device
        max_norm = 0.0
        if issubclass(cls, GradientBalancer):
            max_norm = arguments.pop("max_norm", self.max_norm)
        for name, value in arguments.items():
            translate = self.arguments.get(name)
            options.update({name: value} if translate is None else translate(value, n_tasks))
        return Method(self, n_tasks, options, max_norm)


def _named(name: str) -> Translation:
    return lambda value, n_tasks: {name: value}


def _unused(value: Any, n_tasks: int) -> Mapping[str, Any]:
    return {}


def _main_task(value: int, n_tasks: int) -> Mapping[str, Any]:
    if value not in range(n_tasks):
        raise ValueError(f"main_task must be one of 0..{n_tasks - 1}, got {value!r}")
    return {"task_weights": [float(i == value) for i in range(n_tasks)]}


def _params(value: str, n_tasks: int) -> Mapping[str, Any]:
    levels = {"shared": "parameters", "rep": "features"}
    check_choice("params", value, tuple(levels))
    return {"level": levels[value]}


def _normalization(value: str, n_tasks: int) -> Mapping[str, Any]:
    return {"normalization": "l2" if value == "norm" else value}


def _tasks(weights: Tensor, losses: Tensor) -> float:
    return float(len(weights))


def _of_logarithms(weights: Tensor, losses: Tensor) -> Tensor:
    return 1 / (weights / losses).sum()


_WEIGHTED = {"heads": "weighted"}
_MGDA: Mapping[str, Translation] = {"params": _params, "normalization": _normalization}

#: The family's names and all of fastmto's own; where both have one it means the family's.
METHODS: dict[str, Convention] = {
    "stl": Convention("ls", arguments={"main_task": _main_task}),
    **{name: Convention(name) for name in ("ls", "uw", "scaleinvls", *registry.available())},
    "rlw": Convention("rlw", mean=True),
    "dwa": Convention("dwa", arguments={"iteration_window": _named("window")}, mean=True),
    "mgda": Convention("mgda", _WEIGHTED, _MGDA, factor=_tasks),
    "log_mgda": Convention("mgda", _WEIGHTED, _MGDA, logarithms=True, factor=_of_logarithms),
    "graddrop": Convention("graddrop", max_norm=1.0),
    "cagrad": Convention("cagrad", factor=_tasks),
    "log_cagrad": Convention("cagrad", logarithms=True, factor=_tasks, max_norm=1.0),
    "imtl": Convention("imtl_g", _WEIGHTED),
    "log_imtl": Convention("imtl_g", _WEIGHTED, logarithms=True),
    "nashmtl": Convention(
        "nashmtl", {**_WEIGHTED, "max_norm": None}, {"optim_niter": _unused}, max_norm=1.0
    ),
    "famo": Convention(
        "famo",
        {"gamma": 1e-5},
        {"w_lr": _named("lr"), "task_weights": _unused, "max_norm": _unused},
    ),
    "fairgrad": Convention("fairgrad", factor=_tasks, max_norm=1.0),
}


class WeightMethods:
    """A method by the name that the family gives it.

    Args:
        method: one of `METHODS`.
        n_tasks: T.
        device: of learnable parameters.
        arguments: the method's own, in the family's spelling or the balancer's.

    Attributes:
        method: the `Method`.

    Raises:
        ValueError: an unknown name, an argument out of range.
        TypeError: an argument that the method does not have.
    """

    def __init__(
        self,
        method: str,
        n_tasks: int,
        device: torch.device | str | None = None,
        **arguments: Any,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        self.method = METHODS[method](n_tasks=n_tasks, device=device, **arguments)

    def backward(self, losses: Tensor | Sequence[Tensor], **tensors: Any) -> Returned:
        """As `Method.backward`."""
        return self.method.backward(losses, **tensors)

    def parameters(self) -> list[Parameter]:
        """Learnable parameters, for the optimizer."""
        return self.method.parameters()

    def update(self, losses: Tensor | Sequence[Tensor]) -> None:
        """The losses after the optimizer's step, for FAMO."""
        self.method.update(losses)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to continue exactly from here."""
        return self.method.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.method.load_state_dict(state)


class Method:
    """A balancer with the family's conventions: `METHODS[name](n_tasks=..., device=...)`.

    - nashmtl, mgda, imtl: the heads, too, learn by the weighted loss; elsewhere by their own.
    - mgda, cagrad, fairgrad: weights are T times the balancer's, "to match the sum loss".
    - rlw, dwa: the weighted losses' mean, not their sum.
    - log_x: x on the losses' logarithms; log_mgda scales them back by 1 / sum_i (w_i / L_i).
    - `max_norm` cuts the gradient of the shared parameters after every backward: 1 by default
      for nashmtl, fairgrad, graddrop and log_cagrad, 0 (off) for the others. The FAMO
      repository's nashmtl and famo cut before their backward, where there is nothing yet to cut:
      famo takes `max_norm` without effect, nashmtl cuts as in its own repository. FAMO's pcgrad
      and cagrad cut at 1: give `max_norm=1.0`.

    Where the originals approximate (Nash-MTL's CCP, MGDA, FairGrad) the balancers are exact;
    nashmtl takes `optim_niter` without effect. uw's weights are (1/2) exp(-s), as in its loss.
    mgda compares gradients at `params="shared"` or "rep", not at "last". dwa's windows do not
    slide, see `fastmto.balancers.DWA`. The other tasks' heads get zero gradients from stl, not
    None.

    In `METHODS` a name that is both the family's and fastmto's means the family's: imtl is
    IMTL-G. The rest of fastmto's keys have fastmto's own conventions, and `max_norm=0`.

    Args:
        convention: of the method.
        n_tasks: T.
        options: of the balancer.
        max_norm: as above.

    Attributes:
        balancer: the `fastmto.balancers.Balancer`.
    """

    def __init__(
        self,
        convention: Convention,
        n_tasks: int,
        options: Mapping[str, Any],
        max_norm: float | None,
    ) -> None:
        self.convention = convention
        self.n_tasks = n_tasks
        self.max_norm = check_number("max_norm", max_norm or 0.0, 0)
        self._options = dict(options)
        self.balancer = self._built()

    def _built(self) -> Any:
        balancer = registry.get(self.convention.key, self.n_tasks, **self._options)
        if self.convention.factor is not None:
            assert isinstance(balancer, GramBalancer)
            balancer.weighting = _Scaled(balancer.weighting, self.convention.factor)
        return balancer

    def backward(
        self,
        losses: Tensor | Sequence[Tensor],
        shared_parameters: Tensor | Iterable[Tensor] | None = None,
        task_specific_parameters: Tensor | Iterable[Tensor] | None = None,
        last_shared_parameters: Tensor | Iterable[Tensor] | None = None,
        representation: Tensor | Sequence[Tensor] | None = None,
        closure: Callable[[], Any] | None = None,
    ) -> Returned:
        """Balanced gradients into `.grad`.

        Args:
            losses: (T,).
            shared_parameters, task_specific_parameters, last_shared_parameters: a tensor or
                several. Without task-specific parameters the graph is walked for them.
            representation: for methods that look at it.
            closure: as `fastmto.balancers.Balancer.backward`; not the family's.

        Returns:
            The weighted sum of the losses, detached (for mean, logarithms: of those), and
            "weights" (T,), what each of them was multiplied by, "GTG", the Gram matrix as a numpy
            array after a search that computed one, and "info", `fastmto.balancers.Info`.
        """
        given = list(losses)
        scaled = getattr(self.balancer, "weighting", None)
        if isinstance(scaled, _Scaled):
            scaled.losses = [loss.detach().reshape(()) for loss in given]
        if self.convention.logarithms:
            for i, loss in enumerate(given):
                if loss.item() <= 0:
                    raise ValueError(
                        f"losses[{i}] must be positive: its logarithm is taken; got {loss.item():g}"
                    )
            given = [loss.log() for loss in given]
        if self.convention.mean:
            given = [loss / self.n_tasks for loss in given]
        shared = _listed(shared_parameters)
        at_features = getattr(self.balancer, "level", None) == "features"
        loss, info = self.balancer.backward(
            given,
            shared_parameters=shared,
            task_specific_parameters=_listed(task_specific_parameters) or None,
            last_shared_parameters=_listed(last_shared_parameters),
            features=representation if at_features else None,
            closure=closure,
        )
        if self.max_norm > 0 and shared and info.skipped is None:
            torch.nn.utils.clip_grad_norm_(shared, self.max_norm)
        return loss, self._extra(info)

    def _extra(self, info: Info) -> dict[str, Any]:
        assert info.weights is not None
        weights = info.weights / self.n_tasks if self.convention.mean else info.weights
        extra: dict[str, Any] = {"weights": weights, "info": info}
        if info.gram is not None:
            extra["GTG"] = info.gram.cpu().numpy()
        return extra

    def parameters(self) -> list[Parameter]:
        """Learnable parameters, for the optimizer."""
        parameters: list[Parameter] = self.balancer.parameters()
        return parameters

    def update(self, losses: Tensor | Sequence[Tensor]) -> None:
        """The losses after the optimizer's step, for FAMO."""
        if not hasattr(self.balancer, "update"):
            raise TypeError(f"{self.convention.key} takes no losses after the step")
        self.balancer.update(losses)

    def set_min_losses(self, losses: Tensor | Sequence[float]) -> None:
        """FAMO's lower bounds of the losses (T,), before the first step."""
        if self.balancer.stats["steps"]:
            raise RuntimeError("set_min_losses must come before the first backward")
        self._options["min_losses"] = [float(loss) for loss in losses]
        self.balancer = self._built()

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to continue exactly from here."""
        state: dict[str, Any] = self.balancer.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.balancer.load_state_dict(state)


class _Scaled(Weighting):
    """A weighting's weights times a factor that may look at the T losses, `losses`."""

    def __init__(self, weighting: Weighting, factor: Factor) -> None:
        self.weighting = weighting
        self.factor = factor
        self.losses: list[Tensor] = []

    @property
    def needs_losses(self) -> str:
        return self.weighting.needs_losses

    def __call__(
        self, gram: Tensor, tasks: Sequence[int] | None = None, **losses: Tensor
    ) -> Tensor:
        weights = self.weighting(gram, tasks, **losses)
        self.result = self.weighting.result
        present = self.losses if tasks is None else [self.losses[i] for i in tasks]
        return weights * self.factor(weights, torch.stack(present).to(weights))

    def state_dict(self) -> dict[str, Any]:
        return self.weighting.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weighting.load_state_dict(state)

    def reset(self) -> None:
        super().reset()
        self.weighting.reset()


def _listed(parameters: Tensor | Iterable[Tensor] | None) -> list[Tensor] | None:
    if parameters is None:
        return None
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)

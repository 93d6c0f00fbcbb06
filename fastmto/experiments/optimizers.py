"""What `train` trains with: plain optimizers, methods before an optimizer, PUB and its kin."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

import fastmto

from .models.base import MultiTaskModel

#: Learning rate of a method's own parameters, that of the nash-mtl family's trainers.
METHOD_LR = 0.025
#: Steps between two searches of weights, where a search costs more than the step itself.
SEARCH_EVERY = 10

Losses = Tensor | Sequence[Tensor]


class Stepper(Protocol):
    """What moves parameters by their `.grad`; every torch optimizer does."""

    def zero_grad(self) -> None:
        """Clears the gradients."""

    def step(self) -> Any:
        """Moves the parameters."""


class Balancer(Stepper, Protocol):
    """What `train` asks of an optimizer; `fastmto.PUB` and `fastmto.AdaTask` have it."""

    @property
    def stats(self) -> dict[str, int]:
        """Counts of what happened; "steps" and "backwards" among them."""

    @property
    def weights(self) -> Tensor | None:
        """Task weights (T,) of the last step."""

    def backward(self, losses: Losses) -> None:
        """Takes the T losses in place of `loss.backward()`."""


class SummedLosses:
    """Equal weighting: any torch optimizer on the sum of the losses, as a `Balancer`.

    Args:
        optimizer: over all parameters.
        n_tasks: T.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, n_tasks: int) -> None:
        self.optimizer = optimizer
        self.weights = torch.ones(n_tasks, dtype=torch.float64)
        self.stats = {"steps": 0, "backwards": 0}

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def backward(self, losses: Losses) -> None:
        torch.autograd.backward(losses.sum() if isinstance(losses, Tensor) else losses)
        self.stats["backwards"] += 1

    def step(self) -> None:
        self.optimizer.step()
        self.stats["steps"] += 1

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"


class Balanced:
    """A method of `fastmto.available()` before any torch optimizer, as a `Balancer`.

    Args:
        balancer: the method.
        optimizer: over the model's and the method's parameters.
        shared_parameters, task_parameters, last_shared_parameters: of the model.

    Attributes:
        looks_back: whether the method wants `update(losses)` after every step.
        at_features: whether the method compares gradients at the features.
    """

    def __init__(
        self,
        balancer: fastmto.balancers.Balancer,
        optimizer: Stepper,
        shared_parameters: Iterable[Tensor],
        task_parameters: Iterable[Iterable[Tensor]],
        last_shared_parameters: Iterable[Tensor] | None = None,
    ) -> None:
        self.balancer = balancer
        self.optimizer = optimizer
        self._shared = list(shared_parameters)
        self._heads = [list(head) for head in task_parameters]
        self._last_shared = None if last_shared_parameters is None else list(last_shared_parameters)
        self.looks_back = balancer.needs_update
        self.at_features = getattr(balancer, "level", None) == "features"

    @property
    def stats(self) -> dict[str, int]:
        return self.balancer.stats

    @property
    def weights(self) -> Tensor | None:
        return self.balancer.weights

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def backward(
        self,
        losses: Losses,
        features: Tensor | Sequence[Tensor] | None = None,
        closure: Callable[[], Losses] | None = None,
    ) -> None:
        """As the method's `backward`, which also gets the parameters."""
        self.balancer.backward(
            losses, self._shared, self._heads, self._last_shared, features, closure
        )

    def step(self) -> None:
        self.optimizer.step()

    def update(self, losses: Losses) -> None:
        """Tells the method the losses after the step; for methods that look back."""
        self.balancer.update(losses)  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.balancer!r}, {self.optimizer!r})"


MakeBalancer = Callable[[MultiTaskModel], Balancer]


def search_every(name: str) -> int:
    """Steps between two searches of a method of `fastmto.available()`, unless told otherwise.

    1 for methods whose weights come from the losses, which a search costs nothing; else
    `SEARCH_EVERY`.
    """
    by_losses = isinstance(fastmto.get(name, n_tasks=2), fastmto.balancers.LossBalancer)
    return 1 if by_losses else SEARCH_EVERY


def balancer(
    name: str, *, lr: float, weight_decay: float = 0.0, update_weights_every: int | None = None
) -> MakeBalancer:
    """What `train` needs to build a balancer by name, with the library's other defaults.

    Args:
        name: "equal" (torch's fused Adam on the summed losses, whose decay is the classical one);
            a name of `fastmto.available()` (the method, then the same fused Adam; its own
            parameters, if it has any, with learning rate `METHOD_LR` and no decay); "clippy"
            (`ClippyAdam` on the summed losses), "adatask", "pub_clippy" or "pub_adatask". "pub"
            is `fastmto.PUB`.
        lr: learning rate.
        weight_decay: the optimizer's.
        update_weights_every: steps between two searches of weights, where there are searches;
            None: `search_every`.

    Raises:
        ValueError: an unknown name.
    """
    every = update_weights_every

    def equal(model: MultiTaskModel) -> Balancer:
        adam = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
        return SummedLosses(adam, len(model.task_parameters()))

    def clippy(model: MultiTaskModel) -> Balancer:
        adam = fastmto.ClippyAdam(model.parameters(), lr=lr, weight_decay=weight_decay)
        return SummedLosses(adam, len(model.task_parameters()))

    def adatask(model: MultiTaskModel) -> Balancer:
        return fastmto.AdaTask(
            model.shared_parameters(), model.task_parameters(), lr=lr, weight_decay=weight_decay
        )

    def pub(*, clippy: bool = False, adatask: bool = False) -> MakeBalancer:
        return lambda model: fastmto.PUB(
            model.shared_parameters(),
            model.task_parameters(),
            lr=lr,
            weight_decay=weight_decay,
            update_weights_every=every or SEARCH_EVERY,
            clippy=clippy,
            adatask=adatask,
        )

    def by_name(model: MultiTaskModel) -> Balancer:
        heads = model.task_parameters()
        method = fastmto.get(name, len(heads), update_weights_every=every or search_every(name))
        parameters = list(model.parameters())
        own = method.parameters()
        for parameter in own:
            parameter.data = parameter.data.to(parameters[0].device)
        groups: list[dict[str, Any]] = [{"params": parameters}]
        if own:
            groups.append({"params": own, "lr": METHOD_LR, "weight_decay": 0.0})
        adam = torch.optim.Adam(groups, lr=lr, weight_decay=weight_decay, fused=True)
        return Balanced(
            method, adam, model.shared_parameters(), heads, model.last_shared_parameters()
        )

    makers: dict[str, MakeBalancer] = {
        "equal": equal,
        **dict.fromkeys(fastmto.available(), by_name),
        "pub": pub(),
        "pub_clippy": pub(clippy=True),
        "pub_adatask": pub(adatask=True),
        "adatask": adatask,
        "clippy": clippy,
    }
    if name not in makers:
        raise ValueError(f"balancer must be one of {', '.join(makers)}, got {name!r}")
    return makers[name]

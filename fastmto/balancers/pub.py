"""PUB behind the call of the balancers, for training loops that step a torch optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..engine.balancer import Balancer
from ..engine.batch import Batch, Info
from ..engine.survey import heads_of
from ..optim import pub


class PUB(Balancer):
    """PUB behind the call of the balancers: it moves the parameters inside `backward`.

    PUB balances the updates that Adam would make, so it is an optimizer itself: prefer
    `fastmto.PUB` where the loop is yours. This class serves loops that call
    `balancer.backward(...)` and then step a torch optimizer of their own. The parameters named in
    the call are moved by PUB at once and have no `.grad` afterwards, so the other optimizer
    leaves them alone. Its learning rate is `lr` here, not the other optimizer's; a scheduler works
    on `optimizer`, which exists from the first `backward` on. Every call reads its counts, which
    synchronizes with the device, and there is no GradScaler here.

    Source: PUB, arXiv 2410.05806; see `fastmto.PUB`.

    Args:
        n_tasks: T; None: found at the first backward.
        lr: learning rate.
        update_weights_every, on_nonfinite, options: as `fastmto.PUB`.

    Attributes:
        optimizer: the `fastmto.PUB`; None before the first `backward`.

    Example:
        >>> import torch, fastmto
        >>> trunk, heads = torch.nn.Linear(4, 8), [torch.nn.Linear(8, 1) for _ in range(2)]
        >>> balancer = fastmto.balancers.PUB(lr=1e-2)
        >>> losses = [head(trunk(torch.ones(3, 4))).exp().mean() for head in heads]
        >>> owned = [head.parameters() for head in heads]
        >>> loss, info = balancer.backward(losses, trunk.parameters(), owned)
        >>> info.weights.shape
        torch.Size([2])
    """

    key = "pub"

    def __init__(
        self,
        n_tasks: int | None = None,
        *,
        lr: float = 1e-3,
        update_weights_every: int = 10,
        on_nonfinite: str = "skip",
        **options: Any,
    ) -> None:
        self._pub_options = {
            "lr": lr,
            "update_weights_every": update_weights_every,
            "on_nonfinite": on_nonfinite,
            **options,
        }
        super().__init__(
            n_tasks, update_weights_every=update_weights_every, on_nonfinite=on_nonfinite
        )

    def reset(self) -> None:
        self.optimizer: pub.PUB | None = None
        self._listed: list[Tensor] = []
        self._saved: dict[str, Any] | None = None
        super().reset()

    def _backward(self, batch: Batch, searches: bool) -> tuple[Tensor, Info]:
        assert self.weights is not None
        for name, given in (
            ("shared_parameters", batch.shared),
            ("task_specific_parameters", batch.heads),
        ):
            if given is None:
                raise ValueError(f"{name} must be given to PUB.backward, got None")
        if batch.seed is not None:
            raise ValueError(
                "scaler must be None for this class, which steps inside backward: `scaler.step` of "
                "another optimizer would find no gradient; with fastmto.PUB call "
                "optimizer.backward(losses, scaler=scaler) and scaler.step(optimizer)"
            )
        assert batch.shared is not None
        heads = heads_of(batch, batch.shared, self.names, len(self.weights))
        listed = [*batch.shared, *(p for _, p in heads)]
        if self.optimizer is None:
            owned = bool(heads) and all(owner is not None for owner, _ in heads)
            by_task = [[p for i, p in heads if i == task] for task in range(len(self.weights))]
            self.optimizer = pub.PUB(
                batch.shared,  # type: ignore[arg-type]
                by_task if owned else [p for _, p in heads],  # type: ignore[arg-type]
                **self._pub_options,
            )
            self._listed = listed
            if self._saved is not None:
                self.optimizer.load_state_dict(self._saved)
                self._saved = None
        if len(listed) != len(self._listed) or any(
            p is not q for p, q in zip(listed, self._listed, strict=True)
        ):
            raise ValueError(
                "shared_parameters and task_specific_parameters must be those of the first call: "
                "PUB is the optimizer of these"
            )
        optimizer = self.optimizer
        before = dict(optimizer.stats)
        optimizer.backward(
            batch.values, unbalanced=batch.unbalanced, retain_graph=batch.retain_graph
        )
        if not batch.accumulate:
            optimizer.step()
            optimizer.zero_grad()
        for name in ("searches", "backwards", "held", "skipped", "untouched"):
            self._counted[name] += optimizer.stats[name] - before[name]
        assert optimizer.weights is not None
        self.weights = optimizer.weights.clone()
        skipped = optimizer.stats["skipped"] > before["skipped"]
        searched = optimizer.stats["searches"] > before["searches"]
        info = Info(
            self.weights,
            self.names,
            gram=optimizer.gram if searched else None,
            result=optimizer.result if searched else None,
            skipped="a gradient is not finite" if skipped else None,
        )
        return self._weighted_sum(batch), info

    def _state(self) -> dict[str, Any]:
        return {"optimizer": self._saved if self.optimizer is None else self.optimizer.state_dict()}

    def _load(self, state: Mapping[str, Any]) -> None:
        if self.optimizer is None or state["optimizer"] is None:
            self.optimizer = None
            self._saved = state["optimizer"]
        else:
            self.optimizer.load_state_dict(state["optimizer"])

    def _options(self) -> dict[str, Any]:
        return {k: v for k, v in self._pub_options.items() if k != "update_weights_every"}

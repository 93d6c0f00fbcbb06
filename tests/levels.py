"""One driver around every method of both levels, for the tests of torch's features.

A row says what to build: `Update` an optimizer (PUB, AdaTask), `BalancerCase` a balancer beside a
torch optimizer. `drive(row)` puts it to work on a small model. A method joins the tests of mixed
precision, capturing, compile, clipping, accumulation, freezing and resume with a row here.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from balancer_cases import CASES, BalancerCase, same
from problems import net
from reads import nothing_is_read
from torch import Tensor, nn

import fastmto
from fastmto.balancers import GramBalancer, Info
from fastmto.optim.rules import AdaGrad, RMSProp
from fastmto.weightings import MGDA, Bargaining, Constant, Equal

#: Tasks of every row.
T = 3
#: (feature, family) that are still to come; take a pair out when it lands.
PENDING = {
    ("retain_graph", "marigold"),
    ("unbalanced", "marigold"),
    ("freezing", "marigold"),
}


@dataclass(frozen=True)
class Update:
    """An optimizer of the update level and its options.

    `flat`: the heads come in one list, without their tasks.
    """

    options: dict[str, Any] = field(default_factory=dict)
    kind: type[fastmto.PUB] | type[fastmto.AdaTask] = fastmto.PUB
    flat: bool = False
    level: str = "update"
    key: str = "pub"

    def build(self, shared: Any, heads: Any, **options: Any) -> Any:
        options = {"lr": 0.01, **copy.deepcopy(self.options), **options}
        heads = [p for head in heads for p in head] if self.flat else heads
        return self.kind(shared, heads, **options)

    @property
    def exact(self) -> bool:
        """Weights that may be 0 cannot be divided out of the heads' gradients, which rounds."""
        return not isinstance(self.options.get("weighting"), MGDA | Constant)

    def __str__(self) -> str:
        options = ",".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.kind.__name__}({options}){'flat' * self.flat}"


class Fixed(GramBalancer):
    """Weights that do not depend on the gradients, by the path of those that do."""

    key = "fixed"


@dataclass(frozen=True)
class FixedCase(BalancerCase):
    def build(self, n_tasks: int | None = T, **kwargs: Any) -> Fixed:
        del n_tasks
        weighting = Equal() if self.key == "equal" else Constant([0.5, 2.0, 0.25])
        return Fixed(weighting, **{**self.options, **kwargs})


def every(n: int, **options: Any) -> Update:
    return Update({"update_weights_every": n, **options})


UPDATES = [
    Update(),
    every(1),
    every(3),
    every(3, between="per_task"),
    every(2, delayed=True),
    every(2, clippy=True),
    every(2, adatask=True),
    every(2, adatask=True, clippy=True, delayed=True),
    every(2, scale="rms"),
    every(2, scale="sum", max_weight=1.1),
    every(2, scale="none", max_weight=None, weight_decay=0.1),
    every(2, rule=AdaGrad()),
    every(2, rule=RMSProp(momentum=0.9, centered=True)),
    every(2, weighting=MGDA()),
    every(2, weighting=Constant([0.5, 2.0, 0.25])),
    every(2, weighting=Bargaining(preference=[1.0, 3.0, 0.5])),
    Update({"weighting": None}),
    Update({"clippy": True}, kind=fastmto.AdaTask),
]
#: One of each kind, for tests whose cost is in their number.
SOME_UPDATES = [UPDATES[k] for k in (1, 3, 4, 5, 6, 13, 16, 17)]
#: The gradient-level methods that can decide on the device.
ON_DEVICE = [
    BalancerCase("nashmtl", level="gradient"),
    BalancerCase("nashmtl", {"max_norm": None}, "unbounded", level="gradient"),
    BalancerCase("nashmtl", {"preference": [1.0, 4.0, 0.5]}, "preference", level="gradient"),
    BalancerCase("nashmtl", {"ridge": 0.1}, "ridge", level="gradient"),
    BalancerCase("mgda", level="gradient"),
    BalancerCase("mgda", {"normalization": "l2"}, "l2", level="gradient"),
    FixedCase("equal", level="gradient"),
    FixedCase("constant", level="gradient"),
]
#: Every balancer, in every form that scales or delivers gradients in a way of its own.
BALANCERS = [
    *CASES,
    BalancerCase("mgda_ub", level="gradient"),
    BalancerCase("nashmtl", {"capturable": True}, "capturable", level="gradient"),
    BalancerCase("nashmtl", {"heads": "weighted"}, "weighted heads", level="gradient"),
    BalancerCase("nashmtl", {"level": "features"}, "features", level="gradient"),
    BalancerCase("nashmtl", {"passes": "batched"}, "batched", level="gradient"),
    BalancerCase("marigold", {"estimator": "forward"}, "forward"),
    BalancerCase("marigold", {"estimator": "central"}, "central"),
    BalancerCase("marigold", {"estimator": "reuse"}, "reuse"),
    BalancerCase("marigold", {"estimator": "directions"}, "directions"),
    BalancerCase("marigold", {"estimator": "span", "span": "steps"}, "steps"),
    BalancerCase("marigold", {"estimator": "span", "span_refresh": 2}, "gradients"),
]
Row = Update | BalancerCase


def rows_for(feature: str, rows: Sequence[Row]) -> list[Any]:
    """Parameters of a test of `feature`; those that wait for it may fail."""
    pending = pytest.mark.xfail(strict=False, reason=f"waits for {feature}")
    return [
        pytest.param(row, marks=[pending] if (feature, family(row)) in PENDING else [], id=str(row))
        for row in rows
    ]


def family(row: Row) -> str:
    return row.key if row.key in ("marigold", "db_mtl") else row.level


def on_device(row: Row) -> Row:
    """The row, its decisions made on the device."""
    label = {} if isinstance(row, Update) else {"label": f"{row.label} capturable".strip()}
    return dataclasses.replace(row, options={**row.options, "capturable": True}, **label)


def is_exact(row: Row, options: dict[str, Any]) -> bool:
    """Whether a step decided on the device has the host's bits. Where weights may be 0, the heads
    get a backward of their own between two searches."""
    if isinstance(row, Update):
        return row.exact
    return row.key not in ("mgda", "constant") or options.get("update_weights_every", 1) == 1


class Driver:
    """A small model with T tasks, the method of a row, and the training loop around them.

    Args:
        row: what to build.
        dtype, device: of model and data.
        scale: a GradScaler starts with; None: no scaler.
        scaling: further options of the scaler.
        frozen: which parameters are, at construction.
        leave_out: the frozen parameters are not listed either.
        options: of the method, beside the row's.

    Attributes:
        method: the balancer, or the optimizer of the update level.
        optimizer: what `step` is called on.
        factor: multiplies the first task's loss.
        kick: is added to the first task's gradients of `kicked()`.
    """

    def __init__(
        self,
        row: Row,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        *,
        scale: float | None = None,
        scaling: dict[str, Any] | None = None,
        frozen: Callable[[Driver], list[nn.Parameter]] | None = None,
        leave_out: bool = False,
        **options: Any,
    ) -> None:
        self.row, self.dtype, self.device = row, dtype, device
        self.model = net(1, n_tasks=T).to(device, dtype)
        self.shared = list(self.model.trunk.parameters())
        self.heads = self.model.head_parameters()
        still = frozen(self) if frozen else []
        for p in still:
            p.requires_grad_(False)
        if leave_out:
            ids = {id(p) for p in still}
            self.shared = [p for p in self.shared if id(p) not in ids]
            self.heads = [[p for p in head if id(p) not in ids] for head in self.heads]
        self._build(options)
        self.scaler: torch.amp.GradScaler | None = None
        if scale:
            self.scaler = torch.amp.GradScaler(device, init_scale=scale, **(scaling or {}))
            self.scaler.scale(torch.ones((), device=device))  # the scale exists from now on
        self.factor, self.kick = 1.0, 0.0

    def _build(self, options: dict[str, Any]) -> None:
        self.method: Any = self.row.build(T, **options)
        learned = self.method.parameters()
        # Momentum: a parameter that wrongly gets a zero gradient moves on.
        self.optimizer: Any = torch.optim.Adam([*self.parameters, *learned], 0.01, foreach=False)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def weights(self) -> Tensor:
        return self.method.weights

    @property
    def stats(self) -> dict[str, int]:
        return self.method.stats

    @property
    def grads(self) -> list[Tensor | None]:
        return [None if p.grad is None else p.grad.clone() for p in self.parameters]

    def data(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(100 + step)
        x = torch.randn(12, 6, generator=generator, dtype=torch.float64)
        return x.to(self.device, self.dtype)

    def losses(self, step: int) -> list[Tensor]:
        """Positive, of different sizes."""
        x = self.data(step)
        self.z = self.model.trunk(x)
        losses = [
            (head(self.z.tanh()) - (i + 1) * (1 + x[:, :1].sin() / 2)).pow(2).mean() + 0.1
            for i, head in enumerate(self.model.heads)
        ]
        first = self.factor * losses[0]
        for x in self.kicked() if self.kick else ():
            first = first + self.kick * (x - x.detach()).sum()
        return [first, *losses[1:]]

    def kicked(self) -> list[Tensor]:
        """What `kick` is added to the gradients of: the features and the first task's head."""
        return [self.z, *self.heads[0]]

    def arguments(self, step: int) -> dict[str, Any]:
        return {
            "shared_parameters": self.shared,
            "task_specific_parameters": self.heads,
            "last_shared_parameters": list(self.model.trunk[2].parameters()),
            "features": self.z,
            "closure": lambda: self.losses(step),
        }

    def backward(self, losses: Any, step: int = 0, **options: Any) -> Info:
        if self.scaler is not None:
            options = {"scaler": self.scaler, **options}
        self.loss, info = self.method.backward(losses, **{**self.arguments(step), **options})
        return info

    def zero_grad(self, **options: Any) -> None:
        self.optimizer.zero_grad(**options)

    def move(self) -> None:
        """The optimizer's step, by way of the scaler if there is one."""
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def finish(self, step: int, absent: Sequence[int] = ()) -> None:
        """`move`, and `update` where there is one."""
        self.move()
        if getattr(self.method, "needs_update", False):
            with torch.no_grad():
                self.method.update(self._present(step, absent))

    def step(self, step: int, absent: Sequence[int] = (), *, reads: bool = True, **options) -> Info:
        """One step of the loop. `reads` False: it may not read what the device computes."""
        self.zero_grad()
        losses = self._present(step, absent)
        with nothing_is_read(reads):
            info = self.backward(losses, step, **options)
        self.finish(step, absent)
        return info

    def run(self, steps: Sequence[int], **options: Any) -> None:
        for step in steps:
            self.step(step, absent_at(step), **options)

    def _present(self, step: int, absent: Sequence[int]) -> list[Tensor | None]:
        return [None if i in absent else loss for i, loss in enumerate(self.losses(step))]

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, copied."""
        parts = {"model": self.model, "method": self.method, "optimizer": self.optimizer}
        return copy.deepcopy({name: part.state_dict() for name, part in parts.items()})

    def load(self, state: dict[str, Any]) -> None:
        for name in ("model", "method", "optimizer"):
            getattr(self, name).load_state_dict(state[name])

    def twin(self, how: str) -> Driver:
        """A copy of model, method and optimizer, by "pickle" or "deepcopy"."""
        parts = self.model, self.method, self.optimizer
        twin = copy.copy(self)
        copied = copy.deepcopy(parts) if how == "deepcopy" else pickle.loads(pickle.dumps(parts))
        twin.model, twin.method, twin.optimizer = copied
        twin.shared = list(twin.model.trunk.parameters())
        twin.heads = twin.model.head_parameters()
        return twin

    def snapshot(self) -> dict[str, Any]:
        """What a skipped step leaves alone: everything but its count."""
        state = copy.deepcopy(self.method.state_dict())
        state["stats"].pop("skipped")
        if "gram" in state["state"]:  # MARIGOLD has NaN where it knows nothing
            state["state"]["gram"].nan_to_num_(-1.0)
        state["state"].pop("heads", None)  # whose they are is found whatever their gradients
        smoothed = state["state"].get("smoothed")
        if smoothed is None or not any(x.any() for x in smoothed):
            state["state"].pop("smoothed", None)  # DB-MTL's: zeros once P is known
        return {"model": copy.deepcopy(self.model.state_dict()), "method": state}

    def settled(self) -> dict[str, Any]:
        """Of `snapshot`, what a step that is skipped without a look leaves alone."""
        weights = self.method.state_dict()["weights"]
        return {"model": copy.deepcopy(self.model.state_dict()), "weights": weights}

    def step_back(self, steps: int) -> None:
        """Take back steps of the phase of searches."""
        self.method._steps -= steps

    def counts(self, exact: bool = True) -> dict[str, int]:
        """`stats`, without the passes that only the device needs unless `exact`."""
        return {k: n for k, n in self.stats.items() if exact or k != "backwards"}


class UpdateDriver(Driver):
    """The optimizer of the update level is the method."""

    def _build(self, options: dict[str, Any]) -> None:
        self.method = self.optimizer = self.row.build(self.shared, self.heads, **options)

    def backward(self, losses: Any, step: int = 0, **options: Any) -> Info:
        del step
        if self.scaler is not None:
            options = {"scaler": self.scaler, **options}
        self.loss = None
        self.method.backward(losses, **options)
        return Info(None)

    def step(self, step: int, absent: Sequence[int] = (), *, reads: bool = True, **options) -> Info:
        """As `Driver.step`, and nothing is read by the optimizer's step either."""
        self.zero_grad()
        losses, searches = self._present(step, absent), self.method.stats["searches"]
        skipped = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with nothing_is_read(reads):
                self.backward(losses, step, **options)
                self.finish(step, absent)
        for one in caught:
            if "step skipped" not in str(one.message):
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
            skipped = str(one.message)
        searched = self.method.stats["searches"] > searches
        gram, result = (self.method.gram, self.method.result) if searched else (None, None)
        return Info(self.weights, None, gram, result, skipped=skipped)

    def state(self) -> dict[str, Any]:
        parts = {"model": self.model, "method": self.method}
        return copy.deepcopy({name: part.state_dict() for name, part in parts.items()})

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.method.load_state_dict(state["method"])

    def step_back(self, steps: int) -> None:
        self.method._search.steps -= steps

    def settled(self) -> dict[str, Any]:
        state = copy.deepcopy(self.method.state_dict())
        kept = {name: state["fastmto"][name] for name in ("weights", "counts")}
        model = copy.deepcopy(self.model.state_dict())
        return {"model": model, "moments": state["state"], **kept}

    def snapshot(self) -> dict[str, Any]:
        stats = {k: n for k, n in self.stats.items() if k not in ("skipped", "backwards")}
        return {**self.settled(), "stats": stats}


def drive(row: Row, *args: Any, **options: Any) -> Driver:
    return (UpdateDriver if isinstance(row, Update) else Driver)(row, *args, **options)


def absent_at(step: int) -> tuple[int, ...]:
    """The tasks that stay away from a step."""
    return {2: (0,), 5: (1, 2)}.get(step, ())


def assert_same(a: Any, b: Any, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Tensors, or None in both: equal bit for bit, or within tolerances."""
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        if x is not None and rtol == atol == 0:
            assert x.dtype == y.dtype
            assert torch.equal(x, y)
        elif x is not None:
            torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


def assert_same_run(a: Driver, b: Driver) -> None:
    """Parameters, moments, everything learned and every count, bit for bit."""
    assert same(a.snapshot(), b.snapshot())
    assert a.stats == b.stats
    if a.method is not a.optimizer:
        assert same(a.optimizer.state_dict(), b.optimizer.state_dict())


def assert_close_run(a: Driver, b: Driver, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    assert_same(a.parameters, b.parameters, rtol, atol)


class Linear:
    """One shared tensor, losses of given gradients, a method that is told to be capturable."""

    def __init__(self, row, size: int = 2, n_tasks: int = 2, **options: Any) -> None:
        self.x = nn.Parameter(torch.zeros(size, dtype=torch.float64))
        self.row = row
        options = {"capturable": True, **options}
        if row.level == "update":
            self.method = row.build([self.x], [[]] * n_tasks, **options)
        else:
            self.method = row.build(n_tasks, **options)

    def step(self, rows, *, reads: bool = True, **options: Any):
        """One step on losses whose gradients are `rows`, None for an absent task; its `Info`, or
        the optimizer's own attributes."""
        x = self.x
        x.grad = None
        rows = [None if r is None else torch.as_tensor(r, dtype=x.dtype) for r in rows]
        losses = [None if r is None else (x * r).sum() for r in rows]
        with nothing_is_read(reads):
            if self.row.level != "update":
                return self.method.backward(losses, [x], [], **options)[1]
            self.method.backward(losses, **options)
            self.method.step()
        return self.method


REGULAR = [[1.0, 0.2], [0.1, 2.0]]
HELD = {
    "near_stationary": [[3.0, 0.0], [-1.0, 0.0]],
    "zero_update": [[3.0, 1.0], [0.0, 0.0]],
    "not_finite": [[3.0, 1.0], [0.0, math.inf]],
}

"""Balancers that decide on the device: what they find, and that nothing is read on the way."""

from __future__ import annotations

import copy
import gc
import importlib
import itertools
import math
import pickle
import weakref
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from problems import net
from reads import NothingGoesToTheHost, NothingIsRead
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastmto
from fastmto import ops
from fastmto.balancers import GramBalancer
from fastmto.engine.gradient_level import GradientLevel

T = 3
close = torch.testing.assert_close
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: float(x[0]),
        lambda x: x[x > 1],
        lambda x: x.to("cpu"),
        lambda x: x.isfinite().nonzero(),
        lambda x: torch.tensor([1.0]) + x,
    ],
)
def test_reading_is_noticed(read):
    with pytest.raises(AssertionError), NothingIsRead(), NothingGoesToTheHost():
        read(torch.ones(2))


def test_the_host_s_step_reads():
    world = World(METHODS[0].build(capturable=False))
    world.step(0)
    with pytest.raises(AssertionError):
        world.step(1, reads=False)


@dataclass(frozen=True)
class Method:
    """A balancer that can stay on the device.

    Attributes:
        exact: whether the steps between two searches have the host's bits: where weights may be
            0, the heads get a backward of their own.
    """

    key: str
    options: dict[str, Any] = field(default_factory=dict)
    exact: bool = True

    def build(self, **options: Any) -> GramBalancer:
        options = {**self.options, **options}
        if self.key in ("equal", "constant"):
            options.pop("n_tasks", None)
            fixed = fastmto.weightings.Constant([0.5, 2.0, 0.25])
            return Fixed(fastmto.weightings.Equal() if self.key == "equal" else fixed, **options)
        balancer = fastmto.get(self.key, **options)
        assert isinstance(balancer, GramBalancer)
        return balancer

    def __str__(self) -> str:
        return "-".join([self.key, *(f"{k}={v}" for k, v in self.options.items())])


class Fixed(GramBalancer):
    key = "fixed"


METHODS = [
    Method("nashmtl"),
    Method("nashmtl", {"max_norm": None}),
    Method("nashmtl", {"preference": [1.0, 4.0, 0.5]}),
    Method("nashmtl", {"ridge": 0.1}),
    Method("mgda", exact=False),
    Method("mgda", {"normalization": "l2"}, exact=False),
    Method("equal"),
    Method("constant", exact=False),
]
every_method = pytest.mark.parametrize("method", METHODS, ids=str)


class World:
    """A model, a balancer, an optimizer.

    Args:
        balancer: to be called.
        dtype: of model and data.
        device: of both.
    """

    def __init__(
        self, balancer: GramBalancer, dtype: torch.dtype = torch.float64, device: str = "cpu"
    ) -> None:
        self.balancer = balancer
        self.model = net(2, n_tasks=T).to(device, dtype)
        self.shared = list(self.model.trunk.parameters())
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2, foreach=False)
        self.dtype = dtype
        self.device = device

    def data(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
        return x.to(self.device, self.dtype)

    def losses(self, step: int, absent: tuple[int, ...] = ()) -> tuple[list[Tensor | None], Tensor]:
        """The losses and the features."""
        x = self.data(step)
        z = self.model.trunk(x)
        losses = [
            (head(z.tanh()) - (i + 1) * x[:, :1].sin()).pow(2).mean() + 0.1
            for i, head in enumerate(self.model.heads)
        ]
        return [None if i in absent else loss for i, loss in enumerate(losses)], z

    def backward(self, losses: list[Tensor | None], features: Tensor, **options: Any):
        return self.balancer.backward(
            losses,
            shared_parameters=self.shared,
            task_specific_parameters=self.model.head_parameters(),
            features=features,
            **options,
        )

    def step(self, step: int, absent: tuple[int, ...] = (), *, reads: bool = True):
        """One step; what `backward` returned. `reads` False: it may read nothing."""
        self.optimizer.zero_grad()
        losses, z = self.losses(step, absent)
        if reads:
            returned = self.backward(losses, z)
        else:
            with NothingIsRead(), NothingGoesToTheHost():
                returned = self.backward(losses, z)
        self.optimizer.step()
        return returned

    @property
    def grads(self) -> list[Tensor | None]:
        return [None if p.grad is None else p.grad.clone() for p in self.model.parameters()]


def absent_at(step: int) -> tuple[int, ...]:
    return {2: (0,), 5: (1, 2)}.get(step, ())


def assert_same(a: Any, b: Any, exact: bool = True) -> None:
    """Equal, bit for bit or nearly, None where the other is None."""
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        if x is not None and exact:
            assert torch.equal(x, y)
        elif x is not None:
            close(x, y, rtol=1e-6, atol=1e-9)


def counts(balancer: GramBalancer, exact: bool) -> dict[str, int]:
    """`stats`, but for the passes that only the device needs."""
    return {k: n for k, n in balancer.stats.items() if exact or k != "backwards"}


@every_method
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("level", ["parameters", "features"])
@pytest.mark.parametrize("heads", ["own", "weighted"])
def test_is_the_host_s_step_and_reads_nothing(method, every, level, heads):
    options = {"update_weights_every": every, "level": level, "heads": heads, "n_tasks": T}
    there = World(method.build(capturable=True, **options))
    here = World(method.build(capturable=False, **options))
    exact = method.exact or every == 1
    for step in range(8):
        loss, info = there.step(step, absent_at(step), reads=step == 0)
        expected, told = here.step(step, absent_at(step))
        assert_same(there.grads, here.grads, exact)
        assert_same([loss, info.weights, info.gram], [expected, told.weights, told.gram], exact)
        if method.key in ("nashmtl", "mgda"):
            assert info.status == told.status
            assert (info.result is None) == (told.result is None)
            if info.result is not None and "ridge" not in method.options:
                assert_same([info.result.weights], [told.result.weights], exact)
                assert info.result.iterations == told.result.iterations
    assert counts(there.balancer, exact) == counts(here.balancer, exact)
    assert_same(list(there.model.parameters()), list(here.model.parameters()), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("every", [1, 3])
def test_narrow_gradients(dtype, every):
    options = {"update_weights_every": every}
    worlds = [World(METHODS[0].build(capturable=on, **options), dtype) for on in (True, False)]
    for step in range(7):
        for world in worlds:
            world.step(step, reads=not world.balancer.capturable or step == 0)
        assert_same(*(world.grads for world in worlds))


def test_an_info_keeps_what_it_said():
    world = World(METHODS[0].build(capturable=True))
    told = []
    for step in range(3):
        _, info = world.step(step)
        assert info.weights.dtype == torch.float64
        told.append((info, info.weights.clone(), info.gram.clone(), info.result.iterations))
    for info, weights, gram, iterations in told:
        assert torch.equal(info.weights, weights)
        assert torch.equal(info.gram, gram)
        assert info.result.iterations == iterations
        assert info.status == "solved"
    assert not torch.equal(told[0][1], told[1][1])
    assert info["cosines"].diagonal().allclose(torch.ones(T, dtype=torch.float64))


def linear(balancer, x: nn.Parameter, rows, *, reads: bool = True, **options: Any):
    """One step on losses whose gradients are `rows`; None is an absent task."""
    x.grad = None
    losses = [None if r is None else (x * torch.as_tensor(r, dtype=x.dtype)).sum() for r in rows]
    if reads:
        return balancer.backward(losses, [x], [], **options)[1]
    with NothingIsRead(), NothingGoesToTheHost():
        return balancer.backward(losses, [x], [], **options)[1]


REGULAR = [[1.0, 0.2], [0.1, 2.0]]
HELD = {
    "near_stationary": [[3.0, 0.0], [-1.0, 0.0]],
    "zero_update": [[3.0, 1.0], [0.0, 0.0]],
    "not_finite": [[3.0, 1.0], [0.0, math.inf]],
}


@pytest.mark.parametrize("status", HELD)
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_search_without_an_answer_holds_the_last_weights(status, max_norm):
    pairs = []
    for capturable in (True, False):
        balancer = fastmto.get(
            "nashmtl", max_norm=max_norm, capturable=capturable, on_nonfinite="ignore"
        )
        x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        linear(balancer, x, REGULAR)
        if capturable:
            info = linear(balancer, x, HELD[status], reads=False)
        else:
            with pytest.warns(RuntimeWarning, match="weights held"):
                info = linear(balancer, x, HELD[status])
        assert info.status == status
        pairs.append((balancer, x.grad.clone(), info.weights.clone()))
        assert balancer.stats["held"] == 1
        info = linear(balancer, x, REGULAR, reads=not capturable)
        assert info.status == "solved"
        assert balancer.stats["held"] == 1
    (there, grad, weights), (here, expected, told) = pairs
    assert torch.equal(weights, told)
    assert torch.equal(grad.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert there.stats == here.stats


def test_float32_gradients_that_are_noise_hold_the_last_weights():
    """kappa above what a Gram matrix of float32 gradients can tell."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(2, 20_000, generator=generator)
    x = nn.Parameter(torch.zeros(20_000))
    balancer = fastmto.get("nashmtl", capturable=True)
    balancer.backward([(x * g[0]).sum(), (x * g[1]).sum()], [x], [])
    first = balancer.weights.clone()
    rows = [g[0], -0.3 * g[0] + 1e-5 * g[1]]
    _, info = balancer.backward([(x * row).sum() for row in rows], [x], [])
    assert info.status == "near_stationary"
    assert info.result.kappa > 1e7
    assert info.result.weights is None
    assert torch.equal(info.weights / first, (info.weights / first)[:1].expand(2))  # bounded
    assert balancer.stats["held"] == 1


def test_weights_are_searched_for_at_once_until_some_are_found():
    balancer = fastmto.get("nashmtl", capturable=True, update_weights_every=10)
    x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    for _ in range(3):
        assert linear(balancer, x, HELD["near_stationary"]).status == "near_stationary"
    assert linear(balancer, x, REGULAR).status == "solved"
    assert linear(balancer, x, REGULAR, reads=False).gram is None
    assert balancer.stats["searches"] == 4


def test_a_late_task_is_searched_for_at_once():
    balancer = fastmto.get("nashmtl", 3, capturable=True, update_weights_every=10)
    x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    rows = [*REGULAR, [1.0, 1.0]]
    linear(balancer, x, [*REGULAR, None])
    assert linear(balancer, x, [*REGULAR, None], reads=False).gram is None
    assert linear(balancer, x, rows, reads=False).gram.shape == (3, 3)
    assert linear(balancer, x, rows, reads=False).gram is None


def test_a_gradient_that_is_not_finite_goes_through():
    balancer = fastmto.get("nashmtl", capturable=True)
    x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    before = linear(balancer, x, REGULAR).weights.clone()
    info = linear(balancer, x, HELD["not_finite"], reads=False)
    assert not x.grad.isfinite().all()
    assert info.skipped is None
    assert torch.equal(balancer.weights, before)
    assert linear(balancer, x, REGULAR, reads=False).status == "solved"
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("rows", [[-1.0, -0.2], [math.inf, 0.0]], ids=["held", "overflow"])
def test_a_late_task_without_weights_stands_with_the_mean_of_the_others(capturable, rows):
    """Its initial weight of 1 would be 2000 times theirs."""
    if not capturable and math.inf in rows:
        pytest.skip("the host skips such a step and searches in the next one")
    balancer = fastmto.get("nashmtl", 3, capturable=capturable, update_weights_every=100)
    x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4) if math.inf in rows else None
    large = [[1e3, 200.0], [100.0, 2e3]]
    first = linear(balancer, x, [*large, None], scaler=scaler).weights.clone()
    linear(balancer, x, [*large, None], scaler=scaler)
    late = [*large[:1], None, [1e3 * r for r in rows]]
    if capturable:
        info = linear(balancer, x, late, reads=False, scaler=scaler)
    else:
        with pytest.warns(RuntimeWarning, match="weights held"):
            info = linear(balancer, x, late)
    assert info.status == ("not_finite" if scaler else "near_stationary")
    # Held, they are brought down by one factor to the bound on the joint gradient.
    close(info.weights[2] / info.weights[0], first[:2].mean() / first[0], rtol=1e-12, atol=0)
    assert scaler is None or torch.equal(info.weights[:2], first[:2])


@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy", "to the host"])
@pytest.mark.parametrize("every", [1, 3])
def test_resumes_bit_for_bit(how, every):
    def start(capturable: bool = True) -> World:
        return World(fastmto.get("nashmtl", T, update_weights_every=every, capturable=capturable))

    def steps(world: World, first: int, last: int) -> None:
        for step in range(first, last):
            world.step(step, absent_at(step))

    whole, world = start(), start()
    steps(whole, 0, 9)
    steps(world, 0, 4)
    saved = pickle.loads(
        pickle.dumps(
            (
                world.model.state_dict(),
                world.balancer.state_dict(),
                world.optimizer.state_dict(),
            )
        )
    )
    assert saved[1]["weights"].device.type == "cpu"
    if how in ("state_dict", "to the host"):
        world = start(capturable=how == "state_dict")
        world.model.load_state_dict(saved[0])
        world.balancer.load_state_dict(saved[1])
        world.optimizer.load_state_dict(saved[2])
    else:
        copied = copy.deepcopy if how == "deepcopy" else lambda x: pickle.loads(pickle.dumps(x))
        world.balancer = copied(world.balancer)
    steps(world, 4, 9)
    assert_same(list(whole.model.parameters()), list(world.model.parameters()))
    assert torch.equal(whole.balancer.weights, world.balancer.weights)
    assert whole.balancer.stats == world.balancer.stats


def test_a_held_count_is_part_of_the_state():
    balancer = fastmto.get("nashmtl", capturable=True)
    x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    for rows in (REGULAR, HELD["near_stationary"], HELD["zero_update"]):
        linear(balancer, x, rows)
    assert balancer.stats["held"] == 2
    other = fastmto.get("nashmtl", capturable=True)
    other.load_state_dict(balancer.state_dict())
    linear(other, x, HELD["zero_update"])
    assert other.stats["held"] == 3
    other.reset()
    assert set(other.stats.values()) == {0}


@pytest.mark.parametrize(
    ("key", "options", "why"),
    [
        ("nashmtl", {"method": "ccp"}, "found on the host"),
        ("nashmtl", {"warm_start": True}, "found on the host"),
        ("nashmtl", {"n_tasks": 65}, "65 tasks"),
        ("mgda", {"normalization": "loss"}, "found on the host"),
        ("upgrad", {}, "found on the host"),
        ("imtl", {}, "found on the host"),
        ("graddrop", {}, "GradDrop decides on the host"),
        ("db_mtl", {}, "DBMTL decides on the host"),
        ("nashmtl", {"on_failure": "raise"}, "on_failure='raise' has to look"),
        ("nashmtl", {"on_nonfinite": "skip"}, "on_nonfinite='skip' has to look"),
    ],
)
def test_what_has_to_look_is_refused(key, options, why):
    with pytest.raises(ValueError, match=f"capturable must be None or False: .*{why}"):
        fastmto.get(key, capturable=True, **options)
    fastmto.get(key, capturable=None, **options)


def test_what_the_tensors_say_is_refused_at_the_first_step():
    x = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    balancer = fastmto.get("nashmtl", capturable=True, update_weights_every=2)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"capturable .* small weights of float16 gradients"):
            linear(balancer, x, REGULAR)
    assert x.grad is None
    assert linear(fastmto.get("nashmtl", capturable=True), x, REGULAR).status == "solved"
    many = fastmto.get("mgda", capturable=True)
    with pytest.raises(ValueError, match="the weights of 65 tasks"):
        linear(many, x, [[1.0, float(i)] for i in range(65)])


def test_a_float16_head_is_refused_as_well():
    x, head = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2, dtype=torch.float16))
    balancer = fastmto.get("nashmtl", capturable=True, update_weights_every=2)
    losses = [(x * torch.tensor(row)).sum() + head.sum() * k for k, row in enumerate(REGULAR)]
    with pytest.raises(ValueError, match=r"capturable .* small weights of float16 gradients"):
        balancer.backward(losses, [x], [[], [head]])


class Halved(Fixed):
    def _solve(self, gram, active, batch):
        return super()._solve(gram, active, batch) / 2


class HalvedMGDA(fastmto.balancers.MGDA):
    def _solve(self, gram, active, batch):
        return super()._solve(gram, active, batch) / 2


class Dropped(fastmto.balancers.NashMTL):
    def _decide(self, batch, level, active):
        return super()._decide(batch, level, active[:1])


class Capped(fastmto.weightings.NashMTL):
    def __call__(self, gram, tasks=None):
        return super().__call__(gram, tasks).clamp(max=0.4)


@pytest.mark.parametrize(
    "build",
    [
        lambda **options: Halved(fastmto.weightings.Equal(), **options),
        lambda **options: Fixed(Capped(), **options),
        HalvedMGDA,
        Dropped,
    ],
    ids=["_solve", "weighting", "mgda", "_decide"],
)
def test_what_a_subclass_does_on_the_host_is_not_left_out(build):
    with pytest.raises(ValueError, match=r"capturable must be None or False: .* on the host"):
        build(capturable=True)
    assert build()._why_on_host(2, None) is not None
    # A subclass that only adds to what is called on the device, too, stays there.
    assert type("Named", (fastmto.balancers.MGDA,), {"key": "named"})(capturable=True).capturable


def test_heads_elsewhere_are_decided_about_on_the_host():
    balancer = fastmto.get("nashmtl")
    x, head = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    buffers = GradientLevel([x], [(0, head)], 2)
    assert balancer._why_on_host(2, buffers) is None
    buffers.heads = [(0, nn.Parameter(torch.zeros(2, device="meta")))]
    assert "on another device" in balancer._why_on_host(2, buffers)


@pytest.mark.parametrize("capturable", ["yes", 1, 0, torch.tensor(True)])
def test_capturable_is_a_truth_value(capturable):
    with pytest.raises(ValueError, match="capturable must be True, False or None, got"):
        fastmto.get("nashmtl", capturable=capturable)
    with pytest.raises(ValueError, match="capturable must be True, False or None, got"):
        fastmto.get("pcgrad", capturable=capturable)


def test_on_a_cpu_the_host_decides_unless_told_otherwise():
    world = World(fastmto.get("nashmtl", T))
    world.step(0)
    assert world.balancer._search.device is None


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's compiler's own
@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("key", ["nashmtl", "uncertainty"])
def test_compiled_training_makes_the_same_steps(key, capturable):
    """The graph ends at `backward`, once, and does not look into it."""

    def step(world: World, x: Tensor) -> None:
        world.optimizer.zero_grad()
        losses = world.model.losses(x)
        world.balancer.backward(losses, world.shared, world.model.head_parameters())
        world.optimizer.step()

    worlds = []
    for _ in range(2):
        options = {"capturable": capturable, "update_weights_every": 2} if key == "nashmtl" else {}
        world = World(fastmto.get(key, T, **options))
        world.optimizer = torch.optim.SGD(world.model.parameters(), lr=1e-2)
        worlds.append(world)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, backend="aot_eager")
    for number in range(4):
        compiled(worlds[0], worlds[0].data(number))
        step(worlds[1], worlds[1].data(number))
    assert_same(*(list(world.model.parameters()) for world in worlds))
    reasons = torch._dynamo.utils.counters["graph_break"]
    assert sum("Balancer.backward" in why for why in reasons) == 1
    ours = ("fastmto.", "torch.autograd.grad", "Tensor.item", "grad_fn")
    assert not any(name in why for why in reasons for name in ours)


class Recorder(TorchDispatchMode):
    """The operations of a step, to be run again on the same memory as a CUDA graph runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def recorded(balancer, x: nn.Parameter, rows) -> tuple[Recorder, Any, Tensor]:
    """A step on losses whose gradients are `rows`; what it did, its Info and its gradient."""
    with Recorder() as recorder:
        info = linear(balancer, x, rows)
    assert x.grad is not None
    return recorder, info, x.grad


def test_replays_share_the_weights_whatever_was_captured_last():
    balancer = fastmto.get("nashmtl", 3, capturable=True)
    x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    rows = torch.tensor([*REGULAR, [1.0, 1.0]], dtype=torch.float64)
    linear(balancer, x, rows)
    linear(balancer, x, [rows[0], rows[1], None])
    all_three, info, _ = recorded(balancer, x, rows)
    recorded(balancer, x, [rows[0], rows[1], None])
    before = balancer.weights.clone()
    rows.mul_(10.0)
    all_three.replay()
    assert torch.equal(balancer.weights, info.weights)
    assert torch.equal(balancer.state_dict()["weights"], info.weights)
    close(info.weights[:2], before[:2] / 10, rtol=0.5, atol=0)


def test_a_step_between_captured_first_tells_the_weights_it_goes_by():
    balancer = fastmto.get("nashmtl", capturable=True, update_weights_every=2)
    x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    rows = torch.tensor(REGULAR, dtype=torch.float64)
    for _ in range(3):
        linear(balancer, x, rows)
    between, told, grad = recorded(balancer, x, rows)
    search, info, _ = recorded(balancer, x, rows)
    assert told.gram is None
    rows.mul_(10.0)
    search.replay()
    between.replay()
    assert torch.equal(told.weights, info.weights)
    assert torch.equal(told.weights, balancer.weights)
    close(grad, info.weights @ rows, rtol=1e-12, atol=0)
    # A state that is loaded, and a reset, reach replays as well.
    other = fastmto.get("nashmtl", 2, capturable=True, update_weights_every=2)
    linear(other, x, [[5.0, 1.0], [0.0, 3.0]])
    for change, weights in (
        (lambda: balancer.load_state_dict(other.state_dict()), other.weights.clone()),
        (balancer.reset, None),
    ):
        change()
        between.replay()
        expected = told.weights if weights is None else weights
        assert torch.equal(told.weights, expected)
        close(grad, expected @ rows, rtol=1e-12, atol=0)


@pytest.mark.parametrize("change", ["another batch size", "load_state_dict", "reset", "tasks"])
@pytest.mark.parametrize("captures", [True, False])
def test_what_a_capture_used_outlives_the_next_buffers(change, captures, monkeypatch):
    n_tasks = None if change == "tasks" else 2
    balancer = fastmto.get("nashmtl", n_tasks, capturable=True, level="features")
    w = nn.Parameter(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))

    def step(batch_size: int, n_tasks: int = 2) -> None:
        w.grad = None
        z = torch.linspace(-1, 1, 3 * batch_size).view(batch_size, 3) @ w
        balancer.backward([(z - k).square().sum() for k in range(n_tasks)], [w], [], features=z)

    step(8)
    with monkeypatch.context() as patch:
        for name in ("balancers.gradient_balancer", "engine.search"):
            module = importlib.import_module(f"fastmto.{name}")
            patch.setattr(module, "capturing", lambda device: captures)
        step(8)
        step(8)
    buffers, search = balancer._gradient_level, balancer._search.device
    used = [weakref.ref(x) for x in (buffers.gradients.rows[0], buffers._grams, search.weights)]
    del buffers, search
    if change == "load_state_dict":
        balancer.load_state_dict(balancer.state_dict())
    elif change != "another batch size":
        balancer.reset()
    step(5, 3 if change == "tasks" else 2)
    gc.collect()
    # The weights stay where they are unless there are others.
    alive = [captures, captures, captures or change != "tasks"]
    assert [x() is not None for x in used] == alive
    assert len(balancer._captured) == 2 * captures
    assert copy.deepcopy(balancer)._captured == []


def test_weights_may_be_set():
    for capturable in (True, False):
        balancer = fastmto.get("nashmtl", capturable=capturable, update_weights_every=2)
        x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        linear(balancer, x, REGULAR)
        balancer.weights = torch.tensor([9.0, 4.0], dtype=torch.float64)
        linear(balancer, x, REGULAR)
        assert torch.equal(x.grad, torch.tensor([9.4, 9.8], dtype=torch.float64))


def test_a_capture_reads_nothing_and_keeps_nothing(monkeypatch):
    """Before weights are found a step reads whether they are; not while a graph is captured, when
    nothing has been computed yet, nor is anything kept that only a replay will fill."""
    balancer = fastmto.get("nashmtl", 3, preference=[1.0, 2.0, 3.0], capturable=True)
    x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    rows = [*REGULAR, [1.0, 1.0]]
    for _ in range(2):
        linear(balancer, x, [[1.0, 0.0], [-1.0, 0.0], None])  # no weights
    linear(balancer, x, [None, [1.0, 0.0], [-1.0, 0.0]])
    modules = [
        importlib.import_module(f"fastmto.{name}")
        for name in ("balancers.gradient_balancer", "engine.search", "engine.device")
    ]
    with monkeypatch.context() as patch:
        for module in modules:
            patch.setattr(module, "capturing", lambda device: True)
        linear(balancer, x, [None, rows[0], rows[1]], reads=False)
        assert not balancer._found
        with pytest.raises(RuntimeError, match="must not change in the step that is captured"):
            linear(balancer, x, [rows[0], None, rows[1]])
    linear(balancer, x, [rows[0], None, rows[1]])
    assert balancer._found


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_steps_on_the_kernels_for_gpus(method, dtype, monkeypatch):
    """The same flow over the Triton backend, interpreted, beside the CPU's kernels."""
    pytest.importorskip("triton")
    options = {"update_weights_every": 2, "n_tasks": T, "capturable": True}
    here, there = (World(method.build(**options), dtype) for _ in range(2))
    for step in range(5):
        here.step(step, absent_at(step))
    gpu, used = ops.backend(torch.device("cuda")), []
    with monkeypatch.context() as patch:
        patch.setattr(ops, "_module", lambda name: used.append(name) or gpu)
        for step in range(5):
            there.step(step, absent_at(step), reads=step == 0)
    assert used
    assert here.balancer.stats == there.balancer.stats
    rtol = 1e-4 if dtype == torch.float32 else 2e-2
    close(here.balancer.weights, there.balancer.weights, rtol=rtol, atol=1e-6)
    for p, q in zip(here.model.parameters(), there.model.parameters(), strict=True):
        close(p, q, rtol=rtol, atol=rtol)


def test_no_task_reaches_what_is_shared():
    world = World(fastmto.get("nashmtl", capturable=True))
    first = world.step(0)[1].weights.clone()
    world.optimizer.zero_grad()
    losses = [sum(p.sum() for p in head) for head in world.model.head_parameters()]
    _, info = world.backward(losses, torch.zeros(0))
    assert torch.equal(info.weights, first)
    assert world.balancer.stats["untouched"] == T


@pytest.mark.cuda
@needs_cuda
@every_method
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("passes", ["loop", "batched"])
def test_a_gpu_waits_for_nothing(method, every, passes):
    options = {"update_weights_every": every, "n_tasks": T, "passes": passes}
    there = World(method.build(**options), device="cuda")
    here = World(method.build(capturable=False, **options), device="cuda")
    for step in range(6):
        expected, told = here.step(step, absent_at(step))
        there.optimizer.zero_grad()
        losses, z = there.losses(step, absent_at(step))
        if step > 0:
            torch.cuda.set_sync_debug_mode("error")
        try:
            loss, info = there.backward(losses, z)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        there.optimizer.step()
        assert info.weights.is_cuda
        close(loss, expected, rtol=1e-6, atol=1e-9)
        close(info.weights.cpu(), told.weights.cpu(), rtol=1e-6, atol=1e-9)
        for a, b in zip(there.grads, here.grads, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                close(a, b, rtol=1e-6, atol=1e-9)
    exact = method.exact or every == 1
    assert counts(there.balancer, exact) == counts(here.balancer, exact)


class Captured:
    """The steps of a world with one task set, as a CUDA graph for each kind of step.

    Args:
        world: whose balancer and optimizer have been called before, on a side stream.
    """

    def __init__(self, world: World, x: Tensor, set_to_none: bool) -> None:
        self.x = x.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss, self.info = whole_step(world, self.x, set_to_none)

    def __call__(self, x: Tensor) -> None:
        self.x.copy_(x)
        self.graph.replay()


def whole_step(world: World, x: Tensor, set_to_none: bool):
    """zero_grad, forward, backward and the optimizer's step."""
    world.optimizer.zero_grad(set_to_none=set_to_none)
    return_value = world.backward(world.model.losses(x), x)
    world.optimizer.step()
    return return_value


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("key", ["nashmtl", "mgda"])
def test_a_captured_search_has_the_bits_of_an_eager_one(key, set_to_none):
    worlds = []
    for _ in range(2):
        world = World(fastmto.get(key, T, passes="loop"), torch.float32, "cuda")
        world.optimizer = torch.optim.Adam(world.model.parameters(), lr=1e-2, capturable=True)
        worlds.append(world)
    eager, graphed = worlds
    data = [torch.randn(16, 6, generator=torch.Generator().manual_seed(k)).cuda() for k in range(8)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for x in data[:3]:
            whole_step(graphed, x, set_to_none)
    torch.cuda.current_stream().wait_stream(side)
    captured = Captured(graphed, data[3], set_to_none)
    for x in data[:3]:
        whole_step(eager, x, set_to_none)
    for x in data[3:]:
        captured(x)
        loss, info = whole_step(eager, x, set_to_none)
        assert torch.equal(captured.loss, loss)
        assert torch.equal(captured.info.weights, info.weights)
        assert torch.equal(graphed.balancer.weights, eager.balancer.weights)
        assert captured.info.status == info.status
        for a, b in zip(graphed.model.parameters(), eager.model.parameters(), strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a.grad, b.grad)


@pytest.mark.cuda
@needs_cuda
def test_captured_searches_and_the_steps_between_share_the_weights():
    """A graph of each kind: the one between goes by the weights that the other found last."""
    every = 3
    worlds = []
    for _ in range(2):
        balancer = fastmto.get("nashmtl", T, update_weights_every=every, passes="loop")
        world = World(balancer, torch.float32, "cuda")
        world.optimizer = torch.optim.Adam(world.model.parameters(), lr=1e-2, capturable=True)
        worlds.append(world)
    eager, graphed = worlds
    data = [
        torch.randn(16, 6, generator=torch.Generator().manual_seed(k)).cuda() for k in range(15)
    ]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for x in data[:6]:  # two of each kind
            whole_step(graphed, x, True)
    torch.cuda.current_stream().wait_stream(side)
    graphs = [Captured(graphed, data[0], True), Captured(graphed, data[0], True)]
    for x in data[:6]:
        whole_step(eager, x, True)
    for step, x in itertools.islice(enumerate(data), 6, None):
        graphs[step % every != 0](x)
        whole_step(eager, x, True)
        for a, b in zip(graphed.model.parameters(), eager.model.parameters(), strict=True):
            assert torch.equal(a, b)
    held = graphed.balancer.state_dict()["weights"]
    assert torch.equal(held, eager.balancer.state_dict()["weights"])

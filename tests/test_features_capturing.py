"""Steps decided on the device, by every method that can: nothing is read, and the bits are those
of the host's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from balancer_cases import BalancerCase, same
from levels import (
    ON_DEVICE,
    REGULAR,
    UPDATES,
    Linear,
    Update,
    absent_at,
    assert_same,
    drive,
    every,
    is_exact,
    on_device,
)
from problems import gradients, linear_loss, parameters
from reads import nothing_is_read
from torch import Tensor, nn

import fastmto
from fastmto.engine.gradient_level import GradientLevel
from fastmto.ops import registration
from fastmto.weightings import Bargaining

close = torch.testing.assert_close
NASH = ON_DEVICE[0]


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
    with pytest.raises(AssertionError), nothing_is_read():
        read(torch.ones(2))


@pytest.mark.parametrize("row", [NASH, every(1)], ids=str)
def test_the_host_s_step_reads(row):
    one = drive(row, capturable=False)
    one.run(range(2))
    with pytest.raises(AssertionError):
        one.step(2, reads=False)


BOTH = [
    (row, torch.float64, {"update_weights_every": n, "level": level, "heads": heads})
    for row in ON_DEVICE
    for n in (1, 3)
    for level in ("parameters", "features")
    for heads in ("own", "weighted")
]
BOTH += [
    (NASH, dtype, {"update_weights_every": n})
    for dtype in (torch.float32, torch.bfloat16)
    for n in (1, 3)
]
BOTH += [(row, torch.float32, {}) for row in UPDATES]


@pytest.mark.parametrize(("row", "dtype", "options"), BOTH, ids=str)
def test_is_the_host_s_step_and_reads_nothing(row, dtype, options):
    there, here = (drive(row, dtype, capturable=on, **options) for on in (True, False))
    exact = is_exact(row, options)
    near = {} if exact else {"rtol": 1e-6, "atol": 1e-9}
    if not exact and row.level == "update":
        near = {"rtol": 1e-5, "atol": 1e-5}
    first = 2 if row.level == "update" else 1  # when weights are known to have been found
    for step in range(12 if row.level == "update" else 8):
        info = there.step(step, absent_at(step), reads=step < first)
        told = here.step(step, absent_at(step))
        assert_same(there.grads, here.grads, **near)
        assert_same([info.weights, info.gram], [told.weights, told.gram], **near)
        # What is told of the losses may round where they are narrow.
        rounds = {} if dtype == torch.float64 else {"rtol": 1e-6}
        assert_same([there.loss], [here.loss], **(near or rounds))
        if row.key in ("nashmtl", "mgda"):
            assert info.status == told.status
            assert (info.result is None) == (told.result is None)
            if info.result is not None and "ridge" not in row.options:
                assert_same([info.result.weights], [told.result.weights], **near)
                assert info.result.iterations == told.result.iterations
    assert there.method.capturable
    assert not here.method.capturable
    assert there.counts(exact and row.level != "update") == here.counts(
        exact and row.level != "update"
    )
    assert_same(there.parameters, here.parameters, **near)
    if row.level == "update":
        for p, q in zip(there.parameters, here.parameters, strict=True):
            moments = there.method.state[p], here.method.state[q]
            assert moments[0].keys() == moments[1].keys()
            assert_same(*([*one.values()] for one in moments), **near)
        assert there.method.weighting is None or there.stats["searches"] > 1


@pytest.mark.parametrize(
    ("row", "dtype"),
    [(row, dtype) for row in ON_DEVICE for dtype in (torch.float32, torch.bfloat16)]
    + [(row, torch.float32) for row in UPDATES[2:8] + UPDATES[12:14]],
    ids=str,
)
def test_whole_steps_on_the_kernels_for_gpus(row, dtype, monkeypatch):
    """The same flow over the Triton backend, interpreted, beside the CPU's kernels."""
    pytest.importorskip("triton")
    options = {} if row.level == "update" else {"update_weights_every": 2}
    here, there = (drive(row, dtype, capturable=True, **options) for _ in range(2))
    steps = range(4 if row.level == "update" else 5)
    here.run(steps)
    gpu, used = registration._module("cuda"), []
    with monkeypatch.context() as patch:
        patch.setattr(registration, "_module", lambda name: used.append(name) or gpu)
        for step in steps:
            there.step(step, absent_at(step), reads=step < 2)
    assert used
    assert here.stats == there.stats
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    close(here.weights, there.weights, rtol=tolerance, atol=1e-5)
    assert_same(here.parameters, there.parameters, tolerance, tolerance)


def test_several_dtypes_groups_and_tasks():
    def build(capturable: bool) -> tuple[list[nn.Parameter], fastmto.PUB]:
        shared = [*parameters(0, torch.float32), *parameters(1, torch.bfloat16, [(9,)])]
        heads = [parameters(10 + i, torch.float32, [(3,)]) for i in range(5)]
        groups = [{"params": shared[:4], "lr": 0.1}, {"params": shared[4:], "eps": 1e-4}]
        optimizer = fastmto.PUB(groups, heads, 0.02, update_weights_every=2, capturable=capturable)
        for t in range(6):
            given = gradients(t, shared, 5)
            losses: list[Tensor | None] = [
                linear_loss([*shared, *head], [*g, *gradients(50 + t, head, 1)[0]])
                for head, g in zip(heads, given, strict=True)
            ]
            for absent in {3: (1,), 4: (0, 3)}.get(t, ()):
                losses[absent] = None
            optimizer.zero_grad()
            optimizer.backward(losses)
            optimizer.step()
        return [*shared, *(p for head in heads for p in head)], optimizer

    (ps, there), (qs, here) = build(True), build(False)
    assert_same(ps, qs)
    assert torch.equal(there.weights, here.weights)
    assert there.stats == here.stats
    assert there.stats["absent"] == 3


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (BalancerCase(key, level="gradient"), options, why)
    for key, options, why in (
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
    )
] + [
    (Update(), {"weighting": "ccp"}, "weighting .* is found on the host"),
    (Update(), {"weighting": lambda gram: gram.diagonal()}, "weighting .* is found on the host"),
    (Update(), {"weighting": Bargaining(warm_start=True)}, "weighting .* is found on the host"),
    (Update(), {"n_tasks": 65}, "65 tasks is found on the host"),
    (Update(), {"on_failure": "raise"}, "on_failure"),
    (Update(), {"on_nonfinite": "raise"}, "on_nonfinite"),
]


@pytest.mark.parametrize(("row", "options", "why"), REFUSED, ids=str)
def test_what_has_to_look_is_refused(row, options, why):
    def build(capturable):
        given = {**options, "capturable": capturable}
        n_tasks = given.pop("n_tasks", 2)
        if row.level == "update":
            return row.build([nn.Parameter(torch.zeros(2))], [[]] * n_tasks, **given)
        return row.build(n_tasks, **given)

    with pytest.raises(ValueError, match=f"^capturable must be None or False( here)?: .*{why}"):
        build(True)
    assert not build(None).capturable


def test_what_the_tensors_say_is_refused():
    """By the optimizer at construction, by a balancer at the first step."""
    half = parameters(0, torch.float16)
    with pytest.raises(ValueError, match="float16 parameters"):
        fastmto.PUB(half, [[], []], capturable=True)
    assert fastmto.PUB(half, [[], []], between="per_task", capturable=True).capturable
    one = Linear(NASH, update_weights_every=2)
    one.x = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"capturable .* small weights of float16 gradients"):
            one.step(REGULAR)
    assert one.x.grad is None
    assert Linear(NASH).step(REGULAR).status == "solved"
    head = nn.Parameter(torch.ones(2, dtype=torch.float16))
    x = nn.Parameter(torch.zeros(2))
    losses = [(x * torch.tensor(row)).sum() + head.sum() * k for k, row in enumerate(REGULAR)]
    with pytest.raises(ValueError, match=r"capturable .* small weights of float16 gradients"):
        Linear(NASH, update_weights_every=2).method.backward(losses, [x], [[], [head]])
    with pytest.raises(ValueError, match="the weights of 65 tasks"):
        Linear(BalancerCase("mgda"), n_tasks=None).step([[1.0, float(i)] for i in range(65)])


class Halved(fastmto.balancers.GramBalancer):
    key = "halved"

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
        lambda **options: type("Plain", (fastmto.balancers.GramBalancer,), {"key": "plain"})(
            Capped(), **options
        ),
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


@pytest.mark.parametrize("row", [Update(), NASH, BalancerCase("pcgrad")], ids=str)
@pytest.mark.parametrize("capturable", ["yes", 1, 0, torch.tensor(True)])
def test_capturable_is_a_truth_value(row, capturable):
    with pytest.raises(
        ValueError, match=r"^capturable must be (True, False or None|None, True or False), got"
    ):
        drive(row, capturable=capturable)


@pytest.mark.parametrize(
    "options", [{"clippy": 3}, {"adatask": "x"}, {"delayed": 1}, {"max_weight": "a"}], ids=str
)
def test_options_are_checked_by_name(options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must be"):
        drive(Update(), **options)


@pytest.mark.parametrize("row", [NASH, Update()], ids=str)
def test_on_a_cpu_the_host_decides_unless_told_otherwise(row):
    one = drive(row)
    one.step(0)
    assert not one.method.capturable
    with pytest.raises(AssertionError):
        one.step(1, reads=False)


def test_learning_rates_of_a_schedule_reach_the_device():
    pair = [drive(every(2), capturable=on) for on in (True, False)]
    for one in pair:
        schedule = torch.optim.lr_scheduler.ExponentialLR(one.optimizer, 0.5)
        for step in range(5):
            one.step(step)
            schedule.step()
    assert same(*(one.settled() for one in pair))


@pytest.mark.parametrize("capturable", [True, False])
def test_a_preference_for_more_tasks_than_there_are_is_refused(capturable):
    row = every(1, weighting=Bargaining(preference=[1.0, 2.0, 3.0, 4.0]))
    with pytest.raises(ValueError, match="the 4 tasks of preference, got tasks"):
        drive(row, capturable=capturable).step(0)


COMPILED = [every(2), on_device(every(2)), BalancerCase("uncertainty"), NASH, on_device(NASH)]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's compiler's own
@pytest.mark.parametrize("row", COMPILED, ids=str)
def test_compiled_training_makes_the_same_steps(row):
    """Two steps in one compiled function: graphs end at `backward` and `step`, not in them."""
    pair = [drive(row, **({"update_weights_every": 2} if row == NASH else {})) for _ in range(2)]
    for one in pair:
        if row.level != "update":
            one.optimizer = torch.optim.SGD(one.parameters, lr=1e-2)

    def step(one, x: Tensor) -> None:
        one.optimizer.zero_grad()
        losses = one.model.losses(x)
        if row.level == "update":
            one.method.backward(losses)
        else:
            one.method.backward(losses, one.shared, one.heads)
        one.optimizer.step()

    def two_steps(one, x: Tensor) -> None:
        step(one, x)
        step(one, x + 1)

    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(two_steps, backend="aot_eager")
    for number in range(4):
        compiled(pair[0], pair[0].data(number))
        two_steps(pair[1], pair[1].data(number))
    assert same(*(one.settled() for one in pair))
    breaks = counters["graph_break"]
    assert counters["stats"]["unique_graphs"] >= 1
    assert sum("Balancer.backward" in why for why in breaks) == 1
    ours = ("fastmto.", "torch.autograd.grad", "Tensor.item", "grad_fn")
    assert not any(name in why for why in breaks for name in ours)
    if row.level == "update":
        ends = ("Optimizer.zero_grad", "UpdateBalancer.backward", "UpdateBalancer.step")
        assert len(breaks) >= 2
        assert all(any(end in why for end in ends) for why in breaks)

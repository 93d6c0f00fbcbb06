"""The ops as torch sees them: their schemas, their fake versions, and graphs of torch.compile.

Everything runs on the CPU; a GPU changes nothing of what torch is told about an op.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ops_cases import Case, build
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastmto import ops
from fastmto.ops import cpu
from fastmto.optim.rules import Adam, Clippy, RMSProp

# torch.compile and opcheck import what torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

N_TASKS, NUMEL = 3, 333
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]

CASES = {
    "adam": Case(Adam(), N_TASKS, NUMEL, padding=3, weight_decay=0.1),
    "bfloat16": Case(Adam(), N_TASKS, NUMEL, torch.bfloat16),
    "clippy": Case(Adam(), N_TASKS, NUMEL, clippy=Clippy(), lr=0.5),
    "adatask": Case(RMSProp(momentum=0.9), N_TASKS, NUMEL, adatask=True, step=[4, 0, 9], padding=3),
    "both": Case(Adam(), N_TASKS, NUMEL, adatask=True, clippy=Clippy(), lr=0.5),
}
SKIP = torch.zeros(1, dtype=torch.int32)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def passes(name: str) -> dict[str, Call]:
    """search, apply and delayed with all that the case has."""
    x = build(CASES[name])
    head = x.kind, x.numbers, x.grads, x.state
    sigma = None if x.clippy is None else torch.ones_like(x.poisoned_sigma())
    gram = torch.zeros(N_TASKS, N_TASKS, dtype=torch.float64)
    clip = {"clippy": x.lambdas, "segments": x.segments, "sigma": sigma}
    shrunk = {"segments": x.segments, "sigma": sigma}
    return {
        "update_gram": (
            ops.update_gram,
            (*head, gram),
            {} if sigma is None else {**clip, "params": x.params},
        ),
        "apply": (ops.apply, (*head, x.params, x.weights), {**shrunk, "skip": SKIP}),
        "apply_plain": (ops.apply, (*head, x.params, x.weights), {}),
        "apply_and_gram": (
            ops.apply_and_gram,
            (*head, x.params, x.weights, gram),
            {**clip, "skip": SKIP},
        ),
    }


def others() -> dict[str, Call]:
    """The ops without a rule."""
    x = build(CASES["adam"])
    a_row = x.clone()
    weights = torch.zeros(N_TASKS, dtype=torch.float64)
    info = torch.zeros(4, dtype=torch.float64)
    problem = torch.eye(N_TASKS, dtype=torch.float64)
    found = torch.zeros(1, dtype=torch.int32)
    hyper = torch.tensor([x.rule.hyper(0.1, 0.0)], dtype=torch.float64)
    counts, active = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int32)
    numbers, tally = torch.zeros(1, 11, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    scale = torch.tensor([0.1, 0.2], dtype=torch.float64)
    rows, perturb = torch.zeros(2, NUMEL), torch.ops.fastmto.perturb.default
    return {
        "gram": (ops.gram, (x.grads, problem.clone()), {}),
        "combine": (ops.combine, (x.grads, x.weights, x.params), {}),
        "combine_into_a_row": (ops.combine, (a_row.grads, x.weights, a_row.grads[1]), {}),
        "check": (ops.check, (x.grads, found), {}),
        "step_constants": (ops.step_constants, (hyper, counts, active, numbers, found), {}),
        "count_step": (ops.count_step, (counts, active, found, tally), {}),
        "bargaining": (ops.bargaining, (problem, weights, info), {}),
        "bargaining_by_preference": (
            ops.bargaining,
            (problem, weights, info),
            {"preference": x.weights, "tol": 1e-10, "ridge": 0.1},
        ),
        "mgda": (ops.mgda, (problem, weights, info), {}),
        "perturb": (perturb, (x.params, rows), {"scale": scale, "seed": -5, "offset": 2}),
        "perturb_given": (perturb, (x.params, rows), {"scale": scale, "direction": x.grads[0]}),
        "perturb_in_place": (perturb, (x.params, x.params[None]), {"scale": scale[:1], "seed": 1}),
    }


CALLS = {
    **{f"{op}_{case}": call for case in CASES for op, call in passes(case).items()},
    **others(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_opcheck(call: Call) -> None:
    op, arguments, options = call
    torch.library.opcheck(op, arguments, options)


def test_every_op_is_checked() -> None:
    assert len(ops.OPS) == 11
    assert {op for op, _, _ in CALLS.values()} == set(ops.OPS.values())


@pytest.mark.parametrize("device_type", ops.BACKENDS)
@pytest.mark.parametrize("name", ops.OPS)
def test_backends_have_the_arguments_of_the_contract(name: str, device_type: str) -> None:
    if device_type == "cuda":
        pytest.importorskip("triton")
    contract = {a.name: (a.kwarg_only, a.default_value) for a in ops.OPS[name]._schema.arguments}
    function = getattr(ops.backend(torch.device(device_type)), name)
    given = {
        p.name: (p.kind is p.KEYWORD_ONLY, None if p.default is p.empty else p.default)
        for p in inspect.signature(function).parameters.values()
        if p.name != "isa"  # the CPU kernels' own, for tests
    }
    assert given == contract


class Loop:
    """A training loop of ops only, with the tensors that they write; the gradients stay."""

    def __init__(self, case: Case) -> None:
        self.inputs = x = build(case)
        rows = len(x.numbers)
        rates = x.rule.hyper(case.lr, case.weight_decay)
        self.hyper = torch.tensor([rates] * rows, dtype=torch.float64)
        self.counts = torch.tensor([t - 1 if t else 0 for t in x.steps[:rows]])
        self.active = torch.tensor([t > 0 for t in x.steps[:rows]]).int()
        self.found, self.tally = torch.ones(1).int(), torch.zeros(2, dtype=torch.int64)
        self.gram, self.of_gradients, self.early = (x.poisoned_gram() for _ in range(3))
        self.sigma = None if x.clippy is None else x.poisoned_sigma()
        self.weights, self.simplex = x.weights.clone(), x.weights.clone()
        self.info, self.info_too = torch.full((2, 4), torch.nan, dtype=torch.float64).unbind()
        self.out, self.row = torch.full_like(x.params, torch.nan), x.grads.clone()

    def written(self) -> list[Tensor]:
        x = self.inputs
        tensors = [value for value in vars(self).values() if isinstance(value, Tensor)]
        return [x.params, x.numbers, x.grads, *x.state, *tensors]


def one_step(loop: Loop) -> Tensor:
    x, sigma = loop.inputs, loop.sigma
    ops.step_constants(loop.hyper, loop.counts, loop.active, x.numbers, loop.found)
    head = x.kind, x.numbers, x.grads, x.state
    if x.clippy is None:
        clip: dict[str, Any] = {}
        ops.update_gram(*head, loop.gram)
    else:
        clip = {"segments": x.segments, "sigma": sigma}
        ops.update_gram(*head, loop.gram, clippy=x.lambdas, params=x.params, **clip)
        clip["clippy"] = x.lambdas
    ops.check(x.grads, loop.found)
    problem = loop.gram + torch.eye(N_TASKS, dtype=torch.float64)
    ops.bargaining(problem, loop.weights, loop.info)
    ops.mgda(problem, loop.simplex, loop.info_too)
    weights = 0.5 * (loop.weights + loop.simplex)
    shrunk = {k: v for k, v in clip.items() if k != "clippy"}
    ops.apply(*head, x.params, weights, **shrunk, skip=loop.found)
    ops.apply_and_gram(*head, x.params, loop.weights, loop.early, **clip, skip=loop.found)
    ops.gram(x.grads, loop.of_gradients)
    ops.combine(x.grads, weights, loop.out)
    ops.combine(loop.row, weights, loop.row[1])
    ops.count_step(loop.counts, loop.active, loop.found, loop.tally)
    return loop.out.double().norm() + loop.row[1].double().norm()


@pytest.mark.parametrize("name", CASES)
def test_a_compiled_step_has_one_graph_and_the_bits_of_eager(name: str) -> None:
    """Five steps, of which the fourth is skipped: a later step number is no reason to compile."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(one_step, fullgraph=True, backend=counter)
    plain, other = Loop(CASES[name]), Loop(CASES[name])
    for number in range(5):
        if number == 3:
            kept = plain.inputs.params.clone()
            for loop in (plain, other):
                loop.inputs.grads[0, 5] = torch.nan
        result, result_too = one_step(plain), compiled(other)
        if number == 3:
            assert torch.equal(plain.inputs.params, kept)
            for loop in (plain, other):
                loop.inputs.grads[0, 5] = 0.25
        torch.testing.assert_close(result_too, result, rtol=0, atol=0, equal_nan=True)
        for one, two in zip(plain.written(), other.written(), strict=True):
            torch.testing.assert_close(two, one, rtol=0, atol=0, equal_nan=True)
    assert counter.frame_count == 1
    assert plain.tally.tolist() == [4, 1]
    started = [t for t in plain.inputs.steps if t > 0][: len(plain.inputs.numbers)]
    assert plain.counts[plain.active > 0].tolist() == [t + 3 for t in started]


def test_perturb_in_a_compiled_function() -> None:
    def shifted(params: Tensor, out: Tensor, scale: Tensor) -> Tensor:
        ops.perturb(params, out, scale=scale, seed=2**64 - 5, offset=3)
        return out.sum()

    torch.compiler.reset()
    compiled = torch.compile(shifted, fullgraph=True, backend="aot_eager")
    params, scale = torch.randn(NUMEL), torch.tensor([0.1, 2.0], dtype=torch.float64)
    out, expected = torch.full((2, 2, NUMEL), torch.nan).unbind()
    assert torch.equal(compiled(params, out, scale), shifted(params, expected, scale))
    assert torch.equal(out, expected)
    assert (out != params).any()


def test_ops_go_to_the_backend_of_their_device() -> None:
    x = build(CASES["adam"])
    gram, expected = x.poisoned_gram(), x.poisoned_gram()
    ops.gram(x.grads, gram)
    cpu.gram(x.grads, expected)
    assert torch.equal(gram, expected)
    with pytest.raises(ValueError, match="gram must be a contiguous float64"):
        ops.gram(x.grads, gram.float())
    # A device without a backend gets shapes, which there are none of, and no values.
    ops.gram(torch.ones(2, 8, device="meta"), torch.ones(2, 2, device="meta").double())

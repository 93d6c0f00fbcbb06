"""The ops for GPUs where an index takes more than 32 bits, without a host that waits, in a graph.

What needs a GPU, or its memory, is skipped without; the same code runs small, interpreted.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from ops_cases import (
    Case,
    Inputs,
    build,
    close,
    close_applied,
    expected_apply,
    expected_combine,
    expected_gradient_gram,
    expected_gram,
    expected_sigma,
    numbers_of,
)
from torch import Tensor

from fastmto import ops
from fastmto.ops import philox
from fastmto.optim.rules import AdaGrad, Adam, Clippy, Numbers

pytest.importorskip("triton")

from fastmto.ops import cpu
from fastmto.ops.triton import backend as gpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
#: Bytes: gradients of two tasks and parameters in bfloat16, sums in float32, and as much as the
#: largest of them again for what the checks make.
NEEDED = 2**31 * (3 * 2 + 4 + 4) * 1.1


@pytest.fixture(
    params=[
        pytest.param(2**11, id="small"),
        pytest.param(2**31, id="large", marks=[pytest.mark.cuda, needs_cuda]),
    ]
)
def edge(request: pytest.FixtureRequest) -> Iterator[int]:
    """A coordinate that P lies beyond; 2^31 is the first that 32 bits with a sign cannot say."""
    if request.param == 2**31:
        gc.collect()
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        if free < NEEDED:
            pytest.skip(f"needs {NEEDED / 1e9:.0f} GB of GPU memory, {free / 1e9:.0f} are free")
    yield request.param
    if request.param == 2**31:
        gc.collect()
        torch.cuda.empty_cache()


def numel_beyond(edge: int) -> int:
    """P, a multiple of 16, past several blocks beyond the edge."""
    return edge + 3 * 1024 + 16


@dataclass
class Spread:
    """A case of few coordinates, and the same at `places` of long vectors that are 0 elsewhere."""

    few: Inputs
    many: Inputs
    places: Tensor  # (K,)

    def at_places(self, tensor: Tensor) -> Tensor:
        """What lies at the places; nothing may lie elsewhere."""
        found = tensor[..., self.places]
        assert torch.count_nonzero(tensor) == torch.count_nonzero(found)
        return found


def spread(edge: int, **options: Any) -> Spread:
    numel = numel_beyond(edge)
    places = torch.tensor(
        [0, 1, 1023, edge // 2 + 5, edge - 1, edge, edge + 1, edge + 2047, numel - 17, numel - 1]
    )
    few = build(Case(AdaGrad(), numel=len(places), dtype=torch.bfloat16, **options))
    few.params[few.params == 0] = 1.0
    few.segments = torch.tensor([0, 4, 5, 6, len(places)])
    at = places.to(DEVICE)

    def long(short: Tensor) -> Tensor:
        made = torch.zeros(*short.shape[:-1], numel, dtype=short.dtype, device=DEVICE)
        made[..., at] = short.to(DEVICE)
        return made

    many = replace(
        few,
        grads=long(few.grads),
        state=[long(s) for s in few.state],
        params=long(few.params),
        weights=few.weights.to(DEVICE),
        segments=torch.tensor([0, edge // 2 + 6, edge, edge + 1, numel], device=DEVICE),
        numbers=few.numbers.to(DEVICE),
    )
    return Spread(few, many, at)


def test_search_and_apply_reach_all_coordinates(edge: int) -> None:
    both = spread(edge, weight_decay=0.1)
    few, many = both.few, both.many
    gram = many.poisoned_gram()
    gpu.update_gram(many.kind, many.numbers, many.grads, many.state, gram)
    close(gram, expected_gram(few), torch.bfloat16, name="gram")
    gpu.apply(many.kind, many.numbers, many.grads, many.state, many.params, many.weights)
    after = [both.at_places(s) for s in many.state]
    close_applied(both.at_places(many.params), after, expected_apply(few), few)


def test_delayed_and_clippy_reach_all_coordinates(edge: int) -> None:
    both = spread(edge, clippy=Clippy(), lr=0.5)
    few, many = both.few, both.many
    gram, sigma = many.poisoned_gram(), many.poisoned_sigma()
    gpu.apply_and_gram(
        many.kind,
        many.numbers,
        many.grads,
        many.state,
        many.params,
        many.weights,
        gram,
        clippy=many.lambdas,
        segments=many.segments,
        sigma=sigma,
    )
    low, high = expected_sigma(few)
    assert ((low <= sigma.cpu()) & (sigma.cpu() <= high)).all()
    assert (sigma < 1).any()
    close(gram, expected_gram(few, sigma), torch.bfloat16, name="gram")
    after = [both.at_places(s) for s in many.state]
    close_applied(both.at_places(many.params), after, expected_apply(few, sigma), few)


def test_passes_without_a_rule_reach_all_coordinates(edge: int) -> None:
    both = spread(edge)
    few, many = both.few, both.many
    gram = many.poisoned_gram()
    gpu.gram(many.grads, gram)
    close(gram, expected_gradient_gram(few), torch.bfloat16, name="gram")
    gpu.combine(many.grads, many.weights, many.params)
    close(both.at_places(many.params), expected_combine(few), torch.bfloat16)
    found = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    gpu.check(many.grads, found)
    assert found.item() == 0
    for row, place in ((0, edge), (1, -1), (0, -1), (1, 0)):
        good = many.grads[row, place].clone()
        many.grads[row, place] = torch.nan
        gpu.check(many.grads, found.zero_())
        assert found.item() == 1
        many.grads[row, place] = good


@pytest.mark.parametrize("distribution", philox.DISTRIBUTIONS)
def test_perturb_reaches_all_coordinates(
    edge: int, distribution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    numel = numel_beyond(edge)
    params = torch.zeros(numel, device=DEVICE)
    out = torch.full((1, numel), torch.nan, device=DEVICE)
    scale = torch.ones(1, dtype=torch.float64, device=DEVICE)
    params[edge], params[-1] = 3.0, 5.0
    gpu.perturb(params, out, scale=scale, seed=2**40 + 3, offset=7, distribution=distribution)
    per_block = 4 if distribution == "gaussian" else 128

    def later_words(seed: int, number: int, blocks: int) -> tuple[philox.Words, ...]:
        block = np.arange(first // per_block, first // per_block + blocks, dtype=np.uint64)
        low, high = block & np.uint64(philox.LOW), block >> np.uint64(32)
        counter = low, high, number & philox.LOW, number >> 32
        return philox.philox(counter, (seed & philox.LOW, seed >> 32))

    monkeypatch.setattr(philox, "words", later_words)
    for first, last in ((0, 2048), (edge - 2048, numel)):
        drawn = philox.DISTRIBUTIONS[distribution](2**40 + 3, 7, last - first)
        expected = params[first:last].cpu() + torch.from_numpy(drawn)
        assert torch.equal(out[0, first:last].cpu(), expected)


class Loop:
    """Steps of one group, as an optimizer makes them on the device; everything in fixed memory."""

    def __init__(self, module: Any, device: torch.device, numel: int = 3001) -> None:
        host = build(Case(Adam(), n_tasks=3, numel=numel, step=0, lr=1e-2, weight_decay=0.1))
        self.module = module
        self.inputs = host.to(device)
        self.gram = self.inputs.poisoned_gram()
        self.weights = self.inputs.weights
        self.info = torch.full((4,), torch.nan, dtype=torch.float64, device=device)
        hyper = Adam().hyper(1e-2, 0.1)
        self.hyper = torch.tensor([hyper], dtype=torch.float64, device=device)
        self.counts = torch.zeros(1, dtype=torch.int64, device=device)
        self.active = torch.ones(1, dtype=torch.int32, device=device)
        self.found = torch.ones(1, dtype=torch.int32, device=device)
        self.tally = torch.zeros(2, dtype=torch.int64, device=device)
        self.numbers = torch.full(
            (1, len(Numbers._fields)), torch.nan, dtype=torch.float64, device=device
        )

    def step(self) -> None:
        module, inputs = self.module, self.inputs
        kind, grads, state = inputs.kind, inputs.grads, inputs.state
        module.step_constants(self.hyper, self.counts, self.active, self.numbers, self.found)
        module.check(grads, self.found)
        module.update_gram(kind, self.numbers, grads, state, self.gram)
        module.bargaining(self.gram, self.weights, self.info)
        module.apply(kind, self.numbers, grads, state, inputs.params, self.weights, skip=self.found)
        module.count_step(self.counts, self.active, self.found, self.tally)

    def everything(self) -> dict[str, Tensor]:
        """What a step writes, and what it must not."""
        state = dict(zip(self.inputs.rule.state_names, self.inputs.state, strict=True))
        return {
            "params": self.inputs.params,
            "weights": self.weights,
            "gram": self.gram,
            "info": self.info,
            "counts": self.counts,
            "tally": self.tally,
            "numbers": self.numbers,
            "found": self.found,
            "grads": self.inputs.grads,
            **state,
        }


def gradients(loop: Loop, t: int) -> Tensor:
    """New ones for every step; those of step 3 are not all finite."""
    generator = torch.Generator().manual_seed(t)
    made = torch.randn(loop.inputs.grads.shape, generator=generator)
    if t == 3:
        made[1, -1] = torch.nan
    return made.to(DEVICE)


def test_steps_of_the_kernels_follow_those_of_the_cpu() -> None:
    """Interpreted where there is no GPU; one step is skipped."""
    there, here = Loop(gpu, DEVICE), Loop(cpu, torch.device("cpu"))
    for t in range(5):
        given = gradients(there, t)
        there.inputs.grads.copy_(given)
        here.inputs.grads.copy_(given)
        before = there.inputs.params.clone()
        there.step()
        here.step()
        assert there.found.item() == here.found.item() == int(t == 3)
        assert torch.equal(there.inputs.params, before) == (t == 3)
        expected = here.everything()
        for name, value in there.everything().items():
            if name not in ("gram", "info") or t != 3:
                torch.testing.assert_close(
                    value.cpu(), expected[name], rtol=2e-5, atol=1e-6, equal_nan=True, msg=name
                )
    assert there.tally.tolist() == [4, 1]
    assert there.counts.tolist() == [4]


@pytest.mark.cuda
@needs_cuda
def test_a_graph_of_a_step_has_the_bits_of_eager_steps() -> None:
    eager, graphed = Loop(ops, DEVICE), Loop(ops, DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for t in range(2):
            graphed.inputs.grads.copy_(gradients(graphed, t))
            graphed.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed.step()
    for t in range(8):
        given = gradients(eager, t)
        eager.inputs.grads.copy_(given)
        eager.step()
        if t < 2:
            continue
        graphed.inputs.grads.copy_(given)
        graph.replay()
        made = graphed.everything()
        for name, value in eager.everything().items():
            # Bits: NaN is none other than itself.
            assert torch.equal(made[name].view(torch.uint8), value.view(torch.uint8)), (t, name)
    assert graphed.tally.tolist() == [7, 1]


def calls(module: Any) -> dict[str, Callable[[], None]]:
    """Every op, ready to be called again and again."""
    loop = Loop(module, DEVICE)
    plain = loop.inputs
    own, clipped = (
        build(Case(Adam(), n_tasks=3, numel=3001, **options)).to(DEVICE)
        for options in ({"adatask": True}, {"clippy": Clippy()})
    )
    numbers = numbers_of(Adam(), 3, 1e-2).to(DEVICE)
    sigma = clipped.poisoned_sigma()
    gram, weights = plain.poisoned_gram(), plain.weights.clone()
    spd = torch.eye(3, dtype=torch.float64, device=DEVICE)
    scale = torch.ones(2, dtype=torch.float64, device=DEVICE)
    rows = torch.empty(2, 3001, device=DEVICE)
    passes: dict[str, Callable[[], None]] = {"step": loop.step}

    def update_gram(inputs: Inputs, rows: Tensor, **options: Any) -> None:
        module.update_gram(inputs.kind, rows, inputs.grads, inputs.state, gram, **options)

    def move(inputs: Inputs, rows: Tensor, delayed: bool, **options: Any) -> None:
        head = inputs.kind, rows, inputs.grads, inputs.state, inputs.params, weights
        if delayed:
            module.apply_and_gram(*head, gram, skip=loop.found, **options)
        else:
            options.pop("clippy", None)
            module.apply(*head, skip=loop.found, **options)

    clip = {"clippy": clipped.lambdas, "segments": clipped.segments, "sigma": sigma}
    for name, inputs, of_step, options in (
        ("", plain, numbers, {}),
        (" adatask", own, own.numbers, {}),
        (" clippy", clipped, numbers, clip),
    ):
        aim = {"params": inputs.params} if options else {}
        passes["update_gram" + name] = lambda i=inputs, n=of_step, o=options, a=aim: update_gram(
            i, n, **o, **a
        )
        passes["apply_and_gram" + name] = lambda i=inputs, n=of_step, o=options: move(
            i, n, True, **o
        )
        passes["apply" + name] = lambda i=inputs, n=of_step, o=options: move(i, n, False, **o)
    passes["gram"] = lambda: module.gram(plain.grads, gram)
    passes["combine"] = lambda: module.combine(plain.grads, weights, plain.params)
    passes["mgda"] = lambda: module.mgda(spd, weights, loop.info)
    passes["perturb drawn"] = lambda: module.perturb(plain.params, rows, scale=scale, seed=3)
    passes["perturb given"] = lambda: module.perturb(
        plain.params, rows, scale=scale, direction=plain.params
    )
    return passes


@pytest.mark.parametrize("module", [gpu, ops])
def test_the_calls_that_must_not_wait_are_right(module: Any) -> None:
    made = calls(module)
    for call in made.values():
        call()
    operators = {name.split()[0] for name in made}
    # The step is the rest of them.
    assert operators == {
        *("step", "update_gram", "apply_and_gram", "apply", "gram", "combine", "mgda", "perturb"),
    }


@pytest.mark.cuda
@needs_cuda
def test_no_op_waits_for_the_device() -> None:
    made = calls(ops)
    for call in made.values():
        call()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in made.values():
            call()
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.ones((), device=DEVICE).item()
    finally:
        torch.cuda.set_sync_debug_mode("default")

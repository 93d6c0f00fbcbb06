"""The CPU kernels against the float64 reference, and what is promised about their bits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import ops_cases
import pytest
import torch
from ops_cases import DTYPES, GRAM_TASKS, RULES, TASKS, Case, Inputs, build, numbers_of
from torch import Tensor

from fastmto import ops, solvers
from fastmto.ops import _kernels, cpu
from fastmto.optim.rules import AdaGrad, Adam, Clippy, RMSProp, Rule

BASELINE, V3, V4 = 1, 2, 3
ISAS = [isa for isa in (BASELINE, V3, V4) if _kernels.supported(isa)]
# Past one block of 512, odd, and no multiple of a vector.
NUMEL = 1237

rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=[str(d).split(".")[1] for d in DTYPES])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads(one_thread: None) -> None:
    del one_thread
    torch.set_num_threads(2)


def update_gram(inputs: Inputs, isa: int = 0) -> tuple[Tensor, Tensor | None]:
    """The Gram, and sigma with Clippy."""
    gram, sigma = inputs.poisoned_gram(), inputs.poisoned_sigma()
    head = inputs.kind, inputs.numbers, inputs.grads, inputs.state, gram
    if inputs.clippy is None:
        cpu.update_gram(*head, isa=isa)
        return gram, None
    cpu.update_gram(
        *head,
        clippy=inputs.lambdas,
        params=inputs.params,
        segments=inputs.segments,
        sigma=sigma,
        isa=isa,
    )
    return gram, sigma


def apply(inputs: Inputs, sigma: Tensor | None, isa: int = 0, skip: Tensor | None = None) -> None:
    cpu.apply(
        inputs.kind,
        inputs.numbers,
        inputs.grads,
        inputs.state,
        inputs.params,
        inputs.weights,
        segments=inputs.segments,
        sigma=sigma,
        skip=skip,
        isa=isa,
    )


def apply_and_gram(
    inputs: Inputs, isa: int = 0, skip: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    gram = inputs.poisoned_gram()
    sigma = None if inputs.clippy is None else inputs.poisoned_sigma()
    cpu.apply_and_gram(
        inputs.kind,
        inputs.numbers,
        inputs.grads,
        inputs.state,
        inputs.params,
        inputs.weights,
        gram,
        clippy=inputs.lambdas,
        segments=inputs.segments,
        sigma=sigma,
        skip=skip,
        isa=isa,
    )
    return gram, sigma


def gradient_gram(inputs: Inputs, isa: int = 0) -> Tensor:
    gram = inputs.poisoned_gram()
    cpu.gram(inputs.grads, gram, isa=isa)
    return gram


def found(tensor: Tensor, isa: int = 0) -> int:
    """What `check` makes of a cleared `found`."""
    flag = torch.zeros(1, dtype=torch.int32)
    cpu.check(tensor, flag, isa=isa)
    return int(flag)


def combine(inputs: Inputs, isa: int = 0) -> Tensor:
    out = torch.full_like(inputs.params, torch.nan)
    cpu.combine(inputs.grads, inputs.weights, out, isa=isa)
    return out


def everything(inputs: Inputs, isa: int = 0) -> list[Tensor]:
    """All that the ops write, on copies of the inputs."""
    done = inputs.clone()
    gram, sigma = update_gram(done, isa)
    apply(done, sigma, isa)
    optional = [] if sigma is None else [sigma]
    of_gradients = gradient_gram(inputs, isa)
    return [gram, done.params, *done.state, combine(inputs, isa), of_gradients, *optional]


def same_bits(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def check_gradient_gram(inputs: Inputs, isa: int = 0) -> None:
    gram = gradient_gram(inputs, isa)
    expected = ops_cases.expected_gradient_gram(inputs)
    ops_cases.close(gram, expected, inputs.grads.dtype, name="gram of the gradients")
    assert torch.equal(gram, gram.T)


def check(inputs: Inputs, isa: int = 0) -> None:
    """search, apply, delayed, gram and combine against the reference, outputs poisoned first."""
    before, done = inputs.clone(), inputs.clone()
    dtype = inputs.grads.dtype
    gram, sigma = update_gram(done, isa)
    assert same_bits([done.params, *done.state], [before.params, *before.state])
    if sigma is not None:
        low, high = ops_cases.expected_sigma(inputs)
        slack = ops_cases.FACTOR * ops_cases.EPS[dtype]
        assert ((low * (1 - slack) <= sigma) & (sigma <= high * (1 + slack))).all()
    ops_cases.close(gram, ops_cases.expected_gram(inputs, sigma), dtype, name="gram")
    assert torch.equal(gram, gram.T)

    apply(done, sigma, isa)
    expected = ops_cases.expected_apply(inputs, sigma)
    ops_cases.close_applied(done.params, done.state, expected, inputs)
    ops_cases.close(combine(done, isa), ops_cases.expected_combine(inputs), dtype, name="combine")
    check_gradient_gram(done, isa)
    assert torch.equal(done.grads, before.grads)

    both = inputs.clone()
    gram_too, sigma_too = apply_and_gram(both, isa)
    assert same_bits([gram_too, both.params, *both.state], [gram, done.params, *done.state])
    assert sigma is None or (sigma_too is not None and torch.equal(sigma, sigma_too))


def steps(n_tasks: int) -> list[int]:
    """Every third task absent, the others at steps of their own."""
    return [3 + i if i % 3 != 2 else 0 for i in range(n_tasks)]


def weights(n_tasks: int) -> list[float]:
    """Some zero, as a solver at its bounds gives them."""
    return [0.0 if i % 4 == 1 else 0.5 + 0.1 * (i % 7) for i in range(n_tasks)]


@rules
@dtypes
@pytest.mark.parametrize("n_tasks", TASKS)
@pytest.mark.parametrize("clippy", [None, Clippy(0.3, 0.01)], ids=["plain", "clippy"])
@pytest.mark.parametrize("adatask", [False, True], ids=["shared", "adatask"])
def test_every_rule_and_modifier(
    rule: Rule, dtype: torch.dtype, n_tasks: int, clippy: Clippy | None, adatask: bool
) -> None:
    check(
        build(
            Case(
                rule,
                n_tasks,
                NUMEL,
                dtype,
                clippy=clippy,
                adatask=adatask,
                padding=7,
                step=steps(n_tasks) if adatask else 7,
                lr=0.2,
                weight_decay=0.1,
                weights=weights(n_tasks),
            )
        )
    )


@rules
@dtypes
@pytest.mark.parametrize("adatask", [False, True], ids=["shared", "adatask"])
def test_instruction_sets(rule: Rule, dtype: torch.dtype, adatask: bool) -> None:
    """Each is right; any two give the same bits but for v4 in float maths (csrc kernels.h)."""
    inputs = build(
        Case(rule, 5, NUMEL, dtype, clippy=Clippy(), adatask=adatask, lr=0.2, weight_decay=0.1)
    )
    expected = everything(inputs, BASELINE)
    for isa in ISAS:
        check(inputs, isa)
        if isa != V4 or dtype == torch.float64:
            assert same_bits(everything(inputs, isa), expected)


@pytest.mark.parametrize("numel", [1, 2, 15, 16, 17, 31, 511, 512, 513, 4096, 4097])
@dtypes
def test_sizes_at_the_edges_of_vectors_and_blocks(numel: int, dtype: torch.dtype) -> None:
    for adatask in (False, True):
        check(build(Case(Adam(), 3, numel, dtype, adatask=adatask, padding=3, sizes=[numel])))


@pytest.mark.parametrize("n_tasks", [*range(1, 18), 64, 70])
def test_any_number_of_tasks(n_tasks: int) -> None:
    check(build(Case(Adam(), n_tasks, 601)))


@dtypes
@pytest.mark.parametrize("n_tasks", GRAM_TASKS)
def test_gram_of_the_gradients(n_tasks: int, dtype: torch.dtype) -> None:
    inputs = build(Case(Adam(), n_tasks, NUMEL, dtype, padding=7))
    before = inputs.grads.clone()
    for isa in ISAS:
        check_gradient_gram(inputs, isa)
    assert torch.equal(inputs.grads, before)


@pytest.mark.parametrize("adatask", [False, True], ids=["shared", "adatask"])
def test_many_small_tensors_and_empty_ones(adatask: bool) -> None:
    sizes = [1, 0, 3, 16, 0, 1, 700, 5, *[9] * 300, 20_001, 2, 0]
    check(
        build(
            Case(
                RMSProp(),
                3,
                sum(sizes),
                clippy=Clippy(),
                adatask=adatask,
                lr=0.5,
                sizes=sizes,
            )
        )
    )


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("clippy", [None, Clippy()], ids=["plain", "clippy"])
@pytest.mark.parametrize("adatask", [False, True], ids=["shared", "adatask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_same_bits_on_every_run_and_number_of_threads(
    clippy: Clippy | None, adatask: bool, dtype: torch.dtype
) -> None:
    inputs = build(
        Case(Adam(), 3, 200_003, dtype, clippy=clippy, adatask=adatask, lr=0.1, weight_decay=0.1)
    )
    check(inputs)
    first = everything(inputs)
    for _ in range(3):
        assert same_bits(everything(inputs), first)
    torch.set_num_threads(1)
    assert same_bits(everything(inputs), first)
    torch.set_num_threads(5)
    assert same_bits(everything(inputs), first)


def test_calls_from_several_python_threads() -> None:
    cases = [build(Case(Adam(), n, 60_001, seed=n)) for n in (2, 3, 8)]
    expected = [everything(inputs) for inputs in cases]
    agreed: list[bool] = []

    def work(number: int) -> None:
        for _ in range(10):
            agreed.append(same_bits(everything(cases[number]), expected[number]))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(len(cases))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert agreed == [True] * 30


@pytest.mark.parametrize("isa", ISAS)
def test_gram_of_a_million_coordinates_to_1e_8(isa: int) -> None:
    """Correlations of float32 inputs; summing them in float32 would leave 1e-3."""
    inputs = build(Case(Adam(), 3, 1_000_003))

    def correlation(g: Tensor) -> Tensor:
        s = g.diagonal().rsqrt()
        return s[:, None] * g * s

    for gram, (expected, _) in (
        (update_gram(inputs, isa)[0], ops_cases.expected_gram(inputs)),
        (gradient_gram(inputs, isa), ops_cases.expected_gradient_gram(inputs)),
    ):
        assert (correlation(gram) - correlation(expected)).abs().max() < 2e-8
        torch.testing.assert_close(gram, expected, rtol=1e-6, atol=1e-2)


@pytest.mark.parametrize("isa", ISAS)
def test_gram_of_nearly_parallel_gradients(isa: int) -> None:
    """Sums of a million terms of one sign, where errors do not cancel, on large rows."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.rand(2_000_003, generator=generator)
    grads = torch.stack([shared + 1e-4 * torch.rand(shared.shape, generator=generator)] * 2)
    grads[1, ::3] *= 1.001
    gram = torch.full((2, 2), torch.nan, dtype=torch.float64)
    cpu.gram(grads, gram, isa=isa)
    expected = grads.double() @ grads.double().T
    torch.testing.assert_close(gram, expected, rtol=1e-8, atol=0)


def test_absent_tasks() -> None:
    inputs = build(Case(Adam(), 3, NUMEL, clippy=Clippy(), adatask=True, step=[0, 0, 0], lr=0.5))
    done = inputs.clone()
    gram, sigma = update_gram(done)
    assert (gram == 0).all()
    assert sigma is not None
    assert (sigma == 1).all()
    apply(done, sigma)
    assert same_bits([done.params, *done.state], [inputs.params, *inputs.state])

    lonely = build(Case(Adam(), 3, NUMEL, adatask=True, step=[0, 4, 0]))
    check(lonely)
    gram, _ = update_gram(lonely)
    assert gram[1, 1] > 0
    assert gram.count_nonzero() == 1


@pytest.mark.parametrize("clippy", [None, Clippy(0.3, 0.01)], ids=["plain", "clippy"])
def test_no_task_takes_part_in_a_step_of_shared_moments(clippy: Clippy | None) -> None:
    """A row that is not active, where it is the only one."""
    inputs = build(Case(Adam(), 3, NUMEL, clippy=clippy, step=0, lr=0.5, weight_decay=0.1))
    done = inputs.clone()
    gram, sigma = update_gram(done)
    assert (gram == 0).all()
    assert sigma is None or (sigma == 1).all()
    apply(done, sigma)
    check(inputs)
    assert same_bits([done.params, *done.state], [inputs.params, *inputs.state])


def test_rates_are_those_of_the_first_active_row() -> None:
    inputs = build(Case(Adam(), 3, NUMEL, adatask=True, step=[0, 4, 5], weight_decay=0.1))
    expected = everything(inputs)
    inputs.numbers[2, 8:10] = torch.tensor([torch.nan, torch.nan])
    assert same_bits(everything(inputs), expected)


def test_clippy_takes_the_rate_of_the_tasks_own_row() -> None:
    inputs, faster = (
        build(Case(Adam(), 3, NUMEL, clippy=Clippy(), adatask=True, step=[0, 4, 5], lr=lr))
        for lr in (0.2, 0.4)
    )
    (_, sigma), (_, sigma_faster) = update_gram(inputs), update_gram(faster)
    inputs.numbers[2] = faster.numbers[2]
    _, mixed = update_gram(inputs)
    assert sigma is not None
    assert sigma_faster is not None
    assert mixed is not None
    assert torch.equal(mixed[:2], sigma[:2])
    assert torch.equal(mixed[2], sigma_faster[2])
    assert (sigma_faster[2] < sigma[2]).any()


@pytest.mark.parametrize("adatask", [False, True], ids=["shared", "adatask"])
@pytest.mark.parametrize("clippy", [None, Clippy(0.3, 0.01)], ids=["plain", "clippy"])
def test_a_skipped_step_writes_gram_and_sigma_only(clippy: Clippy | None, adatask: bool) -> None:
    inputs = build(Case(Adam(), 3, NUMEL, clippy=clippy, adatask=adatask, lr=0.2, weight_decay=0.1))
    gram, sigma = update_gram(inputs)
    moved = inputs.clone()
    apply(moved, sigma)
    for value in (0, 1, -7):
        skip = torch.tensor([value], dtype=torch.int32)
        expected = inputs if value else moved
        done = inputs.clone()
        apply(done, sigma, skip=skip)
        assert same_bits([done.params, *done.state], [expected.params, *expected.state])
        done = inputs.clone()
        gram_too, sigma_too = apply_and_gram(done, skip=skip)
        assert same_bits([done.params, *done.state], [expected.params, *expected.state])
        assert torch.equal(gram_too, gram)
        assert sigma is None or (sigma_too is not None and torch.equal(sigma_too, sigma))
        assert int(skip) == value


def test_no_weight_at_all_moves_the_moments_only() -> None:
    inputs = build(Case(Adam(), 3, NUMEL, weights=[0.0] * 3, weight_decay=0.0))
    check(inputs)
    done = inputs.clone()
    apply(done, None)
    assert torch.equal(done.params, inputs.params)
    assert not torch.equal(done.state[0], inputs.state[0])


@pytest.mark.parametrize("step", [1, 2, 10**6, 10**9])
def test_steps_from_first_to_very_late(step: int) -> None:
    check(build(Case(Adam(), 3, NUMEL, step=step)))


@dtypes
@pytest.mark.parametrize("eps", [1.0, 1e-3, 1e-8, 1e-12, 1e-20, 1e-30])
def test_small_and_large_eps(eps: float, dtype: torch.dtype) -> None:
    """Down to where the estimates of v4 give way to exact roots."""
    for rule in (Adam(eps=eps), AdaGrad(eps=eps), RMSProp(eps=eps)):
        check(build(Case(rule, 2, NUMEL, dtype)))


@rules
def test_fresh_state(rule: Rule) -> None:
    """The first step from zero moments, untouched coordinates included."""
    inputs = build(Case(rule, 3, NUMEL, step=1))
    for moments in inputs.state:
        moments.zero_()
    gram, _ = update_gram(inputs)
    ops_cases.close(gram, ops_cases.expected_gram(inputs), torch.float32, name="gram")
    assert (gram.diagonal() > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
@rules
def test_scales(rule: Rule, scale: float, dtype: torch.dtype) -> None:
    check(build(Case(rule, 3, NUMEL, dtype, scale=scale, clippy=Clippy())))


def test_no_update_leaves_clippy_at_one() -> None:
    inputs = build(Case(Adam(), 2, NUMEL, clippy=Clippy()))
    inputs.grads.zero_()
    for moments in inputs.state:
        moments.zero_()
    gram, sigma = update_gram(inputs)
    assert sigma is not None
    assert (sigma == 1).all()
    assert (gram == 0).all()


@pytest.mark.parametrize("isa", ISAS)
@rules
def test_denormal_gradients(rule: Rule, isa: int) -> None:
    inputs = build(Case(rule, 2, NUMEL, scale=1e-42))
    for moments in inputs.state:
        moments.mul_(1e-42)
    done = inputs.clone()
    gram, _ = update_gram(done, isa)
    apply(done, None, isa)
    assert gram.isfinite().all()
    expected = ops_cases.expected_apply(inputs)
    ops_cases.close(done.params, expected.params, torch.float32, name="params")
    assert all(moments.isfinite().all() for moments in done.state)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "huge"), [(torch.float32, 1e25), (torch.float64, 1e200)])
@rules
def test_squares_that_overflow_show_in_the_gram(
    rule: Rule, dtype: torch.dtype, huge: float, isa: int
) -> None:
    """The moments would be infinite for good: the step must be refused."""
    inputs = build(Case(rule, 2, NUMEL, dtype))
    inputs.grads[1, 5] = huge
    gram, _ = update_gram(inputs, isa)
    for shown in (gram, gradient_gram(inputs, isa)):
        assert not shown[1, 1].isfinite()
        assert shown[0, 0].isfinite()
    assert found(inputs.grads, isa) == 1


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [0, NUMEL - 1])
@dtypes
def test_a_task_that_is_not_finite_shows_in_its_own_row(
    bad: float, where: int, dtype: torch.dtype, isa: int
) -> None:
    for rule, clippy in [*((rule, None) for rule in RULES.values()), (Adam(), Clippy())]:
        inputs = build(Case(rule, 3, NUMEL, dtype, clippy=clippy, weights=[1.0, 0.0, 1.0]))
        inputs.grads[1, where] = bad
        gram, sigma = update_gram(inputs, isa)
        for shown in (gram, gradient_gram(inputs, isa)):
            finite = shown.isfinite()
            assert not finite[1, 1]
            assert finite[[0, 0, 2], [0, 2, 2]].all()
        # Its weight is 0, so nothing of it reaches parameters or moments.
        apply(inputs, sigma if sigma is None else sigma.nan_to_num(1.0), isa)
        assert inputs.params.isfinite().all()
        assert all(moments.isfinite().all() for moments in inputs.state)
        assert combine(inputs, isa).isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@dtypes
def test_check_finds_one_bad_element(bad: float, dtype: torch.dtype, isa: int) -> None:
    for numel in (1, 17, 5003):
        limit = {torch.float64: 2.0**511, torch.float16: 2.0**16}.get(dtype, 2.0**63)
        largest = limit * (1 - torch.finfo(dtype).eps / 2)
        tensor = torch.full((1, numel), largest, dtype=dtype)
        tensor[:, ::2] = -largest
        assert tensor.isfinite().all()
        if dtype != torch.float16:
            assert found(torch.full((1, numel), limit, dtype=dtype), isa) == 1
        assert found(tensor, isa) == 0
        for where in {0, numel // 2, numel - 1}:
            spoiled = tensor.clone()
            spoiled[0, where] = bad
            assert found(spoiled, isa) == 1


@pytest.mark.usefixtures("two_threads")
def test_check_of_rows_and_large_tensors() -> None:
    rows = torch.full((3, 50_007), torch.nan)[:, :50_000]
    rows[:] = 1.0
    assert found(rows) == 0
    rows[2, -1] = torch.inf
    assert found(rows) == 1
    assert found(torch.empty(1, 0)) == 0
    assert found(torch.ones(6, 4)) == 0
    with pytest.raises(ValueError, match=r"grads must be \(T >= 1, P\) with contiguous rows"):
        found(torch.ones(4, 6).T)
    with pytest.raises(ValueError, match=r"grads must be a \(T, P\) CPU .*float32.* got int64"):
        found(torch.ones(1, 4, dtype=torch.int64))


def test_check_leaves_what_was_found_before() -> None:
    flag = torch.zeros(1, dtype=torch.int32)
    cpu.check(torch.tensor([[torch.nan]]), flag)
    cpu.check(torch.ones(2, 5), flag)
    assert int(flag) == 1
    with pytest.raises(ValueError, match=r"found must be a contiguous int32 .*\(1,\), got bool"):
        cpu.check(torch.ones(2, 5), torch.zeros(1, dtype=torch.bool))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("offset", [0, 1])
def test_combine_past_the_caches(offset: int) -> None:
    """Large outputs are written past the caches where they are aligned."""
    numel = 2**21 + 5
    grads = torch.randn(2, numel)
    a = torch.tensor([0.3, -2.0], dtype=torch.float64)
    out = torch.full((numel + 1,), torch.nan)[offset : numel + offset]
    cpu.combine(grads, a, out)
    expected = a @ grads.double()
    magnitude = a.abs() @ grads.double().abs()
    ops_cases.close(out, (expected, magnitude), torch.float32)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("numel", [NUMEL, 2**21 + 5])
@dtypes
def test_combine_into_one_of_its_rows(dtype: torch.dtype, numel: int) -> None:
    for row, weights in ((0, [0.5, 2.0, -1.0]), (2, [0.5, 0.0, -1.0]), (1, [0.5, 0.0, 1.0])):
        inputs = build(Case(Adam(), 3, numel, dtype, padding=11, weights=weights))
        apart = combine(inputs)
        done = inputs.clone()
        cpu.combine(done.grads, done.weights, done.grads[row])
        assert torch.equal(done.grads[row], apart)
        others = [i for i in range(3) if i != row]
        assert torch.equal(done.grads[others], inputs.grads[others])


def test_dispatch() -> None:
    assert ops.backend(torch.device("cpu")) is cpu
    with pytest.raises(ValueError, match="device must be one of cpu, cuda, got meta"):
        ops.backend(torch.device("meta"))


ADAM = Adam()
Change = Callable[[dict[str, object]], None]


def put(**values: object) -> Change:
    return lambda arguments: arguments.update(values)


WRONG = {
    "grads_dtype": (put(grads=torch.ones(2, 64, dtype=torch.int32)), "grads must be .* got int32"),
    "grads_dim": (put(grads=torch.ones(64)), r"grads must be a \(T, P\)"),
    "grads_columns": (put(grads=torch.ones(64, 2).T), "grads must be .* contiguous rows"),
    "grads_overlap": (put(grads=torch.ones(64).expand(2, 64)), "rows that do not overlap"),
    "grads_meta": (put(grads=torch.ones(2, 64, device="meta")), "grads must be .* on meta"),
    "no_tasks": (put(grads=torch.ones(0, 64)), "T >= 1"),
    "state_count": (put(state=[torch.ones(64)]), r"state must hold 2 tensors \(exp_avg, "),
    "state_dtype": (
        put(state=[torch.ones(64), torch.ones(64).double()]),
        r"state\[1\] \(exp_avg_sq\) must be .* float32 .* got float64",
    ),
    "state_shape": (put(state=[torch.ones(63), torch.ones(64)]), r"state\[0\] .*\(64,\), got"),
    "state_mixed": (put(state=[torch.ones(2, 64), torch.ones(64)]), r"state\[1\] .*\(2, 64\)"),
    "state_overlap": (
        put(
            state=[torch.ones(2, 64), torch.ones(64).expand(2, 64)],
            numbers=numbers_of(ADAM, [3, 4]),
        ),
        r"state\[1\] \(exp_avg_sq\) must be .* do not overlap",
    ),
    "kind": (put(kind=6), "kind must be a rule's, from 0 to 5, got 6"),
    "numbers_dtype": (put(numbers=torch.ones(1, 11)), "numbers must be a contiguous float64"),
    "numbers_columns": (
        put(numbers=torch.ones(1, 10).double()),
        r"numbers must be .*\(1, 11\), got .*\(1, 10\)",
    ),
    "numbers_per_task": (
        put(numbers=numbers_of(ADAM, [1, 2])),
        r"numbers must be .*\(1, 11\), got",
    ),
    "numbers_shared": (
        put(state=[torch.ones(2, 64), torch.ones(2, 64)]),
        r"numbers must be .*\(2, 11\), got .*\(1, 11\)",
    ),
    "numbers_device": (put(numbers=torch.ones(1, 11, device="meta").double()), "numbers must be"),
    "skip_dtype": (
        put(skip=torch.zeros(1)),
        r"skip must be a contiguous int32 .*\(1,\), got float32",
    ),
    "skip_shape": (put(skip=torch.zeros(2, dtype=torch.int32)), r"skip must be .*\(1,\), got"),
    "params_dtype": (put(params=torch.ones(64).half()), "params must be .* float32 .* float16"),
    "params_shape": (put(params=torch.ones(8, 8)), r"params must be .*\(64,\), got .*\(8, 8\)"),
    "params_strided": (put(params=torch.ones(128)[::2]), "params must be a contiguous"),
    "weights_dtype": (put(weights=torch.ones(2)), "weights must be a contiguous float64"),
    "weights_shape": (put(weights=torch.ones(3).double()), r"weights must be .*\(2,\), got"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("op", ["apply", "apply_and_gram"])
def test_wrong_arguments_are_named(change: Change, message: str, op: str) -> None:
    arguments: dict[str, object] = {
        "kind": ADAM.kind,
        "numbers": numbers_of(ADAM, 3, 0.1),
        "grads": torch.ones(2, 64),
        "state": [torch.ones(64), torch.ones(64)],
        "params": torch.ones(64),
        "weights": torch.ones(2, dtype=torch.float64),
    }
    if op == "apply_and_gram":
        arguments["gram"] = torch.ones(2, 2, dtype=torch.float64)
    change(arguments)
    with pytest.raises(ValueError, match=message):
        getattr(cpu, op)(**arguments)


SEGMENTS = torch.tensor([0, 60, 64])
SIGMA = torch.ones(2, 2, dtype=torch.float64)
WRONG_CLIPPY = {
    "missing": ({}, "params, segments and sigma must be given with clippy"),
    "segments_dtype": ({"segments": SEGMENTS.int()}, "segments must be a contiguous int64"),
    "segments_end": ({"segments": SEGMENTS - 1}, "segments must rise from 0 to P = 64, got -1 to"),
    "segments_fall": ({"segments": torch.tensor([0, 70, 64])}, "segments must rise .* not sorted"),
    "sigma_shape": ({"sigma": torch.ones(2, 3).double()}, r"sigma must be .*\(2, 2\), got .* 3"),
    "sigma_dtype": ({"sigma": torch.ones(2, 2)}, "sigma must be a contiguous float64"),
    "params": ({"params": torch.ones(63)}, r"params must be .*\(64,\)"),
    "gram": ({"gram": torch.ones(3, 3).double()}, r"gram must be .*\(2, 2\), got .*\(3, 3\)"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_CLIPPY.values(), ids=WRONG_CLIPPY.keys())
def test_wrong_arguments_of_clippy_are_named(change: dict[str, Tensor], message: str) -> None:
    arguments: dict[str, Tensor | None] = {
        "params": torch.ones(64),
        "segments": SEGMENTS,
        "sigma": SIGMA,
        "gram": torch.ones(2, 2, dtype=torch.float64),
        **(change or {"sigma": None}),
    }
    gram = arguments.pop("gram")
    head = ADAM.kind, numbers_of(ADAM, 3, 0.1), torch.ones(2, 64), [torch.ones(64), torch.ones(64)]
    with pytest.raises(ValueError, match=message):
        cpu.update_gram(*head, gram, clippy=(0.5, 0.01), **arguments)


def test_sigma_wants_its_companions() -> None:
    inputs = build(Case(Adam(), 2, 64, sizes=[64]))
    sigma = torch.ones(2, 1, dtype=torch.float64)
    head = inputs.kind, inputs.numbers, inputs.grads, inputs.state, inputs.params, inputs.weights
    with pytest.raises(ValueError, match="segments must be given with sigma"):
        cpu.apply(*head, sigma=sigma)
    with pytest.raises(ValueError, match="clippy must be given with sigma"):
        cpu.apply_and_gram(*head, inputs.poisoned_gram(), sigma=sigma)


def test_combine_checks() -> None:
    grads, a = torch.ones(2, 64), torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"out must be a contiguous float32 CPU tensor of shape"):
        cpu.combine(grads, a, torch.ones(64).double())
    with pytest.raises(ValueError, match="weights must be"):
        cpu.combine(grads, a.float(), torch.ones(64))


def test_gram_checks() -> None:
    with pytest.raises(ValueError, match=r"gram must be .*\(2, 2\), got float32"):
        cpu.gram(torch.ones(2, 64), torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"grads must be .* got int32"):
        cpu.gram(torch.ones(2, 64, dtype=torch.int32), torch.ones(2, 2, dtype=torch.float64))


CLOCKED = [
    (rule, t)
    for rule in (*RULES.values(), Adam((0.0, 0.5)), Adam((0.99, 0.0), 1e-3), Adam((0.95, 0.98)))
    for t in (1, 2, 3, 10, 999, 12_345, 10**6, 10**9)
]


def test_clock_gives_the_bits_of_the_rules_numbers() -> None:
    n = len(CLOCKED)
    lr, weight_decay = 3.3e-4, 0.07
    hyper = torch.tensor(
        [rule.hyper(lr * i, weight_decay) for i, (rule, _) in enumerate(CLOCKED)],
        dtype=torch.float64,
    )
    counts = torch.tensor([t - 1 for _, t in CLOCKED])
    active = torch.ones(n, dtype=torch.int32)
    active[::5] = 0
    before = hyper.clone(), counts.clone(), active.clone()
    numbers = torch.full((n, 11), torch.nan, dtype=torch.float64)
    flag = torch.ones(1, dtype=torch.int32)
    cpu.step_constants(hyper, counts, active, numbers, flag)
    expected = [
        rule.numbers(t if i % 5 else 0, lr * i, weight_decay) for i, (rule, t) in enumerate(CLOCKED)
    ]
    assert torch.equal(numbers, torch.tensor(expected, dtype=torch.float64))
    assert int(flag) == 0
    assert same_bits([hyper, counts, active], list(before))


def test_advance() -> None:
    counts, active = torch.tensor([0, 5, 10**12]), torch.tensor([1, 0, 1], dtype=torch.int32)
    flag, tally = torch.zeros(1, dtype=torch.int32), torch.tensor([3, 4])
    cpu.count_step(counts, active, flag, tally)
    assert counts.tolist() == [1, 5, 10**12 + 1]
    assert tally.tolist() == [4, 4]
    flag[0] = 1
    cpu.count_step(counts, active, flag, tally)
    assert counts.tolist() == [1, 5, 10**12 + 1]
    assert tally.tolist() == [4, 5]
    assert (int(flag), active.tolist()) == (1, [1, 0, 1])


WRONG_CLOCK = {
    "hyper": (torch.ones(2, 6).double(), r"hyper must be .*\(2, 7\), got .*\(2, 6\)"),
    "counts": (torch.ones(2), r"counts must be a contiguous int64 .*\(2,\), got float32"),
    "active": (torch.ones(2, dtype=torch.bool), "active must be a contiguous int32 .* got bool"),
    "numbers": (torch.ones(1, 11).double(), r"numbers must be .*\(2, 11\), got .*\(1, 11\)"),
    "found": (torch.ones(2, dtype=torch.int32), r"found must be .*\(1,\), got .*\(2,\)"),
    "tally": (torch.ones(2, dtype=torch.int32), "tally must be a contiguous int64 .* got int32"),
}


@pytest.mark.parametrize("name", WRONG_CLOCK)
def test_wrong_arguments_of_the_clock_are_named(name: str) -> None:
    arguments = {
        "hyper": torch.tensor([Adam().hyper(0.1, 0.0)] * 2, dtype=torch.float64),
        "counts": torch.zeros(2, dtype=torch.int64),
        "active": torch.ones(2, dtype=torch.int32),
        "numbers": torch.ones(2, 11, dtype=torch.float64),
        "found": torch.ones(1, dtype=torch.int32),
        "tally": torch.zeros(2, dtype=torch.int64),
    }
    wrong, message = WRONG_CLOCK[name]
    arguments[name] = wrong
    calls = {
        cpu.step_constants: ("hyper", "counts", "active", "numbers", "found"),
        cpu.count_step: ("counts", "active", "found", "tally"),
    }
    for op, names in calls.items():
        if name in names:
            with pytest.raises(ValueError, match=message):
                op(**{k: arguments[k] for k in names})


SOLVERS = {"bargaining": cpu.bargaining, "mgda": cpu.mgda}
solvers_of_ops = pytest.mark.parametrize("name", SOLVERS)


def problem(n_tasks: int) -> Tensor:
    generator = torch.Generator().manual_seed(n_tasks)
    rows = torch.randn(n_tasks, 3 * n_tasks, generator=generator, dtype=torch.float64)
    return (rows @ rows.T).triu() + (rows @ rows.T).triu(1).T


def poisoned_answer(n_tasks: int) -> tuple[Tensor, Tensor]:
    return (
        torch.full((n_tasks,), torch.nan, dtype=torch.float64),
        torch.full((4,), torch.nan, dtype=torch.float64),
    )


def told(result: solvers.Result[Tensor]) -> list[float]:
    number = solvers.STATUSES.index(result.status)
    return [number, result.iterations, result.residual, result.kappa]


@solvers_of_ops
@pytest.mark.parametrize("n_tasks", [1, 2, 3, 8, 64])
def test_solvers(name: str, n_tasks: int) -> None:
    gram = problem(n_tasks)
    before = gram.clone()
    weights, info = poisoned_answer(n_tasks)
    SOLVERS[name](gram, weights, info)
    expected = getattr(solvers, name)(gram)
    assert expected.ok
    assert torch.equal(weights, expected.weights)
    assert info.tolist() == told(expected)
    assert torch.equal(gram, before)
    if name == "bargaining":
        torch.testing.assert_close(weights * (gram @ weights), torch.ones(n_tasks).double())
    else:
        gains = gram @ weights
        assert gains.min() >= weights @ gains * (1 - 1e-9)


def test_bargaining_by_preference_tol_and_ridge() -> None:
    gram = problem(3)
    powers = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    for options in ({"preference": powers}, {"tol": 1e-3}, {"ridge": 0.1}):
        weights, info = poisoned_answer(3)
        cpu.bargaining(gram, weights, info, **options)
        expected = solvers.bargaining(gram, **options)
        assert torch.equal(weights, expected.weights)
        assert info.tolist() == told(expected)


@solvers_of_ops
def test_weights_stay_where_there_are_none(name: str) -> None:
    gram = problem(3)
    gram[1, 1] = torch.nan
    weights, info = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), poisoned_answer(3)[1]
    SOLVERS[name](gram, weights, info)
    assert weights.tolist() == [1, 2, 3]
    assert solvers.STATUSES[int(info[0])] == "not_finite"
    stationary = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0], dtype=torch.float64)
    SOLVERS[name](stationary, weights, info)
    if name == "bargaining":
        assert weights.tolist() == [1, 2]
        assert solvers.STATUSES[int(info[0])] == "near_stationary"
    else:
        torch.testing.assert_close(weights, torch.full((2,), 0.5, dtype=torch.float64))
        assert info[0] == 0


@solvers_of_ops
def test_wrong_arguments_of_the_solvers_are_named(name: str) -> None:
    solve = SOLVERS[name]
    gram, (weights, info) = problem(2), poisoned_answer(2)
    with pytest.raises(ValueError, match=r"gram must be \(T, T\) with T from 1 to 64, got .*65"):
        solve(problem(65), *poisoned_answer(65))
    with pytest.raises(ValueError, match=r"gram must be .* float64 .* got float32"):
        solve(gram.float(), weights, info)
    with pytest.raises(ValueError, match=r"gram must be .*\(2, 2\), got .*\(2, 3\)"):
        solve(torch.ones(2, 3).double(), weights, info)
    with pytest.raises(ValueError, match=r"weights must be .*\(2,\), got .*\(3,\)"):
        solve(gram, torch.ones(3).double(), info)
    with pytest.raises(ValueError, match=r"info must be .*\(4,\), got .*\(2,\)"):
        solve(gram, weights, weights)


def test_wrong_preference_is_named() -> None:
    gram, (weights, info) = problem(2), poisoned_answer(2)
    with pytest.raises(ValueError, match=r"preference must be .*\(2,\), got .*\(3,\)"):
        cpu.bargaining(gram, weights, info, preference=torch.ones(3).double())
    with pytest.raises(ValueError, match="preference must be"):
        cpu.bargaining(gram, weights, info, preference=torch.tensor([1.0, -1.0]).double())

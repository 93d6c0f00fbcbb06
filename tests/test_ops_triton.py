"""The Triton passes against the float64 reference: on a GPU where there is one, else interpreted.

Small blocks and few programs, so that a few thousand coordinates mean several blocks a program,
several float64 joins and a sum over programs.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from ops_cases import (
    DTYPES,
    EPS,
    FACTOR,
    GRAM_TASKS,
    RULES,
    TASKS,
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
)
from torch import Tensor

from fastmto.optim.rules import Clippy, Numbers, Rule

pytest.importorskip("triton")

from fastmto.ops.triton import apply as triton_apply
from fastmto.ops.triton import clippy as triton_clippy
from fastmto.ops.triton import combine as triton_combine
from fastmto.ops.triton import gram as triton_gram
from fastmto.ops.triton import launch as triton_launch
from fastmto.ops.triton.launch import Tiling

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAIRS = Tiling(128, programs=2, flush=2)
BLOCKS = Tiling(256)
#: Clippy and whether every task keeps its own moments.
MODIFIERS = {
    "plain": (None, False),
    "clippy": (Clippy(), False),
    "adatask": (None, True),
    "both": (Clippy(0.3, 0.02), True),
}

modifiers = pytest.mark.parametrize("modifier", MODIFIERS)


def tiling_of(n_tasks: int, dtype: torch.dtype) -> Tiling:
    """Several blocks a program, with the row tile that is used for so many tasks."""
    tile = triton_gram.tiling_for(n_tasks, dtype == torch.float64, False, 1).tile
    return PAIRS if tile is None else Tiling(64, programs=2, flush=2, tile=tile)


def factors(inputs: Inputs, tiling: Tiling | None = BLOCKS) -> Tensor | None:
    """Clippy's sigma, if the case has Clippy."""
    if inputs.lambdas is None:
        return None
    sigma = inputs.poisoned_sigma()
    triton_clippy.factors(
        inputs.kind,
        inputs.numbers,
        inputs.grads,
        inputs.state,
        inputs.params,
        inputs.segments,
        sigma,
        inputs.lambdas,
        tiling=tiling,
    )
    return sigma


def searched(inputs: Inputs, tiling: Tiling | None, sigma: Tensor | None = None) -> Tensor:
    gram = inputs.poisoned_gram()
    triton_gram.update_gram(
        inputs.kind,
        inputs.numbers,
        inputs.grads,
        inputs.state,
        gram,
        segments=inputs.segments,
        sigma=sigma,
        tiling=tiling,
    )
    return gram


def gradient_gram(inputs: Inputs, tiling: Tiling | None) -> Tensor:
    gram = inputs.poisoned_gram()
    triton_gram.gram(inputs.grads, gram, tiling=tiling)
    return gram


def applied(
    inputs: Inputs,
    tiling: Tiling | None,
    sigma: Tensor | None = None,
    skip: Tensor | None = None,
) -> Inputs:
    after = inputs.clone()
    triton_apply.apply(
        after.kind,
        after.numbers,
        after.grads,
        after.state,
        after.params,
        after.weights,
        segments=after.segments,
        sigma=sigma,
        skip=skip,
        tiling=tiling,
    )
    return after


def apply_and_gram(
    inputs: Inputs,
    tiling: Tiling | None,
    sigma: Tensor | None = None,
    skip: Tensor | None = None,
) -> tuple[Inputs, Tensor]:
    after, gram = inputs.clone(), inputs.poisoned_gram()
    triton_gram.apply_and_gram(
        after.kind,
        after.numbers,
        after.grads,
        after.state,
        after.params,
        after.weights,
        gram,
        segments=after.segments,
        sigma=sigma,
        skip=skip,
        tiling=tiling,
    )
    return after, gram


def same_bits(first: Inputs, second: Inputs) -> bool:
    """Whether parameters and moments are the same."""
    pairs = zip([first.params, *first.state], [second.params, *second.state], strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def check(case: Case, tiling: Tiling | None, blocks: Tiling | None) -> Tensor | None:
    """sigma, search, apply and delayed of `case`; inputs that are read only stay as they are.

    Returns:
        sigma, if the case has Clippy.
    """
    host = build(case)
    inputs = host.to(DEVICE)
    sigma = factors(inputs, blocks)
    if sigma is not None:
        low, high = expected_sigma(host)
        slack = FACTOR * EPS[case.dtype]
        assert ((low * (1 - slack) <= sigma.cpu()) & (sigma.cpu() <= high * (1 + slack))).all()
        assert (sigma <= 1).all()
    expected = expected_apply(host, sigma)
    gram = searched(inputs, tiling, sigma)
    close(gram, expected_gram(host, sigma), case.dtype, name="gram")
    assert torch.equal(gram, gram.T)
    assert same_bits(inputs, host.to(DEVICE))
    after = applied(inputs, blocks, sigma)
    close_applied(after.params, after.state, expected, host)
    assert torch.equal(after.grads, inputs.grads)
    at_once, again = apply_and_gram(inputs, tiling, sigma)
    close_applied(at_once.params, at_once.state, expected, host)
    close(again, expected_gram(host, sigma), case.dtype, name="gram of delayed")
    assert torch.equal(again, again.T)
    assert torch.equal(at_once.grads, inputs.grads)
    return sigma


def modified(modifier: str, rule: Rule, n_tasks: int, **options: object) -> Case:
    """A case with steps that Clippy shortens, some tasks absent where they may be and some
    without weight."""
    clippy, adatask = MODIFIERS[modifier]
    steps = [3 + i if i % 3 != 2 else 0 for i in range(n_tasks)] if adatask else 7
    weights = [0.0 if i % 4 == 1 else 0.5 + 0.1 * (i % 7) for i in range(n_tasks)]
    base = Case(
        rule,
        n_tasks,
        clippy=clippy,
        adatask=adatask,
        step=steps,
        weights=weights,
        lr=0.3,
        weight_decay=0.1,
        padding=5,
    )
    return replace(base, **options)


@modifiers
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rules(dtype: torch.dtype, rule: Rule, modifier: str) -> None:
    check(modified(modifier, rule, 3, dtype=dtype, numel=389), PAIRS, BLOCKS)


@pytest.mark.parametrize("n_tasks", TASKS)
@pytest.mark.parametrize(
    ("dtype", "modifier"),
    [
        *itertools.product(DTYPES, ("plain", "both")),
        (torch.bfloat16, "clippy"),
        (torch.float32, "adatask"),
    ],
    ids=str,
)
def test_tasks_and_dtypes(dtype: torch.dtype, modifier: str, n_tasks: int) -> None:
    numel = 645 if n_tasks < 8 else 389
    case = modified(modifier, RULES["adam"], n_tasks, dtype=dtype, numel=numel)
    check(case, tiling_of(n_tasks, dtype), BLOCKS)


@modifiers
def test_more_tasks_than_a_tile_holds(modifier: str) -> None:
    case = modified(modifier, RULES["rmsprop_centered_momentum"], 37, numel=89)
    check(case, Tiling(32, programs=2, flush=1, tile=16), BLOCKS)


@pytest.mark.parametrize(
    ("dtype", "modifier"),
    [*itertools.product([torch.float32], MODIFIERS), (torch.float64, "both"), (DTYPES[3], "both")],
    ids=str,
)
def test_64_tasks(dtype: torch.dtype, modifier: str) -> None:
    case = modified(modifier, RULES["adam"], 64, dtype=dtype, numel=41, sizes=[10, 31])
    check(case, None, None)


@modifiers
@pytest.mark.parametrize("numel", [1, 3001])
def test_default_tilings(numel: int, modifier: str) -> None:
    check(modified(modifier, RULES["adam"], 2, numel=numel), None, None)
    check(modified(modifier, RULES["adam"], 9, numel=min(numel, 301)), None, None)


@modifiers
def test_repeats_bit_for_bit_and_leaves_the_counters_at_zero(modifier: str) -> None:
    for n_tasks in (2, 9, 17):
        inputs = build(modified(modifier, RULES["adam"], n_tasks, numel=113)).to(DEVICE)
        tiling = Tiling(32, programs=3, flush=1, tile=None if n_tasks == 2 else 16)
        sigma = factors(inputs)
        first = searched(inputs, tiling, sigma)
        _, arrived = triton_launch.workspace(inputs.grads.device, 1, 1)
        assert not arrived.any()
        again = factors(inputs)
        assert sigma is None or (again is not None and torch.equal(again, sigma))
        assert torch.equal(searched(inputs, tiling, sigma), first)
        assert same_bits(applied(inputs, BLOCKS, sigma), applied(inputs, BLOCKS, sigma))


@pytest.mark.parametrize("adatask", [False, True])
@pytest.mark.parametrize("block", [64, 2048])
def test_tensors_of_all_sizes(block: int, adatask: bool) -> None:
    """Empty ones, many within a block, one over many blocks, borders on blocks and inside."""
    sizes = [0, 1, 0, 3, 60, 0, *[9] * 20, 1, 2, 9, 300, 5, 64, 0, 3, 0]
    case = Case(
        RULES["rmsprop"],
        3,
        sum(sizes),
        clippy=Clippy(),
        adatask=adatask,
        lr=0.3,
        sizes=sizes,
    )
    sigma = check(case, Tiling(block, programs=2), Tiling(block))
    assert sigma is not None
    assert (sigma[:, [size == 0 for size in sizes]] == 1).all()
    assert 0 < (sigma < 1).double().mean() < 1
    tiles = check(case, Tiling(128, programs=2, tile=16), Tiling(block))
    assert tiles is not None
    assert torch.equal(tiles, sigma)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_tiling_does_not_show_in_clippys_factors(dtype: torch.dtype) -> None:
    """Nor do a block's borders: the smallest ratio is the same however it is found."""
    case = Case(RULES["adam"], 5, 645, dtype, clippy=Clippy(), lr=0.3)
    inputs = build(case).to(DEVICE)
    first = factors(inputs, Tiling(2048))
    assert first is not None
    for block in (64, 256):
        again = factors(inputs, Tiling(block))
        assert again is not None
        assert torch.equal(again, first)


def test_small_steps_and_zero_updates_are_not_shortened() -> None:
    inputs = build(Case(RULES["adam"], 2, 401, clippy=Clippy(), lr=1e-4)).to(DEVICE)
    sigma = factors(inputs)
    assert sigma is not None
    assert (sigma == 1).all()
    still = build(Case(RULES["adam"], 2, 401, clippy=Clippy(), lr=10.0)).to(DEVICE)
    for tensor in (still.grads, *still.state):
        tensor.zero_()
    sigma = factors(still)
    assert sigma is not None
    assert (sigma == 1).all()
    assert (searched(still, PAIRS, sigma) == 0).all()


@modifiers
def test_no_task_takes_part(modifier: str) -> None:
    """Rows of numbers that are not active: nothing of such a task is read."""
    case = modified(modifier, RULES["adam"], 3, numel=401)
    host = build(replace(case, step=[0, 0, 0]) if case.adatask else case)
    host.numbers.zero_()
    host.grads.fill_(torch.nan)
    inputs = host.to(DEVICE)
    sigma = factors(inputs)
    assert sigma is None or (sigma == 1).all()
    for tiling in (PAIRS, Tiling(32, programs=2, tile=16)):
        assert (searched(inputs, tiling, sigma) == 0).all()
        after, gram = apply_and_gram(inputs, tiling, sigma)
        assert (gram == 0).all()
        assert same_bits(after, inputs)
    assert same_bits(applied(inputs, BLOCKS, sigma), inputs)


@pytest.mark.parametrize("modifier", ["adatask", "both"])
@pytest.mark.parametrize("n_tasks", [3, 9])
def test_absent_tasks(n_tasks: int, modifier: str) -> None:
    """The rates are those of the first row that is active; absent gradients may be anything."""
    case = modified(modifier, RULES["adam"], n_tasks, numel=257, step=[0] * (n_tasks - 1) + [4])
    host = build(replace(case, weights=[1.0] * n_tasks))
    clean = host.clone()
    host.grads[:-1] = torch.nan
    host.numbers[:-1, Numbers._fields.index("lr")] = 7.0
    inputs, tiling = host.to(DEVICE), tiling_of(n_tasks, torch.float32)
    sigma = factors(inputs)
    if sigma is not None:
        assert (sigma[:-1] == 1).all()
        assert (sigma[-1] < 1).any()
    gram = searched(inputs, tiling, sigma)
    close(gram, expected_gram(clean, sigma), torch.float32)
    assert gram.count_nonzero() == 1
    for after in (applied(inputs, BLOCKS, sigma), apply_and_gram(inputs, tiling, sigma)[0]):
        close_applied(after.params, after.state, expected_apply(clean, sigma), clean)
        kept = zip(after.state, inputs.state, strict=True)
        assert all(torch.equal(new[:-1], old[:-1]) for new, old in kept)


@pytest.mark.parametrize(
    ("n_tasks", "modifier"), [*itertools.product((2, 9), MODIFIERS), (17, "both")]
)
def test_skip_leaves_everything_as_it_is(n_tasks: int, modifier: str) -> None:
    """But the Gram, which the search of the same pass writes."""
    case = modified(modifier, RULES["adam"], n_tasks, numel=89)
    inputs = build(case).to(DEVICE)
    tiling = Tiling(32, programs=2, flush=1, tile=None if n_tasks == 2 else 16)
    sigma = factors(inputs)
    yes = torch.tensor([1], dtype=torch.int32, device=DEVICE)
    no = torch.zeros_like(yes)
    gram = searched(inputs, tiling, sigma)
    assert same_bits(applied(inputs, BLOCKS, sigma, yes), inputs)
    after, again = apply_and_gram(inputs, tiling, sigma, yes)
    assert same_bits(after, inputs)
    assert torch.equal(again, gram)
    assert same_bits(applied(inputs, BLOCKS, sigma, no), applied(inputs, BLOCKS, sigma))
    one, other = apply_and_gram(inputs, tiling, sigma, no), apply_and_gram(inputs, tiling, sigma)
    assert same_bits(one[0], other[0])
    assert torch.equal(one[1], other[1])
    assert not same_bits(one[0], inputs)


@modifiers
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_skip_keeps_what_is_not_finite_out(modifier: str) -> None:
    case = modified(modifier, RULES["adam"], 3, numel=257, weights=[1.0, 1.0, 1.0])
    inputs = build(case).to(DEVICE)
    inputs.grads[0, 3] = torch.nan
    inputs.grads[1, 7] = torch.inf
    sigma = factors(inputs)
    yes = torch.tensor([-5], dtype=torch.int32, device=DEVICE)
    assert same_bits(applied(inputs, BLOCKS, sigma, yes), inputs)
    assert same_bits(apply_and_gram(inputs, PAIRS, sigma, yes)[0], inputs)


@modifiers
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("n_tasks", [3, 9])
def test_a_task_that_is_not_finite_shows_in_its_own_row(n_tasks: int, modifier: str) -> None:
    """Whatever tensor it lies in, and though a NaN has no ratio that Clippy could bound."""
    clippy, adatask = MODIFIERS[modifier]
    case = Case(RULES["adam"], n_tasks, 257, clippy=clippy, adatask=adatask, lr=0.3)
    for bad, where in itertools.product((torch.nan, torch.inf, 2.0**80), (0, 200)):
        inputs = build(case).to(DEVICE)
        inputs.grads[1, where] = bad
        sigma = factors(inputs)
        assert sigma is None or sigma[[i for i in range(n_tasks) if i != 1]].isfinite().all()
        finite = searched(inputs, tiling_of(n_tasks, torch.float32), sigma).isfinite()
        assert not finite[1, 1]
        good = [i for i in range(n_tasks) if i != 1]
        assert finite[good][:, good].all()


def test_a_task_without_weight_takes_no_part_whatever_its_gradient() -> None:
    host = build(Case(RULES["adam"], n_tasks=3, weights=(0.5, 0.0, 2.0)))
    expected, combined = expected_apply(host), expected_combine(host)
    host.grads[1] = torch.nan
    inputs = host.to(DEVICE)
    for after in (applied(inputs, BLOCKS), apply_and_gram(inputs, PAIRS)[0]):
        close_applied(after.params, after.state, expected, host)
    out = torch.full_like(inputs.params, torch.nan)
    triton_combine.combine(inputs.grads, inputs.weights, out, tiling=BLOCKS)
    close(out, combined, torch.float32)


def test_a_task_without_weight_still_moves_moments_of_its_own() -> None:
    host = build(Case(RULES["adam"], 3, weights=(0.5, 0.0, 2.0), adatask=True))
    inputs, expected = host.to(DEVICE), expected_apply(host)
    for after in (applied(inputs, BLOCKS), apply_and_gram(inputs, PAIRS)[0]):
        close_applied(after.params, after.state, expected, host)
        assert not torch.equal(after.state[0][1], inputs.state[0][1])


def test_a_single_task_with_moments_of_its_own() -> None:
    """(1, P) moments step on the gradient itself, (P,) moments on the weighted one."""
    own = Case(RULES["adam"], 1, 401, adatask=True, weights=[0.5])
    check(own, PAIRS, BLOCKS)
    check(replace(own, adatask=False), PAIRS, BLOCKS)


@pytest.mark.parametrize("n_tasks", [3, 9])
def test_rows_of_moments_may_lie_differently_far_apart(n_tasks: int) -> None:
    host = build(Case(RULES["rmsprop_centered_momentum"], n_tasks, 301, adatask=True))
    inputs = host.to(DEVICE)
    for k, tensor in enumerate(inputs.state):
        wide = torch.full((n_tasks, 301 + 7 * k), torch.nan, device=DEVICE)
        wide[:, :301] = tensor
        inputs.state[k] = wide[:, :301]
    tiling, expected = tiling_of(n_tasks, torch.float32), expected_apply(host)
    close(searched(inputs, tiling), expected_gram(host), torch.float32)
    for after in (applied(inputs, BLOCKS), apply_and_gram(inputs, tiling)[0]):
        close_applied(after.params, after.state, expected, host)


def test_a_captured_pass_has_scratch_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not there are counters left that were set aside."""
    for name in ("_workspaces", "_reserves"):
        monkeypatch.setattr(triton_launch, name, {})
    monkeypatch.setattr(triton_launch, "RESERVED", 12)
    host = build(Case(RULES["adam"], 2, 401))
    inputs = host.to(DEVICE)
    device = inputs.grads.device

    def captured(*counts: int) -> list[Tensor]:
        """Of captured passes with so many counters: first the Gram, then the counters."""
        with monkeypatch.context() as patch:
            patch.setattr(triton_launch, "capturing", lambda device: True)
            own = [triton_launch.workspace(device, 1, n)[1] for n in counts]
            return [searched(inputs, PAIRS), *own]

    early, *before = captured(1)
    first = searched(inputs, PAIRS)
    (kept,) = triton_launch._workspaces.values()
    assert triton_launch.workspace(device, 1, 1) is kept
    late, *after = captured(1, 5, 3)
    assert list(triton_launch._workspaces.values()) == [kept]
    assert triton_launch._reserves[device].numel() == 0
    assert torch.equal(early, first)
    assert torch.equal(late, first)
    counters = [*before, kept[1], *after]
    spans = sorted((c.data_ptr(), c.data_ptr() + 4 * c.numel()) for c in counters)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    # Kernels are compiled for such addresses.
    assert {start % 16 for start, _ in spans} == {0}
    assert not any(c.any() for c in counters)


def test_threads_of_a_pass_that_writes_have_coordinates_of_their_own() -> None:
    """Else one could read what another has written; and its programs' registers are there."""
    choices = itertools.product(range(1, 9), (32, 64), *[(False, True)] * 3)
    for n_tasks, n_lanes, double, per_task, clipped in choices:
        made = triton_gram.tiling_for(n_tasks, double, True, 1, per_task, clipped, n_lanes)
        assert made.tile is None
        assert made.block >= n_lanes * made.warps > 0, (n_tasks, made)
        assert made.programs is not None
        assert made.registers is not None
        assert made.programs * made.warps * 32 * made.registers <= 2**16, (n_tasks, made)
    for double in (False, True):
        made = triton_apply.tiling_for(double)
        assert made.block >= 64 * made.warps


def test_programs_of_many_tiles_leave_little_to_add_up() -> None:
    one, many = (triton_gram.tiling_for(n, True, False, 132) for n in (16, 1000))
    assert one.programs == 2 * 132
    assert many.programs == 1


@pytest.mark.parametrize(
    ("architecture", "instruction"),
    [
        ("gfx90a", "s_waitcnt vmcnt(0)"),
        ("gfx942", "s_waitcnt vmcnt(0)"),
        ("gfx1100", "s_waitcnt_vscnt null, 0x0"),
        ("gfx1201", "s_wait_storecnt 0x0"),
    ],
)
def test_amds_warps_wait_for_stores(architecture: str, instruction: str) -> None:
    assert triton_launch._waiting_on(architecture) == instruction
    assert torch.version.hip or triton_launch.waiting() is None


@pytest.mark.parametrize(("n_tasks", "dtype"), [(1, DTYPES[0]), *((9, d) for d in DTYPES)], ids=str)
def test_combine(n_tasks: int, dtype: torch.dtype) -> None:
    host = build(Case(RULES["adam"], n_tasks=n_tasks, dtype=dtype, padding=3))
    inputs = host.to(DEVICE)
    out = torch.full_like(inputs.params, torch.nan)
    triton_combine.combine(inputs.grads, inputs.weights, out, tiling=BLOCKS)
    close(out, expected_combine(host), dtype)


def test_combine_into_one_of_its_rows() -> None:
    host = build(Case(RULES["adam"], n_tasks=3, padding=3, weights=(0.5, 0.0, 2.0)))
    for row in range(3):
        done = host.to(DEVICE)
        triton_combine.combine(done.grads, done.weights, done.grads[row], tiling=BLOCKS)
        close(done.grads[row], expected_combine(host), torch.float32)
        others = [i for i in range(3) if i != row]
        assert torch.equal(done.grads[others].cpu(), host.grads[others])


@pytest.mark.parametrize("n_tasks", GRAM_TASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gram_of_the_gradients(dtype: torch.dtype, n_tasks: int) -> None:
    numel = 645 if n_tasks < 8 else 389
    host = build(Case(RULES["adam"], n_tasks=n_tasks, dtype=dtype, numel=numel, padding=3))
    inputs, tiling = host.to(DEVICE), tiling_of(n_tasks, dtype)
    gram = gradient_gram(inputs, tiling)
    close(gram, expected_gradient_gram(host), dtype)
    assert torch.equal(gram, gram.T)
    assert torch.equal(gradient_gram(inputs, tiling), gram)
    assert torch.equal(inputs.grads.cpu(), host.grads)


@pytest.mark.parametrize(("n_tasks", "numel"), [(1, 1), (2, 3001), (9, 301)])
def test_gram_of_the_gradients_with_default_tilings(n_tasks: int, numel: int) -> None:
    host = build(Case(RULES["adam"], n_tasks=n_tasks, numel=numel))
    close(gradient_gram(host.to(DEVICE), None), expected_gradient_gram(host), torch.float32)


def test_gram_of_more_gradients_than_a_tile_holds() -> None:
    host = build(Case(RULES["adam"], n_tasks=37, numel=131))
    gram = gradient_gram(host.to(DEVICE), Tiling(32, programs=2, flush=1, tile=16))
    close(gram, expected_gradient_gram(host), torch.float32)
    assert torch.equal(gram, gram.T)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_tasks", [3, 9])
def test_gram_shows_what_is_not_finite_or_too_large(n_tasks: int, dtype: torch.dtype) -> None:
    huge = {torch.float64: 2.0**512, torch.float16: torch.inf}.get(dtype, 2.0**64)
    for bad in (huge, torch.nan, -torch.inf):
        inputs = build(Case(RULES["adam"], n_tasks=n_tasks, dtype=dtype, numel=131)).to(DEVICE)
        inputs.grads[1, 5] = bad
        finite = gradient_gram(inputs, tiling_of(n_tasks, dtype)).isfinite()
        assert not finite[1, 1]
        good = [i for i in range(n_tasks) if i != 1]
        assert finite[good][:, good].all()


def test_coefficients_are_exact_in_float64() -> None:
    """1 - b2 and the bias corrections from float32 decay rates would be wrong by 1e-5."""
    case = Case(RULES["adam"], dtype=torch.float64, numel=33, step=100_000)
    check(case, PAIRS, BLOCKS)

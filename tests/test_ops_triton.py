"""The Triton passes against the float64 reference: on a GPU where there is one, else interpreted.

Small blocks and few programs, so that a few thousand coordinates mean several blocks a program,
several float64 joins and a sum over programs.
"""

from __future__ import annotations

import pytest
import torch
from ops_cases import (
    DTYPES,
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
)
from torch import Tensor

from fastmto.rules import Rule

pytest.importorskip("triton")

from fastmto.ops import triton_apply, triton_combine, triton_launch, triton_search
from fastmto.ops.triton_launch import Tiling

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAIRS = Tiling(128, programs=3, flush=2)
BLOCKS = Tiling(128)


def tiling_of(n_tasks: int, dtype: torch.dtype) -> Tiling:
    """Several blocks a program, with the row tile that is used for so many tasks."""
    tile = triton_search.tiling_for(n_tasks, dtype == torch.float64, False, 1).tile
    return PAIRS if tile is None else Tiling(32, programs=3, flush=2, tile=tile)


def searched(inputs: Inputs, tiling: Tiling | None) -> Tensor:
    gram = inputs.poisoned_gram()
    triton_search.search(
        inputs.rule, inputs.steps[0], inputs.grads, inputs.state, gram, tiling=tiling
    )
    return gram


def gradient_gram(inputs: Inputs, tiling: Tiling | None) -> Tensor:
    gram = inputs.poisoned_gram()
    triton_search.gram(inputs.grads, gram, tiling=tiling)
    return gram


def applied(inputs: Inputs, tiling: Tiling | None) -> Inputs:
    after = inputs.clone()
    triton_apply.apply(
        after.rule,
        after.steps[0],
        after.grads,
        after.state,
        after.params,
        after.weights,
        after.lr,
        after.weight_decay,
        tiling=tiling,
    )
    return after


def delayed(inputs: Inputs, tiling: Tiling | None) -> tuple[Inputs, Tensor]:
    after, gram = inputs.clone(), inputs.poisoned_gram()
    triton_search.delayed(
        after.rule,
        after.steps[0],
        after.grads,
        after.state,
        after.params,
        after.weights,
        gram,
        after.lr,
        after.weight_decay,
        tiling=tiling,
    )
    return after, gram


def check(case: Case, tiling: Tiling | None, blocks: Tiling | None) -> None:
    """search, apply and delayed of `case`; inputs that are read only stay as they are."""
    host = build(case)
    inputs = host.to(DEVICE)
    expected = expected_apply(host)
    gram = searched(inputs, tiling)
    close(gram, expected_gram(host), case.dtype, name="gram")
    assert torch.equal(gram, gram.T)
    after = applied(inputs, blocks)
    close_applied(after.params, after.state, expected, host)
    assert torch.equal(after.grads, inputs.grads)
    at_once, again = delayed(inputs, tiling)
    close_applied(at_once.params, at_once.state, expected, host)
    close(again, expected_gram(host), case.dtype, name="gram of delayed")
    assert torch.equal(again, again.T)
    assert torch.equal(at_once.grads, inputs.grads)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rules(dtype: torch.dtype, rule: Rule) -> None:
    case = Case(
        rule, n_tasks=3, dtype=dtype, numel=1501, padding=5, weight_decay=0.1, weights=(0.7, 0, 2)
    )
    check(case, PAIRS, BLOCKS)


@pytest.mark.parametrize("n_tasks", TASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tasks_and_dtypes(dtype: torch.dtype, n_tasks: int) -> None:
    numel = 1501 if n_tasks < 8 else 645
    check(
        Case(RULES["adam"], n_tasks=n_tasks, dtype=dtype, numel=numel, padding=3),
        tiling_of(n_tasks, dtype),
        BLOCKS,
    )


def test_more_tasks_than_a_tile_holds() -> None:
    case = Case(RULES["rmsprop_centered_momentum"], n_tasks=37, numel=131)
    check(case, Tiling(32, programs=2, flush=1, tile=16), BLOCKS)


@pytest.mark.parametrize("numel", [1, 3001])
def test_default_tilings(numel: int) -> None:
    check(Case(RULES["adam"], n_tasks=2, numel=numel), None, None)
    check(Case(RULES["adam"], n_tasks=9, numel=min(numel, 301)), None, None)


def test_repeats_bit_for_bit_and_leaves_the_counters_at_zero() -> None:
    for n_tasks in (2, 9, 37):
        inputs = build(Case(RULES["adam"], n_tasks=n_tasks, numel=257)).to(DEVICE)
        tiling = Tiling(32, programs=4, flush=1, tile=None if n_tasks == 2 else 16)
        first = searched(inputs, tiling)
        _, arrived = triton_launch.workspace(DEVICE, 1, 1)
        assert not arrived.any()
        assert torch.equal(searched(inputs, tiling), first)


def test_a_task_without_weight_takes_no_part_whatever_its_gradient() -> None:
    host = build(Case(RULES["adam"], n_tasks=3, weights=(0.5, 0.0, 2.0)))
    expected, combined = expected_apply(host), expected_combine(host)
    host.grads[1] = torch.nan
    inputs = host.to(DEVICE)
    for after in (applied(inputs, BLOCKS), delayed(inputs, PAIRS)[0]):
        close_applied(after.params, after.state, expected, host)
    out = torch.full_like(inputs.params, torch.nan)
    triton_combine.combine(inputs.grads, inputs.weights, out, tiling=BLOCKS)
    close(out, combined, torch.float32)


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
    numel = 1501 if n_tasks < 8 else 645
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

"""The ops in plain torch operations against the float64 reference."""

from __future__ import annotations

import itertools

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
    expected_sigma,
)
from torch import Tensor

from fastmto.ops import eager
from fastmto.rules import Clippy, Rule

CLIPPY = Clippy()
#: lr at which Clippy binds on some tensors under every rule.
CLIPPED_LR = 0.5


def searched(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """gram and sigma of `inputs` after checking both, from poisoned outputs."""
    gram = inputs.poisoned_gram()
    if inputs.clippy is None:
        eager.search(inputs.rule, inputs.step, inputs.grads, inputs.state, gram)
        sigma = None
    else:
        sigma = inputs.poisoned_sigma()
        eager.search(
            inputs.rule,
            inputs.step,
            inputs.grads,
            inputs.state,
            gram,
            clippy=inputs.clippy,
            params=inputs.params,
            lr=inputs.lr,
            segments=inputs.segments,
            sigma=sigma,
        )
        low, high = expected_sigma(inputs)
        unit = 1e-6 if inputs.grads.dtype != torch.float64 else 1e-14
        assert ((sigma >= low * (1 - unit)) & (sigma <= high * (1 + unit))).all()
    close(gram, expected_gram(inputs, sigma), inputs.grads.dtype, name="gram")
    assert torch.equal(gram, gram.T)
    return gram, sigma


@pytest.mark.parametrize("modifier", ["none", "clippy", "adatask", "both"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_search_apply_and_delayed_follow_the_reference(
    dtype: torch.dtype, rule: Rule, modifier: str
) -> None:
    adatask = modifier in ("adatask", "both")
    clippy = CLIPPY if modifier in ("clippy", "both") else None
    case = Case(
        rule,
        n_tasks=3,
        dtype=dtype,
        clippy=clippy,
        adatask=adatask,
        padding=5,
        step=(4, 0, 9) if adatask else 7,
        lr=CLIPPED_LR,
        weight_decay=0.1,
        weights=(0.7, 1.3, 0.0),
    )
    inputs = build(case)
    gram, sigma = searched(inputs)
    if sigma is not None:
        assert sigma.min() < 1
    if adatask:
        assert not gram[1].any()
    expected = expected_apply(inputs, sigma)

    applied = inputs.clone()
    eager.apply(
        rule,
        applied.step,
        applied.grads,
        applied.state,
        applied.params,
        applied.weights,
        applied.lr,
        applied.weight_decay,
        segments=None if sigma is None else applied.segments,
        sigma=sigma,
    )
    close_applied(applied.params, applied.state, expected, inputs)

    at_once, again = inputs.clone(), inputs.poisoned_gram()
    eager.delayed(
        rule,
        at_once.step,
        at_once.grads,
        at_once.state,
        at_once.params,
        at_once.weights,
        again,
        at_once.lr,
        at_once.weight_decay,
        clippy=clippy,
        segments=None if sigma is None else at_once.segments,
        sigma=None if sigma is None else inputs.poisoned_sigma(),
    )
    assert torch.equal(again, gram)
    assert torch.equal(at_once.params, applied.params)
    for one, other in zip(at_once.state, applied.state, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("n_tasks", TASKS)
def test_search_over_several_gram_blocks(n_tasks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "GRAM_BLOCK", 256)
    searched(build(Case(RULES["adam"], n_tasks=n_tasks)))


def test_clippy_leaves_zero_updates_and_empty_tensors_alone() -> None:
    inputs = build(Case(RULES["rmsprop"], clippy=CLIPPY, lr=10.0, sizes=(3, 0, 1000)))
    inputs.grads[1, :3] = 0
    gram, sigma = searched(inputs)
    assert sigma is not None
    assert gram.isfinite().all()
    assert sigma[1, 0] == 1
    assert (sigma[:, 1] == 1).all()
    assert (sigma[:, 2] < 1).all()


def test_a_task_without_weight_takes_no_part_whatever_its_gradient() -> None:
    inputs = build(Case(RULES["adam"], n_tasks=3, weights=(0.5, 0.0, 2.0)))
    expected, combined = expected_apply(inputs), expected_combine(inputs)
    inputs.grads[1] = torch.nan
    applied = inputs.clone()
    eager.apply(
        applied.rule,
        applied.step,
        applied.grads,
        applied.state,
        applied.params,
        applied.weights,
        applied.lr,
    )
    close_applied(applied.params, applied.state, expected, inputs)
    out = torch.full_like(inputs.params, torch.nan)
    eager.combine(inputs.grads, inputs.weights, out)
    close(out, combined, inputs.grads.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine(dtype: torch.dtype) -> None:
    inputs = build(Case(RULES["adam"], n_tasks=4, dtype=dtype, padding=3))
    out = torch.full_like(inputs.params, torch.nan)
    eager.combine(inputs.grads, inputs.weights, out)
    close(out, expected_combine(inputs), dtype)


def test_combine_into_one_of_its_rows() -> None:
    inputs = build(Case(RULES["adam"], n_tasks=3, padding=3, weights=(0.5, 0.0, 2.0)))
    for row in range(3):
        done = inputs.clone()
        eager.combine(done.grads, done.weights, done.grads[row])
        close(done.grads[row], expected_combine(inputs), torch.float32)


@pytest.mark.parametrize("n_tasks", GRAM_TASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gram(dtype: torch.dtype, n_tasks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "GRAM_BLOCK", 256)
    inputs = build(Case(RULES["adam"], n_tasks=n_tasks, dtype=dtype, padding=3))
    gram = inputs.poisoned_gram()
    eager.gram(inputs.grads, gram)
    close(gram, expected_gradient_gram(inputs), dtype)
    assert torch.equal(gram, gram.T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gram_shows_what_is_not_finite_or_too_large(dtype: torch.dtype) -> None:
    huge = {torch.float64: 2.0**512, torch.float16: torch.inf}.get(dtype, 2.0**64)
    for bad in (huge, -huge, torch.nan, -torch.inf):
        inputs = build(Case(RULES["adam"], n_tasks=3, dtype=dtype))
        inputs.grads[1, 5] = bad
        gram = inputs.poisoned_gram()
        eager.gram(inputs.grads, gram)
        assert gram.isfinite().tolist()[1][1] is False
        assert gram[[0, 0, 2], [0, 2, 2]].isfinite().all()
    empty = torch.full((2, 2), torch.nan, dtype=torch.float64)
    eager.gram(torch.empty(2, 0), empty)
    assert not empty.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_finite(dtype: torch.dtype) -> None:
    rows = build(Case(RULES["adam"], n_tasks=2, dtype=dtype, padding=3)).grads
    assert eager.all_finite(rows)
    assert eager.all_finite(rows[:, :0])
    limit = {torch.float64: 2.0**511, torch.float16: 2.0**16}.get(dtype, 2.0**63)
    rows[0, 0] = limit * (1 - torch.finfo(dtype).eps / 2)
    rows[1, 0] = -rows[0, 0]
    assert eager.all_finite(rows)
    rows[1, 0] = -limit
    assert not eager.all_finite(rows)
    rows[1, 0] = 0
    for bad, place in itertools.product((torch.nan, torch.inf, -torch.inf), ((0, 0), (1, -1))):
        spoiled = rows.clone()
        spoiled[place] = bad
        assert not eager.all_finite(spoiled)

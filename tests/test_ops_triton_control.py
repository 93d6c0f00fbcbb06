"""step_constants, count_step and check of the GPU backend: on a GPU where there is one, else
interpreted."""

from __future__ import annotations

import dataclasses
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmto.optim.rules import AdaGrad, Adam, Hyper, Numbers, RMSProp, Rule

pytest.importorskip("triton")

from fastmto.ops import cpu
from fastmto.ops.triton import backend as gpu
from fastmto.ops.triton import control as triton_control
from fastmto.ops.triton.launch import Tiling

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 2.0**-52
RULES: tuple[Rule, ...] = (
    Adam(),
    Adam(betas=(0.0, 0.5)),
    Adam(betas=(0.95, 1 - 1e-7), eps=1e-16),
    AdaGrad(),
    RMSProp(momentum=0.9, centered=True),
)
STEPS = (1, 2, 3, 10, 999, 65_537, 10**6 - 1, 2**31, 2**40)
#: Smallest refused value of each dtype: the power of two that the contract names, or infinity.
TOO_LARGE = {
    torch.float64: 2.0**511,
    torch.float32: 2.0**63,
    torch.bfloat16: 2.0**63,
    torch.float16: torch.inf,
}


@dataclasses.dataclass
class Clock:
    """Arguments of `step_constants` and `count_step`, outputs poisoned."""

    hyper: Tensor
    counts: Tensor
    active: Tensor
    numbers: Tensor
    found: Tensor
    tally: Tensor

    def tick(self, module: Any = gpu) -> Tensor:
        module.step_constants(self.hyper, self.counts, self.active, self.numbers, self.found)
        return self.numbers


def clock_of(
    rules: list[Rule],
    counts: list[int],
    active: list[int] | None = None,
    *,
    lr: float = 0.1,
    weight_decay: float = 0.01,
    device: torch.device = DEVICE,
) -> Clock:
    rows = len(rules)
    hyper = torch.tensor([rule.hyper(lr, weight_decay) for rule in rules], dtype=torch.float64)
    return Clock(
        hyper.to(device),
        torch.tensor(counts, device=device),
        torch.tensor([1] * rows if active is None else active, dtype=torch.int32, device=device),
        torch.full((rows, len(Numbers._fields)), torch.nan, dtype=torch.float64, device=device),
        torch.full((1,), 7, dtype=torch.int32, device=device),
        torch.tensor([5, 9], device=device),
    )


def exact_corrections(rule: Adam, step: int) -> tuple[float, float]:
    """c1 and c2 of the decay rates as float64 holds them, rounded once."""
    with localcontext() as context:
        context.prec = 60
        b1, b2 = (Decimal(b) for b in rule.betas)
        return float(1 / (1 - b1**step)), float(1 / (1 - b2**step).sqrt())


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_clock_makes_the_numbers_of_the_next_step(rule: Rule) -> None:
    """Every number bit for bit but the bias corrections, which are right to 4 units."""
    for lr, weight_decay in ((0.1, 0.01), (3e-4, 0.0)):
        done = clock_of(
            [rule] * len(STEPS), [t - 1 for t in STEPS], lr=lr, weight_decay=weight_decay
        )
        numbers = [Numbers(*row) for row in done.tick().tolist()]
        assert done.found.item() == 0
        for step, made in zip(STEPS, numbers, strict=True):
            expected = rule.numbers(step, lr, weight_decay)
            if not isinstance(rule, Adam):
                assert made == expected
                continue
            assert made == expected._replace(c1=made.c1, c2=made.c2)
            c1, c2 = exact_corrections(rule, step)
            assert made.c1 == pytest.approx(c1, rel=4 * EPS, abs=0)
            assert made.c2 == pytest.approx(c2, rel=4 * EPS, abs=0)
            # The host's own, from 1 - b**t, is off by a rounding of b**t.
            for b, ours, theirs in zip(
                rule.betas, (made.c1, made.c2), (expected.c1, expected.c2), strict=True
            ):
                cancelled = EPS / (1 - b) if step > 1 else 0.0
                assert ours == pytest.approx(theirs, rel=4 * EPS + cancelled, abs=0)


def test_clock_agrees_with_the_cpu_backend() -> None:
    host = torch.device("cpu")
    rules = [Adam(), Adam(betas=(0.5, 0.9)), RULES[-1], Adam()]
    made, expected = (
        clock_of(rules, [0, 41, 3, 8], [1, 1, 1, 0], device=device) for device in (DEVICE, host)
    )
    made.tick()
    expected.tick(cpu)
    torch.testing.assert_close(made.numbers.cpu(), expected.numbers, rtol=2e-13, atol=0)
    assert made.found.item() == expected.found.item() == 0


@pytest.mark.parametrize("rows", [1, 2, 31, 32, 33, 70])
def test_rows_have_clocks_of_their_own(rows: int) -> None:
    rules = [Adam(betas=(0.5 + 0.4 * r / rows, 0.99)) for r in range(rows)]
    active = [int(r % 3 != 1) for r in range(rows)]
    done = clock_of(list(rules), [2 * r for r in range(rows)], active)
    numbers = done.tick().tolist()
    for r, (rule, row) in enumerate(zip(rules, numbers, strict=True)):
        step = 2 * r + 1 if active[r] else 0
        assert row == pytest.approx(rule.numbers(step, 0.1, 0.01), rel=1e-13, abs=0)
    gpu.count_step(done.counts, done.active, done.found, done.tally)
    assert done.counts.tolist() == [2 * r + active[r] for r in range(rows)]
    assert done.tally.tolist() == [6, 9]


def test_a_row_that_is_not_active_is_not_read() -> None:
    done = clock_of([Adam(), Adam()], [4, -1], [1, 0])
    done.hyper[1] = torch.nan
    assert done.tick()[1].tolist() == list(Adam().numbers(0))
    assert done.numbers[0].isfinite().all()


@pytest.mark.parametrize("module", [gpu, cpu])
@pytest.mark.parametrize("found", [0, 1, -3])
def test_advance_counts_steps_made_and_skipped(module: Any, found: int) -> None:
    device = DEVICE if module is gpu else torch.device("cpu")
    done = clock_of([Adam()] * 3, [4, 2**40, 0], [1, 1, 0], device=device)
    done.found.fill_(found)
    module.count_step(done.counts, done.active, done.found, done.tally)
    made = found == 0
    assert done.counts.tolist() == [4 + made, 2**40 + made, 0]
    assert done.tally.tolist() == ([6, 9] if made else [5, 10])
    assert done.found.item() == found
    assert done.active.tolist() == [1, 1, 0]


def rows_of(dtype: torch.dtype, n_tasks: int, numel: int, padding: int) -> Tensor:
    """Finite gradients of every size; what lies between and behind the rows is not."""
    buffer = torch.full((n_tasks, numel + padding), torch.nan, dtype=dtype)
    grads = buffer[:, :numel]
    grads.copy_(torch.randn(n_tasks, numel, generator=torch.Generator().manual_seed(numel)))
    grads[:, ::5] = 0.0
    largest = TOO_LARGE[dtype]
    grads[:, 3::7] = (
        torch.finfo(dtype).max
        if largest == torch.inf
        else float(torch.nextafter(torch.tensor(largest, dtype=dtype), torch.zeros(1, dtype=dtype)))
    )
    grads[:, 4::7] *= -1
    return buffer.to(DEVICE)[:, :numel]


def found_in(grads: Tensor, tiling: Tiling | None, before: int = 0) -> int:
    found = torch.full((1,), before, dtype=torch.int32, device=DEVICE)
    kept = grads.clone()
    triton_control.check(grads, found, tiling=tiling)
    assert torch.equal(grads.nan_to_num(7), kept.nan_to_num(7))
    return int(found.item())


@pytest.mark.parametrize("dtype", TOO_LARGE, ids=str)
def test_check_of_every_kind_of_position(dtype: torch.dtype) -> None:
    """One bad element anywhere is found; padding, and the largest good elements, are none."""
    tiling = Tiling(64)
    for n_tasks, numel, padding in ((1, 1, 0), (1, 64, 3), (3, 193, 5), (2, 63, 1)):
        grads = rows_of(dtype, n_tasks, numel, padding)
        assert found_in(grads, tiling) == 0
        assert found_in(grads, tiling, before=1) == 1
        places = {0, 1, numel // 2, numel - 2, numel - 1, 62, 63, 64, 65, 127, 128, 191, 192}
        limit = TOO_LARGE[dtype]
        bads = (torch.nan, torch.inf, -torch.inf, limit, -limit)
        for k, place in enumerate(sorted(p for p in places if 0 <= p < numel)):
            for row in {0, n_tasks - 1, k % n_tasks}:
                good = grads[row, place].clone()
                grads[row, place] = bads[(k + row) % len(bads)]
                assert found_in(grads, tiling) == 1, (row, place, numel)
                grads[row, place] = good
        assert found_in(grads, tiling) == 0


@pytest.mark.parametrize("dtype", TOO_LARGE, ids=str)
def test_check_agrees_with_the_cpu_backend(dtype: torch.dtype) -> None:
    """Around the smallest value that is refused, with the default tiling."""
    limit = TOO_LARGE[dtype]
    for value in (0.0, limit / 4, limit / 2, limit, 2 * limit, torch.nan, -limit / 2, -limit):
        grads = torch.ones(2, 9001, dtype=dtype)
        grads[1, 8999] = value
        found, expected = torch.zeros(2, 1, dtype=torch.int32)
        cpu.check(grads, expected)
        found = found.to(DEVICE)
        gpu.check(grads.to(DEVICE), found)
        assert found.item() == expected.item() == int(not abs(value) < limit), value


def test_check_of_no_coordinates() -> None:
    assert found_in(torch.zeros(2, 0, device=DEVICE), None) == 0


def strided(t: Tensor) -> Tensor:
    """The same numbers, not contiguous."""
    return torch.stack([t, t], -1)[..., 0]


@pytest.mark.parametrize("change", [Tensor.half, strided, lambda t: t[:1], lambda t: t.to("meta")])
@pytest.mark.parametrize("name", ["hyper", "active", "numbers"])
def test_wrong_arguments_of_clock_are_named(name: str, change: Any) -> None:
    done = clock_of([Adam()] * 2, [0, 0])
    setattr(done, name, change(getattr(done, name)))
    with pytest.raises(ValueError, match=rf"^{name} must"):
        done.tick()


@pytest.mark.parametrize("name", ["counts", "found", "tally"])
def test_wrong_arguments_of_advance_are_named(name: str) -> None:
    for change in (Tensor.half, lambda t: strided(torch.cat([t, t]))):
        done = clock_of([Adam()] * 2, [0, 0])
        setattr(done, name, change(getattr(done, name)))
        with pytest.raises(ValueError, match=rf"^{name} must"):
            gpu.count_step(done.counts, done.active[: len(done.counts)], done.found, done.tally)


def test_wrong_arguments_of_check_are_named() -> None:
    found = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for grads in (torch.zeros(4), torch.zeros(2, 8)[:, ::2], torch.zeros(2, 4, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"^grads must"):
            gpu.check(grads.to(DEVICE), found)
    for bad in (found.long(), found[0], torch.zeros(2, dtype=torch.int32, device=DEVICE)):
        with pytest.raises(ValueError, match=r"^found must"):
            gpu.check(torch.zeros(2, 4, device=DEVICE), bad)


def test_hyper_and_numbers_have_the_order_that_the_kernel_knows() -> None:
    assert Hyper._fields == ("b1", "b2", "eps", "mu", "corrected", "lr", "weight_decay")
    assert Numbers._fields == (
        *("b1", "d1", "b2", "d2", "c1", "c2", "eps", "mu", "lr", "decay", "active"),
    )

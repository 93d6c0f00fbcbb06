"""Plans against the ops they stand for, bit for bit, and what they refuse."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from ops_cases import DTYPES, RULES
from torch import Tensor

from fastmto import ops
from fastmto.ops.plan import Entry, GradientPlan, Plan
from fastmto.optim.rules import Adam, Clippy, Hyper, Numbers, RMSProp, Rule

BOUNDS = (0.5, 0.01)
# Past one block of 512, odd; two runs of the shared parameters, heads of one and several tensors.
SHARED, HEADS = ((700, 0, 537), (65,)), ((33, 4), (129,), (1,))


@dataclass
class World:
    """Everything that a step touches. `spare` rows of gradients lie beyond T."""

    rule: Rule
    n_tasks: int
    adatask: bool
    clippy: bool
    hyper: Tensor
    counts: Tensor
    tally: Tensor
    shared: list[Entry]
    heads: list[Entry]

    def plan(self, isa: int = 0) -> Plan:
        return Plan(
            self.hyper,
            self.counts,
            self.tally,
            self.shared,
            self.heads,
            clippy=BOUNDS if self.clippy else None,
            isa=isa,
        )

    def written(self) -> list[Tensor]:
        entries = [*self.shared, *self.heads]
        sigmas = [e.sigma for e in entries if e.sigma is not None]
        states = [s for e in entries for s in e.state]
        return [self.counts, self.tally, *(e.params for e in entries), *states, *sigmas]


def world(
    rule: Rule,
    n_tasks: int,
    dtype: torch.dtype = torch.float32,
    *,
    adatask: bool = False,
    clippy: bool = False,
    spare: int = 0,
) -> World:
    generator = torch.Generator().manual_seed(n_tasks)
    maths = torch.float64 if dtype is torch.float64 else torch.float32

    def entry(row: int, sizes: Sequence[int], rows: int, stacked: bool) -> Entry:
        numel = sum(sizes)
        shape = (rows, numel) if stacked else (numel,)
        params = torch.randn(numel, generator=generator, dtype=torch.float64).to(dtype)
        return Entry(
            rule.kind,
            row,
            params,
            torch.zeros(rows, numel + 7, dtype=dtype)[:, :numel],
            [torch.zeros(shape, dtype=maths) for _ in rule.state_names],
            torch.tensor([0, *sizes]).cumsum(0) if clippy else None,
            torch.full((rows, len(sizes)), torch.nan, dtype=torch.float64) if clippy else None,
        )

    # The second shared run has the row, or the rows, of the first: neighbours of a frozen tensor.
    clock_rows = n_tasks if adatask else 1
    shared = [entry(0, sizes, n_tasks + spare, adatask) for sizes in SHARED]
    heads = [entry(clock_rows + k, sizes, 1, False) for k, sizes in enumerate(HEADS)]
    rows = clock_rows + len(HEADS)
    hypers = [rule.hyper(0.05 if r < clock_rows else 0.02, 0.1) for r in range(rows)]
    return World(
        rule,
        n_tasks,
        adatask,
        clippy,
        torch.tensor(hypers, dtype=torch.float64),
        torch.arange(rows) % 2,
        torch.zeros(2, dtype=torch.int64),
        shared,
        heads,
    )


class ByOps:
    """The step that a plan makes, by the ops."""

    def __init__(self, world: World) -> None:
        self.world = world
        rows = len(world.counts)
        self.numbers = torch.full((rows, len(Numbers._fields)), torch.nan, dtype=torch.float64)
        self.found = torch.ones(1, dtype=torch.int32)

    def _update(self, entry: Entry, rows: int) -> tuple[int, Tensor, Tensor, list[Tensor]]:
        n = rows if entry.state[0].dim() == 2 else 1
        numbers = self.numbers[entry.row : entry.row + n]
        return entry.kind, numbers, entry.grads[:rows], entry.state

    def _factors(self, entry: Entry, rows: int) -> dict[str, Tensor]:
        if entry.sigma is None or entry.segments is None:
            return {}
        return {"segments": entry.segments, "sigma": entry.sigma[:rows]}

    def _taking_part(self) -> list[tuple[Entry, int]]:
        shared = [(e, self.rows) for e in self.world.shared if self.rows]
        return shared + [(e, 1) for e in self.world.heads if self.active[e.row]]

    def look(self, rows: int, active: Sequence[bool], searches: bool) -> bool:
        world = self.world
        self.rows, self.active = rows, torch.tensor(active, dtype=torch.int32)
        ops.step_constants(world.hyper, world.counts, self.active, self.numbers, self.found)
        self.grams = []
        for entry, n in self._taking_part():
            if world.clippy or (searches and entry in world.shared):
                gram = torch.full((n, n), torch.nan, dtype=torch.float64)
                bounds = {"clippy": BOUNDS, "params": entry.params} if world.clippy else {}
                ops.update_gram(*self._update(entry, n), gram, **bounds, **self._factors(entry, n))
                ops.check(gram, self.found)
                self.grams.append(gram)
            else:
                ops.check(entry.grads[:n], self.found)
        return bool(self.found)

    def move(self, weights: Sequence[float], searches: bool) -> None:
        world = self.world
        for entry, n in self._taking_part():
            is_head = entry in world.heads
            w = torch.tensor([1.0] if is_head else weights, dtype=torch.float64)
            moved = *self._update(entry, n), entry.params, w
            options = {"skip": self.found, **self._factors(entry, n)}
            if searches and not is_head:
                gram = torch.full((n, n), torch.nan, dtype=torch.float64)
                ops.apply_and_gram(*moved, gram, clippy=BOUNDS if world.clippy else None, **options)
                self.grams.append(gram)
            else:
                ops.apply(*moved, **options)
        ops.count_step(world.counts, self.active, self.found, world.tally)

    def gram(self, delayed: bool) -> Tensor:
        """Of a search, or of the move where `apply_and_gram`."""
        first = len(self.grams) - len(SHARED) if delayed else 0
        return self.grams[first] + self.grams[first + 1]


def fill(worlds: Sequence[World], seed: int, absent: Sequence[int] = ()) -> None:
    """The same new gradients everywhere; zeros for absent tasks."""
    for one in worlds:
        generator = torch.Generator().manual_seed(seed)
        for entry in (*one.shared, *one.heads):
            grads = torch.randn(entry.grads.shape, generator=generator, dtype=torch.float64)
            entry.grads.copy_(grads)
        for entry in one.shared:
            entry.grads[list(absent)] = 0


def lockstep(
    rule: Rule,
    n_tasks: int,
    dtype: torch.dtype = torch.float32,
    *,
    adatask: bool = False,
    clippy: bool = False,
    spare: int = 0,
) -> None:
    """Steps of every sort, a plan beside the ops."""
    ours, theirs = (
        world(rule, n_tasks, dtype, adatask=adatask, clippy=clippy, spare=spare) for _ in range(2)
    )
    plan, by_ops = ours.plan(), ByOps(theirs)
    for seed in range(12):
        absent = [seed % n_tasks] if seed % 3 == 2 and n_tasks > 1 else []
        searches = adatask or seed % 2 == 0
        # Weights by this step's Gram, by an earlier one, or no Gram at all.
        in_look, in_move = seed % 4 == 0, seed % 4 == 2
        reached = seed != 7
        rows = (n_tasks + spare if searches else 1) if reached else 0
        touched = [reached and i not in absent for i in range(n_tasks)]
        on_tasks = touched if adatask else [True]
        active = [*on_tasks, *(k != seed % 5 for k in range(len(HEADS)))]
        weights = [float(touched[i] if i < n_tasks else 1) * (0.3 + i) for i in range(rows)]
        fill((ours, theirs), seed, absent)
        if seed == 5:  # not finite, in a head that takes part
            for one in (ours, theirs):
                one.heads[1].grads[0, 40] = torch.inf
        if seed == 6:  # in the shared gradients
            for one in (ours, theirs):
                one.shared[1].grads[0, 3] = torch.nan
        plan.gram(rows).fill_(torch.nan)
        found = plan.look(rows, active, searches=in_look)
        assert found == by_ops.look(rows, active, in_look) == (seed in (5, 6)), seed
        if not found:
            plan.move(weights, searches=in_move)
            by_ops.move(weights, in_move)
        if (in_look or in_move) and not found:
            assert torch.equal(plan.gram(rows), by_ops.gram(in_move)), seed
        for a, b in zip(ours.written(), theirs.written(), strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), seed


def step(plan: Plan, rows: int, active: list[bool]) -> None:
    """A step that is made, without a search, by the weights 1."""
    assert not plan.look(rows, active, searches=False)
    plan.move([1.0] * rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clippy", [False, True], ids=["plain", "clippy"])
@pytest.mark.parametrize("adatask", [False, True], ids=["shared", "adatask"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_the_bits_of_the_ops(rule: Rule, adatask: bool, clippy: bool, dtype: torch.dtype) -> None:
    for n_tasks in (1, 2, 3, 8):
        lockstep(rule, n_tasks, dtype, adatask=adatask, clippy=clippy)


@pytest.mark.parametrize("clippy", [False, True], ids=["plain", "clippy"])
def test_rows_beyond_the_tasks(clippy: bool) -> None:
    lockstep(Adam(), 3, clippy=clippy, spare=1)


def test_threads_make_no_difference() -> None:
    before = torch.get_num_threads()
    ends = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        entry = Entry(
            0,
            0,
            torch.zeros(100_003),
            torch.randn(2, 100_003, generator=torch.Generator().manual_seed(1)),
            [torch.zeros(100_003), torch.zeros(100_003)],
        )
        hyper = torch.tensor([Adam().hyper(0.1, 0.0)], dtype=torch.float64)
        counts, tally = torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
        plan = Plan(hyper, counts, tally, [entry], [])
        assert not plan.look(2, [True], searches=True)
        plan.move([0.5, 2.0])
        ends.append([plan.gram(2), entry.params, *entry.state])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_the_plan_keeps_its_tensors() -> None:
    made = world(Adam(), 2)
    hyper, params = made.hyper, made.shared[0].params
    plan = made.plan()
    fill([made], 0)
    del made
    before = params.clone()
    step(plan, 1, [True] * 4)
    assert not torch.equal(params, before)
    hyper[:, Hyper._fields.index("lr")] = 0.0  # read at every step
    hyper[:, Hyper._fields.index("weight_decay")] = 0.0
    before = params.clone()
    step(plan, 1, [True] * 4)
    assert torch.equal(params, before)


def test_only_what_takes_part_moves() -> None:
    made = world(Adam(), 2)
    plan = made.plan()
    fill([made], 0)
    entries = [*made.shared, *made.heads]
    before = [entry.params.clone() for entry in entries]

    def moved() -> list[bool]:
        return [not torch.equal(e.params, b) for e, b in zip(entries, before, strict=True)]

    step(plan, 0, [True, True, False, False])
    assert moved() == [False, False, True, False, False]
    assert made.counts.tolist() == [1, 2, 0, 1]
    made.heads[1].grads[0, 0] = torch.nan  # of a head that takes no part
    step(plan, 1, [True, False, False, True])
    assert moved() == [True, True, True, False, True]
    assert made.tally.tolist() == [2, 0]


def test_nothing_moves_without_a_look() -> None:
    made = world(Adam(), 2)
    plan = made.plan()
    with pytest.raises(RuntimeError, match=r"needs a look\(\) before it that found nothing"):
        plan.move([])
    fill([made], 0)
    step(plan, 1, [True] * 4)
    with pytest.raises(RuntimeError, match=r"needs a look\(\)"):
        plan.move([1.0])
    made.heads[0].grads[0, 0] = torch.nan
    assert plan.look(1, [True] * 4, searches=False)
    with pytest.raises(RuntimeError, match=r"needs a look\(\)"):
        plan.move([1.0])
    assert made.tally.tolist() == [1, 0]


def test_no_shared_entries() -> None:
    made = replace(world(Adam(), 2), shared=[])
    fill([made], 0)
    plan = made.plan()
    for searches in (True, False):
        assert not plan.look(50, [True] * 4, searches=searches)
        plan.move([1.0] * 50, searches=searches)
    assert made.tally.tolist() == [2, 0]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused(copied: Callable[[object], object]) -> None:
    for plan in (world(Adam(), 2).plan(), GradientPlan([torch.zeros(3, 5)])):
        with pytest.raises(TypeError, match="cannot be copied or pickled: build a new one"):
            copied(plan)


def test_wrong_calls_are_named() -> None:
    made = world(Adam(), 2)
    fill([made], 0)
    plan = made.plan()
    with pytest.raises(ValueError, match=r"rows must be 0 or .* got 3"):
        plan.look(3, [True] * 4, searches=False)
    with pytest.raises(ValueError, match=r"rows must be 0 or .* got -1"):
        plan.look(-1, [True] * 4, searches=False)
    with pytest.raises(ValueError, match="active must be a list or tuple of length 4, got "):
        plan.look(1, [True] * 3, searches=False)
    assert not plan.look(2, [True] * 4, searches=False)
    with pytest.raises(ValueError, match=r"weights must be a list or tuple of length 2, got \[1.0"):
        plan.move([1.0])
    with pytest.raises(ValueError, match="weights must be a list or tuple of length 2"):
        plan.move(torch.ones(2))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        plan.move([1.0, "1"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="all of theirs"):
        world(Adam(), 2, adatask=True).plan().look(1, [True] * 5, searches=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": torch.zeros(4)}, "params must be"),
        ({"grads": torch.zeros(1237)}, "grads must be"),
        ({"state": [torch.zeros(1237)]}, "state must hold 2"),
        ({"segments": torch.tensor([0, 3])}, "segments must rise"),
        ({"sigma": torch.ones(2, 3)}, "sigma must be"),
        ({"sigma": None}, "segments and sigma must be given"),
        ({"row": 9}, "row must be one of the table's 4"),
        ({"kind": 17}, "kind must be a rule's"),
    ],
)
def test_wrong_entries_are_named(change: dict[str, object], message: str) -> None:
    made = world(Adam(), 2, clippy=True)
    made.shared[0] = replace(made.shared[0], **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        made.plan()


def test_wrong_tables_and_heads_are_named() -> None:
    made = world(RMSProp(), 2)
    with pytest.raises(ValueError, match="hyper must be"):
        replace(made, hyper=made.hyper.float()).plan()
    with pytest.raises(ValueError, match="tally must be"):
        replace(made, tally=torch.zeros(3, dtype=torch.int64)).plan()
    with pytest.raises(ValueError, match="heads must have one row"):
        replace(made, heads=made.shared).plan()


def test_clippy_as_the_rules_have_it() -> None:
    assert (Clippy().lambda_rel, Clippy().lambda_abs) == BOUNDS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype: torch.dtype) -> None:
    for n_tasks in (1, 2, 3, 8):
        rows = [
            torch.randn(n_tasks + 1, numel, dtype=torch.float64).to(t)
            for numel, t in ((1237, dtype), (5, torch.float64))
        ]
        plan = GradientPlan(rows)
        weights = torch.rand(n_tasks, dtype=torch.float64)
        grams, outs = [], []
        for each in rows:
            grams.append(torch.full((n_tasks, n_tasks), torch.nan, dtype=torch.float64))
            outs.append(torch.full_like(each[-1], torch.nan))
            ops.gram(each[:-1], grams[-1])
            ops.combine(each[:-1], weights, outs[-1])
            each[-1] = torch.nan
        assert torch.equal(plan.gram(), grams[0] + grams[1])
        assert plan.finite(0)
        assert not plan.finite(n_tasks)
        plan.combine(weights)
        assert all(torch.equal(each[-1], out) for each, out in zip(rows, outs, strict=True))
        assert plan.finite(n_tasks)
        with pytest.raises(ValueError, match="weights must be a contiguous float64"):
            plan.combine(weights.float())
    with pytest.raises(ValueError, match="rows must be as many in every layout"):
        GradientPlan([torch.zeros(2, 3), torch.zeros(3, 3)])

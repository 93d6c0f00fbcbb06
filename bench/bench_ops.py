"""The CPU kernels beside plain torch, torch.compile, fused Adam, memory bandwidth and the
published way. All float32, rule Adam, torch's thread count.

    ours        the CPU backend of fastmto.ops
    op          the same by torch's dispatcher
    eager       the same maths on whole (T, P) tensors in plain torch
    compile     torch.compile of the same maths, the Gram as a reduction a pair
    published   the released PUB code's style, written anew: per task a list of fresh temporaries
                over flattened tensors, concatenated, then a matrix product; the parameters are
                one tensor, or 20 (published_20), whose temporaries the allocator can reuse
    fused_adam  torch.optim.Adam(fused=True) on one tensor (P,)
    randn_add   a row of torch.randn (torch.bernoulli for signs), then torch.add, row by row

Results are asserted before anything is timed. `speedup_vs_x` and the fractions compare best
rounds, `median_speedup_vs_x` is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import math

import pytest
import torch
from conftest import Bandwidth, Contestant, Times, n_sets, take_turns
from torch import Tensor

from fastmto import ops
from fastmto.ops import philox
from fastmto.optim.rules import Adam
from fastmto.reference import updates as reference

# torch.compile imports what torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

RULE, STEP, LR = Adam(), 7, 1e-3
SIZES = [10**6, 10**7]
TASKS = [2, 3, 8]
CPU = ops.backend(torch.device("cpu"))
NUMBERS = torch.tensor([RULE.numbers(STEP, LR)], dtype=torch.float64)


class Buffers:
    """One set of what a step works on."""

    def __init__(self, n_tasks: int, numel: int) -> None:
        generator = torch.Generator().manual_seed(n_tasks)
        self.grads = torch.randn(n_tasks, numel, generator=generator)
        self.m = torch.randn(numel, generator=generator) * 0.1
        self.v = torch.rand(numel, generator=generator) + 0.5
        self.theta = torch.randn(numel, generator=generator)
        self.gram = torch.full((n_tasks, n_tasks), torch.nan, dtype=torch.float64)
        self.weights = torch.linspace(0.5, 1.5, n_tasks, dtype=torch.float64)
        self.out = torch.zeros(numel)

    @property
    def bytes(self) -> int:
        return 4 * self.theta.numel() * (len(self.grads) + 4)

    def copy(self) -> Buffers:
        twin = object.__new__(Buffers)
        twin.__dict__ = {name: value.clone() for name, value in vars(self).items()}
        return twin

    def pieces(self, n: int) -> tuple[list[list[Tensor]], list[Tensor], list[Tensor], list[Tensor]]:
        """The model's n tensors: gradients by task, m, v, theta."""
        size = -(-self.theta.numel() // n)
        return (
            [list(g.split(size)) for g in self.grads],
            list(self.m.split(size)),
            list(self.v.split(size)),
            list(self.theta.split(size)),
        )


def make_sets(n_tasks: int, numel: int) -> list[Buffers]:
    first = Buffers(n_tasks, numel)
    return [first, *(first.copy() for _ in range(n_sets(first.bytes) - 1))]


def ours_search(b: Buffers) -> Tensor:
    CPU.update_gram(RULE.kind, NUMBERS, b.grads, [b.m, b.v], b.gram)
    return b.gram


def ours_apply(b: Buffers) -> None:
    CPU.apply(RULE.kind, NUMBERS, b.grads, [b.m, b.v], b.theta, b.weights)


def op_apply(b: Buffers) -> None:
    """The same by torch's dispatcher, as the optimizers call it."""
    ops.apply(RULE.kind, NUMBERS, b.grads, [b.m, b.v], b.theta, b.weights)


def ours_delayed(b: Buffers) -> None:
    CPU.apply_and_gram(RULE.kind, NUMBERS, b.grads, [b.m, b.v], b.theta, b.weights, b.gram)


C = RULE.coefficients(STEP)


def update(g: Tensor, m: Tensor, v: Tensor) -> Tensor:
    m_i = C.b1 * m + (1 - C.b1) * g
    v_i = C.b2 * v + (1 - C.b2) * g * g
    return C.c1 * m_i / (C.c2 * v_i.sqrt() + C.eps)


def eager_search(b: Buffers) -> Tensor:
    u = update(b.grads, b.m, b.v)
    return u @ u.T


def step_maths(grads: Tensor, m: Tensor, v: Tensor, theta: Tensor, a: Tensor) -> None:
    joint = g = torch.zeros(())
    for i in range(len(grads)):
        joint = joint + a[i] * update(grads[i], m, v)
        g = g + a[i] * grads[i]
    theta.sub_(LR * joint)
    m.copy_(C.b1 * m + (1 - C.b1) * g)
    v.copy_(C.b2 * v + (1 - C.b2) * g * g)


def eager_apply(b: Buffers) -> None:
    step_maths(b.grads, b.m, b.v, b.theta, b.weights.float())


def gram_maths(grads: Tensor, m: Tensor, v: Tensor) -> Tensor:
    u = [update(g, m, v) for g in grads]
    n = len(u)
    return torch.stack([(u[i] * u[j]).sum() for i in range(n) for j in range(i, n)])


def published_updates(b: Buffers, n: int) -> list[Tensor]:
    grads, ms, vs, _ = b.pieces(n)
    rows = []
    for row in grads:
        updates = []
        for g, m, v in zip(row, ms, vs, strict=True):
            exp_avg = m.clone().mul_(C.b1).add_(g, alpha=1 - C.b1)
            exp_avg_sq = v.clone().mul_(C.b2).addcmul_(g, g, value=1 - C.b2)
            denominator = (exp_avg_sq.sqrt() * C.c2).add_(C.eps)
            updates.append((exp_avg / denominator * C.c1).flatten())
        rows.append(torch.cat(updates))
    return rows


def published_search(b: Buffers, n: int = 1) -> Tensor:
    u = torch.stack(published_updates(b, n))
    return torch.mm(u, u.T)


def published_apply(b: Buffers, n: int = 1) -> None:
    grads, ms, vs, thetas = b.pieces(n)
    a = b.weights.tolist()
    for k, (theta, m, v) in enumerate(zip(thetas, ms, vs, strict=True)):
        for i, a_i in enumerate(a):
            g = grads[i][k]
            exp_avg = m.clone().mul_(C.b1).add_(g, alpha=1 - C.b1)
            exp_avg_sq = v.clone().mul_(C.b2).addcmul_(g, g, value=1 - C.b2)
            denominator = (exp_avg_sq.sqrt() * C.c2).add_(C.eps)
            theta.add_(exp_avg / denominator, alpha=-LR * C.c1 * a_i)
        g = sum(a_i * grads[i][k] for i, a_i in enumerate(a))
        m.mul_(C.b1).add_(g, alpha=1 - C.b1)
        v.mul_(C.b2).addcmul_(g, g, value=1 - C.b2)


def fused_adam(b: Buffers) -> torch.optim.Adam:
    """torch's optimizer on the buffers' own memory, task 0's gradient."""
    p = torch.nn.Parameter(b.theta)
    p.grad = b.grads[0]
    optimizer = torch.optim.Adam([p], lr=LR, fused=True)
    optimizer.state[p] = {"step": torch.tensor(7.0), "exp_avg": b.m, "exp_avg_sq": b.v}
    return optimizer


def check_gram(gram: Tensor, b: Buffers, rtol: float) -> None:
    old = {"exp_avg": b.m.double(), "exp_avg_sq": b.v.double()}
    u = torch.stack([reference.advance(RULE, STEP, g.double(), old)[0] for g in b.grads])
    expected = u @ u.T
    if gram.dim() == 1:  # the pairs i <= j
        expected = expected[tuple(torch.triu_indices(*expected.shape))]
    scale = expected.abs().max()
    assert (gram.double() - expected).abs().max() <= rtol * scale


def check_step(b: Buffers, before: Buffers) -> None:
    old = {"exp_avg": before.m.double(), "exp_avg_sq": before.v.double()}
    joint = sum(
        a * reference.advance(RULE, STEP, g.double(), old)[0]
        for a, g in zip(before.weights.tolist(), before.grads, strict=True)
    )
    new = reference.advance(RULE, STEP, before.weights @ before.grads.double(), old)[1]
    torch.testing.assert_close(
        b.theta.double(), before.theta.double() - LR * joint, rtol=0, atol=3e-6
    )
    torch.testing.assert_close(b.m.double(), new["exp_avg"], rtol=0, atol=1e-5)
    torch.testing.assert_close(b.v.double(), new["exp_avg_sq"], rtol=1e-5, atol=0)


def report(
    benchmark, times: Times, bandwidth: Bandwidth, *, n_bytes: float, against: str, **info: object
) -> None:
    """What the run says about contestant "ours", whose floor is `n_bytes`."""
    rates = bandwidth.gigabytes_per_second(times)
    speed = 1e-9 * n_bytes / times.best("ours")
    benchmark.extra_info.update(
        info,
        threads=torch.get_num_threads(),
        ours_ms=1e3 * times.best("ours"),
        **{"ours_GB/s": speed, **rates},
        bandwidth=against,
        fraction_of_bandwidth=bandwidth.fraction(times, n_bytes, against),
        best_over_best_bandwidth=speed / rates[f"{against}_GB/s"],
    )
    for name in times.seconds:
        if name in ("eager", "compile", "published", "published_20", "fused_adam"):
            benchmark.extra_info[f"{name}_ms"] = 1e3 * times.best(name)
            benchmark.extra_info[f"speedup_vs_{name}"] = times.best(name) / times.best("ours")
            benchmark.extra_info[f"median_speedup_vs_{name}"] = times.ratio(name, "ours")


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("n_tasks", TASKS)
def test_search(benchmark, n_tasks: int, numel: int) -> None:
    sets = make_sets(n_tasks, numel)
    torch.compiler.reset()
    compiled = torch.compile(gram_maths, dynamic=False)
    check_gram(ours_search(sets[0]), sets[0], 1e-6)
    check_gram(eager_search(sets[0]), sets[0], 1e-3)
    check_gram(published_search(sets[0]), sets[0], 1e-3)
    check_gram(published_search(sets[0], 20), sets[0], 1e-3)
    check_gram(compiled(sets[0].grads, sets[0].m, sets[0].v), sets[0], 1e-3)
    bandwidth = Bandwidth([(b.theta, b.out) for b in sets])
    contestants: dict[str, Contestant] = {
        "ours": lambda i: ours_search(sets[i]),
        "eager": lambda i: eager_search(sets[i]),
        "compile": lambda i: compiled(sets[i].grads, sets[i].m, sets[i].v),
        "published": lambda i: published_search(sets[i]),
        "published_20": lambda i: published_search(sets[i], 20),
        **bandwidth.contestants(),
    }
    times = take_turns(contestants, len(sets))
    n_bytes = 4.0 * (n_tasks + 2) * numel
    report(
        benchmark, times, bandwidth, n_bytes=n_bytes, against="read", n_tasks=n_tasks, numel=numel
    )
    benchmark.pedantic(ours_search, args=(sets[0],), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("n_tasks", TASKS)
def test_apply(benchmark, n_tasks: int, numel: int) -> None:
    sets = make_sets(n_tasks, numel)
    torch.compiler.reset()
    compiled = torch.compile(step_maths, dynamic=False)

    def compiled_apply(b: Buffers) -> None:
        compiled(b.grads, b.m, b.v, b.theta, b.weights.float())

    for contestant in (ours_apply, ours_delayed, eager_apply, compiled_apply, published_apply):
        moved = sets[0].copy()
        contestant(moved)
        check_step(moved, sets[0])
    optimizers = [fused_adam(b) for b in sets]
    bandwidth = Bandwidth([(b.theta, b.out) for b in sets])
    contestants: dict[str, Contestant] = {
        "ours": lambda i: ours_apply(sets[i]),
        "search": lambda i: ours_search(sets[i]),
        "delayed": lambda i: ours_delayed(sets[i]),
        "eager": lambda i: eager_apply(sets[i]),
        "compile": lambda i: compiled_apply(sets[i]),
        "published": lambda i: published_apply(sets[i]),
        "published_20": lambda i: published_apply(sets[i], 20),
        "fused_adam": lambda i: optimizers[i].step(),
        **bandwidth.contestants(),
    }
    times = take_turns(contestants, len(sets))
    n_bytes = 4.0 * (n_tasks + 6) * numel
    both = times.best("ours") + times.best("search")
    report(
        benchmark,
        times,
        bandwidth,
        n_bytes=n_bytes,
        against="update",
        n_tasks=n_tasks,
        numel=numel,
        search_ms=1e3 * times.best("search"),
        delayed_ms=1e3 * times.best("delayed"),
        search_and_apply_over_fused_adam=both / times.best("fused_adam"),
        delayed_over_fused_adam=times.best("delayed") / times.best("fused_adam"),
    )
    benchmark.pedantic(ours_apply, args=(sets[0],), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("n_tasks", TASKS)
def test_combine(benchmark, n_tasks: int) -> None:
    numel = SIZES[-1]
    sets = make_sets(n_tasks, numel)

    def combine(b: Buffers) -> None:
        CPU.combine(b.grads, b.weights, b.out)

    def eager(b: Buffers) -> None:
        torch.mv(b.grads.T, b.weights.float(), out=b.out)

    for contestant in (combine, eager):
        contestant(sets[0])
        expected = sets[0].weights @ sets[0].grads.double()
        torch.testing.assert_close(sets[0].out.double(), expected, rtol=0, atol=1e-4)
    bandwidth = Bandwidth([(b.theta, b.out) for b in sets])
    contestants: dict[str, Contestant] = {
        "ours": lambda i: combine(sets[i]),
        "eager": lambda i: eager(sets[i]),
        **bandwidth.contestants(),
    }
    times = take_turns(contestants, len(sets))
    n_bytes = 4.0 * (n_tasks + 1) * numel
    report(
        benchmark, times, bandwidth, n_bytes=n_bytes, against="update", n_tasks=n_tasks, numel=numel
    )
    benchmark.pedantic(combine, args=(sets[0],), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("n_tasks", [*TASKS, 32])
def test_gram(benchmark, n_tasks: int) -> None:
    numel = SIZES[-1] if n_tasks <= 8 else SIZES[0]
    sets = make_sets(n_tasks, numel)

    def gram(b: Buffers) -> Tensor:
        CPU.gram(b.grads, b.gram)
        return b.gram

    def eager(b: Buffers) -> Tensor:
        return b.grads @ b.grads.T

    expected = sets[0].grads.double() @ sets[0].grads.double().T
    for contestant, rtol in ((gram, 1e-8), (eager, 1e-3)):
        error = (contestant(sets[0]).double() - expected).abs().max()
        assert error <= rtol * expected.abs().max()
    bandwidth = Bandwidth([(b.theta, b.out) for b in sets])
    contestants: dict[str, Contestant] = {
        "ours": lambda i: gram(sets[i]),
        "eager": lambda i: eager(sets[i]),
        **bandwidth.contestants(),
    }
    times = take_turns(contestants, len(sets))
    n_bytes = 4.0 * n_tasks * numel
    report(
        benchmark, times, bandwidth, n_bytes=n_bytes, against="read", n_tasks=n_tasks, numel=numel
    )
    benchmark.pedantic(gram, args=(sets[0],), rounds=5, warmup_rounds=1)


ROWS = 8


@pytest.mark.parametrize("direction", ["given", "gaussian", "rademacher"])
def test_perturb(benchmark, direction: str) -> None:
    numel = SIZES[-1]
    params, given = torch.randn(numel), torch.randn(numel)
    scale = torch.linspace(1e-3, 1e-2, ROWS, dtype=torch.float64)
    rows = [torch.full((ROWS, numel), torch.nan) for _ in range(n_sets(4 * ROWS * numel))]

    def ours(out: Tensor) -> None:
        if direction == "given":
            CPU.perturb(params, out, scale=scale, direction=given)
        else:
            CPU.perturb(params, out, scale=scale, seed=1, distribution=direction)

    def by_torch(out: Tensor) -> None:
        for row, factor in zip(out, scale.tolist(), strict=True):
            if direction == "given":
                u = given
            elif direction == "gaussian":
                u = torch.randn(numel)
            else:
                u = torch.empty(numel).bernoulli_().mul_(2).sub_(1)
            torch.add(params, u, alpha=factor, out=row)

    ours(rows[0])
    u = given
    if direction != "given":
        u = torch.from_numpy(philox.DISTRIBUTIONS[direction](1, ROWS - 1, numel))
    assert torch.equal(rows[0][-1], params + scale[-1].float() * u)
    by_torch(rows[1])
    assert rows[1].isfinite().all()

    bandwidth = Bandwidth([(out[0], out[1]) for out in rows])
    name = "torch_add" if direction == "given" else "randn_add"
    contestants: dict[str, Contestant] = {
        "ours": lambda i: ours(rows[i]),
        name: lambda i: by_torch(rows[i]),
        "fill": lambda i: rows[i].fill_(1.0),
        **bandwidth.contestants(),
    }
    times = take_turns(contestants, len(rows))
    written, moved = 4.0 * ROWS * numel, 4.0 * (ROWS + 1 + (direction == "given")) * numel
    report(benchmark, times, bandwidth, n_bytes=moved, against="update", n_rows=ROWS, numel=numel)
    benchmark.extra_info.update(
        {
            "written_GB/s": 1e-9 * written / times.best("ours"),
            "fill_GB/s": 1e-9 * written / times.best("fill"),
            "speed_over_fill": times.ratio("fill", "ours"),
            f"{name}_ms": 1e3 * times.best(name),
            f"median_speedup_vs_{name}": times.ratio(name, "ours"),
        }
    )
    benchmark.pedantic(ours, args=(rows[0],), rounds=5, warmup_rounds=1)


def test_small_apply(benchmark) -> None:
    """One head: the price of a call. Microseconds, the last cache does not matter."""
    b = Buffers(1, 1000)
    for contestant in (ours_apply, op_apply):
        moved = b.copy()
        contestant(moved)
        check_step(moved, b)
    optimizer = fused_adam(b.copy())
    times = take_turns(
        {
            "ours": lambda _: ours_apply(b),
            "op": lambda _: op_apply(b),
            "fused_adam": lambda _: optimizer.step(),
        },
        1,
    )
    ours = times.best("ours")
    assert math.isfinite(ours)
    benchmark.extra_info.update(
        numel=1000,
        ours_us=1e6 * ours,
        op_us=1e6 * times.best("op"),
        speedup_vs_fused_adam=times.best("fused_adam") / ours,
    )
    benchmark.pedantic(ours_apply, args=(b,), rounds=100, iterations=10)

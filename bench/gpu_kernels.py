"""Every pass over the flat buffers: checked against the float64 reference, then timed.

A row of the results is one pass at one T, P and dtype, see `measure`. The contestants:

    ours        the operator of `fastmto.ops`
    eager       the same maths in plain torch (gpu_maths.py)
    compile     torch.compile of it
    fused_adam  torch.optim.Adam(fused=True) on one gradient, beside the plain apply pass
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gpu_maths
import torch
from gpu_floors import floor_bytes
from gpu_maths import CLIPPY, LR, RULE, SEGMENTS, STEP, as_view
from gpu_timer import FAILURES, Contestant, CpuTimer, Row, in_a_line
from torch import Tensor

from fastmto import ops
from fastmto.ops import philox
from fastmto.reference import updates as reference

LAMBDAS = (CLIPPY.lambda_rel, CLIPPY.lambda_abs)
SEED = 1
#: Coordinates of random directions that are compared bit for bit with `fastmto.ops.philox`.
DRAWN = 1 << 14
#: What rounding may do to a sum, over the sum of its terms' sizes: ours, and plain torch's Gram,
#: whose float32 sums run over all of P.
EXACT, LOOSE = 1e-6, 1e-2

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Wrong(Exception):
    """A contestant's result is not that of the reference."""


@dataclass(frozen=True)
class Case:
    """A pass at T = n_tasks (rows R of a perturbation), P = numel."""

    name: str
    n_tasks: int
    numel: int
    dtype: str = "float32"

    @property
    def base(self) -> str:
        """The operator."""
        return self.name.split("_")[0]

    @property
    def per_task(self) -> bool:
        return self.name.endswith("_adatask")

    @property
    def floor_bytes(self) -> int:
        element = torch.finfo(DTYPES[self.dtype]).bits // 8
        return floor_bytes(self.name, self.n_tasks, self.numel, element)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} T={self.n_tasks} P={self.numel:.0e}"


class Buffers:
    """One set of what a pass works on; the big ones only where the pass touches them."""

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        n_tasks, numel, dtype = case.n_tasks, case.numel, DTYPES[case.dtype]

        def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

        def nan(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.full(shape, torch.nan, device=device, dtype=dtype)

        rows = [RULE.numbers(STEP, LR)] * (n_tasks if case.per_task else 1)
        self.numbers = torch.tensor(rows, dtype=torch.float64, device=device)
        self.weights = torch.linspace(0.5, 1.5, n_tasks, dtype=torch.float64, device=device)
        self.a = self.weights.float()
        self.gram = nan(n_tasks, n_tasks)
        self.sigma = nan(n_tasks, SEGMENTS)
        if case.name == "apply_clippy":  # there it is an input
            self.sigma.uniform_(0.1, 1.0, generator=generator)
        self.factors = self.sigma.float()
        self.segments = torch.arange(SEGMENTS + 1, device=device) * (numel // SEGMENTS)
        self.found = torch.zeros(1, dtype=torch.int32, device=device)
        self.big: dict[str, Tensor] = {}
        if case.base == "perturb":
            self.scale = torch.linspace(1e-3, 1e-2, n_tasks, dtype=torch.float64, device=device)
            self.scale32 = self.scale.float()
            self.big["params"] = normal(numel)
            self.big["out"] = nan(n_tasks, numel, dtype=torch.float32)
            if case.name == "perturb_given":
                self.big["direction"] = normal(numel)
            return
        self.big["grads"] = normal(n_tasks, numel, dtype=dtype)
        if case.base in ("search", "apply", "delayed"):
            shape = (n_tasks, numel) if case.per_task else (numel,)
            self.big["m"] = normal(*shape).mul_(0.1)
            v = torch.empty(shape, device=device)
            self.big["v"] = v.uniform_(0.5, 1.5, generator=generator)
            if case.name not in ("search", "search_adatask"):
                self.big["params"] = normal(numel, dtype=dtype)
        if case.name == "combine":
            self.big["out"] = nan(numel, dtype=torch.float32)

    def tensor(self, name: str) -> Tensor:
        """By name, the big ones as `gpu_maths` takes them."""
        return as_view(self.big[name]) if name in self.big else getattr(self, name)

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in self.big.values())


def set_bytes(case: Case) -> int:
    """Bytes of the big tensors of `Buffers`."""
    element = torch.finfo(DTYPES[case.dtype]).bits // 8
    n_tasks = case.n_tasks
    if case.base == "perturb":
        return 4 * case.numel * (n_tasks + 1 + (case.name == "perturb_given"))
    n_bytes = element * n_tasks
    if case.base in ("search", "apply", "delayed"):
        n_bytes += 8 * (n_tasks if case.per_task else 1)
        n_bytes += element * (case.name not in ("search", "search_adatask"))
    return case.numel * (n_bytes + 4 * (case.name == "combine"))


def ours(case: Case, b: Buffers) -> None:
    """The operator under test, as the optimizers call it."""
    big, kind = b.big, RULE.kind
    clippy = case.name.endswith("_clippy")
    if case.base == "search":
        extra = (
            {"clippy": LAMBDAS, "params": big["params"], "segments": b.segments, "sigma": b.sigma}
            if clippy
            else {}
        )
        ops.update_gram(kind, b.numbers, big["grads"], [big["m"], big["v"]], b.gram, **extra)
    elif case.base == "apply":
        extra = {"segments": b.segments, "sigma": b.sigma} if clippy else {}
        ops.apply(
            kind, b.numbers, big["grads"], [big["m"], big["v"]], big["params"], b.weights,
            skip=b.found, **extra,
        )  # fmt: skip
    elif case.base == "delayed":
        extra = {"clippy": LAMBDAS, "segments": b.segments, "sigma": b.sigma} if clippy else {}
        ops.apply_and_gram(
            kind, b.numbers, big["grads"], [big["m"], big["v"]], big["params"], b.weights, b.gram,
            skip=b.found, **extra,
        )  # fmt: skip
    elif case.base == "combine":
        ops.combine(big["grads"], b.weights, big["out"])
    elif case.base == "gram":
        ops.gram(big["grads"], b.gram)
    elif case.base == "check":
        ops.check(big["grads"], b.found)
    elif case.name == "perturb_given":
        ops.perturb(big["params"], big["out"], scale=b.scale, direction=big["direction"])
    else:
        distribution = case.name.removeprefix("perturb_")
        ops.perturb(big["params"], big["out"], scale=b.scale, seed=SEED, distribution=distribution)


def fused_adam(b: Buffers) -> Callable[[], object]:
    """A step of torch's optimizer on the buffers' own memory, task 0's gradient."""
    params = torch.nn.Parameter(b.big["params"])
    params.grad = b.big["grads"][0]
    on_gpu = params.is_cuda
    optimizer = torch.optim.Adam([params], lr=LR, fused=True, capturable=on_gpu)
    optimizer.state[params] = {
        "step": torch.tensor(float(STEP), device=params.device),
        "exp_avg": b.big["m"],
        "exp_avg_sq": b.big["v"],
    }
    return optimizer.step


def _demand(what: str, error: Tensor | float, bound: Tensor | float) -> None:
    """NaN errors are wrong too."""
    if not float(error) <= float(bound):
        raise Wrong(f"{what}: off by {float(error):.3g}, allowed {float(bound):.3g}")


def _largest(x: Tensor) -> Tensor:
    return x.abs().max()


@dataclass
class Expected:
    """The float64 reference of one pass, tensor by tensor of the P coordinates.

    Args:
        case, b: what is run.
        before: the buffers that it overwrites, as they were.
    """

    case: Case
    b: Buffers
    before: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.case.base in ("apply", "delayed"):
            self.before = {k: self.b.big[k].clone() for k in ("m", "v", "params")}

    def restore(self) -> None:
        """The buffers as before, outputs poisoned."""
        for name, tensor in self.before.items():
            self.b.big[name].copy_(tensor)
        self.b.gram.fill_(torch.nan)
        if self.case.name != "apply_clippy":
            self.b.sigma.fill_(torch.nan)
        if "out" in self.b.big:
            self.b.big["out"].fill_(torch.nan)

    def _old(self, name: str) -> Tensor:
        return self.before.get(name, self.b.big[name])

    def demand_updates(self, gram: Tensor | None, sigma: Tensor | None, bound: float) -> None:
        """Search, apply and delayed: whatever of their outputs is there.

        Args:
            gram: of the updates, or None.
            sigma: Clippy's factors found on the way, or None.
            bound: of the Gram's error, relative.
        """
        case, b, n_tasks = self.case, self.b, self.case.n_tasks
        clippy, a = case.name.endswith("_clippy"), b.weights
        total = torch.zeros(n_tasks, n_tasks, dtype=torch.float64, device=a.device)
        size = case.numel // SEGMENTS
        for s in range(SEGMENTS):
            at = slice(s * size, (s + 1) * size)
            g = b.big["grads"][:, at].double()
            old = {"exp_avg": self._old("m")[..., at], "exp_avg_sq": self._old("v")[..., at]}
            old = {name: x.double() for name, x in old.items()}
            u, new = reference.advance(RULE, STEP, g, old)
            if clippy:
                theta = self._old("params")[at].double()
                factors = self._factors(u, theta, s)
                if sigma is not None:
                    _demand("sigma", _largest(sigma[:, s].double() - factors), 1e-5)
                u = factors[:, None] * u
            total += u @ u.T
            if self.before:
                if not case.per_task:
                    new = reference.advance(RULE, STEP, a @ g, old)[1]
                self._demand_moved(at, a @ u, new, _largest(a @ g.abs()))
        if gram is not None:
            _demand("gram", _largest(gram.double() - total), bound * _largest(total))

    def _factors(self, u: Tensor, theta: Tensor, s: int) -> Tensor:
        if self.case.name == "apply_clippy":
            return self.b.sigma[:, s]
        factors = [reference.clippy_factor(CLIPPY, LR, theta, row) for row in u]
        return torch.tensor(factors, dtype=torch.float64, device=u.device)

    def _demand_moved(self, at: slice, joint: Tensor, new: reference.State, terms: Tensor) -> None:
        theta, b = self._old("params")[at].double() - LR * joint, self.b.big
        half_ulp = torch.finfo(b["params"].dtype).eps / 2
        _demand(
            "params",
            _largest(b["params"][at].double() - theta),
            half_ulp * 1.01 * _largest(theta) + EXACT,
        )
        _demand(
            "exp_avg",
            _largest(b["m"][..., at].double() - new["exp_avg"]),
            EXACT * (terms + 1),
        )
        _demand(
            "exp_avg_sq",
            _largest(b["v"][..., at].double() - new["exp_avg_sq"]),
            EXACT * (1e-3 * terms**2 + _largest(new["exp_avg_sq"])),
        )

    def demand_sum(self, out: Tensor) -> None:
        """combine."""
        size = self.case.numel // SEGMENTS
        for s in range(SEGMENTS):
            at = slice(s * size, (s + 1) * size)
            g, a = self.b.big["grads"][:, at].double(), self.b.weights
            _demand("out", _largest(out[at].double() - a @ g), EXACT * _largest(a @ g.abs()))

    def demand_gram(self, gram: Tensor, bound: float) -> None:
        """gram."""
        size = self.case.numel // SEGMENTS
        total = torch.zeros_like(gram, dtype=torch.float64)
        for s in range(SEGMENTS):
            g = self.b.big["grads"][:, s * size : (s + 1) * size].double()
            total += g @ g.T
        _demand("gram", _largest(gram.double() - total), bound * _largest(total))

    def demand_found(self, run: Callable[[], Tensor]) -> None:
        """check, which must also see the last element of the last row."""
        last = self.b.big["grads"][-1, -1:]
        kept = last.clone()
        _demand("found, all finite", run().sum(), 0)
        last.fill_(torch.nan)
        found = run().sum()
        last.copy_(kept)
        _demand("found, the last element NaN", 1 - found, 0)

    def demand_directions(self, out: Tensor, exact: bool) -> None:
        """perturb: the direction given, or `fastmto.ops.philox`'s bits where they are ours, and the
        mean and variance of every row."""
        b, numel = self.b, self.case.numel
        if self.case.name == "perturb_given":
            for row, factor in zip(out, b.scale32, strict=True):
                product = factor * b.big["direction"]  # rounded, then the sum is
                bound = 0.0 if exact else EXACT * 10
                _demand("out", _largest(row - (b.big["params"] + product)), bound)
            return
        distribution = self.case.name.removeprefix("perturb_")
        for r, (row, factor) in enumerate(zip(out, b.scale32, strict=True)):
            u = (row - b.big["params"]).div_(factor)
            spread = 8 * numel**-0.5
            _demand(f"mean of direction {r}", u.double().mean().abs(), spread + 1e-3)
            _demand(f"variance of direction {r}", (u.square().mean() - 1).abs(), 2 * spread + 1e-3)
            if exact:
                n = min(numel, DRAWN)
                drawn = philox.DISTRIBUTIONS[distribution](SEED, r, n)
                theta = b.big["params"][:n].cpu().numpy()
                expected = torch.from_numpy(theta + factor.item() * drawn).to(row)
                _demand(f"bits of direction {r}", (row[:n] != expected).sum(), 0)

    def demand(self, result: Any, exact: bool) -> None:
        """Refuses what a contestant made.

        Args:
            result: what it returned; ours writes into the buffers instead.
            exact: it is ours.

        Raises:
            Wrong: something is not as the reference says.
        """
        b, base, bound = self.b, self.case.base, EXACT if exact else LOOSE
        if base in ("search", "apply", "delayed"):
            gram, sigma = result if isinstance(result, tuple) else (result, None)
            if exact:
                gram = None if base == "apply" else b.gram
                sigma = b.sigma if self.case.name.endswith("_clippy") else None
            self.demand_updates(gram, sigma, bound)
        elif base == "combine":
            self.demand_sum(b.big["out"] if exact else result.flatten())
        elif base == "gram":
            self.demand_gram(b.gram if exact else result, bound)
        else:
            self.demand_directions(b.big["out"] if exact else result.flatten(1), exact)


def contestants(
    case: Case, sets: list[Buffers], compiled: Callable[..., object] | None
) -> dict[str, Contestant]:
    """By name; `compiled` is the compiled maths of the pass, or None to leave it out."""
    names = gpu_maths.MATHS[case.name][1]
    plain = gpu_maths.eager(case.name)

    def with_maths(maths: Callable[..., object]) -> Contestant:
        inputs = [[b.tensor(name) for name in names] for b in sets]
        if maths is compiled:
            from torch._dynamo import maybe_mark_dynamic

            for x in (x for one in inputs for x in one if x.dim() >= 3):
                maybe_mark_dynamic(x, x.dim() - 2)  # one compiled function for every P
        return lambda i: maths(*inputs[i])

    found: dict[str, Contestant] = {
        "ours": lambda i: ours(case, sets[i]),
        "eager": with_maths(plain),
    }
    if compiled is not None:
        found["compile"] = with_maths(compiled)
    if case.name == "apply" and case.dtype == "float32":
        steps = [fused_adam(b) for b in sets]
        found["fused_adam"] = lambda i: steps[i]()
    return found


def _check(name: str, contestant: Contestant, expected: Expected) -> None:
    expected.restore()
    if expected.case.base == "check":
        b = expected.b

        def run() -> Tensor:
            b.found.zero_()
            result: Any = contestant(0)
            return b.found if name == "ours" else result

        expected.demand_found(run)
        b.found.zero_()
    else:
        expected.demand(contestant(0), exact=name == "ours")
    expected.restore()


def needed_bytes(case: Case, sets: int) -> int:
    """Memory of the sets, of what is kept for the check and of its float64 copies."""
    one = set_bytes(case)
    if case.base == "perturb":
        return sets * one + 4 * 8 * case.numel
    grads = torch.finfo(DTYPES[case.dtype]).bits // 8 * case.n_tasks * case.numel
    kept = one - grads if case.base in ("apply", "delayed") else 0
    return sets * one + kept + 10 * 8 * case.n_tasks * case.numel // SEGMENTS


def measure(
    case: Case,
    timer: CpuTimer,
    *,
    bandwidth: dict[str, float],
    compiled: Callable[..., object] | None = None,
    late: bool = False,
) -> Row:
    """Check, then time, all contestants of a case.

    Args:
        case: what to run.
        timer: on the device.
        bandwidth: "copy_GB_per_s" and "write_GB_per_s" of the device.
        compiled: the maths as torch.compile made it, or None to leave it out.
        late: there is no time left, so that the case is skipped.

    Returns:
        A row: the case, `status` ("ok", or "skipped", "wrong", "failed" with a `note`), floor, time
        on the device, speed in bytes of the floor, its fraction of the bandwidths, ratios to the
        others ("eager_over_ours": how many times longer eager takes), time a call when Python
        issues it, and what a call allocates. A peer that is wrong, fails or has no memory is left
        out and named in `note`.
    """
    row: Row = {
        "pass": case.name,
        "dtype": case.dtype,
        "n_tasks": case.n_tasks,
        "numel": case.numel,
        "status": "ok",
        "note": "",
        "floor_MB": case.floor_bytes / 1e6,
        "floor_at_copy_us": case.floor_bytes / bandwidth["copy_GB_per_s"] / 1e3,
    }
    if late:
        row.update(status="skipped", note="no time left")
        return row
    n_sets = timer.n_sets(case.floor_bytes)
    free, needed = timer.free_bytes(), needed_bytes(case, n_sets)
    if free is not None and needed > free:
        row.update(
            status="skipped", note=f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
        )
        return row
    sets = [Buffers(case, timer.device, seed) for seed in range(n_sets)]
    expected = Expected(case, sets[0])
    notes = []
    field_of = contestants(case, sets, compiled)
    for name, contestant in field_of.items():
        try:
            if name != "fused_adam":
                _check(name, contestant, expected)
            if name == "ours":
                row["allocated_MB"] = _megabytes(timer.peak_bytes(functools.partial(contestant, 0)))
                row["issued_us"] = 1e6 * timer.issued(contestant, n_sets)
            row[f"{name}_us"] = 1e6 * timer.seconds(contestant, n_sets)
        except (Wrong, *FAILURES) as error:
            reason = in_a_line(error)
            if name == "ours":
                row.update(status="wrong" if isinstance(error, Wrong) else "failed", note=reason)
                return row
            notes.append(f"{name}: {reason}")
        timer.release()
    microseconds = row["ours_us"]
    speed = case.floor_bytes / microseconds / 1e3
    row["GB_per_s"] = speed
    row["fraction_of_copy"] = speed / bandwidth["copy_GB_per_s"]
    if case.base == "perturb":
        row["fraction_of_write"] = speed / bandwidth["write_GB_per_s"]
    for name in field_of:
        if name != "ours" and f"{name}_us" in row:
            row[f"{name}_over_ours"] = row[f"{name}_us"] / microseconds
    row["note"] = "; ".join(notes)
    return row


def _megabytes(n_bytes: int | None) -> float | None:
    return None if n_bytes is None else n_bytes / 1e6


def measure_bandwidth(timer: CpuTimer, numel: int) -> dict[str, float]:
    """What torch's own copy and fill reach: bytes read plus bytes written, and bytes written."""
    n_sets = timer.n_sets(8 * numel)
    pairs = [torch.randn(2, numel, device=timer.device) for _ in range(n_sets)]
    copied = timer.seconds(lambda i: pairs[i][0].copy_(pairs[i][1]), n_sets)
    written = timer.seconds(lambda i: pairs[i].fill_(1.0), n_sets)
    return {
        "numel": numel,
        "copy_GB_per_s": 8e-9 * numel / copied,
        "write_GB_per_s": 8e-9 * numel / written,
    }

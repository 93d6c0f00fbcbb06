"""The passes over the flat shared parameters and the small steps between them, as torch operators.

Every op is `torch.ops.fastmto.<name>`, the same signature on every device, and writes into the
caller's tensors only. The backend is chosen per call by torch's dispatcher from the tensors'
device: cpu.py (compiled kernels) or gpu.py (Triton, imported at the first call). Tests and benches
call these modules themselves. `torch.compile` takes the ops as they are; none returns anything.

Shapes and dtypes, the same for all ops; all tensors of a call lie on one device:

    kind            number of the rule's element formula, `Rule.kind`
    numbers (R, 11) float64, contiguous: rows of `fastmto.rules.Numbers`. R = 1 where the tasks
                    share the moments, R = T where every task keeps its own (AdaTask): a row that is
                    not active is a task that takes no part: its Gram row and column are 0, its
                    sigma 1, its moments keep still and its weight counts as 0
    grads   (T, P)  per-task gradients; float64, float32, bfloat16 or float16; every row
                    contiguous, rows may be padded apart; read only
    state           list of tensors in the order of `rule.state_names`; each (P,) contiguous, or
                    (T, P) with contiguous rows where R = T; float64 where grads are float64, else
                    float32. With T = R = 1 either shape
    params  (P,)    contiguous, the dtype of grads
    weights (T,)    float64; 0 leaves a task out of the sums
    gram    (T, T)  float64, contiguous; written whole, symmetric bit for bit
    sigma   (T, S)  float64, contiguous; Clippy's factors, one a task and tensor
    segments (S+1,) int64; tensor s owns coordinates segments[s] to segments[s+1],
                    segments[0] = 0, segments[S] = P, none before its predecessor
    clippy          (lambda_rel, lambda_abs) of `fastmto.rules.Clippy`, or None
    skip    (1,)    int32, or None: where it is not 0 the op writes nothing but gram and sigma
    found   (1,)    int32

The ops, with u_i the update that the rule makes of g_i with the old moments (rules.py):

    search      gram_ij = <u_i, u_j>; nothing else is written. With clippy (then params, segments
                and sigma are needed): sigma is written, and u_i stands for sigma_is u_i on every
                tensor s
    apply       params <- params - decay params - lr sum_i weights_i u_i, with sigma_is u_i for u_i
                where sigma (and segments) are given, then the moments take one step of the rule on
                g = sum_i weights_i g_i, or, where every task keeps its own, task i's on g_i alone.
                decay and lr are those of the first active row of numbers (sigma_is took lr of task
                i's own); where there is none nothing is written
    delayed     search and apply with the weights of an earlier search, in one pass (with clippy, in
                two, with the factors of this search)
    gram        gram_ij = <g_i, g_j>, of the gradients themselves; no rule, no state. gram_ii is NaN
                or infinite where row i holds a NaN, an infinity or an element whose square the
                maths cannot hold (from 2^64 in float32, 2^512 in float64); products that float32
                takes for 0 (both factors below about 1e-23) count as 0
    combine     out (P,) = sum_i weights_i g_i, in the dtype of grads. `out` may be one of the rows
                of grads, which is then overwritten by the sum; it may not overlap several
    check       found <- 1 if any element of grads is NaN, infinite or so large (2^63 where the
                maths is float32, 2^511 where it is float64) that moments of its square would be
                infinite for good; else found stays as it is. In a search such an element makes its
                task's gram_ii NaN or infinite
    clock       numbers_r <- the numbers of `hyper` (R, 7), rows of `fastmto.rules.Hyper`, at step
                counts_r + 1, where active_r, else zeros; found <- 0. counts (R,) int64, active
                (R,) int32. c1 and c2 are at least as exact as 1 - b^t formed in float64
    advance     where found is 0: counts_r += 1 where active_r, and tally[0] += 1; else tally[1] +=
                1. tally (2,) int64
    bargaining  weights (T,) <- the a > 0 with a_i (gram a)_i = preference_i (1 each for None), if
                and only if there is one; info (4,) float64 <- number of the status in
                `fastmto.solvers.STATUSES`, Newton steps, residual, kappa. T <= 64
    mgda        weights (T,) <- the point w of the simplex of least w' gram w, likewise; info
                likewise. T <= 64
    perturb     out_r = params + scale_r u_r for the R rows of out (R, P), contiguous each; params,
                out and direction are float32 or all float64, scale (R,) is float64. u_r is
                `direction` (P,) or its row r (R, P), or else direction number offset + r of `seed`,
                standard normal or +-1 by `distribution`, as philox.py says: made on the way
                and stored nowhere. Every backend, thread count and tiling gives the same bits:
                scale is rounded to the dtype of params, then one rounding for the product and one
                for the sum. out may be params where R = 1

The maths is float32 for float32, bfloat16 and float16 inputs, and float64 for float64. Gram sums
run in blocks in that precision and are combined in float64. All reductions have a fixed order:
the same inputs, memory alignment, device and thread count give the same bits.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

#: Device type -> module of this package. A new backend is a file, a row here and one in `_KEYS`.
BACKENDS = {"cpu": "cpu", "cuda": "triton.backend"}
#: Device type -> key of torch's dispatcher; AMD's GPUs go by the second too.
_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
#: Most tasks that `bargaining` and `mgda` take.
MAX_SOLVED_TASKS = 64

#: Ops that keep scratch memory from call to call, which must not come from the pool of a CUDA graph
#: that torch.compile makes.
SCRATCH = ("search", "delayed", "gram")

_library: Any = torch.library.Library("fastmto", "DEF")  # type: ignore[no-untyped-call]


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", __name__)


def backend(device: torch.device) -> ModuleType:
    """The module that serves tensors on `device`.

    Raises:
        ValueError: no backend for this type of device.
        ImportError: the backend needs Triton, which is not installed.
    """
    if device.type not in BACKENDS:
        raise ValueError(f"device must be one of {', '.join(BACKENDS)}, got {device}")
    return _module(BACKENDS[device.type])


def _define(schema: str, adapt: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> Any:
    """Register an op with all its backends; returns it.

    `adapt` makes the backends' keywords of the operator's.
    """
    name = schema[: schema.index("(")]
    tags = [torch.Tag.needs_exact_strides]
    if name in SCRATCH and hasattr(torch.Tag, "cudagraph_unsafe"):
        tags.append(torch.Tag.cudagraph_unsafe)
    _library.define(f"{schema} -> ()", tags=tuple(tags))
    for device, module in BACKENDS.items():

        def call(*args: Any, _module_name: str = module, **options: Any) -> None:
            options = options if adapt is None else adapt(options)
            getattr(_module(_module_name), name)(*args, **options)

        _library.impl(name, call, _KEYS[device])
    torch.library.register_fake(f"fastmto::{name}", lambda *args, **options: None, lib=_library)
    return getattr(torch.ops.fastmto, name).default


search = _define(
    "search(int kind, Tensor numbers, Tensor grads, Tensor[] state, Tensor(a!) gram, *, "
    "float[]? clippy=None, Tensor? params=None, Tensor? segments=None, Tensor(b!)? sigma=None)"
)
apply = _define(
    "apply(int kind, Tensor numbers, Tensor grads, Tensor(a!)[] state, Tensor(b!) params, "
    "Tensor weights, *, Tensor? segments=None, Tensor? sigma=None, Tensor? skip=None)"
)
delayed = _define(
    "delayed(int kind, Tensor numbers, Tensor grads, Tensor(a!)[] state, Tensor(b!) params, "
    "Tensor weights, Tensor(c!) gram, *, float[]? clippy=None, Tensor? segments=None, "
    "Tensor(d!)? sigma=None, Tensor? skip=None)"
)
gram = _define("gram(Tensor grads, Tensor(a!) gram)")
combine = _define("combine(Tensor grads, Tensor weights, Tensor(a!) out)")
check = _define("check(Tensor grads, Tensor(a!) found)")
clock = _define(
    "clock(Tensor hyper, Tensor counts, Tensor active, Tensor(a!) numbers, Tensor(b!) found)"
)
advance = _define("advance(Tensor(a!) counts, Tensor active, Tensor found, Tensor(b!) tally)")
bargaining = _define(
    "bargaining(Tensor gram, Tensor(a!) weights, Tensor(b!) info, *, Tensor? preference=None, "
    "float tol=1e-13, float ridge=0.0)"
)
mgda = _define("mgda(Tensor gram, Tensor(a!) weights, Tensor(b!) info)")


def _unsigned(options: dict[str, Any]) -> dict[str, Any]:
    naturals = {k: v % (1 << 64) for k, v in options.items() if k in ("seed", "offset") and v}
    return {**options, **naturals}


_perturb = _define(
    "perturb(Tensor params, Tensor(a!) out, *, Tensor scale, Tensor? direction=None, "
    "int? seed=None, int offset=0, str distribution='gaussian')",
    adapt=_unsigned,
)


def perturb(
    params: Tensor,
    out: Tensor,
    *,
    scale: Tensor,
    direction: Tensor | None = None,
    seed: int | None = None,
    offset: int = 0,
    distribution: str = "gaussian",
) -> None:
    """The op `perturb`; seed and offset are natural numbers below 2^64, which an operator's
    integers of 64 bits with a sign cannot say."""
    _perturb(
        params,
        out,
        scale=scale,
        direction=direction,
        seed=None if seed is None else _signed("seed", seed),
        offset=_signed("offset", offset),
        distribution=distribution,
    )


def _signed(name: str, value: int) -> int:
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{name} must be an integer from 0 to 2^64 - 1, got {value}")
    return value - (1 << 64) if value >> 63 else value

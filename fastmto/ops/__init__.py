"""The passes over the flat shared parameters and the small steps between them, as torch operators.

This file is the contract: every op once, as a signature and what it means. An op is
`torch.ops.fastmto.<name>`, the same on every device, and writes into the caller's tensors only; it
returns nothing. torch's dispatcher chooses the backend per call by the tensors' device: cpu.py
(compiled kernels) or triton/backend.py (imported at the first call), which have a function of the
same name and arguments for each. Tests and benches call these modules themselves. `torch.compile`
takes the ops as they are. plan.py has the same passes on the CPU without checks at every call.

Shapes and dtypes, the same for all ops; all tensors of a call lie on one device:

    kind            number of the rule's element formula, `Rule.kind`
    numbers (R, 11) float64, contiguous: rows of `fastmto.optim.rules.Numbers`. R = 1 where the
                    tasks share the moments, R = T where every task keeps its own (AdaTask): a row
                    that is not active is a task that takes no part: its Gram row and column are 0,
                    its sigma 1, its moments are unchanged and its weight counts as 0
    grads   (T, P)  per-task gradients; float64, float32, bfloat16 or float16; every row
                    contiguous, rows may be padded apart; read only
    state           list of tensors in the order of `rule.state_names`; each (P,) contiguous, or
                    (T, P) with contiguous rows where R = T; float64 where grads are float64, else
                    float32. With T = R = 1 either shape
    params  (P,)    contiguous, the dtype of grads
    weights (T,)    float64; 0 leaves a task out of the sums
    gram    (T, T)  float64, contiguous; written whole, symmetric bit for bit
    sigma   (T, S)  float64, contiguous; Clippy's factors, one per task and tensor
    segments (S+1,) int64; tensor s owns coordinates segments[s] to segments[s+1],
                    segments[0] = 0, segments[S] = P, none before its predecessor
    clippy          (lambda_rel, lambda_abs) of `fastmto.optim.rules.Clippy`, or None
    skip    (1,)    int32, or None: where it is not 0 the op writes nothing but gram and sigma
    found   (1,)    int32

u_i is the update that the rule makes of g_i with the old moments (optim/rules.py).

The maths is float32 for float32, bfloat16 and float16 inputs, and float64 for float64. Gram sums
run in blocks in that precision and are combined in float64. All reductions have a fixed order:
the same inputs, memory alignment, device and thread count give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .registration import BACKENDS, OPS, backend, op

__all__ = [
    "BACKENDS",
    "MAX_SOLVED_TASKS",
    "OPS",
    "apply",
    "apply_and_gram",
    "backend",
    "bargaining",
    "check",
    "combine",
    "count_step",
    "gram",
    "mgda",
    "perturb",
    "step_constants",
    "update_gram",
]

#: Most tasks that `bargaining` and `mgda` take.
MAX_SOLVED_TASKS = 64


@op("gram", "sigma", scratch=True)
def update_gram(
    kind: int,
    numbers: Tensor,
    grads: Tensor,
    state: Sequence[Tensor],
    gram: Tensor,
    *,
    clippy: Sequence[float] | None = None,
    params: Tensor | None = None,
    segments: Tensor | None = None,
    sigma: Tensor | None = None,
) -> None:
    """gram_ij = <u_i, u_j>; nothing else is written.

    With clippy (then params, segments and sigma are needed): sigma is written, and u_i stands for
    sigma_is u_i on every tensor s.
    """


@op("state", "params")
def apply(
    kind: int,
    numbers: Tensor,
    grads: Tensor,
    state: Sequence[Tensor],
    params: Tensor,
    weights: Tensor,
    *,
    segments: Tensor | None = None,
    sigma: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """params <- params - decay params - lr sum_i weights_i u_i, with sigma_is u_i for u_i where
    sigma (and segments) are given.

    Then the moments take one step of the rule on g = sum_i weights_i g_i, or, where every task
    keeps its own, task i's on g_i alone. decay and lr are those of the first active row of numbers
    (sigma_is took lr of task i's own); where there is none nothing is written.
    """


@op("state", "params", "gram", "sigma", scratch=True)
def apply_and_gram(
    kind: int,
    numbers: Tensor,
    grads: Tensor,
    state: Sequence[Tensor],
    params: Tensor,
    weights: Tensor,
    gram: Tensor,
    *,
    clippy: Sequence[float] | None = None,
    segments: Tensor | None = None,
    sigma: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """`update_gram`, and `apply` with the weights of an earlier one, in one pass; with clippy in
    two, with the factors of this Gram."""


@op("gram", scratch=True)
def gram(grads: Tensor, gram: Tensor) -> None:
    """gram_ij = <g_i, g_j>, of the gradients themselves; no rule, no state.

    gram_ii is NaN or infinite where row i holds a NaN, an infinity or an element whose square the
    maths cannot hold (from 2^64 in float32, 2^512 in float64); products that float32 takes for 0
    (both factors below about 1e-23) count as 0.
    """


@op("out")
def combine(grads: Tensor, weights: Tensor, out: Tensor) -> None:
    """out (P,) = sum_i weights_i g_i, in the dtype of grads.

    `out` may be one of the rows of grads, which is then overwritten by the sum; it may not overlap
    several.
    """


@op("found")
def check(grads: Tensor, found: Tensor) -> None:
    """found <- 1 if any element of grads is NaN, infinite or so large (2^63 where the maths is
    float32, 2^511 where it is float64) that moments of its square would be infinite for good; else
    found is unchanged.

    In `update_gram` such an element makes its task's gram_ii NaN or infinite.
    """


@op("numbers", "found")
def step_constants(
    hyper: Tensor, counts: Tensor, active: Tensor, numbers: Tensor, found: Tensor
) -> None:
    """numbers_r <- the numbers of `hyper` (R, 7), rows of `fastmto.optim.rules.Hyper`, at step
    counts_r + 1, where active_r, else zeros; found <- 0.

    counts (R,) int64, active (R,) int32. c1 and c2 are at least as exact as 1 - b^t formed in
    float64.
    """


@op("counts", "tally")
def count_step(counts: Tensor, active: Tensor, found: Tensor, tally: Tensor) -> None:
    """Where found is 0: counts_r += 1 where active_r, and tally[0] += 1; else tally[1] += 1.

    tally (2,) int64.
    """


@op("weights", "info")
def bargaining(
    gram: Tensor,
    weights: Tensor,
    info: Tensor,
    *,
    preference: Tensor | None = None,
    tol: float = 1e-13,
    ridge: float = 0.0,
) -> None:
    """weights (T,) <- the a > 0 with a_i (gram a)_i = preference_i (1 each for None), if and only
    if there is one; info (4,) float64 <- number of the status in `fastmto.solvers.STATUSES`, Newton
    steps, residual, kappa. T <= 64."""


@op("weights", "info")
def mgda(gram: Tensor, weights: Tensor, info: Tensor) -> None:
    """weights (T,) <- the point w of the simplex of least w' gram w, if it is found; info as for
    `bargaining`. T <= 64."""


@op("out", unsigned=("seed", "offset"))
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
    """out_r = params + scale_r u_r for the R rows of out (R, P), contiguous each.

    params, out and direction are all float32 or all float64, scale (R,) is float64. u_r is
    `direction` (P,) or its row r (R, P), or else direction number offset + r of `seed`, standard
    normal or +-1 by `distribution`, as philox.py says: made on the way and stored nowhere. seed
    and offset are natural numbers below 2^64.

    Every backend, thread count and tiling gives the same bits: scale is rounded to the dtype of
    params, then one rounding for the product and one for the sum. out may be params where R = 1.
    """

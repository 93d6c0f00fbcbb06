"""Apply: move the parameters by the weighted updates, then the moments, as one Triton launch.

    params <- (1 - lr weight_decay) params - lr sum_i a_i u_i
    moments <- the rule's step on g = sum_i a_i g_i

with u_i the rule's update of g_i with the old moments, formed again instead of being stored.
A task of weight 0 takes no part, and its gradient is not read.

Floor: (T + 1 + N) P elements read and (1 + N) P written for N state tensors; with Adam and
float32 that is 4 (T+6) P bytes. Loads and stores are 16 bytes wide when P and the row stride are
multiples of 16 and the buffers are 16-byte aligned.
"""

# Triton's language is not Python's: kernels carry no types mypy knows.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..rules import Rule
from .triton_launch import Tiling, launch, programs_for, working_type
from .triton_rules import advance, coefficients, load_state, numbers, store_state

#: Up to this many tasks the loop over them is unrolled whole.
MAX_UNROLLED_T = 8


@triton.jit
def move(theta, s0, s1, s2, offsets, mask, joint, g, state, c, lr, keep, KIND, DTYPE):
    """Write parameters and state, given joint = sum_i a_i u_i and g = sum_i a_i g_i."""
    old = tl.load(theta + offsets, mask=mask, other=0.0).to(DTYPE)
    new_theta = tl.full((), keep, DTYPE) * old - tl.full((), lr, DTYPE) * joint
    tl.store(theta + offsets, new_theta.to(theta.dtype.element_ty), mask=mask)
    _u, new = advance(g, state, c, KIND)
    store_state(s0, s1, s2, offsets, mask, new, KIND)


@triton.jit
def add_task(grads, weights, i, offsets, P, stride, joint, g, state, c, KIND, DTYPE):
    """joint + a_i u_i and g + a_i g_i; without weight a task counts as having no coordinates."""
    a_i = tl.load(weights + i).to(DTYPE)
    end = tl.where(a_i != 0, P, 0)
    g_i = tl.load(grads + i * stride + offsets, mask=offsets < end, other=0.0).to(DTYPE)
    u_i, _new = advance(g_i, state, c, KIND)
    return joint + a_i * u_i, g + a_i * g_i


@triton.jit
def apply_kernel(
    grads,  # (T, P), rows `stride` apart
    s0,
    s1,
    s2,  # (P,) each, None where the rule has fewer
    theta,  # (P,) parameters
    weights,  # (T,) float64
    P: tl.int64,
    stride: tl.int64,
    b1: tl.float64,
    d1: tl.float64,
    b2: tl.float64,
    d2: tl.float64,
    c1: tl.float64,
    c2: tl.float64,
    eps: tl.float64,
    mu: tl.float64,
    lr: tl.float64,
    keep: tl.float64,
    KIND: tl.constexpr,
    T: tl.constexpr,
    UNROLL: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    c = numbers(b1, d1, b2, d2, c1, c2, eps, mu, DTYPE)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < P
    state = load_state(s0, s1, s2, offsets, mask, KIND)
    joint = tl.zeros((BLOCK,), DTYPE)
    g = tl.zeros((BLOCK,), DTYPE)
    if UNROLL:
        for i in tl.static_range(T):
            joint, g = add_task(
                grads, weights, i, offsets, P, stride, joint, g, state, c, KIND, DTYPE
            )
    else:
        for i in tl.range(0, T):
            joint, g = add_task(
                grads, weights, i, offsets, P, stride, joint, g, state, c, KIND, DTYPE
            )
    move(theta, s0, s1, s2, offsets, mask, joint, g, state, c, lr, keep, KIND, DTYPE)


def tiling_for(double: bool) -> Tiling:
    """Eight coordinates a thread (four in float64): two 16-byte accesses a float32 array."""
    return Tiling(block=512 if double else 1024)


def apply(
    rule: Rule,
    step: int,
    grads: Tensor,
    state: tuple[Tensor, ...],
    params: Tensor,
    weights: Tensor,
    lr: float,
    weight_decay: float = 0.0,
    *,
    tiling: Tiling | None = None,
) -> None:
    """The contract's `apply` (ops/__init__.py) with state shared by the tasks and no Clippy.

    Arguments are taken as checked. `params` and `state` are written.
    """
    n_tasks, size = grads.shape
    if tiling is None:
        tiling = tiling_for(grads.element_size() == 8)
    launch(
        apply_kernel,
        (programs_for(size, tiling),),
        grads.device,
        tiling,
        grads,
        *state,
        *(None,) * (3 - len(state)),
        params,
        weights,
        size,
        grads.stride(0),
        *coefficients(rule, step),
        lr,
        1.0 - lr * weight_decay,
        KIND=rule.kind,
        T=n_tasks,
        UNROLL=n_tasks <= MAX_UNROLLED_T,
        DTYPE=working_type(grads),
        BLOCK=tiling.block,
    )

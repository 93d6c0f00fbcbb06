"""The element formulas of the update rules for Triton: the third and last place they stand in.

Equations and notation: ops/rules.py; judge: reference/updates.py. A rule's state travels as a
tuple of blocks in the order of `rule.state_names`, its coefficients as a tuple of scalars.

    kind 0  Adam       (m, v)      kind 3  RMSProp with momentum            (v, b)
    kind 1  AdaGrad    (v,)        kind 4  RMSProp, centered                (v, q)
    kind 2  RMSProp    (v,)        kind 5  RMSProp, centered with momentum  (v, b, q)
    kind 6  no rule: u = g, no state; coefficients are not looked at

Division and root are the GPU's fast float32 ones (2 ulp; on NVIDIA the root of a subnormal number
is 0, which does not show beside an eps far above 1e-19); in float64 they round correctly.
"""

# Triton's language is not Python's: kernels carry no types for mypy, tuples grow by concatenation.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment"
# ruff: noqa: RUF005

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..rules import Numbers

#: Kind of the passes over the gradients as they are.
NO_RULE = tl.constexpr(6)
#: State tensors of a kind.
N_STATES = (2, 1, 1, 2, 2, 3, 0)

#: A row of `numbers`: its length, and where the entries lie that are looked up one by one; the
#: coefficients of the element formulas come first.
WIDTH = tl.constexpr(len(Numbers._fields))
LR = tl.constexpr(Numbers._fields.index("lr"))
DECAY = tl.constexpr(Numbers._fields.index("decay"))
ACTIVE = tl.constexpr(Numbers._fields.index("active"))


@triton.jit
def entry(row, k: tl.constexpr, mask, DTYPE):
    """Entry k of rows of `numbers`; 0 where `mask`, unless it is None, is not set."""
    value = tl.load(row + k) if mask is None else tl.load(row + k, mask=mask, other=0.0)
    return value.to(DTYPE)


@triton.jit
def coefficients(row, mask, DTYPE):
    """The coefficients at `row`, a pointer into `numbers` or a block of them, in the working type
    (never formed there: 1 - b of a rounded b would be wrong); and whether the row is active.

    Without gradient and moments, which are not to be read then, an inactive row's update is
    0 / (0 + 1) = 0.
    """
    active = entry(row, ACTIVE, mask, DTYPE) != 0
    c = (
        entry(row, 0, mask, DTYPE),
        entry(row, 1, mask, DTYPE),
        entry(row, 2, mask, DTYPE),
        entry(row, 3, mask, DTYPE),
        entry(row, 4, mask, DTYPE),
        entry(row, 5, mask, DTYPE),
        tl.where(active, entry(row, 6, mask, DTYPE), 1.0),
        entry(row, 7, mask, DTYPE),
    )
    return c, active


@triton.jit
def rates(numbers, R: tl.constexpr, DTYPE):
    """lr and decay of the first active row, 0 where there is none."""
    if R == 1:
        first = tl.where(tl.load(numbers + ACTIVE) != 0, 0, 1)
    else:
        rows = tl.arange(0, triton.next_power_of_2(R))
        active = tl.load(numbers + rows * WIDTH + ACTIVE, mask=rows < R, other=0.0) != 0
        first = tl.min(tl.where(active, rows, R), axis=0)
    row = numbers + first * WIDTH
    lr = tl.load(row + LR, mask=first < R, other=0.0).to(DTYPE)
    return lr, tl.load(row + DECAY, mask=first < R, other=0.0).to(DTYPE)


@triton.jit
def row_starts(row, q0, q1, q2):
    """Where the moments of task `row` start in each state tensor."""
    return row * q0, row * q1, row * q2


@triton.jit
def load_state(s0, s1, s2, starts, offsets, mask, KIND: tl.constexpr):
    """The moments at `offsets` past `starts`; 0 where not in `mask`."""
    state = ()
    if KIND != NO_RULE:
        state = (tl.load(s0 + (starts[0] + offsets), mask=mask, other=0.0),)
        if KIND != 1 and KIND != 2:
            state = state + (tl.load(s1 + (starts[1] + offsets), mask=mask, other=0.0),)
        if KIND == 5:
            state = state + (tl.load(s2 + (starts[2] + offsets), mask=mask, other=0.0),)
    return state


@triton.jit
def store_state(s0, s1, s2, starts, offsets, mask, state, KIND: tl.constexpr):
    tl.store(s0 + (starts[0] + offsets), state[0], mask=mask)
    if KIND != 1 and KIND != 2:
        tl.store(s1 + (starts[1] + offsets), state[1], mask=mask)
    if KIND == 5:
        tl.store(s2 + (starts[2] + offsets), state[2], mask=mask)


@triton.jit
def root(v):
    """sqrt(v), but NaN for an infinite v, the square of a number too large: the Gram shows it."""
    s = tl.sqrt(v)
    return s + (s - s)


@triton.jit
def advance(g, state, c, KIND: tl.constexpr):
    """One step of the plain rule on gradient g: the update u and the new state."""
    if KIND != NO_RULE:
        b1, d1, b2, d2, c1, c2, eps, mu = c
    if KIND == NO_RULE:
        u = g
        new = ()
    elif KIND == 0:
        m = b1 * state[0] + d1 * g
        v = b2 * state[1] + d2 * g * g
        u = c1 * m / (c2 * root(v) + eps)
        new = (m, v)
    elif KIND == 1:
        v = state[0] + g * g
        u = g / (root(v) + eps)
        new = (v,)
    else:
        v = b2 * state[0] + d2 * g * g
        new = (v,)
        if KIND == 4 or KIND == 5:
            q = b2 * state[KIND - 3] + d2 * g
            u = g / (root(tl.maximum(v - q * q, 0.0)) + eps)
        else:
            u = g / (root(v) + eps)
        if KIND == 3 or KIND == 5:
            u = mu * state[1] + u
            new = new + (u,)
        if KIND == 4 or KIND == 5:
            new = new + (q,)
    return u, new


def streams(numbers: Tensor | None, grads: Tensor, state: Sequence[Tensor]) -> tuple[Any, ...]:
    """The arguments that every pass over updates starts with: grads, s0 to s2 (None where the rule
    has fewer), numbers, P, the row stride of grads, and those of the state (0 where shared)."""
    strides = [s.stride(0) if s.dim() == 2 else 0 for s in state]
    absent = 3 - len(state)
    return (
        grads,
        *state,
        *(None,) * absent,
        numbers,
        grads.shape[1],
        grads.stride(0),
        *strides,
        *(0,) * absent,
    )


def is_per_task(state: Sequence[Tensor]) -> bool:
    """Whether every task keeps moments of its own."""
    return len(state) > 0 and state[0].dim() == 2

"""The element formulas of the update rules for Triton: the third and last place they stand in.

Equations and notation: fastmto/rules.py; judge: fastmto/reference.py. A rule's state travels as a
tuple of blocks in the order of `rule.state_names`, its coefficients as a tuple of scalars.

    kind 0  Adam       (m, v)      kind 3  RMSProp with momentum            (v, b)
    kind 1  AdaGrad    (v,)        kind 4  RMSProp, centered                (v, q)
    kind 2  RMSProp    (v,)        kind 5  RMSProp, centered with momentum  (v, b, q)
    kind 6  no rule: u = g, no state; coefficients are not looked at

Division and root are the GPU's fast float32 ones (2 ulp); in float64 they round correctly.
"""

# Triton's language is not Python's: kernels carry no types for mypy, tuples grow by concatenation.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment"
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from ..rules import Rule

#: Kind of the passes over the gradients as they are.
NO_RULE = tl.constexpr(6)


@triton.jit
def numbers(b1, d1, b2, d2, c1, c2, eps, mu, DTYPE: tl.constexpr):
    """The coefficients as scalars of the working type.

    They come as float64 arguments; Triton would make float32 of a plain Python float, and under
    the interpreter they are Python floats still, which `tl.full` takes too.
    """
    return (
        tl.full((), b1, DTYPE),
        tl.full((), d1, DTYPE),
        tl.full((), b2, DTYPE),
        tl.full((), d2, DTYPE),
        tl.full((), c1, DTYPE),
        tl.full((), c2, DTYPE),
        tl.full((), eps, DTYPE),
        tl.full((), mu, DTYPE),
    )


@triton.jit
def load_state(s0, s1, s2, offsets, mask, KIND: tl.constexpr):
    """The rule's moments at `offsets`; 0 beyond the end, where every update is then 0."""
    state = ()
    if KIND != NO_RULE:
        state = (tl.load(s0 + offsets, mask=mask, other=0.0),)
        if KIND != 1 and KIND != 2:
            state = state + (tl.load(s1 + offsets, mask=mask, other=0.0),)
        if KIND == 5:
            state = state + (tl.load(s2 + offsets, mask=mask, other=0.0),)
    return state


@triton.jit
def store_state(s0, s1, s2, offsets, mask, state, KIND: tl.constexpr):
    tl.store(s0 + offsets, state[0], mask=mask)
    if KIND != 1 and KIND != 2:
        tl.store(s1 + offsets, state[1], mask=mask)
    if KIND == 5:
        tl.store(s2 + offsets, state[2], mask=mask)


@triton.jit
def root(v):
    """sqrt(v), but NaN for an infinite v, the square of a number too large: the Gram shows it."""
    s = tl.sqrt(v)
    return s + (s - s)


@triton.jit
def advance(g, state, c, KIND: tl.constexpr):
    """One step of the plain rule on gradient g: the update u and the new state."""
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


def coefficients(rule: Rule | None, step: int) -> tuple[float, ...]:
    """The arguments of `numbers`, in double precision: 1 - b and the bias corrections must not be
    formed from rounded decay rates. Zeros without a rule."""
    if rule is None:
        return (0.0,) * 8
    b1, b2, c1, c2, eps, mu = rule.coefficients(step)
    return b1, 1.0 - b1, b2, 1.0 - b2, c1, c2, eps, mu

"""Perturb: rows that each lie along a direction from the parameters, as one Triton launch.

    out_r = params + scale_r u_r

u_r is given, or drawn on the way: equations, sources and which word serves which coordinate are in
fastmto/philox.py. Every operation rounds as IEEE 754 says and none is contracted, so that the bits
are those of the CPU.

Floor: (R + 1) P elements moved for drawn directions, (R + 2) P for one given to all rows and
(2 R + 1) P for one a row: a program keeps its parameters while it writes all rows. 16-byte accesses
when P and the row strides are multiples of 16 and the buffers are 16-byte aligned.
"""

# Triton's language is not Python's: kernels carry no types for mypy, tuples grow by concatenation.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment"
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import philox as reference
from .launch import Tiling, launch, programs_for, working_type

ROUNDS = tl.constexpr(reference.ROUNDS)
M0, M1 = (tl.constexpr(m) for m in reference.MULTIPLIERS)
W0, W1 = (tl.constexpr(w) for w in reference.WEYL)
LANES = tl.constexpr(reference.LANES)
LOG = tl.constexpr(reference.LOG)
SIN = tl.constexpr(reference.SIN)
COS = tl.constexpr(reference.COS)
MINUS_TWO_LN2 = tl.constexpr(reference.MINUS_TWO_LN2)
ANGLE = tl.constexpr(reference.ANGLE)
ROOT_HALF = tl.constexpr(reference.ROOT_HALF)
SCALED_ROOT_HALF = tl.constexpr(reference.SCALED_ROOT_HALF)


@triton.jit
def philox(block, number, seed_low, seed_high):
    """The four words of Philox4x32-10, in the shape of `block`; all arguments are int64."""
    c0, c1 = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    c2 = tl.full(block.shape, number.to(tl.uint32), tl.uint32)
    c3 = tl.full(block.shape, (number >> 32).to(tl.uint32), tl.uint32)
    k0, k1 = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    for _round in tl.static_range(ROUNDS):
        p0 = c0.to(tl.uint64) * tl.full((), M0, tl.uint64)
        p1 = c2.to(tl.uint64) * tl.full((), M1, tl.uint64)
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 += tl.full((), W0, tl.uint32)
        k1 += tl.full((), W1, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def polynomial(coefficients: tl.constexpr, DEGREE: tl.constexpr, x):
    value = tl.full(x.shape, coefficients[DEGREE], tl.float32)
    for k in tl.static_range(DEGREE):
        value = value * x + coefficients[DEGREE - 1 - k]
    return value


@triton.jit
def normal_pair(a, b):
    """Two normal numbers from two words."""
    scaled = (a >> 1).to(tl.int32).to(tl.float32) + 0.5
    bits = scaled.to(tl.int32, bitcast=True) - SCALED_ROOT_HALF
    exponent = (bits >> 23).to(tl.float32)
    t = ((bits & 0x7FFFFF) + ROOT_HALF).to(tl.float32, bitcast=True) - 1.0
    log = exponent * MINUS_TWO_LN2 + t * polynomial(LOG, 7, t)
    root = tl.sqrt_rn(log).to(tl.uint32, bitcast=True)
    r = (root ^ (b & 0x80000000)).to(tl.float32, bitcast=True)  # 0 - r would lose the sign of 0
    w = (b << 2).to(tl.int32, bitcast=True).to(tl.float32) * ANGLE
    square = w * w
    sine = w + square * w * polynomial(SIN, 2, square)
    cosine = 1.0 + square * polynomial(COS, 2, square)
    exchanged = (b & 0x40000000) != 0
    return r * tl.where(exchanged, sine, cosine), r * tl.where(exchanged, cosine, sine)


@triton.jit
def put(out, offsets, mask, theta, scale, u, DTYPE):
    tl.store(out + offsets, theta + scale * u.to(DTYPE), mask=mask)


@triton.jit(do_not_specialize=["R"])
def given_kernel(
    theta,  # (P,) parameters
    out,  # (R, P), rows `stride` apart
    scale,  # (R,) float64
    direction,  # (R, P), rows `along` apart, or (P,) with along = 0
    P: tl.int64,
    R: tl.int32,
    stride: tl.int64,
    along: tl.int64,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < P
    old = tl.load(theta + offsets, mask=mask, other=0.0)
    for r in tl.range(0, R):
        u = tl.load(direction + r * along + offsets, mask=mask, other=0.0)
        put(out + r * stride, offsets, mask, old, tl.load(scale + r).to(DTYPE), u, DTYPE)


@triton.jit(do_not_specialize=["R", "first", "seed_low", "seed_high"])
def gaussian_kernel(
    theta,  # (P,) parameters
    out,  # (R, P), rows `stride` apart
    scale,  # (R,) float64
    P: tl.int64,
    R: tl.int32,
    stride: tl.int64,
    first: tl.int64,  # number of row 0's direction, its 64 bits
    seed_low: tl.int64,
    seed_high: tl.int64,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A lane is a block of Philox, four coordinates."""
    lanes = tl.arange(0, BLOCK // 4)
    block = tl.program_id(0).to(tl.int64) * (BLOCK // 4) + lanes
    group = tl.program_id(0).to(tl.int64) * BLOCK + lanes // LANES * (4 * LANES) + lanes % LANES
    number = tl.full((), first, tl.int64)
    low, high = tl.full((), seed_low, tl.int64), tl.full((), seed_high, tl.int64)
    old = ()
    for j in tl.static_range(4):
        offsets = group + j * LANES
        old = old + (tl.load(theta + offsets, mask=offsets < P, other=0.0),)
    for r in tl.range(0, R):
        a = tl.load(scale + r).to(DTYPE)
        x0, x1, x2, x3 = philox(block, number + r, low, high)
        z = normal_pair(x0, x1) + normal_pair(x2, x3)
        for j in tl.static_range(4):
            offsets = group + j * LANES
            put(out + r * stride, offsets, offsets < P, old[j], a, z[j], DTYPE)


@triton.jit(do_not_specialize=["R", "first", "seed_low", "seed_high"])
def rademacher_kernel(
    theta,  # (P,) parameters
    out,  # (R, P), rows `stride` apart
    scale,  # (R,) float64
    P: tl.int64,
    R: tl.int32,
    stride: tl.int64,
    first: tl.int64,  # number of row 0's direction, its 64 bits
    seed_low: tl.int64,
    seed_high: tl.int64,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A lane is a block of Philox, 128 coordinates: 32 bits of four words, a row of tiles each."""
    lanes = tl.arange(0, BLOCK // 128)
    block = tl.program_id(0).to(tl.int64) * (BLOCK // 128) + lanes
    group = tl.program_id(0).to(tl.int64) * BLOCK + lanes // LANES * (128 * LANES) + lanes % LANES
    bit = tl.arange(0, 32)
    tile = bit[:, None] * LANES + group[None, :]
    number = tl.full((), first, tl.int64)
    low, high = tl.full((), seed_low, tl.int64), tl.full((), seed_high, tl.int64)
    old = ()
    for j in tl.static_range(4):
        offsets = tile + j * (32 * LANES)
        old = old + (tl.load(theta + offsets, mask=offsets < P, other=0.0),)
    for r in tl.range(0, R):
        a = tl.load(scale + r).to(DTYPE)
        x = philox(block, number + r, low, high)
        for j in tl.static_range(4):
            offsets = tile + j * (32 * LANES)
            minus = (x[j][None, :] >> bit[:, None].to(tl.uint32)) & 1
            u = 1.0 - 2.0 * minus.to(tl.float32)
            put(out + r * stride, offsets, offsets < P, old[j], a, u, DTYPE)


#: A random distribution's kernel and the coordinates that its programs' blocks must divide into.
KERNELS = {
    "gaussian": (gaussian_kernel, reference.GAUSSIAN_GROUP),
    "rademacher": (rademacher_kernel, reference.RADEMACHER_GROUP),
}


def tiling_for(distribution: str | None, double: bool) -> Tiling:
    """Thirty-two bytes of a row a thread, of Rademacher directions as many as registers allow."""
    if distribution == "rademacher":
        return Tiling(2048 if double else 4096, fuse=False)
    if distribution == "gaussian":
        return Tiling(1024 if double else 2048, fuse=False)
    return Tiling(512 if double else 1024, fuse=False)


def perturb(
    params: Tensor,
    out: Tensor,
    scale: Tensor,
    direction: Tensor | None,
    seed: int | None,
    offset: int,
    distribution: str,
    *,
    tiling: Tiling | None = None,
) -> None:
    """The contract's `perturb` (ops/__init__.py). Arguments are taken as checked; `out` is
    written.

    `tiling.block` is a multiple of the distribution's group (fastmto/philox.py).
    """
    size = params.numel()
    if tiling is None:
        tiling = tiling_for(None if seed is None else distribution, params.element_size() == 8)
    grid = (programs_for(size, tiling),)
    constants = {"DTYPE": working_type(params), "BLOCK": tiling.block}
    head = params, out, scale
    sizes = size, out.shape[0], out.stride(0)
    if seed is None:
        assert direction is not None
        along = direction.stride(0) if direction.dim() == 2 else 0
        launch(
            given_kernel,
            grid,
            params.device,
            tiling,
            params,
            out,
            scale,
            direction,
            *sizes,
            along,
            **constants,
        )
        return
    kernel, group = KERNELS[distribution]
    if tiling.block % group != 0:
        raise ValueError(f"tiling.block must be a multiple of {group}, got {tiling.block}")
    # 64 bits as Triton takes them: signed.
    first = offset - (1 << 64) if offset >= 1 << 63 else offset
    launch(
        kernel,
        grid,
        params.device,
        tiling,
        *head,
        *sizes,
        first,
        seed & reference.LOW,
        seed >> 32,
        **constants,
    )

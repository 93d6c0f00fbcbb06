"""Random directions by counter: any coordinate of any direction from a seed, with nothing stored.

The readable twin of what csrc/kernels/draws.h and ops/triton_perturb.py do, in NumPy.

Source: Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2,
3" (SC 2011), sections 3.3 and 5; Box and Muller, "A Note on the Generation of Random Normal
Deviates" (1958), equation 1. Ours are which word serves which coordinate, and that logarithm, sine
and cosine are polynomials, so that every step is one of IEEE 754's correctly rounded operations
and the numbers are the same bits wherever they are made.

    words     x = philox(counter = (block, number), key = seed): four words of 32 bits from a
              block number and a direction number of 64 bits each
    gaussian  block 16 g + l serves coordinates 64 g + 16 j + l, j = 0..3, as two pairs:
              with a, b = x_0, x_1 for j = 0, 1 and x_2, x_3 for j = 2, 3
                  u = (floor(a / 2) + 1/2) 2^-31 in float32       in (0, 1]
                  r = sqrt(-2 ln u)
                  w = the low 30 bits of b, signed, over 2^30, times pi/2    in [-pi/4, pi/4]
                  r cos w and r sin w, exchanged by bit 30 of b, both negative by bit 31
              At most 6.66 in size; within 4e-7 of these equations, relative
    rademacher  block 16 g + l serves coordinates 2048 g + 512 j + 16 k + l, j = 0..3, k = 0..31:
              -1 where bit k of x_j is set, else 1

Directions are float32 numbers whatever the dtype of the parameters they are added to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]
Floats = npt.NDArray[np.float32]

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
#: What the key grows by in every round: the golden ratio and sqrt(3) - 1 in 32 bits.
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LOW = 0xFFFFFFFF

#: Lanes that stand beside each other in memory: block 16 g + l, l < LANES.
LANES = 16
#: Coordinates of LANES blocks.
GAUSSIAN_GROUP = 4 * LANES
RADEMACHER_GROUP = 128 * LANES

#: -2 ln(1 + t) = t P(t) on [sqrt(1/2) - 1, sqrt(2) - 1]; coefficients of t^0, t^1, ...
LOG = (
    -2.0,
    1.0000057220458984,
    -0.6667017936706543,
    0.4994677007198334,
    -0.3978799283504486,
    0.3440312147140503,
    -0.32557979226112366,
    0.2069597840309143,
)
MINUS_TWO_LN2 = -1.3862943649291992
#: sin w = w + w^3 P(w^2) and cos w = 1 + w^2 P(w^2) on [-pi/4, pi/4].
SIN = (-0.16666655242443085, 0.008332177996635437, -0.0001951729936990887)
COS = (-0.49999895691871643, 0.04165629297494888, -0.0013597822980955243)
#: pi/4 over 2^31: the low 30 bits stand at the top of a signed word.
ANGLE = 3.65729529994141e-10
#: The bits of sqrt(1/2) and of 2^31 sqrt(1/2) in float32.
ROOT_HALF = 0x3F3504F3
SCALED_ROOT_HALF = 0x4EB504F3


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Words, ...]:
    """Philox4x32-10.

    Args:
        counter: four arrays of one shape (or numbers), 32 bits each.
        key: two numbers of 32 bits.

    Returns:
        four arrays of that shape, uint32.
    """
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in counter)
    k0, k1 = key
    m0, m1 = (np.uint64(m) for m in MULTIPLIERS)
    low, half = np.uint64(LOW), np.uint64(32)
    for _ in range(ROUNDS):
        p0, p1 = m0 * c0, m1 * c2
        c0, c1 = (p1 >> half) ^ c1 ^ np.uint64(k0), p1 & low
        c2, c3 = (p0 >> half) ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return tuple(c.astype(np.uint32) for c in (c0, c1, c2, c3))


def words(seed: int, number: int, blocks: int) -> tuple[Words, ...]:
    """The words of blocks 0 to `blocks` - 1 of direction `number`: four arrays (blocks,)."""
    block = np.arange(blocks, dtype=np.uint64)
    counter = (block & np.uint64(LOW), block >> np.uint64(32), number & LOW, number >> 32)
    return philox(counter, (seed & LOW, seed >> 32))


def _polynomial(coefficients: tuple[float, ...], x: Floats) -> Floats:
    """Horner's rule, a rounding after every product and every sum."""
    value = np.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = value * x + np.float32(c)
    return value


def normal_pair(a: Words, b: Words) -> tuple[Floats, Floats]:
    """Two normal numbers from two words: the equations of the module, in this order of rounding."""
    one, half = np.float32(1), np.float32(0.5)
    # u 2^31 = 2^(31 + exponent) (1 + t)
    bits = ((a >> 1).astype(np.int32).astype(np.float32) + half).view(np.int32)
    bits -= np.int32(SCALED_ROOT_HALF)
    exponent = (bits >> 23).astype(np.float32)
    t = ((bits & 0x7FFFFF) + np.int32(ROOT_HALF)).view(np.float32) - one
    r = np.sqrt(exponent * np.float32(MINUS_TWO_LN2) + t * _polynomial(LOG, t))

    w = (b << 2).view(np.int32).astype(np.float32) * np.float32(ANGLE)
    square = w * w
    sine = w + square * w * _polynomial(SIN, square)
    cosine = one + square * _polynomial(COS, square)
    exchanged = (b & 0x40000000) != 0
    r = np.where((b & 0x80000000) != 0, -r, r)
    return r * np.where(exchanged, sine, cosine), r * np.where(exchanged, cosine, sine)


def gaussian(seed: int, number: int, numel: int) -> Floats:
    """Independent standard normal numbers, (numel,)."""
    groups = -(-numel // GAUSSIAN_GROUP)
    x = words(seed, number, LANES * groups)
    rows = [*normal_pair(x[0], x[1]), *normal_pair(x[2], x[3])]
    return np.stack([z.reshape(groups, LANES) for z in rows], axis=1).reshape(-1)[:numel]


def rademacher(seed: int, number: int, numel: int) -> Floats:
    """Independent signs, -1 or 1 with the same probability, (numel,)."""
    groups = -(-numel // RADEMACHER_GROUP)
    x = np.stack([w.reshape(groups, LANES) for w in words(seed, number, LANES * groups)], axis=1)
    bits = (x[:, :, None, :] >> np.arange(32, dtype=np.uint32)[:, None]) & 1
    return (1 - 2 * bits.astype(np.float32)).reshape(-1)[:numel]


#: Directions by the name of their distribution.
DISTRIBUTIONS: dict[str, Callable[[int, int, int], Floats]] = {
    "gaussian": gaussian,
    "rademacher": rademacher,
}

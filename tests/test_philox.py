"""Random directions: the generator's published answers, and what is promised of the numbers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fastmto.ops import philox

# Random123, tests/kat_vectors: philox 4x32, 10 rounds.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], answer: tuple[int, ...]
) -> None:
    assert tuple(int(x) for x in philox.philox(counter, key)) == answer


def test_words_are_those_of_block_number_and_seed() -> None:
    seed, number = 0x299F31D0_A4093822, 0x03707344_13198A2E
    words = philox.words(seed, number, 3)
    for block in range(3):
        answer = philox.philox((block, 0, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
        assert [int(x[block]) for x in words] == [int(x) for x in answer]


def test_which_word_serves_which_coordinate() -> None:
    seed, number = 11, 5
    z, signs = philox.gaussian(seed, number, 200), philox.rademacher(seed, number, 5000)
    x = philox.words(seed, number, 64)
    pairs = [*philox.normal_pair(x[0], x[1]), *philox.normal_pair(x[2], x[3])]
    for p in (0, 15, 16, 63, 64, 199):
        group, j, lane = p // 64, p % 64 // 16, p % 16
        assert z[p] == pairs[j][16 * group + lane]
    for p in (0, 15, 16, 511, 512, 2047, 2048, 4999):
        group, j, bit, lane = p // 2048, p % 2048 // 512, p % 512 // 16, p % 16
        assert signs[p] == (-1 if x[j][16 * group + lane] >> bit & 1 else 1)


@pytest.mark.parametrize("draw", philox.DISTRIBUTIONS.values(), ids=philox.DISTRIBUTIONS)
def test_a_coordinate_does_not_depend_on_how_many_are_asked_for(draw) -> None:
    whole = draw(3, 7, 5000)
    assert whole.dtype == np.float32
    for numel in (0, 1, 15, 63, 64, 65, 2047, 2049):
        part = draw(3, 7, numel)
        assert part.shape == (numel,)
        assert (part == whole[:numel]).all()


@pytest.mark.parametrize("draw", philox.DISTRIBUTIONS.values(), ids=philox.DISTRIBUTIONS)
def test_directions_and_seeds_are_not_correlated(draw) -> None:
    numel = 20_000
    seeds = [(0, 0), (0, 1), (1, 0), (2**63, 0), (0, 2**63), (2**32, 0), (0, 2**32)]
    drawn = [draw(seed, number, numel).astype(float) for seed, number in seeds]
    drawn += [np.roll(drawn[0], k) for k in (1, 16, 64, 2048)]
    for a, b in itertools.combinations(drawn, 2):
        assert abs(a @ b) < 5 * numel**0.5


def test_normal_numbers_have_the_moments_and_the_distribution() -> None:
    z = philox.gaussian(0, 0, 1_000_000).astype(float)
    n = len(z)
    # Standard errors of the first moments of n normal numbers.
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - moment) < 4 * (spread / n) ** 0.5
    inside = [0.382924922548026, 0.682689492137086, 0.954499736103642, 0.997300203936740]
    for bound, p in zip((0.5, 1, 2, 3), inside, strict=True):
        assert abs((abs(z) < bound).mean() - p) < 4 * (p * (1 - p) / n) ** 0.5
    assert 4.4 < abs(z).max() < 6.66


def test_signs_are_balanced() -> None:
    signs = philox.rademacher(0, 0, 1_000_000)
    assert set(np.unique(signs).tolist()) == {-1, 1}
    assert abs(signs.astype(float).mean()) < 4e-3
    by_bit = signs[: 2048 * 400].reshape(400, 4, 32, 16).astype(float).mean(axis=(0, 3))
    assert abs(by_bit).max() < 4.5 / (400 * 16) ** 0.5


def test_normal_numbers_are_the_box_muller_numbers_of_their_words() -> None:
    a, b, *_ = philox.words(4, 4, 400_000)
    a, b = a.copy(), b.copy()
    a[:4] = 0, 1, 0xFFFFFFFF, 0xFFFFFF00
    b[4:8] = 0, 0x20000000, 0x7FFFFFFF, 0xC0000000
    actual = np.array(philox.normal_pair(a, b))
    u = ((a >> 1).astype(np.float32) + np.float32(0.5)).astype(float) * 2.0**-31
    w = (b << np.uint32(2)).view(np.int32) * (np.pi / 4 * 2.0**-31)
    r = np.sqrt(-2 * np.log(u)) * np.where(b >> 31, -1, 1)
    pair = np.array([r * np.cos(w), r * np.sin(w)])
    expected = np.where(b & 0x40000000, pair[::-1], pair)
    assert (abs(actual - expected) <= 4e-7 * abs(expected)).all()
    assert (actual[:, 2] == 0).all()
    assert 6.6 < np.hypot(*actual[:, 0]) < 6.67

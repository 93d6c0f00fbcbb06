"""The op `perturb` of every backend: the same bits as fastmto/philox.py makes in NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmto import ops
from fastmto.ops import _kernels, cpu, philox

ISAS = [isa for isa in (1, 2, 3) if _kernels.supported(isa)]
DTYPES = (torch.float32, torch.float64)
SCALE = torch.tensor([0.1, -3e-4, 1.7], dtype=torch.float64)
#: Seeds and numbers of first directions.
STREAMS = ((0, 0), (2**64 - 5, 2**63 - 1), (2**32, 2**64 - 3))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
distributions = pytest.mark.parametrize("distribution", philox.DISTRIBUTIONS)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def parameters(numel: int, dtype: torch.dtype) -> Tensor:
    """Random numbers, with zeros of both signs among them."""
    generator = torch.Generator().manual_seed(numel)
    params = torch.randn(numel, generator=generator, dtype=torch.float64).to(dtype)
    params[::7] = 0.0
    params[3::7] = -0.0
    return params


def poisoned(rows: int, numel: int, dtype: torch.dtype, padding: int = 5) -> Tensor:
    return torch.full((rows, numel + padding), torch.nan, dtype=dtype)[:, :numel]


def expected(
    params: Tensor, seed: int, offset: int, distribution: str, scale: Tensor = SCALE
) -> Tensor:
    draw = philox.DISTRIBUTIONS[distribution]
    numel = params.numel()
    u = torch.stack([torch.from_numpy(draw(seed, offset + r, numel)) for r in range(len(scale))])
    return params + scale.to(params.dtype)[:, None] * u.to(params.dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    kind = torch.int64 if a.dtype == torch.float64 else torch.int32
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


@dtypes
@distributions
@pytest.mark.parametrize("numel", [1, 15, 63, 64, 65, 2047, 2048, 2049, 7777])
def test_random_directions_on_the_cpu(numel: int, distribution: str, dtype: torch.dtype) -> None:
    params = parameters(numel, dtype)
    before = params.clone()
    for seed, offset in STREAMS:
        right = expected(params, seed, offset, distribution)
        for isa in ISAS:
            out = poisoned(3, numel, dtype)
            cpu.perturb(
                params,
                out,
                scale=SCALE,
                seed=seed,
                offset=offset,
                distribution=distribution,
                isa=isa,
            )
            assert same_bits(out, right)
            assert out._base[:, numel:].isnan().all()
    assert same_bits(params, before)


@dtypes
@pytest.mark.parametrize("numel", [1, 17, 2049, 5000])
@pytest.mark.parametrize("isa", ISAS)
def test_given_directions_on_the_cpu(isa: int, numel: int, dtype: torch.dtype) -> None:
    params, out = parameters(numel, dtype), poisoned(3, numel, dtype)
    one, rows = torch.randn(numel, dtype=dtype), poisoned(3, numel, dtype, padding=2)
    rows.copy_(torch.randn(3, numel, dtype=dtype))
    for direction in (one, rows):
        cpu.perturb(params, out, scale=SCALE, direction=direction, isa=isa)
        assert same_bits(out, params + SCALE.to(dtype)[:, None] * direction)


@dtypes
@distributions
@pytest.mark.parametrize("misaligned", [0, 1])
def test_threads_and_writes_past_the_caches(
    misaligned: int, distribution: str, dtype: torch.dtype
) -> None:
    numel = 1_000_003
    params, direction = parameters(numel, dtype), torch.randn(numel, dtype=dtype)
    right = expected(params, 9, 4, distribution)
    for threads, isa in ((1, 0), (2, 0), (5, 0), *((2, isa) for isa in ISAS)):
        torch.set_num_threads(threads)
        # Rows 16 elements' multiples apart begin at cache lines, or one element behind.
        buffer = torch.full((3, 1_000_064 + 16), torch.nan, dtype=dtype)
        out = buffer[:, misaligned : numel + misaligned]
        cpu.perturb(params, out, scale=SCALE, seed=9, offset=4, distribution=distribution, isa=isa)
        assert same_bits(out, right)
        cpu.perturb(params, out, scale=SCALE, direction=direction, isa=isa)
        assert same_bits(out, params + SCALE.to(dtype)[:, None] * direction)


@dtypes
@distributions
def test_the_operator(distribution: str, dtype: torch.dtype) -> None:
    """Seeds and offsets past 2^63 come through an operator's integers, which have a sign."""
    params, out = parameters(777, dtype), poisoned(3, 777, dtype)
    for seed, offset in STREAMS:
        ops.perturb(params, out, scale=SCALE, seed=seed, offset=offset, distribution=distribution)
        assert same_bits(out, expected(params, seed, offset, distribution))
    for direction in (torch.randn(777, dtype=dtype), torch.randn(3, 777, dtype=dtype)):
        ops.perturb(params, out, scale=SCALE, direction=direction)
        assert same_bits(out, params + SCALE.to(dtype)[:, None] * direction)
    for name in ("seed", "offset"):
        for wrong in (-1, 2**64):
            with pytest.raises(ValueError, match=rf"{name} must be an integer .* got {wrong}"):
                ops.perturb(params, out, scale=SCALE, **{"seed": 1, name: wrong})


@pytest.mark.parametrize("numel", [1, 65, 2049, 5000])
@dtypes
@distributions
def test_random_directions_by_triton(distribution: str, dtype: torch.dtype, numel: int) -> None:
    pytest.importorskip("triton")
    from fastmto.ops.triton import perturb as triton_perturb
    from fastmto.ops.triton.launch import Tiling

    params = parameters(numel, dtype)
    _, group = triton_perturb.KERNELS[distribution]
    for (seed, offset), blocks in zip(STREAMS, (1, 2, 4), strict=True):
        out = poisoned(3, numel, dtype).to(DEVICE)
        triton_perturb.perturb(
            params.to(DEVICE),
            out,
            SCALE.to(DEVICE),
            None,
            seed,
            offset,
            distribution,
            tiling=Tiling(blocks * group, fuse=False),
        )
        assert same_bits(out.cpu(), expected(params, seed, offset, distribution))
    with pytest.raises(ValueError, match=f"tiling.block must be a multiple of {group}, got 32"):
        triton_perturb.perturb(
            params, out, SCALE, None, 0, 0, distribution, tiling=Tiling(32, fuse=False)
        )


@dtypes
def test_the_gpu_backend(dtype: torch.dtype) -> None:
    """Default tilings, and given directions."""
    pytest.importorskip("triton")
    from fastmto.ops.triton import backend as gpu

    params, scale = parameters(3001, dtype), SCALE.to(DEVICE)
    out = poisoned(3, 3001, dtype).to(DEVICE)
    for distribution in philox.DISTRIBUTIONS:
        gpu.perturb(
            params.to(DEVICE), out, scale=scale, seed=7, offset=2, distribution=distribution
        )
        assert same_bits(out.cpu(), expected(params, 7, 2, distribution))
    for direction in (torch.randn(3001, dtype=dtype), torch.randn(3, 3001, dtype=dtype)):
        gpu.perturb(params.to(DEVICE), out, scale=scale, direction=direction.to(DEVICE))
        assert same_bits(out.cpu(), params + SCALE.to(dtype)[:, None] * direction)


@dtypes
def test_one_row_in_place(dtype: torch.dtype) -> None:
    scale = SCALE[:1]
    for numel in (100, 3_000_000):
        params = parameters(numel, dtype)
        right = expected(params, 1, 0, "gaussian", scale)
        cpu.perturb(params, params[None], scale=scale, seed=1)
        assert same_bits(params, right[0])


def test_rows_do_not_depend_on_how_many_there_are() -> None:
    params = parameters(3000, torch.float32)
    scale = torch.full((5,), 0.01, dtype=torch.float64)
    whole, part = poisoned(5, 3000, torch.float32), poisoned(2, 3000, torch.float32)
    cpu.perturb(params, whole, scale=scale, seed=3, offset=10)
    cpu.perturb(params, part, scale=scale[:2], seed=3, offset=12)
    assert same_bits(part, whole[2:4])


def test_no_coordinates() -> None:
    out = torch.empty(2, 0)
    cpu.perturb(torch.empty(0), out, scale=SCALE[:2], seed=1)
    cpu.perturb(torch.empty(0), out, scale=SCALE[:2], direction=torch.empty(0))
    assert out.shape == (2, 0)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "half": (
        {"params": torch.ones(8, dtype=torch.bfloat16)},
        r"params must be .* float32 master weights\), got bfloat16 of shape \(8,\)",
    ),
    "params_shape": ({"params": torch.ones(2, 4)}, r"params must be .* got float32 .*\(2, 4\)"),
    "params_strided": ({"params": torch.ones(16)[::2]}, "params must be a contiguous"),
    "out_dtype": ({"out": torch.ones(3, 8).double()}, "out must be .* float32 like params"),
    "out_shape": ({"out": torch.ones(3, 7)}, r"out must be \(R >= 1, 8\) .* got .*\(3, 7\)"),
    "out_empty": ({"out": torch.ones(0, 8)}, r"out must be \(R >= 1, 8\)"),
    "out_overlap": ({"out": torch.ones(8).expand(3, 8)}, "out must be .* do not overlap"),
    "scale_dtype": ({"scale": torch.ones(3)}, "scale must be .* float64 .* got float32"),
    "scale_shape": ({"scale": SCALE[:2]}, r"scale must be .*\(3,\) on cpu, got .*\(2,\)"),
    "neither": ({"seed": None}, "exactly one of direction and seed .* got neither"),
    "both": ({"direction": torch.ones(8)}, "exactly one of direction and seed .* got both"),
    "direction_shape": (
        {"seed": None, "direction": torch.ones(2, 8)},
        r"direction must be \(8,\) or \(3, 8\) .* got .*\(2, 8\)",
    ),
    "direction_dtype": (
        {"seed": None, "direction": torch.ones(8).double()},
        "direction must be .* float32 like params, on cpu, got float64",
    ),
    "seed_negative": ({"seed": -1}, r"seed must be an integer from 0 to 2\^64 - 1, got -1"),
    "seed_large": ({"seed": 2**64}, "seed must be an integer"),
    "offset": ({"offset": 2**64 - 2}, r"offset must be an integer from 0 to 2\^64 - 3, got 1844"),
    "distribution": (
        {"distribution": "cauchy"},
        "distribution must be one of gaussian, rademacher, got 'cauchy'",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "params": torch.ones(8),
        "out": torch.ones(3, 8),
        "scale": SCALE,
        "seed": 1,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        cpu.perturb(**arguments)


def test_rows_over_the_parameters_are_refused() -> None:
    buffer = torch.ones(4, 8)
    for rows in (slice(0, 3), slice(1, 4)):
        with pytest.raises(ValueError, match="out must not share memory with params"):
            cpu.perturb(buffer[2], buffer[rows], scale=SCALE, seed=1)
    with pytest.raises(ValueError, match="out must not share memory with params"):
        cpu.perturb(buffer.view(-1)[:8], buffer.view(-1)[None, 4:12], scale=SCALE[:1], seed=1)
    cpu.perturb(buffer[0], buffer[1:], scale=SCALE, seed=1)
    with pytest.raises(ValueError, match=r"params must be on the CPU, got .* on meta"):
        cpu.perturb(
            torch.ones(8, device="meta"),
            torch.ones(3, 8, device="meta"),
            scale=SCALE.to("meta"),
            seed=1,
        )

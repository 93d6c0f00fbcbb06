"""Every Triton kernel builds for the GPUs we name, without one: ahead-of-time compilation.

In processes of their own (aot.py), as this one may be interpreting, and with empty cache folders.
What Triton's binder makes of the launchers' arguments is part of it.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
from ahead_of_time import CUDA, HIP, WHOLE, compiled

triton = pytest.importorskip("triton")

pytestmark = pytest.mark.slow

OPS = {
    *("update_gram", "apply_and_gram", "apply", "combine", "gram", "check", "perturb"),
    *("step_constants", "count_step", "bargaining", "mgda"),
}
STREAMS = {"grads", "s0", "s1", "s2", "theta", "out", "direction"}
VERSION = ".".join(triton.__version__.split(".")[:2])
#: Most bytes a thread may spill, by Triton's version and the words kernels' names begin with.
#: Others: none.
SPILLS: dict[str, dict[tuple[str, ...], int]] = {
    "3.6": {
        ("bargaining", "T=32"): 56,
        ("update_gram", "torch.float32", "T=8", "kind=0", "|"): 8,
    },
    "3.7": {
        ("bargaining", "T=32"): 56,
        ("apply_and_gram", "torch.bfloat16", "T=16"): 8,
    },
}


@pytest.fixture(scope="module", params=CUDA)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What came out for an NVIDIA GPU, by "op dtype T=... | kernel"."""
    found = compiled(request.param, tmp_path_factory)
    return {name: made for name, made in found.items() if name.split()[0] not in ("control", "one")}


def starting(kernels: dict[str, Any], *heads: str) -> dict[str, Any]:
    found = {name: made for name, made in kernels.items() if name.startswith(heads)}
    assert found
    return found


def begins(name: str, head: tuple[str, ...]) -> bool:
    """Whether these are a kernel's first words."""
    return tuple(name.split()[: len(head)]) == head


def spilled_beyond_bounds(kernels: dict[str, Any]) -> dict[str, int]:
    bounds = SPILLS.get(VERSION, {})
    found = {}
    for name, made in kernels.items():
        bound = max((b for head, b in bounds.items() if begins(name, head)), default=0)
        if made["spilled"] > bound:
            found[name] = made["spilled"]
    return found


def test_compiles_without_spills_and_fits_shared_memory(kernels: dict[str, Any]) -> None:
    assert {name.split()[0] for name in kernels} == OPS
    assert spilled_beyond_bounds(kernels) == {}
    # What a program may have on every GPU since sm_80.
    assert max(made["shared"] for made in kernels.values()) <= 99 * 1024
    assert max(m["shared"] for m in starting(kernels, "bargaining", "mgda").values()) <= 4096


@pytest.mark.parametrize("target", HIP)
def test_compiles_for_amd(target: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    kernels = compiled(target, tmp_path_factory)
    large = starting(kernels, "large")
    assert len(large) == 2
    assert {made["narrow"] for made in large.values()} == {0}
    # Else it would mean nothing.
    assert kernels["combine torch.bfloat16 T=2 | combine_kernel"]["narrow"] > 0
    assert {name.split()[0] for name in kernels} - {"large"} == OPS
    assert spilled_beyond_bounds(kernels) == {}
    # What a program may have on gfx942.
    assert max(made["shared"] for made in kernels.values()) <= 64 * 1024


@pytest.mark.parametrize("target", HIP)
def test_on_amd_every_wave_waits_for_its_sums_before_the_arrival(
    target: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A barrier alone waits for no stores there."""
    kernels = compiled(target, tmp_path_factory)
    summed = {name: made for name, made in kernels.items() if "arrived" in made["signature"]}
    assert {name.split("| ")[1] for name in summed} == {"gram_pairs", "gram_tiles"}
    for name, made in summed.items():
        order = made["order"]
        (arrival,) = (k for k, word in enumerate(order) if "_atomic" in word)
        sums = max(k for k, word in enumerate(order[:arrival]) if "_store" in word)
        assert order[sums + 1].endswith("vmcnt(0)"), (name, order[sums : arrival + 1])
        # A program of one wave has no barrier.
        assert order[sums + 2] in ("s_barrier", "buffer_wbl2"), (name, order[sums : arrival + 1])


def test_one_coordinate_in_one_tensor_compiles(tmp_path_factory: pytest.TempPathFactory) -> None:
    found = compiled(WHOLE, tmp_path_factory)
    kernels = starting(found, "one ")
    assert {name.split("| ")[1] for name in kernels} == {
        *("gram_pairs", "gram_tiles", "factors_kernel"),
    }
    assert spilled_beyond_bounds(kernels) == {}


def test_sizes_reach_the_kernels_in_64_bits_and_numbers_in_double_precision(
    kernels: dict[str, Any],
) -> None:
    for name, made in kernels.items():
        signature = made["signature"]
        if STREAMS & signature.keys():
            assert signature["P"] == "i64", name
        for size in ("P", "stride", "along"):
            assert signature.get(size, "i64") in ("i64", "constexpr"), name
        for number in ("numbers", "weights", "scale", "hyper", "sigma"):
            assert signature.get(number, "*fp64") in ("*fp64", "constexpr"), name
        for number in ("tol", "ridge"):
            assert signature.get(number, "fp64") == "fp64", name


def test_offsets_of_streams_are_formed_in_64_bits(kernels: dict[str, Any]) -> None:
    """At P > 2^31 a product of 32 bits would wrap."""
    streaming = {name: made for name, made in kernels.items() if made["looked_at"]}
    assert {name.split()[0] for name in streaming} == OPS - {
        *("step_constants", "count_step", "bargaining", "mgda")
    }
    for name, made in kernels.items():
        assert made["narrow"] == [], name
        assert (made["looked_at"] > 0) == bool(STREAMS & made["accesses"].keys()), name


def test_the_inspection_of_offsets_finds_narrow_ones(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    found = compiled(WHOLE, tmp_path_factory)
    controls = {name: made for name, made in found.items() if name.startswith("control")}
    assert len(controls) == 5
    for name, made in controls.items():
        assert made["looked_at"] == 2, name
        assert bool(made["narrow"]) == ("narrow" in name), name
    for name, width in (("wide_block", 16), ("narrow_carried", 4)):
        assert widths(controls[f"control | {name}"]) == {"grads": {width}, "out": {width}}
    late = controls["control | narrow_late"]["narrow"]
    assert any(re.search(r"arith\.muli .*: i32$", line) for line in late)


def widths(made: dict[str, Any]) -> dict[str, set[int]]:
    """Bytes a thread moves at a time, by stream."""
    accesses = made["accesses"].items()
    return {
        stream: {width for found in kinds.values() for width in found}
        for stream, kinds in accesses
        if stream in STREAMS
    }


#: Bytes of a stream at a time where registers leave a thread fewer coordinates than 16 bytes hold,
#: by the words kernels' names begin with. Others, among them all in float32 with T <= 3: 16.
NARROWER = {
    ("gram", "torch.bfloat16", "T=8"): 8,
    ("gram", "torch.float64", "T=8"): 8,
    ("update_gram", "torch.float32", "T=8", "kind=0", "clippy"): 8,
    ("update_gram", "torch.bfloat16", "T=2", "kind=0", "adatask"): 8,
    ("update_gram", "torch.bfloat16", "T=2", "kind=0", "clippy"): 8,
    ("apply_and_gram", "torch.float32", "T=8"): 8,
    ("apply_and_gram", "torch.float64", "T=8"): 8,
    ("apply_and_gram", "torch.bfloat16", "T=2"): 8,
    ("apply_and_gram", "torch.bfloat16", "T=8"): 4,
}


def test_streams_are_read_and_written_16_bytes_at_a_time(kernels: dict[str, Any]) -> None:
    seen = set()
    for name, made in kernels.items():
        if name.endswith("gram_tiles"):
            continue
        least = min((n for head, n in NARROWER.items() if begins(name, head)), default=16)
        for stream, found in widths(made).items():
            assert min(found) >= least, (name, stream, found)
            seen.add(stream)
    assert seen >= STREAMS - {"s2"}


def test_tiles_are_fetched_16_bytes_at_a_time(kernels: dict[str, Any]) -> None:
    tiled = {name: made for name, made in kernels.items() if name.endswith("gram_tiles")}
    assert {name.split()[0] for name in tiled} >= {"update_gram", "gram"}
    for name, made in tiled.items():
        assert set(made["accesses"]["grads"]["cp"]) == {16}, name


def test_every_operation_of_perturb_rounds_as_on_the_cpu(kernels: dict[str, Any]) -> None:
    found = starting(kernels, "perturb", "step_constants")
    assert len(found) >= 6
    for name, made in found.items():
        assert made["fused"] == [], name
        assert made["rounded"], name
        assert all(".rn.f" in operation for operation in made["rounded"]), name


def test_a_barrier_stands_between_a_programs_sum_and_its_arrival(kernels: dict[str, Any]) -> None:
    summed = {name: made for name, made in kernels.items() if "partial" in made["accesses"]}
    assert {name.split()[0] for name in summed} >= {"update_gram", "apply_and_gram", "gram"}
    for name, made in summed.items():
        order = made["order"]
        (arrival,) = (k for k, word in enumerate(order) if word.startswith("atom"))
        assert order[arrival] == "atom.global.gpu.acq_rel.add.u32", name
        assert order[arrival - 2 : arrival] == ["st.global", "bar.sync"], name
        assert order[arrival + 1] == "bar.sync", name
        assert "ld.global.cg" in order[arrival:], name
        assert "ld.global.cg" not in order[:arrival], name


def test_the_solvers_maths_is_float64(kernels: dict[str, Any]) -> None:
    found = starting(kernels, "bargaining", "mgda")
    assert len(found) >= 2
    for name, made in found.items():
        assert made["fused"], name
        assert {operation.split(".")[-1] for operation in made["fused"]} == {"f64"}, name
        assert {operation.split(".")[-1] for operation in made["rounded"]} == {"f64"}, name


def test_sums_over_a_matrix_cross_no_threads(kernels: dict[str, Any]) -> None:
    """Thousands of exchanges are what another layout of the matrices makes of them."""
    for name, made in starting(kernels, "bargaining", "mgda").items():
        assert made["exchanges"] <= 300, name

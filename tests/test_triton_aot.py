"""Every Triton kernel builds for the GPUs we name, without one: ahead-of-time compilation.

In a process of its own (aot.py), as this one may be interpreting, and with an empty cache folder.
What Triton's binder makes of the launchers' arguments is part of it.
"""

from __future__ import annotations

from typing import Any

import pytest
from ahead_of_time import compiled

pytest.importorskip("triton")

#: Loads of single weights, and of other programs' sums.
NOT_STREAMS = {"ld.global.b64", "ld.global.cg.b64", "ld.global.cg.v2.b64"}


@pytest.fixture(scope="module", params=[80, 90, 100], ids=lambda arch: f"sm_{arch}")
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Result of compiling, by kernel."""
    return compiled("aot.py", request.param, tmp_path_factory)


def is_tiled(name: str) -> bool:
    return any(f"T={n}" in name for n in (32, 64, 128))


@pytest.mark.slow
def test_compiles_without_spills_and_fits_shared_memory(kernels: dict[str, Any]) -> None:
    assert {name.split()[0] for name in kernels} == {
        "search",
        "delayed",
        "apply",
        "combine",
        "gram",
        "perturb",
    }
    assert {name: made["stack"] for name, made in kernels.items() if made["stack"]} == {}
    # What a program may have on every GPU since sm_80.
    assert max(made["shared"] for made in kernels.values()) <= 99 * 1024


@pytest.mark.slow
def test_numbers_reach_the_kernels_in_double_precision(kernels: dict[str, Any]) -> None:
    for name, made in kernels.items():
        signature = made["signature"]
        assert signature["P"] == signature["stride"] == "i64", name
        numbers = [signature.get(number, "fp64") for number in ("b1", "d2", "c2", "eps", "keep")]
        assert set(numbers) == {"fp64"}, name


@pytest.mark.slow
def test_streams_are_read_and_written_16_bytes_at_a_time(kernels: dict[str, Any]) -> None:
    streaming = {
        name: made
        for name, made in kernels.items()
        if "float32" in name
        and not (name.startswith(("search", "gram")) and is_tiled(name))
        # There a thread takes two coordinates, or tiles.
        and not name.startswith(("delayed torch.float32 T=8", "delayed torch.float32 T=32"))
    }
    assert len(streaming) >= 23
    for name, made in streaming.items():
        loads = {load.split()[0] for load in made["loads"]} - NOT_STREAMS
        assert loads == {"ld.global.v4.b32"}, name
        if not name.startswith(("search", "gram")):
            assert "st.global.v4.b32" in made["stores"], name


@pytest.mark.slow
def test_every_operation_of_perturb_rounds_as_on_the_cpu(kernels: dict[str, Any]) -> None:
    names = [name for name in kernels if name.startswith("perturb")]
    assert len(names) == 8
    for name in names:
        assert kernels[name]["fused"] == [], name
        assert kernels[name]["rounded"], name
        assert all(".rn.f" in operation for operation in kernels[name]["rounded"]), name


@pytest.mark.slow
def test_tiles_are_fetched_16_bytes_at_a_time(kernels: dict[str, Any]) -> None:
    tiled = [name for name in kernels if name.startswith(("search", "gram")) and is_tiled(name)]
    assert len(tiled) == 4
    for name in tiled:
        copies = [load for load in kernels[name]["loads"] if load.startswith("cp.async.cg")]
        assert copies, name
        assert all(", 0x10," in load for load in copies), name


@pytest.mark.slow
def test_a_barrier_stands_between_a_programs_sum_and_its_arrival(kernels: dict[str, Any]) -> None:
    for name, made in kernels.items():
        if name.startswith(("search", "delayed", "gram")):
            order = made["order"]
            (arrival,) = (k for k, word in enumerate(order) if word.startswith("atom"))
            assert order[arrival] == "atom.global.gpu.acq_rel.add.u32", name
            assert order[arrival - 2 : arrival] == ["st.global", "bar.sync"], name
            assert order[arrival + 1] == "bar.sync", name
            assert "ld.global.cg" in order[arrival:], name
            assert "ld.global.cg" not in order[:arrival], name

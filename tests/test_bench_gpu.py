"""The GPU bench runs end to end without a GPU: every case at toy size on the CPU's ops."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from fastmto import ops

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

import gpu
import gpu_floors
import gpu_kernels
import gpu_maths
import gpu_report
import gpu_solvers
import gpu_steps
from gpu_kernels import Buffers, Case
from gpu_timer import CpuTimer, CudaTimer, Progress

TOY = gpu.Plan(
    sizes=(9600, 3200),
    tasks=(2, 3),
    largest=12800,
    solver_tasks=(2, 8),
    models={
        "mmoe": {"embedding": 4, "n_experts": 2, "expert_widths": (6, 4), "tower_widths": (4,)},
        "ple": {
            "embedding": 4,
            "extraction_widths": (6, 4),
            "n_shared_experts": 1,
            "n_task_experts": 1,
            "tower_widths": (4,),
        },
    },
    batch=32,
    rounds=2,
    compiles=lambda maths: maths,  # compiling takes minutes
    bandwidth_numel=10_000,
    seconds=600,
)
ALL = tuple(gpu_floors.TRAFFIC)
BANDWIDTH = {"copy_GB_per_s": 1.0, "write_GB_per_s": 1.0}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """A whole toy run."""
    found: dict[str, Any] = gpu.environment(CpuTimer())
    gpu.run(TOY, gpu.NAMES, CpuTimer(), found)
    return found


@pytest.mark.parametrize("n_tasks", [1, 2, 3, 8, 32])
def test_floors_are_those_of_the_specification(n_tasks: int) -> None:
    numel = 1000
    expected = {
        "search": 4 * (n_tasks + 2),
        "apply": 4 * (n_tasks + 6),
        "delayed": 4 * (n_tasks + 6),
        "combine": 4 * (n_tasks + 1),
        "gram": 4 * n_tasks,
        "check": 4 * n_tasks,
        # AdaTask reads two moments a task, and writes them where the pass moves them.
        "search_adatask": 4 * 3 * n_tasks,
        "apply_adatask": 4 * (5 * n_tasks + 2),
        "delayed_adatask": 4 * (5 * n_tasks + 2),
        # Clippy's factors need the parameters.
        "search_clippy": 4 * (n_tasks + 3),
        "apply_clippy": 4 * (n_tasks + 6),
        "delayed_clippy": 4 * (n_tasks + 3) + 4 * (n_tasks + 6),
        "perturb_given": 4 * (n_tasks + 2),
        "perturb_gaussian": 4 * (n_tasks + 1),
        "perturb_rademacher": 4 * (n_tasks + 1),
    }
    got = {name: gpu_floors.floor_bytes(name, n_tasks, numel) / numel for name in ALL}
    assert got == expected


def test_half_precision_halves_gradients_and_parameters_but_not_moments() -> None:
    assert gpu_floors.floor_bytes("search", 3, 10, 2) == 10 * (2 * 3 + 4 * 2)
    assert gpu_floors.floor_bytes("apply", 3, 10, 2) == 10 * (2 * 3 + 2 * 2 + 4 * 4)
    assert Case("apply", 3, 10, "bfloat16").floor_bytes == 10 * (2 * 3 + 2 * 2 + 4 * 4)


def test_the_readme_has_the_computed_floors() -> None:
    readme = gpu_report.README.read_text()
    block = readme.partition("<!-- gpu floors -->\n")[2].partition("\n<!-- /gpu floors -->")[0]
    assert block == gpu_floors.table()
    # 8 tasks, 1e8 parameters: 5.6 GB at 4.3 TB/s.
    (line,) = (line for line in block.splitlines() if line.startswith("| apply |"))
    assert "| T + 6 |" in line
    assert "| 5,600, 1,302 |" in line


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in ALL), *((name, "bfloat16") for name in gpu.HALF)],
)
def test_a_set_is_as_large_as_it_is_said_to_be(name: str, dtype: str) -> None:
    case = Case(name, 3, 3200, dtype)
    buffers = Buffers(case, torch.device("cpu"), 0)
    assert buffers.bytes == gpu_kernels.set_bytes(case)
    # Nothing is moved that is not there: inputs and outputs once, what is updated twice.
    passes = 2 if name == "delayed_clippy" else 1
    assert buffers.bytes <= case.floor_bytes <= 2 * passes * buffers.bytes


def test_every_case_is_run_checked_and_timed(results: dict[str, Any]) -> None:
    rows = results["passes"]
    assert [row["note"] for row in rows if row["note"]] == []
    assert {row["status"] for row in rows} == {"ok"}
    expected = {
        (name, n_tasks, numel, "float32")
        for name in ALL
        for n_tasks in (2, 3)
        for numel in (9600, 3200)
    }
    expected |= {(name, 2, 12800, "float32") for name in ALL}
    expected |= {(name, n_tasks, 9600, "bfloat16") for name in gpu.HALF for n_tasks in (2, 3)}
    assert {(r["pass"], r["n_tasks"], r["numel"], r["dtype"]) for r in rows} == expected
    assert len(rows) == len(expected)
    for row in rows:
        floor = gpu_floors.floor_bytes(
            row["pass"], row["n_tasks"], row["numel"], 2 if row["dtype"] == "bfloat16" else 4
        )
        assert row["floor_MB"] == floor / 1e6
        assert row["GB_per_s"] == pytest.approx(floor / row["ours_us"] / 1e3)
        copy = results["bandwidth"]["copy_GB_per_s"]
        assert row["fraction_of_copy"] == pytest.approx(row["GB_per_s"] / copy)
        assert row["floor_at_copy_us"] / row["ours_us"] == pytest.approx(row["fraction_of_copy"])
        assert ("fraction_of_write" in row) == row["pass"].startswith("perturb")
        peers = {"eager", "compile"}
        if (row["pass"], row["dtype"]) == ("apply", "float32"):
            peers.add("fused_adam")
        assert {k.removesuffix("_over_ours") for k in row if k.endswith("_over_ours")} == peers
        for peer in peers:
            assert row[f"{peer}_over_ours"] == row[f"{peer}_us"] / row["ours_us"]
        assert row["issued_us"] > 0


def test_every_solver_and_family_is_timed(results: dict[str, Any]) -> None:
    rows = results["solvers"]
    cases = {(row["solver"], row["n_tasks"], row["family"]) for row in rows}
    assert cases == {(s, t, f) for s in gpu.SOLVERS for t in (2, 8) for f in gpu_solvers.FAMILIES}
    for row in rows:
        assert (row["status"], row["note"]) == ("ok", "")
        assert min(row["ours_us"], row["issued_us"], row["host_us"]) > 0


def test_every_way_to_train_is_timed(results: dict[str, Any]) -> None:
    rows = results["steps"]
    expected = [(model, name) for model in ("mmoe", "ple") for name in gpu_steps.NAMES]
    assert [(row["model"], row["contestant"]) for row in rows] == expected
    for row in rows:
        assert (row["status"], row["note"]) == ("ok", "")
        assert min(row["ms"], row["over_adam"], row["over_adam_graph"]) > 0
        alone = "passes" in row["contestant"]
        assert ("share_outside_passes" in row) == (not alone)
        if not alone:
            assert row["share_outside_passes"] < 1
    by_name = {row["contestant"]: row for row in rows}
    assert by_name["adam"]["over_adam"] == by_name["adam_graph"]["over_adam_graph"] == 1


def test_passes_alone_are_those_of_the_same_steps() -> None:
    times = {"passes": [1.0], "T_passes": [2.0], "passes_graph": [10.0], "T_passes_graph": [30.0]}
    assert gpu_steps._passes("adam", times) == [1.0]
    assert gpu_steps._passes("pub_1", times) == [2.0]
    assert gpu_steps._passes("nashmtl_10", times) == pytest.approx([1.1])
    assert gpu_steps._passes("pub_10_graph", times) == pytest.approx([12.0])
    assert gpu_steps._passes("adam_graph", times) == [10.0]
    assert gpu_steps._passes("T_passes", times) is gpu_steps._passes("passes_graph", times) is None
    assert gpu_steps._passes("pub_1", {"passes": [1.0]}) is None


def test_the_models_have_the_papers_sizes() -> None:
    """9,988,096 shared parameters of the MMOE beside the table, with batch normalisation."""
    model = gpu_steps.make_model("mmoe", gpu_steps.SIZES["mmoe"], torch.device("cpu"))
    shared = sum(p.numel() for p in model.shared_parameters())
    table = 128 * sum(gpu_steps.FIELD_SIZES)
    assert shared - table + 8 * 2 * (512 + 256) == 9_988_096
    own = sum(p.numel() for task in model.task_parameters() for p in task)
    assert own + 2 * 2 * (128 + 64) == 118_034
    dense, ids, labels = gpu_steps.make_batches(50, torch.device("cpu"))[0]
    assert (dense.shape, ids.shape, labels.shape) == ((50, 63), (50, 16), (50, 2))
    assert sum(gpu_steps.FIELD_SIZES) == 496
    assert int(ids.min()) >= 0
    assert int(ids.max()) < 496


def spoiled(op: Callable[..., None], at: Callable[[tuple, dict], torch.Tensor]) -> Callable:
    """The op, whose last output element is a little off."""

    def wrong(*args: Any, **options: Any) -> None:
        op(*args, **options)
        at(args, options).view(-1)[-1:].mul_(1.001)

    return wrong


OUTPUTS: dict[str, tuple[str, Callable[[tuple, dict], torch.Tensor]]] = {
    "search": ("update_gram", lambda args, _: args[4]),
    "search_clippy": ("update_gram", lambda _, options: options["sigma"]),
    "search_adatask": ("update_gram", lambda args, _: args[4]),
    "apply": ("apply", lambda args, _: args[4]),
    "apply_clippy": ("apply", lambda args, _: args[3][0]),
    "apply_adatask": ("apply", lambda args, _: args[3][1]),
    "delayed": ("apply_and_gram", lambda args, _: args[6]),
    "delayed_clippy": ("apply_and_gram", lambda args, _: args[4]),
    "delayed_adatask": ("apply_and_gram", lambda args, _: args[3][0]),
    "combine": ("combine", lambda args, _: args[2]),
    "gram": ("gram", lambda args, _: args[1]),
    "perturb_given": ("perturb", lambda args, _: args[1]),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_kernel_that_is_wrong_is_not_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, at = OUTPUTS[name]
    monkeypatch.setattr(ops, op, spoiled(getattr(ops, op), at))
    row = gpu_kernels.measure(Case(name, 3, 3200), CpuTimer(), bandwidth=BANDWIDTH)
    assert row["status"] == "wrong"
    assert "allowed" in str(row["note"])
    assert "ours_us" not in row


def test_a_check_that_sees_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "check", lambda grads, found: None)
    row = gpu_kernels.measure(Case("check", 2, 1600), CpuTimer(), bandwidth=BANDWIDTH)
    assert row["status"] == "wrong"
    assert "the last element NaN" in str(row["note"])


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_directions_of_another_seed_are_wrong(
    distribution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    perturb = ops.perturb
    monkeypatch.setattr(ops, "perturb", lambda *a, **k: perturb(*a, **{**k, "seed": 2}))
    case = Case(f"perturb_{distribution}", 2, 3200)
    row = gpu_kernels.measure(case, CpuTimer(), bandwidth=BANDWIDTH)
    assert row["status"] == "wrong"
    assert "bits of direction 0" in str(row["note"])


def test_weights_that_solve_nothing_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in gpu.SOLVERS:
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, spoiled(op, lambda args, _: args[1]))
        row = gpu_solvers.measure_solver(name, 3, "easy", CpuTimer())
        assert row["status"] == "wrong"
        assert "ours_us" not in row


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("name", ["search_clippy", "apply_adatask", "gram", "perturb_rademacher"])
def test_one_compiled_function_serves_every_size(name: str) -> None:
    torch.compiler.reset()
    traced = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        traced.append(graph)
        return graph.forward

    compiled = torch.compile(gpu_maths.fused(name), backend=backend)
    for numel in (9600, 3200, 1600 * 5):
        case = Case(name, 3, numel)
        row = gpu_kernels.measure(case, CpuTimer(), bandwidth=BANDWIDTH, compiled=compiled)
        assert (row["status"], row["note"]) == ("ok", "")
    assert len(traced) == 1


@pytest.mark.parametrize("kind", [RuntimeError, triton.TritonError, AttributeError])
def test_a_peer_that_fails_is_left_out_and_named(kind: type[Exception]) -> None:
    def broken(*tensors: torch.Tensor) -> torch.Tensor:
        raise kind("does not compile")

    case = Case("gram", 2, 1600)
    row = gpu_kernels.measure(case, CpuTimer(), bandwidth=BANDWIDTH, compiled=broken)
    assert (row["status"], row["note"]) == ("ok", "compile: does not compile")
    assert "eager_over_ours" in row
    assert "compile_over_ours" not in row


def test_a_peer_that_is_wrong_is_left_out_and_named() -> None:
    case = Case("gram", 2, 1600)
    doubled = lambda g: 2 * gpu_maths.gram(g, fused=True)  # noqa: E731
    row = gpu_kernels.measure(case, CpuTimer(), bandwidth=BANDWIDTH, compiled=doubled)
    assert row["status"] == "ok"
    assert str(row["note"]).startswith("compile: gram: off by")


class Small(CpuTimer):
    """A device with little memory and a large cache."""

    cache_bytes = 100_000

    def free_bytes(self) -> int | None:
        return 100_000


def test_what_does_not_fit_is_skipped_and_said_so() -> None:
    small = Small()
    row = gpu_kernels.measure(Case("search", 2, 1600), small, bandwidth=BANDWIDTH)
    assert row["status"] == "skipped"
    assert "GB are free" in str(row["note"])
    assert small.n_sets(300_000) == 2
    assert small.n_sets(10_000) == 40


def test_no_case_is_begun_late(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = gpu.environment(CpuTimer())
    plan = gpu.Plan(**{**vars(TOY), "seconds": -1.0})
    gpu.run(plan, ("gram",), CpuTimer(), found)
    assert {row["note"] for row in found["passes"]} == {"no time left"}
    assert "no time left" in gpu_report.tables(found)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bench believes in a GPU, with toy sizes; results and README in a folder of the test."""
    readme = tmp_path / "README.md"
    readme.write_text(gpu_report.README.read_text())
    write = gpu_report.write
    monkeypatch.setattr(gpu_report, "write", lambda block, text: write(block, text, readme))
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "CudaTimer", CpuTimer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    few = {"models": {"mmoe": TOY.models["mmoe"]}, "sizes": (3200,), "largest": None}
    plan = gpu.Plan(**{**vars(TOY), **few, "compiles": None})
    monkeypatch.setattr(gpu, "FULL", plan)
    monkeypatch.setattr(gpu, "QUICK", plan)
    return tmp_path


def test_a_run_writes_its_figures_and_the_table(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main([]) == 0
    results = json.loads((files / "gpu-cpu.json").read_text())
    for key in ("device", "date", "torch", "triton", "numpy", "python", "bandwidth", "seconds"):
        assert key in results
    printed = capsys.readouterr().out.rstrip("\n")
    assert printed == gpu_report.tables(results)
    readme = (files / "README.md").read_text()
    assert printed in readme
    assert gpu_floors.table() in readme
    assert "No GPU figure has been measured yet" not in readme
    # The same from a file of figures, without measuring.
    (files / "README.md").write_text(gpu_report.README.read_text())
    (files / "gpu-cpu.json").rename(files / "elsewhere.json")
    assert gpu.main(["--from", str(files / "elsewhere.json")]) == 0
    assert capsys.readouterr().out.rstrip("\n") == printed
    assert (files / "README.md").read_text() == readme
    assert (files / "gpu-cpu.json").read_text() == (files / "elsewhere.json").read_text()


@pytest.mark.parametrize("options", ["--no-write", "--quick", "--only search --only mgda"])
def test_a_part_or_a_look_writes_nothing(files: Path, options: str) -> None:
    before = (files / "README.md").read_text()
    arguments = [*options.split(), "--json", str(files / "figures.json")]
    if options != "--only search --only mgda":
        arguments += ["--only", "gram"]
    assert gpu.main(arguments) == 0
    assert (files / "README.md").read_text() == before
    assert not (files / "gpu-cpu.json").exists()
    results = json.loads((files / "figures.json").read_text())
    ran = {row["pass"] for row in results["passes"]} | {r["solver"] for r in results["solvers"]}
    assert ran == ({"search", "mgda"} if "mgda" in options else {"gram"})


def test_a_wrong_kernel_ends_the_run_with_1(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ops, "gram", spoiled(ops.gram, lambda args, _: args[1]))
    assert gpu.main(["--only", "gram", "--only", "search"]) == 1
    assert "wrong: gram: off by" in capsys.readouterr().out


def test_ctrl_c_keeps_what_is_finished(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "apply", interrupt)
    figures = files / "figures.json"
    arguments = ["--only", "search", "--only", "apply", "--json", str(figures)]
    assert gpu.main(arguments) == 130
    assert {row["pass"] for row in json.loads(figures.read_text())["passes"]} == {"search"}
    assert "| search | 2 |" in capsys.readouterr().out


def test_without_a_gpu_there_is_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_the_floors_are_printed_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--floors", "--no-write"]) == 0
    assert capsys.readouterr().out == gpu_floors.table() + "\n"


def test_figures_are_named_by_the_device() -> None:
    assert gpu.results_path("NVIDIA H200").name == "gpu-nvidia-h200.json"
    assert gpu.results_path("AMD Instinct MI300X (gfx942)").name == (
        "gpu-amd-instinct-mi300x-gfx942.json"
    )


def test_a_readme_without_the_place_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("<!-- gpu floors -->\n")
    with pytest.raises(ValueError, match="must hold <!-- gpu floors --> and then"):
        gpu_report.write("floors", "table", path)


def test_aims_are_compared_with_the_worst_case(results: dict[str, Any]) -> None:
    def row(name: str, n_tasks: int, fraction: float) -> dict[str, Any]:
        return {
            "pass": name, "dtype": "float32", "n_tasks": n_tasks, "numel": 10**8, "status": "ok",
            "note": "", "ours_us": 1.0, "GB_per_s": 1.0, "fraction_of_copy": fraction,
            "fraction_of_write": fraction / 2,
        }  # fmt: skip

    rows = [row("search", 2, 0.95), row("search", 32, 0.5), row("perturb_given", 2, 0.9)]
    text = gpu_report.tables({**results, "passes": rows})
    assert "| search over copy, P >= 1e8, worst T | >= .90 | 0.5 |" in text
    assert "| apply over copy, P >= 1e8, worst T | >= .85 | not run |" in text
    assert "| perturb over write, P >= 1e8, worst | >= .85 | 0.45 |" in text
    pub = next(r for r in results["steps"] if r["contestant"] == "pub_10" and r["model"] == "mmoe")
    assert f"| MMOE, PUB every 10 over equal weights | <= 1.06 | {pub['over_adam']:.3g} |" in text


def test_progress_without_tqdm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    progress = Progress(2)
    progress.at("one")
    progress.advance()
    progress.say("note")
    progress.at("two")
    progress.close()
    assert capsys.readouterr().err == "1/2 one\nnote\n2/2 two\n"


class FakeCuda(CudaTimer):
    """CUDA's events and graphs replaced: a call takes `each` seconds, a launch 1 us more a call."""

    cache_bytes = 1000

    def __init__(self, each: float) -> None:
        self.device = torch.device("cpu")
        self.each = each
        self.order: list[int] = []
        self.graphs: list[int] = []
        self.in_graph = False

    def contestant(self, i: int) -> None:
        self.order.append(i)

    def _events(self, work: Callable[[], object]) -> float:
        before = len(self.order)
        work()
        return (len(self.order) - before) * (self.each + (0 if self.in_graph else 1e-6))

    def _graph_of(self, work: Callable[[], object]) -> Callable[[], object]:
        before = len(self.order)
        work()
        self.in_graph = True
        self.graphs.append(len(self.order) - before)
        calls = self.order[before:]
        return lambda: self.order.extend(calls)


@pytest.mark.parametrize(("each", "graph"), [(4e-6, 501), (1e-3, 3), (1e-7, 2000), (4e-3, None)])
def test_short_calls_are_timed_in_graphs_long_enough_and_long_ones_are_not(
    each: float, graph: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    timer = FakeCuda(each)
    # A round lasts 2 ms or more, over all sets in turn.
    assert timer.seconds(timer.contestant, 3) == pytest.approx(each, rel=1e-3)
    assert timer.graphs == ([] if graph is None else [3, graph])
    assert timer.order[:3] == [0, 1, 2]
    assert all(b == (a + 1) % 3 for a, b in itertools.pairwise(timer.order[-3:]))
    assert timer.n_sets(500) == 8


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_toy_run_on_the_device() -> None:
    found: dict[str, Any] = gpu.environment(CudaTimer())
    gpu.run(TOY, gpu.NAMES, CudaTimer(), found)
    rows = [*found["passes"], *found["solvers"], *found["steps"]]
    assert [row for row in rows if row["status"] != "ok" or row["note"]] == []
    assert found["bandwidth"]["copy_GB_per_s"] > 0

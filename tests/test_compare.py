"""`fastmto compare`: runs in processes of their own, their table, what a Ctrl-C leaves."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fastmto
from fastmto.experiments import compare
from fastmto.experiments.cli import main
from fastmto.experiments.compare import Compared, load_data, peak_memory, save_data, spread
from fastmto.experiments.data import MultiTaskData, load_digits
from fastmto.experiments.experiment import Experiment
from fastmto.experiments.tables import compare_table
from fastmto.experiments.workers import Interrupted, Workers, tick


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def small(epochs: int = 1) -> tuple[Experiment, MultiTaskData]:
    data = load_digits(n_train=256, n_validation=50, n_test=50)
    sizes = {"embedding": 16, "bottom": (16,), "tower_widths": (8,)}
    return Experiment("digits", "shared_bottom", sizes, epochs, 32, 1e-2, 0.0, None), data


def test_a_table_over_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "compare --balancers equal,mgda_ub --seeds 2 --epochs 1 --batch-size 1024"
    assert main([*arguments.split(), "--json", "c.json"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("balancer"))
    assert "upper left accuracy" in lines[head]
    assert lines[head + 2].split()[0] == "equal"
    assert lines[head + 3].split()[0] == "mgda_ub"
    assert "80/80" in err
    assert (tmp_path / "fastmto-compare.png").read_bytes().startswith(b"\x89PNG")

    report = json.loads((tmp_path / "c.json").read_text())
    assert report["config"]["seeds"] == [0, 1]
    equal, mgda = report["balancers"]
    assert [run["seed"] for run in mgda["runs"]] == [0, 1]
    scores = [run["epochs"][-1]["test"]["upper left"] for run in mgda["runs"]]
    assert mgda["test"]["upper left"]["mean"] == pytest.approx(np.mean(scores))
    assert mgda["test"]["upper left"]["std"] == pytest.approx(np.std(scores, ddof=1))
    assert equal["relative_step"] == pytest.approx(1)
    assert mgda["relative_step"] > 0
    if sys.platform == "linux":
        assert 50e6 < equal["peak_bytes"] < 5e9
    assert mgda["runs"][0]["stats"]["steps"] == 20


def test_runs_are_those_of_train() -> None:
    """The same experiment in this process and in a worker gives the same figures."""
    experiment, data = small()
    save_data(data, Path("data.pt"))
    rows: list[Compared] = []
    compare.compare(
        experiment,
        ["nashmtl"],
        {3: Path("data.pt")},
        "cpu",
        1,
        lambda name, steps: None,
        lambda so_far: rows.extend(so_far),
    )
    here = experiment.train(data, "nashmtl", seed=3)
    (there,) = rows[0].results
    assert np.array_equal(here.steps.losses, there.steps.losses)
    assert here.epochs[-1].test == there.epochs[-1].test


def test_data_come_back_as_they_were() -> None:
    _, data = small()
    save_data(data, Path("data.pt"))
    back = load_data(Path("data.pt"))
    assert (back.name, back.tasks, back.field_sizes) == (data.name, data.tasks, data.field_sizes)
    for part in ("train", "validation", "test"):
        for one, other in zip(
            vars(getattr(data, part)).values(), vars(getattr(back, part)).values(), strict=True
        ):
            assert torch.equal(one, other)


def test_a_failing_balancer_is_a_line_and_the_others_go_on() -> None:
    experiment, data = small()
    save_data(data, Path("data.pt"))
    rows: list[Compared] = []

    def keep(so_far: list[Compared]) -> None:
        rows[:] = so_far

    names = ["no_such", "equal"]
    paths = {0: Path("data.pt")}
    compare.compare(experiment, names, paths, "cpu", 1, lambda name, steps: None, keep)
    assert rows[0].failure is not None
    assert "balancer must be one of" in rows[0].failure
    assert [len(row.results) for row in rows] == [0, 1]
    text = compare_table(rows, "cpu").splitlines()
    assert "nan" in text[2]
    assert text[3].startswith("equal")


def test_spread() -> None:
    assert spread([2.0, 4.0]) == pytest.approx((3.0, math.sqrt(2)))
    assert spread([5.0])[0] == 5.0
    assert math.isnan(spread([5.0])[1])
    assert all(math.isnan(x) for x in spread([]))


SCRIPT = """
import sys, torch
from fastmto.experiments.compare import peak_memory
base = peak_memory(torch.device("cpu"))
x = torch.ones(int(sys.argv[1]))
del x
print(peak_memory(torch.device("cpu")) - base)
"""


@pytest.mark.skipif(
    peak_memory(torch.device("cpu")) is None, reason="the system does not say what a process took"
)
def test_peak_memory_remembers_what_is_gone() -> None:
    n = 50_000_000
    environment = {**os.environ, "PYTHONPATH": str(Path(fastmto.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(n)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert float(done.stdout) == pytest.approx(4 * n, rel=0.1)


@pytest.mark.skipif(os.name != "posix", reason="sends signals to processes")
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_the_finished_runs(end: signal.Signals) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(fastmto.__file__).parent.parent)}
    arguments = "compare --balancers equal,famo --seeds 1 --epochs 8 --batch-size 256"
    process = subprocess.Popen(
        [sys.executable, "-m", "fastmto", *arguments.split(), "--json", "c.json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not Path("c.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    if end == signal.SIGINT:
        os.killpg(process.pid, end)  # as a terminal does: to the workers, too
    else:
        process.send_signal(end)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "interrupted: 1 of 2 runs finished" in err
    assert "Traceback" not in err
    assert any(line.startswith("equal") for line in out.splitlines())
    (only,) = [row for row in json.loads(Path("c.json").read_text())["balancers"] if row["runs"]]
    assert only["balancer"] == "equal"


def count_to(n: int) -> int:
    for _ in range(n):
        tick()
    return n


def count_for_ever() -> None:
    while True:
        tick()
        time.sleep(0.01)


def test_workers_count_steps_and_stop_when_left() -> None:
    heard: list[int] = []
    with Workers(1, None) as workers:
        (job,) = workers.finished([workers.submit(count_to, 7)], heard.append)
        endless = workers.submit(count_for_ever)
    assert job.result() == heard[-1] == 7
    assert endless.cancelled() or isinstance(endless.exception(), Interrupted)
    tick()  # no worker here: nothing happens

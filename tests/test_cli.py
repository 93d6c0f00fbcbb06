"""The command, in-process: results, files, mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastmto
from fastmto import available
from fastmto.experiments.arguments import BALANCERS, DEFAULTS, EXTRAS, MODELS
from fastmto.experiments.cli import main


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def picture_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


def test_train_without_arguments_but_short(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["train", "--epochs", "1"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("balancer"))
    for word in ("upper left accuracy", "lower right accuracy", "mean", "ms a step", "balancing*"):
        assert word in lines[head]
    equal, pub = lines[head + 2].split(), lines[head + 3].split()
    assert (equal[0], pub[0]) == ("equal", "pub")
    assert float(equal[3]) == pytest.approx((float(equal[1]) + float(equal[2])) / 2, abs=1e-4)
    assert min(float(x) for x in equal[1:3] + pub[1:3]) > 0.75
    assert equal[-1] == "-"
    assert pub[-1] == "%"
    assert "picture: fastmto-train.png" in out
    assert "80/80" in err
    assert min(picture_size(tmp_path / "fastmto-train.png")) > 600


def test_picture_has_ink_of_every_run(tmp_path: Path) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    from fastmto.experiments.plot import _COLORS

    assert main(["train", "--epochs", "1", "--plot", "a.png"]) == 0
    pixels = imread(tmp_path / "a.png")[:, :, :3]
    for color in _COLORS[:2]:
        assert (abs(pixels - to_rgb(color)).max(axis=2) < 0.02).sum() > 500


def test_json_holds_the_run(tmp_path: Path) -> None:
    arguments = (
        "train --epochs 1 --balancer pub --update-weights-every 4 --model mmoe "
        "--batch-size 512 --lr 0.002 --seed 3 --json r.json --plot p.png"
    )
    assert main(arguments.split()) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    config = report["config"]
    assert config["model"] == "mmoe"
    assert config["balancers"] == ["pub"]
    assert (config["update_weights_every"], config["batch_size"]) == (4, 512)
    assert (config["lr"], config["seed"], config["epochs"]) == (0.002, 3, 1)
    assert config["rows"]["train"] == 20_480
    assert report["versions"]["torch"] == torch.__version__
    (run,) = report["runs"]
    assert run["steps"]["backwards"] == [2, 1, 1, 1] * 10
    assert run["stats"]["searches"] == 10
    assert set(run["epochs"][0]["test"]) == {"upper left", "lower right"}


def census_line(number: int) -> str:
    """A row in the published layout whose labels follow from age and sex."""
    from fastmto.experiments.data.census import COLUMNS, DENSE

    old, male = number % 3 == 0, number % 2 == 0
    values = {name: "0" if name in DENSE else "x" for name in COLUMNS}
    values |= {"age": "60" if old else "20", "sex": "Male" if male else "Female"}
    values["marital_stat"] = "Widowed" if old else "Never married"
    values["income_50k"] = "50000+." if male else "- 50000."
    return ", ".join(values.values()) + "\n"


def test_census_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, n in (("census-income.data", 600), ("census-income.test", 80)):
        (tmp_path / name).write_text("".join(census_line(i) for i in range(n)))
    arguments = "train --data census --root . --epochs 6 --batch-size 32 --model shared_bottom"
    assert main(arguments.split()) == 0
    out = capsys.readouterr().out
    assert "census, shared_bottom" in out
    rows = [line.split() for line in out.splitlines() if line.startswith(("equal", "pub"))]
    assert [row[0] for row in rows] == ["equal", "pub"]
    assert all(row[1:4] == ["1.0000"] * 3 for row in rows)


def test_train_knows_every_balancer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, n in (("census-income.data", 300), ("census-income.test", 80)):
        (tmp_path / name).write_text("".join(census_line(i) for i in range(n)))
    arguments = "train --data census --root . --epochs 1 --batch-size 25 --model mmoe --balancer"
    assert main([*arguments.split(), *BALANCERS]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("---")) + 1
    rows = [line.split() for line in lines[start : start + len(BALANCERS)]]
    assert [row[0] for row in rows] == list(BALANCERS)
    assert all(0 <= float(score) <= 1 for row in rows for score in row[1:4])


def test_an_interrupted_train_keeps_what_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastmto.experiments import train

    steps = []

    def one_step(*arguments: object) -> object:
        steps.append(1)
        if len(steps) == 100:  # in the second run
            raise KeyboardInterrupt
        return stepped(*arguments)

    stepped = train.one_step
    monkeypatch.setattr(train, "one_step", one_step)
    arguments = "train --epochs 1 --balancer equal famo nashmtl --json r.json"
    assert main(arguments.split()) == 130
    out, err = capsys.readouterr()
    assert "interrupted: 1 of 3 runs finished" in err
    assert [line.split()[0] for line in out.splitlines() if line.startswith("equal")] == ["equal"]
    (run,) = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert run["balancer"] == "equal"
    assert min(picture_size(tmp_path / "fastmto-train.png")) > 600


def test_a_failing_balancer_keeps_what_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastmto.balancers import FAMO

    def refuse(*arguments: object) -> None:
        raise ValueError("losses[1] must be > 0")

    monkeypatch.setattr(FAMO, "update", refuse)
    assert main(["train", "--epochs", "1", "--balancer", "equal", "famo", "ls"]) == 1
    out, err = capsys.readouterr()
    message = "fastmto train: error: famo: losses[1] must be > 0; 1 of 3 runs finished"
    assert message in err
    assert "equal" in out


def mistake(arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that must end with status 2."""
    with pytest.raises(SystemExit) as info:
        main(arguments.split())
    assert info.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "fastmto: error: the following arguments are required"),
        ("fly", "invalid choice: 'fly'"),
        ("train --epochs 0", "argument --epochs: must be a whole number >= 1, got '0'"),
        ("train --epochs 1.5", "argument --epochs: must be a whole number >= 1, got '1.5'"),
        ("train --batch-size -4", "argument --batch-size: must be a whole number >= 1, got '-4'"),
        ("train --update-weights-every 0", "argument --update-weights-every: must be"),
        ("train --lr nan", "argument --lr: must be a number > 0, got 'nan'"),
        ("train --lr 0", "argument --lr: must be a number > 0, got '0'"),
        ("train --seed -1", "argument --seed: must be a whole number >= 0, got '-1'"),
        ("train --balancer nash", "argument --balancer: invalid choice: 'nash'"),
        ("train --balancer pub pub", "argument --balancer: named twice in pub pub"),
        ("train --model cnn", "argument --model: invalid choice: 'cnn'"),
        ("train --device abacus", "argument --device: 'abacus' is not available here"),
        ("train --device meta", "argument --device: must be cpu, cuda or cuda:N, got 'meta'"),
        ("train --device cuda:99", "argument --device: 'cuda:99' is not available here"),
        ("train --json no/such/a.json", "argument --json: there is no folder no/such"),
        ("train --plot .", "argument --plot: . is a folder"),
        ("train --plot picture.abc", "argument --plot: the name must end in one of"),
        ("train --root .", "argument --root: digits are embedded"),
        ("train --data census", '--data census needs --root DIR. Get "Census-Income (KDD)"'),
        ("train --data census --root nowhere", "no census-income.data, census-income.data.gz or"),
        ("compare --balancers pub,nash", "argument --balancers: invalid choice: 'nash' (all, or"),
        ("compare --balancers pub,pub", "argument --balancers: named twice in pub,pub"),
        ("compare --seeds 0", "argument --seeds: must be a whole number >= 1, got '0'"),
        ("compare --root .", "argument --root: digits are embedded"),
        ("compare --data census", '--data census needs --root DIR. Get "Census-Income (KDD)"'),
        ("toy --balancers equal", "argument --balancers: invalid choice: 'equal'"),
        ("toy --s -1", "argument --s: must be a number > 0, got '-1'"),
        ("toy --steps 0", "argument --steps: must be a whole number >= 1, got '0'"),
        ("toy --plot picture.abc", "argument --plot: the name must end in one of"),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in mistake(arguments, capsys)


def test_damaged_census_ends_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("census-income.data", "census-income.test"):
        (tmp_path / name).write_text("1, 2\n")
    message = mistake("train --data census --root .", capsys)
    assert "census-income.data, line 1: expected 42 fields" in message


@pytest.mark.parametrize("package", ["sklearn", "matplotlib", "tqdm"])
def test_absent_extras_are_named(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = mistake("train", capsys)
    assert f'{package} not installed: pip install "fastmto[train]"' in message


EXPERIMENT = "--data --root --model --update-weights-every --epochs --batch-size --lr --device"


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("train", f"--balancer --seed {EXPERIMENT}"),
        ("compare", f"--balancers --seeds {EXPERIMENT}"),
        ("toy", "--balancers --s --lr --steps --processes"),
    ],
)
def test_help_names_every_option_and_balancer(
    verb: str, options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as info:
        main([verb, "--help"])
    assert info.value.code == 0
    out = capsys.readouterr().out
    assert [option for option in [*options.split(), "--json", "--plot"] if option not in out] == []
    assert [name for name in available() if name not in out] == []


def test_defaults_of_every_data_set_name_every_model() -> None:
    for defaults in DEFAULTS.values():
        assert defaults.model in MODELS
        assert set(defaults.sizes) == set(MODELS)
    assert set(EXTRAS) == {*DEFAULTS, "toy"}


def test_every_balancer_of_the_command_exists() -> None:
    from fastmto.experiments.optimizers import balancer

    assert all(callable(balancer(name, lr=1e-3)) for name in BALANCERS)
    with pytest.raises(ValueError, match="balancer must be one of") as caught:
        balancer("fly", lr=1e-3)
    assert str(caught.value).split("one of ")[1] == f"{', '.join(BALANCERS)}, got 'fly'"


@pytest.mark.parametrize("words", ["--help", "--version", "train --help", "compare --help", "fly"])
def test_answers_without_torch(words: str) -> None:
    """In a Python in which importing torch, or numpy, is an error."""
    program = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'numpy'))); "
        "from fastmto.experiments.cli import main; main(sys.argv[1:])"
    )
    done = in_a_new_process(["-c", program, *words.split()], check=False)
    expected = {"--version": f"fastmto {fastmto.__version__}", "fly": "fastmto: error"}
    assert (done.stdout or done.stderr).startswith(expected.get(words, "usage: fastmto"))
    assert done.returncode == (2 if words == "fly" else 0)


def test_python_dash_m() -> None:
    assert in_a_new_process(["-m", "fastmto", "--help"]).stdout.startswith("usage: fastmto")


def in_a_new_process(words: list[str], check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PYTHONPATH": str(Path(fastmto.__file__).parent.parent), "PATH": ""},
        check=check,
    )

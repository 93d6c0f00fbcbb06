"""The toy problem's formulas at known points, runs on it, and `fastmto toy`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastmto
from fastmto.experiments import toy
from fastmto.experiments.cli import main
from fastmto.experiments.optimizers import SummedLosses
from fastmto.experiments.tables import toy_table


def by_hand(x1: float, x2: float, s: float) -> tuple[float, float]:
    """The formulas with Python's floats, written out once more."""
    t = math.tanh(x2)
    c1, c2 = max(math.tanh(x2 / 2), 0), max(-math.tanh(x2 / 2), 0)
    f1 = c1 * (math.log(max(abs(0.5 * (-x1 - 7) + t), 5e-6)) + 6)
    f1 += c2 * (((7 - x1) ** 2 + 0.1 * (x2 + 8) ** 2) / 10 - 20)
    f2 = c1 * (math.log(max(abs(0.5 * (-x1 + 3) - t + 2), 5e-6)) + 6)
    f2 += c2 * (((x1 + 7) ** 2 + 0.1 * (x2 + 8) ** 2) / 10 - 20)
    return s * f1, f2


@pytest.mark.parametrize("s", [1.0, 0.1])
@pytest.mark.parametrize("point", [*toy.STARTS.values(), (-5.0, 50.0), (3.0, -8.3552)])
def test_losses_at_points(point: tuple[float, float], s: float) -> None:
    got = toy.losses(torch.tensor(point, dtype=torch.float64), s)
    assert got.tolist() == pytest.approx(by_hand(*point, s), abs=1e-12)


def test_the_logarithm_is_cut_off() -> None:
    x = torch.tensor([-5.0, 50.0], dtype=torch.float64)  # |(-x1 - 7)/2 + 1| = 0
    assert float(toy.losses(x)[0]) == pytest.approx(math.log(5e-6) + 6)


def test_the_optimum_is_pareto_stationary_and_balanced() -> None:
    x = torch.tensor(toy.OPTIMUM_POINT, dtype=torch.float64, requires_grad=True)
    losses = toy.losses(x)
    assert losses.tolist() == pytest.approx(toy.OPTIMUM, abs=1e-4)
    gradients = [torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in losses]
    assert torch.allclose(gradients[0] + gradients[1], torch.zeros(2).double(), atol=1e-4)


def test_many_points_at_once() -> None:
    points = torch.tensor(list(toy.STARTS.values()), dtype=torch.float64)
    assert torch.equal(toy.losses(points)[2], toy.losses(points[2]))


@pytest.mark.parametrize("s", [1.0, 0.1])
def test_gradients_by_hand_are_those_of_autograd(s: float) -> None:
    torch.manual_seed(0)
    points = (torch.rand(200, 2, dtype=torch.float64) - 0.5) * torch.tensor([24.0, 24.0])
    on_edges = torch.tensor([*toy.STARTS.values(), (-5.0, 50.0), (1.0, 50.0)], dtype=torch.float64)
    by_hand = toy.ShiftedLosses(s, torch.float64)
    for point in torch.cat([points, on_edges]):
        x = point.clone().requires_grad_()
        expected = toy.losses(x, s)
        shifted = by_hand(x)
        for i in range(2):
            floor = toy.SHIFT * (s if i == 0 else 1)
            assert shifted[i].item() > 0
            assert shifted[i].item() - floor == pytest.approx(expected[i].item(), abs=1e-12)
            (ours,) = torch.autograd.grad(shifted[i], x, retain_graph=True)
            (theirs,) = torch.autograd.grad(expected[i], x, retain_graph=True)
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
        (both,) = torch.autograd.grad(3 * shifted[0] + shifted[1], x)
        (other,) = torch.autograd.grad(3 * expected[0] + expected[1], x)
        torch.testing.assert_close(both, other, rtol=1e-12, atol=1e-13)


def test_losses_without_a_graph_and_in_float32() -> None:
    x = torch.tensor(toy.STARTS["D"])
    shifted = toy.ShiftedLosses(0.1, torch.float32)(x)
    assert not any(loss.requires_grad for loss in shifted)
    expected = toy.losses(x.double(), 0.1) + toy.SHIFT * torch.tensor([0.1, 1.0])
    torch.testing.assert_close(torch.stack(shifted), expected.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_small_adam_is_torchs_bit_for_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours, theirs = (
        [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((2,), (), ())]
        for _ in range(2)
    )
    small = toy.Adam([(ours[:1], 1e-3), (ours[1:], 0.025)])
    groups = [{"params": theirs[:1]}, {"params": theirs[1:], "lr": 0.025}]
    adam = torch.optim.Adam(groups, lr=1e-3, fused=True)
    for step in range(50):
        small.zero_grad()
        adam.zero_grad()
        for k, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            if k < 2 or step % 3 == 0:  # without a gradient a parameter and its moments stay
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
        small.step()
        adam.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def adam(shared: list[torch.nn.Parameter], heads: list[list[torch.nn.Parameter]]) -> SummedLosses:
    assert heads == [[], []]
    return SummedLosses(torch.optim.Adam(shared, lr=3e-2), 2)


def test_run_records_the_way() -> None:
    way = toy.run(adam, "B", steps=25, s=0.1, every=10)
    assert way.points.shape == (4, 2)  # the start, 10, 20 and 25
    assert way.points[0].tolist() == [0.0, 0.0]
    assert torch.equal(way.losses, toy.losses(way.points, 0.1))
    assert way.losses[-1].sum() < way.losses[0].sum()


def test_equal_weights_end_where_the_public_code_does() -> None:
    # From B at s = .1: (-.380, -19.828), here with a thirty times larger step.
    way = toy.run(adam, "B", steps=2500, s=0.1, every=2500)
    assert way.losses[-1].tolist() == pytest.approx([-0.380, -19.828], abs=5e-3)


def test_an_unknown_start() -> None:
    with pytest.raises(ValueError, match="start must be one of A, B, C, D, E or a point, got 'F'"):
        toy.run(adam, "F", steps=1)


# At the optimum the updates oppose each other exactly: keeping the last weights is right there.
@pytest.mark.filterwarnings("ignore:weights held")
@pytest.mark.parametrize("start", toy.STARTS)
def test_pub_reaches_the_optimum_from_every_start(start: str) -> None:
    """PUB's figure, s = 1, with the paper's literal weights at every step."""

    def pub(shared: list[torch.nn.Parameter], heads: list[list[torch.nn.Parameter]]) -> fastmto.PUB:
        return fastmto.PUB(shared, heads, lr=5e-2, update_weights_every=1, scale="none")

    way = toy.run(pub, start, steps=600, every=600)
    assert way.losses[-1].tolist() == pytest.approx(toy.OPTIMUM, abs=0.3)
    assert way.points[-1].tolist() == pytest.approx(toy.OPTIMUM_POINT, abs=0.2)


# Opposite or vanishing gradients keep the last weights; counted as "held".
@pytest.mark.filterwarnings("ignore:weights held")
@pytest.mark.parametrize("name", fastmto.available())
def test_every_method_gets_somewhere(name: str) -> None:
    for start in toy.STARTS:
        make = toy.method(name, lr=0.05)
        way = toy.run(make, start, steps=40, s=0.1, dtype=torch.float64, every=10)
        assert way.stats["steps"] == way.steps == 40
        assert way.losses.isfinite().all()
        # No method may have made both tasks worse.
        assert (way.losses[-1] < way.losses[0]).any()


@pytest.mark.parametrize(
    ("name", "start", "final"),
    [
        ("ls", "D", (-0.380, -19.828)),
        ("cagrad", "B", (-0.380, -19.828)),
        ("cagrad", "E", (-0.380, -19.828)),
        ("nashmtl", "B", (-1.509, -15.092)),
    ],
)
def test_short_runs_end_where_the_public_code_does(
    name: str, start: str, final: tuple[float, float]
) -> None:
    """Where the end does not depend on the length of the steps: thirty times as long here."""
    way = toy.run(toy.method(name, 0.03), start, 1500, 0.1, dtype=torch.float64, every=1500)
    assert way.losses[-1].tolist() == pytest.approx(final, abs=0.03)


def test_the_reference_is_of_methods_and_starts() -> None:
    assert set(toy.REFERENCE) <= set(fastmto.available())
    assert {len(ends) for ends in toy.REFERENCE.values()} == {len(toy.STARTS)}
    assert set(toy.OPTIONS) | set(toy.CUT_LENGTHS) <= set(fastmto.available())


def test_long_gradients_are_cut_as_in_the_public_code() -> None:
    x = torch.nn.Parameter(torch.tensor([-7.5, -0.5], dtype=torch.float64))
    for name, length in toy.CUT_LENGTHS.items():
        optimizer = toy.method(name)([x], [[], []])
        optimizer.backward(toy.losses(x, 10.0))
        optimizer.step()
        assert x.grad is not None
        assert float(x.grad.norm()) == pytest.approx(length)
        x.grad = None


def test_an_unknown_method() -> None:
    with pytest.raises(ValueError, match=r"name must be one of ls, .*, got 'equal'"):
        toy.method("equal")


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = "toy --balancers nashmtl,ls --steps 60 --lr 0.1 --processes 2 --json t.json"
    assert main(arguments.split()) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("method"))
    assert lines[head].split()[1:6] == list(toy.STARTS)
    assert "difference" not in lines[head]  # other settings than the reference's
    nash, ls = lines[head + 2].split(), lines[head + 3].split()
    assert (nash[0], ls[0]) == ("nashmtl", "ls")
    assert "600/600" in err
    assert (tmp_path / "fastmto-toy.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "t.json").read_text())
    assert report["config"] == {"balancers": ["nashmtl", "ls"], "s": 0.1, "lr": 0.1, "steps": 60}
    way = toy.run(toy.method("ls", 0.1), "D", 60, 0.1, dtype=torch.float64)
    ends = {method["method"]: method["runs"]["D"] for method in report["methods"]}
    assert ends["ls"]["final"] == pytest.approx(way.losses[-1].tolist(), abs=1e-12)
    assert ls[4] == "{:.3f},{:.3f}".format(*ends["ls"]["final"])
    assert len(ends["ls"]["points"]) == 61


def test_an_interrupt_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    way = toy.run(toy.method("ls"), "B", 3, 0.1)

    def run_all(*arguments: Callable[[list[toy.Row]], None]) -> None:
        arguments[-1]([toy.Row("ls", {"B": way})])
        raise KeyboardInterrupt

    monkeypatch.setattr(toy, "run_all", run_all)
    assert main(["toy", "--balancers", "ls,si", "--json", "t.json"]) == 130
    out, err = capsys.readouterr()
    assert "interrupted: 1 of 10 runs finished" in err
    row = next(line for line in out.splitlines() if line.startswith("ls"))
    assert row.split()[1] == "-"
    assert row.split()[2] == "{:.3f},{:.3f}".format(*way.losses[-1].tolist())
    assert [m["method"] for m in json.loads(Path("t.json").read_text())["methods"]] == ["ls"]
    assert Path("fastmto-toy.png").exists()


def test_the_table_shows_the_difference_to_the_reference() -> None:
    f1, f2 = toy.REFERENCE["nashmtl"][1] or (0.0, 0.0)
    ends = torch.tensor([[0.0, 0.0], [f1 + 0.25, f2 - 0.5]], dtype=torch.float64)
    stats = {"held": 2, "skipped": 1}
    row = toy.Row("nashmtl", {"B": toy.Trajectory(ends, ends, 10, 1e-3, stats)}, failure="x")
    other = toy.Row("si", {"B": toy.Trajectory(ends, ends, 10, 1e-3, stats)})
    lines = toy_table([row, other], reference=True).splitlines()
    assert lines[2].split()[-3:] == ["3", "100", "0.250,0.500"]
    assert lines[3].split()[-2:] == ["3", "100"]
    assert toy.is_reference(0.1, 1e-3, 50_000)
    assert not toy.is_reference(0.1, 1e-3, 500)


def test_json_says_none_for_nan() -> None:
    points = torch.tensor([[0.0, math.nan]])
    row = toy.Row("ls", {"A": toy.Trajectory(points, points, 1, 1.0, {})})
    assert json.loads(json.dumps(row.as_json(), allow_nan=False))["runs"]["A"]["final"] == [0, None]

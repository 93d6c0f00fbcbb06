"""The tables that `bench/gpu.py` makes of its figures, and their place in the README."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

README = Path(__file__).parent / "README.md"

Row = dict[str, Any]

#: Contestants beside ours, in the tables' order.
PEERS = ("eager", "compile", "fused_adam")


def write(block: str, text: str, path: Path = README) -> None:
    """Puts `text` between the markers of a block.

    Raises:
        ValueError: the file does not have the two markers, in this order.
    """
    begin, end = f"<!-- gpu {block} -->", f"<!-- /gpu {block} -->"
    readme = path.read_text()
    before, found, rest = readme.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{path.name} must hold {begin} and then {end}")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def _grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _number(value: Any, digits: int = 3) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"


def _fraction(value: Any) -> str:
    return "" if value is None else f"{value:.2f}"


def _power(numel: int) -> str:
    return f"{numel:.0e}".replace("e+0", "e")


def _aims(results: Row) -> list[str]:
    """What was aimed at beside what came; the worst case counts."""

    def least(names: Sequence[str], fraction: str) -> float | None:
        large = [row for row in results["passes"] if row["numel"] >= 10**8]
        found = [row for row in large if row["pass"] in names and row["dtype"] == "float32"]
        return min((row[fraction] for row in found if fraction in row), default=None)

    def of_step(contestant: str, key: str) -> float | None:
        steps = (row for row in results["steps"] if row["model"] == "mmoe")
        return next((row.get(key) for row in steps if row["contestant"] == contestant), None)

    small = (row for row in results["solvers"] if row["n_tasks"] <= 32)
    slowest = max((row["ours_us"] for row in small if "ours_us" in row), default=None)
    perturb = ("perturb_given", "perturb_gaussian", "perturb_rademacher")
    aims = [
        ("search over copy, P >= 1e8, worst T", ">= .90", least(["search"], "fraction_of_copy")),
        ("apply over copy, P >= 1e8, worst T", ">= .85", least(["apply"], "fraction_of_copy")),
        ("perturb over write, P >= 1e8, worst", ">= .85", least(perturb, "fraction_of_write")),
        ("slowest solve, T <= 32, us", "<= 30", slowest),
        ("MMOE, PUB every 10 over equal weights", "<= 1.06", of_step("pub_10", "over_adam")),
        ("of it outside the passes", "<= .01", of_step("pub_10", "share_outside_passes")),
        ("its graph over eager equal weights", "< 1", of_step("pub_10_graph", "over_adam")),
        ("over captured equal weights", "<= 1.06", of_step("pub_10_graph", "over_adam_graph")),
        ("of it outside the passes", "<= .01", of_step("pub_10_graph", "share_outside_passes")),
    ]  # fmt: skip
    return _grid(
        ["", "aim", "measured"],
        [(what, aim, "not run" if got is None else _number(got)) for what, aim, got in aims],
    )


def _passes(rows: list[Row]) -> list[str]:
    """A line a pass and T: the figures at the largest P that all T have, and beside them the
    fractions of the bandwidth at the other P."""
    if not rows:
        return []
    sizes = sorted({row["numel"] for row in rows})
    everywhere = [
        numel
        for numel in sizes
        if {row["n_tasks"] for row in rows if row["numel"] == numel}
        == {row["n_tasks"] for row in rows}
    ]
    main = everywhere[-1] if everywhere else sizes[-1]
    names = list(dict.fromkeys(row["pass"] for row in rows))
    rows = sorted(
        rows, key=lambda row: (names.index(row["pass"]), row["dtype"] != "float32", row["n_tasks"])
    )
    others = [numel for numel in sizes if numel != main]
    lines = _grid(
        [
            f"pass, P = {_power(main)}", "T", "us", "GB/s", "of copy", "eager", "compile",
            "fused Adam", *(f"of copy at {_power(numel)}" for numel in others),
        ],
        [
            [
                row["pass"] + ("" if row["dtype"] == "float32" else f" {row['dtype']}"),
                str(row["n_tasks"]),
                _number(row.get("ours_us")) or row["status"],
                _number(row.get("GB_per_s"), 4),
                _fraction(row.get("fraction_of_copy"))
                + (
                    f" ({_fraction(row['fraction_of_write'])} of write)"
                    if "fraction_of_write" in row
                    else ""
                ),
                *(_number(row.get(f"{name}_over_ours")) for name in PEERS),
                *(
                    _fraction(other.get("fraction_of_copy")) if other else ""
                    for other in (_twin(rows, row, numel) for numel in others)
                ),
            ]
            for row in rows
            if row["numel"] == main
        ],
    )  # fmt: skip
    return ["eager, compile and fused Adam: how many times longer they take.", "", *lines]


def _twin(rows: list[Row], row: Row, numel: int) -> Row | None:
    """The row of the same pass at another P."""
    same = ("pass", "n_tasks", "dtype")
    found = (r for r in rows if r["numel"] == numel and all(r[k] == row[k] for k in same))
    return next(found, None)


def _solvers(rows: list[Row]) -> list[str]:
    tasks = sorted({row["n_tasks"] for row in rows})
    lines: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        line = lines.setdefault((row["solver"], row["family"]), dict.fromkeys(tasks, ""))
        us = [row.get(key) for key in ("ours_us", "issued_us", "host_us")]
        line[row["n_tasks"]] = (
            row["status"] if None in us else " / ".join(_number(value) for value in us)
        )
    return _grid(
        ["us: device / issued by Python / through the host", *(f"T = {n}" for n in tasks)],
        [[f"{name}, {family}", *line.values()] for (name, family), line in lines.items()],
    )


def _steps(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    lines = ["Outside passes: the share of a step that is neither forward nor backward."]
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        lines += [
            "",
            f"{model.upper()}, batch {mine[0]['batch']}, {mine[0]['shared_parameters']:,} shared "
            f"and {mine[0]['task_parameters']:,} task parameters:",
            "",
            *_grid(
                ["", "ms", "over adam", "over adam_graph", "outside passes", "peak MB"],
                [
                    [
                        row["contestant"],
                        _number(row.get("ms"), 4) or row["status"],
                        *(
                            "" if row.get(key) is None else f"{row[key]:.3f}"
                            for key in ("over_adam", "over_adam_graph", "share_outside_passes")
                        ),
                        _number(row.get("peak_MB")),
                    ]
                    for row in mine
                ],
            ),
        ]
    return lines


def tables(results: Row) -> str:
    """All figures of a run as Markdown; what was left out, and why, at the end."""
    bandwidth = results.get("bandwidth", {})
    versions = ", ".join(
        f"{name} {results[name]}"
        for name in ("driver", "cuda", "hip", "torch", "triton")
        if results.get(name) is not None
    )
    lines = [
        f"{results['device']}, {versions}, {results['date']}: copy "
        f"{_number(bandwidth.get('copy_GB_per_s', math.nan))} GB/s, write "
        f"{_number(bandwidth.get('write_GB_per_s', math.nan))} GB/s, {results['seconds']:.0f} s.",
        "",
        *_aims(results),
    ]
    for title, made in (
        ("Passes", _passes(results["passes"])),
        ("Solvers", _solvers(results["solvers"]) if results["solvers"] else []),
        ("Training steps", _steps(results["steps"])),
    ):
        if made:
            lines += ["", f"#### {title}", "", *made]
    left_out = [
        f"- {_what(row)}: {row['status']}{': ' if row['note'] else ''}{row['note']}"
        for row in [*results["passes"], *results["solvers"], *results["steps"]]
        if row["status"] != "ok" or row["note"]
    ]
    if left_out:
        lines += ["", "#### Left out", "", *left_out]
    return "\n".join(lines).rstrip()


def _what(row: Row) -> str:
    if "pass" in row:
        return f"{row['pass']} {row['dtype']} T={row['n_tasks']} P={_power(row['numel'])}"
    if "solver" in row:
        return f"{row['solver']} {row['family']} T={row['n_tasks']}"
    return f"{row['model']} {row['contestant']}"

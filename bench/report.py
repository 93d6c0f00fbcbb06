"""Turns a run of the benches into the tables of bench/README.md.

    python -m pytest bench --benchmark-json=results.json
    python bench/report.py results.json

One table a bench: a column a case, a row a figure, as the benches left them in `extra_info`.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path


def cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value)


def tables(results: dict) -> str:
    machine = results["machine_info"]
    cpu = machine["cpu"]
    lines = [
        f"{cpu.get('brand_raw', machine['machine'])}, {cpu['count']} processors, "
        f"Python {machine['python_version']}, {results['datetime'][:10]}"
    ]
    benches = defaultdict(dict)
    for bench in results["benchmarks"]:
        name, _, case = bench["name"].partition("[")
        benches[name.removeprefix("test_")][case.rstrip("]") or "-"] = bench["extra_info"]
    for name, cases in benches.items():
        keys = dict.fromkeys(key for info in cases.values() for key in info)
        lines += [
            "",
            f"### {name}",
            "",
            f"| | {' | '.join(cases)} |",
            "|---" * (len(cases) + 1) + "|",
        ]
        for key in keys:
            values = (cell(info.get(key, "")) for info in cases.values())
            lines.append(f"| {key} | {' | '.join(values)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables(json.loads(Path(sys.argv[1]).read_text())))

"""The least that every pass has to move through memory: what `bench/gpu.py` measures against.

A pass reads each of its inputs once and writes each of its outputs once; nothing is read twice and
nothing on the way is stored. What does not grow with P (Gram matrix, weights, sums of blocks) is
left out.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Bytes a second that an H200 was seen to copy at (read and written): the stated level, not a
#: measurement of this project.
STATED_COPY_BYTES_PER_S = 4.3e12

#: Bytes of an element of the moments, whatever the gradients are.
STATE_BYTES = 4


@dataclass(frozen=True)
class Traffic:
    """Vectors (P,) that a pass reads or writes, as (how many a task or row, how many in all).

    Args:
        data: of the dtype of the gradients and parameters.
        state: of the moments, Adam's two: 2 to read them, 4 to move them.
    """

    data: tuple[int, int]
    state: tuple[int, int] = (0, 0)

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            (self.data[0] + other.data[0], self.data[1] + other.data[1]),
            (self.state[0] + other.state[0], self.state[1] + other.state[1]),
        )


_SEARCH = Traffic((1, 0), (0, 2))
_APPLY = Traffic((1, 2), (0, 4))
_CLIPPY_SEARCH = Traffic((1, 1), (0, 2))
_ADATASK_APPLY = Traffic((1, 2), (4, 0))

#: By the bench's names of the passes; see `fastmto.ops`. T rows of `perturb` are R there.
TRAFFIC = {
    "search": _SEARCH,
    "apply": _APPLY,
    "delayed": _APPLY,
    "combine": Traffic((1, 1)),
    "gram": Traffic((1, 0)),
    "check": Traffic((1, 0)),
    "perturb_given": Traffic((1, 2)),
    "perturb_gaussian": Traffic((1, 1)),
    "perturb_rademacher": Traffic((1, 1)),
    "search_clippy": _CLIPPY_SEARCH,
    "apply_clippy": _APPLY,
    # The parameters cannot move before every factor is known: two passes.
    "delayed_clippy": _CLIPPY_SEARCH + _APPLY,
    "search_adatask": Traffic((1, 0), (2, 0)),
    "apply_adatask": _ADATASK_APPLY,
    "delayed_adatask": _ADATASK_APPLY,
}


def floor_bytes(name: str, n_tasks: int, numel: int, element_bytes: int = 4) -> int:
    """Bytes of one call.

    Args:
        name: of the pass, a key of `TRAFFIC`.
        n_tasks: T; of a perturbation the number of rows R.
        numel: P.
        element_bytes: of a gradient and a parameter; moments have `STATE_BYTES`.
    """
    traffic = TRAFFIC[name]
    data = traffic.data[0] * n_tasks + traffic.data[1]
    state = traffic.state[0] * n_tasks + traffic.state[1]
    return numel * (element_bytes * data + STATE_BYTES * state)


def _vectors(name: str) -> str:
    """`floor_bytes` of float32 over 4 P, as a formula in T."""
    traffic = TRAFFIC[name]
    each, once = (traffic.data[k] + traffic.state[k] for k in (0, 1))
    factor = "T" if each == 1 else f"{each} T"
    return f"{factor} + {once}" if once else factor


def table(tasks: tuple[int, ...] = (2, 3, 8, 32), numel: int = 10**8) -> str:
    """Every pass's floor in float32 at `numel`, as a Markdown table."""
    power = f"{numel:.0e}".replace("e+0", "e")
    head = " | ".join(f"T = {n}: MB, us" for n in tasks)
    lines = [f"| pass, P = {power} | bytes / (4 P) | {head} |", "|---" * (len(tasks) + 2) + "|"]
    for name in TRAFFIC:
        cells = []
        for n_tasks in tasks:
            n_bytes = floor_bytes(name, n_tasks, numel)
            microseconds = 1e6 * n_bytes / STATED_COPY_BYTES_PER_S
            cells.append(f"{n_bytes / 1e6:,.0f}, {microseconds:,.0f}")
        lines.append(f"| {name} | {_vectors(name)} | {' | '.join(cells)} |")
    return "\n".join(lines)

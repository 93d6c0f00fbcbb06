"""The solvers on the device: checked against their equations, then timed."""

from __future__ import annotations

import numpy as np
import torch
from gpu_kernels import Wrong
from gpu_timer import FAILURES, CpuTimer, Row, in_a_line
from torch import Tensor

from fastmto import ops, solvers

#: Gram matrices that the calls of a measurement go round.
GRAMS = 16
#: Of Gram matrices: random updates, and two of them almost opposite.
FAMILIES = ("easy", "conflict")
SOLVED = solvers.STATUSES.index("solved")


def make_gram(n_tasks: int, family: str, seed: int) -> Tensor:
    """easy: random updates; conflict: two of them at 1 + cos = 1e-4."""
    rng = np.random.default_rng(n_tasks + 1000 * seed)
    rows = rng.normal(size=(n_tasks, 2 * n_tasks + 5))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    if family == "conflict":
        side = rows[1] - (rows[1] @ rows[0]) * rows[0]
        side /= np.linalg.norm(side)
        cosine = -1 + 1e-4
        rows[1] = cosine * rows[0] + np.sqrt(1 - cosine**2) * side
    rows *= np.exp(rng.normal(size=(n_tasks, 1)) / 2)
    return torch.from_numpy(np.ascontiguousarray(rows @ rows.T))


def _demand(name: str, gram: Tensor, weights: Tensor, info: Tensor) -> None:
    """Refuses weights that do not solve their equations; all on the host."""
    if int(info[0]) != SOLVED:
        raise Wrong(f"status {solvers.STATUSES[int(info[0])]}")
    if name == "bargaining":
        error = float((weights * (gram @ weights) - 1).abs().max())
        if not error <= 1e-8:
            raise Wrong(f"a_i (G a)_i is off by {error:.3g}")
        return
    if abs(float(weights.sum()) - 1) > 1e-9 or float(weights.min()) < 0:
        raise Wrong(f"not a point of the simplex: {weights.tolist()}")
    least = solvers.mgda(gram).weights
    assert least is not None
    value, best = (float(w @ gram @ w) for w in (weights, least))
    if not value - best <= 1e-7 * float(gram.diagonal().max()):
        raise Wrong(f"w'Gw is {value:.9g}, the least is {best:.9g}")


def measure_solver(name: str, n_tasks: int, family: str, timer: CpuTimer) -> Row:
    """Check, then time, an op that solves.

    Args:
        name: "bargaining" or "mgda".
        n_tasks: T.
        family: of the Gram matrices.
        timer: on the device.

    Returns:
        A row: the case, `status` ("ok", "wrong" or "failed" with a `note`), microseconds on the
        device, of a call that Python issues, and of the way through the host: copy the Gram matrix
        there, solve it by the compiled solver, copy the weights back.
    """
    row: Row = {
        "solver": name, "family": family, "n_tasks": n_tasks, "status": "ok", "note": "",
    }  # fmt: skip
    op, on_host = getattr(ops, name), getattr(solvers, name)
    host = [make_gram(n_tasks, family, seed) for seed in range(GRAMS)]
    grams = [gram.to(timer.device) for gram in host]
    weights = torch.full((GRAMS, n_tasks), torch.nan, dtype=torch.float64, device=timer.device)
    infos = torch.full((GRAMS, 4), torch.nan, dtype=torch.float64, device=timer.device)

    def solve(i: int) -> None:
        op(grams[i], weights[i], infos[i])

    def through_the_host(i: int) -> None:
        weights[i].copy_(on_host(grams[i].cpu()).weights)

    try:
        for i, gram in enumerate(host):
            solve(i)
            _demand(name, gram, weights[i].cpu(), infos[i].cpu())
        row["ours_us"] = 1e6 * timer.seconds(solve, GRAMS)
        row["issued_us"] = 1e6 * timer.issued(solve, GRAMS)
        row["host_us"] = 1e6 * timer.issued(through_the_host, GRAMS)
    except (Wrong, *FAILURES) as error:
        row["status"] = "wrong" if isinstance(error, Wrong) else "failed"
        row["note"] = in_a_line(error)
    return row

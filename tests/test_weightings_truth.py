"""Every weighting's direction beside the transcription of its paper on explicit gradients.

Directions sum_i w_i g_i are compared: they are unique where the weights are not.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from gradient_cases import KINDS, REGULAR, TASKS, Array, cases

from fastmto.reference import gradients as reference
from fastmto.weightings import (
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    DualProj,
    FairGrad,
    NashMTL,
    PCGrad,
    UPGrad,
    Weighting,
)


@dataclass(frozen=True)
class Method:
    """A weighting of n tasks, its paper, and the gradients on which it has an answer."""

    make: Callable[[int], Weighting]
    truth: Callable[[Array], Array]
    kinds: tuple[str, ...] = KINDS
    decades: float = 12.0
    tasks: tuple[int, ...] = TASKS


#: Where all of `TASKS` would take the transcription long.
FEW = (2, 3, 5)


def preference(n: int) -> Array:
    return np.arange(n) + 0.5


METHODS = {
    "MGDA": Method(lambda n: MGDA(), reference.mgda),
    # Its direction is made of the gradients as they are: not unique where w is not.
    "MGDA l2": Method(
        lambda n: MGDA("l2"),
        lambda grads: reference.normalised_mgda(grads, np.ones(len(grads)), "l2"),
        REGULAR,
    ),
    "CAGrad": Method(lambda n: CAGrad(), lambda grads: reference.cagrad(grads, 0.4, 1)),
    "CAGrad 0.1": Method(
        lambda n: CAGrad(0.1, rescale=0), lambda grads: reference.cagrad(grads, 0.1, 0), tasks=FEW
    ),
    "CAGrad 1.5": Method(
        lambda n: CAGrad(1.5, rescale=2), lambda grads: reference.cagrad(grads, 1.5, 2), tasks=FEW
    ),
    "UPGrad": Method(lambda n: UPGrad(), reference.upgrad),
    "UPGrad preference": Method(
        lambda n: UPGrad(preference(n).tolist()),
        lambda grads: reference.upgrad(grads, preference(len(grads))),
    ),
    "DualProj": Method(lambda n: DualProj(), reference.dual_proj),
    "DualProj preference": Method(
        lambda n: DualProj(preference(n).tolist()),
        lambda grads: reference.dual_proj(grads, preference(len(grads))),
    ),
    "PCGrad": Method(
        lambda n: PCGrad(seed=3),
        lambda grads: reference.pcgrad(grads, PCGrad(seed=3).orders(len(grads))),
    ),
    "IMTLG": Method(lambda n: IMTLG(), reference.imtl_g, REGULAR),
    "NashMTL": Method(lambda n: NashMTL(max_norm=None), reference.nash, (*REGULAR, "duplicates")),
    "NashMTL clipped": Method(
        lambda n: NashMTL(), lambda grads: reference.nash(grads, 1.0), (*REGULAR, "duplicates")
    ),
    "FairGrad 0.5": Method(
        lambda n: FairGrad(0.5), lambda grads: reference.fairgrad(grads, 0.5), REGULAR, 3.0
    ),
    "FairGrad 2": Method(
        lambda n: FairGrad(2.0), lambda grads: reference.fairgrad(grads, 2.0), REGULAR, 3.0
    ),
    "AlignedMTL": Method(lambda n: AlignedMTL(), reference.aligned_mtl, REGULAR, 0.0),
    "AlignedMTL median": Method(
        lambda n: AlignedMTL("median"),
        lambda grads: reference.aligned_mtl(grads, "median"),
        (*REGULAR, "low_rank", "duplicates", "stationary"),
        0.0,
    ),
    "AlignedMTL rmse": Method(
        lambda n: AlignedMTL("rmse"),
        lambda grads: reference.aligned_mtl(grads, "rmse"),
        (*REGULAR, "low_rank", "duplicates", "stationary"),
        0.0,
    ),
}


def distance(weighting: Weighting, truth: Array, grads: Array) -> float:
    """How far the direction is from the truth, relative to what is added up."""
    w = weighting(torch.from_numpy(grads @ grads.T)).numpy()
    size = (np.abs(w) * np.linalg.norm(grads, axis=1)).sum()
    return float(np.linalg.norm(w @ grads - truth) / size)


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, method in METHODS.items() for kind in method.kinds]
)
def test_direction_is_the_papers(name: str, kind: str) -> None:
    method = METHODS[name]
    distances = {
        str(case): distance(method.make(case.tasks), method.truth(case.grads), case.grads)
        for case in cases((kind,), method.tasks)
        if case.decades <= method.decades
    }
    assert distances
    worst = max(distances, key=distances.__getitem__)
    assert distances[worst] <= 1e-11, worst


def test_values_to_twelve_digits(shared_dir: Path) -> None:
    for entry in json.loads((shared_dir / "oracles" / "bargaining.json").read_text())[
        "other_methods"
    ]:
        gram = torch.tensor(entry["gram"], dtype=torch.float64)
        mean = torch.full((len(gram),), 1 / len(gram), dtype=torch.float64)
        found = {
            "mgda": MGDA()(gram),
            "upgrad_unregularised": UPGrad()(gram),
            "imtl_g": IMTLG()(gram),
            "aligned_mtl_min": AlignedMTL()(gram),
        }
        expected = {key: entry[key] for key in found if key in entry}
        assert expected
        if "cagrad_c04_w" in entry:
            w = torch.tensor(entry["cagrad_c04_w"], dtype=torch.float64)
            radius = 0.4 * (mean @ gram @ mean).sqrt()
            expected["cagrad"] = (mean + radius / (w @ gram @ w).sqrt() * w).tolist()
            found["cagrad"] = CAGrad(0.4, rescale=0)(gram)
        for key, values in expected.items():
            torch.testing.assert_close(
                found[key], torch.tensor(values, dtype=torch.float64), rtol=1e-11, atol=1e-12
            )

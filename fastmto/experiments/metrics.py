"""How good a multi-task model is: AUC, and two ways to average relative changes over tasks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

Vector = Tensor | npt.NDArray[np.generic] | Sequence[float]
#: One sequence of criteria per task.
Criteria = Sequence[Sequence[float]]


def _array(name: str, values: Vector) -> npt.NDArray[np.generic]:
    array: npt.NDArray[np.generic] = np.asarray(
        values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    )
    if array.ndim != 1:
        raise ValueError(f"{name} must be (N,), got shape {array.shape}")
    return array


def auc(targets: Vector, scores: Vector) -> float:
    """Area under the ROC curve, by ranks; equal scores share their mean rank.

        AUC = (sum of the positives' ranks - n1 (n1 + 1) / 2) / (n0 n1)

    the Mann-Whitney statistic: the share of (positive, negative) pairs in the right order, ties
    counted half.

    Args:
        targets: (N,), 1 for positive and 0 for negative.
        scores: (N,), any increasing function of the probability.

    Returns:
        In [0, 1], exact up to one float64 rounding.

    Raises:
        ValueError: wrong shapes, labels that are not 0 or 1, only one class, NaN scores.
    """
    y = _array("targets", targets)
    s = _array("scores", scores)
    if y.shape != s.shape:
        raise ValueError(f"targets and scores must be as long, got {len(y)} and {len(s)}")
    positive = y == 1
    if not np.all(positive | (y == 0)):
        raise ValueError("targets must be 0 or 1")
    if np.isnan(s.astype(np.float64)).any():
        raise ValueError("scores must be numbers, got NaN")
    n1 = int(positive.sum())
    n0 = len(y) - n1
    if n0 == 0 or n1 == 0:
        raise ValueError(f"AUC needs both classes, got {n1} positives and {n0} negatives")
    order = np.argsort(s, kind="stable")
    ordered = s[order]
    # Runs of equal scores: the mean 1-based rank of a run from `first` to `last - 1`.
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    last = np.r_[first[1:], len(s)]
    # Twice the mean rank is a whole number, so the sum below is exact.
    twice_rank = np.repeat(first + last + 1, last - first)
    rank_sum = int(twice_rank[positive[order]].sum())
    return (rank_sum - n1 * (n1 + 1)) / (2 * n0 * n1)


def _relative_changes(
    method: Criteria, baseline: Criteria, higher_is_better: Sequence[Sequence[bool]]
) -> list[npt.NDArray[np.float64]]:
    """(-1)^l (M_m - M_b) / M_b of every criterion, l = 1 where higher is better."""
    shapes = {tuple(len(task) for task in one) for one in (method, baseline, higher_is_better)}
    if len(shapes) != 1 or not all(shape and min(shape) > 0 for shape in shapes):
        raise ValueError(
            "method, baseline and higher_is_better must hold the same criteria of the same tasks, "
            f"at least one each, got {[[len(t) for t in one] for one in (method, baseline)]} "
            f"and {[len(t) for t in higher_is_better]}"
        )
    changes = []
    for ours, theirs, higher in zip(method, baseline, higher_is_better, strict=True):
        m, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
        if not np.all(b != 0):
            raise ValueError(f"baseline must not be 0: a change relative to it, got {b.tolist()}")
        changes.append(np.where(higher, -1.0, 1.0) * (m - b) / b)
    return changes


def delta_m_pub(
    method: Criteria, baseline: Criteria, higher_is_better: Sequence[Sequence[bool]]
) -> float:
    """Delta-m as PUB defines it: tasks weigh equally, whatever their number of criteria.

        Delta_m = 100/T sum_i 1/n_i sum_j (-1)^{l_ij} (M_m,ij - M_b,ij) / M_b,ij

    Source: PUB, arXiv 2410.05806, section of the NYUv2 experiments.

    Args:
        method, baseline: n_i criteria of each of T tasks.
        higher_is_better: the same layout; where true, l = 1.

    Returns:
        Percent; below 0 means better than the baseline.

    Raises:
        ValueError: different layouts, or a baseline of 0.
    """
    changes = _relative_changes(method, baseline, higher_is_better)
    return 100 * float(np.mean([task.mean() for task in changes]))


def delta_m(
    method: Criteria, baseline: Criteria, higher_is_better: Sequence[Sequence[bool]]
) -> float:
    """The usual Delta-m: every criterion weighs equally, so a task with more of them weighs more.

        Delta_m = 100 / sum_i n_i * sum_ij (-1)^{l_ij} (M_m,ij - M_b,ij) / M_b,ij

    Source: Maninis et al., CVPR 2019, over criteria as in Nash-MTL and FAMO.

    Args and Returns as of `delta_m_pub`.
    """
    changes = _relative_changes(method, baseline, higher_is_better)
    return 100 * float(np.concatenate(changes).mean())

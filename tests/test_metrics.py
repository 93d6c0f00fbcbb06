"""AUC against scikit-learn and by hand, Delta-m against published tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from fastmto.experiments.metrics import auc, delta_m, delta_m_pub

# NYUv2: segmentation (mIoU, pixel accuracy), depth (absolute, relative error), surface normals
# (mean, median, within 11.25, 22.5, 30 degrees), as printed in PUB's table.
STL = [[38.31, 63.76], [0.6754, 0.2780], [25.01, 19.21, 30.15, 57.20, 69.18]]
HIGHER = [[True, True], [False, False], [False, False, True, True, True]]
PUBLISHED = {
    "LS": [[39.29, 65.33], [0.5493, 0.2263], [28.15, 23.96, 22.09, 47.50, 61.08]],
    "NashMTL": [[40.07, 65.73], [0.5348, 0.2179], [25.26, 20.08, 28.4, 55.47, 68.15]],
    "FAMO": [[38.94, 64.91], [0.5476, 0.2194], [25.06, 19.57, 29.21, 56.61, 68.98]],
}


@pytest.mark.parametrize("n_values", [2, 7, 1000, 10**9], ids="values={}".format)
@pytest.mark.parametrize("share", [0.01, 0.5, 0.97])
def test_auc_is_sklearns(n_values: int, share: float) -> None:
    generator = np.random.default_rng(n_values)
    y = (generator.random(5003) < share).astype(np.int64)
    s = generator.integers(n_values, size=5003) + 3.0 * y * n_values / 10
    expected = roc_auc_score(y, s)
    assert auc(y, s) == pytest.approx(expected, abs=1e-13)
    assert auc(torch.from_numpy(y), torch.from_numpy(s)) == auc(y, s)


def test_auc_by_hand() -> None:
    # Pairs (positive, negative): .8 > .3, .8 > .5, .5 > .3, .5 = .5 counts half: 3.5 of 4.
    assert auc([1, 0, 1, 0], [0.8, 0.3, 0.5, 0.5]) == 3.5 / 4
    assert auc([0, 0, 1], [-np.inf, 0.0, np.inf]) == 1.0
    assert auc([0, 1, 0, 1], [2.0, 2.0, 2.0, 2.0]) == 0.5


def test_auc_of_reversed_scores_is_the_complement() -> None:
    generator = np.random.default_rng(3)
    y, s = generator.integers(2, size=999), generator.integers(50, size=999)
    assert auc(y, s) + auc(y, -s) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize(
    ("targets", "scores", "message"),
    [
        ([1, 1], [0.1, 0.2], "both classes, got 2 positives and 0 negatives"),
        ([0, 2], [0.1, 0.2], "targets must be 0 or 1"),
        ([0, 1], [0.1, np.nan], "got NaN"),
        ([0, 1], [0.1], "as long, got 2 and 1"),
        ([[0, 1]], [0.1, 0.2], r"targets must be \(N,\)"),
    ],
)
def test_auc_refuses(targets: list[float], scores: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        auc(targets, scores)


@pytest.mark.parametrize(
    ("method", "by_task", "by_criterion"),
    [("LS", -0.87, 5.60), ("NashMTL", -7.30, -3.81), ("FAMO", -6.81, -4.10)],
)
def test_delta_m_of_published_rows(method: str, by_task: float, by_criterion: float) -> None:
    # The criteria are printed with four digits: the averages are good to about .01.
    assert delta_m_pub(PUBLISHED[method], STL, HIGHER) == pytest.approx(by_task, abs=0.02)
    assert delta_m(PUBLISHED[method], STL, HIGHER) == pytest.approx(by_criterion, abs=0.02)


def test_delta_m_by_hand() -> None:
    method, baseline = [[1.1], [0.5, 2.0]], [[1.0], [1.0, 1.0]]
    higher = [[True], [False, False]]
    assert delta_m_pub(method, baseline, higher) == pytest.approx(100 * (-0.1 + 0.25) / 2)
    assert delta_m(method, baseline, higher) == pytest.approx(100 * (-0.1 - 0.5 + 1.0) / 3)


@pytest.mark.parametrize("function", [delta_m, delta_m_pub])
def test_delta_m_refuses(function: object) -> None:
    assert callable(function)
    with pytest.raises(ValueError, match="same criteria of the same tasks"):
        function([[1.0]], [[1.0, 2.0]], [[True]])
    with pytest.raises(ValueError, match="same criteria of the same tasks"):
        function([], [], [])
    with pytest.raises(ValueError, match="baseline must not be 0"):
        function([[1.0]], [[0.0]], [[True]])

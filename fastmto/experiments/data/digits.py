"""Two overlapping digits, two tasks: MultiMNIST in small, from scikit-learn's embedded digits.

Source of the problem: MultiMNIST as a two-task benchmark (Sener and Koltun, "Multi-Task Learning
as Multi-Objective Optimization", NeurIPS 2018), after Sabour et al. 2017. Deviations: the images
are the 1,797 real 8x8 digits that ship with scikit-learn (UCI Optical Recognition of Handwritten
Digits), so nothing is downloaded; and a digit covers 5x5 of the other's 8x8 pixels.

Why it is a meaningful small problem for a balancer: both tasks read the same pixels through one
trunk, each one's digit is the other's noise, and nothing about one label can be learned from the
other. Measured over six epochs of equal weighting, the two gradients of the shared parameters have
a mean cosine of 0.00 and point against each other on half of the steps. Both are real handwriting
and both are learnable, so that a method that drops a task shows. What it is not is hard to
balance: the tasks are equally difficult, and good methods end within each other's seed noise.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from .base import MultiTaskData, Split, Task

#: The lower right digit starts this many pixels below and to the right of the upper left one.
SHIFT = 3
SIDE = 8 + SHIFT


def _pairs(
    images: npt.NDArray[np.float64],
    labels: npt.NDArray[np.int64],
    n_pairs: int,
    generator: np.random.Generator,
) -> Split:
    """`n_pairs` overlays of two digits drawn from `images` (N, 8, 8) in [0, 1]."""
    upper, lower = generator.integers(len(images), size=(2, n_pairs))
    canvas = np.zeros((n_pairs, SIDE, SIDE), dtype=np.float32)
    canvas[:, :8, :8] = images[upper]
    # Ink over ink stays ink: the maximum, as MultiMNIST does.
    window = canvas[:, SHIFT:, SHIFT:]
    np.maximum(window, images[lower], out=window)
    return Split(
        dense=torch.from_numpy(canvas.reshape(n_pairs, -1)),
        categorical=torch.empty((n_pairs, 0), dtype=torch.int32),
        targets=torch.from_numpy(np.stack([labels[upper], labels[lower]], axis=1)),
    )


def load_digits(
    seed: int = 0, n_train: int = 20_480, n_validation: int = 2_000, n_test: int = 4_000
) -> MultiTaskData:
    """Overlaid pairs of handwritten digits; tasks "upper left" and "lower right", ten classes each.

    The single digits are first cut into 1,197 for training, 200 for validation and 400 for test
    and only then paired: a test pair is made of handwriting that training never saw.

    Args:
        seed: decides the cut and the pairs; the same seed gives the same bits.
        n_train, n_validation, n_test: pairs in each part.

    Returns:
        144 dense inputs (12x12 pixels in [0, 1]), no categorical ones.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits as sklearn_digits

    bunch = sklearn_digits()
    images = bunch.images / 16.0
    labels = bunch.target.astype(np.int64)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(images))
    cuts = np.split(order, [len(order) - 600, len(order) - 400])
    train, validation, test = (
        _pairs(images[cut], labels[cut], n, generator)
        for cut, n in zip(cuts, (n_train, n_validation, n_test), strict=True)
    )
    return MultiTaskData(
        name="digits",
        tasks=(Task("upper left", 10), Task("lower right", 10)),
        field_sizes=(),
        train=train,
        validation=validation,
        test=test,
    )

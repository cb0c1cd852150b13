"""Numbers of the report beside the metrics: confusions, confidence intervals, percentages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Pair = tuple[int, int, int]  # true class, predicted class, count
    Matrix = tuple[list[int], NDArray[np.int64], NDArray[np.float64]]  # classes, counts, shares


MATRIX_CLASSES = 25  # a larger matrix cannot be read, and for 10,000 classes cannot be drawn


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a share of `right` in `count` (Wilson, 1927)."""
    z = 1.959964
    share, scale = right / count, 1 + z * z / count
    centre = share + z * z / (2 * count)
    half = z * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return max(0.0, float((centre - half) / scale)), min(1.0, float((centre + half) / scale))


def percent(share: float) -> str:
    """Format a share; only exactly 0 and 1 are shown as 0 and 100 %."""
    if share in (0, 1):
        return f"{100 * share:.0f}\u00a0%"
    return f"{min(max(100 * share, 0.1), 99.9):.1f}\u00a0%"


def confused_pairs(targets: NDArray[np.int64], predicted: NDArray[np.int64]) -> list[Pair]:
    """Return every (true, predicted, count) that is a mistake, most frequent first."""
    wrong = targets != predicted
    pairs, counts = np.unique(np.stack([targets[wrong], predicted[wrong]], axis=1), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [(true, guess, n) for (true, guess), n in zip(pairs[order].tolist(), counts[order].tolist(), strict=True)]


def confusion_matrix(targets: NDArray[np.int64], predicted: NDArray[np.int64], k: int, pairs: Sequence[Pair]) -> Matrix:
    """Return at most 25 of k classes, their counts (n, n), and the counts as shares of the true classes.

    Of more classes, those of the most frequent mistakes are taken, then the largest. A 10,000 x 10,000 matrix is
    never formed.
    """
    support = np.bincount(targets, minlength=k)
    confused = (index for pair in pairs[:MATRIX_CLASSES] for index in pair[:2])
    candidates = dict.fromkeys([*confused, *np.argsort(-support, kind="stable")[:MATRIX_CLASSES].tolist()])
    classes = sorted(list(candidates)[:MATRIX_CLASSES])
    both = np.isin(targets, classes) & np.isin(predicted, classes)
    counts = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(counts, tuple(np.searchsorted(classes, each[both]) for each in (targets, predicted)), 1)
    return classes, counts, counts / np.maximum(support[classes], 1)[:, None]

"""Confidence bins: what the calibration error (ECE) is computed from and the reliability diagram shows.

Source: Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017, https://arxiv.org/abs/1706.04599).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

BINS = 15


def confidence_bins(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the count, mean confidence and accuracy of each bin (m/15, (m+1)/15], (3, 15).

    torchmetrics closes bins on the left instead, so that a confidence of exactly 1.0 gets a 16th bin.

    Args:
        confidence: The probability of each image's predicted class, (N,).
        correct: Whether each prediction is right, (N,).
    """
    index = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidence, side="left")
    count = np.bincount(index, minlength=BINS).astype(np.float64)
    sums = [np.bincount(index, weights=w, minlength=BINS) for w in (confidence, correct.astype(np.float64))]
    return np.stack([count, *(s / np.maximum(count, 1) for s in sums)])


def expected_calibration_error(bins: NDArray[np.float64]) -> float:
    """Return the mean gap between confidence and accuracy (L1), from `confidence_bins`."""
    count, confidence, accuracy = bins
    return float((count / count.sum() * np.abs(accuracy - confidence)).sum())

"""Temperature scaling of the logits."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

_STEPS = 200
"""Temperatures per factor of ten: steps of about one percent."""

LARGEST_FACTOR = 3
"""Factors of ten to search up and down: the logits of a hardly trained head are a hundred times too small."""


def fit_temperature(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> tuple[float, float]:
    """Return the temperature from 0.001 to 1,000 with the lowest loss, and that loss.

    The targets are Platt's (1999), 1 - 1 / (N + 2) instead of 1, so that a few images that are all classified
    correctly do not make the model certain.

    Args:
        logits: (N, K).
        targets: Class indices (N,).
        weights: Weight of an image of each class, (K,); 1 by default.
    """
    (n, k), logits = logits.shape, logits.double()
    weights = None if weights is None else weights.double()
    smoothing = min(1.0, k / (k - 1) / (n + 2)) if k > 1 else 0.0

    def loss(step: int) -> float:
        scaled = logits / 10 ** (step / _STEPS)
        return float(functional.cross_entropy(scaled, targets, weights, label_smoothing=smoothing))

    low, high = -LARGEST_FACTOR * _STEPS, LARGEST_FACTOR * _STEPS  # the loss is convex in 1 / T: it has one minimum
    while high - low > 2:
        third = (high - low) // 3
        low, high = (low, high - third) if loss(low + third) <= loss(high - third) else (low + third, high)
    best = min(range(low, high + 1), key=loss)
    return 10 ** (best / _STEPS), loss(best)

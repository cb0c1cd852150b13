"""Temperature scaling of the logits."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

_STEPS = 200
"""Temperatures looked at per factor of ten: steps of about one percent."""


LARGEST_FACTOR = 3
"""Factors of ten up and down to look at: a head that has hardly learned is a hundred times too small."""


def fit_temperature(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> tuple[float, float]:
    """Return the temperature from 0.001 to 1,000 that suits logits best, and the loss with it.

    The targets are Platt's (1999), 1 - 1 / (N + 2) instead of 1: however right a model is about a few images, it does
    not become certain.

    Args:
        logits: (N, K).
        targets: Class numbers (N,).
        weights: What an image of each class counts, (K,); one by default.
    """
    (n, k), logits = logits.shape, logits.double()
    weights = None if weights is None else weights.double()
    smoothing = min(1.0, k / (k - 1) / (n + 2)) if k > 1 else 0.0

    def loss(step: int) -> float:
        scaled = logits / 10 ** (step / _STEPS)
        return float(functional.cross_entropy(scaled, targets, weights, label_smoothing=smoothing))

    low, high = -LARGEST_FACTOR * _STEPS, LARGEST_FACTOR * _STEPS  # the loss is convex in 1 / T: it falls, then rises
    while high - low > 2:
        third = (high - low) // 3
        low, high = (low, high - third) if loss(low + third) <= loss(high - third) else (low + third, high)
    best = min(range(low, high + 1), key=loss)
    return 10 ** (best / _STEPS), loss(best)

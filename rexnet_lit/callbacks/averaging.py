"""The exponential moving average of the weights, which is validated and shipped instead of them."""

from __future__ import annotations

from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class EMA(WeightAveraging):
    """Averages the weights of every step.

    Args:
        decay: The share of the average that each step keeps; it rises to this over the first steps.
    """

    def __init__(self, decay: float) -> None:
        def average(averaged: Tensor, current: Tensor, count: Tensor) -> Tensor:
            now = min(decay, (1 + int(count)) / (10 + int(count)))
            return averaged.lerp(current.to(averaged.dtype), 1 - now) if averaged.is_floating_point() else current

        super().__init__(avg_fn=average)

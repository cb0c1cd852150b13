"""The exponential moving average of the weights, which is validated and shipped instead of them."""

from __future__ import annotations

from functools import partial

from lightning.pytorch.callbacks import WeightAveraging

from rexnet_lit.training import optim


class EMA(WeightAveraging):
    """Averages the weights of every step.

    Args:
        decay: The share of the average that each step keeps; it rises to this over the first steps.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(avg_fn=partial(optim.average, decay))

"""Training losses from plain settings."""

from __future__ import annotations

import dataclasses
from typing import Literal

from torch import nn

from rexnet_lit.errors import UserError

__all__ = ["LossSettings", "build_loss"]


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """The training loss.

    Args:
        name: ``cross_entropy``, the only one so far.
        label_smoothing: Share of the target's probability spread over all classes (Szegedy et al. 2016).
    """

    name: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        if self.name != "cross_entropy":
            raise UserError(f"model.loss.name is {self.name!r}; expected cross_entropy")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"model.loss.label_smoothing is {self.label_smoothing}; expected a fraction from 0 to below 1"
            )


def build_loss(settings: LossSettings) -> nn.Module:
    """Return a module that takes logits (B, K) and targets (B,) and returns the mean loss."""
    return nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)

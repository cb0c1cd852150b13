"""Training losses from plain settings.

Targets are class numbers (B,), or probabilities (B, K) where MixUp or CutMix has blended images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from rexnet_lit.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """The training loss.

    Args:
        name: ``cross_entropy``; ``focal``, which leaves easy images out of account (Lin et al. 2017); ``bce``, a
            yes or no for each class, for MixUp and CutMix (Wightman et al. 2021).
        label_smoothing: Share of the target's probability spread over all classes (Szegedy et al. 2016).
        gamma: How far ``focal`` does so; 0 is cross-entropy.
        class_weights: ``auto`` weighs each class by its rarity: N images over K classes of n give N / (K n).
    """

    name: Literal["cross_entropy", "focal", "bce"] = "cross_entropy"
    label_smoothing: float = 0.1
    gamma: float = 2.0
    class_weights: Literal["none", "auto"] = "none"

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            raise UserError(f"model.loss.name is {self.name!r}; expected one of {', '.join(LOSSES)}")
        if self.class_weights not in ("none", "auto"):
            raise UserError(f"model.loss.class_weights is {self.class_weights!r}; expected none or auto")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"model.loss.label_smoothing is {self.label_smoothing}; expected a fraction from 0 to below 1"
            )
        if not self.gamma >= 0:
            raise UserError(f"model.loss.gamma is {self.gamma}; expected 0 or more")


def _cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor, settings: LossSettings) -> Tensor:
    return -(targets * logits.log_softmax(1) * weights).sum(1)


def _focal(logits: Tensor, targets: Tensor, weights: Tensor, settings: LossSettings) -> Tensor:
    logs = logits.log_softmax(1)
    rest = (1 - logs.exp()).clamp(min=1e-6)  # at 0 a gamma below 1 has no slope
    return -(targets * rest**settings.gamma * logs * weights).sum(1)


def _bce(logits: Tensor, targets: Tensor, weights: Tensor, settings: LossSettings) -> Tensor:
    return (functional.binary_cross_entropy_with_logits(logits, targets, reduction="none") * weights).mean(1)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, LossSettings], Tensor]] = {
    "cross_entropy": _cross_entropy,
    "focal": _focal,
    "bce": _bce,
}
"""Each maps logits (B, K), target probabilities (B, K) and class weights (K,) to losses (B,)."""


class _Loss(nn.Module):
    def __init__(self, settings: LossSettings, weights: Tensor) -> None:
        super().__init__()
        self._settings = settings
        self.weights = nn.Buffer(weights, persistent=False)  # no part of the model

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Map logits (B, K) and targets (B,) or (B, K) to the mean loss."""
        logits, classes = logits.float(), logits.shape[1]
        if targets.ndim == 1:
            targets = functional.one_hot(targets, classes)
        smoothing = self._settings.label_smoothing
        targets = targets.to(logits.dtype) * (1 - smoothing) + smoothing / classes
        # Divided by B, not by the weights' sum: so the mean over processes is the mean over all their images.
        return LOSSES[self._settings.name](logits, targets, self.weights, self._settings).mean()


def build_loss(settings: LossSettings, counts: Sequence[int]) -> nn.Module:
    """Return a module that takes logits (B, K) and targets (B,) or (B, K) and returns the mean loss.

    Args:
        settings: The loss.
        counts: Training images of each class, (K,).
    """
    images = torch.tensor(counts, dtype=torch.float32)
    rarity = images.sum() / (len(images) * images.clamp(min=1))
    return _Loss(settings, rarity if settings.class_weights == "auto" else torch.ones(len(images)))

"""Training losses.

Targets are class indices (B,), or probabilities (B, K) after MixUp or CutMix. To add a loss, write a function and name
it in `LOSSES`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.settings import call_own, check_choice, check_range, class_path_of

_BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


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

if not TYPE_CHECKING:
    LossName = Literal[tuple(LOSSES)]
else:
    LossName = str


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """The training loss.

    Args:
        name: ``cross_entropy``; ``focal``, which gives easy images less weight (Lin et al. 2017); ``bce``, binary
            cross-entropy for each class, for MixUp and CutMix (Wightman et al. 2021).
        label_smoothing: Share of the target's probability spread over all classes (Szegedy et al. 2016).
        gamma: How much less weight ``focal`` gives them; 0 is cross-entropy.
        class_weights: ``auto`` weighs each class by its rarity: N images over K classes of n give N / (K n).
        class_path: An own loss in its place, such as ``my_module.MyLoss``: a ``torch.nn.Module`` that maps logits (B,
            K) and targets (B,), or (B, K) after MixUp, to the mean loss. The settings above then have no effect.
        init_args: Its arguments.
    """

    name: LossName = "cross_entropy"
    label_smoothing: float = 0.1
    gamma: float = 2.0
    class_weights: Literal["none", "auto"] = "none"
    class_path: str | None = None
    init_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_choice("model.loss.name", self.name, LOSSES)
        check_choice("model.loss.class_weights", self.class_weights, ("none", "auto"))
        check_range("model.loss.label_smoothing", self.label_smoothing, "[0, 1)")
        check_range("model.loss.gamma", self.gamma, "[0, inf]")


class _Loss(nn.Module):
    def __init__(self, settings: LossSettings, weights: Tensor) -> None:
        super().__init__()
        self._settings = settings
        self.weights = nn.Buffer(weights, persistent=False)  # not part of the model's state

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Map logits (B, K) and targets (B,) or (B, K) to the mean loss."""
        logits, classes = logits.float(), logits.shape[1]
        if targets.ndim == 1:
            targets = functional.one_hot(targets, classes)
        smoothing = self._settings.label_smoothing
        targets = targets.to(logits.dtype) * (1 - smoothing) + smoothing / classes
        # Divided by B, not by the sum of the weights: the mean over processes is then the mean over all their images.
        return LOSSES[self._settings.name](logits, targets, self.weights, self._settings).mean()


class _OwnFunction(nn.Module):
    """A user's function of logits and targets."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Call it."""
        return self._function(logits, targets)


def own_loss(own: Any) -> nn.Module:
    """Return a user's loss as a module.

    Args:
        own: A module, a function of logits and targets, or what returns a module when it is called without arguments.

    Raises:
        UserError: It is none of these.
    """
    if isinstance(own, nn.Module):
        return own
    called = own
    while isinstance(called, functools.partial):
        called = called.func
    if not isinstance(called, type):
        try:
            parameters = inspect.signature(own).parameters.values()
        except ValueError:
            raise UserError(
                f"model.loss: {class_path_of(own)} does not say what it takes; call it in a function of your own, of "
                "logits and targets"
            ) from None
        needed = [p for p in parameters if p.default is p.empty and p.kind in _BY_PLACE]
        if len(needed) == 2:
            return _OwnFunction(own)
    made = call_own(own, "model.loss")
    if not isinstance(made, nn.Module):
        raise UserError(f"model.loss: {class_path_of(own)} returns a {class_path_of(made)}; expected a torch.nn.Module")
    return made


def build_loss(settings: LossSettings, counts: Sequence[int]) -> nn.Module:
    """Return a module that maps logits (B, K) and targets (B,) or (B, K) to the mean loss.

    Args:
        settings: The loss.
        counts: Training images of each class, (K,).
    """
    images = torch.tensor(counts, dtype=torch.float32)
    rarity = images.sum() / (len(images) * images.clamp(min=1))
    return _Loss(settings, rarity if settings.class_weights == "auto" else torch.ones(len(images)))

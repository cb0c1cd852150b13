"""What trains when, and at which learning rate.

A strategy is a pure function from the epoch to the frozen parts, so a resumed run needs no memory of it. All
parameters are in the optimiser from the first step; freezing only flips ``requires_grad`` and BatchNorm's mode.
To add a strategy, write a function and name it in `STRATEGIES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import nn

from rexnet_lit.errors import UserError, did_you_mean

__all__ = [
    "STRATEGIES",
    "OptimizerSettings",
    "StrategySettings",
    "build_optimizer",
    "freeze",
    "freeze_batchnorm",
]


@dataclasses.dataclass(frozen=True)
class StrategySettings:
    """What trains.

    Args:
        name: ``full`` trains everything; ``linear_probe`` trains the head on a frozen backbone.
    """

    name: Literal["full", "linear_probe"] = "full"

    def __post_init__(self) -> None:
        if self.name not in STRATEGIES:
            raise UserError(f"model.strategy.name is {self.name!r}; expected one of {', '.join(STRATEGIES)}")


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """The optimiser.

    Args:
        name: Any of timm's: ``sgd`` (Nesterov), ``adamw``, ``lamb``, ``lion``, ``muon``, ...
        lr: Full learning rate, reached after the warm-up.
        weight_decay: Not applied to biases and normalisation.
        momentum: Of ``sgd`` and its kin.
        layer_decay: Each stage's rate is this share of the next one's, seen from the head; 1 for none.
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01
    momentum: float = 0.9
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        for key, low, high in (("lr", 0, 100), ("layer_decay", 0, 1)):
            if not low < getattr(self, key) <= high:
                raise UserError(f"model.optimizer.{key} is {getattr(self, key)}; expected above {low} and up to {high}")
        from timm.optim import list_optimizers

        known = [str(name) for name in list_optimizers()]
        if self.name.lower() not in known:
            near = did_you_mean(self.name, known)
            raise UserError(f"model.optimizer.name: timm has no optimiser {self.name!r}{near}")
        if not self.weight_decay >= 0 or not 0 <= self.momentum < 1:
            raise UserError("model.optimizer: weight_decay must be 0 or more and momentum from 0 to below 1")


def _full(epoch: int, settings: StrategySettings) -> tuple[str, ...]:
    return ()


def _linear_probe(epoch: int, settings: StrategySettings) -> tuple[str, ...]:
    return ("stem", "features")


STRATEGIES: dict[str, Callable[[int, StrategySettings], tuple[str, ...]]] = {
    "full": _full,
    "linear_probe": _linear_probe,
}
"""Each maps an epoch (from 0) to the names of the network's frozen submodules."""


def _frozen_modules(network: nn.Module, settings: StrategySettings, epoch: int) -> Iterator[nn.Module]:
    for name in STRATEGIES[settings.name](epoch, settings):
        yield network.get_submodule(name)


def freeze(network: nn.Module, settings: StrategySettings, epoch: int) -> None:
    """Set every parameter's ``requires_grad`` as the strategy wants it in ``epoch``."""
    network.requires_grad_(True)
    for module in _frozen_modules(network, settings, epoch):
        module.requires_grad_(False)


def freeze_batchnorm(network: nn.Module, settings: StrategySettings, epoch: int) -> None:
    """Put frozen parts in eval mode: BatchNorm's running statistics stay as they are and dropout is off."""
    for module in _frozen_modules(network, settings, epoch):
        module.eval()


def build_optimizer(network: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Return timm's optimiser over all parameters, decay and layer-wise rates by group.

    Raises:
        UserError: The optimiser refuses the settings.
    """
    from timm import optim

    groups: list[dict[str, Any]]
    trains = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    network.requires_grad_(True)  # timm leaves out what is frozen now, and a later epoch may unfreeze it
    if settings.layer_decay == 1.0:
        groups = optim.param_groups_weight_decay(network, settings.weight_decay)
    else:
        groups = optim.param_groups_layer_decay(network, settings.weight_decay, layer_decay=settings.layer_decay)
    for parameter, flag in trains:
        parameter.requires_grad_(flag)
    for group in groups:  # timm leaves the scale to its own schedulers
        group["lr"] = settings.lr * group.pop("lr_scale", 1.0)
    try:
        optimizer = optim.create_optimizer_v2(
            groups, opt=settings.name, lr=settings.lr, weight_decay=0.0, momentum=settings.momentum
        )
    except (TypeError, ValueError, RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"model.optimizer: {settings.name} refuses its settings: {error}") from None
    return optimizer

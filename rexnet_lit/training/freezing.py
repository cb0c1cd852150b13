"""What trains when, and at which learning rate.

A strategy is a pure function from the epoch to the frozen parts, so a resumed run needs no memory of it. All
parameters are in the optimiser from the first step; freezing only flips ``requires_grad`` and BatchNorm's mode.
To add a strategy, write a function and name it in `STRATEGIES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, cast

from torch import nn

from rexnet_lit.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class StrategySettings:
    """What trains.

    The backbone's groups are timm's: ``stem``, ``features.0``, ``features.1``, ...: 18 of them in every ReXNet.

    Args:
        name: ``full`` trains everything; ``linear_probe`` the head on a frozen backbone, whose features are computed
            once where the augmentation allows it; ``partial`` all but the first groups; ``staged`` the head first,
            then the upper half of the groups too, then all.
        frozen: How many groups ``partial`` keeps frozen, counted from the stem.
        unfreeze_epochs: The epochs, counted from 0, from which ``staged`` trains the upper half, and all.
        bn: ``frozen`` keeps BatchNorm's running statistics, and normalises by them, in what trains too.
        solver: ``logistic`` begins with the best linear head for the frozen features (scikit-learn's logistic
            regression, its regularisation chosen by the validation loss); a ``linear_probe`` is then done.
        views: How many augmented views of each image a ``linear_probe`` computes features of, to train on them in
            turn; 0 computes them anew in each epoch, unless the recipe does not augment.
        blend: At the end, look for better weights than the best epoch's: the last epoch's and, with a linear head and
            up to 20,000 training images, the last epoch's with a solved head and, from given weights, those between
            the given and the fine-tuned ones, with solved heads. The validation loss chooses, and ``best.ckpt`` holds
            them. Not for a ``linear_probe``. In Python, add `blend.Blend` to the trainer's callbacks, and
            `guards.RunCheckpoint`.
    """

    name: Literal["full", "linear_probe", "partial", "staged"] = "full"
    frozen: int = 9
    unfreeze_epochs: tuple[int, int] = (1, 2)
    bn: Literal["train", "frozen"] = "train"
    solver: Literal["none", "logistic"] = "none"
    views: int = 0
    blend: bool = False

    def __post_init__(self) -> None:
        if self.name not in STRATEGIES:
            raise UserError(f"model.strategy.name is {self.name!r}; expected one of {', '.join(STRATEGIES)}")
        for key, known in (("bn", ("train", "frozen")), ("solver", ("none", "logistic"))):
            if getattr(self, key) not in known:
                raise UserError(f"model.strategy.{key} is {getattr(self, key)!r}; expected one of {', '.join(known)}")
        object.__setattr__(self, "unfreeze_epochs", tuple(self.unfreeze_epochs))
        epochs = self.unfreeze_epochs
        if len(epochs) != 2 or not 0 <= epochs[0] <= epochs[1]:
            raise UserError(
                f"model.strategy.unfreeze_epochs is {list(epochs)}; expected two epochs in order, such as [1, 2]"
            )
        if not 0 <= self.frozen <= _GROUPS:
            raise UserError(f"model.strategy.frozen is {self.frozen}; a ReXNet has {_GROUPS} groups, with the stem")
        if self.views < 0:
            raise UserError(f"model.strategy.views is {self.views}; expected 0 or more")


_GROUPS = 18


def _full(epoch: int, settings: StrategySettings, groups: Sequence[str]) -> Sequence[str]:
    return ()


def _linear_probe(epoch: int, settings: StrategySettings, groups: Sequence[str]) -> Sequence[str]:
    return groups


def _partial(epoch: int, settings: StrategySettings, groups: Sequence[str]) -> Sequence[str]:
    return groups[: settings.frozen]


def _staged(epoch: int, settings: StrategySettings, groups: Sequence[str]) -> Sequence[str]:
    stage = sum(epoch >= start for start in settings.unfreeze_epochs)
    return (groups, groups[: len(groups) // 2], ())[stage]


STRATEGIES: dict[str, Callable[[int, StrategySettings, Sequence[str]], Sequence[str]]] = {
    "full": _full,
    "linear_probe": _linear_probe,
    "partial": _partial,
    "staged": _staged,
}
"""Each maps an epoch (from 0) and the backbone's groups, from the stem up, to the frozen ones."""


def backbone_groups(network: nn.Module) -> list[str]:
    """Return the backbone's parts from the stem up, by the names that timm's ``group_matcher`` tells apart."""
    return ["stem", *(f"features.{i}" for i in range(len(cast(Any, network).features)))]


def _frozen_modules(network: nn.Module, settings: StrategySettings, epoch: int) -> Iterator[nn.Module]:
    for name in STRATEGIES[settings.name](epoch, settings, backbone_groups(network)):
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
    if settings.bn == "frozen":
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()

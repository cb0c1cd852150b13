"""Fine-tuning strategies: which parts of the network train in which epoch.

A strategy is a pure function from the epoch to the frozen parts, so a resumed run needs no state for it. All
parameters are in the optimiser from the first step; freezing only changes ``requires_grad`` and BatchNorm's mode.
Parameters that the user has frozen stay so under every strategy.
To add a strategy, write a function and name it in `STRATEGIES`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from torch import nn

from rexnet_lit.utils.errors import UserError, plural
from rexnet_lit.utils.settings import check_choice, check_range


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

_GROUPS = 18

if not TYPE_CHECKING:
    StrategyName = Literal[tuple(STRATEGIES)]
else:
    StrategyName = str


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
        solver: ``logistic`` starts from the best linear head for the frozen features (scikit-learn's logistic
            regression, its regularisation chosen by the validation loss); a ``linear_probe`` is then done.
        views: How many augmented views of each image a ``linear_probe`` computes features of, to train on them in
            turn; 0 computes them in each epoch, unless the recipe does not augment.
        blend: When training ends, select the weights that ship among the best epoch's, the last epoch's and, with a
            linear head and up to 20,000 training images, the last epoch's with a solved head and, when training
            started from given weights, interpolations between these and the fine-tuned ones, with solved heads. The
            lowest validation loss wins, and is written to ``best.ckpt``. Not for a ``linear_probe``. In Python, add
            `callbacks.weight_selection.WeightSelection` and `callbacks.checkpoint.RunCheckpoint` to the trainer.
    """

    name: StrategyName = "full"
    frozen: int = 9
    unfreeze_epochs: tuple[int, int] = (1, 2)
    bn: Literal["train", "frozen"] = "train"
    solver: Literal["none", "logistic"] = "none"
    views: int = 0
    blend: bool = False

    def __post_init__(self) -> None:
        check_choice("model.strategy.name", self.name, STRATEGIES)
        check_choice("model.strategy.bn", self.bn, ("train", "frozen"))
        check_choice("model.strategy.solver", self.solver, ("none", "logistic"))
        check_range("model.strategy.frozen", self.frozen, f"[0, {_GROUPS}]", "the stem is a group too", whole=True)
        check_range("model.strategy.views", self.views, "[0, inf)", whole=True)
        object.__setattr__(self, "unfreeze_epochs", tuple(self.unfreeze_epochs))
        epochs = self.unfreeze_epochs
        if len(epochs) != 2 or not 0 <= epochs[0] <= epochs[1]:
            raise UserError(
                f"model.strategy.unfreeze_epochs is {list(epochs)}; expected two epochs in order, such as [1, 2]"
            )

    @property
    def solves_head(self) -> bool:
        """Whether the head is solved on the frozen features before training."""
        return self.solver == "logistic"

    @property
    def only_solves(self) -> bool:
        """Whether nothing is left to train after that."""
        return self.solves_head and self.name == "linear_probe"


def backbone_groups(network: nn.Module) -> list[str]:
    """Return the backbone's parts from the stem up, by the names of timm's ``group_matcher``."""
    return ["stem", *(f"features.{i}" for i in range(len(getattr(network, "features", ()))))]


def _frozen_modules(network: nn.Module, settings: StrategySettings, epoch: int) -> Iterator[nn.Module]:
    for name in STRATEGIES[settings.name](epoch, settings, backbone_groups(network)):
        yield network.get_submodule(name)


def freeze(network: nn.Module, settings: StrategySettings, epoch: int, frozen: set[str]) -> None:
    """Set which parameters train in ``epoch``; those that the user has frozen stay frozen.

    Args:
        network: The network.
        settings: The strategy.
        epoch: From 0.
        frozen: Names of the parameters that the strategy has frozen so far. It is updated.
    """
    unfreeze(network, frozen)
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    for module in _frozen_modules(network, settings, epoch):
        module.requires_grad_(False)
    frozen |= {name for name, parameter in trained.items() if not parameter.requires_grad}


def unfreeze(network: nn.Module, frozen: set[str]) -> None:
    """Let all parameters train that `freeze` has frozen."""
    for name, parameter in network.named_parameters():
        if name in frozen:
            parameter.requires_grad_(True)
    frozen.clear()


def settings(network: nn.Module, frozen: Collection[str]) -> dict[str, str]:
    """Return what identifies the parameters that the user has frozen, if there are any."""
    by_user = [name for name, p in network.named_parameters() if not p.requires_grad and name not in frozen]
    digest = hashlib.sha256("\0".join(by_user).encode()).hexdigest()[:8]
    return {"frozen": f"{plural(len(by_user), 'parameter', 'parameters')}, {digest}"} if by_user else {}


def freeze_batchnorm(network: nn.Module, settings: StrategySettings, epoch: int) -> None:
    """Put frozen parts in eval mode: BatchNorm's running statistics stay as they are and dropout is off."""
    for module in _frozen_modules(network, settings, epoch):
        module.eval()
    if settings.bn == "frozen":
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()

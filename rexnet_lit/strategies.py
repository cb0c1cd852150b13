"""What trains when, and at which learning rate.

A strategy is a pure function from the epoch to the frozen parts, so a resumed run needs no memory of it. All
parameters are in the optimiser from the first step; freezing only flips ``requires_grad`` and BatchNorm's mode.
To add a strategy, write a function and name it in `STRATEGIES`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, cast

import torch
from torch import nn

from rexnet_lit.errors import UserError, did_you_mean

__all__ = [
    "STRATEGIES",
    "OptimizerSettings",
    "StrategySettings",
    "backbone_groups",
    "build_optimizer",
    "freeze",
    "freeze_batchnorm",
]


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


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """The optimiser.

    Args:
        name: Any of timm's but AdaHessian and Kron: ``sgd`` (Nesterov), ``adamw``, ``lamb``, ``lion``, ``muon``, ...
        lr: Full learning rate, reached after the warm-up; by default what suits batches of 32: for ``sgd`` 0.05 from
            given weights and 0.1 from scratch, for all others (it is AdamW's) 0.0015 and 0.004.
        weight_decay: Not applied to biases and normalisation.
        momentum: Of ``sgd`` and its kin.
        layer_decay: Each group's rate is this share of the next one's, seen from the head; 1 for none.
        base_batch_size: The images of a step (of all processes, accumulated ones too) that ``lr`` is meant for: for
            other numbers the rate changes in proportion, that of Adam's kin with the square root. None leaves it.
    """

    name: str = "adamw"
    lr: float | None = None
    weight_decay: float = 0.01
    momentum: float = 0.9
    layer_decay: float = 1.0
    base_batch_size: int | None = None

    def __post_init__(self) -> None:
        for key, high in (("lr", 100), ("layer_decay", 1)):
            value = getattr(self, key)
            if value is not None and not 0 < value <= high:
                raise UserError(f"model.optimizer.{key} is {value}; expected above 0 and up to {high}")
        from timm.optim import list_optimizers

        known = [str(name) for name in list_optimizers()]
        if self.name.lower() not in known:
            near = did_you_mean(self.name, known)
            raise UserError(f"model.optimizer.name: timm has no optimiser {self.name!r}{near}")
        if why := _UNFIT.get(self.name.lower()):
            raise UserError(f"model.optimizer.name: {self.name} {why}; take another, such as adamw")
        if not self.weight_decay >= 0 or not 0 <= self.momentum < 1:
            raise UserError("model.optimizer: weight_decay must be 0 or more and momentum from 0 to below 1")
        if self.base_batch_size is not None and self.base_batch_size < 1:
            raise UserError(f"model.optimizer.base_batch_size is {self.base_batch_size}; expected 1 or more")

    def full_lr(self, scratch: bool, batch_size: int | None = None) -> float:
        """Return the full learning rate.

        Args:
            scratch: Whether the weights are random at first.
            batch_size: Images of a step, where they are known; the rate follows them by timm's rule.
        """
        lr = self.lr
        if lr is None:
            lr = _LR["sgd" if self.name.lower() == "sgd" else "adamw"][scratch]
        if self.base_batch_size is None or batch_size is None:
            return lr
        ratio = batch_size / self.base_batch_size
        adaptive = any(kind in self.name.lower() for kind in ("ada", "lamb"))
        return lr * (math.sqrt(ratio) if adaptive else ratio)


_KRON = "compiles itself for minutes, with a compiler that may not be there"
_UNFIT = {"adahessian": "needs gradients of gradients", "kron": _KRON, "kronw": _KRON, "kronc": _KRON}

_LR = {"sgd": (0.05, 0.1), "adamw": (0.0015, 0.004)}
"""Default learning rates from given weights and from scratch: ``tests/benchmarks/bench_accuracy.py``."""


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


def build_optimizer(network: nn.Module, settings: OptimizerSettings, lr: float | None = None) -> torch.optim.Optimizer:
    """Return timm's optimiser over all parameters, decay and layer-wise rates by group.

    Args:
        network: What `network.build_network` returned.
        settings: The optimiser's.
        lr: The full learning rate (`OptimizerSettings.full_lr`); by default the settings', or that from given weights.

    Raises:
        UserError: The optimiser refuses the settings.
    """
    from timm import optim

    lr = settings.full_lr(scratch=False) if lr is None else lr
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
        group["lr"] = lr * group.pop("lr_scale", 1.0)
    plain = settings.name.lower() == "sgd" and not settings.momentum  # Nesterov's wants some
    try:
        optimizer = optim.create_optimizer_v2(
            groups, opt="momentum" if plain else settings.name, lr=lr, weight_decay=0.0, momentum=settings.momentum
        )
    except (TypeError, ValueError, RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"model.optimizer: {settings.name} refuses its settings: {error}") from None
    if isinstance(optimizer, torch.optim.Adam) and next(network.parameters()).device.type == "cpu":
        # One call for all parameters. Not on a GPU: Lightning could not clip gradients under 16-mixed then. Not SGD:
        # torch's fused one fails where only some parameters have a momentum yet.
        for group in optimizer.param_groups:
            group["fused"] = True
    return optimizer

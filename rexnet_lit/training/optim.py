"""The optimiser, its learning rate, and its parameter groups."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import nn

from rexnet_lit.utils.errors import UserError, did_you_mean


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

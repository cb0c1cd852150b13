"""The optimiser, its learning rate and parameter groups, and the average of the weights over its steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rexnet_lit.utils.errors import UserError, did_you_mean
from rexnet_lit.utils.settings import check_range

_KRON = "compiles itself for minutes, with a compiler that may be missing"
_UNSUPPORTED = {"adahessian": "needs second derivatives", "kron": _KRON, "kronw": _KRON, "kronc": _KRON}

_LR = {"sgd": (0.05, 0.1), "adamw": (0.0015, 0.004)}
"""Default learning rates from given weights and from scratch: ``tests/benchmarks/bench_accuracy.py``."""


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """The optimiser.

    Args:
        name: Any of timm's except AdaHessian and Kron: ``sgd`` (Nesterov), ``adamw``, ``lamb``, ``lion``, ``muon``, ...
        lr: Full learning rate, reached after the warm-up. The default suits batches of 32: for ``sgd`` 0.05 from
            given weights and 0.1 from scratch, for all others (tuned for AdamW) 0.0015 and 0.004.
        weight_decay: Not applied to biases and normalisation.
        momentum: For ``sgd`` and similar optimisers.
        layer_decay: Each group's rate is this share of the next one's, counted from the head; 1 for none.
        base_batch_size: The images of a step (over all processes and accumulated batches) that ``lr`` is meant for.
            With other numbers the rate scales in proportion, for adaptive optimisers with the square root. None keeps
            it.
        class_path: An own optimiser in its place, such as ``torch.optim.RMSprop``, which is called with the network's
            parameters. The settings above then have no effect.
        init_args: Its arguments.
    """

    name: str = "adamw"
    lr: float | None = None
    weight_decay: float = 0.01
    momentum: float = 0.9
    layer_decay: float = 1.0
    base_batch_size: int | None = None
    class_path: str | None = None
    init_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        from timm.optim import list_optimizers

        known, name = [str(name) for name in list_optimizers()], self.name.lower()
        if name not in known:
            near = did_you_mean(self.name, known)
            raise UserError(f"model.optimizer.name: timm has no optimiser {self.name!r}{near}")
        if why := _UNSUPPORTED.get(name):
            raise UserError(f"model.optimizer.name: {self.name} {why}; choose another, such as adamw")
        check_range("model.optimizer.lr", self.lr, "(0, 100]", optional=True)
        check_range("model.optimizer.weight_decay", self.weight_decay, "[0, inf]")
        check_range("model.optimizer.momentum", self.momentum, "[0, 1)")
        check_range("model.optimizer.layer_decay", self.layer_decay, "(0, 1]")
        check_range("model.optimizer.base_batch_size", self.base_batch_size, "[1, inf)", optional=True)

    def full_lr(self, scratch: bool, batch_size: int | None = None) -> float:
        """Return the full learning rate.

        Args:
            scratch: Whether training starts from random weights.
            batch_size: Images of a step, if known; the rate scales with them by timm's rule.
        """
        lr = self.lr
        if lr is None:
            lr = _LR["sgd" if self.name.lower() == "sgd" else "adamw"][scratch]
        if self.base_batch_size is None or batch_size is None:
            return lr
        ratio = batch_size / self.base_batch_size
        adaptive = any(kind in self.name.lower() for kind in ("ada", "lamb"))
        return lr * (math.sqrt(ratio) if adaptive else ratio)


def build_optimizer(
    network: nn.Module,
    settings: OptimizerSettings,
    lr: float | None = None,
    more: Sequence[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """Return timm's optimiser over all parameters, with weight decay and layer-wise rates by group.

    Args:
        network: The network.
        settings: The optimiser's settings.
        lr: The full learning rate; by default that of the settings when starting from given weights.
        more: Parameters outside the network, such as a loss's; without weight decay.

    Raises:
        UserError: The optimiser rejects the settings.
    """
    from timm import optim

    lr = settings.full_lr(scratch=False) if lr is None else lr
    groups: list[dict[str, Any]]
    trains = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    network.requires_grad_(True)  # timm leaves out frozen parameters, and a later epoch may unfreeze them
    if settings.layer_decay == 1.0:
        groups = optim.param_groups_weight_decay(network, settings.weight_decay)
    else:
        groups = optim.param_groups_layer_decay(network, settings.weight_decay, layer_decay=settings.layer_decay)
    for parameter, flag in trains:
        parameter.requires_grad_(flag)
    for group in groups:  # timm leaves the scale to its own schedulers
        group["lr"] = lr * group.pop("lr_scale", 1.0)
    if more:
        groups.append({"params": list(more), "lr": lr, "weight_decay": 0.0})
    plain = settings.name.lower() == "sgd" and not settings.momentum  # Nesterov needs some
    try:
        optimizer = optim.create_optimizer_v2(
            groups, opt="momentum" if plain else settings.name, lr=lr, weight_decay=0.0, momentum=settings.momentum
        )
    except (TypeError, ValueError, RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"model.optimizer: {settings.name} rejects its settings: {error}") from None
    optimizer.register_load_state_dict_pre_hook(_keep_settings)
    if isinstance(optimizer, torch.optim.Adam) and next(network.parameters()).device.type == "cpu":
        # One call for all parameters. Not on a GPU: Lightning could not clip gradients under 16-mixed. Not for SGD:
        # torch's fused version fails while only some parameters have a momentum.
        for group in optimizer.param_groups:
            group["fused"] = True
    return optimizer


def _keep_settings(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a checkpoint with this run's rates and weight decay, which a resume may change."""
    groups = [
        {**theirs, **{key: own[key] for key in ("initial_lr", "weight_decay") if key in own}}
        for theirs, own in zip(state["param_groups"], optimizer.param_groups, strict=False)  # torch refuses others
    ]
    return {**state, "param_groups": groups + state["param_groups"][len(groups) :]}


def average(decay: float, averaged: Tensor, current: Tensor, count: Tensor) -> Tensor:
    """Return the moving average after a step, for `WeightAveraging`; its decay rises over the first steps."""
    now = min(decay, (1 + int(count)) / (10 + int(count)))
    return averaged.lerp(current.to(averaged.dtype), 1 - now) if averaged.is_floating_point() else current

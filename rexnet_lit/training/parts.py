"""The parts of a `RexNetModule`: built from its settings, or a user's own in their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import lightning.pytorch as pl
import numpy as np
import timm.models.rexnet
import torch
from lightning.pytorch.utilities import rank_zero_only
from timm.models import PretrainedCfg
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import Metric

from rexnet_lit.data.datamodule import find_datamodule
from rexnet_lit.data.settings import CropMode, failed_checks
from rexnet_lit.models import rexnet, variants
from rexnet_lit.models.heads import HeadSpec
from rexnet_lit.models.spec import ModelSpec
from rexnet_lit.training import optim, schedules
from rexnet_lit.training.distillation import TeacherSettings
from rexnet_lit.training.freezing import StrategySettings
from rexnet_lit.training.losses import LossSettings
from rexnet_lit.training.optim import OptimizerSettings
from rexnet_lit.training.schedules import Plateau, Schedule, ScheduleSettings
from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.settings import (
    call_own,
    check_choice,
    check_range,
    class_path_of,
    overridden,
    own_part,
    plain_arguments,
)

if TYPE_CHECKING:
    from rexnet_lit.training.module import RexNetModule

Shapes: TypeAlias = dict[str, torch.Size]
"""The shapes of a network's tensors by name."""

SELECT = {"top1": "max", "macro_f1": "max", "loss": "min"}
"""What can make weights the best, and whether more or less of it is better."""

# What the command line parses, and what Python takes as well.
if not TYPE_CHECKING:
    Select = Literal[tuple(SELECT)]
    Head, Strategy, OptimizerLike = HeadSpec, StrategySettings, OptimizerSettings
    ScheduleLike, Loss, Network = ScheduleSettings, LossSettings, dict[str, Any] | None
    Taught = TeacherSettings
else:
    Plain: TypeAlias = str | Mapping[str, Any]
    Select = str
    Head: TypeAlias = HeadSpec | Plain
    Strategy: TypeAlias = StrategySettings | Plain
    OptimizerLike: TypeAlias = OptimizerSettings | Plain | Callable[..., Optimizer]
    ScheduleLike: TypeAlias = ScheduleSettings | Plain | Callable[[Optimizer], Any]
    Loss: TypeAlias = LossSettings | Plain | nn.Module | Callable[..., Any]
    Taught: TypeAlias = TeacherSettings | Plain | None
    Network: TypeAlias = nn.Module | Mapping[str, Any] | None


def check_settings(values: Mapping[str, Any]) -> None:
    """Raise `UserError` for numbers and names out of range among the settings of a `RexNetModule`, for all at once."""
    problems = failed_checks(
        partial(check_range, "model.ema", values["ema"], "[0, 1)", "0 for none, or a decay such as 0.999"),
        partial(check_range, "model.drop_path_rate", values["drop_path_rate"], "[0, 1)"),
        partial(check_range, "model.target_precision", values["target_precision"], "(0, 1)"),
        partial(check_choice, "model.select", values["select"], SELECT),
    )
    if problems:
        raise UserError("; ".join(problems))


def build_own(value: Any, key: str, kind: type) -> Any:
    """Return a user's own object of ``kind``, given as it is or by its ``class_path`` and ``init_args``.

    Raises:
        UserError: It is something else, or cannot be built.
    """
    if isinstance(value, Mapping) and set(value) <= {"class_path", "init_args"} and value.get("class_path"):
        value = call_own(cast(Any, own_part(value["class_path"], value.get("init_args"), key)), key)
    if not isinstance(value, kind):
        raise UserError(
            f"{key} is a {class_path_of(value)}; expected a {class_path_of(kind)}, or its class_path and init_args"
        )
    return value


def build_metrics_of(values: Mapping[str, Any] | None) -> dict[str, Metric]:
    """Return further metrics from ``model.metrics``."""
    return {name: build_own(value, f"model.metrics.{name}", Metric) for name, value in (values or {}).items()}


def _is_described(network: nn.Module, spec: ModelSpec, built: Shapes | None) -> bool:
    """Return whether a network is the ReXNet of ``spec``, with no layer replaced: a file of it needs no other code."""
    if not isinstance(network, timm.models.rexnet.RexNet):
        return False
    if built is None:
        with torch.device("meta"):
            built = shapes_of(rexnet.build_network(spec.backbone, spec.num_classes, spec.head))
    return shapes_of(network) == built


def shapes_of(network: nn.Module) -> Shapes:
    """Return the shapes of a network's tensors by name."""
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def describe_network(
    spec: ModelSpec, network: nn.Module, image_size: int | None, crop_mode: CropMode | None, built: Shapes | None
) -> ModelSpec:
    """Return ``spec`` with the class of a user's own network, and its preprocessing if timm knows it.

    Args:
        spec: The description so far.
        network: The network.
        image_size: Height and width in pixels; the network's own by default.
        crop_mode: How an image becomes a square; likewise.
        built: What `shapes_of` says of the ReXNet of ``spec``, if it is known.

    Raises:
        UserError: It lacks what the module calls, or has not one logit per class.
    """
    if _is_described(network, spec, built):
        return dataclasses.replace(spec, network=None)
    lacks = [name for name in ("forward_features", "forward_head", "get_classifier") if not hasattr(network, name)]
    if lacks:
        raise UserError(f"model.network: {class_path_of(network)} has no {', '.join(lacks)}, as timm's models have")
    layers = cast(Any, network).get_classifier().modules()
    sizes = [layer.out_features for layer in layers if hasattr(layer, "out_features")]
    if sizes and sizes[-1] != spec.num_classes:
        raise UserError(f"model.network has {sizes[-1]} logits for {spec.num_classes} classes; replace its last layer")
    cfg = getattr(network, "pretrained_cfg", None)
    recipe = variants.recipe_of(PretrainedCfg(**cfg), image_size, crop_mode) if cfg else spec.eval_recipe
    return dataclasses.replace(spec, network=class_path_of(network), eval_recipe=recipe)


def describe_preprocessing(spec: ModelSpec, trainer: pl.Trainer) -> ModelSpec:
    """Return ``spec``, which says whether its preprocessing is only assumed; the first time, print what is assumed."""
    assumed = find_datamodule(trainer) is None
    if assumed and not spec.assumed_preprocessing:
        recipe = spec.eval_recipe
        rank_zero_only(print)(
            "note: the images come from your own loaders. It is assumed that they are prepared as "
            f"RexNetModule.eval_transform does it: RGB, {recipe.image_size} x {recipe.image_size} pixels, "
            f"(x / 255 - {recipe.mean}) / {recipe.std}; the model will be used so wherever it is loaded",
            flush=True,
        )
    return dataclasses.replace(spec, assumed_preprocessing=assumed)


def check_network(module: RexNetModule) -> None:
    """Raise `UserError` if a setting needs the layers of a ReXNet, and the network is another."""
    if module.spec.network is None:
        return
    strategy = module.strategy_settings
    needs = {
        "strategy.name": strategy.name != "full",
        "strategy.solver": strategy.solves_head,
        "strategy.blend": strategy.blend,
        "calibrate": module.calibrate,
        "drop_path_rate": module.drop_path_rate > 0,
        "grad_checkpointing": module.grad_checkpointing and not hasattr(module.network, "set_grad_checkpointing"),
    }
    found = [f"model.{key}" for key, needed in needs.items() if needed]
    if found:
        raise UserError(
            f"{', '.join(found)}: this needs the unchanged layers of a ReXNet, but model.network is your own "
            f"({module.spec.network}); leave it at its default"
        )


def class_counts(module: RexNetModule) -> Sequence[int]:
    """Return the training images of each class, (K,); ones if the loss does not need them."""
    data, classes = find_datamodule(module.trainer), module.spec.num_classes
    if module.loss_settings.class_weights == "none":
        return [1] * classes
    if data is None:
        raise UserError("model.loss.class_weights: auto counts the images of an ImageFolderDataModule")
    counts: list[int] = np.bincount(data.splits()["train"].targets, minlength=classes).tolist()
    return counts


def trains_long(module: RexNetModule) -> bool:
    """Return whether channels_last pays on a GPU.

    It halves the time of a step in 16 bits. But cuDNN compiles its kernels for each batch size, which takes 5 to
    10 s (tests/benchmarks/bench_blocks.py, H200): as long as the whole training on a small folder.
    """
    if find_datamodule(module.trainer) is None:
        return False
    steps = schedules.count_steps(module.trainer, module.schedule_settings)[1]
    images = steps * cast(int, schedules.images_per_step(module.trainer))
    return images * (module.spec.eval_recipe.image_size / 224) ** 2 > 100_000


def build_optimizer(module: RexNetModule, own: Any) -> Optimizer:
    """Return the optimiser of the network's parameters and the loss's: the user's ``own``, or from the settings."""
    of_loss = [parameter for parameter in module.loss.parameters() if parameter.requires_grad]
    if own is None:
        return optim.build_optimizer(module.network, module.optimizer_settings, module.lr, of_loss)
    optimizer = call_own(own, "model.optimizer", [*module.network.parameters(), *of_loss])
    if not isinstance(optimizer, Optimizer):
        raise UserError(
            f"model.optimizer: {class_path_of(own)} returned a {class_path_of(optimizer)}, not an optimiser"
        )
    return optimizer


def build_schedule(module: RexNetModule, optimizer: Optimizer, own: Any) -> tuple[dict[str, Any], Plateau | None]:
    """Return Lightning's description of the schedule, and the state of ``plateau``."""
    settings, plateau = module.schedule_settings, None
    if own is not None and not module.strategy_settings.only_solves:
        made = call_own(own, "model.schedule", optimizer)
        found: dict[str, Any] = made if isinstance(made, dict) else {"scheduler": made}
        if isinstance(found.get("scheduler"), ReduceLROnPlateau):
            if module.trainer.limit_val_batches == 0:
                raise UserError("model.schedule: ReduceLROnPlateau needs the validation loss; nothing is validated")
            if found.get("interval", "epoch") == "epoch":  # when there is a loss
                found = {"frequency": module.trainer.check_val_every_n_epoch or 1, **found}
        return {"monitor": "val/loss", **found}, None
    per_epoch, total = schedules.count_steps(module.trainer, settings)
    factor: Any = lambda step: schedules.lr_factor(settings, step, total, per_epoch)  # noqa: E731
    if module.strategy_settings.only_solves:
        factor = lambda step: 0.0  # noqa: E731
    elif settings.name == "plateau":
        factor = plateau = Plateau.start(settings, total, per_epoch)
    return {"scheduler": Schedule(optimizer, factor), "interval": "step"}, plateau


def settings_of_run(module: RexNetModule) -> dict[str, Any]:
    """Return the settings that decide the weights of a run, apart from its data, by name."""
    found: dict[str, Any] = {f"strategy.{key}": v for key, v in dataclasses.asdict(module.strategy_settings).items()}
    kinds: dict[str, tuple[Any, str]] = {
        "optimizer": (module.optimizer_settings, "configure_optimizers"),
        "schedule": (module.schedule_settings, "configure_optimizers"),
        "loss": (module.loss_settings, "configure_loss"),
    }
    for group, (settings, method) in kinds.items():
        values = dataclasses.asdict(settings)
        if own := overridden(module, method):
            values |= {"class_path": own, "init_args": None}
        elif group == "loss" and module.loss is not module._default_loss[0]:
            values |= {"class_path": class_path_of(module.loss), "init_args": plain_arguments(module.loss)}
        if values["class_path"] is not None:  # the others have no effect
            values = {key: values[key] for key in ("class_path", "init_args")}
        found |= {f"{group}.{key}": value for key, value in values.items()}
    names = ("select", "ema", "drop_path_rate", "grad_checkpointing")
    found |= {**module.start.settings(), "teacher": module.teacher and str(module.teacher)}
    return found | {name: getattr(module, name) for name in names}

"""Measuring the symmetries of the training images by the features of the network before its training."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from rexnet_lit.checks.symmetries import HFLIP, VALIDATION, Symmetries, judge, training_images
from rexnet_lit.data.datamodule import ImageFolderDataModule
from rexnet_lit.data.folder import Samples
from rexnet_lit.data.splits import draw_evenly
from rexnet_lit.models import rexnet
from rexnet_lit.training.features import embedder
from rexnet_lit.training.module import RexNetModule

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    HFLIP: lambda images: images.flip(3),
    "data.augment.vflip": lambda images: images.flip(2),
    "data.augment.quarter_turns": lambda images: images.rot90(1, (2, 3)),
}
"""What the setting of each symmetry does with a batch of images (B, 3, S, S)."""
_LARGEST = 128
"""Larger images are shrunk to this side, in pixels: a third of the time at 224, for a comparison alone."""


def measure_symmetries(
    module: RexNetModule, data: ImageFolderDataModule, views: Mapping[str, Callable[[Tensor], Tensor]] = VIEWS
) -> Symmetries | None:
    """Return the symmetries, the same on all processes; None if there are too few images. No weights change.

    None also for a network of the user's own, which need not take images of every size.

    Args:
        module: The module; its network has not been trained on these images.
        data: Its data, which `setup` has prepared for a fit.
        views: What to do with images, by setting.
    """
    train, val = _draw(data, module.spec.num_classes)
    if module.spec.network is not None or not len(val) or len({*train.targets.tolist()}) < 2:
        return None
    network, trainer = module.network, module.trainer
    module.network = copy.deepcopy(network).eval()
    try:
        if module.scratch:
            _estimate_statistics(module.network)
            data.compute_features(train, functools.partial(_embed_some, module.network))
            module.network.eval()
        embed = embedder(module)
        known = data.compute_features(train, lambda images: embed(_shrink(images)))[0]
        seen = data.compute_features(val, lambda images: _embed_views(embed, _shrink(images), views))[0]
    finally:
        module.network = network
    found = None
    if trainer.is_global_zero:
        upright, *changed = np.split(seen.numpy(), 1 + len(views), axis=1)
        by_key = dict(zip(views, changed, strict=True))
        found = judge(known.numpy(), train.targets, upright, val.targets, by_key)
    return cast(Symmetries, trainer.strategy.broadcast(found))


def images_measured(train: int, val: int, classes: int) -> int:
    """Return how many images, changed ones too, the features are computed of to judge one symmetry."""
    return min(train, training_images(classes)) + 2 * min(val, VALIDATION)


def _draw(data: ImageFolderDataModule, classes: int) -> tuple[Samples, Samples]:
    """Return the images to train a classifier on, and those to test it on: training images if there are no others."""
    splits = data.splits()
    train, most = splits["train"], training_images(classes)
    if "val" in splits:
        val = splits["val"]
        return train.take(draw_evenly(train.targets, most)), val.take(draw_evenly(val.targets, VALIDATION))
    held = draw_evenly(train.targets, min(VALIDATION, len(train) // 3))
    others = train.take(np.setdiff1d(np.arange(len(train)), held))
    return others.take(draw_evenly(others.targets, most)), train.take(held)


def _shrink(images: Tensor) -> Tensor:
    """Return a batch (B, 3, S, S) with S of at most `_LARGEST`."""
    if images.shape[-1] <= _LARGEST:
        return images
    return nn.functional.interpolate(images, (_LARGEST, _LARGEST), mode="bilinear", antialias=True)


def _embed_views(
    embed: Callable[[Tensor], Tensor], images: Tensor, views: Mapping[str, Callable[[Tensor], Tensor]]
) -> Tensor:
    """Return the features of a batch as it is and after each change, side by side."""
    return torch.cat([embed(images), *(embed(change(images)) for change in views.values())], 1)


def _estimate_statistics(network: nn.Module) -> None:
    """Let the BatchNorm layers of an untrained network average the statistics of what it is given next."""
    for layer in network.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.reset_running_stats()
            layer.momentum = None
            layer.train()


def _embed_some(network: nn.Module, images: Tensor) -> Tensor:
    """Return the features of a batch, which BatchNorm needs two images for."""
    batch = images if len(images) > 1 else images.repeat(2, 1, 1, 1)
    batch = batch.to(next(network.parameters()).dtype)
    with torch.no_grad():
        return rexnet.embed(network, rexnet.match_memory_format(_shrink(batch), network))[: len(images)]

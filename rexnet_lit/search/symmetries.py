"""Measures the symmetries of the images before the first run of a search, on the features of its untrained network."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from rexnet_lit.checks.symmetries import VALIDATION, Symmetries, judge, training_images
from rexnet_lit.data.datamodule import find_datamodule
from rexnet_lit.data.splits import draw_evenly
from rexnet_lit.models import rexnet
from rexnet_lit.search.space import Setting, Values
from rexnet_lit.training.features import embedder
from rexnet_lit.training.module import RexNetModule
from rexnet_lit.utils.files import write_file


def wanted_settings(found: Symmetries | None, base: Mapping[str, Any], space: Mapping[str, Setting]) -> Values:
    """Return the searched settings that should change: symmetries to use, and others not to use.

    Args:
        found: The symmetries, if they are known.
        base: The settings of the config, by key.
        space: The settings to search.
    """
    wanted = Values()
    for key, holds in found.holds.items() if found is not None else ():
        ends = (space[key].choices or (space[key].low, space[key].high)) if key in space else ()
        values = sorted(value for value in ends if (value > 0) == holds)
        if values and (base[key] > 0) != holds:
            wanted[key] = values[0]
    return wanted


def read_symmetries(file: Path) -> Symmetries | None:
    """Return what a search has measured, None if it has not."""
    return Symmetries(**json.loads(file.read_text("utf-8"))) if file.is_file() else None


class MeasureSymmetries(Callback):
    """Measures the symmetries before the training of a fit, whose weights do not change by it.

    Args:
        file: Where to write them.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure them, unless that has been done, or the fit is resumed or has a data module of another kind."""
        data = find_datamodule(trainer)
        if self.file.is_file() or trainer.global_step or data is None or not isinstance(pl_module, RexNetModule):
            return
        most = {"train": training_images(pl_module.spec.num_classes), "val": VALIDATION}
        splits = {str(name): samples for name, samples in data.splits().items()}
        train, val = (splits[name].take(draw_evenly(splits[name].targets, count)) for name, count in most.items())
        network = pl_module.network
        pl_module.network = copy.deepcopy(network).eval()
        try:
            if pl_module.scratch:
                _estimate_statistics(pl_module.network)
                data.compute_features(train, functools.partial(_embed_some, pl_module.network), evaluate=True)
                pl_module.network.eval()
            embed = embedder(pl_module)
            known = data.compute_features(train, embed, evaluate=True)[0]
            views = data.compute_features(val, lambda images: torch.cat([embed(view) for view in _views(images)], 1))[0]
        finally:
            pl_module.network = network
        if trainer.is_global_zero:
            seen = np.split(views.numpy(), views.shape[1] // known.shape[1], axis=1)
            found = judge(known.numpy(), train.targets, seen, val.targets)
            write_file(self.file, json.dumps(dataclasses.asdict(found), indent=1) + "\n")


def _views(images: Tensor) -> tuple[Tensor, ...]:
    """Return a batch (B, 3, S, S) as it is, and mirrored, upside down, and turned by a quarter."""
    return images, images.flip(3), images.flip(2), images.rot90(1, (2, 3))


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
        return rexnet.embed(network, rexnet.match_memory_format(batch, network))[: len(images)]

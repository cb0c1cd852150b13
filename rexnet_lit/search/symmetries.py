"""Which symmetries the images of a folder have: whether a mirrored or turned one could be among them.

A classifier that has only seen the training images as they are is tested on validation images, as they are and
mirrored, upside down, and turned by a quarter. Where it recognises the changed ones as well, the symmetry holds, and
augmentation with it is likely to help. Where it fails, as for letters, augmentation shows images that do not exist. The
features are those of the network before its training, so this takes seconds.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray
from torch import Tensor, nn

from rexnet_lit.data.datamodule import find_datamodule
from rexnet_lit.data.splits import draw_evenly
from rexnet_lit.models import rexnet
from rexnet_lit.report.comparison import mcnemar, paired_interval
from rexnet_lit.search.space import Setting, Values
from rexnet_lit.training.features import embedder
from rexnet_lit.training.module import RexNetModule
from rexnet_lit.utils.files import write_file

_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "data.augment.hflip": lambda images: images.flip(3),
    "data.augment.vflip": lambda images: images.flip(2),
    "data.augment.quarter_turns": lambda images: images.rot90(1, (2, 3)),
}
"""What each setting does with a batch (B, 3, S, S)."""
_TRAIN, _PER_CLASS, _VAL = 500, 10, 250
"""The images that are used, at most: for training, or so many of each class, and for validation."""
_SURE, _ERRORS = 0.01, 2.5
"""The largest p-value at which a loss counts, and the standard errors by which the classifier must be above chance."""
_LOSS = 0.3
"""A symmetry fails if the classifier no longer recognises this share of what it recognises beyond chance."""


@dataclasses.dataclass(frozen=True)
class Symmetries:
    """What was measured.

    Args:
        upright: Share of the validation images that are recognised as they are.
        changed: The same for the changed images, by setting.
        holds: Whether each symmetry holds, by setting; None if that cannot be told.
    """

    upright: float
    changed: Mapping[str, float]
    holds: Mapping[str, bool | None]

    def __str__(self) -> str:
        """Return one line about them."""
        words = {True: "holds", False: "does not hold", None: "cannot be told"}
        parts = [f"{key} {words[self.holds[key]]} ({share:.0%})" for key, share in self.changed.items()]
        return (
            f"Symmetries of the images, by the share of changed images that is recognised ({self.upright:.0%} of the "
            f"images as they are): {', '.join(parts)}"
        )

    def wanted(self, base: Mapping[str, Any], space: Mapping[str, Setting]) -> Values:
        """Return the searched settings that should change: symmetries to use, and others not to use.

        Args:
            base: The settings of the config, by key.
            space: The settings to search.
        """
        found = Values()
        for key, holds in self.holds.items():
            ends = (space[key].choices or (space[key].low, space[key].high)) if key in space else ()
            values = sorted(value for value in ends if (value > 0) == holds)
            if values and (base[key] > 0) != holds:
                found[key] = values[0]
        return found


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
        most = {"train": max(_TRAIN, _PER_CLASS * pl_module.spec.num_classes), "val": _VAL}
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
            views = (lambda images: images, *_VIEWS.values())
            seen = data.compute_features(val, lambda images: torch.cat([embed(view(images)) for view in views], 1))[0]
        finally:
            pl_module.network = network
        if trainer.is_global_zero:
            features = [part.numpy() for part in seen.chunk(len(views), 1)]
            found = judge(known.numpy(), train.targets, features, val.targets)
            write_file(self.file, json.dumps(dataclasses.asdict(found), indent=1) + "\n")


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
    with torch.no_grad():
        return rexnet.embed(network, rexnet.match_memory_format(batch, network))[: len(images)]


def judge(
    known: NDArray[np.float32],
    targets: NDArray[np.int64],
    seen: Sequence[NDArray[np.float32]],
    val_targets: NDArray[np.int64],
) -> Symmetries:
    """Test a ridge classifier of images as they are on images that are changed.

    Args:
        known: Features of training images, (N, C).
        targets: Their classes, (N,).
        seen: Features of validation images, (M, C): as they are, then changed by each of the settings.
        val_targets: Their classes, (M,).
    """
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), RidgeClassifierCV(np.logspace(0, 5, 11))).fit(known, targets)
    right, *changed = (classifier.predict(features) == val_targets for features in seen)
    chance = float(np.bincount(val_targets).max() / len(val_targets))
    known_share = float(right.mean()) - chance
    tells = known_share > _ERRORS * np.sqrt(chance * (1 - chance) / len(right))
    holds = dict[str, bool | None]()
    for key, after in zip(_VIEWS, changed, strict=True):
        lost, won = int((right & ~after).sum()), int((after & ~right).sum())
        _, most = paired_interval(won, lost, len(right), 0.9)
        fails = (lost - won) / len(right) > _LOSS * known_share and mcnemar(lost, won) < _SURE
        holds[key] = None if not tells else False if fails else True if most < _LOSS * known_share else None
    shares = {key: float(after.mean()) for key, after in zip(_VIEWS, changed, strict=True)}
    return Symmetries(float(right.mean()), shares, holds)

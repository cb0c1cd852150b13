"""Pictures in TensorBoard: augmented training images, the confusion matrix, and the worst mistakes of a validation."""

from __future__ import annotations

import io
import time
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from rexnet_lit.data import decode
from rexnet_lit.data.datamodule import find_datamodule
from rexnet_lit.report.figures import draw_confusion, draw_mistakes, figure_name
from rexnet_lit.report.html import thumbnail
from rexnet_lit.report.predictions import Predictions
from rexnet_lit.report.tables import confused_pairs, confusion_matrix
from rexnet_lit.training.callbacks.predictions import PredictionCollector
from rexnet_lit.training.module import RexNetModule

WORST = 12
MAX_IMAGES = 50_000
"""Validation images up to which the pictures are drawn: the probabilities of all of them are kept for that."""

_SHARE = 0.02
"""Share of a fit's time that drawing may take."""


class AugmentedSamples(Callback):
    """Shows 16 training images, augmented as in the first epoch."""

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log them."""
        data = find_datamodule(trainer)
        if data is not None and _boards(trainer):
            _add(trainer, "augmented samples", make_grid(torch.from_numpy(data.preview()).permute(0, 3, 1, 2), nrow=4))


class ValidationPictures(PredictionCollector):
    """Shows, for validations of a fit, the confusion matrix with class names and the most certain mistakes.

    The first and the last validation have them, and as many others as take 2 % of the time: with few images, drawing
    takes longer than an epoch.
    """

    def __init__(self) -> None:
        super().__init__()
        self._collects = self._due = self._pending = False
        self._began = self._spent = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._began, self._spent, self._pending = time.monotonic(), 0.0, False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide whether there is something to draw, something to draw it on, and time for it."""
        data = find_datamodule(trainer)
        self._collects = trainer.state.fn == "fit" and not trainer.sanity_checking and bool(_boards(trainer))
        self._collects &= data is not None and len(data.splits().get("val", ())) <= MAX_IMAGES
        if self._collects:
            due = self._spent <= _SHARE * (time.monotonic() - self._began)
            self._due = trainer.strategy.broadcast(due)  # the processes' clocks differ

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Keep the probabilities of a batch."""
        if self._collects:
            self.collect(*args, **kwargs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw them if there is time."""
        self._pending = self._collects and not self._due
        if self._collects and self._due:
            started = time.monotonic()
            self._draw(trainer, pl_module)
            self._spent += time.monotonic() - started

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw those of the last validation if there was no time."""
        if self._pending:
            self._draw(trainer, pl_module)
        self._pending = False

    def _draw(self, trainer: Trainer, module: LightningModule) -> None:
        if not isinstance(module, RexNetModule):
            return
        indices, probs = self.gather(trainer)
        data = find_datamodule(trainer)
        if data is None or not len(indices) or not trainer.is_global_zero or not np.isfinite(probs).all():
            return
        samples = data.splits()["val"].take(indices)
        p = Predictions(list(samples.paths), probs, samples.targets, module.spec.class_names)
        short = [figure_name(name, index) for index, name in enumerate(p.names)]
        pairs = confused_pairs(p.truth, p.predicted)
        classes, counts, shares = confusion_matrix(p.truth, p.predicted, len(p.names), pairs)
        _add(trainer, "confusion matrix", _pixels(draw_confusion([short[c] for c in classes], counts, shares)))
        wrong = np.flatnonzero(p.predicted != p.truth)
        worst = wrong[np.argsort(-p.confidence[wrong], kind="stable")][:WORST].tolist()
        images = [thumbnail(lambda path: decode.read(samples.root / path, 160), p.paths[i]) for i in worst]
        captions = [f"{short[p.predicted[i]]}, {p.confidence[i]:.0%}\ntrue: {short[p.truth[i]]}" for i in worst]
        _add(trainer, "worst mistakes", _pixels(draw_mistakes(images, captions)))


def _boards(trainer: Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _add(trainer: Trainer, tag: str, image: Tensor) -> None:
    for board in _boards(trainer):
        add = getattr(board, "add_image", None) or board.experiment.add_image
        add(tag, image, trainer.global_step)


def _pixels(png: bytes) -> Tensor:
    """Return a picture as (3, H, W)."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(png)).convert("RGB"))).permute(2, 0, 1)

"""Predictions collected over batches and processes, and their CSV file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray

from rexnet_lit.data import verify
from rexnet_lit.data.datamodule import find_datamodule
from rexnet_lit.report.predictions import Predictions, write_predictions
from rexnet_lit.training.module import RexNetModule
from rexnet_lit.utils.files import unused_path


class PredictionCollector(Callback):
    """Collects the probabilities of each image from what the steps return.

    A subclass assigns `collect` to the hooks that end a batch: ``on_test_batch_end``.
    """

    def __init__(self) -> None:
        self._indices: list[NDArray[np.int64]] = []
        self._probs: list[NDArray[np.float32]] = []

    def collect(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Keep the probabilities of a batch."""
        if batch_idx == 0:
            self._indices, self._probs = [], []
        if len(batch) > 2:  # a user's own loader has no indices
            probs = outputs["logits"].float().softmax(1) if isinstance(outputs, dict) else outputs
            self._indices.append(batch[2].cpu().numpy())
            self._probs.append(probs.cpu().numpy())

    def gather(self, trainer: Trainer) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the indices (N,) of the images, rising, and their probabilities (N, K), in every process."""
        parts = [(self._indices, self._probs)] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(parts, parts[0])
        indices = np.concatenate([i for part in parts for i in part[0]])
        probs = np.concatenate([p for part in parts for p in part[1]])
        order = np.argsort(indices)
        return indices[order], probs[order]


class PredictionWriter(PredictionCollector):
    """Writes the predictions into a CSV file at ``path``, and a list of the unreadable images beside it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.predictions: Predictions | None = None
        self.quarantined: Path | None = None

    on_predict_batch_end = PredictionCollector.collect

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files."""
        data = find_datamodule(trainer)
        if data is None or not isinstance(pl_module, RexNetModule):
            return
        indices, probs = self.gather(trainer)
        samples = trainer.predict_dataloaders.dataset.samples.take(indices)  # type: ignore[union-attr]
        if not trainer.is_global_zero:
            return
        self.predictions = Predictions(list(samples.paths), probs, None, pl_module.spec.class_names)
        write_predictions(self.predictions, self.path)
        if data.bad_files and self.path.is_file():  # not beside a device such as /dev/stdout
            self.quarantined = unused_path(self.path.with_name("quarantine.csv"))
            verify.write_quarantine(data.bad_files, self.quarantined)

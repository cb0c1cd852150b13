"""Predictions gathered over batches and processes, and their CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray
from torch import Tensor

from rexnet_lit.data import verify
from rexnet_lit.data.datamodule import find_datamodule
from rexnet_lit.report.predictions import Predictions, write_predictions
from rexnet_lit.training.module import RexNetModule
from rexnet_lit.utils.files import unused_path


class PredictionCollector(Callback):
    """Gathers a per-image result over batches and processes, in the order of the images."""

    def __init__(self) -> None:
        self._indices: list[NDArray[np.int64]] = []
        self._rows: list[NDArray[np.float32]] = []

    def _add(self, batch_idx: int, outputs: dict[str, Tensor | None]) -> None:
        logits, indices = outputs["logits"], outputs["indices"]
        if logits is None or indices is None:  # of a user's own loader
            return
        if batch_idx == 0:
            self._indices, self._rows = [], []
        self._indices.append(indices.cpu().numpy())
        self._rows.append(logits.float().softmax(1).cpu().numpy())

    def _gather(self, trainer: pl.Trainer) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the images that were looked at, (N,), rising, and their rows (N, K), on every process."""
        mine = (self._indices, self._rows)
        parts = [mine]
        if trainer.world_size > 1:
            parts = [mine] * trainer.world_size
            torch.distributed.all_gather_object(parts, mine)
        indices = np.concatenate([i for part in parts for i in part[0]])
        rows = np.concatenate([r for part in parts for r in part[1]])
        order = np.argsort(indices)
        return indices[order], rows[order]


class PredictionWriter(PredictionCollector):
    """Writes the predictions' CSV.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.predictions: Predictions | None = None
        self.quarantined: Path | None = None

    def on_predict_batch_end(  # noqa: D102
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        self._add(batch_idx, outputs)

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file; every image that could not be read is listed beside it."""
        data = find_datamodule(trainer)
        if data is None or not isinstance(pl_module, RexNetModule):
            return
        found, probs = self._gather(trainer)
        samples = trainer.predict_dataloaders.dataset.samples.take(found)  # type: ignore[union-attr]
        if not trainer.is_global_zero:
            return
        self.predictions = Predictions(samples.paths, probs, None, pl_module.spec.class_names)
        write_predictions(self.predictions, self.path)
        if data.bad_files and self.path.is_file():  # a device has no place beside it
            self.quarantined = unused_path(self.path.with_name("quarantine.csv"))
            verify.write_quarantine(data.bad_files, self.quarantined)

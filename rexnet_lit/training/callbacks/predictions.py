"""Predictions collected over batches and processes, and their CSV file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray
from torch import Tensor

from rexnet_lit.data import verify
from rexnet_lit.data.datamodule import find_datamodule
from rexnet_lit.models.limits import COVERAGE, Limits
from rexnet_lit.report.predictions import Limited, Predictions, write_predictions
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
        return self._in_order(trainer, self._probs)

    def _in_order(self, trainer: Trainer, values: list[NDArray[Any]]) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Return the indices of the images of all processes, rising, and their values, of which each batch has some."""
        parts = [(self._indices, values)] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(parts, parts[0])
        indices = np.concatenate([i for part in parts for i in part[0]])
        found = np.concatenate([v for part in parts for v in part[1]])
        order = np.argsort(indices)
        return indices[order], found[order]


class LimitsCollector(PredictionCollector):
    """Also finds how strange each image is, if the model has limits: from the input of its classifier."""

    def __init__(self) -> None:
        super().__init__()
        self._limits: Limits | None = None
        self._hook: Any = None
        self._features: Tensor | None = None
        self._strangeness: list[NDArray[np.float64]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Watch the classifier."""
        self._limits = pl_module.spec.limits if isinstance(pl_module, RexNetModule) else None
        if self._limits is not None:
            classifier = cast(Any, pl_module).network.get_classifier()
            self._hook = classifier.register_forward_pre_hook(lambda _, args: setattr(self, "_features", args[0]))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Watch it no more."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._features = None

    def collect(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Keep the probabilities of a batch, and how strange its images are."""
        super().collect(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        if batch_idx == 0:
            self._strangeness = []
        if self._limits is not None and self._features is not None and len(batch) > 2:
            self._strangeness.append(self._limits.strangeness(self._features.float().cpu().numpy()))

    def gather_limited(self, trainer: Trainer, probs: NDArray[np.float32]) -> Limited | None:
        """Return what the model's limits say of the images that `gather` has returned; None if it has none."""
        if self._limits is None:
            return None
        return limited(self._limits, probs, self._in_order(trainer, self._strangeness)[1])


def limited(limits: Limits, probs: NDArray[np.float32], strangeness: NDArray[np.float64]) -> Limited:
    """Return what a model's limits say of images with probabilities (N, K)."""
    return Limited(limits.unsure(probs), limits.sets(probs), strangeness, limits.confidence, limits.precision, COVERAGE)


class PredictionWriter(LimitsCollector):
    """Writes the predictions into a CSV file at ``path``, and a list of the unreadable images beside it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.predictions: Predictions | None = None
        self.quarantined: Path | None = None

    on_predict_batch_end = LimitsCollector.collect

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files."""
        data = find_datamodule(trainer)
        if data is None or not isinstance(pl_module, RexNetModule):
            return
        indices, probs = self.gather(trainer)
        found = self.gather_limited(trainer, probs)
        samples = trainer.predict_dataloaders.dataset.samples.take(indices)  # type: ignore[union-attr]
        if not trainer.is_global_zero:
            return
        self.predictions = Predictions(list(samples.paths), probs, None, pl_module.spec.class_names, found)
        write_predictions(self.predictions, self.path)
        if data.bad_files and self.path.is_file():  # not beside a device such as /dev/stdout
            self.quarantined = unused_path(self.path.with_name("quarantine.csv"))
            verify.write_quarantine(data.bad_files, self.quarantined)

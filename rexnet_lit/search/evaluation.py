"""The test images of a run, their probabilities, and the metrics of these."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray

from rexnet_lit.data.datamodule import ImageFolderDataModule
from rexnet_lit.data.folder import Samples
from rexnet_lit.models import checkpoint
from rexnet_lit.training.callbacks.predictions import PredictionCollector
from rexnet_lit.training.metrics import build_metrics, stage_results
from rexnet_lit.training.module import RexNetModule


class _Collector(PredictionCollector):
    on_test_batch_end = PredictionCollector.collect


@dataclasses.dataclass(frozen=True, eq=False)
class Tested:
    """The test images of a run, and their probabilities (N, K)."""

    samples: Samples
    probs: NDArray[np.float32]


def evaluate(run: Path, config: Mapping[str, Any], split_file: Path | None, accelerator: str = "auto") -> Tested:
    """Return the predictions of a run's model for its test images.

    Args:
        run: The run folder.
        config: The settings of the data module.
        split_file: What lists the images; None where the folder has a test split.
        accelerator: Where to compute, as ``trainer.accelerator``.
    """
    model = checkpoint.load_model(run / "model.safetensors")
    module = RexNetModule.from_model(model)
    data = ImageFolderDataModule(
        root=config["root"], class_names=module.spec.class_names,
        split_file=None if split_file is None else str(split_file),
        batch_size=config["batch_size"], num_workers=config["num_workers"],
        max_bad_fraction=config["max_bad_fraction"], follow_outside_links=config["follow_outside_links"],
    )  # fmt: skip
    collector = _Collector()
    trainer = pl.Trainer(
        logger=False, callbacks=[collector], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, accelerator=accelerator, devices=1,
    )  # fmt: skip
    trainer.test(module, data, verbose=False)
    indices, probs = collector.gather(trainer)
    return Tested(data.splits()["test"].take(indices), probs)


def metrics_of(probs: NDArray[np.float32], targets: NDArray[np.int64]) -> dict[str, Any]:
    """Return what `training.metrics.stage_results` does, for probabilities (N, K) and targets (N,)."""
    metrics = build_metrics(probs.shape[1], "test/")
    metrics.update(torch.from_numpy(probs).log(), torch.from_numpy(targets))
    return stage_results(metrics)

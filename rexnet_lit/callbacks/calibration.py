"""Probabilities that mean what they say: the logits' temperature, fitted on the validation images.

A network that has learned by smoothed labels says 90 % where it is right 99 times of 100, and one that has overfitted
the other way round. Dividing the logits by one number mends most of that, and leaves every decision as it was (Guo et
al., "On Calibration of Modern Neural Networks", 2017). The number goes into the last layer's weights, so that all that
reads the model afterwards, timm too, is calibrated.
"""

from __future__ import annotations

import math
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from rexnet_lit.callbacks.checkpoint import replace_weights
from rexnet_lit.callbacks.end_of_training import EndOfTraining
from rexnet_lit.data.datamodule import ImageFolderDataModule
from rexnet_lit.models import checkpoint
from rexnet_lit.training.calibration import LARGEST_FACTOR, fit_temperature
from rexnet_lit.training.module import RexNetModule


class Calibrate(EndOfTraining):
    """Puts the temperature into ``best.ckpt`` when training ends, where ``model.calibrate`` asks for it.

    Not with a cosine head, whose temperature is a setting. The weights in training, and ``last.ckpt``, stay the same.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, Tensor] = {}
        """The validation metrics of what ships."""

    def finish(
        self, trainer: pl.Trainer, pl_module: RexNetModule, data: ImageFolderDataModule, saver: ModelCheckpoint
    ) -> None:
        """Fit the temperature of the best weights, and write them anew."""
        if not pl_module.calibrate or pl_module.spec.num_classes == 1:
            return
        if not saver.best_model_path:
            rank_zero_only(print)("Not calibrated: no validated weights were saved.")
            return
        if not pl_module.calibrates:
            rank_zero_only(print)("Not calibrated: a cosine head has a temperature of its own.")
            return
        path, net = Path(saver.best_model_path), pl_module.network
        best = checkpoint.load_model(path).state if trainer.is_global_zero else None
        best = trainer.strategy.broadcast(best)
        assert best is not None  # noqa: S101 (for the type checker)
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        training = pl_module.training
        net.load_state_dict(best)
        pl_module.eval()
        features = data.compute_features("val", pl_module.embedder())[0]
        logits = pl_module.logits(features)
        net.load_state_dict(before)
        pl_module.train(training)

        targets = torch.from_numpy(data.splits()["val"].targets)
        temperature, _ = fit_temperature(logits, targets)
        if abs(math.log10(temperature)) > LARGEST_FACTOR - 0.01:
            rank_zero_only(print)("Not calibrated: on the validation images these weights do no better than chance.")
            return
        was, self.metrics = (pl_module.measure(found, targets) for found in (logits, logits / temperature))
        changes = (f"{name} {was[f'val/{name}']:.3f} -> {self.metrics[f'val/{name}']:.3f}" for name in ("loss", "ece"))
        told = f"logits divided by {temperature:.2f}; val {', '.join(changes)}"
        if self.metrics["val/loss"] > was["val/loss"]:
            told += f": {len(targets)} validation images are too few to be so sure"
        rank_zero_only(print)(f"Calibrated: {told}.", flush=True)
        if trainer.is_global_zero and temperature != 1:
            last = [name for name, part in net.named_modules() if isinstance(part, nn.Linear)][-1]
            scaled = {f"network.{last}.{part}": best[f"{last}.{part}"] / temperature for part in ("weight", "bias")}
            replace_weights(path, scaled)

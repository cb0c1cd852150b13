"""Calibrated probabilities: the temperature of the logits, fitted on the validation images.

A network that was trained with smoothed labels is 90 % confident where it is right 99 times out of 100; one that has
overfitted is too confident. Dividing the logits by one number corrects most of that and changes no decision (Guo et
al., "On Calibration of Modern Neural Networks", 2017). The number goes into the weights of the last layer, so the model
is calibrated wherever it is loaded, in timm too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from rexnet_lit.data.datamodule import ImageFolderDataModule
from rexnet_lit.training.calibration import LARGEST_FACTOR, fit_temperature
from rexnet_lit.training.callbacks.checkpoint import RunCheckpoint
from rexnet_lit.training.callbacks.end_of_training import EndOfTraining, network_restored
from rexnet_lit.training.features import embedder, head_logits
from rexnet_lit.training.module import RexNetModule


class Calibrate(EndOfTraining):
    """Calibrates ``best.ckpt`` when training ends, where ``model.calibrate`` asks for it.

    Not with a cosine head, whose temperature is a setting. The weights in training, and ``last.ckpt``, stay the same.
    """

    def setting(self, module: RexNetModule) -> str | None:  # noqa: D102
        return "model.calibrate" if module.calibrate else None

    def finish(self, trainer: Trainer, module: RexNetModule, data: ImageFolderDataModule, saver: RunCheckpoint) -> None:
        """Fit the temperature of the best weights, and save them divided by it."""
        if not module.calibrate or module.spec.num_classes == 1 or "val" not in data.splits():
            return
        if not saver.best_model_path:
            message = "Not calibrated: no validated weights were saved."
        elif not module.calibrates:
            message = "Not calibrated: a cosine head has a temperature of its own."
        else:
            rank_zero_only(print)("Calibrating the probabilities, on the validation images.", flush=True)
            message = self._calibrate(trainer, module, data, saver)
        rank_zero_only(print)(message, flush=True)

    def _calibrate(
        self, trainer: Trainer, module: RexNetModule, data: ImageFolderDataModule, saver: RunCheckpoint
    ) -> str:
        best = saver.best_weights(trainer)
        with network_restored(module):
            module.network.load_state_dict(best)
            if "val" not in saver.features:
                saver.features["val"] = data.compute_features("val", embedder(module))[0]
            logits = head_logits(module, saver.features["val"])
        targets = torch.from_numpy(data.splits()["val"].targets)
        temperature, _ = fit_temperature(logits, targets)
        if is_chance(temperature):
            return "Not calibrated: on the validation images these weights do no better than chance."
        if temperature != 1:
            saver.change_best(divided(module, best, temperature))
        before, after = (module.measure(scores, targets) for scores in (logits, logits / temperature))
        total = saver.shipped.temperature * temperature
        saver.shipped = dataclasses.replace(saver.shipped, metrics=after, temperature=total)
        changes = (f"{key} {before[f'val/{key}']:.3f} -> {after[f'val/{key}']:.3f}" for key in ("loss", "ece"))
        message = f"Calibrated: temperature {temperature:.2f}; val {', '.join(changes)}"
        if after["val/loss"] > before["val/loss"]:
            message += f": {len(targets)} validation images are too few for such confidence"
        return f"{message}."


def is_chance(temperature: float) -> bool:
    """Return whether a temperature is at the end of those that are searched."""
    return abs(math.log10(temperature)) > LARGEST_FACTOR - 0.01


def divided(module: RexNetModule, weights: Mapping[str, Tensor], temperature: float) -> dict[str, Tensor]:
    """Return the weights of the last layer that divide the logits by a temperature."""
    last = [name for name, part in module.network.named_modules() if isinstance(part, nn.Linear)][-1]
    return {f"{last}.{part}": weights[f"{last}.{part}"] / temperature for part in ("weight", "bias")}

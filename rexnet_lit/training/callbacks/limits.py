"""The limits of the answers of ``best.ckpt``, fitted when training ends."""

from __future__ import annotations

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from rexnet_lit.data.datamodule import ImageFolderDataModule
from rexnet_lit.data.folder import Samples
from rexnet_lit.models.limits import COVERAGE, Limits
from rexnet_lit.training.callbacks.checkpoint import RunCheckpoint
from rexnet_lit.training.callbacks.end_of_training import EndOfTraining, network_restored
from rexnet_lit.training.features import embedder, head_logits
from rexnet_lit.training.limits import MIN_IMAGES, fit_known, fit_limits
from rexnet_lit.training.module import RexNetModule

MAX_TRAIN_IMAGES = 20_000
"""Training images whose features describe the known ones; of more, so many are drawn."""


class FitLimits(EndOfTraining):
    """Adds to ``best.ckpt`` how far its answers can be relied on. It comes after what changes the weights."""

    def finish(self, trainer: Trainer, module: RexNetModule, data: ImageFolderDataModule, saver: RunCheckpoint) -> None:
        """Fit the limits on the validation images, and save them."""
        count = len(data.splits().get("val", ()))
        if not saver.best_model_path or module.spec.num_classes == 1 or not count:
            return
        if module.spec.network is not None:
            message = "No limits of the answers (prediction sets, unsure, stranger): they need a ReXNet's own layers."
        elif count < MIN_IMAGES:
            images = f"{MIN_IMAGES} validation images, and there are {count}"
            message = f"No limits of the answers: prediction sets, unsure and stranger need {images}."
        else:
            message = self._fit(trainer, module, data, saver)
        rank_zero_only(print)(message, flush=True)

    def _fit(self, trainer: Trainer, module: RexNetModule, data: ImageFolderDataModule, saver: RunCheckpoint) -> str:
        found, splits = saver.features, data.splits()
        samples = {"train": splits["train"], "val": splits["val"]}
        with network_restored(module):
            module.network.load_state_dict(saver.best_weights(trainer))
            embed = embedder(module) if len(found) < 2 else None
            if embed and "val" not in found:
                found["val"] = data.compute_features("val", embed)[0]
            if embed and "train" not in found:
                samples["train"] = _drawn(samples["train"])
                all_ = len(samples["train"]) == len(splits["train"])  # of which decoded images may be in memory
                found["train"] = data.compute_features("train" if all_ else samples["train"], embed, evaluate=True)[0]
            probs = head_logits(module, found["val"]).softmax(1)
        known = fit_known(found["train"].numpy(), samples["train"].targets, module.spec.num_classes)
        val = found["val"].numpy()
        limits = fit_limits(probs.numpy(), samples["val"].targets, val, known, module.target_precision)
        saver.change_best(limits=limits)
        return describe(limits, probs, "validation images, which also selected the weights")


def _drawn(samples: Samples) -> Samples:
    """Return at most `MAX_TRAIN_IMAGES` of the images, the same ones each time."""
    if len(samples) <= MAX_TRAIN_IMAGES:
        return samples
    chosen = np.random.default_rng(0).permutation(len(samples))[:MAX_TRAIN_IMAGES]
    return samples.take(np.sort(chosen))


def describe(limits: Limits, probs: Tensor, source: str) -> str:
    """Say what limits mean for the images, with probabilities (N, K), from which they come."""
    values = probs.numpy()
    sizes = limits.sets(values).sum(1)
    sure = f"no answer is sure: no confidence is known to give {limits.precision:.0%} right"
    if limits.confidence is not None:
        share = 1 - limits.unsure(values).mean()
        sure = f"{share:.0%} of the answers are sure, with a confidence above {limits.confidence:.3f}"
    return (
        f"Limits, from {limits.images} {source}: {sure}; sets that have the true class for {COVERAGE:.0%} of images "
        f"have {sizes.mean():.2f} classes."
    )

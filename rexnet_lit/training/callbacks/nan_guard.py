"""Stops a run whose loss is NaN or infinite, and names the images of the batch.

A broken image, a learning rate that is too high or a 16-bit overflow can cause it. Training would go on and end with a
useless model, without an error.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from rexnet_lit.data.datamodule import find_datamodule
from rexnet_lit.training.callbacks.checkpoint import find_checkpoint
from rexnet_lit.utils.errors import UserError

_REMEDY = "set a smaller model.optimizer.lr or a longer model.schedule.warmup_epochs, or trainer.gradient_clip_val: 1.0"

_LEAST_SCALE = 2.0**-10
"""The scale of the loss, 2^16 at first, at which no smaller one will help."""


class NaNGuard(Callback):
    """Stops a run with a NaN or infinite loss before it reaches the weights (on a GPU: within ten steps) or a file.

    Under ``16-mixed`` a step whose gradients overflow is skipped, and the scale of the loss halved. Such steps are
    counted, and a scale that has become too small stops the run.
    """

    def __init__(self) -> None:
        self._unchecked: list[tuple[int, int, Tensor | None, Tensor]] = []
        """Epoch, batch, indices of the images, and loss of the steps since the last check."""
        self._indices: Tensor | None = None
        self._steps = 0
        self._scale: float | None = None
        self._skipped = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember which images the batch holds."""
        self._indices = batch[2] if isinstance(batch, list | tuple) and len(batch) > 2 else None

    def on_train_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is None or self._steps % 10:  # reading the scale waits for the GPU
            return
        before, self._scale = self._scale, float(scaler.get_scale())
        if before is not None and self._scale < before:
            self._skipped += round(math.log2(before / self._scale))
        if self._scale < _LEAST_SCALE:
            raise UserError(
                f"trainer.precision: the gradients overflow in 16 bits; {self._skipped} steps were skipped until epoch "
                f"{trainer.current_epoch + 1}, batch {batch_idx + 1}; set trainer.precision to bf16-mixed or 32-true, "
                "or a smaller model.optimizer.lr"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print how many steps were skipped."""
        if self._skipped:
            rank_zero_only(print)(f"note: {self._skipped} steps were skipped because 16-bit gradients overflowed")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Check the loss; on a GPU, where that waits for the step, ten at a time."""
        batch = trainer.fit_loop.epoch_loop.batch_idx
        self._unchecked.append((trainer.current_epoch, batch, self._indices, loss.detach()))
        self._steps += 1
        if loss.device.type == "cpu" or self._steps % 10 == 0:
            self._check(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check before anything is written, the weights too: a finite loss can have infinite gradients."""
        self._check(trainer)
        bad = [name for name, p in pl_module.named_parameters() if not bool(torch.isfinite(p).all())]
        if bad:
            where = f"{len(bad)} tensors of the model (such as {bad[0]}) in epoch {trainer.current_epoch + 1}"
            raise UserError(f"NaN or infinite values in {where}; {_REMEDY}; {_what_is_saved(trainer)}")

    def _check(self, trainer: Trainer) -> None:
        steps, self._unchecked = self._unchecked, []
        finite = torch.isfinite(torch.stack([loss for *_, loss in steps])).tolist() if steps else []
        if not all(finite):
            epoch, batch, indices, loss = steps[finite.index(False)]
            where = f"epoch {epoch + 1}, batch {batch + 1}{_image_names(trainer, indices)}"
            raise UserError(f"the loss is {float(loss):g} at {where}; {_REMEDY}; {_what_is_saved(trainer)}")


def _what_is_saved(trainer: Trainer) -> str:
    saver = find_checkpoint(trainer)
    return "the last checkpoint is from before" if saver and saver.last_model_path else "nothing was saved yet"


def _image_names(trainer: Trainer, indices: Tensor | None) -> str:
    """Return the names of a training batch's images, where the batch has their indices."""
    data = find_datamodule(trainer)
    if data is None or indices is None:
        return ""
    paths = getattr(getattr(trainer.train_dataloader, "dataset", None), "samples", data.splits()["train"]).paths
    names = [repr(paths[i]) for i in indices.tolist()[:8]]
    return f" (images {', '.join(names)}{', ...' if len(indices) > 8 else ''})"

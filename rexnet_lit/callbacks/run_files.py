"""The files of a run folder: split.csv, quarantine.csv and model.safetensors; and TensorBoard's sample images."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from torchvision.utils import make_grid

from rexnet_lit.callbacks.checkpoint import find_model_checkpoint
from rexnet_lit.callbacks.loggers import RunTensorBoardLogger
from rexnet_lit.data import verify
from rexnet_lit.data.datamodule import find_datamodule
from rexnet_lit.data.folder import write_split
from rexnet_lit.models import checkpoint
from rexnet_lit.training.module import RexNetModule
from rexnet_lit.utils.errors import UserError, plural


class RunFiles(Callback):
    """Writes ``split.csv``, ``quarantine.csv`` and ``model.safetensors`` into the run folder."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the split, where folders do not determine it, and the files that were left out."""
        data, log_dir = find_datamodule(trainer), trainer.log_dir  # all processes agree on log_dir
        dry_run = getattr(trainer, "fast_dev_run", False)
        if data is None or data.folder is None or log_dir is None or dry_run or not trainer.is_global_zero:
            return
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        if data.folder.pooled:
            write_split(data.folder, Path(log_dir) / "split.csv")
        if data.bad_files:
            target = Path(log_dir) / "quarantine.csv"
            verify.write_quarantine(data.bad_files, target)
            many = plural(len(data.bad_files), "image", "images")
            print(f"left out as unreadable: {many}, listed in {target}", flush=True)  # noqa: T201

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the model; list the files that became unreadable during the run."""
        self._write_model(trainer)
        data = find_datamodule(trainer)
        if data is None or trainer.log_dir is None or not trainer.is_global_zero:
            return
        lost = data.lost_files()
        if lost:
            target = Path(trainer.log_dir) / "quarantine.csv"
            verify.write_quarantine([*data.bad_files, *lost], target)
            many = plural(len(lost), "image was", "images were")
            print(f"{many} lost during the run and replaced by others of the class: {target}", flush=True)  # noqa: T201

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the model of a run that was killed after its last save."""
        if isinstance(pl_module, RexNetModule) and not pl_module.started:
            rank_zero_only(print)("Nothing was left to train: the checkpoint is from the end of the run.")
            self._write_model(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the best model so far when the run is stopped; its own errors must not hide what stopped the run."""
        if trainer.state.fn == "fit":
            with contextlib.suppress(OSError, UserError):
                self._write_model(trainer)

    @rank_zero_only
    def _write_model(self, trainer: Trainer) -> None:
        """Write the best weights (without a validation, the last ones) with the model's description."""
        saver = find_model_checkpoint(trainer)
        best = saver.best_model_path or saver.last_model_path if saver is not None else ""
        if best and Path(best).is_file():
            model = checkpoint.load_model(best)
            checkpoint.save_model(Path(best).parent.parent / "model.safetensors", model.spec, model.state)


class AugmentedSamples(Callback):
    """Shows 16 training images in TensorBoard, augmented as in the first epoch."""

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log them."""
        data = find_datamodule(trainer)
        boards = [logger for logger in trainer.loggers if isinstance(logger, RunTensorBoardLogger)]
        if data is None or not boards:
            return
        images = torch.from_numpy(data.preview()).permute(0, 3, 1, 2)
        for board in boards:
            board.add_image("augmented samples", make_grid(images, nrow=4), trainer.global_step)

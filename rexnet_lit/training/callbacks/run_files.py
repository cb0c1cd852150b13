"""A run's folder, and the files in it: split.csv, quarantine.csv and model.safetensors."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from rexnet_lit.data import verify
from rexnet_lit.data.datamodule import find_datamodule
from rexnet_lit.data.table import write_split
from rexnet_lit.models import checkpoint
from rexnet_lit.training.callbacks import run_folder
from rexnet_lit.training.module import RexNetModule
from rexnet_lit.utils.errors import UserError, plural


class RunFiles(Callback):
    """Takes the run folder, and writes ``split.csv``, ``quarantine.csv`` and ``model.safetensors`` into it.

    It comes before what writes there: the checkpoints, the records.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        """None before the fit, and for a run that saves and logs nothing."""
        self.module: LightningModule | None = None
        """What trains, or has trained, into the folder."""
        self._held = contextlib.ExitStack()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the folder of the run that is resumed, before its checkpoints are read."""
        self.folder = None
        self._take(trainer)

    def _take(self, trainer: Trainer) -> None:
        """Choose a folder unless there is one from this trainer's last fit, and lock it."""
        if self.folder is None:
            self.folder = run_folder.folder_for(trainer)
        self._held.close()
        if self.folder is not None and trainer.is_global_zero:
            self._held.enter_context(run_folder.lock(self.folder))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the folder."""
        self._release()

    def _release(self) -> None:
        self._held.close()
        if self.folder is not None:
            run_folder.remove_if_empty(self.folder)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the split, where folders do not determine it, and the files that were left out.

        Raises:
            UserError: Another fit of the same trainer has trained the module for all its epochs.
        """
        if self.module is pl_module and trainer.ckpt_path is None and trainer.fit_loop.done:
            raise UserError(
                "this trainer has trained the module for all its epochs; to go on, give a new Trainer a "
                "larger max_epochs, and its fit the last.ckpt as ckpt_path"
            )
        self.module = pl_module
        self._take(trainer)
        if self.folder is None or not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)  # some loggers make none
        data = find_datamodule(trainer)
        if data is None or data.folder is None:
            return
        if data.folder.pooled or data.record.fixes:
            write_split(data.folder, self.folder / "split.csv")
        if data.bad_files:
            target = self.folder / "quarantine.csv"
            verify.write_quarantine(data.bad_files, target)
            many = plural(len(data.bad_files), "image", "images")
            print(f"left out as unreadable: {many}, listed in {target}", flush=True)  # noqa: T201

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the model; list the files that became unreadable during the run."""
        self._write_model()
        data = find_datamodule(trainer)
        if data is None or self.folder is None or not trainer.is_global_zero:
            return
        lost = data.lost_files()
        if lost:
            target = self.folder / "quarantine.csv"
            verify.write_quarantine([*data.bad_files, *lost], target)
            many = plural(len(lost), "image was", "images were")
            print(f"{many} lost during the run and replaced by others of the class: {target}", flush=True)  # noqa: T201

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the model of a run that was killed after its last save."""
        if isinstance(pl_module, RexNetModule) and not pl_module.started:
            rank_zero_only(print)("Nothing was left to train: the checkpoint is from the end of the run.")
            self._write_model()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the best model so far when the run is stopped; its own errors must not hide what stopped the run."""
        if trainer.state.fn == "fit":
            with contextlib.suppress(OSError, UserError):
                self._write_model()
        self._release()

    @rank_zero_only
    def _write_model(self) -> None:
        """Write the best weights (without a validation, the last ones) with the model's description."""
        if self.folder is None:
            return
        files = [self.folder / "checkpoints" / name for name in ("best.ckpt", "last.ckpt")]
        found = next(filter(Path.is_file, files), None)
        if found is not None:
            model = checkpoint.load_model(found)
            checkpoint.save_model(self.folder / "model.safetensors", model.spec, model.state)


def find_run_folder(trainer: Trainer) -> Path | None:
    """Return the folder of a trainer's run; None if it has none."""
    found = [c for c in trainer.callbacks if isinstance(c, RunFiles)]  # type: ignore[attr-defined]
    return found[-1].folder if found else None

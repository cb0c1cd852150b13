"""The callbacks that the command line adds to the trainer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Callback,
    Checkpoint,
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    ProgressBar,
    RichProgressBar,
)
from lightning.pytorch.cli import SaveConfigCallback

from rexnet_lit.cli.messages import parser_message
from rexnet_lit.training.callbacks import run_folder
from rexnet_lit.training.callbacks.predictions import PredictionWriter
from rexnet_lit.training.callbacks.run_files import find_run_folder
from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.files import check_output, check_writable, expand_home, unused_path

if TYPE_CHECKING:
    from rexnet_lit.training.callbacks.evaluation_report import EvaluationReport

TRAINING_CALLBACKS = (Checkpoint, EarlyStopping, LearningRateMonitor, DeviceStatsMonitor)
"""Callbacks in a fit's config that the other runs leave out: they have no effect there, or need a logger."""


class RunConfig(SaveConfigCallback):
    """Writes ``config.yaml`` when training starts: a resume that fails before that leaves the old file as it is."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing yet."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it, without the checkpoint that this run resumes: a new run with this config starts afresh."""
        folder = find_run_folder(trainer)
        if folder is None or not trainer.is_global_zero:
            return
        self.config["ckpt_path"], self.config["accept_changes"] = None, False
        try:
            self.parser.save(self.config, folder / self.config_filename, skip_none=False, overwrite=True)
        except ValueError as error:
            message = parser_message(str(error))
            raise UserError(f"trainer: its settings cannot be written into config.yaml: {message}") from error


def progress_bar(settings: dict[str, Any], given: Sequence[Callback]) -> list[Callback]:
    """Return a progress bar for a terminal, unless the user has chosen one or none."""
    terminal, own = sys.stdout.isatty(), any(isinstance(callback, ProgressBar) for callback in given)
    if settings["enable_progress_bar"] is None:
        settings["enable_progress_bar"] = terminal or own
    return [RichProgressBar(leave=True)] if settings["enable_progress_bar"] and terminal and not own else []


def prediction_writer(output: str | None, root: Path) -> PredictionWriter:
    """Return what writes ``data.predict_output``, a new ``predictions.csv`` below ``root`` by default."""
    path = Path(expand_home(output)) if output else unused_path(root / "predictions.csv")
    check_output("data.predict_output", path, ".csv", mark=b"path,label_1,prob_1")
    if path.name == "quarantine.csv":
        raise UserError("data.predict_output: quarantine.csv lists unreadable images; choose another name")
    check_writable("data.predict_output", path)
    return PredictionWriter(path)


def evaluation_report(model: Path, root: Path) -> EvaluationReport:
    """Return what writes ``report/``: into the model's run folder if that is below ``root``."""
    from rexnet_lit.training.callbacks.evaluation_report import EvaluationReport  # a fit needs no report

    home = run_folder.run_folder_of(model)
    folder = home if home is not None and root.absolute() in home.parents else root
    check_writable("trainer.default_root_dir", folder / "report")
    return EvaluationReport(folder)

"""What we ask of Lightning's trainer, and say in one line before a run begins.

Lightning itself meets most of it with a traceback once the run is under way, or not at all.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    Checkpoint,
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from rexnet_lit.callbacks.checkpoint import RunCheckpoint
from rexnet_lit.cli.config import class_problem
from rexnet_lit.training.module import RexNetModule
from rexnet_lit.utils.errors import UserError, did_you_mean

TRAINING_CALLBACKS = (Checkpoint, EarlyStopping, LearningRateMonitor, DeviceStatsMonitor)
"""Callbacks of a fit's config that have nothing to do in the other runs, or want a logger."""

_INSTEAD: dict[type[Callback], str] = {
    BaseFinetuning: "set model.strategy, such as staged",
    BatchSizeFinder: "set data.batch_size",
    GradientAccumulationScheduler: "set trainer.accumulate_grad_batches",
    LearningRateFinder: "use --find_lr true",
    ModelPruning: "no file of ours could describe a pruned network",
    StochasticWeightAveraging: "set model.ema",
    Timer: "set trainer.max_time",
    WeightAveraging: "set model.ema",
}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings of the trainer that are out of their range, or not for us."""
    least = {
        "accumulate_grad_batches": 1,
        "check_val_every_n_epoch": 1,
        "gradient_clip_val": 0,
        "log_every_n_steps": 0,
    }
    for key, low in least.items():
        value = settings[key]
        if value is not None and not value >= low:
            raise UserError(f"trainer.{key} is {value}; expected {low} or more")
    if settings["val_check_interval"] is not None and settings["val_check_interval"] == 0:
        raise UserError("trainer.val_check_interval is 0; expected a share of an epoch, or a number of batches")
    if settings["barebones"]:
        raise UserError("trainer.barebones is not supported: it leaves out the checkpoints")
    if settings["overfit_batches"]:
        raise UserError("trainer.overfit_batches is not supported; use trainer.limit_train_batches")
    if "://" in str(settings["default_root_dir"] or ""):
        raise UserError(f"trainer.default_root_dir is {settings['default_root_dir']!r}; expected a local folder")


def check_callbacks(callbacks: Iterable[Callback]) -> None:
    """Refuse callbacks that do in another way what our settings do, and that a resume could not follow."""
    for callback in callbacks:
        for kind, instead in _INSTEAD.items():
            if isinstance(callback, kind):
                raise UserError(f"trainer.callbacks: {type(callback).__name__} is not supported; {instead}")


def check_trainer(trainer: pl.Trainer, settings: Mapping[str, Any]) -> None:
    """Refuse what only the trainer that was made of its settings shows."""
    if settings["sync_batchnorm"] and trainer.world_size > 1 and trainer.strategy.root_device.type == "cpu":
        raise UserError("trainer.sync_batchnorm is for GPUs; set it to false")
    if isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO):
        raise UserError("trainer.plugins: AsyncCheckpointIO is not supported: a file must be whole before it counts")


def disable_slurm_requeue(trainer: pl.Trainer, *, resumes: bool) -> None:
    """Have Lightning requeue no SLURM job: it saves a file of its own then, which a new run begins from in silence.

    Raises:
        UserError: There is such a file.
    """
    cluster = trainer._accelerator_connector.cluster_environment
    if isinstance(cluster, SLURMEnvironment):
        cluster.auto_requeue = False
    requeued = trainer._checkpoint_connector._hpc_resume_path
    if requeued is not None and SLURMEnvironment.detect() and not resumes:
        raise UserError(f"{requeued}: under SLURM Lightning would go on with it; move it, or set --ckpt_path to it")


def check_fit(trainer: pl.Trainer, model: RexNetModule) -> None:
    """Refuse a training of nothing, and whoever waits for a figure that nobody logs."""
    if 0 in (trainer.max_epochs, trainer.max_steps) or trainer.limit_train_batches == 0:
        raise UserError("trainer: max_epochs, max_steps or limit_train_batches is 0: nothing would be trained")
    logged = ["train/loss", "train/loss_step"]
    if trainer.limit_val_batches != 0:
        logged += map(str, model.val_metrics.keys())
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        monitor = getattr(callback, "monitor", None)
        if isinstance(callback, RunCheckpoint):
            continue
        if isinstance(callback, EarlyStopping) and str(monitor).startswith("train/"):
            callback._check_on_train_epoch_end = True  # it is known then, not at a validation
        if monitor is not None and monitor not in logged:
            raise UserError(
                f"trainer.callbacks: {type(callback).__name__} monitors {monitor!r}, which nobody logs"
                f"{did_you_mean(monitor, logged)}; there are {', '.join(logged)}"
            )
    if trainer.limit_val_batches == 0 and model.schedule_settings.name == "plateau":
        raise UserError("model.schedule: plateau waits for the validation loss, and trainer.limit_val_batches is 0")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Say in one line why an object of the trainer cannot be made.

    Raises:
        UserError: Lightning, or the parser, refuses its settings. What a user's own class raises passes.
    """
    try:
        yield
    except ValueError as error:
        cause: BaseException = error
        while cause.__cause__ or cause.__context__:
            cause = cause.__cause__ or cause.__context__ or cause
        said = str(cause)
        if _raised_in(cause, "jsonargparse"):  # of several kinds of value that it has tried, the class's reason counts
            said = class_problem(str(error)) or str(error).partition("\nGiven ")[0]
        elif not raised_by_lightning(cause):
            raise
        raise UserError(f"trainer: {' '.join(said.split())}") from error


def raised_by_lightning(error: BaseException) -> bool:
    """Say whether an exception comes from Lightning's own code."""
    return _raised_in(error, "lightning")


def _raised_in(error: BaseException, package: str) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and package in Path(frames[-1].filename).parts

"""Checks of the trainer's settings before a run starts, where Lightning would fail later or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from rexnet_lit.cli.messages import trainer_message
from rexnet_lit.training.callbacks.checkpoint import RunCheckpoint
from rexnet_lit.training.module import RexNetModule
from rexnet_lit.utils.errors import UserError, did_you_mean
from rexnet_lit.utils.settings import check_range

_RANGES = {
    "accumulate_grad_batches": "[1, inf)",
    "check_val_every_n_epoch": "[1, inf)",
    "gradient_clip_val": "[0, inf]",
    "log_every_n_steps": "[0, inf)",
    "val_check_interval": "(0, inf)",
}

_UNSUPPORTED_SETTINGS = {
    "barebones": "it leaves out the checkpoints",
    "overfit_batches": "use trainer.limit_train_batches",
}

_UNSUPPORTED_CALLBACKS: dict[type[Callback], str] = {
    BaseFinetuning: "set model.strategy, such as staged",
    BatchSizeFinder: "set data.batch_size",
    GradientAccumulationScheduler: "set trainer.accumulate_grad_batches",
    LearningRateFinder: "use --find_lr true",
    ModelPruning: "a model file cannot describe a pruned network",
    StochasticWeightAveraging: "set model.ema",
    Timer: "set trainer.max_time",
    WeightAveraging: "set model.ema",
}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise `UserError` for settings of the trainer that are out of range or not supported."""
    for key, interval in _RANGES.items():
        if isinstance(settings[key], int | float):  # val_check_interval may be a duration
            check_range(f"trainer.{key}", settings[key], interval)
    for key, reason in _UNSUPPORTED_SETTINGS.items():
        if settings[key]:
            raise UserError(f"trainer.{key} is not supported; {reason}")
    if "://" in str(settings["default_root_dir"] or ""):
        raise UserError(f"trainer.default_root_dir is {settings['default_root_dir']!r}; expected a local folder")


def check_callbacks(callbacks: Iterable[Callback]) -> None:
    """Raise `UserError` for callbacks that compete with a setting; a resumed run could not restore them exactly."""
    for callback in callbacks:
        for kind, reason in _UNSUPPORTED_CALLBACKS.items():
            if isinstance(callback, kind):
                raise UserError(f"trainer.callbacks: {type(callback).__name__} is not supported; {reason}")


def check_trainer(trainer: pl.Trainer, settings: Mapping[str, Any], command: str) -> None:
    """Raise `UserError` for settings that leave nothing to run on, or do not suit the chosen device and plugins."""
    if command != "fit":
        key = "limit_val_batches" if command == "validate" else f"limit_{command}_batches"
        if getattr(trainer, key) == 0:
            raise UserError(f"trainer.{key} is 0: there would be no images to run on")
        return
    if settings["sync_batchnorm"] and trainer.world_size > 1 and trainer.strategy.root_device.type == "cpu":
        raise UserError("trainer.sync_batchnorm is for GPUs; set it to false")
    if isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO):
        raise UserError("trainer.plugins: AsyncCheckpointIO is not supported: a checkpoint must be complete on return")


def disable_slurm_requeue(trainer: pl.Trainer, *, resumes: bool) -> None:
    """Stop Lightning from requeueing a SLURM job: it saves a file of its own, which a later run silently resumes.

    Raises:
        UserError: There is such a file.
    """
    cluster = trainer._accelerator_connector.cluster_environment
    if isinstance(cluster, SLURMEnvironment):
        cluster.auto_requeue = False
    requeued = trainer._checkpoint_connector._hpc_resume_path
    if requeued is not None and SLURMEnvironment.detect() and not resumes:
        raise UserError(f"{requeued}: under SLURM Lightning would resume this file; move it, or set --ckpt_path to it")


def check_fit(trainer: pl.Trainer, model: RexNetModule) -> None:
    """Raise `UserError` if nothing would be trained, or something monitors a metric that is not logged."""
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
            callback._check_on_train_epoch_end = True  # it is logged then, not at a validation
        if monitor is not None and monitor not in logged:
            raise UserError(
                f"trainer.callbacks: {type(callback).__name__} monitors {monitor!r}, which is not logged"
                f"{did_you_mean(monitor, logged)}; logged are {', '.join(logged)}"
            )
    if trainer.limit_val_batches == 0 and model.schedule_settings.name == "plateau":
        raise UserError("model.schedule: plateau needs the validation loss, but trainer.limit_val_batches is 0")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a refusal by Lightning or the parser into a `UserError`; what a user's own class raises passes."""
    try:
        yield
    except ValueError as error:
        message = trainer_message(error)
        if message is None:
            raise
        raise UserError(f"trainer: {message}") from error

"""What an exact resume depends on: recorded in each checkpoint, and compared before a run is resumed.

A checkpoint holds no random state, because there is none: order, augmentation and dropout are functions of (seed,
epoch, position). So a run that is resumed from ``last.ckpt`` ends with the weights of one that was never interrupted,
bit for bit on a CPU, unless something that decides the weights has changed.
"""

from __future__ import annotations

import json
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from rexnet_lit.data.datamodule import ImageFolderDataModule
from rexnet_lit.data.sampler import run_seed
from rexnet_lit.training.module import RexNetModule
from rexnet_lit.utils.errors import UserError

REPLACED = "rexnet_lit_rewritten"
"""Marks a ``best.ckpt`` whose weights were replaced when its run ended."""

_CONDITIONS, _LENGTH = "rexnet_lit_run", "rexnet_lit_run_length"
_ABSENT = "not recorded"
_FIXED = (
    *("model.optimizer.name", "model.optimizer.momentum", "model.optimizer.layer_decay"),
    *("model.optimizer.class_path", "model.optimizer.init_args"),
    *("model.ema", "model.schedule.name", "model.schedule.class_path", "model.schedule.init_args"),
)
"""Settings whose state a resume takes from the checkpoint: changing them would have no effect, or fail."""


def record(trainer: Trainer, module: LightningModule, data: Any) -> dict[str, str]:
    """Return what a checkpoint records of its run."""
    conditions = _conditions(trainer, module, data)
    return {_CONDITIONS: json.dumps(conditions, default=str), _LENGTH: json.dumps(_length(trainer))}


def refuse_changes(trainer: Trainer, module: LightningModule, data: Any, content: Any, accept: bool) -> None:
    """Compare a run with the one that wrote a checkpoint's ``content``; ``accept`` what a resume can follow.

    Raises:
        UserError: Settings or images have changed, all of which are named, or the checkpoint cannot be resumed exactly.
    """
    then = json.loads(content.get(_CONDITIONS, "{}"))
    now = json.loads(json.dumps(_conditions(trainer, module, data), default=str))
    # A setting that there was not yet then, and that is not used now, is no change.
    changed = [name for name in now if then.get(name, now[name] and _ABSENT) != now[name]]
    fixed = [name for name in changed if name.startswith(_FIXED) and name in then]
    refused = fixed + [name for name in changed if name not in fixed and not accept]
    if not refused:
        _refuse_inexact(trainer, content)
        return
    named = "; ".join(f"{name} ({then.get(name, _ABSENT)} then, {now[name]} now)" for name in refused[:8])
    more = f" and {len(refused) - 8} more" if len(refused) > 8 else ""
    remedy = "or resume with --accept_changes true"
    if fixed:
        remedy = "(the run folder's config.yaml has them), or start a new run from its weights with model.weights"
    raise UserError(f"ckpt_path: these have changed since the checkpoint: {named}{more}; set them back {remedy}")


def _refuse_inexact(trainer: Trainer, content: Any) -> None:
    batches = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    if content.get(REPLACED):
        why = "holds the weights that were selected and calibrated when its run ended, not those of an epoch"
    elif batches["current"]["processed"] % trainer.accumulate_grad_batches and not batches["is_last_batch"]:
        why = "was saved within a step of accumulated batches, without their gradients"
    else:
        return
    remedy = "resume the last.ckpt beside it, or start a new run from it with model.weights"
    raise UserError(f"ckpt_path: this best.ckpt {why}; {remedy}")


def begin_next_epoch(trainer: Trainer, content: Any) -> None:
    """Let a run with ``max_steps`` that was saved at the end of an epoch go on with the next one.

    Lightning takes every checkpoint of such a run for one within an epoch. It would end the saved epoch a second time,
    and so leave out the next one.
    """
    loop = content["loops"]["fit_loop"]
    epochs = loop["epoch_progress"]
    current = epochs["current"]
    if trainer.max_steps == -1 or not current["ready"] == current["started"] == current["processed"]:
        return
    for count in epochs.values():
        count["completed"] = count["processed"]
    batches = loop["epoch_loop.batch_progress"]
    batches["is_last_batch"] = False
    optimizer = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    for progress in (batches, loop["epoch_loop.scheduler_progress"], *optimizer.values()):
        progress["current"] = dict.fromkeys(progress["current"], 0)


def print_length_changes(trainer: Trainer, content: Any) -> None:
    """Say that a run is made longer or shorter, which a user may do."""
    then = json.loads(content.get(_LENGTH, "{}"))
    for key, now in _length(trainer).items():
        if then.get(key, now) != now:
            rank_zero_only(print)(f"note: trainer.{key} was {then[key]} and is {now}: the schedule changes with it")


def _length(trainer: Trainer) -> dict[str, int | None]:
    return {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}


def _conditions(trainer: Trainer, module: LightningModule, data: Any) -> dict[str, Any]:
    """Return, by setting, what decides the weights of a run."""
    keys = ["accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "limit_train_batches"]
    settings: dict[str, Any] = {}
    if isinstance(module, RexNetModule):
        settings |= {f"model.{key}": value for key, value in module.settings().items()}
        if module.schedule_settings.name == "plateau":  # what is validated, and when, decides the learning rate
            keys += ["check_val_every_n_epoch", "val_check_interval", "limit_val_batches"]
    if isinstance(data, ImageFolderDataModule):
        settings |= {f"data.{key}": value for key, value in data.settings().items()} | data.fingerprints()
    return {
        "seed_everything": run_seed(),
        "processes": trainer.world_size,
        **{f"trainer.{key}": getattr(trainer, key) for key in keys},
        "trainer.precision": trainer.precision,
        "trainer.sync_batchnorm": getattr(trainer.strategy, "_layer_sync", None) is not None,
        **settings,
    }

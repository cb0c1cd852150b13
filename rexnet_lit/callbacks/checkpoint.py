"""What keeps a run safe: its checkpoints, and what it does when told to stop.

A checkpoint holds no random state, because there is none: order, augmentation and dropout are functions of (seed,
epoch, position). So a run that goes on from ``last.ckpt`` ends with the weights of one that was never interrupted,
bit for bit on a CPU, if nothing that decides them has changed; `RunCheckpoint` compares that.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from rexnet_lit.data.datamodule import ImageFolderDataModule, find_datamodule, run_seed
from rexnet_lit.models import checkpoint
from rexnet_lit.training.module import RexNetModule
from rexnet_lit.utils import process
from rexnet_lit.utils.errors import Stopped, UserError
from rexnet_lit.utils.files import link_or_copy


class RunCheckpoint(ModelCheckpoint):
    """Keeps ``best.ckpt`` (highest validation top-1) and ``last.ckpt``.

    ``last.ckpt`` is written at the end of each epoch, every ``every`` seconds within one, and when the process is
    told to stop by SIGTERM, Ctrl-C or its terminal's end: then the running step (or validation) is finished first.

    Args:
        every: Seconds between saves within an epoch.
        accept_changes: Go on although the images, the batch size or the processes are others than before.
    """

    def __init__(self, every: float = 600.0, accept_changes: bool = False) -> None:
        super().__init__(
            filename="best",
            monitor="val/top1",
            mode="max",
            save_last=True,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )
        self._every, self._accept_changes = every, accept_changes
        self._saved = time.monotonic()
        self._told: signal.Signals | None = None
        self._stop: Stopped | None = None
        self._over = False
        self._fresh: Path | None = None
        self._validated = -1
        self._handlers: dict[signal.Signals, Any] = {}

    # Saving

    def on_train_batch_end(  # noqa: D102
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # The gradients of half a step are in no checkpoint. Where validation is next, the save comes after it, unless
        # the run is to stop: it may come after each batch.
        if (batch_idx + 1) % trainer.accumulate_grad_batches or _tries_out(trainer):
            return
        if trainer.is_last_batch:
            return
        validates = trainer.val_check_batch and (batch_idx + 1) % trainer.val_check_batch == 0
        due = self._told is not None or (not validates and time.monotonic() - self._saved > self._every)
        if trainer.strategy.reduce_boolean_decision(due, all=False):
            self._save_last(trainer)
            self._stop = self._stop_if_told(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Within an epoch, save the best weights, and the last ones when it is time; at its end that is done anyway."""
        self._validated = trainer.global_step
        if trainer.state.fn == "fit" and not (trainer.sanity_checking or trainer.is_last_batch or _tries_out(trainer)):
            self._save_best(trainer)
            whole = (trainer.fit_loop.epoch_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0
            due = whole and time.monotonic() - self._saved > self._every
            if trainer.strategy.reduce_boolean_decision(due, all=False):
                self._save_last(trainer)
            self._fresh = None  # the last weights will be others

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the last and, where it is, the best weights."""
        if _tries_out(trainer):
            return
        with contextlib.nullcontext() if trainer.is_last_batch else _within_epoch(trainer):
            if self._validated == trainer.global_step:  # or the figures are of other weights
                self._save_best(trainer)
            self._save_last(trainer)
        self._stop = self._stop_if_told(trainer)

    def _stop_here(self, *args: Any, **kwargs: Any) -> None:
        """Stop where a step or an epoch has ended so: its figures are logged now."""
        stop, self._stop = self._stop, None  # the trainer may fit again
        if stop is not None:
            raise stop

    on_train_batch_start = on_train_epoch_start = on_validation_start = _stop_here

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Where nothing was ever validated, the last weights are the best that there are."""
        if _tries_out(trainer):
            return
        super().on_train_end(trainer, pl_module)
        last = Path(self.last_model_path)
        if trainer.is_global_zero and not self.best_model_path and last.is_file():
            best = last.with_name("best.ckpt")
            best.unlink(missing_ok=True)
            link_or_copy(last, best, best)

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        """Write a checkpoint; one that has just been written as the best is the last too, by another name."""
        best, self._fresh = self._fresh, None
        last = Path(filepath)
        if best is None:
            super()._save_checkpoint(trainer, filepath)
            self._fresh = None if last.name == "last.ckpt" else last
            return
        if trainer.is_global_zero:
            link_or_copy(best, last, last.with_name(checkpoint.PREVIOUS))
        trainer.strategy.barrier()

    def _save_best(self, trainer: pl.Trainer) -> None:
        candidates = self._monitor_candidates(trainer)
        if self.monitor in candidates:
            self._save_topk_checkpoint(trainer, candidates)

    def _save_last(self, trainer: pl.Trainer) -> None:
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        self._saved = time.monotonic()

    # Stopping

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals over, from Lightning too, which would save nothing; remove what a killed save has left."""
        if trainer.is_global_zero and self.dirpath:
            for debris in Path(self.dirpath).glob(".*.ckpt.*"):
                debris.unlink(missing_ok=True)
        if threading.current_thread() is not threading.main_thread():
            return

        def told(number: int, frame: Any) -> None:
            again, self._told = self._told is not None, signal.Signals(number)
            if self._over:
                raise Stopped(number, f"stopped after the last epoch; {self._how_to_go_on(trainer)}")
            if again and trainer.validating:
                raise Stopped(number, f"stopped during validation; {self._how_to_go_on(trainer)}")
            if trainer.is_global_zero and not again:
                where = "this validation" if trainer.validating else "this step"
                # print() must not be entered twice, and the signal may have come in one.
                with contextlib.suppress(OSError):
                    os.write(1, f"{self._told.name}: saving and stopping after {where}\n".encode())

        self._over = False
        before = process.received_signal()
        self._told = signal.Signals(before) if before else None
        trainer._signal_connector.received_sigterm = False  # Lightning would end the run before this step is logged
        self._handlers = {number: signal.signal(number, told) for number in process.stop_signals()}

    def end_training(self, trainer: pl.Trainer) -> None:
        """Stop now where the last epoch was told to; from here on there is nothing to save first.

        Raises:
            Stopped: It was.
        """
        self._over = True
        self._stop = self._stop or self._stop_if_told(trainer)
        self._stop_here()

    def _stop_if_told(self, trainer: pl.Trainer) -> Stopped | None:
        told = self._told is not None
        if trainer.strategy.reduce_boolean_decision(told, all=False):
            name = (self._told or signal.SIGTERM).name
            done = trainer.fit_loop.epoch_loop.batch_idx + 1
            batches = f"batch {done} of {trainer.num_training_batches}"
            where = f"stopped by {name} after {batches} of epoch {trainer.current_epoch + 1}"
            return Stopped(int(self._told or signal.SIGTERM), f"{where}; {self._how_to_go_on(trainer)}")
        return None

    def _how_to_go_on(self, trainer: pl.Trainer) -> str:
        last = Path(self.dirpath or "") / "last.ckpt"
        config = last.parent.parent / "config.yaml"
        if not last.is_file():
            return "nothing was saved yet"
        if not config.is_file():
            return f"all is saved in {last}"
        parts = (shlex.quote(str(path)) for path in (config, last))
        return "go on with: python -m rexnet_lit fit --config {} --ckpt_path {}".format(*parts)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    # Going on

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave a resumed run stopped where it had stopped early."""
        if stopped_early(trainer):
            trainer.should_stop = True
            rank_zero_only(print)(
                "note: EarlyStopping has told this run to end; remove it from trainer.callbacks to go on"
            )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write down what an exact resume depends on."""
        conditions = _conditions(trainer, pl_module, find_datamodule(trainer))
        checkpoint[_CONDITIONS] = json.dumps(conditions, default=str)
        checkpoint[_LENGTH] = json.dumps(_length(trainer))

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to go on where the run would silently be another; know the best weights that there are."""
        self.refuse_changes(trainer, pl_module, find_datamodule(trainer), checkpoint)
        self._best_on_disk(trainer, checkpoint)
        then = json.loads(checkpoint.get(_LENGTH, "{}"))
        for key, now in _length(trainer).items():
            if then.get(key, now) != now:
                rank_zero_only(print)(f"note: trainer.{key} was {then[key]} and is {now}: the schedule changes with it")

    def refuse_changes(self, trainer: pl.Trainer, module: pl.LightningModule, data: Any, content: Any) -> None:
        """Compare a run with the one that a checkpoint's ``content`` is of.

        Raises:
            UserError: Something has changed and ``accept_changes`` is not set, or cannot be changed; all is named.
        """
        then = json.loads(content.get(_CONDITIONS, "{}"))
        now = json.loads(json.dumps(_conditions(trainer, module, data), default=str))
        differing = [name for name in now if then.get(name, _ABSENT) != now[name]]
        fixed = [name for name in differing if name.startswith(_FIXED) and name in then]
        named = fixed + [name for name in differing if name not in fixed and not self._accept_changes]
        if not named:
            batches, why = content["loops"]["fit_loop"]["epoch_loop.batch_progress"], ""
            if content.get(_REPLACED):
                why = "holds what was chosen and calibrated when its run ended, not an epoch's weights"
            elif batches["current"]["processed"] % trainer.accumulate_grad_batches and not batches["is_last_batch"]:
                why = "was saved amid a step of accumulated batches, whose gradients are lost"
            if why:
                raise UserError(
                    f"ckpt_path: this best.ckpt {why}; go on with the last.ckpt beside it, or start a new run from it "
                    "with model.weights"
                )
            return
        changed = [f"{name} ({then.get(name, _ABSENT)} then, {now[name]} now)" for name in named[:8]]
        more = f" and {len(named) - 8} more" if len(named) > 8 else ""
        remedy = (
            "set them back (the run folder's config.yaml has them), or start a new run from its weights with "
            "model.weights"
            if fixed
            else "set them back, or go on nevertheless with --accept_changes true"
        )
        raise UserError(f"ckpt_path: since the checkpoint these have changed: {'; '.join(changed)}{more}; {remedy}")

    def _best_on_disk(self, trainer: pl.Trainer, content: dict[str, Any]) -> None:
        """Have a checkpoint know the run folder's ``best.ckpt``, and none that is not there.

        One that a user's own saver has written is from just before ours; another may have been copied from elsewhere.
        """
        ours = content["callbacks"].get(self.state_key)
        best, found = Path(self.dirpath or "") / "best.ckpt", None
        if trainer.is_global_zero and best.is_file():
            with contextlib.suppress(UserError):  # a damaged one is as good as none
                written = checkpoint.read_ckpt(str(best))
                found = written["global_step"], written["callbacks"][self.state_key]
        found = trainer.strategy.broadcast(found)
        if ours is None or (found is not None and found[0] > content["global_step"]):
            return
        nothing = {"best_model_score": None, "kth_value": self.kth_value}
        content["callbacks"][self.state_key] = {**ours, **nothing} if found is None else found[1]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best score over; a run folder may have been moved since."""
        self.best_model_score = state_dict["best_model_score"]
        self.kth_value = state_dict["kth_value"]
        if self.best_model_score is not None:
            self.best_model_path = self.kth_best_model_path = str(Path(self.dirpath or "") / "best.ckpt")
            self.best_k_models = {self.best_model_path: self.best_model_score}
        self.last_model_path = str(Path(self.dirpath or "") / "last.ckpt")


def replace_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Put other weights into a ``best.ckpt`` at the end of a run: they are no epoch's then, and not resumed from."""
    content = checkpoint.read_ckpt(str(path))
    content["state_dict"] |= state
    checkpoint.write_ckpt({**content, _REPLACED: True}, path)


def find_model_checkpoint(trainer: pl.Trainer) -> ModelCheckpoint | None:
    """Return what keeps a run's best and last weights: ours, whatever a user has added."""
    savers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    return next((saver for saver in savers if isinstance(saver, RunCheckpoint)), savers[0] if savers else None)


def stopped_early(trainer: pl.Trainer) -> bool:
    """Say whether EarlyStopping has told the run to end."""
    early = [c for c in trainer.callbacks if isinstance(c, EarlyStopping)]  # type: ignore[attr-defined]
    return any(c.stopped_epoch or c.stopping_reason_message for c in early)


@contextlib.contextmanager
def _within_epoch(trainer: pl.Trainer) -> Iterator[None]:
    """Have what is saved say that its epoch goes on: Lightning counts one that ``max_steps`` cuts short as done."""
    progress: Any = trainer.fit_loop.epoch_progress
    for count in (progress.current, progress.total):
        count.processed -= 1
    try:
        yield
    finally:
        for count in (progress.current, progress.total):
            count.processed += 1


def _tries_out(trainer: pl.Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


_CONDITIONS, _LENGTH, _REPLACED = "rexnet_lit_run", "rexnet_lit_run_length", "rexnet_lit_rewritten"
_ABSENT = "not recorded"
_FIXED = ("model.optimizer.", "model.ema", "model.schedule.name")
"""What a resume takes from the checkpoint: to change it would be in vain, or fail."""


def _length(trainer: pl.Trainer) -> dict[str, int | None]:
    """Return what a user may rightly change on a resume: to train longer."""
    return {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}


def _conditions(trainer: pl.Trainer, module: pl.LightningModule, data: Any) -> dict[str, Any]:
    """Return, by setting, what decides a run's weights."""
    keys = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "limit_train_batches")
    conditions: dict[str, Any] = {
        "seed_everything": run_seed(),
        "processes": trainer.world_size,
        **{f"trainer.{key}": getattr(trainer, key) for key in keys},
        "trainer.precision": trainer.precision,
        "trainer.sync_batchnorm": getattr(trainer.strategy, "_layer_sync", None) is not None,
    }
    if isinstance(module, RexNetModule):
        conditions |= {f"model.{key}": value for key, value in module.settings().items()}
        if module.schedule_settings.name == "plateau":  # what is validated, and when, decides the learning rate
            validation = ("check_val_every_n_epoch", "val_check_interval", "limit_val_batches")
            conditions |= {f"trainer.{key}": getattr(trainer, key) for key in validation}
    if isinstance(data, ImageFolderDataModule):
        conditions |= {f"data.{key}": value for key, value in data.settings().items()}
        conditions |= data.fingerprints()
    return conditions


class StopOnSignal(Callback):
    """Ends a run that a signal should have ended, where Python has dropped the signal's exception."""

    def _look(self, *args: Any, **kwargs: Any) -> None:
        number = process.received_signal()
        if number:
            raise Stopped(number, f"stopped by {signal.Signals(number).name}")

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _look

"""What a run did: ``metrics.csv``, ``result.json``, and what the loggers get beside the metrics."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from rexnet_lit.data.datamodule import find_datamodule
from rexnet_lit.data.sampler import run_seed
from rexnet_lit.training.callbacks.checkpoint import NOT_SAVED, Shipped, find_checkpoint
from rexnet_lit.training.callbacks.mirroring import ChooseMirroring
from rexnet_lit.training.callbacks.run_files import find_run_folder
from rexnet_lit.training.callbacks.run_folder import RESULT
from rexnet_lit.training.metrics import main_metrics
from rexnet_lit.training.module import RexNetModule
from rexnet_lit.utils.errors import Stopped, UserError
from rexnet_lit.utils.files import write_file

_PACKAGES = ("rexnet-lit", "torch", "torchvision", "lightning", "timm", "torchmetrics", "albumentations")
_PHASES = ("preparation", "training", "validation", "selection and calibration")


class RunRecord(Callback):
    """Records a run.

    ``metrics.csv`` has a row per epoch, with its last validation, and a last row for the weights that ship; it is left
    to a `CSVLogger` of the user's that writes it into the same folder. ``result.json`` says what ships and why, and
    what is needed to repeat the run. The loggers get the learning rates, the images per second, and the settings.

    It comes first among the callbacks, so that it knows when the others begin.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(_PHASES, 0.0)
        self._phase, self._since = _PHASES[0], time.monotonic()
        self._rows: list[dict[str, Any]] = []
        self._images, self._epoch_start = 0, 0.0
        self._started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._own_csv = True
        self._failed = False
        self._begun = self._validated = False
        """Whether training has begun, and whether the present epoch has been validated."""
        self.images_per_second = 0.0
        """In training, in the present epoch."""

    def _enter(self, phase: str) -> str:
        """Begin a phase, and return the one before."""
        now, before = time.monotonic(), self._phase
        self._seconds[before] += now - self._since
        self._phase, self._since = phase, now
        return before

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``result.json``; keep the rows of the epochs that a resumed run has done."""
        self._enter("training")
        self.on_train_epoch_start(trainer, pl_module)
        if not self._keep_rows(trainer):
            return
        self._begun = True
        self._write_result(trainer, "running")
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):  # it gets them with the final metrics
                self._log(logger.log_hyperparams, _settings(trainer, pl_module))

    def _keep_rows(self, trainer: Trainer) -> bool:
        """Read the rows of the epochs that are done; return whether this process writes into a run folder."""
        folder = find_run_folder(trainer)
        if folder is None or not trainer.is_global_zero:
            return False
        own = [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]
        self._own_csv = all(Path(logger.log_dir) != folder for logger in own)
        if (folder / "metrics.csv").is_file() and self._own_csv:
            with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            self._rows = [row for row in rows if row["epoch"].isdecimal() and int(row["epoch"]) < trainer.current_epoch]
        return True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._images, self._epoch_start, self._validated = 0, time.monotonic(), False

    def on_train_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += len(batch[1]) * trainer.world_size
        self.images_per_second = self._images / max(time.monotonic() - self._epoch_start, 1e-9)
        if trainer.global_step % max(1, trainer.log_every_n_steps) == 0:  # type: ignore[attr-defined]
            self._log_metrics(trainer, learning_rates(trainer))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Time the validation."""
        if trainer.state.fn == "fit":
            self._before = self._enter("validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with what the validation has interrupted."""
        if trainer.state.fn == "fit":
            self._validated = True
            start = self._since
            self._enter(self._before)
            self._epoch_start += self._since - start  # the speed is that of training

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a row."""
        metrics = main_metrics(trainer.callback_metrics)
        if not metrics or not trainer.is_global_zero:  # none in a run that is resumed at the end of an epoch
            return
        if not self._validated:  # Lightning keeps those of an earlier epoch
            metrics = {name: value for name, value in metrics.items() if not name.startswith("val/")}
        rates = learning_rates(trainer)
        row = {"epoch": trainer.current_epoch, "step": trainer.global_step, "weights": "", "lr": rates.get("lr", "")}
        self._rows.append({**row, **metrics, "images/s": round(self.images_per_second, 1)})
        self._write_rows(trainer)
        if self._images:
            self._log_metrics(trainer, {"images/s": self.images_per_second})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that training has ended; stop Lightning's bar, which would hide those of what follows."""
        self._enter(_PHASES[-1])
        bar = trainer.progress_bar_callback
        if isinstance(bar, RichProgressBar):
            bar._stop_progress()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record what ships."""
        if getattr(pl_module, "started", True):
            self._finish(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Record what ships of a run that is resumed after its last epoch: the others' `on_fit_end` has selected it."""
        if stage == "fit" and not getattr(pl_module, "started", True):
            self._keep_rows(trainer)
            self._finish(trainer, pl_module)

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter(_PHASES[-1])
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        shipped = _shipped(trainer)
        if shipped.metrics:
            row = {"epoch": "", "step": trainer.global_step, "weights": f"shipped: {shipped.weights}"}
            self._rows.append({**row, **shipped.metrics})
            self._write_rows(trainer)
        self._write_result(trainer, "finished")
        final = {name.replace("val/", "shipped/"): value for name, value in shipped.metrics.items()}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                self._log(logger.log_hyperparams, _settings(trainer, pl_module), final)
        if final:
            self._log_metrics(trainer, final)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Record why the run has ended."""
        if trainer.state.fn == "fit" and self._begun:
            stopped = isinstance(exception, Stopped | KeyboardInterrupt)
            self._write_result(trainer, "stopped" if stopped else "failed", str(exception))

    def _write_rows(self, trainer: Trainer) -> None:
        folder = find_run_folder(trainer)
        if folder is None or not self._own_csv:
            return
        text = io.StringIO(newline="")
        names = dict.fromkeys(name for row in self._rows for name in row)
        table = csv.DictWriter(text, list(names), restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(self._rows)
        self._log(write_file, folder / "metrics.csv", text.getvalue())

    def _write_result(self, trainer: Trainer, status: str, reason: str = "") -> None:
        folder = find_run_folder(trainer)
        if folder is None or not trainer.is_global_zero:
            return
        self._enter(self._phase)
        shipped, module = _shipped(trainer), trainer.lightning_module
        seconds = {phase: round(value, 2) for phase, value in self._seconds.items()}
        content = {
            "status": status,
            **({"reason": reason} if reason else {}),
            "weights": shipped.weights if status == "finished" else None,
            "why": shipped.why if status == "finished" else None,
            "temperature": shipped.temperature,
            "head_strength": shipped.strength,
            "metrics": dict(shipped.metrics),
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "resumed": trainer.ckpt_path,
            "seed": run_seed(),
            "started": self._started,
            "seconds": {**seconds, "total": round(sum(self._seconds.values()), 2)},
            "command": shlex.join(sys.orig_argv),
            "device": f"{trainer.world_size} x {trainer.strategy.root_device.type}",
            "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
            "settings": _settings(trainer, module),
            "chosen": _chosen(trainer),
        }
        self._log(write_file, folder / RESULT, json.dumps(content, indent=2, default=str) + "\n")

    def _log_metrics(self, trainer: Trainer, values: dict[str, float]) -> None:
        for logger in trainer.loggers:
            self._log(logger.log_metrics, values, trainer.global_step)

    def _log(self, write: Callable[..., Any], *args: Any) -> None:
        """Write a record; warn once if that fails, as the training is worth more."""
        try:
            write(*args)
        except (OSError, UserError) as error:
            if not self._failed:
                self._failed = True
                warnings.warn(f"the record of the run cannot be written: {error}; training continues", stacklevel=2)


def find_record(trainer: Trainer) -> RunRecord:
    """Return the record of a fit, which every fit of a `RexNetModule` has."""
    return next(c for c in trainer.callbacks if isinstance(c, RunRecord))  # type: ignore[attr-defined]


def learning_rates(trainer: Trainer) -> dict[str, float]:
    """Return the learning rates that differ: ``lr`` is the full one, ``lr/1`` the next smaller one, ..."""
    rates = {group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups}
    ordered = sorted(map(float, rates), reverse=True)
    return {"lr" if i == 0 else f"lr/{i}": rate for i, rate in enumerate(ordered)}


def _shipped(trainer: Trainer) -> Shipped:
    saver = find_checkpoint(trainer)
    return NOT_SAVED if saver is None else saver.shipped


def _chosen(trainer: Trainer) -> dict[str, float]:
    """Return what the run has chosen where a setting is ``auto``."""
    choices = (c.chosen for c in trainer.callbacks if isinstance(c, ChooseMirroring))  # type: ignore[attr-defined]
    return next(choices, {})


def _settings(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    data = find_datamodule(trainer)
    settings: dict[str, Any] = {"max_epochs": trainer.max_epochs, "precision": str(trainer.precision)}
    if isinstance(module, RexNetModule):
        settings |= {"backbone": module.spec.network or module.spec.backbone, "head": module.spec.head.name}
        settings |= module.settings()
    return settings | ({} if data is None else {f"data.{key}": value for key, value in data.settings().items()})


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

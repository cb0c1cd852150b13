"""What is printed: of a fit a line per epoch and a summary, of another run in Python what it leaves out."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.utilities import rank_zero_only

from rexnet_lit.data.datamodule import find_datamodule
from rexnet_lit.models import checkpoint
from rexnet_lit.training.callbacks.checkpoint import find_checkpoint, stopped_early
from rexnet_lit.training.callbacks.record import find_record
from rexnet_lit.training.callbacks.run_files import find_run_folder
from rexnet_lit.training.metrics import main_metrics
from rexnet_lit.training.module import RexNetModule
from rexnet_lit.utils.errors import plural
from rexnet_lit.utils.progress import SECONDS


def print_table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print names and values in two columns, the same in a terminal and in a log file."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    print("\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)]), flush=True)  # noqa: T201


class ConsoleSummary(Callback):
    """Prints the metrics of each epoch, and at the end of a fit those of the model, the files and the next command.

    Where a progress bar shows the epochs, in a terminal or a notebook, only the end is printed. In a log file an epoch
    that takes long has a line every few seconds.
    """

    def __init__(self) -> None:
        self._start, self._printed, self._validated = 0.0, 0.0, False

    def _prints(self, trainer: Trainer) -> bool:
        shows_bar = sys.stdout.isatty() or "ipykernel" in sys.modules
        return trainer.is_global_zero and not (shows_bar and trainer.progress_bar_callback is not None)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock: the first batch of the epoch is loaded after this."""
        self._start = self._printed = time.monotonic()
        self._validated = False

    on_train_start = on_train_epoch_start  # a run that is resumed within an epoch does not start that epoch

    def on_train_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._print_progress(trainer, "training", batch_idx + 1, trainer.num_training_batches)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Print how far the validation is."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            done, batches = trainer.fit_loop.epoch_loop.val_loop.batch_progress.current.ready, trainer.num_val_batches
            self._print_progress(trainer, "validation", done, sum(batches))

    def _print_progress(self, trainer: Trainer, what: str, done: int, batches: float) -> None:
        if time.monotonic() - self._printed > SECONDS and self._prints(trainer):
            self._printed = time.monotonic()
            loss = trainer.callback_metrics.get("train/loss_step")
            shown = f", loss {float(loss):.4f}" if loss is not None and what == "training" else ""
            print(f"epoch {trainer.current_epoch + 1}: {what}, batch {done} of {batches}{shown}", flush=True)  # noqa: T201

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the metrics are those of this epoch."""
        self._validated = self._validated or not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the metrics of the epoch."""
        values = main_metrics(trainer.callback_metrics)
        if not self._validated:  # they are those of an earlier epoch
            values = {name: value for name, value in values.items() if not name.startswith("val/")}
        if self._prints(trainer) and values:  # none in a run that is resumed at the end of an epoch
            shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
            end = f"/{trainer.max_epochs}" if trainer.max_epochs != -1 else ""
            took, speed = time.monotonic() - self._start, find_record(trainer).images_per_second
            trained = f"; training {speed:.1f} images/s" if speed else ""
            print(f"epoch {trainer.current_epoch + 1}{end}  {shown}  ({took:.1f} s{trained})", flush=True)  # noqa: T201

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the summary."""
        saver, folder = find_checkpoint(trainer), find_run_folder(trainer)
        if saver is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            print("Fit finished. Nothing was saved: the trainer's enable_checkpointing is false.", flush=True)  # noqa: T201
        if saver is None or folder is None or not (folder / "model.safetensors").is_file():
            return
        shipped, model = saver.shipped, folder / "model.safetensors"
        rows = [(name, f"{value:.4f}") for name, value in main_metrics(shipped.metrics).items()]
        rows += [("run folder", str(folder)), ("model", str(model)), ("next", _next_command(trainer, model))]
        kept = f"Kept: {shipped.weights} of {trainer.current_epoch} ({shipped.why})"
        if not shipped.weights.startswith("epoch"):
            kept = f"Kept: {shipped.weights} ({shipped.why})"
        print_table(f"Fit finished{_why_ended(trainer)}. {kept}", rows)


def _why_ended(trainer: Trainer) -> str:
    timers = [c for c in trainer.callbacks if isinstance(c, Timer)]  # type: ignore[attr-defined]
    if stopped_early(trainer):
        return " by EarlyStopping"
    return " by trainer.max_time" if any((timer.time_remaining() or 0) < 0 for timer in timers) else ""


def _next_command(trainer: Trainer, model: Path) -> str:
    data = find_datamodule(trainer)
    splits = data.folder.splits if data is not None and data.folder else {"val": None}
    command = "test" if "test" in splits else "validate" if "val" in splits else "predict --data.predict_path PATH"
    return f"python -m rexnet_lit {command} --ckpt_path {shlex.quote(str(model))}"


class EvaluationNotes(Callback):
    """Prints what ``test`` and ``predict`` of a `Trainer` in Python leave out, unlike those of the command line."""

    @rank_zero_only
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that other weights ship, and that strangers are not looked at."""
        data, folder = find_datamodule(trainer), find_run_folder(trainer)
        shipped = folder / "model.safetensors" if folder is not None else Path("MODEL")
        if isinstance(pl_module, RexNetModule) and not trainer.ckpt_path and shipped.is_file():
            state = checkpoint.load_model(shipped).state
            if checkpoint.digest(state) != checkpoint.digest(pl_module.network.state_dict()):
                _note(f"this tests the weights at the end of training; those that ship are in {shipped}")
        if data is not None and data.strangers is not None:
            _note(f"data.strangers has no effect here; use: rexnet-lit test {shlex.quote(str(shipped))}")

    @rank_zero_only
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that no file is written, and which images have no row."""
        data, loader = find_datamodule(trainer), trainer.predict_dataloaders
        if data is None or data.predict_samples is None:
            return
        if data.predict_output is not None:
            _note("data.predict_output has no effect here; use: rexnet-lit predict MODEL")
        lost = len(data.predict_samples) - len(loader.dataset.samples)  # type: ignore[union-attr]
        if lost:
            many = plural(lost, "image has", "images have")
            _note(
                f"{many} no row, being unreadable; the rows' paths: trainer.predict_dataloaders.dataset.samples.paths"
            )


def _note(text: str) -> None:
    print(f"note: {text}", flush=True)  # noqa: T201

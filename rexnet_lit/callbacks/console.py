"""What a fit prints: a line per epoch, and a summary at the end."""

from __future__ import annotations

import itertools
import shlex
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.utilities import rank_zero_only

from rexnet_lit.callbacks.calibration import Calibrate
from rexnet_lit.callbacks.checkpoint import find_model_checkpoint, stopped_early
from rexnet_lit.callbacks.weight_selection import WeightSelection
from rexnet_lit.data.datamodule import find_datamodule

_STAGES = ("train", "val", "test")
_FIRST = ("loss", "top1", "top5", "macro_f1", "ece")


def main_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of each stage, the most important first; without learning rates and losses of single steps."""
    names = [name for name in metrics if name.partition("/")[0] in _STAGES and not name.endswith("_step")]
    ranks = {f"{stage}/{name}": rank for rank, (stage, name) in enumerate(itertools.product(_STAGES, _FIRST))}
    return {name: float(metrics[name]) for name in sorted(names, key=lambda name: ranks.get(name, len(ranks)))}


def print_table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print names and values in two columns, the same in a terminal and in a log file."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    print("\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)]), flush=True)  # noqa: T201


class ConsoleSummary(Callback):
    """Prints the metrics of each epoch, and at the end of a fit those of the model, the files and the next command.

    Args:
        lines: Print a line per epoch, for a log file; a terminal has a progress bar.
    """

    def __init__(self, *, lines: bool) -> None:
        self._lines = lines
        self._start = self._trained = 0.0
        self._images, self._validated = 0, False
        self._best: dict[str, float] = {}
        self._best_epoch = -1

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock: the first batch of the epoch is loaded after this."""
        self._start, self._images, self._validated = time.monotonic(), 0, False

    on_train_start = on_train_epoch_start  # a run that is resumed within an epoch does not start that epoch

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the best metrics; there may be several validations in an epoch."""
        if trainer.sanity_checking:
            return
        self._validated = True
        found = {k: v for k, v in main_metrics(trainer.callback_metrics).items() if k.startswith("val/")}
        if found.get("val/top1", -1.0) > self._best.get("val/top1", -1.0):
            self._best, self._best_epoch = found, trainer.current_epoch

    def on_train_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += len(batch[1]) * trainer.world_size
        self._trained = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the metrics of the epoch."""
        values = main_metrics(trainer.callback_metrics)
        if not self._validated:  # they are those of an earlier epoch
            values = {name: value for name, value in values.items() if not name.startswith("val/")}
        if self._best_epoch in (trainer.current_epoch, -1):
            self._best |= {name: value for name, value in values.items() if name.startswith("train/")}
        if self._lines and trainer.is_global_zero and values:  # none in a run that is resumed at the end of an epoch
            shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
            end = f"/{trainer.max_epochs}" if trainer.max_epochs != -1 else ""
            took = f"{time.monotonic() - self._start:.1f} s"
            if self._images:
                took += f"; training {self._images / (self._trained - self._start):.1f} images/s"
            print(f"epoch {trainer.current_epoch + 1}{end}  {shown}  ({took})", flush=True)  # noqa: T201

    def state_dict(self) -> dict[str, Any]:
        """Return the best epoch so far, for the summary of a resumed run."""
        return {"best": self._best, "best_epoch": self._best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best epoch of the run that is resumed."""
        self._best, self._best_epoch = dict(state_dict["best"]), int(state_dict["best_epoch"])

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the summary."""
        saver = find_model_checkpoint(trainer)
        if saver is None and not getattr(trainer, "fast_dev_run", False):
            print("Fit finished. Nothing was saved: trainer.enable_checkpointing is false.", flush=True)  # noqa: T201
        saved = (saver.best_model_path or saver.last_model_path) if saver is not None else ""
        model = Path(saved).parent.parent / "model.safetensors"
        if not saved or not model.is_file():
            return
        ends = [c for c in trainer.callbacks if isinstance(c, WeightSelection | Calibrate)]  # type: ignore[attr-defined]
        selected = next((c.kept for c in ends if isinstance(c, WeightSelection)), "")
        metrics: dict[str, Any] = {} if selected else dict(self._best)  # the training loss is of other weights
        for end in ends:
            metrics |= end.metrics
        rows = [(name, f"{value:.4f}") for name, value in main_metrics(metrics).items()]
        rows += [("run folder", str(model.parent)), ("model", str(model)), ("next", _next_command(trainer, model))]
        print_table(f"Fit finished{_why_ended(trainer)}{self._which_weights(trainer, selected)}", rows)

    def _which_weights(self, trainer: Trainer, selected: str) -> str:
        if selected:
            return f". Selected weights: {selected}"
        if self._best_epoch >= 0:
            return f". Best epoch: {self._best_epoch + 1} of {trainer.current_epoch}"
        return ", without a validation"


def _why_ended(trainer: Trainer) -> str:
    timers = [c for c in trainer.callbacks if isinstance(c, Timer)]  # type: ignore[attr-defined]
    if stopped_early(trainer):
        return " by EarlyStopping"
    return " by trainer.max_time" if any((timer.time_remaining() or 0) < 0 for timer in timers) else ""


def _next_command(trainer: Trainer, model: Path) -> str:
    data = find_datamodule(trainer)
    command = "test" if data is not None and data.folder and "test" in data.folder.splits else "validate"
    return f"python -m rexnet_lit {command} --ckpt_path {shlex.quote(str(model))}"

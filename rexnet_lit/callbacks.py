"""What happens around training: the run folder's files, the lines on the screen, the report, the predictions.

Everything here hangs on Lightning's hooks and writes on the first process only.
"""

from __future__ import annotations

import contextlib
import csv
import shlex
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray
from torch import Tensor
from torchvision.utils import make_grid

from rexnet_lit import checkpoint, decode, quarantine, report
from rexnet_lit.blend import Blend
from rexnet_lit.calibration import Calibrate
from rexnet_lit.data import ImageFolderDataModule
from rexnet_lit.errors import UserError, counted
from rexnet_lit.files import fresh_path
from rexnet_lit.folder import write_split
from rexnet_lit.guards import saver_of, stopped_early
from rexnet_lit.loggers import Board
from rexnet_lit.module import RexNetModule

__all__ = [
    "AugmentedSamples",
    "EpochLine",
    "PredictionWriter",
    "RunFiles",
    "TestReport",
    "figures",
    "print_rows",
]


def _data(trainer: pl.Trainer) -> ImageFolderDataModule | None:
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, ImageFolderDataModule) else None


class RunFiles(Callback):
    """Writes ``split.csv``, ``quarantine.csv`` and ``model.safetensors`` into the run folder."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write down who is in which split, where the folders do not say, and which files were left out."""
        data, log_dir = _data(trainer), trainer.log_dir  # log_dir is agreed on by all processes
        if (
            data is None
            or data.folder is None
            or log_dir is None
            or getattr(trainer, "fast_dev_run", False)
            or not trainer.is_global_zero
        ):
            return
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        if data.folder.pooled:
            write_split(data.folder, Path(log_dir) / "split.csv")
        if data.bad_files:
            target = Path(log_dir) / "quarantine.csv"
            quarantine.write_quarantine(data.bad_files, target)
            many = counted(len(data.bad_files), "image", "images")
            print(f"left out as unreadable: {many}, listed in {target}", flush=True)  # noqa: T201

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the best weights, with the model's description, as the file to share; list files lost meanwhile."""
        self._ship(trainer, pl_module)
        data = _data(trainer)
        if data is None or trainer.log_dir is None or not trainer.is_global_zero:
            return
        lost = data.lost_files()
        if lost:
            target = Path(trainer.log_dir) / "quarantine.csv"
            quarantine.write_quarantine([*data.bad_files, *lost], target)
            many = counted(len(lost), "image was", "images were")
            print(f"{many} lost during the run, others of the class stood in: {target}", flush=True)  # noqa: T201

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ship what a run that was killed after its last save has not."""
        if isinstance(pl_module, RexNetModule) and not pl_module.started:
            rank_zero_only(print)("Nothing was left to train: the checkpoint is of the run's end.")
            self._ship(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Ship what there is when the run is stopped early; what stopped it is told, not what this may meet."""
        if trainer.state.fn == "fit":
            with contextlib.suppress(OSError, UserError):
                self._ship(trainer, pl_module)

    @rank_zero_only
    def _ship(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        saver = saver_of(trainer)
        # Without validation nothing is best, and the last weights are what there is.
        best = saver.best_model_path or saver.last_model_path if saver is not None else ""
        if best and Path(best).is_file():
            model = checkpoint.load_model(best)
            checkpoint.save_model(Path(best).parent.parent / "model.safetensors", model.spec, model.state)


class AugmentedSamples(Callback):
    """Shows TensorBoard what the first epoch's augmentation makes of 16 training images."""

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw them."""
        data = _data(trainer)
        boards = [logger for logger in trainer.loggers if isinstance(logger, Board)]
        if data is None or not boards:
            return
        images = torch.from_numpy(data.preview()).permute(0, 3, 1, 2)
        for board in boards:
            board.add_image("augmented samples", make_grid(images, nrow=4), trainer.global_step)


def print_rows(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print names and values in two columns, alike in a terminal and in a log file."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    print("\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)]), flush=True)  # noqa: T201


def figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics worth showing, the most important first."""
    return {name: float(metrics[name]) for name in _SHOWN if name in metrics}


_SHOWN = tuple(
    f"{stage}/{name}"
    for stage in ("train", "val", "test")
    for name in ("loss", "top1", "top5", "macro_f1", "ece")
)  # fmt: skip


class EpochLine(Callback):
    """Says how each epoch went, and at the end of a fit where everything is.

    Args:
        lines: Print a line per epoch, for a log file; a terminal has a progress bar.
    """

    def __init__(self, *, lines: bool) -> None:
        self._lines = lines
        self._start = self._trained = 0.0
        self._images, self._validated = 0, False
        self._best: dict[str, float] = {}
        self._best_epoch = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the time: a run that is resumed within an epoch does not start that epoch."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the time: the epoch's first batch is loaded after this."""
        self._start, self._images, self._validated = time.monotonic(), 0, False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the best figures; there may be several validations in an epoch."""
        if trainer.sanity_checking:
            return
        self._validated = True
        found = {k: v for k, v in figures(trainer.callback_metrics).items() if k.startswith("val/")}
        if found.get("val/top1", -1.0) > self._best.get("val/top1", -1.0):
            self._best, self._best_epoch = found, trainer.current_epoch

    def on_train_batch_end(  # noqa: D102
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += len(batch[1]) * trainer.world_size
        self._trained = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the epoch's figures."""
        values = figures(trainer.callback_metrics)
        if not self._validated:  # they would be an earlier epoch's
            values = {name: value for name, value in values.items() if not name.startswith("val/")}
        if self._best_epoch in (trainer.current_epoch, -1):
            self._best = {**self._best, **{k: v for k, v in values.items() if k.startswith("train/")}}
        if self._lines and trainer.is_global_zero and values:  # a run resumed where its epoch ended has none
            shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
            end = f"/{trainer.max_epochs}" if trainer.max_epochs != -1 else ""
            took = f"{time.monotonic() - self._start:.1f} s"
            if self._images:
                took += f"; training {self._images / (self._trained - self._start):.1f} images/s"
            print(f"epoch {trainer.current_epoch + 1}{end}  {shown}  ({took})", flush=True)  # noqa: T201

    def state_dict(self) -> dict[str, Any]:
        """Return the best epoch so far, for a resumed run's summary."""
        return {"best": self._best, "best_epoch": self._best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best epoch of the run that is resumed."""
        self._best, self._best_epoch = dict(state_dict["best"]), int(state_dict["best_epoch"])

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say which epoch was best, where the files are, and what to type next."""
        saver = saver_of(trainer)
        if saver is None and not getattr(trainer, "fast_dev_run", False):
            rank_zero_only(print)("Fit finished. Nothing was saved: trainer.enable_checkpointing is false.", flush=True)
        saved = (saver.best_model_path or saver.last_model_path) if saver is not None else ""
        model = Path(saved).parent.parent / "model.safetensors"
        if not trainer.is_global_zero or not saved or not model.is_file():
            return
        data = _data(trainer)
        command = "test" if data is not None and data.folder and "test" in data.folder.splits else "validate"
        ends: list[Any] = [c for c in trainer.callbacks if isinstance(c, Blend | Calibrate)]  # type: ignore[attr-defined]
        kept = next((c.kept for c in ends if isinstance(c, Blend)), "")
        shown = {} if kept else self._best  # the training loss is of other weights
        for end in ends:
            shown = {**shown, **end.metrics}
        timers = [c for c in trainer.callbacks if isinstance(c, Timer)]  # type: ignore[attr-defined]
        title = "Fit finished"
        if stopped_early(trainer):
            title += " by EarlyStopping"
        elif any((timer.time_remaining() or 0) < 0 for timer in timers):
            title += " by trainer.max_time"
        if kept:
            title += f". Instead of the best epoch: {kept}"
        elif self._best_epoch >= 0:
            title += f". Best epoch: {self._best_epoch + 1} of {trainer.current_epoch}"
        else:
            title += ", without a validation"
        print_rows(
            title,
            [
                *((name, f"{value:.4f}") for name, value in figures(shown).items()),
                ("run folder", str(model.parent)),
                ("model", str(model)),
                ("next", f"python -m rexnet_lit {command} --ckpt_path {shlex.quote(str(model))}"),
            ],
        )


class _Collector(Callback):
    """Gathers a per-image result over batches and processes, in the order of the images."""

    def __init__(self) -> None:
        self._batches: list[NDArray[np.int64]] = []
        self._indices: list[NDArray[np.int64]] = []
        self._rows: list[NDArray[np.float32]] = []

    def _add(self, loader: Any, batch_idx: int, rows: Tensor) -> None:
        if batch_idx == 0:
            self._batches, self._indices, self._rows = loader.sampler.batches(0), [], []
        self._indices.append(self._batches[batch_idx])
        self._rows.append(rows.cpu().numpy())

    def _gather(self, trainer: pl.Trainer) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the images that were looked at, (N,), rising, and their rows (N, K), on every process."""
        mine = (self._indices, self._rows)
        parts = [mine]
        if trainer.world_size > 1:
            parts = [mine] * trainer.world_size
            torch.distributed.all_gather_object(parts, mine)
        indices = np.concatenate([i for part in parts for i in part[0]])
        rows = np.concatenate([r for part in parts for r in part[1]])
        order = np.argsort(indices)
        return indices[order], rows[order]


class TestReport(_Collector):
    """Writes ``report/`` after a test.

    Args:
        folder: The run folder to write into.
    """

    __test__ = False  # no test case, whatever pytest makes of the name

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.metrics: Mapping[str, Any] = {}

    def on_test_batch_end(  # noqa: D102
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        self._add(trainer.test_dataloaders, batch_idx, outputs)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report."""
        data = _data(trainer)
        if data is None or not isinstance(pl_module, RexNetModule):
            return
        found, probs = self._gather(trainer)
        total = len(data.splits()["test"])
        samples = data.splits()["test"].take(found)
        if not trainer.is_global_zero:
            return
        spec = pl_module.spec
        predictions = report.Predictions(samples.paths, probs, samples.targets, spec.class_names)
        facts = {
            "Model": f"{spec.backbone}, {spec.head.name} head",
            "Input": f"{spec.eval_recipe.image_size} x {spec.eval_recipe.image_size} pixels",
            "Classes": str(spec.num_classes),
            "Test pictures": f"{len(samples)} of {total}" if len(samples) < total else str(total),
            "Left out as unreadable": str(len(data.bad_files)),
        }
        target = self.folder / "report"
        if target.exists():  # the newest report has the name, and no earlier one is lost
            target.rename(fresh_path(target))
        root = samples.root
        self.metrics = report.write_report(
            target,
            predictions,
            read_image=lambda path: decode.read(root / path, 160),
            title=f"Test report: {Path(root).name}",
            facts=facts,
            history=_history(self.folder / "metrics.csv"),
            weights=checkpoint.digest(pl_module.network.state_dict()),
        )
        if data.bad_files:
            quarantine.write_quarantine(data.bad_files, target / "quarantine.csv")


def _history(path: Path) -> list[dict[str, float]]:
    """Return the epochs' figures from a run's ``metrics.csv``, where it has one."""
    if not path.is_file():
        return []
    epochs: dict[int, dict[str, float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            shown = {k: float(row[k]) for k in _SHOWN if row.get(k)}
            if shown and row.get("epoch"):
                epoch = int(float(row["epoch"]))
                epochs.setdefault(epoch, {"epoch": epoch}).update(shown)
    return [epochs[epoch] for epoch in sorted(epochs)]


class PredictionWriter(_Collector):
    """Writes the predictions' CSV.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.predictions: report.Predictions | None = None
        self.quarantined: Path | None = None

    def on_predict_batch_end(  # noqa: D102
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        self._add(trainer.predict_dataloaders, batch_idx, outputs)

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file; every image that could not be read is listed beside it."""
        data = _data(trainer)
        if data is None or not isinstance(pl_module, RexNetModule):
            return
        found, probs = self._gather(trainer)
        samples = trainer.predict_dataloaders.dataset.samples.take(found)  # type: ignore[union-attr]
        if not trainer.is_global_zero:
            return
        self.predictions = report.Predictions(samples.paths, probs, None, pl_module.spec.class_names)
        report.write_predictions(self.predictions, self.path)
        if data.bad_files and self.path.is_file():  # a device has no place beside it
            self.quarantined = fresh_path(self.path.with_name("quarantine.csv"))
            quarantine.write_quarantine(data.bad_files, self.quarantined)

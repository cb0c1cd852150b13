"""The run's logs: TensorBoard and ``metrics.csv``. A log that cannot be written ends no training."""

from __future__ import annotations

import csv
import functools
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from torch import Tensor

from rexnet_lit.utils.files import atomic_write


def _forgiving(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make a logger's method say once what the system refuses, and go on."""

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except (OSError, ValueError) as raised:  # Lightning takes any fault of TensorBoard's for a wrong value
            error = raised if isinstance(raised, OSError) else raised.__cause__
            if not isinstance(error, OSError):
                raise
            if not getattr(self, "_has_failed", False):
                self._has_failed = True
                reason = error.strerror or type(error).__name__
                what = f"{type(self).__name__}'s log in {self.log_dir}"
                warnings.warn(f"{what} cannot be written ({reason}); training goes on without it", stacklevel=2)

    return guarded


class RunTensorBoardLogger(TensorBoardLogger):
    """TensorBoard's event files."""

    log_metrics = _forgiving(TensorBoardLogger.log_metrics)
    log_hyperparams = _forgiving(TensorBoardLogger.log_hyperparams)
    save = _forgiving(TensorBoardLogger.save)
    finalize = _forgiving(TensorBoardLogger.finalize)

    def _draw(self, tag: str, image: Tensor, step: int) -> None:
        self.experiment.add_image(tag, image, step)

    add_image = _forgiving(_draw)


class RunCSVLogger(CSVLogger):
    """``metrics.csv``, on the disk at once, which a resumed run carries on.

    Args:
        root: The folder that holds ``lightning_logs/``.
        version: The run's number; not yet known by default.
        keep: The step up to which an existing file's rows are kept.
    """

    def __init__(self, root: str, version: int | None = None, keep: int = -1) -> None:
        super().__init__(root, version=version, flush_logs_every_n_steps=1)
        self._keep = keep

    log_metrics = _forgiving(CSVLogger.log_metrics)
    save = _forgiving(CSVLogger.save)
    finalize = _forgiving(CSVLogger.finalize)

    @property
    @rank_zero_experiment
    def experiment(self) -> _Rows:
        """What writes the rows; made when the first is due."""
        if self._experiment is None:
            self._experiment = _Rows(self.log_dir, self._keep)
        return self._experiment  # type: ignore[return-value]


class _Rows(ExperimentWriter):
    """Rows behind those of an existing file, which Lightning's own would delete; cut back when the first is due."""

    def __init__(self, folder: str, keep: int) -> None:
        super().__init__(folder)
        self._keep: int | None = keep

    def _check_log_dir_exists(self) -> None:
        """Leave what is there."""

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        """Take a row."""
        if self._keep is not None:
            self._cut_back(Path(self.metrics_file_path), self._keep)
            self._keep = None
        super().log_metrics(metrics_dict, step)

    def _cut_back(self, path: Path, keep: int) -> None:
        if not path.is_file():
            return
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            self.metrics_keys = list(reader.fieldnames or [])
            rows = [row for row in reader if (row["step"] or "").isdecimal() and int(row["step"]) < keep]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.metrics_keys)
        writer.writeheader()
        writer.writerows(rows)
        with atomic_write(path) as file:
            file.write(text.getvalue().encode())

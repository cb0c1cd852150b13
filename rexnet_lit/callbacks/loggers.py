"""The logs of a run: TensorBoard and ``metrics.csv``. A log that cannot be written does not stop the training."""

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


def _warn_on_failure(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make a logger's method warn once when the log cannot be written, instead of raising."""

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except (OSError, ValueError) as raised:  # Lightning reraises any error of TensorBoard as a ValueError
            error = raised if isinstance(raised, OSError) else raised.__cause__
            if not isinstance(error, OSError):
                raise
            if not getattr(self, "_has_failed", False):
                self._has_failed = True
                what = f"{type(self).__name__}: the log in {self.log_dir} cannot be written"
                reason = error.strerror or type(error).__name__
                warnings.warn(f"{what} ({reason}); training continues without it", stacklevel=2)

    return guarded


class RunTensorBoardLogger(TensorBoardLogger):
    """TensorBoard's event files."""

    log_metrics = _warn_on_failure(TensorBoardLogger.log_metrics)
    log_hyperparams = _warn_on_failure(TensorBoardLogger.log_hyperparams)
    save = _warn_on_failure(TensorBoardLogger.save)
    finalize = _warn_on_failure(TensorBoardLogger.finalize)

    @_warn_on_failure
    def add_image(self, tag: str, image: Tensor, step: int) -> None:
        """Log an image (3, H, W)."""
        self.experiment.add_image(tag, image, step)


class RunCSVLogger(CSVLogger):
    """``metrics.csv``, written at every step; a resumed run appends to it.

    Args:
        root: The folder that holds ``lightning_logs/``.
        version: The run's number; not yet known by default.
        keep: The step up to which an existing file's rows are kept.
    """

    def __init__(self, root: str, version: int | None = None, keep: int = -1) -> None:
        super().__init__(root, version=version, flush_logs_every_n_steps=1)
        self._keep = keep

    log_metrics = _warn_on_failure(CSVLogger.log_metrics)
    save = _warn_on_failure(CSVLogger.save)
    finalize = _warn_on_failure(CSVLogger.finalize)

    @property
    @rank_zero_experiment
    def experiment(self) -> _Rows:
        """What writes the rows."""
        if self._experiment is None:
            self._experiment = _Rows(self.log_dir, self._keep)
        return self._experiment  # type: ignore[return-value]


class _Rows(ExperimentWriter):
    """Appends to an existing file, which Lightning's would delete; drops its rows from step ``keep`` on."""

    def __init__(self, folder: str, keep: int) -> None:
        super().__init__(folder)
        self._keep: int | None = keep

    def _check_log_dir_exists(self) -> None:
        """Keep what is there."""

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        """Add a row; before the first one, drop those that are logged again."""
        if self._keep is not None:
            self._drop_rows(Path(self.metrics_file_path), self._keep)
            self._keep = None
        super().log_metrics(metrics_dict, step)

    def _drop_rows(self, path: Path, keep: int) -> None:
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

"""TensorBoard's log of a run. A log that cannot be written does not stop the training."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor


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
    """TensorBoard's event files, without ``hparams.yaml``: ``config.yaml`` and ``result.json`` have the settings."""

    log_metrics = _warn_on_failure(TensorBoardLogger.log_metrics)
    log_hyperparams = _warn_on_failure(TensorBoardLogger.log_hyperparams)
    finalize = _warn_on_failure(TensorBoardLogger.finalize)

    @_warn_on_failure
    def save(self) -> None:
        """Flush the events."""
        self.experiment.flush()

    @_warn_on_failure
    def add_image(self, tag: str, image: Tensor, step: int) -> None:
        """Log an image (3, H, W)."""
        self.experiment.add_image(tag, image, step)

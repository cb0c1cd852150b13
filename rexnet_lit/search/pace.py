"""Ends a fit, soon after its start, that would take longer than there is time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

_FIRST, _LAST = 2, 12
"""The steps between which the time of a step is measured."""
_VALIDATION, _END = 1.15, 1.1
"""What the validation takes beside the steps, and the end of the run beside its epochs: factors, of usual runs."""


class TooLongError(Exception):
    """A fit would take too long.

    Args:
        begun: Seconds before its first epoch.
        epoch: Seconds of an epoch.
    """

    def __init__(self, begun: float, epoch: float) -> None:
        super().__init__(f"an epoch takes about {epoch:.0f} s")
        self.begun, self.epoch = begun, epoch


class Pace(Callback):
    """Measures the first steps and the first epoch.

    Args:
        limit: Returns the seconds that the whole fit may take.

    Raises:
        TooLongError: It would take longer.
    """

    def __init__(self, limit: Callable[[], float]) -> None:
        self.limit = limit
        self._start = self._epoch = self._step = time.monotonic()
        self._measured = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin an epoch."""
        if not self._measured:
            self._epoch = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Estimate the epoch by the first steps, of which the very first ones take longer."""
        if self._measured:
            return
        if batch_idx == _FIRST:
            self._step = time.monotonic()
        elif batch_idx == _LAST:
            step = (time.monotonic() - self._step) / (_LAST - _FIRST)
            self._check(trainer, step * float(trainer.num_training_batches), _VALIDATION * _END)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the first epoch."""
        if not self._measured:
            self._check(trainer, time.monotonic() - self._epoch, _END)
            self._measured = True

    def _check(self, trainer: Trainer, epoch: float, rest: float) -> None:
        begun, left = self._epoch - self._start, (trainer.max_epochs or 0) - trainer.current_epoch
        if begun + epoch * left > self.limit():  # even without the rest
            raise TooLongError(begun, rest * epoch)

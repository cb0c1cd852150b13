"""What a run does when a signal asks it to stop: finish the step, save, and exit with 128 + the signal's number."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from rexnet_lit.utils import process
from rexnet_lit.utils.errors import Stopped


class StopSignals:
    """Records a signal while a run trains, so that the running step (or validation) is finished and saved first.

    Args:
        how_to_resume: Returns the end of the message: what is saved, and how to resume it.
    """

    def __init__(self, how_to_resume: Callable[[], str]) -> None:
        self._how_to_resume = how_to_resume
        self._replaced: dict[signal.Signals, Any] = {}
        self.received: signal.Signals | None = None
        self.training_ended = False
        """Whether there is nothing left to save first: a signal stops the run at once."""

    def install(self, trainer: Trainer) -> None:
        """Handle the signals, instead of Lightning, which would not save."""
        if threading.current_thread() is not threading.main_thread():
            return

        def handle(number: int, frame: Any) -> None:
            repeated, self.received = self.received is not None, signal.Signals(number)
            if self.training_ended:
                raise Stopped(number, f"stopped after the last epoch; {self._how_to_resume()}")
            if repeated and trainer.validating:
                raise Stopped(number, f"stopped during validation; {self._how_to_resume()}")
            if trainer.is_global_zero and not repeated:
                current = "validation" if trainer.validating else "step"
                # Not print(), which must not be entered twice: the signal may have interrupted one.
                with contextlib.suppress(OSError):
                    os.write(1, f"{self.received.name}: saving and stopping after this {current}\n".encode())

        self.training_ended = False
        before = process.received_signal()
        self.received = signal.Signals(before) if before else None
        trainer._signal_connector.received_sigterm = False  # Lightning would end the run before this step is logged
        for number in process.stop_signals():
            signal.signal(number, handle)
            # Not the handler of a moment ago, which is Lightning's: Lightning removes its own before `uninstall`.
            self._replaced[number] = trainer._signal_connector._original_handlers[number] or signal.SIG_DFL

    def uninstall(self) -> None:
        """Restore the handlers that were there before."""
        for number, handler in self._replaced.items():
            signal.signal(number, handler)
        self._replaced = {}

    def stop(self, trainer: Trainer) -> Stopped | None:
        """Return what to raise when any process of the run has received a signal. All processes call this."""
        if not trainer.strategy.reduce_boolean_decision(self.received is not None, all=False):
            return None
        received = self.received or signal.SIGTERM
        done = f"batch {trainer.fit_loop.epoch_loop.batch_idx + 1} of {trainer.num_training_batches}"
        epoch = trainer.current_epoch + 1
        return Stopped(received, f"stopped by {received.name} after {done} of epoch {epoch}; {self._how_to_resume()}")


class StopOnSignal(Callback):
    """Stops an evaluation at the next batch, where Python has dropped the exception that a signal has raised."""

    def _check(self, *args: Any, **kwargs: Any) -> None:
        number = process.received_signal()
        if number:
            raise Stopped(number, f"stopped by {signal.Signals(number).name}")

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _check

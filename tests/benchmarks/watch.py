"""A callback that the benchmarks put into a fit: prints when the first step begins, and what the steps wait for.

``WATCH_STARTED`` is the time when the command was started; with ``WATCH_STOP=1`` the process ends at the first step.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback


class Watch(Callback):
    """Prints two lines that start with ``watch:``."""

    def __init__(self) -> None:
        self._waited, self._began, self._left = 0.0, 0.0, 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Print the time of the first step; count how long the batch was waited for."""
        now = time.monotonic()
        if self._began:
            self._waited += now - self._left if self._left else 0.0
            return
        self._began = now
        used = os.times()
        seconds = time.time() - float(os.environ["WATCH_STARTED"])
        print(f"watch: first step after {seconds:.2f} s, {used.user + used.system:.2f} CPU s", flush=True)
        if os.environ.get("WATCH_STOP"):
            print("watch: modules", *sys.modules, flush=True)
            os._exit(0)

    def on_train_batch_end(self, *args: Any) -> None:
        """Wait for the GPU, and for the next batch from here on."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._left = time.monotonic()

    def on_train_epoch_end(self, *args: Any) -> None:
        """Do not count the validation."""
        self._left = 0.0

    def on_train_end(self, *args: Any) -> None:
        """Print the share of the time that was waited, and the memory."""
        share = self._waited / max(time.monotonic() - self._began, 1e-9)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / 1e9
        print(f"watch: waited {100 * share:.1f} %, peak {peak:.2f} GB", flush=True)

"""The DataLoader: torch's, with clear failures, and workers that leave signals to the main process."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from multiprocessing import parent_process
from types import TracebackType
from typing import Any, cast

import torch
from torch.multiprocessing import get_start_method
from torch.utils.data import DataLoader

from rexnet_lit.data.dataset import FeatureDataset, ImageDataset
from rexnet_lit.data.sampler import BatchKey, BatchSampler
from rexnet_lit.data.unlabelled import JointDataset
from rexnet_lit.utils.errors import UserError

_POLL = 10
"""Seconds of waiting after which torch checks that the workers live. One that dies during start-up raises no signal."""

_PATIENCE = 300
"""Seconds to wait for a worker's batch before the run fails."""


_GUARD = (
    "workers that are not forked import the main script: put what it runs below if __name__ == '__main__', or set "
    "data.num_workers to 0"
)


class Loader(DataLoader[Any]):
    """A loader of `BatchKey` whose failures name the cause.

    By the two state methods Lightning sees that it can be resumed. It has no state: its sampler asks the trainer.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""

    def start(self) -> None:
        """Start persistent workers now.

        A forking process copies, page by page, what it writes to afterwards. Once a training step has filled its
        memory, a fork takes seconds.
        """
        if self.persistent_workers:
            self._iterate()

    def _iterate(self) -> Any:
        """Start the workers, or have the persistent ones start again."""
        try:
            return super().__iter__()
        except (EOFError, ConnectionError) as error:  # the forkserver has ended: it imports the main module
            raise UserError(f"the data loading workers do not start ({type(error).__name__}); {_GUARD}") from None

    def __iter__(self) -> Any:  # torch's iterators have no public type
        """Yield the batches.

        Raises:
            UserError: A worker died or hangs.
        """
        batches: Any = None
        due, done, waited = list(self.sampler), 0, 0.0
        while True:
            try:
                if batches is None:
                    batches = self._iterate()
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if not str(error).startswith("DataLoader "):
                    raise  # from a worker's own code, such as a transform
                waited += self.timeout
                timed_out = str(error).startswith("DataLoader timed out")
                if timed_out and waited < _PATIENCE:  # the workers live: wait on
                    if batches is None:
                        self._iterator = None  # half-built by `_iterate`: start new workers
                    continue
                if not timed_out and not done and get_start_method() != "fork":
                    raise UserError(f"a data loading worker has ended before its first batch; {_GUARD}") from None
                raise self._failure(due[min(done, len(due) - 1)], timed_out, str(error)) from None
            done, waited = done + 1, 0.0
            yield batch

    def _failure(self, batch: BatchKey, timed_out: bool, reason: str) -> UserError:
        what = f"gave nothing for {_PATIENCE:g} s" if timed_out else "died"
        hint = "the disk may be stuck" if timed_out else "memory, or /dev/shm, may be full"
        paths = cast(ImageDataset | JointDataset | FeatureDataset, self.dataset).samples.paths
        names = ", ".join(repr(paths[int(i)]) for i in batch.indices[:8])
        return UserError(
            f"a data loading worker {what} ({reason.splitlines()[0]}) before the batch of {names}, ...; {hint}: "
            "set a smaller data.num_workers (0 reads in the main process) or data.batch_size"
        )


def build_loader(
    dataset: ImageDataset | JointDataset | FeatureDataset,
    sampler: BatchSampler,
    num_workers: int,
    *,
    stays: bool,
    on_gpu: bool,
    seed: int,
) -> Loader:
    """Return a loader.

    Args:
        dataset: The images.
        sampler: Their order; its items are whole batches.
        num_workers: Processes that read.
        stays: Whether the workers outlive an epoch.
        on_gpu: Whether the batches go to a GPU.
        seed: The run's seed.
    """
    return Loader(  # without its own `__init__`: Lightning creates another one with the same arguments for predictions
        dataset,
        sampler=sampler,
        batch_size=None,
        num_workers=num_workers,
        persistent_workers=stays and num_workers > 0,
        pin_memory=on_gpu,
        timeout=_POLL if num_workers else 0,
        worker_init_fn=functools.partial(_start_worker, niceness=0 if on_gpu else 10),
        # Without its own generator, each iteration would draw from the global one.
        generator=torch.Generator().manual_seed(seed),
    )


def _start_worker(number: int, niceness: int = 0) -> None:
    """Ignore the signals that every process of a run is sent: the main one saves, and ends the workers.

    Args:
        number: The worker's number.
        niceness: Added to the worker's, so that the training step has priority on the CPU.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
        threading.Thread(target=_wait_for_sigterm, daemon=True).start()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.excepthook = _print_unless_disconnected
    if niceness and hasattr(os, "nice"):
        os.nice(niceness)


def _wait_for_sigterm() -> None:
    """End the process at a SIGTERM of the main process; others send it to all, as ``timeout`` and ``scancel`` do."""
    main = parent_process()
    while main is not None and signal.sigwaitinfo((signal.SIGTERM,)).si_pid != main.pid:
        pass
    os._exit(0)


def _print_unless_disconnected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print no traceback if the main process stopped reading batches: it reports the cause.

    In a worker this hook only sees errors of the thread that sends batches (`multiprocessing.resource_sharer`).
    """
    if not issubclass(kind, ConnectionError):
        sys.__excepthook__(kind, error, trace)

"""Who reads the batches: torch's loader, with failures that are named and workers that leave signals alone."""

from __future__ import annotations

import functools
import os
import signal
import sys
from types import TracebackType
from typing import Any, cast

import torch
from torch.utils.data import DataLoader

from rexnet_lit.data.dataset import FeatureDataset, ImageDataset
from rexnet_lit.data.sampler import BatchKey, BatchSampler
from rexnet_lit.utils.errors import UserError

_POLL = 10
"""Seconds after which to see whether a loader's workers are alive."""

_PATIENCE = 300
"""Seconds to wait for a batch of a worker before it is said to hang."""


class Loader(DataLoader[Any]):
    """A loader of `Batch` keys whose failures are named.

    Lightning sees by the two state methods that it can be resumed; it needs no state, since its sampler asks the
    trainer.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: there is nothing to remember."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing."""

    def start(self) -> None:
        """Start the workers now, if they are to stay.

        A process that forks copies, page by page, what it writes to afterwards. Once a training step has filled its
        memory, a fork costs seconds.
        """
        if self.persistent_workers:
            super().__iter__()

    def __iter__(self) -> Any:  # torch's iterators have no public type
        """Yield the batches.

        Raises:
            UserError: A worker has died or hangs.
        """
        batches: Any = None
        due, done, waited = list(self.sampler), 0, 0.0
        while True:
            try:
                if batches is None:
                    batches = super().__iter__()
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                # Torch looks whether its workers live when this much time is up; asked again, it waits on.
                waited += self.timeout
                if not str(error).startswith("DataLoader "):
                    raise  # a worker's own, such as a transform's
                timed_out = str(error).startswith("DataLoader timed out")
                if timed_out and waited < _PATIENCE:
                    if batches is None:
                        self._iterator = None  # what it has begun cannot be asked for again: start new workers
                    continue
                raise self._failure(due[min(done, len(due) - 1)], timed_out, str(error)) from None
            done, waited = done + 1, 0.0
            yield batch

    def _failure(self, batch: BatchKey, timed_out: bool, reason: str) -> UserError:
        what = f"gave nothing for {_PATIENCE:g} s" if timed_out else "died"
        hint = "the disk may be stuck" if timed_out else "memory, or /dev/shm, may be full"
        paths = cast(ImageDataset | FeatureDataset, self.dataset).samples.paths
        names = ", ".join(repr(paths[int(i)]) for i in batch.indices[:8])
        return UserError(
            f"a data loading worker {what} ({reason.splitlines()[0]}) before the batch of {names}, ...; {hint}: "
            "set a smaller data.num_workers (0 reads in the main process) or data.batch_size"
        )


def build_loader(
    dataset: ImageDataset | FeatureDataset,
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
        on_gpu: Whether the batches go to one.
        seed: The run's.
    """
    return Loader(  # no `__init__` of its own: Lightning makes another of the same arguments for predictions
        dataset,
        sampler=sampler,
        batch_size=None,
        num_workers=num_workers,
        persistent_workers=stays and num_workers > 0,
        pin_memory=on_gpu,
        timeout=_POLL if num_workers else 0,
        worker_init_fn=functools.partial(_start_worker, niceness=0 if on_gpu else 10),
        # A loader without its own generator draws from the global one each time it is iterated.
        generator=torch.Generator().manual_seed(seed),
    )


def _start_worker(number: int, niceness: int = 0) -> None:
    """Leave signals, which a terminal sends to every process, to the main one: it saves, and ends the workers.

    Args:
        number: The worker's.
        niceness: How far to stand back behind the training step, where both want the CPU.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.excepthook = _unless_alone
    if niceness and hasattr(os, "nice"):
        os.nice(niceness)


def _unless_alone(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print no traceback when the main process has turned away from a batch: it says why.

    In a worker this hook hears of nothing but the thread that hands batches over
    (`multiprocessing.resource_sharer`).
    """
    if not issubclass(kind, ConnectionError):
        sys.__excepthook__(kind, error, trace)

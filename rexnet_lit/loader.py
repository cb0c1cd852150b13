"""Batches: in which order, read by whom.

What a batch holds depends on seed, epoch and position alone: not on workers, not on when it was asked for. The sampler
hands out whole batches as `Batch` keys; the dataset turns a key into tensors.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, cast

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from rexnet_lit import decode
from rexnet_lit.errors import UserError
from rexnet_lit.folder import Samples
from rexnet_lit.transforms import EvalTransform, TrainTransform

__all__ = [
    "Batch",
    "BatchSampler",
    "FeatureDataset",
    "ImageDataset",
    "Loader",
    "SamplerName",
    "all_batches",
    "build_loader",
    "draw_weights",
    "training_order",
    "training_position",
]

SamplerName = Literal["shuffle", "balanced", "balanced_sqrt"]


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch by its images' indices: what the sampler hands to the dataset."""

    epoch: int
    indices: NDArray[np.int64]
    draws: NDArray[np.int64]
    """How often each has been drawn before in this epoch."""


def training_order(targets: NDArray[np.int64], sampler: SamplerName, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the indices of one epoch, (N,), in training order.

    ``balanced`` draws with replacement so that every class is met equally often, ``balanced_sqrt`` in proportion
    to the square root of its images (Mahajan et al. 2018).
    """
    rng = np.random.default_rng((seed, epoch))
    if sampler == "shuffle":
        return rng.permutation(len(targets))
    weights = draw_weights(np.bincount(targets), sampler)[targets]
    return rng.choice(len(targets), size=len(targets), p=weights / weights.sum())


def draw_weights(counts: NDArray[np.int64], sampler: SamplerName) -> NDArray[np.float64]:
    """Return how often an image of each class is drawn, (K,), of classes of so many images: relative to others."""
    power = {"shuffle": 0.0, "balanced": -1.0, "balanced_sqrt": -0.5}[sampler]
    weights: NDArray[np.float64] = np.maximum(counts, 1) ** power
    return weights


class BatchSampler(DistributedSampler[Batch]):
    """Hands each process its batches of an epoch.

    Training batches differ in size by one image at most: no image is dropped or repeated, and no last batch of
    one is formed, which ReXNet's BatchNorm could not train on. Evaluation batches are in order, without padding.

    It is a `DistributedSampler` so that Lightning leaves it in place.

    Args:
        size: N, the number of images.
        batch_size: Images of a batch in one process, at most (2 and 3 may be exceeded where one would stay alone).
        order: Maps an epoch to the indices (N,) in training order; None for evaluation.
        position: Says which epoch it is and how many of its batches are done, asked at each ``iter``; by default
            the epoch of the last `set_epoch`, from its start.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        order: Callable[[int], NDArray[np.int64]] | None = None,
        position: Callable[[], tuple[int, int]] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(range(size), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self._size, self._order, self._position = size, order, position
        self._batch_size = min(batch_size, max(1, size // world_size))  # so that each process evaluates something
        # At 2 or 3 a batch, some numbers of images leave one alone: the batches then grow instead.
        self._steps = max(1, min(math.ceil(size / (batch_size * world_size)), size // (2 * world_size)))

    def batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """Return the indices of this process's batches in ``epoch``."""
        return self._share(self._images(epoch))

    def _images(self, epoch: int) -> NDArray[np.int64]:
        return np.arange(self._size) if self._order is None else self._order(epoch)

    def _share(self, values: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Cut what there is of each of an epoch's images, (N,), into batches; return this process's."""
        if self._order is not None:
            chunks = np.array_split(values, self._steps * self.num_replicas)
        else:
            chunks = [values[start : start + self._batch_size] for start in range(0, self._size, self._batch_size)]
        return chunks[self.rank :: self.num_replicas]

    def __iter__(self) -> Iterator[Batch]:
        epoch, done = self._position() if self._position else (self.epoch, 0)
        images = self._images(epoch)
        shares = zip(self._share(images), self._share(_draws_before(images)), strict=True)
        return (Batch(epoch, *share) for share in itertools.islice(shares, done, None))

    def __len__(self) -> int:
        if self._order is not None:
            return self._steps
        return len(range(self.rank * self._batch_size, self._size, self._batch_size * self.num_replicas))


def _draws_before(images: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each of ``images``, (N,), how often it stands before its place."""
    order = np.argsort(images, kind="stable")
    found = np.empty_like(images)
    found[order] = np.arange(len(images)) - np.searchsorted(images[order], images[order])
    return found


def all_batches(limit: int | float) -> bool:
    """Say whether a trainer's ``limit_*_batches`` leaves none out: 1.0 does not, and 1 leaves all but one."""
    return isinstance(limit, float) and limit == 1


def training_position(trainer: pl.Trainer) -> tuple[int, int]:
    """Return the epoch that is due and how many of its batches are done, right also while a run is resumed.

    ``trainer.current_epoch`` is not: a resumed run asks for its batches before Lightning has set it.
    """
    epoch: Any = trainer.fit_loop.epoch_progress.current
    batch: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    midway = epoch.started > epoch.processed
    return epoch.processed, batch.processed if midway else 0


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

    def _failure(self, batch: Batch, timed_out: bool, reason: str) -> UserError:
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


_POLL = 10
"""Seconds after which to see whether a loader's workers are alive."""

_PATIENCE = 300
"""Seconds to wait for a batch of a worker before it is said to hang."""


class ImageDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images by batch: a `Batch` in, ((B, 3, S, S) float32, (B,) int64) out.

    The images' memory is channels_last.

    Args:
        samples: Paths and targets.
        transform: How an image becomes a tensor.
        seed: The run's.
        read: What reads files: `decode.read`, or a cache's.
        mix: MixUp or CutMix: maps images (B, 3, S, S) and targets (B,) to images and target probabilities (B, K).
    """

    def __init__(
        self,
        samples: Samples,
        transform: TrainTransform | EvalTransform,
        seed: int,
        read: Callable[[str, int], NDArray[np.uint8]] = decode.read,
        mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.samples, self.transform, self.seed = samples, transform, seed
        self._read, self.mix = read, mix
        self.images: Sequence[NDArray[np.uint8] | None] | None = None
        """Decoded images by index, None for what is to be read from its file (``data.cache``)."""
        self.min_size = transform.min_size
        """Pixels of the shorter side that decoding must keep, as `decode.read` takes it."""

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def images_bytes(self) -> int:
        """Bytes of decoded images in memory."""
        return sum(image.nbytes for image in self.images or () if image is not None)

    def read(self, index: int) -> NDArray[np.uint8]:
        """Return image ``index`` as uint8 (H, W, 3).

        A training image that has become unreadable is replaced by the next one of its class.

        Raises:
            UserError: An evaluation image, or all of a class, have become unreadable.
        """
        image = None if self.images is None else self.images[index]
        if image is not None:
            return image
        try:
            return self._read(self.samples.path(index), self.min_size)
        except decode.DecodeError as error:
            if isinstance(self.transform, EvalTransform):
                raise UserError(
                    f"{self.samples.path(index)}: can no longer be read ({error}); "
                    "restore the file, or remove it and start again"
                ) from None
            warnings.warn(
                f"{self.samples.path(index)!r} can no longer be read ({error}); "
                "the next readable image of its class stands in for it",
                stacklevel=2,
            )
        return self._stand_in(index)

    def _stand_in(self, index: int) -> NDArray[np.uint8]:
        same = np.flatnonzero(self.samples.targets == self.samples.targets[index])
        for other in np.roll(same, -int(np.searchsorted(same, index)))[1:]:
            try:
                return self._read(self.samples.path(int(other)), self.min_size)
            except decode.DecodeError:
                continue
        raise UserError(f"{self.samples.path(index)}: no image of its class can be read any longer; restore the files")

    def _load(self, index: int, epoch: int, draw: int) -> Tensor:
        image = self.read(index)
        if isinstance(self.transform, EvalTransform):
            return self.transform(image)
        return self.transform.at(epoch)(image, self._seed(index, epoch, draw))

    def _seed(self, index: int, epoch: int, draw: int = 0) -> int:
        return int(np.random.SeedSequence((self.seed, epoch, index, draw)).generate_state(1)[0])

    def augmented(self, index: int, epoch: int) -> NDArray[np.uint8]:
        """Return what the network is shown of a training image in an epoch, (S, S, 3), before normalisation."""
        transform = cast(TrainTransform, self.transform)
        return transform.at(epoch).augment(self.read(index), self._seed(index, epoch))

    def __getitem__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if not isinstance(batch, Batch):  # Lightning puts a sampler of its own in the place of ours
            raise UserError("the trainer's overfit_batches is not supported; use limit_train_batches")
        drawn = zip(batch.indices.tolist(), batch.draws.tolist(), strict=True)
        images = [self._load(index, batch.epoch, draw) for index, draw in drawn]
        stacked = torch.stack([image.permute(1, 2, 0) for image in images])  # (B, S, S, 3): one straight copy
        inputs, targets = stacked.permute(0, 3, 1, 2), torch.from_numpy(self.samples.targets[batch.indices])
        if self.mix is None:
            return inputs, targets
        seed = np.random.SeedSequence((self.seed, batch.epoch, *batch.indices.tolist())).generate_state(1)[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seed))
            return self.mix(inputs, targets)


class FeatureDataset(Dataset[tuple[Tensor, Tensor]]):
    """Features in the place of images: a `Batch` in, ((B, C) float32, (B,) int64) out.

    Args:
        samples: Paths and targets.
        features: (V, N, C): the images' features in V views, which the epochs take in turn.
    """

    def __init__(self, samples: Samples, features: Tensor) -> None:
        self.samples, self.features = samples, features

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        features = self.features[batch.epoch % len(self.features)]
        return features[torch.from_numpy(batch.indices)], torch.from_numpy(self.samples.targets[batch.indices])

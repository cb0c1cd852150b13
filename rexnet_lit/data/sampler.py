"""Which images an epoch's batches contain, and in which order.

That depends on seed, epoch and position alone, not on workers or on when it is computed. The sampler yields whole
batches as `BatchKey`; a dataset turns a key into tensors.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

from rexnet_lit.data.folder import Samples
from rexnet_lit.utils.errors import UserError, plural

SAMPLERS = {"shuffle": 0.0, "balanced": -1.0, "balanced_sqrt": -0.5}
"""Ways to draw training images: an image's weight is its class's number of images to this power."""

if not TYPE_CHECKING:
    SamplerName = Literal[tuple(SAMPLERS)]
else:
    SamplerName = str


@dataclasses.dataclass(frozen=True)
class BatchKey:
    """A batch as the indices of its images: the sampler yields it, the dataset loads it."""

    epoch: int
    indices: NDArray[np.int64]
    draws: NDArray[np.int64]
    """How often each was drawn before in this epoch."""


def run_seed() -> int:
    """Return the run's seed: what ``seed_everything`` was called with, 0 without it."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def training_order(
    targets: NDArray[np.int64], sampler: SamplerName, seed: int, epoch: int, unlabelled: int = 0
) -> NDArray[np.int64]:
    """Return the indices of one epoch in training order, (N,), or (N + U,) with images without a label.

    ``balanced`` draws with replacement so that every class is drawn equally often, ``balanced_sqrt`` in proportion
    to the square root of its images (Mahajan et al. 2018).

    Args:
        targets: (N,) class numbers of the images with a label.
        sampler: How these are drawn.
        seed: The run's seed.
        epoch: From 0.
        unlabelled: U. Their indices follow the others; in the order they are spread evenly.
    """
    rng, size = np.random.default_rng((seed, epoch)), len(targets)
    if sampler == "shuffle":
        order = rng.permutation(size)
    else:
        weights = class_sampling_weights(np.bincount(targets), sampler)[targets]
        order = rng.choice(size, size=size, p=weights / weights.sum())
    if not unlabelled:
        return order
    places = np.concatenate([(np.arange(count) + 0.5) / count for count in (size, unlabelled)])
    both = np.concatenate([order, size + rng.permutation(unlabelled)])
    return both[np.argsort(places, kind="stable")]


def class_sampling_weights(counts: NDArray[np.int64], sampler: SamplerName) -> NDArray[np.float64]:
    """Return how often an image of each class is drawn, (K,), relative to the others."""
    weights: NDArray[np.float64] = np.maximum(counts, 1) ** SAMPLERS[sampler]
    return weights


class BatchSampler(DistributedSampler[BatchKey]):
    """Yields each process its batches of an epoch.

    Training batches differ in size by one image at most: no image is dropped or repeated, and there is never a batch
    of one, on which ReXNet's BatchNorm cannot train. Evaluation batches are in order, without padding.

    As a `DistributedSampler` it is not replaced by Lightning.

    Args:
        size: N, the number of images.
        batch_size: Images per batch in one process, at most (2 and 3 may be exceeded to avoid a batch of one).
        order: Maps an epoch to the indices (N,) in training order; None for evaluation.
        position: Returns the epoch and how many of its batches are done, at each ``iter``; by default the epoch of the
            last `set_epoch`, and 0.
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
        self._batch_size = min(batch_size, max(1, size // world_size))  # each process evaluates at least one
        # With batches of 2 or 3, some numbers of images leave one over: then the batches are larger.
        self._steps = max(1, min(math.ceil(size / (batch_size * world_size)), size // (2 * world_size)))

    def _images(self, epoch: int) -> NDArray[np.int64]:
        return np.arange(self._size) if self._order is None else self._order(epoch)

    def _share(self, values: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Divide values of an epoch's images, (N,), into batches; return this process's."""
        if self._order is not None:
            chunks = np.array_split(values, self._steps * self.num_replicas)
        else:
            chunks = [values[start : start + self._batch_size] for start in range(0, self._size, self._batch_size)]
        return chunks[self.rank :: self.num_replicas]

    def __iter__(self) -> Iterator[BatchKey]:
        epoch, done = self._position() if self._position else (self.epoch, 0)
        images = self._images(epoch)
        shares = zip(self._share(images), self._share(_draws_before(images)), strict=True)
        return (BatchKey(epoch, *share) for share in itertools.islice(shares, done, None))

    def __len__(self) -> int:
        if self._order is not None:
            return self._steps
        return len(range(self.rank * self._batch_size, self._size, self._batch_size * self.num_replicas))


def build_sampler(
    samples: Samples,
    name: str,
    batch_size: int,
    trainer: Any,
    order: Callable[[int], NDArray[np.int64]] | None = None,
    unlabelled: int = 0,
) -> BatchSampler:
    """Return the sampler of a split for this process of a trainer.

    Args:
        samples: The split's images.
        name: Its name.
        batch_size: As `BatchSampler` takes it.
        trainer: Knows the processes, and the position in training; None for one process.
        order: As `BatchSampler` takes it.
        unlabelled: Number of images without a label that ``order`` contains as well.

    Raises:
        UserError: There are too few images for the processes.
    """
    rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
    least = 1 if order is None else 2  # BatchNorm cannot train on one
    if len(samples) < least * world:
        counts = f"{plural(len(samples), 'image', 'images')} for {plural(world, 'process', 'processes')}"
        hint = "add images, or set fewer trainer.devices"
        raise UserError(f"{samples.root}: {name} has {counts}; each needs at least {least}: {hint}")
    position = partial(training_position, trainer) if trainer is not None and order is not None else None
    return BatchSampler(len(samples) + unlabelled, batch_size, order, position, rank, world)


def _draws_before(images: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each of ``images``, (N,), how often it occurs before its position."""
    order = np.argsort(images, kind="stable")
    found = np.empty_like(images)
    found[order] = np.arange(len(images)) - np.searchsorted(images[order], images[order])
    return found


def uses_all_batches(limit: int | float) -> bool:
    """Return whether a trainer's ``limit_*_batches`` means all: 1.0 does, 1 means a single batch."""
    return isinstance(limit, float) and limit == 1


def training_position(trainer: Any) -> tuple[int, int]:
    """Return a trainer's epoch and how many of its batches are done.

    ``trainer.current_epoch`` is wrong here: a resumed run iterates its loader before Lightning has set it.
    """
    epoch = trainer.fit_loop.epoch_progress.current
    batch = trainer.fit_loop.epoch_loop.batch_progress.current
    midway = epoch.started > epoch.processed
    return epoch.processed, batch.processed if midway else 0

"""Datasets and loaders: a folder of class folders becomes batches, in an order that is a pure function.

What a batch holds depends on (seed, epoch, index) alone: not on workers, not on when it was asked for. The sampler
hands out whole batches as `Batch` keys; the dataset turns a key into tensors.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from rexnet_lit import decode, process, quarantine
from rexnet_lit.errors import UserError
from rexnet_lit.folder import ImageFolder, Samples, Split, fingerprint, list_images, scan
from rexnet_lit.spec import DataRecord, EvalRecipe
from rexnet_lit.transforms import AugmentSettings, EvalTransform, TrainTransform

__all__ = ["Batch", "BatchSampler", "ImageDataset", "ImageFolderDataModule", "run_seed"]

SamplerName = Literal["shuffle", "balanced", "balanced_sqrt"]


def run_seed() -> int:
    """Return the run's seed: what ``seed_everything`` was called with, 0 without it."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch by its images' indices: what the sampler hands to the dataset."""

    epoch: int
    indices: NDArray[np.int64]


def training_order(targets: NDArray[np.int64], sampler: SamplerName, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the indices of one epoch, (N,), in training order.

    ``balanced`` draws with replacement so that every class is met equally often, ``balanced_sqrt`` in proportion
    to the square root of its images (Mahajan et al. 2018).
    """
    rng = np.random.default_rng((seed, epoch))
    if sampler == "shuffle":
        return rng.permutation(len(targets))
    counts = np.bincount(targets)
    weights = counts[targets] ** (-1.0 if sampler == "balanced" else -0.5)
    return rng.choice(len(targets), size=len(targets), p=weights / weights.sum())


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
        self._size, self._batch_size, self._order, self._position = size, batch_size, order, position
        # At 2 or 3 a batch, some numbers of images leave one alone: the batches then grow instead.
        self._steps = max(1, min(math.ceil(size / (batch_size * world_size)), size // (2 * world_size)))

    def batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """Return the indices of this process's batches in ``epoch``."""
        if self._order is not None:
            chunks = np.array_split(self._order(epoch), self._steps * self.num_replicas)
        else:
            chunks = [
                np.arange(start, min(start + self._batch_size, self._size))
                for start in range(0, self._size, self._batch_size)
            ]
        return chunks[self.rank :: self.num_replicas]

    def __iter__(self) -> Iterator[Batch]:
        epoch, done = self._position() if self._position else (self.epoch, 0)
        return (Batch(epoch, indices) for indices in self.batches(epoch)[done:])

    def __len__(self) -> int:
        if self._order is not None:
            return self._steps
        return len(range(self.rank * self._batch_size, self._size, self._batch_size * self.num_replicas))


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
                timed_out = "timed out" in str(error)
                if timed_out and waited < _PATIENCE:
                    if batches is None:
                        self._iterator = None  # what it has begun cannot be asked for again: start new workers
                    continue
                if "DataLoader" not in str(error):
                    raise
                raise self._failure(due[min(done, len(due) - 1)], timed_out, str(error)) from None
            done, waited = done + 1, 0.0
            yield batch

    def _failure(self, batch: Batch, timed_out: bool, reason: str) -> UserError:
        what = f"gave nothing for {_PATIENCE:g} s" if timed_out else "died"
        hint = "the disk may be stuck" if timed_out else "memory, or /dev/shm, may be full"
        paths = cast(ImageDataset, self.dataset).samples.paths
        names = ", ".join(repr(paths[int(i)]) for i in batch.indices[:8])
        return UserError(
            f"a data loading worker {what} ({reason.splitlines()[0]}) before the batch of {names}, ...; {hint}: "
            "set a smaller data.num_workers (0 reads in the main process) or data.batch_size"
        )


def _start_worker(number: int, niceness: int = 0) -> None:
    """Leave signals, which a terminal sends to every process, to the main one: it saves, and ends the workers.

    Args:
        number: The worker's.
        niceness: How far to stand back behind the training step, where both want the CPU.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if niceness and hasattr(os, "nice"):
        os.nice(niceness)


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
        images: Decoded images by index, instead of reading files (``data.cache``).
    """

    def __init__(
        self,
        samples: Samples,
        transform: TrainTransform | EvalTransform,
        seed: int,
        images: list[NDArray[np.uint8]] | None = None,
    ) -> None:
        self.samples, self.transform, self.seed, self.images = samples, transform, seed, images

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> NDArray[np.uint8]:
        """Return image ``index`` as uint8 (H, W, 3).

        A training image that has become unreadable is replaced by the next one of its class.

        Raises:
            UserError: An evaluation image, or all of a class, have become unreadable.
        """
        if self.images is not None:
            return self.images[index]
        try:
            return decode.read(self.samples.path(index), self.transform.min_size)
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
                return decode.read(self.samples.path(int(other)), self.transform.min_size)
            except decode.DecodeError:
                continue
        raise UserError(f"{self.samples.path(index)}: no image of its class can be read any longer; restore the files")

    def _load(self, index: int, epoch: int) -> Tensor:
        image = self.read(index)
        if isinstance(self.transform, EvalTransform):
            return self.transform(image)
        seed = np.random.SeedSequence((self.seed, epoch, index)).generate_state(1)[0]
        return self.transform(image, int(seed))

    def __getitem__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images = [self._load(int(i), batch.epoch) for i in batch.indices]
        stacked = torch.stack([image.permute(1, 2, 0) for image in images])  # (B, S, S, 3): one straight copy
        return stacked.permute(0, 3, 1, 2), torch.from_numpy(self.samples.targets[batch.indices])


class ImageFolderDataModule(pl.LightningDataModule):
    """A folder of class folders, ready for training.

    The folder is scanned when this is made, so ``num_classes`` and ``class_names`` are known at once.

    Args:
        root: Holds ``train/ val/ [test/]`` with a folder per class, or the class folders directly.
        image_size: Height and width in pixels of the network's input; the backbone's own by default.
        batch_size: Images of a step in each process, at most.
        num_workers: Loader processes; chosen for the machine by default.
        val_fraction: Share of each class set aside for validation where there is no ``val`` folder.
        test_fraction: Share of each class set aside for testing where there is no ``test`` folder.
        split_file: CSV with the columns path, label, split: who is in which split (a run's ``split.csv``).
        class_order: ``sorted`` folder names, ``natural`` (2 before 10, as timm sorts), or a file of names.
        follow_outside_links: Whether symbolic links may lead out of ``root``.
        augment: The training recipe.
        sampler: ``shuffle``; ``balanced`` meets every class equally often, ``balanced_sqrt`` goes halfway.
        cache: ``ram`` keeps the decoded images in memory.
        max_bad_fraction: A run refuses when a larger share of the images cannot be read.
        predict_path: An image, or a folder of unlabelled images.
        predict_output: CSV that `predict` writes.

    Raises:
        UserError: The folder or a setting is wrong; all of the folder's faults are named at once.
    """

    def __init__(
        self,
        root: str | None = None,
        image_size: int | None = None,
        batch_size: int = 32,
        num_workers: int | None = None,
        val_fraction: float = 0.2,
        test_fraction: float = 0.0,
        split_file: str | None = None,
        class_order: str = "sorted",
        follow_outside_links: bool = False,
        augment: AugmentSettings = AugmentSettings(),  # noqa: B008 (frozen)
        sampler: SamplerName = "shuffle",
        cache: Literal["none", "ram"] = "none",
        max_bad_fraction: float = quarantine.MAX_BAD_FRACTION,
        predict_path: str | None = None,
        predict_output: str | None = None,
        *,
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 2:
            raise UserError(f"data.batch_size is {batch_size}; ReXNet's BatchNorm needs at least 2")
        self.record = DataRecord(
            _absolute(root),
            _absolute(split_file),
            val_fraction,
            test_fraction,
            class_order,
            follow_outside_links,
        )
        self.image_size, self.batch_size, self.num_workers = image_size, batch_size, num_workers
        self.augment, self.sampler, self.cache = augment, sampler, cache
        self.max_bad_fraction, self.predict_output = max_bad_fraction, predict_output
        self.predict_samples = _unlabelled(predict_path) if predict_path is not None else None
        self.eval_recipe: EvalRecipe | None = None
        """The preprocessing; a trainer's model decides it in `setup`."""
        self.train_size: int | None = image_size
        self.bad_files: list[quarantine.BadFile] = []
        self._datasets: dict[str, ImageDataset] = {}
        self._fingerprints: dict[str, str] | None = None
        self.folder: ImageFolder | None = None
        self.class_names = class_names or ()
        if root is not None:
            self.folder = scan(
                root,
                val_fraction=val_fraction,
                test_fraction=test_fraction,
                split_file=split_file,
                class_order=class_order,
                class_names=class_names,
                follow_outside_links=follow_outside_links,
            )
            self.class_names = self.folder.class_names

    @property
    def num_classes(self) -> int:
        """K, found in the folder."""
        return len(self.class_names)

    def splits(self) -> dict[Split, Samples]:
        """Return the samples of each split, without the unreadable ones once `setup` has found them."""
        if self.folder is None:
            raise UserError("data.root is not set; say which folder of images: --data.root DIR")
        return {name: self._datasets[name].samples if name in self._datasets else samples
                for name, samples in self.folder.splits.items()}  # fmt: skip

    def fingerprints(self) -> dict[str, str]:
        """Return what tells one set of images from another, by split: of training and validation."""
        if self._fingerprints is None:
            splits = self.splits()
            names: tuple[Split, ...] = ("train", "val")
            self._fingerprints = {
                f"{name} images": f"{len(splits[name])}, fingerprint {fingerprint(splits[name])[:12]}"
                for name in names
                if name in splits
            }
        return self._fingerprints

    def prepare_data(self) -> None:
        """Look for unreadable files in one process; the others find the answer in the cache."""
        if self.folder is not None:
            for samples in self.folder.splits.values():
                quarantine.find_bad(samples)

    def setup(self, stage: str) -> None:
        """Make the datasets of ``stage`` (``fit``, ``validate``, ``test`` or ``predict``).

        Raises:
            UserError: Too many images cannot be read, or a split that is needed is missing.
        """
        recipe, train_size = self._recipe()
        evaluate = EvalTransform(recipe)
        if stage == "predict":
            if self.predict_samples is None:
                raise UserError("data.predict_path is not set; name an image or a folder: --data.predict_path PATH")
            good = self._without_bad(self.predict_samples, limit=False)
            self._datasets["predict"] = ImageDataset(good, evaluate, 0)
            return
        needed: dict[str, tuple[Split, ...]] = {
            "fit": ("train", "val"),
            "validate": ("val",),
            "test": ("test",),
        }
        splits = self.folder.splits if self.folder else self.splits()
        for name in needed[stage]:
            if name not in splits or len(splits[name]) == 0:
                raise UserError(_missing_split(name, self.record.root))
            if name in self._datasets and name != "train":
                continue
            samples = self._without_bad(splits[name])
            transform = TrainTransform(self.augment, recipe, train_size) if name == "train" else evaluate
            images = _decode_all(samples, transform.min_size) if self.cache == "ram" else None
            self._datasets[name] = ImageDataset(samples, transform, run_seed(), images)

    def _recipe(self) -> tuple[EvalRecipe, int]:
        """Return the eval recipe and the training size: the model's where there is one."""
        model = getattr(self.trainer, "lightning_module", None)
        recipe = model.spec.eval_recipe if model is not None else self.eval_recipe
        recipe = recipe or EvalRecipe(image_size=self.image_size or 224)
        train_size = model.train_size if model is not None else recipe.image_size
        self.eval_recipe = recipe
        return recipe, train_size

    def _without_bad(self, samples: Samples, *, limit: bool = True) -> Samples:
        """Return ``samples`` less the unreadable files, which are remembered for ``quarantine.csv``."""
        bad = quarantine.find_bad(samples)
        found = [quarantine.BadFile(samples.paths[i], reason) for i, reason in bad]
        self.bad_files += [row for row in found if row not in self.bad_files]
        if limit and len(bad) > self.max_bad_fraction * len(samples):
            raise UserError(
                f"{samples.root}: {len(bad)} of {len(samples)} images cannot be read (such as {found[0].path!r}: "
                f"{found[0].reason}), more than data.max_bad_fraction {self.max_bad_fraction}; "
                "`python -m rexnet_lit check` lists them"
            )
        if len(bad) == len(samples):
            raise UserError(f"{samples.root}: no image can be read (such as {found[0].path!r}: {found[0].reason})")
        keep = np.setdiff1d(np.arange(len(samples)), [i for i, _ in bad])
        return samples.take(keep)

    def _loader(self, name: str, order: Callable[[int], NDArray[np.int64]] | None = None) -> Loader:
        dataset, trainer = self._datasets[name], self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        if order is not None and len(dataset) < 2 * world:
            raise UserError(
                f"{dataset.samples.root}: {len(dataset)} training image(s) for {world} process(es); "
                "each needs at least 2 (BatchNorm cannot train on one): add images"
            )
        position = (lambda: training_position(trainer)) if trainer is not None and order is not None else None
        on_gpu = trainer is not None and trainer.strategy.root_device.type == "cuda"
        workers = process.auto_num_workers(on_gpu) if self.num_workers is None else self.num_workers
        return Loader(
            dataset,
            sampler=BatchSampler(len(dataset), self.batch_size, order, position, rank, world),
            batch_size=None,  # the sampler's items are whole batches already
            num_workers=workers,
            persistent_workers=workers > 0 and name in ("train", "val"),
            pin_memory=on_gpu,
            timeout=_POLL if workers else 0,
            worker_init_fn=functools.partial(_start_worker, niceness=0 if on_gpu else 10),
            # A loader without its own generator draws from the global one each time it is iterated.
            generator=torch.Generator().manual_seed(run_seed()),
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of the training split, augmented, in an order of their own each epoch."""
        targets = self._datasets["train"].samples.targets
        return self._loader("train", lambda epoch: training_order(targets, self.sampler, run_seed(), epoch))

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches of the validation split, in order."""
        loader = self._loader("val")
        loader.start()
        return loader

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test split, in order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of the unlabelled images, in order; the targets are -1."""
        return self._loader("predict")


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).absolute())


def _unlabelled(path: str) -> Samples:
    root, paths = list_images(path)
    return Samples(root, paths, np.full(len(paths), -1, np.int64))


def _missing_split(name: str, root: str | None) -> str:
    remedy = f"add a {name} folder with a folder per class, or set data.{name}_fraction above 0"
    return f"{root}: there is no {name} split; {remedy if name != 'train' else 'add a train folder'}"


def _decode_all(samples: Samples, min_size: int) -> list[NDArray[np.uint8]]:
    """Decode every image once, for all epochs; OpenCV releases the interpreter, so threads are enough."""
    with ThreadPoolExecutor(process.cpu_count()) as pool:
        return list(pool.map(lambda i: decode.read(samples.path(i), min_size), range(len(samples))))

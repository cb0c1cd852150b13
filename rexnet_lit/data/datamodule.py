"""The LightningDataModule: from a folder of class folders to loaders."""

from __future__ import annotations

import dataclasses
import os
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, cast, get_args

import lightning.pytorch as pl
import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from rexnet_lit.data import decode, verify
from rexnet_lit.data.cache import DiskCache, decode_all
from rexnet_lit.data.dataset import FeatureDataset, ImageDataset
from rexnet_lit.data.duplicates import equal_groups, groups_across
from rexnet_lit.data.folder import ImageFolder, Samples, fingerprint, list_images, scan
from rexnet_lit.data.loader import Loader, build_loader
from rexnet_lit.data.sampler import BatchSampler, SamplerName, training_order, uses_all_batches
from rexnet_lit.data.settings import MAX_BAD_FRACTION, MAX_IMAGE_SIZE, DataRecord, EvalRecipe
from rexnet_lit.data.splits import Split, first_few
from rexnet_lit.data.transforms import AugmentSettings, EvalTransform, ProgressiveTransform, TrainTransform, build_mix
from rexnet_lit.utils import process
from rexnet_lit.utils.errors import UserError, plural
from rexnet_lit.utils.files import absolute_path
from rexnet_lit.utils.settings import settings_of


def run_seed() -> int:
    """Return the run's seed: what ``seed_everything`` was called with, 0 without it."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


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
        num_folds: Of cross-validation: validate on one of so many folds instead of ``val_fraction``; 0 for none.
        fold: Which one, from 0.
        group_pattern: A regular expression on the paths: images with the same match (of its first group) never end
            up in two splits, such as ``(patient[0-9]+)_``.
        split_file: CSV with the columns path, label, split, group: who is in which split (a run's ``split.csv``).
        class_order: ``sorted`` folder names, ``natural`` (2 before 10, as timm sorts), or a file of names.
        follow_outside_links: Whether symbolic links may lead out of ``root``.
        size_schedule: Progressive resizing: pairs of an epoch, counted from 0, and the training images' height and
            width in pixels from then on, such as ``[[0, 128], [10, 224]]``. Validation keeps ``image_size``.
        augment: The training recipe.
        sampler: ``shuffle``; ``balanced`` meets every class equally often, ``balanced_sqrt`` goes halfway.
        cache: ``auto`` decodes a fit's images once if they take no more than a quarter of the free memory, ``ram`` as
            many as fit. ``disk`` keeps the decoded images in the user's cache folder: from the second epoch
            on, or the second run, nothing is decoded.
        cache_gb: Gigabytes (10^9 bytes) that the cache may fill; half of what is free by default.
        max_bad_fraction: A run refuses when a larger share of the images cannot be read: of a split that is given; of
            all images where the splits are drawn.
        predict_path: An image, or a folder of unlabelled images.
        predict_output: CSV that `predict` writes; a new ``predictions.csv`` in ``trainer.default_root_dir`` by default.

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
        num_folds: int = 0,
        fold: int = 0,
        group_pattern: str | None = None,
        split_file: str | None = None,
        class_order: str = "sorted",
        follow_outside_links: bool = False,
        size_schedule: list[tuple[int, int]] | None = None,
        augment: AugmentSettings = AugmentSettings(),  # noqa: B008 (frozen)
        sampler: SamplerName = "shuffle",
        cache: Literal["auto", "none", "ram", "disk"] = "auto",
        cache_gb: float | None = None,
        max_bad_fraction: float = MAX_BAD_FRACTION,
        predict_path: str | None = None,
        predict_output: str | None = None,
        *,
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__()
        trains = root is not None and class_names is None
        problems = _problems(batch_size, trains, size_schedule, num_workers, cache, sampler, cache_gb, max_bad_fraction)
        if problems:
            raise UserError("; ".join(problems))
        self.record = DataRecord(
            root=absolute_path(root),
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            num_folds=num_folds,
            fold=fold,
            group_pattern=group_pattern,
            split_file=absolute_path(split_file),
            class_order=os.fspath(class_order),
            follow_outside_links=follow_outside_links,
            max_bad_fraction=max_bad_fraction,
        )
        self.image_size, self.batch_size, self.num_workers = image_size, batch_size, num_workers
        self.size_schedule = size_schedule
        self.augment, self.sampler, self.cache = settings_of(AugmentSettings, augment), sampler, cache
        self._cache_bytes = None if cache_gb is None else cache_gb * 1e9
        self._disk: DiskCache | None = None
        self.predict_output = predict_output
        self.predict_samples: Samples | None = None
        self.predict_notes: tuple[str, ...] = ()
        if predict_path is not None:
            self.predict_samples, self.predict_notes = _unlabelled(predict_path)
        self.eval_recipe: EvalRecipe | None = None
        """The preprocessing; a trainer's model decides it in `setup`."""
        self.train_size: int | None = image_size
        self.bad_files: list[verify.UnreadableFile] = []
        self._datasets: dict[str, ImageDataset] = {}
        self._features: dict[str, FeatureDataset] = {}
        self._fingerprints: dict[str, str] | None = None
        self.folder: ImageFolder | None = None
        self.class_names = class_names or ()
        if root is not None:
            self.folder = scan(root, self.record, class_names)
            self.class_names = self.folder.class_names

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: Lightning's would unpickle, and no checkpoint holds the data.

        Raises:
            UserError: Always.
        """
        raise UserError("a checkpoint holds no data: make it anew, ImageFolderDataModule(root=DIR)")

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

    def settings(self) -> dict[str, Any]:
        """Return, by key, what decides the weights of a run beside its model and the images."""
        return {
            "batch_size": self.batch_size,
            "sampler": self.sampler,
            "image_size": self.image_size,
            "size_schedule": self.size_schedule,
            **{f"augment.{key}": value for key, value in dataclasses.asdict(self.augment).items()},
        }

    def fingerprints(self) -> dict[str, str]:
        """Return what tells one set of images from another, by split: of training and validation."""
        if self._fingerprints is None:
            splits = self.folder.splits if self.folder else self.splits()
            names: tuple[Split, ...] = ("train", "val")
            self._fingerprints = {
                f"{name} images": f"{len(splits[name])}, fingerprint {fingerprint(splits[name])[:12]}"
                for name in names
                if name in splits
            }
        return self._fingerprints

    def prepare_data(self) -> None:
        """Find unreadable and duplicate files in one process; the others read the results from the cache."""
        splits = self.folder.splits if self.folder else {}
        if not splits:
            return
        contents = [
            verify.verify_images(samples, progress=_said_now_and_then(f"looking at the {name} images")).contents
            for name, samples in splits.items()
        ]
        groups = equal_groups(np.concatenate(contents))
        split_of = np.repeat(np.arange(len(splits)), [len(samples) for samples in splits.values()])
        class_of = np.concatenate([samples.targets for samples in splits.values()])
        for labels, where in (
            (split_of, "splits: the scores are too good"),
            (class_of, "classes: one label is wrong"),
        ):
            count = sum(len(group) for group in groups_across(groups, labels))
            if count:
                lists = "`python -m rexnet_lit check` lists them"
                many = plural(count, "image stands", "images stand")
                print(f"warning: {many} with the same content in several {where}; {lists}")  # noqa: T201

    def lost_files(self) -> list[verify.UnreadableFile]:
        """Return the training images that have become unreadable since `setup`."""
        samples = self._datasets["train"].samples
        return [verify.UnreadableFile(samples.paths[i], reason) for i, reason in verify.find_unreadable(samples)]

    def setup(self, stage: str) -> None:
        """Make the datasets of ``stage`` (``fit``, ``validate``, ``test`` or ``predict``).

        Raises:
            UserError: Too many images cannot be read, or a split that is needed is missing.
        """
        self._features = {}  # they are another network's
        evaluate = EvalTransform(self._recipe()[0])
        if stage == "predict":
            if self.predict_samples is None:
                return  # a trainer that is given a loader asks all the same
            good = self._without_bad(self.predict_samples, verify.find_unreadable(self.predict_samples))
            self._datasets["predict"] = ImageDataset(good, evaluate, 0)
            return
        needed: dict[str, tuple[Split, ...]] = {
            "fit": ("train", "val"),
            "validate": ("val",),
            "test": ("test",),
        }
        if stage not in needed:
            raise UserError(f"setup: the stage is {stage!r}; expected one of {', '.join([*needed, 'predict'])}")
        splits = self.folder.splits if self.folder else self.splits()
        bad = self._find_bad(needed[stage])
        for name in needed[stage]:
            if name not in splits or len(splits[name]) == 0:
                raise UserError(_missing_split(name, self.record))
            if name != "train" and name in self._datasets and self._datasets[name].transform == evaluate:
                continue
            samples = self._without_bad(splits[name], bad[name])
            if name == "train":
                self._check_classes(samples)
            transform = self.train_transform() if name == "train" else evaluate
            mix = build_mix(self.augment, self.num_classes) if name == "train" else None
            self._datasets.pop(name, None)  # what it holds in memory is not needed twice
            self._datasets[name] = self._dataset(samples, transform, mix)

    def train_transform(self) -> TrainTransform:
        """Return what augments training images."""
        recipe, size = self._recipe()
        if self.size_schedule:
            return ProgressiveTransform(self.augment, recipe, self.size_schedule)
        return TrainTransform(self.augment, recipe, size)

    def preview(self, count: int = 16) -> NDArray[np.uint8]:
        """Return training images, (N, S, S, 3), as the first epoch's augmentation makes them."""
        dataset = self._datasets["train"]
        order = training_order(dataset.samples.targets, self.sampler, run_seed(), 0)[:count]
        return np.stack([dataset.augmented(int(index), 0) for index in order])

    def _dataset(self, samples: Samples, transform: TrainTransform | EvalTransform, mix: Any = None) -> ImageDataset:
        """Return a dataset that reads through the disk cache where that is asked for."""
        read: Callable[[str, int], NDArray[np.uint8]] = decode.read
        if self.cache == "disk":
            if self._disk is None:
                self._disk = DiskCache(limit=self._cache_bytes)
            read = self._disk.read
        return ImageDataset(samples, transform, run_seed(), read, mix)

    def _keep_in_memory(self, name: str) -> None:
        """Decode a split's images for all epochs where that is asked for, or pays and fits."""
        dataset = self._datasets[name]
        if self.cache not in ("auto", "ram") or name not in ("train", "val") or dataset.images is not None:
            return
        count, size = len(dataset), dataset.min_size
        held = sum(data.images_bytes for data in self._datasets.values())
        free = process.available_memory() / (4 if self.cache == "auto" else 2)
        limit = free if self._cache_bytes is None else self._cache_bytes - held
        limit /= self.trainer.world_size if self.trainer is not None else 1
        if self.cache == "auto" and not self._pays_and_fits(dataset, limit):
            return
        dataset.images = decode_all([dataset.samples.path(i) for i in range(count)], size, limit)
        missing = sum(image is None for image in dataset.images)
        if missing and self.cache == "ram":
            warnings.warn(f"data.cache: {missing} of {count} images do not fit into the memory", stacklevel=2)

    def _pays_and_fits(self, dataset: ImageDataset, limit: float) -> bool:
        """Say whether a fit asks for all images more than once, and a sample of them is small enough."""
        trainer = self.trainer
        if trainer is None or trainer.state.fn != "fit" or trainer.max_epochs == 1:
            return False
        if not uses_all_batches(trainer.limit_train_batches):
            return False
        count = len(dataset)
        paths = [dataset.samples.path(i) for i in range(0, count, max(1, count // 64))]
        images = decode_all(paths, dataset.min_size, limit)
        return all(image is not None for image in images) and bool(
            np.mean([image.nbytes for image in images if image is not None]) * count <= limit
        )

    def _recipe(self) -> tuple[EvalRecipe, int]:
        """Return the eval recipe and the training size: the model's where there is one."""
        model = getattr(self.trainer, "lightning_module", None)
        recipe = model.spec.eval_recipe if model is not None else self.eval_recipe
        recipe = recipe or EvalRecipe(image_size=self.image_size or 224)
        if self.image_size not in (None, recipe.image_size):
            raise UserError(
                f"ImageFolderDataModule has image_size {self.image_size}, and the model {recipe.image_size}: give "
                "RexNetModule the same, or leave the data's out"
            )
        train_size = model.train_size if model is not None else recipe.image_size
        self.eval_recipe = recipe
        return recipe, train_size

    def _find_bad(self, needed: Sequence[Split]) -> dict[Split, list[tuple[int, str]]]:
        """Return index and reason of each split's unreadable images; refuse where they are too many."""
        folder, limit = self.folder, self.record.max_bad_fraction
        if folder is None:
            return {}
        looked = [name for name in folder.splits if folder.pooled or name in needed]
        bad = {name: verify.find_unreadable(folder.splits[name]) for name in looked}
        names = verify.splits_over_limit(folder, {name: len(rows) for name, rows in bad.items()}, limit)
        if names:
            found = [(folder.splits[name].paths[i], reason) for name in names for i, reason in bad[name]]
            total, (path, reason) = sum(len(folder.splits[name]) for name in names), found[0]
            raise UserError(
                f"{self.record.root}: {len(found)} of {total} images of {', '.join(names)} cannot be read (such as "
                f"{path!r}: {reason}), more than data.max_bad_fraction {limit}; `python -m rexnet_lit check` lists "
                "them: mend or remove them, or set a larger fraction"
            )
        return bad

    def _without_bad(self, samples: Samples, bad: Sequence[tuple[int, str]]) -> Samples:
        """Return ``samples`` less the unreadable files, which are remembered for ``quarantine.csv``."""
        found = [verify.UnreadableFile(samples.paths[i], reason) for i, reason in bad]
        self.bad_files += [row for row in found if row not in self.bad_files]
        if len(bad) == len(samples) == 1:
            raise UserError(f"{samples.path(0)}: cannot be read as an image ({found[0].reason}); mend or replace it")
        if len(bad) == len(samples):
            names = first_few([row.path for row in found])
            raise UserError(
                f"{samples.root}: none of these {len(samples)} images can be read: {names} "
                f"({found[0].reason}); mend or replace them"
            )
        keep = np.setdiff1d(np.arange(len(samples)), [i for i, _ in bad])
        return samples.take(keep)

    def _check_classes(self, samples: Samples) -> None:
        """Refuse to train where a class has lost all its images."""
        counts = np.bincount(samples.targets, minlength=self.num_classes)
        empty = [self.class_names[number] for number in np.flatnonzero(counts == 0)]
        if empty:
            raise UserError(
                f"{samples.root}: no training image can be read of {plural(len(empty), 'class', 'classes')}: "
                f"{first_few(empty, 100)}; mend the files (`python -m rexnet_lit check` lists them), or remove these "
                "folders"
            )

    def compute_features(
        self, name: Split, embed: Callable[[Tensor], Tensor], views: int = 1, *, evaluate: bool = False
    ) -> Tensor:
        """Return the features (V, N, C), float32, of a split's images; each process computes its share.

        Args:
            name: The split, which `setup` has made.
            embed: Maps images (B, 3, S, S) to features (B, C).
            views: V: epochs whose augmentation to use.
            evaluate: Use the eval recipe instead.
        """
        dataset, trainer = self._datasets[name], self.trainer
        if trainer is None:
            raise RuntimeError("compute_features needs a trainer")
        if evaluate:
            decoded, least = dataset.images, dataset.min_size
            dataset = self._dataset(dataset.samples, EvalTransform(self._recipe()[0]))
            if least >= dataset.min_size:  # decoded as for training, cached or not: a cache changes no result
                dataset.images, dataset.min_size = decoded, least
        strategy, workers, on_gpu = trainer.strategy, *self._workers()
        found: Tensor | None = None
        for view in range(views):
            sampler = BatchSampler(
                len(dataset), self.batch_size, rank=trainer.global_rank, world_size=trainer.world_size
            )
            sampler.set_epoch(view)
            loader = build_loader(dataset, sampler, workers, stays=False, on_gpu=on_gpu, seed=0)
            for images, _, indices in loader:
                features = embed(images.to(strategy.root_device)).float()
                if found is None:
                    found = features.new_zeros(views, len(dataset), features.shape[1])
                found[view, indices.to(features.device)] = features
        assert found is not None  # noqa: S101 (for the type checker: each process has a batch)
        return cast(Tensor, strategy.reduce(found, reduce_op="sum")).cpu()

    def train_on_features(self, train: Tensor, val: Tensor) -> None:
        """Hand out features, (V, N, C) of both splits, in the place of images until the next `setup`."""
        splits: tuple[tuple[Split, Tensor], ...] = (("train", train), ("val", val))
        self._features = {name: FeatureDataset(self._datasets[name].samples, found) for name, found in splits}

    def _workers(self) -> tuple[int, bool]:
        """Return the number of loader processes, and whether their batches go to a GPU."""
        trainer = self.trainer
        gpus = trainer.num_devices if trainer is not None and trainer.strategy.root_device.type == "cuda" else 0
        return process.default_num_workers(gpus) if self.num_workers is None else self.num_workers, gpus > 0

    def _sampler(self, name: str) -> BatchSampler:
        if name not in self._datasets:
            stage = {"train": "fit", "val": "validate"}.get(name, name)
            raise UserError(f"the {name} images are not ready: call setup({stage!r}) first")
        dataset, trainer = self._datasets[name], self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        if name != "train":
            if len(dataset) < world:
                raise UserError(
                    f"{dataset.samples.root}: {plural(len(dataset), f'{name} image', f'{name} images')} for {world} "
                    "processes; each needs one: add images, or set fewer trainer.devices"
                )
            return BatchSampler(len(dataset), self.batch_size, rank=rank, world_size=world)
        if len(dataset) < 2 * world:
            raise UserError(
                f"{dataset.samples.root}: {plural(len(dataset), 'training image', 'training images')} for "
                f"{plural(world, 'process', 'processes')}; each needs at least 2 (BatchNorm cannot train on one): "
                "add images"
            )
        targets = dataset.samples.targets
        position = (lambda: training_position(trainer)) if trainer is not None else None
        return BatchSampler(
            len(dataset),
            self.batch_size,
            lambda epoch: training_order(targets, self.sampler, run_seed(), epoch),
            position,
            rank,
            world,
        )

    def _loader(self, name: str) -> Loader:
        sampler, stays = self._sampler(name), name in ("train", "val")
        workers, on_gpu = self._workers()
        if name in self._features:
            return build_loader(self._features[name], sampler, 0, stays=stays, on_gpu=on_gpu, seed=run_seed())
        self._keep_in_memory(name)
        return build_loader(self._datasets[name], sampler, workers, stays=stays, on_gpu=on_gpu, seed=run_seed())

    def steps_per_epoch(self) -> int:
        """Return the number of training batches of an epoch, in each process."""
        return len(self._sampler("train"))

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of the training split, augmented, in an order of their own each epoch."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches of the validation split, in order."""
        loader = self._loader("val")
        loader.start()
        return loader

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test split, in order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of the unlabelled images, in order; the targets are -1.

        Raises:
            UserError: There are none.
        """
        if self.predict_samples is None:
            raise UserError("data.predict_path is not set; name an image or a folder: --data.predict_path PATH")
        return self._loader("predict")


def _problems(
    batch_size: int,
    trains: bool,
    size_schedule: list[tuple[int, int]] | None,
    num_workers: int | None,
    cache: str,
    sampler: str,
    cache_gb: float | None,
    max_bad_fraction: float,
) -> list[str]:
    """Say which of these settings are out of their range."""
    starts = [start for start, _ in size_schedule or [(0, 32)]]
    sizes = [size for _, size in size_schedule or [(0, 32)]]
    rising = starts == sorted(set(starts)) and starts[0] == 0 and 32 <= min(sizes) <= max(sizes) <= MAX_IMAGE_SIZE
    pairs = f"pairs of epoch and pixels (32 to {MAX_IMAGE_SIZE}), epochs rising from 0, such as [[0, 128], [10, 224]]"
    workers = num_workers is None or 0 <= num_workers <= 1024
    samplers, caches = get_args(SamplerName), ("auto", "none", "ram", "disk")
    least = "at least 2, which ReXNet's BatchNorm needs" if trains else "at least 1"
    checks = (
        ("batch_size", batch_size, batch_size >= 1 + trains, least),
        ("size_schedule", size_schedule, rising, pairs),
        ("num_workers", num_workers, workers, "0 (the main process reads) or a few"),
        ("cache", repr(cache), cache in caches, f"one of {', '.join(caches)}"),
        ("sampler", repr(sampler), sampler in samplers, f"one of {', '.join(samplers)}"),
        ("cache_gb", cache_gb, cache_gb is None or cache_gb > 0, "above 0, or data.cache none"),
        ("max_bad_fraction", max_bad_fraction, 0 <= max_bad_fraction <= 1, "a fraction from 0 to 1"),
    )
    return [f"data.{key} is {value}; expected {expected}" for key, value, good, expected in checks if not good]


def _said_now_and_then(what: str, every: float = 10.0) -> Callable[[int, int], None]:
    """Return a progress callback for what takes minutes once, and no time when it is known."""
    said = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said > every:
            said = time.monotonic()
            print(f"{what}: {done:,} of {total:,}", flush=True)  # noqa: T201

    return progress


def _unlabelled(path: str) -> tuple[Samples, tuple[str, ...]]:
    root, paths, notes = list_images(path)
    return Samples(root, paths, np.full(len(paths), -1, np.int64)), notes


def _missing_split(name: str, record: DataRecord) -> str:
    remedy = f"add a {name} folder"
    if name == "test":  # not in a run of the model: what its fit has not set aside, it was trained on
        remedy += " with a folder per class, or fit with data.test_fraction above 0"
    elif name == "val" and record.val_fraction == 0:
        remedy += " with a folder per class, or set data.val_fraction above 0"
    elif name == "val":
        remedy += " with a folder per class, or more images: a class keeps its only one for training"
    return f"{record.root}: there is no {name} split; {remedy}"


def any_datamodule(trainer: pl.Trainer | None) -> pl.LightningDataModule | None:
    """Return the trainer's data module of any class; None where it was given loaders."""
    data: pl.LightningDataModule | None = getattr(trainer, "datamodule", None)
    return data


def find_datamodule(trainer: pl.Trainer | None) -> ImageFolderDataModule | None:
    """Return the trainer's data module if it is an `ImageFolderDataModule`."""
    data = any_datamodule(trainer)
    return data if isinstance(data, ImageFolderDataModule) else None


def training_position(trainer: pl.Trainer) -> tuple[int, int]:
    """Return the epoch that is due and how many of its batches are done, right also while a run is resumed.

    ``trainer.current_epoch`` is not: a resumed run asks for its batches before Lightning has set it.
    """
    epoch: Any = trainer.fit_loop.epoch_progress.current
    batch: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    midway = epoch.started > epoch.processed
    return epoch.processed, batch.processed if midway else 0

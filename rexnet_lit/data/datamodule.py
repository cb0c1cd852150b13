"""The LightningDataModule: from a folder of class folders to loaders."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NoReturn, cast, get_args

import lightning.pytorch as pl
import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from rexnet_lit.data import decode, quarantine, verify
from rexnet_lit.data.augmentation import AugmentSettings, build_mix
from rexnet_lit.data.cache import DiskCache
from rexnet_lit.data.dataset import FeatureDataset, ImageDataset
from rexnet_lit.data.features import embed_dataset
from rexnet_lit.data.folder import ImageFolder, Samples, fingerprint, scan
from rexnet_lit.data.loader import Loader, build_loader
from rexnet_lit.data.memory import keep_in_memory
from rexnet_lit.data.sampler import SAMPLERS, BatchSampler, SamplerName, build_sampler, run_seed, training_order
from rexnet_lit.data.settings import CropMode, DataRecord, EvalRecipe, check_size_schedule, failed_checks
from rexnet_lit.data.splits import Split
from rexnet_lit.data.transforms import EvalTransform, TrainTransform, build_train_transform, checked
from rexnet_lit.data.unlabelled import JointDataset, find_bad, require_teacher, without_labels
from rexnet_lit.utils import process
from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.files import absolute_path
from rexnet_lit.utils.settings import check_choice, check_range, check_types, overridden, settings_of

CacheName = Literal["auto", "none", "ram", "disk"]
_SPLITS_OF_STAGE: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}


class ImageFolderDataModule(pl.LightningDataModule):
    """A folder of class folders, ready for training.

    The constructor scans the folder, so ``num_classes`` and ``class_names`` are known at once.

    Args:
        root: Holds ``train/ val/ [test/]`` with a folder per class, or the class folders directly.
        image_size: Height and width in pixels of the network's input; the backbone's own by default.
        batch_size: Images per step in each process, at most.
        num_workers: Loader processes; chosen for the machine by default.
        val_fraction: Share of each class set aside for validation where there is no ``val`` folder.
        test_fraction: Share of each class set aside for testing where there is no ``test`` folder.
        num_folds: Cross-validation: validate on one of this many folds instead of ``val_fraction``; 0 for none.
        fold: Which fold, from 0.
        group_pattern: A regular expression on the paths: images with the same match (of its first group) never end
            up in two splits, such as ``(patient[0-9]+)_``.
        split_file: Table to use instead of the folders, such as a run's ``split.csv``: columns path, label, split,
            group, or other usual names of these. All but the path may be missing.
        labels: Table (CSV, Parquet) with the label of each image below ``root``, such as Kaggle's ``train.csv``.
        class_order: ``sorted`` (by name), ``natural`` (2 before 10, as timm sorts), or a file with a name per line.
        follow_outside_links: Whether symbolic links may lead out of ``root``.
        fixes: CSV with the columns path, action, label: images to relabel or remove, as the page of `check --report`
            saves it. The folder is not changed.
        size_schedule: Progressive resizing: pairs of an epoch, counted from 0, and the training images' height and
            width in pixels from then on, such as ``[[0, 128], [10, 224]]``. Validation keeps ``image_size``.
        augment: The training recipe.
        sampler: ``shuffle``; ``balanced`` draws every class equally often, ``balanced_sqrt`` is halfway between.
        cache: ``auto`` decodes the images once per fit if they fit in a quarter of the free memory, ``ram`` as many as
            fit. ``disk`` keeps decoded images in the user's cache folder, for later epochs and runs.
        cache_gb: Gigabytes (10^9 bytes) that the cache may use; half of the free space by default.
        max_bad_fraction: The share of unreadable images that a run accepts: of each split, or of all images where the
            splits are drawn.
        crop_mode: How an image becomes a square: ``center`` (default) cuts the ends off, ``border`` pads, ``squash``
            distorts. The last two show all of the image.
        predict_path: An image, or a folder of unlabelled images.
        predict_output: CSV that `predict` writes; a new ``predictions.csv`` in ``trainer.default_root_dir`` by default.
        strangers: A folder of images of other things, for the report of `test`: how many of them it tells apart.
        unlabelled: A folder of images without labels, flat or nested, from which ``model.teacher`` teaches as well.

    Raises:
        UserError: The folder or a setting is wrong; all problems are listed at once.
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
        labels: str | None = None,
        class_order: str = "sorted",
        follow_outside_links: bool = False,
        fixes: str | None = None,
        size_schedule: list[tuple[int, int]] | None = None,
        augment: AugmentSettings = AugmentSettings(),  # noqa: B008 (frozen)
        sampler: SamplerName = "shuffle",
        cache: CacheName = "auto",
        cache_gb: float | None = None,
        max_bad_fraction: float = DataRecord.max_bad_fraction,
        crop_mode: CropMode | None = None,
        predict_path: str | None = None,
        predict_output: str | None = None,
        strangers: str | None = None,
        unlabelled: str | None = None,
        *,
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__()
        check_types("data", ImageFolderDataModule.__init__, locals())
        self.record = DataRecord(
            root=absolute_path(root),
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            num_folds=num_folds,
            fold=fold,
            group_pattern=group_pattern,
            split_file=absolute_path(split_file),
            labels=absolute_path(labels),
            class_order=os.fspath(class_order),
            follow_outside_links=follow_outside_links,
            fixes=absolute_path(fixes),
            max_bad_fraction=max_bad_fraction,
        )
        trains = root is not None and class_names is None
        problems = self.record.problems() + failed_checks(
            partial(check_range, "data.batch_size", batch_size, f"[{1 + trains}, inf)", "for BatchNorm", whole=True),
            partial(check_size_schedule, size_schedule),
            partial(check_range, "data.num_workers", num_workers, "[0, 1024]", "0 for the main process", optional=True),
            partial(check_choice, "data.cache", cache, get_args(CacheName)),
            partial(check_choice, "data.crop_mode", crop_mode or "center", get_args(CropMode)),
            partial(check_choice, "data.sampler", sampler, SAMPLERS),
            partial(check_range, "data.cache_gb", cache_gb, "(0, inf]", "or data.cache none", optional=True),
            partial(check_range, "data.max_bad_fraction", max_bad_fraction, "[0, 1]"),
        )
        if problems:
            raise UserError("; ".join(problems))
        self.image_size, self.crop_mode, self.size_schedule = image_size, crop_mode, size_schedule
        self.batch_size, self.num_workers, self.predict_output = batch_size, num_workers, predict_output
        self.augment, self.sampler, self.cache = settings_of(AugmentSettings, augment, "data.augment"), sampler, cache
        self._cache_bytes = None if cache_gb is None else cache_gb * 1e9
        self._disk: DiskCache | None = None
        self.predict_samples, self.predict_notes = without_labels(predict_path, "data.predict_path")
        self.strangers = without_labels(strangers, "data.strangers")[0]
        self.unlabelled = without_labels(unlabelled, "data.unlabelled")[0]
        self.eval_recipe: EvalRecipe | None = None
        """The preprocessing; `setup` takes it from the trainer's model."""
        self.bad_files: list[verify.UnreadableFile] = []
        self._datasets: dict[str, ImageDataset] = {}
        self._features: dict[str, FeatureDataset] = {}
        self._fingerprints: dict[str, str | None] | None = None
        self.folder: ImageFolder | None = None
        self.class_names = class_names or ()
        if root is not None:
            self.folder = scan(root, self.record, class_names)
            self.class_names = self.folder.class_names

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: Lightning's version would unpickle, and no checkpoint contains the data."""
        raise UserError("a checkpoint contains no data: use ImageFolderDataModule(root=DIR)")

    @property
    def num_classes(self) -> int:
        """K, found in the folder."""
        return len(self.class_names)

    def splits(self) -> dict[Split, Samples]:
        """Return the samples of each split, without the unreadable ones once `setup` has found them."""
        if self.folder is None:
            raise UserError("data.root is not set; name the folder of images: --data.root DIR")
        return {name: self._datasets[name].samples if name in self._datasets else samples
                for name, samples in self.folder.splits.items()}  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """Return the settings, by key, that affect the weights of a run beside its model and the images."""
        return {
            "batch_size": self.batch_size,
            "sampler": self.sampler,
            "image_size": self.image_size,
            "crop_mode": self.crop_mode,
            "size_schedule": self.size_schedule,
            **{f"augment.{key}": value for key, value in dataclasses.asdict(self.augment).items()},
            "train_transform": overridden(self, "train_transform"),
        }

    def fingerprints(self) -> dict[str, str | None]:
        """Return what identifies the training and validation images; None for none."""
        if self._fingerprints is None:
            splits = self.folder.splits if self.folder else self.splits()
            images = {f"{name} images": splits[name] for name in _SPLITS_OF_STAGE["fit"] if name in splits}
            self._fingerprints = {
                key: None if samples is None else f"{len(samples)}, fingerprint {fingerprint(samples)[:12]}"
                for key, samples in {**images, "data.unlabelled": self.unlabelled}.items()
            }
        return self._fingerprints

    def prepare_data(self) -> None:
        """Find unreadable and duplicate files in one process; the others read the result from the cache."""
        if self.unlabelled is not None:
            require_teacher(self.trainer)
        if self.folder and self.folder.splits:
            quarantine.verify_splits(self.folder.splits, self.unlabelled)

    def lost_files(self) -> list[verify.UnreadableFile]:
        """Return the training images that have become unreadable since `setup`."""
        parts = [self._datasets[name].samples for name in ("train", "unlabelled") if name in self._datasets]
        found = ((samples.paths[i], reason) for samples in parts for i, reason in verify.find_unreadable(samples))
        return [verify.UnreadableFile(path, reason) for path, reason in found]

    def setup(self, stage: str) -> None:
        """Create the datasets of ``stage`` (``fit``, ``validate``, ``test`` or ``predict``).

        Raises:
            UserError: Too many images are unreadable, or a needed split is missing.
        """
        self._features = {}  # of another network
        evaluate = EvalTransform(self._recipe()[0])
        if stage == "predict":
            if self.predict_samples is None:
                return  # Lightning calls this also if the trainer is given a loader
            good = self._readable(self.predict_samples, verify.find_unreadable(self.predict_samples))
            self._datasets["predict"] = ImageDataset(good, evaluate, 0)
            return
        check_choice("setup: the stage", getattr(stage, "value", stage), [*_SPLITS_OF_STAGE, "predict"])
        splits = self.folder.splits if self.folder else self.splits()
        needed = _SPLITS_OF_STAGE[stage]
        bad = quarantine.find_bad(self.folder, needed, self.record.max_bad_fraction) if self.folder else {}
        for name in needed:
            if name not in splits or len(splits[name]) == 0:
                if (stage, name) == ("fit", "val") and self.record.may_lack_val:
                    continue
                raise UserError(self.record.missing_split(name))
            if name != "train" and name in self._datasets and self._datasets[name].transform == evaluate:
                continue
            parts = {str(name): self._readable(splits[name], bad[name])}
            if name == "train":
                quarantine.check_classes(parts[name], self.class_names)
                if self.unlabelled is not None:
                    require_teacher(self.trainer)
                    parts["unlabelled"] = self._readable(*find_bad(self.unlabelled, self.record.max_bad_fraction))
            given = self.train_transform() if name == "train" else evaluate
            transform = checked(given, *self._recipe(), self.size_schedule)
            mix = build_mix(self.augment, self.num_classes) if name == "train" else None
            for part, samples in parts.items():
                self._datasets.pop(part, None)  # free its memory first
                self._datasets[part] = self._dataset(samples, transform, mix)

    def train_transform(self) -> Callable[..., Tensor]:
        """Return what maps a training image, uint8 (H, W, 3), to float32 (3, S, S), normalised.

        A subclass may return a function of its own, or albumentations: its random numbers then follow the run's seed.
        """
        return build_train_transform(self.augment, *self._recipe(), self.size_schedule)

    def mirror(self, hflip: float) -> None:
        """Flip the training images of this fit with this probability: what ``augment.hflip: auto`` stands for."""
        augment = dataclasses.replace(self.augment, hflip=hflip)
        for name in self._datasets.keys() & {"train", "unlabelled"}:
            self._datasets[name].transform = build_train_transform(augment, *self._recipe(), self.size_schedule)

    def preview(self, count: int = 16) -> NDArray[np.uint8]:
        """Return training images, (N, S, S, 3), as the first epoch's augmentation makes them; ``auto`` mirrors."""
        dataset = self._datasets["train"]
        order = training_order(dataset.samples.targets, self.sampler, run_seed(), 0)[:count]
        return np.stack([dataset.augmented(int(index), 0) for index in order])

    def _dataset(self, samples: Samples, transform: TrainTransform | EvalTransform, mix: Any = None) -> ImageDataset:
        """Return a dataset, which reads through the disk cache if there is one."""
        read: Callable[[str, int], NDArray[np.uint8]] = decode.read
        if self.cache == "disk":
            self._disk = self._disk or DiskCache(limit=self._cache_bytes)
            read = self._disk.read
        return ImageDataset(samples, transform, run_seed(), read, mix)

    def _keep_in_memory(self, name: str) -> None:
        """Decode a split's images for all epochs if asked for, or if that saves time and fits."""
        if self.cache in ("auto", "ram"):
            taken = sum(data.images_bytes for data in self._datasets.values())
            limit = None if self._cache_bytes is None else self._cache_bytes - taken
            keep_in_memory(self._datasets[name], self.trainer, limit, auto=self.cache == "auto")

    def _recipe(self) -> tuple[EvalRecipe, int]:
        """Return the eval recipe and the training size: the model's if there is one."""
        model = getattr(self.trainer, "lightning_module", None)
        recipe = model.spec.eval_recipe if model is not None else self.eval_recipe
        recipe = recipe or EvalRecipe(image_size=self.image_size or 224).with_crop_mode(self.crop_mode)
        for name in ("image_size", "crop_mode"):
            if getattr(self, name) not in (None, getattr(recipe, name)):
                raise UserError(
                    f"ImageFolderDataModule has {name} {getattr(self, name)}, and the model {getattr(recipe, name)}: "
                    "give RexNetModule the same, or leave the data's out"
                )
        train_size = model.train_size if model is not None else recipe.image_size
        self.eval_recipe = recipe
        return recipe, train_size

    def _readable(self, samples: Samples, bad: list[tuple[int, str]]) -> Samples:
        """Return ``samples`` without the unreadable files, which are recorded for ``quarantine.csv``."""
        found = [verify.UnreadableFile(samples.paths[i], reason) for i, reason in bad]
        self.bad_files += [row for row in found if row not in self.bad_files]
        return quarantine.without_bad(samples, bad)

    def compute_features(
        self, images: Split | Samples, embed: Callable[[Tensor], Tensor], views: int = 1, *, evaluate: bool = False
    ) -> Tensor:
        """Return the features (V, N, C), float32, of images; each process computes its share.

        Args:
            images: A split, which `setup` has made, or any readable images, which get the eval recipe.
            embed: Maps images (B, 3, S, S) to features (B, C).
            views: V: epochs whose augmentation to use.
            evaluate: Use the eval recipe instead.
        """
        trainer, evaluated = self.trainer, EvalTransform(self._recipe()[0])
        if trainer is None:
            raise RuntimeError("compute_features needs a trainer")
        dataset = self._datasets[images] if isinstance(images, str) else self._dataset(images, evaluated)
        if evaluate:
            decoded, least = dataset.images, dataset.min_size
            dataset = self._dataset(dataset.samples, evaluated)
            if least >= dataset.min_size:  # decoded as for training, so that a cache changes no result
                dataset.images, dataset.min_size = decoded, least
        workers, on_gpu = self._workers()
        return embed_dataset(
            dataset, embed, trainer, views=views, batch_size=self.batch_size, num_workers=workers, on_gpu=on_gpu
        )

    def train_on_features(self, features: Mapping[Split, Tensor]) -> None:
        """Load features, (V, N, C) of each split, instead of images until the next `setup`."""
        for name, values in features.items():
            self._features[name] = FeatureDataset(self._datasets[name].samples, values)

    def _workers(self) -> tuple[int, bool]:
        """Return the number of loader processes, and whether their batches go to a GPU."""
        trainer = self.trainer
        gpus = trainer.num_devices if trainer is not None and trainer.strategy.root_device.type == "cuda" else 0
        return process.default_num_workers(gpus) if self.num_workers is None else self.num_workers, gpus > 0

    def _sampler(self, name: str) -> BatchSampler:
        if name not in self._datasets:
            stage = {"train": "fit", "val": "validate"}.get(name, name)
            raise UserError(f"the {name} images are not ready: call setup({stage!r}) first")
        samples, others = self._datasets[name].samples, len(self._datasets.get("unlabelled", ()))
        order = partial(training_order, samples.targets, self.sampler, run_seed(), unlabelled=others)
        train = name == "train"
        return build_sampler(samples, name, self.batch_size, self.trainer, *((order, others) if train else ()))

    def _loader(self, name: str) -> Loader:
        sampler, stays = self._sampler(name), name in ("train", "val")
        workers, on_gpu = self._workers()
        dataset: ImageDataset | JointDataset | FeatureDataset = self._datasets[name]
        if name in self._features:
            dataset, workers = self._features[name], 0
        elif stays:
            self._keep_in_memory(name)
        if name == "train" and "unlabelled" in self._datasets:
            self._keep_in_memory("unlabelled")
            dataset = JointDataset(self._datasets[name], self._datasets["unlabelled"])
        return build_loader(dataset, sampler, workers, stays=stays, on_gpu=on_gpu, seed=run_seed())

    def steps_per_epoch(self) -> int:
        """Return the number of training batches of an epoch in each process."""
        return len(self._sampler("train"))

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of the training split, augmented, in a different order each epoch."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Batches of the validation split, in order; no loader for a fit without validation images."""
        if "val" not in self._datasets and "train" in self._datasets:
            return []
        loader = self._loader("val")
        loader.start()
        return loader

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test split, in order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of the unlabelled images, in order; the targets are -1."""
        if self.predict_samples is None:
            raise UserError("data.predict_path is not set; name an image or a folder: --data.predict_path PATH")
        return self._loader("predict")


def any_datamodule(trainer: pl.Trainer | None) -> pl.LightningDataModule | None:
    """Return the trainer's data module of any class; None if it was given loaders."""
    return cast("pl.LightningDataModule | None", getattr(trainer, "datamodule", None))


def find_datamodule(trainer: pl.Trainer | None) -> ImageFolderDataModule | None:
    """Return the trainer's data module if it is an `ImageFolderDataModule`."""
    data = any_datamodule(trainer)
    return data if isinstance(data, ImageFolderDataModule) else None

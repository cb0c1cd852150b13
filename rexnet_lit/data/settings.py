"""The settings of a dataset and of its preprocessing, in plain types."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.settings import check_choice, check_range

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_IMAGE_SIZE = 4096
"""Pixels per side: more than fits in the memory of any machine."""

MAX_BAD_FRACTION = 0.05
"""Default share of unreadable files that a run accepts: with more, something else is wrong."""

INTERPOLATIONS = {"bicubic": "bicubic", "bilinear": "bilinear", "nearest": "nearest-exact"}
"""Ways to resize, and torch's names for them."""

CropMode = Literal["center", "border", "squash"]
"""timm's names for how an image becomes a square: see `EvalRecipe`."""

if not TYPE_CHECKING:
    Interpolation = Literal[tuple(INTERPOLATIONS)]
else:
    Interpolation = str


def failed_checks(*checks: Callable[[], None]) -> list[str]:
    """Run all checks, and return the messages of those that fail."""
    problems = []
    for check in checks:
        try:
            check()
        except UserError as error:
            problems.append(str(error))
    return problems


def check_size_schedule(schedule: list[tuple[int, int]] | None) -> None:
    """Raise `UserError` unless a schedule of image sizes starts at epoch 0 and is in order."""
    starts, sizes = zip(*(schedule or [(0, 32)]), strict=True)
    rising = list(starts) == sorted(set(starts)) and starts[0] == 0
    if not (rising and 32 <= min(sizes) <= max(sizes) <= MAX_IMAGE_SIZE):
        raise UserError(
            f"data.size_schedule is {schedule}; expected pairs of epoch and pixels (32 to {MAX_IMAGE_SIZE}), epochs "
            "rising from 0, such as [[0, 128], [10, 224]]"
        )


@dataclasses.dataclass(frozen=True)
class EvalRecipe:
    """How an image becomes the network's input outside training.

    The image is resized to ``floor(image_size / crop_pct)`` pixels: its shorter side (``crop_mode`` ``center``), its
    longer side (``border``), or both sides, which distorts it (``squash``). The centre ``image_size`` square is
    cropped, for ``border`` padded with ``mean`` where the image is narrower, and ``(x / 255 - mean) / std`` is applied
    per channel (RGB).
    """

    image_size: int = 224
    crop_pct: float = 0.875
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    crop_mode: CropMode = "center"

    def __post_init__(self) -> None:
        check_range("data.image_size", self.image_size, f"[32, {MAX_IMAGE_SIZE}]", "in pixels", whole=True)
        check_range("crop_pct", self.crop_pct, "(0, 1]")
        check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        check_choice("data.crop_mode", self.crop_mode, get_args(CropMode))
        if not all(len(t) == 3 and all(map(math.isfinite, t)) for t in (self.mean, self.std)) or not min(self.std) > 0:
            raise UserError(f"mean is {self.mean} and std {self.std}; expected three numbers each, std above 0")

    @property
    def resize_size(self) -> int:
        """Length in pixels of the side that ``crop_mode`` names, before the centre crop."""
        return math.floor(self.image_size / self.crop_pct)  # as timm rounds

    @property
    def padding(self) -> tuple[int, ...]:
        """The colour (RGB, 0 to 255) around an image that ``border`` makes narrower than the square: the mean."""
        return tuple(min(max(round(255 * level), 0), 255) for level in self.mean)

    def with_crop_mode(self, mode: CropMode | None) -> EvalRecipe:
        """Return the recipe with another crop mode, if given; ``border`` and ``squash`` then show all of the image."""
        if mode in (None, self.crop_mode):
            return self
        return dataclasses.replace(self, crop_mode=mode, crop_pct=self.crop_pct if mode == "center" else 1.0)

    def visible(self, width: int, height: int) -> float:
        """Return the share of an image's area that the network is given."""
        kept = self.image_size / self.resize_size
        shape = min(width, height) / max(width, height)
        if self.crop_mode == "squash":
            return kept * kept
        if self.crop_mode == "border":
            return kept * min(1.0, kept / shape)
        return kept * kept * shape


@dataclasses.dataclass(frozen=True)
class SplitSettings:
    """How a folder is read and divided into train, val and test: the arguments of `ImageFolderDataModule`."""

    val_fraction: float = 0.2
    test_fraction: float = 0.0
    num_folds: int = 0
    fold: int = 0
    group_pattern: str | None = None
    split_file: str | None = None
    labels: str | None = None
    class_order: str = "sorted"
    follow_outside_links: bool = False
    max_bad_fraction: float = dataclasses.field(default=MAX_BAD_FRACTION, compare=False)
    """Not compared: it does not change which image is in which split."""
    fixes: str | None = dataclasses.field(default=None, compare=False)
    """Not compared: it changes no image's split."""

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """Return these settings from all of a data module; the others are left out."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in data.items() if name in names})

    @property
    def may_lack_val(self) -> bool:
        """Whether a fit may do without validation images: a file has assigned every image, and none is to be drawn."""
        return self.split_file is not None and not self.val_fraction and not self.num_folds

    def problems(self) -> list[str]:
        """Return what is wrong with the fractions, folds and tables."""
        folds = self.num_folds if isinstance(self.num_folds, int) else 0
        problems = failed_checks(
            partial(check_range, "data.val_fraction", self.val_fraction, "[0, 1)"),
            partial(check_range, "data.test_fraction", self.test_fraction, "[0, 1)"),
            partial(
                check_range, "data.num_folds", 2 if self.num_folds == 0 else self.num_folds, "[2, inf)", "0 for none"
            ),
            partial(check_range, "data.fold", self.fold, f"[0, {max(folds, 1)})", "see data.num_folds"),
        )
        if not problems and not self.num_folds and self.val_fraction + self.test_fraction >= 1:
            problems.append("data.val_fraction and data.test_fraction add up to 1 or more; leave images for train")
        if self.labels is not None and self.split_file is not None:
            problems.append("data.labels and data.split_file are both set; one table can have both columns: remove one")
        return problems


@dataclasses.dataclass(frozen=True)
class DataRecord(SplitSettings):
    """What a model file stores of its dataset, so that `test` needs no other setting. All plain types."""

    root: str | None = None

    def __post_init__(self) -> None:
        optional = (self.root, self.split_file, self.labels, self.group_pattern, self.fixes)
        texts = [self.class_order, *(t for t in optional if t is not None)]
        numbers = (self.val_fraction, self.test_fraction, self.num_folds, self.fold, self.max_bad_fraction)
        if not all(isinstance(t, str) for t in texts) or not all(isinstance(n, int | float) for n in numbers):
            raise TypeError(f"not the record of a dataset: {self}")

    def missing_split(self, name: str) -> str:
        """Return the error message for a split that is needed and not there."""
        hints = {"test": "fit with data.test_fraction above 0", "val": "set data.val_fraction above 0"}
        if name == "val" and self.val_fraction:
            hints["val"] = "more images: a class keeps its only one for training"
        hint = hints.get(name, "images")
        return f"{self.root}: there is no {name} split; add {name}/ with a folder per class, or {hint}"

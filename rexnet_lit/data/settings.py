"""The settings of a dataset and of its preprocessing, in plain types."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from rexnet_lit.utils.errors import UserError

MAX_IMAGE_SIZE = 4096
"""Pixels a side: above what any memory trains on."""


MAX_BAD_FRACTION = 0.05
"""Above this share of unreadable files something else is wrong than a few files."""


Interpolation = Literal["bicubic", "bilinear", "nearest"]


@dataclasses.dataclass(frozen=True)
class EvalRecipe:
    """How an image becomes the network's input outside training.

    The shorter side is resized to ``round(image_size / crop_pct)`` pixels, the centre ``image_size`` square is
    cut out, and ``(x / 255 - mean) / std`` is applied per channel (RGB).
    """

    image_size: int = 224
    crop_pct: float = 0.875
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if self.image_size < 32:
            raise UserError(f"data.image_size is {self.image_size}; a ReXNet needs at least 32 pixels")
        if self.image_size > MAX_IMAGE_SIZE:
            raise UserError(f"data.image_size is {self.image_size}; expected at most {MAX_IMAGE_SIZE} pixels")
        if not 0 < self.crop_pct <= 1:
            raise UserError(f"crop_pct is {self.crop_pct}; expected a fraction above 0 and up to 1")
        if self.interpolation not in get_args(Interpolation):
            raise UserError(f"interpolation is {self.interpolation!r}; expected one of {get_args(Interpolation)}")
        if not all(len(t) == 3 and all(map(math.isfinite, t)) for t in (self.mean, self.std)) or not min(self.std) > 0:
            raise UserError(f"mean is {self.mean} and std {self.std}; expected three numbers each, std above 0")

    @property
    def resize_size(self) -> int:
        """Length in pixels of the shorter side before the centre crop."""
        return math.floor(self.image_size / self.crop_pct)  # as timm rounds


@dataclasses.dataclass(frozen=True)
class SplitSettings:
    """How a folder is read, and divided into train, val and test.

    Args:
        val_fraction: Share of each class set aside for validation where there is no ``val`` folder; at least one image.
        test_fraction: Share of each class set aside for testing where there is no ``test`` folder.
        num_folds: Cross-validation: validate on one of so many folds instead of ``val_fraction``; 0 for none.
        fold: Which fold, from 0.
        group_pattern: A regular expression on the paths: images with the same match (of its first group) never end up
            in two splits, such as ``(patient[0-9]+)_``.
        split_file: CSV with the columns path, label, split, group, to use instead of the folders (a run's
            ``split.csv``). All but ``path`` may be missing.
        class_order: ``sorted`` (by name), ``natural`` (2 before 10, as timm sorts), or a file with a name per line.
        follow_outside_links: Whether symbolic links may lead out of the folder.
    """

    val_fraction: float = 0.2
    test_fraction: float = 0.0
    num_folds: int = 0
    fold: int = 0
    group_pattern: str | None = None
    split_file: str | None = None
    class_order: str = "sorted"
    follow_outside_links: bool = False

    def problems(self) -> list[str]:
        """Return what is wrong with the fractions and folds."""
        for name in ("val_fraction", "test_fraction"):
            if not 0 <= getattr(self, name) < 1:
                return [f"data.{name} is {getattr(self, name)}; expected a fraction from 0 to below 1"]
        if not self.num_folds and self.val_fraction + self.test_fraction >= 1:
            return [
                f"data.val_fraction {self.val_fraction} and data.test_fraction {self.test_fraction} leave nothing for "
                "train"
            ]
        if self.num_folds < 0 or self.num_folds == 1:
            return [f"data.num_folds is {self.num_folds}; expected 2 or more, or 0 for none"]
        if self.fold and not self.num_folds:
            return [f"data.fold is {self.fold}, and data.num_folds 0; set both, such as data.num_folds 5"]
        if self.num_folds and not 0 <= self.fold < self.num_folds:
            return [f"data.fold is {self.fold}; expected 0 to {self.num_folds - 1}, below data.num_folds"]
        return []


@dataclasses.dataclass(frozen=True)
class DataRecord(SplitSettings):
    """What a model file remembers of its dataset, so that `test` needs nothing else. All plain."""

    root: str | None = None
    max_bad_fraction: float = dataclasses.field(default=MAX_BAD_FRACTION, compare=False)
    """Not compared: it does not say which image is in which split."""

    def __post_init__(self) -> None:
        texts = [self.class_order, *(t for t in (self.root, self.split_file, self.group_pattern) if t is not None)]
        numbers = (self.val_fraction, self.test_fraction, self.num_folds, self.fold, self.max_bad_fraction)
        if not all(isinstance(t, str) for t in texts) or not all(isinstance(n, int | float) for n in numbers):
            raise TypeError(f"not the record of a dataset: {self}")

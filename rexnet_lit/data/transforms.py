"""Recipes that turn a decoded image into the network's input: uint8 (H, W, 3) RGB in, float32 (3, S, S) out.

`EvalTransform` is the one preprocessing of validation, test, prediction and export. `TrainTransform` augments, by a
recipe's name or by an albumentations pipeline from YAML; what it draws depends on the seed it is given and on
nothing else, so workers and epochs never share a stream (albumentations 2.0.8 alone repeats itself).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from rexnet_lit.data.settings import INTERPOLATIONS, EvalRecipe
from rexnet_lit.utils.errors import UserError, did_you_mean
from rexnet_lit.utils.settings import check_choice, check_range

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # importing it would ask the package index for news
import albumentations as A  # noqa: N812

_LONGEST = 3  # times the shorter side: what lies further out than the network sees is not resized
_FILL = 128.0  # grey, for what a rotation or shift uncovers


def _none(_: AugmentSettings) -> list[Any]:
    return []


def _medium(_: AugmentSettings) -> list[Any]:
    return [
        A.Affine(rotate=(-10, 10), translate_percent=(-0.05, 0.05), fill=_FILL, p=0.5),
        A.ColorJitter(brightness=(0.8, 1.2), contrast=(0.8, 1.2), saturation=(0.8, 1.2), hue=(-0.02, 0.02), p=0.5),
    ]


def _heavy(_: AugmentSettings) -> list[Any]:
    return [
        A.Affine(rotate=(-20, 20), translate_percent=(-0.1, 0.1), shear=(-10, 10), fill=_FILL, p=0.7),
        A.ColorJitter(brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.6, 1.4), hue=(-0.05, 0.05), p=0.8),
        A.ToGray(p=0.1),
        A.GaussianBlur(p=0.1),
        A.CoarseDropout(num_holes_range=(1, 3), hole_height_range=(0.1, 0.25), hole_width_range=(0.1, 0.25), p=0.3),
    ]


def _randaugment(augment: AugmentSettings) -> list[Any]:
    """Return ``num_ops`` of RandAugment's changes, at its ranges for the magnitude (timm's "rand-m9" family)."""
    m = augment.magnitude / 10
    shift, turn, shear, factor = 0.45 * m, 30 * m, 17 * m, 0.9 * m
    colour = (max(0.05, 1 - factor), 1 + factor)
    ops = [
        A.AutoContrast(p=1),
        A.Equalize(p=1),
        A.InvertImg(p=1),
        A.Rotate(limit=(-turn, turn), fill=_FILL, p=1),
        A.Posterize(num_bits=min(7, round(8 - 4 * m)), p=1),
        A.Solarize(threshold_range=(1 - m, 1 - m), p=1),
        A.ColorJitter(brightness=colour, contrast=(1, 1), saturation=(1, 1), hue=(0, 0), p=1),
        A.ColorJitter(brightness=(1, 1), contrast=colour, saturation=(1, 1), hue=(0, 0), p=1),
        A.ColorJitter(brightness=(1, 1), contrast=(1, 1), saturation=colour, hue=(0, 0), p=1),
        A.Sharpen(alpha=(0.0, factor), p=1),
        A.Affine(shear={"x": (-shear, shear), "y": (0, 0)}, fill=_FILL, p=1),
        A.Affine(shear={"x": (0, 0), "y": (-shear, shear)}, fill=_FILL, p=1),
        A.Affine(translate_percent={"x": (-shift, shift), "y": (0, 0)}, fill=_FILL, p=1),
        A.Affine(translate_percent={"x": (0, 0), "y": (-shift, shift)}, fill=_FILL, p=1),
    ]
    return [A.SomeOf(ops, n=augment.num_ops, replace=True, p=1)]


RECIPES = {"none": _none, "light": _none, "medium": _medium, "heavy": _heavy, "randaugment": _randaugment}
"""The changes that each training recipe makes after crop and flip; ``none`` has neither."""

if TYPE_CHECKING:
    RecipeName = str
else:
    RecipeName = Literal[tuple(RECIPES)]


@dataclasses.dataclass(frozen=True)
class AugmentSettings:
    """What training does to an image before the network sees it.

    Args:
        name: ``none`` (the eval recipe), ``light`` (crop and flip), ``medium`` (and small turns and colour changes),
            ``heavy`` (more of it), ``randaugment`` (crop, flip and ``num_ops`` random changes; Cubuk et al. 2020).
        min_scale: Smallest share of the image's area that a random crop keeps.
        hflip: Probability of a mirror image. 0 where left and right mean something: digits, letters, signs.
        num_ops: Changes per image of ``randaugment``.
        magnitude: Strength of each, 0 to 10.
        erasing: Probability that a rectangle is replaced by noise (Zhong et al. 2020).
        mixup: Alpha of MixUp, which blends pairs of images and their labels (Zhang et al. 2018); 0 for none.
        cutmix: Alpha of CutMix, which pastes a rectangle of another image (Yun et al. 2019); 0 for none. With both,
            each batch gets one of them by the toss of a coin.
        transforms: albumentations by name, in place of the recipe's own turns and colour changes, such as
            ``[{GaussianBlur: {p: 0.2}}, {Rotate: {limit: 10}}]``.
    """

    name: RecipeName = "light"
    min_scale: float = 0.6
    hflip: float = 0.5
    num_ops: int = 2
    magnitude: float = 9.0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    transforms: list[Any] | None = None

    def __post_init__(self) -> None:
        check_choice("data.augment.name", self.name, RECIPES)
        check_range("data.augment.min_scale", self.min_scale, "(0, 1]")
        check_range("data.augment.hflip", self.hflip, "[0, 1]")
        check_range("data.augment.erasing", self.erasing, "[0, 1]")
        check_range("data.augment.magnitude", self.magnitude, "[0, 10]")
        check_range("data.augment.num_ops", self.num_ops, "[0, inf)")
        check_range("data.augment.mixup", self.mixup, "[0, inf)")
        check_range("data.augment.cutmix", self.cutmix, "[0, inf)")

    @property
    def fixed(self) -> bool:
        """Whether an image looks the same in every epoch."""
        return self.name == "none" and not (self.transforms or self.erasing or self.mixup or self.cutmix)


@functools.cache
def _normalisation(recipe: EvalRecipe) -> NDArray[np.float32]:
    """Return the table (1, 256, 3) that maps a byte of each channel to its normalised value."""
    levels = np.arange(256, dtype=np.float64)[:, None] / 255
    return ((levels - recipe.mean) / recipe.std).astype(np.float32)[None]


def _normalise(image: NDArray[np.uint8], recipe: EvalRecipe) -> Tensor:
    """Map uint8 (S, S, 3) to float32 (3, S, S); the memory stays (S, S, 3), which is channels_last."""
    return torch.from_numpy(cv2.LUT(image, _normalisation(recipe))).permute(2, 0, 1)


def _resize(image: NDArray[np.uint8], height: int, width: int, interpolation: str) -> NDArray[np.uint8]:
    """Return ``image`` (H, W, 3) in another size, without aliasing, as Pillow does to two levels of 255."""
    if image.shape[:2] == (height, width):
        return image
    planes = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)[None]
    resized = functional.interpolate(
        planes, (height, width), mode=INTERPOLATIONS[interpolation], antialias=interpolation != "nearest"
    )
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """The eval recipe, timm's: resized until the shorter side fits, the centre square cut out, normalised.

    Of an image more than three times as long as wide only the middle is resized: a strip of 1,000,000 x 10 pixels
    needs no memory.
    """

    recipe: EvalRecipe

    @property
    def min_size(self) -> int:
        """Length in pixels of the shorter side that a decoded image should not fall below."""
        return self.recipe.resize_size

    def crop(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the network's view of ``image`` (H, W, 3) as uint8 (S, S, 3), before normalisation."""
        size, shorter = self.recipe.resize_size, min(image.shape[:2])
        image = _centre(image, _LONGEST * shorter)
        height, width = (size * side // shorter for side in image.shape[:2])
        return _centre(_resize(image, height, width, self.recipe.interpolation), self.recipe.image_size)

    def __call__(self, image: NDArray[np.uint8]) -> Tensor:
        """Map uint8 (H, W, 3) to float32 (3, S, S)."""
        return _normalise(self.crop(image), self.recipe)


def _centre(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Return the middle of ``image`` (H, W, 3), no side of it longer than ``size``."""
    top, left = (max(0, round((side - size) / 2)) for side in image.shape[:2])
    return image[top : top + size, left : left + size]


class _RandomResizedCrop(A.RandomResizedCrop):  # type: ignore[misc]
    """A random crop that is resized as the eval recipe resizes."""

    def __init__(self, size: int, min_scale: float, interpolation: str) -> None:
        super().__init__(size=(size, size), scale=(min_scale, 1.0))
        self._mode = interpolation

    def apply(self, img: NDArray[np.uint8], crop_coords: tuple[int, int, int, int], **params: Any) -> Any:
        """Crop and resize."""
        left, top, right, bottom = crop_coords
        return _resize(img[top:bottom, left:right], self.size[0], self.size[1], self._mode)


class TrainTransform:
    """The training recipe.

    Args:
        augment: What to do to an image.
        recipe: Interpolation, mean and std; and the whole geometry for ``augment.name == "none"``.
        image_size: S, in pixels.

    Raises:
        UserError: ``augment.transforms`` is no albumentations pipeline.
    """

    def __init__(self, augment: AugmentSettings, recipe: EvalRecipe, image_size: int) -> None:
        self.recipe = dataclasses.replace(recipe, image_size=image_size)
        self._view = EvalTransform(self.recipe) if augment.name == "none" else None
        # A crop that keeps the least area must still hold as many pixels as the input has.
        scale = 1.0 if augment.name == "none" else math.sqrt(augment.min_scale)
        self.min_size = self._view.min_size if self._view else math.ceil(image_size / scale)
        steps: list[Any] = []
        if self._view is None:
            steps.append(_RandomResizedCrop(image_size, augment.min_scale, recipe.interpolation))
            if augment.hflip:
                steps.append(A.HorizontalFlip(p=augment.hflip))
        if augment.transforms is not None:
            own = build_pipeline(augment.transforms)
            _try_out(own, image_size)
            steps += own
        else:
            steps += RECIPES[augment.name](augment)
        if augment.erasing:
            steps.append(A.Erasing(scale=(0.02, 0.33), ratio=(0.3, 3.3), fill="random", p=augment.erasing))
        self._compose = A.Compose(steps)

    def augment(self, image: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
        """Return the augmented view of ``image`` (H, W, 3) as uint8 (S, S, 3), before normalisation."""
        if self._view is not None:
            image = self._view.crop(image)
        self._compose.set_random_seed(seed)
        augmented: NDArray[np.uint8] = self._compose(image=image)["image"]
        return augmented

    def __call__(self, image: NDArray[np.uint8], seed: int) -> Tensor:
        """Map uint8 (H, W, 3) to float32 (3, S, S), drawing from ``seed`` alone."""
        return _normalise(self.augment(image, seed), self.recipe)

    def at(self, epoch: int) -> TrainTransform:
        """Return what transforms the images of an epoch."""
        return self


class ProgressiveTransform(TrainTransform):
    """The training recipe at a size that changes with the epoch (progressive resizing, Howard 2018).

    Args:
        augment: As of `TrainTransform`.
        recipe: As of `TrainTransform`.
        sizes: Pairs of an epoch, counted from 0, and the size in pixels that holds from then on, in order.
    """

    def __init__(self, augment: AugmentSettings, recipe: EvalRecipe, sizes: Sequence[tuple[int, int]]) -> None:
        super().__init__(augment, recipe, max(size for _, size in sizes))  # what decoding must keep
        self._stages = [(start, TrainTransform(augment, recipe, size)) for start, size in sizes]

    def at(self, epoch: int) -> TrainTransform:
        """Return what transforms the images of an epoch."""
        return [stage for start, stage in self._stages if epoch >= start][-1]


def build_mix(augment: AugmentSettings, num_classes: int) -> Any:
    """Return MixUp, CutMix, or one of them at a time; None where neither is asked for.

    It maps images (B, 3, S, S) and targets (B,) to images and target probabilities (B, K).
    """
    if not augment.mixup and not augment.cutmix:
        return None
    from torchvision.transforms import v2

    kinds = [(v2.MixUp, augment.mixup), (v2.CutMix, augment.cutmix)]
    mixes = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]
    return v2.RandomChoice(mixes) if len(mixes) > 1 else mixes[0]


def _try_out(steps: list[Any], size: int) -> None:
    """Refuse steps that do not map an image to an image of the same size, before a loader worker meets them.

    Raises:
        UserError: One of them raises, resizes, normalises, or makes a tensor.
    """
    image: Any = np.tile(np.linspace(0, 255, size, dtype=np.uint8)[:, None, None], (1, size, 3))
    for number, step in enumerate(steps):
        for part in _alternatives(step):
            here, name = f"data.augment.transforms[{number}]", type(part).__name__
            probability, part.p = part.p, 1.0  # what is rarely drawn is tried too
            for seed in range(8):
                try:
                    result = A.Compose([part], seed=seed)(image=image)["image"]
                except Exception as error:
                    raise UserError(f"{here}: {name} fails on an image: {error}") from None
                if getattr(result, "dtype", None) != np.uint8 or result.shape != image.shape:
                    raise UserError(
                        f"{here}: {name} must map uint8 {image.shape} to the same; got {type(result).__name__} of "
                        f"{getattr(result, 'dtype', None)} {tuple(getattr(result, 'shape', ()))} (resizing and "
                        "normalisation are done for you)"
                    )
            part.p = probability


def _alternatives(step: Any) -> list[Any]:
    """Return the steps of which a choice such as ``OneOf`` may take one alone; else the step itself."""
    if not isinstance(step, A.BaseCompose) or isinstance(step, A.Sequential | A.Compose):
        return [step]
    return [part for inner in step.transforms for part in _alternatives(inner)]


def build_pipeline(steps: Sequence[Any], where: str = "data.augment.transforms") -> list[Any]:
    """Build albumentations from plain data.

    Args:
        steps: Each a name, or ``{name: {argument: value}}``; ``OneOf``, ``SomeOf`` and ``Sequential`` take a list of
            the same under ``transforms``.
        where: The key, for the error.

    Raises:
        UserError: A name or an argument that albumentations does not know.
    """
    if not isinstance(steps, list | tuple):
        raise UserError(f"{where}: expected a list of transforms, got {steps!r}")
    built = []
    for number, step in enumerate(steps):
        here = f"{where}[{number}]"
        name, arguments = next(iter(step.items())) if isinstance(step, dict) and len(step) == 1 else (step, {})
        if not isinstance(name, str) or not isinstance(arguments, dict | None):
            raise UserError(f"{here}: expected a name or {{name: {{argument: value}}}}, got {step!r}")
        kind = getattr(A, name, None)
        if not (isinstance(kind, type) and issubclass(kind, A.BasicTransform | A.BaseCompose)):
            raise UserError(f"{here}: albumentations has no {name!r}{did_you_mean(name, A.__dict__)}")
        arguments = dict(arguments or {})
        if "transforms" in arguments:
            arguments["transforms"] = build_pipeline(arguments["transforms"], f"{here}.{name}.transforms")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # albumentations only warns of an argument that it does not know
                built.append(kind(**arguments))
        except Exception as error:
            raise UserError(f"{here}: {name} refuses its arguments: {error}") from None
    return built

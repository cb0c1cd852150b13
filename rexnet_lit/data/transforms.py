"""From a decoded image to the network's input: uint8 (H, W, 3) RGB in, float32 (3, S, S) out.

Validation, test, prediction and export use `EvalTransform`. `TrainTransform` augments; its random numbers depend only
on the seed it is given, so that workers and epochs never repeat each other's (albumentations 2.0.8 alone does).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import albumentations as A  # noqa: N812
import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from rexnet_lit.data import decode
from rexnet_lit.data.augmentation import AUTO, MIRRORED, RECIPES, AugmentSettings, build_pipeline, check_pipeline
from rexnet_lit.data.settings import INTERPOLATIONS, CropMode, EvalRecipe
from rexnet_lit.utils.errors import UserError

_LONGEST = 3  # times the shorter side; of a longer image, only what the crop shows is resized


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
    """The eval recipe, timm's: resized as its ``crop_mode`` says, the centre square cut out or padded, normalised."""

    recipe: EvalRecipe

    @property
    def min_size(self) -> int:
        """Length in pixels of the shorter side that a decoded image should not fall below."""
        return self.recipe.resize_size

    def crop(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the network's view of ``image`` (H, W, 3) as uint8 (S, S, 3), before normalisation."""
        recipe, size = self.recipe, self.recipe.resize_size
        if recipe.crop_mode == "squash":
            return _centre(_resize(image, size, size, recipe.interpolation), recipe.image_size)
        if recipe.crop_mode == "border":
            ratio = max(image.shape[:2]) / size
            height, width = (max(1, round(side / ratio)) for side in image.shape[:2])
            return _pad(_centre(_resize(image, height, width, recipe.interpolation), recipe.image_size), recipe)
        shorter = min(image.shape[:2])
        height, width = (size * side // shorter for side in image.shape[:2])
        if max(height, width) > _LONGEST * size:
            return _resize_centre(image, height, width, recipe)
        return _centre(_resize(image, height, width, recipe.interpolation), recipe.image_size)

    def __call__(self, image: NDArray[np.uint8] | Image.Image) -> Tensor:
        """Map a PIL image, or uint8 (H, W, 3), to float32 (3, S, S)."""
        return _normalise(self.crop(_pixels(image)), self.recipe)


def _pixels(image: NDArray[np.uint8] | Image.Image) -> NDArray[np.uint8]:
    return decode.from_pil(image) if isinstance(image, Image.Image) else image


def _centre(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Return the middle of ``image`` (H, W, 3), no side of it longer than ``size``."""
    top, left = (max(0, round((side - size) / 2)) for side in image.shape[:2])
    return image[top : top + size, left : left + size]


def _pad(image: NDArray[np.uint8], recipe: EvalRecipe) -> NDArray[np.uint8]:
    """Return ``image`` (H, W, 3) in the middle of a square (S, S, 3) of the mean colour, as timm does."""
    square = np.empty((recipe.image_size, recipe.image_size, 3), np.uint8)
    square[:] = recipe.padding
    top, left = ((recipe.image_size - side) // 2 for side in image.shape[:2])
    square[top : top + image.shape[0], left : left + image.shape[1]] = image
    return square


def _resize_centre(image: NDArray[np.uint8], height: int, width: int, recipe: EvalRecipe) -> NDArray[np.uint8]:
    """Return the centre square of ``image`` resized to ``(height, width)``, without resizing the rest.

    Pillow can do that: a strip of 1,000,000 x 10 pixels needs no memory.
    """
    size = recipe.image_size
    scales = (image.shape[1] / width, image.shape[0] / height)
    starts = (max(0, round((side - size) / 2)) for side in (width, height))
    box = [scale * start for scale, start in zip(scales, starts, strict=True)]
    box += [min(box[i] + scales[i] * size, image.shape[1 - i]) for i in (0, 1)]
    filter_ = Image.Resampling[recipe.interpolation.upper()]
    return np.array(Image.fromarray(image).resize((size, size), filter_, box=tuple(box)))


class _RandomResizedCrop(A.RandomResizedCrop):  # type: ignore[misc]
    """A random crop that is resized as the eval recipe resizes.

    With ``border`` and ``squash`` it is drawn as from a square, so that it has about the proportions of the image, and
    then becomes a square as the image does in evaluation: every part of a long image is seen.
    """

    def __init__(self, size: int, min_scale: float, recipe: EvalRecipe) -> None:
        super().__init__(size=(size, size), scale=(min_scale, 1.0))
        mode: CropMode = "border" if recipe.crop_mode == "border" else "squash"
        self._of_any_shape = recipe.crop_mode != "center"
        self._fit = EvalTransform(dataclasses.replace(recipe, image_size=size, crop_pct=1.0, crop_mode=mode))

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the crop."""
        height, width = params["shape"][:2]
        if self._of_any_shape:
            side = max(height, width)
            ends = super().get_params_dependent_on_data({**params, "shape": (side, side)}, data)["crop_coords"]
            left, right = _scaled(ends[::2], width, side)
            top, bottom = _scaled(ends[1::2], height, side)
            return {"crop_coords": (left, top, right, bottom)}
        drawn: dict[str, Any] = super().get_params_dependent_on_data(params, data)
        if max(height, width) * self.scale[0] <= min(height, width) * self.ratio[1]:
            return drawn
        # No crop of this shape is as large as `min_scale` asks for. albumentations, like torchvision and timm, then
        # always takes the middle; the network would never see the ends.
        left, top, right, bottom = drawn["crop_coords"]
        x, y = (self.py_random.randint(0, last) for last in (width - (right - left), height - (bottom - top)))
        return {"crop_coords": (x, y, x + right - left, y + bottom - top)}

    def apply(self, img: NDArray[np.uint8], crop_coords: tuple[int, int, int, int], **params: Any) -> Any:
        """Crop and resize."""
        left, top, right, bottom = crop_coords
        return self._fit.crop(img[top:bottom, left:right])


def _scaled(ends: Sequence[int], side: int, of: int) -> tuple[int, int]:
    """Return a range of pixels of a side, drawn as a range of one of length ``of``; at least one pixel."""
    start = min(round(ends[0] * side / of), side - 1)
    return start, max(round(ends[1] * side / of), start + 1)


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
        self._arguments: tuple[Any, ...] = (augment, recipe, image_size)
        self.recipe = dataclasses.replace(recipe, image_size=image_size)
        self._view = EvalTransform(self.recipe) if augment.name == "none" else None
        # A crop that keeps the least area must still hold as many pixels as the input has.
        scale = 1.0 if augment.name == "none" else math.sqrt(augment.min_scale)
        self.min_size = self._view.min_size if self._view else math.ceil(image_size / scale)
        steps: list[Any] = []
        if self._view is None:
            steps.append(_RandomResizedCrop(image_size, augment.min_scale, recipe))
            if augment.hflip:
                steps.append(A.HorizontalFlip(p=MIRRORED if augment.hflip == AUTO else augment.hflip))
            if augment.vflip:
                steps.append(A.VerticalFlip(p=augment.vflip))
            if augment.quarter_turns:
                steps.append(A.RandomRotate90(p=augment.quarter_turns))
        if augment.transforms is not None:
            own = build_pipeline(augment.transforms)
            check_pipeline(own, image_size)
            steps += own
        else:
            steps += RECIPES[augment.name](augment)
        if augment.erasing:
            steps.append(A.Erasing(scale=(0.02, 0.33), ratio=(0.3, 3.3), fill="random", p=augment.erasing))
        self._compose = A.Compose(steps)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how to build it: a pickled pipeline of albumentations takes up to 35 kB, most of it random states."""
        return type(self), self._arguments

    def augment(self, image: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
        """Return the augmented view of ``image`` (H, W, 3) as uint8 (S, S, 3), before normalisation."""
        if self._view is not None:
            image = self._view.crop(image)
        # One stream for all steps: `set_random_seed` gives each the same, and an image would be rotated exactly when it
        # is flipped.
        self._compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
        augmented: NDArray[np.uint8] = self._compose(image=image)["image"]
        return augmented

    def __call__(self, image: NDArray[np.uint8] | Image.Image, seed: int | None = None) -> Tensor:
        """Map a PIL image, or uint8 (H, W, 3), to float32 (3, S, S).

        All random numbers depend on ``seed``; by default on torch's generator, which differs in each loader's worker.
        """
        seed = int(torch.randint(2**31, ())) if seed is None else seed
        return _normalise(self.augment(_pixels(image), seed), self.recipe)

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
        self._arguments = (augment, recipe, sizes)
        self._stages = [(start, TrainTransform(augment, recipe, size)) for start, size in sizes]

    def at(self, epoch: int) -> TrainTransform:
        """Return what transforms the images of an epoch."""
        return [stage for start, stage in self._stages if epoch >= start][-1]


class OwnTransform(TrainTransform):
    """A training transform of the user's own.

    Its random numbers, if they come from ``random``, NumPy, torch or albumentations, depend only on the seed.

    Args:
        transform: Maps uint8 (H, W, 3) to float32 (3, S, S), normalised: a function, or albumentations.
        recipe: The mean and std by which `augment` shows an image.
        image_size: S, in pixels.

    Raises:
        UserError: It does something else.
    """

    def __init__(self, transform: Callable[..., Any], recipe: EvalRecipe, image_size: int) -> None:
        self._arguments = (transform, recipe, image_size)
        self.transform, self.recipe = transform, dataclasses.replace(recipe, image_size=image_size)
        self.min_size = math.ceil(image_size / math.sqrt(0.08))  # of torchvision's and albumentations' random crop
        self(np.tile(np.linspace(0, 255, self.min_size, dtype=np.uint8)[:, None, None], (1, self.min_size, 3)), 0)

    def __call__(self, image: NDArray[np.uint8] | Image.Image, seed: int | None = None) -> Tensor:
        """Map a PIL image, or uint8 (H, W, 3), to float32 (3, S, S); see `TrainTransform`."""
        seed, size = int(torch.randint(2**31, ())) if seed is None else seed, self.recipe.image_size
        states = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                random.seed(seed)
                np.random.seed(seed)
                result = self._apply(_pixels(image), seed)
        except Exception as error:
            raise UserError(f"train_transform fails on an image: {type(error).__name__}: {error}") from error
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
        if not (isinstance(result, Tensor) and result.dtype == torch.float32 and result.shape == (3, size, size)):
            found = f"{getattr(result, 'dtype', '')} {tuple(getattr(result, 'shape', ()))}"
            raise UserError(
                f"train_transform must map uint8 (H, W, 3) to a float32 tensor (3, {size}, {size}); got "
                f"{type(result).__name__} {found}"
            )
        return result

    def _apply(self, image: NDArray[np.uint8], seed: int) -> Any:
        if not isinstance(self.transform, A.BasicTransform | A.BaseCompose):
            return self.transform(image)
        pipeline = self.transform if isinstance(self.transform, A.BaseCompose) else A.Compose([self.transform])
        pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
        return pipeline(image=image)["image"]

    def augment(self, image: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
        """Return what the network sees, without the normalisation, as uint8 (S, S, 3)."""
        pixels = self(image, seed).permute(1, 2, 0) * torch.tensor(self.recipe.std) + torch.tensor(self.recipe.mean)
        return (pixels * 255).round().clamp(0, 255).byte().numpy()


def checked(
    transform: Any, recipe: EvalRecipe, image_size: int, sizes: Sequence[tuple[int, int]] | None
) -> TrainTransform | EvalTransform:
    """Return a transform that a dataset can use: ours as it is, or one made from the user's own.

    Raises:
        UserError: The user's own does something else than `OwnTransform` needs, or there are sizes, which it ignores.
    """
    if isinstance(transform, TrainTransform | EvalTransform):
        return transform
    if sizes:
        raise UserError("data.size_schedule has no effect on your own train_transform; leave it out")
    return OwnTransform(transform, recipe, image_size)


def build_train_transform(
    augment: AugmentSettings, recipe: EvalRecipe, image_size: int, sizes: Sequence[tuple[int, int]] | None
) -> TrainTransform:
    """Return the training recipe, at sizes that change with the epoch if there are any."""
    return ProgressiveTransform(augment, recipe, sizes) if sizes else TrainTransform(augment, recipe, image_size)

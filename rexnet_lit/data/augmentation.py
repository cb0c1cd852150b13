"""What training does to an image: recipes by name, or albumentations pipelines written in YAML.

To add a recipe, write a function and enter it in `RECIPES`.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import albumentations as A  # noqa: N812
import numpy as np

from rexnet_lit.utils.errors import UserError, did_you_mean
from rexnet_lit.utils.settings import check_choice, check_range

AUTO: Final = "auto"
"""The value of `AugmentSettings.hflip` that leaves the choice to the fit."""
MIRRORED = 0.5
"""The probability of a horizontal flip where images may be mirrored."""
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
    """Apply ``num_ops`` random operations in RandAugment's ranges for the magnitude (as timm's "rand-m9")."""
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
"""Each maps the settings to the transforms that follow crop and flip; ``none`` has no crop and flip either."""

if not TYPE_CHECKING:
    RecipeName = Literal[tuple(RECIPES)]
else:
    RecipeName = str


@dataclasses.dataclass(frozen=True)
class AugmentSettings:
    """What training does to an image before the network sees it.

    Args:
        name: ``none`` (as in evaluation), ``light`` (crop and flip), ``medium`` (also small rotations and colour
            changes), ``heavy`` (stronger ones), ``randaugment`` (crop, flip and ``num_ops`` random operations; Cubuk
            et al. 2020).
        min_scale: Smallest share of the image's area that a random crop keeps.
        hflip: Probability of a horizontal flip. 0 where left and right matter: letters, signs. ``auto``: 0 where a
            classifier on the features of the untrained network recognises mirrored images worse, else 0.5.
        vflip: Probability of a vertical flip, for images without an upper side: from above, through a microscope.
        quarter_turns: Probability of a turn by 0, 90, 180 or 270 degrees at random, for images without a direction.
        num_ops: Operations per image of ``randaugment``.
        magnitude: Strength of each, 0 to 10.
        erasing: Probability that a rectangle is replaced by noise (Zhong et al. 2020).
        mixup: Alpha of MixUp, which blends pairs of images and their labels (Zhang et al. 2018); 0 for none.
        cutmix: Alpha of CutMix, which pastes a rectangle of another image (Yun et al. 2019); 0 for none. With both,
            each batch gets one of them at random.
        transforms: albumentations by name, instead of the recipe's own transforms after crop and flip, such as
            ``[{GaussianBlur: {p: 0.2}}, {Rotate: {limit: 10}}]``; in Python also as objects.
    """

    name: RecipeName = "light"
    min_scale: float = 0.6
    hflip: float | Literal["auto"] = MIRRORED
    vflip: float = 0.0
    quarter_turns: float = 0.0
    num_ops: int = 2
    magnitude: float = 9.0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    transforms: list[Any] | None = None

    def __post_init__(self) -> None:
        check_choice("data.augment.name", self.name, RECIPES)
        check_range("data.augment.min_scale", self.min_scale, "(0, 1]")
        if self.hflip != AUTO:
            check_range("data.augment.hflip", self.hflip, "[0, 1]", "or auto")
        check_range("data.augment.vflip", self.vflip, "[0, 1]")
        check_range("data.augment.quarter_turns", self.quarter_turns, "[0, 1]")
        if self.name == "none" and (self.vflip or self.quarter_turns):
            raise UserError("data.augment: vflip and quarter_turns have no effect with the name none; use light")
        check_range("data.augment.erasing", self.erasing, "[0, 1]")
        check_range("data.augment.magnitude", self.magnitude, "[0, 10]")
        check_range("data.augment.num_ops", self.num_ops, "[0, inf)")
        check_range("data.augment.mixup", self.mixup, "[0, inf)")
        check_range("data.augment.cutmix", self.cutmix, "[0, inf)")

    @property
    def chooses_hflip(self) -> bool:
        """Whether a fit has to choose the probability of a horizontal flip."""
        return self.hflip == AUTO and self.name != "none"

    @property
    def fixed(self) -> bool:
        """Whether an image looks the same in every epoch."""
        return self.name == "none" and not (self.transforms or self.erasing or self.mixup or self.cutmix)


def build_mix(augment: AugmentSettings, num_classes: int) -> Any:
    """Return MixUp, CutMix, or a random choice between them; None without either.

    It maps images (B, 3, S, S) and targets (B,) to images and target probabilities (B, K).
    """
    if not augment.mixup and not augment.cutmix:
        return None
    from torchvision.transforms import v2

    kinds = [(v2.MixUp, augment.mixup), (v2.CutMix, augment.cutmix)]
    mixes = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]
    return v2.RandomChoice(mixes) if len(mixes) > 1 else mixes[0]


def check_pipeline(steps: list[Any], size: int) -> None:
    """Check that each step maps an image to one of the same size, before the loader's workers run them.

    Raises:
        UserError: A step raises, resizes, normalises, or returns a tensor.
    """
    image: Any = np.tile(np.linspace(0, 255, size, dtype=np.uint8)[:, None, None], (1, size, 3))
    for number, step in enumerate(steps):
        for part in _alternatives(step):
            here, name = f"data.augment.transforms[{number}]", type(part).__name__
            probability, part.p = part.p, 1.0  # also run what has a low probability
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
    """Return the steps that a choice such as ``OneOf`` may run alone; for other steps the step itself."""
    if not isinstance(step, A.BaseCompose) or isinstance(step, A.Sequential | A.Compose):
        return [step]
    return [part for inner in step.transforms for part in _alternatives(inner)]


def build_pipeline(steps: Sequence[Any], where: str = "data.augment.transforms") -> list[Any]:
    """Build albumentations from plain types, or take them as they are.

    Args:
        steps: Each a name, ``{name: {argument: value}}``, or an object of albumentations. ``OneOf``, ``SomeOf`` and
            ``Sequential`` take such a list under ``transforms``.
        where: The key, for the error.

    Raises:
        UserError: albumentations does not have a name or an argument.
    """
    if not isinstance(steps, list | tuple):
        raise UserError(f"{where}: expected a list of transforms, got {steps!r}")
    built = []
    for number, step in enumerate(steps):
        here = f"{where}[{number}]"
        if isinstance(step, A.BasicTransform | A.BaseCompose):
            built.append(copy.deepcopy(step))  # the user's own stays as it is
            continue
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
                warnings.simplefilter("error")  # albumentations only warns about unknown arguments
                built.append(kind(**arguments))
        except Exception as error:
            raise UserError(f"{here}: {name} refuses its arguments: {error}") from None
    return built

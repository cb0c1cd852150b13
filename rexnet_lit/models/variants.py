"""timm's ReXNet variants: names, published weights, preprocessing."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import timm
import torch

from rexnet_lit.data.settings import CropMode, EvalRecipe
from rexnet_lit.utils.errors import UserError, did_you_mean

_FAMILIES = ["rexnet_*", "rexnetr_*"]

# Top-1 in percent at 224 and 288 px: timm's results/results-imagenet.csv, which is not in its wheel.
_TOP1 = {
    "rexnet_100.nav_in1k": "77.862",
    "rexnet_130.nav_in1k": "79.492",
    "rexnet_150.nav_in1k": "80.322",
    "rexnet_200.nav_in1k": "81.636",
    "rexnet_300.nav_in1k": "82.780",
    "rexnetr_200.sw_in12k_ft_in1k": "82.602 / 83.160",
    "rexnetr_300.sw_in12k_ft_in1k": "84.036 / 84.582",
}


def check_backbone(backbone: str) -> None:
    """Raise `UserError` unless ``backbone`` is a ReXNet of timm, with or without a tag."""
    names = timm.list_models(_FAMILIES)
    known = [*names, *timm.list_models(_FAMILIES, include_tags=True)]
    if backbone not in known:
        near = did_you_mean(backbone, known) or f"; known: {', '.join(names)}"
        raise UserError(f"model.backbone: no ReXNet is named {backbone!r}{near}")


def published_config(backbone: str) -> Any:
    """Return timm's ``pretrained_cfg`` of a ReXNet."""
    check_backbone(backbone)
    return timm.get_pretrained_cfg(backbone)


def eval_recipe(backbone: str, image_size: int | None = None, crop_mode: CropMode | None = None) -> EvalRecipe:
    """Return the preprocessing that ``backbone``'s weights were tested with.

    Args:
        backbone: timm's name; its ``pretrained_cfg`` decides.
        image_size: Height and width in pixels; by default the test size of the weights.
        crop_mode: How an image becomes a square; by default as the weights were tested.
    """
    return recipe_of(published_config(backbone), image_size, crop_mode)


def recipe_of(cfg: Any, image_size: int | None = None, crop_mode: CropMode | None = None) -> EvalRecipe:
    """Return the preprocessing of timm's ``pretrained_cfg``, with another image size or crop mode if given."""
    test_size = (cfg.test_input_size or cfg.input_size)[-1]
    return EvalRecipe(
        image_size=test_size if image_size is None else image_size,
        crop_pct=cfg.test_crop_pct or cfg.crop_pct,
        interpolation=cfg.interpolation,
        mean=tuple(cfg.mean),
        std=tuple(cfg.std),
        crop_mode=cfg.crop_mode or "center",
    ).with_crop_mode(crop_mode)


def train_size(backbone: str) -> int:
    """Return the height and width in pixels that ``backbone``'s weights were trained at."""
    return int(published_config(backbone).input_size[-1])


def published_names(backbone: str) -> tuple[str, ...]:
    """Return the class names of ``backbone``'s published weights, synonyms after commas."""
    from timm.data import imagenet_info

    subset = imagenet_info.infer_imagenet_subset(published_config(backbone).to_dict())
    return tuple(imagenet_info.ImageNetInfo(subset or "imagenet-1k").label_descriptions())


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of ``rexnet_lit models``.

    Args:
        name: timm's name.
        parameters: Count, with 1000 classes.
        multiply_adds: Count for one image at 224 px.
        features: Width of the pooled features.
        weights: Tags with published weights.
        top1: Published ImageNet top-1 in percent by tag, at 224 px (``/`` at 288 px).
    """

    name: str
    parameters: int
    multiply_adds: int
    features: int
    weights: tuple[str, ...]
    top1: dict[str, str]


def variants() -> list[Variant]:
    """Return all ReXNets of the installed timm, smallest first within each family."""
    from torch.utils.flop_counter import FlopCounterMode

    rows = []
    tagged = timm.list_pretrained(_FAMILIES)
    for name in sorted(timm.list_models(_FAMILIES), key=lambda n: re.split(r"_", n)):
        with torch.device("meta"):  # shapes only: no memory, no arithmetic
            network: Any = timm.create_model(name).eval()
            image = torch.empty(1, 3, 224, 224)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(image)
        weights = tuple(t.partition(".")[2] for t in tagged if t.partition(".")[0] == name)
        rows.append(
            Variant(
                name=name,
                parameters=sum(p.numel() for p in network.parameters()),
                multiply_adds=counter.get_total_flops() // 2,  # it counts a multiply-add as two
                features=network.num_features,
                weights=weights,
                top1={tag: _TOP1[f"{name}.{tag}"] for tag in weights if f"{name}.{tag}" in _TOP1},
            )
        )
    return rows

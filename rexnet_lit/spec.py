"""What a model is, in plain types: the one truth that checkpoint, prediction and export share.

A `ModelSpec` travels inside every ``.ckpt`` and ``.safetensors`` file as JSON. It holds everything that turns an
image into a named probability, and nothing that says where or by whom the model was trained.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, Literal, TypeVar, get_args

from rexnet_lit.errors import UserError

__all__ = [
    "FORMAT_VERSION",
    "MAX_BAD_FRACTION",
    "MAX_IMAGE_SIZE",
    "DataRecord",
    "EvalRecipe",
    "HeadSpec",
    "Interpolation",
    "ModelSpec",
]

FORMAT_VERSION = 1
"""Raised when a file written today could not be read right by yesterday's code."""

MAX_IMAGE_SIZE = 4096
"""Pixels a side: above what any memory trains on."""

MAX_BAD_FRACTION = 0.05
"""Above this share of unreadable files something else is wrong than a few files."""

_MAX_CLASSES = 200_000  # of a model file: more would fill the memory with a head

T = TypeVar("T")
Interpolation = Literal["bicubic", "bilinear", "nearest"]
Pool = Literal["avg", "max", "avgmax"]


def settings_of(kind: type[T], value: T | str | dict[str, Any]) -> T:
    """Return ``value`` as settings: in Python a name stands for its defaults, and a mapping for its fields."""
    if isinstance(value, str):
        return kind(name=value)  # type: ignore[call-arg]
    return kind(**value) if isinstance(value, dict) else value


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
class HeadSpec:
    """What stands between the backbone's features and the logits.

    Args:
        name: ``linear`` (timm's own), ``mlp`` (hidden layers before it), or ``cosine`` (the angle between features and
            a class's vector, over a temperature; Gidaris and Komodakis 2018).
        hidden: Width of the hidden layers of ``mlp``.
        dropout: Share of features dropped before each linear layer while training.
        layers: Number of hidden layers of ``mlp``.
        temperature: What the cosine, from -1 to 1, is divided by.
        pool: How the feature map becomes features: its average, its maximum, or the mean of both (``avgmax``).
    """

    name: Literal["linear", "mlp", "cosine"] = "linear"
    hidden: int = 512
    dropout: float = 0.2
    layers: int = 1
    temperature: float = 0.05
    pool: Pool = "avg"

    @property
    def shape(self) -> tuple[object, ...]:
        """What makes two heads the same function of the same tensors; dropout does not."""
        own = {"mlp": (self.hidden, self.layers), "cosine": (self.temperature,)}
        return self.name, self.pool, *own.get(self.name, ())

    def __post_init__(self) -> None:
        if self.pool not in get_args(Pool):
            raise UserError(f"model.head.pool is {self.pool!r}; expected one of {', '.join(get_args(Pool))}")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"model.head.temperature is {self.temperature}; expected above 0, such as 0.05")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.head.dropout is {self.dropout}; expected a fraction from 0 to below 1")
        for key, most in (("hidden", 65_536), ("layers", 16)):
            if not 1 <= getattr(self, key) <= most:
                raise UserError(f"model.head.{key} is {getattr(self, key)}; expected 1 to {most}")


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A classifier's description.

    Args:
        backbone: timm's model name, with its pretrained tag where it has one (``rexnet_100.nav_in1k``).
        class_names: One name per logit, in the order of the logits.
        head: The head's kind and size.
        eval_recipe: The preprocessing of validation, test, prediction and export.
        format_version: The version of this description.
    """

    backbone: str
    class_names: tuple[str, ...]
    head: HeadSpec = HeadSpec()
    eval_recipe: EvalRecipe = EvalRecipe()
    format_version: int = FORMAT_VERSION

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return len(self.class_names)

    def to_json(self) -> str:
        """Return the description as JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str, where: str) -> ModelSpec:
        """Read a description that `to_json` wrote.

        Args:
            text: The JSON.
            where: The file it came from, for the error.

        Raises:
            UserError: It is not a description, or of a newer format.
        """
        try:
            raw: dict[str, Any] = json.loads(text)
            version = int(raw["format_version"])
            if version > FORMAT_VERSION:
                raise UserError(
                    f"{where}: model format {version} is newer than this rexnet_lit reads ({FORMAT_VERSION}); "
                    "upgrade with: pip install -U rexnet-lit"
                )
            recipe, head, names = dict(raw["eval_recipe"]), dict(raw["head"]), raw["class_names"]
            recipe["mean"], recipe["std"] = tuple(recipe["mean"]), tuple(recipe["std"])
            counts = (recipe["image_size"], *(head[key] for key in ("hidden", "layers") if key in head))
            if not all(isinstance(count, int) and not isinstance(count, bool) for count in counts):
                raise TypeError("a size is no whole number")
            if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
                raise TypeError("class_names is no list of names")
            if not all(isinstance(head.get(key, ""), str) for key in ("name", "pool")) or version < 1:
                raise TypeError("a name is no text, or a format below 1")
            if not 0 < len(set(names)) == len(names) <= _MAX_CLASSES:
                raise ValueError(f"{len(names)} class names, {len(set(names))} of them different")
            return cls(
                backbone=str(raw["backbone"]),
                class_names=tuple(names),
                head=HeadSpec(**head),
                eval_recipe=EvalRecipe(**recipe),
                format_version=version,
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(f"{where}: its model description cannot be read ({error!r}); re-create the file") from None


@dataclasses.dataclass(frozen=True)
class DataRecord:
    """What a model file remembers of its dataset, so that `test` needs nothing else. All plain."""

    root: str | None = None
    split_file: str | None = None
    val_fraction: float = 0.2
    test_fraction: float = 0.0
    class_order: str = "sorted"
    follow_outside_links: bool = False
    num_folds: int = 0
    fold: int = 0
    group_pattern: str | None = None
    max_bad_fraction: float = dataclasses.field(default=MAX_BAD_FRACTION, compare=False)
    """Not compared: it does not say who is in which split."""

    def __post_init__(self) -> None:
        texts = [self.class_order, *(t for t in (self.root, self.split_file, self.group_pattern) if t is not None)]
        numbers = (self.val_fraction, self.test_fraction, self.num_folds, self.fold, self.max_bad_fraction)
        if not all(isinstance(t, str) for t in texts) or not all(isinstance(n, int | float) for n in numbers):
            raise TypeError(f"not the record of a dataset: {self}")

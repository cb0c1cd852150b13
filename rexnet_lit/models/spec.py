"""What a model is, in plain types: the one truth that checkpoint, prediction and export share.

A `ModelSpec` travels inside every ``.ckpt`` and ``.safetensors`` file as JSON. It holds everything that turns an
image into a named probability, and nothing that says where or by whom the model was trained.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, Literal, get_args

from rexnet_lit.data.settings import EvalRecipe
from rexnet_lit.utils.errors import UserError

FORMAT_VERSION = 1
"""Raised when a file written today could not be read right by yesterday's code."""


_MAX_CLASSES = 200_000  # of a model file: more would fill the memory with a head

Pool = Literal["avg", "max", "avgmax"]


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
    eval_recipe: EvalRecipe = EvalRecipe()  # noqa: RUF009 (frozen)
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

"""The description of a model in plain types, shared by checkpoints, prediction and export.

A `ModelSpec` is stored in every ``.ckpt`` and ``.safetensors`` file as JSON. It holds everything that maps an image to
class probabilities, and nothing about where or by whom the model was trained.
"""

from __future__ import annotations

import dataclasses
import json
import unicodedata
from typing import Any

from rexnet_lit.data.settings import EvalRecipe
from rexnet_lit.models.heads import HeadSpec
from rexnet_lit.models.limits import Limits, plain
from rexnet_lit.utils.errors import UserError

FORMAT_VERSION = 2
"""Increased when older code could not read a file written today, or would leave out a part of it: 2 has limits."""

_MAX_CLASSES = 200_000  # in a model file: more would fill the memory with a head


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A classifier's description.

    Args:
        backbone: timm's model name, with or without a pretrained tag (``rexnet_100.nav_in1k``).
        class_names: One name per logit, in the order of the logits.
        head: The head's settings.
        eval_recipe: The preprocessing of validation, test, prediction and export.
        format_version: The version of this description.
        network: The class of a user's own network; None for a ReXNet.
        assumed_preprocessing: Whether it was trained with the user's own loaders, of which ``eval_recipe`` is assumed.
        limits: How far its answers can be relied on; None in files of older versions, and where validation images were
            missing or few.
    """

    backbone: str
    class_names: tuple[str, ...]
    head: HeadSpec = HeadSpec()  # noqa: RUF009 (frozen, as is the next)
    eval_recipe: EvalRecipe = EvalRecipe()  # noqa: RUF009
    format_version: int = FORMAT_VERSION
    network: str | None = None
    assumed_preprocessing: bool = False
    limits: Limits | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:  # as the data's names
        names = tuple(unicodedata.normalize("NFC", name) for name in self.class_names)
        object.__setattr__(self, "class_names", names)

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return len(self.class_names)

    def to_json(self) -> str:
        """Return the description as JSON."""
        return json.dumps(dataclasses.asdict(self), default=plain)

    @classmethod
    def from_json(cls, text: str, where: str) -> ModelSpec:
        """Read a description that `to_json` wrote.

        Args:
            text: The JSON.
            where: The file it came from, for the error.

        Raises:
            UserError: It is not a description, or has a newer format.
        """
        try:
            raw: dict[str, Any] = json.loads(text)
            version = int(raw["format_version"])
            if version <= FORMAT_VERSION:
                return cls._from_plain(raw, version)
        except UserError as error:
            raise UserError(f"{where}: its model description is invalid ({error}); export the file again") from None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(f"{where}: its model description is invalid ({error!r}); export the file again") from None
        raise UserError(
            f"{where}: model format {version} is newer than this rexnet_lit reads ({FORMAT_VERSION}); "
            "upgrade with: pip install -U rexnet-lit"
        )

    @classmethod
    def _from_plain(cls, raw: dict[str, Any], version: int) -> ModelSpec:
        recipe, head, names = dict(raw["eval_recipe"]), dict(raw["head"]), raw["class_names"]
        recipe["mean"], recipe["std"] = tuple(recipe["mean"]), tuple(recipe["std"])
        sizes = [recipe["image_size"], *(head[key] for key in ("hidden", "layers") if key in head)]
        if not all(type(size) is int for size in sizes) or version < 1:
            raise TypeError("a size is not an integer, or the format is below 1")
        if not isinstance(raw["backbone"], str):
            raise TypeError("backbone is not a name")
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise TypeError("class_names is not a list of names")
        if not 0 < len(set(names)) == len(names) <= _MAX_CLASSES:
            raise ValueError(f"{len(names)} class names, {len(set(names))} of them different")
        return cls(
            backbone=raw["backbone"],
            class_names=tuple(names),
            head=HeadSpec(**head),
            eval_recipe=EvalRecipe(**recipe),
            format_version=version,
            network=None if raw.get("network") is None else str(raw["network"]),
            assumed_preprocessing=bool(raw.get("assumed_preprocessing", False)),
            limits=None if raw.get("limits") is None else Limits.from_plain(raw["limits"], len(names)),
        )

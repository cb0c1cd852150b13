"""Heads: the layers that map the pooled features to logits.

To add a head, write a function and name it in `HEADS`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, get_args

from torch import Tensor, nn
from torch.nn import functional

from rexnet_lit.utils.settings import check_choice, check_range


def _linear(in_features: int, num_classes: int, head: HeadSpec) -> nn.Module:
    return nn.Linear(in_features, num_classes)


def _mlp(in_features: int, num_classes: int, head: HeadSpec) -> nn.Module:
    widths = [in_features, *[head.hidden] * head.layers]
    hidden = [
        layer
        for narrow, wide in itertools.pairwise(widths)
        for layer in (nn.Linear(narrow, wide), nn.SiLU(), nn.Dropout(head.dropout))
    ]
    return nn.Sequential(*hidden, nn.Linear(head.hidden, num_classes))


class _Cosine(nn.Linear):
    """Maps features to the cosines of their angles with K vectors, divided by a temperature."""

    def __init__(self, in_features: int, num_classes: int, temperature: float) -> None:
        super().__init__(in_features, num_classes, bias=False)
        self.temperature = temperature

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C) to (B, K)."""
        return functional.linear(functional.normalize(features), functional.normalize(self.weight)) / self.temperature


def _cosine(in_features: int, num_classes: int, head: HeadSpec) -> nn.Module:
    return _Cosine(in_features, num_classes, head.temperature)


HEADS: dict[str, Callable[[int, int, HeadSpec], nn.Module]] = {"linear": _linear, "mlp": _mlp, "cosine": _cosine}
"""Each takes the width of the pooled features, K and the settings; the module maps features (B, C) to logits (B, K)."""

Pool = Literal["avg", "max", "avgmax"]

if not TYPE_CHECKING:
    HeadName = Literal[tuple(HEADS)]  # for jsonargparse, which would follow an `if TYPE_CHECKING`
else:
    HeadName = str


@dataclasses.dataclass(frozen=True)
class HeadSpec:
    """The settings of a head, from the backbone's feature map to the logits.

    Args:
        name: ``linear`` (timm's own), ``mlp`` (with hidden layers), or ``cosine`` (the angle between features and
            a class's vector, divided by a temperature; Gidaris and Komodakis 2018).
        hidden: Width of the hidden layers of ``mlp``.
        dropout: Share of features dropped before each linear layer during training.
        layers: Number of hidden layers of ``mlp``.
        temperature: Divides the cosine, which lies between -1 and 1.
        pool: How the feature map is pooled: its average, its maximum, or the mean of both (``avgmax``).
    """

    name: HeadName = "linear"
    hidden: int = 512
    dropout: float = 0.2
    layers: int = 1
    temperature: float = 0.05
    pool: Pool = "avg"

    def __post_init__(self) -> None:
        check_choice("model.head.name", self.name, HEADS)
        check_choice("model.head.pool", self.pool, get_args(Pool))
        check_range("model.head.temperature", self.temperature, "(0, inf)")
        check_range("model.head.dropout", self.dropout, "[0, 1)")
        check_range("model.head.hidden", self.hidden, "[1, 65536]", whole=True)
        check_range("model.head.layers", self.layers, "[1, 16]", whole=True)

    @property
    def shape(self) -> tuple[object, ...]:
        """What two heads must share to be the same function of the same tensors; dropout is not part of it."""
        own = {"mlp": (self.hidden, self.layers), "cosine": (self.temperature,)}
        return self.name, self.pool, *own.get(self.name, ())

"""Heads: what maps the pooled features to logits."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from rexnet_lit.models.spec import HeadSpec


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
    """Maps features to the cosines of their angles with K vectors, over a temperature."""

    def __init__(self, in_features: int, num_classes: int, temperature: float) -> None:
        super().__init__(in_features, num_classes, bias=False)
        self.temperature = temperature

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C) to (B, K)."""
        return functional.linear(functional.normalize(features), functional.normalize(self.weight)) / self.temperature


def _cosine(in_features: int, num_classes: int, head: HeadSpec) -> nn.Module:
    return _Cosine(in_features, num_classes, head.temperature)


HEADS: dict[str, Callable[[int, int, HeadSpec], nn.Module]] = {"linear": _linear, "mlp": _mlp, "cosine": _cosine}
"""Each takes the pooled features' width, K and the head's settings; it maps features (B, C) to logits (B, K)."""

"""What the exported graphs have in common.

A graph takes float32 RGB images (B, 3, S, S) from 0 to 1, the centre square that `predictor.Classifier.view` returns,
and returns probabilities (B, K): normalisation and softmax are inside. Class names and the preprocessing are in its
metadata.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rexnet_lit.models.predictor import Classifier

Check: TypeAlias = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Maps images (B, 3, S, S) to probabilities (B, K), computed by the written file."""

Writer: TypeAlias = Callable[[Classifier, Path, Tensor, Path], Check]
"""Takes a classifier, its own file, example images (N, 3, S, S) from 0 to 1 and the path to write to."""

BATCH = {"images": {0: torch.export.Dim("batch")}}
"""The dynamic shapes of a graph: any number of images."""


class Deployed(nn.Module):
    """A network that maps images from 0 to 1 to probabilities."""

    def __init__(self, classifier: Classifier, network: nn.Module | None = None) -> None:
        super().__init__()
        recipe = classifier.spec.eval_recipe
        self.network = (network or classifier.network).cpu().to(memory_format=torch.contiguous_format)
        self.mean = nn.Buffer(torch.tensor(recipe.mean).view(1, 3, 1, 1))
        self.std = nn.Buffer(torch.tensor(recipe.std).view(1, 3, 1, 1))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, S, S) to (B, K)."""
        return cast(Tensor, self.network((images - self.mean) / self.std)).softmax(1)

    @torch.no_grad()
    def check(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map arrays, as a `Check`."""
        return cast("NDArray[np.float32]", self(torch.from_numpy(images)).numpy())


def metadata(classifier: Classifier) -> dict[str, str]:
    """Return what a graph carries about itself."""
    return {
        "rexnet_lit": classifier.spec.to_json(),
        "class_names": json.dumps(classifier.class_names),
        "input": "float32 RGB (B, 3, S, S) from 0 to 1, centre square; output: probabilities (B, K)",
    }

"""What the report shows of a mistake: where the evidence for the answer is, and the training images nearest to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from rexnet_lit.data import decode, quarantine, verify
from rexnet_lit.data.datamodule import ImageFolderDataModule
from rexnet_lit.data.folder import Samples
from rexnet_lit.data.image_header import DecodeError
from rexnet_lit.data.splits import draw_evenly
from rexnet_lit.models import rexnet
from rexnet_lit.models.predictor import Classifier
from rexnet_lit.report.html import draw_heat
from rexnet_lit.report.test_page import Evidence
from rexnet_lit.training.features import embedder
from rexnet_lit.training.module import RexNetModule

MOST = 2000
"""Training images that are compared, at most: they take as long as testing so many more."""

_NEAREST = 3

Embedded = tuple[Samples, Tensor]
"""Images, and their features (N, C), of length 1."""


def embed_training_images(module: RexNetModule, data: ImageFolderDataModule) -> Embedded | None:
    """Return at most `MOST` training images and their features, or None if there are no training images.

    In a distributed run, each process computes a share of the features.
    """
    train = data.splits().get("train")
    if train is None:
        return None
    drawn = train.take(draw_evenly(train.targets, MOST))
    bad = verify.find_unreadable(drawn)
    if len(drawn) - len(bad) < module.trainer.world_size:
        return None
    drawn = quarantine.without_bad(drawn, bad)
    return drawn, nn.functional.normalize(data.compute_features(drawn, embedder(module))[0])


def describe(embedded: Embedded | None, data: ImageFolderDataModule) -> str:
    """Return which training images are searched, in a sentence."""
    if embedded is None:
        return "There are no training images here to compare with."
    count, total = len(embedded[0]), len(data.splits()["train"])
    if total <= MOST:
        return f"All {count:,} training images were compared."
    return f"{count:,} of {total:,} training images were compared, of each class as many where it has enough."


def explainer(module: RexNetModule, root: Path, embedded: Embedded | None) -> Callable[[str], Evidence | None]:
    """Return a function from the path of an image below ``root`` to what is shown of it; None if it cannot be read."""
    with torch.inference_mode(False):  # Lightning tests in it, where there are no gradients
        network = rexnet.fuse_batchnorm(module.network).float()
        classifier = Classifier(module.spec, network, module.device)

    def explain(path: str) -> Evidence | None:
        try:
            image = decode.read(root / path, module.spec.eval_recipe.resize_size)
        except DecodeError:
            return None
        with torch.inference_mode(False):
            heat = draw_heat(classifier.view(image), classifier.explain(image))
        if embedded is None:
            return Evidence(heat, [])
        samples, features = embedded
        feature = torch.from_numpy(classifier.embed(image)[0])
        nearest = (features @ feature).topk(min(_NEAREST, len(samples))).indices.tolist()
        return Evidence(heat, [(samples.paths[i], int(samples.targets[i])) for i in nearest])

    return explain

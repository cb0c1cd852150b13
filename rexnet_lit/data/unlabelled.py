"""Images without labels: listed for a prediction, or to train on what a teacher says of them (``data.unlabelled``)."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from rexnet_lit.data import quarantine, verify
from rexnet_lit.data.dataset import Batch, ImageDataset
from rexnet_lit.data.folder import Samples, list_images
from rexnet_lit.data.sampler import BatchKey
from rexnet_lit.data.walk import PathList
from rexnet_lit.utils.errors import UserError


class JointDataset(Dataset[Batch]):
    """Images with labels, and after them images without, whose targets are -1: a batch holds the former first.

    Args:
        labelled: The images with labels.
        others: The images without.
    """

    def __init__(self, labelled: ImageDataset, others: ImageDataset) -> None:
        self._parts = (labelled, others)

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    @property
    def samples(self) -> Samples:
        """All images."""
        labelled, others = (part.samples for part in self._parts)
        targets = np.concatenate([labelled.targets, others.targets])
        return Samples(labelled.root, PathList.join([labelled.paths, others.paths]), targets)

    def __getitem__(self, batch: BatchKey) -> Batch:
        first, batches = 0, []
        for part in self._parts:
            own = (first <= batch.indices) & (batch.indices < first + len(part))
            if own.any():  # MixUp then blends neither kind with the other
                inputs, targets, indices = part[BatchKey(batch.epoch, batch.indices[own] - first, batch.draws[own])]
                batches.append((inputs, targets, indices + first))
            first += len(part)
        inputs, targets, indices = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
        return inputs, targets, indices


def find_bad(samples: Samples, limit: float) -> tuple[Samples, list[tuple[int, str]]]:
    """Return the images with absolute paths, for they are not below ``data.root``; index and reason of the unreadable.

    Raises:
        UserError: These are more than the share ``limit``.
    """
    bad = verify.find_unreadable(samples)
    if len(bad) > limit * len(samples):
        where = f"{samples.root}: {len(bad)} of the {len(samples)} images of data.unlabelled"
        raise quarantine.too_many(where, samples.paths[bad[0][0]], bad[0][1], limit)
    paths = PathList([os.fsencode(samples.path(i)) for i in range(len(samples))])
    return Samples(samples.root, paths, samples.targets), bad


def require_teacher(trainer: Any) -> None:
    """Raise `UserError` unless the model that a trainer trains has a teacher; evaluations need none."""
    if trainer is not None and trainer.state.fn != "fit":
        return
    if getattr(getattr(trainer, "lightning_module", None), "teacher", None) is None:
        raise UserError(
            "data.unlabelled: only a teacher can tell what images without labels show; name a fine-tuned model of the "
            "same classes: --model.teacher MODEL"
        )


def without_labels(path: str | None, key: str) -> tuple[Samples | None, tuple[str, ...]]:
    """Return what `list_images` does of a setting as samples with the target -1, and the notes; None for no path."""
    if path is None:
        return None, ()
    try:
        folder, paths, notes = list_images(path)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    return Samples(folder, paths, np.full(len(paths), -1, np.int64)), notes

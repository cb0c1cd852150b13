"""Decoded images kept in memory, so that later epochs decode nothing."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from rexnet_lit.data.cache import decode_all
from rexnet_lit.data.dataset import ImageDataset
from rexnet_lit.data.sampler import uses_all_batches


def has_several_epochs(trainer: Any) -> bool:
    """Return whether a trainer reads all training images more than once."""
    if trainer is None or trainer.state.fn != "fit" or trainer.max_epochs == 1:
        return False
    return uses_all_batches(trainer.limit_train_batches)


def keep_in_memory(dataset: ImageDataset, limit: float, *, only_if_all_fit: bool) -> None:
    """Decode a dataset's images for all epochs.

    Args:
        dataset: The images.
        limit: Bytes to use, at most.
        only_if_all_fit: Keep none if a sample of the images is too large; else as many as fit, with a warning.
    """
    paths = [dataset.samples.path(i) for i in range(len(dataset))]
    if only_if_all_fit:
        sizes = [
            np.inf if image is None else image.nbytes
            for image in decode_all(paths[:: max(1, len(paths) // 64)], dataset.min_size, limit)
        ]
        if np.mean(sizes) * len(paths) > limit:
            return
    dataset.images = decode_all(paths, dataset.min_size, limit)
    missing = sum(image is None for image in dataset.images)
    if missing and not only_if_all_fit:
        warnings.warn(f"data.cache: {missing} of {len(paths)} images do not fit into the memory", stacklevel=2)

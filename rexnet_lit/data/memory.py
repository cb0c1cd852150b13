"""Decoded images kept in memory, so that later epochs decode nothing."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rexnet_lit.data.cache import Image, decode_all
from rexnet_lit.data.sampler import uses_all_batches
from rexnet_lit.utils import process
from rexnet_lit.utils.progress import progress

if TYPE_CHECKING:
    from rexnet_lit.data.dataset import ImageDataset

_PARTS = 16
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (Linux's; it may be small in a container)


class DecodedImages:
    """Images by index, in a few tensors.

    Forked workers of a loader inherit them. For others (on macOS and Windows, and from Python 3.14 on) torch moves the
    tensors to shared memory when the first worker starts, and passes their addresses: in the worker's pickle, the
    images would be copied through a pipe to each.

    Args:
        images: The images, uint8 (H, W, 3), or None; emptied to save memory.
    """

    def __init__(self, images: list[Image | None]) -> None:
        sizes = np.array([0 if image is None else image.nbytes for image in images], np.int64)
        starts = np.cumsum(sizes) - sizes
        parts = starts * _PARTS // max(1, int(sizes.sum()))  # moving one at a time needs little memory
        self._places = torch.zeros(len(images), 4, dtype=torch.int64)
        """The part, the first byte, height and width of each image; height 0 for None."""
        self._parts: list[torch.Tensor] = []
        for number in range(int(parts.max(initial=-1)) + 1):
            inside = np.flatnonzero(parts == number)
            self._parts.append(torch.empty(int(sizes[inside].sum()), dtype=torch.uint8))
            for index in inside.tolist():
                image, images[index] = images[index], None
                if image is not None:
                    first = int(starts[index] - starts[inside[0]])
                    self._places[index] = torch.tensor([number, first, *image.shape[:2]])
                    self._view(index)[:] = image

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Image | None:
        return self._view(index) if self._places[index, 2] else None

    def _view(self, index: int) -> Image:
        part, first, height, width = self._places[index].tolist()
        pixels: Image = self._parts[part].numpy()[first : first + height * width * 3]
        return pixels.reshape(height, width, 3)

    @property
    def nbytes(self) -> int:
        """Bytes of the images."""
        return sum(part.nbytes for part in self._parts)

    @property
    def missing(self) -> int:
        """Number of images that are None."""
        return int((self._places[:, 2] == 0).sum())

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes; no images if the shared memory is too small for them."""
        shared = not self._parts or self._parts[-1].is_shared()  # type: ignore[no-untyped-call]
        # Batches need some too. Where there is no such folder, the system's memory is the limit.
        if not shared and _SHARED_MEMORY.is_dir() and self.nbytes > shutil.disk_usage(_SHARED_MEMORY).free / 2:
            warnings.warn(
                f"data.cache: {_SHARED_MEMORY} is too small for the decoded images ({self.nbytes / 1e6:.0f} MB), so "
                "each epoch decodes them again; enlarge it, or set data.num_workers 0 or data.cache disk",
                stacklevel=2,
            )
            return {"_places": torch.zeros_like(self._places), "_parts": []}
        return self.__dict__


def _has_several_epochs(trainer: Any) -> bool:
    """Return whether a trainer reads all training images more than once."""
    if trainer is None or trainer.state.fn != "fit" or trainer.max_epochs == 1:
        return False
    return uses_all_batches(trainer.limit_train_batches)


def keep_in_memory(dataset: ImageDataset, trainer: Any, limit: float | None, *, auto: bool) -> None:
    """Decode a dataset's images for all epochs, unless that has been done.

    Args:
        dataset: The images.
        trainer: What trains on them, or None.
        limit: Bytes to use in all processes, at most; a share of the free memory by default.
        auto: Only if that saves time and all fit; else as many as fit, with a warning.
    """
    if dataset.images is not None or (auto and not _has_several_epochs(trainer)):
        return
    limit = process.available_memory() / (4 if auto else 2) if limit is None else limit
    limit /= trainer.world_size if trainer is not None else 1
    paths = [dataset.samples.path(i) for i in range(len(dataset))]
    if auto:
        sizes = [
            np.inf if image is None else image.nbytes
            for image in decode_all(paths[:: max(1, len(paths) // 64)], dataset.min_size, limit)
        ]
        if np.mean(sizes) * len(paths) > limit:
            return
    with progress(f"Reading {len(paths):,} images into memory"):
        dataset.images = DecodedImages(decode_all(paths, dataset.min_size, limit))
    missing = dataset.images.missing
    if missing and not auto:
        warnings.warn(f"data.cache: {missing} of {len(paths)} images do not fit into the memory", stacklevel=2)

"""Datasets that return whole batches: images or their features, the targets, and the images' indices."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from rexnet_lit.data import decode, image_header
from rexnet_lit.data.folder import Samples
from rexnet_lit.data.memory import DecodedImages
from rexnet_lit.data.sampler import BatchKey
from rexnet_lit.data.transforms import EvalTransform, TrainTransform
from rexnet_lit.data.walk import PathList
from rexnet_lit.utils.errors import UserError

Batch = tuple[Tensor, Tensor, Tensor]
"""Inputs, targets, and the indices (B,) of the images in the dataset."""


class ImageDataset(Dataset[Batch]):
    """Images by batch: a `BatchKey` in; (B, 3, S, S) float32, targets (B,) int64 and indices (B,) out.

    The images' memory format is channels_last.

    Args:
        samples: Paths and targets.
        transform: How an image becomes a tensor.
        seed: The run's seed.
        read: Reads a file: `decode.read`, or a cache's method.
        mix: MixUp or CutMix: maps images (B, 3, S, S) and targets (B,) to images and target probabilities (B, K).
    """

    def __init__(
        self,
        samples: Samples,
        transform: TrainTransform | EvalTransform,
        seed: int,
        read: Callable[[str, int], NDArray[np.uint8]] = decode.read,
        mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.samples, self.transform, self.seed = samples, transform, seed
        self._read, self.mix = read, mix
        self._tensors: tuple[Tensor, ...] | None = None
        self.images: DecodedImages | None = None
        """Decoded images by index (``data.cache``); None is read from its file."""
        self.min_size = transform.min_size
        """Pixels of the shorter side that decoding must keep, as `decode.read` takes it."""

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def images_bytes(self) -> int:
        """Bytes of decoded images in memory."""
        return 0 if self.images is None else self.images.nbytes

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes, and the samples as tensors: a worker gets these in shared memory, not in its pickle.

        A pickle that exceeds the buffer of a pipe, 64 kB, would have `multiprocessing` wait forever for a worker that
        has died, as those of a script without a main guard do.
        """
        if self._tensors is None:
            paths = self.samples.paths
            buffer = torch.from_numpy(np.frombuffer(paths.buffer, np.uint8).copy())
            self._tensors = (buffer, torch.from_numpy(paths.offsets), torch.from_numpy(self.samples.targets))
        return {**self.__dict__, "samples": self.samples.root}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the attributes."""
        buffer, offsets, targets = (tensor.numpy() for tensor in state["_tensors"])
        paths = PathList.from_buffer(buffer.tobytes(), offsets)
        self.__dict__.update(state, samples=Samples(state["samples"], paths, targets))

    def read(self, index: int) -> NDArray[np.uint8]:
        """Return image ``index`` as uint8 (H, W, 3).

        A training image that has become unreadable is replaced by the next one of its class.

        Raises:
            UserError: An evaluation image, or all of a class, have become unreadable.
        """
        image = None if self.images is None else self.images[index]
        if image is not None:
            return image
        path = self.samples.path(index)
        try:
            return self._read(path, self.min_size)
        except image_header.DecodeError as error:
            if isinstance(self.transform, EvalTransform):
                hint = "restore the file, or remove it and start again"
                raise UserError(f"{path}: can no longer be read ({error}); {hint}") from None
            replaced = "replaced by the next readable image of its class"
            warnings.warn(f"{path!r} can no longer be read ({error}); {replaced}", stacklevel=2)
        same = np.flatnonzero(self.samples.targets == self.samples.targets[index])
        for other in np.roll(same, -int(np.searchsorted(same, index)))[1:].tolist():
            with contextlib.suppress(image_header.DecodeError):
                return self._read(self.samples.path(other), self.min_size)
        raise UserError(f"{path}: no image of its class can be read any longer; restore the files")

    def _load(self, index: int, epoch: int, draw: int) -> Tensor:
        image = self.read(index)
        if isinstance(self.transform, EvalTransform):
            return self.transform(image)
        return self.transform.at(epoch)(image, self._seed(index, epoch, draw))

    def _seed(self, index: int, epoch: int, draw: int = 0) -> int:
        return int(np.random.SeedSequence((self.seed, epoch, index, draw)).generate_state(1)[0])

    def augmented(self, index: int, epoch: int) -> NDArray[np.uint8]:
        """Return a training image as the network sees it in an epoch, (S, S, 3), before normalisation."""
        transform = cast(TrainTransform, self.transform)
        return transform.at(epoch).augment(self.read(index), self._seed(index, epoch))

    def __getitem__(self, batch: BatchKey) -> Batch:
        if not isinstance(batch, BatchKey):
            raise UserError(
                "an ImageDataset is read by its own batch sampler, and another one is in its place: use "
                "limit_train_batches instead of overfit_batches, and the loader as train_dataloader() returns it"
            )
        drawn = zip(batch.indices.tolist(), batch.draws.tolist(), strict=True)
        images = [self._load(index, batch.epoch, draw) for index, draw in drawn]
        stacked = torch.stack([image.permute(1, 2, 0) for image in images])  # (B, S, S, 3): one contiguous copy
        inputs, targets = stacked.permute(0, 3, 1, 2), torch.from_numpy(self.samples.targets[batch.indices])
        indices = torch.from_numpy(batch.indices)
        if self.mix is None:
            return inputs, targets, indices
        seed = np.random.SeedSequence((self.seed, batch.epoch, *batch.indices.tolist())).generate_state(1)[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seed))
            mixed, probabilities = self.mix(inputs, targets.clamp(min=0))
        probabilities[targets < 0] = -1  # without labels, which are never mixed with others
        return mixed, probabilities, indices


class FeatureDataset(Dataset[Batch]):
    """Features instead of images: a `BatchKey` in; (B, C) float32, targets (B,) and indices (B,) out.

    Args:
        samples: Paths and targets.
        features: (V, N, C): the images' features in V views, which the epochs take in turn.
    """

    def __init__(self, samples: Samples, features: Tensor) -> None:
        self.samples, self.features = samples, features

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, batch: BatchKey) -> Batch:
        features = self.features[batch.epoch % len(self.features)]
        indices = torch.from_numpy(batch.indices)
        return features[indices], torch.from_numpy(self.samples.targets[batch.indices]), indices

"""How far a model's answers can be relied on: prediction sets, unsure answers, and strangers.

The numbers are fitted when training ends (`training.limits`) and kept in the model's description.

Sources: sets by split conformal prediction with the least ambiguous classifier (Sadinle et al., "Least Ambiguous
Set-Valued Classifiers with Bounded Error Levels", 2019; Angelopoulos and Bates, "A Gentle Introduction to Conformal
Prediction", 2021, https://arxiv.org/abs/2107.07511); strangers by class-conditional Mahalanobis distances (Lee et al.,
"A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks", 2018).
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rexnet_lit.utils.settings import check_range

Floats = NDArray[np.float32]

MAX_SCORES = 1000
"""Scores that a model file keeps, from which the sets of any coverage follow."""

COVERAGE = 0.9
"""The share of images whose set has the true class, where no other is asked for."""


@dataclass(frozen=True, eq=False)
class KnownFeatures:
    """Where the features of the training images are, to measure how far another image is from them.

    Args:
        center: Their mean, (C,).
        basis: Directions in which they vary most, (C, D), orthonormal; float16 in a new one, as in a file.
        whiten: Maps coordinates in these directions to ones of unit variance within a class, (D, D).
        means: The coordinates of each class's mean, so mapped, (K, D).
        residual: The squared distance from these directions per degree of freedom; 0 if there are no others.
        threshold: The distance that 95 % of validation images do not exceed.
    """

    center: Floats
    basis: Floats
    whiten: Floats
    means: Floats
    residual: float
    threshold: float = 1.0

    def distance(self, features: Floats) -> NDArray[np.float64]:
        """Return the distance of features (N, C) from the nearest class, (N,)."""
        found = np.empty(len(features))
        for start in range(0, len(features), 1024):
            found[start : start + 1024] = self._distance(features[start : start + 1024])
        return found

    @classmethod
    def from_plain(cls, raw: Mapping[str, Any], classes: int) -> KnownFeatures:
        """Read what `plain` and JSON have made of them; raise as `Limits.from_plain` does."""
        center, basis, whiten, means = (unpack(raw[name]) for name in ("center", "basis", "whiten", "means"))
        residual, threshold = float(raw["residual"]), float(raw["threshold"])
        (width,), (_, d) = center.shape, basis.shape
        fits = (basis.shape, whiten.shape, means.shape) == ((width, d), (d, d), (classes, d))
        if not fits or not np.isfinite([residual, threshold]).all() or threshold <= 0 or residual < 0:
            raise ValueError("what it knows is not finite, or of shapes that do not fit")
        return cls(center, basis, whiten, means, residual, threshold)

    def _distance(self, features: Floats) -> NDArray[np.float64]:
        offset = features.astype(np.float64) - self.center
        along = offset @ self.basis.astype(np.float64)
        white, means = along @ self.whiten, self.means.astype(np.float64)
        squares = (white**2).sum(1)[:, None] - 2 * white @ means.T + (means**2).sum(1)
        square = squares.min(1).clip(0)
        if self.residual:
            square += ((offset**2).sum(1) - (along**2).sum(1)).clip(0) / self.residual
        return np.asarray(np.sqrt(square))


@dataclass(frozen=True, eq=False)
class Limits:
    """What holds for a model's answers on images like those it was validated on.

    Args:
        images: Validation images from which the limits come.
        scores: 1 - the probability of the true class of these images, rising; of more than 1,000 every (N / 1,000)th.
        precision: The share of sure answers that is right, at least, with a confidence of 90 %.
        confidence: An answer with more is sure; None where no confidence is enough.
        known: What strangers are told by; None in a model whose every image was trained on.
    """

    images: int
    scores: Floats
    precision: float
    confidence: float | None
    known: KnownFeatures | None

    def least_probability(self, coverage: float = COVERAGE) -> float:
        """Return how probable a class must be to be in the set; 0 where there are too few images for the coverage.

        Args:
            coverage: The share of images whose set has the true class.

        Raises:
            UserError: It is not between 0 and 1.
        """
        check_range("coverage", coverage, "(0, 1)")
        rank = math.ceil((self.images + 1) * coverage - 1e-9)
        kept = kept_ranks(self.images)
        return 0.0 if rank > self.images else 1 - float(self.scores[np.searchsorted(kept, rank)])

    def sets(self, probs: Floats, coverage: float = COVERAGE) -> NDArray[np.bool_]:
        """Return which classes are in the set of each image, (N, K), for probabilities (N, K)."""
        # In float64, where 1 - (1 - p) is p again for a float32 p above 0.5, and for others nearly so.
        return probs.astype(np.float64) >= self.least_probability(coverage) - 1e-9

    def unsure(self, probs: Floats) -> NDArray[np.bool_]:
        """Return whether each answer is unsure, (N,), for probabilities (N, K)."""
        return np.asarray(probs.max(1) <= (1.0 if self.confidence is None else self.confidence))

    def strangeness(self, features: Floats) -> NDArray[np.float64]:
        """Return how strange images with features (N, C) are, (N,): 95 % of known images have 1 or less.

        NaN where it is not known what the model knows.
        """
        if self.known is None:
            return np.full(len(features), np.nan)
        return self.known.distance(features) / self.known.threshold

    @classmethod
    def from_plain(cls, raw: Mapping[str, Any], classes: int) -> Limits:
        """Read what `plain` and JSON have made of limits.

        Raises:
            ValueError: The numbers do not fit together; or TypeError or KeyError.
        """
        known = None if raw["known"] is None else KnownFeatures.from_plain(raw["known"], classes)
        confidence = None if raw["confidence"] is None else float(raw["confidence"])
        found = cls(int(raw["images"]), unpack(raw["scores"]), float(raw["precision"]), confidence, known)
        if not np.isfinite([found.precision, 0.0 if confidence is None else confidence]).all():
            raise ValueError("its limits are not finite")
        if found.images < 1 or found.scores.shape != kept_ranks(found.images).shape:
            raise ValueError(f"its limits have {found.scores.shape} scores of {found.images} images")
        return found


def kept_ranks(images: int) -> NDArray[np.int64]:
    """Return which of the sorted scores of so many images are kept: their ranks, from 1."""
    kept = min(images, MAX_SCORES)
    return -(-np.arange(1, kept + 1) * images // kept)


def plain(value: object) -> object:
    """Return an array as text, for JSON."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"a {type(value).__name__} is not for a model file")
    shape = "x".join(map(str, value.shape))
    return f"{value.dtype.str}:{shape}:{base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()}"


def unpack(text: str) -> Floats:
    """Return the array that `plain` wrote.

    Raises:
        ValueError: It is damaged, or holds anything but finite numbers.
    """
    dtype, shape, content = text.split(":")
    if dtype not in ("<f2", "<f4"):
        raise ValueError(f"an array of {dtype[:10]}")
    values = np.frombuffer(base64.b64decode(content, validate=True), dtype).astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("an array that is not finite")
    return values.reshape([int(size) for size in shape.split("x")])

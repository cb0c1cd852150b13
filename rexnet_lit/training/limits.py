"""Fits the limits of a model's answers (`models.limits`) on validation images.

All validation images are used, though they have also selected the weights and the temperature: of some hundred images a
part would give limits that vary more than this selection shifts them. The choice is among a few candidates, so the
shift is small: in docs/benchmarks.md less than what chance does in one run, and half of the images would cost more.

Sources: the threshold of sure answers is that of Angelopoulos et al., "Learn then Test", 2021
(https://arxiv.org/abs/2110.01052), for the guarantee of Geifman and El-Yaniv, "Selective Classification for Deep Neural
Networks", 2017; the covariance is that of Ledoit and Wolf, "A
Well-Conditioned Estimator for Large-Dimensional Covariance Matrices", 2004.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from rexnet_lit.models.limits import Floats, KnownFeatures, Limits, kept_ranks

MIN_IMAGES = 20
"""Validation images that it takes: of fewer, none is at the limit that 95 % pass."""

COMPONENTS = 32
"""Directions in which the features of known images are described, at most."""

_PASS = 0.95
_RISK = 0.1
"""The probability that sure answers are right less often than is asked for."""

_GROWTH = 1.1
"""Each set of answers that is tested is so many times as large as the one before."""


def fit_limits(
    probs: Floats, targets: NDArray[np.int64], features: Floats | None, known: KnownFeatures | None, precision: float
) -> Limits:
    """Return the limits of a model.

    Args:
        probs: Probabilities of validation images, (N, K).
        targets: Their classes, (N,).
        features: Their features, (N, C).
        known: What `fit_known` returned for training images; None, as the features, for limits without strangers.
        precision: The share of sure answers that should be right.
    """
    count, rank = len(targets), math.ceil((len(targets) + 1) * _PASS - 1e-9)
    scores = np.sort(1 - probs[np.arange(count), targets].astype(np.float64))[kept_ranks(count) - 1]
    sure = sure_confidence(probs.max(1), probs.argmax(1) == targets, precision)
    if known is not None and features is not None:
        distance = float(np.sort(known.distance(features))[min(rank, count) - 1])
        known = dataclasses.replace(known, threshold=max(distance, 1e-12))
    return Limits(count, scores.astype(np.float32), precision, sure, known)


def sure_confidence(confidence: Floats, right: NDArray[np.bool_], precision: float) -> float | None:
    """Return the lowest confidence above which answers are right as often as asked for; None if there is none.

    Ever larger sets of the most confident answers are tested for having too many mistakes anywhere, until one may have
    (Learn then Test with a fixed sequence). The images above the confidence of another image are a random sample of
    those above it anywhere, so each test is that of a binomial share. That the first failure ends them makes one risk
    enough for all, because mistakes get more frequent as the confidence falls. The sequence starts several times, the
    tests sharing the risk: with the smallest set that can pass, if all its answers are right, and with sets 3, 9, ...
    times as large, as a single wrong label may be among the most confident answers.

    Args:
        confidence: That of each image, (N,).
        right: Whether its answer is, (N,).
        precision: The share of answers that should be right.
    """
    order, count = np.argsort(-confidence, kind="stable"), len(confidence)
    ranked, mistakes = confidence[order], np.concatenate([[0], np.cumsum(~right[order])])
    starts = 1
    while _smallest_set(precision, _RISK / (starts + 1)) * 3**starts <= count:
        starts += 1
    for start in range(starts - 1, -1, -1):
        size, found = _smallest_set(precision, _RISK / starts) * 3**start, None
        while size <= count:
            limit = float(ranked[size]) if size < count else 0.0
            above = int((ranked > limit).sum())  # fewer than `size` if some are equal
            if chance_of(int(mistakes[above]), above, 1 - precision) > _RISK / starts:
                break
            found = limit
            size = min(max(size + 1, int(_GROWTH * size)), count) if size < count else count + 1
        if found is not None:
            return found
    return None


def _smallest_set(precision: float, risk: float) -> int:
    """Return how many right answers it takes to be certain of a precision at a risk."""
    return math.ceil(math.log(risk) / math.log(precision))


def chance_of(mistakes: int, images: int, share: float) -> float:
    """Return the probability of so few mistakes among images of which this share are mistakes: the binomial tail."""
    i = np.arange(1, mistakes + 1)
    ways = np.concatenate([[0.0], np.cumsum(np.log((images - i + 1) / i))])  # the logarithm
    i = np.arange(mistakes + 1)
    return float(np.exp(ways + i * np.log(share) + (images - i) * np.log1p(-share)).sum())


def fit_known(features: Floats, targets: NDArray[np.int64], classes: int) -> KnownFeatures:
    """Return where the features of training images are.

    Args:
        features: (M, C).
        targets: Their classes, (M,).
        classes: K; a class without images among these counts as one at the mean of all.
    """
    from sklearn.covariance import LedoitWolf
    from sklearn.decomposition import PCA

    count, width = features.shape
    d = max(1, min(COMPONENTS, count // 2, width))
    with np.errstate(invalid="ignore"):  # features that do not vary have no shares of the variance
        found = PCA(d, svd_solver="randomized", random_state=0).fit(features)
    center, basis = found.mean_.astype(np.float32), found.components_.T.astype(np.float16)
    offset = features.astype(np.float64) - center
    along = offset @ basis.astype(np.float64)
    means = np.zeros((classes, d))
    for c in np.unique(targets):
        means[c] = along[targets == c].mean(0)
    spread = along - means[targets]
    if (spread**2).sum() <= 1e-6 * (along**2).sum():  # classes of one image, or of copies: of the classes instead
        spread = along
    precision = LedoitWolf(assume_centered=True).fit(spread).precision_ if spread.any() else np.eye(d)
    whiten = np.linalg.cholesky(precision)
    rest = float(((offset**2).sum(1) - (along**2).sum(1)).mean()) / max(1, width - d)
    return KnownFeatures(center, basis, whiten.astype(np.float32), (means @ whiten).astype(np.float32), max(rest, 0.0))

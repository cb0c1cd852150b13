"""Which labels are probably wrong, from features of the images or from a model's predictions. No torch.

A linear head is fitted to all but a fifth of the images and applied to that fifth, five times, so that no image is
judged by a head that has seen its label. The head is linear discriminant analysis with a shrunken covariance: it has a
closed form, so it takes seconds where logistic regression takes a minute, and finds as many wrong labels
(docs/experiments.md).

How many labels are wrong is estimated with the head's temperature by maximum likelihood. The model is random
classification noise (Angluin and Laird, "Learning from noisy examples", 1988): a share of the labels has been replaced
by any other class. An image is a suspect if, under this model, its label is more likely wrong than right.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rexnet_lit.checks.findings import Suspect
from rexnet_lit.data.splits import first_few
from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.files import by_text

Floats = NDArray[np.float32]
Classes = NDArray[np.int64]

FOLDS = 5
_SHRINKAGES = (0.01, 0.03, 0.1, 1.0)  # added to the covariance's diagonal, times its mean; the likelihood chooses
_TEMPERATURES = np.geomspace(0.01, 10, 13)  # tried first, as factors of the logits
_MOST_FITTED = 4_000_000  # logits that the temperature and the share are estimated from
_MOST_WRONG = 0.5  # a larger share of wrong labels is not believed
_CLEARLY = 3.0  # standard errors
_NEIGHBOURS = 3
_BLOCK = 512  # suspects whose neighbours are searched at once


class Judgement(NamedTuple):
    """What is known of each label.

    Args:
        probs: (N, K): the class probabilities of each image, by a model that has not seen its label.
        suspects: The images whose labels are probably wrong, worst first.
        share: The estimated share of wrong labels. None if the model hardly tells the classes apart, which leaves no
            suspects.
    """

    probs: Floats
    suspects: NDArray[np.intp]
    share: float | None


def judge_features(features: Floats, targets: Classes, num_classes: int, units: NDArray[np.intp]) -> Judgement:
    """Judge labels by the images' features.

    Args:
        features: (N, C).
        targets: (N,).
        num_classes: K.
        units: (N,): images with the same number stay in one fold.
    """
    folds = assign_folds(targets, units)
    candidates = _held_out_logits(features - features.mean(0), targets, num_classes, folds)
    return max((_judge(logits, targets) for logits in candidates), key=lambda pair: pair[0])[1]


def judge_logits(logits: Floats, targets: Classes) -> Judgement:
    """Judge labels by logits (N, K), -inf where a class cannot be judged, of a model that was not trained on them."""
    return _judge(logits, targets)[1]


def assign_folds(targets: Classes, units: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return each image's fold, (N,): units stay whole, and each class is spread evenly, by its units' first images."""
    _, first, inverse = np.unique(units, return_index=True, return_inverse=True)
    shuffled = np.random.default_rng(0).permutation(len(first))
    order = shuffled[np.argsort(targets[first[shuffled]], kind="stable")]
    fold_of_unit = np.empty(len(first), np.intp)
    fold_of_unit[order] = np.arange(len(first)) % FOLDS
    return fold_of_unit[inverse]


def _held_out_logits(x: Floats, targets: Classes, num_classes: int, folds: NDArray[np.intp]) -> Iterator[Floats]:
    """Yield the logits (N, K) for each shrinkage; -inf for a class without images in the other folds."""
    width = x.shape[1]
    if len(x) < width:
        x = np.asarray(np.linalg.qr(x.T, mode="r")).T  # the same images, turned into fewer dimensions
    members = [np.flatnonzero(folds == fold) for fold in range(FOLDS)]
    counts = np.stack([np.bincount(targets[m], minlength=num_classes) for m in members]).astype(np.float64)
    sums = np.zeros((FOLDS, num_classes, x.shape[1]))
    for fold, m in enumerate(members):
        ordered = m[np.argsort(targets[m], kind="stable")]
        present, starts = np.unique(targets[ordered], return_index=True)
        if len(m):
            sums[fold, present] = np.add.reduceat(x[ordered], starts, axis=0, dtype=np.float64)
    products = [(x[m].T @ x[m]).astype(np.float64) for m in members]
    heads = []
    for fold, m in enumerate(members):
        count = counts.sum(0) - counts[fold]
        known = np.flatnonzero(count)
        if len(m) and len(known):
            means = (sums.sum(0) - sums[fold])[known] / count[known, None]
            scatter = np.sum(products, axis=0) - products[fold] - (means.T * count[known]) @ means
            heads.append((m, known, count[known] / count.sum(), means, scatter / count.sum()))
    for shrinkage in _SHRINKAGES:
        logits = np.full((len(x), num_classes), -np.inf, np.float32)
        for m, known, prior, means, covariance in heads:
            shrunken = covariance.copy()
            shrunken.flat[:: len(covariance) + 1] += shrinkage * np.trace(covariance) / width + 1e-9
            weight = np.linalg.solve(shrunken, means.T)
            bias = np.log(prior) - (means.T * weight).sum(0) / 2
            logits[m[:, None], known] = x[m] @ weight.astype(np.float32) + bias.astype(np.float32)
        yield logits


def _judge(logits: Floats, targets: Classes) -> tuple[float, Judgement]:
    """Return the mean log-likelihood of the labels, and the judgement.

    A label whose class has a logit of -inf cannot be judged: it is no suspect.
    """
    rows = np.flatnonzero(np.isfinite(logits[np.arange(len(targets)), targets]))
    if not len(rows):
        return -np.inf, Judgement(np.zeros_like(logits), rows, None)
    fitted = np.random.default_rng(0).permutation(rows)[: max(_MOST_FITTED // logits.shape[1], 1000)]

    def fit(temperature: float) -> tuple[float, float, float]:
        right, wrong = _likelihoods(_softmax(logits[fitted] * np.float32(temperature)), targets[fitted])
        share = _share(right, wrong)
        return float(np.log((1 - share) * right + share * wrong + 1e-30).mean()), temperature, share

    best = max(map(fit, _TEMPERATURES))
    step = float(_TEMPERATURES[1] / _TEMPERATURES[0])
    for _ in range(4):
        step = step**0.5
        best = max(best, fit(best[1] * step), fit(best[1] / step))
    likelihood, temperature, share = best
    probs = _softmax(logits * np.float32(temperature))
    if not _tells_apart(logits[fitted], targets[fitted]):
        return likelihood, Judgement(probs, rows[:0], None)
    right, wrong = _likelihoods(probs[rows], targets[rows])
    chosen = rows[(1 - share) * right < share * wrong]
    given = probs[chosen, targets[chosen]]
    return likelihood, Judgement(probs, chosen[np.argsort(given, kind="stable")], share)


def _tells_apart(logits: Floats, targets: Classes) -> bool:
    """Return whether images have clearly higher logits for the class of their label than other images have for it."""
    values = np.ma.masked_invalid(logits)
    values = values - values.mean(1, keepdims=True)
    gain = (values - values.mean(0))[np.arange(len(targets)), targets]
    one_class = (targets == targets[0]).all()  # nothing to compare with
    return bool(one_class or gain.mean() > _CLEARLY * gain.std() / len(gain) ** 0.5)


def _likelihoods(probs: Floats, targets: Classes) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return how likely each label is, (N,): as the true class, and as one drawn from the others by mistake."""
    right = probs[np.arange(len(targets)), targets].astype(np.float64)
    return right, (1 - right) / max(probs.shape[1] - 1, 1)


def _share(right: NDArray[np.float64], wrong: NDArray[np.float64]) -> float:
    """Return the most likely share of wrong labels, by bisection: the log-likelihood is concave in it."""
    low, high = 0.0, _MOST_WRONG
    for _ in range(30):
        share = (low + high) / 2
        rising = ((wrong - right) / ((1 - share) * right + share * wrong + 1e-30)).mean() > 0
        low, high = (share, high) if rising else (low, share)
    return low


def _softmax(logits: Floats) -> Floats:
    with np.errstate(invalid="ignore"):
        powers = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True), np.float32)


def describe(
    judgement: Judgement,
    targets: Classes,
    paths: Sequence[str],
    class_names: Sequence[str],
    features: Floats | None = None,
    copies: NDArray[np.intp] | None = None,
) -> tuple[Suspect, ...]:
    """Return the suspects, with the images most like them if there are features.

    Args:
        judgement: The judgement.
        targets: (N,).
        paths: The N images.
        class_names: The classes.
        features: (N, C).
        copies: (N,): copies of one image have the same number, and are not shown as similar to each other.
    """
    chosen, labels = judgement.suspects, targets[judgement.suspects]
    others = judgement.probs[chosen].copy()
    others[np.arange(len(chosen)), labels] = -1
    suggested = others.argmax(1)
    alike: list[list[tuple[str, ...]]] = [[()] * len(chosen)] * 2
    if features is not None and copies is not None:
        near = _nearest(features, targets, judgement.suspects, copies, (labels, suggested))
        alike = [[tuple(paths[i] for i in row) for row in rows] for rows in near]
    return tuple(
        Suspect(
            path=paths[i],
            label=class_names[labels[row]],
            suggested=class_names[suggested[row]],
            prob_label=float(judgement.probs[i, labels[row]]),
            prob_suggested=float(others[row, suggested[row]]),
            like_label=alike[0][row],
            like_suggested=alike[1][row],
        )
        for row, i in enumerate(chosen.tolist())
    )


def _nearest(
    features: Floats,
    targets: Classes,
    suspects: NDArray[np.intp],
    copies: NDArray[np.intp],
    wanted: tuple[Classes, NDArray[np.intp]],
) -> list[list[list[int]]]:
    """Return for both wanted classes of each suspect the images of highest cosine similarity, other suspects apart."""
    unit = features - features.mean(0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True) + 1e-12
    trusted = np.setdiff1d(np.arange(len(targets)), suspects)
    found: list[list[list[int]]] = [[], []]
    for start in range(0, len(suspects), _BLOCK):
        block = suspects[start : start + _BLOCK]
        similar = unit[block] @ unit[trusted].T
        similar[copies[block][:, None] == copies[trusted]] = -np.inf
        for rows, classes in zip(found, wanted, strict=True):
            for row, k in zip(similar, classes[start : start + _BLOCK], strict=True):
                of_class = np.flatnonzero((targets[trusted] == k) & np.isfinite(row))
                best = of_class[np.argsort(-row[of_class], kind="stable")[:_NEIGHBOURS]]
                rows.append(trusted[best].tolist())
    return found


def join_units(size: int, groups: Iterable[Sequence[int]]) -> NDArray[np.intp]:
    """Return a number for each of ``size`` images, (N,): the same for images that share a group, directly or not."""
    heads = list(range(size))

    def head(i: int) -> int:
        while heads[i] != i:
            heads[i] = heads[heads[i]]
            i = heads[i]
        return i

    for group in groups:
        for other in group[1:]:
            heads[head(other)] = head(group[0])
    return np.array([head(i) for i in range(size)], np.intp)


def _numbered(names: Sequence[str]) -> dict[str, int]:
    """Return the position of each name, by the texts that stand for this name alone in a CSV file."""
    position = {name: i for i, name in enumerate(names)}
    return {text: position[min(same)] for text, same in by_text(names).items() if len(same) == 1}


def read_logits(file: str | os.PathLike[str], class_names: Sequence[str], paths: Sequence[str]) -> Floats:
    """Read a ``predictions.csv`` as log-probabilities (N, K); those of images that it does not list are -inf.

    What the listed classes leave of the probability is divided equally among the others.

    Raises:
        UserError: The file cannot be read, is no such file, or knows other classes or none of the images.
    """
    numbers, row_of = _numbered(class_names), _numbered(paths)
    logits = np.full((len(paths), len(class_names)), -np.inf, np.float32)
    unknown: dict[str, None] = {}
    try:
        with Path(file).open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            for line in csv.DictReader(stream):
                names = [line[f"label_{rank}"] for rank in range(1, len(line)) if line.get(f"label_{rank}")]
                probs = [float(line[f"prob_{rank + 1}"]) for rank in range(len(names))]
                unknown |= dict.fromkeys(name for name in names if name not in numbers)
                row = row_of.get(line["path"])
                if row is not None and names and not unknown:
                    rest = max(1 - sum(probs), 0.0) / max(len(class_names) - len(names), 1)
                    given = np.full(len(class_names), rest)
                    given[[numbers[name] for name in names]] = probs
                    logits[row] = np.log(np.maximum(given, 1e-7))
    except OSError as error:
        raise UserError(f"--predictions {file}: {error.strerror}") from None
    except (csv.Error, KeyError, ValueError, TypeError):
        expected = "expected the predictions.csv of a test, with path, label_1, prob_1, ..."
        raise UserError(f"--predictions {file}: {expected}") from None
    if unknown:
        raise UserError(f"--predictions {file}: the folder has no class {first_few(list(unknown))}")
    if not np.isfinite(logits).any():
        raise UserError(f"--predictions {file}: it lists none of the folder's images; paths are relative to the folder")
    return logits

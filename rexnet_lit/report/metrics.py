"""Predictions in numbers and tables: metrics, confusions, CSV files.

The calibration error follows Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017,
https://arxiv.org/abs/1706.04599); the interval of the top-1 accuracy is Wilson's (1927).

Names of classes and files are other people's text. They are made printable once (`visible`), then escaped for
each place they go to: CSV cells against formulas, HTML by jinja2's autoescape, figures against mathtext.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rexnet_lit.utils.errors import UserError, printable
from rexnet_lit.utils.files import write_csv

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Pair = tuple[int, int, int]  # true class, predicted class, count


BINS = 15
MATRIX_CLASSES = 25  # more cells than 25 x 25 can neither be read nor, for 10,000 classes, be drawn


@dataclass(frozen=True)
class Predictions:
    """Test-set output.

    Args:
        paths: The images, relative to the dataset's root. They may hold anything a file name may: spaces,
            newlines, undecodable bytes as surrogate escapes.
        probs: Softmax probabilities, (N, K).
        targets: True class indices, (N,), or None for unlabelled images.
        class_names: One name per column of `probs`.

    Raises:
        ValueError: The lengths do not fit together, or a target is no class index.
        UserError: A probability is not finite.
    """

    paths: Sequence[str]
    probs: NDArray[np.float32]
    targets: NDArray[np.int64] | None
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        shape = (len(self.paths), len(self.class_names))
        if self.probs.shape != shape:
            raise ValueError(f"probs has shape {self.probs.shape}; paths and class_names say {shape}")
        if self.targets is not None:
            if self.targets.shape != shape[:1]:
                raise ValueError(f"targets has shape {self.targets.shape}; expected {shape[:1]}")
            if self.targets.size and not 0 <= self.targets.min() <= self.targets.max() < shape[1]:
                raise ValueError(f"targets run from {self.targets.min()} to {self.targets.max()} of {shape[1]} classes")
        broken = np.flatnonzero(~np.isfinite(self.probs.sum(axis=1)))
        if broken.size:
            raise UserError(
                f"{printable(self.paths[broken[0]])}: the model's output is not finite (NaN or infinity), for "
                f"{broken.size} of {shape[0]} images; its weights are damaged: use another checkpoint"
            )


def shown_names(p: Predictions) -> list[str]:
    """Class names that can be printed and are all different (ImageNet has two "crane")."""
    names = [printable(name) for name in p.class_names]
    times = Counter(names)
    return [name if times[name] == 1 else f"{name} (#{index})" for index, name in enumerate(names)]


def top_k_classes(probs: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return the k likeliest classes, (N, k), best first; of equals the lower index, as argmax does.

    k passes of argmax over blocks of rows: for 10,000 classes many times faster and smaller than sorting.
    """
    top = np.empty((len(probs), k), np.int64)
    for start in range(0, len(probs), 1024):
        block = probs[start : start + 1024].copy()
        rows = np.arange(len(block))
        for rank in range(k):
            best = block.argmax(axis=1)
            top[start : start + 1024, rank] = best
            block[rows, best] = -1
    return top


def known_targets(p: Predictions) -> NDArray[np.int64]:
    """Return the targets (N,), or raise where there are none."""
    if p.targets is None:
        raise ValueError("metrics need targets; these predictions are of unlabelled images")
    if not len(p.targets):
        raise UserError("there is no picture to test on; expected at least one in the test split")
    return p.targets


def calibration(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return count, mean confidence and accuracy of each confidence bin, (3, 15).

    Bins are ``(m/15, (m+1)/15]`` as in Guo et al. torchmetrics differs at the edges: it closes bins on the
    left, so a confidence of exactly 1.0 has a 16th bin of its own.
    """
    index = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidence, side="left")
    count = np.bincount(index, minlength=BINS).astype(np.float64)
    sums = [np.bincount(index, weights=w, minlength=BINS) for w in (confidence, correct.astype(np.float64))]
    return np.stack([count, *(s / np.maximum(count, 1) for s in sums)])


def compute_metrics(p: Predictions) -> dict[str, Any]:
    """Return the content of ``metrics.json``; everything but counts is a fraction.

    ``top1``, ``top5`` (only where there are more than 5 classes), ``macro_f1``, ``nll``, ``ece``, ``count``
    and ``per_class``: ``{name: {precision, recall, f1, support}}``.

    ``macro_f1`` averages over the classes that occur among the targets or the predictions, as scikit-learn's
    ``f1_score(average="macro")`` and torchmetrics' ``MulticlassF1Score(average="macro")`` both do: a class
    that the test set lacks and the model never names says nothing, and would drag the mean towards 0. Such a
    class is still listed in ``per_class``, with support 0. 0/0 is 0 (scikit-learn's ``zero_division=0``).
    ``nll`` is in nats; probabilities are clipped at float32's smallest normal number: a certain mistake costs 87.
    ``ece`` has 15 equal-width bins and the L1 norm, on the confidence of the first answer.

    Raises:
        ValueError: The images are unlabelled.
        UserError: There is no image.
    """
    targets, k = known_targets(p), len(p.class_names)
    top = top_k_classes(p.probs, min(5, k))
    predicted, rows = top[:, 0], np.arange(len(targets))
    correct = predicted == targets
    confidence = p.probs[rows, predicted].astype(np.float64)
    count, mean_confidence, accuracy = calibration(confidence, correct)
    likelihood = np.clip(p.probs[rows, targets].astype(np.float64), np.finfo(np.float32).tiny, 1)

    support = np.bincount(targets, minlength=k)
    named = np.bincount(predicted, minlength=k)
    hits = np.bincount(targets[correct], minlength=k)
    columns = {
        "precision": hits / np.maximum(named, 1),
        "recall": hits / np.maximum(support, 1),
        "f1": 2 * hits / np.maximum(support + named, 1),
    }
    lists = [*(column.tolist() for column in columns.values()), support.tolist()]
    metrics: dict[str, Any] = {"top1": float(correct.mean())}
    if k > 5:
        metrics["top5"] = float((top == targets[:, None]).any(axis=1).mean())
    return metrics | {
        "macro_f1": float(columns["f1"][support + named > 0].mean()),
        "nll": float(-np.log(likelihood).mean()),
        "ece": float((count / count.sum() * np.abs(accuracy - mean_confidence)).sum()),
        "count": len(targets),
        "per_class": {
            name: dict(zip((*columns, "support"), values, strict=True))
            for name, *values in zip(shown_names(p), *lists, strict=True)
        },
    }


def write_predictions(p: Predictions, path: str | os.PathLike[str], top_k: int = 5) -> None:
    """Write ``path,label_1,prob_1,...,label_k,prob_k`` and, with truth known, ``target``: UTF-8, atomically.

    Probabilities have 6 decimals.

    Args:
        p: The predictions.
        path: The file; missing folders are made.
        top_k: Labels a row; never more than there are classes.

    Raises:
        UserError: The file cannot be written.
    """
    k = min(top_k, len(p.class_names))
    top, names = top_k_classes(p.probs, k), shown_names(p)
    header = ["path", *(f"{column}_{rank}" for rank in range(1, k + 1) for column in ("label", "prob"))]

    def rows() -> Iterator[list[str | float]]:
        for index, (image, labels) in enumerate(zip(p.paths, top.tolist(), strict=True)):
            row: list[str | float] = [image]
            for label in labels:
                row += [names[label], round(float(p.probs[index, label]), 6)]
            yield row if p.targets is None else [*row, names[p.targets[index]]]

    write_csv(Path(path), header if p.targets is None else [*header, "target"], rows())


def wilson(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of `right` in `count`."""
    z = 1.959964
    share, scale = right / count, 1 + z * z / count
    centre = share + z * z / (2 * count)
    half = z * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return max(0.0, float((centre - half) / scale)), min(1.0, float((centre + half) / scale))


def percent(share: float) -> str:
    """Format a share; only what is exactly 0 or 1 reads as 0 or 100 %."""
    if share in (0, 1):
        return f"{100 * share:.0f}\u00a0%"
    return f"{min(max(100 * share, 0.1), 99.9):.1f}\u00a0%"


def confused_pairs(targets: NDArray[np.int64], predicted: NDArray[np.int64], k: int) -> list[Pair]:
    """Return every (true, predicted, count) that is a mistake, most frequent first."""
    wrong = targets != predicted
    codes, counts = np.unique(targets[wrong] * k + predicted[wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [(int(c) // k, int(c) % k, int(n)) for c, n in zip(codes[order], counts[order], strict=True)]


def confusion(
    targets: NDArray[np.int64], predicted: NDArray[np.int64], k: int, pairs: Sequence[Pair]
) -> tuple[list[int], NDArray[np.int64], NDArray[np.float64]]:
    """Return at most 25 classes, their counts (n, n), and the counts as shares of the true classes.

    Of more classes those of the most frequent mistakes are taken, then the largest: a 10,000 x 10,000 matrix
    is never formed.
    """
    support = np.bincount(targets, minlength=k)
    if k > MATRIX_CLASSES:
        largest = np.argsort(-support, kind="stable")[:MATRIX_CLASSES].tolist()
        candidates = dict.fromkeys([*(c for pair in pairs[:MATRIX_CLASSES] for c in pair[:2]), *largest])
        classes = sorted(list(candidates)[:MATRIX_CLASSES])
    else:
        classes = list(range(k))
    place = np.full(k, -1)
    place[classes] = np.arange(len(classes))
    rows, columns = place[targets], place[predicted]
    both = (rows >= 0) & (columns >= 0)
    counts = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(counts, (rows[both], columns[both]), 1)
    return classes, counts, counts / np.maximum(support[classes], 1)[:, None]

"""Predictions of a test or predict run, and their CSV file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rexnet_lit.utils.errors import UserError, printable
from rexnet_lit.utils.files import write_csv

if TYPE_CHECKING:
    from numpy.typing import NDArray


SEPARATOR = " | "
"""Between the class names of a set; a ``|`` in a name is written as ``\\|``."""


@dataclass(frozen=True)
class Limited:
    """How far each answer of a model with limits can be relied on.

    Args:
        unsure: Whether the confidence is too low, (N,).
        sets: The classes that each image may be of, (N, K).
        strangeness: How unlike the images that the model knows each one is, (N,); a stranger has more than 1. NaN
            for a model that cannot tell.
        confidence: The confidence that sure answers exceed; None where none is enough.
        precision: The share of sure answers that should be right.
        coverage: The share of images whose set should have the true class.
    """

    unsure: NDArray[np.bool_]
    sets: NDArray[np.bool_]
    strangeness: NDArray[np.float64]
    confidence: float | None
    precision: float
    coverage: float

    @property
    def stranger(self) -> NDArray[np.bool_]:
        """Whether each image is a stranger, (N,)."""
        return self.strangeness > 1


@dataclass(frozen=True)
class Predictions:
    """A model's probabilities for a set of images.

    Args:
        paths: The images, relative to the dataset's root. They may hold anything a file name may: spaces,
            newlines, undecodable bytes as surrogate escapes.
        probs: Softmax probabilities, (N, K).
        targets: True class indices, (N,), or None for unlabelled images.
        class_names: One name per column of `probs`.
        limited: What the model's limits say of the images, if it has any.

    Raises:
        ValueError: The lengths differ, or a target is no class index.
        UserError: A probability is NaN or infinite.
    """

    paths: Sequence[str]
    probs: NDArray[np.float32]
    targets: NDArray[np.int64] | None
    class_names: tuple[str, ...]
    limited: Limited | None = None

    def __post_init__(self) -> None:
        shape = (len(self.paths), len(self.class_names))
        if self.probs.shape != shape:
            raise ValueError(f"probs has shape {self.probs.shape}; expected {shape}, from paths and class_names")
        if self.targets is not None:
            if self.targets.shape != shape[:1]:
                raise ValueError(f"targets has shape {self.targets.shape}; expected {shape[:1]}")
            if self.targets.size and not 0 <= self.targets.min() <= self.targets.max() < shape[1]:
                raise ValueError(f"targets run from {self.targets.min()} to {self.targets.max()} of {shape[1]} classes")
        broken = np.flatnonzero(~np.isfinite(self.probs.sum(axis=1)))
        if broken.size:
            raise UserError(
                f"{printable(self.paths[broken[0]])}: the model's output is NaN or infinite, for {broken.size} of "
                f"{shape[0]} images; its weights are damaged: use another checkpoint"
            )

    @cached_property
    def names(self) -> list[str]:
        """Class names, printable and unique: ImageNet has two classes named "crane"."""
        names = [printable(name) for name in self.class_names]
        times = Counter(names)
        return [name if times[name] == 1 else f"{name} (#{index})" for index, name in enumerate(names)]

    @cached_property
    def predicted(self) -> NDArray[np.int64]:
        """The most probable class of each image, (N,)."""
        return np.asarray(self.probs.argmax(axis=1), np.int64)

    @cached_property
    def confidence(self) -> NDArray[np.float64]:
        """The probability of the predicted class of each image, (N,)."""
        return np.asarray(self.probs.max(axis=1), np.float64)

    @property
    def truth(self) -> NDArray[np.int64]:
        """The true classes, (N,).

        Raises:
            ValueError: The images are unlabelled.
        """
        if self.targets is None:
            raise ValueError("a report needs targets; these images are unlabelled")
        return self.targets


def top_k_classes(probs: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return the k most probable classes, (N, k), best first; of equals the lower index, as argmax does.

    With 10,000 classes, k passes of argmax over blocks of rows are many times faster and smaller than sorting.
    """
    top = np.empty((len(probs), k), np.int64)
    for start in range(0, len(probs), 1024):
        block = probs[start : start + 1024].copy()
        for rank in range(k):
            best = block.argmax(axis=1)
            top[start : start + 1024, rank] = best
            np.put_along_axis(block, best[:, None], -1, axis=1)
    return top


def set_names(p: Predictions, index: int) -> str:
    """Return the classes of an image's set in one text, the most probable first."""
    if p.limited is None:
        return ""
    members = np.flatnonzero(p.limited.sets[index])
    members = members[np.argsort(-p.probs[index, members], kind="stable")]
    return SEPARATOR.join(p.names[k].replace("|", r"\|") for k in members)


def write_predictions(p: Predictions, path: str | os.PathLike[str], top_k: int = 5) -> None:
    """Write ``path,label_1,prob_1,...,label_k,prob_k`` and, where the truth is known, ``target``: UTF-8, atomically.

    Probabilities have 6 decimals. The answers of a model with limits also have ``unsure`` and ``stranger``, 0 or 1 (or
    empty, if it cannot tell), and ``set``: class names with `SEPARATOR` between them.

    Args:
        p: The predictions.
        path: The file; missing folders are made.
        top_k: Labels per row, at most the number of classes.

    Raises:
        UserError: The file cannot be written.
    """
    top = top_k_classes(p.probs, min(top_k, len(p.names)))
    header = ["path", *(f"{column}_{rank + 1}" for rank in range(top.shape[1]) for column in ("label", "prob"))]
    header += [] if p.targets is None else ["target"]
    header += [] if p.limited is None else ["unsure", "set", "stranger"]

    def rows() -> Iterator[list[str | float]]:
        for index, (image, labels) in enumerate(zip(p.paths, top.tolist(), strict=True)):
            row: list[str | float] = [image]
            for label in labels:
                row += [p.names[label], round(float(p.probs[index, label]), 6)]
            if p.targets is not None:
                row.append(p.names[p.targets[index]])
            if p.limited is not None:
                stranger = "" if np.isnan(p.limited.strangeness[index]) else int(p.limited.stranger[index])
                row += [int(p.limited.unsure[index]), set_names(p, index), stranger]
            yield row

    write_csv(Path(path), header, rows())

"""Which symmetries the images of a folder have: whether a mirrored or turned one could be among them.

A classifier that has only seen training images as they are is tested on validation images, as they are and mirrored,
upside down, and turned by a quarter. Where it recognises the changed ones as well, the symmetry holds, and augmentation
with it is likely to help. Where it fails, as for letters, augmentation shows images that do not exist. (Lin et al.,
"Visual Chirality", 2020, train a network to tell mirrored photographs from others.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from rexnet_lit.checks.findings import Finding
from rexnet_lit.data.splits import draw_evenly

Pixels = NDArray[np.uint8]
Change = Callable[[Pixels], Pixels]


def unchanged(image: Pixels) -> Pixels:
    """Return the image."""
    return image


HFLIP = "data.augment.hflip"
_VIEWS: dict[str, tuple[str, Change, float]] = {
    HFLIP: ("mirrored", lambda image: image[:, ::-1], 0.5),
    "data.augment.vflip": ("upside down", lambda image: image[::-1], 0.5),
    "data.augment.quarter_turns": ("turned by a quarter", lambda image: np.rot90(image), 0.75),
}
"""The setting that uses each symmetry: in words, what it does with an image (H, W, 3), and a value to use it with."""
SETTINGS = frozenset(_VIEWS)
_TRAIN, _PER_CLASS, VALIDATION = 500, 10, 250
"""The images that are used, at most: for training, or so many of each class, and for validation."""
_SURE, _ERRORS = 0.01, 2.5
"""The largest p-value at which a loss counts, and the standard errors by which the classifier must be above chance."""
_LOSS = 0.3
"""A symmetry fails if the classifier no longer recognises this share of what it recognises beyond chance."""


@dataclasses.dataclass(frozen=True)
class Symmetries:
    """What was measured.

    Args:
        upright: Share of the validation images that are recognised as they are.
        changed: The same for the changed images, by setting.
        holds: Whether each symmetry holds, by setting; None if that cannot be told.
    """

    upright: float
    changed: Mapping[str, float]
    holds: Mapping[str, bool | None]

    def __str__(self) -> str:
        """Return one line about them."""
        words = {True: "holds", False: "does not hold", None: "cannot be told"}
        parts = [f"{key} {words[self.holds[key]]} ({share:.0%})" for key, share in self.changed.items()]
        return (
            f"Symmetries of the images, by the share of changed images that is recognised ({self.upright:.0%} of the "
            f"images as they are): {', '.join(parts)}"
        )


def training_images(classes: int) -> int:
    """Return how many images to train the classifier on, at most."""
    return max(_TRAIN, _PER_CLASS * classes)


def judge(
    known: NDArray[np.float32],
    targets: NDArray[np.int64],
    upright: NDArray[np.float32],
    val_targets: NDArray[np.int64],
    changed: Mapping[str, NDArray[np.float32]],
) -> Symmetries:
    """Test a ridge classifier of images as they are on images that are changed.

    Args:
        known: Features of training images, (N, C).
        targets: Their classes, (N,).
        upright: Features of validation images, (M, C).
        val_targets: Their classes, (M,).
        changed: Features of the validation images after the change of a setting, (M, C), by setting.
    """
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from rexnet_lit.report.comparison import mcnemar, paired_interval

    classifier = make_pipeline(StandardScaler(), RidgeClassifierCV(np.logspace(0, 5, 11))).fit(known, targets)
    right = classifier.predict(upright) == val_targets
    seen = {key: classifier.predict(features) == val_targets for key, features in changed.items()}
    chance = float(np.bincount(val_targets).max() / len(val_targets))
    known_share = float(right.mean()) - chance
    tells = known_share > _ERRORS * np.sqrt(chance * (1 - chance) / len(right))
    holds = dict[str, bool | None]()
    for key, after in seen.items():
        lost, won = int((right & ~after).sum()), int((after & ~right).sum())
        _, most = paired_interval(won, lost, len(right), 0.9)
        fails = (lost - won) / len(right) > _LOSS * known_share and mcnemar(lost, won) < _SURE
        holds[key] = None if not tells else False if fails else True if most < _LOSS * known_share else None
    shares = {key: float(after.mean()) for key, after in seen.items()}
    return Symmetries(float(right.mean()), shares, holds)


def measure(
    features: NDArray[np.float32],
    targets: NDArray[np.int64],
    units: NDArray[np.int64],
    embed: Callable[[NDArray[np.int64], Change], NDArray[np.float32]],
) -> Symmetries | None:
    """Return the symmetries of images; None if there are too few of them.

    Args:
        features: Of all images as they are, (N, C).
        targets: Their classes, (N,).
        units: A number for each image, (N,): images with the same one, such as copies, stay together.
        embed: Returns the features (M, C) of the images with these indices (M,), each of which is changed first.
    """
    val = draw_evenly(targets, min(VALIDATION, len(targets) // 3))
    others = np.flatnonzero(~np.isin(units, units[val]))
    train = others[draw_evenly(targets[others], training_images(len(np.unique(targets))))]
    if len(np.unique(targets[train])) < 2 or not len(val):
        return None
    changed = {key: embed(val, change) for key, (_, change, _) in _VIEWS.items()}
    return judge(features[train], targets[train], features[val], targets[val], changed)


def report(found: Symmetries | None) -> list[Finding]:
    """Return what the user should set: no mirroring where it fails, and the other symmetries where they hold."""
    findings = list[Finding]()
    if found is None:
        return findings
    for key, (words, _, value) in _VIEWS.items():
        share, setting = found.changed[key], value if found.holds[key] else 0
        if found.holds[key] is not (key != HFLIP):  # what most configs have
            continue
        how, auto = ("as well", "") if setting else ("worse", " (auto, the default of finetune, does that)")
        message = f"images that are {words} are recognised {how}: {share:.0%} of them, {found.upright:.0%} as they are"
        findings.append(Finding("info", "symmetry", message, f"train with {key}: {setting}{auto}"))
    return findings

"""Dividing images into train, val and test: by a hash of each file's path, or by groups.

A draw hashes instead of shuffling: within each class the files are ordered by a keyed hash of their path, and the first
go to test, the next to val. So it is stratified, the same on every machine, and hardly changes when the dataset grows:
one more file moves at most one other file per split of its class, where a seeded shuffle (scikit-learn's too) draws
everything again and mixes training images into the test set. Groups are drawn by scikit-learn, which balances the
classes; they are stable only through the split file that a run writes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from rexnet_lit.data.settings import SplitSettings
from rexnet_lit.data.walk import PathList, Walk
from rexnet_lit.utils.errors import plural

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

SPLIT_OF_NAME: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""Usual names of the splits, in lower case."""

Found = dict[Split, dict[str, PathList]]
"""The images of each split by class name."""

_SALT = b"rexnet_lit split"  # a change would change the validation images of every user


def quoted(name: object) -> str:
    """Return a name in quotes, on one line, with control characters and undecodable bytes escaped."""
    name = os.fsdecode(name) if isinstance(name, bytes) else str(name)
    return repr(name) if name.isprintable() else ascii(name)


def first_few(names: Sequence[object], limit: int = 5) -> str:
    """Return the first few names in quotes, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(quoted(name) for name in names[:limit]) + more


def listed(names: Sequence[object], noun: str, what: str, limit: int = 5) -> str:
    """Return a count with examples, such as ``2 groups in more than one split: 'a', 'b'``."""
    return f"{plural(len(names), noun, noun + ('es' if noun.endswith('s') else 's'))} {what}: {first_few(names, limit)}"


def nfc(name: str) -> str:
    """Return a name in Unicode's composed form: in names of files that come from a Mac, accents stand alone."""
    return unicodedata.normalize("NFC", name)


def natural_key(name: str) -> list[tuple[int, str]]:
    """Return a sort key that compares numbers in names as numbers (timm's natural order)."""
    parts = re.split(r"(\d+)", name.lower())
    return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)]


def draw_missing(walk: Walk, found: Found, settings: SplitSettings, groups: Mapping[bytes, str]) -> bool:
    """Draw val (and test, if asked for) from train where they are missing; return whether anything was drawn."""
    if groups:
        _check_groups(walk, found, groups)
    if "val" in found:
        if settings.num_folds:
            walk.problems.append("data.num_folds is set, but there is a val split; remove one of them")
        elif settings.val_fraction not in (0, SplitSettings.val_fraction):
            walk.notes.append(f"data.val_fraction {settings.val_fraction:g} has no effect: there is a val split")
        settings = dataclasses.replace(settings, val_fraction=0.0, num_folds=0)
    if "test" in found:
        if settings.test_fraction:
            walk.notes.append(f"data.test_fraction {settings.test_fraction:g} has no effect: there is a test split")
        settings = dataclasses.replace(settings, test_fraction=0.0)
    draws_val = bool(settings.val_fraction or settings.num_folds)
    if not (draws_val or settings.test_fraction) or "train" not in found:
        return False
    if len(found) > 1 or settings.split_file is not None:
        walk.notes.append(f"{'val' if draws_val else 'test'} is drawn from train")
    train = found["train"]
    drawn = draw_groups(train, groups, settings) if groups else {n: draw(n, train[n], settings) for n in train}
    alone = [name for name, paths in train.items() if len(paths) == 1]
    if alone and not groups:
        walk.notes.append(listed(alone, "class", "with one image, which stays in train"))
    bare = [name for name, parts in drawn.items() if not len(parts["train"]) and len(train[name])]
    if bare:
        walk.problems.append(f"{first_few(bare)}: all images went to val or test with their groups; use smaller groups")
    is_drawn: dict[Split, bool] = {"train": True, "val": draws_val, "test": settings.test_fraction > 0}
    for split in SPLITS:
        if is_drawn[split]:
            found[split] = {name: parts[split] for name, parts in drawn.items()}
    return True


def draw(name: str, paths: PathList, settings: SplitSettings) -> dict[Split, PathList]:
    """Divide the images of the class ``name``.

    In the order of their hashes the first images go to test and the next to val, or the rest is cut into folds. A class
    of two or more images gives val at least one (if its share is not 0) and keeps one in train.
    """
    count = len(paths)
    val_share = 0.0 if settings.num_folds else settings.val_fraction
    val, test = int(count * val_share + 0.5), int(count * settings.test_fraction + 0.5)
    if val_share > 0:
        val = max(val, 1)
    spare = max(count - 1, 0)
    val = min(val, spare)
    test = min(test, spare - val)
    raw, blake2b = paths.raws(), hashlib.blake2b
    digests = b"".join([blake2b(path, digest_size=8, salt=_SALT).digest() for path in raw])
    order = np.argsort(np.frombuffer(digests, "<u8"), kind="stable")
    rest, start = order[test:], 0
    if settings.num_folds and len(rest) > 1:
        # The folds of small classes differ by one image: start at a different fold for each class.
        turn = blake2b(os.fsencode(name), digest_size=8, salt=_SALT).digest()
        fold = (settings.fold + turn[0]) % settings.num_folds
        bounds = np.linspace(0, len(rest), settings.num_folds + 1).round().astype(int)
        start, val = int(bounds[fold]), int(bounds[fold + 1] - bounds[fold])
    parts = {
        "test": order[:test],
        "val": rest[start : start + val],
        "train": np.concatenate([rest[:start], rest[start + val :]]),
    }
    return {split: PathList([raw[i] for i in np.sort(parts[split]).tolist()]) for split in SPLITS}


def draw_groups(
    by_class: Mapping[str, PathList], groups: Mapping[bytes, str], settings: SplitSettings
) -> dict[str, dict[Split, PathList]]:
    """Divide all classes so that no group is in two splits, with classes as balanced as that allows.

    One more image may change the whole draw, unlike that of `draw`.

    Args:
        by_class: The images of each class.
        groups: The groups of images; an image without one is a group of its own.
        settings: The shares, which whole groups meet roughly.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    raw = [path for paths in by_class.values() for path in paths.raws()]
    targets = np.repeat(np.arange(len(by_class)), [len(paths) for paths in by_class.values()])
    keys = np.unique([groups.get(path, f"\0{i}") for i, path in enumerate(raw)], return_inverse=True)[1]
    split_of = np.full(len(raw), "train", object)
    test, val = settings.test_fraction, settings.val_fraction
    val_folds = settings.num_folds or ((1 - test) / val if val else 0)
    for split, folds, fold in (("test", 1 / test if test else 0, 0), ("val", val_folds, settings.fold)):
        left = np.flatnonzero(split_of == "train")
        count = min(max(2, round(folds)), len(np.unique(keys[left])))
        if not folds or count < 2:  # a single group cannot be divided
            continue
        splitter = StratifiedGroupKFold(count, shuffle=True, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of classes smaller than the number of folds
            parts = list(splitter.split(left, targets[left], keys[left]))
        split_of[left[parts[min(fold, count - 1)][1]]] = split
    return {
        name: {s: PathList([raw[i] for i in np.flatnonzero((targets == number) & (split_of == s))]) for s in SPLITS}
        for number, name in enumerate(by_class)
    }


def _check_groups(walk: Walk, found: Found, groups: Mapping[bytes, str]) -> None:
    """Report given splits that share a group, and images without one."""
    splits_of: dict[str, set[str]] = {}
    without = 0
    for split, path in ((split, path) for split, paths in raw_paths(found) for path in paths):
        if path in groups:
            splits_of.setdefault(groups[path], set()).add(split)
        else:
            without += 1
    shared = sorted(group for group, splits in splits_of.items() if len(splits) > 1)
    if shared:
        walk.problems.append(listed(shared, "group", "in more than one split") + "; move each to one")
    walk.notes.append(f"{plural(len(splits_of), 'group', 'groups')} of images, each in one split")
    if without:
        walk.notes.append(f"{plural(without, 'image', 'images')} without a group; each counts as its own")


def raw_paths(found: Found) -> Iterator[tuple[Split, list[bytes]]]:
    """Yield the paths of each split and class."""
    return ((split, paths.raws()) for split, by_class in found.items() for paths in by_class.values())


def group_by_name(walk: Walk, paths: Iterable[bytes], pattern: str) -> dict[bytes, str]:
    """Return the groups that a regular expression finds in paths: its first group, or the whole match."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        walk.problems.append(f"data.group_pattern {quoted(pattern)} is not a regular expression: {error}")
        return {}
    matches = ((path, compiled.search(os.fsdecode(path))) for path in paths)
    found = {path: match.group(1 if compiled.groups else 0) for path, match in matches if match is not None}
    groups = {path: group for path, group in found.items() if group is not None}
    if not groups:
        walk.problems.append(f"data.group_pattern {quoted(pattern)} matches no path of an image")
    return groups


def draw_evenly(targets: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Return the indices of at most so many images, rising and always the same: of each class as many, or all it has.

    Args:
        targets: The class of each image, (N,).
        most: How many.
    """
    shuffled = np.random.default_rng(0).permutation(len(targets))
    by_class = shuffled[np.argsort(targets[shuffled], kind="stable")]
    place_in_class = np.arange(len(targets)) - np.searchsorted(targets[by_class], targets[by_class])
    return np.sort(by_class[np.argsort(place_in_class, kind="stable")[:most]])

# ruff: noqa: PTH113, PTH114, PTH117, PTH118, PTH120 - paths are bytes here, maybe a million
"""Drawing train, val and test: by a hash of each file's path, by groups, or from a CSV file. Used by `folder` only."""

from __future__ import annotations

import collections
import csv
import hashlib
import io
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from rexnet_lit.data.settings import SplitSettings
from rexnet_lit.data.walk import PathList, Walk

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
"""How people call their splits, in lower case."""

Found = dict[Split, dict[str, PathList]]
"""The images of each split by class name."""

_COLUMNS = ("path", "label", "split", "group")  # of a split file

_SALT = b"rexnet_lit split"  # changing it moves everyone's validation images


def quoted(name: object) -> str:
    """Return a name in quotes, on one line, with control characters and undecodable bytes escaped."""
    return ascii(name) if not str(name).isprintable() else repr(name)


def first_few(names: Sequence[object], limit: int = 5) -> str:
    """Return the first few names in quotes, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(quoted(name) for name in names[:limit]) + more


def natural_key(name: str) -> list[tuple[int, str]]:
    """Compare numbers in names as numbers (timm's natural order)."""
    parts = re.split(r"(\d+)", name.lower())
    return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)]


def draw(name: str, paths: PathList, settings: SplitSettings) -> dict[Split, PathList]:
    """Divide the images of the class ``name``.

    The files stand in the order of a keyed hash of their paths; the first go to test, the next to val, or the rest is
    cut into folds. A class of two or more images gives val at least one (if its share is not 0) and keeps one in train.
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
        # The folds of small classes differ by one image: not always in favour of the first.
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
    by_class: dict[str, PathList], groups: Mapping[bytes, str], settings: SplitSettings
) -> dict[str, dict[Split, PathList]]:
    """Divide all classes so that no group is in two splits, and each split's classes are as alike as that allows.

    An image more may draw all groups anew, unlike `draw`.

    Args:
        by_class: The images of each class.
        groups: The images' groups; one that is not in it is a group of its own.
        settings: How much goes where; of whole groups, so roughly.
    """
    names = list(by_class)
    raw = [path for name in names for path in by_class[name].raws()]
    targets = np.repeat(np.arange(len(names)), [len(by_class[name]) for name in names])
    keys = np.unique([groups.get(path, f"\0{i}") for i, path in enumerate(raw)], return_inverse=True)[1]
    where = np.full(len(raw), "train", object)
    left = np.arange(len(raw))
    if settings.test_fraction:
        left = _fold_of_groups(left, targets, keys, 1 / settings.test_fraction, 0, where, "test")
    folds = settings.num_folds or ((1 - settings.test_fraction) / settings.val_fraction if settings.val_fraction else 0)
    if folds:
        _fold_of_groups(left, targets, keys, folds, settings.fold, where, "val")
    return {
        name: {
            split: PathList([raw[i] for i in np.flatnonzero((targets == number) & (where == split))])
            for split in SPLITS
        }
        for number, name in enumerate(names)
    }


def _fold_of_groups(
    indices: NDArray[np.int64],
    targets: NDArray[np.int64],
    keys: NDArray[np.int64],
    folds: float,
    fold: int,
    where: NDArray[np.object_],
    split: Split,
) -> NDArray[np.int64]:
    """Write a fold of whole groups into ``where``; return the other indices."""
    from sklearn.model_selection import StratifiedGroupKFold

    count = min(max(2, round(folds)), len(np.unique(keys[indices])))
    if count < 2:  # one group: it cannot be divided
        return indices
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes smaller than the number of folds
        parts = list(splitter.split(indices, targets[indices], keys[indices]))
    rest, chosen = parts[min(fold, count - 1)]
    where[indices[chosen]] = split
    remaining: NDArray[np.int64] = indices[rest]
    return remaining


def group_by_name(paths: Iterable[bytes], pattern: str, problems: list[str]) -> dict[bytes, str]:
    """Return the groups that a regular expression finds in paths: its first group, or all that it matches."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        problems.append(f"data.group_pattern {quoted(pattern)} is no regular expression: {error}")
        return {}
    matches = ((path, compiled.search(os.fsdecode(path))) for path in paths)
    found = {path: match.group(1 if compiled.groups else 0) for path, match in matches if match is not None}
    groups = {path: group for path, group in found.items() if group is not None}
    if not groups:
        problems.append(f"data.group_pattern {quoted(pattern)} matches no image's path")
    return groups


def read_split_file(walk: Walk, file: Path, problems: list[str], groups: dict[bytes, str]) -> Found:
    """Read ``path,label,split,group`` (columns by name); check that each image is there, once, inside the root.

    Undecodable bytes in names are kept as they are in the file. Rows without a split column all go to train,
    for `draw` to divide; without a label column the first folder (below the split's) is the label. Groups are
    added to ``groups``.
    """
    try:
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            text = stream.read()
    except OSError as error:
        problems.append(f"split file {quoted(str(file))}: {error.strerror}")
        return {}
    reader = csv.DictReader(io.StringIO(text, newline=""))
    faults: dict[str, list[str]] = collections.defaultdict(list)
    rows: dict[Split, dict[str, list[bytes]]] = {}
    try:
        columns = [column.strip().lower() for column in reader.fieldnames or []]
        unknown = [column for column in columns if column not in _COLUMNS]
        if "path" not in columns or unknown:
            expected = f"expected a header {','.join(_COLUMNS)} (all but path may be missing)"
            problems.append(f"split file {quoted(str(file))}: {expected}; got {first_few(columns, 20)}")
            return {}
        reader.fieldnames = columns
        for path, label, split, group in _rows(walk, reader, faults):
            if group:
                groups[path] = group
            rows.setdefault(split, {}).setdefault(label, []).append(path)
    except csv.Error as error:
        problems.append(f"split file {quoted(str(file))}, line {reader.line_num}: {error}")
        return {}
    if not rows and not faults:
        problems.append(f"split file {quoted(str(file))} lists no images")
    for fault, where in faults.items():
        problems.append(f"split file {quoted(str(file))}: {len(where)} x {fault}: {first_few(where, 3)}")
    return {
        split: {label: PathList(sorted(paths)) for label, paths in by_label.items()} for split, by_label in rows.items()
    }


def lists_images_of(file: str | os.PathLike[str], root: str | os.PathLike[str]) -> bool:
    """Say whether all images of a split file are below ``root``."""
    walk = Walk(os.fsencode(root))
    problems: list[str] = []
    return bool(read_split_file(walk, Path(file), problems, {})) and not problems


def _rows(
    walk: Walk, reader: csv.DictReader[str], faults: dict[str, list[str]]
) -> Iterator[tuple[bytes, str, Split, str]]:
    """Yield the good rows; collect the bad ones by what is wrong with them."""
    seen: set[bytes] = set()
    real_folders: dict[bytes, bool] = {}
    root = os.fsdecode(walk.root)
    for row in reader:
        name, label, split_name, group = (row.get(column) or "" for column in _COLUMNS)
        relative = os.path.relpath(name, root) if os.path.isabs(name) else os.path.normpath(name or ".")
        relative = relative.replace(os.sep, "/")
        path = os.fsencode(relative)
        absolute = os.path.join(walk.root, path)
        folder = os.path.dirname(path)
        if folder not in real_folders:
            real_folders[folder] = not folder or walk.stays_inside(folder)
        split = SPLIT_OF_NAME.get(split_name.strip().lower()) if "split" in (reader.fieldnames or ()) else "train"
        label = label or _label_of(relative)
        if split is None:
            faults["split is none of train, val, test"].append(f"{name}: {split_name}")
        elif not os.path.isfile(absolute):
            faults["no such file"].append(name)
        elif not real_folders[folder] or (os.path.islink(absolute) and not walk.stays_inside(path)):
            continue  # said with the other links
        elif path in seen:
            faults["listed twice"].append(name)
        elif not label:
            faults["no label, and no folder to take it from"].append(name)
        else:
            yield path, label, split, group
        seen.add(path)


def _label_of(relative: str) -> str:
    """Return a path's first folder that is not a split's."""
    folders = relative.split("/")[:-1]
    if len(folders) > 1 and folders[0].lower() in SPLIT_OF_NAME:
        folders = folders[1:]
    return folders[0] if folders else ""

# ruff: noqa: PTH113, PTH114, PTH117, PTH118, PTH120 - paths are bytes here, maybe a million
"""Drawing train, val and test: by a hash of each file's path, or from a CSV file. Used by `folder` only."""

from __future__ import annotations

import collections
import csv
import hashlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from rexnet_lit.folder.walk import PathList, Walk

__all__ = [
    "SPLITS",
    "SPLIT_OF_NAME",
    "Found",
    "Split",
    "bad_fractions",
    "draw",
    "natural_key",
    "quoted",
    "read_split_file",
    "some",
]

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

SPLIT_OF_NAME: dict[str, Split] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
"""How people call their splits, in lower case."""

Found = dict[Split, dict[str, PathList]]
"""The images of each split by class name."""

_SALT = b"rexnet_lit split"  # changing it moves everyone's validation images


def quoted(name: object) -> str:
    """Return a name in quotes, on one line, with control characters and undecodable bytes escaped."""
    return ascii(name) if not str(name).isprintable() else repr(name)


def some(names: Sequence[object], limit: int = 5) -> str:
    """Return the first few names in quotes, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(quoted(name) for name in names[:limit]) + more


def bad_fractions(val_fraction: float, test_fraction: float) -> list[str]:
    """Return what is wrong with the shares asked for."""
    for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= value < 1:
            return [f"data.{name} is {value}; expected a fraction from 0 to below 1"]
    if val_fraction + test_fraction >= 1:
        return [f"data.val_fraction {val_fraction} and data.test_fraction {test_fraction} leave nothing for train"]
    return []


def natural_key(name: str) -> list[tuple[int, str]]:
    """Compare numbers in names as numbers (timm's natural order)."""
    parts = re.split(r"(\d+)", name.lower())
    return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)]


def draw(paths: PathList, val_fraction: float, test_fraction: float) -> dict[Split, PathList]:
    """Divide the images of one class.

    The files stand in the order of a keyed hash of their paths; the first go to test, the next to val. A
    class of two or more images gives val at least one (if `val_fraction` is not 0) and keeps one in train.
    """
    count = len(paths)
    val, test = int(count * val_fraction + 0.5), int(count * test_fraction + 0.5)
    if val_fraction > 0:
        val = max(val, 1)
    spare = max(count - 1, 0)
    val = min(val, spare)
    test = min(test, spare - val)
    raw, blake2b = paths.raws(), hashlib.blake2b
    digests = b"".join([blake2b(path, digest_size=8, salt=_SALT).digest() for path in raw])
    order = np.argsort(np.frombuffer(digests, "<u8"), kind="stable")
    parts = {"test": order[:test], "val": order[test : test + val], "train": order[test + val :]}
    return {split: PathList([raw[i] for i in np.sort(parts[split]).tolist()]) for split in SPLITS}


def read_split_file(walk: Walk, file: Path, problems: list[str]) -> Found:
    """Read ``path,label,split`` (columns by name); check that each image is there, once, inside the root.

    Undecodable bytes in names are kept as they are in the file. Rows without a split column all go to train,
    for `draw` to divide; without a label column the first folder (below the split's) is the label.
    """
    try:
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            text = stream.read()
    except OSError as error:
        problems.append(f"split file {quoted(str(file))}: {error.strerror}")
        return {}
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = reader.fieldnames or []
    if "path" not in columns:
        problems.append(f"split file {quoted(str(file))}: expected a header path,label,split; got {some(columns)}")
        return {}
    faults: dict[str, list[str]] = collections.defaultdict(list)
    rows: dict[Split, dict[str, list[bytes]]] = {}
    for path, label, split in _rows(walk, reader, faults):
        rows.setdefault(split, {}).setdefault(label, []).append(path)
    for fault, where in faults.items():
        problems.append(f"split file {quoted(str(file))}: {len(where)} x {fault}: {some(where, 3)}")
    return {
        split: {label: PathList(sorted(paths)) for label, paths in by_label.items()} for split, by_label in rows.items()
    }


def _rows(walk: Walk, reader: csv.DictReader[str], faults: dict[str, list[str]]) -> Iterator[tuple[bytes, str, Split]]:
    """Yield the good rows; collect the bad ones by what is wrong with them."""
    seen: set[bytes] = set()
    real_folders: dict[bytes, bool] = {}
    root = os.fsdecode(walk.root)
    for row in reader:
        name, label, split_name = (row.get(column) or "" for column in ("path", "label", "split"))
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
            yield path, label, split
        seen.add(path)


def _label_of(relative: str) -> str:
    """Return a path's first folder that is not a split's."""
    folders = relative.split("/")[:-1]
    if len(folders) > 1 and folders[0].lower() in SPLIT_OF_NAME:
        folders = folders[1:]
    return folders[0] if folders else ""

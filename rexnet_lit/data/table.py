# ruff: noqa: PTH113, PTH114, PTH117, PTH118, PTH120 - bytes, and a million of them
"""Reading the CSV file that assigns images to classes and splits."""

from __future__ import annotations

import collections
import csv
import functools
import os
from collections.abc import Iterator
from pathlib import Path

from rexnet_lit.data.splits import SPLIT_OF_NAME, Found, Split, first_few, quoted
from rexnet_lit.data.walk import PathList, Walk

_COLUMNS = ("path", "label", "split", "group")


def read_split_file(walk: Walk, file: Path) -> tuple[Found, dict[bytes, str]]:
    """Read ``path,label,split,group`` (columns by name); check that each image exists, once, inside the root.

    Undecodable bytes in names are kept as they are in the file. Without a split column all rows go to train, for
    `draw` to divide; without a label column the first folder (below the split's) is the label.

    Returns:
        The images, and the groups of those that have one.
    """
    faults: dict[str, list[str]] = collections.defaultdict(list)
    rows: dict[Split, dict[str, list[bytes]]] = {}
    groups: dict[bytes, str] = {}
    where = f"split file {quoted(str(file))}"
    try:
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            reader = csv.DictReader(stream)
            try:
                for path, label, split, group in _rows(walk, reader, faults):
                    if group:
                        groups[path] = group
                    rows.setdefault(split, {}).setdefault(label, []).append(path)
                if not rows and not faults:
                    walk.problems.append(f"{where} lists no images")
            except csv.Error as error:
                walk.problems.append(f"{where}, line {reader.line_num}: {error}")
    except OSError as error:
        walk.problems.append(f"{where}: {error.strerror}")
    walk.problems += [f"{where}: {len(names)} x {fault}: {first_few(names, 3)}" for fault, names in faults.items()]
    return {s: {label: PathList(sorted(paths)) for label, paths in by.items()} for s, by in rows.items()}, groups


def lists_images_of(file: str | os.PathLike[str], root: str | os.PathLike[str]) -> bool:
    """Return whether all images of a split file are below ``root``."""
    walk = Walk(os.fsencode(root))
    return bool(read_split_file(walk, Path(file))[0]) and not walk.problems


def _rows(
    walk: Walk, reader: csv.DictReader[str], faults: dict[str, list[str]]
) -> Iterator[tuple[bytes, str, Split, str]]:
    """Yield the valid rows; collect the others by their fault."""
    columns = reader.fieldnames = [column.strip().lower() for column in reader.fieldnames or []]
    if "path" not in columns or not set(columns) <= set(_COLUMNS):
        expected = f"expected a header {','.join(_COLUMNS)} (all but path may be missing)"
        raise csv.Error(f"{expected}; got {first_few(columns, 20)}")
    seen: set[bytes] = set()
    stays_inside = functools.cache(walk.stays_inside)
    root = os.fsdecode(walk.root)
    for row in reader:
        name, label, split_name, group = (row.get(column) or "" for column in _COLUMNS)
        relative = os.path.relpath(name, root) if os.path.isabs(name) else os.path.normpath(name or ".")
        relative = relative.replace(os.sep, "/")
        path = os.fsencode(relative)
        absolute, folder = os.path.join(walk.root, path), os.path.dirname(path)
        allowed = not folder or stays_inside(folder)
        split = SPLIT_OF_NAME.get(split_name.strip().lower()) if "split" in columns else "train"
        label = label or _first_class_folder(relative)
        if split is None:
            faults["split is none of train, val, test"].append(f"{name}: {split_name}")
        elif not os.path.isfile(absolute):
            faults["no such file"].append(name)
        elif not allowed or (os.path.islink(absolute) and not stays_inside(path)):
            continue  # reported with the other links
        elif path in seen:
            faults["listed twice"].append(name)
        elif not label:
            faults["no label, and no folder to take it from"].append(name)
        else:
            yield path, label, split, group
        seen.add(path)


def _first_class_folder(relative: str) -> str:
    """Return a path's first folder that is not a split's."""
    folders = relative.split("/")[:-1]
    if len(folders) > 1 and folders[0].lower() in SPLIT_OF_NAME:
        folders = folders[1:]
    return folders[0] if folders else ""

"""Corrections of a dataset, image by image, from a CSV file: keep, relabel or remove.

The page of ``check --report`` and the report of a test write such a file; one written by hand needs only the columns
path, action and label. The folder itself is never changed: `scan` applies the file to what it has found.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rexnet_lit.data.image_file import read_bytes
from rexnet_lit.data.image_header import DecodeError
from rexnet_lit.data.splits import Found, first_few, quoted
from rexnet_lit.data.walk import PathList, Walk
from rexnet_lit.utils.files import by_text, csv_cell, expand_home

COLUMNS = ("path", "action", "label", "reason", "sha256")
ACTIONS = ("keep", "relabel", "remove")


@dataclasses.dataclass(frozen=True)
class AppliedFixes:
    """What a file of fixes did to a dataset.

    Args:
        summary: The number of images by action, and between which classes they moved, in one line.
        kept: The images that the user has looked at and keeps as they are.
    """

    summary: str = ""
    kept: frozenset[str] = frozenset()


class _Fix(NamedTuple):
    path: str  # as it is in the file: invisible characters may be escaped
    action: str
    label: str
    sha256: str


class _Place(NamedTuple):
    split: str
    label: str
    path: bytes


_Faults = dict[str, list[str]]


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal; an empty string if it cannot be read."""
    try:
        return hashlib.sha256(read_bytes(path)).hexdigest()
    except DecodeError:
        return ""


def apply_fixes(walk: Walk, found: Found, names: Sequence[str], file: str, *, of_file: bool = False) -> AppliedFixes:
    """Apply a file of fixes to the images of each split, in place, after val and test are drawn.

    So no image moves to another split, and a score with fixes is comparable with one without. What has been applied
    before, to a ``split.csv``, is left as it is.

    Args:
        walk: The dataset's folder; collects what is wrong with the file, and a note on what it changed.
        found: The images of each split by class.
        names: The classes.
        file: CSV with the columns path, action (``keep``, ``relabel`` or ``remove``), label (the new class) and, if
            the fix is only for this content of the image, sha256.
        of_file: The images are those of a split file, where removed ones may be missing.
    """
    where, faults = f"data.fixes {quoted(file)}", collections.defaultdict[str, list[str]](list)
    try:
        with Path(expand_home(file)).open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            fixes = list(_read(stream, os.fsdecode(walk.root), faults))
    except (OSError, csv.Error) as error:
        walk.problems.append(f"{where}: {getattr(error, 'strerror', None) or error}")
        return AppliedFixes()
    before = {name: len(paths) for name, paths in found.get("train", {}).items()}
    places = _find(found, {fix.path for fix in fixes})
    labels = by_text(names)
    changes = [(fix, _check(walk, fix, places.get(fix.path, []), labels, faults, of_file)) for fix in fixes]
    rows = collections.Counter(place.path for _, place in changes if place)
    faults["listed twice"] += [os.fsdecode(path) for path, count in rows.items() if count > 1]
    walk.problems += [f"{where}: {len(some)} x {fault}: {first_few(some, 3)}" for fault, some in faults.items() if some]
    if any(faults.values()):
        return AppliedFixes()
    new_labels: dict[_Place, str | None] = {}
    for fix, place in changes:
        if place and fix.action != "keep":
            new_labels[place] = next(iter(labels[fix.label])) if fix.action == "relabel" else None
    _move(found, {place: label for place, label in new_labels.items() if label != place.label})
    emptied = [name for name, count in before.items() if count and not len(found["train"][name])]
    if emptied:
        hint = "keep one, or take the folder of the class away"
        walk.problems.append(f"{where}: no training image is left of {first_few(emptied)}: {hint}")
    kept = frozenset(os.fsdecode(place.path) for fix, place in changes if place and fix.action == "keep")
    summary = _summary(new_labels, len(kept), sum(place is None for _, place in changes))
    walk.notes.append(f"{where}: {summary}")
    return AppliedFixes(summary, kept)


def _read(lines: Iterator[str], root: str, faults: _Faults) -> Iterator[_Fix]:
    reader = csv.DictReader(lines)
    columns = reader.fieldnames = [column.strip().lower() for column in reader.fieldnames or []]
    if not {"path", "action"} <= set(columns):
        raise csv.Error(f"expected the columns path, action, label; got {first_few(columns, 20) or 'an empty file'}")
    seen: set[str] = set()
    for row in reader:
        path, action, label, _, digest = (row.get(column) or "" for column in COLUMNS)
        path = os.path.relpath(os.path.join(root, path), root)  # noqa: PTH118 - "./a.png", or an absolute path
        action = action.strip().lower()
        if action not in ACTIONS:
            faults[f"the action is none of {', '.join(ACTIONS)}"].append(f"{path}: {action}")
        elif path in seen:
            faults["listed twice"].append(path)
        else:
            yield _Fix(path, action, label, digest.strip().lower())
        seen.add(path)


def _find(found: Found, wanted: set[str]) -> dict[str, list[_Place]]:
    """Return where the images are that the file lists."""
    places: dict[str, list[_Place]] = {}
    for split, by_class in found.items():
        for label, paths in by_class.items():
            for raw in paths.raws():
                path = os.fsdecode(raw)
                for text in {path, csv_cell(path)} & wanted:
                    places.setdefault(text, []).append(_Place(split, label, raw))
    return places


def _check(
    walk: Walk, fix: _Fix, places: list[_Place], labels: Mapping[str, set[str]], faults: _Faults, of_file: bool
) -> _Place | None:
    """Return the image of a fix, None if there is nothing to do; collect what is wrong."""
    file = os.path.join(os.fsdecode(walk.root), os.fsdecode(places[0].path) if places else fix.path)  # noqa: PTH118
    if fix.action == "relabel" and len(labels.get(fix.label, ())) != 1:
        faults["there is no such class"].append(f"{fix.path}: {fix.label}")
    elif len(places) > 1:
        faults["several images may be meant; rename one"].append(fix.path)
    elif not places:
        if fix.action != "remove" or not (of_file or walk.is_file(os.fsencode(fix.path))):
            faults["no such image in the dataset"].append(fix.path)
    elif fix.sha256 and sha256_of(file) != fix.sha256:
        faults["the image has changed since it was decided on"].append(fix.path)
    return places[0] if len(places) == 1 else None


def _move(found: Found, new_labels: Mapping[_Place, str | None]) -> None:
    """Give images another class, or remove them where that is None."""
    gone, added = collections.defaultdict(set), collections.defaultdict(list)
    for place, label in new_labels.items():
        gone[place.split, place.label].add(place.path)
        if label is not None:
            added[place.split, label].append(place.path)
    for split, by_class in found.items():
        for name in {name for where, name in (*gone, *added) if where == split}:
            raws = [raw for raw in by_class.get(name, PathList()).raws() if raw not in gone[split, name]]
            by_class[name] = PathList(sorted([*raws, *added[split, name]]))


def _summary(new_labels: Mapping[_Place, str | None], kept: int, removed_before: int) -> str:
    moves = [(place.label, label) for place, label in new_labels.items() if label is not None]
    moved = collections.Counter(move for move in moves if move[0] != move[1])
    removed = len(new_labels) - len(moves)
    most = [f"{quoted(old)} to {quoted(new)}: {count}" for (old, new), count in moved.most_common(3)]
    more = [f"{len(moved) - 3} more pairs of classes"] if len(moved) > 3 else []
    between = f" ({', '.join(most + more)})" if moved else ""
    parts = [f"{moved.total()} relabelled{between}", f"{removed} removed", f"{kept} kept"]
    same = len(moves) - moved.total() + removed_before
    return ", ".join(parts + ([f"{same} already as wanted"] if same else []))

# ruff: noqa: PTH114, PTH117, PTH118, PTH120 - bytes, and a million of them
"""The table of ``data.labels`` or ``data.split_file``: which image has which label, split and group.

A CSV file (with commas, semicolons or tabs) or, where pandas is installed, a Parquet file. Tables come from elsewhere:
columns are recognised by their usual names, and images by their path, or by their file name, with or without the
ending, if only one file has it.
"""

from __future__ import annotations

import codecs
import collections
import csv
import dataclasses
import functools
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rexnet_lit.data import image_file, packed
from rexnet_lit.data.settings import SplitSettings
from rexnet_lit.data.splits import SPLIT_OF_NAME, Found, Split, first_few, listed, nfc, quoted
from rexnet_lit.data.walk import PathList, Walk
from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.files import expand_home, write_file

if TYPE_CHECKING:
    from rexnet_lit.data.folder import ImageFolder

_COLUMNS = {
    "image": (
        *("path", "file_path", "image_path", "img_path", "file_name", "file", "image_name", "image", "img"),
        *("image_id", "img_id", "file_id", "id"),
    ),
    "label": (
        *("label_name", "class_name", "category_name", "label", "class", "category", "target", "labels"),
        *("label_id", "class_id", "category_id"),
    ),
    "split": ("split", "subset", "partition", "set"),
    "group": ("group", "group_id", "groups"),
}
"""Usual names of the columns; if a table has several of one kind, the first here counts."""

_Rows = dict[bytes, tuple[str, Split]]  # label and split of each image
_REMEDIES = {
    "no such file": "check data.root and the column of the images",
    "several files have this name": "name their folders too",
    "listed twice": "with different labels or splits",
}


def read_table(walk: Walk, settings: SplitSettings) -> tuple[Found, dict[bytes, str]]:
    """Read the table that ``settings`` name; what is wrong with it is added to the problems and notes of ``walk``.

    Undecodable bytes in names are kept as they are in the file. Without a split column the folders train/, val/ and
    test/ decide, if all images are in such folders; otherwise all go to train, for `draw` to divide. Without a label
    in ``data.split_file`` the first folder (below the split's) is the label.

    Args:
        walk: Of the folder that the images are in.
        settings: ``max_bad_fraction`` is the share of the rows that may name no file.

    Returns:
        The images, and the groups of those that have one.
    """
    is_complete = settings.labels is not None  # each image should have a row, and each row a label
    file = Path(expand_home(settings.labels or settings.split_file or ""))
    where = f"{'data.labels' if is_complete else 'data.split_file'} {quoted(str(file))}"
    faults: dict[str, list[str]] = collections.defaultdict(list)
    groups: dict[bytes, str] = {}
    rows: _Rows = {}
    images = _Images(walk, walk.images([b""])[0].raws() if is_complete else None)
    walk.nested.clear()  # its folders are no classes
    try:
        lines = _parquet_lines(file) if file.suffix.lower() in (".parquet", ".pq") else _csv_lines(file)
        columns = _find_columns(walk, where, next(lines, []), is_complete)
        count = _read_rows(lines, columns, images, is_complete, faults, rows, groups)
    except (OSError, UserError) as error:
        walk.problems.append(f"{where}: {getattr(error, 'strerror', None) or error}")
        return {}, {}
    if "group" in columns and settings.group_pattern is not None:
        walk.problems.append(f"{where} has a group column, and data.group_pattern is set too; remove one of them")
    if not rows and not faults:
        walk.problems.append(f"{where} lists no images")
    left_out = {name: faults.pop(name, []) for name in ("row without a label", "row of an image listed before")}
    if len(faults.get("no such file", ())) <= settings.max_bad_fraction * count:  # as with unreadable files
        left_out["row without a file"] = faults.pop("no such file", [])
    left_out["image without a row"] = [*map(os.fsdecode, sorted(images.unused))]
    for what, names in left_out.items():
        if names:
            noun, _, rest = what.partition(" ")
            walk.notes.append(f"{where}: {listed(names, noun, f'{rest}, left out')}")
    foreign = sorted({label for label, _ in rows.values() if is_complete and not _is_text(label)})
    if foreign:
        walk.notes.append(f"{where}: {listed(foreign, 'label', 'not in UTF-8')}; save the table with that encoding")
    for fault, names in faults.items():
        remedy = f" ({_REMEDIES[fault]})" if fault in _REMEDIES else ""
        walk.problems.append(f"{where}: {len(names)} x {fault}: {first_few(names, 3)}{remedy}")
    if "split" not in columns:
        _split_by_folder(walk, rows)
    found: dict[Split, dict[str, list[bytes]]] = {}
    for path, (label, split) in rows.items():
        found.setdefault(split, {}).setdefault(label, []).append(path)
    return {s: {label: PathList(sorted(paths)) for label, paths in by.items()} for s, by in found.items()}, groups


def lists_images_of(settings: SplitSettings, root: str | os.PathLike[str]) -> bool:
    """Return whether all images of the table that ``settings`` name are below ``root``."""
    walk = image_file.open_walk(packed.local_folder(root))
    return bool(read_table(walk, dataclasses.replace(settings, max_bad_fraction=0.0))[0]) and not walk.problems


def _csv_lines(file: Path) -> Iterator[Sequence[str]]:
    with file.open("rb") as binary:  # Excel's "Unicode text" is in UTF-16
        utf16 = binary.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    errors = "strict" if utf16 else "surrogateescape"
    with file.open(encoding="utf-16" if utf16 else "utf-8-sig", errors=errors, newline="") as stream:
        try:
            delimiter = max(",;\t", key=stream.readline().count)
        except UnicodeDecodeError as error:
            raise UserError(f"line 1: {error}") from None
        stream.seek(0)
        reader = csv.reader(stream, delimiter=delimiter)
        try:
            yield from (line for line in reader if line)
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"line {reader.line_num}: {error}") from None


def _parquet_lines(file: Path) -> Iterator[Sequence[str]]:
    try:
        import pandas as pd  # type: ignore[import-untyped,unused-ignore]

        frame = pd.read_parquet(file).convert_dtypes()  # beside an empty cell whole numbers are floats
    except ImportError:
        raise UserError("Parquet files need pandas and pyarrow: install both, or save the table as CSV") from None
    except ValueError as error:
        raise UserError(f"not a Parquet file: {error}") from None
    frame = frame if frame.index.name is None else frame.reset_index()
    yield [str(name) for name in frame.columns]
    yield from frame.astype("string").fillna("").to_numpy().tolist()


def _find_columns(walk: Walk, where: str, header: Sequence[str], is_complete: bool) -> dict[str, int]:
    """Return the position of each kind of column; note which columns are not used.

    Raises:
        UserError: There is none for the images, or for the labels where they are needed.
    """
    plain = [_plain(name) for name in header]
    columns: dict[str, int] = {}
    for kind, names in _COLUMNS.items():
        found = [plain.index(_plain(name)) for name in names if _plain(name) in plain]
        columns |= {kind: found[0]} if found else {}
    needed = [kind for kind in ("image", "label")[: 1 + is_complete] if kind not in columns]
    if needed:
        kinds = "; ".join(f"for the {kind}: {', '.join(_COLUMNS[kind])}" for kind in needed)
        raise UserError(f"expected a header with a column {kinds}; got {first_few(header, 20)}")
    unused = [name for i, name in enumerate(header) if i not in columns.values()]
    if unused:
        taken = ", ".join(f"{quoted(header[i])} as the {kind}" for kind, i in columns.items())
        walk.notes.append(f"{where}: taken as: {taken}; ignored: {first_few(unused, 20)}")
    return columns


def _is_text(label: str) -> bool:
    return not any("\udc80" <= char <= "\udcff" for char in label)  # bytes that could not be decoded


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def _read_rows(
    lines: Iterator[Sequence[str]],
    columns: Mapping[str, int],
    images: _Images,
    is_complete: bool,
    faults: dict[str, list[str]],
    rows: _Rows,
    groups: dict[bytes, str],
) -> int:
    """Collect the rows, and those that cannot be used by their fault; return the number of all."""
    count = 0
    for count, line in enumerate(lines, 1):  # noqa: B007
        cells = {kind: line[i] if i < len(line) else "" for kind, i in columns.items()}
        name, label = cells["image"], nfc(cells.get("label", ""))
        label = label.strip() if is_complete else label  # of a folder the spaces count
        split = SPLIT_OF_NAME.get(cells["split"].strip().lower()) if "split" in cells else "train"
        paths = images.find(name, split if "split" in cells else None)
        if split is None:
            faults["split is none of train, val, test"].append(f"{name}: {cells['split']}")
        if paths is None or split is None:
            continue  # a link out of the folder is reported with the other links
        if len(paths) != 1:
            faults["several files have this name" if paths else "no such file"].append(name)
            continue
        label = label if label or is_complete else _first_class_folder(os.fsdecode(paths[0]))
        before = rows.get(paths[0])
        if not label:
            faults["row without a label" if is_complete else "no label, and no folder to take it from"].append(name)
        elif before is None:
            rows[paths[0]] = label, split
            if cells.get("group"):
                groups[paths[0]] = cells["group"]
        else:
            faults["row of an image listed before" if before == (label, split) else "listed twice"].append(name)
    return count


def _split_by_folder(walk: Walk, rows: _Rows) -> None:
    """Assign the images to the splits whose folders they are in, if all are in such folders."""
    tops = {path.partition(b"/")[0] for path in rows}
    split_of = {top: split for top in tops if (split := SPLIT_OF_NAME.get(os.fsdecode(top).lower()))}
    if tops == split_of.keys() and set(split_of.values()) - {"train"}:
        walk.notes.append(f"{first_few(sorted(tops))} taken as the splits of the table")
        for path, (label, _) in rows.items():
            rows[path] = label, split_of[path.partition(b"/")[0]]


class _Images:
    """Finds the image that a cell of a table means.

    Args:
        walk: Of the folder.
        paths: Its images; without them it is only searched for names that are not paths.
    """

    def __init__(self, walk: Walk, paths: list[bytes] | None) -> None:
        self._walk, self._paths = walk, paths
        self.unused = set(paths or ())
        """Paths that were not found yet."""
        self._known = frozenset(self.unused)
        self._root = os.fsdecode(walk.root)
        self._stays_inside = functools.cache(walk.stays_inside)

    def find(self, name: str, split: Split | None) -> list[bytes] | None:
        """Return the images that ``name`` may mean, those in the folder of ``split`` first; None if it leads outside.

        It is a path, or the end of one, perhaps with the root's own name before it; the ending may be missing.
        """
        relative = os.path.relpath(name, self._root) if os.path.isabs(name) else os.path.normpath(name or ".")
        path = os.fsencode(relative.replace(os.sep, "/"))
        if path in self._known:
            found = [path]
        elif self._walk.is_file(path):
            folder = os.path.dirname(path)
            inside = not folder or self._stays_inside(folder)
            if not inside or (os.path.islink(os.path.join(self._walk.root, path)) and not self._stays_inside(path)):
                return None
            found = [path]
        else:
            found = self._by_end(relative)
        if len(found) > 1:
            in_split = [path for path in found if SPLIT_OF_NAME.get(os.fsdecode(path.split(b"/")[0]).lower()) == split]
            found = in_split if len(in_split) == 1 else found
        self.unused.difference_update(found)
        return found

    def _by_end(self, relative: str) -> list[bytes]:
        end = "/" + nfc(relative).replace("\\", "/")
        name = end.rpartition("/")[2]
        for where in self._index:
            found = [path for text, path in where.get(name, ()) if text.endswith(end)]
            if found:
                return found
        return []

    @functools.cached_property
    def _index(self) -> tuple[dict[str, list[tuple[str, bytes]]], dict[str, list[tuple[str, bytes]]]]:
        """Absolute paths in NFC, and those below the root, by file name; the same without their endings."""
        if self._paths is None:
            self._paths = image_file.open_walk(Path(self._root)).images([b""])[0].raws()
        names: dict[str, list[tuple[str, bytes]]] = collections.defaultdict(list)
        stems: dict[str, list[tuple[str, bytes]]] = collections.defaultdict(list)
        for path in self._paths:
            text = nfc(f"{self._root}/{os.fsdecode(path)}".replace(os.sep, "/"))
            stem = text.rpartition(".")[0]
            names[text.rpartition("/")[2]].append((text, path))
            stems[stem.rpartition("/")[2]].append((stem, path))
        return names, stems


def _first_class_folder(relative: str) -> str:
    """Return a path's first folder that is not a split's."""
    folders = relative.split("/")[:-1]
    if len(folders) > 1 and folders[0].lower() in SPLIT_OF_NAME:
        folders = folders[1:]
    return nfc(folders[0]) if folders else ""


def write_split(folder: ImageFolder, path: str | os.PathLike[str]) -> None:
    """Write ``path,label,split``, which `scan` reads back as ``split_file``.

    UTF-8; undecodable bytes of names are written unchanged. As it is read back, nothing is escaped for spreadsheets.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("path", "label", "split"))
    for split, samples in folder.splits.items():
        for name, target in zip(samples.paths, samples.targets.tolist(), strict=True):
            writer.writerow((name, folder.class_names[target], split))
    write_file(Path(path), text.getvalue())

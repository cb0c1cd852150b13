"""From a folder of images to named classes, splits and a list of samples.

`scan` takes ``DIR/{train,val,test}/CLASS/...``, ``DIR/CLASS/...`` or a table, ignores clutter, and reports all
problems at once. Files are listed, never opened: `verify` finds the unreadable ones.

Class numbers are train's: the classes of val and test are looked up by name, so that a missing class does not shift
the others, as it does where each split numbers its own folders.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rexnet_lit.data import image_file, packed
from rexnet_lit.data.fixes import AppliedFixes, apply_fixes
from rexnet_lit.data.settings import SplitSettings
from rexnet_lit.data.splits import (
    SPLIT_OF_NAME,
    SPLITS,
    Found,
    Split,
    draw_missing,
    first_few,
    group_by_name,
    listed,
    natural_key,
    nfc,
    quoted,
    raw_paths,
)
from rexnet_lit.data.table import read_table
from rexnet_lit.data.walk import PathList, Walk
from rexnet_lit.utils.errors import UserError, plural
from rexnet_lit.utils.files import expand_home

_LAYOUT = "expected DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg, or DIR/CLASS/*.jpg, or a table of data.labels"

Layout = Literal["split", "flat", "file"]


@dataclasses.dataclass(frozen=True)
class Samples:
    """The images of one split.

    Args:
        root: The dataset's folder, absolute.
        paths: Paths below `root`, sorted within each class.
        targets: ``(N,)`` class numbers.
    """

    root: Path
    paths: PathList
    targets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        """Return the absolute path of one image."""
        return os.path.join(self.root, self.paths[index])  # noqa: PTH118 - a string per sample, not a Path

    def take(self, indices: NDArray[np.integer]) -> Samples:
        """Return the samples at these indices, in this order."""
        return Samples(self.root, self.paths.take(indices), self.targets[indices])


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """A scanned dataset.

    Args:
        root: Its folder, absolute.
        class_names: The classes, in the order of their numbers.
        splits: The splits that hold images.
        notes: One line each, for the user.
        clutter: Number of files and folders that were left out.
        layout: ``split`` (DIR/train/CLASS), ``flat`` (DIR/CLASS) or ``file`` (a table).
        drawn: Whether val or test was drawn from train.
        groups: The groups of the images that have one, by path.
        fixes: What ``settings.fixes`` has changed.
    """

    root: Path
    class_names: tuple[str, ...]
    splits: dict[Split, Samples]
    notes: tuple[str, ...] = ()
    clutter: int = 0
    layout: Layout = "flat"
    drawn: bool = False
    groups: Mapping[bytes, str] = dataclasses.field(default_factory=dict)
    fixes: AppliedFixes = dataclasses.field(default_factory=AppliedFixes)

    @property
    def pooled(self) -> bool:
        """Whether the splits come from one pool of images: drawn now, or read from a file."""
        return self.drawn or self.layout == "file"


def scan(
    root: str | os.PathLike[str],
    settings: SplitSettings = SplitSettings(),  # noqa: B008 (frozen)
    class_names: Sequence[str] | None = None,
) -> ImageFolder:
    """Find classes, splits and images.

    Args:
        root: The dataset's folder. ``valid`` and ``validation`` are taken as ``val``, in any case.
        settings: How to divide it.
        class_names: The classes of an existing model, in its order. Classes that the folder lacks are noted;
            a class that the model does not know is an error; train/ may be missing.

    Raises:
        UserError: The folder cannot be used; all reasons are given.
    """
    folder, problems = try_scan(root, settings, class_names)
    if problems:
        raise UserError(f"{quoted(os.fspath(root))}: " + "; ".join(problems))
    return folder


def try_scan(
    root: str | os.PathLike[str],
    settings: SplitSettings = SplitSettings(),  # noqa: B008 (frozen)
    class_names: Sequence[str] | None = None,
) -> tuple[ImageFolder, list[str]]:
    """Do what `scan` does, but return the problems beside what could be found."""
    where = packed.local_folder(root)
    problems = settings.problems()
    if not where.is_dir():
        problems.append("this is a file, not a folder" if where.exists() else "no such folder")
    if problems:
        return ImageFolder(where, (), {}), problems
    walk = image_file.open_walk(where, follow_outside_links=settings.follow_outside_links)
    layout: Layout = "file"
    groups: dict[bytes, str] = {}
    if settings.split_file is None and settings.labels is None:
        layout, found = _read_folders(walk, class_names)
    else:
        found, groups = read_table(walk, settings)
    _report_left_out(walk)
    if class_names is not None:
        class_names = [nfc(name) for name in class_names]
    names = tuple(class_names) if class_names is not None else _class_order(walk, found, settings.class_order)
    if class_names is None:
        _check_classes(walk, found, names)
    else:
        _check_given_classes(walk, found, names, layout)
    if settings.group_pattern is not None:
        raws = (path for _, paths in raw_paths(found) for path in paths)
        groups |= group_by_name(walk, raws, settings.group_pattern)
    if class_names is None and "val" not in found and settings.val_fraction == 0 and not settings.num_folds:
        lines, what = walk.problems, "training needs one to choose weights"
        if settings.may_lack_val:
            lines, what = walk.notes, "no such images select or calibrate the weights"
        lines.append(f"there is no val split and data.val_fraction is 0; {what}")
    drawn = draw_missing(walk, found, settings, groups)
    fixes = AppliedFixes()
    if settings.fixes:
        fixes = apply_fixes(walk, found, names, settings.fixes, of_file=layout == "file")
    samples = {split: samples_of(where, by_class, names) for split, by_class in found.items()}
    splits = {split: samples[split] for split in SPLITS if len(samples.get(split, ()))}
    notes = tuple(walk.notes)
    return ImageFolder(where, names, splits, notes, walk.clutter, layout, drawn, groups, fixes), walk.problems


def _read_folders(walk: Walk, class_names: Sequence[str] | None) -> tuple[Layout, Found]:
    """Tell the two layouts apart, and list the images of each split by class."""
    tops, loose = walk.folders(b"")
    split_folders: dict[Split, list[bytes]] = {}
    for top in tops:
        if (split := SPLIT_OF_NAME.get(os.fsdecode(top).lower())) is not None:
            split_folders.setdefault(split, []).append(top)
    as_splits = [*itertools.chain(*split_folders.values())]
    others = [top for top in tops if top not in as_splits]
    if split_folders and _are_classes(walk, split_folders, others, class_names):
        walk.notes.append(f"{first_few(sorted(as_splits))} taken as a class, not as a split")
        split_folders = {}
    if not split_folders:
        return "flat", {"train": _read_classes(walk, b"", tops, loose)}
    if "train" not in split_folders and class_names is None:
        walk.problems.append(
            f"there is no train/ folder beside {first_few(tops)}; {_LAYOUT} (if {first_few(as_splits)} is meant as a "
            "class, rename that folder)"
        )
    if loose:
        walk.notes.append(f"{plural(loose, 'image', 'images')} beside the splits, ignored")
    if others:
        walk.clutter += len(others)
        walk.notes.append(f"ignored beside the splits: {first_few(others)}")
    return "split", _read_splits(walk, split_folders)


def _read_splits(walk: Walk, split_folders: dict[Split, list[bytes]]) -> Found:
    found: Found = {}
    split_of: dict[bytes, Split] = {}
    for split, folders in split_folders.items():
        if len(folders) > 1:
            walk.problems.append(f"{first_few(folders)} are one split; keep one")
        elif folders[0] != split.encode():
            walk.notes.append(f"{quoted(folders[0])} is taken as {split}/")
        real = os.path.realpath(os.path.join(walk.root, folders[0]))  # noqa: PTH118
        if real in split_of:
            walk.problems.append(f"{split} and {split_of[real]} are the same folder by a link")
        split_of[real] = split
        if not walk.stays_inside(folders[0]):
            continue  # reported with the other links
        names, loose = walk.folders(folders[0])
        if split == "test" and loose and not names:
            many = plural(loose, "image", "images")
            walk.notes.append(f"test/ has {many} without class folders: ignored (to be predicted)")
        else:
            found[split] = _read_classes(walk, folders[0], names, loose)
    return found


def _are_classes(
    walk: Walk, split_folders: dict[Split, list[bytes]], others: list[bytes], class_names: Sequence[str] | None
) -> bool:
    """Return whether folders called train or valid are classes: of vehicles, or beside invalid."""
    folders = [*itertools.chain(*split_folders.values())]
    if class_names is not None:
        return {os.fsdecode(folder) for folder in folders} <= set(class_names)
    if len(folders) > 1 or "test" in split_folders or not others:  # test/ may well hold unlabelled images
        return False
    names, loose = walk.folders(folders[0])
    return not names and loose > 0


def _read_classes(walk: Walk, base: bytes, names: list[bytes], loose: int) -> dict[str, PathList]:
    """List the images of each class folder."""
    where = f"{quoted(base)}: " if base else ""
    if not names:
        got = f"{plural(loose, 'image', 'images')} directly, no class folders" if loose else "it is empty"
        walk.problems.append(f"{where}{got}; {_LAYOUT}")
    elif loose:
        walk.notes.append(f"{where}{plural(loose, 'image', 'images')} outside every class folder, ignored")
    before = len(walk.nested)
    lists = walk.images([base + b"/" + name if base else name for name in names])
    inner: dict[str, set[str]] = {os.fsdecode(name): set() for name in names}
    for folder in walk.nested[before:]:
        parts = folder.removeprefix(os.fsdecode(base) + "/").split("/")
        inner[parts[0]].add(parts[-1])
    shared = sorted(set.intersection(*inner.values())) if len(names) > 1 else []
    if len(shared) > 1:
        walk.notes.append(
            f"{where}each of the classes {first_few(names)} holds folders called {first_few(shared)}: if those are the "
            "classes, name the outer folders train, val and test"
        )
    classes: dict[str, PathList] = {}
    for name, paths in zip((nfc(os.fsdecode(top)) for top in names), lists, strict=True):
        if name in classes:
            walk.notes.append(f"{where}2 folders are called {quoted(name)}, in different forms of Unicode: one class")
            paths = PathList(sorted([*classes[name].raws(), *paths.raws()]))
        classes[name] = paths
    return classes


def _report_left_out(walk: Walk) -> None:
    """Add to the problems and notes what the walk could not read, or left out."""
    remedy = "; copy the files in, or set data.follow_outside_links: true"
    if walk.outside_links:
        walk.problems.append(listed(walk.outside_links, "link", "out of the folder", limit=1) + remedy)
    if walk.unreadable:
        walk.problems.append(listed(walk.unreadable, "folder", "without permission, or unreadable"))
    for names, noun, what in (
        (walk.nested, "nested folder", "counted to the class above"),
        (walk.broken_links, "broken link", "ignored"),
        (walk.repeated_links, "link", "to folders already read, ignored"),
    ):
        if names:
            walk.notes.append(listed(names, noun, what, limit=1))
    for suffix, count in sorted(walk.unsupported.items()):
        if suffix:
            walk.notes.append(f"{plural(count, f'.{suffix} file', f'.{suffix} files')} ignored: convert to JPEG or PNG")
        else:
            walk.notes.append(f"{plural(count, 'file', 'files')} without an extension, ignored")


def _class_order(walk: Walk, found: Found, order: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return train's classes in the requested order."""
    names = sorted(found.get("train", ()))
    if order == "sorted":
        return tuple(names)
    if order == "natural":
        return tuple(sorted(names, key=lambda name: (natural_key(name), name)))
    what = f"data.class_order {quoted(os.fspath(order))}"
    try:
        lines = Path(expand_home(order)).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        walk.problems.append(f"{what}: expected sorted, natural or a file of names ({type(error).__name__})")
        return tuple(names)
    wanted = [nfc(line.strip("\r")) for line in lines if line.strip()]
    faults = {
        "without a folder": sorted(set(wanted) - set(names)),
        "not listed": sorted(set(names) - set(wanted)),
        "listed twice": sorted(name for name, count in collections.Counter(wanted).items() if count > 1),
    }
    if not any(faults.values()):
        return tuple(wanted)
    parts = [f"{fault}: {first_few(names)}" for fault, names in faults.items() if names]
    walk.problems.append(f"{what} does not match the folder's {len(names)} classes; {'; '.join(parts)}")
    return tuple(names)


def _check_classes(walk: Walk, found: Found, names: tuple[str, ...]) -> None:
    """Report empty classes, and classes that train lacks."""
    for split, by_class in found.items():
        extra = sorted(name for name in by_class.keys() - set(names) if len(by_class[name]))
        empty = [name for name in names if not len(by_class.get(name, ()))]
        if extra:
            walk.problems.append(listed(extra, "class", f"in {split}, but not in train"))
        elif empty and split == "train":
            walk.problems.append(listed(empty, "class folder", "without images", limit=100))
        elif empty:
            _note_empty(walk, split, empty, names)
    if len(names) == 1:
        walk.problems.append(f"one class, {quoted(names[0])}; a classifier needs at least 2; {_LAYOUT}")


def _check_given_classes(walk: Walk, found: Found, names: tuple[str, ...], layout: Layout) -> None:
    """Compare each split's classes with a model's."""
    strange: dict[str, list[str]] = {}
    for split, by_class in found.items():
        extra = sorted(by_class.keys() - set(names))
        absent = [name for name in names if name not in by_class]
        empty = [name for name in names if not len(by_class.get(name, ()))]
        if extra or (absent and layout == "split" and split == "train"):
            parts = (("unknown to it", extra), ("the model's, but not here", absent))
            differences = "; ".join(f"{what}: {first_few(some) or 'none'}" for what, some in parts)
            strange.setdefault(differences, []).append(split)
        elif empty:
            _note_empty(walk, split, empty, names)
    for differences, splits in strange.items():
        walk.problems.append(f"the classes of {', '.join(splits)} are not the model's: {differences}")


def _note_empty(walk: Walk, split: Split, empty: list[str], names: tuple[str, ...]) -> None:
    walk.notes.append(f"{len(empty)} of {len(names)} classes have no images in {split}: {first_few(empty)}")


def samples_of(root: Path, by_class: Mapping[str, PathList], names: tuple[str, ...]) -> Samples:
    """Return the images of each class as one list, in the order of ``names``."""
    lists = [by_class.get(name, PathList()) for name in names]
    targets = np.repeat(np.arange(len(names), dtype=np.int64), [len(paths) for paths in lists])
    return Samples(root, PathList.join(lists), targets)


def list_images(path: str | os.PathLike[str]) -> tuple[Path, PathList, tuple[str, ...]]:
    """List what to predict: one image file, or all images in a folder and its sub-folders, sorted.

    Returns:
        The folder, absolute, the paths below it, and notes on what was left out. Links may lead anywhere.

    Raises:
        UserError: There is no image.
    """
    where = packed.local_folder(path)
    if where.is_file():
        return where.parent, PathList([os.fsencode(where.name)]), ()
    if not where.is_dir():
        raise UserError(f"{quoted(os.fspath(path))}: no such file or folder")
    walk = image_file.open_walk(where, follow_outside_links=True)
    (paths,) = walk.images([b""])
    walk.nested.clear()  # there are no classes
    _report_left_out(walk)
    notes = (*walk.problems, *walk.notes)
    if not len(paths):
        known = "; ".join(["expected JPEG, PNG, WebP, BMP, TIFF or GIF files", *notes])
        raise UserError(f"{quoted(os.fspath(path))}: no images here; {known}")
    return where, paths, notes


def fingerprint(samples: Samples) -> str:
    """Return a SHA-256 over paths, class numbers and file sizes, independent of the order and of the root."""
    digest = hashlib.sha256()
    for path, target in sorted(zip(samples.paths.raws(), samples.targets.tolist(), strict=True)):
        try:
            size = image_file.status(os.path.join(samples.root, os.fsdecode(path))).st_size  # noqa: PTH118
        except OSError:
            size = -1
        digest.update(b"%b\0%d %d\n" % (path, target, size))
    return digest.hexdigest()

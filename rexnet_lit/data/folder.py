"""From a folder of images to named classes, splits and a list of samples.

`scan` takes ``DIR/{train,val,test}/CLASS/...`` or ``DIR/CLASS/...`` or a CSV file, ignores clutter, and
reports all mistakes at once. Files are listed, never opened: unreadable images are `quarantine`'s.

Class numbers are train's: the classes of val and test are looked up by name, so a class that is missing there
does not shift the others, as it does where each split numbers its own folders.

A split is drawn by hashing, not by shuffling: within each class the files are ordered by a keyed hash of
their path, and the first go to test, the next to val. So it is stratified and the same on every machine, and
it stays when the dataset grows: a file more moves at most one other file per split of its class, where a
seeded shuffle (scikit-learn's too) draws everything anew, and mixes what was trained on into what is tested. Groups
are divided by scikit-learn nevertheless, which balances classes: they stay only by the split file that a run writes.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rexnet_lit.data.settings import SplitSettings
from rexnet_lit.data.splits import (
    SPLIT_OF_NAME,
    SPLITS,
    Found,
    Split,
    draw,
    draw_groups,
    first_few,
    group_by_name,
    natural_key,
    quoted,
    read_split_file,
)
from rexnet_lit.data.walk import PathList, Walk
from rexnet_lit.utils.errors import UserError, plural
from rexnet_lit.utils.files import write_file

_LAYOUT = "expected DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg, or DIR/CLASS/*.jpg"

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
        notes: One line each: what the user should know.
        clutter: How many files and folders were left out.
        layout: ``split`` (DIR/train/CLASS), ``flat`` (DIR/CLASS) or ``file`` (a CSV).
        drawn: Whether val or test was drawn from train.
    """

    root: Path
    class_names: tuple[str, ...]
    splits: dict[Split, Samples]
    notes: tuple[str, ...] = ()
    clutter: int = 0
    layout: Layout = "flat"
    drawn: bool = False

    @property
    def pooled(self) -> bool:
        """Whether the splits are of one pool of images, drawn now or written down in a file."""
        return self.drawn or self.layout == "file"


def scan(
    root: str | os.PathLike[str],
    settings: SplitSettings = SplitSettings(),  # noqa: B008 (frozen)
    class_names: Sequence[str] | None = None,
) -> ImageFolder:
    """Find classes, splits and images.

    Args:
        root: The dataset's folder. ``valid`` and ``validation`` are taken as ``val``, whatever the case.
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
    where = Path(os.path.abspath(root))  # noqa: PTH100 - resolve() would replace the user's links
    problems = settings.problems()
    if not where.is_dir():
        problems.append("this is a file, not a folder" if where.exists() else "no such folder")
    if problems:
        return ImageFolder(where, (), {}), problems
    notes: list[str] = []
    walk = Walk(os.fsencode(where), follow_outside_links=settings.follow_outside_links)
    groups: dict[bytes, str] = {}
    if settings.split_file is None:
        layout, found = _read_folders(walk, class_names, problems, notes)
    else:
        layout, found = "file", read_split_file(walk, Path(settings.split_file), problems, groups)
    _say_walk(walk, problems, notes)
    names = tuple(class_names) if class_names is not None else _order(found, settings.class_order, problems)
    _check_classes(found, names, class_names is not None, layout, problems, notes)
    if settings.group_pattern is not None:
        raws = (path for by_class in found.values() for paths in by_class.values() for path in paths.raws())
        groups |= group_by_name(raws, settings.group_pattern, problems)
    if class_names is None and "val" not in found and settings.val_fraction == 0 and not settings.num_folds:
        problems.append("there is no val split and data.val_fraction is 0; training needs one to choose by")
    drawn = _draw_missing(found, settings, groups, problems, notes)
    splits = {
        split: _samples(where, found[split], names) for split in SPLITS if any(map(len, found.get(split, {}).values()))
    }
    return ImageFolder(where, names, splits, tuple(notes), walk.clutter, layout, drawn), problems


def _read_folders(
    walk: Walk, class_names: Sequence[str] | None, problems: list[str], notes: list[str]
) -> tuple[Layout, Found]:
    """Tell the two layouts apart, and list the images of each split by class."""
    tops, loose = walk.folders(b"")
    split_folders: dict[Split, list[bytes]] = {}
    for top in tops:
        if (split := SPLIT_OF_NAME.get(os.fsdecode(top).lower())) is not None:
            split_folders.setdefault(split, []).append(top)
    others = [top for top in tops if os.fsdecode(top).lower() not in SPLIT_OF_NAME]
    if split_folders and _are_classes(walk, split_folders, others, class_names):
        notes.append(f"{first_few([os.fsdecode(t) for t in tops if t not in others])} taken as a class, not as a split")
        split_folders = {}
    if not split_folders:
        return "flat", {"train": _read_classes(walk, b"", tops, loose, problems, notes)}
    if "train" not in split_folders and class_names is None:
        got = first_few([os.fsdecode(top) for top in tops])
        meant = ", ".join(quoted(os.fsdecode(f)) for some_folders in split_folders.values() for f in some_folders)
        problems.append(
            f"there is no train/ folder beside {got}; {_LAYOUT} (if {meant} is meant as a class, rename that folder)"
        )
    if loose:
        notes.append(f"{plural(loose, 'image beside the splits is', 'images beside the splits are')} ignored")
    if others:
        walk.clutter += len(others)
        notes.append(f"ignored beside the splits: {first_few([os.fsdecode(top) for top in others])}")
    found: Found = {}
    real: dict[str, Split] = {}
    for split, folders in split_folders.items():
        where = os.path.realpath(os.path.join(os.fsdecode(walk.root), os.fsdecode(folders[0])))  # noqa: PTH118
        if len(folders) > 1:
            problems.append(f"{first_few([os.fsdecode(f) for f in folders])} are one split; keep one")
        elif folders[0] != split.encode():
            notes.append(f"{quoted(os.fsdecode(folders[0]))} is taken as {split}/")
        if where in real:
            problems.append(f"{split} and {real[where]} are the same folder by a link")
        real[where] = split
        if not walk.stays_inside(folders[0]):
            continue  # said with the other links
        names, loose = walk.folders(folders[0])
        if split == "test" and loose and not names:
            notes.append(
                f"test/ has {plural(loose, 'image', 'images')} without class folders: ignored (to be predicted)"
            )
            continue
        found[split] = _read_classes(walk, folders[0], names, loose, problems, notes)
    return "split", found


def _are_classes(
    walk: Walk,
    split_folders: dict[Split, list[bytes]],
    others: list[bytes],
    class_names: Sequence[str] | None,
) -> bool:
    """Say whether folders called train or valid are classes: of vehicles, or beside invalid."""
    folders = [folder for some_folders in split_folders.values() for folder in some_folders]
    if class_names is not None:
        return {os.fsdecode(folder) for folder in folders} <= set(class_names)
    if len(folders) > 1 or "test" in split_folders or not others:  # test/ may well hold unlabelled images
        return False
    names, loose = walk.folders(folders[0])
    return not names and loose > 0


def _read_classes(
    walk: Walk, base: bytes, names: list[bytes], loose: int, problems: list[str], notes: list[str]
) -> dict[str, PathList]:
    """List the images of each class folder."""
    where = f"{quoted(os.fsdecode(base))}: " if base else ""
    if not names:
        got = f"{plural(loose, 'image', 'images')} directly, no class folders" if loose else "it is empty"
        problems.append(f"{where}{got}; {_LAYOUT}")
    elif loose:
        many = plural(loose, "image outside every class folder is", "images outside every class folder are")
        notes.append(f"{where}{many} ignored")
    before = len(walk.nested)
    lists = walk.images([base + b"/" + name if base else name for name in names])
    inner: dict[str, set[str]] = {os.fsdecode(name): set() for name in names}
    for folder in walk.nested[before:]:
        parts = folder.removeprefix(os.fsdecode(base) + "/").split("/")
        inner[parts[0]].add(parts[-1])
    shared = sorted(set.intersection(*inner.values())) if len(names) > 1 else []
    if len(shared) > 1:
        notes.append(
            f"{where}each of the classes {first_few([os.fsdecode(name) for name in names])} holds folders called "
            f"{first_few(shared)}: if those are the classes, name the outer folders train, val and test"
        )
    return {os.fsdecode(name): paths for name, paths in zip(names, lists, strict=True)}


def _say_walk(walk: Walk, problems: list[str], notes: list[str]) -> None:
    """Turn what the walk met into words."""
    if walk.outside_links:
        first = quoted(walk.outside_links[0])
        problems.append(
            f"{plural(len(walk.outside_links), 'link leads', 'links lead')} out of the folder, first {first}; "
            "copy the files in, or set data.follow_outside_links: true"
        )
    if walk.unreadable:
        many = plural(len(walk.unreadable), "folder", "folders")
        problems.append(f"{many} may not or cannot be read: {first_few(walk.unreadable)}")
    if walk.nested:
        first = quoted(walk.nested[0])
        many = plural(
            len(walk.nested),
            "nested folder belongs to the class above it",
            "nested folders belong to the class above them",
        )
        notes.append(f"{many}, first {first}")
    if walk.broken_links:
        many = plural(len(walk.broken_links), "broken link is", "broken links are")
        notes.append(f"{many} ignored, first {quoted(walk.broken_links[0])}")
    if walk.repeated_links:
        first = quoted(walk.repeated_links[0])
        many = plural(len(walk.repeated_links), "link to a folder already read is", "links to folders already read are")
        notes.append(f"{many} ignored, first {first}")
    for suffix, count in sorted(walk.unsupported.items()):
        if suffix:
            many = plural(count, f"{suffix} file is", f"{suffix} files are")
            notes.append(f"{many} ignored: convert to JPEG or PNG")
        else:
            notes.append(f"{plural(count, 'file without an extension is', 'files without an extension are')} ignored")


def _order(found: Found, class_order: str | os.PathLike[str], problems: list[str]) -> tuple[str, ...]:
    """Return train's classes in the order asked for."""
    names = sorted(found.get("train", ()))
    if class_order == "sorted":
        return tuple(names)
    if class_order == "natural":
        return tuple(sorted(names, key=lambda name: (natural_key(name), name)))
    try:
        listed = Path(class_order).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        what = f"data.class_order {quoted(os.fspath(class_order))}"
        problems.append(f"{what}: expected sorted, natural or a file of names ({type(error).__name__})")
        return tuple(names)
    wanted = tuple(line.strip("\r") for line in listed if line.strip())
    missing, extra = sorted(set(wanted) - set(names)), sorted(set(names) - set(wanted))
    twice = sorted(name for name, count in collections.Counter(wanted).items() if count > 1)
    if missing or extra or twice:
        problems.append(
            f"data.class_order {quoted(os.fspath(class_order))} lists {len(wanted)} classes, the folder has "
            f"{len(names)}; without a folder: {first_few(missing) or 'none'}; not listed: "
            f"{first_few(extra) or 'none'}; listed twice: {first_few(twice) or 'none'}"
        )
        return tuple(names)
    return wanted


def _check_classes(
    found: Found, names: tuple[str, ...], given: bool, layout: Layout, problems: list[str], notes: list[str]
) -> None:
    """Compare each split's classes with the numbering ones, and drop what has no number."""
    known = set(names)
    strange: dict[str, list[str]] = {}
    for split, by_class in found.items():
        extra = sorted(name for name, paths in by_class.items() if name not in known and (given or len(paths)))
        absent = [name for name in names if name not in by_class]
        empty = [name for name in names if not len(by_class.get(name, ()))]
        if given and (extra or (absent and layout == "split" and split == "train")):
            what = (
                f"unknown to it: {first_few(extra) or 'none'}; the model's, but not here: {first_few(absent) or 'none'}"
            )
            strange.setdefault(what, []).append(split)
        elif extra:
            many = plural(len(extra), "class is", "classes are")
            problems.append(f"{many} in {split}, but not in train: {first_few(extra)}")
        elif empty and split == "train" and not given:
            many = plural(len(empty), "class folder holds", "class folders hold")
            problems.append(f"{many} no images: {first_few(empty, 100)}")
        elif empty:
            notes.append(f"{len(empty)} of {len(names)} classes have no images in {split}: {first_few(empty)}")
        for name in extra:
            del by_class[name]
    for what, splits in strange.items():
        problems.append(f"the classes of {', '.join(splits)} are not the model's: {what}")
    if not given and len(names) == 1:
        problems.append(f"one class, {quoted(names[0])}; a classifier needs at least 2; {_LAYOUT}")


def _draw_missing(
    found: Found, settings: SplitSettings, groups: dict[bytes, str], problems: list[str], notes: list[str]
) -> bool:
    """Take val (and test, if asked for) from train where they are not given; say whether anything was taken."""
    if groups:
        _check_groups(found, groups, problems, notes)
    if "val" in found:
        if settings.num_folds:
            problems.append("data.num_folds is set, but there is a val split; take one of them away")
        settings = dataclasses.replace(settings, val_fraction=0.0, num_folds=0)
    if "test" in found:
        settings = dataclasses.replace(settings, test_fraction=0.0)
    takes_val = bool(settings.val_fraction or settings.num_folds)
    if not (takes_val or settings.test_fraction) or "train" not in found:
        return False
    if len(found) > 1:
        notes.append("val is drawn from train" if takes_val else "test is drawn from train")
    train = found["train"]
    drawn = (
        draw_groups(train, groups, settings) if groups else {n: draw(n, paths, settings) for n, paths in train.items()}
    )
    alone = [name for name, paths in train.items() if len(paths) == 1]
    if alone and not groups:
        many = plural(len(alone), "class has", "classes have")
        notes.append(f"{many} one image, which stays in train: {first_few(alone)}")
    bare = [name for name, parts in drawn.items() if not len(parts["train"]) and len(train[name])]
    if bare:
        problems.append(
            f"all images of {first_few(bare)} are of groups that went to val or test; make the groups smaller"
        )
    taken: dict[Split, bool] = {"train": True, "val": takes_val, "test": bool(settings.test_fraction)}
    for split, is_taken in taken.items():
        if is_taken:
            found[split] = {name: parts[split] for name, parts in drawn.items()}
    return True


def _check_groups(found: Found, groups: dict[bytes, str], problems: list[str], notes: list[str]) -> None:
    """Refuse given splits that share a group, and say what belongs to none."""
    where: dict[str, set[str]] = {}
    without = 0
    for split, by_class in found.items():
        for paths in by_class.values():
            for path in paths.raws():
                if path in groups:
                    where.setdefault(groups[path], set()).add(split)
                else:
                    without += 1
    torn = sorted(group for group, splits in where.items() if len(splits) > 1)
    if torn:
        many = plural(len(torn), "group is", "groups are")
        problems.append(f"{many} in more than one split: {first_few(torn)}; move each to one")
    notes.append(f"{plural(len(where), 'group', 'groups')} of images, each in one split")
    if without:
        notes.append(f"{plural(without, 'image belongs', 'images belong')} to no group; each counts as its own")


def _samples(root: Path, by_class: dict[str, PathList], names: tuple[str, ...]) -> Samples:
    lists = [by_class.get(name, PathList()) for name in names]
    targets = np.repeat(np.arange(len(names), dtype=np.int64), [len(paths) for paths in lists])
    return Samples(root, PathList.join(lists), targets)


def list_images(path: str | os.PathLike[str]) -> tuple[Path, PathList, tuple[str, ...]]:
    """List what to predict: one image file, or all images in a folder and its sub-folders, sorted.

    Returns:
        The folder, absolute, the paths below it, and what the user should know of what was left out. Links may lead
        anywhere.

    Raises:
        UserError: There is no image.
    """
    where = Path(os.path.abspath(path))  # noqa: PTH100
    if where.is_file():
        return where.parent, PathList([os.fsencode(where.name)]), ()
    if not where.is_dir():
        raise UserError(f"{quoted(os.fspath(path))}: no such file or folder")
    walk = Walk(os.fsencode(where), follow_outside_links=True)
    (paths,) = walk.images([b""])
    problems: list[str] = []
    notes: list[str] = []
    walk.nested.clear()  # there are no classes
    _say_walk(walk, problems, notes)
    if not len(paths):
        known = "; ".join(["expected JPEG, PNG, WebP, BMP, TIFF or GIF files", *problems, *notes])
        raise UserError(f"{quoted(os.fspath(path))}: no images here; {known}")
    return where, paths, (*problems, *notes)


def write_split(folder: ImageFolder, path: str | os.PathLike[str]) -> None:
    """Write ``path,label,split``, which `scan` reads back as ``split_file``.

    UTF-8 as the csv module quotes it (a newline in a name stands between quotes); bytes of a name that are no
    UTF-8 are written as they are. It is for reading back, so nothing is escaped for spreadsheets.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("path", "label", "split"))
    for split, samples in folder.splits.items():
        for name, target in zip(samples.paths, samples.targets.tolist(), strict=True):
            writer.writerow((name, folder.class_names[target], split))
    write_file(Path(path), text.getvalue())


def fingerprint(samples: Samples) -> str:
    """Return a SHA-256 over paths, class numbers and file sizes: the same for the same set, in any order, anywhere."""
    rows = sorted(zip(samples.paths.raws(), samples.targets.tolist(), strict=True))
    root = os.fsencode(samples.root)
    digest = hashlib.sha256()
    for path, target in rows:
        digest.update(b"%b\0%d %d\n" % (path, target, _size(os.path.join(root, path))))  # noqa: PTH118
    return digest.hexdigest()


def _size(path: bytes) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116 - maybe a million
    except OSError:
        return -1

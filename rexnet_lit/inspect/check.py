"""The dataset doctor: what is wrong with a folder of images, and what to do about it, before a training run.

`check` returns findings as data; `render` shows them on one screen; `Checkup.to_dict` gives them as JSON.
Each file is read and decoded once for everything that is asked about it. Nothing is written.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rexnet_lit.data.decode import decode, probe, read_bytes
from rexnet_lit.data.folder import ImageFolder, try_scan
from rexnet_lit.data.image_header import DecodeError, ImageInfo
from rexnet_lit.data.settings import DataRecord
from rexnet_lit.data.splits import Split, first_few
from rexnet_lit.data.verify import UnreadableFile, splits_over_limit
from rexnet_lit.inspect.duplicates import groups_of_equals, near_groups, perceptual_hash, thumbnail
from rexnet_lit.inspect.findings import CheckResult, Finding
from rexnet_lit.utils.errors import plural
from rexnet_lit.utils.process import cpu_count

FEW_IMAGES = 10  # a class with fewer to learn from is a guess
IMBALANCE = 10.0  # the largest class against the smallest
SMALL_SIDE = 32  # pixels; below, there is less than a ReXNet's smallest input
LONG_SHAPE = 4.0  # longer side against the shorter; a square crop sees little of such a picture
ODD_AREA = 25.0  # times larger or smaller than the median picture


@dataclasses.dataclass(frozen=True, eq=False)
class _Look:
    """One file after one reading."""

    path: str
    split: Split
    target: int
    reason: str = ""  # why it is unreadable
    info: ImageInfo | None = None
    digest: bytes | None = None
    phash: int = 0
    small: NDArray[np.uint8] | None = None


def check(
    root: str | os.PathLike[str],
    settings: DataRecord = DataRecord(),  # noqa: B008 (frozen)
    *,
    progress: Callable[[int, int], None] | None = None,
) -> CheckResult:
    """Look at a dataset from all sides.

    Args:
        root: Its folder, as `folder.scan` takes it.
        settings: How to split it, and how many unreadable images a training would take.
        progress: Called with the number of images read and their total.

    Returns:
        What was found; a dataset that cannot be used is an error among the findings, not an exception.
    """
    folder, problems = try_scan(root, settings)
    looks = _look_at_all(folder, progress)
    images = [look for look in looks if look.info is not None]
    equal = [[looks[i] for i in group] for group in groups_of_equals(look.digest for look in looks)]
    alike = _alike(images, equal)
    findings = [Finding("error", "folder", problem) for problem in problems]
    findings += _about_splits(folder, problems)
    findings += _about_folder(folder)
    findings += _about_classes(folder)
    findings += _about_bad(folder, looks, settings.max_bad_fraction) if folder.splits else []
    findings += _about_copies("duplicate", "have the same content", equal)
    findings += _about_copies("near-duplicate", "look the same", alike)
    findings += _about_sizes(images)
    order = {"error": 0, "warning": 1, "info": 2}
    infos = [look.info for look in images if look.info is not None]
    return CheckResult(
        root=str(folder.root),
        layout=folder.layout,
        class_names=folder.class_names,
        counts=_counts(folder),
        formats=dict(collections.Counter(info.format for info in infos).most_common()),
        sizes={
            "width": _spread([info.width for info in infos]),
            "height": _spread([i.height for i in infos]),
        },
        animated=sum(info.frames > 1 for info in infos),
        clutter=folder.clutter,
        bad=tuple(UnreadableFile(look.path, look.reason) for look in looks if look.reason),
        duplicates=tuple(tuple(look.path for look in group) for group in equal),
        near_duplicates=tuple(tuple(look.path for look in group) for group in alike),
        findings=tuple(sorted(findings, key=lambda finding: order[finding.severity])),
        examples=tuple((look.split, folder.class_names[look.target], look.path) for look in looks),
    )


def _look_at_all(folder: ImageFolder, progress: Callable[[int, int], None] | None) -> list[_Look]:
    """Read every file once, in threads."""
    places = [(split, i) for split, samples in folder.splits.items() for i in range(len(samples))]
    looks = []
    pool = ThreadPoolExecutor(cpu_count())
    try:
        for look in pool.map(lambda place: _look(folder, *place), places):
            looks.append(look)
            if progress is not None:
                progress(len(looks), len(places))
    finally:
        pool.shutdown(cancel_futures=True)
    return looks


def _look(folder: ImageFolder, split: Split, index: int) -> _Look:
    samples = folder.splits[split]
    look = _Look(samples.paths[index], split, int(samples.targets[index]))
    try:
        data = read_bytes(samples.path(index))
        info = probe(data)
        pixels = decode(data, min_size=64, thorough=True)
    except DecodeError as error:
        return dataclasses.replace(look, reason=str(error))
    digest = hashlib.blake2b(data, digest_size=16).digest()
    return dataclasses.replace(look, info=info, digest=digest, phash=perceptual_hash(pixels), small=thumbnail(pixels))


def _alike(images: Sequence[_Look], equal: list[list[_Look]]) -> list[list[_Look]]:
    """Group what looks the same, one of each set of equal files."""
    repeated = {id(look) for group in equal for look in group[1:]}
    once = [look for look in images if id(look) not in repeated]
    hashes = np.array([look.phash for look in once], np.uint64)
    small = np.array([look.small for look in once], np.uint8).reshape(-1, 16, 16, 3)
    return [[once[i] for i in group] for group in near_groups(hashes, small)]


def _counts(folder: ImageFolder) -> dict[Split, dict[str, int]]:
    counts = {}
    for split, samples in folder.splits.items():
        per_class = np.bincount(samples.targets, minlength=len(folder.class_names)).tolist()
        counts[split] = dict(zip(folder.class_names, per_class, strict=True))
    return counts


def _spread(values: list[int]) -> tuple[int, int, int]:
    return (min(values), int(np.median(values)), max(values)) if values else (0, 0, 0)


def _about_folder(folder: ImageFolder) -> list[Finding]:
    """Pass on what the scan noted."""
    found = []
    for note in folder.notes:
        expected = "taken as" in note or "drawn from" in note
        found.append(Finding("info" if expected else "warning", "layout", note))
    if folder.clutter:
        many = plural(folder.clutter, "file or folder is no image", "files and folders are no images")
        found.append(Finding("info", "clutter", f"{many}, and ignored"))
    return found


def _about_splits(folder: ImageFolder, problems: Sequence[str]) -> list[Finding]:
    """Name a split that training needs and that holds nothing, where the scan has said nothing of it."""
    missing = [name for name in ("train", "val") if name not in folder.splits]
    if problems or not missing:
        return []
    message = f"no images for {' and '.join(missing)}"
    return [Finding("error", "empty-split", message, "add images: a class of one image stays in train whole")]


def _about_classes(folder: ImageFolder) -> list[Finding]:
    if "train" not in folder.splits or len(folder.class_names) < 2:
        return []
    counts = _counts(folder)["train"]
    found = []
    few = [name for name, count in counts.items() if 0 < count < FEW_IMAGES]
    if few:
        message = f"{len(few)} of {len(counts)} classes have fewer than {FEW_IMAGES} images in train: {first_few(few)}"
        found.append(Finding("warning", "tiny-class", message, "add images, or merge these classes"))
    filled = {name: count for name, count in counts.items() if count}
    most, least = max(filled, key=lambda name: filled[name]), min(filled, key=lambda name: filled[name])
    if filled[most] >= IMBALANCE * filled[least]:
        message = (
            f"the largest class, {first_few([most])}, has {filled[most]} images in train, "
            f"the smallest, {first_few([least])}, {filled[least]}"
        )
        advice = "read macro F1 instead of accuracy; try --data.sampler balanced"
        found.append(Finding("warning", "imbalance", message, advice))
    return found


def _about_bad(folder: ImageFolder, looks: Sequence[_Look], limit: float) -> list[Finding]:
    bad = [look for look in looks if look.reason]
    if not bad:
        return []
    common = collections.Counter(look.reason for look in bad).most_common()
    reasons = ", ".join(f"{count} x {reason}" for reason, count in common[:5])
    if common[5:]:
        reasons += f", {sum(count for _, count in common[5:])} x other reasons"
    by_split = {name: sum(look.split == name for look in bad) for name in folder.splits}
    over = splits_over_limit(folder, by_split, limit)
    nothing = [name for name, count in by_split.items() if count == len(folder.splits[name])]
    message = f"{len(bad)} of {len(looks)} images are unreadable: {reasons}"
    advice = "replace or delete them; " + (
        f"training refuses more than {100 * limit:g}% (data.max_bad_fraction): {', '.join(over)}"
        if over
        else "training leaves them out"
    )
    paths = tuple(look.path for look in bad)
    found = [Finding("error" if over else "warning", "unreadable", message, advice, paths)]
    if nothing:
        message = f"no image can be read of {', '.join(nothing)}"
        found.append(Finding("error", "unreadable-split", message, "mend the files, or add others"))
    good = {look.target for look in looks if look.split == "train" and not look.reason}
    lost = sorted({look.target for look in bad if look.split == "train"} - good)
    if lost:
        names = first_few([folder.class_names[k] for k in lost])
        message = f"no training image can be read of {plural(len(lost), 'class', 'classes')}: {names}"
        found.append(Finding("error", "unreadable-class", message, "mend the files, or remove these folders"))
    return found


def _about_copies(kind: str, what: str, groups: list[list[_Look]]) -> list[Finding]:
    """Tell copies across splits (leakage) and across classes (conflicts) from harmless ones."""
    spread = [(group, len({look.split for look in group}), len({look.target for look in group})) for group in groups]
    leaks = [group for group, splits, _ in spread if splits > 1]
    conflicts = [group for group, _, classes in spread if classes > 1]
    harmless = [group for group, splits, classes in spread if splits == classes == 1]
    cases: list[tuple[Literal["warning", "info"], str, list[list[_Look]], str, str]] = [
        (
            "warning",
            "across-splits",
            leaks,
            "in different splits",
            "keep all in one split: scores are too good now",
        ),
        ("warning", "across-classes", conflicts, "under different classes", "decide which label is right"),
        (
            "info",
            "within-class",
            harmless,
            "in one class and split",
            "they only weigh more; delete them if unwanted",
        ),
    ]
    found = []
    for severity, code, these, where, advice in cases:
        if these:
            paths = tuple(look.path for group in these for look in group)
            message = f"{len(paths)} images in {plural(len(these), 'group', 'groups')} {what} {where}"
            found.append(Finding(severity, f"{kind}-{code}", message, advice, paths))
    return found


def _about_sizes(images: list[_Look]) -> list[Finding]:
    shapes = [(look.path, look.info.width, look.info.height) for look in images if look.info is not None]
    if not shapes:
        return []
    typical = float(np.median([width * height for _, width, height in shapes]))
    small = [path for path, w, h in shapes if min(w, h) < SMALL_SIDE]
    long = [path for path, w, h in shapes if max(w, h) > LONG_SHAPE * min(w, h)]
    odd = [path for path, w, h in shapes if not typical / ODD_AREA <= w * h <= typical * ODD_AREA]
    animated = [look.path for look in images if look.info is not None and look.info.frames > 1]
    cases: list[tuple[Literal["warning", "info"], str, list[str], str, str]] = [
        (
            "warning",
            "small",
            small,
            f"narrower than {SMALL_SIDE} pixels",
            "look at them: thumbnails or icons?",
        ),
        (
            "info",
            "long",
            long,
            f"over {LONG_SHAPE:g} times as long as wide",
            "a centre crop shows little of them",
        ),
        (
            "info",
            "odd-size",
            odd,
            f"over {ODD_AREA:g} times larger or smaller than the median",
            "look at them",
        ),
        ("info", "animated", animated, "of several frames or pages; the first is used", ""),
    ]
    return [
        Finding(severity, code, f"{plural(len(paths), 'image', 'images')} {what}", advice, tuple(paths))
        for severity, code, paths, what, advice in cases
        if paths
    ]

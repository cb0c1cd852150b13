"""What is wrong with a folder of images, and what to do about it, before a training run.

`check` returns the findings as data; `findings.print_result` shows them on one screen. Nothing is written.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from rexnet_lit.checks import suspects as labels
from rexnet_lit.checks import symmetries
from rexnet_lit.checks.findings import SPOIL_SCORES, CheckResult, Finding, Severity, Suspect
from rexnet_lit.checks.symmetries import Change, Symmetries
from rexnet_lit.data.duplicates import equal_groups, groups_across, near_groups
from rexnet_lit.data.folder import ImageFolder, try_scan
from rexnet_lit.data.image_header import ImageInfo
from rexnet_lit.data.settings import DataRecord, EvalRecipe
from rexnet_lit.data.splits import Split, first_few
from rexnet_lit.data.verify import Details, UnreadableFile, splits_over_limit, verify_images
from rexnet_lit.utils.errors import plural

FEW_IMAGES = 10  # a class with fewer training images is hardly learned
IMBALANCE = 10.0  # largest class / smallest class
SMALL_SIDE = 32  # pixels; smaller than the smallest input of a ReXNet
LONG_SHAPE = 4.0  # longer side / shorter side; a square crop shows little of such an image
CROPPED = 0.34  # share that the crop takes from the images because they are no squares; photographs, 3:2, lose 0.33
ODD_AREA = 25.0  # times larger or smaller than the median image

_SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
# Copies across splits are leakage, copies across classes are conflicting labels.
_COPIES: tuple[tuple[Severity, str, str, str], ...] = (
    ("warning", "across-splits", "in different splits", "keep all in one split: scores are too good now"),
    ("warning", "across-classes", "under different classes", "decide which label is right"),
    ("info", "within-class", "in one class and split", "they only weigh more; delete them if unwanted"),
)

Embed = Callable[[list[str], int, Change], NDArray[np.float32]]


@dataclasses.dataclass(frozen=True, eq=False)
class _Image:
    path: str
    split: Split
    target: int
    reason: str = ""  # why it is unreadable
    details: Details | None = None


def check(
    root: str | os.PathLike[str],
    settings: DataRecord = DataRecord(),  # noqa: B008 (frozen)
    recipe: EvalRecipe = EvalRecipe(),  # noqa: B008 (frozen)
    *,
    progress: Callable[[int, int], None] | None = None,
    embed: Embed | None = None,
    predictions: str | None = None,
) -> CheckResult:
    """Check a dataset.

    Args:
        root: Its folder, as `folder.scan` takes it.
        settings: How to split it, how many unreadable images a training run accepts, and its fixes: images that they
            keep are not reported again.
        recipe: How images will be cropped.
        progress: Called with the number of images read and their total.
        embed: Checks the labels and the symmetries too, by the features (N, C) that it returns for the absolute paths
            of N images. Its second argument is the median length of their shorter side in pixels, the third one is
            applied to each image (H, W, 3).
        predictions: Checks the labels by this ``predictions.csv`` instead.

    Returns:
        The findings. A dataset that cannot be used is an error among them, not an exception.
    """
    folder, problems = try_scan(root, settings)
    images, equal = _read_all(folder, progress)
    alike = _near_duplicates(images, equal)
    kept = folder.fixes.kept
    equal, alike = ([g for g in groups if not kept.issuperset(images[i].path for i in g)] for groups in (equal, alike))
    infos = [image.details.info for image in images if image.details]
    suspects, judgement, symmetry = _check_labels(folder, images, [*equal, *alike], embed, predictions)
    suspects = tuple(suspect for suspect in suspects if suspect.path not in kept)
    findings = [
        *(Finding("error", "folder", problem) for problem in problems),
        *_check_splits(folder, problems),
        *_check_layout(folder),
        *_check_missing(folder),
        *_check_classes(folder),
        *_check_unreadable(folder, images, settings.max_bad_fraction),
        *_check_copies("duplicate", "have the same content", images, equal),
        *_check_copies("near-duplicate", "look the same", images, alike),
        *_check_crop(infos, recipe),
        *_check_depth(images),
        *_check_sizes(images, recipe, kept),
        *_report_suspects(suspects, judgement),
        *symmetries.report(symmetry),
    ]

    def paths(groups: list[list[int]]) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(images[i].path for i in group) for group in groups)

    return CheckResult(
        root=str(folder.root),
        layout=folder.layout,
        class_names=folder.class_names,
        counts=_counts(folder),
        formats=dict(collections.Counter(info.format for info in infos).most_common()),
        sizes={"width": _spread([i.width for i in infos]), "height": _spread([i.height for i in infos])},
        visible=_visible(infos, recipe),
        animated=sum(info.frames > 1 for info in infos),
        clutter=folder.clutter,
        bad=tuple(UnreadableFile(image.path, image.reason) for image in images if image.reason),
        duplicates=paths(equal),
        near_duplicates=paths(alike),
        findings=tuple(sorted(findings, key=lambda f: (_SEVERITIES.index(f.severity), f.code not in SPOIL_SCORES))),
        suspects=suspects,
        examples=tuple((image.split, folder.class_names[image.target], image.path) for image in images),
    )


def _read_all(folder: ImageFolder, progress: Callable[[int, int], None] | None) -> tuple[list[_Image], list[list[int]]]:
    """Return all images, and groups of positions of those with the same content."""
    total = sum(len(samples) for samples in folder.splits.values())
    images: list[_Image] = []
    contents = [np.zeros((0, 16), np.uint8)]
    for split, samples in folder.splits.items():
        read_before = len(images)

        def report(done: int, _: int, before: int = read_before) -> None:
            if progress is not None:
                progress(before + done, total)

        found = verify_images(samples, details=True, cache=False, progress=report)
        reasons = dict(found.bad)
        images += [
            _Image(samples.paths[i], split, int(samples.targets[i]), reasons.get(i, ""), details)
            for i, details in enumerate(found.details)
        ]
        contents.append(found.contents)
    return images, equal_groups(np.concatenate(contents))


def _near_duplicates(images: Sequence[_Image], equal: list[list[int]]) -> list[list[int]]:
    """Group the images that look the same; of equal files, only the first is compared."""
    repeated = {i for group in equal for i in group[1:]}
    found = [(i, image.details) for i, image in enumerate(images) if image.details and i not in repeated]
    hashes = np.array([details.phash for _, details in found], np.uint64)
    thumbnails = np.array([details.thumbnail for _, details in found], np.uint8).reshape(-1, 16, 16, 3)
    return [[found[k][0] for k in group] for group in near_groups(hashes, thumbnails)]


def _check_labels(
    folder: ImageFolder,
    images: Sequence[_Image],
    copies: Sequence[Sequence[int]],
    embed: Embed | None,
    predictions: str | None,
) -> tuple[tuple[Suspect, ...], labels.Judgement | None, Symmetries | None]:
    """Return the images of all splits whose labels are probably wrong, how they were judged, and the symmetries.

    Unreadable images are left out. The judgement is None if there is nothing to check the labels by, and the symmetries
    if there are no features.
    """
    good = [i for i, image in enumerate(images) if image.details]
    if len(folder.class_names) < 2 or not good or (embed is None and predictions is None):
        return (), None, None
    targets, paths = np.array([images[i].target for i in good]), [images[i].path for i in good]
    if predictions is not None:
        judgement = labels.judge_logits(labels.read_logits(predictions, folder.class_names, paths), targets)
        return labels.describe(judgement, targets, paths, folder.class_names), judgement, None
    assert embed is not None  # noqa: S101 (for the type checker)
    sides = [min(image.details.info.width, image.details.info.height) for image in images if image.details]
    files, side = [os.path.join(folder.root, path) for path in paths], int(np.median(sides))  # noqa: PTH118
    features = embed(files, side, symmetries.unchanged)
    by_name: dict[str, list[int]] = {}
    for i, image in enumerate(images if folder.groups else ()):
        if (group := folder.groups.get(os.fsencode(image.path))) is not None:
            by_name.setdefault(group, []).append(i)
    units = labels.join_units(len(images), [*copies, *by_name.values()])[good]
    judgement = labels.judge_features(features, targets, len(folder.class_names), units)
    same = labels.join_units(len(images), copies)[good]
    found = symmetries.measure(features, targets, units, lambda some, how: embed([files[i] for i in some], side, how))
    return labels.describe(judgement, targets, paths, folder.class_names, features, same), judgement, found


def _report_suspects(suspects: Sequence[Suspect], judgement: labels.Judgement | None) -> list[Finding]:
    if judgement is None:
        return []
    if judgement.share is None:
        message = "no label was checked: the features or predictions hardly tell the classes apart"
        advice = "check the labels with a model that is trained on these classes: --labels --model MODEL"
        return [Finding("warning", "labels", message, advice)]
    if not suspects:
        return [Finding("info", "labels", "no label is more likely wrong than right")]
    share = f"estimated share of all: {judgement.share:.1%}"
    message = f"{plural(len(suspects), 'label is', 'labels are')} probably wrong ({share})"
    advice = "look at them, worst first; they are wrong more often than right, but not all of them are"
    return [Finding("warning", "suspect-label", message, advice, tuple(suspect.path for suspect in suspects))]


def _counts(folder: ImageFolder) -> dict[Split, dict[str, int]]:
    counts = {}
    for split, samples in folder.splits.items():
        per_class = np.bincount(samples.targets, minlength=len(folder.class_names)).tolist()
        counts[split] = dict(zip(folder.class_names, per_class, strict=True))
    return counts


def _spread(values: list[int]) -> tuple[int, int, int]:
    return (min(values), int(np.median(values)), max(values)) if values else (0, 0, 0)


def _check_layout(folder: ImageFolder) -> list[Finding]:
    """Return the notes of the scan."""
    found = []
    for note in folder.notes:
        if " have no images in " in note:
            continue  # see _check_missing
        expected = any(words in note for words in ("taken as", "drawn from", "data.fixes", "each in one split"))
        found.append(Finding("info" if expected else "warning", "layout", note))
    if folder.clutter:
        many = plural(folder.clutter, "file or folder is no image", "files and folders are no images")
        found.append(Finding("info", "clutter", f"{many}, and ignored"))
    return found


def _check_splits(folder: ImageFolder, problems: Sequence[str]) -> list[Finding]:
    """Report an empty split that training needs, unless the scan has already failed."""
    missing = [name for name in ("train", "val") if name not in folder.splits]
    if problems or not missing:
        return []
    message = f"no images for {' and '.join(missing)}"
    return [Finding("error", "empty-split", message, "add images: a class of one image stays in train whole")]


def _check_missing(folder: ImageFolder) -> list[Finding]:
    """Report classes without images for validation or test, also where these are drawn."""
    found = []
    for split, counts in _counts(folder).items():
        empty = [name for name, count in counts.items() if not count]
        if empty and split != "train":
            message = f"{len(empty)} of {len(counts)} classes have no images in {split}: {first_few(empty)}"
            found.append(Finding("warning", "missing-class", message, "add some: no score tells how good these are"))
    return found


def _check_classes(folder: ImageFolder) -> list[Finding]:
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


def _check_unreadable(folder: ImageFolder, images: Sequence[_Image], limit: float) -> list[Finding]:
    bad = [image for image in images if image.reason]
    if not bad:
        return []
    common = collections.Counter(image.reason for image in bad).most_common()
    reasons = [f"{count} x {reason}" for reason, count in common[:5]]
    if common[5:]:
        reasons.append(f"{sum(count for _, count in common[5:])} x other reasons")
    by_split = {name: sum(image.split == name for image in bad) for name in folder.splits}
    over = splits_over_limit(folder, by_split, limit)
    advice = "replace or delete them; " + (
        f"training refuses more than {100 * limit:g}% (data.max_bad_fraction): {', '.join(over)}"
        if over
        else "training leaves them out"
    )
    message = f"{len(bad)} of {len(images)} images are unreadable: {', '.join(reasons)}"
    paths = tuple(image.path for image in bad)
    found = [Finding("error" if over else "warning", "unreadable", message, advice, paths)]
    empty = [name for name, count in by_split.items() if count == len(folder.splits[name])]
    if empty:
        message = f"no image can be read of {', '.join(empty)}"
        found.append(Finding("error", "unreadable-split", message, "repair the files, or add others"))
    good = {image.target for image in images if image.split == "train" and not image.reason}
    lost = sorted({image.target for image in bad if image.split == "train"} - good)
    if lost:
        names = first_few([folder.class_names[k] for k in lost])
        message = f"no training image can be read of {plural(len(lost), 'class', 'classes')}: {names}"
        found.append(Finding("error", "unreadable-class", message, "repair the files, or remove these folders"))
    return found


def _check_copies(kind: str, what: str, images: Sequence[_Image], groups: list[list[int]]) -> list[Finding]:
    leaks = groups_across(groups, [image.split for image in images])
    conflicts = groups_across(groups, [image.target for image in images])
    reported = {group[0] for group in leaks + conflicts}
    harmless = [group for group in groups if group[0] not in reported]
    found = []
    for these, (severity, code, where, advice) in zip((leaks, conflicts, harmless), _COPIES, strict=True):
        if these:
            paths = tuple(images[i].path for group in these for i in group)
            message = f"{len(paths)} images in {plural(len(these), 'group', 'groups')} {what} {where}"
            found.append(Finding(severity, f"{kind}-{code}", message, advice, paths))
    return found


def _visible(infos: Sequence[ImageInfo], recipe: EvalRecipe) -> float:
    """Return the share of an image's area that the network is given outside training, as the mean over the images."""
    return float(np.mean([recipe.visible(info.width, info.height) for info in infos])) if infos else 1.0


def _check_crop(infos: Sequence[ImageInfo], recipe: EvalRecipe) -> list[Finding]:
    """Warn if the centre crop costs more of the images than of ordinary photographs, which lose a third."""
    visible = _visible(infos, recipe)
    if recipe.crop_mode != "center" or 1 - visible / recipe.visible(1, 1) <= CROPPED:
        return []
    message = f"the centre crop never shows {1 - visible:.0%} of the images' area (mean over {len(infos)} images)"
    advice = "if it matters what is at their ends: --data.crop_mode border (pads to a square) or squash (distorts)"
    return [Finding("warning", "crop", message, advice)]


def _check_depth(images: Sequence[_Image]) -> list[Finding]:
    """Name 16-bit images whose values use fewer bits; they are brightened, not all alike if their bits differ."""
    found = [(image.path, image.details.info.used_bits) for image in images if image.details]
    depths = collections.Counter(bits for _, bits in found if bits)
    if not depths.keys() - {16}:
        return []
    paths = tuple(path for path, bits in found if bits and bits < 16)
    message = f"{plural(len(paths), '16-bit image uses', '16-bit images use')} only part of the 16 bits: " + ", ".join(
        f"{count} scaled as {bits} bits" for bits, count in sorted(depths.items())
    )
    if len(depths) == 1:
        return [Finding("info", "bit-depth", message, "", paths)]
    advice = "their brightness cannot be compared; if it matters, save all with one scale, as 8 bits"
    return [Finding("warning", "bit-depth", message, advice, paths)]


def _check_sizes(images: Sequence[_Image], recipe: EvalRecipe, kept: frozenset[str]) -> list[Finding]:
    infos = [(image.path, image.details.info) for image in images if image.details]
    if not infos:
        return []
    typical = float(np.median([info.width * info.height for _, info in infos]))
    crops = recipe.crop_mode == "center" and not _check_crop([info for _, info in infos], recipe)

    def is_odd(info: ImageInfo) -> bool:
        return not typical / ODD_AREA <= info.width * info.height <= typical * ODD_AREA

    cases: tuple[tuple[Severity, str, Callable[[ImageInfo], bool], str, str], ...] = (
        (
            "warning",
            "small",
            lambda info: min(info.width, info.height) < SMALL_SIDE,
            f"smaller than {SMALL_SIDE} pixels on one side",
            "view them: thumbnails or icons?",
        ),
        (
            "info",
            "long",
            lambda info: crops and max(info.width, info.height) > LONG_SHAPE * min(info.width, info.height),
            f"over {LONG_SHAPE:g} times as long as wide",
            "a centre crop shows little of them; data.crop_mode border or squash shows all",
        ),
        ("info", "odd-size", is_odd, f"over {ODD_AREA:g} times larger or smaller than the median", "view them"),
        ("info", "animated", lambda info: info.frames > 1, "of several frames or pages; the first is used", ""),
    )
    found = []
    for severity, code, applies, what, advice in cases:
        paths = tuple(path for path, info in infos if applies(info) and path not in kept)
        if paths:
            found.append(Finding(severity, code, f"{plural(len(paths), 'image', 'images')} {what}", advice, paths))
    return found

"""Which images a run leaves out as unreadable, and when there are too many to go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rexnet_lit.data import verify
from rexnet_lit.data.duplicates import equal_groups, groups_across
from rexnet_lit.data.folder import ImageFolder, Samples
from rexnet_lit.data.splits import Split, first_few
from rexnet_lit.utils.errors import UserError, plural
from rexnet_lit.utils.progress import progress


def verify_splits(splits: Mapping[Split, Samples], unlabelled: Samples | None = None) -> None:
    """Verify all images, and print a warning if files have the same content in two splits or classes."""
    images = {str(name): samples for name, samples in splits.items()}
    if unlabelled is not None:
        images["unlabelled"] = unlabelled
    results = []
    for name, samples in images.items():
        with progress(f"Verifying the {name} images", len(samples)) as show:
            results.append(verify.verify_images(samples, progress=lambda done, total: show(done)))
    groups = equal_groups(np.concatenate([result.contents for result in results]))
    split_of = np.repeat([*images], [len(samples) for samples in images.values()])
    class_of = np.concatenate([samples.targets for samples in images.values()])
    labelled = [[i for i in group if class_of[i] >= 0] for group in groups]
    for labels, where in (
        (split_of, "splits: the scores are too good"),
        (class_of, "classes: one label is wrong"),
    ):
        count = sum(map(len, groups_across(labelled, labels)))
        if count:
            many = plural(count, "image", "images")
            hint = "`python -m rexnet_lit check` lists them"
            print(f"warning: {many} with the same content in several {where}; {hint}")  # noqa: T201
    copies = sum(class_of[i] < 0 and not {"val", "test"}.isdisjoint(split_of[group]) for group in groups for i in group)
    if copies:
        many = plural(copies, "image", "images")
        print(f"warning: {many} of data.unlabelled are also in val or test: the scores may be too good")  # noqa: T201


def find_bad(folder: ImageFolder, needed: Sequence[Split], limit: float) -> dict[Split, list[tuple[int, str]]]:
    """Return index and reason of each split's unreadable images.

    Args:
        folder: The dataset.
        needed: The splits to check; all where they come from one pool.
        limit: The share of unreadable images that is accepted.

    Raises:
        UserError: There are more.
    """
    checked = [name for name in folder.splits if folder.pooled or name in needed]
    bad = {name: verify.find_unreadable(folder.splits[name]) for name in checked}
    names = verify.splits_over_limit(folder, {name: len(rows) for name, rows in bad.items()}, limit)
    if names:
        found = [(folder.splits[name].paths[i], reason) for name in names for i, reason in bad[name]]
        total = sum(len(folder.splits[name]) for name in names)
        where = f"{folder.root}: {len(found)} of {total} images of {', '.join(names)}"
        raise too_many(where, *found[0], limit, "`python -m rexnet_lit check` lists them: ")
    return bad


def too_many(where: str, path: str, reason: str, limit: float, hint: str = "") -> UserError:
    """Return the error for too many unreadable images, with one of them as an example."""
    return UserError(
        f"{where} cannot be read (such as {path!r}: {reason}), more than data.max_bad_fraction {limit}; {hint}repair "
        "or remove them, or set a larger fraction"
    )


def without_bad(samples: Samples, bad: Sequence[tuple[int, str]]) -> Samples:
    """Return the readable samples.

    Raises:
        UserError: None is readable.
    """
    if len(bad) == len(samples) == 1:
        raise UserError(f"{samples.path(0)}: cannot be read as an image ({bad[0][1]}); repair or replace it")
    if bad and len(bad) == len(samples):
        what, many = first_few([samples.paths[i] for i, _ in bad]), plural(len(bad), "image", "images")
        raise UserError(f"{samples.root}: none of the {many} can be read: {what} ({bad[0][1]}); repair or replace them")
    return samples.take(np.setdiff1d(np.arange(len(samples)), [i for i, _ in bad]))


def check_classes(samples: Samples, class_names: Sequence[str]) -> None:
    """Raise `UserError` if no training image of a class is readable."""
    counts = np.bincount(samples.targets, minlength=len(class_names))
    empty = [class_names[number] for number in np.flatnonzero(counts == 0).tolist()]
    if empty:
        raise UserError(
            f"{samples.root}: no training image can be read of {plural(len(empty), 'class', 'classes')}: "
            f"{first_few(empty, 100)}; repair the files (`python -m rexnet_lit check` lists them), or remove these "
            "folders"
        )

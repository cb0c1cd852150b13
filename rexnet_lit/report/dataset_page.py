"""What `check` found in a dataset as one HTML page, with images of every class, on which labels are corrected."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rexnet_lit.report.html import THUMBNAIL, decidable, decisions, gallery_entry, render_page, thumbnail
from rexnet_lit.utils.files import write_file

if TYPE_CHECKING:
    from rexnet_lit.checks.findings import CheckResult, Suspect
    from rexnet_lit.report.html import Image


# What the page shows at most: classes, images of each, groups of duplicates, images of each, suspects, odd shapes.
CLASSES, IMAGES, GROUPS, DUPLICATES, SUSPECTS, SHAPES = 100, 12, 24, 6, 200, 24
LARGE, SMALL = 320, 96  # pixels of the longer side: a suspect, and the images that it is compared with
_SHAPE_CODES = ("small", "long", "odd-size", "animated")  # findings of single images


def write_dataset_page(
    file: str | os.PathLike[str],
    result: CheckResult,
    *,
    read_image: Callable[[str], Image],
    sha256: Callable[[str], str] = lambda path: "",
    augmented: Sequence[tuple[str, str, Image]] = (),
    config: str = "",
) -> None:
    """Write the page: one file without links, so it can be sent by mail.

    In a browser that runs JavaScript, suspects, duplicates and images of odd shapes can be decided on: keep, relabel
    or remove. The page saves that as ``fixes.csv``, for ``data.fixes`` and `rexnet-lit fix`.

    Args:
        file: The HTML file.
        result: What `check` found.
        read_image: Turns a path below the dataset's folder into RGB, (H, W, 3). If it raises, a grey square is shown.
        sha256: Returns the SHA-256 of an image's file, for the fixes that the page saves.
        augmented: Path, caption and image, (H, W, 3), of examples of the training augmentation.
        config: The config that the augmentation is from.

    Raises:
        UserError: The file cannot be written.
    """
    where = {path: (split, name) for split, name, path in result.examples}
    items: list[dict[str, str]] = []

    def entry(path: str, caption: str = "", image: Image | None = None, *, size: int = THUMBNAIL) -> dict[str, Any]:
        small = thumbnail(read_image if image is None else lambda _: image, path, size)
        return gallery_entry(small, path) | {"caption": caption, "item": {}}

    def to_decide(path: str, reason: str, suggested: str = "", *, size: int = THUMBNAIL) -> dict[str, Any]:
        items.append(decidable(path, where[path][1], reason, sha256(path), suggested))
        return entry(path, "/".join(where[path]), size=size) | {"item": items[-1]}

    def suspect(s: Suspect) -> dict[str, Any]:
        reason = f"suspect: {s.suggested} {100 * s.prob_suggested:.0f} %, {s.label} {100 * s.prob_label:.0f} %"
        alike = [[entry(path, size=SMALL) for path in paths] for paths in (s.like_label, s.like_suggested)]
        sides = (
            (s.label, s.prob_label, "its label", alike[0]),
            (s.suggested, s.prob_suggested, "suggested", alike[1]),
        )
        return to_decide(s.path, reason, s.suggested, size=LARGE) | {"sides": sides}

    def copies(groups: Sequence[Sequence[str]]) -> list[list[dict[str, Any]]]:
        exact = set(result.duplicates)
        words = {group: "same file as" if group in exact else "looks like" for group in map(tuple, groups)}
        return [
            [to_decide(path, f"{words[tuple(g)]} {g[0] if i else g[1]}") for i, path in enumerate(g[:DUPLICATES])]
            for g in groups[:GROUPS]
        ]

    groups = [(len({where.get(path) for path in g}), g) for g in (*result.duplicates, *result.near_duplicates)]
    conflicts, harmless = [g for n, g in groups if n > 1], [g for n, g in groups if n == 1]
    view = {
        "title": Path(result.root).name,
        "result": result,
        "suspects": [suspect(s) for s in result.suspects[:SUSPECTS]],
        "conflicts": copies(conflicts),
        "conflict_count": len(conflicts),
        "harmless": copies(harmless),
        "harmless_count": len(harmless),
        "shapes": [
            (finding, [to_decide(path, finding.code) for path in finding.paths[:SHAPES]])
            for finding in result.findings
            if finding.code in _SHAPE_CODES
        ],
        "augmented": [entry(*example) for example in augmented],
        "config": config,
        "examples": {name: [entry(path) for path in paths] for name, paths in _examples(result).items()},
        "decide": decisions(Path(result.root).name, result.class_names, items),
    }
    write_file(Path(file), render_page("dataset.html", view))


def _examples(result: CheckResult) -> dict[str, list[str]]:
    """Return up to 12 paths of each of the first 100 classes, spread over the class."""
    unreadable = {row.path for row in result.bad}
    paths: dict[str, list[str]] = {name: [] for name in result.class_names[:CLASSES]}
    for _, name, path in result.examples:
        if name in paths and path not in unreadable:
            paths[name].append(path)
    return {name: these[:: max(1, len(these) // IMAGES)][:IMAGES] for name, these in paths.items()}

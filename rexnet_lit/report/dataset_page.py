"""What `check` found in a dataset as one HTML page, with images of every class."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rexnet_lit.report.html import gallery_entry, render_page, thumbnail
from rexnet_lit.utils.files import write_file

if TYPE_CHECKING:
    from rexnet_lit.checks.findings import CheckResult
    from rexnet_lit.report.html import Image


# What the page shows at most: classes, images of each, groups of duplicates, and images of each.
CLASSES, IMAGES, GROUPS, DUPLICATES = 100, 12, 24, 6


def write_dataset_page(
    file: str | os.PathLike[str],
    result: CheckResult,
    *,
    read_image: Callable[[str], Image],
    augmented: Sequence[tuple[str, str, Image]] = (),
    config: str = "",
) -> None:
    """Write the page: no scripts, no links, so it can be sent by mail.

    Args:
        file: The HTML file.
        result: What `check` found.
        read_image: Turns a path below the dataset's folder into RGB, (H, W, 3). If it raises, a grey square is shown.
        augmented: Path, caption and image, (H, W, 3), of examples of the training augmentation.
        config: The config that the augmentation is from.

    Raises:
        UserError: The file cannot be written.
    """

    def entry(path: str, caption: str = "", image: Image | None = None) -> dict[str, Any]:
        small = thumbnail(read_image if image is None else lambda _: image, path)
        return gallery_entry(small, path) | {"caption": caption}

    def entries(group: Sequence[str]) -> list[dict[str, Any]]:
        return [entry(path, "/".join(where[path])) for path in group[:DUPLICATES]]

    where = {path: (split, name) for split, name, path in result.examples}
    groups = [(len({where.get(path) for path in g}), g) for g in (*result.duplicates, *result.near_duplicates)]
    conflicts, harmless = [g for n, g in groups if n > 1], [g for n, g in groups if n == 1]
    view = {
        "title": Path(result.root).name,
        "result": result,
        "conflicts": [entries(group) for group in conflicts[:GROUPS]],
        "conflict_count": len(conflicts),
        "harmless": [entries(group) for group in harmless[:GROUPS]],
        "harmless_count": len(harmless),
        "augmented": [entry(*example) for example in augmented],
        "config": config,
        "examples": {name: [entry(path) for path in paths] for name, paths in _examples(result).items()},
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

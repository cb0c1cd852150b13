"""The dataset doctor's findings as one HTML page, with pictures of every class."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rexnet_lit.report.figures import SMALL, thumbnail, thumbnail_uri
from rexnet_lit.report.test_page import render_page
from rexnet_lit.utils.errors import printable
from rexnet_lit.utils.files import write_file

if TYPE_CHECKING:
    from rexnet_lit.inspect.findings import CheckResult
    from rexnet_lit.report.figures import Image


CLASSES, PICTURES, GROUPS, COPIES, PATHS = 100, 12, 24, 6, 5
"""How many classes, pictures of each, groups of copies, pictures of each, and paths of a finding are shown."""


def write_dataset_page(
    file: str | os.PathLike[str],
    checkup: CheckResult,
    *,
    read_image: Callable[[str], Image],
    augmented: Sequence[tuple[str, str, Image]] = (),
    config: str = "",
) -> None:
    """Write the page: no scripts, no links, fit to be mailed.

    Args:
        file: The HTML file.
        checkup: What `doctor.check` found.
        read_image: Turns a path below the dataset's folder into RGB, (H, W, 3). If it raises, a grey square is shown.
        augmented: Path, caption and picture of what the training recipe makes of images.
        config: Where that recipe is from.

    Raises:
        UserError: The file cannot be written.
    """

    def picture(path: str, caption: str = "", image: Image | None = None) -> dict[str, Any]:
        small = thumbnail(read_image if image is None else lambda _: image, path)
        return {
            "image": thumbnail_uri(small),
            "pixelated": max(small.shape) <= SMALL,
            "path": printable(path),
            "caption": printable(caption),
        }

    where = {path: (split, name) for split, name, path in checkup.examples}
    groups = [*checkup.duplicates, *checkup.near_duplicates]
    torn = [group for group in groups if len({where.get(path) for path in group}) > 1]
    harmless = [group for group in groups if len({where.get(path) for path in group}) == 1]

    def shown(these: Sequence[tuple[str, ...]]) -> list[list[dict[str, Any]]]:
        return [[picture(path, "/".join(where[path])) for path in group[:COPIES]] for group in these[:GROUPS]]

    by_class: dict[str, list[str]] = {}
    for _, name, path in checkup.examples:
        by_class.setdefault(name, []).append(path)
    bad = {row.path for row in checkup.bad}
    sheets = []
    for name in checkup.class_names[:CLASSES]:
        paths = [path for path in by_class.get(name, ()) if path not in bad]
        step = max(1, len(paths) // PICTURES)
        sheets.append(
            {
                "name": printable(name),
                "counts": [(split, counts[name]) for split, counts in checkup.counts.items()],
                "pictures": [picture(path) for path in paths[::step][:PICTURES]],
            }
        )
    view = {
        "title": printable(Path(checkup.root).name),
        "verdict": checkup.verdict.capitalize(),
        "class_count": len(checkup.class_names),
        "totals": [(split, sum(counts.values())) for split, counts in checkup.counts.items()],
        "formats": list(checkup.formats.items()),
        "width": checkup.sizes["width"] if checkup.formats else None,
        "height": checkup.sizes["height"],
        "findings": [
            {
                "severity": finding.severity,
                "message": printable(finding.message),
                "advice": printable(finding.advice),
                "paths": [printable(path) for path in finding.paths[:PATHS]],
                "more": max(0, len(finding.paths) - PATHS),
            }
            for finding in checkup.findings
        ],
        "conflicts": shown(torn),
        "conflict_count": len(torn),
        "harmless": shown(harmless),
        "harmless_count": len(harmless),
        "augmented": [picture(path, caption, image) for path, caption, image in augmented],
        "config": printable(config),
        "sheets": sheets,
    }
    write_file(Path(file), render_page("dataset.html", view))

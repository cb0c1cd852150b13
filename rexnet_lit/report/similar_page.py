"""The page of `similar --report`: each query beside the images that are most similar to it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rexnet_lit.report.html import gallery_entry, render_page, thumbnail
from rexnet_lit.utils.files import write_file

if TYPE_CHECKING:
    from rexnet_lit.report.html import Image
    from rexnet_lit.search.similar import Similar


def write_similar_page(
    file: str | os.PathLike[str],
    found: Mapping[str, Sequence[Similar]],
    folder: str,
    read_image: Callable[[str], Image],
) -> None:
    """Write the page.

    Args:
        file: The HTML file.
        found: The path of each query, to the images that are similar to it.
        folder: Where these are from.
        read_image: Turns a path, absolute or below ``folder``, into RGB, (H, W, 3).

    Raises:
        UserError: It cannot be written.
    """

    def entry(path: str, caption: str) -> dict[str, object]:
        return gallery_entry(thumbnail(read_image, path), path) | {"caption": caption}

    results = [
        (entry(query, "query"), [entry(row.path, f"{row.similarity:.3f} {row.label}") for row in rows])
        for query, rows in found.items()
    ]
    write_file(
        Path(file), render_page("similar.html", {"title": "Similar images", "folder": folder, "results": results})
    )

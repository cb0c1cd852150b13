"""`similar`: the nearest images of a folder, on the screen, as JSON and as a page."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

import rexnet_lit
from rexnet_lit.cli.tables import table
from rexnet_lit.data import decode
from rexnet_lit.data.folder import list_images
from rexnet_lit.report.html import check_page
from rexnet_lit.report.similar_page import write_similar_page
from rexnet_lit.search.similar import Index, Similar, build_index
from rexnet_lit.utils.errors import UserError, printable
from rexnet_lit.utils.files import check_writable
from rexnet_lit.utils.settings import check_range

_QUERIES = 100


def similar(query: str, folder: str, model: str, *, top: int, as_json: bool, page: str | None) -> None:
    """Find the images that are most similar to each query, and print them.

    Args:
        query: An image, or a folder of a few.
        folder: Where to search.
        model: A model file, or timm's name of a ReXNet.
        top: How many images to find.
        as_json: Print JSON instead of tables.
        page: The HTML file to write.

    Raises:
        UserError: The query, the folder or the model cannot be used.
    """
    check_range("--top", top, "[1, inf)")
    if page:
        check_page(Path(page))
        check_writable("--report", Path(page))
    above, names, _ = list_images(query)
    if len(names) > _QUERIES:
        raise UserError(f"similar: {query!r} holds {len(names):,} images; search for at most {_QUERIES} at once")
    queries = [os.fspath(above / name) for name in names]
    with contextlib.redirect_stdout(sys.stderr):  # stdout may be JSON
        classifier = rexnet_lit.load(model)
        features = classifier.embed(queries)
        index = build_index(folder, classifier)
    found = {path: index.nearest(row, top, path) for path, row in zip(queries, features, strict=True)}
    if as_json:
        results = [{"query": path, "similar": [_entry(s) for s in rows]} for path, rows in found.items()]
        counts = {"images": len(index.paths), "unreadable": index.unreadable}
        content = {"index": str(index.root), **counts, "results": results}
        print(json.dumps(content, indent=2))  # noqa: T201
    else:
        for path, rows in found.items():
            _print(path, rows)
    print_notes(index)
    if page:
        write_similar_page(page, found, str(index.root), lambda path: decode.read(index.root / path, 160))
        print(f"report: {page}", file=sys.stderr)  # noqa: T201


def print_notes(index: Index) -> None:
    """Print what is to be said about the images of an index, and which of them cannot be read."""
    bad = index.unreadable
    left_out = [f"{len(bad)} images cannot be read: {', '.join(bad[:3])}"] if bad else []
    for note in [*index.notes, *left_out]:
        print(f"note: {printable(note)}", file=sys.stderr)  # noqa: T201


def _entry(found: Similar) -> dict[str, object]:
    row = dataclasses.asdict(found)
    return {"path": row["path"], "class": row["label"], "similarity": round(found.similarity, 4)}


def _print(query: str, rows: list[Similar]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(Text(f"similar to {printable(query)}"))
    if not rows:
        console.print("no other image")
        return
    listed = table("similarity", "class", "path", justify="left")
    for row in rows:
        listed.add_row(f"{row.similarity:.3f}", Text(printable(row.label)), Text(printable(row.path), overflow="fold"))
    console.print(listed)

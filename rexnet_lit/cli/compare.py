"""`compare`: runs that were tested on the same images, on the screen, as JSON and as a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text

from rexnet_lit.cli.config import leaves, load_yaml
from rexnet_lit.cli.tables import table
from rexnet_lit.report.comparison import Comparison, compare_runs, read_run, report_folder, write_comparison
from rexnet_lit.report.html import check_page
from rexnet_lit.utils.errors import plural, printable

_HIDDEN = ("trainer.default_root_dir", "trainer.logger")


def compare(names: Sequence[str], *, as_json: bool, page: str | None) -> None:
    """Compare runs, and print the result.

    Args:
        names: Their folders or models.
        as_json: Print JSON instead of tables.
        page: The HTML file to write.

    Raises:
        UserError: A run has no report, or they were tested on different images.
    """
    if page:
        check_page(Path(page))
    found = compare_runs([read_run(name, _settings(name)) for name in names])
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))  # noqa: T201
    else:
        _print(found, Console())
    if page:
        write_comparison(Path(page), found)
        Console(stderr=True).print(Text(f"report: {page}"))  # stdout may be JSON


def _settings(name: str) -> dict[str, Any]:
    """Return the settings that a run recorded: its ``config.yaml``, or its ``result.json`` if it was made in Python."""
    folder = report_folder(name)
    for home in (folder, folder.parent):
        try:
            if (home / "config.yaml").is_file():
                config = load_yaml((home / "config.yaml").read_text("utf-8"), "fit")
                return {key: value for key, value in leaves(config) if not key.startswith(_HIDDEN)}
            if (home / "result.json").is_file():
                return dict(json.loads((home / "result.json").read_text("utf-8"))["settings"])
        except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError):
            continue  # its predictions are still worth comparing
    return {}


def _print(found: Comparison, console: Console) -> None:
    split = "validation" if found.split == "val" else "test"
    console.print(Text(f"{plural(found.images, f'{split} image', f'{split} images')}, intervals of 95 %"))
    metrics = table("run", "top-1", "interval", "macro F1", "loss", "ECE")
    for run in found.runs:
        low, high = run["top1_interval"]
        cells = (f"{100 * run['top1']:.1f} %", f"{100 * low:.1f} to {100 * high:.1f}", f"{100 * run['macro_f1']:.1f} %")
        metrics.add_row(Text(printable(run["name"])), *cells, f"{run['nll']:.3f}", f"{run['ece']:.3f}")
    console.print(metrics)
    if found.settings:
        settings = table("setting", *(run["name"] for run in found.runs), justify="left")
        for key, values in found.settings.items():
            settings.add_row(key, *(Text(printable(str(value))) for value in values))
        console.print(settings)
    for difference in found.differences:
        console.print(Text(printable(f"{difference.sentence}.")))

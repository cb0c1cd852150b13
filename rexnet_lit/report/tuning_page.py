"""The page of a search: what was tried, what it gave, and which settings mattered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rexnet_lit.report import figures
from rexnet_lit.report.html import data_uri, render_page
from rexnet_lit.utils.files import write_file


def write_tuning_page(
    file: Path,
    trials: Sequence[Mapping[str, Any]],
    *,
    title: str,
    best: Mapping[str, Any],
    default: Mapping[str, Any],
    changes: Mapping[str, tuple[Any, Any]],
    importance: Mapping[str, float],
    verdict: str,
    symmetries: str,
    histories: Mapping[str, Sequence[Mapping[str, float]]],
) -> None:
    """Write the page.

    Args:
        file: The HTML file.
        trials: The rows of the leaderboard: ``name``, ``stage``, ``epochs``, ``seconds``, ``status``, ``reason``,
            ``values`` (the settings that differ from the config's) and ``metrics`` (of the validation images).
        title: The page's title.
        best: The row of the weights that ship.
        default: The row of the config's settings.
        changes: The settings of the best that differ: the config's value, and the best.
        importance: The share of the variation of the loss that each setting explains.
        verdict: A sentence about the result on the test images; empty without a test split.
        symmetries: A sentence about the symmetries of the images; may be empty.
        histories: The metrics per epoch of the best and of the config's settings, by name.

    Raises:
        UserError: The file cannot be written.
    """
    curves = [
        (name, [data_uri(png) for theme in (figures.LIGHT, figures.DARK) if (png := figures.draw_history(rows, theme))])
        for name, rows in histories.items()
    ]
    view = {
        "title": title,
        "trials": trials,
        "best": best,
        "default": default,
        "changes": changes,
        "importance": importance,
        "verdict": verdict,
        "symmetries": symmetries,
        "curves": [(name, drawn) for name, drawn in curves if drawn],
    }
    write_file(file, render_page("tuning.html", view))

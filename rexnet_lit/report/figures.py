"""The report's figures, as PNG bytes.

matplotlib's Figure without pyplot has no global state: any thread may draw, and a notebook keeps its backend.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rexnet_lit.utils.errors import printable
from rexnet_lit.utils.reliability import BINS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from rexnet_lit.report.html import Image


NAME_LENGTH = 18  # characters of a class name in a figure
FEW = 10  # with fewer images, the accuracy of a bin means little

# Right is blue and wrong is orange everywhere: colour-blind people can tell them apart.
LIGHT = {"face": "#ffffff", "text": "#1f2328", "muted": "#8b949e", "right": "#2563eb", "wrong": "#c2410c"}
DARK = {"face": "#161b22", "text": "#e6edf3", "muted": "#7d8590", "right": "#6ea8fe", "wrong": "#fb923c"}


@cache
def _font() -> tuple[str, frozenset[int]]:
    """Return matplotlib's own font, which is the same on every machine, and the characters it has."""
    from matplotlib import font_manager, get_data_path

    path = str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
    return path, frozenset(font_manager.get_font(path).get_charmap())


def short_name(name: str) -> str:
    """Cut a long name in the middle: related classes often start alike."""
    half = NAME_LENGTH // 2
    return name if len(name) <= NAME_LENGTH else f"{name[:half]}…{name[1 - half :]}"


def figure_name(name: str, index: int) -> str:
    """Shorten a class name; one that the font cannot draw becomes its index (the page shows it in full)."""
    if not all(ord(char) in _font()[1] for char in name):
        return f"#{index}"
    return short_name(name)


def _text_style(theme: Mapping[str, str], size: float = 9) -> dict[str, Any]:
    """Return how text is drawn: `$` is not mathtext, and a user's matplotlibrc has no effect."""
    from matplotlib.font_manager import FontProperties

    return {
        "fontproperties": FontProperties(fname=_font()[0], size=size),
        "color": theme["text"],
        "parse_math": False,
        "usetex": False,
    }


def _figure(width: float, height: float, theme: Mapping[str, str], layout: Any = "constrained") -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=144, facecolor=theme["face"], layout=layout)


def _style_axes(ax: Axes, theme: Mapping[str, str], x: str, y: str) -> None:
    ax.set_facecolor(theme["face"])
    ax.grid(visible=False)
    ax.set_xlabel(x, **_text_style(theme))
    ax.set_ylabel(y, **_text_style(theme))
    ax.tick_params(colors=theme["text"], labelsize=8)
    for side, spine in ax.spines.items():
        spine.set(visible=side in ("left", "bottom"), edgecolor=theme["muted"], linewidth=0.8)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144, facecolor=figure.get_facecolor())
    return buffer.getvalue()


def draw_confusion(names: Sequence[str], counts: NDArray[np.int64], shares: NDArray[np.float64]) -> bytes:
    """Draw counts (n, n), a row per true class: blue if right, orange if wrong, darker for larger shares."""
    from matplotlib.colors import to_rgb

    n, size = len(names), max(4.0, 1.6 + 0.36 * len(names))
    figure = _figure(size, size, LIGHT)
    ax = figure.subplots()
    _style_axes(ax, LIGHT, "predicted", "true")
    diagonal = np.eye(n, dtype=bool)[..., None]
    colours = np.where(diagonal, to_rgb(LIGHT["right"]), to_rgb(LIGHT["wrong"]))
    # A single mistake among many images must be visible.
    strength = np.where(counts > 0, 0.1 + 0.9 * shares, 0)[..., None]
    ax.imshow(1 + (colours - 1) * strength, interpolation="nearest")
    ax.set_xticks(range(n), names, rotation=90, **_text_style(LIGHT, 8))
    ax.set_yticks(range(n), names, **_text_style(LIGHT, 8))
    for row, column in np.argwhere(counts):
        style = _text_style(LIGHT, 8) | ({"color": "white"} if shares[row, column] > 0.5 else {})
        ax.text(column, row, str(counts[row, column]), ha="center", va="center", **style)
    return _png(figure)


def draw_mistakes(images: Sequence[Image], captions: Sequence[str]) -> bytes:
    """Draw images with their captions, six in a row."""
    columns = 6
    rows = max(1, -(-len(images) // columns))
    figure = _figure(10, 2 * rows, LIGHT, layout=None)
    # Constrained layout of 24 axes takes longer than the rest of the report.
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02 / rows, top=1 - 0.2 / rows, wspace=0.1, hspace=0.27)
    for ax in figure.subplots(rows, columns, squeeze=False).flat:
        ax.set_axis_off()
    for ax, image, caption in zip(figure.axes, images, captions, strict=False):
        ax.imshow(image, interpolation="nearest")
        ax.set_anchor("N")
        ax.set_title(caption, pad=3, **_text_style(LIGHT, 7))
    if not images:
        figure.text(0.5, 0.5, "no mistakes", ha="center", va="center", **_text_style(LIGHT, 12))
    return _png(figure)


def draw_calibration(bins: NDArray[np.float64], ece: float, theme: Mapping[str, str]) -> bytes:
    """Draw a reliability diagram, from `reliability.confidence_bins`: the accuracy and image count of each bin."""
    count, _, accuracy = bins
    figure = _figure(5, 5, theme)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    left, style = np.arange(BINS) / BINS, {"width": 1 / BINS, "align": "edge", "edgecolor": theme["face"]}
    for bar, images in zip(top.bar(left, accuracy, color=theme["right"], **style), count, strict=True):
        bar.set_alpha(0.35 if images < FEW else 1)
    top.plot([0, 1], [0, 1], linestyle="--", linewidth=1, color=theme["text"])
    top.set(xlim=(0, 1), ylim=(0, 1.02))
    top.set_title(f"ECE {ece:.3f}", loc="left", **_text_style(theme, 10))
    bottom.bar(left, count, color=theme["muted"], **style)
    _style_axes(top, theme, "", "accuracy")
    _style_axes(bottom, theme, "confidence", "images")
    return _png(figure)


def draw_risk(risk: NDArray[np.float64], sure: int, theme: Mapping[str, str]) -> bytes:
    """Draw the risk-coverage curve, from `limits.risk_coverage`; a dot marks the ``sure`` most confident answers."""
    figure = _figure(5, 3.2, theme)
    ax = figure.subplots()
    kept = np.arange(1, len(risk) + 1) / len(risk)
    ax.plot(kept, risk, color=theme["right"])
    if sure:
        ax.plot(kept[sure - 1], risk[sure - 1], "o", color=theme["wrong"])
    ax.set(xlim=(0, 1), ylim=(0, None))
    ax.set_title(f"area {risk.mean():.3f}", loc="left", **_text_style(theme, 10))
    _style_axes(ax, theme, "share of answers kept, most confident first", "share of mistakes among them")
    return _png(figure)


def draw_history(history: Sequence[Mapping[str, float]], theme: Mapping[str, str]) -> bytes | None:
    """Draw losses and, beside them, metrics that are fractions; None if `history` has neither."""
    from matplotlib.ticker import MaxNLocator

    keys = sorted({key for row in history for key in row if key.startswith(("train/", "val/"))})
    epochs = [row.get("epoch", index) + 1 for index, row in enumerate(history)]  # shown from 1, as on the screen
    curves = {key: np.array([row.get(key, np.nan) for row in history], np.float64) for key in keys}
    curves = {key: np.where(np.isfinite(y), y, np.nan) for key, y in curves.items() if np.isfinite(y).any()}
    losses = {key: y for key, y in curves.items() if re.search("loss|nll", key)}
    shares = {k: y for k, y in curves.items() if k not in losses and np.nanmin(y) >= 0 and np.nanmax(y) <= 1}
    panels = [(unit, group) for unit, group in (("loss", losses), ("fraction", shares)) if group]
    if not panels:
        return None
    figure = _figure(8, 3.2, theme)
    palette = (theme["right"], theme["wrong"], "#2da44e", "#a371f7", theme["muted"])
    for ax, (unit, group) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        measures = sorted({key.partition("/")[2] for key in group})
        for key, y in group.items():
            index, style = measures.index(key.partition("/")[2]), "--" if key.startswith("train/") else "-"
            label, colour = figure_name(printable(key), index), palette[index % len(palette)]
            ax.plot(epochs, y, style, marker="o", markersize=3, label=label, color=colour)
        _style_axes(ax, theme, "epoch", unit)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        for text in ax.legend(frameon=False, fontsize=8, labelcolor=theme["text"]).get_texts():
            text.set_parse_math(False)
    return _png(figure)

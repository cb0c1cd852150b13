"""What a test run found: metrics, tables, figures and one HTML page, as pure functions of the predictions.

The calibration error follows Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017,
https://arxiv.org/abs/1706.04599); the interval of the top-1 accuracy is Wilson's (1927).

Names of classes and files are other people's text. They are made printable once (`visible`), then escaped for
each place they go to: CSV cells against formulas, HTML by jinja2's autoescape, figures against mathtext.
"""

from __future__ import annotations

import base64
import csv
import importlib.resources
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rexnet_lit.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Image = NDArray[np.uint8]
    Pair = tuple[int, int, int]  # true class, predicted class, count
    Row = dict[str, Any]  # what the template reads of one line or picture

__all__ = ["Predictions", "compute_metrics", "visible", "write_predictions", "write_report"]

BINS = 15
MATRIX_CLASSES = 25  # more cells than 25 x 25 can neither be read nor, for 10,000 classes, be drawn
TABLE_CLASSES = 50
PAIRS = 10
WORST, UNSURE = 24, 12
THUMBNAIL = 160  # pixels of the longer side
SMALL = 64  # up to here a picture is shown blown up, pixel by pixel
NAME_LENGTH = 18  # characters of a class name in a figure
FEW = 10  # pictures below which a share is chance
THRESHOLDS = (0.5, 0.8, 0.9, 0.95, 0.99)

# Right is blue and wrong is orange everywhere: the colour-blind tell them apart.
LIGHT = {"face": "#ffffff", "text": "#1f2328", "muted": "#8b949e", "right": "#2563eb", "wrong": "#c2410c"}
DARK = {"face": "#161b22", "text": "#e6edf3", "muted": "#7d8590", "right": "#6ea8fe", "wrong": "#fb923c"}

# Control characters, line separators, direction overrides (they make a name read as another) and surrogates.
_INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
# Tab and carriage return as `visible` shows them; the last four are the full-width forms.
_FORMULA = ("=", "+", "-", "@", "\\t", "\\r", "\uff1d", "\uff0b", "\uff0d", "\uff20")


@dataclass(frozen=True)
class Predictions:
    """Test-set output.

    Args:
        paths: The images, relative to the dataset's root. They may hold anything a file name may: spaces,
            newlines, undecodable bytes as surrogate escapes.
        probs: Softmax probabilities, (N, K).
        targets: True class indices, (N,), or None for unlabelled images.
        class_names: One name per column of `probs`.

    Raises:
        ValueError: The lengths do not fit together, or a target is no class index.
        UserError: A probability is not finite.
    """

    paths: Sequence[str]
    probs: NDArray[np.float32]
    targets: NDArray[np.int64] | None
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        shape = (len(self.paths), len(self.class_names))
        if self.probs.shape != shape:
            raise ValueError(f"probs has shape {self.probs.shape}; paths and class_names say {shape}")
        if self.targets is not None:
            if self.targets.shape != shape[:1]:
                raise ValueError(f"targets has shape {self.targets.shape}; expected {shape[:1]}")
            if self.targets.size and not 0 <= self.targets.min() <= self.targets.max() < shape[1]:
                raise ValueError(f"targets run from {self.targets.min()} to {self.targets.max()} of {shape[1]} classes")
        broken = np.flatnonzero(~np.isfinite(self.probs.sum(axis=1)))
        if broken.size:
            raise UserError(
                f"{visible(self.paths[broken[0]])}: the model's output is not finite (NaN or infinity), for "
                f"{broken.size} of {shape[0]} images; its weights are damaged: use another checkpoint"
            )


def visible(text: str) -> str:
    r"""Return `text` with what cannot be seen or encoded written out (a newline as ``\n``)."""

    def escape(match: re.Match[str]) -> str:
        char = match.group()
        # os.fsdecode keeps an undecodable byte b as U+DC00 + b.
        return f"\\x{ord(char) - 0xDC00:02x}" if "\udc80" <= char <= "\udcff" else ascii(char)[1:-1]

    return _INVISIBLE.sub(escape, text)


def _shown_names(p: Predictions) -> list[str]:
    """Class names that can be printed and are all different (ImageNet has two "crane")."""
    names = [visible(name) for name in p.class_names]
    times = Counter(names)
    return [name if times[name] == 1 else f"{name} (#{index})" for index, name in enumerate(names)]


def _top_k(probs: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return the k likeliest classes, (N, k), best first; of equals the lower index, as argmax does.

    k passes of argmax over blocks of rows: for 10,000 classes many times faster and smaller than sorting.
    """
    top = np.empty((len(probs), k), np.int64)
    for start in range(0, len(probs), 1024):
        block = probs[start : start + 1024].copy()
        rows = np.arange(len(block))
        for rank in range(k):
            best = block.argmax(axis=1)
            top[start : start + 1024, rank] = best
            block[rows, best] = -1
    return top


def _truth(p: Predictions) -> NDArray[np.int64]:
    if p.targets is None:
        raise ValueError("metrics need targets; these predictions are of unlabelled images")
    if not len(p.targets):
        raise UserError("there is no picture to test on; expected at least one in the test split")
    return p.targets


def _calibration(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return count, mean confidence and accuracy of each confidence bin, (3, 15).

    Bins are ``(m/15, (m+1)/15]`` as in Guo et al. torchmetrics differs at the edges: it closes bins on the
    left, so a confidence of exactly 1.0 has a 16th bin of its own.
    """
    index = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidence, side="left")
    count = np.bincount(index, minlength=BINS).astype(np.float64)
    sums = [np.bincount(index, weights=w, minlength=BINS) for w in (confidence, correct.astype(np.float64))]
    return np.stack([count, *(s / np.maximum(count, 1) for s in sums)])


def compute_metrics(p: Predictions) -> dict[str, Any]:
    """Return the content of ``metrics.json``; everything but counts is a fraction.

    ``top1``, ``top5`` (only where there are more than 5 classes), ``macro_f1``, ``nll``, ``ece``, ``count``
    and ``per_class``: ``{name: {precision, recall, f1, support}}``.

    ``macro_f1`` averages over the classes that occur among the targets or the predictions, as scikit-learn's
    ``f1_score(average="macro")`` and torchmetrics' ``MulticlassF1Score(average="macro")`` both do: a class
    that the test set lacks and the model never names says nothing, and would drag the mean towards 0. Such a
    class is still listed in ``per_class``, with support 0. 0/0 is 0 (scikit-learn's ``zero_division=0``).
    ``nll`` is in nats; probabilities are clipped at float32's smallest normal number: a certain mistake costs 87.
    ``ece`` has 15 equal-width bins and the L1 norm, on the confidence of the first answer.

    Raises:
        ValueError: The images are unlabelled.
        UserError: There is no image.
    """
    targets, k = _truth(p), len(p.class_names)
    top = _top_k(p.probs, min(5, k))
    predicted, rows = top[:, 0], np.arange(len(targets))
    correct = predicted == targets
    confidence = p.probs[rows, predicted].astype(np.float64)
    count, mean_confidence, accuracy = _calibration(confidence, correct)
    likelihood = np.clip(p.probs[rows, targets].astype(np.float64), np.finfo(np.float32).tiny, 1)

    support = np.bincount(targets, minlength=k)
    named = np.bincount(predicted, minlength=k)
    hits = np.bincount(targets[correct], minlength=k)
    columns = {
        "precision": hits / np.maximum(named, 1),
        "recall": hits / np.maximum(support, 1),
        "f1": 2 * hits / np.maximum(support + named, 1),
    }
    lists = [*(column.tolist() for column in columns.values()), support.tolist()]
    metrics: dict[str, Any] = {"top1": float(correct.mean())}
    if k > 5:
        metrics["top5"] = float((top == targets[:, None]).any(axis=1).mean())
    return metrics | {
        "macro_f1": float(columns["f1"][support + named > 0].mean()),
        "nll": float(-np.log(likelihood).mean()),
        "ece": float((count / count.sum() * np.abs(accuracy - mean_confidence)).sum()),
        "count": len(targets),
        "per_class": {
            name: dict(zip((*columns, "support"), values, strict=True))
            for name, *values in zip(_shown_names(p), *lists, strict=True)
        },
    }


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path` that takes its place once it is whole; otherwise it is removed."""
    # Not tempfile: its files are 0600, and a report is there to be read by colleagues.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; free or choose another place") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _write(path: Path, content: bytes | str) -> None:
    with _replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def _cell(text: str) -> str:
    """Make `text` printable, and a text rather than a formula to a spreadsheet."""
    shown = visible(text)
    return f"'{shown}" if shown.startswith(_FORMULA) else shown


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[str | float]]) -> None:
    with _replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([_cell(v) if isinstance(v, str) else v for v in row] for row in rows)


def write_predictions(p: Predictions, path: str | os.PathLike[str], top_k: int = 5) -> None:
    r"""Write ``path,label_1,prob_1,...,label_k,prob_k`` and, with truth known, ``target``: UTF-8, atomically.

    A cell that a spreadsheet would run as a formula gets a leading apostrophe; what cannot be seen or encoded
    is written out (a newline as ``\n``). Probabilities have 6 decimals.

    Args:
        p: The predictions.
        path: The file; missing folders are made.
        top_k: Labels a row; never more than there are classes.

    Raises:
        UserError: The file cannot be written.
    """
    k = min(top_k, len(p.class_names))
    top, names = _top_k(p.probs, k), _shown_names(p)
    header = ["path", *(f"{column}_{rank}" for rank in range(1, k + 1) for column in ("label", "prob"))]

    def rows() -> Iterator[list[str | float]]:
        for index, (image, labels) in enumerate(zip(p.paths, top.tolist(), strict=True)):
            row: list[str | float] = [image]
            for label in labels:
                row += [names[label], round(float(p.probs[index, label]), 6)]
            yield row if p.targets is None else [*row, names[p.targets[index]]]

    _write_csv(Path(path), header if p.targets is None else [*header, "target"], rows())


def _wilson(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of `right` in `count`."""
    z = 1.959964
    share, scale = right / count, 1 + z * z / count
    centre = share + z * z / (2 * count)
    half = z * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return max(0.0, float((centre - half) / scale)), min(1.0, float((centre + half) / scale))


def _percent(share: float) -> str:
    """Format a share; only what is exactly 0 or 1 reads as 0 or 100 %."""
    if share in (0, 1):
        return f"{100 * share:.0f}\u00a0%"
    return f"{min(max(100 * share, 0.1), 99.9):.1f}\u00a0%"


def _confused_pairs(targets: NDArray[np.int64], predicted: NDArray[np.int64], k: int) -> list[Pair]:
    """Return every (true, predicted, count) that is a mistake, most frequent first."""
    wrong = targets != predicted
    codes, counts = np.unique(targets[wrong] * k + predicted[wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [(int(c) // k, int(c) % k, int(n)) for c, n in zip(codes[order], counts[order], strict=True)]


def _confusion(
    targets: NDArray[np.int64], predicted: NDArray[np.int64], k: int, pairs: Sequence[Pair]
) -> tuple[list[int], NDArray[np.int64], NDArray[np.float64]]:
    """Return at most 25 classes, their counts (n, n), and the counts as shares of the true classes.

    Of more classes those of the most frequent mistakes are taken, then the largest: a 10,000 x 10,000 matrix
    is never formed.
    """
    support = np.bincount(targets, minlength=k)
    if k > MATRIX_CLASSES:
        largest = np.argsort(-support, kind="stable")[:MATRIX_CLASSES].tolist()
        candidates = dict.fromkeys([*(c for pair in pairs[:MATRIX_CLASSES] for c in pair[:2]), *largest])
        classes = sorted(list(candidates)[:MATRIX_CLASSES])
    else:
        classes = list(range(k))
    place = np.full(k, -1)
    place[classes] = np.arange(len(classes))
    rows, columns = place[targets], place[predicted]
    both = (rows >= 0) & (columns >= 0)
    counts = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(counts, (rows[both], columns[both]), 1)
    return classes, counts, counts / np.maximum(support[classes], 1)[:, None]


# Figures. matplotlib's Figure without pyplot has no global state: any thread may draw, and a notebook keeps
# its backend.


@cache
def _font() -> tuple[str, frozenset[int]]:
    """Return matplotlib's own font, the same on every machine, and the characters it can draw."""
    from matplotlib import font_manager, get_data_path

    path = str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
    return path, frozenset(font_manager.get_font(path).get_charmap())


def _short(name: str) -> str:
    """Cut a name in its middle: related classes tend to start alike."""
    half = NAME_LENGTH // 2
    return name if len(name) <= NAME_LENGTH else f"{name[:half]}…{name[1 - half :]}"


def _figure_name(name: str, index: int) -> str:
    """Shorten a class name; one that the font cannot draw becomes its index (the page has it in full)."""
    if not all(ord(char) in _font()[1] for char in name):
        return f"#{index}"
    return _short(name)


def _text_style(theme: Mapping[str, str], size: float = 9) -> dict[str, Any]:
    """Return how text is drawn: never as mathtext (`$` is a character), never by a user's matplotlibrc."""
    from matplotlib.font_manager import FontProperties

    return {
        "fontproperties": FontProperties(fname=_font()[0], size=size),
        "color": theme["text"],
        "parse_math": False,
        "usetex": False,
    }


def _figure(width: float, height: float, theme: Mapping[str, str], *, constrained: bool = True) -> Figure:
    from matplotlib.figure import Figure

    layout: Literal["constrained"] | None = "constrained" if constrained else None
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


def _draw_confusion(names: Sequence[str], counts: NDArray[np.int64], shares: NDArray[np.float64]) -> bytes:
    from matplotlib.colors import to_rgb

    n, size = len(names), max(4.0, 1.6 + 0.36 * len(names))
    figure = _figure(size, size, LIGHT)
    ax = figure.subplots()
    _style_axes(ax, LIGHT, "predicted", "true")
    diagonal = np.eye(n, dtype=bool)[..., None]
    colours = np.where(diagonal, to_rgb(LIGHT["right"]), to_rgb(LIGHT["wrong"]))
    # A single mistake among many pictures must still be seen.
    strength = np.where(counts > 0, 0.1 + 0.9 * shares, 0)[..., None]
    ax.imshow(1 + (colours - 1) * strength, interpolation="nearest")
    ax.set_xticks(range(n), names, rotation=90, **_text_style(LIGHT, 8))
    ax.set_yticks(range(n), names, **_text_style(LIGHT, 8))
    for row, column in np.argwhere(counts):
        style = _text_style(LIGHT, 8) | ({"color": "white"} if shares[row, column] > 0.5 else {})
        ax.text(column, row, str(counts[row, column]), ha="center", va="center", **style)
    return _png(figure)


def _draw_mistakes(images: Sequence[Image], captions: Sequence[str]) -> bytes:
    columns = 6
    rows = max(1, -(-len(images) // columns))
    figure = _figure(10, 2 * rows, LIGHT, constrained=False)
    # Laying out 24 axes by constraints takes longer than all the rest of the report.
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


def _draw_calibration(bins: NDArray[np.float64], ece: float, theme: Mapping[str, str]) -> bytes:
    count, _, accuracy = bins
    figure = _figure(5, 5, theme)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    left, style = np.arange(BINS) / BINS, {"width": 1 / BINS, "align": "edge", "edgecolor": theme["face"]}
    # Bins of a few pictures are pale: their height is chance.
    for bar, pictures in zip(top.bar(left, accuracy, color=theme["right"], **style), count, strict=True):
        bar.set_alpha(0.35 if pictures < FEW else 1)
    top.plot([0, 1], [0, 1], linestyle="--", linewidth=1, color=theme["muted"])
    top.set(xlim=(0, 1), ylim=(0, 1.02))
    top.set_title(f"ECE {ece:.3f}", loc="left", **_text_style(theme, 10))
    bottom.bar(left, count, color=theme["muted"], **style)
    _style_axes(top, theme, "", "share right")
    _style_axes(bottom, theme, "confidence: how sure the model says it is", "pictures")
    return _png(figure)


def _draw_history(history: Sequence[Mapping[str, float]], theme: Mapping[str, str]) -> bytes | None:
    """Draw losses, and beside them what was measured as a fraction; None where `history` has neither."""
    from matplotlib.ticker import MaxNLocator

    keys = sorted({key for row in history for key in row if key.startswith(("train/", "val/"))})
    epochs = [row.get("epoch", index) for index, row in enumerate(history)]
    curves = {key: np.array([row.get(key, np.nan) for row in history], np.float64) for key in keys}
    curves = {key: np.where(np.isfinite(y), y, np.nan) for key, y in curves.items() if np.isfinite(y).any()}
    losses = {key: y for key, y in curves.items() if re.search("loss|nll", key)}
    shares = {k: y for k, y in curves.items() if k not in losses and np.nanmin(y) >= 0 and np.nanmax(y) <= 1}
    panels = [(label, group) for label, group in (("loss", losses), ("fraction", shares)) if group]
    if not panels:
        return None
    figure = _figure(8, 3.2, theme)
    palette = (theme["right"], theme["wrong"], "#2da44e", "#a371f7", theme["muted"])
    for ax, (label, group) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        measures = sorted({key.partition("/")[2] for key in group})
        for key, y in group.items():
            # One colour a measure; training is dashed, validation solid.
            index = measures.index(key.partition("/")[2])
            line = {
                "color": palette[index % len(palette)],
                "linestyle": "--" if key.startswith("train/") else "-",
            }
            ax.plot(epochs, y, marker="o", markersize=3, label=_figure_name(visible(key), index), **line)
        _style_axes(ax, theme, "epoch", label)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        for text in ax.legend(frameon=False, fontsize=8, labelcolor=theme["text"]).get_texts():
            text.set_parse_math(False)
    return _png(figure)


def _thumbnail(read_image: Callable[[str], Image], path: str) -> Image:
    """Read an image and shrink it to at most 160 pixels a side; one that cannot be read is a grey square."""
    import cv2

    try:
        image = read_image(path)
    except Exception:  # whatever a reader raises, a report of the other pictures is worth having
        return np.full((THUMBNAIL, THUMBNAIL, 3), 160, np.uint8)
    height, width = image.shape[:2]
    scale = THUMBNAIL / max(height, width)
    if scale >= 1:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def _uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _thumbnail_uri(image: Image) -> str:
    """Encode for the page: small pictures without loss, photographs as JPEG (a fifth of the size)."""
    import cv2

    kind = "png" if max(image.shape) <= SMALL else "jpeg"
    return _uri(cv2.imencode(f".{kind}", np.ascontiguousarray(image[..., ::-1]))[1].tobytes(), kind)


# The page.


@dataclass(frozen=True)
class _Outcome:
    """What tables, figures and page share: names, answers (N,), mistakes, and which pictures to show."""

    names: list[str]
    targets: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float64]
    correct: NDArray[np.bool_]
    pairs: list[Pair]
    worst: list[int]
    unsure: list[int]


def _outcome(p: Predictions) -> _Outcome:
    targets, names = _truth(p), _shown_names(p)
    predicted, confidence = p.probs.argmax(axis=1), p.probs.max(axis=1).astype(np.float64)
    wrong = np.flatnonzero(predicted != targets)
    return _Outcome(
        names=names,
        targets=targets,
        predicted=predicted,
        confidence=confidence,
        correct=predicted == targets,
        pairs=_confused_pairs(targets, predicted, len(names)),
        worst=wrong[np.argsort(-confidence[wrong], kind="stable")][:WORST].tolist(),
        unsure=np.argsort(confidence, kind="stable")[:UNSURE].tolist(),
    )


def _gallery(p: Predictions, o: _Outcome, indices: Sequence[int], thumbnails: Mapping[int, Image]) -> list[Row]:
    return [
        {
            "image": _thumbnail_uri(thumbnails[i]),
            "pixelated": max(thumbnails[i].shape) <= SMALL,
            "path": visible(p.paths[i]),
            "true": o.names[o.targets[i]],
            "predicted": o.names[o.predicted[i]],
            "right": o.correct[i],
            "sure": float(o.confidence[i]),
        }
        for i in indices
    ]


def _thresholds(o: _Outcome) -> list[Row]:
    """Return what is left, and how much of it is right, when only answers above a confidence are used."""
    kept = [(limit, o.confidence >= limit) for limit in THRESHOLDS]
    return [{"limit": t, "answered": k.mean(), "right": o.correct[k].mean()} for t, k in kept if k.any()]


def _class_rows(o: _Outcome, metrics: Mapping[str, Any]) -> list[Row]:
    """Return the classes that were tested or named, the worst F1 first; of equals the larger first."""
    seen = np.zeros(len(o.names), dtype=bool)
    seen[o.targets] = seen[o.predicted] = True
    rows = [{"name": name} | values for name, values in metrics["per_class"].items()]
    return sorted((row for row, s in zip(rows, seen, strict=True) if s), key=lambda r: (r["f1"], -r["support"]))


def _view(o: _Outcome, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the page's words and numbers."""
    support = np.bincount(o.targets, minlength=len(o.names))
    right = int(o.correct.sum())
    classes, counts, shares = _confusion(o.targets, o.predicted, len(o.names), o.pairs)
    rows = _class_rows(o, metrics)
    return {
        "metrics": metrics,
        "right": right,
        "wrong": len(o.targets) - right,
        "interval": _wilson(right, len(o.targets)),
        "largest": (o.names[support.argmax()], support.max() / len(o.targets)),
        "mean_confidence": o.confidence.mean(),
        "thresholds": _thresholds(o),
        "pairs": [
            {"true": o.names[true], "predicted": o.names[guess], "count": n, "support": int(support[true])}
            for true, guess, n in o.pairs[:PAIRS]
        ],
        "matrix": [
            (o.names[index], _short(o.names[index]), list(zip(row.tolist(), share.tolist(), strict=True)))
            for index, row, share in zip(classes, counts, shares, strict=True)
        ],
        "classes": rows[:TABLE_CLASSES],
        "seen_count": len(rows),
        "class_count": len(o.names),
        "few": FEW,
    }


def _write_figures(
    folder: Path,
    o: _Outcome,
    ece: float,
    thumbnails: Mapping[int, Image],
    history: Sequence[Mapping[str, float]],
) -> dict[str, list[str]]:
    """Write the PNG files; return the two that the page holds as data URIs, light and dark."""
    short = [_figure_name(name, index) for index, name in enumerate(o.names)]
    captions = [f"{short[o.predicted[i]]}, {_percent(o.confidence[i])}\nis {short[o.targets[i]]}" for i in o.worst]
    classes, counts, shares = _confusion(o.targets, o.predicted, len(o.names), o.pairs)
    _write(folder / "confusion.png", _draw_confusion([short[c] for c in classes], counts, shares))
    _write(folder / "mistakes.png", _draw_mistakes([thumbnails[i] for i in o.worst], captions))

    bins = _calibration(o.confidence, o.correct)
    calibration = [_draw_calibration(bins, ece, theme) for theme in (LIGHT, DARK)]
    _write(folder / "calibration.png", calibration[0])
    curves = [drawn for theme in (LIGHT, DARK) if (drawn := _draw_history(history, theme))]
    if curves:
        _write(folder / "history.png", curves[0])
    return {
        "calibration": [_uri(figure) for figure in calibration],
        "curves": [_uri(figure) for figure in curves],
    }


def _render(view: Mapping[str, Any]) -> str:
    import jinja2

    # StrictUndefined: a misspelt name in the template fails a test instead of leaving a hole in the page.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = _percent
    source = importlib.resources.files("rexnet_lit.report").joinpath("report.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(view)


def write_report(
    folder: str | os.PathLike[str],
    p: Predictions,
    *,
    read_image: Callable[[str], NDArray[np.uint8]],
    title: str,
    facts: Mapping[str, str],
    history: Sequence[Mapping[str, float]] = (),
) -> dict[str, Any]:
    """Write the report of a test run.

    The folder gets ``metrics.json``, ``per_class.csv``, ``predictions.csv``, ``confusion.png``,
    ``mistakes.png``, ``calibration.png``, ``history.png`` (where `history` holds something to draw) and
    ``report.html``: one page without scripts or links, fit to be mailed. Only the pictures that the page
    shows are read.

    Args:
        folder: Where to write; made if missing.
        p: The test set's predictions, with targets.
        read_image: Turns a path of `p` into RGB, (H, W, 3). If it raises, the page shows a grey square.
        title: The page's title.
        facts: What the page says about the run, name to value. It adds none; keep absolute paths out.
        history: A row an epoch: ``train/...`` and ``val/...`` to a number, ``epoch`` if it is not the index.

    Returns:
        The metrics, as `compute_metrics`.

    Raises:
        ValueError: The images are unlabelled, or a path is absolute: the page is made to be shared.
        UserError: There is no image, or a file cannot be written.
    """
    if any(PurePath(path).is_absolute() for path in p.paths):
        raise ValueError("a report takes paths relative to the dataset's root; it must not show where that is")
    folder, metrics, o = Path(folder), compute_metrics(p), _outcome(p)
    per_class = metrics["per_class"].items()
    columns = ("precision", "recall", "f1", "support")
    _write(folder / "metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    _write_csv(folder / "per_class.csv", ("class", *columns), ([n, *(v[c] for c in columns)] for n, v in per_class))
    write_predictions(p, folder / "predictions.csv")

    thumbnails = {i: _thumbnail(read_image, p.paths[i]) for i in {*o.worst, *o.unsure}}
    page = _view(o, metrics) | _write_figures(folder, o, metrics["ece"], thumbnails, history)
    page |= {
        "title": visible(title),
        "facts": [(visible(key), visible(str(value))) for key, value in facts.items()],
        "worst": _gallery(p, o, o.worst, thumbnails),
        "unsure": _gallery(p, o, o.unsure, thumbnails),
    }
    _write(folder / "report.html", _render(page))
    return metrics

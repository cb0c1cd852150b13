"""A test run's report: the folder of tables and figures, and one HTML page, as pure functions of the predictions."""

from __future__ import annotations

import importlib.resources
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from rexnet_lit.report.figures import (
    DARK,
    FEW,
    LIGHT,
    SMALL,
    data_uri,
    draw_calibration,
    draw_confusion,
    draw_history,
    draw_mistakes,
    figure_name,
    short_name,
    thumbnail,
    thumbnail_uri,
)
from rexnet_lit.report.metrics import (
    Predictions,
    calibration,
    compute_metrics,
    confused_pairs,
    confusion,
    known_targets,
    percent,
    shown_names,
    wilson,
    write_predictions,
)
from rexnet_lit.utils.errors import printable
from rexnet_lit.utils.files import write_csv, write_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rexnet_lit.report.figures import Image
    from rexnet_lit.report.metrics import Pair

    Row = dict[str, Any]  # what the template reads of one line or picture


TABLE_CLASSES = 50
PAIRS = 10
WORST, UNSURE = 24, 12
THRESHOLDS = (0.5, 0.8, 0.9, 0.95, 0.99)


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
    targets, names = known_targets(p), shown_names(p)
    predicted, confidence = p.probs.argmax(axis=1), p.probs.max(axis=1).astype(np.float64)
    wrong = np.flatnonzero(predicted != targets)
    return _Outcome(
        names=names,
        targets=targets,
        predicted=predicted,
        confidence=confidence,
        correct=predicted == targets,
        pairs=confused_pairs(targets, predicted, len(names)),
        worst=wrong[np.argsort(-confidence[wrong], kind="stable")][:WORST].tolist(),
        unsure=np.argsort(confidence, kind="stable")[:UNSURE].tolist(),
    )


def _gallery(p: Predictions, o: _Outcome, indices: Sequence[int], thumbnails: Mapping[int, Image]) -> list[Row]:
    return [
        {
            "image": thumbnail_uri(thumbnails[i]),
            "pixelated": max(thumbnails[i].shape) <= SMALL,
            "path": printable(p.paths[i]),
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
    classes, counts, shares = confusion(o.targets, o.predicted, len(o.names), o.pairs)
    rows = _class_rows(o, metrics)
    return {
        "metrics": metrics,
        "right": right,
        "wrong": len(o.targets) - right,
        "interval": wilson(right, len(o.targets)),
        "largest": (o.names[support.argmax()], support.max() / len(o.targets)),
        "mean_confidence": o.confidence.mean(),
        "thresholds": _thresholds(o),
        "pairs": [
            {"true": o.names[true], "predicted": o.names[guess], "count": n, "support": int(support[true])}
            for true, guess, n in o.pairs[:PAIRS]
        ],
        "matrix": [
            (o.names[index], short_name(o.names[index]), list(zip(row.tolist(), share.tolist(), strict=True)))
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
    short = [figure_name(name, index) for index, name in enumerate(o.names)]
    captions = [f"{short[o.predicted[i]]}, {percent(o.confidence[i])}\nis {short[o.targets[i]]}" for i in o.worst]
    classes, counts, shares = confusion(o.targets, o.predicted, len(o.names), o.pairs)
    write_file(folder / "confusion.png", draw_confusion([short[c] for c in classes], counts, shares))
    write_file(folder / "mistakes.png", draw_mistakes([thumbnails[i] for i in o.worst], captions))

    bins = calibration(o.confidence, o.correct)
    diagrams = [draw_calibration(bins, ece, theme) for theme in (LIGHT, DARK)]
    write_file(folder / "calibration.png", diagrams[0])
    curves = [drawn for theme in (LIGHT, DARK) if (drawn := draw_history(history, theme))]
    if curves:
        write_file(folder / "history.png", curves[0])
    return {
        "calibration": [data_uri(figure) for figure in diagrams],
        "curves": [data_uri(figure) for figure in curves],
    }


def render_page(template: str, view: Mapping[str, Any]) -> str:
    """Fill one of the package's templates; everything in ``view`` is escaped."""
    import jinja2

    # StrictUndefined: a misspelt name in the template fails a test instead of leaving a hole in the page.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = percent
    here = importlib.resources.files("rexnet_lit.report")
    source, style = (here.joinpath(name).read_text(encoding="utf-8") for name in (template, "style.css"))
    return environment.from_string(source).render({**view, "style": style})


def write_report(
    folder: str | os.PathLike[str],
    p: Predictions,
    *,
    read_image: Callable[[str], NDArray[np.uint8]],
    title: str,
    facts: Mapping[str, str],
    history: Sequence[Mapping[str, float]] = (),
    weights: str = "",
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
        history: A row an epoch: ``train/...`` and ``val/...`` to a number, ``epoch``, from 0, if it is not the index.
        weights: A digest of the tested weights, for ``weights.sha256``: whose figures these are.

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
    if weights:
        write_file(folder / "weights.sha256", weights + "\n")
    write_file(folder / "metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_csv(folder / "per_class.csv", ("class", *columns), ([n, *(v[c] for c in columns)] for n, v in per_class))
    write_predictions(p, folder / "predictions.csv")

    thumbnails = {i: thumbnail(read_image, p.paths[i]) for i in {*o.worst, *o.unsure}}
    page = _view(o, metrics) | _write_figures(folder, o, metrics["ece"], thumbnails, history)
    page |= {
        "title": printable(title),
        "facts": [(printable(key), printable(str(value))) for key, value in facts.items()],
        "worst": _gallery(p, o, o.worst, thumbnails),
        "unsure": _gallery(p, o, o.unsure, thumbnails),
    }
    write_file(folder / "report.html", render_page("report.html", page))
    return metrics

"""The report of a test run: a folder of tables and figures, and one HTML page."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rexnet_lit.report import figures
from rexnet_lit.report.figures import DARK, LIGHT, figure_name, short_name
from rexnet_lit.report.html import data_uri, decidable, decisions, gallery_entry, render_page, thumbnail
from rexnet_lit.report.limits import limits_of, risk_coverage
from rexnet_lit.report.predictions import Predictions, write_predictions
from rexnet_lit.report.tables import confused_pairs, confusion_matrix, percent, wilson_interval
from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.files import write_csv, write_file
from rexnet_lit.utils.reliability import confidence_bins

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rexnet_lit.report.html import Image
    from rexnet_lit.report.limits import Strangers
    from rexnet_lit.report.tables import Matrix, Pair

    Row = dict[str, Any]  # what the template reads of one row or image


TABLE_CLASSES = 50
PAIRS = 10
WORST, UNSURE = 24, 12
THRESHOLDS = (0.5, 0.8, 0.9, 0.95, 0.99)
COLUMNS = ("precision", "recall", "f1", "support")
NEAR = 96  # pixels of the longer side of a training image


class Evidence(NamedTuple):
    """What may explain a mistake.

    Args:
        heat: What the model was given, and where in it the evidence for its answer is, RGB, (S, S, 3).
        nearest: Path and class of the nearest training images, the most similar first.
    """

    heat: Image
    nearest: Sequence[tuple[str, int]]


def write_report(
    folder: str | os.PathLike[str],
    p: Predictions,
    results: Mapping[str, Any],
    *,
    read_image: Callable[[str], NDArray[np.uint8]],
    title: str,
    facts: Mapping[str, str],
    history: Sequence[Mapping[str, float]] = (),
    weights: str = "",
    sha256: Callable[[str], str] = lambda path: "",
    strangers: Strangers | None = None,
    explain: Callable[[str], Evidence | None] | None = None,
    compared: str = "",
) -> dict[str, Any]:
    """Write the report of a test run.

    The folder gets ``metrics.json``, ``per_class.csv``, ``predictions.csv``, ``confusion.png``, ``mistakes.png``,
    ``calibration.png``, ``risk_coverage.png``, ``history.png`` (if `history` has something to draw) and
    ``report.html``: one page without links that can be sent by mail, on which wrong labels are corrected. Only images
    that the page shows are read.

    Args:
        folder: Where to write; made if missing.
        p: The test set's predictions, with targets.
        results: What `training.metrics.stage_results` returned for them: ``top1``, ``top5`` (with more than 5
            classes), ``macro_f1``, ``nll``, ``ece``, ``count``, and ``precision``, ``recall``, ``f1`` and ``support``
            as lists of K. The report shows these and computes none of its own.
        read_image: Turns a path of `p` into RGB, (H, W, 3). If it raises, the page shows a grey square.
        title: The page's title.
        facts: What the page shows about the run, name to value; without absolute paths.
        history: One row per epoch: ``train/...`` and ``val/...`` to a number, and ``epoch``, from 0, if it is not the
            index.
        weights: A digest of the tested weights, for ``weights.sha256``.
        sha256: Returns the SHA-256 of an image's file, for the fixes that the page saves.
        strangers: How the model answers images of other things.
        explain: Returns what may explain the mistake at a path; the page shows it.
        compared: Which training images it has compared, in a sentence.

    Returns:
        The content of ``metrics.json``: `results`, with ``per_class`` (name to its figures) in place of the lists,
        ``classes_without_images`` if there are any, and ``limits`` of a model that has them.

    Raises:
        ValueError: The images are unlabelled, or a path is absolute and would show where the dataset is.
        UserError: There are no images, or a file cannot be written.
    """
    if any(PurePath(path).is_absolute() for path in p.paths):
        raise ValueError("paths in a report must be relative to the dataset's root")
    if not len(p.truth):
        raise UserError("the test split has no images; expected at least one")
    folder = Path(folder)
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in zip(*(results[name] for name in COLUMNS), strict=True)]
    metrics = {key: value for key, value in results.items() if key not in COLUMNS}
    absent = [name for name, row in zip(p.names, rows, strict=True) if not row["support"]]
    metrics |= {"classes_without_images": absent} if absent else {}  # which macro F1 leaves out
    risk = risk_coverage(p)
    metrics |= limits_of(p, risk, strangers)
    metrics["per_class"] = dict(zip(p.names, rows, strict=True))
    if weights:
        write_file(folder / "weights.sha256", weights + "\n")
    write_file(folder / "metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    table = ([name, *row.values()] for name, row in metrics["per_class"].items())
    write_csv(folder / "per_class.csv", ("class", *COLUMNS), table)
    write_predictions(p, folder / "predictions.csv")

    wrong = np.flatnonzero(p.predicted != p.truth)
    worst = wrong[np.argsort(-p.confidence[wrong], kind="stable")][:WORST].tolist()
    unsure = np.argsort(p.confidence, kind="stable")[:UNSURE].tolist()
    thumbnails = {i: thumbnail(read_image, p.paths[i]) for i in {*worst, *unsure}}
    items = {i: _mistake(p, i, sha256(p.paths[i])) for i in worst}
    pairs = confused_pairs(p.truth, p.predicted)
    matrix = confusion_matrix(p.truth, p.predicted, len(p.names), pairs)
    page = {
        "title": title,
        "facts": facts,
        "worst": [
            _gallery_entry(p, i, thumbnails[i]) | _explanation(p, i, explain, read_image) | {"item": items[i]}
            for i in worst
        ],
        "compared": compared,
        "unsure": [_gallery_entry(p, i, thumbnails[i]) | {"item": {}} for i in unsure],
        "decide": decisions(title, p.class_names, items.values()),
        **_view(p, metrics, pairs, matrix),
        **_write_figures(folder, p, metrics["ece"], risk, matrix, {i: thumbnails[i] for i in worst}, history),
    }
    write_file(folder / "report.html", render_page("report.html", page))
    return metrics


def _gallery_entry(p: Predictions, index: int, image: Image) -> Row:
    true, predicted = p.truth[index], p.predicted[index]
    return gallery_entry(image, p.paths[index]) | {
        "true": p.names[true],
        "predicted": p.names[predicted],
        "right": true == predicted,
        "confidence": float(p.confidence[index]),
        "heat": None,
        "nearest": [],
    }


def _explanation(
    p: Predictions,
    index: int,
    explain: Callable[[str], Evidence | None] | None,
    read_image: Callable[[str], Image],
) -> Row:
    found = None if explain is None else explain(p.paths[index])
    if found is None:
        return {}
    agrees = {int(p.predicted[index]): "wrong", int(p.truth[index]): "right"}
    nearest = [
        gallery_entry(thumbnail(read_image, path, NEAR), path) | {"label": p.names[k], "agrees": agrees.get(k, "")}
        for path, k in found.nearest
    ]
    return {"heat": gallery_entry(thumbnail(lambda _: found.heat, ""), ""), "nearest": nearest}


def _mistake(p: Predictions, index: int, sha256: str) -> dict[str, str]:
    label, guess = (p.class_names[classes[index]] for classes in (p.truth, p.predicted))
    reason = f"predicted {guess}, {100 * p.confidence[index]:.0f} %"
    return decidable(p.paths[index], label, reason, sha256, guess)


def _view(p: Predictions, metrics: Mapping[str, Any], pairs: Sequence[Pair], matrix: Matrix) -> dict[str, Any]:
    """Return the numbers of the page."""
    correct, support = p.predicted == p.truth, np.bincount(p.truth, minlength=len(p.names))
    right, count = int(correct.sum()), len(correct)
    seen = np.unique(np.concatenate([p.truth, p.predicted])).tolist()
    rows = [{"name": p.names[index]} | metrics["per_class"][p.names[index]] for index in seen]
    kept = [(limit, p.confidence >= limit) for limit in THRESHOLDS]
    return {
        "metrics": metrics,
        "wrong": count - right,
        "interval": wilson_interval(right, count),
        "largest": (p.names[support.argmax()], support.max() / count),
        "mean_confidence": p.confidence.mean(),
        "thresholds": [{"limit": t, "kept": k.mean(), "right": correct[k].mean()} for t, k in kept if k.any()],
        "pairs": [
            {"true": p.names[true], "predicted": p.names[guess], "count": n, "support": int(support[true])}
            for true, guess, n in pairs[:PAIRS]
        ],
        "matrix": [
            (p.names[index], short_name(p.names[index]), list(zip(row.tolist(), share.tolist(), strict=True)))
            for index, row, share in zip(*matrix, strict=True)
        ],
        "covered": sorted(
            metrics.get("limits", {}).get("sets_per_class", {}).items(), key=lambda row: row[1]["coverage"]
        )[:TABLE_CLASSES],
        "classes": sorted(rows, key=lambda row: (row["f1"], -row["support"]))[:TABLE_CLASSES],
        "seen_count": len(rows),
        "class_count": len(p.names),
        "few": figures.FEW,
    }


def _write_figures(
    folder: Path,
    p: Predictions,
    ece: float,
    risk: NDArray[np.float64],
    matrix: Matrix,
    worst: Mapping[int, Image],
    history: Sequence[Mapping[str, float]],
) -> dict[str, list[str]]:
    """Write the PNG files; return the three that the page holds as data URIs, light and dark."""
    short = [figure_name(name, index) for index, name in enumerate(p.names)]
    classes, counts, shares = matrix
    captions = [f"{short[p.predicted[i]]}, {percent(p.confidence[i])}\ntrue: {short[p.truth[i]]}" for i in worst]
    kept = 0 if p.limited is None else int((~p.limited.unsure).sum())
    bins = confidence_bins(p.confidence, p.predicted == p.truth)
    diagrams = [figures.draw_calibration(bins, ece, theme) for theme in (LIGHT, DARK)]
    risks = [figures.draw_risk(risk, kept, theme) for theme in (LIGHT, DARK)]
    curves = [drawn for theme in (LIGHT, DARK) if (drawn := figures.draw_history(history, theme))]
    write_file(folder / "confusion.png", figures.draw_confusion([short[c] for c in classes], counts, shares))
    write_file(folder / "mistakes.png", figures.draw_mistakes(list(worst.values()), captions))
    write_file(folder / "calibration.png", diagrams[0])
    write_file(folder / "risk_coverage.png", risks[0])
    if curves:
        write_file(folder / "history.png", curves[0])
    drawn_as = {"calibration": diagrams, "risk": risks, "curves": curves}
    return {name: [data_uri(png) for png in pngs] for name, pngs in drawn_as.items()}

"""Comparing runs on the same test images: which is better, and whether the images suffice to tell.

Top-1 is compared by McNemar's test in its mid-p form, as Fagerland, Lydersen and Laake recommend ("The McNemar test for
binary matched-pairs data: mid-p and asymptotic are better than exact conditional", 2013), with the interval of Bonett
and Price ("Adjusted Wald confidence interval for a difference of binomial proportions based on paired data", 2012).
Macro F1 gets the interval of a paired bootstrap.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from rexnet_lit.report.html import render_page
from rexnet_lit.report.tables import wilson_interval
from rexnet_lit.utils.errors import UserError, plural
from rexnet_lit.utils.files import write_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

TEST = "McNemar's test, mid-p"
LEVEL = 0.05
"""How often a difference may be found where there is none."""
_RESAMPLES = 2000
_METRICS = ("top1", "top5", "macro_f1", "nll", "ece")


@dataclasses.dataclass(frozen=True, eq=False)
class TestedRun:
    """A run and its predictions for the test images.

    Args:
        name: What the user calls it.
        metrics: The content of ``metrics.json``.
        answers: The path of each image, to its true and its predicted class.
        settings: The run's settings, by key.
    """

    name: str
    metrics: Mapping[str, Any]
    answers: Mapping[str, tuple[str, str]]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Difference:
    """How a run differs from the first one. Metrics are fractions, intervals (low, high).

    Args:
        run: The run.
        baseline: The first run.
        top1: Its top-1 minus the baseline's.
        top1_interval: Of the true difference.
        macro_f1: Its macro F1 minus the baseline's.
        macro_f1_interval: Of the true difference.
        only_run_right: Number of images that only the run classifies correctly.
        only_baseline_right: Number of images that only the baseline classifies correctly.
        p_value: Of McNemar's test, mid-p.
        differs: Whether top-1 differs by more than chance explains.
        sentence: The result in words.
    """

    run: str
    baseline: str
    top1: float
    top1_interval: tuple[float, float]
    macro_f1: float
    macro_f1_interval: tuple[float, float]
    only_run_right: int
    only_baseline_right: int
    p_value: float
    differs: bool
    sentence: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The result of `compare_runs`.

    Args:
        images: Number of images.
        split: ``test``, or ``val`` for reports of `validate`.
        confidence: Of each difference's interval; with several, all hold together in 95 % of cases.
        runs: Name and metrics of each run, with ``top1_interval``.
        differences: Of each run from the first.
        settings: The settings that differ, with the value in each run.
        test: The name of the test.
    """

    images: int
    split: str
    confidence: float
    runs: tuple[dict[str, Any], ...]
    differences: tuple[Difference, ...]
    settings: dict[str, tuple[Any, ...]]
    test: str = TEST

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return dataclasses.asdict(self)


def read_run(name: str, settings: Mapping[str, Any]) -> TestedRun:
    """Return a run's predictions and metrics.

    Args:
        name: Its folder, or a folder with ``predictions.csv`` and ``metrics.json``, or a file of a run.
        settings: Its settings.

    Raises:
        UserError: There is no report, or it is damaged.
    """
    folder = report_folder(name)
    answers: dict[str, tuple[str, str]] = {}
    try:
        metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
        with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                answers[row["path"]] = row["target"], row["label_1"]
    except (OSError, KeyError, ValueError) as error:
        reason = f"no column {error}" if isinstance(error, KeyError) else getattr(error, "strerror", None) or error
        raise UserError(f"{folder}: its report cannot be read ({reason}); run rexnet-lit test again") from None
    if not answers:
        raise UserError(f"{folder / 'predictions.csv'}: no predictions; run rexnet-lit test again")
    return TestedRun(name, metrics, answers, settings)


def report_folder(name: str) -> Path:
    """Return the folder that holds the report of a run.

    Raises:
        UserError: There is none.
    """
    path = Path(name)
    if not path.exists():
        raise UserError(f"compare: there is no {name!r}; name the folders of runs, such as lightning_logs/version_0")
    start = path if path.is_dir() else path.parent
    for folder in (start, start / "report", start.parent / "report"):
        if (folder / "predictions.csv").is_file():
            return folder
    model = next((f"{file}" for file in (start / "checkpoints/best.ckpt",) if file.is_file()), "MODEL")
    raise UserError(f"{name}: it has no report/predictions.csv; test it first: rexnet-lit test {model}")


def compare_runs(runs: Sequence[TestedRun]) -> Comparison:
    """Compare each run with the first.

    Raises:
        UserError: The runs were tested on different images, or there are fewer than two.
    """
    if len(runs) < 2:
        raise UserError("compare: name at least two runs")
    first = runs[0]
    for run in runs[1:]:
        _check_images(first, run)
    paths = sorted(first.answers)
    names = sorted({label for run in runs for answer in run.answers.values() for label in answer})
    number = {label: i for i, label in enumerate(names)}
    truth = np.array([number[first.answers[path][0]] for path in paths])
    predicted = [np.array([number[run.answers[path][1]] for path in paths]) for run in runs]
    level = LEVEL / (len(runs) - 1)
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    settings = {key: tuple(run.settings.get(key) for run in runs) for key in keys}
    rows = []
    for run, labels in zip(runs, predicted, strict=True):
        metrics = {
            key: run.metrics.get(key) for key in ("top1", "top5", "macro_f1", "nll", "ece") if key in run.metrics
        }
        interval = wilson_interval(int((labels == truth).sum()), len(truth))
        rows.append({"name": run.name, **metrics, "top1_interval": interval})
    return Comparison(
        images=len(paths),
        split="val" if "val" in map(_split_of, runs) else "test",
        confidence=1 - level,
        runs=tuple(rows),
        differences=tuple(
            _difference(run.name, first.name, labels, predicted[0], truth, level)
            for run, labels in zip(runs[1:], predicted[1:], strict=True)
        ),
        settings={key: values for key, values in settings.items() if any(value != values[0] for value in values)},
    )


def _check_images(first: TestedRun, other: TestedRun) -> None:
    truth = [{path: answer[0] for path, answer in run.answers.items()} for run in (first, other)]
    if truth[0] == truth[1]:
        return
    shared = truth[0].keys() & truth[1].keys()
    reason = f"{len(shared)} of {len(truth[0])} and {len(truth[1])} images are the same"
    if len(shared) == len(truth[0]) == len(truth[1]):
        relabelled = sum(truth[0][path] != truth[1][path] for path in shared)
        reason = f"{plural(relabelled, 'image has', 'images have')} another label"
    elif _split_of(first) != _split_of(other):
        kinds = {"val": "validation", "test": "test"}
        reason += f": {kinds[_split_of(first)]} and {kinds[_split_of(other)]} images"
    raise UserError(
        f"{first.name} and {other.name} were tested on different images ({reason}): their metrics cannot be compared; "
        "test both on one folder with --data.root, or give both runs the same test split"
    )


def _split_of(run: TestedRun) -> str:
    return "val" if run.metrics.get("split") == "val" else "test"


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the mid-p value of McNemar's test: two-sided, from the images that only one of two models has right."""
    n, low = only_first + only_second, min(only_first, only_second)
    ways = [math.comb(n, k) for k in range(low + 1)]
    tail, observed = sum(ways) / 2**n, ways[low] / 2**n
    p_value: float = 2 * tail - observed
    if only_first == only_second:
        p_value = 1 - observed / 2 if n else 1.0
    return p_value


def paired_interval(only_first: int, only_second: int, count: int, level: float = LEVEL) -> tuple[float, float]:
    """Return Bonett and Price's interval of a difference of two shares of the same ``count`` images, second - first."""
    first, second = (only_first + 1) / (count + 2), (only_second + 1) / (count + 2)
    half = NormalDist().inv_cdf(1 - level / 2) * np.sqrt((first + second - (second - first) ** 2) / (count + 2))
    return max(-1.0, float(second - first - half)), min(1.0, float(second - first + half))


def macro_f1(truth: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
    """Return the mean F1 of the classes that occur in ``truth`` (N,)."""
    count = int(max(truth.max(), predicted.max())) + 1
    support, answers = np.bincount(truth, minlength=count), np.bincount(predicted, minlength=count)
    right = np.bincount(truth[truth == predicted], minlength=count)
    present = support > 0
    return float((2 * right[present] / (support + answers)[present]).mean())


def _difference(
    run: str, baseline: str, labels: NDArray[np.int64], base: NDArray[np.int64], truth: NDArray[np.int64], level: float
) -> Difference:
    def gain(rows: NDArray[np.int64]) -> float:
        return macro_f1(truth[rows], labels[rows]) - macro_f1(truth[rows], base[rows])

    right, base_right = labels == truth, base == truth
    worse, better = int((base_right & ~right).sum()), int((right & ~base_right).sum())
    p_value, interval = mcnemar(worse, better), paired_interval(worse, better, len(truth), level)
    draw = np.random.default_rng(0).integers
    gains = [gain(draw(len(truth), size=len(truth))) for _ in range(_RESAMPLES)]
    low, high = np.quantile(gains, [level / 2, 1 - level / 2]).tolist()
    difference = (better - worse) / len(truth)
    differs = p_value < level and not interval[0] <= 0 <= interval[1]
    return Difference(
        run, baseline, difference, interval, gain(np.arange(len(truth))), (low, high), better, worse, p_value, differs,
        _sentence(run, baseline, difference, interval, len(truth), (worse + better) / len(truth), differs=differs),
    )  # fmt: skip


def _sentence(
    run: str, baseline: str, difference: float, interval: tuple[float, float], count: int, disagree: float, *,
    differs: bool,
) -> str:  # fmt: skip
    """Say in words what the test has found; ``disagree`` is the share of images that only one of the two has right."""
    images = plural(count, "image", "images")
    if differs:
        best, other, sign = (run, baseline, 1) if difference > 0 else (baseline, run, -1)
        low, high = sorted(100 * sign * limit for limit in interval)
        return f"{best} is better than {other} by {abs(100 * difference):.1f} points ({low:.1f} to {high:.1f})"
    low, high = (100 * limit for limit in interval)
    found = f"{100 * difference:+.1f} points ({low:+.1f} to {high:+.1f})"
    if difference == 0:
        return f"{images} show no difference between {run} and {baseline}: {found}"
    # Two standard normal quantiles: to find a difference of this size four times in five.
    needed = (1.96 + 0.84) ** 2 * (disagree - difference**2) / difference**2
    return (
        f"{images} are too few to see a difference between {run} and {baseline}: {found}; one of this size would need "
        f"about {float(f'{needed:.1g}'):,.0f}"
    )


def write_comparison(file: Path, comparison: Comparison) -> None:
    """Write a comparison as one HTML page.

    Raises:
        UserError: The file cannot be written.
    """
    write_file(file, render_page("comparison.html", {"title": "Comparison of runs", "c": comparison}))

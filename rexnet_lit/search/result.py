"""What a search gives back: the run folder with the best weights, best.yaml and report.html."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rexnet_lit.report.comparison import TestedRun, compare_runs
from rexnet_lit.report.tuning_page import write_tuning_page
from rexnet_lit.search.evaluation import evaluate, metrics_of
from rexnet_lit.search.space import importance
from rexnet_lit.search.state import ship_run, shipped_run
from rexnet_lit.search.trial import Trial
from rexnet_lit.search.tune import Search
from rexnet_lit.training.callbacks.evaluation_report import history_of
from rexnet_lit.utils.files import write_file


def ship(search: Search, root: Path, overlay: Mapping[str, Any]) -> Path:
    """Copy the best run into a run folder below ``root``, and write ``best.yaml``; return the folder.

    A search that goes on after its end makes a new folder only if it has found something better.

    Args:
        search: The search.
        root: Where the new folder is made.
        overlay: The settings by key that make a fit one with the config's settings.
    """
    record, best = search.folder / "result.json", search.best
    facts = {"trial": best.name}
    known = shipped_run(record, facts)
    if known is not None:
        return known
    target = ship_run(search.run_of(best), root, record, facts)
    _write_best(search, best, overlay)
    return target


def _write_best(search: Search, best: Trial, overlay: Mapping[str, Any]) -> None:
    """Write the settings of the best run as a config."""
    tree: dict[str, Any] = {}
    for key, value in {**overlay, **search.settings_of(best)}.items():
        *groups, name = key.split(".")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    top1, default = best.metrics["val/top1"], search.done[0].metrics["val/top1"]
    header = (
        f"# The best settings that a search has found: val top-1 {top1:.3f}, {default:.3f} with those of the config.\n"
        "#\n#   python -m rexnet_lit fit DIR --config best.yaml\n"
    )
    write_file(search.folder / "best.yaml", header + yaml.safe_dump(json.loads(json.dumps(tree)), sort_keys=False))


def changes(search: Search) -> dict[str, tuple[Any, Any]]:
    """Return the settings in which the best run differs from the config: the config's value, and the best."""
    settings = search.settings_of(search.best).items()
    return {key: (search.base.get(key), value) for key, value in settings if value != search.base.get(key)}


def describe_test(search: Search, config: Mapping[str, Any]) -> str:
    """Describe the result on the test images; return an empty string without a test split."""
    after = _test(search, search.best, "the best settings", config)
    if after is None:
        return ""
    result = f"On {len(after.answers)} test images, which the search has not seen: top-1 {after.metrics['top1']:.3f}"
    before = None if search.best is search.done[0] else _test(search, search.done[0], "the config's settings", config)
    if before is None:
        return result
    sentence = compare_runs([before, after]).differences[0].sentence
    return f"{result}, {before.metrics['top1']:.3f} with the config's settings; {sentence}"


def _test(search: Search, trial: Trial, name: str, config: Mapping[str, Any]) -> TestedRun | None:
    """Return the predictions of a trial for the test images, or None without a test split."""
    run = search.run_of(trial)
    split_file = run / "split.csv"
    tested = evaluate(run, config, split_file if split_file.is_file() else None, search.base["trainer.accelerator"])
    if not len(tested.samples):
        return None
    targets, labels = tested.samples.targets, tested.probs.argmax(1)
    rows = zip(tested.samples.paths, targets.tolist(), labels.tolist(), strict=True)
    return TestedRun(name, metrics_of(tested.probs, targets), {path: (str(t), str(y)) for path, t, y in rows})


def write_report(search: Search, title: str, verdict: str) -> None:
    """Write ``report.html``."""
    best, default = search.best, search.done[0]
    names = {"The config's settings": default} | ({} if best is default else {"The best settings": best})
    write_tuning_page(
        search.folder / "report.html",
        [_row(trial) for trial in search.done],
        title=title,
        best=_row(best),
        default=_row(default),
        changes=changes(search),
        importance=importance(search.space, search.seen),
        verdict=verdict,
        symmetries=str(search.symmetries or ""),
        histories={name: history_of(search.run_of(trial) / "metrics.csv") for name, trial in names.items()},
    )


def _row(trial: Trial) -> dict[str, Any]:
    return {"name": trial.name, **dataclasses.asdict(trial)}

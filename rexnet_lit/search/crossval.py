"""Cross-validation: every image is predicted by a model that has not seen it.

Each fold is tested by a model that was trained, selected and calibrated without it: its validation images are drawn
from the other folds. So the figures are not optimistic, unlike those of validation images that chose the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rexnet_lit.data import decode
from rexnet_lit.data.folder import ImageFolder, Samples, fingerprint, samples_of, scan
from rexnet_lit.data.settings import SplitSettings
from rexnet_lit.data.splits import Split, draw, draw_groups, first_few
from rexnet_lit.data.table import write_split
from rexnet_lit.data.walk import PathList
from rexnet_lit.report.predictions import Predictions
from rexnet_lit.report.test_page import write_report
from rexnet_lit.search.evaluation import Tested, evaluate, metrics_of
from rexnet_lit.search.state import Fit, finished_run, remember
from rexnet_lit.utils.errors import UserError, plural

_OF_FOLDS = ("top1", "top5", "macro_f1", "nll", "ece")


def pool(root: str, settings: SplitSettings) -> ImageFolder:
    """Return a dataset whose training and validation images are all in train; a test split stays as it is.

    Raises:
        UserError: The folder cannot be used, or the settings leave no validation images.
    """
    if not settings.val_fraction:
        raise UserError("data.val_fraction is 0; crossval needs validation images to select the weights of each fold")
    if problems := settings.problems():
        raise UserError("; ".join(problems))
    folder = scan(root, dataclasses.replace(settings, num_folds=0, fold=0))
    parts = [folder.splits[name] for name in ("train", "val") if name in folder.splits]
    targets = np.concatenate([part.targets for part in parts])
    raws = [path for part in parts for path in part.paths.raws()]
    order = sorted(range(len(raws)), key=lambda i: (int(targets[i]), raws[i]))
    notes = tuple(note for note in folder.notes if note != "val is drawn from train")  # each fold draws its own
    splits: dict[Split, Samples] = {"train": Samples(folder.root, PathList([raws[i] for i in order]), targets[order])}
    if "test" in folder.splits:
        splits["test"] = folder.splits["test"]
        notes += (f"{plural(len(splits['test']), 'image', 'images')} of the test split are in no fold",)
    return dataclasses.replace(folder, splits=splits, notes=notes)


def fold_of(folder: ImageFolder, settings: SplitSettings, fold: int) -> ImageFolder:
    """Return a pooled dataset with the images of a fold in test, and validation images from the other folds.

    Raises:
        UserError: A class has no training images left, or the fold no images.
    """
    samples = folder.splits["train"]
    raws, groups = samples.paths.raws(), folder.groups
    by_class = {
        name: PathList([raws[i] for i in np.flatnonzero(samples.targets == number)])
        for number, name in enumerate(folder.class_names)
    }

    def divide(images: dict[str, PathList], how: SplitSettings) -> dict[str, dict[Split, PathList]]:
        return draw_groups(images, groups, how) if groups else {n: draw(n, paths, how) for n, paths in images.items()}

    first = divide(by_class, dataclasses.replace(settings, fold=fold, test_fraction=0.0))
    rest = divide(
        {name: parts["train"] for name, parts in first.items()},
        dataclasses.replace(settings, num_folds=0, fold=0, test_fraction=0.0),
    )
    bare = [name for name, parts in rest.items() if not len(parts["train"])]
    if bare:
        raise UserError(
            f"data.num_folds: fold {fold + 1} leaves no training images of {first_few(bare)}; use fewer folds or "
            "smaller groups"
        )
    chosen: dict[Split, dict[str, PathList]] = {
        "train": {name: parts["train"] for name, parts in rest.items()},
        "val": {name: parts["val"] for name, parts in rest.items()},
        "test": {name: parts["val"] for name, parts in first.items()},
    }
    if not any(map(len, chosen["test"].values())):
        raise UserError(f"data.num_folds is {settings.num_folds}, but fold {fold + 1} has no images; use fewer folds")
    names = folder.class_names
    splits = {split: samples_of(folder.root, images, names) for split, images in chosen.items()}
    return dataclasses.replace(folder, splits=splits)


@dataclasses.dataclass(frozen=True, eq=False)
class Folds:
    """A finished cross-validation.

    Args:
        target: Its folder.
        folder: The dataset: the images of all folds are in train.
        runs: The run folder of each fold.
        tested: The images of each fold, and their probabilities by its model, which has not seen them.
        metrics: The content of ``metrics.json``: the metrics of all images, those of each fold, their mean and spread.
    """

    target: Path
    folder: ImageFolder
    runs: Sequence[Path]
    tested: Sequence[Tested]
    metrics: Mapping[str, Any]


def cross_validate(
    fit: Fit, settings: Mapping[str, Any], folder: ImageFolder, identity: Mapping[str, Any], target: Path
) -> Folds:
    """Train and test every fold, and write ``metrics.json``, ``predictions.csv`` and ``report.html``.

    The same call goes on where an earlier one was killed.

    Args:
        fit: Trains a fold.
        settings: Those of a fit, in groups.
        folder: What `pool` has returned.
        identity: The settings that all folds share, by key.
        target: The folder to write.

    Raises:
        UserError: The folder or a setting cannot be used, or ``target`` holds another cross-validation.
    """
    config, how = settings["data"], SplitSettings.of(settings["data"])
    remember(target, {**identity, "images": fingerprint(folder.splits["train"])})
    unused = ["data.fold has no effect: each fold is tested"] if config.get("fold") else []
    for note in (*folder.notes, *unused):
        print(f"note: {note}", flush=True)  # noqa: T201
    runs, tested = [], []
    for fold, parts in enumerate([fold_of(folder, how, fold) for fold in range(how.num_folds)]):
        print(f"fold {fold + 1} of {how.num_folds}: {_counts(parts)}", flush=True)  # noqa: T201
        home = target / f"fold_{fold + 1}"
        run = finished_run(home)
        if run is None:
            write_split(parts, home / "split.csv")
            run = fit(changes(config, home))
        runs.append(run)
        tested.append(evaluate(run, config, home / "split.csv", settings["trainer"]["accelerator"]))
    return Folds(target, folder, runs, tested, _report(target, folder, tested))


def changes(config: Mapping[str, Any], home: Path) -> dict[str, Any]:
    """Return the settings that differ for a run in the folder ``home``: its images come from a file there."""
    drawn = ("val_fraction", "test_fraction", "num_folds", "fold", "group_pattern", "labels", "fixes")
    found: dict[str, Any] = {f"data.{key}": getattr(SplitSettings, key) for key in drawn if key in config}
    return found | {"data.split_file": str(home / "split.csv"), "trainer.default_root_dir": str(home)}


def _counts(folder: ImageFolder) -> str:
    return ", ".join(f"{len(samples)} {split}" for split, samples in folder.splits.items())


def _report(target: Path, folder: ImageFolder, tested: list[Tested]) -> dict[str, Any]:
    of_folds = [metrics_of(part.probs, part.samples.targets) for part in tested]
    shown = [name for name in _OF_FOLDS if name in of_folds[0]]
    values = {name: np.array([metrics[name] for metrics in of_folds]) for name in shown}
    paths = [path for part in tested for path in part.samples.paths]
    order = np.array(sorted(range(len(paths)), key=lambda i: paths[i]))
    probs = np.concatenate([part.probs for part in tested])[order]
    targets = np.concatenate([part.samples.targets for part in tested])[order]
    results = {
        **metrics_of(probs, targets),
        "mean": {name: float(column.mean()) for name, column in values.items()},
        "std": {name: float(column.std(ddof=1)) for name, column in values.items()},
        "folds": [{name: metrics[name] for name in (*shown, "count")} for metrics in of_folds],
    }
    left_out = len(folder.splits["train"]) - len(paths)
    facts = {"Folds": str(len(tested)), "Classes": str(len(folder.class_names)), "Images": str(len(paths))}
    facts |= {
        f"{name} of the folds": f"{100 * column.mean():.1f} % (standard deviation {100 * column.std(ddof=1):.1f})"
        for name, column in (("Top-1", values["top1"]), ("Macro F1", values["macro_f1"]))
    }
    if left_out:
        facts["Never tested"] = f"{plural(left_out, 'image', 'images')}: unreadable, or the only one of a class"
    return write_report(
        target,
        Predictions([paths[i] for i in order], probs, targets, folder.class_names),
        results,
        read_image=lambda path: decode.read(folder.root / path, 160),
        title=f"Cross-validation report: {folder.root.name}",
        facts=facts,
    )

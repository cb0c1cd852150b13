"""How many planted wrong labels `check --labels` finds, beside cleanlab, and what correcting them is worth in training.

    python tests/benchmarks/wrong_labels.py --weights FILE.safetensors --data letters=DIR [--data NAME=DIR ...]
    python tests/benchmarks/wrong_labels.py --weights FILE.safetensors --retrain DIR

Each --data folder is linked with a share of the labels replaced by another class at random, and checked. "First n": of
the first n images in the order of suspicion, n being the number planted, the share that is planted. Then precision and
recall of the suspects. cleanlab (`pip install cleanlab`) gets the same held-out probabilities, at the temperature that
fits the given labels best.

--retrain trains on DIR as it is, with 10 % of the labels of train/ and val/ replaced, and with the suspects'
suggestions applied to those, or the suspects removed; DIR/test measures.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rexnet_lit.checks import check, suspects
from rexnet_lit.checks.symmetries import Change
from rexnet_lit.cli.config import CheckSettings
from rexnet_lit.cli.label_features import Embedder, build_embedder
from rexnet_lit.data.folder import scan

Rates = dict[str, float]


def link(root: Path, new: Path, label_of: Mapping[str, str]) -> None:
    """Link the images of ``root`` below ``new``, each in the folder of its label."""
    for path, label in label_of.items():
        target = new / Path(path).parent.parent / label / f"{Path(path).parent.name}-{Path(path).name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(root / path, target)


def plant(label_of: Mapping[str, str], share: float, seed: int, names: tuple[str, ...]) -> dict[str, str]:
    """Replace a share of the labels by another class."""
    rng = np.random.default_rng(seed)
    paths = sorted(label_of)
    chosen = rng.choice(len(paths), round(share * len(paths)), replace=False)
    moved = {
        paths[i]: names[(names.index(label_of[paths[i]]) + rng.integers(1, len(names))) % len(names)] for i in chosen
    }
    return {**label_of, **moved}


def cached(embed: Embedder, seconds: list[float]) -> Embedder:
    """Compute the features of each file once, whatever folder it is linked in; record the time."""
    known: dict[tuple[int, int, Change], Any] = {}

    def compute(paths: list[str], side: int, change: Change) -> Any:
        def key(path: str) -> tuple[int, int, Change]:
            status = os.stat(path)  # noqa: PTH116
            return status.st_ino, status.st_size, change

        new = [path for path in paths if key(path) not in known]
        if new:
            started = time.monotonic()
            known.update(zip(map(key, new), embed(new, side, change), strict=True))
            seconds.append(time.monotonic() - started)
        return np.stack([known[key(path)] for path in paths])

    return compute


def naive(probs: Any, targets: Any) -> Any:
    """Sharpen or soften probabilities until they fit the given labels best."""
    logs, rows = np.log(np.maximum(probs, 1e-30)), np.arange(len(targets))
    tempered = [suspects._softmax(logs * power) for power in np.geomspace(0.1, 3, 40)]
    return min(tempered, key=lambda p: -np.log(np.maximum(p[rows, targets], 1e-30)).mean())


def rates(flagged: Any, wrong: Any) -> tuple[float, float]:
    """Precision and recall."""
    return float(wrong[flagged].mean()) if len(flagged) else float("nan"), float(wrong[flagged].sum() / wrong.sum())


def measure(root: Path, share: float, seed: int, embed: Embedder, names: tuple[str, ...], label_of: Any) -> Rates:
    """Plant, check, compare."""
    seen: dict[str, Any] = {}
    original = suspects.judge_features

    def record(features: Any, targets: Any, *rest: Any) -> Any:
        started = time.monotonic()
        seen.update(judgement=original(features, targets, *rest), targets=targets)
        seen["seconds"] = time.monotonic() - started
        return seen["judgement"]

    with tempfile.TemporaryDirectory(dir=root.parent) as temporary:
        link(root, Path(temporary), plant(label_of, share, seed, names))
        suspects.judge_features = record
        try:
            result = check.check(temporary, embed=embed)
        finally:
            suspects.judge_features = original
    bad = {row.path for row in result.bad}
    images = [(name, Path(path).name) for _, name, path in result.examples if path not in bad]
    wrong = np.array([not file.startswith(f"{name}-") for name, file in images])
    judgement, targets = seen["judgement"], seen["targets"]
    given = judgement.probs[np.arange(len(targets)), targets]
    count = wrong.sum()
    found = {"seconds": seen["seconds"], "estimated": judgement.share}
    found["first n"] = wrong[np.argsort(given)[:count]].mean()
    found["precision"], found["recall"] = rates(judgement.suspects, wrong)
    if importlib.util.find_spec("cleanlab"):
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores

        probs = naive(judgement.probs, targets)
        for method in ("self_confidence", "normalized_margin"):
            order = np.argsort(get_label_quality_scores(targets, probs, method=method))
            found[f"cleanlab {method}"] = wrong[order[:count]].mean()
        for kind in ("prune_by_noise_rate", "confident_learning"):
            flagged = find_label_issues(targets, probs, filter_by=kind, return_indices_ranked_by="self_confidence")
            found[f"{kind} precision"], found[f"{kind} recall"] = rates(flagged, wrong)
    return found


def fit(root: Path, out: Path, o: argparse.Namespace, seed: int) -> float:
    """Train and return the test accuracy."""
    settings = [
        f"--data.image_size={o.size}", f"--trainer.max_epochs={o.epochs}", f"--model.weights={o.weights}",
        f"--seed_everything={seed}", "--trainer.accelerator=cpu", "--config", *shlex.split(o.fit),
        f"--trainer.default_root_dir={out}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "rexnet_lit"]
    run = out / "lightning_logs" / "version_0"
    for arguments in (["fit", str(root), *settings], ["test", str(run / "model.safetensors")]):
        subprocess.run([*command, *arguments], check=True, capture_output=True)
    return float(json.loads((run / "report" / "metrics.json").read_text())["top1"])


def retrain(root: Path, embed: Embedder, o: argparse.Namespace) -> None:
    """Print the test accuracy after training on right, wrong, corrected and remaining labels."""
    names, label_of = read(root)
    rng = np.random.default_rng(0)
    by_class: dict[tuple[str, str], list[str]] = {}
    for path in sorted(label_of):
        by_class.setdefault((path.split("/")[0], label_of[path]), []).append(path)
    most = {"train": o.per_class, "val": o.per_class // 4, "test": 10**9}
    kept = [p for (split, _), paths in by_class.items() for p in rng.permutation(paths)[: most[split]].tolist()]
    trained = {path: label_of[path] for path in kept if not path.startswith("test/")}
    tested = {path: label_of[path] for path in kept if path.startswith("test/")}
    for seed in range(o.seeds):
        with tempfile.TemporaryDirectory(dir=root.parent) as temporary:
            out = Path(temporary)
            planted = plant(trained, 0.1, seed, names)
            link(root, out / "planted", {**planted, **tested})
            found = check.check(out / "planted", embed=embed).suspects
            fixes = {}
            for row in found:
                split, _, file = row.path.split("/")
                fixes[f"{split}/{file.replace('-', '/', 1)}"] = row.suggested
            kinds = {
                "right labels": label_of,
                "10 % wrong": planted,
                "suggestions applied": {**planted, **{p: label for p, label in fixes.items() if p in trained}},
                "suspects removed": {path: label for path, label in planted.items() if path not in fixes},
            }
            for kind, labels in kinds.items():
                folder = out / kind.replace(" ", "_")
                link(root, folder, {**{p: labels[p] for p in trained if p in labels}, **tested})
                print(f"seed {seed}, {kind}: {fit(folder, out / ('run ' + kind), o, seed):.4f}", flush=True)


def read(root: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the classes, and the label of each image."""
    folder = scan(root)
    return folder.class_names, {
        path: folder.class_names[target]
        for samples in folder.splits.values()
        for path, target in zip(samples.paths, samples.targets.tolist(), strict=True)
    }


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--retrain", type=Path, metavar="DIR")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--fit", default="finetune", help="the config of the fits, and options")
    parser.add_argument("--per-class", type=int, default=100)
    o = parser.parse_args()
    quiet: Callable[[str], Callable[[int, int], None]] = lambda title: lambda done, total: None  # noqa: E731
    seconds: list[float] = []
    embed = cached(build_embedder(None, o.weights, CheckSettings(image_size=o.size), quiet), seconds)
    for name, _, folder in (pair.partition("=") for pair in o.data):
        names, label_of = read(Path(folder))
        for share in (0.05, 0.1):
            runs = [measure(Path(folder), share, seed, embed, names, label_of) for seed in range(o.seeds)]
            means = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
            print(f"{name}, {len(label_of)} images, {share:.0%} wrong (features {seconds[-1]:.1f} s):")
            print("   ", ", ".join(f"{key} {value:.3f}" for key, value in means.items()), flush=True)
    if o.retrain:
        retrain(o.retrain, embed, o)


if __name__ == "__main__":
    main()

"""Whether the limits of a model's answers hold on test images, and how well it tells strangers.

    python tests/benchmarks/limits.py --data DIR --data DIR2 --weights FILE.safetensors --epochs 2 --size 48 --seeds 0 1

Each DIR holds train/, val/ and test/, of which the training takes --per-class images of each class (half as many for
validation), and the measurement all test images. Strangers are 250 validation images of each other folder, squares of
scikit-learn's photographs, and noise. Then all validation and test images of a run are divided anew 500 times, so that
no part has selected the weights: what differs from that is what the selection costs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from bench_accuracy import CONFIGS, draw
from scipy.special import logsumexp, softmax
from sklearn.datasets import load_sample_images
from sklearn.metrics import roc_auc_score

import rexnet_lit
from rexnet_lit.training.limits import sure_confidence

Array = Any


def fit(o: argparse.Namespace, root: Path, seed: int, out: Path) -> rexnet_lit.Classifier:
    """Train the shipped finetune config."""
    start = ["--model.weights", o.weights] if o.weights else ["--model.pretrained", "false"]
    command = [
        sys.executable, "-m", "rexnet_lit", "fit", "--config", CONFIGS / "finetune.yaml", "--data.root", root, *start,
        "--data.image_size", o.size, "--trainer.max_epochs", o.epochs, "--seed_everything", seed, "--data.num_workers",
        0, "--trainer.accelerator", "cpu", "--trainer.default_root_dir", out,
    ]  # fmt: skip
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stdout + done.stderr)
    return rexnet_lit.load(out / "lightning_logs" / "version_0" / "model.safetensors", device="cpu")


def labelled(classifier: rexnet_lit.Classifier, folder: Path) -> tuple[Array, Array]:
    """Return the features and classes of the images below a folder."""
    files = sorted(path for path in folder.glob("*/*") if path.is_file())
    return classifier.embed(files), np.array([classifier.class_names.index(path.parent.name) for path in files])


def squares() -> list[Array]:
    """Return 208 squares of the two photographs."""
    photos = load_sample_images().images
    return [
        np.ascontiguousarray(p[y : y + 100, x : x + 100])
        for p in photos
        for y in range(0, 320, 40)
        for x in range(0, 540, 42)
    ]


def lac(scores: Array, probs: Array, coverage: float = 0.9) -> Array:
    """Sets of all classes whose score, (N, K), is no higher than the conformal quantile of calibration scores."""
    rank = int(np.ceil((len(scores) + 1) * coverage - 1e-9))
    return probs <= np.sort(scores)[rank - 1]


def aps(probs: Array, uniform: Array, penalty: float = 0.0) -> Array:
    """The randomised scores of APS, and with a penalty beyond the second class of RAPS, (N, K)."""
    order = np.argsort(-probs, 1)
    ranked = np.take_along_axis(probs, order, 1)
    scores = ranked.cumsum(1) - uniform[:, None] * ranked + penalty * np.maximum(0, np.arange(probs.shape[1]) - 1)
    return np.take_along_axis(scores, np.argsort(order, 1), 1)


def redivide(probs: Array, y: Array, count: int, times: int) -> dict[str, float]:
    """Divide images with known answers anew, and return the means over the divisions."""
    rng, found = np.random.default_rng(0), []
    for _ in range(times):
        order, u = rng.permutation(len(y)), rng.random(len(y))
        cal, test = order[:count], order[count:]
        row: dict[str, float] = {}
        for name, scores in (("LAC", 1 - probs), ("APS", aps(probs, u)), ("RAPS", aps(probs, u, 0.1))):
            sets = lac(scores[cal, y[cal]], scores[test])
            row[f"{name} coverage"], row[f"{name} size"] = (
                sets[np.arange(len(test)), y[test]].mean(),
                sets.sum(1).mean(),
            )
        right, confidence = probs.argmax(1) == y, probs.max(1)
        limit = sure_confidence(confidence[cal], right[cal], 0.95)
        sure = confidence[test] > (2 if limit is None else limit)
        row["sure"], row["met"] = sure.mean(), not sure.any() or right[test][sure].mean() >= 0.95
        found.append(row)
    return {name: float(np.mean([row[name] for row in found])) for name in found[0]}


def measure(o: argparse.Namespace, root: Path, seed: int) -> None:
    """Train once, and print a line for each thing that was measured."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        drawn = draw(root, o.per_class, seed, out / "data")
        classifier = fit(o, drawn, seed, out)
        limits, head = classifier.limits, classifier.network.head.fc
        features, y = labelled(classifier, root / "test")
        val, val_y = labelled(classifier, drawn / "val")
        rng = np.random.default_rng(0)
        strangers = {other.name: labelled_any(classifier, other / "val") for other in o.data if other != root}
        strangers["photographs"] = classifier.embed(squares())
        strangers["noise"] = classifier.embed(rng.integers(0, 256, (200, o.size, o.size, 3), np.uint8))

    def logits(x: Array) -> Array:
        return x @ head.weight.numpy().T + head.bias.numpy()

    def probs_of(x: Array) -> Array:
        return softmax(logits(x), 1).astype(np.float32)

    probs = probs_of(features)
    sets, sure, right = limits.sets(probs), ~limits.unsure(probs), probs.argmax(1) == y
    print(f"{root.name} seed {seed}: top-1 {right.mean():.3f}, {limits.images} validation and {len(y)} test images")
    print(f"  sets: coverage {sets[np.arange(len(y)), y].mean():.3f}, size {sets.sum(1).mean():.2f}, "
          f"empty {(sets.sum(1) == 0).mean():.3f}")  # fmt: skip
    precision = right[sure].mean() if sure.any() else float("nan")
    wanted = np.argsort(-probs.max(1), kind="stable")
    best = np.flatnonzero(right[wanted].cumsum() / np.arange(1, len(y) + 1) >= 0.95)
    most = (best[-1] + 1) / len(y) if len(best) else 0
    print(f"  sure: {sure.mean():.3f} of the answers, precision {precision:.3f}; at most possible {most:.3f}")
    known = limits.strangeness(features)
    print(f"  known images taken for strangers: {(known > 1).mean():.3f}")
    for name, x in strangers.items():
        truth = np.repeat([0, 1], [len(y), len(x)])
        by = {
            "strangeness": (known, limits.strangeness(x)),
            "max softmax": (-probs.max(1), -probs_of(x).max(1)),
            "energy": (-logsumexp(logits(features), 1), -logsumexp(logits(x), 1)),
        }
        areas = ", ".join(f"{n} {roc_auc_score(truth, np.concatenate(pair)):.3f}" for n, pair in by.items())
        print(f"  {name}: AUROC {areas}; recognised {(limits.strangeness(x) > 1).mean():.3f}")
    pooled, answers = np.concatenate([probs_of(val), probs]), np.concatenate([val_y, y])
    again = redivide(pooled, answers, len(val), o.times)
    print("  divided anew:", ", ".join(f"{name} {value:.3f}" for name, value in again.items()), flush=True)


def labelled_any(classifier: rexnet_lit.Classifier, folder: Path) -> Array:
    """Return the features of 250 images below a folder."""
    files = sorted(path for path in folder.glob("*/*") if path.is_file())
    return classifier.embed([files[int(i)] for i in np.random.default_rng(0).permutation(len(files))[:250]])


def main() -> None:
    """Measure each folder with each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, action="append")
    parser.add_argument("--weights")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--per-class", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--times", type=int, default=500)
    o = parser.parse_args()
    for seed in o.seeds:
        for root in o.data:
            measure(o, root, seed)


if __name__ == "__main__":
    main()

"""Whether the limits of a model's answers hold on test images, and how well it tells strangers.

    python tests/benchmarks/limits.py --data DIR --data DIR2 --weights FILE.safetensors --epochs 2 --size 48 \\
        --seeds 0 1 2 3 4 --smoothing 0.1 0 --rows rows.jsonl

Each DIR holds train/, val/ and test/. The training takes --per-class images of each class from train/. The images of
val/ and test/ are put together (for classes with few of them the rest of train/ too) and divided by chance, half as
many as for training for validation, four times as many for the test: without the selection by the validation images,
the share of sets that have the true class would be 90 % on average. Strangers are 250 validation images of each other
folder, the images of the classes that --hold-out leaves out, squares of scikit-learn's photographs, and noise.

Then 500 times as many test images as were validated set the limits, and the other test images check them: these limits
come from images that have not selected the weights. Another 500 times half as many, which is what keeping a half of the
validation images apart would cost. Each run is a line of --rows; what is in there is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from bench_accuracy import CONFIGS
from scipy.special import logsumexp, softmax
from sklearn.datasets import load_sample_images
from sklearn.metrics import roc_auc_score

import rexnet_lit
from rexnet_lit.cli.main import main as rexnet
from rexnet_lit.report.limits import risk_coverage
from rexnet_lit.training.limits import sure_confidence

Array = Any
Row = dict[str, Any]


def divide(root: Path, classes: list[str], per_class: int, seed: int, out: Path) -> None:
    """Copy the images of a run to train/, val/ and test/ below ``out``."""
    rng, pool = np.random.default_rng(seed), []
    for name in classes:
        files = {split: sorted((root / split / name).iterdir()) for split in ("train", "val", "test")}
        order = [files["train"][int(i)] for i in rng.permutation(len(files["train"]))]
        rest, most = files["val"] + files["test"], per_class // 2 * 5
        rest += order[per_class:] if len(rest) < most else []
        pool += [rest[int(i)] for i in rng.permutation(len(rest))[:most]]
        _copy(order[:per_class], out / "train")
    pool = [pool[int(i)] for i in rng.permutation(len(pool))]
    _copy(pool[: len(pool) // 5], out / "val")
    _copy(pool[len(pool) // 5 :], out / "test")


def _copy(files: list[Path], folder: Path) -> None:
    for file in files:
        (folder / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / file.parent.name / f"{file.parents[1].name}_{file.name}")


def fit(o: argparse.Namespace, root: Path, seed: int, smoothing: float, out: Path) -> rexnet_lit.Classifier:
    """Train the shipped finetune config."""
    start = ["--model.weights", o.weights] if o.weights else ["--model.pretrained", "false"]
    command = [
        "fit", "--config", CONFIGS / "finetune.yaml", "--data.root", root, *start, "--data.image_size", o.size,
        "--trainer.max_epochs", o.epochs, "--seed_everything", seed, "--data.num_workers", 0, "--trainer.accelerator",
        "cpu", "--trainer.default_root_dir", out, "--model.loss.label_smoothing", smoothing,
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        code = rexnet([str(part) for part in command])
    if code:
        raise SystemExit(errors.getvalue())
    return rexnet_lit.load(out / "lightning_logs" / "version_0" / "model.safetensors", device="cpu")


def embed(classifier: rexnet_lit.Classifier, folder: Path, count: int = 0, classes: str = "*") -> tuple[Array, Array]:
    """Return the features and class names of the images below a folder, of ``count`` of them if it is given."""
    files = sorted(path for path in folder.glob(f"{classes}/*") if path.is_file())
    files = [files[int(i)] for i in np.random.default_rng(0).permutation(len(files))[: count or None]]
    return classifier.embed(files), np.array([path.parent.name for path in files])


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


def normalised(logits: Array, p: float = 4.0) -> Array:
    """Centre the logits and divide them by their p-norm (MaxLogit-pNorm: Cattelan and Silva 2023, arXiv 2305.15508)."""
    centred = logits - logits.mean(1, keepdims=True)
    return centred / np.linalg.norm(centred, p, 1, keepdims=True)


def resample(probs: Array, y: Array, count: int, times: int) -> Row:
    """Set limits by ``count`` of the test images and check them on the others; return the means over many divisions."""
    rng, found = np.random.default_rng(0), []
    for _ in range(times):
        order, u = rng.permutation(len(y)), rng.random(len(y))
        cal, test = order[:count], order[count:]
        row: Row = {}
        for name, scores in (("LAC", 1 - probs), ("APS", aps(probs, u)), ("RAPS", aps(probs, u, 0.1))):
            sets = lac(scores[cal, y[cal]], scores[test])
            row[f"coverage {name}"] = sets[np.arange(len(test)), y[test]].mean()
            row[f"size {name}"] = sets.sum(1).mean()
        right, confidence = probs.argmax(1) == y, probs.max(1)
        limit = sure_confidence(confidence[cal], right[cal], 0.95)
        sure = confidence[test] > (2 if limit is None else limit)
        row["sure"], row["met"] = sure.mean(), not sure.any() or right[test][sure].mean() >= 0.95
        found.append(row)
    means = {name: float(np.mean([row[name] for row in found])) for name in found[0]}
    return means | {"spread": float(np.std([row["coverage LAC"] for row in found]))}


def measure(o: argparse.Namespace, root: Path, seed: int, smoothing: float) -> Row:
    """Train once, and return all that was measured."""
    names = sorted(path.name for path in (root / "train").iterdir())
    chosen = sorted(names[int(i)] for i in np.random.default_rng(seed).permutation(len(names))[o.hold_out :])
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        divide(root, chosen, o.per_class, seed, out / "data")
        classifier = fit(o, out / "data", seed, smoothing, out)
        features, truth = embed(classifier, out / "data" / "test")
        strangers = {other.name: embed(classifier, other / "val", 250)[0] for other in o.data if other != root}
        if o.hold_out:
            held = [embed(classifier, root, 0, f"[vt]*/{name}")[0] for name in names if name not in chosen]
            strangers["classes held out"] = np.concatenate(held)
        strangers["photographs"] = classifier.embed(squares())
        noise = np.random.default_rng(0).integers(0, 256, (200, o.size, o.size, 3), np.uint8)
        strangers["noise"] = classifier.embed(noise)
    limits, head = classifier.limits, classifier.network.head.fc
    y = np.array([classifier.class_names.index(name) for name in truth])

    def logits(x: Array) -> Array:
        return x @ head.weight.numpy().T + head.bias.numpy()

    def probs_of(x: Array) -> Array:
        return softmax(logits(x), 1).astype(np.float32)

    probs = probs_of(features)
    sets, sure, right = limits.sets(probs), ~limits.unsure(probs), probs.argmax(1) == y
    precision = float(right[sure].mean()) if sure.any() else None
    ranked = np.flatnonzero(right[np.argsort(-probs.max(1), kind="stable")].cumsum() / np.arange(1, len(y) + 1) >= 0.95)
    known = limits.strangeness(features)

    def aurc(confidence: Array) -> float:
        answers: Any = SimpleNamespace(confidence=confidence, predicted=probs.argmax(1), truth=y)
        return float(risk_coverage(answers).mean())

    row: Row = {
        "images": [limits.images, len(y)], "top1": right.mean(), "aurc": aurc(probs.max(1)),
        "aurc, normalised logits": aurc(normalised(logits(features)).max(1)),
        "coverage": sets[np.arange(len(y)), y].mean(), "size": sets.sum(1).mean(), "empty": (sets.sum(1) == 0).mean(),
        "sure": sure.mean(), "precision": precision, "met": precision is None or precision >= 0.95,
        "most": (ranked[-1] + 1) / len(y) if len(ranked) else 0, "false alarms": (known > 1).mean(),
        "unselected": resample(probs, y, limits.images, o.times),
        "half": resample(probs, y, limits.images // 2, o.times),
    }  # fmt: skip
    for name, x in strangers.items():
        by = {
            "strangeness": (known, limits.strangeness(x)),
            "max softmax": (-probs.max(1), -probs_of(x).max(1)),
            "energy": (-logsumexp(logits(features), 1), -logsumexp(logits(x), 1)),
        }
        labels = np.repeat([0, 1], [len(y), len(x)])
        row[name] = {kind: roc_auc_score(labels, np.concatenate(pair)) for kind, pair in by.items()}
        row[name] |= {
            f"recognised by {kind}": (pair[1] > np.quantile(pair[0], 0.95)).mean() for kind, pair in by.items()
        }
        row[name]["recognised"] = (limits.strangeness(x) > 1).mean()
    return row


def table(rows: list[Row]) -> None:
    """Print the mean (standard deviation) of everything over the seeds, by folder and label smoothing."""
    for key in sorted({(row["data"], row["smoothing"]) for row in rows}):
        found = [row for row in rows if (row["data"], row["smoothing"]) == key]
        print(f"\n{key[0]}, label smoothing {key[1]}, {len(found)} seeds, images {found[0]['images']}")
        for name, value in found[0].items():
            for part in value if isinstance(value, dict) else [None]:
                values = [row[name][part] if part else row[name] for row in found]
                if name not in ("data", "smoothing", "seed", "images"):
                    given = [float(v) for v in values if v is not None]
                    mean = f"{np.mean(given):.3f} ({np.std(given):.3f})" if given else "-"
                    print(f"  {name}{f', {part}' if part else ''}: {mean}")


def main() -> None:
    """Measure each folder with each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=lambda path: Path(path).absolute(), required=True, action="append")
    parser.add_argument("--weights")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--per-class", type=int, default=50)
    parser.add_argument("--hold-out", type=int, default=0, help="classes that are not trained, drawn by the seed")
    parser.add_argument("--smoothing", type=float, nargs="+", default=[0.1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--times", type=int, default=500)
    parser.add_argument("--rows", type=Path, required=True)
    o = parser.parse_args()
    rexnet_lit.configure_allocator()
    rows = [json.loads(line) for line in o.rows.read_text().splitlines()] if o.rows.exists() else []
    for smoothing in o.smoothing:
        for seed in o.seeds:
            for root in o.data:
                run = {"data": root.name, "seed": seed, "smoothing": smoothing}
                if not any(run.items() <= row.items() for row in rows):
                    rows.append(run | measure(o, root, seed, smoothing))
                    with o.rows.open("a") as file:
                        file.write(json.dumps(rows[-1], default=lambda number: number.item()) + "\n")
    table(rows)


if __name__ == "__main__":
    main()

"""What `crossval` ships: top-1 on test images of a refit, of the folds' average, and of the folds' models.

    python tests/benchmarks/bench_ship.py /tmp/ship GLYPHS DIGITS --weights FILE.safetensors

Each folder holds train/ and test/; of the training images 20 a class are drawn by the seed. The same command goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path
from typing import Any

from rexnet_lit.cli import main
from rexnet_lit.search.evaluation import evaluate, metrics_of

_SETTINGS = [
    "--config", "finetune", "--data.num_folds", "5", "--data.image_size", "32", "--trainer.max_epochs", "5",
    "--data.augment.hflip", "0", "--data.num_workers", "0", "--trainer.accelerator", "cpu",
]  # fmt: skip


def draw(source: Path, target: Path, seed: int, count: int) -> None:
    """Copy ``count`` training images a class, and all test images."""
    chance = random.Random(seed)
    for split in ("train", "test"):
        for folder in sorted((source / split).iterdir()):
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            to = target / split / folder.name
            to.mkdir(parents=True, exist_ok=True)
            for file in chance.sample(files, count) if split == "train" else files:
                shutil.copy(file, to / file.name)


def measure(data: Path, root: Path, settings: list[str]) -> dict[str, Any]:
    """Cross-validate, ship both, and return the figures."""
    command = ["crossval", str(data), *settings, "--trainer.default_root_dir", str(root)]
    for how in ("refit", "average"):
        if main.main([*command, "--ship", how]):
            raise SystemExit(f"crossval failed: {' '.join(command)}")
    records = {how: json.loads((root / f"crossval/{how}.json").read_text()) for how in ("refit", "average")}
    refit = Path(records["refit"]["run"])
    config = {
        "root": str(data), "batch_size": 64, "num_workers": 0, "max_bad_fraction": 0.05, "follow_outside_links": False,
    }  # fmt: skip
    runs = {
        "refit": refit,
        **{f"fold {k}": next(root.glob(f"crossval/fold_{k}/lightning_logs/*")) for k in range(1, 6)},
    }
    found = {name: evaluate(run, config, refit / "split.csv", "cpu") for name, run in runs.items()}
    figures = {name: metrics_of(part.probs, part.samples.targets) for name, part in found.items()}
    folds = [figures[name] for name in figures if name != "refit"]
    result = {name: [figures["refit"][name], sum(fold[name] for fold in folds) / 5] for name in ("top1", "ece")}
    average = json.loads((Path(records["average"]["run"]) / "result.json").read_text())
    return {**result, "average": average["why"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--weights")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--count", type=int, default=20, help="training images of a class")
    given = parser.parse_args()
    start = ["--model.weights", given.weights] if given.weights else ["--model.pretrained", "false"]
    for seed in range(given.seeds):
        for source in given.data:
            drawn = given.out / f"{source.name}_{seed}"
            if not drawn.is_dir():
                draw(source, drawn, seed, given.count)
            found = measure(
                drawn, given.out / f"runs_{drawn.name}", [*_SETTINGS, *start, "--seed_everything", str(seed)]
            )
            print(f"{source.name}, seed {seed}: [refit, mean of the folds] {json.dumps(found)}", flush=True)

"""What a teacher (model.teacher) and images without labels (data.unlabelled) are worth.

    python tests/benchmarks/bench_teacher.py --data DIR --teacher MODEL [--weights FILE.safetensors] --seeds 0 1

DIR holds train/, val/ and test/ with a folder of images per class; MODEL is a model of rexnet_lit for these classes.
Each seed draws --labelled training images a class, half as many for validation, and --unlabelled further ones a class,
whose labels are not used. The rows, all with the weights of the last epoch, after the same number of steps:

- labels: the images with labels alone;
- teacher: a teacher beside the labels;
- unlabelled: a teacher, and also the images without labels.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np

from rexnet_lit import ImageFolderDataModule, RexNetModule


def draw(root: Path, labelled: int, unlabelled: int, seed: int, target: Path) -> tuple[int, int]:
    """Fill ``target/data`` and ``target/others``; return how many training images are in each."""
    shutil.copytree(root / "test", target / "data" / "test")
    (target / "others").mkdir()
    for split, count in (("train", labelled), ("val", labelled // 2)):
        for folder in sorted((root / split).iterdir()):
            files = sorted(folder.iterdir())
            order = np.random.default_rng(seed).permutation(len(files))
            (target / "data" / split / folder.name).mkdir(parents=True)
            for i in order[:count]:
                shutil.copy(files[i], target / "data" / split / folder.name)
            for i in order[count : count + unlabelled] if split == "train" else ():
                shutil.copy(files[i], target / "others" / f"{folder.name}_{files[i].name}")
    return len(list((target / "data" / "train").glob("*/*"))), len(list((target / "others").iterdir()))


def top1(o: argparse.Namespace, data: Path, seed: int, epochs: int, teacher: Any, others: Path | None) -> float:
    """Train, and return the test accuracy in percent."""
    pl.seed_everything(seed, verbose=False)
    images = ImageFolderDataModule(
        str(data), image_size=o.size, num_workers=0, unlabelled=None if others is None else str(others)
    )
    module = RexNetModule(
        pretrained=False, weights=o.weights, class_names=images.class_names, image_size=o.size, select="loss",
        teacher=teacher,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as out:
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", default_root_dir=out, gradient_clip_val=1.0,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, images)
        return 100 * trainer.test(module, images, verbose=False)[0]["test/top1"]


def main() -> None:
    """Print a line per run, and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--weights", help="to start from; from scratch by default")
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--weight", type=float, default=0.5)
    parser.add_argument("--labelled", type=int, default=20)
    parser.add_argument("--unlabelled", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=3, help="with all images")
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", help="rows to run, such as labels")
    o = parser.parse_args()
    teacher = {"path": o.teacher, "temperature": o.temperature, "weight": o.weight}
    found: dict[str, list[float]] = {}
    for seed in o.seeds:
        with tempfile.TemporaryDirectory() as temporary:
            target = Path(temporary)
            count, more = draw(o.data, o.labelled, o.unlabelled, seed, target)
            long = round(o.epochs * (count + more) / count)
            rows: dict[str, tuple[int, Any, Path | None]] = {
                "labels": (long, None, None),
                "teacher": (long, teacher, None),
                "unlabelled": (o.epochs, teacher, target / "others"),
            }
            for name, row in rows.items():
                if o.only is None or name in o.only:
                    found.setdefault(name, []).append(top1(o, target / "data", seed, *row))
                    print(f"{o.data.name}, seed {seed}, {name}: {found[name][-1]:.1f}", flush=True)
    for name, values in found.items():
        print(f"| {o.data.name}, {name} | {np.mean(values):.1f} ({np.std(values):.1f}) |")


if __name__ == "__main__":
    main()

"""Training speed of one whole run against timm's train.py, on the same photographs, in one go.

    python tests/benchmarks/bench_train.py --timm PATH/TO/timm/train.py [--images 416] [--size 224] [--rounds 2]

Both train rexnet_100 from scratch in fp32, batch 32, two epochs, and the second epoch counts: its images per second
of training, data loading included. timm runs once at its defaults and once with --channels-last; ours also with half
of the backbone frozen (`partial`), and with all of it (`linear_probe`, features anew in each epoch). The photographs
are random crops of the two that scikit-learn ships, 500 x 375 JPEG, or yours (--photos DIR, a folder of class folders).
The machine is noisy: read the ratios.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

BATCH = 32


def draw_photos(root: Path, count: int, val: int = 32) -> None:
    """Write ``count`` crops in four classes as train/, and ``val`` of them as val/."""
    from sklearn.datasets import load_sample_images

    photos = [cv2.cvtColor(image, cv2.COLOR_RGB2BGR) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    for split, number in (("train", count), ("val", val)):
        for i in range(number):
            photo = photos[i % 2]
            top, left = rng.integers(0, photo.shape[0] - 240), rng.integers(0, photo.shape[1] - 320)
            crop = cv2.resize(photo[top : top + 240, left : left + 320], (500, 375), interpolation=cv2.INTER_CUBIC)
            target = root / split / f"class{i % 4}"
            target.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(target / f"{i}.jpg"), crop, [cv2.IMWRITE_JPEG_QUALITY, 92])


def run(command: list[str], cwd: Path) -> list[tuple[float, str]]:
    """Run ``command`` and return the lines that it printed, each with the time it came."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd, env=environment
    )
    lines = [(time.monotonic(), line) for line in process.stdout or ()]
    if process.wait() != 0:
        sys.exit(f"{' '.join(command)} failed:\n{''.join(line for _, line in lines[-30:])}")
    return lines


def ours(root: Path, size: int, out: Path, strategy: str = "full") -> float:
    """Return the images per second that our second epoch's line says: from the epoch's start to its last batch."""
    command = [
        sys.executable, "-m", "rexnet_lit", "fit",
        f"--data.root={root}", f"--data.image_size={size}", f"--data.batch_size={BATCH}",
        "--model.pretrained=false", "--trainer.max_epochs=2", "--trainer.accelerator=cpu",
        f"--trainer.default_root_dir={out}", f"--model.strategy={strategy}",
    ]  # fmt: skip
    for _, line in run(command, out):
        if found := re.search(r"^epoch 2/2 .* training ([\d.]+) images/s", line):
            return float(found.group(1))
    sys.exit("our log has no line of the second epoch")


def timms(train: Path, root: Path, size: int, images: int, out: Path, extra: list[str]) -> float:
    """Return timm's images per second in the second epoch, between its log lines of the first and last batch."""
    steps = images // BATCH  # timm drops the last, smaller batch
    command = [
        sys.executable, str(train), "--data-dir", str(root), "--train-split", "train", "--val-split", "val",
        "--model", "rexnet_100", "--num-classes", "4", "--img-size", str(size), "-b", str(BATCH), "--epochs", "2",
        "--opt", "sgd", "--lr", "0.05", "--device", "cpu", "--workers", "1",
        "--output", str(out), "--log-interval", "1", *extra,
    ]  # fmt: skip
    # It logs a batch when it has ended: from the first line to the last are all batches but one.
    lines = run(command, out)
    first, last = (next(t for t, line in lines if re.search(rf"Train: 1 \[\s*{i}/", line)) for i in (0, steps - 1))
    return (steps - 1) * BATCH / (last - first)


def main() -> None:
    """Run them in turn, ``--rounds`` times, and print the rates and the ratios of their medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timm", required=True, type=Path, help="timm's train.py, from a checkout of its repository")
    parser.add_argument("--photos", type=Path, help="train/ and val/ with class folders")
    parser.add_argument("--images", type=int, default=416)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        root = options.photos or out / "photos"
        if options.photos is None:
            draw_photos(root, options.images)
        images = sum(1 for path in (root / "train").rglob("*") if path.is_file())
        names = ("rexnet_lit", "rexnet_lit, partial", "rexnet_lit, linear_probe", "timm", "timm --channels-last")
        rates: dict[str, list[float]] = {name: [] for name in names}
        for number in range(options.rounds):
            for name, strategy in zip(names, ("full", "partial", "linear_probe"), strict=False):
                rates[name].append(ours(root, options.size, out, strategy))
            for name, extra in (("timm", []), ("timm --channels-last", ["--channels-last"])):
                rates[name].append(timms(options.timm.absolute(), root, options.size, images, out, extra))
            print(f"round {number + 1}:", {name: round(r[-1], 1) for name, r in rates.items()}, flush=True)
        medians = {name: statistics.median(r) for name, r in rates.items()}
        print(f"{images} images, {options.size} px, batch {BATCH}, second epoch, images per second (median):")
        for name, rate in medians.items():
            print(f"  {name:<24} {rate:6.1f}   rexnet_lit is {medians['rexnet_lit'] / rate:.2f} x")


if __name__ == "__main__":
    main()

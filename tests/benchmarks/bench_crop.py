"""Test accuracy on long images whose class shows at one end only, for each ``data.crop_mode``.

    python tests/benchmarks/bench_crop.py --weights FILE.safetensors [--size 96] [--seeds 0 1 2]

Draws two classes of 320 x 96 pixels, 40 images each for training, 20 for validation and 50 for the test: a red or blue
disc on a background of smooth noise, within 80 pixels of the left end. The centre crop shows the columns 118 to 202.
Solves the head on the features of the weights (configs/linear_probe.yaml with the logistic solver).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np

CONFIG = Path(__file__).parents[2] / "configs" / "linear_probe.yaml"
COUNTS = {"train": 40, "val": 20, "test": 50}


def draw(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Return an image (96, 320, 3)."""
    coarse = rng.integers(60, 160, (4, 12, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (320, 96), interpolation=cv2.INTER_CUBIC)
    x, y, radius = int(rng.integers(28, 52)), int(rng.integers(30, 66)), int(rng.integers(20, 28))
    cv2.circle(image, (x, y), radius, (40, 40, 220) if kind == "red" else (220, 40, 40), -1)  # BGR
    return image


def main() -> None:
    """Draw, train, test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    print("| crop_mode | test top-1 % | by seed |\n|---|---|---|")
    for mode in ("center", "border", "squash"):
        scores = []
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as folder:
                rng = np.random.default_rng(seed)
                for split, count in COUNTS.items():
                    for kind in ("red", "blue"):
                        (Path(folder) / "data" / split / kind).mkdir(parents=True)
                        for i in range(count):
                            cv2.imwrite(f"{folder}/data/{split}/{kind}/{i}.png", draw(kind, rng))
                call = [sys.executable, "-m", "rexnet_lit"]
                settings = [f"--data.image_size={options.size}", f"--data.crop_mode={mode}"]
                settings += [f"--model.weights={options.weights.absolute()}", "--model.strategy.solver=logistic"]
                settings += [f"--seed_everything={seed}"]
                fit = [*call, "fit", "data", f"--config={CONFIG}", "--trainer.accelerator=cpu", *settings]
                run = Path(folder) / "lightning_logs" / "version_0"
                for command in (fit, [*call, "test", str(run / "model.safetensors")]):
                    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
                    if done.returncode:
                        sys.exit(done.stdout + done.stderr)
                scores.append(100 * json.loads((run / "report" / "metrics.json").read_text())["top1"])
        print(f"| `{mode}` | {np.mean(scores):.1f} | {', '.join(f'{s:.0f}' for s in scores)} |", flush=True)


if __name__ == "__main__":
    main()

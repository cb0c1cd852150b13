"""A target far from letters on white: the same, faint on photographs, grey and noisy; for bench_accuracy.py.

    python tests/benchmarks/letters_on_photos.py GLYPHS OUT

GLYPHS holds train/, val/ and test/ with a folder of 96 x 96 letters per class; the photographs are scikit-learn's two.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
from sklearn.datasets import load_sample_images


def main() -> None:
    """Draw each letter of GLYPHS on a piece of a photograph."""
    source, out = map(Path, sys.argv[1:])
    photos = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    for folder in sorted(path for split in ("train", "val", "test") for path in (source / split).iterdir()):
        target = out / folder.relative_to(source)
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.iterdir()):
            letter = np.float32(cv2.imread(str(file), cv2.IMREAD_GRAYSCALE))
            letter = 255 - letter if letter.mean() > 127 else letter
            photo, side = photos[rng.integers(2)], rng.integers(96, 300)
            top, left = (rng.integers(0, length - side) for length in photo.shape)
            ground = np.float32(cv2.resize(photo[top : top + side, left : left + side], letter.shape))
            ink = rng.uniform(0.18, 0.36) * rng.choice([-1, 1])  # darker or brighter than what is behind
            image = 0.7 * ground + 40 + ink * letter + rng.normal(0, 10, letter.shape)
            cv2.imwrite(str(target / file.name), image.clip(0, 255).astype(np.uint8))


if __name__ == "__main__":
    main()

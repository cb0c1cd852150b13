"""Reading training images on one core: decode, RandomResizedCrop, flip, normalise; against timm's transform on PIL.

    python tests/benchmarks/bench_decode.py [--photos DIR] [--size 224] [--rounds 3]

The photographs are two that scikit-learn ships, resized to 4000 x 3000 and 500 x 375, or yours (--photos, a folder of
JPEGs). Both keep at least 35 % of the area in a crop. The disk cache is filled first; its second epoch counts. Each
reader has a process of its own, with the allocator set up as its command sets it up; rates are medians of rounds that
take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import rexnet_lit

READERS = ("timm on PIL", "rexnet_lit", "rexnet_lit, cache: disk")


def draw_photos(folder: Path, width: int, height: int, count: int) -> None:
    """Write ``count`` crops of photographs, scaled to a camera's size."""
    import cv2
    import numpy as np
    from sklearn.datasets import load_sample_images

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        photo = load_sample_images().images[i % 2]
        top, left = rng.integers(0, photo.shape[0] - 360), rng.integers(0, photo.shape[1] - 480)
        crop = photo[top : top + 360, left : left + 480, ::-1]
        resized = cv2.resize(crop, (width, height), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f"{i}.jpg"), resized, [cv2.IMWRITE_JPEG_QUALITY, 92])


def measure(reader: str, folder: Path, size: int) -> float:
    """Return images per second, of this process on one core."""
    if reader != "timm on PIL":
        rexnet_lit.configure_allocator()
    import torch
    from PIL import Image
    from timm.data import create_transform

    from rexnet_lit.data import decode
    from rexnet_lit.data.augmentation import AugmentSettings
    from rexnet_lit.data.cache import DiskCache
    from rexnet_lit.data.settings import EvalRecipe
    from rexnet_lit.data.transforms import TrainTransform

    torch.set_num_threads(1)
    augment = AugmentSettings("light", min_scale=0.35)
    ours = TrainTransform(augment, EvalRecipe(image_size=size), size)
    theirs = create_transform(
        size, is_training=True, scale=(augment.min_scale, 1.0), color_jitter=None, interpolation="bicubic"
    )
    cache = DiskCache()
    load: Callable[[str, int], torch.Tensor] = {
        "timm on PIL": lambda path, i: theirs(Image.open(path).convert("RGB")),
        "rexnet_lit": lambda path, i: ours(decode.read(path, ours.min_size), i),
        "rexnet_lit, cache: disk": lambda path, i: ours(cache.read(path, ours.min_size), i),
    }[reader]
    paths = [str(path) for path in sorted(folder.rglob("*")) if path.is_file()]
    for warm in (paths[:10] if "cache" not in reader else paths, paths):
        started = time.perf_counter()
        for i, path in enumerate(warm):
            load(path, i)
    return len(paths) / (time.perf_counter() - started)


def main() -> None:
    """Time the three readers in turn on each set of photographs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="a folder of JPEGs")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=READERS, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.measure:
        print(measure(o.measure, o.photos, o.size))
        return
    with tempfile.TemporaryDirectory() as temporary:
        sets = {"yours": o.photos}
        if o.photos is None:
            sets = {"4000 x 3000": Path(temporary) / "large", "500 x 375": Path(temporary) / "small"}
            draw_photos(sets["4000 x 3000"], 4000, 3000, 24)
            draw_photos(sets["500 x 375"], 500, 375, 300)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": temporary}
        for name, folder in sets.items():
            rates: dict[str, list[float]] = {reader: [] for reader in READERS}
            for reader in READERS * o.rounds:
                command = [
                    sys.executable,
                    __file__,
                    "--measure",
                    reader,
                    "--photos",
                    str(folder),
                    "--size",
                    str(o.size),
                ]
                said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
                rates[reader].append(float(said))
            base = statistics.median(rates["timm on PIL"])
            print(f"{name}, JPEGs to {o.size} px, one core:")
            for reader, found in rates.items():
                median = statistics.median(found)
                print(f"  {reader:<24} {median:7.1f} images/s  {median / base:5.1f} x")


if __name__ == "__main__":
    main()

"""Make a small, unbalanced target of Tux Paint's stamps: 427 training, 143 validation and 143 test pictures.

    apt-get download tuxpaint-stamps-default && dpkg-deb -x tuxpaint-stamps-default_*.deb STAMPS
    python tests/benchmarks/stamps.py STAMPS/usr/share/tuxpaint/stamps OUT

Photographs and drawings on transparent grounds, mostly 55 to 400 px long, in eight classes of 34 to 247 (the
collection's own folders; its other folders hold fewer). Version 2022.06.04; public domain and free licences.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np

CLASSES = ("animals", "food", "household", "plants", "seasonal", "symbols", "town", "vehicles")


def main() -> None:
    """Copy three fifths, a fifth and a fifth of each class."""
    source, target = map(Path, sys.argv[1:])
    for name in CLASSES:
        files = sorted((source / name).rglob("*.png"))
        order = np.random.default_rng(0).permutation(len(files))
        ends = round(0.6 * len(files)), round(0.8 * len(files))
        for split, part in zip(("train", "val", "test"), np.split(order, ends), strict=True):
            folder = target / split / name
            folder.mkdir(parents=True)
            for i in part:
                shutil.copy(files[i], folder / "_".join(files[i].relative_to(source / name).parts))


if __name__ == "__main__":
    main()

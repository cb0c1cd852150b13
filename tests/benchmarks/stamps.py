"""Make a small, unbalanced target of Tux Paint's stamps: 427 training, 143 validation and 143 test pictures.

    apt-get download tuxpaint-stamps-default && dpkg-deb -x tuxpaint-stamps-default_*.deb STAMPS
    python tests/benchmarks/stamps.py STAMPS/usr/share/tuxpaint/stamps OUT [--white]

Photographs and drawings on transparent grounds, mostly 55 to 400 px long, in eight classes of 34 to 247 (the
collection's own folders; its other folders hold fewer). Version 2022.06.04; public domain and free licences.

Under the transparent pixels lie colours that nobody sees: black in half of the pictures, white in a third, others in
the rest. A tool that drops the transparency trains on them, and they tell something of the class. With --white, what
is seen is laid on white: every tool gets the same pixels, which are those that rexnet_lit makes of either.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from rexnet_lit.data import decode

CLASSES = ("animals", "food", "household", "plants", "seasonal", "symbols", "town", "vehicles")


def on_white(source: Path, target: Path) -> None:
    """Write a picture as rexnet_lit decodes it."""
    Image.fromarray(decode.read(source)).save(target)


def main() -> None:
    """Copy three fifths, a fifth and a fifth of each class."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--white", action="store_true", help="lay the pictures on white")
    options = parser.parse_args()
    copy = on_white if options.white else shutil.copy
    for name in CLASSES:
        files = sorted((options.source / name).rglob("*.png"))
        order = np.random.default_rng(0).permutation(len(files))
        ends = round(0.6 * len(files)), round(0.8 * len(files))
        for split, part in zip(("train", "val", "test"), np.split(order, ends), strict=True):
            folder = options.target / split / name
            folder.mkdir(parents=True)
            for i in part:
                copy(files[i], folder / "_".join(files[i].relative_to(options.source / name).parts))


if __name__ == "__main__":
    main()

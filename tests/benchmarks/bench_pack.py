"""A packed dataset against the folder of its images: listing, reading in random order, and a slow disk.

    python tests/benchmarks/bench_pack.py [--images 100000] [--read 5000] [--delay 20] [--rounds 3]

Each has a process of its own and one thread; they take turns, and figures are medians. The images are JPEGs of 64 x 48
in 100 classes. With --delay, each opening, listing and stat of a file or folder takes so many milliseconds longer, as
on a network disk, and fewer images are read. Where litdata or pyarrow is installed, its format is read in the same
order, too: chunks of 64 MB, and row groups of 256 images.
"""

from __future__ import annotations

import argparse
import builtins
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from rexnet_lit.data import decode, image_file
from rexnet_lit.data.folder import scan
from rexnet_lit.data.pack import pack

OTHERS = {"litdata": "litdata", "Parquet": "pyarrow"}
Reader = tuple[int, Callable[[int], bytes]]
"""How many images there are, and the function that returns the file of one of them."""


def draw(folder: Path, images: int) -> None:
    """Write JPEGs of 64 x 48 in 100 classes; their last bytes, after the end of the image, differ."""
    rng = np.random.default_rng(0)
    pictures = [
        cv2.imencode(".jpg", cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), (64, 48)))[1].tobytes()
        for _ in range(100)
    ]
    for number in range(100):
        (folder / "train" / f"class_{number:03}").mkdir(parents=True)
    for number in range(images):
        content = pictures[number % 100] + number.to_bytes(4, "big")
        (folder / "train" / f"class_{number % 100:03}" / f"{number:07}.jpg").write_bytes(content)


def write_others(folder: Path, out: Path) -> None:
    """Write the images in the formats of the other libraries that are installed."""
    samples = scan(folder).splits["train"]
    contents = [image_file.read_bytes(folder / path) for path in samples.paths]
    if importlib.util.find_spec("litdata"):
        from litdata.streaming.writer import BinaryWriter

        (out / "litdata").mkdir()
        writer = BinaryWriter(str(out / "litdata"), chunk_bytes="64MB")
        for number, content in enumerate(contents):
            writer[number] = content
        writer.done()
        writer.merge()
    if importlib.util.find_spec("pyarrow"):
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"image": contents}), out / "images.parquet", row_group_size=256)


def reader(kind: str, data: Path) -> Reader:
    """Open one of the formats."""
    if kind in ("folder", "packed"):
        samples = scan(data / kind).splits["train"]
        return len(samples), lambda index: image_file.read_bytes(samples.path(index))
    if kind == "litdata":
        from litdata import StreamingDataset

        stream = StreamingDataset(str(data / "litdata"))
        return len(stream), lambda index: bytes(stream[index])
    from pyarrow import parquet

    file = parquet.ParquetFile(data / "images.parquet")
    return file.metadata.num_rows, lambda index: file.read_row_group(index // 256)["image"][index % 256].as_py()


def slow(seconds: float, root: str) -> None:
    """Make each opening, listing and stat of what is below a folder take longer."""

    def delayed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(root):
                time.sleep(seconds)
            return function(path, *args, **kwargs)

        return call

    builtins.open = delayed(builtins.open)
    for name in ("open", "stat", "lstat", "scandir", "listdir"):
        setattr(os, name, delayed(getattr(os, name)))


def measure(kind: str, data: Path, read: int, delay: float) -> dict[str, float]:
    """Return the seconds until the list is there, images per second in random order, and the files that stay open."""
    if delay:
        slow(delay / 1000, str(data))
    before = len(list(Path("/proc/self/fd").iterdir()))
    started = time.perf_counter()
    count, content = reader(kind, data)
    listed = time.perf_counter() - started
    order = np.random.default_rng(0).permutation(count)[:read].tolist()
    started = time.perf_counter()
    for index in order:
        decode.decode(content(index))
    rate = len(order) / (time.perf_counter() - started)
    return {"listed": listed, "rate": rate, "open": len(list(Path("/proc/self/fd").iterdir())) - before}


def table(kinds: Sequence[str], data: Path, read: int, delay: float, rounds: int) -> None:
    """Measure each in turn; print the medians."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for kind in [*kinds] * rounds:
        command = [sys.executable, __file__, "--measure", kind, "--data", str(data), "--read", str(read)]
        done = subprocess.run([*command, "--delay", str(delay)], check=True, capture_output=True, text=True)
        found[kind].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"\n{delay:g} ms longer per file; {read} images read\n")
    print("| | listed, s | images/s | files left open |\n|---|---|---|---|")
    for kind, rows in found.items():
        listed, rate, left = (statistics.median(row[name] for row in rows) for name in ("listed", "rate", "open"))
        print(f"| {kind} | {listed:.2f} | {rate:,.0f} | {left:.0f} |", flush=True)


def main() -> None:
    """Print a table without delay, and one with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--read", type=int, default=5000)
    parser.add_argument("--delay", type=float, default=20.0, help="milliseconds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.measure:
        print(json.dumps(measure(o.measure, o.data, o.read, o.delay)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary)
        draw(data / "folder", o.images)
        started = time.perf_counter()
        pack(str(data / "folder"), str(data / "packed"))
        print(f"{o.images} images, packed in {time.perf_counter() - started:.1f} s")
        write_others(data / "folder", data)
        others = [kind for kind, module in OTHERS.items() if importlib.util.find_spec(module)]
        table(["folder", "packed", *others], data, o.read, 0, o.rounds)
        table(["folder", "packed"], data, min(o.read, 250), o.delay, o.rounds)


if __name__ == "__main__":
    main()

"""Listing a million images in a thousand classes: seconds and memory, against torchvision's ImageFolder.

    python tests/benchmarks/bench_scan.py [--files 1000000] [--classes 1000] [--rounds 3]

The files are empty: neither opens them. Each scan has a process of its own, in turns, after the folders were read
once; memory is what the process's peak has grown by. Then what a loader worker's memory grows by over an epoch: the
paths are one buffer, which reading does not copy.
"""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.connection
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCANS = ("torchvision", "rexnet_lit")


def measure(scan: str, root: str) -> tuple[float, float]:
    """Return the seconds and the megabytes of a scan in this process."""
    from torchvision.datasets import ImageFolder

    from rexnet_lit.data.folder import scan as ours
    from rexnet_lit.data.settings import SplitSettings

    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    found = ImageFolder(root) if scan == "torchvision" else ours(root, SplitSettings(val_fraction=0.01)).splits["train"]
    seconds = time.perf_counter() - started
    assert len(found) > 0
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def memory() -> float:
    """Return the megabytes of this process, those that it shares included."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Rss:")) / 1024


def epoch(root: str) -> tuple[float, float]:
    """Return a forked worker's megabytes before and after it has asked for every path once."""
    from rexnet_lit.data.folder import scan
    from rexnet_lit.data.settings import SplitSettings

    samples = scan(root, SplitSettings(val_fraction=0.01)).splits["train"]

    def work(pipe: multiprocessing.connection.Connection) -> None:
        samples.path(0)
        before = memory()
        for i in range(len(samples)):
            samples.path(i)
        pipe.send((before, memory()))

    here, there = multiprocessing.Pipe()
    worker = multiprocessing.get_context("fork").Process(target=work, args=(there,))
    worker.start()
    before, after = here.recv()
    worker.join()
    return before, after


def main() -> None:
    """Write the files, scan them in turn, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.measure:
        print(*(epoch if o.measure[0] == "epoch" else lambda root: measure(o.measure[0], root))(o.measure[1]))
        return
    with tempfile.TemporaryDirectory() as root:
        for kind in range(o.classes):
            folder = Path(root) / f"class{kind:04}"
            folder.mkdir()
            for i in range(o.files // o.classes):
                (folder / f"{i:06}.jpg").touch()

        def ask(what: str) -> tuple[float, float]:
            command = [sys.executable, __file__, "--measure", what, root]
            first, second = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            return float(first), float(second)

        ask("torchvision")
        found: dict[str, list[tuple[float, float]]] = {scan: [] for scan in SCANS}
        for scan in SCANS * o.rounds:
            found[scan].append(ask(scan))
        print(f"{o.files:,} files in {o.classes:,} classes:")
        for scan, pairs in found.items():
            seconds, megabytes = (statistics.median(column) for column in zip(*pairs, strict=True))
            print(f"  {scan:<12} {seconds:6.2f} s   {megabytes:6.0f} MB")
        before, after = ask("epoch")
        print(f"  a worker's memory over an epoch: {before:.1f} to {after:.1f} MB ({after / before - 1:+.1%})")


if __name__ == "__main__":
    main()

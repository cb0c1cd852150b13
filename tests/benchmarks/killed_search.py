"""A `tune` that is killed at ten random moments, against one that is not: the same trials, and the same weights.

    python tests/benchmarks/killed_search.py [--kills 10] [--trials 3]

On a hundred handwritten digits at 32 px, from random weights. The number of trials is fixed: with a budget of time, a
search that was killed has less of it.
"""

from __future__ import annotations

import argparse
import collections
import csv
import itertools
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_accuracy import draw
from torch import Tensor

from rexnet_lit import write_sample
from rexnet_lit.models.checkpoint import load_model


def search(data: Path, out: Path, trials: int, kill_after: float | None = None) -> bool:
    """Start a search, or go on with it; return whether it has ended by itself."""
    command = [
        sys.executable, "-m", "rexnet_lit", "tune", str(data), "--trials", str(trials), "--data.image_size", "32",
        "--model.pretrained", "false", "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu",
        "--data.num_workers", "0", "--trainer.default_root_dir", str(out),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said, _ = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return False
    if process.returncode:
        sys.exit(said)
    return True


def result_of(out: Path) -> tuple[list[str], dict[str, Tensor]]:
    """Return the trials of the leaderboard, in order of their names, and the weights that ship."""
    with (out / "tuning/leaderboard.csv").open(encoding="utf-8", newline="") as file:
        rows = [f"{row['trial']} {row['stage']} {row['val_loss']}" for row in csv.DictReader(file)]
    return sorted(rows), load_model(next(out.glob("lightning_logs/*/model.safetensors"))).state


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--trials", type=int, default=3)
    o = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_sample(root / "all")
        data = draw(root / "all", 10, 0, root / "digits")
        started = time.monotonic()
        search(data, root / "whole", o.trials)
        seconds = time.monotonic() - started
        print(f"an undisturbed search takes {seconds:.0f} s", flush=True)
        kills, ended = 0, False
        while not ended:
            # Each start takes some seconds before it goes on, so the moments cover all of a short search.
            after = rng.uniform(0.1, 0.5) * seconds if kills < o.kills else None
            ended = search(data, root / "killed", o.trials, after)
            kills += not ended
            if ended and kills < o.kills:  # more kills are wanted
                shutil.rmtree(root / "killed")
                ended = False
        (whole, expected), (killed, found) = (result_of(root / name) for name in ("whole", "killed"))
        twice = [row for row, count in collections.Counter(row.split()[0] for row in killed).items() if count > 1]
        print(f"killed {kills} times; {len(killed)} trials, of which {len(twice)} twice")
        for row, other in itertools.zip_longest(whole, killed):
            print(f"  {row}" if row == other else f"  {row}, after the kills {other}")
        apart = max(float((expected[name] - tensor).abs().max()) for name, tensor in found.items())
        print(f"the largest difference of a weight: {apart:.2g}")


if __name__ == "__main__":
    main()

"""From the command to the first training step, against importing torch and Lightning alone, in turns.

    python tests/benchmarks/bench_start.py [--rounds 3] [--list]

A fit on the handwritten digits is ended when its first step begins. CPU seconds (user and system, all threads) are
counted, because a busy machine changes them less than the time on the clock. ``--list`` adds what a fit imports beyond
these two packages.
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
from collections import Counter
from pathlib import Path

IMPORTS = (
    "import os, sys, torch, lightning.pytorch; t = os.times()\n"
    "print(f'first step after 0 s, {t.user + t.system:.2f} CPU s'); print('watch: modules', *sys.modules)"
)


def run(command: list[str], cwd: Path) -> tuple[float, float, set[str], str]:
    """Return CPU seconds, seconds on the clock, the modules that were imported, and what was printed on stderr."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parents[1]), str(here)])
    environment = {**os.environ, "PYTHONPATH": paths, "WATCH_STOP": "1", "WATCH_STARTED": str(time.time())}
    started = time.monotonic()
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)
    seconds = time.monotonic() - started
    found = re.search(r"first step after .*, (\S+) CPU s", done.stdout)
    if found is None:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return float(found[1]), seconds, set(done.stdout.partition("watch: modules ")[2].split()), done.stderr


def main() -> None:
    """Run both in turns, and print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--list", action="store_true", help="also print what a fit imports beyond them, by package")
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        cwd = Path(temporary)
        run(["-c", f"from rexnet_lit.data.sample import write_sample; write_sample('digits')\n{IMPORTS}"], cwd)
        fit = [
            "-m", "rexnet_lit", "fit", "--config=finetune", "--data.root=digits", "--data.image_size=32",
            "--data.num_workers=0", "--model.pretrained=false", f"--trainer.accelerator={o.accelerator}",
            "--trainer.callbacks+=watch.Watch", "--trainer.default_root_dir=.",
        ]  # fmt: skip
        both = {"import torch, lightning.pytorch": ["-c", IMPORTS], "fit, to its first step": fit}
        found: dict[str, list[tuple[float, float, set[str], str]]] = {name: [] for name in both}
        for _ in range(o.rounds):
            for name, command in both.items():
                found[name].append(run(command, cwd))
        print("| | CPU s | s | of the imports |\n|---|---|---|---|")
        base, ours = found.values()
        for name, rows in found.items():
            cpu, clock = (statistics.median(row[i] for row in rows) for i in (0, 1))
            ratio = statistics.median(row[0] / other[0] for row, other in zip(rows, base, strict=True))
            print(f"| {name} | {cpu:.2f} | {clock:.2f} | {ratio:.2f} |")
        if not o.list:
            return
        seconds: Counter[str] = Counter()
        timed = run(["-X", "importtime", *fit], cwd)[3]
        for spent, name in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", timed):
            if name not in base[0][2]:
                seconds[name.partition(".")[0]] += int(spent) / 1e6
        extra = Counter(name.partition(".")[0] for name in ours[0][2] - base[0][2])
        print("\n| imported beyond them | modules | s |\n|---|---|---|")
        for name, spent in seconds.most_common(15):
            print(f"| {name} | {extra[name]} | {spent:.2f} |")


if __name__ == "__main__":
    main()

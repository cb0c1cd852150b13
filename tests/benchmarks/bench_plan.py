"""How near the estimates of `plan` are to what the fits take: time, memory and disk, for three configs.

python tests/benchmarks/bench_plan.py

It uses the sample digits at 32 px, one thread and no loader processes, and compares CPU seconds, which other work on
the machine hardly changes; then they are the seconds of a quiet machine, apart from waiting for the disk.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

COMMON = ("--data.image_size", "32", "--data.num_workers", "0", "--trainer.accelerator", "cpu")
PLAN = """
import sys, time, types
from rexnet_lit.utils.process import configure_allocator
configure_allocator()
from rexnet_lit.cli import main
from rexnet_lit.search import plan
plan.time = types.SimpleNamespace(perf_counter=time.process_time)
sys.exit(main.main(sys.argv[1:]))
"""
FIT = """
import resource, subprocess, sys
subprocess.run([sys.executable, "-m", "rexnet_lit", *sys.argv[1:]], stdout=subprocess.DEVNULL, check=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20)
"""


def run(code: str, *argv: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-c", code, *argv]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def seconds(text: str) -> float:
    found = re.search(r"time in all +(?:(\d+) min )?([\d.]+) s", text)
    assert found, text
    return 60 * int(found[1] or 0) + float(found[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", default="3", help="of quickstart and finetune; linear_probe has 20")
    args = parser.parse_args()
    from rexnet_lit import write_sample

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_sample(root / "digits")
        weights: tuple[str, ...] = ()
        for config, epochs in (("quickstart", args.epochs), ("linear_probe", "20"), ("finetune", args.epochs)):
            options = (str(root / "digits"), "--config", config, "--trainer.max_epochs", epochs, *COMMON, *weights)
            planned = run(PLAN, "plan", *options)
            out = ("--trainer.default_root_dir", str(root / config))
            cpu, memory = map(float, run(FIT, "fit", *options, *out).split())
            run_folder = root / config / "lightning_logs" / "version_0"
            disk = sum(file.stat().st_size for file in run_folder.rglob("*.*")) / 1e6
            gib, megabytes = re.search(r"this fit\) +([\d.]+)", planned), re.search(r"disk +(\d+) MB", planned)
            assert gib, planned
            assert megabytes, planned
            print(
                f"{config}: time {seconds(planned):.0f} s planned, {cpu:.0f} s measured "
                f"({seconds(planned) / cpu - 1:+.0%}); memory {gib[1]} GiB, {memory:.2f} GiB "
                f"({float(gib[1]) / memory - 1:+.0%}); disk {megabytes[1]} MB, {disk:.0f} MB",
                flush=True,
            )
            weights = ("--model.weights", str(root / "quickstart/lightning_logs/version_0/model.safetensors"))


if __name__ == "__main__":
    main()

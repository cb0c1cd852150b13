"""Test accuracy of `tune` within some minutes, against one fit and against other tools in the same minutes.

    python tests/benchmarks/bench_tune.py --data DIR --data DIR2 --weights FILE.safetensors --minutes 4 --size 64 \\
        --per-class 50 --seeds 0 1 2 --fastai PATH/TO/python-that-has-fastai --rows rows.jsonl

Each DIR holds train/, val/ and test/, of which --per-class takes that many images of each class (the seed draws them;
half as many for validation). Every folder is trained from scratch, and from the weights (but not those that --scratch
names). --jobs runs go on at a time, each in one thread.

A plain loop (AdamW, cosine) and fastai train 20 epochs with three learning rates one after the other, in one process;
then 40, 80 and 160 epochs with the best, as long as the minutes last, and keep the run with the best top-1 on the
validation images. Each result is a line of --rows; what is in there is not run again. The result of
the config's settings, which is that of `fit`, is the one that `tune` prints. Of the others, only the training counts.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_accuracy import CONFIGS, TUNED, draw, fastai_loop, plain_loop, run

Job = tuple[str, Path, bool, int]
"""Tool, folder, whether it starts from the weights, and seed."""


def tune(o: argparse.Namespace, root: Path, weights: Path | None, seed: int, out: Path) -> dict[str, float]:
    """`tune` with finetune.yaml; return its metrics, and the test top-1 of the config's settings."""
    start = ["--model.weights", weights] if weights else ["--model.pretrained", "false"]
    screen, _ = run([
        sys.executable, "-m", "rexnet_lit", "tune", "--config", CONFIGS / "finetune.yaml", "--data.root", root, *start,
        "--budget", f"{o.minutes}m", "--data.image_size", o.size, "--seed_everything", seed,
        "--trainer.accelerator", "cpu", "--trainer.default_root_dir", out,
    ], 1, out)  # fmt: skip
    found = re.search(r"has not seen: top-1 (\d\.\d+)(?:, (\d\.\d+) with the config's)?", screen)
    if not found:
        sys.exit(screen)
    folder = next((out / "lightning_logs").iterdir())
    test = ["test", "--ckpt_path", folder / "model.safetensors", "--trainer.accelerator", "cpu"]
    run([sys.executable, "-m", "rexnet_lit", *test], 1, out)
    metrics = json.loads((folder / "report" / "metrics.json").read_text())
    best = json.loads((folder / "result.json").read_text())["metrics"]
    if o.keep:
        leaderboard = (out / "tuning" / "leaderboard.csv").read_text()
        (o.keep / f"{root.name}_{'weights' if weights else 'scratch'}_{seed}.csv").write_text(leaderboard)
    of_config = float(found.group(2) or found.group(1))
    return {"top1": metrics["top1"], "macro_f1": metrics["macro_f1"], "val_top1": best["val/top1"], "config": of_config}


def repeated(name: str, root: str, weights: str, size: int, seed: int, seconds: float) -> None:
    """Repeat a peer's training for some seconds; print the result that is best on the validation images."""
    loop = plain_loop if name == "plain" else fastai_loop
    found: list[tuple[float, float, tuple[float, ...]]] = []
    spent = per_epoch = 0.0
    for i in itertools.count():
        rate = TUNED[name] * (1, 3, 1 / 3)[i] if i < 3 else max(found)[1]
        epochs = 20 if i < 3 else 20 * 2 ** (i - 2)
        if found and spent + epochs * per_epoch > seconds:
            break
        result = loop(root, weights, epochs, size, seed, rate)
        spent, per_epoch = spent + result[2], result[2] / epochs
        found.append((result[3], rate, result))
    top1, f1, _, val_top1 = max(found)[2]
    print(json.dumps({"top1": top1, "macro_f1": f1, "val_top1": val_top1, "runs": len(found)}))


def measure(o: argparse.Namespace, job: Job) -> dict[str, Any]:
    """Run one job; return its row."""
    tool, root, from_weights, seed = job
    weights = o.weights if from_weights else None
    with tempfile.TemporaryDirectory() as out, tempfile.TemporaryDirectory() as data:
        given = draw(root, o.per_class, seed, Path(data) / root.name) if o.per_class else root
        started = time.monotonic()
        if tool == "tune":
            result = tune(o, given, weights, seed, Path(out))
        else:
            python = o.fastai if tool == "fastai" else sys.executable
            command = [python, __file__, tool, given, weights or "-", o.size, seed, 60 * o.minutes]
            screen, _ = run(command, 1, Path(out))
            result = json.loads(next(line for line in screen.splitlines() if line.startswith("{")))
    start = "weights" if from_weights else "scratch"
    row = {"tool": tool, "data": root.name, "start": start, "seed": seed, **result}
    return {**row, "seconds": round(time.monotonic() - started)}


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print mean and spread of each tool."""
    tools = list(dict.fromkeys(row["tool"] for row in rows))
    print(f"| test top-1 %, macro F1 % | config's settings | {' | '.join(tools)} |\n|{'---|' * (len(tools) + 2)}")
    for data, start in sorted({(row["data"], row["start"]) for row in rows}):
        of_cell = [row for row in rows if (row["data"], row["start"]) == (data, start)]
        config = [100 * row["config"] for row in of_cell if "config" in row]
        cells = [f"{np.mean(config):.1f} ({np.std(config):.1f})" if config else ""]
        for tool in tools:
            own = [row for row in of_cell if row["tool"] == tool]
            values = [[100 * row[key] for row in own] for key in ("top1", "macro_f1")]
            cells.append(", ".join(f"{np.mean(v):.1f} ({np.std(v):.1f})" for v in values) if own else "")
        print(f"| {data}, from {'the weights' if start == 'weights' else 'scratch'} | {' | '.join(cells)} |")


def main() -> None:
    """Run what is missing, and print a table."""
    if len(sys.argv) > 1 and sys.argv[1] in TUNED:
        name, root, weights, size, seed, seconds = sys.argv[1:]
        repeated(name, root, weights, int(size), int(seed), float(seconds))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=lambda path: Path(path).absolute(), required=True, action="append")
    parser.add_argument("--weights", type=lambda path: Path(path).absolute())
    parser.add_argument("--scratch", action="append", default=[], help="a folder's name that only starts from scratch")
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--per-class", type=int, default=50, help="images; 0 for all of them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tools", nargs="+", default=["tune", "plain", "fastai"])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--fastai", help="a Python that has fastai, scikit-learn and timm")
    parser.add_argument("--rows", type=Path, default=Path("tune.jsonl"), help="the file of the results")
    parser.add_argument("--keep", type=Path, help="a folder that gets the leaderboards of tune")
    o = parser.parse_args()
    rows = [json.loads(line) for line in o.rows.read_text().splitlines()] if o.rows.is_file() else []
    known = {(row["tool"], row["data"], row["start"], row["seed"]) for row in rows}
    starts = [True, False] if o.weights else [False]
    jobs = [
        (tool, root, start, seed)
        for seed, root, start, tool in itertools.product(o.seeds, o.data, starts, o.tools)
        if (tool, root.name, "weights" if start else "scratch", seed) not in known
        and not (start and root.name in o.scratch)
    ]
    with concurrent.futures.ThreadPoolExecutor(o.jobs) as pool:
        for row in pool.map(lambda job: measure(o, job), jobs):
            rows.append(row)
            with o.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
    print_table(rows)


if __name__ == "__main__":
    main()

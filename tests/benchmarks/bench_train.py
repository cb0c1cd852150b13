"""Training speed of whole runs against timm's train.py, on the same photographs, in one go.

    python tests/benchmarks/bench_train.py --timm PATH/TO/timm/train.py [--images 416] [--size 224] [--rounds 2]

Both train rexnet_100 from scratch, two epochs, and the second epoch counts: its images per second of training, data
loading included. On a CPU in fp32, timm once at its defaults and once with --channels-last; ours also with half of the
backbone frozen (`partial`), and with all of it (`linear_probe`, features computed each epoch). On a GPU (--device cuda)
in bf16, timm with --amp, in both layouts, and compiled. Of our runs it also says when the first step began, the share
of the time that steps waited for data, the peak memory (of the process; on a GPU what torch has allocated there) and
the seconds after the last epoch. --vary says what runs of ours to make instead.

The photographs are random crops of the two that scikit-learn ships, 500 x 375 JPEG, or yours (--photos DIR, a folder of
class folders). The machine is noisy: read the ratios. With --busy N, N processes compute beside it all the time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np


def draw_photos(root: Path, count: int, val: int = 32) -> None:
    """Write ``count`` crops in four classes as train/, and ``val`` of them as val/."""
    from sklearn.datasets import load_sample_images

    photos = [cv2.cvtColor(image, cv2.COLOR_RGB2BGR) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    for split, number in (("train", count), ("val", val)):
        for i in range(number):
            photo = photos[i % 2]
            top, left = rng.integers(0, photo.shape[0] - 240), rng.integers(0, photo.shape[1] - 320)
            crop = cv2.resize(photo[top : top + 240, left : left + 320], (500, 375), interpolation=cv2.INTER_CUBIC)
            target = root / split / f"class{i % 4}"
            target.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(target / f"{i}.jpg"), crop, [cv2.IMWRITE_JPEG_QUALITY, 92])


def run(command: list[str], cwd: Path) -> list[tuple[float, str]]:
    """Run ``command`` and return the lines that it printed, each with the time it came."""
    here, started = Path(__file__).parent, str(time.time())
    paths = os.pathsep.join([str(here.parents[1]), str(here)])
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": paths, "WATCH_STARTED": started}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd, env=environment
    )
    lines = [(time.monotonic(), line) for line in process.stdout or ()]
    if process.wait() != 0:
        sys.exit(f"{' '.join(command)} failed:\n{''.join(line for _, line in lines[-30:])}")
    return lines


def ours(o: argparse.Namespace, root: Path, images: int, out: Path, extra: Sequence[str]) -> list[float]:
    """Return the images per second that our second epoch's line says, and what `watch` and ``result.json`` say."""
    command = [
        sys.executable, "-m", "rexnet_lit", "fit",
        f"--data.root={root}", f"--data.image_size={o.size}", f"--data.batch_size={o.batch}",
        "--model.pretrained=false", "--trainer.max_epochs=2", f"--trainer.accelerator={o.device}",
        f"--trainer.default_root_dir={out}", "--trainer.callbacks+=watch.Watch", *extra,
    ]  # fmt: skip
    if o.device == "cuda":
        command += ["--trainer.devices=1", "--trainer.precision=bf16-mixed"]
    said = "".join(line for _, line in run(command, out))
    patterns = (
        r"^epoch 2/2 .* training ([\d.]+) images/s",
        r"first step after (\S+) s",
        r"waited (\S+) %, peak (\S+) GB",
    )
    found = [re.search(pattern, said, re.MULTILINE) for pattern in patterns]
    newest = max(out.rglob("result.json"), key=lambda path: path.stat().st_mtime)
    end = json.loads(newest.read_text())["seconds"]["selection and calibration"]
    return [*(float(value) for match in found if match for value in match.groups()), end]


def timms(o: argparse.Namespace, root: Path, images: int, out: Path, extra: Sequence[str]) -> list[float]:
    """Return timm's images per second in the second epoch, between its log lines of the first and last batch."""
    steps = images // o.batch  # timm drops the last, smaller batch
    command = [
        sys.executable, str(o.timm.absolute()), "--data-dir", str(root), "--train-split", "train", "--val-split", "val",
        "--model", "rexnet_100", "--num-classes", "4", "--img-size", str(o.size), "-b", str(o.batch), "--epochs", "2",
        "--opt", "sgd", "--lr", "0.05", "--device", o.device, "--workers", str(o.workers or 1),
        "--output", str(out), "--log-interval", "1", *extra,
    ]  # fmt: skip
    # It logs a batch when it has ended: from the first line to the last are all batches but one.
    lines = run(command, out)
    first, last = (next(t for t, line in lines if re.search(rf"Train: 1 \[\s*{i}/", line)) for i in (0, steps - 1))
    return [(steps - 1) * o.batch / (last - first)]


def tools(o: argparse.Namespace) -> dict[str, Callable[..., list[float]]]:
    """Return what to run, by name."""
    if o.device == "cuda":
        settings, amp = [""], ("--amp", "--amp-dtype", "bfloat16")
        layouts = {"--amp": amp, "--amp --channels-last": (*amp, "--channels-last")}
        layouts["--amp --channels-last --torchcompile"] = (*amp, "--channels-last", "--torchcompile")
    else:
        settings = ["", "--model.strategy=partial", "--model.strategy=linear_probe"]
        layouts = {"": (), "--channels-last": ("--channels-last",)}
    workers = () if o.workers is None else (f"--data.num_workers={o.workers}",)
    found = {
        f"rexnet_lit {text}".strip(): partial(ours, extra=(*workers, *shlex.split(text))) for text in o.vary or settings
    }
    if o.timm:
        found |= {f"timm {name}".strip(): partial(timms, extra=extra) for name, extra in layouts.items()}
    return found


@contextlib.contextmanager
def busy(number: int) -> Iterator[None]:
    """Let so many processes compute all the time."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    """Run them in turn, ``--rounds`` times, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timm", type=Path, help="timm's train.py, from a checkout of its repository")
    parser.add_argument("--photos", type=Path, help="train/ and val/ with class folders")
    parser.add_argument("--images", type=int, default=416)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--workers", type=int, help="loader processes of all; ours by default, and one of timm's")
    parser.add_argument(
        "--vary", action="append", default=[], help="--vary=SETTINGS: a run of ours instead of these; may be repeated"
    )
    parser.add_argument("--busy", type=int, default=0, help="processes that compute beside the trainings")
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, busy(o.busy):
        out = Path(temporary)
        root = o.photos or out / "photos"
        if o.photos is None:
            draw_photos(root, o.images)
        images = sum(1 for path in (root / "train").rglob("*") if path.is_file())
        rows: dict[str, list[list[float]]] = {}
        for _ in range(o.rounds):
            for name, tool in tools(o).items():
                rows.setdefault(name, []).append(tool(o, root, images, out))
        medians = {name: [statistics.median(column) for column in zip(*r, strict=True)] for name, r in rows.items()}
        beside = f", beside {o.busy} busy processes" if o.busy else ""
        print(f"{images} images, {o.size} px, batch {o.batch}, {o.device}, medians of {o.rounds}{beside}\n")
        print("| | images/s | the first is | first step, s | waited, % | peak, GB | end, s |")
        print("|---|---|---|---|---|---|---|")
        first = next(iter(medians.values()))[0]
        for name, (rate, *others) in medians.items():
            cells = " | ".join(f"{value:.1f}" for value in others) or "| | |"
            print(f"| {name} | {rate:.1f} | {first / rate:.2f} x | {cells} |", flush=True)


if __name__ == "__main__":
    main()

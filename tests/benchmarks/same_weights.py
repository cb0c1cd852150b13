"""Whether two checkouts train the same weights, bit for bit: short trainings of every kind, compared by SHA-256.

    python tests/benchmarks/same_weights.py OLD NEW --glyphs DIR --weights FILE.safetensors

OLD and NEW are checkouts of this repository; both run in this Python environment, each with its own configs. DIR holds
train/, val/ and test/ with a folder of images per class (60 images of each class are used); FILE is a rexnet_100 to
start from. The digest is over the names, shapes, types and bytes of the tensors in ``model.safetensors``. The exit code
is 1 where a pair differs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import safe_open

IMAGES = 60  # of each class
SMALL = ("--data.image_size=64", "--trainer.accelerator=cpu", "--data.num_workers=1")

# Name, data, config files, settings. `{weights}` stands for the weights' file.
CASES: tuple[tuple[str, str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("quickstart", "digits", ("quickstart.yaml",), ("--trainer.max_epochs=3",)),
    (
        "finetune.yaml from weights, selected and calibrated",
        "glyphs",
        ("finetune.yaml",),
        (*SMALL, "--model.weights={weights}", "--trainer.max_epochs=2"),
    ),
    (
        "linear_probe.yaml, solved head",
        "glyphs",
        ("linear_probe.yaml",),
        (*SMALL, "--model.weights={weights}", "--model.strategy.solver=logistic"),
    ),
    (
        "staged",
        "glyphs",
        ("finetune.yaml",),
        (*SMALL, "--model.weights={weights}", "--model.strategy=staged", "--trainer.max_epochs=3"),
    ),
    (
        "MixUp, EMA, accumulation",
        "glyphs",
        ("finetune.yaml",),
        (
            *SMALL, "--model.pretrained=false", "--model.strategy.blend=false", "--data.augment.mixup=0.2",
            "--data.augment.cutmix=0.5", "--model.ema=0.99", "--trainer.accumulate_grad_batches=3",
            "--trainer.max_epochs=2",
        ),
    ),
    (
        "data.cache: disk",
        "glyphs",
        ("finetune.yaml",),
        (
            *SMALL, "--model.pretrained=false", "--model.strategy.blend=false", "--data.cache=disk",
            "--data.augment=medium", "--trainer.max_epochs=2",
        ),
    ),
    (
        "ddp_sim.yaml",
        "digits",
        ("quickstart.yaml", "hardware/ddp_sim.yaml"),
        ("--trainer.max_epochs=2", "--data.num_workers=0"),
    ),
    (
        "killed and resumed",
        "glyphs",
        ("finetune.yaml",),
        (*SMALL, "--model.weights={weights}", "--trainer.max_epochs=3"),
    ),
)  # fmt: skip


def environment(checkout: Path, cache: Path) -> dict[str, str]:
    """Return an environment in which ``import rexnet_lit`` finds the checkout, with one thread: sums have one order."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "REXNET_LIT", "MASTER_"))}
    return {
        **kept, "PYTHONPATH": str(checkout), "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip


def digest(file: Path) -> str:
    """Return the SHA-256 of a model's tensors."""
    total = hashlib.sha256()
    with safe_open(file, framework="np") as content:
        for name in sorted(content.keys()):
            array = content.get_tensor(name)
            total.update(f"\0{name}\0{array.dtype}{array.shape}\0".encode() + array.tobytes())
    return total.hexdigest()


def train(checkout: Path, folder: Path, argv: Sequence[str], kill: bool) -> str:
    """Run a fit in ``folder``; return its weights' digest.

    Args:
        checkout: Whose code to run.
        folder: A new folder.
        argv: The settings.
        kill: Kill it once its first epoch is saved, and resume it.
    """
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "rexnet_lit", "fit", *argv, "--trainer.default_root_dir=."]
    settings = {"cwd": folder, "env": environment(checkout, folder / "cache"), "text": True}
    settings |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    run = folder / "lightning_logs" / "version_0"
    process = subprocess.Popen(command, **settings)
    if kill:
        while process.poll() is None and not (run / "checkpoints" / "last.ckpt").is_file():
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        time.sleep(8)  # until its loader's workers have noticed
        process = subprocess.Popen([*command, "--ckpt_path=last"], **settings)
    out, _ = process.communicate()
    if process.returncode != 0:
        sys.exit(f"{checkout}: {' '.join(command)} ended with {process.returncode}:\n{out[-3000:]}")
    return digest(run / "model.safetensors")


def main() -> None:
    """Run every case from both checkouts, the pair at the same time, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs=2, type=lambda path: Path(path).resolve(), metavar=("OLD", "NEW"))
    parser.add_argument("--glyphs", type=Path, required=True)
    parser.add_argument("--weights", type=lambda path: Path(path).resolve(), required=True)
    parser.add_argument("--only", default="", help="run the cases that have this in their name")
    o = parser.parse_args()
    different = 0
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        sample = [sys.executable, "-m", "rexnet_lit", "sample", str(work / "digits")]
        subprocess.run(sample, check=True, capture_output=True, env=environment(o.checkouts[0], work))
        for split in ("train", "val"):
            for source in sorted((o.glyphs / split).iterdir()):
                (work / "glyphs" / split / source.name).mkdir(parents=True)
                for file in sorted(source.iterdir())[:IMAGES]:
                    shutil.copy(file, work / "glyphs" / split / source.name)
        print("| Training | OLD | NEW | |\n|---|---|---|---|")
        for number, (name, data, configs, settings) in enumerate(CASES):
            if o.only not in name:
                continue

            def run(side: int, number: int = number, name: str = name, data: str = data,
                    configs: Sequence[str] = configs, settings: Sequence[str] = settings) -> str:  # fmt: skip
                checkout: Path = o.checkouts[side]
                argv = [f"--config={checkout / 'configs' / config}" for config in configs]
                argv += [f"--data.root={work / data}", *(s.format(weights=o.weights) for s in settings)]
                return train(checkout, work / f"{number}-{side}", argv, kill="killed" in name)

            with ThreadPoolExecutor(2) as pool:
                old, new = pool.map(run, (0, 1))
            different += old != new
            print(f"| {name} | {old[:12]} | {new[:12]} | {'equal' if old == new else 'DIFFERENT'} |", flush=True)
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()

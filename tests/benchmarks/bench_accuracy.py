"""Test accuracy and wall time of whole trainings against other tools: same folder, weights, size, epochs, batch of 32.

    python tests/benchmarks/bench_accuracy.py --data DIR --data DIR2 --weights FILE.safetensors --epochs 5 --size 64 \\
        --seeds 0 1 2 --timm PATH/TO/timm/train.py --fastai PATH/TO/python-that-has-fastai

Each DIR holds train/, val/ and test/, of which --per-class takes that many images of each class (the seed draws them;
half as many for validation, and --test-per-class for the test). Without --weights all train from scratch; with them,
the head that is solved on the frozen features (configs/linear_probe.yaml) takes part too. The others run at their
documented defaults, and once tuned (the learning rate of ``TUNED``):

- a plain loop: timm's network in channels_last, torchvision's classification reference (SGD 0.1, momentum 0.9,
  steps), or AdamW 0.001 with a cosine;
- timm's train.py: SGD at its 0.1 per 256 images, five epochs of warm-up; or AdamW 0.001 with one;
- fastai's vision_learner.fine_tune; or with a base rate of 0.005.

Every process computes in --threads threads. timm's own validate.py says no macro F1.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE, CONFIGS = Path(__file__), Path(__file__).parents[2] / "configs"
Result = tuple[float, float, float]
"""Test top-1 and macro F1 (a fraction; nan where it is not said), seconds of the training process."""
TUNED = {"plain": 1e-3, "fastai": 5e-3}
"""The learning rate that was best of three on one of the datasets."""


def run(command: list[object], threads: int, cwd: Path) -> tuple[str, float]:
    """Run a command; return what it printed and how many seconds it took."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    started = time.monotonic()
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout + done.stderr, time.monotonic() - started


def ours(o: argparse.Namespace, root: Path, seed: int, out: Path, *extra: str, config: str = "finetune") -> Result:
    """A shipped config, with only what it must be told."""
    start = ["--model.weights", o.weights] if o.weights else ["--model.pretrained", "false"]
    command: list[object] = [
        sys.executable, "-m", "rexnet_lit", "fit", "--config", CONFIGS / f"{config}.yaml", "--data.root", root, *start,
        "--data.image_size", o.size, "--trainer.max_epochs", o.epochs, "--seed_everything", seed,
        "--trainer.accelerator", "cpu", "--trainer.default_root_dir", out, *extra,
    ]  # fmt: skip
    _, seconds = run(command, o.threads, out)
    folder = out / "lightning_logs" / "version_0"
    test = ["test", "--ckpt_path", folder / "model.safetensors", "--trainer.accelerator", "cpu"]
    run([sys.executable, "-m", "rexnet_lit", *test], o.threads, out)
    metrics = json.loads((folder / "report" / "metrics.json").read_text())
    return metrics["top1"], metrics["macro_f1"], seconds


def solved(*args: Any) -> Result:
    """The head alone, solved on features that are computed once: there are no epochs."""
    return ours(*args, "--model.strategy.solver", "logistic", config="linear_probe")


def _varied(vary: str, o: argparse.Namespace, root: Path, seed: int, out: Path) -> Result:
    return ours(o, root, seed, out, *shlex.split(vary))


def peer(o: argparse.Namespace, root: Path, seed: int, out: Path, python: str, name: str, rate: float) -> Result:
    """A loop of this file, in a process of its own."""
    said, _ = run([python, HERE, name, root, o.weights or "-", o.epochs, o.size, seed, rate], o.threads, out)
    top1, f1, seconds, _ = json.loads(next(line for line in said.splitlines() if line.startswith("[")))
    return top1, f1, seconds


def timms(o: argparse.Namespace, root: Path, seed: int, out: Path, *settings: str) -> Result:
    """timm's train.py, and its validate.py on the best checkpoint."""
    start = ["--pretrained", "--pretrained-path", o.weights] if o.weights else []
    data = ["--model", "rexnet_100", "--num-classes", len(list((root / "train").iterdir())), "--img-size", o.size]
    command: list[object] = [
        sys.executable, o.timm, "--data-dir", root, "--train-split", "train", "--val-split", "val", *data, "-b", 32,
        "--epochs", o.epochs, "--seed", seed, "--device", "cpu", "--workers", 1, "--channels-last", "--output", out,
        "--experiment", "run", "--log-interval", 1000, *start, *settings,
    ]  # fmt: skip
    _, seconds = run(command, o.threads, out)
    best = ["--checkpoint", out / "run" / "model_best.pth.tar", "--split", "test", "-b", 64]
    validate = [sys.executable, o.timm.with_name("validate.py"), "--data-dir", root, *data, "--device", "cpu", *best]
    said, _ = run(validate, o.threads, out)
    found = re.search(r'"top1": ([\d.]+)', said)
    return float(found.group(1)) / 100 if found else float("nan"), float("nan"), seconds


def plain_loop(root: str, weights: str, epochs: int, size: int, seed: int, rate: float) -> tuple[float, ...]:
    """Train as torchvision's reference does, or with AdamW at ``rate``; also return the top-1 on val."""
    import timm
    import torch
    from safetensors.torch import load_file
    from sklearn.metrics import f1_score
    from torchvision import datasets, transforms
    from torchvision.transforms.functional import InterpolationMode

    torch.manual_seed(seed)
    started = time.monotonic()
    last = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    train = transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *last])
    shorter = transforms.Resize(round(size / 0.875), InterpolationMode.BICUBIC)
    evaluate = transforms.Compose([shorter, transforms.CenterCrop(size), *last])
    data = datasets.ImageFolder(f"{root}/train", train)
    loader = torch.utils.data.DataLoader(data, 32, shuffle=True, num_workers=1, drop_last=True, persistent_workers=True)
    network = timm.create_model("rexnet_100", num_classes=len(data.classes))
    if weights != "-":
        network.load_state_dict({k: v for k, v in load_file(weights).items() if "head.fc" not in k}, strict=False)
    network.to(memory_format=torch.channels_last)
    steps, optimizer, schedule = epochs * len(loader), None, None
    if rate:
        optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    else:
        optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 30 * len(loader), 0.1)
    for _ in range(epochs):
        for images, targets in loader:
            loss = torch.nn.functional.cross_entropy(network(images.to(memory_format=torch.channels_last)), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    seconds = time.monotonic() - started
    network.eval()
    predicted: dict[str, np.ndarray] = {}
    truth: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for split in ("val", "test"):
            images_of = datasets.ImageFolder(f"{root}/{split}", evaluate)
            answers = [network(images).argmax(1) for images, _ in torch.utils.data.DataLoader(images_of, 64)]
            predicted[split], truth[split] = torch.cat(answers).numpy(), np.array(images_of.targets)
    top1, val_top1 = (float((predicted[split] == truth[split]).mean()) for split in ("test", "val"))
    return top1, float(f1_score(truth["test"], predicted["test"], average="macro")), seconds, val_top1


def fastai_loop(root: str, weights: str, epochs: int, size: int, seed: int, rate: float) -> tuple[float, ...]:
    """Train with fastai's documented few lines, head on an unpooled timm body; also return the top-1 on val."""
    from fastai.vision.all import (
        ImageDataLoaders,
        Path,
        Resize,
        aug_transforms,
        get_image_files,
        set_seed,
        vision_learner,
    )
    from safetensors.torch import load_file
    from sklearn.metrics import f1_score

    set_seed(seed)
    started = time.monotonic()
    items, batches = Resize(int(size * 1.14)), aug_transforms(size=size)
    loaders = ImageDataLoaders.from_folder(
        root, train="train", valid="val", item_tfms=items, batch_tfms=batches, bs=32, num_workers=1
    )
    learner = vision_learner(loaders, "rexnet_100", pretrained=False, normalize=False)
    if weights != "-":
        body = {k: v for k, v in load_file(weights).items() if not k.startswith("head.")}
        learner.model[0].model.load_state_dict(body)
    with learner.no_bar(), learner.no_logging():
        if weights == "-":
            learner.fit_one_cycle(epochs, rate or 1e-3)
        else:
            learner.fine_tune(epochs, **({"base_lr": rate} if rate else {}))
        seconds = time.monotonic() - started
        probs, truth = learner.get_preds(dl=loaders.valid)
        val_top1 = (probs.argmax(1) == truth).float().mean().item()
        probs, truth = learner.get_preds(dl=loaders.test_dl(get_image_files(Path(root) / "test"), with_labels=True))
    predicted = probs.argmax(1)
    top1 = (predicted == truth).float().mean().item()
    return top1, float(f1_score(truth, predicted, average="macro")), seconds, val_top1


def draw(root: Path, per_class: int, seed: int, target: Path, tested: int | None = None) -> Path:
    """Copy at most ``per_class`` images of each class of ``root``; half as many for validation, ``tested`` to test."""
    counts = {"train": per_class, "val": max(1, per_class // 2), "test": tested or per_class}
    for split, count in counts.items():
        for folder in sorted((root / split).iterdir()):
            files = sorted(folder.iterdir())
            (target / split / folder.name).mkdir(parents=True)
            for i in np.random.default_rng(seed).permutation(len(files))[:count]:
                shutil.copy(files[i], target / split / folder.name)
    return target


def main() -> None:
    """Run all on all folders, seed by seed, and print a table for each folder."""
    if len(sys.argv) > 1 and sys.argv[1] in ("plain", "fastai"):
        loop = plain_loop if sys.argv[1] == "plain" else fastai_loop
        root, weights, epochs, size, seed, rate = sys.argv[2:]
        print(json.dumps(loop(root, weights, int(epochs), int(size), int(seed), float(rate))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, action="append")
    parser.add_argument("--weights", type=lambda path: Path(path).absolute())
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--per-class", type=int, help="images; all of them by default")
    parser.add_argument("--test-per-class", type=int, help="images to test on; as many as --per-class by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--timm", type=lambda path: Path(path).absolute(), help="timm's train.py")
    parser.add_argument("--fastai", help="a Python that has fastai, scikit-learn and timm")
    vary_help = "also run ours with these settings, such as '--model.strategy.bn frozen'; may be repeated"
    parser.add_argument("--vary", action="append", default=[], help=vary_help)
    parser.add_argument("--only", default="", help="run what has this in its name")
    o = parser.parse_args()
    tools: dict[str, Any] = {
        "rexnet_lit": ours,
        **({"rexnet_lit, solved head": solved} if o.weights else {}),
        **{f"rexnet_lit {vary}": functools.partial(_varied, vary) for vary in o.vary},
        "plain loop, default": lambda *a: peer(*a, sys.executable, "plain", 0.0),
        "plain loop, tuned": lambda *a: peer(*a, sys.executable, "plain", TUNED["plain"]),
    }
    if o.timm:
        tools["timm, default"] = timms
        tools["timm, tuned"] = lambda *a: timms(*a, "--opt", "adamw", "--lr", "1e-3", "--warmup-epochs", "1")
    if o.fastai:
        tools["fastai, default"] = lambda *a: peer(*a, o.fastai, "fastai", 0.0)
        tools["fastai, tuned"] = lambda *a: peer(*a, o.fastai, "fastai", TUNED["fastai"])
    for root in (path.absolute() for path in o.data):
        start = "from the weights" if o.weights else "from scratch"
        drawn = f" ({o.per_class} a class)" if o.per_class else ""
        print(f"\n{root.name}{drawn}, {o.epochs} epochs at {o.size} px, {start}: mean (spread) of {len(o.seeds)} seeds")
        print("| | test top-1 % | macro F1 % | seconds |\n|---|---|---|---|")
        for name, tool in tools.items():
            if o.only not in name:
                continue
            found: list[Result] = []
            for seed in o.seeds:
                with tempfile.TemporaryDirectory() as out, tempfile.TemporaryDirectory() as data:
                    given = root
                    if o.per_class:
                        given = draw(root, o.per_class, seed, Path(data) / root.name, o.test_per_class)
                    found.append(tool(o, given, seed, Path(out)))
            columns = [[100 * r[0] for r in found], [100 * r[1] for r in found], [r[2] for r in found]]
            cells = [f"{np.mean(c):.1f} ({np.std(c):.1f})" for c in columns[:2]]
            print(f"| {name} | {' | '.join(cells)} | {np.mean(columns[2]):.0f} |", flush=True)


if __name__ == "__main__":
    main()

"""Prediction in every format, and beside timm's inference.py: speed, size and accuracy.

    python tests/benchmarks/bench_predict.py RUN_FOLDER [--timm PATH/TO/timm/inference.py] [--images CLASS_FOLDERS]

RUN_FOLDER holds model.safetensors; the images for the accuracy, test/ of its dataset by default, are in a folder per
class. The JPEGs are crops of two photographs that scikit-learn ships, of 500 x 375 and 4000 x 3000.

The first table is of whole commands, on all cores: images per second between a run on few and one on many images, so
that the start does not count, and the seconds of the longer run. The second is of one thread in this process: the
network alone on one image, one JPEG of 500 x 375, and JPEGs in batches of 32; timm's row is its network and its
transform. All take turns; medians.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import openvino
import timm
import torch
from bench_decode import draw_photos
from numpy.typing import NDArray
from PIL import Image

import rexnet_lit
from rexnet_lit.export.export import export
from rexnet_lit.models import checkpoint

BATCH = 32
SIZES = {"500 x 375": (500, 375, 32, 512), "4000 x 3000": (4000, 3000, 16, 96)}
"""Width and height of the JPEGs, and how many are few and many."""


class Contender(NamedTuple):
    """What predicts.

    Attributes:
        network: Maps images (B, 3, S, S) to probabilities or logits (B, K).
        view: Maps a file to an image (3, S, S).
        megabytes: The size of the model's file.
    """

    network: Callable[[NDArray[np.float32]], Any]
    view: Callable[[Path], NDArray[np.float32]]
    megabytes: float

    def predict(self, files: Sequence[Path]) -> NDArray[np.float32]:
        """Return the probabilities or logits (N, K)."""
        parts = [files[start : start + BATCH] for start in range(0, len(files), BATCH)]
        return np.concatenate([self.network(np.stack([self.view(file) for file in part])) for part in parts])


def contenders(model: Path, folder: Path) -> dict[str, Contender]:
    """Export the model in each format, and load it; each computes in one thread."""
    torch.set_num_threads(1)
    classifier = rexnet_lit.load(model, device="cpu")
    size = classifier.spec.eval_recipe.image_size

    def view(file: Path) -> NDArray[np.float32]:
        return np.float32(classifier.view(file).transpose(2, 0, 1)) / 255

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    found = {"rexnet_lit in Python": Contender(_in_torch(classifier.network), _input(classifier._input), _mb(model))}
    for kind in ("onnx", "onnx-int8", "openvino", "openvino-int8"):
        file = folder / f"{kind}.{'onnx' if 'onnx' in kind else 'xml'}"
        megabytes = export(str(model), kind, str(file)).size / 1e6
        if "onnx" in kind:
            session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
            found[kind] = Contender(lambda x, run=session.run: run(None, {"images": x})[0], view, megabytes)
        else:
            compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_NUM_THREADS": 1})
            found[kind] = Contender(lambda x, run=compiled: run(x)[0], view, megabytes)
    options = {"num_classes": len(classifier.class_names), "checkpoint_path": str(model)}
    network = timm.create_model(classifier.spec.backbone.partition(".")[0], **options).eval()
    transform = timm.data.create_transform(size, interpolation="bicubic", crop_pct=classifier.spec.eval_recipe.crop_pct)
    pixels = _input(lambda file: transform(Image.open(file).convert("RGB")))
    found["timm in Python"] = Contender(_in_torch(network), pixels, _mb(model))
    network = timm.create_model(classifier.spec.backbone.partition(".")[0], **options).eval()
    network = network.to(memory_format=torch.channels_last)
    found["timm in Python, channels_last"] = Contender(_in_torch(network, torch.channels_last), pixels, _mb(model))
    return found


def _in_torch(network: torch.nn.Module, layout: torch.memory_format = torch.channels_last) -> Callable[..., Any]:
    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return network(torch.from_numpy(images).contiguous(memory_format=layout)).numpy()

    return run


def _input(function: Callable[[Path], torch.Tensor]) -> Callable[[Path], NDArray[np.float32]]:
    return lambda file: function(file).numpy()


def _mb(file: Path) -> float:
    return file.stat().st_size / 1e6


def seconds(function: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def in_turn(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each function, called in turn, after one call that does not count."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            took = seconds(function)
            if number:
                found[name].append(took)
    return found


def time_commands(o: argparse.Namespace, folder: Path) -> None:
    """Print the table of whole commands."""
    model = (o.run / "model.safetensors").absolute()
    spec = checkpoint.load_model(model).spec
    commands = {"rexnet_lit": ["-m", "rexnet_lit", "predict", str(model)]}
    if o.timm:
        theirs = [
            str(o.timm.absolute()), "--model", spec.backbone.partition(".")[0], "--checkpoint", str(model),
            "--num-classes", str(spec.num_classes), "--img-size", str(spec.eval_recipe.image_size), "--device", "cpu",
            "--batch-size", str(BATCH), "--workers", str(o.workers), "--no-console-results",
            "--results-format", "csv", "--results-dir", ".",
        ]  # fmt: skip
        commands |= {"timm's inference.py": theirs, "timm's inference.py --channels-last": [*theirs, "--channels-last"]}
    print("| | | images/s | rexnet_lit is faster by | whole command, s |\n|---|---|---|---|---|")
    for size, (width, height, few, many) in SIZES.items():
        draw_photos(folder / size / str(many) / "all", width, height, many)
        small = folder / size / str(few) / "all"
        small.mkdir(parents=True)
        for file in sorted((folder / size / str(many) / "all").iterdir())[:few]:
            (small / file.name).symlink_to(file)
        found: dict[str, list[float]] = {name: [] for name in commands}
        whole: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(o.rounds):
            for name, command in commands.items():
                took = []
                for count in (few, many):
                    images = str(folder / size / str(count))
                    extra = [images] if name == "rexnet_lit" else ["--data-dir", images]
                    run = [sys.executable, *command, *extra]
                    took.append(
                        seconds(lambda run=run: subprocess.run(run, cwd=folder, check=True, capture_output=True))
                    )
                found[name].append((many - few) / (took[1] - took[0]))
                whole[name].append(took[1])
        ours = found["rexnet_lit"]
        for name, rates in found.items():
            ratios = [mine / other for mine, other in zip(ours, rates, strict=True)]
            faster = f"{statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})"
            last = f"{statistics.median(rates):.1f} | {'' if rates is ours else faster}"
            print(f"| {size} | {name} | {last} | {statistics.median(whole[name]):.1f} |", flush=True)


def time_formats(o: argparse.Namespace, folder: Path) -> None:
    """Print the table of the formats."""
    model = o.run / "model.safetensors"
    found = contenders(model, folder)
    names = checkpoint.load_model(model).spec.class_names
    root = o.images or Path(checkpoint.load_model(model).data.root or "") / "test"
    labelled = [(file, index) for index, name in enumerate(names) for file in sorted((root / name).iterdir())]
    truth = np.array([index for _, index in labelled])
    small, large = (sorted((folder / size / str(many) / "all").iterdir()) for size, (*_, many) in SIZES.items())
    images = {name: each.view(small[0])[None] for name, each in found.items()}
    alone = in_turn({name: lambda c=each, x=images[name]: c.network(x) for name, each in found.items()}, 20 * o.rounds)
    single = in_turn({name: lambda c=each: c.predict(small[:1]) for name, each in found.items()}, 20 * o.rounds)
    many = in_turn({name: lambda c=each: c.predict(small[:64]) for name, each in found.items()}, o.rounds)
    photos = in_turn({name: lambda c=each: c.predict(large[:16]) for name, each in found.items()}, o.rounds)
    print(f"\n{len(labelled)} test images, {next(iter(images.values())).shape[-1]} px, one thread\n")
    print("| | MB | test top-1 % | network alone, ms | one JPEG, ms | 500 x 375, images/s | 4000 x 3000, images/s |")
    print("|---|---|---|---|---|---|---|")
    for name, each in found.items():
        top1 = 100 * (each.predict([file for file, _ in labelled]).argmax(1) == truth).mean()
        times = (statistics.median(alone[name]), statistics.median(single[name]))
        rates = (64 / statistics.median(many[name]), 16 / statistics.median(photos[name]))
        shown = [
            f"{each.megabytes:.1f}",
            f"{top1:.1f}",
            *(f"{1000 * t:.1f}" for t in times),
            *(f"{r:.1f}" for r in rates),
        ]
        print(f"| {name} | {' | '.join(shown)} |", flush=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--timm", type=Path, help="timm's inference.py, from a checkout of its repository")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--workers", type=int, default=2, help="timm's loader processes; ours are chosen by the command"
    )
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        time_commands(o, Path(temporary))
        time_formats(o, Path(temporary))


if __name__ == "__main__":
    main()

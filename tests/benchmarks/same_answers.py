"""The answers of a model wherever it is used, on 200 images of all shapes and kinds, against the predictor's.

    python tests/benchmarks/same_answers.py MODEL.safetensors

For each crop mode: the largest difference of a probability between `Classifier.probabilities` and the data module with
the network (as `validate` and `test` compute), ONNX, OpenVINO, torch.export and timm's network of the hub folder on
the predictor's views, and the script in docs/guide.md, with and without its exact resize, on the files. timm's own
transform on Pillow images is compared in levels by tests/data. Before that, the memory of 2,000
predictions; after it, eight threads.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import timm
import torch
from numpy.typing import NDArray
from PIL import Image

import rexnet_lit
from rexnet_lit.export.export import export
from rexnet_lit.models import checkpoint
from rexnet_lit.models.predictor import Classifier

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"


def draw(folder: Path, count: int) -> list[Path]:
    """Write images: greyscale, palette, transparent and turned ones too, from 1 : 1 to 3 : 1, of 20 to 600 pixels."""
    rng = np.random.default_rng(0)
    files = []
    for number in range(count):
        width = int(rng.integers(20, 600))
        height = max(int(width / rng.uniform(1, 2.9)), 8)
        noise = rng.integers(0, 256, (6, 6, 3), np.uint8)
        image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        if number % 2:
            image = image.transpose(Image.Transpose.ROTATE_90)
        kind, exif = number % 8, Image.Exif()
        exif[0x112] = 1 + number % 8
        if kind == 0:
            image.putalpha(Image.linear_gradient("L").resize(image.size))
        image = {1: image.quantize(31), 2: image.convert("L")}.get(kind, image)
        suffix = ".jpg" if kind > 3 else ".png"
        files.append(folder / f"{number:03}{suffix}")
        image.save(files[-1], exif=exif)
    return files


def runs(model: Path, folder: Path) -> dict[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]]:
    """Export the model; return by format what maps images (N, 3, S, S) from 0 to 1 to probabilities (N, K)."""
    files = {"onnx": folder / "m.onnx", "openvino": folder / "m.xml", "torch": folder / "m.pt2", "hub": folder / "hub"}
    for kind, file in files.items():
        export(str(model), kind, str(file))
    session = onnxruntime.InferenceSession(files["onnx"], providers=["CPUExecutionProvider"])
    compiled = openvino.Core().compile_model(files["openvino"], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    program = torch.export.load(files["torch"]).module()
    network = timm.create_model(f"local-dir:{files['hub']}", pretrained=True).eval()
    recipe = timm.data.resolve_model_data_config(network)
    mean, std = (torch.tensor(recipe[name]).view(3, 1, 1) for name in ("mean", "std"))

    def in_timm(images: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return network((torch.from_numpy(images) - mean) / std).softmax(1).numpy()

    return {
        "ONNX": lambda images: session.run(None, {"images": images})[0],
        "OpenVINO": lambda images: compiled(images)["probabilities"],
        "torch.export": lambda images: program(torch.from_numpy(images)).detach().numpy(),
        "hub folder in timm": in_timm,
    }


def of_data_module(classifier: Classifier, folder: Path) -> NDArray[np.float32]:
    """Return the probabilities of the images as the data module gives them to the network."""
    data = rexnet_lit.ImageFolderDataModule(predict_path=str(folder), num_workers=0)
    data.eval_recipe = classifier.spec.eval_recipe
    data.setup("predict")
    with torch.inference_mode():
        return torch.cat([classifier.network(batch[0]).softmax(1) for batch in data.predict_dataloader()]).numpy()


def of_script(files: list[Path], model: Path, exact: bool) -> NDArray[np.float32]:
    """Return the probabilities of the guide's script."""
    code = re.findall(r"```python\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)
    (script,) = (text for text in code if "onnx" in text)
    (resized,) = (text for text in code if "def resized" in text)
    script = re.sub(r"^(for k in|    print).*\n", "", script, flags=re.MULTILINE).replace("model.onnx", str(model))
    if exact:
        script = resized + re.sub(r"image\.resize\(sides, .*\)", "resized(image, sides)", script)
    found: list[Any] = []
    for file in files:
        names: dict[str, Any] = {}
        exec(compile(script.replace("photo.jpg", str(file)), str(GUIDE), "exec"), names)  # noqa: S102
        found.append(names["probabilities"])
    return np.stack(found)


def resident() -> float:
    """Return the memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def main() -> None:
    """Print the differences, and the memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--images", type=int, default=200)
    o = parser.parse_args()
    torch.set_num_threads(1)
    own = checkpoint.load_model(o.model)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "images").mkdir()
        files = draw(folder / "images", o.images)
        classifier, memory = rexnet_lit.load(o.model, device="cpu"), []
        for _ in range(max(2000 // len(files), 1)):
            classifier.predict(files)
            memory.append(resident())
        print(f"memory after each {len(files)} predictions, MB: {', '.join(f'{m:.0f}' for m in memory)}", flush=True)
        for mode in ("center", "border", "squash"):
            spec = dataclasses.replace(own.spec, eval_recipe=own.spec.eval_recipe.with_crop_mode(mode))
            model = folder / mode / "model.safetensors"
            checkpoint.save_model(model, spec, own.state)
            classifier = rexnet_lit.load(model, device="cpu")
            expected = classifier.probabilities(files)
            views = np.stack([classifier.view(file) for file in files]).transpose(0, 3, 1, 2).astype(np.float32) / 255
            found = {name: run(views) for name, run in runs(model, folder / mode).items()}
            found["data module"] = of_data_module(classifier, folder / "images")
            found["the guide's script, exact resize"] = of_script(files, folder / mode / "m.onnx", exact=True)
            found["the guide's script"] = of_script(files, folder / mode / "m.onnx", exact=False)
            differences = {name: f"{np.abs(probs - expected).max():.1e}" for name, probs in found.items()}
            print(mode, json.dumps(differences), flush=True)
        with ThreadPoolExecutor(8) as pool:
            parts = list(pool.map(lambda start: classifier.probabilities(files[start::8]), range(8)))
        apart = max(np.abs(parts[n] - expected[n::8]).max() for n in range(8))
        print(f"eight threads: {apart:.1e}")


if __name__ == "__main__":
    main()

"""INT8 against float32 in onnxruntime and OpenVINO: size, milliseconds an image in one thread, cost in accuracy.

    python tests/benchmarks/bench_int8.py RUN_FOLDER [--images CLASS_FOLDERS]

RUN_FOLDER holds model.safetensors; the images, test/ of its dataset by default, are in a folder per class. The four
take turns.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino

import rexnet_lit
from rexnet_lit.export.export import export
from rexnet_lit.models import checkpoint


def main() -> None:
    """Export both, measure both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    model = options.run / "model.safetensors"
    classifier = rexnet_lit.load(model, device="cpu")
    root = options.images or Path(checkpoint.load_model(model).data.root or "") / "test"
    files = [(file, name) for name in classifier.class_names for file in sorted((root / name).iterdir())]
    images = np.stack([classifier.view(file) for file, _ in files]).transpose(0, 3, 1, 2).astype(np.float32) / 255
    truth = np.array([classifier.class_names.index(name) for _, name in files])

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    runs: dict[str, Any] = {}
    sizes: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("onnx", "onnx-int8", "openvino", "openvino-int8"):
            file = Path(folder) / f"{kind}.{'onnx' if 'onnx' in kind else 'xml'}"
            sizes[kind] = export(str(model), kind, str(file)).size / 1e6
            if "onnx" in kind:
                session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
                runs[kind] = lambda part, session=session: session.run(None, {"images": part})[0]
            else:
                compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_NUM_THREADS": 1})
                runs[kind] = lambda part, compiled=compiled: compiled(part)[0]
    took: dict[str, list[float]] = {kind: [] for kind in runs}
    for _ in range(60):
        for kind, run in runs.items():
            started = time.perf_counter()
            run(images[: options.batch])
            took[kind].append((time.perf_counter() - started) / options.batch)
    print(f"{classifier.spec.backbone}, {images.shape[-1]} px, batches of {options.batch}, {len(files)} test images")
    print("| | MB | ms an image | test top-1 % |\n|---|---|---|---|")
    for kind, run in runs.items():
        probs = np.concatenate([run(part) for part in np.array_split(images, 20)])
        milliseconds, top1 = 1000 * np.median(took[kind][10:]), 100 * (probs.argmax(1) == truth).mean()
        print(f"| {kind} | {sizes[kind]:.1f} | {milliseconds:.2f} | {top1:.1f} |")


if __name__ == "__main__":
    main()

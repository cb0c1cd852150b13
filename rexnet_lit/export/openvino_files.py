"""OpenVINO's own format (IR): the graph in an ``.xml`` file, the weights in a ``.bin`` file beside it.

The ONNX graph is read, also the quantised one. `openvino.convert_model`, which takes PyTorch modules, and NNCF, which
quantises, report their use to the maker's servers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from torch import Tensor

from rexnet_lit.export import onnx_files
from rexnet_lit.export.export import Check, metadata
from rexnet_lit.models.predictor import Classifier


def write_float(classifier: Classifier, model: Path, example: Tensor, target: Path) -> Check:
    """Write an ``.xml`` file, and a ``.bin`` file beside it, as a `export.Writer`.

    Raises:
        UserError: A package is missing.
    """
    onnx_files.require("openvino", "openvino", "onnx", "onnxscript")
    return _write(classifier, onnx_files.build_graph(classifier, example).SerializeToString(), target)


def write_int8(classifier: Classifier, model: Path, example: Tensor, target: Path) -> Check:
    """Write a quantised graph with the ranges of the example images, as `write_float`."""
    onnx_files.require("openvino", "openvino")
    quantised = target.with_name("quantised")
    onnx_files.write_int8(classifier, model, example, quantised)
    return _write(classifier, quantised.read_bytes(), target)


def _write(classifier: Classifier, graph: bytes, target: Path) -> Check:
    import openvino

    core = openvino.Core()
    converted = core.read_model(graph)
    for key, value in metadata(classifier).items():
        converted.set_rt_info(value, [key])
    named = target.with_suffix(".xml")  # OpenVINO goes by the suffix
    openvino.save_model(converted, named, compress_to_fp16=False)
    # Some CPUs compute in bfloat16 unless told otherwise.
    run = core.compile_model(named, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    named.replace(target)
    return lambda images: cast("dict[int, Any]", run(images))[0]

"""OpenVINO's own format (IR): the graph in an ``.xml`` file, the weights in a ``.bin`` file beside it.

The ONNX graph is read. `openvino.convert_model`, which takes PyTorch modules, reports its use to the maker's servers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from torch import Tensor

from rexnet_lit.export.export import Check, metadata
from rexnet_lit.export.onnx_files import build_graph, require
from rexnet_lit.models.predictor import Classifier


def write_float(classifier: Classifier, model: Path, example: Tensor, target: Path) -> Check:
    """Write an ``.xml`` file, and a ``.bin`` file beside it, as a `export.Writer`.

    Raises:
        UserError: A package is missing.
    """
    require("openvino", "openvino", "onnx", "onnxscript")
    import openvino

    core = openvino.Core()
    graph = core.read_model(build_graph(classifier, example).SerializeToString())
    for key, value in metadata(classifier).items():
        graph.set_rt_info(value, [key])
    named = target.with_suffix(".xml")  # OpenVINO goes by the suffix
    openvino.save_model(graph, named, compress_to_fp16=False)
    # Some CPUs compute in bfloat16 unless told otherwise.
    run = core.compile_model(named, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    named.replace(target)
    return lambda images: cast("dict[int, Any]", run(images))[0]

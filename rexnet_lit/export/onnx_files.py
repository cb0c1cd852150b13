"""ONNX files, with float32 weights or quantised to 8-bit integers.

For quantisation, the range of each activation is measured on images like those that the model is for (Jacob et al.,
"Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018).
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from rexnet_lit.export.export import BATCH, Check, Deployed, metadata
from rexnet_lit.models.predictor import Classifier
from rexnet_lit.utils.errors import UserError


def require(extra: str, *packages: str) -> None:
    """Raise `UserError` unless the packages that an extra installs are there."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise UserError(f"export: {error.name} is not installed; pip install 'rexnet-lit[{extra}]'") from None


def build_graph(classifier: Classifier, example: Tensor) -> Any:
    """Return an ONNX graph (`onnx.ModelProto`) with float32 weights, without metadata; needs onnx and onnxscript."""
    program = torch.onnx.export(
        Deployed(classifier), (example,), dynamo=True, input_names=["images"], output_names=["probabilities"],
        dynamic_shapes=BATCH, verbose=False,
    )  # fmt: skip
    proto = cast(Any, program).model_proto
    for node in proto.graph.node:  # source locations, with paths of this machine
        del node.metadata_props[:]
    return proto


def write_float(classifier: Classifier, model: Path, example: Tensor, target: Path) -> Check:
    """Write an ONNX file with float32 weights, as a `export.Writer`.

    Raises:
        UserError: A package is missing.
    """
    require("onnx", "onnx", "onnxruntime", "onnxscript")
    import onnx

    proto = build_graph(classifier, example)
    for key, value in metadata(classifier).items():
        proto.metadata_props.add(key=key, value=value)
    proto.graph.input[0].doc_string = metadata(classifier)["input"]
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, target)
    return _check(target)


def write_int8(classifier: Classifier, model: Path, example: Tensor, target: Path) -> Check:
    """Write a quantised ONNX file with the ranges of the example images, as a `export.Writer`."""
    exact, folded = target.with_name("exact"), target.with_name("folded")
    write_float(classifier, model, example[:2], exact)
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):  # type: ignore[misc]
        batches = ({"images": batch.numpy()} for batch in torch.split(example, 16))

        def get_next(self) -> object:
            return next(self.batches, None)

    quant_pre_process(exact, folded, skip_symbolic_shape=True)
    # Only for unsigned activations are there kernels that stay in integers from layer to layer. CPUs without VNNI add
    # two products in 16 bits, which overflow unless the weights have 7 bits.
    types: dict[str, Any] = {
        "activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True, "reduce_range": True,
    }  # fmt: skip
    float_nodes = [node.name for node in onnx.load(folded).graph.node if node.op_type == "Softmax"]
    quantize_static(folded, target, Images(), nodes_to_exclude=float_nodes, **types)
    return _check(target)


def _check(file: Path) -> Check:
    from onnxruntime import InferenceSession

    run = InferenceSession(file, providers=["CPUExecutionProvider"]).run
    return lambda images: run(None, {"images": images})[0]

"""The export formats, without torch, so that ``export --help`` is quick.

To add a format, write a `export.Writer` and add an entry here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """A format that ``export`` writes.

    Args:
        description: What it is, for ``--help``.
        writer: Its `export.Writer`, as ``module:function``, the module in this folder.
        suffixes: File name endings; empty if the output is a new folder.
        needs_images: Whether it is quantised, with images like those that the model is for.
        overwrites: Whether an existing file of that kind is replaced.
        companion: Ending of a second file, beside the first; the output may then also be a folder for both.
    """

    description: str
    writer: str
    suffixes: tuple[str, ...] = ()
    needs_images: bool = False
    overwrites: bool = True
    companion: str = ""


FORMATS = {
    "onnx": Format("ONNX with float32 weights", "onnx_files:write_float", (".onnx",)),
    "onnx-int8": Format("ONNX quantised to 8 bits, for CPUs", "onnx_files:write_int8", (".onnx",), needs_images=True),
    "openvino": Format(
        "OpenVINO IR with float32 weights, an .xml and a .bin file",
        "openvino_files:write_float",
        (".xml",),
        companion=".bin",
    ),
    "openvino-int8": Format(
        "OpenVINO IR quantised to 8 bits, for CPUs",
        "openvino_files:write_int8",
        (".xml",),
        needs_images=True,
        companion=".bin",
    ),
    "torch": Format("a torch.export program, for torch.export.load", "torch_files:write_program", (".pt2",)),
    # The file that exists may be the only copy of another model.
    "safetensors": Format(
        "weights for rexnet_lit.load and timm", "torch_files:write_safetensors", (".safetensors",), overwrites=False
    ),
    "hub": Format("a folder for timm and hubs, with a model card", "hub:write", overwrites=False),
}

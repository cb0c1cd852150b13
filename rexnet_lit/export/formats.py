"""Model files for other programs, each checked against the model on pictures before it is kept.

An exported graph takes float32 RGB (B, 3, S, S) from 0 to 1, the centre square that `predictor.Classifier.view`
cuts, and returns probabilities (B, K): normalisation and softmax are inside. Class names and the preprocessing are
in its metadata. A hub folder holds the bare network instead, as timm builds it. INT8 is for CPUs: its integers stand
for ranges of activations that pictures of the model's own kind show (Jacob et al., "Quantization and Training of
Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018).
To add a format, write a function and name it in `FORMATS`.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rexnet_lit.data.folder import list_images
from rexnet_lit.export import hub
from rexnet_lit.models import checkpoint
from rexnet_lit.models.predictor import Classifier, load
from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.files import check_output, check_writable

Check = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Maps images (B, 3, S, S) to probabilities (B, K), by the written file."""

TOLERANCE = 1e-4
"""Largest difference in a probability between the file and the model, where the file computes in floats."""

LEAST_AGREEMENT = 0.9
"""Share of pictures of which a file of integers must say the model's class."""

_PICTURES = 256
"""Pictures for integers: half of them to set the ranges, the others to compare the file with the model."""

_FEWEST = 20


class Parity(NamedTuple):
    """How well a written file agrees with the model.

    Args:
        difference: The largest one in a probability.
        same: Share of the pictures that are of the same class for both.
        pictures: How many were looked at.
    """

    difference: float
    same: float
    pictures: int


class _Deployed(nn.Module):
    """Images from 0 to 1 in, probabilities out."""

    def __init__(self, classifier: Classifier, network: nn.Module | None = None) -> None:
        super().__init__()
        recipe = classifier.spec.eval_recipe
        self.network = (network or classifier.network).cpu().to(memory_format=torch.contiguous_format)
        self.mean = nn.Buffer(torch.tensor(recipe.mean).view(1, 3, 1, 1))
        self.std = nn.Buffer(torch.tensor(recipe.std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, S, S) to (B, K)."""
        return cast(Tensor, self.network((images - self.mean) / self.std)).softmax(1)


def _metadata(classifier: Classifier) -> dict[str, str]:
    return {
        "rexnet_lit": classifier.spec.to_json(),
        "class_names": json.dumps(classifier.class_names),
        "input": "float32 RGB (B, 3, S, S) from 0 to 1, centre square; output: probabilities (B, K)",
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' progress reports and deprecation notes off the screen."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _onnx(classifier: Classifier, model: Path, example: Tensor, target: Path) -> Check:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ModuleNotFoundError as error:
        raise UserError(f"export: {error.name} is not installed; pip install 'rexnet-lit[onnx]'") from None
    program = torch.onnx.export(
        _Deployed(classifier).eval(),
        (example,),
        dynamo=True,
        input_names=["images"],
        output_names=["probabilities"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    proto = cast(Any, program).model_proto
    for node in proto.graph.node:  # where in the source each came from, with this machine's paths
        del node.metadata_props[:]
    for key, value in _metadata(classifier).items():
        proto.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(proto)
    onnx.save(proto, target)
    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    return lambda images: cast(NDArray[np.float32], session.run(None, {"images": images})[0])


def _onnx_int8(classifier: Classifier, model: Path, example: Tensor, target: Path) -> Check:
    exact, folded = target.with_name("exact"), target.with_name("folded")
    _onnx(classifier, model, example[:2], exact)
    import onnx
    from onnxruntime import InferenceSession
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Pictures(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches = iter(torch.split(example, 16))

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            batch = next(self._batches, None)
            return None if batch is None else {"images": batch.numpy()}

    quant_pre_process(exact, folded, skip_symbolic_shape=True)
    # Of unsigned activations alone there are kernels that stay with integers from layer to layer.
    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
    exact_nodes = [node.name for node in onnx.load(folded).graph.node if node.op_type == "Softmax"]
    quantize_static(folded, target, Pictures(), nodes_to_exclude=exact_nodes, **kinds)
    session = InferenceSession(target, providers=["CPUExecutionProvider"])
    return lambda images: cast(NDArray[np.float32], session.run(None, {"images": images})[0])


def _torch(classifier: Classifier, model: Path, example: Tensor, target: Path) -> Check:
    shapes = {"images": {0: torch.export.Dim("batch")}}
    program = torch.export.export(_Deployed(classifier).eval(), (example,), dynamic_shapes=shapes)
    for node in program.graph.nodes:  # where in the source each came from, with this machine's paths
        node.meta.pop("stack_trace", None)
    archive = io.BytesIO()  # written straight to a full disk, torch ends the process
    torch.export.save(program, archive, extra_files=_metadata(classifier))
    target.write_bytes(archive.getvalue())
    restored = torch.export.load(io.BytesIO(target.read_bytes())).module()
    return lambda images: restored(torch.from_numpy(images)).detach().numpy()


def _ask(deployed: _Deployed) -> Check:
    def check(images: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            return deployed.eval()(torch.from_numpy(images)).numpy()  # type: ignore[no-any-return]

    return check


def _safetensors(classifier: Classifier, model: Path, example: Tensor, target: Path) -> Check:
    named = target.with_suffix(".safetensors")
    checkpoint.save_model(named, classifier.spec, classifier.network.state_dict())
    check = _ask(_Deployed(load(named, device="cpu")))
    named.replace(target)
    return check


def _hub(classifier: Classifier, model: Path, example: Tensor, target: Path) -> Check:
    figures = hub.read_figures(model, checkpoint.digest(classifier.network.state_dict()))
    hub.write_folder(classifier, figures, target)
    return _ask(_Deployed(classifier, hub.load_folder(target)))


FORMATS: dict[str, Callable[[Classifier, Path, Tensor, Path], Check]] = {
    "onnx": _onnx,
    "onnx-int8": _onnx_int8,
    "torch": _torch,
    "safetensors": _safetensors,
    "hub": _hub,
}
"""Each writes a classifier, whose own file is given, to a path, and returns how to ask what is written.

It may need example images, (B, 3, S, S) from 0 to 1; for those of `_INTEGERS` they are of the model's own kind.
"""

_INTEGERS = ("onnx-int8",)


_ENDINGS = {"onnx": (".onnx",), "onnx-int8": (".onnx",), "torch": (".pt2", ".pt"), "safetensors": (".safetensors",)}


def export(model: str, kind: str, output: str, images: str | None = None) -> Parity:
    """Write ``model`` in another format.

    Args:
        model: A ``.ckpt`` or ``.safetensors`` file of ours.
        kind: A key of `FORMATS`.
        output: The file, or for ``hub`` the new folder; it appears only when it agrees with the model.
        images: For ``onnx-int8``, a folder of pictures such as the model is for; by default its run's dataset.

    Raises:
        UserError: The model cannot be read, a package or pictures are missing, or the export disagrees with the model.
    """
    folder = _output_folder(Path(output), Path(model), kind)
    if images is not None and kind not in _INTEGERS:
        raise UserError(f"--images is for {' and '.join(_INTEGERS)}; {kind} needs no pictures")
    classifier = load(model, device="cpu")
    if kind in _INTEGERS:
        seen, unseen = np.array_split(_own_pictures(classifier, model, images), 2)
    else:
        unseen = _photographs(classifier)
        seen = unseen[:2]
    with torch.no_grad():
        expected = _Deployed(classifier).eval()(torch.from_numpy(unseen)).numpy()
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as temporary, _quiet():
        written = Path(temporary) / "model"
        check = FORMATS[kind](classifier, Path(model), torch.from_numpy(seen), written)
        # One image and many: the batch is free in the file.
        got = np.concatenate([check(unseen[:1]), check(unseen)[1:]])
        same = float((got.argmax(1) == expected.argmax(1)).mean())
        parity = Parity(float(np.abs(got - expected).max()), same, len(unseen))
        if kind in _INTEGERS and not same >= LEAST_AGREEMENT:
            raise UserError(
                f"export: the {kind} file says the model's class of {same:.0%} of {len(unseen)} pictures, less than "
                f"{LEAST_AGREEMENT:.0%}; it is not kept, take onnx"
            )
        if kind not in _INTEGERS and not parity.difference <= TOLERANCE:
            raise UserError(
                f"export: the {kind} file's probabilities differ from the model's by {parity.difference:.2g}, more "
                f"than {TOLERANCE:g}; it is not kept"
            )
        written.replace(Path(os.path.realpath(output)))
    return parity


def _output_folder(output: Path, model: Path, kind: str) -> Path:
    folder = output.absolute().parent
    if not folder.is_dir():
        raise UserError(f"--output: there is no folder {str(folder)!r}; make it first")
    check_writable("--output", output)
    if output.exists() and model.exists() and output.samefile(model):
        raise UserError(f"--output: {str(output)!r} is the model itself; name another file")
    if kind not in _ENDINGS:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UserError(f"--output: {str(output)!r} exists already; name a new folder")
        return folder
    if kind == "safetensors" and output.exists():  # which may be the only copy of another model
        raise UserError(f"--output: {str(output)!r} exists already; name a new file")
    check_output("--output", output, *_ENDINGS[kind])
    return folder


def _photographs(classifier: Classifier) -> NDArray[np.float32]:
    """Return four views (4, 3, S, S) from 0 to 1 of the two photographs that scikit-learn ships."""
    from sklearn.datasets import load_sample_images

    photos = [np.ascontiguousarray(image) for image in load_sample_images().images]
    views = [classifier.view(image) for photo in photos for image in (photo, np.ascontiguousarray(photo[::-1, ::-1]))]
    return (np.stack(views).transpose(0, 3, 1, 2) / 255).astype(np.float32)


def _own_pictures(classifier: Classifier, model: str, images: str | None) -> NDArray[np.float32]:
    """Return views (N, 3, S, S) from 0 to 1 of pictures that are drawn from a folder, always the same ones."""
    if images is not None and not Path(images).exists():
        raise UserError(f"--images: there is no folder {images!r}")
    where = images or checkpoint.load_model(model).data.root
    if where is None or not Path(where).exists():
        raise UserError(
            f"export: onnx-int8 needs pictures such as the model is for, and its dataset ({where or 'unknown'}) is not "
            "here; name a folder of some: --images DIR"
        )
    root, paths, _ = list_images(where)
    views: list[NDArray[np.uint8]] = []
    for i in np.random.default_rng(0).permutation(len(paths)):
        with contextlib.suppress(UserError):  # broken ones are not what this is about
            views.append(classifier.view(root / os.fsdecode(paths[int(i)])))
        if len(views) == _PICTURES:
            break
    if len(views) < _FEWEST:
        raise UserError(
            f"export: onnx-int8 needs at least {_FEWEST} pictures, {where} has {len(views)}; add --images DIR"
        )
    return (np.stack(views).transpose(0, 3, 1, 2) / np.float32(255)).astype(np.float32)

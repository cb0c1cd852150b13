"""Reading and writing models: the only place that deserialises.

``.safetensors`` files are for sharing: weights, with the `ModelSpec` as JSON in the metadata. ``.ckpt`` files are
Lightning's, for resuming: they are read with ``weights_only=True``, which accepts only tensors and plain values, and no
option changes that. A SHA-256 (in the metadata; in a ``.ckpt`` as the comment at the end of its zip archive) detects
damage that torch and safetensors would not. Writes are atomic: an interruption leaves the previous file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from rexnet_lit.data.settings import DataRecord
from rexnet_lit.models.spec import ModelSpec
from rexnet_lit.utils.errors import MissingFileError, UserError
from rexnet_lit.utils.files import atomic_write, expand_home

T = TypeVar("T")

KEY = "rexnet_lit"
"""The key of the model's description in a ``.ckpt`` and in the metadata of a ``.safetensors`` file."""

PREVIOUS = "last.previous.ckpt"
"""The generation before ``last.ckpt``."""

_DIGEST = f"{KEY}_sha256"
_SEAL = b"sha256:"
_SEAL_BYTES = len(_SEAL) + 64


@dataclasses.dataclass(frozen=True)
class Model:
    """The content of a model file.

    Args:
        path: The file.
        spec: The model's description.
        state: The network's weights.
        data: The dataset it was trained on, if the file names it.
    """

    path: Path
    spec: ModelSpec
    state: dict[str, Tensor]
    data: DataRecord


def write_ckpt(content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a Lightning checkpoint; keep the previous generation of ``last.ckpt``.

    Raises:
        UserError: The file cannot be written; the file that was at ``path`` is still there.
    """
    file = Path(expand_home(path))
    buffer = io.BytesIO()
    torch.save(content, buffer)  # into memory: on a full disk torch does not report the reason
    body = buffer.getbuffer()
    body[-2:] = _SEAL_BYTES.to_bytes(2, "little")  # the archive ends with the length of its comment, 0
    try:
        with atomic_write(file, file.with_name(PREVIOUS) if file.name == "last.ckpt" else None) as stream:
            stream.write(body)
            stream.write(_SEAL + hashlib.sha256(body).hexdigest().encode())
    except OSError as error:
        before = "the previous one is unchanged" if file.exists() else "there is no previous one"
        raise UserError(
            f"{file}: the checkpoint cannot be written ({error.strerror or error}); {before}: "
            "free some space, or set another trainer.default_root_dir, and resume"
        ) from None


def _intact(content: bytes) -> bool:
    """Whether a checkpoint is as it was written: by its SHA-256, or without one by zip's own checksums."""
    body, seal = content[:-_SEAL_BYTES], content[-_SEAL_BYTES:]
    if seal.startswith(_SEAL):
        return seal == _SEAL + hashlib.sha256(body).hexdigest().encode()
    if content[-22:-18] != b"PK\5\6":  # the end of an archive without a comment
        return False
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return archive.testzip() is None
    except zipfile.BadZipFile:
        return False


def _local_file(path: str | os.PathLike[str], key: str) -> Path:
    if "://" in os.fspath(path):
        raise UserError(f"{key}: {os.fspath(path)!r} is a URL; models are read from local files only")
    file = Path(expand_home(path))
    if file.is_dir():
        raise UserError(f"{key}: {os.fspath(path)!r} is a folder; name a model file, such as model.safetensors in it")
    if not file.is_file():
        raise MissingFileError(f"{key}: there is no file {os.fspath(path)!r}")
    if not os.access(file, os.R_OK):
        raise UserError(f"{key}: {os.fspath(path)!r} may not be read (permission denied)")
    return file


def read_ckpt(path: str) -> dict[str, Any]:
    """Read a Lightning checkpoint.

    Raises:
        UserError: It is missing, damaged, or holds anything but tensors and plain values.
    """
    file = _local_file(path, "ckpt_path")
    raw = file.read_bytes()
    if file.suffix == ".safetensors":
        raise UserError(
            f"{path}: a model, which cannot be resumed; start from it with model.weights, or give the trainer "
            "the module of RexNetModule.load_from_checkpoint(path), and no ckpt_path"
        )
    if raw.startswith(b"\x80"):  # torch's old format, or any pickle
        raise UserError(f"{path}: refused, it is a pickle, which could run code; use a checkpoint of rexnet_lit")
    if not _intact(raw):
        if file.suffix != ".ckpt":
            raise UserError(f"{path}: not a model of rexnet_lit; name a .ckpt or .safetensors file of a run")
        raise UserError(f"{path}: damaged or not a checkpoint (its checksum does not match); use another of the run")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such a file is refused below, with a reason
            content = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: refused, it holds pickled objects, which could run code; "
            "only checkpoints of tensors and plain values are read"
        ) from None
    except Exception as error:  # torch raises any kind on a crafted file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: damaged or not a checkpoint ({reason})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a checkpoint: it holds a {type(content).__name__}")
    return content


def read_record(checkpoint: Mapping[str, Any], where: str) -> tuple[ModelSpec, DataRecord]:
    """Return the descriptions of the model and the dataset in a Lightning checkpoint.

    Raises:
        UserError: rexnet_lit did not write it.
    """
    try:
        record = checkpoint[KEY]
        spec, data = ModelSpec.from_json(record["spec"], where), DataRecord(**json.loads(record["data"]))
    except (KeyError, TypeError, ValueError, RecursionError):
        raise UserError(f"{where}: not a checkpoint of rexnet_lit; it has no description of the model") from None
    return spec, data


def make_record(spec: ModelSpec, data: DataRecord) -> dict[str, str]:
    """Return what `read_record` reads: plain strings."""
    return {"spec": spec.to_json(), "data": json.dumps(dataclasses.asdict(data))}


def save_model(path: str | os.PathLike[str], spec: ModelSpec, state: Mapping[str, Tensor]) -> None:
    """Write a ``.safetensors`` file: the weights and their description, without the dataset."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in plain_names(state).items()}
    description = spec.to_json()
    metadata = {"format": "pt", KEY: description, _DIGEST: digest(tensors, description)}
    with atomic_write(Path(expand_home(path))) as file:
        file.write(serialise(tensors, metadata=metadata))


def digest(tensors: Mapping[str, Tensor], description: str = "") -> str:
    """Return a SHA-256 of a model's weights, whatever their order and device, and its description."""
    total = hashlib.sha256(description.encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"\0{name}\0{tensor.dtype}{tuple(tensor.shape)}\0".encode())
        total.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], str | None]:
    """Return the tensors, and the description's JSON if there is one."""
    try:
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged or not a safetensors file ({error})") from None
    description = metadata.get(KEY)
    if description is not None and metadata.get(_DIGEST, "") not in ("", digest(tensors, description)):
        raise UserError(f"{file}: damaged: its checksum does not match; use another copy, or the run's best.ckpt")
    return plain_names(tensors), description


def plain_names(state: Mapping[str, T]) -> dict[str, T]:
    """Return weights without what wrappers put before their names: ``torch.compile``, DDP and ``AveragedModel``."""
    names = {name: name.replace("_orig_mod.", "") for name in state if name != "n_averaged"}
    if all(name.startswith("module.") for name in names.values()):
        names = {name: plain.removeprefix("module.") for name, plain in names.items()}
    return {plain: state[name] for name, plain in names.items()}


def load_model(path: str | os.PathLike[str], key: str = "ckpt_path") -> Model:
    """Read a model of rexnet_lit: a ``.ckpt`` of a run or a ``.safetensors`` file.

    Args:
        path: The file.
        key: The setting that names it, for the errors.

    Raises:
        UserError: It is missing, damaged, unsafe, of a newer format, or not of rexnet_lit.
    """
    file = _local_file(path, key)
    if file.suffix == ".safetensors":
        state, description = _read_safetensors(file)
        if description is None:
            raise UserError(
                f"{file}: not a model of rexnet_lit (no description in its metadata); to start from these weights, "
                "use fit with model.weights"
            )
        return Model(file, ModelSpec.from_json(description, str(file)), state, _run_data(file))
    content = read_ckpt(str(file))
    spec, data = read_record(content, str(file))
    return Model(file, spec, network_weights(content, str(file)), data)


def network_weights(checkpoint: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """Return the weights of the network in a Lightning checkpoint.

    Raises:
        UserError: It has none.
    """
    tensors, prefix = checkpoint.get("state_dict"), "network."
    pairs = tensors.items() if isinstance(tensors, dict) else ()
    state = {name.removeprefix(prefix): t for name, t in pairs if isinstance(name, str) and name.startswith(prefix)}
    state = plain_names(state)
    if not state or not all(map(_is_dense_tensor, state.values())):
        raise UserError(f"{where}: it holds no weights of a network; use another checkpoint of the run")
    return state


def _is_dense_tensor(value: object) -> bool:
    if not isinstance(value, Tensor) or value.is_nested or value.is_quantized:
        return False
    return value.layout is torch.strided and value.device.type == "cpu"


def _run_data(file: Path) -> DataRecord:
    """Return the dataset that the run folder of a shared model file was trained on, if it is in one."""
    for name in ("last.ckpt", "best.ckpt"):
        with contextlib.suppress(UserError, OSError):
            path = str(file.parent / "checkpoints" / name)
            return read_record(read_ckpt(path), path)[1]
    return DataRecord()


def load_starting_weights(path: str, key: str = "model.weights") -> tuple[dict[str, Tensor], ModelSpec | None]:
    """Return the weights in a file that ``key`` names, and their description unless it is a timm state dict."""
    file = _local_file(path, key)
    if file.suffix != ".safetensors":
        model = load_model(file, key)
        return model.state, model.spec
    state, description = _read_safetensors(file)
    return state, ModelSpec.from_json(description, path) if description is not None else None

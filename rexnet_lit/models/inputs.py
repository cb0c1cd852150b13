"""What a `Classifier` takes for an image: a file, its bytes, an image or array of another library; one or several.

All kinds become the pixels that training would see, by `data.decode`. What is no image is a `UserError` that says what
to pass instead.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from rexnet_lit.data import decode, image_file, image_header
from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.files import expand_home

ImageLike: TypeAlias = "str | os.PathLike[str] | bytes | IO[bytes] | Image.Image | NDArray[Any] | torch.Tensor"
"""One image:

- a path;
- the content of an image file: bytes, or a binary file object, which is read from its start;
- a PIL image;
- an array (H, W) or (H, W, C), C in 1, 3, 4, of uint8, uint16, bool or floats from 0 to 1. Colours are RGB or RGBA:
  OpenCV's ``imread`` gives BGR, which cannot be detected; pass the path, or ``image[..., ::-1]``;
- a tensor, as torchvision has it: (H, W) or (C, H, W) of the same types, on any device, not normalised.

Only a file may be a JPEG of more than 80 megapixels, because it is decoded at a fraction of its size.
"""

Images: TypeAlias = "ImageLike | Iterable[ImageLike]"
"""One image, or several: a list, a generator such as ``Path.glob``, an array (N, H, W, C), a tensor (N, C, H, W)."""

_CHANNELS = (1, 3, 4)
_LOADING = threading.Lock()  # Pillow reads an open file on first use, which two threads must not do at once


def each(images: Images) -> tuple[Iterator[ImageLike], bool]:
    """Return the images one by one, and whether one image was given by itself."""
    if isinstance(images, np.ndarray):
        one = images.ndim != 4 and images.dtype.kind not in "OSU"  # arrays of paths are lists
    elif isinstance(images, torch.Tensor):
        one = images.ndim != 4
    else:
        single = isinstance(images, str | bytes | bytearray | memoryview | os.PathLike | Image.Image | Mapping)
        one = single or hasattr(images, "read") or not isinstance(images, Iterable)
    return iter(cast("Iterable[ImageLike]", [images] if one else images)), one


def pixels(image: ImageLike, min_size: int) -> NDArray[np.uint8]:
    """Return an image of any kind as uint8 (H, W, 3) RGB, by the same rules as training.

    Args:
        image: The image.
        min_size: How many pixels the shorter side of a JPEG must keep.

    Raises:
        UserError: It cannot be read, or is no image.
    """
    try:
        if isinstance(image, str | os.PathLike):
            return decode.decode(image_file.read_bytes(expand_home(image)), min_size, thorough=True)
        if isinstance(image, np.ndarray):
            return _from_array(image)
        if isinstance(image, torch.Tensor):
            return _from_tensor(image)
        if isinstance(image, Image.Image):
            return _from_pil(image)
        if isinstance(image, bytes | bytearray | memoryview):
            return decode.decode(bytes(image), min_size, thorough=True)
        if hasattr(image, "read"):
            return decode.decode(_content(image), min_size, thorough=True)
    except image_header.DecodeError as error:
        raise UserError(f"{_name(image)}: cannot be read as an image ({error}){_advice(image)}") from None
    expected = "expected a path, bytes, a file object, a PIL image, an array or a tensor"
    raise UserError(f"a {type(image).__name__} is not an image; {_advice(image).removeprefix('; ') or expected}")


def _from_array(array: NDArray[Any]) -> NDArray[np.uint8]:
    if array.ndim == 3 and array.shape[2] not in _CHANNELS and array.shape[0] in _CHANNELS:
        channels_last = "in arrays the channels come last: pass array.transpose(1, 2, 0)"
        raise image_header.DecodeError(f"{array.dtype} {array.shape}; {channels_last}")
    return decode.from_array(array)


def _from_tensor(tensor: torch.Tensor) -> NDArray[np.uint8]:
    shape = tuple(tensor.shape)
    if tensor.ndim not in (2, 3) or (tensor.ndim == 3 and shape[0] not in _CHANNELS):
        hint = "; pass tensor.permute(2, 0, 1)" if tensor.ndim == 3 and shape[2] in _CHANNELS else ""
        raise image_header.DecodeError(f"tensor {shape}; expected (H, W), or (C, H, W) with C in 1, 3, 4{hint}")
    tensor = tensor.detach().cpu()
    array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()  # numpy has no bfloat16
    return decode.from_array(array if array.ndim == 2 else array.transpose(1, 2, 0))


def _from_pil(image: Image.Image) -> NDArray[np.uint8]:
    image_header.check_size(*image.size, image.format or "image")
    with _LOADING, contextlib.suppress(Exception):  # from_pil says why
        image.load()
    return decode.from_pil(image)


def _content(file: Any) -> bytes:
    """Return the content of a file object from its start, as Pillow reads it: after writing, its position is the end.

    Raises:
        DecodeError: It cannot be read, is too large, or was opened as text.
    """
    try:
        if getattr(file, "seekable", bool)():
            file.seek(0)
        data = file.read(image_file.MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise image_header.DecodeError(str(error) or type(error).__name__) from None
    if not isinstance(data, bytes | bytearray):
        kind = "text; open it in binary mode: open(path, 'rb')" if isinstance(data, str) else type(data).__name__
        raise image_header.DecodeError(f"read() returns {kind}")
    if len(data) > image_file.MAX_BYTES:
        raise image_header.DecodeError(f"more than {image_file.MAX_BYTES // 2**20} MiB")
    return bytes(data)


def _name(image: object) -> str:
    if isinstance(image, str | os.PathLike):
        return os.fspath(image)
    if isinstance(image, bytes | bytearray | memoryview):
        return "these bytes"
    name = getattr(image, "filename", "") or getattr(image, "name", "")
    return name if isinstance(name, str) and name else f"this {type(image).__name__}"


def _advice(image: object) -> str:
    """Return what to pass instead of something that is often mistaken for an image."""
    if isinstance(image, Mapping):
        return "; pass the images in it: row['image'], or list(images.values())"
    if image is None:
        return "; cv2.imread returns None for a file that it cannot read"
    if isinstance(image, str | os.PathLike):
        text = os.fspath(image)
        if re.match(r"data:\w+/", text):
            return "; pass the bytes: base64.b64decode(text.partition(',')[2])"
        if re.match(r"\w[\w+.-]+:/", text):
            return "; URLs are not opened: download it, and pass the file or its bytes"
        if os.path.isdir(expand_home(text)):  # noqa: PTH112 - Path accepts no null bytes
            return "; for the images in a folder pass sorted(Path(folder).rglob('*.jpg'))"
    return ""

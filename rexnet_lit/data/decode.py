"""The one image reader: bytes of a file in, ``uint8 (H, W, 3)`` RGB out.

Every rule about image files lives here, so training, evaluation and prediction see the same pixels:

- Format: by content, never by name. JPEG, PNG, WebP, BMP, TIFF and GIF; everything else is refused and named.
- Size: at most `MAX_BYTES` bytes and `MAX_PIXELS` pixels, read from the header before anything is decoded.
- Orientation: the EXIF (or TIFF) orientation is applied.
- Transparency: composited on `BACKGROUND`, so colour hidden under alpha 0 never reaches the network.
- Palette, 1-bit, greyscale: expanded to three channels. CMYK and YCCK: ``(1 - C)(1 - K)`` and so on. ICC
  profiles and gamma chunks are not applied, as in timm and torchvision.
- 9 to 16 bits a sample: scaled, white to 255, rounded (not clipped, as Pillow's ``convert`` does).
- Floating point TIFF: values must be finite and within [0, 1], and are scaled by 255; anything else would
  make a picture's brightness depend on a guess. 32-bit integers are refused: they have no agreed white.
- Animations and pages: the first one.
- Damage: a file that ends early is refused; bytes behind a picture's end are common, and ignored. PNG
  checksums are verified.

OpenCV decodes the ordinary files, Pillow the odd ones; where both can, they agree bit for bit. Large JPEGs
are decoded at a fraction of their size when the caller says how many pixels it needs: what the eval recipe makes
of scikit-learn's photographs at 224 px then differs from full decoding by half a level to one of 255 on average.
"""

from __future__ import annotations

import functools
import io
import os
import stat
import struct
import warnings
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from rexnet_lit.data.image_header import (
    DecodeError,
    Header,
    ImageInfo,
    check_size,
    exif_orientation,
    read_header,
    sniff,
    without_orientation,
)

RULES = f"1 {cv2.__version__} {PIL.__version__}"
"""What is kept of decoded files holds for these decoders; others may see other pixels, or judge differently."""

MAX_BYTES = 256 * 1024 * 1024
BACKGROUND = (255, 255, 255)
"""White, as on the page where a transparent picture is usually seen. `_composite` relies on it."""

Pixels = NDArray[Any]  # OpenCV's types do not say which kind of number they hold

_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF tags
_WHITE_IS_ZERO = 0

# Threads come from the DataLoader's workers; OpenCV's own would multiply with them.
cv2.setNumThreads(0)
# What is wrong with a file is in the DecodeError; OpenCV 4 and 5 keep the switch in different places.
(cv2.utils.logging if hasattr(cv2.utils, "logging") else cv2).setLogLevel(0)
# Pillow's remarks on odd metadata name no file, and its limit on size is replaced by ours.
warnings.filterwarnings("ignore", module=r"PIL\.")


def read(path: str | os.PathLike[str], min_size: int | None = None) -> NDArray[np.uint8]:
    """Read and decode a file; see `decode`.

    Raises:
        DecodeError: The file cannot be read, or is no usable image.
    """
    return decode(read_bytes(path), min_size)


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Return a regular file's content, if it is not larger than `MAX_BYTES`.

    Raises:
        DecodeError: The file is missing, not a file, too large, or cannot be read.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 - called once per sample: no Path objects
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
            raise DecodeError("not a regular file")
        if status.st_size > MAX_BYTES:
            raise DecodeError(f"{status.st_size / 2**20:,.0f} MiB; the limit is {MAX_BYTES // 2**20} MiB")
        with open(path, "rb") as file:  # noqa: PTH123
            return file.read(MAX_BYTES)
    except (OSError, ValueError, MemoryError) as error:
        raise DecodeError(getattr(error, "strerror", None) or type(error).__name__) from None


def probe(data: bytes) -> ImageInfo:
    """Read a file's header only.

    Raises:
        DecodeError: It is no image of an allowed format, or too large.
    """
    try:
        header = _header(data)
        frames = header.frames
        if header.format in ("GIF", "TIFF"):
            frames = int(getattr(_open(header, data), "n_frames", 1))
        swapped = exif_orientation(header.exif) >= 5
    except DecodeError:
        raise
    except Exception as error:
        raise DecodeError(_reason(data, error)) from None
    size = (header.height, header.width) if swapped else (header.width, header.height)
    return ImageInfo(header.format, *size, frames=frames)


def decode(data: bytes, min_size: int | None = None, *, thorough: bool = False) -> NDArray[np.uint8]:
    """Decode an image.

    Args:
        data: The content of an image file.
        min_size: How many pixels the shorter side must keep at least. A JPEG is then decoded at the smallest
            of 1/8, 1/4, 1/2 and 1/1 that keeps them; other formats, and smaller pictures, come at full size.
        thorough: Also look for JPEG data lost before the end marker, which no decoder reports. It costs two
            more decodings of pictures that end in mid-grey; meant for the check before training.

    Returns:
        ``uint8 (H, W, 3)`` RGB, C-contiguous and writable.

    Raises:
        DecodeError: It is no usable image. No other exception leaves this function.
    """
    try:
        header = _header(data)
        scale = _jpeg_scale(header, min_size)
        # libjpeg in OpenCV writes what it dislikes on stderr; Pillow's is silent, and here no slower.
        quiet = thorough and header.format == "JPEG"
        pixels = None if quiet else _by_opencv(header, data, scale)
        if pixels is None:
            pixels = _by_pillow(header, data, scale)
        if thorough and _lost_tail(header, data, pixels, scale):
            raise DecodeError("truncated JPEG (data missing before its end)")
        return np.ascontiguousarray(_turn(pixels, exif_orientation(header.exif)), dtype=np.uint8)
    except DecodeError:
        raise
    except Exception as error:  # decoders raise anything on damaged files, MemoryError included
        raise DecodeError(_reason(data, error)) from None


def from_pil(image: Image.Image) -> NDArray[np.uint8]:
    """Bring an image that is already open to the same pixels as its file would come to.

    Raises:
        DecodeError: It is no usable image.
    """
    try:
        check_size(*image.size, image.format or "image")
        # As in `decode`: not what XMP says, which Pillow would follow too. Pillow turns its TIFFs itself.
        return _turn(_pillow_to_rgb(image), exif_orientation(image.info.get("exif", b"")))
    except DecodeError:
        raise
    except Exception as error:
        raise DecodeError(_reason(b"", error)) from None


def from_array(image: NDArray[Any]) -> NDArray[np.uint8]:
    """Bring an array to the same pixels as a file that holds it would come to.

    Args:
        image: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8, uint16, bool, or floats from 0 to 1.

    Raises:
        DecodeError: It is no such array.
    """
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    shaped = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))
    whole = image.dtype.kind == "u" and image.dtype.itemsize <= 2
    if not shaped or not image.size or not (whole or image.dtype.kind in "bf"):
        expected = "(H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8, uint16, bool or float"
        raise DecodeError(f"{image.dtype} {image.shape}; expected {expected}")
    if image.dtype.kind in "bf":
        image = _from_unit(image)
    elif image.dtype.itemsize == 2:
        image = _to_8_bits(65535)[image]
    return from_pil(Image.fromarray(image))


def _from_unit(values: NDArray[Any]) -> Pixels:
    """Scale values from 0 to 1."""
    rounding = 1e-6
    if not np.isfinite(values).all() or values.min() < -rounding or values.max() > 1 + rounding:
        raise DecodeError(f"floating point values from {values.min():g} to {values.max():g}; expected 0 to 1")
    return np.round(values.astype(np.float32).clip(0, 1) * 255).astype(np.uint8)


def _header(data: bytes) -> Header:
    """Read a header, and refuse what is too large.

    A TIFF's directory is read by Pillow, which decodes nothing yet.
    """
    if sniff(data) != "TIFF":
        return read_header(data)
    image = TiffImagePlugin.TiffImageFile(io.BytesIO(data))
    check_size(*image.size, "TIFF")
    tags = image.tag_v2
    if image.mode in ("RGB", "RGBA") and set(tags.get(_BITS_PER_SAMPLE, (8,))) == {16}:
        # Pillow keeps only the high byte of these colours, so they are OpenCV's. Pillow turns its TIFFs
        # itself, OpenCV some of them: it is shown an upright one. A TIFF begins as EXIF data does.
        width, height, upright = int(tags[256]), int(tags[257]), without_orientation(data)
        return Header("TIFF", width, height, exif=data, kind="deep", stripped=upright)
    return Header("TIFF", *image.size)


def _reason(data: bytes, error: Exception) -> str:
    """Name a decoder's exception in a few words."""
    name = sniff(data) or "image"
    text = str(error)
    if isinstance(error, MemoryError):
        return f"{name} needs more memory than there is"
    if isinstance(error, (EOFError, IndexError, struct.error)) or "truncated" in text.lower():
        return f"truncated {name}"
    first_line = "".join(c if " " <= c <= "~" else " " for c in text)[:80].strip()
    return f"damaged {name}" + (f" ({first_line})" if first_line else "")


def _jpeg_scale(header: Header, min_size: int | None) -> int:
    """Return the largest divisor of a JPEG's size that keeps `min_size` pixels on the shorter side."""
    if header.format != "JPEG" or min_size is None:
        return 1
    short = min(header.width, header.height)
    return next((n for n in (8, 4, 2) if -(-short // n) >= min_size), 1)


_RGB = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
# IMREAD_REDUCED_COLOR_n asks for BGR in its lowest bit.
_SCALED = {
    1: _RGB,
    2: _RGB | (cv2.IMREAD_REDUCED_COLOR_2 & ~cv2.IMREAD_COLOR_BGR),
    4: _RGB | (cv2.IMREAD_REDUCED_COLOR_4 & ~cv2.IMREAD_COLOR_BGR),
    8: _RGB | (cv2.IMREAD_REDUCED_COLOR_8 & ~cv2.IMREAD_COLOR_BGR),
}


def _by_opencv(header: Header, data: bytes, scale: int) -> Pixels | None:
    """Decode what OpenCV decodes right; None where it should be left to Pillow."""
    if header.kind == "odd":
        return None
    flags = _SCALED[scale] if header.kind == "plain" else cv2.IMREAD_UNCHANGED
    pixels = cv2.imdecode(np.frombuffer(header.stripped or data, np.uint8), flags)
    if pixels is None or header.kind == "plain":
        return pixels
    if header.kind == "deep":
        pixels = _from_deep(header, pixels)
    if pixels.ndim == 2:
        return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)
    if pixels.shape[2] == 4:
        return _composite(cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGBA))
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def _from_deep(header: Header, pixels: Pixels) -> Pixels:
    """Scale OpenCV's 16-bit samples; a PNG's transparent grey, which OpenCV drops, becomes the background."""
    shallow = _to_8_bits(65535)[pixels]
    if header.trns and pixels.ndim == 2:
        shallow[pixels == int.from_bytes(header.trns[:2], "big")] = BACKGROUND[0]
    return shallow


@functools.lru_cache(maxsize=8)
def _to_8_bits(white: int) -> Pixels:
    """Return the table that maps ``0 .. white`` to ``0 .. 255``."""
    return np.minimum(np.round(np.arange(65536) * (255 / white)), 255).astype(np.uint8)


def _composite(rgba: Pixels) -> Pixels:
    """Lay ``(H, W, 4)`` on white: ``255 - (255 - c) * alpha / 255``, rounded.

    Four times as fast as the same in numpy, and exact for all values.
    """
    ink = cv2.bitwise_not(cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB))
    alpha = cv2.cvtColor(np.ascontiguousarray(rgba[..., 3]), cv2.COLOR_GRAY2RGB)
    return cv2.bitwise_not(cv2.multiply(ink, alpha, scale=1 / 255))


def _open(header: Header, data: bytes) -> ImageFile.ImageFile:
    """Open with the one plugin that is meant: no registry, no other format, no check of Pillow's own."""
    openers: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
        "JPEG": JpegImagePlugin.JpegImageFile,
        "PNG": PngImagePlugin.PngImageFile,
        "WEBP": WebPImagePlugin.WebPImageFile,
        "BMP": BmpImagePlugin.BmpImageFile,
        "TIFF": TiffImagePlugin.TiffImageFile,
        "GIF": GifImagePlugin.GifImageFile,
    }
    return openers[header.format](io.BytesIO(header.stripped or data))


def _by_pillow(header: Header, data: bytes, scale: int) -> Pixels:
    image = _open(header, data)
    check_size(*image.size, header.format)
    if scale > 1:
        image.draft(None, (max(image.width // scale, 1), max(image.height // scale, 1)))
    image.load()
    return _pillow_to_rgb(image)


def _pillow_to_rgb(image: Image.Image) -> Pixels:
    """Apply the rules on depth, transparency and colour of the module's docstring."""
    if image.mode == "F":
        return cv2.cvtColor(_from_unit(np.asarray(image)), cv2.COLOR_GRAY2RGB)
    if image.mode == "I":
        raise DecodeError("32-bit or signed integer samples; save as 8 or 16 bits")
    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})
        grey: Pixels = _to_8_bits(2 ** int(tags.get(_BITS_PER_SAMPLE, (16,))[0]) - 1)[np.asarray(image)]
        grey = 255 - grey if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else grey
        return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
    if image.has_transparency_data:
        rgba = np.array(image.convert("RGBA"))
        if image.format == "BMP" and not rgba[..., 3].any():  # Windows programs leave the fourth byte 0
            return np.ascontiguousarray(rgba[..., :3])
        return _composite(rgba)
    return np.array(image.convert("RGB"))


def _lost_tail(header: Header, data: bytes, pixels: Pixels, scale: int) -> bool:
    """Say whether a JPEG's data ended before its picture did, although an end marker follows.

    The decoder fills what is missing with mid-grey. So where the last pixel is just that, noise is put in
    front of the end marker: a complete picture does not change.
    """
    if not header.scan or (pixels[-1, -1] != 128).any():
        return False
    noise = bytes(range(1, 250)) * 2
    filler = b"".join(noise + bytes([0xFF, 0xD0 + n % 8]) for n in range(16))
    longer = data[: data.find(b"\xff\xd9", header.scan)] + filler + b"\xff\xd9"
    return not np.array_equal(_by_pillow(header, data, scale), _by_pillow(header, longer, scale))


def _turn(pixels: Pixels, orientation: int) -> Pixels:
    """Turn and mirror so that the picture stands upright."""
    if orientation == 1:
        return pixels
    turns: dict[int, Callable[[Pixels], Pixels]] = {
        2: lambda x: cv2.flip(x, 1),
        3: lambda x: cv2.rotate(x, cv2.ROTATE_180),
        4: lambda x: cv2.flip(x, 0),
        5: cv2.transpose,
        6: lambda x: cv2.rotate(x, cv2.ROTATE_90_CLOCKWISE),
        7: lambda x: cv2.flip(cv2.transpose(x), -1),
        8: lambda x: cv2.rotate(x, cv2.ROTATE_90_COUNTERCLOCKWISE),
    }
    return turns[orientation](pixels)

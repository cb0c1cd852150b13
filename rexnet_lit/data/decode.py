"""The one image reader: the bytes of a file in, ``uint8 (H, W, 3)`` RGB out.

All rules about image files are here, so training, evaluation and prediction see the same pixels:

- Format: detected by content, never by name. JPEG, PNG, WebP, BMP, TIFF and GIF; others are refused by name.
- Size: at most `image_file.MAX_BYTES` bytes, and `MAX_PIXELS` pixels according to the header, which is read first. A
  JPEG may have `MAX_JPEG_PIXELS` (progressive: `MAX_PIXELS_IN_SCANS`); it is then decoded at a fraction of at most
  `MAX_PIXELS`.
- Orientation: the EXIF (or TIFF) orientation is applied; XMP is ignored.
- Transparency: composited on `BACKGROUND`, so colours hidden under alpha 0 never reach the network.
- Palette, 1-bit and greyscale images get three channels. CMYK and YCCK: ``(1 - C)(1 - K)`` and so on. ICC
  profiles and gamma chunks are not applied, as in timm and torchvision.
- 9 to 16 bits per sample are scaled so that white is 255, and rounded (Pillow's ``convert`` clips them). Cameras and
  scanners of 10, 12 or 14 bits save their values in 16: there white is the largest value of 8, 10, 12, 14 or 16 bits,
  the fewest that hold all values of the image. Files with transparency use 16. What a file says about this is not
  used: PNG requires samples that sBIT describes to be scaled to 16 bits already, and TIFF's tag is rarely right.
- Floating point TIFF: values must be finite and within [0, 1], and are scaled by 255; any other rule would be a
  guess. 32-bit integers are refused: there is no common value for white.
- Animations and multi-page files: the first frame.
- Damage: truncated files are refused and PNG checksums verified; bytes after the end of the image are common and
  ignored.

Pillow reads all headers. It also decodes, except where OpenCV gives the same pixels in less time (0.8 of Pillow's for
JPEG, 0.4 to 0.7 for opaque PNG, 0.4 for opaque lossy WebP), and 16-bit colours, of which Pillow keeps only the high
byte. JPEGs are decoded at a fraction of their size when the caller needs fewer pixels: with the eval recipe at 224 px,
scikit-learn's photographs then differ from full decoding by half a level to one of 255 on average.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any, cast

import cv2
import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, JpegImagePlugin, TiffImagePlugin

from rexnet_lit.data.image_file import read_bytes
from rexnet_lit.data.image_header import (
    MAX_PIXELS,
    MAX_PIXELS_IN_SCANS,
    DecodeError,
    ImageInfo,
    check_size,
    critical_chunks,
    failure_reason,
    open_header,
    webp_size,
)

RULES = f"3 {cv2.__version__} {PIL.__version__}"
"""Part of the key of everything cached: other versions may decode other pixels, or accept other files."""

BACKGROUND = (255, 255, 255)
"""White, as on the page where a transparent image is usually seen. `_composite` relies on it."""

Pixels = NDArray[Any]  # OpenCV's stubs do not name the type of the elements

_MAX_SCANS = 500  # of a progressive JPEG, which usually has ten: each decodes the whole image again
_WHITE_IS_ZERO = 0
_USED_BITS = "rexnet_lit_used_bits"  # in the facts that Pillow keeps of an image

# The DataLoader has its own workers; each would otherwise start OpenCV's threads.
cv2.setNumThreads(0)
# A DecodeError has the reason. OpenCV 4 and 5 keep this switch in different places.
(cv2.utils.logging if hasattr(cv2.utils, "logging") else cv2).setLogLevel(0)
# Pillow's warnings about metadata name no file, and those about large images are replaced by `MAX_PIXELS`.
warnings.filterwarnings("ignore", module=r"PIL\.")


def read(path: str | os.PathLike[str], min_size: int | None = None) -> NDArray[np.uint8]:
    """Read and decode a file; see `decode`.

    Raises:
        DecodeError: The file cannot be read, or is not a usable image.
    """
    return decode(read_bytes(path), min_size)


def decode(data: bytes, min_size: int | None = None, *, thorough: bool = False) -> NDArray[np.uint8]:
    """Decode an image.

    Args:
        data: The content of an image file.
        min_size: How many pixels the shorter side must keep. A JPEG is decoded at the smallest of 1/8, 1/4, 1/2
            and 1/1 of its size that keeps them; other formats are decoded at full size.
        thorough: Also detect JPEG data that is missing before the end marker, which decoders do not report. This
            decodes images that end in mid-grey two more times; meant for the check before training.

    Returns:
        ``uint8 (H, W, 3)`` RGB, C-contiguous and writable.

    Raises:
        DecodeError: It is not a usable image. No other exception leaves this function.
    """
    return decode_with_info(data, min_size, thorough=thorough)[0]


def decode_with_info(
    data: bytes, min_size: int | None = None, *, thorough: bool = False
) -> tuple[NDArray[np.uint8], ImageInfo]:
    """Decode an image, and return the facts from its header too (``frames`` is 1); see `decode`."""
    try:
        exif = None
        if _is_plain_webp(data):
            plain = _imdecode(data)
            if plain is not None:
                return plain, ImageInfo("WEBP", plain.shape[1], plain.shape[0])
        if data.startswith(b"\x89PNG"):
            data, exif = critical_chunks(data)
        image = open_header(data)
        if exif is not None:
            image.info["exif"] = exif
        width, height = image.size
        if isinstance(image, JpegImagePlugin.JpegImageFile):
            pixels = _decode_jpeg(image, data, min_size, thorough)
        else:
            pixels = _decode_other(image, data)
        orientation = _orientation(image)
        width, height = (height, width) if orientation >= 5 else (width, height)
        upright = np.ascontiguousarray(_apply_orientation(pixels, orientation), dtype=np.uint8)
    except DecodeError:
        raise
    except Exception as error:  # decoders raise anything on damaged files, MemoryError included
        raise DecodeError(failure_reason(data, error)) from None
    return upright, ImageInfo(str(image.format), width, height, used_bits=image.info.get(_USED_BITS, 0))


def count_frames(data: bytes) -> int:
    """Return how many frames or pages a file has; 1 where they cannot be counted."""
    try:
        return int(getattr(open_header(data), "n_frames", 1))
    except Exception:
        return 1


def from_pil(image: Image.Image) -> NDArray[np.uint8]:
    """Return the pixels that `decode` would return for the file of an open image.

    Raises:
        DecodeError: It is not a usable image.
    """
    try:
        check_size(*image.size, image.format or "image")
        return _apply_orientation(_pillow_to_rgb(image), _orientation(image))
    except DecodeError:
        raise
    except Exception as error:
        raise DecodeError(failure_reason(b"", error)) from None


def from_array(image: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the pixels that `decode` would return for a file that holds this array.

    Args:
        image: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8, uint16, bool, or floats from 0 to 1.

    Raises:
        DecodeError: The array has another shape, type or range.
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
        image = _to_8_bits(16 if image.shape[-1] == 4 and image.ndim == 3 else _used_bits(image))[image]
    return from_pil(Image.fromarray(image))


# IMREAD_REDUCED_COLOR_n has BGR in its lowest bit.
_SCALED = {
    divisor: (flag & ~cv2.IMREAD_COLOR_BGR) | cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    for divisor, flag in (
        (1, 0),
        (2, cv2.IMREAD_REDUCED_COLOR_2),
        (4, cv2.IMREAD_REDUCED_COLOR_4),
        (8, cv2.IMREAD_REDUCED_COLOR_8),
    )
}


def _imdecode(data: bytes, scale: int = 1) -> NDArray[np.uint8] | None:
    """Decode to RGB with OpenCV; None if it cannot."""
    return cast("NDArray[np.uint8] | None", cv2.imdecode(np.frombuffer(data, np.uint8), _SCALED[scale]))


def _decode_jpeg(image: JpegImagePlugin.JpegImageFile, data: bytes, min_size: int | None, thorough: bool) -> Pixels:
    """Decode a JPEG at the smallest scale that keeps ``min_size``, if it ends with an end marker."""
    start = image.fp.tell() if image.fp else 0  # of the first scan
    # In a scan 0xFF is always followed by a marker or 0x00, so what looks like an end marker is one. It is
    # searched from the back because many files have other data after it (a video, a depth map).
    if data.rfind(b"\xff\xd9", start) < 0:
        raise DecodeError("truncated JPEG")
    end = data.find(b"\xff\xd9", start)
    (width, height), progressive = image.size, "progressive" in image.info
    if progressive and data.count(b"\xff\xda", start, end) > _MAX_SCANS:
        raise DecodeError(f"JPEG of more than {_MAX_SCANS} scans")
    if width * height > MAX_PIXELS_IN_SCANS and (progressive or data.find(b"\xff\xda", start, end) >= 0):
        check_size(width, height, "JPEG", MAX_PIXELS_IN_SCANS)
    scale = 1
    if min_size is None:
        check_size(width, height, "JPEG")
    else:
        wanted = next((n for n in (8, 4, 2) if -(-min(width, height) // n) >= min_size), 1)
        scale = next(n for n in (wanted, 2, 4, 8) if n >= wanted and width * height <= MAX_PIXELS * n**2)
    if not thorough and image.mode in ("L", "RGB"):
        pixels = _imdecode(data, scale)
        if pixels is not None:
            return pixels
    pixels = _load(image, scale)  # libjpeg in OpenCV writes warnings to stderr, Pillow's does not
    if thorough and not progressive and (pixels[-1, -1] == 128).all() and _misses_data(data, end, scale):
        raise DecodeError("truncated JPEG (data missing before its end)")
    return pixels


def _decode_other(image: ImageFile.ImageFile, data: bytes) -> Pixels:
    if _has_deep_colours(image):
        return _decode_deep(image, data)
    if image.format == "PNG" and image.mode in ("1", "L", "P", "RGB") and not image.has_transparency_data:
        pixels = _imdecode(data)
        if pixels is not None:
            return pixels
    return _load(image)


def _is_plain_webp(data: bytes) -> bool:
    """Return whether a file is a lossy WebP without transparency, animation and EXIF data, and not too large.

    Pillow would allocate a canvas for an animation, although it only reads the header.
    """
    if data[:4] != b"RIFF" or data[8:15] != b"WEBPVP8" or len(data) < 30 or b"EXIF" in data:
        return False
    is_still = data[15:16] == b" " or (data[15:16] == b"X" and not data[20] & 0x12 and b"VP8L" not in data)
    if not is_still or int.from_bytes(data[4:8], "little") + 8 > len(data):
        return False
    check_size(*webp_size(data), "WEBP")
    return True


def _misses_data(data: bytes, end: int, scale: int) -> bool:
    """Return whether a JPEG's data stops before its last block, although an end marker follows.

    Decoders fill missing blocks with mid-grey. Noise before the end marker changes them, but no complete image.
    """
    noise = bytes(range(1, 250)) * 2
    filler = b"".join(noise + bytes([0xFF, 0xD0 + n % 8]) for n in range(16))
    longer = data[:end] + filler + b"\xff\xd9"
    return not np.array_equal(_load(open_header(data), scale), _load(open_header(longer), scale))


def _load(image: ImageFile.ImageFile, scale: int = 1) -> Pixels:
    """Decode with Pillow, a JPEG at 1 / ``scale`` of its size."""
    if scale > 1:
        image.draft(None, (max(image.width // scale, 1), max(image.height // scale, 1)))
    image.load()
    if image.mode.startswith("I;16") and _declared_bits(image) == 16:
        image.info[_USED_BITS] = _used_bits(np.asarray(image))
    return _pillow_to_rgb(image)


def _has_deep_colours(image: ImageFile.ImageFile) -> bool:
    """Return whether an image has colours (or grey and alpha) of 16 bits, of which Pillow keeps 8."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (8,))
        return image.mode in ("RGB", "RGBA") and set(bits) == {16}
    return image.format == "PNG" and str(image.tile[0].args) in ("RGB;16B", "LA;16B", "RGBA;16B")


def _decode_deep(image: ImageFile.ImageFile, data: bytes) -> Pixels:
    """Decode 16-bit colours with OpenCV, which applies the orientation of TIFFs itself."""
    deep = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if deep is None:
        raise DecodeError("damaged image of 16 bits per sample")
    opaque = deep.ndim == 3 and deep.shape[2] == 3
    if opaque:
        image.info[_USED_BITS] = _used_bits(deep)
    pixels: Pixels = _to_8_bits(image.info.get(_USED_BITS, 16))[deep]
    if pixels.ndim == 2:
        return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)
    if pixels.shape[2] == 4:
        return _composite(cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGBA))
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def _pillow_to_rgb(image: Image.Image) -> Pixels:
    """Apply the rules on depth, transparency and colour of the module's docstring."""
    if image.mode == "F":
        return cv2.cvtColor(_from_unit(np.asarray(image)), cv2.COLOR_GRAY2RGB)
    if image.mode == "I":
        raise DecodeError("32-bit or signed integer samples; save as 8 or 16 bits")
    if image.mode.startswith("I;16"):
        return cv2.cvtColor(_from_deep_grey(image), cv2.COLOR_GRAY2RGB)
    if image.has_transparency_data:
        rgba = np.array(image.convert("RGBA"))
        if image.format == "BMP" and not rgba[..., 3].any():  # Windows programs leave the fourth byte 0
            return np.ascontiguousarray(rgba[..., :3])
        return _composite(rgba)
    return np.array(image.convert("RGB"))


def _from_deep_grey(image: Image.Image) -> Pixels:
    """Scale grey of 9 to 16 bits. A transparent value becomes the background."""
    samples, bits = np.asarray(image), _declared_bits(image)
    grey: Pixels = _to_8_bits(_used_bits(samples) if bits == 16 else bits)[samples]
    if "transparency" in image.info:
        grey[samples == image.info["transparency"]] = BACKGROUND[0]
    tags = getattr(image, "tag_v2", {})
    return 255 - grey if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO else grey


def _declared_bits(image: Image.Image) -> int:
    """Return the bits per sample of a deep image, as a TIFF declares them; 16 for others."""
    return int(getattr(image, "tag_v2", {}).get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0])


def _used_bits(samples: NDArray[Any]) -> int:
    """Return how many bits the values of 16-bit samples use, by the rule of the module's docstring."""
    return next(bits for bits in (8, 10, 12, 14, 16) if int(samples.max()) < 2**bits)


@functools.lru_cache(maxsize=16)
def _to_8_bits(bits: int) -> Pixels:
    """Return the table that maps values of so many bits to ``0 .. 255``."""
    levels: Pixels = np.minimum(np.round(np.arange(65536) * (255 / (2**bits - 1))), 255).astype(np.uint8)
    return levels


def _from_unit(values: NDArray[Any]) -> Pixels:
    """Scale values from 0 to 1."""
    rounding = 1e-6
    if not np.isfinite(values).all() or values.min() < -rounding or values.max() > 1 + rounding:
        raise DecodeError(f"floating point values from {values.min():g} to {values.max():g}; expected 0 to 1")
    return np.round(values.astype(np.float32).clip(0, 1) * 255).astype(np.uint8)


def _composite(rgba: Pixels) -> Pixels:
    """Composite ``(H, W, 4)`` on white: ``255 - (255 - c) * alpha / 255``, rounded.

    Exact for all values, in a quarter of numpy's time.
    """
    ink = cv2.bitwise_not(cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB))
    alpha = cv2.cvtColor(np.ascontiguousarray(rgba[..., 3]), cv2.COLOR_GRAY2RGB)
    return cv2.bitwise_not(cv2.multiply(ink, alpha, scale=1 / 255))


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if there is none or it cannot be read. Pillow turns TIFFs itself."""
    data = image.info.get("exif", b"")
    if b"\x12\x01" not in data and b"\x01\x12" not in data:  # the tag, in both byte orders: parsing takes time
        return 1
    exif = Image.Exif()  # `getexif` would also follow XMP
    try:
        exif.load(data)
        value = exif.get(ExifTags.Base.Orientation)
    except Exception:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _apply_orientation(pixels: Pixels, orientation: int) -> Pixels:
    turns: dict[int, Callable[[Pixels], Pixels]] = {
        1: lambda x: x,
        2: lambda x: cv2.flip(x, 1),
        3: lambda x: cv2.rotate(x, cv2.ROTATE_180),
        4: lambda x: cv2.flip(x, 0),
        5: cv2.transpose,
        6: lambda x: cv2.rotate(x, cv2.ROTATE_90_CLOCKWISE),
        7: lambda x: cv2.flip(cv2.transpose(x), -1),
        8: lambda x: cv2.rotate(x, cv2.ROTATE_90_COUNTERCLOCKWISE),
    }
    return turns[orientation](pixels)

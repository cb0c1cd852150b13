"""Image files for tests: pictures whose pixels are known, in every format, and damaged on purpose."""

from __future__ import annotations

import io

import cv2
import numpy as np
from PIL import Image


def photo(width: int = 120, height: int = 90, seed: int = 0) -> np.ndarray:
    """A smooth colourful picture without symmetry."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def encode(pixels: np.ndarray | Image.Image, format: str, **options) -> bytes:
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def samples() -> dict[str, bytes]:
    """One small file of each format and kind."""
    picture = Image.fromarray(photo(64, 48))
    alpha = picture.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    return {
        "jpeg": encode(picture, "JPEG", quality=85),
        "jpeg-progressive": encode(picture, "JPEG", progressive=True),
        "jpeg-grey": encode(picture.convert("L"), "JPEG"),
        "jpeg-cmyk": encode(picture.convert("CMYK"), "JPEG"),
        "png": encode(picture, "PNG"),
        "png-alpha": encode(alpha, "PNG"),
        "png-palette": encode(picture.quantize(32), "PNG"),
        "webp": encode(picture, "WEBP"),
        "webp-alpha": encode(alpha, "WEBP", lossless=True),
        "bmp": encode(picture, "BMP"),
        "tiff": encode(picture, "TIFF"),
        "tiff-lzw": encode(picture, "TIFF", compression="tiff_lzw"),
        "tiff-jpeg": encode(picture, "TIFF", compression="jpeg"),
        "gif": encode(picture.quantize(64), "GIF"),
    }


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip bits, cut, overwrite, insert, drop, or write a wrong header."""
    buffer = bytearray(data)
    kind = rng.integers(0, 6)
    at = int(rng.integers(0, len(buffer)))
    if kind == 0:
        for _ in range(int(rng.integers(1, 30))):
            buffer[int(rng.integers(0, len(buffer)))] ^= 1 << int(rng.integers(0, 8))
    elif kind == 1:
        del buffer[at:]
    elif kind == 2:
        buffer[at : at + 40] = rng.bytes(40)
    elif kind == 3:
        buffer[at:at] = rng.bytes(int(rng.integers(1, 200)))
    elif kind == 4:
        del buffer[at : at + int(rng.integers(1, 200))]
    else:
        for _ in range(int(rng.integers(1, 8))):
            buffer[int(rng.integers(0, min(64, len(buffer))))] = int(rng.choice([0, 1, 127, 128, 255]))
    return bytes(buffer)


SAMPLES = samples()

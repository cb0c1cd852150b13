"""The headers of image files, read before anything is decoded: the format, the limits, and whether the file is whole.

Pillow parses them. Checked here is what Pillow leaves out: our limit on pixels, files made to take minutes to parse,
the checksums of PNG image data, and what a file is that is not an image. Used by `decode` only.
"""

from __future__ import annotations

import dataclasses
import io
import re
import struct
import zlib

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

MAX_PIXELS = 80_000_000
"""More than ordinary cameras have (full frame: 61 megapixels), little enough for 16 workers to hold at once."""

MAX_JPEG_PIXELS = 240_000_000
"""Of a JPEG that is decoded at a fraction of its size, as telephones of 108 and 200 megapixels make them."""

MAX_PIXELS_IN_SCANS = 120_000_000
"""Of such a JPEG of several scans, as progressive ones are: libjpeg keeps up to 6 bytes of each pixel, at any scale."""

_MAX_READS = 100_000  # while a header is parsed: crafted files of empty segments would take minutes
_MAX_CHUNKS = 100_000  # of a PNG; 80 megapixels in the 8 KiB chunks of libpng have fewer

_PLUGINS: dict[bytes, type[ImageFile.ImageFile]] = {
    rb"\xff\xd8\xff": JpegImagePlugin.JpegImageFile,
    rb"\x89PNG\r\n\x1a\n": PngImagePlugin.PngImageFile,
    rb"RIFF....WEBP": WebPImagePlugin.WebPImageFile,
    rb"GIF8[79]a": GifImagePlugin.GifImageFile,
    rb"II[*+]\0|MM\0[*+]": TiffImagePlugin.TiffImageFile,
    rb"BM": BmpImagePlugin.BmpImageFile,
}
"""By a pattern of the first bytes. Used directly, because `Image.open` hides why a header could not be read."""

_REFUSED = {
    rb"<!doctype html|<html": "HTML, not an image (a download page?)",
    rb".*<svg": "SVG, which is not supported",
    rb"version https://git-lfs": "a Git LFS pointer; fetch the files with: git lfs pull",
    rb"....ftypavi": "AVIF, which is not supported",
    rb"....ftyp(he|mi|ms)": "HEIC, which is not supported",
    rb"....ftyp": "a video, which is not supported",
    rb"%pdf": "PDF, which is not supported",
    rb"%!ps": "PostScript, which is not supported",
    rb"8bps": "Photoshop, which is not supported",
    rb"pk\x03\x04": "ZIP, not an image",
    rb"\x1f\x8b": "gzip, not an image",
    rb"\0\0\0\x0cjp  |\xff\x4f\xff\x51": "JPEG 2000, which is not supported",
    rb"\0\0\0\x0cjxl |\xff\x0a": "JPEG XL, which is not supported",
    rb"\0\0\x01\0": "an icon, which is not supported",
    rb"\{": "JSON, not an image",
    rb"(?!.*\0)[\0-\x7f]*\Z": "text, not an image",
}
"""What else is found in folders of images, by a pattern of its start (in any case)."""


class DecodeError(Exception):
    """Why a file cannot be used as an image: a few words, without the path."""


@dataclasses.dataclass(frozen=True)
class ImageInfo:
    """Facts from the header of an image file.

    Args:
        format: ``JPEG``, ``PNG``, ``WEBP``, ``BMP``, ``TIFF`` or ``GIF``.
        width: In pixels, after the orientation is applied.
        height: In pixels, after the orientation is applied.
        frames: Frames of an animation or pages of a TIFF; 1 for other images.
        used_bits: Of 16-bit samples without transparency, how many the values are taken to use; 0 for other images.
    """

    format: str
    width: int
    height: int
    frames: int = 1
    used_bits: int = 0


class _HeaderStream(io.BytesIO):
    """A file that ends a plugin's parsing after a number of reads."""

    reads_left = float(_MAX_READS)

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise DecodeError("damaged header (too many parts)")
        return super().read(size)


def _plugin(data: bytes) -> type[ImageFile.ImageFile] | None:
    return next((plugin for start, plugin in _PLUGINS.items() if re.match(start, data, re.DOTALL)), None)


def open_header(data: bytes) -> ImageFile.ImageFile:
    """Read the header, and refuse other formats and what is too large."""
    plugin = _plugin(data)
    if plugin is None:
        raise DecodeError(_describe(data))
    if plugin is WebPImagePlugin.WebPImageFile:
        check_size(*webp_size(data), "WEBP")  # the plugin would allocate all pixels
    if len(data) <= _MAX_READS:  # too small for so many parts
        image = plugin(io.BytesIO(data))
    else:
        stream = _HeaderStream(data)
        image = plugin(stream)
        stream.reads_left = float("inf")
    check_size(*image.size, str(image.format), MAX_JPEG_PIXELS if image.format == "JPEG" else None)
    return image


def webp_size(data: bytes) -> tuple[int, int]:
    """Return the size in a WebP's first chunk (RFC 9649)."""
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def _describe(data: bytes) -> str:
    """Name what a refused file seems to be."""
    if not data.strip(b"\0"):
        return "only zero bytes" if data else "empty file"
    start = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip()
    matching = (reason for pattern, reason in _REFUSED.items() if re.match(pattern, start, re.IGNORECASE | re.DOTALL))
    return next(matching, "not an image of a known format")


def check_size(width: int, height: int, name: str, limit: int | None = None) -> None:
    """Raise `DecodeError` for an empty image, or one above ``limit`` (`MAX_PIXELS` by default)."""
    limit = MAX_PIXELS if limit is None else limit
    if width < 1 or height < 1:
        raise DecodeError(f"damaged {name} (its size is {width} x {height})")
    if width * height > limit:
        megapixels = f"{width * height / 1e6:,.0f} megapixels"
        raise DecodeError(f"{width} x {height} is {megapixels}; the limit is {limit / 1e6:.0f}")


def failure_reason(data: bytes, error: Exception) -> str:
    """Describe a decoder's exception in a few words."""
    name = getattr(_plugin(data), "format", "image")
    text = str(error)
    if isinstance(error, MemoryError):
        return f"{name} needs more memory than there is"
    cause = error.__cause__ or error
    cut = 0 < len(data) < 4 or (name == "WEBP" and int.from_bytes(data[4:8], "little") + 8 > len(data))
    if cut or isinstance(cause, (EOFError, IndexError, struct.error)) or "truncated" in text.lower():
        return f"truncated {name}"
    first_line = "".join(c if " " <= c <= "~" else " " for c in text)[:80].strip()
    return f"damaged {name}" + (f" ({first_line})" if first_line else "")


def critical_chunks(data: bytes) -> tuple[bytes, bytes]:
    """Verify the checksums of a PNG's image data, which Pillow skips, and remove metadata.

    libpng in OpenCV writes about damaged metadata (such as colour profiles) to stderr.

    Returns:
        The file without metadata, and its EXIF data; empty if there is none or its checksum is wrong.
    """
    kept, exif, at = [data[:8]], b"", 8
    for _ in range(_MAX_CHUNKS):
        length, name = struct.unpack_from(">I4s", data, at)
        chunk = data[at : at + 12 + length]
        if len(chunk) < 12 + length:
            raise DecodeError("truncated PNG")
        if name in (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"eXIf"):
            intact = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
            if name == b"eXIf":
                exif = chunk[8:-4] if intact else exif
            elif not intact:
                raise DecodeError(f"damaged PNG (checksum of {name.decode()})")
            else:
                kept.append(chunk)
        if name == b"IEND":
            return b"".join(kept), exif
        at += len(chunk)
    raise DecodeError(f"damaged PNG (more than {_MAX_CHUNKS} chunks)")

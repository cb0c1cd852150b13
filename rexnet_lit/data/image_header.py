"""What image files say before they are decoded: format, size, orientation, and whether they are whole.

The headers are read here, not by a decoder, because the limit on pixels must hold before a decoder allocates
them, and because decoders differ in how much of a cut or damaged file they accept. Used by `decode` only.

Sources: ITU-T T.81 annex B (JPEG), the PNG specification, RFC 9649 (WebP), TIFF 6.0, EXIF 2.3.
"""

from __future__ import annotations

import dataclasses
import re
import struct
import zlib
from collections.abc import Callable
from typing import Literal

MAX_PIXELS = 80_000_000
"""Above every ordinary camera (a 61-megapixel full frame fits), below what 16 workers could not hold."""

_MAX_PARTS = 100_000  # Segments or chunks; a picture of our limit in the smallest parts that programs write has fewer.
_FILL = re.compile(rb"\xff+")  # before a JPEG's marker
_MAX_SCANS = 500  # A progressive JPEG has about ten; thousands are an attack on the decoder's time.


_ORIENTATION, _SHORT = 0x0112, 3  # a TIFF tag and a type

Kind = Literal["plain", "alpha", "deep", "odd"]
"""Which decoder gets a file: Pillow the odd ones, OpenCV the others, each kind in its own way."""

# What else people's folders hold, by how it starts (in lower case).
_REFUSED = {
    b"<!doctype html": "HTML, not an image (a download page?)",
    b"<html": "HTML, not an image (a download page?)",
    b"version https://git-lfs": "a Git LFS pointer; fetch the files with: git lfs pull",
    b"%pdf": "PDF, which is not supported",
    b"%!ps": "PostScript, which is not supported",
    b"8bps": "Photoshop, which is not supported",
    b"pk\x03\x04": "ZIP, not an image",
    b"\x1f\x8b": "gzip, not an image",
    b"\0\0\0\x0cjp  ": "JPEG 2000, which is not supported",
    b"\xff\x4f\xff\x51": "JPEG 2000, which is not supported",
    b"\0\0\0\x0cjxl ": "JPEG XL, which is not supported",
    b"\xff\x0a": "JPEG XL, which is not supported",
    b"\0\0\x01\0": "an icon, which is not supported",
    b"{": "JSON, not an image",
}


class DecodeError(Exception):
    """Why a file is no usable image: short, without the path."""


@dataclasses.dataclass(frozen=True)
class ImageInfo:
    """What a file's header says.

    Args:
        format: ``JPEG``, ``PNG``, ``WEBP``, ``BMP``, ``TIFF`` or ``GIF``.
        width: Pixels across, after the orientation is applied.
        height: Pixels down, after the orientation is applied.
        frames: Frames of an animation or pages of a TIFF; 1 for a plain picture.
    """

    format: str
    width: int
    height: int
    frames: int = 1


@dataclasses.dataclass(frozen=True)
class Header:
    """The stored size (before orientation) and what chooses the decoder."""

    format: str
    width: int
    height: int
    exif: bytes = b""
    frames: int = 1
    kind: Kind = "odd"
    stripped: bytes = b""  # the file without metadata that its decoder should not see
    trns: bytes = b""  # PNG: which grey or colour is transparent
    scan: int = 0  # JPEG whose blocks stand in reading order: where its data starts


def sniff(data: bytes) -> str | None:
    """Return the allowed format whose signature the data starts with."""
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    return "BMP" if data[:2] == b"BM" else None


def _looks_like(data: bytes) -> str:
    """Name what a refused file seems to be."""
    if not data.strip(b"\0"):
        return "only zero bytes" if data else "empty file"
    if data[4:8] == b"ftyp":
        brand = data[8:12]
        kind = "AVIF" if brand[:3] == b"avi" else "HEIC" if brand[:2] in (b"he", b"mi", b"ms") else "a film"
        return f"{kind}, which is not supported"
    start = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if b"<svg" in start:
        return "SVG, which is not supported"
    for magic, reason in _REFUSED.items():
        if start.startswith(magic):
            return reason
    binary = b"\0" in start or not start.isascii()
    return "not an image of a known format" if binary else "text, not an image"


def read_header(data: bytes) -> Header:
    """Find format, size, orientation and decoder of anything but a TIFF, and refuse what is too large.

    Raises:
        DecodeError: It is no image of an allowed format, cut off, or too large.
        struct.error: It is cut off within its header.
    """
    name = sniff(data)
    if name is None:
        raise DecodeError(_looks_like(data))
    readers: dict[str, Callable[[bytes], Header]] = {
        "JPEG": _jpeg,
        "PNG": _png,
        "WEBP": _webp,
        "BMP": _bmp,
        "GIF": _gif,
    }
    header = readers[name](data)
    check_size(header.width, header.height, name)
    return header


def check_size(width: int, height: int, name: str) -> None:
    """Refuse an empty picture, and one above `MAX_PIXELS`."""
    if width < 1 or height < 1:
        raise DecodeError(f"damaged {name} (its size is {width} x {height})")
    if width * height > MAX_PIXELS:
        megapixels = f"{width * height / 1e6:,.0f} megapixels"
        raise DecodeError(f"{width} x {height} is {megapixels}; the limit is {MAX_PIXELS / 1e6:.0f}")


def _jpeg(data: bytes) -> Header:
    """Walk the segments up to the first scan, and make sure that the last scan ends."""
    width = height = components = 0
    frame, exif, at = 0, b"", 2
    for _ in range(_MAX_PARTS):
        marked = _FILL.search(data, at, at + 65536)  # decoders skip stray bytes between segments
        if marked is None or marked.end() + 3 > len(data):
            raise DecodeError("truncated JPEG")
        at = marked.end() - 1
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD9:  # these have no length
            at += 2
            continue
        body = data[at + 4 : at + 2 + length]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            precision, height, width, components = struct.unpack_from(">BHHB", body)
            frame = marker if precision == 8 else 0
        elif marker == 0xE1 and body[:6] == b"Exif\0\0" and not exif:
            exif = body
        elif marker == 0xDA:
            break
        at += 2 + length
    else:
        raise DecodeError(f"damaged JPEG (more than {_MAX_PARTS} segments)")
    # Inside a scan 0xFF is always followed by a marker or 0x00, so what looks like an end marker is one.
    # Trailing bytes (a film, a depth map, padding) are common and harmless. It is near the back, mostly.
    if data.rfind(b"\xff\xd9", at) < 0:
        raise DecodeError("truncated JPEG")
    if frame == 0xC2 and data.count(b"\xff\xda", at, data.find(b"\xff\xd9", at)) > _MAX_SCANS:
        raise DecodeError(f"JPEG of more than {_MAX_SCANS} scans")
    kind: Kind = "plain" if frame in (0xC0, 0xC1, 0xC2) and components in (1, 3) else "odd"
    return Header("JPEG", width, height, exif, kind=kind, scan=at if frame in (0xC0, 0xC1) else 0)


def _png(data: bytes) -> Header:
    """Walk the chunks to the end, verify what carries the picture, and leave the rest away."""
    kept, exif, trns, frames, at = [data[:8]], b"", b"", 1, 8
    ihdr = b""
    for _ in range(_MAX_PARTS):
        if at + 12 > len(data):
            raise DecodeError("truncated PNG")
        length, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 12 + length
        if not name.isalpha():
            raise DecodeError("damaged PNG (a chunk without a name)")
        if end > len(data):
            raise DecodeError("truncated PNG")
        if name in (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS"):
            chunk = data[at:end]
            if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
                raise DecodeError(f"damaged PNG (checksum of {name.decode()})")
            kept.append(chunk)
            ihdr = chunk[8:21] if name == b"IHDR" else ihdr
            trns = chunk[8:-4] if name == b"tRNS" else trns
        elif name == b"eXIf":
            exif = data[at + 8 : end - 4]
        elif name == b"acTL":
            frames = int.from_bytes(data[at + 8 : at + 12], "big")
        at = end
        if name == b"IEND":
            break
    else:
        raise DecodeError(f"damaged PNG (more than {_MAX_PARTS} chunks)")
    width, height, depth, colour = struct.unpack_from(">IIBB", ihdr)
    kind: Kind = "deep" if depth == 16 else "odd" if trns else "alpha" if colour in (4, 6) else "plain"
    # libpng comments on metadata on stderr (a damaged colour profile, say): it is not shown any.
    return Header("PNG", width, height, exif, max(frames, 1), kind, b"".join(kept), trns)


def _webp(data: bytes) -> Header:
    """Walk the RIFF chunks."""
    size = int.from_bytes(data[4:8], "little") + 8
    if size > len(data):
        raise DecodeError("truncated WEBP")
    width, height, frames, at = 0, 0, 0, 12
    exif, alpha = b"", False
    names: list[bytes] = []
    while at + 8 <= size:
        if len(names) == _MAX_PARTS:
            raise DecodeError(f"damaged WEBP (more than {_MAX_PARTS} chunks)")
        name, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        body = data[at + 8 : at + 8 + length]
        names.append(name)
        if name == b"VP8X":
            alpha = bool(body[0] & 0x12)  # transparency or animation
            width, height = (int.from_bytes(body[i : i + 3], "little") + 1 for i in (4, 7))
        elif name == b"VP8 " and not width:
            width, height = (int.from_bytes(body[i : i + 2], "little") & 0x3FFF for i in (6, 8))
        elif name == b"VP8L" and not width:
            bits = int.from_bytes(body[1:5], "little")
            width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        elif name == b"EXIF":
            exif = body
        frames += name == b"ANMF"
        at += 8 + length + length % 2
    kind: Kind = "plain" if b"VP8 " in names and not alpha and not frames else "odd"
    return Header("WEBP", width, height, exif, max(frames, 1), kind)


def _bmp(data: bytes) -> Header:
    old = int.from_bytes(data[14:18], "little") == 12  # the header of OS/2 1.x
    width, height = struct.unpack_from("<HH" if old else "<ii", data, 18)
    return Header("BMP", width, abs(height))


def _gif(data: bytes) -> Header:
    """Read the canvas; Pillow widens it where the first frame is larger, and checks that."""
    return Header("GIF", *struct.unpack_from("<HH", data, 6))


def exif_orientation(exif: bytes) -> int:
    """Return the EXIF orientation, 1 to 8; 1 where there is none or it cannot be read."""
    tiff = exif.removeprefix(b"Exif\0\0")
    at, order = _orientation_entry(tiff)
    kind, value = struct.unpack_from(order + "2xH4xH", tiff, at) if at else (0, 1)
    return value if kind == _SHORT and 1 <= value <= 8 else 1


def without_orientation(tiff: bytes) -> bytes:
    """Return a TIFF file that says it stands upright."""
    at, order = _orientation_entry(tiff)
    return tiff[: at + 8] + struct.pack(order + "H", 1) + tiff[at + 10 :] if at else tiff


def _orientation_entry(tiff: bytes) -> tuple[int, str]:
    """Return where the orientation stands in the first directory (0: nowhere), and the byte order."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2], "")
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for at in range(start + 2, min(start + 2 + 12 * count, len(tiff) - 11) if order else 0, 12):
            if struct.unpack_from(order + "H", tiff, at) == (_ORIENTATION,):
                return at, order
    except struct.error:
        pass
    return 0, order

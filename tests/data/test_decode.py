"""The image reader, against pictures whose pixels are known and files that are broken on purpose.

Numbers after "A" are the cases of the project's list of data faults.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import subprocess
import sys
import time
import zlib

import cv2
import numpy as np
import pytest
from image_tools import SAMPLES, encode, mutate, photo
from PIL import Image, ImageOps

from rexnet_lit.data import decode as module
from rexnet_lit.data import image_header
from rexnet_lit.data.decode import (
    BACKGROUND,
    count_frames,
    decode,
    decode_with_info,
    from_array,
    from_pil,
    read,
)  # fmt: skip
from rexnet_lit.data.image_file import MAX_BYTES
from rexnet_lit.data.image_header import MAX_PIXELS, DecodeError

# The module ignores Pillow's remarks for its callers; pytest's own filters would bring them back.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL")


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(samples: np.ndarray, colour: int, extra: bytes = b"") -> bytes:
    """Write a PNG by the specification, 8 or 16 bits by the array's type."""
    depth = samples.dtype.itemsize * 8
    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(f">u{depth // 8}").tobytes() for row in samples)
    ihdr = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", ihdr)
        + extra
        + png_chunk(b"IDAT", zlib.compress(rows))
        + png_chunk(b"IEND", b"")
    )


def on_background(rgba: np.ndarray) -> np.ndarray:
    """The definition of compositing, in floating point."""
    alpha = rgba[..., 3:].astype(np.float64) / 255
    return np.floor(rgba[..., :3] * alpha + np.array(BACKGROUND) * (1 - alpha) + 0.5).astype(np.uint8)


# --- ordinary files ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLES)
def test_every_format_agrees_with_pillow(name):
    expected = Image.open(io.BytesIO(SAMPLES[name]))
    rgba = np.array(expected.convert("RGBA"))
    got = decode(SAMPLES[name])
    assert got.dtype == np.uint8
    assert got.shape == (48, 64, 3)
    assert got.flags.c_contiguous
    assert got.flags.writeable
    assert np.array_equal(got, on_background(rgba))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (33, 64)])
def test_png_of_every_depth_is_expanded(mode, size):
    image = Image.fromarray(photo(*size)).convert(mode)
    assert np.array_equal(decode(encode(image, "PNG", bits=1 if mode == "1" else 8)), image.convert("RGB"))


def test_interlaced_png():
    # Adam7 needs seven passes; a 1 x 1 picture has only the first, which is the plain row.
    data = bytearray(png(np.array([[[9, 8, 7]]], np.uint8), 2))
    data[28] = 1
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    assert decode(bytes(data)).tolist() == [[[9, 8, 7]]]


@pytest.mark.parametrize("min_size", [None, 151, 76, 38])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_opencv_and_pillow_decode_the_same_pixels(min_size, options):
    """A JPEG is decoded by OpenCV, and with ``thorough`` by Pillow."""
    data = encode(photo(403, 301), "JPEG", quality=88, **options)
    assert np.array_equal(decode(data, min_size), decode(data, min_size, thorough=True))


@pytest.mark.parametrize("name", SAMPLES)
def test_an_open_image_comes_to_the_same_pixels(name):
    assert np.array_equal(from_pil(Image.open(io.BytesIO(SAMPLES[name]))), decode(SAMPLES[name]))


def test_an_open_image_is_turned_as_its_file_is():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encode(photo(60, 40), "JPEG", xmp=xmp)  # which Pillow's exif_transpose would follow
    assert np.array_equal(from_pil(Image.open(io.BytesIO(data))), decode(data))
    for orientation in range(1, 9):
        for format in ("JPEG", "PNG", "WEBP"):
            exif = Image.Exif()
            exif[274] = orientation
            data = encode(photo(60, 40), format, exif=exif)
            assert np.array_equal(from_pil(Image.open(io.BytesIO(data))), decode(data))


def test_an_open_image_is_turned_and_its_faults_are_decode_errors():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert from_pil(Image.open(io.BytesIO(encode(photo(40, 24), "JPEG", exif=exif)))).shape == (40, 24, 3)
    with pytest.raises(DecodeError, match="truncated"):
        from_pil(Image.open(io.BytesIO(SAMPLES["jpeg"][:-200])))
    with pytest.raises(DecodeError, match="32-bit"):
        from_pil(Image.new("I", (4, 4)))


# --- decoding at a fraction of the size ------------------------------------------------------------


@pytest.mark.parametrize(
    ("min_size", "expected"),
    [(None, 301), (301, 301), (152, 301), (151, 151), (76, 76), (39, 76), (38, 38), (1, 38)],
)
def test_jpeg_scale_is_the_smallest_that_keeps_min_size(min_size, expected):
    assert min(decode(encode(photo(403, 301), "JPEG"), min_size).shape[:2]) == expected


def test_min_size_leaves_other_formats_alone():
    assert decode(SAMPLES["png"], 8).shape == (48, 64, 3)


def test_scaled_decoding_is_near_area_reduction():
    """DCT scaling is a low-pass filter: a smooth picture comes within 2 levels of averaging, on the mean."""
    picture = photo(800, 600)
    scaled = decode(encode(picture, "JPEG", quality=95, subsampling=0), 150)
    averaged = cv2.resize(picture, (200, 150), interpolation=cv2.INTER_AREA)
    assert scaled.shape == averaged.shape
    assert np.abs(scaled.astype(int) - averaged).mean() < 2


# --- orientation (A12) -----------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("JPEG", {}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
)
def test_a12_orientation_is_applied_in_every_format(format, options, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(40, 24), format, exif=exif, **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    got = decode(data)
    assert np.array_equal(got, np.array(expected.convert("RGB")))
    info = decode_with_info(data, 8)[1]
    assert (info.height, info.width) == got.shape[:2]
    assert (got.shape[0] > got.shape[1]) == (orientation >= 5)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a12_orientation_of_16_bit_tiff(orientation, tmp_path):
    """Written with OpenCV, then the orientation tag is patched in place of another one."""
    deep = (photo(40, 24).astype(np.uint16) * 257)[..., ::-1]
    path = tmp_path / "x.tif"
    cv2.imwrite(str(path), deep, [cv2.IMWRITE_TIFF_COMPRESSION, 1])
    data = bytearray(path.read_bytes())
    (at,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, at)
    tags = [struct.unpack_from("<HHII", data, at + 2 + 12 * i) for i in range(count)]
    entries = {tag[0]: tag for tag in tags} | {274: (274, 3, 1, orientation)}
    # A new directory at the end of the file.
    start = len(data) + len(data) % 2
    data += b"\0" * (len(data) % 2) + struct.pack("<H", len(entries))
    for tag in sorted(entries):
        data += struct.pack("<HHII", *entries[tag])
    data += b"\0\0\0\0"
    struct.pack_into("<I", data, 4, start)
    expected = module._apply_orientation(photo(40, 24), orientation)
    assert np.array_equal(decode(bytes(data)), expected)
    info = decode_with_info(bytes(data))[1]
    assert (info.height, info.width) == expected.shape[:2]


def test_broken_exif_is_no_reason_to_refuse():
    whole = encode(photo(40, 24), "JPEG")
    for body in (
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"Exif\0\0" + b"x" * 30,
    ):
        data = whole[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + whole[2:]
        assert np.array_equal(decode(data), decode(whole))


# --- depth (A7, A8) --------------------------------------------------------------------------------


def deep_values(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 65536, shape).astype(np.uint16)


def scaled(values: np.ndarray) -> np.ndarray:
    return np.round(values / 257).astype(np.uint8)


def test_a7_16_bit_png_is_scaled_not_clipped():
    grey, colour = deep_values(10, 12), deep_values(10, 12, 3)
    assert np.array_equal(decode(png(grey, 0)), np.repeat(scaled(grey)[..., None], 3, axis=2))
    assert np.array_equal(decode(png(colour, 2)), scaled(colour))


def test_a7_16_bit_png_with_transparency():
    grey_alpha, rgba = deep_values(10, 12, 2), deep_values(10, 12, 4)
    expected = on_background(scaled(grey_alpha)[..., [0, 0, 0, 1]])
    assert np.array_equal(decode(png(grey_alpha, 4)), expected)
    assert np.array_equal(decode(png(rgba, 6)), on_background(scaled(rgba)))
    # One transparent value, as a tRNS chunk names it.
    grey, colour = deep_values(10, 12), deep_values(10, 12, 3)
    got = decode(png(grey, 0, png_chunk(b"tRNS", int(grey[3, 4]).to_bytes(2, "big"))))
    assert got[3, 4].tolist() == list(BACKGROUND)
    assert np.array_equal(got[0, 0], scaled(grey)[0, 0].repeat(3))
    got = decode(png(colour, 2, png_chunk(b"tRNS", colour[3, 4].astype(">u2").tobytes())))
    assert got[3, 4].tolist() == list(BACKGROUND)
    assert np.array_equal(got[0, 0], scaled(colour)[0, 0])


@pytest.mark.parametrize("compression", [1, 5, 8])
def test_a7_16_bit_tiff(tmp_path, compression):
    colour, grey = deep_values(10, 12, 3), deep_values(10, 12)
    for values, expected in (
        (colour[..., ::-1], scaled(colour)),
        (grey, np.repeat(scaled(grey)[..., None], 3, axis=2)),
    ):
        path = tmp_path / "x.tif"
        cv2.imwrite(str(path), values, [cv2.IMWRITE_TIFF_COMPRESSION, compression])
        assert np.array_equal(read(path), expected)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_16_bit_samples_that_use_fewer_bits(bits):
    """White is the largest value of as many bits as a device has; 0.4 of it is enough to tell them apart."""
    white = 2**bits - 1
    values = np.linspace(0, 0.4 * white, 120).astype(np.uint16).reshape(10, 12)
    expected = np.repeat(np.round(values * (255 / white))[..., None], 3, axis=2)
    colour = np.stack([values, values // 2, values // 3], axis=2)
    for data in (png(values, 0), encode(Image.fromarray(values), "TIFF")):
        pixels, info = decode_with_info(data)
        assert np.array_equal(pixels, expected)
        assert info.used_bits == bits
    pixels, info = decode_with_info(png(colour, 2))
    assert np.array_equal(pixels, np.round(colour * (255 / white)))
    assert info.used_bits == bits
    assert np.array_equal(from_array(values), expected)
    assert np.array_equal(from_array(colour), pixels)
    assert np.array_equal(from_pil(Image.fromarray(values)), expected)
    white_is_zero = encode(Image.fromarray(values), "TIFF", tiffinfo={262: 0})
    assert np.array_equal(decode(white_is_zero), 255 - expected)
    assert decode_with_info(SAMPLES["png"])[1].used_bits == 0


def test_white_is_zero_16_bit_tiff():
    grey = deep_values(10, 12)
    data = encode(Image.fromarray(grey), "TIFF", tiffinfo={262: 0})
    assert np.array_equal(decode(data)[..., 0], 255 - scaled(grey))


def test_a8_float_tiff_is_scaled_or_refused():
    values = np.linspace(0, 1, 120, dtype=np.float32).reshape(10, 12)
    got = decode(encode(Image.fromarray(values), "TIFF"))
    assert np.array_equal(got[..., 1], np.round(values * 255))
    for bad in (
        values * 300,
        values - 0.5,
        np.full((4, 4), np.nan, np.float32),
        np.full((4, 4), np.inf, np.float32),
    ):
        with pytest.raises(DecodeError, match="floating point values from"):
            decode(encode(Image.fromarray(bad), "TIFF"))


def test_a8_integer_tiff_is_refused():
    with pytest.raises(DecodeError, match="32-bit"):
        decode(encode(Image.fromarray(np.arange(100, dtype=np.int32).reshape(10, 10)), "TIFF"))


# --- transparency and colour (A9, A10, A11) ------------------------------------------------------


def test_a9_colour_under_alpha_0_is_hidden():
    rgba = np.dstack([np.full((8, 8, 3), [255, 0, 0]), np.zeros((8, 8))]).astype(np.uint8)
    rgba[2, 2, 3], rgba[3, 3, 3] = 255, 128
    for data in (encode(rgba, "PNG"), encode(rgba, "WEBP", lossless=True, exact=True), encode(rgba, "TIFF")):
        got = decode(data)
        assert got[0, 0].tolist() == list(BACKGROUND)
        assert got[2, 2].tolist() == [255, 0, 0]
        assert got[3, 3].tolist() == [255, 127, 127]


def test_a9_compositing_is_exact_for_all_values():
    colour, alpha = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    rgba = np.dstack([colour, colour, colour, alpha])
    assert np.array_equal(decode(encode(rgba, "PNG")), on_background(rgba))


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_a10_palette_with_transparency(format):
    image = Image.new("P", (4, 2), 0)
    image.putpalette([200, 10, 10, 10, 200, 10])
    image.putpixel((1, 0), 1)
    got = decode(encode(image, format, transparency=0))
    assert got[0, 0].tolist() == list(BACKGROUND)
    assert got[0, 1].tolist() == [10, 200, 10]


def test_a10_palette_with_partial_transparency_and_grey_with_transparency():
    image = Image.new("P", (2, 1), 0)
    image.putpalette([200, 10, 10, 10, 200, 10])
    image.putpixel((1, 0), 1)
    got = decode(encode(image, "PNG", transparency=bytes([128, 255])))
    assert got[0].tolist() == [[227, 132, 132], [10, 200, 10]]  # 255 - (255 - c) * 128 / 255
    assert decode(encode(Image.new("L", (2, 1), 7), "PNG", transparency=7))[0, 0].tolist() == list(BACKGROUND)


def test_a11_cmyk_jpeg():
    inks = {(0, 0, 0, 0): 255, (0, 0, 0, 255): 0, (255, 255, 255, 0): 0, (0, 0, 0, 128): 127}
    for ink, grey in inks.items():
        got = decode(encode(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100))
        assert np.abs(got.astype(int) - grey).max() <= 2
    cyan = decode(encode(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=100))
    assert np.abs(cyan.astype(int) - [0, 255, 255]).max() <= 4


def test_bmp_with_an_unused_fourth_byte_is_opaque():
    rgba = np.dstack([photo(8, 8), np.zeros((8, 8), np.uint8)])
    data = bytearray(encode(Image.fromarray(rgba), "BMP"))
    assert np.array_equal(decode(bytes(data)), rgba[..., :3])


# --- animations (A13) ------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_a13_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (16, 12), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert count_frames(data) == 3
    assert decode(data)[5, 5].tolist() == [255, 0, 0]
    assert count_frames(encode(frames[0], format, **options)) == 1


def opaque_files() -> dict[str, bytes]:
    picture = Image.fromarray(photo(67, 45))
    return {
        "png": encode(picture, "PNG"),
        "png-grey": encode(picture.convert("L"), "PNG"),
        "png-1-bit": encode(picture.convert("1"), "PNG"),
        "png-palette": encode(picture.quantize(40), "PNG"),
        "png-2-bit-palette": encode(picture.quantize(4), "PNG", bits=2),
        "webp": encode(picture, "WEBP", quality=80),
        "webp-extended": encode(picture, "WEBP", quality=80, icc_profile=b"x" * 200),
    }


@pytest.mark.parametrize("name", opaque_files())
def test_opencv_decodes_opaque_files_to_pillow_s_pixels(name, monkeypatch):
    data = opaque_files()[name]
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    monkeypatch.setattr(module, "_load", lambda *_: pytest.fail("Pillow takes longer"))
    assert np.array_equal(decode(data), expected)


def test_orientation_of_an_opaque_webp():
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(photo(67, 45))
    turned = decode(encode(picture, "WEBP", quality=80, exif=exif))
    assert np.array_equal(turned, cv2.rotate(decode(encode(picture, "WEBP", quality=80)), cv2.ROTATE_90_CLOCKWISE))


def test_exif_data_without_orientation_is_not_parsed(monkeypatch):
    exif = Image.Exif()
    exif[0x010F] = "maker"
    data = encode(Image.fromarray(photo(20, 10)), "PNG", exif=exif)
    monkeypatch.setattr(Image.Exif, "load", lambda *_: pytest.fail("this takes time"))
    assert decode(data).shape == (10, 20, 3)


def test_a_damaged_exif_chunk_is_no_reason_to_refuse_a_png():
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(photo(20, 10))
    data = bytearray(encode(picture, "PNG", exif=exif))
    assert decode(bytes(data)).shape == (20, 10, 3)
    data[data.index(b"eXIf") + 5] ^= 1
    assert np.array_equal(decode(bytes(data)), np.array(picture))


# --- limits (A5, A6, S7) -----------------------------------------------------------------------------


def header_only(format: str, width: int, height: int) -> bytes:
    """A small file that claims a size."""
    if format == "JPEG":
        data = bytearray(SAMPLES["jpeg"])
        at = data.index(b"\xff\xc0")
        data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    elif format == "PNG":
        ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", ihdr)
        data += png_chunk(b"IDAT", zlib.compress(b"\0" * 999)) + png_chunk(b"IEND", b"")
    elif format == "WEBP":
        data = bytearray(SAMPLES["webp"])
        data[26:30] = struct.pack("<HH", width, height)
    elif format == "BMP":
        data = bytearray(SAMPLES["bmp"])
        data[18:26] = struct.pack("<ii", width, height)
    elif format == "GIF":
        data = bytearray(SAMPLES["gif"])
        data[6:10] = struct.pack("<HH", width, height)
    else:
        data = bytearray(SAMPLES["tiff"])
        (at,) = struct.unpack_from("<I", data, 4)
        for entry in range(at + 2, at + 26, 12):
            tag, kind = struct.unpack_from("<HH", data, entry)
            if tag in (256, 257):
                struct.pack_into("<H" if kind == 3 else "<I", data, entry + 8, {256: width, 257: height}[tag])
    return bytes(data)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.parametrize("side", [(10_000, 9_000), (16_383, 16_383)])
def test_a5_a6_size_is_refused_from_the_header(format, side):
    started = time.process_time()
    with pytest.raises(DecodeError, match="megapixels"):
        decode(header_only(format, *side))
    assert time.process_time() - started < 0.5


def test_a5_20000_x_20000():
    for format in ("JPEG", "PNG", "BMP", "GIF", "TIFF"):
        with pytest.raises(DecodeError, match="20000 x 20000 is 400 megapixels"):
            decode(header_only(format, 20_000, 20_000))


def test_sizes_are_named_with_their_format():
    with pytest.raises(DecodeError, match="16383 x 16383 is 268 megapixels; the limit is 80"):
        decode(header_only("WEBP", 16_383, 16_383))
    for format in ("JPEG", "PNG", "BMP", "TIFF"):
        with pytest.raises(DecodeError, match=f"(damaged|truncated) {format}"):
            decode(header_only(format, 0, 10))
    with pytest.raises(DecodeError, match=r"damaged WEBP \(its size is 0 x 10\)"):
        decode(header_only("WEBP", 0, 10))
    with pytest.raises(DecodeError, match="truncated JPEG"):
        decode(b"\xff\xd8\xff")


def test_a_large_webp_is_refused_before_pillow_allocates_its_canvas(monkeypatch):
    monkeypatch.setattr(image_header, "MAX_PIXELS", 64 * 48 - 1)
    monkeypatch.setattr(image_header.WebPImagePlugin.WebPImageFile, "_open", lambda *_: pytest.fail("too late"))
    for name in ("webp", "webp-alpha"):
        with pytest.raises(DecodeError, match="64 x 48 is"):
            decode(SAMPLES[name])


def test_a6_limit_lies_between_48_and_90_megapixels():
    assert 8000 * 6000 <= MAX_PIXELS < 90_000_000
    big = encode(np.zeros((6000, 8000), np.uint8), "JPEG", quality=10)
    assert decode(big, 200).shape == (750, 1000, 3)


def test_the_limit_of_a_jpeg_is_on_what_is_decoded():
    """Telephones make 108 megapixels. Of 80 decoded ones, the most that fit are those of half the size."""
    photo = encode(np.zeros((9000, 12000), np.uint8), "JPEG", quality=10)
    assert decode(photo, 256).shape == (1125, 1500, 3)
    assert decode(photo, 8000, thorough=True).shape == (4500, 6000, 3)
    with pytest.raises(DecodeError, match="12000 x 9000 is 108 megapixels; the limit is 80"):
        decode(photo)
    for name, marker, limit in (("jpeg", b"\xff\xc0", 240), ("jpeg-progressive", b"\xff\xc2", 120)):
        data = bytearray(SAMPLES[name])
        at = data.index(marker)
        data[at + 5 : at + 9] = struct.pack(">HH", 10_000, 100 * limit + 100)
        with pytest.raises(DecodeError, match=f"megapixels; the limit is {limit}"):
            decode(bytes(data), 1)


def test_a_large_jpeg_of_separate_scans_is_limited_as_a_progressive_one(monkeypatch):
    """libjpeg keeps all of both. Such a file has a scan for each colour, here a second one of the first."""
    monkeypatch.setattr(module, "MAX_PIXELS_IN_SCANS", 64 * 48 - 1)
    data = SAMPLES["jpeg"]
    assert decode(data, 1).shape == (6, 8, 3)
    scan = data[data.index(b"\xff\xda") : -2]
    with pytest.raises(DecodeError, match="64 x 48 is"):
        decode(data[:-2] + scan + data[-2:], 1)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8\xff" + b"\xff" * 2**24,
        b"\xff\xd8" + b"\xff\x00" * 2**23,
        b"\xff\xd8" + b"\xff\xe5\x00\x02" * 2**22,
        b"\x89PNG\r\n\x1a\n" + bytes(2**24),
        b"\x89PNG\r\n\x1a\n" + b"\0\0\0\0abCd\0\0\0\0" * 2**20,
        b"RIFF" + struct.pack("<I", 2**24 + 4) + b"WEBP" + b"EMPT\0\0\0\0" * 2**21,
    ],
    ids=["fill bytes", "no markers", "segments", "zeros", "chunks", "RIFF chunks"],
)
def test_headers_without_end_cost_no_time(data):
    """Each took seconds of Python before the limits, more than ten from 64 MB on."""
    started = time.process_time()
    with pytest.raises(DecodeError, match=r"truncated|damaged"):
        decode(data)
    assert time.process_time() - started < 1


def test_a5_real_bombs_are_refused_at_once(bombs):
    files = sorted(bombs.rglob("*.png"))
    assert len(files) == 3
    for file in files:
        started = time.process_time()
        with pytest.raises(DecodeError, match="megapixels"):
            read(file)
        assert time.process_time() - started < 0.5


def test_s7_bytes_are_limited_before_reading(tmp_path):
    path = tmp_path / "big.png"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # a sparse file
    with pytest.raises(DecodeError, match="256 MiB"):
        read(path)


def test_jpeg_of_thousands_of_scans_is_refused():
    data = SAMPLES["jpeg-progressive"]
    scan = data.rindex(b"\xff\xda")
    with pytest.raises(DecodeError, match="scans"):
        decode(data[:-2] + data[scan:-2] * 600 + data[-2:])


# --- refused files (A2, A3) --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"\0" * 5000, "only zero bytes"),
        (b"<!DOCTYPE html><html></html>", "HTML"),
        (b"\xef\xbb\xbf\n <html>", "HTML"),
        (b'<?xml version="1.0"?><svg></svg>', "SVG"),
        (b"\0\0\0\x18ftypheic\0\0", "HEIC"),
        (b"\0\0\0\x18ftypavif\0\0", "AVIF"),
        (b"\0\0\0\x18ftypisom\0\0", "video"),
        (b"%PDF-1.7", "PDF"),
        (b"8BPS\0\1", "Photoshop"),
        (b"PK\x03\x04abc", "ZIP"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
        (b'{"error": 404}', "JSON"),
        (b"Not Found", "text"),
        (b"\x93\x00\xfe\x80", "not an image"),
        (b"\0\0\x01\0\x01\0", "icon"),
        (b"P6\n1 1\n255\nabc", "text"),
    ],
)
def test_a2_a3_refused_by_content(data, reason):
    with pytest.raises(DecodeError, match=reason):
        decode(data)


def test_reasons_carry_no_path_and_no_control_characters(tmp_path):
    path = tmp_path / "secret name.jpg"
    path.write_bytes(b"\xff\xd8\xff\xe0\x1b[31m")
    with pytest.raises(DecodeError) as error:
        read(path)
    assert "secret" not in str(error.value)
    assert str(error.value).isprintable()


def test_read_refuses_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for path, reason in (
        (tmp_path, "regular"),
        (tmp_path / "pipe.jpg", "regular"),
        (tmp_path / "no.jpg", "No such file"),
    ):
        with pytest.raises(DecodeError, match=reason):
            read(path)
    with pytest.raises(DecodeError):
        read("a\0b")


def test_a25_a26_read_only_and_odd_names(tmp_path):
    name = os.fsencode(tmp_path) + b"/a b\n\xc3\xa9\xff.jpg"
    with open(name, "wb") as file:  # noqa: PTH123 - a name of bytes
        file.write(SAMPLES["jpeg"])
    os.chmod(name, stat.S_IRUSR)  # noqa: PTH101
    assert read(os.fsdecode(name)).shape == (48, 64, 3)


# --- damage (A1, A4) ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLES)
def test_a1_a_cut_file_is_refused_or_whole(name):
    """Every cut is refused, unless what is left is the whole picture and the rest was an end note."""
    data = SAMPLES[name]
    whole = decode(data)
    refused = 0
    cuts = [*range(1, len(data), max(1, len(data) // 150)), *range(len(data) - 20, len(data))]
    for cut in cuts:
        try:
            assert np.array_equal(decode(data[:cut]), whole), cut
        except DecodeError:
            refused += 1
    assert refused >= len(cuts) - 25


@pytest.mark.parametrize("name", ["jpeg", "jpeg-progressive", "jpeg-cmyk", "png", "webp", "gif"])
def test_a1_cut_in_half(name):
    with pytest.raises(DecodeError, match="truncated"):
        decode(SAMPLES[name][: len(SAMPLES[name]) // 2])


def test_a1_an_end_marker_in_the_thumbnail_is_not_the_end():
    exif_thumbnail = b"Exif\0\0" + SAMPLES["jpeg-grey"]
    data = SAMPLES["jpeg"][:2] + b"\xff\xe1" + struct.pack(">H", len(exif_thumbnail) + 2) + exif_thumbnail
    data += SAMPLES["jpeg"][2:]
    assert decode(data).shape == (48, 64, 3)
    with pytest.raises(DecodeError, match="truncated"):
        decode(data[:-300])


@pytest.mark.parametrize("name", SAMPLES)
def test_a1_bytes_behind_the_end_are_allowed(name):
    for tail in (b"\0" * 4096, b"trailing text", b"\xff\xd8\xff\xe0 half of another", SAMPLES["jpeg"]):
        assert np.array_equal(decode(SAMPLES[name] + tail), decode(SAMPLES[name]))


@pytest.mark.parametrize("options", [{}, {"restart_marker_blocks": 4}, {"subsampling": 0}])
def test_a1_data_lost_before_the_end_marker_is_found(options):
    data = encode(photo(128, 96), "JPEG", quality=90, **options)
    start = data.index(b"\xff\xda")
    for keep in (0.2, 0.5, 0.8):
        lost = data[: int(start + (len(data) - start) * keep)].rstrip(b"\xff") + b"\xff\xd9"
        for min_size in (None, 1):
            with pytest.raises(DecodeError, match="data missing"):
                decode(lost, min_size, thorough=True)


def test_a1_a_picture_that_ends_in_grey_is_fine():
    picture = photo(128, 96)
    picture[64:] = 128
    for options in ({}, {"restart_marker_blocks": 4}, {"progressive": True}):
        data = encode(picture, "JPEG", quality=90, **options)
        assert decode(data)[-1, -1].tolist() == [128, 128, 128]
        assert np.array_equal(decode(data, thorough=True), decode(data))


def test_png_checksum_is_verified():
    data = bytearray(SAMPLES["png"])
    data[len(data) // 2] ^= 1
    with pytest.raises(DecodeError, match="damaged PNG \\(checksum of IDAT\\)"):
        decode(bytes(data))


def test_png_with_missing_rows_is_refused():
    rows = zlib.compress(b"\0" * (10 * 31 - 100))
    ihdr = struct.pack(">IIBBBBB", 10, 10, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", ihdr) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")
    with pytest.raises(DecodeError, match=r"truncated|damaged"):
        decode(data)


def attack(name: str, count: int) -> tuple[int, int]:
    """Decode mutated files; count those refused and those decoded."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    refused = decoded = 0
    for _ in range(count):
        data = mutate(SAMPLES[name], rng)
        try:
            pixels = decode(data, int(rng.choice([1, 20, 1000])), thorough=True)
        except DecodeError as error:
            refused += str(error).isprintable() and len(str(error)) < 160
        else:
            assert pixels.dtype == np.uint8
            assert pixels.ndim == 3
            assert pixels.shape[2] == 3
            decoded += 1
    return refused, decoded


@pytest.mark.parametrize("name", SAMPLES)
def test_a4_1500_mutated_files_never_crash(name):
    refused, _ = attack(name, 1500)
    assert refused > 200


# --- the process ---------------------------------------------------------------------------------------


def test_memory_error_becomes_a_decode_error(monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(module, "_decode_jpeg", fail)
    with pytest.raises(DecodeError, match="memory"):
        decode(SAMPLES["jpeg"])


def test_import_is_quiet_light_and_without_threads():
    code = "import sys, rexnet_lit.data.decode, cv2; print(cv2.getNumThreads(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() in (["0", "False"], ["1", "False"])
    assert done.stderr == ""


def test_damaged_png_and_its_metadata_leave_no_trace_on_stderr():
    """libpng would write a line for each file whose colour profile it dislikes; these are everywhere."""
    data = encode(Image.fromarray(photo(8, 8)), "PNG", icc_profile=b"x" * 200)
    code = (
        "from rexnet_lit.data.decode import decode\nfrom rexnet_lit.data.image_header import DecodeError\n"
        f"decode({data!r})\n"
        f"for file in ({SAMPLES['png']!r}, {SAMPLES['jpeg']!r}):\n"
        "    for cut in (40, 100, 300, 900):\n"
        "        try: decode(file[:cut])\n"
        "        except DecodeError: pass\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""

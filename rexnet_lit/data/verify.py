"""Finding unreadable images and equal files before training, in one pass over the files.

Every file is read and decoded once, JPEGs at a fraction of their size, in threads (the decoders release the GIL).
The results are kept in the user's cache folder, never in the dataset: the next time only the size and the
modification time of each file are read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rexnet_lit.data import image_file
from rexnet_lit.data.decode import RULES, count_frames, decode_with_info
from rexnet_lit.data.duplicates import perceptual_hash, thumbnail
from rexnet_lit.data.folder import ImageFolder, Samples
from rexnet_lit.data.image_header import DecodeError, ImageInfo
from rexnet_lit.data.splits import Split
from rexnet_lit.utils.files import atomic_write, write_csv
from rexnet_lit.utils.process import cache_dir, cpu_count

_CHUNK = 32  # files per task: large enough that tasks cost little, small enough for a progress bar
_NO_CONTENT = bytes(16)
_ANIMATED = ("GIF", "PNG", "TIFF", "WEBP")  # formats that can have several frames or pages


@dataclasses.dataclass(frozen=True)
class UnreadableFile:
    """An image that cannot be used.

    Args:
        path: Relative to the dataset's folder.
        reason: Why, in a few words.
    """

    path: str
    reason: str


class Details(NamedTuple):
    """What `check` reports about a readable image: its header, and what near-duplicates are found by."""

    info: ImageInfo
    phash: int
    thumbnail: NDArray[np.uint8]


class Verification(NamedTuple):
    """The result of reading every image of a split.

    Args:
        bad: Index and reason of the unreadable ones, in the order of the samples.
        contents: (N, 16) uint8: a digest of each file's content; zeros where it is unreadable.
        details: (N,) if asked for, else empty; None where a file is unreadable.
    """

    bad: list[tuple[int, str]]
    contents: NDArray[np.uint8]
    details: list[Details | None]


class _Result(NamedTuple):
    reason: str  # empty if the file is readable
    content: bytes
    details: Details | None = None


def splits_over_limit(folder: ImageFolder, bad: Mapping[Split, int], limit: float) -> list[Split]:
    """Return the splits with more unreadable images than allowed.

    Splits drawn from one pool are counted together, because the draw decides which of them has the bad files.

    Args:
        folder: The dataset.
        bad: Number of unreadable images by split.
        limit: The fraction that is allowed.
    """
    total = {name: len(samples) for name, samples in folder.splits.items()}
    if folder.pooled:
        over = sum(bad.values()) > limit * sum(total.values())
        return [*bad] if over else []
    return [name for name, count in bad.items() if count > limit * total[name]]


def verify_images(
    samples: Samples,
    *,
    details: bool = False,
    workers: int | None = None,
    cache: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Read and decode every image.

    Args:
        samples: The images.
        details: Also return what `check` needs; this reads all files again.
        workers: Number of threads; by default one per usable CPU core.
        cache: Whether to use and update the user's cache.
        progress: Called with the number of images done and their total, in the calling thread.
    """
    total = len(samples)
    known = _KnownFiles(samples.root, enabled=cache)

    def verify_chunk(start: int) -> list[_Result]:
        indices = range(start, min(start + _CHUNK, total))
        return [_verify(samples.path(index), known, details) for index in indices]

    results = Verification([], np.zeros((total, 16), np.uint8), [])
    pool = ThreadPoolExecutor(cpu_count() if workers is None else max(workers, 1))
    try:
        starts = range(0, total, _CHUNK)
        for start, chunk in zip(starts, pool.map(verify_chunk, starts), strict=True):
            results.bad.extend((start + i, result.reason) for i, result in enumerate(chunk) if result.reason)
            digests = b"".join(_NO_CONTENT if result.reason else result.content for result in chunk)
            results.contents[start : start + _CHUNK] = np.frombuffer(digests, np.uint8).reshape(-1, 16)
            if details:
                results.details.extend(result.details for result in chunk)
            if progress is not None:
                progress(min(start + _CHUNK, total), total)
    finally:
        pool.shutdown(cancel_futures=True)
        known.save()  # after an interruption too: the next run continues here
    return results


def find_unreadable(samples: Samples) -> list[tuple[int, str]]:
    """Return index and reason of the unreadable images; see `verify_images`."""
    return verify_images(samples).bad


def _verify(path: str, known: _KnownFiles, details: bool) -> _Result:
    try:
        status = image_file.status(path)
    except (OSError, ValueError) as error:
        return _Result(getattr(error, "strerror", None) or type(error).__name__, _NO_CONTENT)
    text = b"%b\0%d\0%d" % (os.fsencode(path), status.st_size, status.st_mtime_ns)
    key = hashlib.blake2b(text, digest_size=16).digest()
    if key in known.old and not details:
        return known.old[key]
    try:
        data = image_file.read_bytes(path)
    except DecodeError as error:
        return _Result(str(error), _NO_CONTENT)  # not remembered: a disk or a permission may be repaired
    result = _examine(data, details)
    if "memory" not in result.reason:
        known.new[key] = result._replace(details=None)
    return result


def _examine(data: bytes, details: bool) -> _Result:
    content = hashlib.blake2b(data, digest_size=16).digest()
    try:
        pixels, info = decode_with_info(data, min_size=64 if details else 1, thorough=True)
    except DecodeError as error:
        return _Result(str(error), content)
    if not details:
        return _Result("", content)
    if info.format in _ANIMATED:
        info = dataclasses.replace(info, frames=count_frames(data))
    return _Result("", content, Details(info, perceptual_hash(pixels), thumbnail(pixels)))


class _KnownFiles:
    """The results for the files of a dataset, by a digest of (path, size, modification time).

    One ``.npz`` file of plain numbers per dataset folder. Two runs at once may lose each other's new results, but
    not damage the file, which is replaced as a whole. A damaged file counts as missing.
    """

    def __init__(self, root: Path, *, enabled: bool) -> None:
        name = hashlib.blake2b(os.fsencode(root) + RULES.encode(), digest_size=16).hexdigest()
        self._file = cache_dir() / "quarantine" / f"{name}.npz" if enabled else None
        self.old = self._load()
        self.new: dict[bytes, _Result] = {}

    def save(self) -> None:
        """Add what is new to the cache, if it can be written."""
        if self._file is None or not self.new:
            return
        everything = {**self._load(), **self.new}  # including what another run has written meanwhile
        bad = {index: result.reason for index, result in enumerate(everything.values()) if result.reason}
        keys = np.frombuffer(b"".join(everything), np.uint8)
        contents = np.frombuffer(b"".join(result.content for result in everything.values()), np.uint8)
        reasons = np.frombuffer(json.dumps(bad).encode(), np.uint8)
        with contextlib.suppress(OSError), atomic_write(self._file) as file:
            np.savez(file, keys=keys, contents=contents, reasons=reasons)

    def _load(self) -> dict[bytes, _Result]:
        if self._file is None:
            return {}
        try:
            with self._file.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                keys, contents = (_rows(arrays[name]) for name in ("keys", "contents"))
                reasons = json.loads(arrays["reasons"].tobytes())
            pairs = zip(keys, contents, strict=True)
            return {key: _Result(str(reasons.get(str(i), "")), content) for i, (key, content) in enumerate(pairs)}
        except Exception:  # a damaged or foreign file raises anything
            return {}


def _rows(array: NDArray[np.uint8]) -> list[bytes]:
    """Return each row of (N, 16) as bytes."""
    raw = np.ascontiguousarray(array, np.uint8).reshape(-1, 16).tobytes()
    return [raw[at : at + 16] for at in range(0, len(raw), 16)]


def write_quarantine(rows: Iterable[UnreadableFile], path: str | os.PathLike[str]) -> None:
    """Write ``path,reason`` as CSV, for people."""
    write_csv(Path(path), ("path", "reason"), ((row.path, row.reason) for row in rows))

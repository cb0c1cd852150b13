"""Finding unreadable images before training, so that no epoch meets them, and files with the same content.

Every file is decoded once, JPEGs at an eighth of their size, in threads (the decoders release Python's
lock). What was found is kept in the user's cache folder, never in the dataset: a second look at an unchanged
dataset only asks the file system for sizes and times.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rexnet_lit.data.decode import RULES, decode, read_bytes
from rexnet_lit.data.folder import ImageFolder, Samples
from rexnet_lit.data.image_header import DecodeError
from rexnet_lit.data.splits import Split
from rexnet_lit.utils.files import write_csv
from rexnet_lit.utils.process import cache_dir, cpu_count

_CHUNK = 32  # files per task: enough to make a task's cost small, few enough for a progress bar


@dataclasses.dataclass(frozen=True)
class UnreadableFile:
    """An image that cannot be used.

    Args:
        path: Relative to the dataset's folder.
        reason: Why, in a few words.
    """

    path: str
    reason: str


class Verification(NamedTuple):
    """What a look at every image has found.

    Args:
        bad: Pairs of index and reason of the unreadable ones, in the order of the samples.
        contents: (N, 16) uint8: a digest of each file's content; zeros where it is unreadable.
    """

    bad: list[tuple[int, str]]
    contents: NDArray[np.uint8]


def find_unreadable(
    samples: Samples,
    *,
    workers: int | None = None,
    cache: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[int, str]]:
    """Do what `look` does, and return the unreadable images alone."""
    return verify_images(samples, workers=workers, cache=cache, progress=progress).bad


def splits_over_limit(folder: ImageFolder, bad: Mapping[Split, int], limit: float) -> list[Split]:
    """Return the splits with more unreadable images than a run takes; all where they are of one pool: a draw is chance.

    Args:
        folder: The dataset.
        bad: How many of each split are unreadable.
        limit: The share that is allowed.
    """
    total = {name: len(samples) for name, samples in folder.splits.items()}
    if folder.pooled:
        over = sum(bad.values()) > limit * sum(total.values())
        return [*bad] if over else []
    return [name for name, count in bad.items() if count > limit * total[name]]


def verify_images(
    samples: Samples,
    *,
    workers: int | None = None,
    cache: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Read and decode every image.

    Args:
        samples: The images.
        workers: Threads; as many as there are usable cores by default.
        cache: Whether to use and update the user's cache.
        progress: Called with the number of images done and their total, in the calling thread.
    """
    total = len(samples)
    known = _Known(samples.root, enabled=cache)
    starts = range(0, total, _CHUNK)
    bad: list[tuple[int, str]] = []
    contents = np.zeros((total, 16), np.uint8)
    pool = ThreadPoolExecutor(cpu_count() if workers is None else max(workers, 1))
    try:
        for start, found in zip(starts, pool.map(lambda at: _check(samples, known, at), starts), strict=True):
            bad += [(start + i, reason) for i, (reason, _) in enumerate(found) if reason]
            digests = b"".join(_NO_CONTENT if reason else digest for reason, digest in found)
            contents[start : start + _CHUNK] = np.frombuffer(digests, np.uint8).reshape(-1, 16)
            if progress is not None:
                progress(min(start + _CHUNK, total), total)
    finally:
        pool.shutdown(cancel_futures=True)
        known.save()  # after an interruption too: the next run goes on from here
    return Verification(bad, contents)


def _check(samples: Samples, known: _Known, start: int) -> list[tuple[str, bytes]]:
    """Check one chunk."""
    return [known.check(samples.path(index)) for index in range(start, min(start + _CHUNK, len(samples)))]


def count_duplicates(contents: Sequence[NDArray[np.uint8]], targets: Sequence[NDArray[np.int64]]) -> tuple[int, int]:
    """Count files whose content stands elsewhere too: in another split, and under another class.

    Args:
        contents: `Looks.contents` of each split.
        targets: The class numbers (N,) of each split.
    """
    digests = np.concatenate(contents).view("V16").ravel()
    splits, classes = np.repeat(np.arange(len(contents)), [len(c) for c in contents]), np.concatenate(targets)
    _, content, counts = np.unique(digests, return_inverse=True, return_counts=True)
    known = digests != np.zeros((), "V16")

    def files_in_several(of: NDArray[np.int64]) -> int:
        pairs = np.unique(np.stack([content[known], of[known]]), axis=1)[0]
        return int(counts[np.bincount(pairs, minlength=len(counts)) > 1].sum())

    return files_in_several(splits), files_in_several(classes)


_NO_CONTENT = bytes(16)


class _Known:
    """What is known about files of one dataset: by (path, size, time of change), good or why not, and the content.

    One ``.npz`` file of plain numbers per dataset folder. Two runs at once may lose each other's news, but
    not harm the file: it is replaced as a whole. Whatever is wrong with it, it is as if it were not there.
    """

    def __init__(self, root: Path, *, enabled: bool) -> None:
        name = hashlib.blake2b(os.fsencode(root) + RULES.encode(), digest_size=16).hexdigest()
        self._file = cache_dir() / "quarantine" / f"{name}.npz" if enabled else None
        self._seen = self._load()
        self._news: dict[bytes, tuple[str, bytes]] = {}

    def check(self, path: str) -> tuple[str, bytes]:
        """Return why a file is bad, empty if it is good, and its content's digest. May run in several threads."""
        try:
            status = os.stat(path)  # noqa: PTH116 - once per sample: no Path objects
        except (OSError, ValueError) as error:
            return getattr(error, "strerror", None) or type(error).__name__, _NO_CONTENT
        text = b"%b\0%d\0%d" % (os.fsencode(path), status.st_size, status.st_mtime_ns)
        key = hashlib.blake2b(text, digest_size=16).digest()
        if key in self._seen:
            return self._seen[key]
        try:
            data = read_bytes(path)
        except DecodeError as error:
            return str(error), _NO_CONTENT  # a failing disk or a missing permission may be mended: not remembered
        reason = ""
        try:
            decode(data, min_size=1, thorough=True)
        except DecodeError as error:
            reason = str(error)
        found = reason, hashlib.blake2b(data, digest_size=16).digest()
        if "memory" not in reason:
            self._news[key] = found
        return found

    def save(self) -> None:
        """Add what is new to the cache, if it can be written."""
        if self._file is None or not self._news:
            return
        everything = {**self._load(), **self._news}  # what another run wrote meanwhile stays
        keys = np.frombuffer(b"".join(everything), np.uint8).reshape(-1, 16)
        contents = np.frombuffer(b"".join(digest for _, digest in everything.values()), np.uint8).reshape(-1, 16)
        bad = {index: reason for index, (reason, _) in enumerate(everything.values()) if reason}
        reasons = np.frombuffer(json.dumps(bad).encode(), np.uint8)
        temporary = None
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._file.parent, suffix=".tmp", delete=False) as file:
                temporary = Path(file.name)
                np.savez(file, keys=keys, reasons=reasons, contents=contents)
            temporary.replace(self._file)
        except OSError:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    temporary.unlink()

    def _load(self) -> dict[bytes, tuple[str, bytes]]:
        if self._file is None:
            return {}
        try:
            with self._file.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                keys, contents = (_rows(arrays[name]) for name in ("keys", "contents"))
                reasons = json.loads(arrays["reasons"].tobytes())
            return {
                key: (str(reasons.get(str(index), "")), content)
                for index, (key, content) in enumerate(zip(keys, contents, strict=True))
            }
        except Exception:  # a cut or foreign file raises anything
            return {}


def _rows(array: NDArray[np.uint8]) -> list[bytes]:
    """Return each row of (N, 16) as bytes."""
    raw = np.ascontiguousarray(array, np.uint8).reshape(-1, 16).tobytes()
    return [raw[at : at + 16] for at in range(0, len(raw), 16)]


def write_quarantine(rows: Iterable[UnreadableFile], path: str | os.PathLike[str]) -> None:
    """Write ``path,reason`` as CSV, for people."""
    write_csv(Path(path), ("path", "reason"), ((row.path, row.reason) for row in rows))

"""Decoded images, kept so that later epochs decode nothing: in memory or on the disk (``data.cache``).

What is kept is just what `decode.read` returned, so a cache changes no result. On the disk each image is a ``.npy``
file in the user's cache folder, never in the dataset, named after the image's path, size, time of change and the
pixels that the recipe needs: a changed file or recipe finds nothing of its past. Files appear by renaming, so neither a
killed run nor another that shares the folder leaves half of one. A ledger in the folder holds how many bytes are kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

try:
    import fcntl
except ImportError:  # where there is none, two runs that fill the cache at the same moment may miscount
    fcntl = None  # type: ignore[assignment]

import numpy as np
from numpy.typing import NDArray

from rexnet_lit.data import decode, image_header
from rexnet_lit.utils import process
from rexnet_lit.utils.errors import UserError

Image = NDArray[np.uint8]

_LEFTOVER = 3600.0
"""Seconds after which a file that is still being written belongs to nobody."""


def decode_all(paths: Sequence[str], min_size: int, limit: float | None = None) -> list[Image | None]:
    """Decode images once, for all epochs, until the memory is full; None stands for what does not fit.

    OpenCV releases the interpreter, so threads are enough.

    Args:
        paths: The files.
        min_size: As `decode.read` takes it.
        limit: Bytes to use at most; half of the free memory by default.
    """
    free = [limit if limit is not None else process.available_memory() / 2]

    def take(path: str) -> Image | None:
        if free[0] <= 0:
            return None
        try:
            image = decode.read(path, min_size)
        except image_header.DecodeError:
            return None  # it has just broken: who asks for it next says so
        free[0] -= image.nbytes  # two threads at once may overdraw it by an image
        return image

    with ThreadPoolExecutor(process.cpu_count()) as pool:
        return list(pool.map(take, paths))


class DiskCache:
    """Reads images, and keeps what was decoded.

    All processes of all runs share it: the folder, and the count of its bytes. When none are left, what no run has read
    since this one began makes room, the longest unread first; then nothing more is kept.

    Args:
        folder: Where; the user's cache folder by default.
        limit: Bytes that all of it may fill; half of what is there and free by default.

    Raises:
        UserError: The folder cannot be made.
    """

    def __init__(self, folder: Path | None = None, limit: float | None = None) -> None:
        self._folder = folder or process.cache_dir() / "decoded"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache: {self._folder}: {error.strerror}; set XDG_CACHE_HOME to a folder of yours, "
                            "or data.cache to ram or none") from None  # fmt: skip
        self._started = time.time()
        self._ledger = self._folder / ".bytes"
        self._old: list[tuple[float, int, str]] = []
        self._limit, self._used = limit or 0.0, 0
        with contextlib.suppress(OSError), self._counting():  # on a read-only disk nothing will be kept
            self._old = self._tidy()
            self._used = sum(size for _, size, _ in self._old)
            if limit is None:
                self._limit = (self._used + shutil.disk_usage(self._folder).free) / 2
            self._make_room(0)

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        """Have the count of bytes to oneself, read and then written down."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(self._ledger, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            text = file.read()
            self._used = int(text) if text.isdigit() else 0
            yield
            file.seek(0)
            file.write(b"%020d" % self._used)

    def _tidy(self) -> list[tuple[float, int, str]]:
        """Remove what killed runs have left; return time, bytes and path of all images, the longest unread last."""
        files: list[tuple[float, int, str]] = []
        for folder in os.scandir(self._folder):
            for entry in os.scandir(folder) if folder.is_dir() else ():
                with contextlib.suppress(OSError):  # another run may tidy too
                    status = entry.stat()
                    if entry.name.endswith(".npy"):
                        files.append((status.st_mtime, status.st_size, entry.path))
                    elif time.time() - status.st_mtime > _LEFTOVER:
                        Path(entry.path).unlink()
        return sorted(files, reverse=True)

    def _make_room(self, size: int) -> bool:
        """Say whether ``size`` bytes are left, if need be without what has not been read since the run began."""
        while self._limit - self._used < size and self._old:
            _, freed, path = self._old.pop()
            with contextlib.suppress(OSError):  # gone: another process has counted it
                if os.stat(path).st_mtime < self._started:  # noqa: PTH116
                    os.unlink(path)  # noqa: PTH108
                    self._used -= freed
        return self._limit - self._used >= size

    def read(self, path: str, min_size: int) -> Image:
        """Return what `decode.read` would.

        Raises:
            DecodeError: The file cannot be read, or is no usable image.
        """
        file = self._file(path, min_size)
        with contextlib.suppress(OSError, ValueError, EOFError):
            image: Image = np.load(file, mmap_mode="r", allow_pickle=False)
            if image.dtype == np.uint8 and image.ndim == 3:
                with contextlib.suppress(OSError):
                    os.utime(file)
                return image
        decoded = decode.read(path, min_size)
        self._keep(file, decoded)
        return decoded

    def _file(self, path: str, min_size: int) -> str:
        try:
            status = os.stat(path)  # noqa: PTH116 - called once per sample: no Path objects
        except OSError as error:
            raise image_header.DecodeError(error.strerror or type(error).__name__) from None
        key = os.fsencode(path) + f"\0{status.st_size} {status.st_mtime_ns} {min_size} {decode.RULES}".encode()
        name = hashlib.blake2b(key, digest_size=16).hexdigest()
        return os.path.join(self._folder, name[:2], f"{name}.npy")  # noqa: PTH118

    def _keep(self, file: str, image: Image) -> None:
        folder = os.path.dirname(file)  # noqa: PTH120
        with contextlib.suppress(OSError):  # a full or read-only disk keeps nothing, and harms nobody
            with self._counting():
                if not self._make_room(image.nbytes):
                    return
                self._used += image.nbytes
            os.makedirs(folder, exist_ok=True)  # noqa: PTH103
            descriptor, temporary = tempfile.mkstemp(dir=folder)
            try:
                with os.fdopen(descriptor, "wb") as stream:
                    np.save(stream, image, allow_pickle=False)
                os.replace(temporary, file)  # noqa: PTH105
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                with self._counting():
                    self._used -= image.nbytes
                raise

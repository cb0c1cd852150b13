"""Decoded images, kept so that later epochs do not decode them again: in memory or on disk (``data.cache``).

The cache holds what `decode.read` returned, so it changes no result. On disk each image is a ``.npy`` file in the
user's cache folder, never in the dataset. Its name is a digest of the path, size and modification time of the image
and the number of pixels that the recipe needs, so a changed file or recipe is decoded again. Files appear by renaming:
neither a killed run nor another run that shares the folder leaves an incomplete one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # on Windows two runs that fill the cache at the same time may miscount
    fcntl = None  # type: ignore[assignment]

import numpy as np
from numpy.typing import NDArray

from rexnet_lit.data import decode, image_file, image_header
from rexnet_lit.utils import process
from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.files import atomic_write

Image = NDArray[np.uint8]

_LEFTOVER_SECONDS = 3600.0  # after this time a file that is still being written belongs to a killed run


def decode_all(paths: Sequence[str], min_size: int, limit: float | None = None) -> list[Image | None]:
    """Decode images once, for all epochs, until the memory is full; None for those that do not fit.

    OpenCV and Pillow release the GIL, so threads are enough.

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
            return None  # damaged since it was verified: reported when it is next read
        free[0] -= image.nbytes  # two threads at once may exceed the limit by an image
        return image

    with ThreadPoolExecutor(process.cpu_count()) as pool:
        return list(pool.map(take, paths))


class DiskCache:
    """Reads images, and keeps what was decoded.

    All processes of all runs share the folder and the count of its bytes (in ``.bytes``, locked with flock: filelock
    takes 14 times as long per image). When the limit is reached, images that no run has read since this one started
    are removed, the longest unread first; after that nothing more is kept.

    Args:
        folder: The folder; by default in the user's cache folder.
        limit: Bytes that the whole cache may use; by default half of what it uses already and what is free.

    Raises:
        UserError: The folder cannot be made.
    """

    def __init__(self, folder: Path | None = None, limit: float | None = None) -> None:
        self._folder = folder or process.cache_dir() / "decoded"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"data.cache: {self._folder}: {error.strerror}; set XDG_CACHE_HOME to another folder, "
                "or data.cache to ram or none"
            ) from None
        self._started = time.time()
        self._old: list[tuple[float, int, str]] | None = None
        """Images by time, the longest unread last; None before they are listed."""
        self._limit, self._used = limit or 0.0, 0
        with contextlib.suppress(OSError), self._counting():  # nothing is kept on a read-only disk
            self._old = self._scan()
            self._used = sum(size for _, size, _ in self._old)
            if limit is None:
                self._limit = (self._used + shutil.disk_usage(self._folder).free) / 2
            self._make_space(0)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes without the list of images, which a worker that is not forked makes if it needs it."""
        return {**self.__dict__, "_old": None}

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        """Hold the lock on the count of bytes, which is in `_used` within the block."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(self._folder / ".bytes", os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            text = file.read()
            self._used = int(text) if text.isdigit() else 0
            yield
            file.seek(0)
            file.write(b"%020d" % self._used)

    def _scan(self) -> list[tuple[float, int, str]]:
        """Remove leftovers of killed runs; return (time, bytes, path) of all images, the longest unread last."""
        files: list[tuple[float, int, str]] = []
        for folder in os.scandir(self._folder):
            for entry in os.scandir(folder) if folder.is_dir() else ():
                with contextlib.suppress(OSError):  # another run may remove it at the same time
                    status = entry.stat()
                    if entry.name.endswith(".npy"):
                        files.append((status.st_mtime, status.st_size, entry.path))
                    elif time.time() - status.st_mtime > _LEFTOVER_SECONDS:
                        Path(entry.path).unlink()
        return sorted(files, reverse=True)

    def _make_space(self, size: int) -> bool:
        """Remove images that were not read since the start until ``size`` bytes are left; return whether they are."""
        if self._old is None and self._limit - self._used < size:
            self._old = self._scan()
        while self._limit - self._used < size and self._old:
            _, freed, path = self._old.pop()
            with contextlib.suppress(OSError):  # removed, and subtracted, by another process
                if os.stat(path).st_mtime < self._started:  # noqa: PTH116
                    os.unlink(path)  # noqa: PTH108
                    self._used -= freed
        return self._limit - self._used >= size

    def read(self, path: str, min_size: int) -> Image:
        """Return what `decode.read` would.

        Raises:
            DecodeError: The file cannot be read, or is not a usable image.
        """
        file = self._file(path, min_size)
        with contextlib.suppress(OSError, ValueError, EOFError):
            image: Image = np.load(file, mmap_mode="r", allow_pickle=False)
            if image.dtype == np.uint8 and image.ndim == 3:
                with contextlib.suppress(OSError):
                    os.utime(file)
                return image
        decoded = decode.read(path, min_size)
        with contextlib.suppress(OSError):  # a full or read-only disk keeps nothing
            self._keep(file, decoded)
        return decoded

    def _file(self, path: str, min_size: int) -> str:
        try:
            status = image_file.status(path)
        except OSError as error:
            raise image_header.DecodeError(error.strerror or type(error).__name__) from None
        key = os.fsencode(path) + f"\0{status.st_size} {status.st_mtime_ns} {min_size} {decode.RULES}".encode()
        name = hashlib.blake2b(key, digest_size=16).hexdigest()
        return os.path.join(self._folder, name[:2], f"{name}.npy")  # noqa: PTH118

    def _keep(self, file: str, image: Image) -> None:
        with self._counting():
            if not self._make_space(image.nbytes):
                return
            self._used += image.nbytes
        try:
            with atomic_write(Path(file), durable=False) as stream:
                np.save(stream, image, allow_pickle=False)
        except BaseException:
            with self._counting():
                self._used -= image.nbytes
            raise

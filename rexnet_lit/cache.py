"""Decoded images, kept so that later epochs decode nothing: in memory or on the disk (``data.cache``).

What is kept is just what `decode.read` returned, so a cache changes no result. On the disk each image is a ``.npy``
file in the user's cache folder, never in the dataset, named after the image's path, size, time of change and the
pixels that the recipe needs: a changed file or recipe finds nothing of its past. Files appear by renaming, so neither a
killed run nor another that shares the folder leaves half of one.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rexnet_lit import decode, process
from rexnet_lit.errors import UserError

__all__ = ["DiskCache", "decode_all"]

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
    free = [limit if limit is not None else process.free_memory() / 2]

    def take(path: str) -> Image | None:
        if free[0] <= 0:
            return None
        try:
            image = decode.read(path, min_size)
        except decode.DecodeError:
            return None  # it has just broken: who asks for it next says so
        free[0] -= image.nbytes  # two threads at once may overdraw it by an image
        return image

    with ThreadPoolExecutor(process.cpu_count()) as pool:
        return list(pool.map(take, paths))


class DiskCache:
    """Reads images, and keeps what was decoded.

    Processes share it: the folder, and the bytes that are left. When none are left, what no run has read since this one
    began makes room, the longest unread first; then nothing more is kept. (Two runs that fill it at the same time each
    count their own bytes; the next one to start takes away what is too much.)

    Args:
        folder: Where; the user's cache folder by default.
        limit: Bytes that all of it may fill; half of what is there and free by default.
        sharers: Processes that make one for the same run.

    Raises:
        UserError: The folder cannot be made.
    """

    def __init__(self, folder: Path | None = None, limit: float | None = None, sharers: int = 1) -> None:
        self._folder = folder or process.cache_folder() / "decoded"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache: {self._folder}: {error.strerror}; set XDG_CACHE_HOME to a folder of yours, "
                            "or data.cache to ram or none") from None  # fmt: skip
        self._started = time.time()
        self._old = self._tidy()
        used = sum(size for _, size, _ in self._old)
        bound = limit if limit is not None else (used + shutil.disk_usage(self._folder).free) / 2
        self._left = multiprocessing.Value("d", (bound - used) / sharers)
        self._make_room(0)

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
        while self._left.value < size and self._old:
            _, freed, path = self._old.pop()
            with contextlib.suppress(OSError):  # gone: another process has counted it
                if os.stat(path).st_mtime < self._started:  # noqa: PTH116
                    os.unlink(path)  # noqa: PTH108
                    self._left.value += freed
        return bool(self._left.value >= size)

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
            raise decode.DecodeError(error.strerror or type(error).__name__) from None
        key = os.fsencode(path) + f"\0{status.st_size} {status.st_mtime_ns} {min_size} {decode.RULES}".encode()
        name = hashlib.blake2b(key, digest_size=16).hexdigest()
        return os.path.join(self._folder, name[:2], f"{name}.npy")  # noqa: PTH118

    def _keep(self, file: str, image: Image) -> None:
        with self._left.get_lock():
            if not self._make_room(image.nbytes):
                return
            self._left.value -= image.nbytes
        folder = os.path.dirname(file)  # noqa: PTH120
        with contextlib.suppress(OSError):  # a full or read-only disk keeps nothing, and harms nobody
            os.makedirs(folder, exist_ok=True)  # noqa: PTH103
            descriptor, temporary = tempfile.mkstemp(dir=folder)
            try:
                with os.fdopen(descriptor, "wb") as stream:
                    np.save(stream, image, allow_pickle=False)
                os.replace(temporary, file)  # noqa: PTH105
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise

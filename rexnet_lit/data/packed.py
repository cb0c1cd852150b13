"""Packed datasets: the images of a folder in a few tar files with an index, on a disk or in object storage.

A shard is an ordinary, uncompressed tar file. ``tar -xf`` restores the folder from it, and webdataset reads it. The
index says where each image is, so that images are read in any order, as from the folder: with the same seed, a packed
dataset trains the same weights. Listing it takes one file instead of a folder per class, and reading an image one
``pread`` in a file that stays open, or one request for a range of bytes.

A packed image has the path that it would have in the folder, below the folder of the index. For a URL that is a folder
of the cache, into which the index is copied.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import os
import stat
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rexnet_lit.data.walk import PathList, Walk
from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.files import atomic_write, expand_home, is_url, write_file
from rexnet_lit.utils.process import cache_dir

INDEX = "rexnet_lit_index.npz"
VERSION = 1

_SOURCE = "source.txt"  # beside the copy of an index: the URL of its shards
_MAX_OPEN = 64
"""Shards that a process keeps open: some systems allow 256 files in all."""


@dataclasses.dataclass(frozen=True)
class PackedImage:
    """One image of a packed dataset, with the names that ``os.stat`` gives to what a file has."""

    pack: Pack
    shard: int
    start: int
    st_size: int
    st_mtime_ns: int
    st_mode: int = stat.S_IFREG

    def read(self) -> bytes:
        """Return the content of its file.

        Raises:
            OSError: The shard cannot be read, or is shorter than the index says.
        """
        data = self.pack.read(self.shard, self.start, self.st_size)
        if len(data) != self.st_size:
            shorter = f"{self.pack.shards[self.shard]} is shorter than the index says; pack the folder again"
            raise OSError(errno.EIO, shorter)
        return data


class Pack:
    """The index of a packed dataset, and its shards.

    Args:
        root: The folder of the index; its shards are beside it, or at the URL that is noted there.

    Raises:
        UserError: The index is damaged, or of another version.
    """

    def __init__(self, root: str) -> None:
        file = os.path.join(root, INDEX)  # noqa: PTH118
        try:
            content = Path(file).read_bytes()
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                version = int(arrays["version"])
                self.shards: list[str] = arrays["shards"].tobytes().decode().split("\n")
                self.paths = PathList.from_buffer(arrays["paths"].tobytes(), arrays["offsets"])
                self._shard, self._start, self._size = (arrays[name] for name in ("shard", "start", "size"))
        except Exception as error:  # a damaged file raises anything
            raise UserError(f"{file}: a damaged index ({type(error).__name__}); pack the folder again") from None
        if version != VERSION:
            raise UserError(f"{file}: written by another version of rexnet_lit; pack the folder again")
        self.modified = os.stat(file).st_mtime_ns  # noqa: PTH116
        source = Path(root, _SOURCE)
        self._url = source.read_text(encoding="utf-8") if source.is_file() else ""
        self._root = root
        self._lock = threading.Lock()
        self._open: dict[int, int] = {}
        self._remote: tuple[int, Any, str] = (0, None, "")
        # In place of the time of a file: other copies of the index have the same.
        self._state = int.from_bytes(hashlib.blake2b(content, digest_size=7).digest(), "big")
        if self._url and len(self.read(0, 0, 1)) != 1:
            raise UserError(
                f"{self._url}: the server ignores requests for a range of bytes; copy the dataset to a disk"
            )

    def find(self, path: bytes) -> PackedImage | None:
        """Return an image by its path below the root."""
        at = self.position(path)
        if at == len(self.paths) or self.paths.raw(at) != path:
            return None
        return PackedImage(self, int(self._shard[at]), int(self._start[at]), int(self._size[at]), self._state)

    def position(self, path: bytes) -> int:
        """Return where a path is, or would be, in the sorted list."""
        low, high = 0, len(self.paths)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.paths.raw(middle) < path else (low, middle)
        return low

    def read(self, shard: int, start: int, size: int) -> bytes:
        """Return bytes of a shard; threads and forked processes may read at once."""
        if self._url:
            system, where = self._file_system()
            try:
                return bytes(system.cat_file(f"{where}/{self.shards[shard]}", start=start, end=start + size))
            except OSError:
                raise
            except Exception as error:  # the client's own errors: of the network, of permissions
                raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error
        descriptor = self._open.get(shard)
        if descriptor is not None:
            return self._read_at(descriptor, start, size)
        binary = getattr(os, "O_BINARY", 0)  # of Windows
        descriptor = os.open(os.path.join(self._root, self.shards[shard]), os.O_RDONLY | binary)  # noqa: PTH118
        keep = False
        try:
            data = self._read_at(descriptor, start, size)
            with self._lock:
                keep = shard not in self._open and len(self._open) < _MAX_OPEN
                if keep:
                    self._open[shard] = descriptor
        finally:
            if not keep:
                os.close(descriptor)
        return data

    def _read_at(self, descriptor: int, start: int, size: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(descriptor, size, start)
        with self._lock:  # Windows, where no process is forked
            os.lseek(descriptor, start, os.SEEK_SET)
            return os.read(descriptor, size)

    def _file_system(self) -> tuple[Any, str]:
        process, system, where = self._remote
        if process != os.getpid():  # clients do not survive a fork
            system, where = _file_system(self._url)
            self._remote = (os.getpid(), system, where)
        return system, where


def write_index(folder: Path, shards: Sequence[str], paths: PathList, places: NDArray[np.int64]) -> None:
    """Write the index of a packed dataset.

    Args:
        folder: Where its shards are.
        shards: Their names.
        paths: Those of the images, below the root, sorted.
        places: (N, 3): the shard of each image, where its content starts in there, and its size in bytes.
    """
    with atomic_write(folder / INDEX) as file:
        np.savez_compressed(
            file,
            version=np.int64(VERSION),
            shards=np.frombuffer("\n".join(shards).encode(), np.uint8),
            paths=np.frombuffer(paths.buffer, np.uint8),
            offsets=paths.offsets,
            shard=places[:, 0].astype(np.int32),
            start=places[:, 1],
            size=places[:, 2],
        )


class PackedWalk(Walk):
    """A `Walk` through the index of a packed dataset, in which there are only folders and images."""

    def __init__(self, root: bytes, pack: Pack) -> None:
        super().__init__(root)
        self._pack = pack

    def folders(self, relative: bytes) -> tuple[list[bytes], int]:
        """List a folder's sub-folders, and count the images directly in it."""
        low, high, start = self._range(relative)
        names, images = [], 0
        while low < high:
            name, slash, _ = self._pack.paths.raw(low)[start:].partition(b"/")
            if slash:
                names.append(name)
                low = self._range(self._pack.paths.raw(low)[: start + len(name)])[1]
            else:
                images, low = images + 1, low + 1
        return names, images

    def images(self, tops: Sequence[bytes]) -> list[PathList]:
        """List the images below each of these folders, sorted."""
        found = []
        for top in tops:
            low, high, start = self._range(top)
            raws = [self._pack.paths.raw(at) for at in range(low, high)]
            inner = dict.fromkeys(raw.rpartition(b"/")[0] for raw in raws if b"/" in raw[start:])
            self.nested.extend(os.fsdecode(folder) for folder in inner)
            found.append(PathList(raws))
        return found

    def is_file(self, path: bytes) -> bool:
        """Return whether there is such an image."""
        return self._pack.find(path) is not None

    def stays_inside(self, path: bytes) -> bool:
        """Return True: there are no links."""
        return True

    def _range(self, folder: bytes) -> tuple[int, int, int]:
        """Return where the paths in a folder start and end in the list, and where the names in them start."""
        if not folder:
            return 0, len(self._pack.paths), 0
        prefix = folder + b"/"
        return self._pack.position(prefix), self._pack.position(folder + b"0"), len(prefix)  # "0" follows "/"


def local_folder(root: str | os.PathLike[str]) -> Path:
    """Return the folder of a dataset, absolute; for a URL, one of the cache, into which its index is copied.

    Raises:
        UserError: There is no packed dataset at the URL, or it cannot be read.
    """
    if not is_url(root):
        return Path(os.path.abspath(expand_home(root)))  # noqa: PTH100 - resolve() would replace the user's links
    url = os.fspath(root).rstrip("/")
    folder = cache_dir() / "packed" / hashlib.blake2b(url.encode(), digest_size=8).hexdigest() / url.rpartition("/")[2]
    system, where = _file_system(url)
    try:
        index = system.cat_file(f"{where}/{INDEX}")
    except FileNotFoundError:
        raise UserError(f"{url}: there is no {INDEX} here; upload what `rexnet-lit pack DIR OUT` has written") from None
    except Exception as error:
        raise UserError(f"{url}: cannot be read: {type(error).__name__}: {error}") from error
    file = folder / INDEX
    try:
        if not file.is_file() or file.read_bytes() != index:  # else it need not be read again
            write_file(folder / _SOURCE, url)
            with atomic_write(file) as stream:
                stream.write(index)
    except OSError as error:
        raise UserError(
            f"{url}: its index cannot be kept in {folder} ({error.strerror}); set XDG_CACHE_HOME"
        ) from error
    return folder


def _file_system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs  # a dependency of torch and Lightning

    try:
        return url_to_fs(url)  # type: ignore[no-any-return]
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {error}") from None

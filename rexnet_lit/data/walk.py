# ruff: noqa: PTH113, PTH114, PTH116, PTH118, PTH120 - bytes, and a million of them
"""Walking folders of images: which files are images, which are clutter, and where links may lead.

One pass of ``os.scandir`` over bytes, without a ``stat`` or an object per file, so that a million files take
seconds and little memory. No file is opened or written.
"""

from __future__ import annotations

import collections
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

IMAGE_SUFFIXES = frozenset(
    b"jpg jpeg jpe jif jfi jfif jfif-tbnl pjp pjpeg mpo jps png apng webp bmp dib tif tiff btf tf8 gif".split()
)
_COMMON_ENDS = frozenset((b".jpg", b".JPG", b".png", b".PNG"))
_DOT = ord(".")
_OTHER_IMAGE_SUFFIXES = frozenset(
    b"heic heif avif svg psd raw dng cr2 cr3 nef arw orf rw2 jp2 j2k jxl jxr ico tga dds exr hdr ppm pgm pbm "
    b"pnm pcx xcf eps ai".split()
)
_CLUTTER_FOLDERS = frozenset((b"__MACOSX", b"@eaDir", b"__pycache__", b"$RECYCLE.BIN", b"lost+found"))


class PathList:
    """Paths relative to a root, in one buffer of bytes and one array of offsets.

    Reading from a list of a million strings writes reference counts, which makes every DataLoader worker copy the
    pages; reading from this does not. Undecodable bytes are kept as by ``os.fsdecode``. The separator is ``/``.
    """

    def __init__(self, paths: Sequence[bytes] = ()) -> None:
        self.buffer = b"".join(paths)
        ends = itertools.accumulate(map(len, paths), initial=0)
        self.offsets = np.fromiter(ends, np.int64, len(paths) + 1)

    @classmethod
    def from_buffer(cls, buffer: bytes, offsets: NDArray[np.int64]) -> PathList:
        """Return the paths of another list's `buffer` and `offsets`."""
        paths = cls()
        paths.buffer, paths.offsets = buffer, offsets
        return paths

    @classmethod
    def join(cls, parts: Sequence[PathList]) -> PathList:
        """Return all paths of several lists, in order."""
        whole = cls()
        whole.buffer = b"".join(part.buffer for part in parts)
        whole.offsets = np.cumsum(np.concatenate([whole.offsets, *(np.diff(part.offsets) for part in parts)]))
        return whole

    def raw(self, index: int) -> bytes:
        """Return a path in bytes."""
        return self.buffer[self.offsets[index] : self.offsets[index + 1]]

    def raws(self) -> list[bytes]:
        """Return all paths in bytes."""
        return [self.buffer[a:b] for a, b in itertools.pairwise(self.offsets.tolist())]

    def take(self, indices: NDArray[np.integer]) -> PathList:
        """Return the paths at these indices, in this order."""
        starts, ends = self.offsets[indices].tolist(), self.offsets[np.asarray(indices) + 1].tolist()
        return PathList([self.buffer[a:b] for a, b in zip(starts, ends, strict=True)])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return os.fsdecode(self.raw(int(index) % len(self)))

    def __iter__(self) -> Iterator[str]:
        return map(os.fsdecode, self.raws())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PathList):
            return NotImplemented
        return self.buffer == other.buffer and np.array_equal(self.offsets, other.offsets)


def is_clutter(name: bytes) -> bool:
    """Return whether a file or folder is hidden, or one that operating systems and tools leave behind."""
    return name[:1] == b"." or name in _CLUTTER_FOLDERS


def _suffix(name: bytes) -> bytes:
    return name[name.rfind(b".") + 1 :].lower() if b"." in name else b""


class Walk:
    """Collects the images below folders, and what it leaves out.

    Args:
        root: The dataset's folder; links must stay inside, unless `follow_outside_links`.
        follow_outside_links: Whether links may lead anywhere.
    """

    def __init__(self, root: bytes, *, follow_outside_links: bool = False) -> None:
        self.root = root
        self.problems: list[str] = []
        """What makes the folder unusable, for the user; the modules that read it add to these."""
        self.notes: list[str] = []
        self.clutter = 0
        self.unsupported: collections.Counter[str] = collections.Counter()
        self.nested: list[str] = []
        self.broken_links: list[str] = []
        self.repeated_links: list[str] = []
        self.outside_links: list[str] = []
        self.unreadable: list[str] = []
        self._follow_outside_links = follow_outside_links
        self._real_root = os.path.realpath(root)

    def folders(self, relative: bytes) -> tuple[list[bytes], int]:
        """List a folder's sub-folders (links to folders included), and count the images directly in it."""
        kinds = [(self._kind(entry, relative), entry.name) for entry in self._entries(relative)]
        return sorted(name for kind, name in kinds if kind == "folder"), sum(kind == "image" for kind, _ in kinds)

    def images(self, tops: Sequence[bytes]) -> list[PathList]:
        """List the images below each of these folders, sorted.

        Each real folder is read once, and before any link to it is followed. Links are followed in the order in which
        they are found, `tops` that are links among them.
        """
        found: list[list[PathList]] = [[] for _ in tops]
        links: collections.deque[tuple[int, bytes]] = collections.deque()
        seen: set[tuple[int, int]] = set()

        def read(start: bytes, number: int, is_link: bool = False) -> None:
            names, inner = self._read(start, tops[number], seen, is_link)
            found[number].append(PathList(sorted(names)))
            links.extend((number, link) for link in inner)

        for number, top in enumerate(tops):
            if os.path.islink(self._absolute(top)):
                links.append((number, top))
            else:
                read(top, number)
        while links:
            number, link = links.popleft()
            identity = self._identity(link)
            if identity in seen or (identity and self._leads_up(link)):
                self.repeated_links.append(os.fsdecode(link))
            elif identity and self.stays_inside(link):
                read(link, number, is_link=True)
        return [parts[0] if len(parts) == 1 else _merge(parts) for parts in found]

    def _read(
        self, start: bytes, top: bytes, seen: set[tuple[int, int]], is_link: bool
    ) -> tuple[list[bytes], list[bytes]]:
        """Return the images in a folder and in the real folders below it, and the links to folders."""
        names: list[bytes] = []
        links: list[bytes] = []
        stack = [start]
        while stack:
            folder = stack.pop()
            identity = self._identity(folder)
            if identity is None:
                continue
            if is_link and identity in seen:  # by a link to a folder inside this one
                self.repeated_links.append(os.fsdecode(folder))
                continue
            seen.add(identity)
            before, prefix = len(names), folder + b"/" if folder else b""
            for entry in self._entries(folder):
                name = entry.name
                if name[-4:] in _COMMON_ENDS and name[0] != _DOT and entry.is_file(follow_symlinks=False):
                    names.append(prefix + name)  # the fast path for nearly all of a million files
                    continue
                kind, path = self._kind(entry, folder), prefix + name
                if kind == "folder" and entry.is_symlink():
                    links.append(path)
                elif kind == "folder":
                    stack.append(path)
                elif kind == "image" and (not entry.is_symlink() or self.stays_inside(path)):
                    names.append(path)
            if folder != top and len(names) > before:
                self.nested.append(os.fsdecode(folder))
        return names, links

    def _kind(self, entry: os.DirEntry[bytes], folder: bytes) -> Literal["folder", "image", "other"]:
        """Classify an entry, and count it if it is left out."""
        if is_clutter(entry.name):
            self.clutter += 1
            return "other"
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # a link to itself, or through a file
            is_folder = is_file = False
        suffix = _suffix(entry.name)
        if is_folder:
            return "folder"
        if is_file and suffix in IMAGE_SUFFIXES:
            return "image"
        if not is_file and entry.is_symlink():
            self.broken_links.append(os.fsdecode(os.path.join(folder, entry.name)))
            return "other"
        self.clutter += 1
        if suffix in _OTHER_IMAGE_SUFFIXES or b"." not in entry.name:
            self.unsupported[suffix.decode()] += 1
        return "other"

    def _entries(self, relative: bytes) -> list[os.DirEntry[bytes]]:
        try:
            with os.scandir(self._absolute(relative)) as entries:
                return list(entries)
        except OSError:
            self.unreadable.append(os.fsdecode(relative))
            return []

    def _absolute(self, relative: bytes) -> bytes:
        return os.path.join(self.root, relative) if relative else self.root

    def _identity(self, relative: bytes) -> tuple[int, int] | None:
        """Return what two names of the same folder share; None, and record it, if it cannot be read."""
        try:
            status = os.stat(self._absolute(relative))
        except OSError:
            self.unreadable.append(os.fsdecode(relative))
            return None
        return status.st_dev, status.st_ino

    def _leads_up(self, link: bytes) -> bool:
        """Return whether a link leads to a folder that contains it: a loop."""
        path = self._absolute(link)
        return _is_inside(os.path.realpath(os.path.dirname(path)), os.path.realpath(path))

    def is_file(self, path: bytes) -> bool:
        """Return whether there is such a file."""
        return os.path.isfile(self._absolute(path))

    def stays_inside(self, path: bytes) -> bool:
        """Return whether a path, links followed, is allowed; record it if not."""
        if self._follow_outside_links:
            return True
        real = os.path.realpath(self._absolute(path))
        inside = _is_inside(real, self._real_root) and real != self._real_root
        if not inside:
            self.outside_links.append(os.fsdecode(path))
        return inside


def _is_inside(path: bytes, folder: bytes) -> bool:
    separator = os.fsencode(os.sep)  # realpath's: a backslash on Windows
    return (path + separator).startswith(folder.rstrip(separator) + separator)


def _merge(parts: Sequence[PathList]) -> PathList:
    """Sort once what was found behind links: a class may have thousands of them."""
    return PathList(sorted(path for part in parts for path in part.raws()))

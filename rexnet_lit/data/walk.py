# ruff: noqa: PTH114, PTH116, PTH118, PTH120 - paths are bytes here, maybe a million
"""Walking folders of images: what counts as an image, what is clutter, and where links may lead.

One pass of ``os.scandir`` over bytes, no ``stat`` and no object per file, so that a million files cost
seconds and little memory. Nothing is opened and nothing is written. Used by `folder` only.
"""

from __future__ import annotations

import collections
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

IMAGE_SUFFIXES = frozenset(b"jpg jpeg jpe jfif png webp bmp dib tif tiff gif".split())
_COMMON_ENDS = frozenset((b".jpg", b".JPG", b".png", b".PNG"))
_DOT = ord(".")
_OTHER_IMAGE_SUFFIXES = frozenset(
    b"heic heif avif svg psd raw dng cr2 cr3 nef arw orf rw2 jp2 j2k jxl jxr ico tga dds exr hdr ppm pgm pbm "
    b"pnm pcx xcf eps ai".split()
)
_CLUTTER_FOLDERS = frozenset((b"__MACOSX", b"@eaDir", b"__pycache__", b"$RECYCLE.BIN", b"lost+found"))


class PathList(Sequence[str]):
    """Paths relative to a root, in one buffer of bytes and one array of offsets.

    A list of a million strings costs every DataLoader worker a copy of its pages, as reference counts are
    written; this does not. Undecodable bytes travel as ``os.fsdecode`` has them. Folders are separated by
    ``/``.
    """

    def __init__(self, paths: Sequence[bytes] = ()) -> None:
        self._buffer = b"".join(paths)
        self._offsets = np.zeros(len(paths) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, paths), np.int64, len(paths)), out=self._offsets[1:])

    @classmethod
    def join(cls, parts: Sequence[PathList]) -> PathList:
        """Return all paths of several lists, in order."""
        whole = cls()
        whole._buffer = b"".join(part._buffer for part in parts)
        lengths = [np.diff(part._offsets) for part in parts]
        whole._offsets = np.concatenate([np.zeros(1, np.int64), *lengths])
        np.cumsum(whole._offsets, out=whole._offsets)
        return whole

    def raw(self, index: int) -> bytes:
        """Return a path as the file system has it."""
        return self._buffer[self._offsets[index] : self._offsets[index + 1]]

    def raws(self) -> list[bytes]:
        """Return all paths as the file system has them."""
        return [self._buffer[a:b] for a, b in itertools.pairwise(self._offsets.tolist())]

    def take(self, indices: NDArray[np.integer]) -> PathList:
        """Return the paths at these indices, in this order."""
        starts, ends = self._offsets[indices].tolist(), self._offsets[np.asarray(indices) + 1].tolist()
        return PathList([self._buffer[a:b] for a, b in zip(starts, ends, strict=True)])

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> PathList: ...
    def __getitem__(self, index: int | slice) -> str | PathList:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return os.fsdecode(self.raw(int(index) % len(self)))

    def __iter__(self) -> Iterator[str]:
        return (os.fsdecode(self.raw(i)) for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PathList):
            return NotImplemented
        return self._buffer == other._buffer and np.array_equal(self._offsets, other._offsets)

    __hash__ = None  # type: ignore[assignment]  # compared by content, like a list

    def __repr__(self) -> str:
        return f"PathList({len(self)} paths)"


def suffix_of(name: bytes) -> bytes:
    """Return what follows the last dot, in lower case; empty where there is none."""
    return name.rpartition(b".")[2].lower() if b"." in name else b""


def is_clutter(name: bytes) -> bool:
    """Say whether a file or folder is hidden, or one that operating systems and tools leave behind."""
    return name[:1] == b"." or name in _CLUTTER_FOLDERS


class Walk:
    """Collects the images below folders, and counts what is left out.

    Args:
        root: The dataset's folder; links must stay inside, unless `follow_outside_links`.
        follow_outside_links: Whether links may lead anywhere.
    """

    def __init__(self, root: bytes, *, follow_outside_links: bool = False) -> None:
        self.root = root
        self.clutter = 0
        self.unsupported: collections.Counter[str] = collections.Counter()
        self.nested: list[str] = []
        self.broken_links: list[str] = []
        self.repeated_links: list[str] = []
        self.outside_links: list[str] = []
        self.unreadable: list[str] = []
        self._anywhere = follow_outside_links
        self._real_root = os.path.realpath(root)

    def folders(self, relative: bytes) -> tuple[list[bytes], int]:
        """List a folder's sub-folders (links to folders included), and count the images directly in it."""
        names, images = [], 0
        for entry in self._entries(relative):
            if is_clutter(entry.name):
                self.clutter += 1
            elif self._is_folder(entry, relative):
                names.append(entry.name)
            elif suffix_of(entry.name) in IMAGE_SUFFIXES:
                images += 1
            else:
                self._leave_out(entry.name)
        return sorted(names), images

    def images(self, tops: Sequence[bytes]) -> list[PathList]:
        """List the images below each of these folders, sorted.

        A real folder is read once, wherever links to it stand, and before any link is followed.
        """
        found: list[list[PathList]] = [[] for _ in tops]
        links: list[tuple[int, bytes]] = []
        seen: set[tuple[int, int]] = set()
        for number, top in enumerate(tops):
            if os.path.islink(self._absolute(top)):
                links.append((number, top))
            else:
                found[number].append(self._below(top, top, seen, number, links))
        while links:
            number, link = links.pop(0)
            target = self._identity(link)
            if target is None:
                continue
            if target in seen or self._leads_up(link):
                self.repeated_links.append(os.fsdecode(link))
            elif self.stays_inside(link):
                found[number].append(self._below(link, tops[number], seen, number, links))
        return [_merged(parts) for parts in found]

    def _below(
        self,
        start: bytes,
        top: bytes,
        seen: set[tuple[int, int]],
        number: int,
        links: list[tuple[int, bytes]],
    ) -> PathList:
        """Read a folder and the real folders in it; links to folders are put off."""
        names: list[bytes] = []
        stack = [start]
        while stack:
            folder = stack.pop()
            identity = self._identity(folder)
            if identity is None:
                continue
            seen.add(identity)
            prefix = folder + b"/" if folder else b""
            before = len(names)
            for entry in self._entries(folder):
                name = entry.name
                if name[-4:] in _COMMON_ENDS and name[0] != _DOT and entry.is_file(follow_symlinks=False):
                    names.append(prefix + name)  # a short way for nearly all of a million files
                elif is_clutter(name):
                    self.clutter += 1
                elif entry.is_symlink():
                    self._link(entry, prefix + name, names, number, links)
                elif entry.is_dir(follow_symlinks=False):
                    stack.append(prefix + name)
                elif suffix_of(name) in IMAGE_SUFFIXES and entry.is_file(follow_symlinks=False):
                    names.append(prefix + name)
                else:
                    self._leave_out(name)
            if folder != top and len(names) > before:
                self.nested.append(os.fsdecode(folder))
        return PathList(sorted(names))

    def _link(
        self,
        entry: os.DirEntry[bytes],
        path: bytes,
        names: list[bytes],
        number: int,
        links: list[tuple[int, bytes]],
    ) -> None:
        """Take a link to an image, put off one to a folder."""
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # it leads to itself, through a file, nowhere near
            is_folder = is_file = False
        if is_folder:
            links.append((number, path))
        elif suffix_of(entry.name) not in IMAGE_SUFFIXES:
            self._leave_out(entry.name)
        elif not is_file:
            self.broken_links.append(os.fsdecode(path))
        elif self.stays_inside(path):
            names.append(path)

    def _leave_out(self, name: bytes) -> None:
        self.clutter += 1
        suffix = suffix_of(name)
        if suffix in _OTHER_IMAGE_SUFFIXES:
            self.unsupported["." + suffix.decode()] += 1
        elif b"." not in name:
            self.unsupported[""] += 1

    def _is_folder(self, entry: os.DirEntry[bytes], relative: bytes) -> bool:
        try:
            return entry.is_dir()
        except OSError:
            self.broken_links.append(os.fsdecode(os.path.join(relative, entry.name)))
            return False

    def _identity(self, relative: bytes) -> tuple[int, int] | None:
        """Return what tells a folder from all others; None, remembered, where it may not be looked at."""
        try:
            status = os.stat(self._absolute(relative))
        except OSError:
            self.unreadable.append(os.fsdecode(relative))
            return None
        return status.st_dev, status.st_ino

    def _entries(self, relative: bytes) -> list[os.DirEntry[bytes]]:
        try:
            with os.scandir(self._absolute(relative)) as entries:
                return list(entries)
        except OSError:
            self.unreadable.append(os.fsdecode(relative))
            return []

    def _absolute(self, relative: bytes) -> bytes:
        return os.path.join(self.root, relative) if relative else self.root

    def _leads_up(self, link: bytes) -> bool:
        """Say whether a link leads to a folder that holds it: a loop."""
        target = os.path.realpath(self._absolute(link))
        holder = os.path.realpath(os.path.dirname(self._absolute(link)))
        return (holder + b"/").startswith(target.rstrip(b"/") + b"/")

    def stays_inside(self, link: bytes) -> bool:
        """Say whether a path, links followed, is allowed; remember it where not."""
        if self._anywhere:
            return True
        target = os.path.realpath(self._absolute(link))
        inside = target.startswith(self._real_root.rstrip(b"/") + b"/")
        if not inside:
            self.outside_links.append(os.fsdecode(link))
        return inside


def _merged(parts: list[PathList]) -> PathList:
    """Sort what was found behind links in among the rest."""
    if len(parts) == 1:
        return parts[0]
    return PathList(sorted(path for part in parts for path in part.raws()))

"""The file of an image: its size and its content, in a folder or in a packed dataset."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from rexnet_lit.data.image_header import DecodeError
from rexnet_lit.data.packed import INDEX, Pack, PackedImage, PackedWalk
from rexnet_lit.data.walk import Walk

MAX_BYTES = 256 * 1024 * 1024

_packs: dict[str, Pack] = {}


def open_walk(root: Path, *, follow_outside_links: bool = False) -> Walk:
    """Return what lists a folder, or a packed dataset."""
    index = root / INDEX
    if not index.is_file():
        _packs.pop(str(root), None)  # it was packed before
    else:
        pack = _packs.get(str(root))
        if pack is None or pack.modified != index.stat().st_mtime_ns:  # it was packed again
            pack = _packs[str(root)] = Pack(str(root))
        return PackedWalk(os.fsencode(root), pack)
    return Walk(os.fsencode(root), follow_outside_links=follow_outside_links)


def status(path: str | os.PathLike[str]) -> os.stat_result | PackedImage:
    """Return what ``os.stat`` does of a file, or of a packed image.

    Raises:
        OSError: There is no such file or image.
    """
    text = os.fspath(path)
    for root, pack in tuple(_packs.items()):  # other threads may add one
        if text.startswith(root + os.sep) and (found := pack.find(_relative(text, root))):
            return found
    try:
        return os.stat(text)  # noqa: PTH116 - called once per sample: no Path objects
    except (FileNotFoundError, NotADirectoryError):
        for folder in Path(text).parents:  # another process has listed it
            if str(folder) not in _packs and (folder / INDEX).is_file():
                pack = _packs[str(folder)] = Pack(str(folder))
                if found := pack.find(_relative(text, str(folder))):
                    return found
        raise


def _relative(path: str, root: str) -> bytes:
    return os.fsencode(path[len(root) + 1 :].replace(os.sep, "/"))


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Return the content of a regular file, or a packed image, of at most `MAX_BYTES`.

    Raises:
        DecodeError: The file is missing, not a regular file, too large, or cannot be read.
    """
    try:
        found = status(path)
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would block
            raise DecodeError("not a regular file")
        if found.st_size > MAX_BYTES:
            raise DecodeError(f"{found.st_size / 2**20:,.0f} MiB; the limit is {MAX_BYTES // 2**20} MiB")
        if isinstance(found, PackedImage):
            return found.read()
        with open(path, "rb") as file:  # noqa: PTH123
            return file.read(found.st_size + 1)  # memory for all of it is allocated first
    except (OSError, ValueError, MemoryError) as error:
        raise DecodeError(getattr(error, "strerror", None) or type(error).__name__) from None

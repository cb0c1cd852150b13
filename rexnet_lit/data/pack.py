"""Writing a packed dataset, which `packed` reads."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rexnet_lit.data import packed
from rexnet_lit.data.folder import list_images
from rexnet_lit.data.image_file import read_bytes
from rexnet_lit.data.image_header import DecodeError
from rexnet_lit.data.splits import listed, quoted
from rexnet_lit.data.walk import PathList
from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.files import check_new_folder, is_url, new_folder
from rexnet_lit.utils.progress import progress

SHARD_BYTES = 512 * 1024 * 1024
"""A shard that has reached this size is complete."""


class Packed(NamedTuple):
    """What was written: how many images, in how many shards, of how many bytes; and notes on what was left out."""

    images: int
    shards: int
    size: int
    notes: tuple[str, ...]


def pack(root: str, output: str) -> Packed:
    """Write the images in a folder and its sub-folders as a packed dataset, those too that are damaged.

    Args:
        root: The folder, which is not changed. Links are followed, and their targets are packed.
        output: A new folder, or an empty one.

    Raises:
        UserError: There are no images, or ``output`` cannot be used.
    """
    if is_url(output):
        raise UserError(f"pack: {quoted(output)} is a URL; pack into a folder, and upload its files")
    source = packed.local_folder(root)
    if not source.is_dir():
        raise UserError(f"pack: there is no folder {quoted(root)}")
    if (source / packed.INDEX).is_file():
        raise UserError(f"pack: {quoted(root)} is packed already")
    target = check_new_folder("pack", output, source)
    _, paths, notes = list_images(source)
    with new_folder("pack", target, last=packed.INDEX) as folder:  # with the index the dataset is complete
        written = _write(source, paths, folder)
    empty = [folder for folder, inner, files in os.walk(source) if not inner and not files]
    if empty:
        notes = (*notes, listed([os.path.relpath(folder, source) for folder in empty], "empty folder", "left out"))
    return written._replace(notes=(*notes, *written.notes))


def _write(source: Path, paths: PathList, folder: Path) -> Packed:
    """Write the shards and the index."""
    shards: list[str] = []
    kept: list[bytes] = []
    places: list[tuple[int, int, int]] = []  # shard, start and size of each image
    left_out: list[str] = []
    tar: tarfile.TarFile | None = None
    with contextlib.ExitStack() as stack, progress("Packing the images", len(paths)) as show:
        for done, path in enumerate(paths.raws(), start=1):
            name = os.fsdecode(path)
            try:
                content, modified = read_bytes(source / name), (source / name).stat().st_mtime
            except (DecodeError, OSError) as error:
                left_out.append(f"{name}: {error}")
                continue
            if tar is None or tar.offset >= SHARD_BYTES:
                stack.close()
                shards.append(f"shard-{len(shards):05}.tar")
                tar = stack.enter_context(tarfile.open(folder / shards[-1], "w", format=tarfile.PAX_FORMAT))
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(content), int(modified)
            tar.addfile(entry, io.BytesIO(content))
            blocks = -(-len(content) // tarfile.BLOCKSIZE)
            kept.append(path)
            places.append((len(shards) - 1, tar.offset - blocks * tarfile.BLOCKSIZE, len(content)))
            show(done)
    if not kept:
        raise UserError(f"pack: no image in {quoted(str(source))} can be read: {left_out[0]}")
    packed.write_index(folder, shards, PathList(kept), np.array(places, np.int64))
    notes = (listed(left_out, "file", "left out, cannot be read", limit=3),) if left_out else ()
    return Packed(len(kept), len(shards), sum(size for *_, size in places), notes)

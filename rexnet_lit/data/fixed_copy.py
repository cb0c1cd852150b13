"""A copy of a dataset with its fixes applied, for `rexnet-lit fix`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path, PurePosixPath

from rexnet_lit.data import packed
from rexnet_lit.data.folder import ImageFolder, scan
from rexnet_lit.data.settings import SplitSettings
from rexnet_lit.data.splits import quoted
from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.files import check_new_folder, new_folder
from rexnet_lit.utils.progress import progress


def write_fixed_copy(root: str, fixes: str, output: str, *, link: bool = False) -> ImageFolder:
    """Copy the images of a dataset into a new folder of the same layout, each below its corrected class.

    An image whose name is taken in its new class gets a number: ``name-1.jpg``. Files that are no images are left out.

    Args:
        root: The dataset's folder, which is not changed.
        fixes: The CSV file, as ``data.fixes`` takes it.
        output: The new folder; it may exist if it is empty.
        link: Make hard links instead of copies: both folders then share the content of their files.

    Returns:
        The dataset with its fixes, as it was read from ``root``.

    Raises:
        UserError: The dataset, the fixes or ``output`` cannot be used.
    """
    target = check_new_folder("fix", output, root)
    if (packed.local_folder(root) / packed.INDEX).is_file():
        raise UserError(
            f"fix: {quoted(root)} is packed; unpack it with tar -xf into another folder, or fit with --data.fixes"
        )
    folder = scan(root, SplitSettings(fixes=fixes))
    names = _new_names(folder)
    with new_folder("fix", target) as copy, progress("Copying the images", len(names)) as show:
        for done, (old, new) in enumerate(names.items(), start=1):
            file = copy / new
            file.parent.mkdir(parents=True, exist_ok=True)
            source = os.path.realpath(folder.root / old)
            _link(source, file) if link else shutil.copy2(source, file)
            show(done)
    return folder


def _link(source: str, file: Path) -> None:
    try:
        os.link(source, file)
    except OSError as error:
        raise UserError(f"fix: cannot link {quoted(source)}: {error.strerror}; leave --link out") from error


def _new_names(folder: ImageFolder) -> dict[str, str]:
    """Return the new path of each image that stays: with its class's folder in place of the old one."""
    at = 1 if folder.layout == "split" else 0  # DIR/train/CLASS or DIR/CLASS
    names: dict[str, str] = {}
    moved: dict[str, str] = {}
    for samples in folder.splits.values():
        for path, target in zip(samples.paths, samples.targets.tolist(), strict=True):
            parts, name = path.split("/"), folder.class_names[target]
            (names if parts[at] == name else moved)[path] = "/".join([*parts[:at], name, *parts[at + 1 :]])
    taken = {name.casefold() for name in names.values()}  # not all disks distinguish A.jpg from a.jpg
    for path, wanted in moved.items():
        number, name, pure = 0, wanted, PurePosixPath(wanted)
        while name.casefold() in taken:
            number += 1
            name = str(pure.with_name(f"{pure.stem}-{number}{pure.suffix}"))
        taken.add(name.casefold())
        names[path] = name
    return names

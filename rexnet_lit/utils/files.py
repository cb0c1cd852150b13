"""Writing files: whole, in the place of what was there, never over what a user did not mean."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from rexnet_lit.utils.errors import UserError, printable

# Tab and carriage return as `visible` shows them; the last four are the full-width forms.
_FORMULA = ("=", "+", "-", "@", "\\t", "\\r", "\uff1d", "\uff0b", "\uff0d", "\uff20")


@contextlib.contextmanager
def atomic_write(path: Path, previous: Path | None = None) -> Iterator[IO[bytes]]:
    """Open a file that takes ``path``'s place when the block ends well, and leaves no trace when it does not.

    Args:
        path: The file; of a link, what it leads to. A device or a pipe is written straight into.
        previous: Where to keep what was at ``path``.
    """
    if path.exists() and not path.is_file() and not path.is_dir():  # before it is resolved: a pipe has no other name
        with path.open("wb") as stream:
            yield stream
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        Path(temporary).chmod(0o666 & ~mask)  # mkstemp makes private files
        if previous is not None and path.exists():
            path.replace(previous)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Have the disk know of what was renamed in a folder."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def link_or_copy(source: Path, path: Path, previous: Path) -> None:
    """Give a file that is whole and on the disk another name, without writing it again where links are known.

    Args:
        source: The file, in the same folder.
        path: The name, whose file it replaces.
        previous: Where to keep what was at ``path``.
    """
    temporary = path.with_name(f".{path.name}.link")
    temporary.unlink(missing_ok=True)
    try:
        temporary.hardlink_to(source)
    except OSError:
        with atomic_write(path, previous) as file:
            file.write(source.read_bytes())
        return
    if path.exists():
        path.replace(previous)
    temporary.replace(path)
    _flush_folder(path.parent)


def write_file(path: Path, content: bytes | str) -> None:
    """Write a whole file in the place of ``path``, or leave it as it was.

    Raises:
        UserError: It cannot be written.
    """
    try:
        with atomic_write(path) as file:
            file.write(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; free or choose another place") from error


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[str | float]]) -> None:
    r"""Write a CSV file for people: UTF-8, whole or not at all.

    A cell that a spreadsheet would run as a formula gets a leading apostrophe; what cannot be seen or encoded is
    written out (a newline as ``\n``).

    Raises:
        UserError: It cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_cell(v) if isinstance(v, str) else v for v in row] for row in rows)
    write_file(path, text.getvalue())


def _cell(text: str) -> str:
    shown = printable(text)
    return f"'{shown}" if shown.startswith(_FORMULA) else shown


def absolute_path(path: str | None) -> str | None:
    """Return a path that means the same from any folder; None where there is none."""
    return None if path is None else str(Path(path).absolute())


def unused_path(path: Path) -> Path:
    """Return ``path``, or its name with the lowest free number behind where it exists: nothing is overwritten."""
    number, fresh = 1, path
    while fresh.exists():
        fresh = path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1
    return fresh


def check_output(key: str, path: Path, *endings: str, mark: bytes = b"") -> None:
    """See that what a user asks to be written takes nobody's place but that of an earlier output.

    Args:
        key: The option that names it, for the error.
        path: The file.
        endings: What its kind of file is called, such as ``.csv``.
        mark: What stands in the first kilobyte of an earlier output.

    Raises:
        UserError: ``path`` is a folder, or an existing file of another kind or of somebody else.
    """
    if path.is_dir():
        raise UserError(f"{key}: {str(path)!r} is a folder; name a file")
    if path.is_file() and path.suffix.lower() not in endings:
        raise UserError(
            f"{key}: {str(path)!r} exists and is no {' or '.join(endings)} file, so it is not overwritten; name another"
        )
    if mark and path.is_file():
        with path.open("rb") as file:
            if mark not in file.read(1024):
                raise UserError(f"{key}: {str(path)!r} exists and is no earlier output of this command; name another")


def check_writable(key: str, path: Path) -> None:
    """See that a file can be written, before the work for it is done.

    Args:
        key: The option that names its place, for the error.
        path: The file; missing folders would be made.

    Raises:
        UserError: The nearest folder that exists is not this user's to write to.
    """
    folder = next((f for f in path.absolute().parents if f.exists()), path.absolute().parent)
    if not folder.is_dir():
        raise UserError(f"{key}: {str(folder)!r} is a file, not a folder; choose another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{key}: {str(folder)!r} cannot be written; change its permissions, or choose another place")

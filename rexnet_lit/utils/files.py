"""Writing files: completely or not at all, and never over files that the user did not mean."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from rexnet_lit.utils.errors import UserError, printable

# What a spreadsheet takes as a formula: tab and carriage return as `printable` writes them, and full-width forms.
_FORMULA = ("=", "+", "-", "@", "\\t", "\\r", "\uff1d", "\uff0b", "\uff0d", "\uff20")


@contextlib.contextmanager
def atomic_write(path: Path, previous: Path | None = None, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """Open a file that replaces ``path`` when the block ends without an exception, and is removed otherwise.

    Args:
        path: The file; the target of a symbolic link. A device or a pipe is written directly.
        previous: Where to keep the old file.
        durable: Wait until the disk has it.
    """
    if path.exists() and not path.is_file() and not path.is_dir():  # before it is resolved: a pipe has no other name
        with path.open("wb") as stream:
            yield stream
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        with contextlib.suppress(OSError):  # some network file systems (CIFS, FUSE) refuse it
            temporary.chmod(0o666 & ~mask)  # mkstemp makes private files
        _replace(temporary, path, previous, durable=durable)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def link_or_copy(source: Path, path: Path, previous: Path) -> None:
    """Create a second name for a complete file: a hard link, or a copy where hard links are not supported.

    Args:
        source: The file, in the same folder.
        path: The second name, whose file is replaced.
        previous: Where to keep the old file.
    """
    temporary = path.with_name(f".{path.name}.link")
    temporary.unlink(missing_ok=True)
    try:
        temporary.hardlink_to(source)
    except OSError:
        with atomic_write(path, previous) as file:
            file.write(source.read_bytes())
    else:
        _replace(temporary, path, previous)


def _replace(temporary: Path, path: Path, previous: Path | None, *, durable: bool = True) -> None:
    if previous is not None and path.exists():
        path.replace(previous)
    temporary.replace(path)
    if durable and os.name == "posix":  # the new name must reach the disk too
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_file(path: Path, content: bytes | str) -> None:
    """Replace ``path`` by a complete file, or leave it as it was.

    Raises:
        UserError: It cannot be written.
    """
    try:
        with atomic_write(path) as file:
            file.write(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; free or choose another place") from error


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[str | float]]) -> None:
    r"""Write a CSV file for people, in UTF-8.

    A cell that a spreadsheet would run as a formula gets a leading apostrophe; invisible characters are escaped
    (a newline as ``\n``).

    Raises:
        UserError: It cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([csv_cell(v) if isinstance(v, str) else v for v in row] for row in rows)
    write_file(path, text.getvalue())


def csv_cell(text: str) -> str:
    """Return a text as `write_csv` writes it."""
    shown = printable(text)
    return f"'{shown}" if shown.startswith(_FORMULA) else shown


def by_text(names: Iterable[str]) -> dict[str, set[str]]:
    """Return which names a text in a CSV file may stand for: a name, or one as `write_csv` writes it."""
    found: dict[str, set[str]] = {}
    for name in names:
        for text in (name, csv_cell(name)):
            found.setdefault(text, set()).add(name)
    return found


def expand_home(path: str | os.PathLike[str]) -> str:
    """Return a path with ``~`` or ``~user`` at its start replaced by the home folder.

    A shell does so only for whole arguments: not in YAML, in Python, or after ``=``.
    """
    return os.path.expanduser(os.fspath(path))  # noqa: PTH111 - Path.expanduser raises without a home


def is_url(path: str | os.PathLike[str]) -> bool:
    """Return whether this is a URL, such as ``s3://bucket/dataset``; ``C://data`` is none."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", os.fspath(path)) is not None


def absolute_path(path: str | None) -> str | None:
    """Return a path that is valid from any folder; a URL as it is, and None for None."""
    return path if path is None or is_url(path) else str(Path(expand_home(path)).absolute())


def unused_path(path: Path) -> Path:
    """Return ``path`` if it does not exist, else its name with the lowest free number: ``name-1.csv``."""
    number, fresh = 1, path
    while fresh.exists():
        fresh = path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1
    return fresh


def check_new_folder(command: str, output: str, source: str | os.PathLike[str] = "") -> Path:
    """Return the real path of a folder that `new_folder` can write: it does not exist, or is empty.

    Args:
        command: What writes it, for the error.
        output: The folder.
        source: A folder that it must be outside of.

    Raises:
        UserError: It cannot be written.
    """
    target = Path(os.path.realpath(expand_home(output)))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{command}: {printable(repr(output))} exists and is not empty; name a new folder")
    if source and Path(os.path.realpath(source)) in (target, *target.parents):
        raise UserError(
            f"{command}: {printable(repr(output))} is inside the dataset; name a folder outside {str(source)!r}"
        )
    return target


@contextlib.contextmanager
def new_folder(command: str, target: Path, last: str = "") -> Iterator[Path]:
    """Yield a folder whose content is moved to ``target`` when the block ends without an exception.

    Args:
        command: What writes it, for the error.
        target: The folder that `check_new_folder` returned.
        last: The name of the file that is moved last.

    Raises:
        UserError: The folder cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        place = target if target.exists() else target.parent  # an empty folder may be another disk's
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=place) as temporary:
            yield Path(temporary)
            target.mkdir(exist_ok=True)
            for part in sorted(Path(temporary).iterdir(), key=lambda part: part.name == last):
                part.replace(target / part.name)
    except OSError as error:
        what = error.strerror or error
        raise UserError(f"{command}: cannot write {str(target)!r}: {what}; free or choose another place") from error


def check_output(key: str, path: Path, *endings: str, mark: bytes = b"", within: int = 1024) -> None:
    """Check that an output replaces nothing but an earlier output of the same kind.

    Args:
        key: The option that sets it, for the error.
        path: The file.
        endings: The suffixes of this kind of file, such as ``.csv``.
        mark: Bytes in an earlier output.
        within: How many of its bytes to search for them; -1 for all.

    Raises:
        UserError: ``path`` is a folder, or an existing file of another kind or origin.
    """
    if path.is_dir():
        raise UserError(f"{key}: {str(path)!r} is a folder; name a file")
    if path.is_file() and path.suffix.lower() not in endings:
        raise UserError(
            f"{key}: {str(path)!r} exists and is no {' or '.join(endings)} file, so it is not overwritten; name another"
        )
    if mark and path.is_file():
        with path.open("rb") as file:
            if mark not in file.read(within):
                raise UserError(f"{key}: {str(path)!r} exists and is no earlier output of this command; name another")


def check_writable(key: str, path: Path) -> None:
    """Check that a file can be written, before the work for it is done.

    Args:
        key: The option that sets it, for the error.
        path: The file, whose missing folders would be made.

    Raises:
        UserError: The nearest existing folder is not writable.
    """
    folder = next((f for f in path.absolute().parents if f.exists()), path.absolute().parent)
    if not folder.is_dir():
        raise UserError(f"{key}: {str(folder)!r} is a file, not a folder; choose another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{key}: {str(folder)!r} cannot be written; change its permissions, or choose another place")

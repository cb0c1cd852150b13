"""A run's folder, ``lightning_logs/version_N``: claimed by one process, held while it trains, found again."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from rexnet_lit.models import checkpoint
from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.files import check_writable

try:
    import fcntl
except ImportError:  # Windows; nothing is locked there
    fcntl = None  # type: ignore[assignment]


_LOCK = ".lock"


def run_folder_of(model: Path) -> Path | None:
    """Return the run folder that ``model`` lies in, None where it lies elsewhere."""
    for folder in list(Path(os.path.abspath(model)).parents)[:2]:  # noqa: PTH100 (no links resolved)
        if re.fullmatch(r"version_\d+", folder.name) and folder.parent.name == "lightning_logs":
            return folder
    return None


def run_number(folder: Path) -> int:
    """Return N of a run folder."""
    return int(folder.name.removeprefix("version_"))


def claim(root: Path) -> Path:
    """Make a new run folder below ``root``; of runs that start at once, each gets its own."""
    runs = root / "lightning_logs"
    check_writable("trainer.default_root_dir", runs / "version_0")
    found = runs.iterdir() if runs.is_dir() else ()
    taken = [run_number(folder) for folder in found if re.fullmatch(r"version_\d+", folder.name)]
    free = max(taken, default=-1) + 1
    while True:
        folder = runs / f"version_{free}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            free += 1
        else:
            return folder


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Let no other process train in a run folder meanwhile, where the file system has locks.

    The lock is the process's own: its children do not inherit it, and the kernel drops it however the process ends.

    Raises:
        UserError: Another process trains there.
    """
    path = folder / _LOCK
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # not for us to say: what the run cannot write, it will say itself
            try:
                stack.enter_context(_locked(path))
            except BlockingIOError:
                raise UserError(
                    f"{folder}: another process is training in this run folder; wait for it, stop it, or leave "
                    "--ckpt_path out to start a new run"
                ) from None
            stack.callback(path.unlink, missing_ok=True)
        yield


def _locked(path: Path) -> TextIO:
    """Open a file and lock it; not one that its holder has removed in between.

    Raises:
        BlockingIOError: Another process holds the lock.
    """
    while True:
        file = path.open("w", encoding="utf-8")
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            pass
        except OSError:
            file.close()
            raise
        file.close()


def remove_if_empty(folder: Path) -> None:
    """Remove a claimed folder of a run that has written nothing, but for TensorBoard's file, which comes first."""
    with contextlib.suppress(OSError):
        files = list(folder.iterdir())
        if all(file.name.startswith("events.out.tfevents.") for file in files):
            for file in files:
                file.unlink()
        folder.rmdir()
        folder.parent.rmdir()


def find_last_checkpoint(root: Path) -> tuple[Path, list[str]]:
    """Find the newest checkpoint that can be resumed, in the run folders below ``root``.

    Returns:
        The ``last.ckpt`` (or the generation before it), and why newer files were passed over, a line each.

    Raises:
        UserError: There is none.
    """
    runs = root / "lightning_logs"
    found = sorted(
        (file for name in ("last.ckpt", checkpoint.PREVIOUS) for file in runs.glob(f"version_*/checkpoints/{name}")),
        key=lambda file: file.stat().st_mtime_ns,
        reverse=True,
    )
    skipped: list[str] = []
    for file in found:
        try:
            checkpoint.read_record(checkpoint.read_ckpt(str(file)), str(file))
        except UserError as error:
            skipped.append(f"skipped: {error}")
        else:
            return file, skipped
    reasons = "".join(f"; {reason}" for reason in skipped)
    raise UserError(
        f"ckpt_path: there is no checkpoint to resume below {runs}{reasons}; "
        "name a file, or leave --ckpt_path out to start a new run"
    )

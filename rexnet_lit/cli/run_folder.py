"""The folder of a run, ``lightning_logs/version_N``: created for one process, locked while it trains, found later."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from rexnet_lit.models import checkpoint
from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.files import check_writable

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]


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
    """Make a new run folder below ``root``; runs that start at the same time each get their own."""
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
    """Keep other processes from training in a run folder, where the file system has locks.

    The lock belongs to this process alone, unlike one of flock(2), which the workers of its loader would inherit: a new
    run may start as soon as this one has ended, even when it was killed.

    Raises:
        UserError: Another process trains there.
    """
    path = folder / ".lock"
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("w", encoding="utf-8"))
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(file.fileno()).st_nlink:  # the run that held the lock has just ended and removed the file
                raise BlockingIOError
            stack.callback(path.unlink, missing_ok=True)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is training in this run folder; wait for it, stop it, or leave "
                "--ckpt_path out to start a new run"
            ) from None
        except OSError:  # no locks here, or a folder that cannot be written, which the run reports itself
            pass
        yield


def remove_if_empty(folder: Path) -> None:
    """Remove the folder of a run that has written nothing but TensorBoard's file, which comes first."""
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
        The ``last.ckpt`` (or the generation before it), and a line for each newer file that was skipped.

    Raises:
        UserError: There is none.
    """
    runs = root / "lightning_logs"
    found = [file for name in ("last.ckpt", checkpoint.PREVIOUS) for file in runs.glob(f"version_*/checkpoints/{name}")]
    skipped: list[str] = []
    for file in sorted(found, key=lambda file: file.stat().st_mtime_ns, reverse=True):
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

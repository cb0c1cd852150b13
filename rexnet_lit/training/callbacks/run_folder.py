"""The folder of a run: where it is, created for one process, locked while it trains, and found later.

It is the folder above ``checkpoints/``: ``lightning_logs/version_N`` by default, or where the user's logger puts a run.
Its ``result.json``, written when training starts, marks it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from rexnet_lit.models import checkpoint
from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.files import check_writable, unused_path

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

RESULT = "result.json"
_CHECKPOINTS = "checkpoints"
_OWN_FILES = ("best", "last")
_VERSION = re.compile(r"version_\d+")
_DEPTH = 4
"""Folders between a root and its run folders, and between a run folder and a checkpoint of the user's, at most."""


def run_folder_of(model: str | Path) -> Path | None:
    """Return the run folder that ``model`` lies in, None where it lies elsewhere.

    A user's own `ModelCheckpoint` may have made folders below ``checkpoints/``: ``{val/top1}`` in a file name does.
    """
    path = Path(os.path.abspath(model))  # noqa: PTH100 (no links resolved)
    for folder in list(path.parents)[:_DEPTH]:
        if folder.name == _CHECKPOINTS:
            return folder.parent
        if (folder / RESULT).is_file() or (_VERSION.fullmatch(folder.name) and folder.parent.name == "lightning_logs"):
            return folder
    return None


def folder_for(trainer: Trainer) -> Path | None:
    """Return the folder of a fit that begins, which no earlier run has used; all processes call this.

    A resumed run stays in its own. A run that saves nothing and logs nothing has none.

    Raises:
        UserError: It cannot be written.
    """
    if trainer.fast_dev_run or not (trainer.checkpoint_callbacks or trainer.loggers):  # type: ignore[attr-defined]
        return None
    folder = _choose(trainer) if trainer.is_global_zero else None
    chosen: Path | None = trainer.strategy.broadcast(folder)
    return chosen


def _choose(trainer: Trainer) -> Path:
    resumed = run_folder_of(trainer.ckpt_path) if trainer.ckpt_path else None
    if resumed is not None:
        folder = resumed
    elif not trainer.loggers:
        folder = claim(Path(trainer.default_root_dir))
    else:
        logger = trainer.loggers[0]
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = Path(logger.save_dir or trainer.default_root_dir, str(logger.name), version)  # as ModelCheckpoint does
        if _is_used(folder):
            folder = (
                claim(folder.parent.parent, folder.parent.name) if _VERSION.fullmatch(version) else unused_path(folder)
            )
    check_writable("trainer.default_root_dir", folder / _CHECKPOINTS / "last.ckpt")
    return folder


def refuse_same_files(callbacks: Iterable[Any], folder: Path) -> None:
    """Refuse checkpoint callbacks of the user's that write a ``best.ckpt`` or ``last.ckpt`` into a run's ``folder``.

    Raises:
        UserError: One does.
    """
    for callback in callbacks:
        if Path(getattr(callback, "dirpath", None) or "").absolute() != folder.absolute():
            continue
        last = getattr(callback, "save_last", None) and getattr(callback, "CHECKPOINT_NAME_LAST", None)
        names = {"save_last": last, "filename": getattr(callback, "filename", None)}
        setting, name = next(((key, name) for key, name in names.items() if name in _OWN_FILES), (None, None))
        if setting is not None:
            raise UserError(
                f"trainer.callbacks: {type(callback).__name__} would write {name}.ckpt over that of the run itself, in "
                f"{folder}; leave {setting} out, or set another dirpath"
            )


def _is_used(folder: Path) -> bool:
    return (folder / RESULT).exists() or (folder / _CHECKPOINTS).exists()


def claim(root: Path, name: str = "lightning_logs") -> Path:
    """Make a new run folder below ``root``; runs that start at the same time each get their own."""
    runs = root / name
    check_writable("trainer.default_root_dir", runs / "version_0")
    found = runs.iterdir() if runs.is_dir() else ()
    taken = [int(folder.name.removeprefix("version_")) for folder in found if _VERSION.fullmatch(folder.name)]
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


def find_last_checkpoint(roots: Iterable[Path]) -> tuple[Path, list[str]]:
    """Find the newest checkpoint that can be resumed, in the run folders below ``roots``.

    Returns:
        The ``last.ckpt`` (or the generation before it), and a line for each newer file that was skipped.

    Raises:
        UserError: There is none.
    """
    roots = list(roots)
    names = ("last.ckpt", checkpoint.PREVIOUS)
    found = {
        file for root in roots for folder in _checkpoint_folders(root, _DEPTH) for file in map(folder.joinpath, names)
    }
    skipped: list[str] = []
    for file in sorted(filter(Path.is_file, found), key=lambda file: file.stat().st_mtime_ns, reverse=True):
        try:
            checkpoint.read_record(checkpoint.read_ckpt(str(file)), str(file))
        except UserError as error:
            skipped.append(f"skipped: {error}")
        else:
            return file, skipped
    reasons = "".join(f"; {reason}" for reason in skipped)
    raise UserError(
        f"ckpt_path: there is no checkpoint to resume below {' or '.join(map(str, roots))}{reasons}; "
        "name a file, or leave --ckpt_path out to start a new run"
    )


def _checkpoint_folders(root: Path, depth: int) -> Iterator[Path]:
    """Yield the folders named ``checkpoints`` at most ``depth`` levels below ``root``, without following links."""
    with contextlib.suppress(OSError), os.scandir(root) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                if entry.name == _CHECKPOINTS:
                    yield Path(entry.path)
                elif depth > 1:
                    yield from _checkpoint_folders(Path(entry.path), depth - 1)

"""What several runs have in common: how each is trained, and how the command that was killed goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rexnet_lit.training.callbacks import run_folder
from rexnet_lit.training.callbacks.run_folder import RESULT
from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.files import check_writable, unused_path, write_file

TRIALS = "trials.json"
"""The runs of a search that have ended."""

Fit = Callable[..., Path]
"""Trains with some settings (``data.batch_size``) changed and with further callbacks, resumes what it finds in
``trainer.default_root_dir``, and returns the run folder."""


def remember(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings that the runs in ``folder`` share, or compare them with those that an earlier start wrote.

    If they differ and the earlier runs have only failed, their folder is renamed, and a new one begins.

    Raises:
        UserError: They differ, or the folder holds something else, or cannot be written.
    """
    file = folder / "settings.json"
    check_writable("trainer.default_root_dir", file)
    now = json.loads(json.dumps(settings, default=str))
    if not file.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder} exists and is not empty; choose another --trainer.default_root_dir")
        write_file(file, json.dumps(now, indent=2) + "\n")
        return
    try:
        then = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{file} is damaged; choose another --trainer.default_root_dir") from None
    changed = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    if changed and _only_failed(folder):
        moved = unused_path(folder)
        folder.rename(moved)
        print(f"note: what failed with other settings is moved to {moved}", flush=True)  # noqa: T201
        remember(folder, settings)
    elif changed:
        named = "; ".join(f"{key} ({then.get(key)} then, {now.get(key)} now)" for key in changed[:6])
        raise UserError(
            f"{folder} was begun with other settings: {named}; set them back to go on there, or choose another "
            "--trainer.default_root_dir"
        )


def _only_failed(folder: Path) -> bool:
    """Return whether nothing below ``folder`` has finished, or can be resumed."""
    states = {read_result(file.parent).get("status") for file in folder.rglob(RESULT)}
    return states <= {"failed"} and not (folder / TRIALS).is_file()


def finished_run(root: Path) -> Path | None:
    """Return the folder of the run below ``root`` that has finished, if there is one."""
    for file in sorted(root.glob(f"lightning_logs/*/{RESULT}")):
        if read_result(file.parent).get("status") == "finished" and (file.parent / "model.safetensors").is_file():
            return file.parent
    return None


def shipped_run(record: Path, facts: Mapping[str, Any]) -> Path | None:
    """Return the run folder that `ship_run` has made, if it was for the same facts."""
    if not record.is_file():
        return None
    known = json.loads(record.read_text("utf-8"))
    same = facts.items() <= known.items() and (Path(known["run"]) / "model.safetensors").is_file()
    return Path(known["run"]) if same else None


def ship_run(
    run: Path, root: Path, record: Path, facts: Mapping[str, Any], complete: Callable[[Path], None] | None = None
) -> Path:
    """Copy a run into a new run folder below ``root``, note that in the file ``record``, and return the folder.

    Args:
        run: The run.
        root: Where the new folder is made.
        record: A JSON file.
        facts: What to write there, beside the folder.
        complete: Called with the new folder before it is noted: a copy that was killed is made again.
    """
    target = run_folder.claim(root)
    shutil.copytree(run, target, dirs_exist_ok=True)
    if complete is not None:
        complete(target)
    write_file(record, json.dumps({**facts, "run": str(target.absolute())}, indent=2) + "\n")
    return target


def read_result(run: Path) -> dict[str, Any]:
    """Return what a run wrote into ``result.json``; nothing if it is damaged or missing."""
    try:
        found: dict[str, Any] = json.loads((run / RESULT).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found

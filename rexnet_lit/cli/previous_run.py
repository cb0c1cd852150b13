"""What a run takes from the run before it: the checkpoint to resume, or how a model's dataset was split."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rexnet_lit.data.datamodule import ImageFolderDataModule
from rexnet_lit.data.settings import DataRecord, SplitSettings
from rexnet_lit.data.table import lists_images_of
from rexnet_lit.models import checkpoint
from rexnet_lit.training.callbacks import run_folder
from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.files import absolute_path, expand_home

_OTHER_KEYS = {"class_order", "follow_outside_links", "max_bad_fraction", "fixes"}
_SPLIT_KEYS = {field.name for field in dataclasses.fields(SplitSettings)} - _OTHER_KEYS
_NOT_DRAWN: dict[str, Any] = {"num_folds": 0, "fold": 0}  # the splits are read from a file


def read_checkpoint(path: str, root: str | None) -> tuple[str, dict[str, Any], list[str]]:
    """Find and read the checkpoint to resume: a file, or ``last`` for the newest one in the run folders below ``root``.

    Returns:
        Its path and content, and why newer ones were skipped.

    Raises:
        UserError: There is none, or it cannot be resumed.
    """
    path, skipped = expand_home(path), list[str]()
    if path == "last":
        found, skipped = run_folder.find_last_checkpoint([Path(root or ".")])
        path = str(found.absolute())
    elif Path(path).is_dir():
        raise UserError(f"ckpt_path: {path!r} is a folder; name the run's checkpoints/last.ckpt, or last")
    elif Path(path).suffix == ".safetensors":
        raise UserError(f"ckpt_path: {path} contains weights only; to start a new run from them, use model.weights")
    content = checkpoint.read_ckpt(path)
    checkpoint.read_record(content, path)
    missing = [key for key in ("epoch", "global_step", "loops", "optimizer_states") if key not in content]
    if missing:
        raise UserError(f"ckpt_path: {path} cannot be resumed: {', '.join(missing)} missing; use model.weights")
    return path, content, skipped


def recorded_splits(data: Mapping[str, Any], record: DataRecord, folder: Path | None) -> dict[str, Any]:
    """Return the data settings that reproduce the splits of the model's run, without those that the user has changed.

    ``data`` holds this run's settings, with the model's ``record`` as defaults of all but its fixes; ``folder`` is the
    model's run folder.
    """
    recorded = dataclasses.asdict(record)
    changed = {key for key in _SPLIT_KEYS if data[key] != recorded[key]}
    changed -= {key for key in ("split_file", "labels") if absolute_path(data[key]) == recorded[key]}
    written = str(folder / "split.csv") if folder is not None and (folder / "split.csv").is_file() else None
    settings: dict[str, Any] = {}
    if data["root"] is not None and not _same_folder(data["root"], record.root):
        file, root = written or record.split_file, expand_home(data["root"])
        if (
            file and not changed and lists_images_of(SplitSettings(split_file=file), root)
        ):  # the same images in another place
            settings = {"split_file": file, "labels": None, **_NOT_DRAWN}
        elif record.labels and not changed and lists_images_of(SplitSettings(labels=record.labels), root):
            settings = {"split_file": None}
        else:
            settings = {"split_file": None, "labels": None, **_NOT_DRAWN}
    elif changed:
        settings = {"split_file": None, **(_NOT_DRAWN if "val_fraction" in changed else {})}
        settings |= {"labels": None} if "split_file" in changed else {}
    elif written:
        settings = {"split_file": written, "labels": None, **_NOT_DRAWN}
    if record.fixes and data["fixes"] is None and _same_folder(data["root"] or record.root, record.root):
        # The run's split.csv is of the corrected dataset.
        settings["fixes"] = None if written and settings["split_file"] == written else record.fixes
    return {key: value for key, value in settings.items() if key not in changed}


def is_new(data: ImageFolderDataModule, record: DataRecord) -> bool:
    """Return whether the data is a folder of class folders, without a test split, that a model was not trained on."""
    folder = data.folder
    if folder is None or folder.layout != "flat" or "test" in folder.splits or "train" not in folder.splits:
        return False
    return not _same_folder(str(folder.root), record.root)


def _same_folder(path: str | None, other: str | None) -> bool:
    return path is not None and other is not None and os.path.realpath(expand_home(path)) == os.path.realpath(other)

"""What a search does with the symmetries of the images, which it measures before its first run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from rexnet_lit.checks.symmetries import Symmetries
from rexnet_lit.data.datamodule import ImageFolderDataModule, find_datamodule
from rexnet_lit.search.space import Setting, Values
from rexnet_lit.training.callbacks.mirroring import ChooseMirroring
from rexnet_lit.training.module import RexNetModule
from rexnet_lit.training.symmetries import measure_symmetries
from rexnet_lit.utils.files import write_file


def wanted_settings(found: Symmetries | None, base: Mapping[str, Any], space: Mapping[str, Setting]) -> Values:
    """Return the searched settings that should change: symmetries to use, and others not to use.

    Args:
        found: The symmetries, if they are known.
        base: The settings of the config, by key.
        space: The settings to search.
    """
    wanted = Values()
    for key, holds in found.holds.items() if found is not None else ():
        ends = (space[key].choices or (space[key].low, space[key].high)) if key in space else ()
        values = sorted(value for value in ends if (value > 0) == holds)
        if values and (base[key] > 0) != holds:
            wanted[key] = values[0]
    return wanted


def read_symmetries(file: Path) -> Symmetries | None:
    """Return what a search has measured, None if it has not."""
    return Symmetries(**json.loads(file.read_text("utf-8"))) if file.is_file() else None


class MeasureSymmetries(ChooseMirroring):
    """Measures all symmetries before the training of a fit, whose weights do not change by it.

    Args:
        file: Where to write them.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        self._measured = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure them, unless that has been done, or the fit has a data module of another kind."""
        self._measured = False
        super().on_fit_start(trainer, pl_module)
        data = find_datamodule(trainer)
        if not self._measured and data is not None and isinstance(pl_module, RexNetModule):
            self.measure(pl_module, data)

    def measure(self, module: RexNetModule, data: ImageFolderDataModule) -> Symmetries | None:
        """Return the symmetries."""
        self._measured, trainer = True, module.trainer
        found = trainer.strategy.broadcast(read_symmetries(self.file))
        if found is None and not trainer.ckpt_path:
            found = measure_symmetries(module, data)
            if found is not None and trainer.is_global_zero:
                write_file(self.file, json.dumps(dataclasses.asdict(found), indent=1) + "\n")
        return found

"""Whether to mirror training images: decides ``data.augment.hflip: auto`` before the training."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from rexnet_lit.checks.symmetries import HFLIP, Symmetries
from rexnet_lit.data.augmentation import MIRRORED
from rexnet_lit.data.datamodule import ImageFolderDataModule, find_datamodule
from rexnet_lit.training.module import RexNetModule
from rexnet_lit.training.symmetries import VIEWS, measure_symmetries
from rexnet_lit.utils.settings import overridden


class ChooseMirroring(Callback):
    """Mirrors half of the training images, unless mirrored ones are recognised worse (`checks.symmetries`).

    A resumed run keeps what it has decided.
    """

    def __init__(self) -> None:
        self._resumed: float | None = None
        self.hflip: float | None = None
        """The probability that was chosen; None where it is a setting."""

    @property
    def state_key(self) -> str:
        """The name of the state in a checkpoint, of subclasses too."""
        return "ChooseMirroring"

    @property
    def chosen(self) -> dict[str, float]:
        """What was chosen, by setting."""
        return {} if self.hflip is None else {HFLIP: self.hflip}

    def state_dict(self) -> dict[str, Any]:
        """Return what was chosen."""
        return dict(self.chosen)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what was chosen."""
        self._resumed = state_dict.get(HFLIP)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose, before features of augmented images are computed."""
        data = find_datamodule(trainer)
        hflip = self._resumed if trainer.ckpt_path else None  # a validation restores it too
        self.hflip = self._resumed = None
        if data is None or not data.augment.chooses_hflip or not isinstance(pl_module, RexNetModule):
            return
        if overridden(data, "train_transform"):  # it decides
            return
        if hflip is None:
            pl_module.start.require(resumes=trainer.ckpt_path is not None)
            found = self.measure(pl_module, data)
            hflip = 0.0 if found is not None and found.holds[HFLIP] is False else MIRRORED
            rank_zero_only(print)(_describe(hflip, found), flush=True)
        self.hflip = hflip
        data.mirror(hflip)

    def measure(self, module: RexNetModule, data: ImageFolderDataModule) -> Symmetries | None:
        """Return whether images may be mirrored, the same on all processes; None if that cannot be told."""
        return measure_symmetries(module, data, {HFLIP: VIEWS[HFLIP]})


def _describe(hflip: float, found: Symmetries | None) -> str:
    """Return a line about the choice."""
    if found is None or found.holds[HFLIP] is None:
        return f"{HFLIP} auto: {hflip:g}, as it cannot be told whether mirrored images are recognised worse"
    how = "worse" if hflip == 0 else "as well"
    shares = f"{found.changed[HFLIP]:.0%}, {found.upright:.0%} as they are"
    return f"{HFLIP} auto: {hflip:g}, because mirrored images are recognised {how} ({shares})"

"""What happens once, at the end of training, with the weights that were saved."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from rexnet_lit.callbacks.checkpoint import RunCheckpoint, find_model_checkpoint
from rexnet_lit.data.datamodule import ImageFolderDataModule, find_datamodule
from rexnet_lit.training.module import RexNetModule


class EndOfTraining(Callback):
    """Does something with what a run has saved, once, when its training ends."""

    def finish(
        self, trainer: pl.Trainer, pl_module: RexNetModule, data: ImageFolderDataModule, saver: ModelCheckpoint
    ) -> None:
        """Do it, on all processes."""
        raise NotImplementedError

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do it where model, data and saver are such as we know."""
        saver, data = find_model_checkpoint(trainer), find_datamodule(trainer)
        if isinstance(saver, RunCheckpoint):
            saver.end_training(trainer)
        if isinstance(pl_module, RexNetModule) and isinstance(data, ImageFolderDataModule) and saver is not None:
            self.finish(trainer, pl_module, data, saver)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do it for a run that was killed after its last epoch, and resumed: there is no training to end."""
        if isinstance(pl_module, RexNetModule) and not pl_module.started:
            pl_module.to(trainer.strategy.root_device)  # whence Lightning has taken it
            self.on_train_end(trainer, pl_module)

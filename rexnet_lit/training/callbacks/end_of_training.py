"""What happens once, when training ends, to the weights that were saved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from rexnet_lit.data.datamodule import ImageFolderDataModule, find_datamodule
from rexnet_lit.training.callbacks.checkpoint import RunCheckpoint, find_checkpoint
from rexnet_lit.training.module import RexNetModule


class EndOfTraining(Callback):
    """Calls `finish` once, when the training of a run ends."""

    def finish(self, trainer: Trainer, module: RexNetModule, data: ImageFolderDataModule, saver: RunCheckpoint) -> None:
        """Do the work, in all processes."""
        raise NotImplementedError

    def setting(self, module: RexNetModule) -> str | None:
        """Return the setting that asks for it, None if it is not asked for or always done."""
        return None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say of a setting that it will have no effect."""
        key = self.setting(pl_module) if isinstance(pl_module, RexNetModule) else None
        if key and (find_checkpoint(trainer) is None or find_datamodule(trainer) is None):
            rank_zero_only(print)(f"note: {key} has no effect without checkpoints and an ImageFolderDataModule")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish, unless the model or the data are of a user's own class, or nothing is saved."""
        saver, data = find_checkpoint(trainer), find_datamodule(trainer)
        if saver is None:
            return
        saver.end_training(trainer)
        if isinstance(pl_module, RexNetModule) and data is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.finish(trainer, pl_module, data, saver)
            # Once, after the last of them: a run that is killed before it starts them again.
            if self is [c for c in trainer.callbacks if isinstance(c, EndOfTraining)][-1]:  # type: ignore[attr-defined]
                saver.write_best(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish a run that was killed after its last epoch, and resumed: it trains no more.

        Not if it was killed after this: what is selected and calibrated twice is not the same.
        """
        saver = find_checkpoint(trainer)
        if isinstance(pl_module, RexNetModule) and not pl_module.started and not (saver and saver.has_ended(trainer)):
            pl_module.to(trainer.strategy.root_device)  # Lightning has moved it to the CPU
            self.on_train_end(trainer, pl_module)


def copy_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy of weights that further training does not change."""
    return {name: tensor.detach().clone() for name, tensor in state.items()}


@contextlib.contextmanager
def network_restored(module: RexNetModule) -> Iterator[None]:
    """Put the module in eval mode, and afterwards restore its mode and the weights of its network."""
    weights, training = copy_state(module.network.state_dict()), module.training
    module.eval()
    try:
        yield
    finally:
        module.network.load_state_dict(weights)
        module.train(training)

"""BatchNorm over all processes (``trainer.sync_batchnorm``), for timm's layers.

Lightning's own plugin exchanges timm's BatchNorm, which has the activation inside, for one that has none: the network
that trains is another, and nobody says so. timm's conversion keeps it.
"""

from __future__ import annotations

from lightning.pytorch.plugins.layer_sync import LayerSync, TorchSyncBatchNorm
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class TimmSyncBatchNorm(LayerSync):
    """Exchanges each BatchNorm for a synchronised one with the same tensors and activation, and back."""

    def __init__(self) -> None:
        self._exchanged: list[tuple[nn.Module, str, _BatchNorm]] = []

    def apply(self, model: nn.Module) -> nn.Module:
        """Exchange all of a model's."""
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, _BatchNorm) and not isinstance(child, nn.SyncBatchNorm):
                    self._exchanged.append((parent, name, child))
                    setattr(parent, name, convert_sync_batchnorm(child))  # type: ignore[no-untyped-call]
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Put the model's own back."""
        for parent, name, own in self._exchanged:
            synchronised = getattr(parent, name)
            own._parameters, own._buffers = synchronised._parameters, synchronised._buffers
            own.train(synchronised.training)
            setattr(parent, name, own)
        self._exchanged = []
        return model


def install(strategy: Strategy) -> None:
    """Put ours in the place of Lightning's."""
    if isinstance(strategy, ParallelStrategy) and isinstance(
        getattr(strategy, "_layer_sync", None), TorchSyncBatchNorm
    ):
        strategy._layer_sync = TimmSyncBatchNorm()

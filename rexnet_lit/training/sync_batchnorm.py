"""BatchNorm over all processes (``trainer.sync_batchnorm``), for timm's layers.

Lightning's own plugin replaces timm's BatchNorm, which includes the activation, by one without it: another network
would be trained, without any message. timm's conversion keeps the activation.
"""

from __future__ import annotations

from lightning.pytorch.plugins.layer_sync import LayerSync, TorchSyncBatchNorm
from lightning.pytorch.strategies import Strategy
from timm.layers import convert_sync_batchnorm
from torch import nn


class TimmSyncBatchNorm(LayerSync):
    """Replaces each BatchNorm by a synchronised one with the same tensors and activation."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Convert all layers of a model, once: another conversion would drop the activations."""
        if not any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
            convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Keep the converted layers: in one process they compute what BatchNorm does."""
        return model


def install(strategy: Strategy) -> None:
    """Replace Lightning's plugin."""
    if isinstance(getattr(strategy, "_layer_sync", None), TorchSyncBatchNorm):
        strategy._layer_sync = TimmSyncBatchNorm()  # type: ignore[attr-defined]

"""Replacements for two of Lightning's plugins: reading and writing checkpoints, and synchronised BatchNorm."""

from __future__ import annotations

from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.plugins.layer_sync import LayerSync, TorchSyncBatchNorm
from lightning.pytorch.strategies import Strategy
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rexnet_lit.models import checkpoint


class SafeCheckpointIO(TorchCheckpointIO):
    """Atomic writes, no pickles, local files only: through `models.checkpoint`."""

    def save_checkpoint(self, checkpoint_: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint to ``path``."""
        checkpoint.write_ckpt(checkpoint_, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; ``weights_only`` is always on, whatever is passed."""
        return checkpoint.read_ckpt(str(path))


class TimmSyncBatchNorm(LayerSync):
    """timm's conversion, which keeps the activation that timm has in its BatchNorm; Lightning's would drop it."""

    def __init__(self) -> None:
        self._replaced: list[tuple[nn.Module, str, _BatchNorm]] = []

    def apply(self, model: nn.Module) -> nn.Module:
        """Replace each BatchNorm by a synchronised one with the same tensors and activation."""
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, _BatchNorm) and not isinstance(child, nn.SyncBatchNorm):
                    self._replaced.append((parent, name, child))
                    setattr(parent, name, convert_sync_batchnorm(child))  # type: ignore[no-untyped-call]
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Put the original layers back, with the trained tensors."""
        for parent, name, original in self._replaced:
            synchronised = getattr(parent, name)
            original._parameters, original._buffers = synchronised._parameters, synchronised._buffers
            original.train(synchronised.training)
            setattr(parent, name, original)
        self._replaced = []
        return model


def install(strategy: Strategy) -> None:
    """Replace Lightning's defaults; a checkpoint plugin of the user's stays."""
    io = strategy.checkpoint_io
    if type(io) is TorchCheckpointIO:
        strategy.checkpoint_io = SafeCheckpointIO()
    elif isinstance(io, _WrappingCheckpointIO) and type(io.checkpoint_io) is TorchCheckpointIO:
        io.checkpoint_io = SafeCheckpointIO()
    if isinstance(getattr(strategy, "_layer_sync", None), TorchSyncBatchNorm):
        strategy._layer_sync = TimmSyncBatchNorm()  # type: ignore[attr-defined]

"""Lightning reads and writes checkpoints through `models.checkpoint`: atomic writes, no pickles, local files only."""

from __future__ import annotations

from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import Strategy

from rexnet_lit.models import checkpoint


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint reader and writer, made safe."""

    def save_checkpoint(self, checkpoint_: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint to ``path``."""
        checkpoint.write_ckpt(checkpoint_, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; ``weights_only`` is always on, whatever is passed."""
        return checkpoint.read_ckpt(str(path))


def install(strategy: Strategy) -> None:
    """Replace Lightning's default, which unpickles; a plugin of the user's stays."""
    io = strategy.checkpoint_io
    if type(io) is TorchCheckpointIO:
        strategy.checkpoint_io = SafeCheckpointIO()
    elif isinstance(io, _WrappingCheckpointIO) and type(io.checkpoint_io) is TorchCheckpointIO:
        io.checkpoint_io = SafeCheckpointIO()

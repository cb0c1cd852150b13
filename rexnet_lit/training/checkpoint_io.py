"""Lightning's reading and writing of checkpoints, through `checkpoint`."""

from __future__ import annotations

from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import Strategy

from rexnet_lit.models import checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint reader and writer, made safe: atomic writes, no pickles, local files only."""

    def save_checkpoint(self, checkpoint_: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint in the place of ``path``."""
        checkpoint.write_ckpt(checkpoint_, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; ``weights_only`` is always on, whatever is asked."""
        return checkpoint.read_ckpt(str(path))


def install(strategy: Strategy) -> None:
    """Put ours in the place of Lightning's default, which unpickles; a plugin of the user's own stays."""
    io = strategy.checkpoint_io
    if type(io) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO()
    elif isinstance(io, _WrappingCheckpointIO) and type(io.checkpoint_io) is TorchCheckpointIO:
        io.checkpoint_io = AtomicCheckpointIO()

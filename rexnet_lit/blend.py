"""Weights between the start and the end of a fine-tuning.

Fine-tuning on few images also unlearns. On the straight line between the given weights, with the best linear head for
their features, and the fine-tuned ones there is often a better model than either. The validation loss chooses it: top-1
is too coarse for a few hundred images, and the plain loss prefers whoever is better calibrated, so each candidate's
logits are divided by the temperature that suits them best.

Sources: Wortsman et al., "Robust fine-tuning of zero-shot models", 2022 (WiSE-FT, from a zero-shot start); Guo et al.,
"On Calibration of Modern Neural Networks", 2017. Measured in tests/benchmarks/recipe.md.
"""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.nn import functional

from rexnet_lit import checkpoint
from rexnet_lit.data import ImageFolderDataModule
from rexnet_lit.module import RexNetModule
from rexnet_lit.network import classify

__all__ = ["Blend"]

State = dict[str, Tensor]

SHARES = (0.25, 0.5, 0.75)
"""How far along the line to look, beside its ends."""

_TEMPERATURES = torch.logspace(-1, 0.7, 60).tolist()

MOST_IMAGES = 20_000
"""Training images up to which it is done: solving the head for more takes long, and more images move further."""


class Blend(Callback):
    """Puts the best weights of the line into ``best.ckpt`` when training ends, where ``model.strategy.blend`` asks."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Solve the start's head, look along the line, and keep what validates best; the best epoch where none does."""
        saver, data = trainer.checkpoint_callback, getattr(trainer, "datamodule", None)
        if (
            not isinstance(pl_module, RexNetModule)
            or not isinstance(data, ImageFolderDataModule)
            or not isinstance(saver, ModelCheckpoint)
            or not saver.best_model_path
            or pl_module.start is None
            or len(data.splits()["train"]) > MOST_IMAGES
        ):
            return
        best = Path(saver.best_model_path)
        network = pl_module.network
        last, training = _copy(network.state_dict()), pl_module.training
        end: State = trainer.strategy.broadcast(checkpoint.load_model(best).state if trainer.is_global_zero else {})

        network.load_state_dict(pl_module.start)
        pl_module.eval()
        embed = pl_module.embedder()
        train = data.compute_features("train", embed, evaluate=True)
        pl_module.solve(train[0], data.compute_features("val", embed)[0])
        start = _copy(network.state_dict())

        targets = torch.from_numpy(data.splits()["val"].targets)
        top1, losses = {}, {}
        for share in (0.0, *SHARES, 1.0):
            network.load_state_dict(_between(start, end, share))
            features = data.compute_features("val", pl_module.embedder())[0]
            logits = classify(network, features.to(pl_module.device)).detach().cpu()
            top1[share] = float((logits.argmax(1) == targets).float().mean())
            losses[share] = min(float(functional.cross_entropy(logits / t, targets)) for t in _TEMPERATURES)
        chosen = min(losses, key=lambda share: losses[share])
        network.load_state_dict(last)
        pl_module.train(training)

        ends = f"val top-1 {top1[0.0]:.3f} for the given weights, {top1[1.0]:.3f} for the best epoch"
        kept = {0.0: "the former are", 1.0: "the latter is"}.get(chosen, f"{chosen:.0%} of the way between is")
        rank_zero_only(print)(f"Blend: {ends}; {kept} kept ({top1[chosen]:.3f}).", flush=True)
        if chosen < 1 and trainer.is_global_zero:
            content = checkpoint.read_ckpt(str(best))
            blended = _between(start, end, chosen)
            content["state_dict"] |= {f"network.{name}": tensor for name, tensor in blended.items()}
            checkpoint.write_ckpt(content, best)


def _copy(state: State) -> State:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _between(start: State, end: State, share: float) -> State:
    """Return the weights at ``share`` of the way; BatchNorm's running statistics too, and the end's counts."""
    return {
        name: start[name].lerp(there.to(start[name]), share) if there.is_floating_point() else there
        for name, there in end.items()
    }

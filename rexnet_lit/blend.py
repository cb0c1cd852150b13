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
    """Puts the best weights into ``best.ckpt`` when training ends, where ``model.strategy.blend`` asks for it.

    Candidates are the best epoch's, and those on the line from the start to the last epoch.
    """

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Solve the start's head, try the candidates on the validation split, and keep the best."""
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
        network = pl_module.network
        before, training = _copy(network.state_dict()), pl_module.training
        files = [Path(saver.best_model_path), Path(saver.last_model_path)]
        states = [checkpoint.load_model(file).state for file in files] if trainer.is_global_zero else []
        best, last = trainer.strategy.broadcast(states)

        network.load_state_dict(pl_module.start)
        pl_module.eval()
        embed = pl_module.embedder()
        train = data.compute_features("train", embed, evaluate=True)
        pl_module.solve(train[0], data.compute_features("val", embed)[0])
        start = _copy(network.state_dict())

        candidates = {"the best epoch": best, "the given weights": start, "the last epoch": last}
        candidates |= {
            f"{share:.0%} of the way from these to the last": _between(start, last, share) for share in SHARES
        }
        targets = torch.from_numpy(data.splits()["val"].targets)
        top1, losses = {}, {}
        for name, state in candidates.items():
            network.load_state_dict(state)
            features = data.compute_features("val", pl_module.embedder())[0]
            logits = classify(network, features.to(pl_module.device)).detach().cpu()
            top1[name] = float((logits.argmax(1) == targets).float().mean())
            losses[name] = min(float(functional.cross_entropy(logits / t, targets)) for t in _TEMPERATURES)
        chosen = min(losses, key=lambda name: losses[name])
        network.load_state_dict(before)
        pl_module.train(training)

        ends = ", ".join(f"{top1[name]:.3f} for {name}" for name in list(candidates)[:3])
        rank_zero_only(print)(f"Blend: val top-1 {ends}; kept: {chosen} ({top1[chosen]:.3f}).", flush=True)
        if chosen != "the best epoch" and trainer.is_global_zero:
            content = checkpoint.read_ckpt(str(files[0]))
            content["state_dict"] |= {f"network.{name}": tensor for name, tensor in candidates[chosen].items()}
            checkpoint.write_ckpt(content, files[0])


def _copy(state: State) -> State:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _between(start: State, end: State, share: float) -> State:
    """Return the weights at ``share`` of the way; BatchNorm's running statistics too, and the end's counts."""
    return {
        name: start[name].lerp(there.to(start[name]), share) if there.is_floating_point() else there
        for name, there in end.items()
    }

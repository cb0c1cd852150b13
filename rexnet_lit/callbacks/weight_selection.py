"""The weights that ship: of the best and the last epoch, and of those between the start and the end, the best.

The epoch with the highest validation top-1 is often a lucky one: there are a few hundred images, and twenty epochs to
choose from; it must be better than the last one by two standard errors of the difference. A head that is solved on the
backbone's features of the undisturbed training images is often better than one that has learned beside it, after few
epochs from scratch by far. And fine-tuning on few images also unlearns: on the straight line between the given weights
and the fine-tuned ones there is often a better backbone than either; it must be better by one standard error. The
validation loss chooses: top-1 is too coarse. Where `model.calibrate` will divide the logits by the temperature that
suits them best, each candidate's are divided so, or the loss would prefer whoever is better calibrated already.

Sources: Wortsman et al., "Robust fine-tuning of zero-shot models", 2022 (WiSE-FT, from a zero-shot start); Kang et
al., "Decoupling Representation and Classifier for Long-Tailed Recognition", 2020 (the head anew); Guo et al., "On
Calibration of Modern Neural Networks", 2017. Measured in tests/benchmarks/recipe.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.nn import functional

from rexnet_lit.callbacks.checkpoint import replace_weights
from rexnet_lit.callbacks.end_of_training import EndOfTraining
from rexnet_lit.data.datamodule import ImageFolderDataModule
from rexnet_lit.models import checkpoint
from rexnet_lit.training.calibration import fit_temperature
from rexnet_lit.training.module import RexNetModule

State = dict[str, Tensor]

SHARES = (0.0, 0.5, 1.0)
"""How far along the line to look; a finer grid finds nothing better."""

MOST_IMAGES = 20_000
"""Training images up to which it is done: solving heads for more takes long, and more images move further."""


class WeightSelection(EndOfTraining):
    """Puts the best weights into ``best.ckpt`` when training ends, where ``model.strategy.blend`` asks for it.

    Candidates are the best and the last epoch; with a linear head, the last epoch with a solved one too, and from given
    weights what lies between these and the last epoch, with solved heads.
    """

    def __init__(self) -> None:
        self.kept = ""
        """What ships instead of the best epoch, if anything does."""
        self.metrics: dict[str, Tensor] = {}
        """The validation metrics of what ships, where anything was compared."""

    def finish(
        self, trainer: pl.Trainer, pl_module: RexNetModule, data: ImageFolderDataModule, saver: ModelCheckpoint
    ) -> None:
        """Solve the heads, try the candidates on the validation split, and keep the best."""
        # A user's own saver may keep no last.ckpt.
        if not pl_module.blends or not saver.best_model_path or not saver.last_model_path:
            return
        net = pl_module.network
        before, training = _copy(net.state_dict()), pl_module.training
        files = [Path(saver.best_model_path), Path(saver.last_model_path)]
        states = [checkpoint.load_model(file).state for file in files] if trainer.is_global_zero else []
        best, last = trainer.strategy.broadcast(states)
        line: dict[float, State] = {}
        if pl_module.spec.head.name == "linear" and len(data.splits()["train"]) <= MOST_IMAGES:
            start = pl_module.start
            line = {1.0: last} if start is None else {share: _between(start, last, share) for share in SHARES}
        if not line and all(torch.equal(tensor, last[name]) for name, tensor in best.items()):
            return

        pl_module.eval()
        candidates = self._candidates(pl_module, data, best, last, line)
        targets = torch.from_numpy(data.splits()["val"].targets)
        weights = torch.from_numpy(pl_module.class_weights()).float()
        logits, top1, losses, each = {}, {}, {}, {}
        for name, (state, features) in candidates.items():
            net.load_state_dict(state)
            found = logits[name] = pl_module.logits(features)
            top1[name] = float((found.argmax(1) == targets).float().mean())
            temperature, losses[name] = 1.0, float(functional.cross_entropy(found, targets, weights))
            if pl_module.calibrates:
                temperature, losses[name] = fit_temperature(found, targets, weights)
            each[name] = functional.cross_entropy(found / temperature, targets, reduction="none") * weights[targets]
        net.load_state_dict(before)
        pl_module.train(training)

        lowest = min(losses, key=lambda name: losses[name])
        rivals = {"the best epoch": ("the last epoch", 2)}
        rivals |= {_name(share): (_name(1.0), 1) for share in line if share < 1}
        for name, (than, errors) in rivals.items():
            gain = each[than] - each[name]
            if float(gain.mean()) < errors * float(gain.std()) / len(gain) ** 0.5:
                del losses[name]  # no more than luck
        chosen = min(losses, key=lambda name: losses[name])
        self.metrics = pl_module.measure(logits[chosen], targets)
        told = [name for name in ("the best epoch", _name(0.0), "the last epoch") if name in top1]
        shown = ", ".join(f"{top1[name]:.3f} for {name}" for name in told)
        kept = f"kept, for its loss: {chosen} ({top1[chosen]:.3f})"
        if chosen != lowest:
            kept = f"kept: {chosen} ({top1[chosen]:.3f}), for the lower loss of {lowest} may be luck"
        rank_zero_only(print)(f"Blend: val top-1 {shown}; {kept}.", flush=True)
        if chosen == "the best epoch":
            return
        self.kept = chosen
        if trainer.is_global_zero:
            replace_weights(files[0], {f"network.{name}": tensor for name, tensor in candidates[chosen][0].items()})

    def _candidates(
        self, pl_module: RexNetModule, data: ImageFolderDataModule, best: State, last: State, line: dict[float, State]
    ) -> dict[str, tuple[State, Tensor]]:
        """Return, by name, each candidate's weights and its features of the validation images, (N, C).

        Args:
            pl_module: The module, in eval mode, whose weights change.
            data: Where the images are.
            best: The best epoch's weights.
            last: The last epoch's.
            line: By their share of the way, the weights for which a head is to be solved, the last epoch's last.
        """
        net, embedders = pl_module.network, []
        for state in (*(line.values() or [last]), best):
            net.load_state_dict(state)
            embedders.append(pl_module.embedder())
        # All in one pass, however many networks look: reading the images may be what takes long.
        val = data.compute_features("val", _together(embedders))[0].chunk(len(embedders), dim=1)
        found = {"the best epoch": (best, val[-1]), "the last epoch": (last, val[-2])}
        if line:
            train = data.compute_features("train", _together(embedders[:-1]), evaluate=True)[0].chunk(len(line), dim=1)
            for (share, state), features, val_features in zip(line.items(), train, val[:-1], strict=True):
                net.load_state_dict(state)
                pl_module.solve(features, val_features)
                found[_name(share)] = _copy(net.state_dict()), val_features
        return found


def _name(share: float) -> str:
    ends = {0.0: "the given weights", 1.0: "the last epoch with a solved head"}
    return ends.get(share, f"{share:.0%} of the way from these to the last")


def _together(embedders: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    """Return what maps images (B, 3, H, W) to the features of all networks side by side, (B, E * C)."""
    return lambda images: torch.cat([embed(images) for embed in embedders], dim=1)


def _copy(state: State) -> State:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _between(start: State, end: State, share: float) -> State:
    """Return the weights at ``share`` of the way; BatchNorm's running statistics too, and the end's counts."""
    return {
        name: start[name].lerp(there.to(start[name]), share) if there.is_floating_point() else there
        for name, there in end.items()
    }

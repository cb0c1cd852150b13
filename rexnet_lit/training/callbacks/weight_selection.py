"""Weight selection: which of the trained weights become ``best.ckpt`` and the shipped model.

The epoch with the highest validation top-1 is often a lucky one, chosen among twenty on a few hundred images: it must
be better than the last epoch by two standard errors of the difference. A head that is solved on the features of the
training images without augmentation is often better than the one that was trained with the backbone, far better after a
few epochs from scratch. And fine-tuning on few images also forgets: on the straight line between the starting and the
fine-tuned weights there is often a better backbone than at either end, which must be better by one standard error.
``model.select`` decides, and of equals the loss. Where `model.calibrate` will divide the logits by their best
temperature, the logits of each candidate are divided so first; else the loss would prefer whichever is calibrated.

Sources: Wortsman et al., "Robust fine-tuning of zero-shot models", 2022 (WiSE-FT, from a zero-shot start); Kang et
al., "Decoupling Representation and Classifier for Long-Tailed Recognition", 2020 (the new head); Guo et al., "On
Calibration of Modern Neural Networks", 2017. Measured in docs/experiments.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.nn import functional

from rexnet_lit.data.datamodule import ImageFolderDataModule
from rexnet_lit.models import checkpoint
from rexnet_lit.training.calibration import fit_temperature
from rexnet_lit.training.callbacks.checkpoint import WHY, RunCheckpoint, Shipped, replace_weights
from rexnet_lit.training.callbacks.end_of_training import EndOfTraining, copy_state, network_restored
from rexnet_lit.training.features import class_weights, embedder, head_logits, solve_head
from rexnet_lit.training.module import RexNetModule

State = dict[str, Tensor]

SHARES = {
    0.0: "the starting weights",
    0.5: "50% of the way from the starting weights to the last epoch",
    1.0: "the last epoch with a solved head",
}
"""Points on the line from the starting weights to the last epoch; a finer grid finds nothing better."""

BEST = "the best epoch"

MAX_IMAGES = 20_000
"""Training images up to which heads are solved: it takes long for more, and there is less to gain."""


@dataclass(frozen=True)
class _Score:
    """Validation metrics, the loss as it is compared, and what each image adds to the error (N,)."""

    metrics: dict[str, float]
    loss: float
    errors: Tensor

    @property
    def top1(self) -> float:
        """The share of the images that are classified correctly."""
        return self.metrics["val/top1"]

    def rank(self, select: str) -> tuple[float, float]:
        """Return what is lower for better weights: by ``model.select``, and of equals by the loss."""
        return self.loss if select == "loss" else -self.metrics[f"val/{select}"], self.loss


class WeightSelection(EndOfTraining):
    """Puts the best weights into ``best.ckpt`` when training ends, where ``model.strategy.blend`` asks for it.

    Candidates are the best and the last epoch. With a linear head also the last epoch with a solved head, and, for a
    run that did not start from scratch, the weights between the start and the last epoch with solved heads.
    """

    def finish(self, trainer: Trainer, module: RexNetModule, data: ImageFolderDataModule, saver: RunCheckpoint) -> None:
        """Compare the candidates on the validation images, and save the best."""
        if not module.blends or not saver.best_model_path:
            return
        files = [Path(saver.best_model_path), Path(saver.last_model_path)]
        states = [checkpoint.load_model(file).state for file in files] if trainer.is_global_zero else []
        best, last = trainer.strategy.broadcast(states)
        line: dict[str, State] = {}
        if module.spec.head.name == "linear" and len(data.splits()["train"]) <= MAX_IMAGES:
            start = module.start.state
            line = {name: _interpolate(start, last, share) for share, name in SHARES.items()} if start else {}
            line[SHARES[1.0]] = last
        if not line and all(torch.equal(tensor, last[name]) for name, tensor in best.items()):
            return
        rank_zero_only(print)("Selecting the weights that ship, on the validation images.", flush=True)
        with network_restored(module):
            candidates, train = _candidates(module, data, best, last, line)
            targets = torch.from_numpy(data.splits()["val"].targets)
            weights = torch.from_numpy(class_weights(module)).float()
            scores = {name: _score(module, *candidate, targets, weights) for name, candidate in candidates.items()}
        chosen, why = _select(scores, module.select)
        name = saver.shipped.weights if chosen == BEST else chosen
        saver.shipped = Shipped(name, why, scores[chosen].metrics)
        saver.features = {"train": train[chosen]} if chosen in train else {}
        if chosen != BEST and trainer.is_global_zero:
            replace_weights(files[0], {f"network.{name}": tensor for name, tensor in candidates[chosen][0].items()})


def _candidates(
    module: RexNetModule, data: ImageFolderDataModule, best: State, last: State, line: Mapping[str, State]
) -> tuple[dict[str, tuple[State, Tensor]], dict[str, Tensor]]:
    """Return, by name, the weights of each candidate and its features of the validation images, (N, C).

    With them come the features of the training images, (M, C), where these were computed. A head is solved for each of
    the weights in ``line``, of which those of the last epoch come last.
    """
    network, embedders = module.network, []
    for state in (*(line.values() or [last]), best):
        network.load_state_dict(state)
        embedders.append(embedder(module))
    # One pass for all networks, because reading the images may take the longest.
    val = data.compute_features("val", _side_by_side(embedders))[0].chunk(len(embedders), dim=1)
    candidates, of_train = {BEST: (best, val[-1]), "the last epoch": (last, val[-2])}, dict[str, Tensor]()
    if line:
        train = data.compute_features("train", _side_by_side(embedders[:-1]), evaluate=True)[0].chunk(len(line), dim=1)
        for (name, state), features, val_features in zip(line.items(), train, val[:-1], strict=True):
            network.load_state_dict(state)
            solve_head(module, features, val_features)
            candidates[name] = copy_state(network.state_dict()), val_features
        of_train = {**dict(zip(line, train, strict=True)), "the last epoch": train[-1]}
    return candidates, of_train


def _score(module: RexNetModule, state: State, features: Tensor, targets: Tensor, weights: Tensor) -> _Score:
    module.network.load_state_dict(state)
    logits = head_logits(module, features)
    temperature, loss = 1.0, float(functional.cross_entropy(logits, targets, weights))
    if module.calibrates:
        temperature, loss = fit_temperature(logits, targets, weights)
    wrong = (logits.argmax(1) != targets).float()
    shares = torch.bincount(targets, minlength=len(weights)).clamp(min=1) / len(targets)
    errors = {
        "top1": wrong,
        "macro_f1": wrong / shares[targets],
        "loss": functional.cross_entropy(logits / temperature, targets, reduction="none") * weights[targets],
    }
    return _Score(module.measure(logits, targets), loss, errors[module.select])


def _select(scores: Mapping[str, _Score], select: str) -> tuple[str, str]:
    """Return the best candidate that is better than its rival by more than chance, and why; print both."""
    rivals = {BEST: ("the last epoch", 2), SHARES[0.0]: (SHARES[1.0], 1), SHARES[0.5]: (SHARES[1.0], 1)}
    eligible = []
    for name, score in scores.items():
        rival, deviations = rivals.get(name, (name, 0))
        gain = scores[rival].errors - score.errors
        if not deviations or not float(gain.mean()) < deviations * float(gain.std()) / len(gain) ** 0.5:
            eligible.append(name)
    first, chosen = (min(names, key=lambda name: scores[name].rank(select)) for names in (list(scores), eligible))
    ends = (BEST, SHARES[0.0], "the last epoch")
    compared = ", ".join(f"{scores[name].top1:.3f} for {name}" for name in ends if name in scores)
    better = WHY[select].replace("highest", "higher").replace("lowest", "lower")
    why = WHY[select] if chosen == first else f"the {better} of {first} may be chance"
    selected = f"selected: {chosen} ({scores[chosen].top1:.3f}), {why}"
    rank_zero_only(print)(f"Weight selection: val top-1 {compared}; {selected}.", flush=True)
    return chosen, why


def _side_by_side(embedders: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    """Return a function from images (B, 3, H, W) to the features of all E networks side by side, (B, E * C)."""
    return lambda images: torch.cat([embed(images) for embed in embedders], dim=1)


def _interpolate(start: State, end: State, share: float) -> State:
    """Return the weights at ``share`` of the way, with BatchNorm's running statistics; counts are those of ``end``."""
    return {
        name: start[name].lerp(tensor.to(start[name]), share) if tensor.is_floating_point() else tensor
        for name, tensor in end.items()
    }

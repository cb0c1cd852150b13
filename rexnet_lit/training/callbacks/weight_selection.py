"""Weight selection: which of the trained weights become ``best.ckpt`` and the shipped model.

The epoch with the highest validation top-1 is often a lucky one, chosen among twenty on a few hundred images: it must
be better than the last epoch by two standard errors of the difference. A head that is solved on the features of the
training images without augmentation is often better than the one that was trained with the backbone, far better after a
few epochs from scratch. And fine-tuning on few images also forgets: on the straight line between the starting and the
fine-tuned weights there is often a better backbone than at either end, which must be better by one standard error.
``model.select`` decides, and of equals the loss. Where `model.calibrate` will divide the logits by their best
temperature, the logits of each candidate are divided so first; else the loss would prefer whichever is calibrated.

Embedding the training images and solving a head takes the longest, so it is left out for networks of which the features
of the validation images show that they cannot win.

Sources: Wortsman et al., "Robust fine-tuning of zero-shot models", 2022 (WiSE-FT, from a zero-shot start); Kang et
al., "Decoupling Representation and Classifier for Long-Tailed Recognition", 2020 (the new head); Guo et al., "On
Calibration of Modern Neural Networks", 2017. Measured in docs/experiments.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.nn import functional

from rexnet_lit.data.datamodule import ImageFolderDataModule
from rexnet_lit.data.splits import Split
from rexnet_lit.models import checkpoint
from rexnet_lit.training.calibration import fit_temperature
from rexnet_lit.training.callbacks.checkpoint import WHY, RunCheckpoint, Shipped
from rexnet_lit.training.callbacks.end_of_training import EndOfTraining, copy_state, network_restored
from rexnet_lit.training.features import class_weights, embedder, head_logits, solve_head
from rexnet_lit.training.module import RexNetModule

State = dict[str, Tensor]
Embedder = Callable[[Tensor], Tensor]

SHARES = {
    0.0: "the starting weights",
    0.5: "50% of the way from the starting weights to the last epoch",
    1.0: "the last epoch with a solved head",
}
"""Points on the line from the starting weights to the last epoch; a finer grid finds nothing better."""

BEST = "the best epoch"

MAX_IMAGES = 20_000
"""Training images up to which heads are solved: it takes long for more, and there is less to gain."""

_CLEARLY, _MUCH = 3.0, 0.05
_COMPARED = 1000
"""Validation images, at most, on which networks are compared before heads are solved."""


@dataclasses.dataclass(frozen=True)
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

    def setting(self, module: RexNetModule) -> str | None:  # noqa: D102
        return "model.strategy.blend" if module.blends else None

    def finish(self, trainer: Trainer, module: RexNetModule, data: ImageFolderDataModule, saver: RunCheckpoint) -> None:
        """Compare the candidates on the validation images, and save the best."""
        if not module.blends or not saver.best_model_path or "val" not in data.splits():
            return
        best = saver.best_weights(trainer)
        last = _last_weights(trainer, saver, best)
        line: dict[str, State] = {}
        if module.spec.head.name == "linear" and len(data.splits()["train"]) <= MAX_IMAGES:
            start = module.start.state
            line = {name: interpolate(start, last, share) for share, name in SHARES.items()} if start else {}
            line[SHARES[1.0]] = last
        if not line and best is last:
            return
        rank_zero_only(print)("Selecting the weights that ship, on the validation images.", flush=True)
        with network_restored(module):
            targets = torch.from_numpy(data.splits()["val"].targets)
            weights = torch.from_numpy(class_weights(module)).float()
            embedders = _embedders(module, {**line, "the last epoch": last, BEST: best})
            val = _features(data, "val", embedders)
            solved = _not_clearly_worse({name: val[name] for name in line}, targets, weights, module.select)
            solved = trainer.strategy.broadcast(solved)
            train = _features(data, "train", {name: embedders[name] for name in solved})
            heads = {name: _with_solved_head(module, line[name], train[name], val[name]) for name in solved}
            candidates = {BEST: best, "the last epoch": last} | {name: state for name, (state, _) in heads.items()}
            scores = {name: _score(module, state, val[name], targets, weights) for name, state in candidates.items()}
        chosen, why = _select(scores, module.select)
        if chosen == BEST:
            saver.shipped = dataclasses.replace(saver.shipped, why=why, metrics=scores[chosen].metrics)
        else:
            strength = heads[chosen][1] if chosen in heads else None
            saver.shipped = Shipped(chosen, why, scores[chosen].metrics, strength=strength)
        saver.features = {"val": val[chosen].contiguous()}
        backbone = SHARES[1.0] if chosen == "the last epoch" or (chosen == BEST and best is last) else chosen
        if backbone in train:
            saver.features["train"] = train[backbone]
        if chosen != BEST:
            saver.change_best(candidates[chosen])


def _last_weights(trainer: Trainer, saver: RunCheckpoint, best: State) -> State:
    """Return the weights in ``last.ckpt``: ``best`` itself if they are the same."""
    last = None
    if trainer.is_global_zero and not Path(saver.last_model_path).samefile(saver.best_model_path):
        found = checkpoint.load_model(saver.last_model_path).state
        last = None if all(torch.equal(tensor, found[name]) for name, tensor in best.items()) else found
    last = trainer.strategy.broadcast(last)
    return best if last is None else last


def _embedders(module: RexNetModule, states: Mapping[str, State]) -> dict[str, Embedder]:
    """Return each network's function from images to features; networks of the same weights share it."""
    made: dict[int, Embedder] = {}
    for state in states.values():
        if id(state) not in made:
            module.network.load_state_dict(state)
            made[id(state)] = embedder(module)
    return {name: made[id(state)] for name, state in states.items()}


def _features(data: ImageFolderDataModule, split: Split, embedders: Mapping[str, Embedder]) -> dict[str, Tensor]:
    """Return each network's features (N, C) of a split by the eval recipe; the images are read once for all."""
    different = list(dict.fromkeys(embedders.values()))
    if not different:
        return {}
    features = data.compute_features(split, _side_by_side(different), evaluate=split == "train")[0]
    found = dict(zip(different, features.chunk(len(different), dim=1), strict=True))
    return {name: found[embed] for name, embed in embedders.items()}


def _with_solved_head(module: RexNetModule, state: State, train: Tensor, val: Tensor) -> tuple[State, float]:
    module.network.load_state_dict(state)
    head = solve_head(module, train, val)
    return copy_state(module.network.state_dict()), head.strength


def _not_clearly_worse(features: Mapping[str, Tensor], targets: Tensor, weights: Tensor, select: str) -> list[str]:
    """Return the networks for which it is worth the time to embed the training images and solve a head.

    A ridge regression on the validation images, each left out in turn, is nearly as good as the head, and takes no
    time. What it finds worse than another network by `_CLEARLY` standard errors of the difference, and by `_MUCH` of
    that one's error, cannot win.
    """
    every = -(-len(targets) // _COMPARED)
    errors = {
        name: _left_out_errors(of[::every].double(), targets[::every], weights, select) for name, of in features.items()
    }

    def clearly_worse(name: str, other: str) -> bool:
        loss = errors[name] - errors[other]
        deviation = loss.std(correction=0) / len(loss) ** 0.5
        return bool(loss.mean() > max(_CLEARLY * deviation, _MUCH * errors[other].mean()))

    return [name for name in errors if not any(clearly_worse(name, other) for other in errors)]


def _left_out_errors(features: Tensor, targets: Tensor, weights: Tensor, select: str) -> Tensor:
    """Return each image's error (N,) by a ridge regression on the others: with the penalty that has the lowest loss."""
    centred = (features - features.mean(0)) / (features.std(0, correction=0) + 1e-6)
    truth = functional.one_hot(targets, len(weights)).double()
    values, vectors = torch.linalg.eigh(centred @ centred.T / centred.shape[1])
    found = []
    for penalty in (0.01, 0.1, 1.0, 10.0, 100.0):
        smoother = (vectors * (values / (values + penalty))) @ vectors.T  # (N, N), from the targets to their estimates
        itself = smoother.diagonal() + 1 / len(targets)  # the share of an image in its own estimate
        scores = truth - (truth - truth.mean(0) - smoother @ truth) / (1 - itself)[:, None]
        temperature, loss = fit_temperature(scores, targets, weights)
        found.append((loss, scores / temperature))
    _, logits = min(found, key=lambda pair: pair[0])
    return _errors(logits, targets, weights, select)


def _errors(logits: Tensor, targets: Tensor, weights: Tensor, select: str) -> Tensor:
    """Return what each image adds to the error that ``model.select`` names, (N,)."""
    if select == "loss":
        return functional.cross_entropy(logits, targets, reduction="none") * weights[targets]
    wrong = (logits.argmax(1) != targets).float()
    shares = torch.bincount(targets, minlength=len(weights)).clamp(min=1) / len(targets)
    return wrong if select == "top1" else wrong / shares[targets]


def _score(module: RexNetModule, state: State, features: Tensor, targets: Tensor, weights: Tensor) -> _Score:
    module.network.load_state_dict(state)
    logits = head_logits(module, features)
    temperature, loss = 1.0, float(functional.cross_entropy(logits, targets, weights))
    if module.calibrates:
        temperature, loss = fit_temperature(logits, targets, weights)
    errors = _errors(logits / temperature, targets, weights, module.select)
    return _Score(module.measure(logits, targets), loss, errors)


def _select(scores: Mapping[str, _Score], select: str) -> tuple[str, str]:
    """Return the best candidate that is better than its rival by more than chance, and why; print both."""
    rivals = {BEST: ("the last epoch", 2), SHARES[0.0]: (SHARES[1.0], 1), SHARES[0.5]: (SHARES[1.0], 1)}
    eligible = []
    for name, score in scores.items():
        rival, deviations = rivals.get(name, (name, 0))
        if rival not in scores:  # clearly worse
            rival, deviations = name, 0
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


def _side_by_side(embedders: Sequence[Embedder]) -> Embedder:
    """Return a function from images (B, 3, H, W) to the features of all E networks side by side, (B, E * C)."""
    return lambda images: torch.cat([embed(images) for embed in embedders], dim=1)


def interpolate(start: State, end: State, share: float) -> State:
    """Return the weights at ``share`` of the way, with BatchNorm's running statistics; counts are those of ``end``."""
    return {
        name: start[name].lerp(tensor.to(start[name]), share) if tensor.is_floating_point() else tensor
        for name, tensor in end.items()
    }

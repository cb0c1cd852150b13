"""One model from a cross-validation, which itself gives as many as there are folds.

A refit is trained on all images, for as long and in the form (raw weights, a solved head, ...) that most folds have
chosen. No image is left to it, so its temperature and the limits of its answers come from the predictions of the folds
for the images that they have not seen, as scikit-learn's ``CalibratedClassifierCV(ensemble=False)`` does it. These
models had fewer images, so that the limits are rather too careful. What is measured in the features of the model
itself, how strange an image is, cannot be had so.

The average of the folds' weights (Wortsman et al., "Model soups", 2022, https://arxiv.org/abs/2203.05482) has seen all
images of the folds too, and from scratch it is chance: a test split decides whether it ships.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from rexnet_lit.data.datamodule import ImageFolderDataModule
from rexnet_lit.data.folder import ImageFolder, fingerprint
from rexnet_lit.data.table import write_split
from rexnet_lit.models import checkpoint
from rexnet_lit.search.crossval import Folds, changes
from rexnet_lit.search.evaluation import evaluate, metrics_of
from rexnet_lit.search.state import Fit, read_result, ship_run, shipped_run
from rexnet_lit.search.trial import write_average
from rexnet_lit.training.calibration import fit_temperature
from rexnet_lit.training.callbacks.calibration import divided, is_chance
from rexnet_lit.training.callbacks.checkpoint import RunCheckpoint, Shipped
from rexnet_lit.training.callbacks.end_of_training import EndOfTraining, copy_state, network_restored
from rexnet_lit.training.callbacks.limits import describe
from rexnet_lit.training.callbacks.run_folder import RESULT
from rexnet_lit.training.callbacks.weight_selection import SHARES, interpolate
from rexnet_lit.training.features import embedder, solve_head
from rexnet_lit.training.limits import MIN_IMAGES, fit_limits
from rexnet_lit.training.logistic_head import STRENGTHS
from rexnet_lit.training.module import RexNetModule
from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.files import write_file

LAST = "the last epoch"
_NO_FIGURES = "its figures are those of the cross-validation, as no image is left to test it"


def check(how: str, settings: Mapping[str, Any], folder: ImageFolder) -> None:
    """Raise `UserError`, before anything is trained, if a model cannot be shipped in this way."""
    if how == "average" and "test" not in folder.splits:
        raise UserError(
            "--ship average: every image trains some of the averaged models, so only a test split can tell whether the "
            "average is any good, and there is none; add test/, set data.test_fraction, or use --ship refit"
        )
    if how == "refit" and settings["model"]["schedule"].get("name") == "plateau":
        raise UserError("--ship refit: model.schedule plateau needs validation images, and a refit has none")


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What most folds have chosen.

    Args:
        weights: Which weights of a run.
        epochs: How long to train.
        strength: scikit-learn's C of a solved head.
        votes: In words, how many folds have chosen these weights.
    """

    weights: str
    epochs: int
    strength: float | None
    votes: str

    @classmethod
    def of(cls, results: Sequence[Mapping[str, Any]]) -> Agreement:
        """Return it for the ``result.json`` of each fold."""
        chosen = [str(result["weights"]) for result in results]
        kinds = [LAST if name.startswith("epoch ") else name for name in chosen]
        kind, count = Counter(kinds).most_common(1)[0]
        lengths, strengths = [], []
        for result, name in ((r, n) for r, n, k in zip(results, chosen, kinds, strict=True) if k == kind):
            lengths.append(int(name.split()[1]) if name.startswith("epoch ") else int(result["epochs"]))
            strengths += [result["head_strength"]] if result["head_strength"] else []
        # The starting weights are not trained at all.
        epochs = 1 if kind == SHARES[0.0] else max(1, math.ceil(statistics.median(lengths)))
        return cls(kind, epochs, statistics.median_low(strengths) if strengths else None, f"{count} of {len(results)}")


class Refit(EndOfTraining):
    """Puts the weights on which the folds agree into ``best.ckpt``, calibrated and with limits by their predictions.

    Args:
        agreed: What the folds have chosen.
        logits: Those of the folds for images that they have not seen, before their own calibration, (N, K).
        targets: The classes of these images, (N,).
        calibrate: Whether to calibrate.
    """

    def __init__(self, agreed: Agreement, logits: Tensor, targets: Tensor, *, calibrate: bool) -> None:
        self.agreed, self.logits, self.targets, self.calibrate = agreed, logits, targets, calibrate

    def finish(self, trainer: Trainer, module: RexNetModule, data: ImageFolderDataModule, saver: RunCheckpoint) -> None:
        """Change the last weights, and save them."""
        saver.take_last(trainer)
        several = module.spec.num_classes > 1
        weights, temperature, lines = self._weights(trainer, module, data, saver), 1.0, []
        if self.calibrate and module.spec.head.name != "cosine" and several:
            found, _ = fit_temperature(self.logits, self.targets)
            if is_chance(found):
                lines.append("Not calibrated: the folds' models do no better than chance.")
            else:
                temperature = found
                weights = {**weights, **divided(module, weights, temperature)}
                lines.append(
                    f"Calibrated on the folds' predictions of {len(self.targets)} images: temperature {found:.2f}."
                )
        saver.change_best(weights)
        if len(self.targets) >= MIN_IMAGES and module.spec.network is None and several:
            probs = (self.logits / temperature).softmax(1).float()
            limits = fit_limits(probs.numpy(), self.targets.numpy(), None, None, module.target_precision)
            saver.change_best(limits=limits)
            lines.append(describe(limits, probs, "images that the folds' models have not seen"))
            lines.append(
                "No strangers: how strange an image is can be judged only by images that have not trained the model."
            )
        why = f"trained on all {len(data.splits()['train'])} images; {self.agreed.votes} folds chose such weights"
        saver.shipped = Shipped(self.agreed.weights, f"{why}; {_NO_FIGURES}", {}, temperature, self.agreed.strength)
        rank_zero_only(print)("\n".join(lines), flush=True)

    def _weights(
        self, trainer: Trainer, module: RexNetModule, data: ImageFolderDataModule, saver: RunCheckpoint
    ) -> dict[str, Tensor]:
        """Return the agreed weights: the last ones, or a point on the way to them with a solved head."""
        last = saver.best_weights(trainer)
        shares = [share for share, name in SHARES.items() if name == self.agreed.weights]
        if not shares:
            return last
        with network_restored(module):
            start = module.start.state
            line = last if start is None or shares == [1.0] else interpolate(start, last, shares[0])
            module.network.load_state_dict(line)
            features = data.compute_features("train", embedder(module), evaluate=True)[0]
            solve_head(module, features, None, (self.agreed.strength,) if self.agreed.strength else STRENGTHS)
            return copy_state(module.network.state_dict())


def _refit(folds: Folds, fit: Fit, settings: Mapping[str, Any], root: Path) -> Path:
    record, home = folds.target / "refit.json", folds.target / "refit"
    known = shipped_run(record, {})
    if known is not None:
        return known
    results = [read_result(run) for run in folds.runs]
    agreed = Agreement.of(results)
    logits = [
        torch.from_numpy(part.probs).double().clamp(min=torch.finfo(torch.float32).tiny).log() * result["temperature"]
        for part, result in zip(folds.tested, results, strict=True)
    ]
    targets = torch.from_numpy(np.concatenate([part.samples.targets for part in folds.tested]))
    given = settings["trainer"]["callbacks"] or []
    given = given if isinstance(given, list) else [given]
    kept = [part for part in given if not str(part.get("init_args", {}).get("monitor", "")).startswith("val/")]
    left_out = len(given) - len(kept)
    print(  # noqa: T201
        f"refit on all {len(folds.folder.splits['train'])} images, {agreed.epochs} epochs: {agreed.votes} folds chose "
        f"{agreed.weights}" + (f"; without {left_out} of trainer.callbacks, which monitor val/" if left_out else ""),
        flush=True,
    )
    write_split(folds.folder, home / "split.csv")
    of_refit = {
        "data.val_fraction": 0.0, "model.calibrate": False, "trainer.max_epochs": agreed.epochs,
        "trainer.max_steps": -1, **({"trainer.callbacks": kept} if left_out else {}),
    }  # fmt: skip
    end = Refit(agreed, torch.cat(logits), targets, calibrate=settings["model"]["calibrate"])
    run = fit({**changes(settings["data"], home), **of_refit}, [end])
    _annotate(run, folds)
    return ship_run(run, root, record, {})


def _average(folds: Folds, fit: Fit, settings: Mapping[str, Any], root: Path) -> Path:
    test = {"test images": fingerprint(folds.folder.splits["test"])}
    record, home = folds.target / "average.json", folds.target / "average"
    known = shipped_run(record, test)
    if known is not None:
        return known
    split_file, models = home / "split.csv", [run / "model.safetensors" for run in folds.runs]
    write_split(folds.folder, split_file)
    write_average(models, home / "model.safetensors")
    tested = [
        evaluate(run, settings["data"], split_file, settings["trainer"]["accelerator"]) for run in (home, *folds.runs)
    ]
    right = np.array([part.probs.argmax(1) == part.samples.targets for part in tested], np.float64)
    figures = [metrics_of(part.probs, part.samples.targets) for part in tested]
    gain = right[0] - right[1:].mean(0)
    mean, half = 100 * gain.mean(), 196 * gain.std(ddof=1) / math.sqrt(len(gain))
    verdict = (
        f"on {len(gain)} test images top-1 {figures[0]['top1']:.3f} for the average of the folds' weights and "
        f"{right[1:].mean():.3f} for the mean of their models: {mean:+.1f} points ({mean - half:+.1f} to "
        f"{mean + half:+.1f})"
    )
    if mean >= 0:
        run, weights = home, f"the average of the weights of {len(folds.runs)} folds"
        why = f"{verdict}; it has no limits of its answers, as no other image is left to fit them on"
        _complete(home, folds.runs[0])
    else:
        best = max(range(len(folds.runs)), key=lambda k: (figures[k + 1]["top1"], -figures[k + 1]["nll"]))
        run, weights = folds.runs[best], f"the model of fold {best + 1}"
        why = f"{verdict}; this one has the highest of the folds, {figures[best + 1]['top1']:.3f}, which flatters it"
    return ship_run(run, root, record, test, functools.partial(_annotate, folds=folds, weights=weights, why=why))


def _complete(home: Path, like: Path) -> None:
    """Give an averaged model what `test` reads of a run: where its images are."""
    model = checkpoint.load_model(home / "model.safetensors")
    _, data = checkpoint.read_record(checkpoint.read_ckpt(str(like / "checkpoints/best.ckpt")), str(like))
    data = dataclasses.replace(data, split_file=str((home / "split.csv").absolute()))
    content = {
        "state_dict": {f"network.{name}": tensor for name, tensor in model.state.items()},
        checkpoint.KEY: checkpoint.make_record(model.spec, data),
    }
    (home / "checkpoints").mkdir(exist_ok=True)
    checkpoint.write_ckpt(content, home / "checkpoints/best.ckpt")


def _annotate(run: Path, folds: Folds, **content: Any) -> None:
    """Write into the ``result.json`` of what ships where its figures come from."""
    figures = {key: folds.metrics[key] for key in ("mean", "std")}
    source = {
        "folds": len(folds.runs),
        "images": folds.metrics["count"],
        **figures,
        "report": str(folds.target.absolute()),
    }
    result = {"status": "finished", "metrics": {}, **read_result(run), **content, "cross_validation": source}
    write_file(run / RESULT, json.dumps(result, indent=2) + "\n")


SHIP: dict[str, Callable[[Folds, Fit, Mapping[str, Any], Path], Path]] = {"refit": _refit, "average": _average}
"""Each makes one model from the folds, and returns its run folder below the root."""

HELP = (
    "refit trains on all images, for as long as the folds agree on",
    "average averages the weights of the folds, if that is no worse on a test split",
)

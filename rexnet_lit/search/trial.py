"""One run of a search; the leaderboard; and the weights from which a run continues others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rexnet_lit.models.checkpoint import load_starting_weights, save_model
from rexnet_lit.search.space import Values
from rexnet_lit.utils.files import write_csv

_COLUMNS = (
    "trial", "stage", "status", "reason", "epochs", "seed", "val_top1", "val_macro_f1", "val_loss", "seconds",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a search.

    Args:
        number: From 0.
        stage: ``default`` (the config's settings), ``short``, ``full``, ``again`` (with another seed) or ``continued``
            (from the weights of an earlier run).
        values: The searched settings that differ from the config's, by key.
        epochs: Its length.
        seed: Of the run.
        seconds: How long it took.
        status: ``finished`` or ``failed``.
        reason: Why it failed.
        metrics: Of its weights on the validation images.
        start: The runs whose weights it starts from, or the average of them; if none, from those of the config.
    """

    number: int
    stage: str
    values: Values
    epochs: int
    seed: int
    seconds: float = 0.0
    status: str = "finished"
    reason: str = ""
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    start: Sequence[str] = ()

    @property
    def loss(self) -> float:
        """The validation loss; infinite for a failed run."""
        return self.metrics.get("val/loss", math.inf) if self.status == "finished" else math.inf

    @property
    def name(self) -> str:
        """Its folder below ``trials/``."""
        return f"trial_{self.number:03d}"


def write_leaderboard(file: Path, trials: Sequence[Trial], defaults: Mapping[str, Any]) -> None:
    """Write a row for each trial, with the searched settings.

    Args:
        file: A CSV file.
        trials: The best first.
        defaults: The config's value of each searched setting, by key.
    """
    rows = [
        [
            trial.name, trial.stage, trial.status, trial.reason, str(trial.epochs), str(trial.seed),
            *(trial.metrics.get(name, "") for name in ("val/top1", "val/macro_f1", "val/loss")),
            round(trial.seconds, 1), *(str(trial.values.get(key, default)) for key, default in defaults.items()),
        ]
        for trial in trials
    ]  # fmt: skip
    write_csv(file, (*_COLUMNS, *defaults), rows)


def write_average(models: Sequence[Path], file: Path) -> None:
    """Write the average of models, of those that have the shapes of the first: with its description, without limits."""
    states, specs = zip(*(load_starting_weights(str(model)) for model in models), strict=True)
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in states]
    alike = [state for state, own in zip(states, shapes, strict=True) if own == shapes[0]]
    file.parent.mkdir(parents=True, exist_ok=True)
    spec = dataclasses.replace(specs[0], limits=None)
    save_model(file, spec, {name: _mean([state[name] for state in alike]) for name in states[0]})


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    """Return the mean of tensors of one shape, in their type."""
    return torch.stack([tensor.double() for tensor in tensors]).mean(0).to(tensors[0].dtype)

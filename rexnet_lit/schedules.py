"""Learning-rate schedules: pure functions of the optimiser step."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from rexnet_lit.errors import UserError

__all__ = ["ScheduleSettings", "lr_factor"]

ScheduleName = Literal["cosine", "step", "constant"]


@dataclasses.dataclass(frozen=True)
class ScheduleSettings:
    """How the learning rate changes over a run.

    Args:
        name: ``cosine`` falls to ``min_factor`` at the last step (Loshchilov and Hutter 2017); ``step`` multiplies
            by ``gamma`` every ``step_epochs``; ``constant`` stays.
        warmup_epochs: Length of the linear rise to the full rate, in epochs (fractions allowed).
        min_factor: Where ``cosine`` ends, as a share of the full rate.
        step_epochs: Epochs between two drops of ``step``.
        gamma: Factor of each drop of ``step``.
    """

    name: ScheduleName = "cosine"
    warmup_epochs: float = 1.0
    min_factor: float = 0.01
    step_epochs: float = 10.0
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if self.name not in get_args(ScheduleName):
            raise UserError(
                f"model.schedule.name is {self.name!r}; expected one of {', '.join(get_args(ScheduleName))}"
            )
        if self.warmup_epochs < 0:
            raise UserError(f"model.schedule.warmup_epochs is {self.warmup_epochs}; expected 0 or more")
        if not 0 <= self.min_factor <= 1:
            raise UserError(f"model.schedule.min_factor is {self.min_factor}; expected a fraction from 0 to 1")
        if self.step_epochs <= 0 or self.gamma <= 0:
            raise UserError("model.schedule.step_epochs and model.schedule.gamma must be above 0")


def lr_factor(settings: ScheduleSettings, step: int, total_steps: int, steps_per_epoch: float) -> float:
    """Return what the full learning rate is multiplied by.

    Args:
        settings: The schedule.
        step: Optimiser steps done so far: 0 for the first one.
        total_steps: Optimiser steps of the whole run.
        steps_per_epoch: Optimiser steps of one epoch (fewer than batches under accumulation).
    """
    # A warm-up is never longer than a quarter of the run, or a short trial would end before the full rate.
    warmup = min(round(settings.warmup_epochs * steps_per_epoch), total_steps // 4)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if settings.name == "constant":
        return 1.0
    if settings.name == "step":
        return float(settings.gamma ** math.floor(step / steps_per_epoch / settings.step_epochs))
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return settings.min_factor + (1 - settings.min_factor) * 0.5 * (1 + math.cos(math.pi * done))

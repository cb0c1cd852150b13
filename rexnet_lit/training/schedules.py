"""Learning-rate schedules: pure functions of the optimiser step, and one that watches the validation."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from torch.optim.lr_scheduler import LambdaLR

from rexnet_lit.utils.errors import UserError

ScheduleName = Literal["cosine", "one_cycle", "step", "plateau", "constant"]


@dataclasses.dataclass(frozen=True)
class ScheduleSettings:
    """How the learning rate changes over a run.

    Args:
        name: ``cosine`` falls to ``min_factor`` at the last step (Loshchilov and Hutter 2017); ``one_cycle`` rises
            and falls (Smith and Topin 2018); ``step`` multiplies by ``gamma`` every ``step_epochs``; ``plateau``
            does when the validation loss has not fallen for ``patience`` validations; ``constant`` stays.
        warmup_epochs: Length of the linear rise to the full rate, in epochs (fractions allowed); not of ``one_cycle``.
        min_factor: Where ``cosine`` ends, as a share of the full rate.
        step_epochs: Epochs between two drops of ``step``.
        gamma: Factor of each drop of ``step`` and ``plateau``.
        patience: Validations without a lower loss that ``plateau`` bears.
        rise: Share of the run for which ``one_cycle`` rises, from a 25th of the full rate.
    """

    name: ScheduleName = "cosine"
    warmup_epochs: float = 1.0
    min_factor: float = 0.01
    step_epochs: float = 10.0
    gamma: float = 0.1
    patience: int = 3
    rise: float = 0.3

    def __post_init__(self) -> None:
        if self.name not in get_args(ScheduleName):
            raise UserError(
                f"model.schedule.name is {self.name!r}; expected one of {', '.join(get_args(ScheduleName))}"
            )
        if not 0 <= self.warmup_epochs < math.inf:
            raise UserError(f"model.schedule.warmup_epochs is {self.warmup_epochs}; expected 0 or more")
        if not 0 <= self.min_factor <= 1:
            raise UserError(f"model.schedule.min_factor is {self.min_factor}; expected a fraction from 0 to 1")
        if not 0 < self.step_epochs < math.inf or not 0 < self.gamma < math.inf:
            raise UserError("model.schedule.step_epochs and model.schedule.gamma must be above 0")
        if self.patience < 0:
            raise UserError(f"model.schedule.patience is {self.patience}; expected 0 or more")
        if not 0 < self.rise < 1:
            raise UserError(f"model.schedule.rise is {self.rise}; expected a fraction between 0 and 1")


def _warmup_steps(settings: ScheduleSettings, total_steps: int, steps_per_epoch: float) -> int:
    # Never longer than a quarter of the run, or a short trial would end before the full rate.
    return min(round(settings.warmup_epochs * steps_per_epoch), total_steps // 4)


def lr_factor(settings: ScheduleSettings, step: int, total_steps: int, steps_per_epoch: float) -> float:
    """Return what the full learning rate is multiplied by.

    Args:
        settings: The schedule.
        step: Optimiser steps done so far: 0 for the first one.
        total_steps: Optimiser steps of the whole run.
        steps_per_epoch: Optimiser steps of one epoch (fewer than batches under accumulation).
    """
    if settings.name == "one_cycle":
        return _one_cycle(step, max(1, total_steps), settings.rise)
    warmup = _warmup_steps(settings, total_steps, steps_per_epoch)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if settings.name in ("constant", "plateau"):
        return 1.0
    if settings.name == "step":
        drops = math.floor(step / (steps_per_epoch * settings.step_epochs) + 1e-9)  # 33 / (10 * 1.1) is below 3
        return float(settings.gamma**drops)
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return settings.min_factor + (1 - settings.min_factor) * 0.5 * (1 + math.cos(math.pi * done))


def _one_cycle(step: int, total_steps: int, rise: float) -> float:
    """Return the factor of torch's ``OneCycleLR`` with its defaults, whose bounds are these."""
    start, end = 1 / 25, 1 / 25 / 1e4
    peak = rise * total_steps - 1
    low, done = (start, step / peak) if step < peak else (end, (total_steps - 1 - step) / (total_steps - 1 - peak))
    return low + (1 - low) * 0.5 * (1 - math.cos(math.pi * min(1.0, max(0.0, done))))


@dataclasses.dataclass
class Plateau:
    """The factor of ``plateau``: the only schedule with a memory, in plain numbers that a checkpoint keeps.

    Args:
        warmup: Steps of the linear rise.
        gamma: Factor of each drop.
        patience: Validations without a lower loss that are borne.
        factor: What the drops so far amount to.
        best: Lowest validation loss so far.
        bad: Validations since then.
    """

    warmup: int
    gamma: float
    patience: int
    factor: float = 1.0
    best: float = math.inf
    bad: int = 0

    @classmethod
    def of(cls, settings: ScheduleSettings, total_steps: int, steps_per_epoch: float) -> Plateau:
        """Return a new one."""
        return cls(_warmup_steps(settings, total_steps, steps_per_epoch), settings.gamma, settings.patience)

    def __call__(self, step: int) -> float:
        """Return what the full learning rate is multiplied by, after ``step`` steps."""
        return self.factor * min(1.0, (step + 1) / (self.warmup + 1))

    def apply(self, scheduler: LambdaLR) -> None:
        """Have the next step take the factor of now, not of the last step's end."""
        rates = [rate * self(scheduler.last_epoch) for rate in scheduler.base_lrs]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates

    def update(self, loss: float) -> None:
        """Take a validation's loss into account."""
        self.best, self.bad = (loss, 0) if loss < self.best else (self.best, self.bad + 1)
        if self.bad > self.patience:
            self.factor, self.bad = self.factor * self.gamma, 0

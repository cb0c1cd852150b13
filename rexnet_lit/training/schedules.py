"""Learning-rate schedules: functions of the optimiser step, and ``plateau``, which follows the validation loss.

To add a schedule, write a function and name it in `SCHEDULES`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning.pytorch as pl
from torch.optim.lr_scheduler import LambdaLR

from rexnet_lit.data.datamodule import ImageFolderDataModule, any_datamodule
from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.settings import check_choice, check_range


def _cosine(settings: ScheduleSettings, step: int, total_steps: int, steps_per_epoch: float) -> float:
    warmup = _warmup_steps(settings, total_steps, steps_per_epoch)
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return settings.min_factor + (1 - settings.min_factor) * 0.5 * (1 + math.cos(math.pi * done))


def _one_cycle(settings: ScheduleSettings, step: int, total_steps: int, steps_per_epoch: float) -> float:
    """Return the factor of torch's ``OneCycleLR`` with its default bounds."""
    start, end, total = 1 / 25, 1 / 25 / 1e4, max(1, total_steps)
    peak = settings.rise * total - 1
    low, done = (start, step / peak) if step < peak else (end, (total - 1 - step) / (total - 1 - peak))
    return low + (1 - low) * 0.5 * (1 - math.cos(math.pi * min(1.0, max(0.0, done))))


def _step(settings: ScheduleSettings, step: int, total_steps: int, steps_per_epoch: float) -> float:
    drops = math.floor(step / (steps_per_epoch * settings.step_epochs) + 1e-9)  # 33 / (10 * 1.1) is below 3
    return float(settings.gamma**drops)


def _constant(settings: ScheduleSettings, step: int, total_steps: int, steps_per_epoch: float) -> float:
    return 1.0


SCHEDULES: dict[str, Callable[[ScheduleSettings, int, int, float], float]] = {
    "cosine": _cosine,
    "one_cycle": _one_cycle,
    "step": _step,
    "plateau": _constant,  # times the factor of `Plateau`
    "constant": _constant,
}
"""Each maps settings, step, steps of the run and steps of an epoch to the share of the full rate after the warm-up."""

_NEED_AN_END = ("cosine", "one_cycle")

if not TYPE_CHECKING:
    ScheduleName = Literal[tuple(SCHEDULES)]
else:
    ScheduleName = str


@dataclasses.dataclass(frozen=True)
class ScheduleSettings:
    """How the learning rate changes over a run.

    Args:
        name: ``cosine`` falls to ``min_factor`` at the last step (Loshchilov and Hutter 2017); ``one_cycle`` rises
            and falls (Smith and Topin 2018); ``step`` multiplies by ``gamma`` every ``step_epochs``; ``plateau``
            does when the validation loss has not fallen for ``patience`` validations; ``constant`` stays.
        warmup_epochs: Length of the linear warm-up to the full rate, in epochs (fractions allowed); not for
            ``one_cycle``.
        min_factor: Where ``cosine`` ends, as a share of the full rate.
        step_epochs: Epochs between two drops of ``step``.
        gamma: Factor of each drop of ``step`` and ``plateau``.
        patience: Validations without a lower loss before ``plateau`` drops the rate.
        rise: Share of the run for which ``one_cycle`` rises, from a 25th of the full rate.
        class_path: An own schedule in its place, such as ``torch.optim.lr_scheduler.StepLR``, which is called with the
            optimiser. It is stepped after each epoch; a function may return a dictionary as Lightning's
            ``configure_optimizers`` does, for other intervals. The settings above then have no effect.
        init_args: Its arguments.
    """

    name: ScheduleName = "cosine"
    warmup_epochs: float = 1.0
    min_factor: float = 0.01
    step_epochs: float = 10.0
    gamma: float = 0.1
    patience: int = 3
    rise: float = 0.3
    class_path: str | None = None
    init_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_choice("model.schedule.name", self.name, SCHEDULES)
        check_range("model.schedule.warmup_epochs", self.warmup_epochs, "[0, inf)")
        check_range("model.schedule.min_factor", self.min_factor, "[0, 1]")
        check_range("model.schedule.step_epochs", self.step_epochs, "(0, inf)")
        check_range("model.schedule.gamma", self.gamma, "(0, inf)")
        check_range("model.schedule.patience", self.patience, "[0, inf)")
        check_range("model.schedule.rise", self.rise, "(0, 1)")


def _warmup_steps(settings: ScheduleSettings, total_steps: int, steps_per_epoch: float) -> int:
    if settings.name == "one_cycle":
        return 0
    # Never longer than a quarter of the run, or a short trial would end before the full rate.
    return min(round(settings.warmup_epochs * steps_per_epoch), total_steps // 4)


def lr_factor(settings: ScheduleSettings, step: int, total_steps: int, steps_per_epoch: float) -> float:
    """Return the factor of the full learning rate.

    Args:
        settings: The schedule.
        step: Optimiser steps done so far: 0 for the first one.
        total_steps: Optimiser steps of the whole run.
        steps_per_epoch: Optimiser steps of one epoch (fewer than batches under accumulation).
    """
    warmup = _warmup_steps(settings, total_steps, steps_per_epoch)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SCHEDULES[settings.name](settings, step, total_steps, steps_per_epoch)


class Schedule(LambdaLR):
    """A schedule whose rates depend on this run's settings and the step alone, also in a resumed run."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the step of a checkpoint, not its rates: the length of the run or the rate may have changed."""
        super().load_state_dict({**state_dict, "base_lrs": self.base_lrs})
        self.apply()

    def apply(self) -> None:
        """Have the next step use the current factor, not that of the last step's end."""
        rates = [rate * factor(self.last_epoch) for rate, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._last_lr = rates


@dataclasses.dataclass
class Plateau:
    """The factor of ``plateau``: the only schedule with a state, in plain numbers that a checkpoint keeps."""

    warmup: int
    gamma: float
    patience: int
    factor: float = 1.0
    """The product of the drops so far."""
    best: float = math.inf
    bad: int = 0
    """Validations since the best one."""

    @classmethod
    def start(cls, settings: ScheduleSettings, total_steps: int, steps_per_epoch: float) -> Plateau:
        """Return the state before the first step."""
        return cls(_warmup_steps(settings, total_steps, steps_per_epoch), settings.gamma, settings.patience)

    def __call__(self, step: int) -> float:
        """Return the factor of the full learning rate after ``step`` steps."""
        return self.factor * min(1.0, (step + 1) / (self.warmup + 1))

    def update(self, loss: float) -> None:
        """Take a validation's loss into account."""
        self.best, self.bad = (loss, 0) if loss < self.best else (self.best, self.bad + 1)
        if self.bad > self.patience:
            self.factor, self.bad = self.factor * self.gamma, 0


def images_per_step(trainer: pl.Trainer) -> int | None:
    """Return the images of an optimiser step, over all processes; None without a known batch size."""
    data = any_datamodule(trainer)
    size: int | None = getattr(data, "batch_size", None)
    if size is None:
        return None
    images = size * trainer.accumulate_grad_batches * trainer.world_size
    if not isinstance(data, ImageFolderDataModule):
        return images
    return min(images, len(data.splits()["train"]) + len(data.unlabelled or ()))


def count_steps(trainer: pl.Trainer, settings: ScheduleSettings) -> tuple[int, int]:
    """Return the optimiser steps of an epoch and of the run.

    Lightning's ``estimated_stepping_batches`` would start the loader's workers, in a resumed run on the batches of
    the first epoch.

    Args:
        trainer: What trains.
        settings: The schedule.

    Raises:
        UserError: The run has no end, and the schedule needs one.
    """
    data = any_datamodule(trainer)
    if data is None:  # the user's own loaders
        total, epochs = int(trainer.estimated_stepping_batches), trainer.max_epochs
        return (math.ceil(total / epochs) if epochs and epochs > 0 else total), total
    folder = isinstance(data, ImageFolderDataModule)
    batches = cast(ImageFolderDataModule, data).steps_per_epoch() if folder else len(data.train_dataloader())
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * (1.0 if limit is None else limit))
    per_epoch = max(1, math.ceil(batches / trainer.accumulate_grad_batches))
    ends = [] if trainer.max_epochs in (None, -1) else [per_epoch * int(trainer.max_epochs)]
    ends += [trainer.max_steps] if trainer.max_steps >= 0 else []
    if not ends and settings.name in _NEED_AN_END and settings.class_path is None:
        raise UserError(f"model.schedule: {settings.name} needs an end; set trainer.max_epochs or trainer.max_steps")
    return per_epoch, min(ends, default=2**62)


def auto_epochs(images: int, batch_size: int, scratch: bool = False) -> int:
    """Return the epochs that ``trainer.max_epochs: auto`` stands for: 20, or up to 80 of few images.

    20 epochs of a hundred images are 80 steps. That is enough from given weights, but hardly trains a network that
    starts from random ones, which gets at least 320 (docs/experiments.md, "Few images").

    Args:
        images: Number of training images.
        batch_size: Images per step.
        scratch: Whether training starts from random weights.
    """
    epochs, most, steps = 20, 80, 320 if scratch else 80
    return min(most, max(epochs, math.ceil(steps / math.ceil(images / batch_size))))


def gradient_factor(trainer: pl.Trainer, batch_idx: int) -> float:
    """Return what a batch's loss is multiplied by, so that the gradient of accumulated batches is their mean.

    Lightning divides by ``accumulate_grad_batches`` in an epoch's last step too, which may have fewer.
    """
    every, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
    rest = 0 if math.isinf(batches) else int(batches) % every
    return every / rest if rest and batch_idx >= batches - rest else 1.0

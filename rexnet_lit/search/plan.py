"""What a fit will take, computed from two short fits on some of its images: time, memory, and space on the disk.

The second short fit has the batch size of the fit, the first one half of it: memory grows linearly with the batch.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from rexnet_lit.data.folder import Samples
from rexnet_lit.data.sampler import uses_all_batches
from rexnet_lit.data.splits import draw_evenly
from rexnet_lit.training.callbacks.mirroring import ChooseMirroring
from rexnet_lit.training.callbacks.pictures import ValidationPictures
from rexnet_lit.training.symmetries import images_measured
from rexnet_lit.utils import process

EPOCHS, STEPS = 2, 10
"""Of the second short fit."""
_SKIPPED = 2  # steps at the start of a fit, which take longer
MARGIN = 0.9  # of the memory: an estimate that is a little too low must not end a run


class Stopwatch(Callback):
    """Takes the times of a short fit. It must be the first of its callbacks."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self.epochs: list[float] = []
        self.steps: list[list[float]] = []
        self.validations: list[float] = []
        self.choice = 0.0

    def _mark(self, name: str) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times[name] = time.perf_counter()
        return self.times[name]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin."""
        self._mark("setup")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The images are read, and the features of a frozen backbone are computed."""
        self._mark("start")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin an epoch."""
        self.epochs.append(self._mark("step"))
        self.steps.append([])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Note how long the step took, with loading its images."""
        last = self.times["step"]
        self.steps[-1].append(self._mark("step") - last)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a validation."""
        self._mark("validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note how long the validation took."""
        last = self.times["validation"]
        self.validations.append(self._mark("validation") - last)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training is over; weights are selected and calibrated after this."""
        self.epochs.append(self._mark("trained"))

    def stop(self) -> None:
        """End."""
        self._mark("end")

    def between(self, first: str, last: str) -> float:
        """Return the seconds between two marks."""
        return self.times[last] - self.times[first]


class TimedChoice(ChooseMirroring):
    """Notes how long the choice of ``data.augment.hflip`` takes, which looks at some of the images."""

    def __init__(self, watch: Stopwatch) -> None:
        super().__init__()
        self._watch = watch

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose."""
        started = time.perf_counter()
        super().on_fit_start(trainer, pl_module)
        self._watch.choice = time.perf_counter() - started


class NoPictures(ValidationPictures):
    """Draws nothing: a whole fit spends a small share of its time on pictures, a short one would spend much."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do not collect what would be drawn."""


@dataclasses.dataclass(frozen=True)
class ShortFit:
    """What a short fit took.

    Args:
        watch: Its times.
        batch: Images per step.
        train: Number of training images.
        val: Number of validation images.
        memory: Its peak in bytes, of the process or of the GPU; 0 if it is not known.
    """

    watch: Stopwatch
    batch: int
    train: int
    val: int
    memory: int


@dataclasses.dataclass(frozen=True)
class Work:
    """What a fit has to do.

    Args:
        train: Number of training images of a process.
        val: Number of validation images of a process.
        steps: Batches per epoch.
        epochs: Number of epochs.
        validations: How many of them validate.
        selects: Whether weights are selected at the end, which takes time for each image.
    """

    train: int
    val: int
    steps: int
    epochs: float
    validations: float
    selects: bool


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds that a fit takes.

    Args:
        step: One training step.
        start: From the command to the first step: imports, reading the images, features of a frozen backbone.
        training: All steps.
        validation: All validations.
        saving: Checkpoints and logs of all epochs.
        end: Selection and calibration of the weights, the model file.
    """

    step: float
    start: float
    training: float
    validation: float
    saving: float
    end: float

    @property
    def total(self) -> float:
        """Of the whole fit."""
        return self.start + self.training + self.validation + self.saving + self.end


def estimate_times(cold: ShortFit, warm: ShortFit, work: Work, imports: float, classes: int) -> Times:
    """Return the times of a fit.

    Args:
        cold: The first short fit of this process: its first step takes longer, as that of the fit will.
        warm: The second one, with the fit's batch size and `EPOCHS` epochs.
        work: What the fit has to do.
        imports: Seconds before the first short fit.
        classes: Number of classes.
    """
    watch = warm.watch
    measured, of_warm = (images_measured(part.train, part.val, classes) for part in (work, warm))
    choice = watch.choice * measured / of_warm
    first, last = watch.steps[0], watch.steps[-1]
    step = float(np.mean([*first[_SKIPPED:], *last[1:]] or last))
    first_validation, validation = (watch.validations[i] if watch.validations else 0.0 for i in (0, -1))
    images = (work.train + work.val) / (warm.train + warm.val)
    val = work.val / max(warm.val, 1)
    saving = max(0.0, watch.epochs[-1] - watch.epochs[-2] - step * len(last) - validation)
    unprepared = max(0.0, cold.watch.steps[0][0] - float(np.median(cold.watch.steps[0])))
    begins = watch.epochs[0] - watch.times["start"]
    return Times(
        step=step,
        start=imports + unprepared + begins + choice + (watch.between("setup", "start") - watch.choice) * images,
        training=step * work.steps * work.epochs,
        validation=validation * val * work.validations + max(0.0, first_validation - validation) * val,
        saving=saving * work.epochs,
        end=watch.between("trained", "end") * (images if work.selects else 1),
    )


def memory_of(cold: ShortFit, warm: ShortFit, batch: int) -> int:
    """Return the bytes that a fit with another batch size takes, on the line through two short fits; 0 if unknown."""
    if not cold.memory or warm.batch <= cold.batch:
        return 0
    slope = max(0, warm.memory - cold.memory) / (warm.batch - cold.batch)
    return round(warm.memory + slope * (batch - warm.batch))


def largest_batch(cold: ShortFit, warm: ShortFit, memory: int, images: int) -> int:
    """Return the largest multiple of 8, up to the number of images, whose estimated memory fits; 0 if unknown.

    Args:
        cold: The first short fit.
        warm: The second one.
        memory: Bytes that there are.
        images: Number of training images.
    """
    if not memory_of(cold, warm, warm.batch):
        return 0
    fits = [b for b in range(8, max(9, min(images, 65536) + 1), 8) if memory_of(cold, warm, b) <= MARGIN * memory]
    return fits[-1] if fits else 0


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that were used so far: on a GPU by tensors, else by this process; 0 if it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def all_memory(device: torch.device, used: int) -> int:
    """Return the bytes that a fit may use: of the GPU, or what is free on this machine with what was used here."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return process.available_memory() + used


def some_of_each_class(samples: Samples, count: int) -> Samples:
    """Return about ``count`` images, of all classes alike, but at least one of each class."""
    return samples.take(draw_evenly(samples.targets, max(count, len(np.unique(samples.targets)))))


def work_of(trainer: Mapping[str, Any], sizes: Mapping[str, int], batch: int, devices: int) -> Work:
    """Return what a fit has to do; its strategy is not considered.

    Args:
        trainer: Its trainer's settings.
        sizes: Number of images by split.
        batch: Images of a step on each device.
        devices: Number of devices.
    """
    train, val = (math.ceil(sizes.get(name, 0) / devices) for name in ("train", "val"))
    steps = max(1, _limited(math.ceil(train / batch), trainer["limit_train_batches"]))
    val_steps = math.ceil(val / batch)
    val = round(val * _limited(val_steps, trainer["limit_val_batches"]) / max(val_steps, 1))
    epochs: float = trainer["max_epochs"]
    if trainer["max_steps"] not in (None, -1):
        most = trainer["max_steps"] * trainer["accumulate_grad_batches"] / steps
        epochs = most if epochs in (None, -1) else min(epochs, most)
    every = trainer["check_val_every_n_epoch"] or 1
    return Work(train, val, steps, epochs, max(epochs // every, 0), selects=False)


def _limited(batches: int, limit: int | float | None) -> int:
    if limit is None or uses_all_batches(limit):
        return batches
    return min(batches, limit) if isinstance(limit, int) else max(1, int(batches * limit))

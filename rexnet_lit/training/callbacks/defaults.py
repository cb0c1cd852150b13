"""The callbacks that every run gets: from the command line, in a notebook, with any ``Trainer``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    Callback,
    Checkpoint,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    WeightAveraging,
)

from rexnet_lit.training.callbacks.averaging import EMA
from rexnet_lit.training.callbacks.calibration import Calibrate
from rexnet_lit.training.callbacks.checkpoint import RunCheckpoint
from rexnet_lit.training.callbacks.console import ConsoleSummary, EvaluationNotes
from rexnet_lit.training.callbacks.limits import FitLimits
from rexnet_lit.training.callbacks.mirroring import ChooseMirroring
from rexnet_lit.training.callbacks.nan_guard import NaNGuard
from rexnet_lit.training.callbacks.pictures import AugmentedSamples, ValidationPictures
from rexnet_lit.training.callbacks.predictions import LimitsCollector
from rexnet_lit.training.callbacks.record import RunRecord
from rexnet_lit.training.callbacks.run_files import RunFiles
from rexnet_lit.training.callbacks.weight_selection import WeightSelection
from rexnet_lit.utils.errors import UserError

if TYPE_CHECKING:
    from rexnet_lit.training.module import RexNetModule

_DEFAULTS = (
    RunRecord, ChooseMirroring, WeightSelection, Calibrate, FitLimits, RunFiles, AugmentedSamples, ValidationPictures,
    ConsoleSummary, NaNGuard,
)  # fmt: skip


def callbacks_of(module: RexNetModule) -> list[Callback]:
    """Return the callbacks of a run, but for those that the trainer has: an earlier fit's, or the user's own.

    Checkpoints of Lightning's default `ModelCheckpoint` are replaced by those of `RunCheckpoint`; one that the user
    has set up stays. A trainer that has already trained another module starts over.
    """
    if module._trainer is None:
        return []
    trainer = module.trainer
    given: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if trainer.state.fn != "fit":
        writes = any(isinstance(c, (LimitsCollector, EvaluationNotes)) for c in given)
        return [] if writes else [EvaluationNotes()]
    if module.ema and any(isinstance(c, WeightAveraging) and not isinstance(c, EMA) for c in given):
        raise UserError("trainer.callbacks: WeightAveraging and model.ema both average the weights; leave one out")
    if any(isinstance(c, GradientAccumulationScheduler) for c in given):
        reason = "the schedule needs to know the steps; set accumulate_grad_batches"
        raise UserError(f"trainer.callbacks: GradientAccumulationScheduler is not supported: {reason}")
    trained = next((c for c in given if isinstance(c, RunFiles)), None)
    if trained is not None and trained.module not in (None, module):
        _start_over(trainer)
        given = trainer.callbacks  # type: ignore[attr-defined]
    saves = any(isinstance(c, Checkpoint) for c in given)
    if saves and not any(isinstance(c, RunCheckpoint) for c in given):
        # Not returned: Lightning would take it for a replacement of every ModelCheckpoint.
        kept = [c for c in given if not _is_lightnings_default(c)]
        trainer.callbacks = [*kept, RunCheckpoint()]  # type: ignore[attr-defined]
    found: list[Callback] = [kind() for kind in _DEFAULTS if not any(isinstance(c, kind) for c in given)]
    averaged = any(isinstance(c, EMA) for c in given)
    return [*found, EMA(module.ema)] if module.ema and not averaged else found


def _is_lightnings_default(callback: Callback) -> bool:
    """Return whether a callback is what Lightning adds where the user has given no checkpoint callback."""
    if type(callback) is not ModelCheckpoint:
        return False
    # fsspec makes another object in a forked process (`ddp_notebook`), which does not equal the first one.
    return {**vars(callback), "_fs": None} == {**vars(ModelCheckpoint()), "_fs": None}


def _start_over(trainer: Trainer) -> None:
    """Forget the training of another module: its progress, its callbacks, its best weights."""
    kept = [c for c in trainer.callbacks if not isinstance(c, (*_DEFAULTS, EMA))]  # type: ignore[attr-defined]
    trainer.callbacks = kept  # type: ignore[attr-defined]
    for callback in kept:
        if isinstance(callback, RunCheckpoint):
            callback.reset()
    loop = trainer.fit_loop
    fresh = type(loop)(trainer, loop.min_epochs, loop.max_epochs)
    fresh.epoch_loop = type(loop.epoch_loop)(trainer, loop.epoch_loop.min_steps, loop.epoch_loop.max_steps)
    loop.load_state_dict(fresh.state_dict())
    loop.restarting = loop._loaded_from_state_dict = False
    trainer.should_stop = False

"""The learning-rate finder of ``fit --find_lr true``.

Source: Smith, Cyclical Learning Rates for Training Neural Networks, 2017; Lightning's implementation.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.tuner.tuning import Tuner
from numpy.typing import NDArray

from rexnet_lit.data.datamodule import ImageFolderDataModule
from rexnet_lit.training.module import RexNetModule
from rexnet_lit.training.schedules import images_per_step
from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.files import unused_path
from rexnet_lit.utils.settings import overridden


def find_lr(trainer: pl.Trainer, module: RexNetModule, data: ImageFolderDataModule) -> None:
    """Raise the learning rate step by step until the loss diverges; plot the losses and print the best rate.

    Args:
        trainer: A trainer with one device. Its loggers and callbacks are removed.
        module: The model, trained for these steps.
        data: The images.

    Raises:
        UserError: There is more than one process, or there are too few steps.
    """
    if trainer.world_size > 1:
        raise UserError("find_lr runs in one process; set trainer.devices to 1")
    if data.augment.chooses_hflip and not overridden(data, "train_transform"):
        print("data.augment.hflip auto: images are mirrored here, as only a fit chooses")  # noqa: T201
    trainer.loggers, trainer.callbacks = [], []  # type: ignore[attr-defined]  # they would start a run folder
    logging.disable(logging.INFO)
    with warnings.catch_warnings(), contextlib.ExitStack() as quiet:
        warnings.simplefilter("ignore")  # from Lightning, about its own callback
        if not sys.stderr.isatty():  # Lightning's progress bar
            quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
        found = Tuner(trainer).lr_find(module, datamodule=data, min_lr=1e-6, update_attr=False)
    logging.disable(logging.NOTSET)
    # Without the first steps, which are noise, and the last, which diverged.
    values = np.array([found.results[key][10:-1] for key in ("lr", "loss")] if found is not None else [[], []])
    rates, losses = values[:, np.isfinite(values[1])]
    if found is None or len(rates) < 2:
        raise UserError("find_lr: too few steps; set a smaller data.batch_size or more trainer.max_epochs")
    # Over the logarithm of the rate, unlike Lightning's suggestion, which favours small rates.
    steepest = int(np.gradient(losses, np.log(rates)).argmin())
    path = unused_path(Path(trainer.default_root_dir) / "lr_finder.png")
    optimizer = module.optimizer_settings
    per_step = images_per_step(trainer)
    # As the setting is written: `base_batch_size` scales it.
    rates *= optimizer.full_lr(scratch=False) / optimizer.full_lr(scratch=False, batch_size=per_step)
    best = rates[steepest]
    _draw(path, rates, losses, steepest)
    note = " (with one rate for all layers, without layer_decay)" if optimizer.layer_decay != 1 else ""
    print(f"the loss falls fastest{note}, see {path}, at --model.optimizer.lr {best:.1g}")  # noqa: T201


def _draw(path: Path, rates: NDArray[np.float64], losses: NDArray[np.float64], best: int) -> None:
    """Draw the losses over the learning rates, and mark the best rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    ax = figure.subplots()
    ax.plot(rates, losses)
    ax.plot(rates[best], losses[best], "o", markersize=8, label=f"the loss falls fastest: {rates[best]:.1g}")
    ax.set(xscale="log", xlabel="model.optimizer.lr", ylabel="training loss, smoothed")
    ax.set_ylim(top=float(losses[: best + 1].max() + 0.2 * np.ptp(losses[: best + 1]) + 1e-3))
    ax.legend()
    figure.savefig(path)

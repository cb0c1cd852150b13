"""Fine-tune ReXNet image classifiers on your own folder of images.

In Python: `load` a model and predict; or train with `ImageFolderDataModule` and `RexNetModule` under Lightning's
``Trainer``. On the command line: ``python -m rexnet_lit --help``.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from rexnet_lit.utils.errors import UserError, opencv_message
from rexnet_lit.utils.process import configure_allocator

if TYPE_CHECKING:
    from rexnet_lit.data.augmentation import AugmentSettings as AugmentSettings
    from rexnet_lit.data.datamodule import ImageFolderDataModule as ImageFolderDataModule
    from rexnet_lit.data.sample import write_sample as write_sample
    from rexnet_lit.data.settings import EvalRecipe as EvalRecipe
    from rexnet_lit.data.transforms import EvalTransform as EvalTransform
    from rexnet_lit.data.transforms import TrainTransform as TrainTransform
    from rexnet_lit.models.checkpoint import save_model as save_model
    from rexnet_lit.models.heads import HeadSpec as HeadSpec
    from rexnet_lit.models.predictor import Classifier as Classifier
    from rexnet_lit.models.predictor import load as load
    from rexnet_lit.training.callbacks.checkpoint import RunCheckpoint as RunCheckpoint
    from rexnet_lit.training.freezing import StrategySettings as StrategySettings
    from rexnet_lit.training.losses import LossSettings as LossSettings
    from rexnet_lit.training.module import RexNetModule as RexNetModule
    from rexnet_lit.training.optim import OptimizerSettings as OptimizerSettings
    from rexnet_lit.training.schedules import ScheduleSettings as ScheduleSettings
    from rexnet_lit.training.schedules import auto_epochs as auto_epochs

__all__ = [
    "AugmentSettings", "Classifier", "EvalRecipe", "EvalTransform", "HeadSpec", "ImageFolderDataModule",
    "LossSettings", "OptimizerSettings", "RexNetModule", "RunCheckpoint", "ScheduleSettings", "StrategySettings",
    "TrainTransform", "UserError", "auto_epochs", "configure_allocator", "load", "save_model", "write_sample",
]  # fmt: skip
__version__ = "0.1.0"

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # importing albumentations would query the package index

# Imported on first use: torch and Lightning take seconds, and `python -m rexnet_lit --help` needs neither.
_LAZY = {
    "AugmentSettings": "data.augmentation",
    "Classifier": "models.predictor",
    "EvalRecipe": "data.settings",
    "EvalTransform": "data.transforms",
    "HeadSpec": "models.heads",
    "ImageFolderDataModule": "data.datamodule",
    "LossSettings": "training.losses",
    "OptimizerSettings": "training.optim",
    "RexNetModule": "training.module",
    "RunCheckpoint": "training.callbacks.checkpoint",
    "ScheduleSettings": "training.schedules",
    "StrategySettings": "training.freezing",
    "TrainTransform": "data.transforms",
    "auto_epochs": "training.schedules",
    "load": "models.predictor",
    "save_model": "models.checkpoint",
    "write_sample": "data.sample",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    except (ImportError, AttributeError) as error:
        message = opencv_message(error)
        if message is None:
            raise
        raise UserError(message) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})

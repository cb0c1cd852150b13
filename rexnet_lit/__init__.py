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
    from rexnet_lit.data.datamodule import ImageFolderDataModule as ImageFolderDataModule
    from rexnet_lit.models.predictor import Classifier as Classifier
    from rexnet_lit.models.predictor import load as load
    from rexnet_lit.training.module import RexNetModule as RexNetModule

__all__ = ["Classifier", "ImageFolderDataModule", "RexNetModule", "UserError", "configure_allocator", "load"]
__version__ = "0.1.0"

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # importing albumentations would query the package index

# Imported on first use: torch and Lightning take seconds, and `python -m rexnet_lit --help` needs neither.
_LAZY = {
    "Classifier": "models.predictor",
    "ImageFolderDataModule": "data.datamodule",
    "RexNetModule": "training.module",
    "load": "models.predictor",
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

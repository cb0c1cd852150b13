"""What tests of whole trainings in a notebook's manner share: small data, a small model, a quiet trainer."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm.models.rexnet
import torch

from rexnet_lit.data.datamodule import ImageFolderDataModule
from rexnet_lit.training.callbacks import pictures
from rexnet_lit.training.module import RexNetModule

NAMES = ("circle", "cross", "square")


def make_runs_quick(patch: pytest.MonkeyPatch) -> None:
    """Build every ReXNet with 7 narrow blocks in place of 16, and draw no pictures of its validations.

    A run takes a third of the time. For tests of what surrounds the network.
    """
    create = functools.partial(timm.models.rexnet._create_rexnet, depth_mult=0.3, initial_chs=8, final_chs=40)
    patch.setattr(timm.models.rexnet, "_create_rexnet", create)
    patch.setattr(pictures, "MAX_IMAGES", 0)


def data_of(root: Path, **settings: Any) -> ImageFolderDataModule:
    return ImageFolderDataModule(str(root), **{"image_size": 32, "batch_size": 8, "num_workers": 0, **settings})


def model_of(kind: type[RexNetModule] = RexNetModule, **settings: Any) -> RexNetModule:
    """A model whose random weights are always the same."""
    torch.manual_seed(0)
    return kind(**{"pretrained": False, "class_names": NAMES, "image_size": 32, **settings})


def trainer_of(folder: Path, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            "max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder,
            "num_sanity_val_steps": 0, "use_distributed_sampler": False,
            **settings,
        }
    )  # fmt: skip


def state_of(module: RexNetModule) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in module.network.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

"""Which callbacks a fit gets."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from module_tools import model_of

from rexnet_lit.training.callbacks.checkpoint import RunCheckpoint

BATCHES = [(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]))]


class Fit(pl.callbacks.Callback):
    """Keeps the callbacks that save checkpoints."""

    def on_fit_start(self, trainer, pl_module):
        self.found = trainer.checkpoint_callbacks
        raise KeyboardInterrupt


def checkpoints_of(trainer):
    seen = Fit()
    trainer.callbacks.append(seen)
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        trainer.fit(model_of(), BATCHES, BATCHES)
    return seen.found


QUIET = {
    "max_epochs": 1,
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def test_lightnings_default_checkpoints_are_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [type(c) for c in checkpoints_of(pl.Trainer(**QUIET))] == [RunCheckpoint]


def test_also_those_of_another_thread_or_process(tmp_path, monkeypatch):
    """Their file system differs from one that is made here, as it does in the processes of `ddp_notebook`."""
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(1) as other:
        trainer = other.submit(pl.Trainer, **QUIET).result()
    assert trainer.checkpoint_callback._fs != ModelCheckpoint()._fs
    assert [type(c) for c in checkpoints_of(trainer)] == [RunCheckpoint]


def test_checkpoints_that_the_user_has_set_up_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = ModelCheckpoint(save_top_k=3, monitor="val/loss")
    found = checkpoints_of(pl.Trainer(**QUIET, callbacks=[own]))
    assert own in found
    assert [type(c) for c in found if c is not own] == [RunCheckpoint]

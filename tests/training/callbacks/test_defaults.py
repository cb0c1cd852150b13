"""Which callbacks a fit gets."""

from __future__ import annotations

import contextlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from module_tools import data_of, make_runs_quick, model_of, trainer_of

from rexnet_lit.training.callbacks.checkpoint import RunCheckpoint
from rexnet_lit.training.callbacks.run_files import find_run_folder
from rexnet_lit.utils.errors import UserError

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


def test_what_runs_in_python_leave_out(shapes, tmp_path, monkeypatch, capsys):
    make_runs_quick(monkeypatch)
    (tmp_path / "new").mkdir()
    shutil.copy(next(shapes.glob("test/*/*.png")), tmp_path / "new")
    (tmp_path / "new/broken.png").write_bytes(b"\x89PNG")
    images = str(tmp_path / "new")
    data = data_of(shapes, strangers=images, predict_path=images, predict_output="mine.csv")
    module = model_of()
    trainer = trainer_of(tmp_path, max_epochs=1, enable_checkpointing=True)
    trainer.fit(module, data)
    shipped = find_run_folder(trainer) / "model.safetensors"
    capsys.readouterr()
    trainer.test(module, data, verbose=False)
    notes = capsys.readouterr().out
    assert f"note: data.strangers has no effect here; use: rexnet-lit test {shipped}" in notes
    assert "this tests" not in notes  # they are what ships

    with torch.no_grad():
        module.network.get_classifier().bias.add_(1)
    trainer.test(module, data, verbose=False)
    notes = capsys.readouterr().out
    assert f"note: this tests the weights at the end of training; those that ship are in {shipped}" in notes

    trainer_of(tmp_path).predict(module, data)
    notes = capsys.readouterr().out
    assert "note: data.predict_output has no effect here; use: rexnet-lit predict MODEL" in notes
    assert "note: 1 image has no row, being unreadable; the rows' paths: " in notes


def test_a_run_without_checkpoints_records_that_nothing_ships(shapes, tmp_path, monkeypatch):
    make_runs_quick(monkeypatch)
    trainer = trainer_of(tmp_path, max_epochs=1, logger=pl.loggers.CSVLogger(tmp_path))
    trainer.fit(model_of(), data_of(shapes))
    record = json.loads((find_run_folder(trainer) / "result.json").read_text())
    assert (record["weights"], record["why"]) == ("none", "the trainer saves no checkpoints")


def test_gradient_accumulation_scheduler_is_refused(tmp_path):
    scheduler = pl.callbacks.GradientAccumulationScheduler({0: 2})
    with pytest.raises(UserError, match=r"GradientAccumulationScheduler is not supported.*accumulate_grad_batches"):
        trainer_of(tmp_path, callbacks=[scheduler]).fit(model_of(), BATCHES, BATCHES)

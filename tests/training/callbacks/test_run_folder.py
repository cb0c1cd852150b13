"""Where a run's files are: beside its checkpoints, whichever logger is used, and never over other files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from cli_tools import write_dataset
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from module_tools import data_of, model_of, trainer_of

from rexnet_lit.cli import main
from rexnet_lit.models import checkpoint
from rexnet_lit.training.callbacks import pictures
from rexnet_lit.training.callbacks.run_folder import find_last_checkpoint, run_folder_of

pytestmark = pytest.mark.usefixtures("quick_runs")

FIT = [
    *("fit", "data", "--config", "quickstart", "--trainer.max_epochs", "1", "--data.num_workers", "0"),
    *("--trainer.accelerator", "cpu", "--trainer.limit_train_batches", "2", "--model.calibrate", "false"),
]
OWN = ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "logs", "--trainer.logger.name", "mine"]
FILES = {"config.yaml", "split.csv", "metrics.csv", "result.json", "model.safetensors", "checkpoints"}


@pytest.fixture
def pooled(tmp_path, monkeypatch):
    """Class folders that must be split, and a user's own split.csv in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "all", pool=10)
    (tmp_path / "all" / "pool").rename(tmp_path / "data")
    Path("split.csv").write_text("mine")


@pytest.mark.parametrize("version", [(), ("--trainer.logger.version", "first")], ids=["counted", "named"])
def test_a_logger_of_the_users(version, pooled, capsys):
    """The second run gets its own folder; `last` and `test` find theirs."""
    for _ in range(2):
        assert main.main([*FIT, *OWN, *version]) == 0, capsys.readouterr()
    folders = sorted(file.parent for file in Path("logs/mine").rglob("result.json"))
    assert [folder.name for folder in folders] == (["first", "first-1"] if version else ["version_0", "version_1"])
    for folder in folders:
        assert {file.name for file in folder.iterdir()} >= FILES
    assert Path("split.csv").read_text() == "mine"
    assert not Path("lightning_logs").exists()
    last, _ = find_last_checkpoint([Path()])
    assert last == folders[-1] / "checkpoints" / "last.ckpt"
    assert main.main([*FIT, *OWN, *version, "--trainer.max_epochs", "2", "--ckpt_path", "last"]) == 0
    assert json.loads((folders[-1] / "result.json").read_text())["epochs"] == 2
    assert main.main(["validate", str(folders[0] / "checkpoints" / "best.ckpt"), "--report"]) == 0
    metrics = json.loads((folders[0] / "report" / "metrics.json").read_text())
    assert metrics["split"] == "val"
    with (folders[0] / "split.csv").open(newline="") as file:
        validated = [row for row in csv.DictReader(file) if row["split"] == "val"]
    assert metrics["count"] == len(validated)


class Remote(Logger):
    """Sends what it gets elsewhere, as loggers of W&B and MLflow do: it makes no folder."""

    name, version = "mine", "first"

    def log_metrics(self, metrics, step=None):
        """Do nothing."""

    def log_hyperparams(self, params):
        """Do nothing."""


def test_a_logger_that_makes_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data", train=8, val=4)
    for _ in range(2):
        assert main.main([*FIT, "--trainer.logger", f"{__name__}.Remote"]) == 0, capsys.readouterr()
    for folder in (Path("mine/first"), Path("mine/first-1")):
        assert {file.name for file in folder.iterdir()} == FILES - {"split.csv"}


def test_a_checkpoint_whose_name_makes_a_folder_knows_its_run(pooled, capsys):
    own = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename", "{epoch}-{val/top1:.2f}"]
    assert main.main([*FIT, *own]) == 0
    run = Path("lightning_logs/version_0")
    (file,) = (run / "checkpoints").glob("epoch=0-*/*.ckpt")
    assert run_folder_of(file) == run.absolute()
    capsys.readouterr()
    assert main.main(["validate", str(file)]) == 0
    assert "warning" not in capsys.readouterr().out  # the same split


def test_without_a_logger_nothing_of_the_users_is_overwritten(pooled):
    for _ in range(2):
        trainer = trainer_of(Path(), max_epochs=1, enable_checkpointing=True)
        trainer.fit(model_of(class_names=("bars", "disc", "ring")), data_of(Path("data")))
    assert Path("split.csv").read_text() == "mine"
    assert sorted(file.parent.name for file in Path().rglob("result.json")) == ["version_0", "version_1"]


def test_a_trainer_that_saves_and_logs_nothing_writes_nothing(pooled):
    before = set(Path().iterdir())
    trainer_of(Path(), max_epochs=1).fit(model_of(class_names=("bars", "disc", "ring")), data_of(Path("data")))
    assert set(Path().iterdir()) == before


def test_a_csv_logger_keeps_its_metrics(tmp_path, shapes):
    trainer = trainer_of(tmp_path, max_epochs=1, enable_checkpointing=True, logger=CSVLogger(tmp_path))
    trainer.fit(model_of(), data_of(shapes))
    (table,) = tmp_path.rglob("metrics.csv")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert "train/loss_step" in rows[0] or "val/loss" in rows[0]
    assert any(row.get("shipped/top1") for row in rows)


def test_lightnings_default_checkpoint_is_replaced_and_the_users_own_stays(tmp_path, shapes):
    from lightning.pytorch.callbacks import ModelCheckpoint

    trainer = trainer_of(tmp_path / "default", max_epochs=1, enable_checkpointing=True)
    trainer.fit(model_of(), data_of(shapes))
    assert [type(c).__name__ for c in trainer.checkpoint_callbacks] == ["RunCheckpoint"]
    mine = ModelCheckpoint(monitor="val/loss", dirpath=tmp_path / "mine")
    trainer = trainer_of(tmp_path / "own", max_epochs=1, enable_checkpointing=True, callbacks=[mine])
    trainer.fit(model_of(), data_of(shapes))
    assert mine in trainer.checkpoint_callbacks
    assert Path(mine.best_model_path).is_file()
    assert checkpoint.load_model(next((tmp_path / "own").rglob("best.ckpt"))).spec.class_names


def test_what_tensorboard_shows(tmp_path, shapes, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(pictures, "MAX_IMAGES", 12)
    trainer = trainer_of(
        tmp_path, max_epochs=4, enable_checkpointing=True, logger=TensorBoardLogger(tmp_path), log_every_n_steps=1
    )
    trainer.fit(model_of(), data_of(shapes))
    folder = Path(trainer.checkpoint_callback.best_model_path).parents[1]
    board = EventAccumulator(str(folder)).Reload()
    tags = board.Tags()
    assert {"augmented samples", "confusion matrix", "worst mistakes"} == set(tags["images"])
    assert len(board.Images("confusion matrix")) == 2  # the first and the last: there is no time for more
    assert "_hparams_/session_start_info" in tags["tensors"] or board.PluginTagToContent("hparams")
    assert [name for name in tags["scalars"] if name.startswith("lr")] == ["lr"]
    result = json.loads((folder / "result.json").read_text())
    for name in ("loss", "top1", "macro_f1", "ece"):
        assert board.Scalars(f"shipped/{name}")[-1].value == pytest.approx(result["metrics"][f"val/{name}"], rel=1e-6)
    with (folder / "metrics.csv").open(newline="") as file:
        shipped = list(csv.DictReader(file))[-1]
    assert {name: float(shipped[name]) for name in result["metrics"]} == result["metrics"]

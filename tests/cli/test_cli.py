"""The command line: errors in one line, the small commands, and fit, validate, test, predict from end to end."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import typing
import urllib.request
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from cli_tools import NAMES, fails, lively_model, picture, rows_of, run_rexnet, write_dataset, write_pictures
from lightning.pytorch.utilities.exceptions import SIGTERMException
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rexnet_lit.cli import main, previous_run, several_runs
from rexnet_lit.cli.commands import COMMANDS
from rexnet_lit.data.settings import DataRecord
from rexnet_lit.export import export
from rexnet_lit.models import checkpoint
from rexnet_lit.models.predictor import Classifier, load
from rexnet_lit.training.module import RexNetModule
from rexnet_lit.utils import process

CONFIGS = Path(__file__).parents[2] / "configs"
quick = pytest.mark.usefixtures("quick_runs")
QUICK = ("fit", "--config", CONFIGS / "quickstart.yaml", "--trainer.default_root_dir", "runs")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three classes, read-only."""
    return write_dataset(tmp_path_factory.mktemp("images") / "data", train=4, val=2, test=2)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Work in an empty folder, where unexpected files show."""
    monkeypatch.chdir(tmp_path)


# Errors of the user


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--model.backbone", "rexnet_101"), "model.backbone"),
        (("--model.backbone", "resnet50"), "did you mean 'rexnet"),
        (("--data.batchsize", "8"), "--data.batchsize 8; did you mean 'data.batch_size'"),
        (("--model.optimzer.lr", "1"), "did you mean 'model.optimizer.lr'"),
        (("--config", "unknown.yaml"), "trainer.max_epoch'; did you mean 'trainer.max_epochs'"),
        (("--config", "broken.yaml"), "line 2"),
        (("--config", "none.yaml"), "none.yaml"),
        (("--data.batch_size", "many"), "data.batch_size"),
        (("--data.image_size", "big"), "data.image_size: "),
        (("--trainer.precision", "fp8"), "trainer.precision: "),
        (("--trainer.logger", "bogus"), "trainer.logger: "),
        (("--data.augment", "lihgt"), "data.augment.name"),
        (("--model.head", "conv"), "model.head.name"),
        (("--model.head.dropout", "2"), "model.head.dropout is 2.0"),
        (("--trainer.accelerator", "warp"), "accelerator='warp'"),
        (("--model.optimizer.name", "adamx"), "did you mean 'adamax'"),
        (("--model.weights", "gone.safetensors"), "model.weights"),
        (("--model.weights", "https://example.com/w.safetensors"), "model.weights"),
        (("--ckpt_path", "gone.ckpt"), "ckpt_path: "),
        (("--ckpt_path", "last"), "ckpt_path"),
        (("--ckpt_path", "https://example.com/m.ckpt"), "ckpt_path"),
        (("--data.image_size", "16"), "data.image_size is 16"),
        (("--data.image_size", "100000"), "data.image_size is 100000"),
        (("--data.val_fraction", "2"), "data.val_fraction is 2.0"),
        (("--data.num_workers", "-1"), "data.num_workers is -1"),
        (("--data.size_schedule", "[[0, 64], [3, 100000]]"), "data.size_schedule"),
        (("--model.drop_path_rate", "1"), "model.drop_path_rate is 1.0"),
        (("--seed_everything", "-1"), "seed_everything is -1"),
        (("--trainer.accumulate_grad_batches", "0"), "trainer.accumulate_grad_batches is 0"),
        (("--trainer.gradient_clip_val", "-1"), "trainer.gradient_clip_val is -1"),
        (("--trainer.gradient_clip_val", ".nan"), "trainer.gradient_clip_val is nan"),
        (("--trainer.logger", "CVSLogger"), "did you mean 'CSVLogger'"),
        (("--trainer.gradient_clip_val", "big"), "trainer.gradient_clip_val: "),
        (("--trainer.val_check_interval", "0"), "trainer.val_check_interval is 0"),
        (("--trainer.check_val_every_n_epoch", "0"), "trainer.check_val_every_n_epoch is 0"),
        (("--trainer.barebones", "true"), "trainer.barebones"),
        (("--model.image_size", "64"), "model.image_size"),
        (("--trainer.overfit_batches", "1"), "trainer.overfit_batches"),
        (("--trainer.default_root_dir", "s3://b/c"), "trainer.default_root_dir is 's3://b/c'"),
        (("--trainer.default_root_dir", "/proc/foo"), "No such file or directory: '/proc/foo"),
        (("--trainer.accelerator", "tpu"), "trainer: "),
        (("--trainer.max_epochs", "0"), "max_epochs, max_steps or limit_train_batches is 0"),
        (("--config", "s3://bucket/c.yaml"), "s3://bucket/c.yaml"),
        (("--config", "deep.yaml"), "deep.yaml: "),
        (("--config", "deep_text.yaml"), "deep_text.yaml: data.augment.transforms: "),
        (("--data.augment.transforms", "[" * 30_000), "data.augment.transforms: "),
        (("--config", "bomb.yaml"), "bomb.yaml: "),  # S6
        (("--config", "twice.yaml"), "twice.yaml: the key 'data'"),
        (("--config", "list.yaml"), "list.yaml: data "),
    ],
    ids=lambda value: "=".join(map(str, value))[:60] if isinstance(value, tuple) else "",
)
def test_a_wrong_setting(images, capsys, arguments, expected):
    Path("unknown.yaml").write_text("trainer:\n  max_epoch: 3\n")
    Path("broken.yaml").write_text("model: [\n")
    Path("deep.yaml").write_text(f"data: {'[' * 100_000}\n")
    Path("deep_text.yaml").write_text(f"data: {{augment: {{transforms: '{'[' * 30_000}'}}}}\n")
    rows = [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in itertools.pairwise("abcdefghi")]
    Path("bomb.yaml").write_text("\n".join(["a: &a [lol]", *rows]))
    Path("twice.yaml").write_text("data:\n  batch_size: 4\ntrainer:\n  max_epochs: 1\ndata:\n  batch_size: 8\n")
    Path("list.yaml").write_text("data: [1]\n")
    line = fails(capsys, *QUICK, "--data.root", images, *arguments)
    assert expected in line
    assert "rexnet" not in arguments[0] or "<class" not in line
    assert not Path("runs").exists()  # no run has started


def test_all_errors_are_reported_at_once(images, capsys):
    Path("wrong.yaml").write_text(
        "trainer: {max_epoch: 3}\ndata: {batch_size: lots}\nmodel: {head: {nam: mlp}, loss: {gamma: x}}\n"
    )
    arguments = ("--config", "wrong.yaml", "--data.cache=tape", "--model.optimzer.lr", "1")
    line = fails(capsys, *QUICK, "--data.root", images, *arguments)
    for words in (
        "wrong.yaml: data.batch_size: ",
        "'trainer.max_epoch'; did you mean 'trainer.max_epochs'",
        "'model.head.nam'; did you mean 'model.head.name'",
        "wrong.yaml: model.loss.gamma: ",
        "; data.cache: ",
        "--model.optimzer.lr 1; did you mean 'model.optimizer.lr'",
    ):
        assert words in line
    values = ("--data.augment.min_scale", 3, "--model.head.dropout", 2, "--model.schedule.rise", 5)
    line = fails(capsys, *QUICK, "--data.root", images, *values, "--data.batch_size", 1)
    for key in ("data.augment.min_scale is 3", "model.head.dropout is 2", "model.schedule.rise"):
        assert key in line


def test_a_setting_that_does_not_suit_the_data(images, capsys):
    arguments = ("--data.root", images, "--data.num_workers", 0, "--trainer.val_check_interval", 700)
    assert fails(capsys, *QUICK, *arguments).startswith("trainer: `val_check_interval` (700) must be less")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: {max_bad_fraction: .nan}", "data.max_bad_fraction is nan"),
        ("data: {cache_gb: .nan}", "data.cache_gb is nan"),
        ("data: {augment: {mixup: .inf}}", "data.augment.mixup is inf"),
        ("model: {head: {temperature: .nan}}", "model.head.temperature is nan"),
        ("model: {schedule: {warmup_epochs: .nan}}", "model.schedule.warmup_epochs is nan"),
        ("model: {schedule: {step_epochs: .inf}}", "model.schedule.step_epochs is inf"),
        ("# data: {batch_size: 4}", "mine.yaml: "),
        ("- data", "mine.yaml: "),
    ],
)
def test_a_wrong_config(images, capsys, text, expected):
    Path("mine.yaml").write_text(text)
    assert expected in fails(capsys, *QUICK, "--config", "mine.yaml", "--data.root", images)


def test_wrong_folders(tmp_path, capsys):
    assert "data.root is not set" in fails(capsys, *QUICK)
    assert "'gone': no such folder" in fails(capsys, *QUICK, "--data.root", "gone")
    root = write_dataset(tmp_path / "data", train=2, val=2)
    (root / "train" / "zebra").mkdir()
    (root / "train" / "yak").mkdir()
    line = fails(capsys, *QUICK, "--data.root", root)
    assert "without images" in line
    assert "'yak'" in line
    assert "'zebra'" in line
    (root / "train" / "zebra").rmdir()
    (root / "train" / "yak").rmdir()
    write_pictures(root / "val" / "zebra", "ring", 1)
    line = fails(capsys, *QUICK, "--data.root", root)
    assert "in val, but not in train: 'zebra'" in line


def test_no_network(images, capsys, monkeypatch, tmp_path):
    """Without a network and a cache, both remedies are in the message, and no random weights are used."""
    from huggingface_hub import constants

    def unreachable(*args, **kwargs):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    line = fails(capsys, *QUICK, "--data.root", images, "--model.pretrained", "true")
    for words in ("model.pretrained", "neither in the local cache", "model.weights", "model.pretrained to false"):
        assert words in line
    assert not Path("runs").exists()
    line = fails(capsys, *QUICK, "--data.root", images, "--model.backbone", "rexnetr_100", "--model.pretrained=true")
    assert "rexnetr_100 has no published weights" in line


class Bomb:
    """Unpickled, it makes a file."""

    def __reduce__(self):
        return (os.mkdir, ("exploded",))


@pytest.mark.parametrize(
    ("option", "address"),
    [
        *((option, "http://127.0.0.1:1/x.yaml") for option in ("-c", "--config", "--data", "--model", "--trainer")),
        ("--trainer.callbacks", "http://127.0.0.1:1/x.yaml"),
        ("--config", "memory://x.yaml"),
    ],
)
def test_urls_are_refused_as_configs(option, address, capsys, monkeypatch):
    def no_request(*args, **kwargs):
        raise AssertionError("a request was made")

    monkeypatch.setattr(socket, "getaddrinfo", no_request)
    monkeypatch.setattr(socket.socket, "connect", no_request)
    assert address in fails(capsys, "fit", option, address, "--data.root", "gone")


@pytest.mark.parametrize("command", ["validate", "test", "predict", "export"])
def test_wrong_model_files(command, capsys, monkeypatch):
    def no_request(*args, **kwargs):
        raise AssertionError("a request was made")

    monkeypatch.setattr(socket, "getaddrinfo", no_request)
    monkeypatch.setattr(socket, "create_connection", no_request)
    torch.save({"state_dict": {}, "bomb": Bomb()}, "zip.ckpt")
    Path("plain.ckpt").write_bytes(pickle.dumps(Bomb(), protocol=2))
    Path("newer.ckpt").write_bytes(pickle.dumps(Bomb(), protocol=4))
    Path("text.ckpt").write_text("hello: world\n" * 9)
    Path("empty.ckpt").touch()
    Path("empty.safetensors").touch()
    torch.save({"state_dict": {}}, "foreign.ckpt")
    cases = {
        "gone.ckpt": "there is no file 'gone.ckpt'",
        "https://example.com/model.ckpt": "local files only",
        "zip.ckpt": "zip.ckpt: refused",
        "plain.ckpt": "plain.ckpt: ",
        "newer.ckpt": "newer.ckpt: ",
        "text.ckpt": "text.ckpt: ",
        "empty.ckpt": "empty.ckpt: damaged",
        "empty.safetensors": "empty.safetensors: damaged",
        "foreign.ckpt": "not a checkpoint of rexnet_lit",
    }
    for model, expected in cases.items() if command in ("test", "export") else [("zip.ckpt", "zip.ckpt: refused")]:
        if command == "export":
            line = fails(capsys, command, model, "--format", "safetensors", "--output", "out.safetensors")
        else:
            line = fails(capsys, command, "--ckpt_path", model)
        assert expected in line
    assert not Path("exploded").exists()
    if command != "export":
        assert "needs a model (--ckpt_path)" in fails(capsys, command)


def test_the_crop_mode_of_the_model_file_is_used(tmp_path, capsys):
    """And that of the settings, if they name one, as with the image size."""
    model = lively_model(tmp_path / "model.safetensors", size=32, crop_mode="squash")
    wide = tmp_path / "wide.png"
    Image.fromarray(np.hstack([picture(name, 1, 48) for name in NAMES])).save(wide)
    argv = ["predict", str(model), str(wide), "--data.num_workers", "0", "--data.predict_output"]
    assert main.main([*argv, "own.csv"]) == 0
    assert main.main([*argv, "other.csv", "--data.crop_mode", "center", "--trainer.accelerator", "cpu"]) == 0
    capsys.readouterr()
    squash = load(model, device="cpu")
    pillow = np.asarray(Image.open(wide).resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(squash.view(wide) - pillow).max() <= 2
    recipe = squash.spec.eval_recipe.with_crop_mode("center")
    centre = Classifier(dataclasses.replace(squash.spec, eval_recipe=recipe), squash.network, "cpu")
    for classifier, file in ((squash, "own.csv"), (centre, "other.csv")):
        assert float(rows_of(file)[0]["prob_1"]) == pytest.approx(classifier.predict(wide)[0][0].prob, abs=1e-5)
    assert squash.predict(wide)[0][0].prob != pytest.approx(centre.predict(wide)[0][0].prob, abs=1e-3)
    assert "data.crop_mode: expected" in fails(capsys, *argv, "no.csv", "--data.crop_mode", "pad")


def test_a_wrong_command(capsys):
    assert "'tset'; did you mean 'test'" in fails(capsys, "tset")
    assert "required: DIR" in fails(capsys, "check")
    assert "unrecognized arguments: --jsn" in fails(capsys, "check", ".", "--jsn")
    assert "required: COMMAND" in fails(capsys)


@quick
def test_predict_names_the_missing_setting(tmp_path, capsys):
    model = lively_model(tmp_path / "model.safetensors", size=32)
    assert "data.predict_path is not set" in fails(capsys, "predict", "--ckpt_path", model)
    line = fails(capsys, "predict", "--ckpt_path", model, "--data.predict_path", "gone")
    assert "gone" in line
    assert "data.root" in fails(capsys, "test", "--ckpt_path", model)


@quick
def test_predict_overwrites_nothing_of_value(tmp_path, capsys):
    model = lively_model(tmp_path / "model.safetensors", size=32)
    before = model.read_bytes()
    write_pictures(tmp_path / "flat", "disc", 1)
    (tmp_path / "flat" / "broken.png").touch()
    argv = ["predict", "--ckpt_path", model, "--data.num_workers", 0, "--data.predict_path", tmp_path / "flat"]
    line = fails(capsys, *argv[:-1], tmp_path / "flat" / "broken.png")
    assert line == f"{tmp_path / 'flat' / 'broken.png'}: cannot be read as an image (empty file); repair or replace it"
    line = fails(capsys, *argv, "--data.predict_output", model)
    assert "model.safetensors' exists and is no .csv file" in line
    (tmp_path / "mine.csv").write_text("path,label\na.jpg,disc\n")
    assert "is no earlier output" in fails(capsys, *argv, "--data.predict_output", tmp_path / "mine.csv")
    assert "data.predict_output" in fails(capsys, *argv, "--data.predict_output", "quarantine.csv")
    assert model.read_bytes() == before
    (tmp_path / "quarantine.csv").write_text("mine")
    assert main.main([*map(str, argv), "--data.predict_output", str(tmp_path / "p.csv")]) == 0
    assert "all are listed in" in capsys.readouterr().out
    assert main.main([*map(str, argv), "--data.predict_output", str(tmp_path / "p.csv")]) == 0  # its own output
    (tmp_path / "quarantine-2.csv").unlink()
    capsys.readouterr()
    assert (tmp_path / "quarantine.csv").read_text() == "mine"
    assert [row["path"] for row in rows_of(tmp_path / "quarantine-1.csv")] == ["broken.png"]


@quick
@pytest.mark.parametrize("known", [int | float | None, float | int | None])
def test_limited_batches(tmp_path, capsys, monkeypatch, known):
    """Only the batches within the limit are written and counted.

    1 is one batch and 1.0 all, whichever order of the union `typing` has cached.
    """
    for clear in typing._cleanups:
        clear()
    for name in ("train", "val", "test", "predict"):
        monkeypatch.setitem(pl.Trainer.__init__.__annotations__, f"limit_{name}_batches", known)
    model = lively_model(tmp_path / "model.safetensors", size=32)
    write_dataset(tmp_path / "data", test=3, train=2, val=2)
    limits = ("--data.batch_size", 4, "--trainer.limit_test_batches", 1, "--trainer.limit_predict_batches", 1)
    argv = ["--ckpt_path", model, "--data.num_workers", 0, *limits]
    assert main.main([*map(str, ["test", *argv, "--data.root", tmp_path / "data"])]) == 0
    assert "Test: 4 images" in capsys.readouterr().out
    report = Path("lightning_logs/version_0/report")
    assert json.loads((report / "metrics.json").read_text())["count"] == 4
    assert "4 of 9" in (report / "report.html").read_text()
    argv += ["--data.predict_path", tmp_path / "data" / "test"]
    assert main.main([*map(str, ["predict", *argv])]) == 0
    rows = rows_of("predictions.csv")
    assert [f"test/{row['path']}" for row in rows] == [row["path"] for row in rows_of(report / "predictions.csv")]
    assert len(rows) == 4
    line = fails(capsys, "predict", *argv, "--trainer.limit_predict_batches", 0)
    assert line.startswith("trainer.limit_predict_batches is 0")


def test_debug_shows_the_traceback(capsys, monkeypatch):
    command = ["export", "gone.ckpt", "--format", "onnx", "--output", "x.onnx"]
    for options, variable in ((["--debug"], "0"), ([], "1")):
        monkeypatch.setenv("REXNET_LIT_DEBUG", variable)
        assert main.main([*command, *options]) == 2
        screen = capsys.readouterr().err
        assert screen.startswith("Traceback (most recent call last)")
        assert "no file" in screen.splitlines()[-1]


def test_bugs_keep_their_traceback(monkeypatch):
    def broken(argv):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(main, "_dispatch", broken)
    with pytest.raises(ZeroDivisionError):
        main.main(["models"])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (SIGTERMException(), 143),
        (PermissionError(13, "Permission denied", "runs"), 2),
        (OSError(28, "No space left on device"), 2),
    ],
)
def test_exit_codes(error, code, monkeypatch, capsys):
    def ends(argv):
        raise error

    monkeypatch.setattr(main, "_dispatch", ends)
    assert main.main(["models"]) == code
    assert len(capsys.readouterr().err.splitlines()) == (code == 2)


# The small commands


def test_check(images, tmp_path, capsys):
    assert main.main(["check", str(images), "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)
    assert main.main(["check", str(images)]) == 0
    capsys.readouterr()
    root = write_dataset(tmp_path / "data", train=2, val=2)
    (root / "train" / "zebra").mkdir()
    assert main.main(["check", str(root), "--json"]) == 1
    assert "zebra" in json.dumps(json.loads(capsys.readouterr().out))
    assert main.main(["check", str(root)]) == 1
    assert "zebra" in capsys.readouterr().out
    assert "no folder 'gone'" in fails(capsys, "check", "gone")
    Path("model.ckpt").write_text("precious")
    assert "is no .html or .htm file" in fails(capsys, "check", root, "--report", "model.ckpt")
    assert Path("model.ckpt").read_text() == "precious"


def test_models_lists_the_ten(capsys):
    assert main.main(["models"]) == 0
    out = capsys.readouterr().out
    names = re.findall(r"^\s*(rexnetr?_\d+)\s", out, re.MULTILINE)
    assert len(names) == len(set(names)) == 10
    # timm's table of results.
    assert re.search(r"rexnet_100 +4,796,873 .* 1280 +nav_in1k +77\.862", out)


def test_sample(capsys):
    assert main.main(["sample", "digits"]) == 0
    out = capsys.readouterr().out
    assert "10 classes" in out
    counts = {split: len(list(Path("digits", split).rglob("*.png"))) for split in ("train", "val", "test")}
    assert sum(counts.values()) == 1797
    assert all(f"{n} {split}" in out for split, n in counts.items())
    assert sorted(f.name for f in Path("digits/val").iterdir()) == list("0123456789")
    assert [f.name for f in Path().iterdir()] == ["digits"]
    assert "not empty" in fails(capsys, "sample", "digits")
    Path("empty").mkdir()
    assert main.main(["sample", "empty"]) == 0


def test_help_and_version(capsys):
    assert main.main(["--help"]) == 0
    out = capsys.readouterr().out
    for command in COMMANDS:
        assert re.search(rf"^ +{command}\b", out, re.MULTILINE)
    assert main.main(["--version"]) == 0
    assert "rexnet_lit " in capsys.readouterr().out


# Runs


def files_of(folder):
    return {str(f.relative_to(folder)) for f in Path(folder).rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A fit of two epochs in a process of its own: its folder, which holds only the data and what the run wrote."""
    base = tmp_path_factory.mktemp("fitted")
    write_dataset(base / "data", train=8, val=4, test=4)
    before = files_of(base)
    out, err = run_rexnet(
        *QUICK[:3],
        *("--data.root", "data", "--data.num_workers", 2, "--data.batch_size", 8),
        *("--trainer.max_epochs", 2, "--trainer.default_root_dir", "runs"),
        cwd=base,
    )
    return base, out, err, files_of(base) - before


def test_fit_writes_the_contracts_files_and_nothing_else(fitted):
    base, out, err, written = fitted
    assert err == ""
    assert "24 train, 12 val, 12 test" in out
    assert len(re.findall(r"^epoch \d/2 ", out, re.MULTILINE)) == 2
    assert "Fit finished" in out
    assert re.search(r"^  next +python -m rexnet_lit test --ckpt_path \S+model\.safetensors$", out, re.MULTILINE)

    folder = "runs/lightning_logs/version_0"
    written = {f for f in written if not f.startswith("cache/")}  # the user's cache: which files were readable
    events = {f for f in written if "events.out.tfevents" in f}
    assert len(events) == 1
    assert written - events - {f"{folder}/hparams.yaml"} == {
        f"{folder}/{name}"
        for name in (
            "config.yaml",
            "metrics.csv",
            "result.json",
            "model.safetensors",
            "checkpoints/best.ckpt",
            "checkpoints/last.ckpt",
            "checkpoints/last.previous.ckpt",
        )
    }
    config = yaml.safe_load((base / folder / "config.yaml").read_text())
    assert config["trainer"]["max_epochs"] == 2  # the command line beats the config
    assert config["data"]["image_size"] == 32
    board = EventAccumulator(str(base / folder)).Reload()
    assert board.Tags()["images"] == ["augmented samples", "confusion matrix", "worst mistakes"]
    epochs = rows_of(base / folder / "metrics.csv")
    assert {"train/loss", "val/loss", "val/top1", "val/macro_f1", "val/ece"} <= set(epochs[0])


def test_garbage_collection_is_paused_during_imports():
    frozen = gc.get_freeze_count()
    with process.gc_paused():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > frozen
    gc.unfreeze()


def test_test_predict_and_export_need_only_the_model(fitted, tmp_path, capsys, monkeypatch):
    """`test` in its own process and another folder; then predict and export in this process."""
    import rexnet_lit

    base, _, _, _ = fitted
    run = base / "runs" / "lightning_logs" / "version_0"
    model = run / "model.safetensors"
    before = files_of(base)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    out, err = run_rexnet("test", "--ckpt_path", model, "--data.num_workers", 2, cwd=elsewhere)
    assert err == ""
    assert "Test: 12 images" in out
    assert str(run / "report" / "report.html") in out
    assert {f for f in files_of(elsewhere) if not f.startswith("cache/")} == set()
    assert {Path(f).name for f in files_of(base) - before} == {
        *("metrics.json", "per_class.csv", "predictions.csv", "report.html", "weights.sha256"),
        *("confusion.png", "mistakes.png", "calibration.png", "risk_coverage.png", "history.png"),
    }
    own = checkpoint.digest(checkpoint.load_model(model).state)
    assert (run / "report" / "weights.sha256").read_text() == own + "\n"
    metrics = json.loads((run / "report" / "metrics.json").read_text())
    assert {"top1", "macro_f1", "nll", "ece", "count", "per_class", "split"} == set(metrics)  # top5 needs more classes
    assert metrics["count"] == 12
    assert set(metrics["per_class"]) == set(NAMES)
    classifier = rexnet_lit.load(model, device="cpu")
    rows = rows_of(run / "report" / "predictions.csv")
    assert len(rows) == 12
    shown = [classifier.predict(base / "data" / row["path"], top_k=1)[0][0] for row in rows]
    assert [float(row["prob_1"]) for row in rows] == pytest.approx([p.prob for p in shown], abs=1e-5)
    assert metrics["top1"] == pytest.approx(sum(r["target"] == r["label_1"] for r in rows) / 12)

    # Predict: a flat folder of unlabelled images, then one image.
    flat = tmp_path / "flat"
    for name in NAMES:
        write_pictures(flat, name, 2, start=500)
    (flat / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    monkeypatch.chdir(elsewhere)
    argv = ["predict", "--ckpt_path", str(model), "--data.num_workers", "0", "--data.predict_path"]
    assert main.main([*argv, str(flat), "--data.predict_output", "out/names.csv"]) == 0
    assert "out/names.csv" in capsys.readouterr().out
    rows = rows_of("out/names.csv")
    assert list(rows[0]) == ["path", "label_1", "prob_1", "label_2", "prob_2", "label_3", "prob_3"]
    assert [row["path"] for row in rows] == sorted(f.name for f in flat.iterdir() if f.name != "broken.png")
    assert [row["path"] for row in rows_of("out/quarantine.csv")] == ["broken.png"]
    for row in rows:
        best = classifier.predict(flat / row["path"])[0]
        assert [row[f"label_{k}"] for k in (1, 2, 3)] == [p.label for p in best]
        assert [float(row[f"prob_{k}"]) for k in (1, 2, 3)] == pytest.approx([p.prob for p in best], abs=1e-5)
    before = files_of(base)
    assert main.main([*argv, str(flat / "disc 500.png")]) == 0  # no output given: the current folder
    assert "predictions: predictions.csv" in capsys.readouterr().out
    assert files_of(base) == before
    assert {f for f in files_of(elsewhere) if not f.startswith("cache/")} == {
        "out/names.csv", "out/quarantine.csv", "predictions.csv",
    }  # fmt: skip

    # Export: the checkpoint's weights are the shared file's.
    assert (
        main.main(["export", str(run / "checkpoints/best.ckpt"), "--format=safetensors", "--output=m.safetensors"]) == 0
    )
    capsys.readouterr()
    images = sorted(flat.glob("disc*.png"))
    torch.testing.assert_close(rexnet_lit.load("m.safetensors", device="cpu").logits(images), classifier.logits(images))


def test_validate_equals_the_fits_best_epoch(fitted, capsys):
    base, _, _, _ = fitted
    run = base / "runs" / "lightning_logs" / "version_0"
    best = max(float(row["val/top1"]) for row in rows_of(run / "metrics.csv") if row["val/top1"])
    argv = ["validate", "--ckpt_path", str(run / "checkpoints" / "best.ckpt"), "--data.num_workers", "0"]
    assert main.main(argv) == 0
    out = capsys.readouterr().out
    assert "Validation: 12 images" in out
    assert f"{best:.4f}" in re.search(r"top1 +(\S+)", out).group(1)
    assert not Path("lightning_logs").exists()


@quick
def test_unreadable_images_are_reported_by_validate_and_test(tmp_path, capsys):
    root = write_dataset(tmp_path / "data", train=8, val=21, test=21)
    for split in ("val", "test"):
        (root / split / "disc" / "empty.png").write_bytes(b"")
    model = lively_model(tmp_path / "model.safetensors", size=32)
    argv = ["--ckpt_path", str(model), "--data.root", str(root), "--data.num_workers", "0"]
    said = "left out as unreadable: 1 image, first {}/disc/empty.png: empty file"
    assert main.main(["validate", *argv]) == 0
    assert said.format("val") in capsys.readouterr().out
    assert main.main(["test", *argv]) == 0
    out = capsys.readouterr().out
    assert said.format("test") in out
    listed = re.search(r"all are listed in (\S+)", out).group(1)
    assert rows_of(listed) == [{"path": "test/disc/empty.png", "reason": "empty file"}]


@quick
def test_a24_a29_duplicates_and_images_lost_in_a_run_are_reported(tmp_path, capsys, monkeypatch):
    root = write_dataset(tmp_path / "data", train=8, val=4)
    shutil.copy(next((root / "train" / "bars").iterdir()), root / "val" / "ring" / "copy.png")
    lost = sorted((root / "train" / "disc").iterdir())[3]
    monkeypatch.setattr(RexNetModule, "on_train_start", lambda self: lost.unlink())
    fit = [*QUICK, "--data.root", "data", "--data.batch_size", "8", "--trainer.max_epochs", "1"]
    with pytest.warns(UserWarning, match="can no longer be read"):
        assert main.main([*map(str, fit), "--data.num_workers", "0", "--data.cache", "none"]) == 0
    out = capsys.readouterr().out
    assert "1 image was lost during the run" in out
    for where in ("splits", "classes"):  # A24
        assert f"warning: 2 images with the same content in several {where}: " in out
    reason = "No such file or directory"
    name = f"train/disc/{lost.name}"
    assert rows_of("runs/lightning_logs/version_0/quarantine.csv") == [{"path": name, "reason": reason}]


@quick
def test_test_uses_the_split_of_the_run(tmp_path, capsys):
    """`test` uses the test rows of split.csv, also after images were added to the folder."""
    for name in NAMES:
        write_pictures(tmp_path / "data" / name, name, 12)
    fit = [*QUICK, "--data.root", "data", "--data.test_fraction", "0.25", "--data.batch_size", "8"]
    fit += ["--trainer.max_epochs", "1", "--data.num_workers", "0", "--trainer.limit_train_batches", "2"]
    assert main.main([str(a) for a in fit]) == 0
    run = Path("runs/lightning_logs/version_0")
    split = rows_of(run / "split.csv")
    drawn = {row["path"] for row in split if row["split"] == "test"}
    assert len(drawn) == 9
    assert len(split) == 36
    assert {name: [r["split"] for r in split].count(name) for name in ("train", "val", "test")} == {
        "train": 21,
        "val": 6,
        "test": 9,
    }
    for seed in range(40, 44):
        write_pictures(tmp_path / "data" / "bars", "bars", 1, start=seed)
    for model in ("model.safetensors", "checkpoints/best.ckpt"):
        assert main.main(["test", "--ckpt_path", str(run / model), "--data.num_workers", "0"]) == 0
        tested = {row["path"] for row in rows_of(run / "report" / "predictions.csv")}
        assert tested == drawn, model
    capsys.readouterr()


def _quick(root, *argv):
    """Fit for an epoch, in the current folder's ``runs``; return the exit code."""
    settings = ("--data.batch_size", 8, "--trainer.max_epochs", 1, "--data.num_workers", 0)
    return main.main([str(a) for a in (*QUICK, "--data.root", root, *settings, *argv)])


@quick
def test_fixes_of_a_run(tmp_path, capsys):
    """They change the labels of all splits, hold for `test` without their file, and for no other dataset."""
    root = write_dataset(tmp_path / "data", train=6, val=2, test=2)
    bars, disc, ring = (f"test/{name}/{name} 2000.png" for name in NAMES)
    train = "train/bars/bars 003.png"
    Path("fixes.csv").write_text(f"path,action,label\n{bars},relabel,disc\n{ring},remove,\n{train},relabel,ring\n")
    assert _quick("data", "--data.fixes", "fixes.csv") == 0
    assert "2 relabelled ('bars' to 'disc': 1, 'bars' to 'ring': 1), 1 removed, 0 kept" in capsys.readouterr().out
    run, gone = Path("runs/lightning_logs/version_0"), tmp_path / "fixes.csv"
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["fixes"] == str(gone)
    gone.unlink()
    root.rename(tmp_path / "moved")
    Path("more.csv").write_text(f"path,action\n{disc},remove\n{ring},remove\n")
    test = ["test", "--ckpt_path", str(run / "model.safetensors"), "--data.num_workers", "0"]
    assert main.main([*test, "--data.root", "moved", "--data.fixes", "more.csv"]) == 0
    targets = {row["path"]: row["target"] for row in rows_of(run / "report" / "predictions.csv")}
    assert (len(targets), targets[bars], {disc, ring} & {*targets}) == (4, "disc", set())
    capsys.readouterr()
    write_dataset(tmp_path / "other", val=2)
    assert main.main([*test, "--data.root", "other"]) == 2
    assert "fixes.csv, are not applied to other" in capsys.readouterr().out


def test_where_the_fixes_of_a_test_come_from(tmp_path):
    (tmp_path / "split.csv").write_text("path,label,split\n")
    record = DataRecord(root=str(tmp_path), fixes="/fixes.csv")
    data = {**dataclasses.asdict(record), "fixes": None}
    assert previous_run.recorded_splits(data, record, tmp_path)["fixes"] is None  # split.csv has the new labels
    assert previous_run.recorded_splits(data, record, None)["fixes"] == "/fixes.csv"
    changed = {**data, "val_fraction": 0.5}
    assert previous_run.recorded_splits(changed, record, tmp_path)["fixes"] == "/fixes.csv"
    assert "fixes" not in previous_run.recorded_splits({**data, "fixes": "mine.csv"}, record, tmp_path)
    assert "fixes" not in previous_run.recorded_splits({**data, "root": "elsewhere"}, record, None)


@quick
def test_a_moved_dataset_with_a_split_file(tmp_path, capsys):
    write_dataset(tmp_path, data=6)
    names = sorted(str(path.relative_to(tmp_path / "data")) for path in (tmp_path / "data").rglob("*.png"))
    rows = [f"{name},{'val' if i % 3 == 0 else 'train'}\n" for i, name in enumerate(names)]
    (tmp_path / "mine.csv").write_text("path,split\n" + "".join(rows))
    assert _quick("data", "--data.split_file", "mine.csv") == 0
    capsys.readouterr()
    (tmp_path / "data").rename(tmp_path / "moved")
    validate = ["validate", "--ckpt_path", "runs/lightning_logs/version_0/model.safetensors", "--data.num_workers", "0"]
    assert main.main([*validate, "--data.root", "moved"]) == 0
    assert "Validation: 6 images" in capsys.readouterr().out


@quick
def test_a_model_trained_on_a_table_of_labels(tmp_path, capsys):
    rows = []
    for name in NAMES:
        write_pictures(tmp_path / "data", name, 8)
        rows += [f"{name} {seed:03d},{name},{seed}" for seed in range(8)]
    (tmp_path / "train.csv").write_text("\n".join(["id,class,age", *rows]))
    assert main.main(["check", "data", "--data.labels=train.csv"]) == 0
    assert main.main(["check", "data", "--data.labels", "train.csv", "--strict"]) == 1  # eight images a class are few
    assert _quick("data", "--data.labels", "train.csv") == 0
    assert "ignored: 'age'" in capsys.readouterr().out
    run = tmp_path / "runs/lightning_logs/version_0"
    assert main.main(["fit", "--config", str(run / "config.yaml"), "--ckpt_path", "last"]) == 0
    assert "Nothing was left to train" in capsys.readouterr().out
    (tmp_path / "train.csv").unlink()  # the run's split.csv has the labels too
    (tmp_path / "data").rename(tmp_path / "moved")
    validate = ["validate", "--ckpt_path", str(run / "model.safetensors"), "--data.num_workers", "0"]
    assert main.main([*validate, "--data.root", "moved"]) == 0
    assert "Validation: 6 images" in capsys.readouterr().out
    # Other labels: of bars and discs only, and all for validation.
    few = [f"{row},val" for row in rows if "ring" not in row]
    (tmp_path / "few.csv").write_text("\n".join(["id,class,age,split", *few]))
    assert main.main([*validate, "--data.root", "moved", "--data.labels", "few.csv"]) == 0
    out = capsys.readouterr().out
    assert "Validation: 16 images" in out
    assert "1 of 3 classes have no images here, and no part in macro F1: 'ring'" in out


@quick
def test_validate_uses_max_bad_fraction_of_the_run(tmp_path, capsys):
    write_dataset(tmp_path / "data", train=4, val=4)
    for path in sorted((tmp_path / "data" / "val").rglob("*.png"))[:2]:
        path.write_bytes(b"broken")
    assert _quick("data") == 2
    assert _quick("data", "--data.max_bad_fraction", 0.5) == 0
    validate = ["validate", "--ckpt_path", "runs/lightning_logs/version_0/model.safetensors", "--data.num_workers", "0"]
    assert main.main(validate) == 0
    assert main.main([*validate, "--data.max_bad_fraction", "0.1"]) == 2
    assert "more than data.max_bad_fraction 0.1" in capsys.readouterr().err


@quick
def test_validate_uses_the_fold_of_the_run(tmp_path, capsys):
    write_dataset(tmp_path, data=9)
    assert _quick("data", "--data.num_folds", 3, "--data.fold", 2) == 0
    loss = re.search(r"val/loss +(\S+)", capsys.readouterr().out.partition("Fit finished")[2])[1]
    validate = ["validate", "--ckpt_path", "runs/lightning_logs/version_0/model.safetensors", "--data.num_workers", "0"]
    assert main.main(validate) == 0
    out = capsys.readouterr().out
    assert "Validation: 9 images" in out
    assert re.search(r"loss +(\S+)", out)[1] == loss
    assert main.main([*validate, "--data.val_fraction", "0.4"]) == 0
    assert "Validation: 12 images" in capsys.readouterr().out  # options override the model's record
    write_pictures(tmp_path / "data" / "bars", "bars", 6, start=50)  # the dataset has grown
    assert main.main([*validate, "--config", "runs/lightning_logs/version_0/config.yaml"]) == 0
    assert "Validation: 9 images" in capsys.readouterr().out
    (tmp_path / "link").symlink_to("data")
    shutil.copytree("data", tmp_path / "moved")
    for same in ("link", "other/../data", "moved"):
        (tmp_path / "other").mkdir(exist_ok=True)
        assert main.main([*validate, "--data.root", same]) == 0
        out = capsys.readouterr().out
        assert "Validation: 9 images" in out
        assert re.search(r"loss +(\S+)", out)[1] == loss, same
    assert main.main([*validate, "--data.root", str(write_dataset(tmp_path / "other", train=2, val=4))]) == 0
    assert "Validation: 12 images" in capsys.readouterr().out


@quick
def test_warning_if_the_splits_differ_from_those_of_the_run(tmp_path, capsys):
    """They may contain training images."""
    write_dataset(tmp_path, data=8)
    assert _quick("data") == 0
    model = Path("runs/lightning_logs/version_0/model.safetensors")
    shutil.copy(model, "alone.safetensors")
    cases = {
        ("validate", "--ckpt_path", str(model)): False,
        ("validate", "--ckpt_path", str(model), "--data.val_fraction", "0.5"): True,
        ("test", "--ckpt_path", str(model), "--data.test_fraction", "0.5"): True,
        ("validate", "--ckpt_path", "alone.safetensors", "--data.root", "data"): True,
    }
    capsys.readouterr()
    for command, warned in cases.items():
        assert main.main(list(command)) == 0
        assert ("images that it was trained on may be among these" in capsys.readouterr().out) is warned, command


@quick
def test_validate_and_test_accept_the_config_of_a_fit(tmp_path, capsys):
    """With settings that only training uses, and settings given by class."""
    write_dataset(tmp_path / "data", train=4, val=2, test=2)
    extra = tmp_path / "extra.yaml"
    extra.write_text(
        "trainer:\n  profiler: {class_path: lightning.pytorch.profilers.SimpleProfiler}\n"
        "  strategy: {class_path: lightning.pytorch.strategies.SingleDeviceStrategy, init_args: {device: cpu}}\n"
        "  callbacks:\n  - {class_path: EarlyStopping, init_args: {monitor: val/loss}}\n"
        "  - {class_path: ModelCheckpoint, init_args: {filename: mine}}\n  - {class_path: DeviceStatsMonitor}\n"
        "  - {class_path: TQDMProgressBar}\n"
    )
    assert _quick("data", "--config", extra) == 0
    assert "epoch 1/1" in capsys.readouterr().out
    run = Path("runs/lightning_logs/version_0")
    assert yaml.safe_load((run / "config.yaml").read_text())["ckpt_path"] is None
    for command in ("validate", "test"):
        assert (
            main.main([command, "--config", str(run / "config.yaml"), "--ckpt_path", str(run / "model.safetensors")])
            == 0
        )


@quick
def test_summary_after_max_time_and_without_checkpoints(tmp_path, capsys):
    """And a learning-rate monitor of the user replaces the default one, or each row would be written twice."""
    write_dataset(tmp_path / "data", train=8, val=2)
    mine = tmp_path / "mine.yaml"
    mine.write_text("trainer: {callbacks: [{class_path: LearningRateMonitor, init_args: {logging_interval: step}}]}")
    every = ("--config", mine, "--trainer.log_every_n_steps", 1, "--trainer.max_epochs", 1000)
    assert _quick("data", *every, "--trainer.max_time", "00:00:00:02") == 0
    assert "Fit finished by trainer.max_time" in capsys.readouterr().out
    rates = EventAccumulator("runs/lightning_logs/version_0").Reload().Scalars("lr")
    assert len(rates) == len({event.step for event in rates}) > 0
    assert _quick("data", "--trainer.enable_checkpointing", "false") == 0
    assert "Fit finished. Nothing was saved: the trainer's enable_checkpointing is false.\n" in capsys.readouterr().out


def test_trainer_errors_are_one_line(images, capsys, tmp_path):
    config = tmp_path / "wrong.yaml"
    for text, expected in (
        ("callbacks: {class_path: EarlyStopping, init_args: {monitor: val/loss, mode: foo}}", "`mode` can be"),
        (
            "callbacks: [{class_path: EarlyStopping, init_args: {monitor: val/loss, mode: foo}}]",
            "`mode` can be",
        ),
        ("strategy: {class_path: lightning.pytorch.strategies.DeepSpeedStrategy}", "DeepSpeed"),
        ("logger: WandbLogger", "wandb"),
        ("callbacks: EarlyStoping", "did you mean 'EarlyStopping'"),
        ("callbacks: [{class_path: mine}]", "'mine'"),
        ("callbacks: [{class_path: my.Own}]", "callbacks: my.Own: No module named 'my'"),
        ("callbacks: [{class_path: torch.nn.Linear}]", "torch.nn.Linear is not a subclass of Callback"),
        ("callbacks: EarlyStopping", "EarlyStopping: the following arguments are required: monitor"),
        ("callbacks: [{class_path: EarlyStopping, init_args: {monitr: a}}]", "Option 'monitr' is not accepted"),
        ("callbacks: [{class_path: EarlyStopping, init_args: {patience: x}}]", "patience: expected int, got x"),
        (
            "callbacks: [{class_path: LearningRateMonitor, init_args: {logging_interval: bogus}}]",
            "logging_interval: expected one of 'step', 'epoch', null, got bogus",
        ),
        (
            "plugins: [{class_path: lightning.pytorch.plugins.io.TorchCheckpointIO, init_args: {x: 1}}]",
            "TorchCheckpointIO: Option 'x' is not accepted",
        ),
    ):
        config.write_text(f"trainer: {{{text}}}")
        line = fails(capsys, *QUICK, "--data.root", images, "--config", config)
        assert line.removeprefix(f"{config}: ").startswith("trainer")
        assert expected in line
        assert len(line) < 300
    config.write_text("data: {batch_size: 8}", "utf-16")
    line = fails(capsys, *QUICK, "--data.root", images, "--config", config)
    assert line.startswith(f"{config}: ")


@quick
def test_a_fast_dev_run_writes_nothing(images, capsys):
    precious = Path("runs/checkpoints/best.ckpt")
    precious.parent.mkdir(parents=True)
    precious.write_text("precious")
    assert _quick(images, "--trainer.fast_dev_run", "true") == 0
    assert [f for f in Path("runs").rglob("*") if f.is_file()] == [precious]
    assert precious.read_text() == "precious"


@quick
def test_automatic_epochs(images, capsys):
    """They are printed, and a number in `config.yaml`; other commands take the config too, and several runs agree."""
    auto = ("--trainer.max_epochs", "auto")
    assert _quick(images, *auto, "--data.batch_size", 4, "--trainer.max_time", "00:00:00:01") == 0
    assert "trainer.max_epochs auto: 80, for 12 training images, from random weights" in capsys.readouterr().out
    run = Path("runs/lightning_logs/version_0")
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_epochs"] == 80
    assert main.main(["test", "--config", "finetune", "--ckpt_path", str(run / "model.safetensors")]) == 0
    assert several_runs.parse([str(images), *auto]).settings["trainer"]["max_epochs"] == 80
    assert main.main([*map(str, QUICK), "--data.root", str(images), "--trainer.max_epochs", "many"]) == 2
    assert "trainer.max_epochs: expected int, 'auto', null, got many" in capsys.readouterr().err


@quick
def test_options_override_configs_in_any_order(images, capsys):
    argv = ["fit", "--trainer.max_epochs=1", "--data.batch_size", 8, *QUICK[1:], "--data.root", images]
    assert main.main([str(a) for a in (*argv, "--data.num_workers", 0)]) == 0
    assert "epoch 1/1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("callback", "instead"),
    [
        ("BackboneFinetuning", "set model.strategy, such as staged"),
        ("GradientAccumulationScheduler", "set trainer.accumulate_grad_batches"),
        ("StochasticWeightAveraging", "set model.ema"),
        ("BatchSizeFinder", "set data.batch_size"),
        ("Timer", "set trainer.max_time"),
    ],
)
def test_unsupported_callbacks(images, capsys, tmp_path, callback, instead):
    needed = {"GradientAccumulationScheduler": {"scheduling": {0: 1}}, "StochasticWeightAveraging": {"swa_lrs": 0.1}}
    config = tmp_path / "callback.yaml"
    given = [{"class_path": callback, "init_args": needed.get(callback, {})}]
    config.write_text(yaml.safe_dump({"trainer": {"callbacks": given}}))
    line = fails(capsys, *QUICK, "--data.root", images, "--config", config)
    assert line.startswith(f"trainer.callbacks: {callback} ")
    assert instead in line


def test_a_requeued_slurm_job_is_not_resumed_silently(images, tmp_path, monkeypatch, capsys):
    for key, value in {"NTASKS": 1, "JOB_NAME": "fit", "JOB_ID": 7, "PROCID": 0, "LOCALID": 0, "NODEID": 0}.items():
        monkeypatch.setenv(f"SLURM_{key}", str(value))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "hpc_ckpt_3.ckpt").touch()
    line = fails(capsys, *QUICK, "--data.root", images, "--trainer.accelerator", "cpu")
    assert "hpc_ckpt_3.ckpt: " in line
    assert not (tmp_path / "runs" / "lightning_logs").exists()


def test_validate_on_two_processes_gives_the_same_metrics(tmp_path, capsys):
    """21 images in batches of 8 on two processes, gloo: no image is counted twice or lost."""
    root = write_dataset(tmp_path / "data", train=2, val=7)
    model = lively_model(tmp_path / "model.safetensors", size=32)
    argv = ["validate", "--ckpt_path", str(model), "--data.root", str(root), "--data.num_workers", "0"]
    assert main.main([*argv, "--trainer.accelerator", "cpu"]) == 0
    alone = capsys.readouterr().out
    overlay = CONFIGS / "hardware" / "ddp_sim.yaml"
    together, err = run_rexnet(*argv, "--config", overlay, "--data.batch_size", 8, cwd=tmp_path)
    assert together == alone
    assert err == ""


def test_a_distributed_run_leaves_its_process_group(tmp_path):
    """Gloo threads must end before Python: in 1 of 60 runs one aborted the process at exit."""
    root = write_dataset(tmp_path / "data", train=1, val=1)
    model = lively_model(tmp_path / "model.safetensors", size=32)
    code = """
import atexit, sys, torch
atexit.register(lambda: print("in a group at the end:", torch.distributed.is_initialized()))
from rexnet_lit.cli import main
from rexnet_lit.cli.commands import COMMANDS
code = main.main(sys.argv[1:])
print("in a group:", torch.distributed.is_initialized())
sys.exit(code)
"""
    argv = ["validate", "--ckpt_path", model, "--data.root", root, "--data.num_workers", "0"]
    argv += ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.strategy", "ddp"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, argv)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "in a group: True" in done.stdout
    assert "in a group at the end: False" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["full", "staged", "partial", "linear_probe"])
def test_two_processes_fit(strategy, tmp_path, capsys):
    """DDP with the overlay; one process gets the metrics of the last epoch from last.ckpt.

    They would differ if the processes had different weights, as each validates its share.
    """
    write_dataset(tmp_path / "data", train=7, val=7)
    fit = [*QUICK, "--config", CONFIGS / "hardware" / "ddp_sim.yaml", "--data.root", "data", "--data.batch_size", 6]
    fit += ["--model.strategy", strategy, *(["--data.augment", "none"] if strategy == "linear_probe" else [])]
    out, err = run_rexnet(*fit, "--trainer.max_epochs", 3, "--data.num_workers", 1, cwd=tmp_path)
    assert err == "" or strategy == "staged"  # a warning of torch that all parameters are in use
    assert "on 2 x cpu" in out
    assert out.count("Fit finished") == 1
    last = rows_of("runs/lightning_logs/version_0/metrics.csv")
    loss = [float(row["val/loss"]) for row in last if row["epoch"]][-1]
    assert (
        main.main(
            [
                "validate",
                "--ckpt_path",
                "runs/lightning_logs/version_0/checkpoints/last.ckpt",
                "--trainer.accelerator=cpu",
            ]
        )
        == 0
    )
    assert f"{loss:.4f}" in capsys.readouterr().out


@pytest.mark.slow
def test_validate_on_two_processes_with_less_than_a_batch(tmp_path):
    root = write_dataset(tmp_path / "data", train=2, val=2)
    model = lively_model(tmp_path / "model.safetensors", size=32)
    overlay = CONFIGS / "hardware" / "ddp_sim.yaml"
    out, _ = run_rexnet("validate", "--ckpt_path", model, "--data.root", root, "--config", overlay, cwd=tmp_path)
    assert "Validation: 6 images" in out


def test_check_writes_a_page(images, tmp_path, capsys):
    """Images of each class, duplicates side by side, augmented images; no request."""
    root = tmp_path / "data <b>"
    shutil.copytree(images, root)
    source = next((root / "train").rglob("*.png"))
    (root / "val" / source.parent.name / "again.png").write_bytes(source.read_bytes())
    page = tmp_path / "page.html"
    assert main.main(["check", str(root), "--report", str(page), "--config", str(CONFIGS / "finetune.yaml")]) == 0
    capsys.readouterr()
    text = page.read_text("utf-8")
    assert "data &lt;b&gt;" in text
    assert "<b>data" not in text
    assert "Duplicates across splits or classes" in text
    assert "again.png" in text
    assert "Augmented training images" in text
    assert text.count("epoch 1") == 4
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert re.findall(r"<script[^>]*>", text) == ["<script>"]  # our own, see tests/report/test_decide.py
    assert all(f"<h2>{name}</h2>" in text for name in NAMES)


def test_check_splits_as_a_config_does(tmp_path, capsys):
    write_dataset(tmp_path, data=10, elsewhere=1)
    (tmp_path / "data" / "disc" / "more").symlink_to(tmp_path / "elsewhere" / "disc")
    (tmp_path / "data" / "disc" / "broken.png").touch()
    argv = ["check", str(tmp_path / "data"), "--json"]
    assert main.main(argv) == 1
    assert "1 link out of the folder" in capsys.readouterr().out
    config = tmp_path / "c.yaml"
    settings = {"follow_outside_links": True, "val_fraction": 0.3, "test_fraction": 0.2, "max_bad_fraction": 0.01}
    config.write_text(yaml.safe_dump({"data": settings}))
    assert main.main([*argv, "--config", str(config)]) == 1
    found = json.loads(capsys.readouterr().out)
    counts = {split: sum(by_class.values()) for split, by_class in found["counts"].items()}
    assert sum(counts.values()) == 32
    assert counts["val"] > counts["test"] > 0
    (error,) = (row for row in found["findings"] if row["severity"] == "error")
    assert error["advice"].endswith("training refuses more than 1% (data.max_bad_fraction): train, val, test")
    settings["max_bad_fraction"] = 0.1
    config.write_text(yaml.safe_dump({"data": settings}))
    assert main.main([*argv, "--config", str(config)]) == 0
    config.write_text("data: {val_fraction: 20%}")
    assert "--config" in fails(capsys, *argv, "--config", config)


def test_check_refuses_a_wrong_config(images, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("data: {augment: {nam: light}}")
    for config, message in (("none.yaml", "none.yaml"), ("c.yaml", "nam")):
        argv = ["check", str(images), "--report", str(tmp_path / "p.html"), "--config", str(tmp_path / config)]
        assert message in fails(capsys, *argv)


def test_int8_is_calibrated_on_the_images_of_the_run(fitted, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "LEAST_AGREEMENT", 0.0)  # it has hardly been trained
    model = fitted[0] / "runs" / "lightning_logs" / "version_0" / "model.safetensors"
    assert main.main(["export", str(model), "--format", "onnx-int8", "--output", str(tmp_path / "m.onnx")]) == 0
    assert "on 24 images" in capsys.readouterr().out  # half of the images


@quick
def test_find_lr_plots_the_losses_and_trains_nothing(images, tmp_path, capsys):
    argv = [*QUICK, "--data.root", images, "--data.batch_size", 4, "--data.num_workers", 0]
    assert main.main([str(a) for a in (*argv, "--find_lr", "true", "--trainer.accelerator", "cpu")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    rate = float(re.search(r"--model.optimizer.lr (\S+)", out)[1])
    assert 1e-6 <= rate <= 1
    with Image.open(tmp_path / "runs" / "lr_finder.png") as picture:
        assert picture.size[0] > 500
    assert [file.name for file in (tmp_path / "runs").iterdir()] == ["lr_finder.png"]  # and no run folder
    assert "Fit finished" not in out


# The home folder


@quick
def test_home_folder_in_every_path(tmp_path, monkeypatch, capsys):
    """A shell expands ``~`` only at the start of an argument: not in YAML, after ``=``, or in quotes."""
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    data = write_dataset(home / "data", train=4, val=2, test=2)
    lively_model(home / "start.safetensors", size=32)
    (home / "order.txt").write_text("ring\ndisc\nbars\n")
    (home / "c.yaml").write_text("data: {root: ~/data, class_order: ~/order.txt, image_size: 32, num_workers: 0}")
    fit = [
        "fit", "--config=~/c.yaml", "--model.weights", "~/start.safetensors", "--trainer.default_root_dir", "~/runs",
        "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu",
    ]  # fmt: skip
    assert main.main(fit) == 0
    run = "~/runs/lightning_logs/version_0"
    assert main.main([*fit, "--ckpt_path", f"{run}/checkpoints/last.ckpt", "--trainer.max_epochs", "2"]) == 0
    model = f"{run}/model.safetensors"
    cpu = ["--trainer.accelerator", "cpu"]
    assert main.main(["test", "--ckpt_path", model, "--data.root", "~/data", *cpu]) == 0
    split = [f"{split}/{name}/{name} {i:03d}.png" for split in ("train", "val") for name in NAMES for i in (0, 1000)]
    split = [path for path in split if (data / path).is_file()]
    (home / "split.csv").write_text("path,label,split\n" + "".join(f"{p},{p.split('/')[1]},val\n" for p in split))
    given = ["--data.root", "~/data", "--data.split_file", "~/split.csv"]
    assert main.main(["validate", "--ckpt_path", model, *given, *cpu]) == 0
    paths = ["--data.predict_path", "~/data/val", "--data.predict_output", "~/names.csv"]
    assert main.main(["predict", "--ckpt_path", model, *paths, *cpu]) == 0
    assert main.main(["check", "~/data", "--report=~/page.html", "--config=~/c.yaml"]) == 0
    assert main.main(["export", model, "--format", "safetensors", "--output=~/copy.safetensors"]) == 0
    assert main.main(["sample", "~/digits"]) == 0
    classifier = load("~/copy.safetensors")
    assert classifier.class_names == ("ring", "disc", "bars")
    assert len(classifier.predict("~/data/val/disc/disc 1000.png")) == 1
    module = RexNetModule.load_from_checkpoint(model)
    checkpoint.save_model("~/again.safetensors", module.spec, module.network.state_dict())
    found = {path.name for path in home.iterdir()}
    assert {"runs", "names.csv", "page.html", "copy.safetensors", "digits", "again.safetensors"} <= found
    assert list(here.iterdir()) == []


def test_a_new_folder_without_splits_is_tested_whole(tmp_path, capsys):
    """A folder of class folders that the model was not trained on; its own one has no test split to offer."""
    root = write_dataset(tmp_path / "data", train=4, val=2)
    model = lively_model(tmp_path / "model.safetensors", size=32)
    command = ["test", str(model), str(root / "train"), "--trainer.default_root_dir", str(tmp_path / "runs")]
    assert main.main(command) == 0
    screen = capsys.readouterr().out
    assert "train has no splits, so all of its images are tested" in screen
    assert "Test: 12 images" in screen
    assert "there is no test split" in fails(capsys, "test", model, root)


def test_ranges_and_choices_are_reported_at_once(tmp_path, capsys):
    root = write_dataset(tmp_path / "data", train=4, val=2)
    wrong = {"data.batch_size": 0, "data.val_fraction": 3, "model.ema": 2, "model.drop_path_rate": 1}
    wrong |= {"model.head.dropout": 5, "trainer.accumulate_grad_batches": 0}
    line = fails(capsys, "fit", root, *(f"--{key}={value}" for key, value in wrong.items()))
    assert all(f"{key} is " in line for key in wrong)

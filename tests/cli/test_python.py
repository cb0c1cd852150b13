"""A bare ``Trainer`` does what the command line does with the same settings: the same weights, the same files."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from cli_tools import rows_of
from module_tools import equal, model_of

from rexnet_lit import ImageFolderDataModule, RexNetModule, RunCheckpoint
from rexnet_lit.cli import main
from rexnet_lit.models import checkpoint
from rexnet_lit.models.limits import Limits
from rexnet_lit.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_runs")

DATA = {"image_size": 32, "batch_size": 8, "num_workers": 0}
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}

SETTINGS = {
    "selected and calibrated": (
        {"weights": "start.safetensors", "strategy": {"blend": True}, "calibrate": True, "select": "loss"},
        {},
        {"max_epochs": 2, "gradient_clip_val": 1.0},
    ),
    "averaged and mixed": (
        {"pretrained": False, "ema": 0.9, "drop_path_rate": 0.1},
        {"augment": {"name": "light", "mixup": 0.4}},
        {"max_epochs": 3, "accumulate_grad_batches": 2},
    ),
    "solved": (
        {"weights": "start.safetensors", "strategy": {"name": "linear_probe", "solver": "logistic"}},
        {"augment": {"name": "none"}},
        {"max_epochs": 2},
    ),
}


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = model_of()
    checkpoint.save_model("start.safetensors", module.spec, module.network.state_dict())


def by_command(root, model, data, trainer, *argv):
    config = {
        "seed_everything": 3,
        "model": model,
        "data": {**DATA, **data, "root": str(root)},
        "trainer": {**trainer, "accelerator": "cpu", "default_root_dir": "command"},
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    assert main.main(["fit", "--config", "config.yaml", *argv]) == 0
    return Path("command/lightning_logs/version_0")


def in_python(root, model, data, trainer, **fit):
    pl.seed_everything(3, verbose=False)
    images = ImageFolderDataModule(str(root), **{**DATA, **data})
    module = RexNetModule(**model, class_names=images.class_names, image_size=32)
    pl.Trainer(**{**trainer, **QUIET, "default_root_dir": "python"}).fit(module, datamodule=images, **fit)
    return Path("python/lightning_logs/version_0")


@pytest.mark.filterwarnings("ignore:.*(num_workers|logging interval|LeafSpec)")
@pytest.mark.parametrize("name", SETTINGS)
def test_the_weights_are_equal(name, start, shapes):
    folders = [fit(shapes, *SETTINGS[name]) for fit in (by_command, in_python)]
    ours, theirs = (checkpoint.load_model(folder / "model.safetensors") for folder in folders)
    assert equal(ours.state, theirs.state)
    assert ours.spec == theirs.spec
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    for key in ("status", "weights", "why", "metrics", "epochs", "steps", "seed", "settings"):
        assert results[0][key] == results[1][key], key
    names = [{file.name for file in folder.iterdir()} - {"hparams.yaml"} for folder in folders]
    assert {n for n in names[0] if "events" not in n} - {"config.yaml"} == {n for n in names[1] if "events" not in n}
    tables = [rows_of(folder / "metrics.csv") for folder in folders]
    losses = [[row["val/loss"] for row in table] for table in tables]
    assert losses[0] == losses[1]


@pytest.mark.filterwarnings("ignore:.*(num_workers|logging interval|LeafSpec)")
def test_a_run_that_is_resumed_in_python_ends_with_the_same_weights(start, shapes):
    """Its starting weights are gone; it stays in its folder."""
    model, data, trainer = SETTINGS["averaged and mixed"]
    model = {**model, "weights": "start.safetensors"}
    whole = by_command(shapes, model, data, trainer)

    class Stop(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                raise KeyboardInterrupt

    with pytest.raises(BaseException):  # noqa: B017, PT011 (Lightning's own)
        in_python(shapes, model, data, {**trainer, "callbacks": [Stop()]})
    Path("start.safetensors").unlink()
    last = Path("python/lightning_logs/version_0/checkpoints/last.ckpt")
    assert torch.load(last, weights_only=True)["epoch"] == 1
    resumed = in_python(shapes, model, data, trainer, ckpt_path=str(last))
    ours, theirs = (checkpoint.load_model(folder / "model.safetensors").state for folder in (whole, resumed))
    assert equal(ours, theirs)
    assert [row["epoch"] for row in rows_of(resumed / "metrics.csv")] == ["0", "1", "2", ""]


def trained(root, kind=RexNetModule, trainer=(), fit=(), **model):
    """A trainer after its fit, and the module and the images that it was given."""
    images = ImageFolderDataModule(str(root), **DATA)
    module = kind(**{"pretrained": False, **model}, class_names=images.class_names, image_size=32)
    fitted = pl.Trainer(**{"max_epochs": 1, **QUIET, "default_root_dir": "python", **dict(trainer)})
    fitted.fit(module, datamodule=images, **dict(fit))
    return fitted, module, images


def result_of(fitted):
    return json.loads((Path(fitted.log_dir) / "result.json").read_text())


noisy = pytest.mark.filterwarnings("ignore:.*(num_workers|logging interval|LeafSpec|best model|no `val_dataloader)")


@noisy
def test_the_trainer_of_a_fit_tests_what_ships(start, shapes):
    fitted, module, images = trained(shapes, strategy={"blend": True}, calibrate=True)
    shipped = result_of(fitted)["metrics"]["val/loss"]
    smaller = ImageFolderDataModule(str(shapes), **{**DATA, "batch_size": 4})
    for given in ({"datamodule": images}, {"model": module, "datamodule": smaller, "ckpt_path": "best"}):
        assert fitted.validate(**given, verbose=False)[0]["val/loss"] == pytest.approx(shipped, rel=1e-4)
    with pytest.raises(UserError, match="a model, which cannot be resumed"):
        fitted.test(module, images, ckpt_path=str(Path(fitted.log_dir) / "model.safetensors"))


class Own(RexNetModule):
    def __init__(self, alpha=0.1, **settings):
        super().__init__(**settings)
        self.alpha = alpha


@noisy
def test_a_loaded_module_trains_on(start, shapes):
    fitted, *_ = trained(shapes, Own)
    path = fitted.checkpoint_callback.best_model_path
    module = Own.load_from_checkpoint(path, alpha=0.7, select="loss", optimizer={"lr": 1e-5})
    assert (module.alpha, module.select, module.lr, module.scratch) == (0.7, "loss", 1e-5, False)
    sizes = set()
    module.network.register_forward_pre_hook(lambda _, given: sizes.add(given[0].shape[2:]))
    pl.Trainer(max_epochs=1, **QUIET, default_root_dir="on").fit(module, ImageFolderDataModule(str(shapes), **DATA))
    assert sizes == {(32, 32)}


@noisy
def test_a_loaded_module_trains_as_one_that_starts_from_the_file(start, shapes):
    """That has the same weights to select among, too."""
    _, first, images = trained(shapes, strategy={"blend": True})
    file = Path(first.trainer.log_dir) / "model.safetensors"
    found = []
    for kind in ("load_from_checkpoint", None):
        pl.seed_everything(5, verbose=False)
        settings = {"strategy": {"blend": True}, "select": "loss"}
        if kind:
            module = RexNetModule.load_from_checkpoint(file, **settings)
        else:
            module = RexNetModule(weights=str(file), class_names=images.class_names, image_size=32, **settings)
        trainer = pl.Trainer(max_epochs=1, **QUIET, default_root_dir="on")
        trainer.fit(module, ImageFolderDataModule(str(shapes), **DATA))
        found.append((checkpoint.load_model(Path(trainer.log_dir) / "model.safetensors").state, result_of(trainer)))
    assert equal(found[0][0], found[1][0])
    for key in ("weights", "why", "metrics"):
        assert found[0][1][key] == found[1][1][key]


class Fixed(RexNetModule):
    def __init__(self, class_names):
        super().__init__(class_names=class_names, pretrained=False)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (
            RexNetModule,
            {"image_size": 48, "weights": "a"},
            "image_size, weights: the model file decides this",
        ),
        (RexNetModule, {"num_classes": 3}, r"num_classes: .*use RexNetModule\(weights=FILE"),
        (Fixed, {"ema": 0.9}, r"Fixed does not take backbone, .*, ema; let it take \*\*settings"),
    ],
)
def test_what_a_loaded_module_cannot_take(kind, settings, words, start):
    with pytest.raises(UserError, match=words):
        kind.load_from_checkpoint("start.safetensors", **settings)


@noisy
def test_a_model_that_is_trained_on_loses_its_limits(start, shapes):
    """They are those of the weights that were loaded: without validation images, or own loaders, no new ones come."""
    module = RexNetModule.load_from_checkpoint("start.safetensors")
    limits = Limits(20, np.full(20, 0.5, np.float32), 0.95, 0.2, None)
    module.spec = dataclasses.replace(module.spec, limits=limits)
    checkpoint.save_model("limited.safetensors", module.spec, module.network.state_dict())
    data = ImageFolderDataModule(str(shapes), **DATA)
    data.setup("fit")
    loaded = RexNetModule.load_from_checkpoint("limited.safetensors")
    assert loaded.spec.limits is not None
    trainer = pl.Trainer(max_epochs=1, default_root_dir="own", **QUIET)
    trainer.fit(loaded, data.train_dataloader())
    assert checkpoint.load_model(Path(trainer.log_dir) / "model.safetensors").spec.limits is None


def test_callbacks_of_another_trainers_run(start, shapes):
    saver, early = RunCheckpoint(), pl.callbacks.EarlyStopping("val/loss", patience=0, min_delta=10)
    callbacks = {"callbacks": [saver, early], "max_epochs": 3}
    first, *_ = trained(shapes, trainer=callbacks)
    best = Path(saver.best_model_path).read_bytes()
    second, *_ = trained(shapes, trainer=callbacks, optimizer={"lr": 1e-5}, calibrate=True)
    assert second.current_epoch > 0
    assert Path(saver.best_model_path).parents[1] == Path(second.log_dir) != Path(first.log_dir)
    assert (Path(first.log_dir) / "checkpoints" / "best.ckpt").read_bytes() == best


@noisy
@pytest.mark.parametrize("given", [{"filename": "best"}, {"save_last": True}, {"dirpath": "{run}", "filename": "last"}])
def test_a_checkpoint_over_the_runs_own_is_refused(given, start, shapes):
    run = Path("python/lightning_logs/version_0/checkpoints").absolute()
    own = pl.callbacks.ModelCheckpoint(**{key: str(value).format(run=run) for key, value in given.items()})
    with pytest.raises(UserError, match=r"trainer.callbacks: ModelCheckpoint would write (best|last).ckpt over"):
        trained(shapes, trainer={"callbacks": [own]})
    assert not run.is_dir()
    own = pl.callbacks.ModelCheckpoint(filename="{epoch}", save_top_k=-1)
    _, module, *_ = trained(shapes, trainer={"callbacks": [own]})
    found = {path.name for path in Path(module.trainer.log_dir, "checkpoints").iterdir()}
    assert found == {"best.ckpt", "last.ckpt", "epoch=0.ckpt"}


@noisy
@pytest.mark.filterwarnings("ignore:.*ckpt_path")
def test_another_kind_of_checkpoint_callback(start, shapes):
    _, module, *_ = trained(shapes, trainer={"callbacks": [pl.callbacks.OnExceptionCheckpoint("stopped")]})
    assert (Path(module.trainer.log_dir) / "model.safetensors").is_file()


class Broken(RexNetModule):
    def training_step(self, batch, batch_idx):
        raise RuntimeError("mistake")


class OwnOptimizer(RexNetModule):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@noisy
def test_own_parts_in_the_record_and_on_a_resume(start, shapes):
    settings = result_of(trained(shapes, OwnOptimizer)[0])["settings"]
    own = [value for key, value in settings.items() if key.startswith(("optimizer.", "schedule."))]
    assert set(own) == {f"{__name__}.OwnOptimizer.configure_optimizers", None}
    assert settings["loss.name"] == "cross_entropy"

    sgd, loss = partial(torch.optim.SGD, lr=0.01, momentum=0.5), torch.nn.CrossEntropyLoss(label_smoothing=0.2)
    fitted, *_ = trained(shapes, optimizer=sgd, loss=loss)
    settings = result_of(fitted)["settings"]
    assert settings["optimizer.class_path"] == "torch.optim.sgd.SGD"
    assert settings["optimizer.init_args"] == {"lr": 0.01, "momentum": 0.5}
    assert "optimizer.name" not in settings
    assert settings["loss.init_args"]["label_smoothing"] == 0.2
    last = str(Path(fitted.log_dir) / "checkpoints/last.ckpt")
    other = {"optimizer": partial(torch.optim.SGD, lr=0.02, momentum=0.5), "loss": torch.nn.CrossEntropyLoss()}
    with pytest.raises(UserError, match=r"model.optimizer.init_args .*; model.loss.init_args"):
        trained(shapes, trainer={"max_epochs": 2}, fit={"ckpt_path": last}, **other)
    trained(shapes, trainer={"max_epochs": 2}, fit={"ckpt_path": last}, optimizer=sgd, loss=loss)


@noisy
def test_the_record_of_a_run(start, shapes, capsys):
    with pytest.raises(RuntimeError, match="mistake"):
        trained(shapes, Broken)
    failed = json.loads(Path("python/lightning_logs/version_0/result.json").read_text())
    assert (failed["status"], failed["reason"]) == ("failed", "mistake")
    fitted, *_ = trained(shapes, trainer={"max_epochs": 3, "check_val_every_n_epoch": 2})
    rows = rows_of(Path(fitted.log_dir) / "metrics.csv")
    assert [bool(row["val/loss"]) for row in rows[:3]] == [False, True, False]
    trained(shapes, trainer={"enable_checkpointing": False}, calibrate=True)
    assert "model.calibrate has no effect without checkpoints" in capsys.readouterr().out

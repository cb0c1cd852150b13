"""One model from a cross-validation: a refit on all images, or the average of the folds."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from cli_tools import NAMES, fails, rows_of, write_dataset
from module_tools import make_runs_quick
from scipy.optimize import minimize_scalar

import rexnet_lit
from rexnet_lit.cli import main, several_runs
from rexnet_lit.models import checkpoint
from rexnet_lit.search import crossval, evaluation
from rexnet_lit.search.ship import LAST, Agreement
from rexnet_lit.training.module import RexNetModule
from rexnet_lit.utils.errors import UserError

SETTINGS = (
    "--config", "quickstart", "--data.val_fraction", "0.34", "--data.num_workers", "0", "--data.batch_size", "4",
    "--trainer.max_epochs", "3", "--trainer.accelerator", "cpu", "--model.optimizer.lr", "0.01",
)  # fmt: skip


@pytest.fixture(scope="module")
def crossed(tmp_path_factory):
    """A cross-validation of two folds, with a test split, that was stopped before its refit."""
    root = tmp_path_factory.mktemp("crossed")
    write_dataset(root / "data", train=12, test=4)
    with pytest.MonkeyPatch.context() as patch:
        make_runs_quick(patch)
        patch.chdir(root)
        train = several_runs.SeveralRuns.train

        def stop_before_the_refit(self, changes, callbacks=()):
            if callbacks:
                raise KeyboardInterrupt
            return train(self, changes)

        patch.setattr(several_runs.SeveralRuns, "train", stop_before_the_refit)
        assert main.main(["crossval", str(root / "data"), *SETTINGS, "--data.num_folds", "2", "--ship", "refit"]) == 130
    return root


def fold_results(root):
    runs = [root / f"crossval/fold_{k}/lightning_logs/version_0" for k in (1, 2)]
    return runs, [json.loads((run / "result.json").read_text()) for run in runs]


def test_a_refit_trains_on_all_images_and_is_calibrated_by_the_folds(crossed, monkeypatch, capsys):
    make_runs_quick(monkeypatch)
    monkeypatch.chdir(crossed)
    seen, before = [], RexNetModule.on_train_batch_start

    def watched(self, batch, batch_idx):
        seen.append((self.current_epoch, batch[2].tolist()))
        before(self, batch, batch_idx)

    monkeypatch.setattr(RexNetModule, "on_train_batch_start", watched)
    command = ["crossval", str(crossed / "data"), *SETTINGS, "--data.num_folds", "2", "--ship", "refit"]
    assert main.main(command) == 0
    screen = capsys.readouterr().out
    run, (_, results) = crossed / "lightning_logs/version_0", fold_results(crossed)
    assert screen.count("Fit finished") == 1
    assert "lightning_logs/version_0/model.safetensors" in screen.splitlines()[-1]
    epochs = int(np.ceil(np.median([int(result["weights"].split()[1]) for result in results])))
    assert sorted({epoch for epoch, _ in seen}) == list(range(epochs))
    for epoch in range(epochs):
        assert sorted(i for e, batch in seen if e == epoch for i in batch) == list(range(36))

    result, metrics = (
        json.loads(file.read_text()) for file in (run / "result.json", crossed / "crossval/metrics.json")
    )
    assert result["weights"] == LAST
    assert "36 images" in result["why"]
    assert result["metrics"] == {}
    assert result["cross_validation"]["mean"] == metrics["mean"]

    logits, targets = [], []
    rows = {row["path"]: row for row in rows_of(crossed / "crossval/predictions.csv")}
    for fold, of_fold in enumerate(results, 1):
        for place in rows_of(crossed / f"crossval/fold_{fold}/split.csv"):
            if place["split"] == "test":
                row = rows[place["path"]]
                probs = {row[f"label_{k}"]: float(row[f"prob_{k}"]) for k in (1, 2, 3)}
                logits.append([of_fold["temperature"] * np.log(max(probs[name], 1e-7)) for name in NAMES])
                targets.append(NAMES.index(row["target"]))
    logits, targets = np.array(logits), np.array(targets)
    assert len(targets) == 36
    wanted = np.full((36, 3), 1 / 38 / 2)  # Platt's targets: 1 - 1 / (N + 2) for the true class
    wanted[np.arange(36), targets] = 1 - 1 / 38

    def loss(log):
        scaled = logits / np.exp(log)
        return -(wanted * (scaled - np.logaddexp.reduce(scaled, 1, keepdims=True))).sum(1).mean()

    best = float(np.exp(minimize_scalar(loss, bounds=(-5, 5), method="bounded").x))
    assert result["temperature"] == pytest.approx(best, rel=0.02)
    shipped, last = (checkpoint.load_model(run / name) for name in ("model.safetensors", "checkpoints/last.ckpt"))
    head = last.state["head.fc.weight"] / result["temperature"]
    assert torch.allclose(shipped.state["head.fc.weight"], head, rtol=1e-5)

    limits = shipped.spec.limits
    assert limits.images == 36
    assert limits.known is None
    probs = np.exp(logits / result["temperature"])
    probs /= probs.sum(1, keepdims=True)
    assert limits.scores == pytest.approx(np.sort(1 - probs[np.arange(36), targets]), abs=2e-4)

    images = crossed / "data/test"
    assert main.main(["predict", str(run / "model.safetensors"), str(images), "--data.num_workers", "0"]) == 0
    answers = rows_of(crossed / "predictions.csv")
    assert {row["stranger"] for row in answers} == {""}
    assert {row["unsure"] for row in answers} <= {"0", "1"}
    with pytest.raises(UserError, match="tells no strangers"):
        rexnet_lit.load(run / "model.safetensors").strangeness(images / answers[0]["path"])
    trained = len(seen)
    (crossed / "crossval/refit.json").unlink()  # killed at the very end
    assert main.main(command) == 0
    again = checkpoint.load_model(crossed / "lightning_logs/version_1/model.safetensors")
    assert all(torch.equal(again.state[name], tensor) for name, tensor in shipped.state.items())
    assert again.spec.to_json() == shipped.spec.to_json()
    assert main.main(command) == 0
    assert "lightning_logs/version_1/model.safetensors" in capsys.readouterr().out.splitlines()[-1]
    assert len(seen) == trained


def test_an_average_ships_if_it_is_no_worse_than_the_folds(crossed, monkeypatch, capsys):
    make_runs_quick(monkeypatch)
    root = crossed.with_name("average")
    shutil.copytree(crossed, root)
    shutil.rmtree(root / "lightning_logs", ignore_errors=True)
    monkeypatch.chdir(root)
    monkeypatch.setattr(several_runs.SeveralRuns, "train", None)  # nothing is trained
    trainer, accelerators = evaluation.pl.Trainer, []

    def build(**settings):
        accelerators.append(settings["accelerator"])
        return trainer(**settings)

    monkeypatch.setattr(evaluation.pl, "Trainer", build)
    command = ["crossval", str(crossed / "data"), *SETTINGS, "--data.num_folds", "2", "--ship", "average"]
    runs, _ = fold_results(root)
    images = sorted((crossed / "data/test").rglob("*.png"))
    models = [rexnet_lit.load(run / "model.safetensors") for run in runs]
    truth = [image.parent.name for image in images]
    right = [np.mean(np.array([row[0].label for row in model.predict(images)]) == truth) for model in models]
    best, other = (runs[k] for k in np.argsort([-share for share in right]))
    shutil.copy(best / "model.safetensors", other)  # the average is then the model of each fold
    assert main.main(command) == 0
    assert accelerators == 5 * [
        "cpu"
    ]  # of the folds for their images, and of these and the average for the test images
    screen = capsys.readouterr().out
    assert f"top-1 {max(right):.3f} for the average of the folds' weights" in screen
    shipped = next((root / "lightning_logs").glob("version_*/checkpoints/best.ckpt")).parent.parent
    model, fold = (checkpoint.load_model(path / "model.safetensors") for path in (shipped, best))
    assert model.spec.limits is None
    assert all(torch.equal(model.state[name], tensor) for name, tensor in fold.state.items())
    assert model.data.split_file == str(root / "crossval/average/split.csv")
    splits = [row["split"] for row in rows_of(shipped / "split.csv")]
    assert splits.count("train") == 36
    assert splits.count("test") == 12


def test_agreement():
    def results(*weights, strengths=()):
        rows = zip(weights, [*strengths, *[None] * len(weights)], strict=False)
        return [{"weights": name, "epochs": 8, "head_strength": strength} for name, strength in rows]

    assert Agreement.of(results("epoch 3", "epoch 6", "epoch 4")) == Agreement(LAST, 4, None, "3 of 3")
    assert Agreement.of(results(LAST, "epoch 5", "the starting weights")) == Agreement(LAST, 7, None, "2 of 3")
    solved = "the last epoch with a solved head"
    found = Agreement.of(results(solved, "epoch 1", solved, solved, strengths=(0.1, None, 0.001, 0.01)))
    assert found == Agreement(solved, 8, 0.01, "3 of 4")


def test_five_folds_are_the_same_settings_as_none_given(tmp_path, monkeypatch):
    data = write_dataset(tmp_path / "data", train=4) / "train"
    monkeypatch.chdir(tmp_path)
    found = []

    def record(fit, settings, folder, identity, target):
        found.append((settings["data"]["num_folds"], identity))
        raise UserError("enough")

    monkeypatch.setattr(crossval, "cross_validate", record)
    for argv in ((), ("--data.num_folds", "5")):
        assert main.main(["crossval", str(data), *SETTINGS, *argv]) == 2
    assert found[0] == found[1]
    assert found[0][0] == 5


def test_what_cannot_be_shipped_is_refused_before_training(tmp_path, monkeypatch, capsys):
    data = write_dataset(tmp_path / "data", train=4) / "train"
    monkeypatch.chdir(tmp_path)
    command = ("crossval", data, *SETTINGS, "--ship")
    assert "no test split" not in fails(capsys, *command, "best")
    assert "use --ship refit" in fails(capsys, *command, "average")
    assert "plateau" in fails(capsys, *command, "refit", "--model.schedule", "plateau")
    assert not (tmp_path / "crossval").exists()

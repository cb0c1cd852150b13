"""Cross-validation: who is in which fold, its figures against scikit-learn, and going on where it was stopped."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from cli_tools import NAMES, write_dataset
from PIL import Image
from sklearn import metrics as sk

from rexnet_lit.cli import main, several_runs
from rexnet_lit.data.settings import SplitSettings
from rexnet_lit.search.crossval import cross_validate, fold_of, pool
from rexnet_lit.utils.errors import UserError


def blank_images(root, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name)


@pytest.mark.parametrize("pattern", [None, r"([a-z]+\d+)_"])
def test_every_image_is_tested_once_and_never_trained_on(tmp_path, pattern):
    for split, count in (("train", 30), ("val", 9)):
        blank_images(tmp_path, [f"{split}/{c}/{split}{c}{i // 3}_{i}.png" for c in "01" for i in range(count)])
    blank_images(tmp_path, ["test/0/left_out.png"])
    settings = SplitSettings(num_folds=3, val_fraction=0.2, group_pattern=pattern)
    folder = pool(str(tmp_path), settings)
    assert "1 image of the test split" in folder.notes[-1]
    tested = []
    for fold in range(3):
        parts = {name: set(samples.paths) for name, samples in fold_of(folder, settings, fold).splits.items()}
        assert set(parts) == {"train", "val", "test"}
        assert set.union(*parts.values()) == set(folder.splits["train"].paths)
        assert sum(map(len, parts.values())) == len(folder.splits["train"])
        groups = {name: {path.split("_")[0] for path in paths} for name, paths in parts.items()}
        if pattern:
            assert not groups["test"] & (groups["train"] | groups["val"])
            assert not groups["val"] & groups["train"]
        else:  # as many of each class
            counts = [sum("/0/" in path for path in parts["test"]), sum("/1/" in path for path in parts["test"])]
            assert counts == [13, 13]
        tested += parts["test"]
    assert sorted(tested) == sorted(folder.splits["train"].paths)


def test_a_test_fraction_is_in_no_fold(tmp_path):
    blank_images(tmp_path, [f"{c}/{i}.png" for c in "ab" for i in range(20)])
    folder = pool(str(tmp_path), SplitSettings(num_folds=3, test_fraction=0.2))
    train, test = (set(folder.splits[name].paths) for name in ("train", "test"))
    assert len(test) == 8
    assert len(train) == 32
    assert not train & test
    with pytest.raises(UserError, match="num_folds is 1"):
        pool(str(tmp_path), SplitSettings(num_folds=1))


def test_a_class_that_a_fold_would_take_away_is_an_error(tmp_path):
    blank_images(tmp_path, [f"{c}/p{c}{i % (2 if c == 'a' else 9)}_{i}.png" for c in "ab" for i in range(18)])
    settings = SplitSettings(num_folds=3, val_fraction=0.5, group_pattern=r"(p\w\d)_")
    folder = pool(str(tmp_path), settings)
    assert len(folder.splits["train"]) == 36
    with pytest.raises(UserError, match="leaves no training images of 'a'"):
        [fold_of(folder, settings, fold) for fold in range(3)]


def test_too_few_or_too_many_folds_are_an_error_before_the_first_fit(tmp_path):
    blank_images(tmp_path / "data", [f"{c}/{i}.png" for c in "ab" for i in range(2)])
    with pytest.raises(UserError, match=r"data\.num_folds is 1; expected"):
        pool(str(tmp_path / "data"), SplitSettings(num_folds=1))
    config = {"root": str(tmp_path / "data"), "num_folds": 9, "val_fraction": 0.5}
    folder = pool(config["root"], SplitSettings.of(config))
    with pytest.raises(UserError, match=r"data\.num_folds is 9.* fold \d has no images; use fewer"):
        cross_validate(pytest.fail, {"data": config}, folder, {}, tmp_path / "crossval")


def test_an_own_network_starts_from_scratch_as_in_a_fit(tmp_path):
    write_dataset(tmp_path, train=8)
    own = '{"class_path": "timm.create_model", "init_args": {"model_name": "test_resnet", "num_classes": 3}}'
    arguments = ["--config", "finetune", "--data.root", str(tmp_path), "--model.network", own]
    runs = several_runs.parse([*arguments, "--model.pretrained", "true"])
    assert runs.from_scratch
    scratch = several_runs.parse([*arguments[:4], "--model.pretrained", "false"])
    assert runs.settings["trainer"]["max_epochs"] == scratch.settings["trainer"]["max_epochs"] > 20


def test_command_goes_on_and_its_figures_equal_scikit_learn(tmp_path, monkeypatch, capsys):
    write_dataset(tmp_path / "data", train=6)
    data = tmp_path / "data" / "train"
    monkeypatch.chdir(tmp_path)
    command = [
        "crossval", str(data), "--config", "quickstart", "--data.num_folds", "2", "--data.val_fraction", "0.34",
        "--data.num_workers", "0", "--data.batch_size", "4", "--trainer.max_epochs", "1",
    ]  # fmt: skip
    train, trained = several_runs.SeveralRuns.train, []

    def stop_after_the_first(self, changes):
        if trained:
            raise KeyboardInterrupt
        trained.append(changes["data.split_file"])
        return train(self, changes)

    monkeypatch.setattr(several_runs.SeveralRuns, "train", stop_after_the_first)
    assert main.main(command) == 130
    monkeypatch.setattr(several_runs.SeveralRuns, "train", train)
    assert main.main([*command, "--model.optimizer.lr", "0.1"]) == 2
    assert "model.optimizer.lr" in capsys.readouterr().err
    assert main.main(command) == 0
    screen = capsys.readouterr().out
    assert screen.count("Fit finished") == 1  # the second fold's
    figures = json.loads((tmp_path / "crossval/metrics.json").read_text())
    with (tmp_path / "crossval/predictions.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["path"] for row in rows) == sorted(str(path.relative_to(data)) for path in data.rglob("*.png"))
    truth, answers = [row["target"] for row in rows], [row["label_1"] for row in rows]
    assert figures["top1"] == pytest.approx(sk.accuracy_score(truth, answers))
    assert figures["macro_f1"] == pytest.approx(sk.f1_score(truth, answers, average="macro"))
    probs = [[float(row[f"prob_{row_names.index(name) + 1}"]) for name in NAMES]
             for row, row_names in ((row, [row[f"label_{k}"] for k in (1, 2, 3)]) for row in rows)]  # fmt: skip
    assert figures["nll"] == pytest.approx(
        sk.log_loss(truth, probs / np.sum(probs, 1, keepdims=True), labels=NAMES), abs=1e-4
    )
    top1 = [fold["top1"] for fold in figures["folds"]]
    assert figures["mean"]["top1"] == pytest.approx(np.mean(top1))
    assert figures["std"]["top1"] == pytest.approx(np.std(top1, ddof=1))

"""The search: its order, its budget, going on after a stop, and failures. The runs are played, but for one test."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from cli_tools import rows_of, write_dataset

from rexnet_lit.cli import main
from rexnet_lit.cli import tune as command_line
from rexnet_lit.models import checkpoint
from rexnet_lit.models.spec import ModelSpec
from rexnet_lit.search import result, tune
from rexnet_lit.search.pace import Pace, TooLongError
from rexnet_lit.search.space import Setting, importance, propose, read_space
from rexnet_lit.search.symmetries import MeasureSymmetries
from rexnet_lit.search.tune import Search
from rexnet_lit.utils.errors import UserError

BASE = {
    "trainer.max_epochs": 8, "seed_everything": 0, "model.optimizer.lr": 0.001, "data.augment.hflip": 0.5,
    "data.augment.name": "light",
    "data.augment.vflip": 0, "data.augment.quarter_turns": 0, "model.backbone": "rexnet_100", "model.pretrained": True,
    "model.weights": None,
}  # fmt: skip
SPACE = {
    "model.optimizer.lr": {"times": [0.5, 1, 2]},
    "data.augment.hflip": [0, 0.5],
    "data.augment.vflip": [0, 0.5],
    "data.augment.quarter_turns": [0, 0.75],
}


class Played:
    """Plays fits: an epoch takes a second, and without flips the loss is lower. ``stop_at`` ends one by Ctrl-C.

    The only weight is the number of epochs; a fit that continues another adds its own. ``holds`` says which symmetries
    the first one finds.
    """

    def __init__(self, monkeypatch, stop_at=None, fails=(), holds=None):
        self.now, self.started, self.stop_at, self.fails, self.holds = 0.0, [], stop_at, fails, holds
        monkeypatch.setattr(tune.time, "monotonic", lambda: self.now)

    def __call__(self, changes, callbacks=()):
        self.started.append(changes)
        for callback in callbacks:
            if isinstance(callback, MeasureSymmetries) and self.holds is not None:
                shares = dict.fromkeys(self.holds, 0.5)
                callback.file.parent.mkdir(parents=True, exist_ok=True)
                callback.file.write_text(json.dumps({"upright": 0.9, "changed": shares, "holds": self.holds}))
        if len(self.started) == self.stop_at:
            raise KeyboardInterrupt
        if changes.get("data.augment.vflip") in self.fails:
            raise RuntimeError("out of memory\nand more")
        epochs = changes["trainer.max_epochs"]
        if any(isinstance(callback, Pace) and epochs > callback.limit() for callback in callbacks):
            self.now += 1
            raise TooLongError(0.5, 1.0)
        self.now += epochs
        trained = epochs
        if "model.weights" in changes:
            trained += checkpoint.load_model(changes["model.weights"]).state["epochs"].item()
        loss = 1 / trained + changes.get("data.augment.hflip", 0.5) + changes.get("data.augment.vflip", 0)
        if "model.weights" not in changes:
            loss += abs(math.log(changes.get("model.optimizer.lr", 0.001) / 0.001)) / 10
        loss += changes["seed_everything"] / 100
        run = Path(changes["trainer.default_root_dir"]) / "lightning_logs/version_0"
        (run / "checkpoints").mkdir(parents=True)
        spec = ModelSpec("rexnet_100", ("ant", "bee"))
        checkpoint.save_model(run / "model.safetensors", spec, {"epochs": torch.tensor(float(trained))})
        metrics = {"val/loss": loss, "val/top1": 1 - loss / 9, "val/macro_f1": 0.5}
        (run / "result.json").write_text(json.dumps({"status": "finished", "metrics": metrics}))
        return run


def search_in(folder, fit, budget=None, trials=None, select="loss", **settings):
    return Search(fit, folder, read_space(SPACE, "space", BASE), {**BASE, **settings}, budget, trials, select)


def test_the_first_run_is_the_configs_and_the_best_is_never_worse(tmp_path, monkeypatch):
    search = search_in(tmp_path, Played(monkeypatch), trials=5)
    search.run()
    stages = [trial.stage for trial in search.done]
    assert stages == ["default", *["short"] * 6, *["full"] * (len(stages) - 9), "again", "continued"]
    assert "full" in stages
    assert search.done[0].values == search.done[1].values == {}
    assert [trial.epochs for trial in search.done[:7]] == [8, *[2] * 6]
    assert {trial.epochs for trial in search.done[7:-1]} == {8}
    assert search.best is search.done[-1]
    assert (search.best.epochs, search.best.values) == (4, {"data.augment.hflip": 0, "model.optimizer.lr": 0.0005})
    assert search.best.loss <= search.done[0].loss
    # Only the weights of the two best and of the config's settings are kept.
    first, second = sorted(search.full, key=lambda trial: trial.loss)[:2]
    kept = {path.parts[-4] for path in tmp_path.rglob("model.safetensors")}
    assert kept == {"trial_000", first.name, second.name}
    rows = rows_of(tmp_path / "leaderboard.csv")
    assert rows[0]["trial"] == search.best.name
    assert rows[0]["data.augment.hflip"] == "0"
    assert len(rows) == len(search.done)


@pytest.mark.parametrize("stop_at", range(1, 11))
def test_a_search_that_was_stopped_ends_as_if_it_had_not(tmp_path, monkeypatch, stop_at):
    undisturbed = search_in(tmp_path / "a", Played(monkeypatch), trials=5)
    undisturbed.run()
    first = Played(monkeypatch, stop_at=stop_at)
    with pytest.raises(KeyboardInterrupt):
        search_in(tmp_path / "b", first, trials=5).run()
    second = Played(monkeypatch)
    again = search_in(tmp_path / "b", second, trials=5)
    again.run()
    assert again.done == undisturbed.done
    finished = [changes["trainer.default_root_dir"] for changes in (*first.started[:-1], *second.started)]
    assert len(finished) == len(set(finished))  # none ran twice


@pytest.mark.parametrize("budget", [20, 40, 100])
def test_budget(tmp_path, monkeypatch, budget):
    fit = Played(monkeypatch)
    search = search_in(tmp_path, fit, budget=budget)
    search.run()
    assert 0.8 * budget <= search.elapsed <= budget
    assert fit.started[0]["trainer.max_time"] == {"seconds": math.ceil(1.05 * budget)}
    stages = {trial.stage for trial in search.done}
    assert stages == {"default", "short", "full", *(["again", "continued"] if budget > 20 else [])}


@pytest.mark.parametrize("given", [True, False])
def test_training_continues_from_the_average_of_the_best_only_from_given_weights(tmp_path, monkeypatch, given):
    monkeypatch.setitem(BASE, "model.pretrained", given)
    search = search_in(tmp_path, Played(monkeypatch), budget=60)
    search.run()
    continued = next(trial for trial in search.done if trial.stage == "continued")
    before = [trial for trial in search.full if trial.number < continued.number]
    ranked = [trial.name for trial in sorted(before, key=lambda trial: trial.loss)]
    assert list(continued.start) == ranked[: 2 if given else 1]
    assert checkpoint.load_model(search.start_file(continued)).state["epochs"] == 8


def test_a_search_ends_when_its_last_run_fails(tmp_path, monkeypatch):
    played = Played(monkeypatch)
    search = search_in(tmp_path, played, budget=60)
    monkeypatch.setattr(search, "start_file", lambda trial: 1 / 0)
    search.run()
    assert search.done[-1].stage == "continued"
    assert search.done[-1].reason == "ZeroDivisionError: division by zero"
    assert search.best.stage != "continued"


def test_a_fit_that_is_longer_than_the_budget_is_shortened(tmp_path, monkeypatch, capsys):
    def epochs_of(search):
        return [trial.epochs for trial in search.done]

    search = search_in(tmp_path, Played(monkeypatch), budget=8)
    search.run()
    assert epochs_of(search)[0] == 5  # 85 % of 8 s, less 1 s lost and 0.5 s before the first epoch
    assert max(epochs_of(search)) == 5
    assert result.changes(search)["trainer.max_epochs"][0] == 8  # the report compares with the config
    assert (
        "8 epochs would take about 8 s, too long for a search of 8 s: its runs have 5 epochs."
        in capsys.readouterr().out
    )
    again = search_in(tmp_path, Played(monkeypatch), budget=30)
    again.run()
    assert max(epochs_of(again)) == 5
    with pytest.raises(UserError, match="allow more time"):
        search_in(tmp_path / "b", Played(monkeypatch), budget=1).run()


HFLIP, VFLIP, TURNS = "data.augment.hflip", "data.augment.vflip", "data.augment.quarter_turns"


def test_what_the_symmetries_ask_for_is_tried_first(tmp_path, monkeypatch, capsys):
    """From the first run where there is no time for short runs; and a symmetry that fails is not tried."""
    holds = {HFLIP: False, VFLIP: False, TURNS: None}
    search = search_in(tmp_path / "a", Played(monkeypatch, holds=holds), budget=12)
    search.run()
    found = [(trial.stage, trial.values, trial.epochs, list(trial.start)) for trial in search.done]
    assert found == [
        ("default", {}, 4, []),  # 85 % of 12 s for two runs, less 1 s lost and 0.5 s before the epoch
        ("continued", {HFLIP: 0}, 7, ["trial_000"]),  # all that is left
    ]
    assert f"{HFLIP} does not hold (50%)" in capsys.readouterr().out
    search = search_in(tmp_path / "two", Played(monkeypatch, holds=holds), budget=3)  # no time for two runs
    search.run()
    assert search.done[0].epochs == 1
    none = {HFLIP: False, VFLIP: None, TURNS: False}
    search = search_in(tmp_path / "e", Played(monkeypatch, holds=none), trials=8)
    search.run()
    assert any(VFLIP in trial.values for trial in search.done)
    assert not any(TURNS in trial.values for trial in search.done)
    search = search_in(tmp_path / "c", Played(monkeypatch, holds=holds), trials=8)
    search.run()
    tried = [trial.values for trial in search.done if trial.stage == "short"]
    assert tried[:2] == [{}, {HFLIP: 0}]
    assert all(values[HFLIP] == 0 and VFLIP not in values for values in tried[1:])
    search = search_in(tmp_path / "d", Played(monkeypatch, holds={HFLIP: True, VFLIP: True, TURNS: True}), trials=1)
    search.run()
    assert search.done[2].values == {VFLIP: 0.5, TURNS: 0.75}


@pytest.mark.parametrize(("holds", "hflip"), [(False, 0), (True, 0.5), (None, 0.5)])
def test_what_the_first_run_has_chosen_is_kept(tmp_path, monkeypatch, holds, hflip):
    """With `hflip: auto` the first run decides; the others, and `best.yaml`, have the number."""
    played = Played(monkeypatch, holds={HFLIP: holds, VFLIP: False, TURNS: False})
    search = search_in(tmp_path, played, trials=4, **{HFLIP: "auto"})
    search.run()
    assert HFLIP not in played.started[0]
    assert search.done[1].values == {}
    chosen = [changes[HFLIP] for changes in played.started[1:]]
    assert set(chosen[:1]) == {hflip}
    assert set(chosen) == ({0} if holds is False else {0, 0.5})
    assert HFLIP not in search.settings_of(search.done[0])
    assert rows_of(tmp_path / "leaderboard.csv")[0][HFLIP] in ("0", "0.5")


def test_a_first_run_that_was_stopped_is_resumed_with_its_own_settings(tmp_path, monkeypatch):
    """It has chosen for `hflip: auto` by then."""
    holds = {HFLIP: False, VFLIP: None, TURNS: None}
    with pytest.raises(KeyboardInterrupt):
        search_in(tmp_path, Played(monkeypatch, holds=holds, stop_at=1), trials=1, **{HFLIP: "auto"}).run()
    played = Played(monkeypatch, holds=holds)
    search_in(tmp_path, played, trials=1, **{HFLIP: "auto"}).run()
    assert HFLIP not in played.started[0]
    assert {changes[HFLIP] for changes in played.started[1:]} == {0}


def test_a_failed_run_is_a_row_and_the_search_goes_on(tmp_path, monkeypatch):
    search = search_in(tmp_path, Played(monkeypatch, fails=(0.5,)), trials=5)
    search.run()
    failed = [trial for trial in search.done if trial.status == "failed"]
    assert failed[0].reason == "RuntimeError: out of memory"
    assert search.best.stage != "default"
    with pytest.raises(UserError, match="out of memory"):
        search_in(tmp_path / "b", Played(monkeypatch, fails=(None,)), trials=1).run()


def test_proposals_are_repeatable_and_learn():
    space = {"lr": Setting(low=1e-4, high=1e-1, log=True), "flip": Setting(choices=(0, 0.5))}

    def loss(values):
        return abs(math.log10(values["lr"]) + 2) + values["flip"]

    seen = []
    for number in range(30):
        values = propose(space, seen, number, seed=0)
        assert values == propose(space, seen, number, seed=0)
        seen.append((values, loss(values)))
    assert min(value for _, value in seen) < 0.2
    assert sum(value for _, value in seen[20:]) < sum(value for _, value in seen[:10])
    shares = importance(space, seen)
    assert set(shares) == {"lr", "flip"}
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (["hflip"], "expected settings"),
        ({"data.augment.hflp": [0, 1]}, "did you mean 'data.augment.hflip'"),
        ({"data.augment.hflip": 0}, "expected a list"),
        ({"data.augment.hflip": {"low": 1, "high": 0}}, "expected a list"),
        ({"model.optimizer.lr": {"low": 0, "high": 1, "log": True}}, "expected a list"),
        ({"model.backbone": {"times": [1, 2]}}, "cannot be multiplied"),
    ],
)
def test_wrong_spaces(content, problem):
    with pytest.raises(UserError, match=problem):
        read_space(content, "mine.yaml", BASE)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("1h30m", 5400), ("5", 300), ("0.5h", 1800)])
def test_times(text, seconds):
    assert command_line._seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "0s", "5x", "-3m"])
def test_wrong_times(text):
    with pytest.raises(UserError, match="--budget"):
        command_line._seconds(text)


@pytest.mark.usefixtures("quick_runs")
def test_command(tmp_path, monkeypatch, capsys):
    data = write_dataset(tmp_path / "data", train=8) / "train"
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("model.optimizer.lr: {times: [1, 2]}\n")
    command = [
        "tune", str(data), "--config", "quickstart", "--trials", "1", "--space", "mine.yaml", "--data.batch_size", "8",
        "--trainer.max_epochs", "2", "--data.num_workers", "0",
    ]  # fmt: skip
    assert main.main(command) == 0
    screen = capsys.readouterr().out
    assert "There is no test split: 3 images are set aside" in screen
    assert "On 3 test images, which the search has not seen" in screen
    run = tmp_path / "lightning_logs/version_0"
    assert (run / "model.safetensors").is_file()
    best = yaml.safe_load((tmp_path / "tuning/best.yaml").read_text())
    row = rows_of(tmp_path / "tuning/leaderboard.csv")[0]
    assert (best["trainer"]["max_epochs"], best["seed_everything"]) == (int(row["epochs"]), int(row["seed"]))
    assert best["data"]["batch_size"] == 8  # an option of the command
    assert "root" not in best["data"]
    if row["stage"] == "continued":
        assert checkpoint.load_model(best["model"]["weights"]).spec.class_names
    page = (tmp_path / "tuning/report.html").read_text()
    assert "trial_000" in page
    trials = (tmp_path / "tuning/trials.json").read_text()
    assert main.main(command) == 0  # nothing is left to run
    assert (tmp_path / "tuning/trials.json").read_text() == trials
    assert not (tmp_path / "lightning_logs/version_1").exists()
    assert main.main([*command, "--trainer.max_time", "00:00:01:00"]) == 2
    assert "--budget" in capsys.readouterr().err
    assert main.main([*command, "--model.loss.label_smoothing", "0"]) == 2
    assert "model.loss.label_smoothing" in capsys.readouterr().err
    configs = []
    for others in ([], ["--config", "finetune"], ["--config", "quickstart"]):
        capsys.readouterr()
        assert main.main(["fit", str(data), *others, "--config", "tuning/best.yaml", "--print_config"]) == 0
        configs.append(capsys.readouterr().out)
    assert configs[0] == configs[1] == configs[2]
    assert yaml.safe_load(configs[0])["model"]["backbone"] == "rexnet_100"
    assert main.main([*command, "--budget", "0.1s", "--trainer.default_root_dir", "other"]) == 2
    assert "allow more time" in capsys.readouterr().err


def test_a_search_that_failed_at_once_can_be_corrected(tmp_path, monkeypatch, capsys):
    data = write_dataset(tmp_path / "data", train=8) / "train"
    monkeypatch.chdir(tmp_path)
    command = [
        "tune", str(data), "--config", "quickstart", "--trials", "1", "--data.batch_size", "8", "--trainer.max_epochs",
        "1", "--data.num_workers", "0",
    ]  # fmt: skip
    assert main.main([*command, "--model.pretrained", "true"]) == 2
    assert main.main([*command, "--space", "no.yaml"]) == 2
    capsys.readouterr()
    assert main.main(command) == 0
    assert f"what failed with other settings is moved to {Path('tuning-1')}" in capsys.readouterr().out
    assert Path("tuning-1/settings.json").is_file()
    assert main.main([*command, "--data.image_size", "48"]) == 2  # now there is something to lose
    assert "data.image_size (32 then, 48 now)" in capsys.readouterr().err

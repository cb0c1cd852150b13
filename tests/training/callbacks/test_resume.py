"""A run survives: killed, told to stop, a full disk, a bad worker, a loss that is no number (faults.md B, C, D, F)."""

from __future__ import annotations

import concurrent.futures
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from cli_tools import rows_of
from module_tools import data_of, model_of, trainer_of
from run_tools import CONFIGS, command_line, differing, fit, run_folder, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rexnet_lit.models import checkpoint
from rexnet_lit.training.callbacks import run_folder as run_folders
from rexnet_lit.training.callbacks.checkpoint import RunCheckpoint
from rexnet_lit.training.callbacks.nan_guard import NaNGuard
from rexnet_lit.utils import process
from rexnet_lit.utils.errors import Stopped, UserError
from rexnet_lit.utils.files import check_writable, link_or_copy

STEPS = 18  # of a run here: 3 epochs of 6

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture(scope="module")
def home(tmp_path_factory, make_shapes):
    """An empty folder but for the dataset: 24 training images in 3 classes."""
    root = tmp_path_factory.mktemp("home")
    make_shapes(root / "data", train=8, val=3, test=0)
    return root


@pytest.fixture(scope="module")
def whole_run(home):
    """Where a run is that nothing has interrupted, by its settings."""
    known = {}

    def of(*settings):
        if settings not in known:
            cwd = another(home, home.parent / f"whole{len(known)}")
            done = fit(cwd, *settings)
            assert done.code == 0, done.out
            known[settings] = cwd
        return known[settings]

    return of


@pytest.fixture(scope="module")
def whole(whole_run):
    """The weights of a run that nothing has interrupted, by its settings."""
    return lambda *settings: weights(whole_run(*settings))


def another(home: Path, cwd: Path) -> Path:
    cwd.mkdir(exist_ok=True)
    (cwd / "data").symlink_to(home / "data")
    return cwd


@pytest.fixture
def cwd(home, tmp_path):
    return another(home, tmp_path / "cwd")


def resumed(cwd, *settings, version=0):
    """Resume the run and return its weights."""
    done = fit(cwd, *settings, "--ckpt_path", "last")
    assert done.code == 0, done.out
    assert "Fit finished" in done.out
    assert all(float(seconds) < 200 for seconds in re.findall(r"\((\S+) s; training", done.out))
    assert [f.name for f in (cwd / "runs" / "lightning_logs").iterdir()] == [f"version_{version}"]
    return weights(cwd, version)


# --- killed ---------------------------------------------------------------------------------------

EMA = ("--model.ema", 0.9)
ACCUMULATE = ("--trainer.accumulate_grad_batches", 4)
WORKERS = ("--data.num_workers", 2)
SOLVED = ("--model.strategy", "linear_probe", "--model.strategy.solver", "logistic")
# Everything that changes with the epoch or the batch: what trains, the images' size, which are blended.
CHANGING = (
    "--model.strategy", "staged", "--data.size_schedule", "[[0, 32], [2, 48]]", "--data.augment.mixup", 0.4,
    "--data.augment.cutmix", 1.0, "--model.loss", "bce", "--model.schedule", "plateau", "--data.cache", "disk", *EMA,
)  # fmt: skip


@pytest.mark.parametrize(
    ("step", "save_every", "settings"),
    [
        (9, -1, ()),  # mid-epoch; the last save is of the step before
        (9, 600, ("--trainer.max_steps", STEPS - 2)),  # at the end of an epoch, which Lightning would end twice
        (3, -1, SOLVED),
        pytest.param(3, -1, ACCUMULATE, marks=pytest.mark.slow),
        (14, 600, (*CHANGING, *WORKERS)),  # saved at the end of an epoch only; all trains now, on larger images
        pytest.param(5, -1, CHANGING, marks=pytest.mark.slow),  # the head alone has been trained
        pytest.param(9, 600, (*WORKERS, *EMA), marks=pytest.mark.slow),
        pytest.param(12, -1, EMA, marks=pytest.mark.slow),  # an epoch's first step
        pytest.param(11, -1, WORKERS, marks=pytest.mark.slow),  # an epoch's last step
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def test_killed_and_resumed_it_ends_with_the_same_weights(whole, cwd, step, save_every, settings):
    assert fit(cwd, *settings, trouble=("kill", step), save_every=save_every).code == -9
    assert differing(resumed(cwd, *settings), whole(*settings)) == []


@pytest.mark.parametrize("first", [9, pytest.param(14, marks=pytest.mark.slow)])  # within the second epoch, the last
def test_resume_after_max_steps_ends_with_the_same_weights(whole, cwd, first):
    constant = ("--model.schedule", "constant", "--model.schedule.warmup_epochs", 0)  # the same for all lengths
    assert fit(cwd, *constant, "--trainer.max_steps", first).code == 0
    assert (run_folder(cwd) / "checkpoints" / "best.ckpt").is_file()
    assert differing(resumed(cwd, *constant, "--trainer.max_steps", STEPS), whole(*constant)) == []
    assert [row["epoch"] for row in rows_of(run_folder(cwd) / "metrics.csv")] == ["0", "1", "2", ""]  # what ships


@pytest.mark.slow
def test_num_workers_does_not_change_the_weights(whole):
    assert differing(whole(*WORKERS), whole()) == []


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), (*EMA, *WORKERS), (*ACCUMULATE, *EMA), CHANGING], ids=str)
@pytest.mark.parametrize("save_every", [-1, 600])
def test_killed_at_every_step(whole, home, tmp_path, settings, save_every):
    steps = 6 if ACCUMULATE[0] in settings else STEPS
    bad = []
    for step in range(steps):
        cwd = another(home, tmp_path / f"step{step}")
        assert fit(cwd, *settings, trouble=("kill", step), save_every=save_every).code == -9
        if not (run_folder(cwd) / "checkpoints" / "last.ckpt").exists():
            assert step < (2 if save_every < 0 else 7)
            shutil.rmtree(cwd / "runs")
            assert fit(cwd, *settings).code == 0  # nothing was saved: it starts again
            bad += [step] if differing(weights(cwd), whole(*settings)) else []
        else:
            bad += [step] if differing(resumed(cwd, *settings), whole(*settings)) else []
        shutil.rmtree(cwd)
    assert bad == []


@pytest.mark.slow
def test_killed_in_validation(whole, cwd):
    assert fit(cwd, trouble=("kill in validation", 12)).code == -9
    assert differing(resumed(cwd), whole()) == []


def test_resume_after_a_kill_during_weight_selection_writes_the_model(cwd):
    start = cwd / "start.safetensors"
    module = model_of(class_names=("circle", "cross", "square"))
    checkpoint.save_model(start, module.spec, module.network.state_dict())
    settings = ("--model.weights", start, "--model.strategy.blend", "true", "--trainer.max_epochs", 1)
    settings += ("--model.calibrate", "true")
    assert fit(cwd, *settings).code == 0
    assert fit(cwd, *settings, trouble=("kill in blend", 6)).code == -9
    cut = run_folder(cwd, 1)
    assert not (cut / "model.safetensors").exists()
    done = fit(cwd, *settings, "--ckpt_path", cut / "checkpoints" / "last.ckpt")
    assert done.code == 0, done.out
    assert "Nothing was left to train" in done.out
    shipped = [run_folder(cwd, n) / "model.safetensors" for n in (0, 1)]
    whole, resumed = (checkpoint.load_model(file).state for file in shipped)
    assert differing(whole, resumed) == []
    records = [json.loads((run_folder(cwd, n) / "result.json").read_text()) for n in (0, 1)]
    for key in ("weights", "why", "metrics"):
        assert records[1][key] == records[0][key]
    rows = [(run_folder(cwd, n) / "metrics.csv").read_text().splitlines() for n in (0, 1)]
    assert [len(each) for each in rows] == [3, 3]  # the header, the epoch, what ships
    assert rows[1][2] == rows[0][2]
    # As if killed after the selection, before the results were written: nothing is selected or calibrated twice.
    for file in (shipped[0], shipped[0].with_name("result.json")):
        file.unlink()
    done = fit(cwd, *settings, "--ckpt_path", run_folder(cwd, 0) / "checkpoints" / "last.ckpt")
    assert done.code == 0
    assert "Selecting" not in done.out
    assert differing(whole, checkpoint.load_model(shipped[0]).state) == []
    again = json.loads((run_folder(cwd, 0) / "result.json").read_text())
    for key in ("weights", "why", "temperature", "head_strength", "metrics"):
        assert again[key] == records[0][key]
    # Asked for something else, it does it.
    resume = ("--ckpt_path", run_folder(cwd, 0) / "checkpoints" / "last.ckpt", "--model.target_precision", 0.9)
    assert "Selecting the weights" in fit(cwd, *settings, *resume).out


@pytest.mark.parametrize(
    ("trouble", "code"), [("term in blend", 143), pytest.param("ctrl-c in blend", 130, marks=pytest.mark.slow)]
)
def test_a_signal_while_weights_are_blended(cwd, trouble, code):
    """There is no step to finish any more."""
    settings = ("--model.strategy.blend", "true", "--trainer.max_epochs", 1)
    assert fit(cwd, *settings).code == 0
    done = fit(cwd, *settings, trouble=(trouble, 6))
    assert done.code == code
    assert "stopped after the last epoch; resume with: python -m rexnet_lit fit" in done.out
    done = fit(cwd, *settings, "--ckpt_path", run_folder(cwd, 1) / "checkpoints" / "last.ckpt")
    assert "Nothing was left to train" in done.out
    whole, resumed = (checkpoint.load_model(run_folder(cwd, n) / "model.safetensors").state for n in (0, 1))
    assert differing(whole, resumed) == []


def test_sigterm_in_the_last_validation(whole, cwd):
    done = fit(cwd, trouble=("term in validation", STEPS))
    assert done.code == 143
    assert "stopped by SIGTERM after batch 6 of 6 of epoch 3; resume with" in done.out
    done = fit(cwd, "--ckpt_path", "last")
    assert "Nothing was left to train" in done.out
    assert (run_folder(cwd) / "model.safetensors").is_file()
    assert differing(weights(cwd), whole()) == []


def test_best_ckpt_is_saved_at_a_validation(cwd):
    done = fit(cwd, "--trainer.val_check_interval", 4, "--trainer.max_epochs", 2)  # of 6 steps
    assert done.code == 0, done.out
    best, last = (run_folder(cwd) / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    assert checkpoint.read_ckpt(str(best))["global_step"] in (4, 10)
    assert checkpoint.read_ckpt(str(last))["global_step"] == 12


def test_without_a_validation_the_last_weights_ship(cwd):
    done = fit(cwd, "--trainer.limit_val_batches", 0, "--trainer.max_epochs", 1)
    assert done.code == 0, done.out
    assert "Fit finished. Kept: the last weights (nothing was validated)" in done.out
    best, last = (checkpoint.load_model(run_folder(cwd) / "checkpoints" / f"{n}.ckpt").state for n in ("best", "last"))
    assert differing(best, last) == []
    refused = fit(cwd, "--trainer.limit_val_batches", 0, "--model.schedule", "plateau")
    failed(refused, "model.schedule: plateau")


def test_resume_after_early_stopping_does_not_train(cwd):
    """Resumed, it writes the model that is missing, and trains no further."""
    early = cwd / "early.yaml"
    early.write_text(
        "trainer: {callbacks: [{class_path: EarlyStopping, init_args: "
        "{monitor: val/top1, mode: max, patience: 1, min_delta: 1.0}}]}"
    )
    settings = ("--config", early, "--trainer.max_epochs", 8)
    done = fit(cwd, *settings)
    assert done.code == 0
    assert "Fit finished by EarlyStopping. Kept: epoch " in done.out
    before = weights(cwd)
    (run_folder(cwd) / "model.safetensors").unlink()
    done = fit(cwd, *settings, "--ckpt_path", "last")
    assert done.code == 0, done.out
    assert "EarlyStopping has ended this run" in done.out
    assert differing(before, weights(cwd)) == []
    assert (run_folder(cwd) / "model.safetensors").is_file()


def test_several_validations_in_an_epoch(whole, cwd):
    """The summary's figures are those of the weights that ship; the last weights are saved too, when it is time."""
    settings = ("--trainer.val_check_interval", 1)
    done = fit(cwd, *settings)
    assert done.code == 0, done.out
    said = float(re.search(r"^  val/top1 +(\S+)", done.out, re.MULTILINE)[1])
    found = [event.value for event in logged(cwd, "val/top1")]
    assert said == pytest.approx(max(found), abs=1e-4)
    assert len(found) == STEPS
    assert float(rows_of(run_folder(cwd) / "metrics.csv")[-1]["val/top1"]) == pytest.approx(max(found))
    assert fit(cwd, *settings, trouble=("kill", 8), save_every=-1).code == -signal.SIGKILL
    done = fit(cwd, *settings, "--ckpt_path", "last")
    assert "after 8 steps" in done.out
    assert differing(whole(), weights(cwd, 1)) == []


def test_a_validation_within_an_accumulated_step(whole, cwd):
    """The gradients of half a step are in no checkpoint."""
    settings = ("--trainer.accumulate_grad_batches", 4, "--trainer.val_check_interval", 3)
    assert fit(cwd, *settings, trouble=("kill at batch 3", 3), save_every=-1).code == -signal.SIGKILL
    assert differing(resumed(cwd, *settings), whole(*settings)) == []
    settings += ("--trainer.max_steps", 1, "--model.calibrate", "false")  # which is batch 4: batch 3 is the best
    assert fit(cwd, *settings).code == 0
    best = run_folder(cwd, 1) / "checkpoints" / "best.ckpt"
    failed(fit(cwd, *settings, "--ckpt_path", best), "within a step of accumulated batches", "last.ckpt beside it")


def test_resume_from_a_copied_checkpoint_writes_the_model(cwd):
    assert fit(cwd, "--trainer.max_epochs", 1, "--model.optimizer.lr", 1e-9).code == 0
    shutil.copy(run_folder(cwd) / "checkpoints" / "last.ckpt", cwd / "copied.ckpt")
    shutil.rmtree(cwd / "runs")
    done = fit(cwd, "--ckpt_path", "copied.ckpt", "--model.optimizer.lr", 1e-9)
    assert done.code == 0, done.out
    assert "Fit finished" in done.out
    assert {f.name for f in run_folder(cwd).rglob("*") if f.suffix in (".ckpt", ".safetensors")} >= {
        "best.ckpt", "last.ckpt", "model.safetensors",
    }  # fmt: skip


def test_a_second_checkpoint_callback_does_not_change_the_model(cwd):
    own = ("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_epochs", 1)
    assert fit(cwd, *own, "--trainer.callbacks.save_top_k", -1).code == 0
    folder = run_folder(cwd)
    shipped = checkpoint.load_model(folder / "model.safetensors").state
    assert differing(shipped, checkpoint.load_model(folder / "checkpoints" / "best.ckpt").state) == []


def test_resume_from_another_callbacks_checkpoint_keeps_the_best_score(cwd):
    """It is written before ours: it does not know the validation that it follows."""
    own = ("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_epochs", 1)
    own = (*own, "--trainer.callbacks.filename", "own-{epoch}", "--trainer.callbacks.save_on_train_epoch_end", "true")
    assert fit(cwd, *own, trouble=("kill", 7)).code == -signal.SIGKILL
    folder = run_folder(cwd) / "checkpoints"
    known = checkpoint.read_ckpt(str(folder / "best.ckpt"))["callbacks"]
    (ours,) = (key for key in known if key.startswith("RunCheckpoint"))
    assert checkpoint.read_ckpt(str(folder / "own-epoch=0.ckpt"))["callbacks"][ours]["best_model_score"] is None
    assert fit(cwd, *own, "--ckpt_path", folder / "own-epoch=0.ckpt", "--trainer.max_steps", 7).code == 0
    last = checkpoint.read_ckpt(str(folder / "last.ckpt"))["callbacks"][ours]
    assert last["best_model_score"] == known[ours]["best_model_score"]


def test_metrics_csv_has_each_epoch_once_after_a_resume(cwd):
    assert fit(cwd, trouble=("kill", 14)).code == -9
    resumed(cwd, "--trainer.log_every_n_steps", 1)
    rows = rows_of(run_folder(cwd) / "metrics.csv")
    assert [row["epoch"] for row in rows if row["val/top1"]] == ["0", "1", "2", ""]
    assert [row["epoch"] for row in rows if row["train/loss"]] == ["0", "1", "2"]


def test_tensorboard_has_each_step_once_after_a_resume(whole_run, cwd):
    settings = ("--trainer.log_every_n_steps", 1)
    assert fit(cwd, *settings, trouble=("term", 8)).code == 143
    resumed(cwd, *settings)
    found, wanted = (logged(where, "train/loss_step") for where in (cwd, whole_run(*settings)))
    assert [(event.step, event.value) for event in found] == [(event.step, event.value) for event in wanted]


def test_resume_without_the_starting_weights_file(cwd):
    start = cwd / "start.safetensors"
    module = model_of(class_names=("circle", "cross", "square"))
    checkpoint.save_model(start, module.spec, module.network.state_dict())
    settings = ("--model.weights", start, "--model.optimizer.lr", "null")
    assert fit(cwd, *settings).code == 0
    assert fit(cwd, *settings, trouble=("kill", 14)).code == -signal.SIGKILL
    start.unlink()
    last = run_folder(cwd, 1) / "checkpoints" / "last.ckpt"
    done = fit(cwd, *settings, "--ckpt_path", last)
    assert done.code == 0, done.out
    assert differing(weights(cwd, 0), weights(cwd, 1)) == []
    config = yaml.safe_load((run_folder(cwd, 1) / "config.yaml").read_text())
    assert config["model"]["weights"] == str(start)
    failed(fit(cwd, *settings), "model.weights: there is no file")


def test_a_run_folder_that_cannot_be_written(run, monkeypatch):
    folder = run_folder(run)
    seen = []
    monkeypatch.setattr(os, "access", lambda path, mode: seen.append(Path(path)) or False)
    with pytest.raises(UserError, match=r"trainer.default_root_dir: '.*version_0/checkpoints' cannot be written"):
        check_writable("trainer.default_root_dir", folder / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match=r"trainer.default_root_dir: '.*lightning_logs' cannot be written; change"):
        run_folders.claim(folder.parent.parent)
    assert seen == [folder / "checkpoints", folder.parent]


def test_a_trainer_can_fit_again_after_a_stop():
    callback, stop = RunCheckpoint(), Stopped(143, "told")
    callback._stop = stop
    with pytest.raises(Stopped) as raised:
        callback.on_train_batch_start(None, None, None, 0)
    assert raised.value is stop
    callback.on_train_epoch_start(None, None)


def test_a_fit_restores_the_signal_handlers(tmp_path, shapes):
    """Lightning's own would stay, which ignores a SIGTERM."""
    before = [signal.getsignal(number) for number in process.stop_signals()]
    trainer = trainer_of(tmp_path, max_epochs=1, enable_checkpointing=True, callbacks=[RunCheckpoint()])
    trainer.fit(model_of(), data_of(shapes))
    assert [signal.getsignal(number) for number in process.stop_signals()] == before


# --- told to stop ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trouble", "code", "where"),
    [
        (("term", 8), 143, "SIGTERM after batch 3 of 6 of epoch 2"),
        (("ctrl-c", 8), 130, "SIGINT after batch 3 of 6 of epoch 2"),
        (("terminal closed", 8), 129, "SIGHUP after batch 3 of 6 of epoch 2"),
        # It validates, then saves.
        pytest.param(("term", 11), 143, "SIGTERM after batch 6 of 6 of epoch 2", marks=pytest.mark.slow),
        (("term in validation", 12), 143, "SIGTERM after batch 6 of 6 of epoch 2"),
    ],
    ids=str,
)
def test_a_signal_saves_and_prints_the_command_to_resume(whole_run, cwd, trouble, code, where):
    done = fit(cwd, trouble=trouble)
    assert done.code == code, done.out
    assert where in done.out
    assert "Traceback" not in done.out
    config, last = re.search(
        r"resume with: python -m rexnet_lit fit --config (\S+) --ckpt_path (\S+)$", done.out, re.M
    ).groups()
    assert checkpoint.read_ckpt(str(cwd / last))["global_step"] == int(where.split()[3]) + 6
    if trouble[0].startswith("term"):  # what was saved is the same for all signals
        done = command_line(cwd, "fit", "--config", config, "--ckpt_path", last)
        assert done.code == 0, done.out
        assert differing(weights(cwd), weights(whole_run())) == []
        assert epoch_rows(cwd) == epoch_rows(whole_run())
        assert yaml.safe_load((cwd / config).read_text())["trainer"]["max_epochs"] == 3
    else:
        assert (cwd / config).is_file()


def epoch_rows(cwd):
    """What a run's record says of its epochs, the mean loss of one that was interrupted too."""
    rows = [row for row in rows_of(run_folder(cwd) / "metrics.csv") if row["train/loss"] or row["val/loss"]]
    return [{name: value for name, value in row.items() if name != "images/s"} for row in rows]


def logged(cwd, tag):
    """What TensorBoard shows of a run."""
    return EventAccumulator(str(run_folder(cwd))).Reload().Scalars(tag)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_during_an_import_exits_at_once(tmp_path, number):
    """numpy looks for what half of it lacks until the stack is full."""
    lines = ("import os", "try:", f"    os.kill(os.getpid(), {int(number)})", "finally:", "    print('half a package')")
    (tmp_path / "half.py").write_text("\n".join(lines))
    default = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)"  # not ignored, as under nohup
    code = f"{default}; from rexnet_lit.utils import process; process.install_signal_handlers(); import half"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "")


def test_sighup_stays_ignored_under_nohup():
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup's
    try:
        assert process.stop_signals() == (signal.SIGTERM, signal.SIGINT)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert signal.SIGHUP in process.stop_signals()
    finally:
        signal.signal(signal.SIGHUP, handler)


@pytest.mark.slow
def test_sigterm_with_a_validation_after_each_step(whole, cwd):
    done = fit(cwd, "--trainer.val_check_interval", 1, trouble=("term", 8))
    assert "SIGTERM after batch 3 of 6 of epoch 2" in done.out
    assert differing(resumed(cwd, "--trainer.val_check_interval", 1), whole()) == []


@pytest.mark.parametrize(("trouble", "code"), [("term at start-up", 143), ("ctrl-c at start-up", 130)])
def test_a_signal_at_start_up(cwd, trouble, code):
    done = fit(cwd, trouble=(trouble, 0))
    assert done.code == code
    assert "Traceback" not in done.out
    assert not (cwd / "runs").exists()


def test_ctrl_c_during_validate(run):
    argv = ("validate", "--ckpt_path", run_folder(run) / "model.safetensors", "--data.num_workers", 0)
    done = command_line(run, *argv, trouble=("ctrl-c in validation", 0))
    assert done.code == 130, done.out
    assert "Traceback" not in done.out


def test_sigterm_to_every_process(whole, cwd):
    done = fit(cwd, "--data.num_workers", 2, trouble=("term to all", 8))
    assert done.code == 143, done.out
    assert "stopped by SIGTERM after batch 3 of 6 of epoch 2; resume with" in done.out
    assert differing(resumed(cwd), whole()) == []


def test_sigterm_in_a_fork(cwd):
    done = fit(cwd, "--data.num_workers", 1, trouble=("term in a fork", 0))
    assert done.code == 143, done.out
    assert "SIGTERM after batch 1 of 6 of epoch 1; resume with" in done.out


def test_training_continues_without_a_terminal(whole, cwd):
    done = fit(cwd, trouble=("no screen", 7))
    assert done.code == 0
    assert done.out.count("epoch") == 1
    assert differing(weights(cwd), whole()) == []


def test_closed_standard_streams_are_not_reused_for_files(tmp_path):
    script = (
        "import os, sys; [os.close(n) for n in (0, 1, 2)]\n"
        "from rexnet_lit.utils import process; process.open_missing_streams(); print('lost')\n"
        "file = open('file', 'w'); os.write(1, b'lost'); assert file.fileno() > 2\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, timeout=60)
    assert done.returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


def test_a_screen_without_the_characters_of_a_name(monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", screen)
    process.escape_unencodable()
    print("caf\u00e9 \u3084 \udcff", flush=True)
    assert screen.buffer.getvalue() == b"caf\xe9 \\u3084 \\udcff\n"


# --- what may fail --------------------------------------------------------------------------------


def failed(done, *expected):
    assert done.code == 2, done.out
    assert "Traceback" not in done.out
    line = done.out.splitlines()[-1]
    assert line.startswith("rexnet-lit: error: ")
    for words in expected:
        assert words in line
    return line


def test_nan_loss(whole, cwd):
    done = fit(cwd, trouble=("nan", 8))
    line = failed(done, "the loss is nan at epoch 2, batch 3 (images '", "model.optimizer.lr", "is from before")
    named = re.findall(r"'(\S+?/\S+?\.(?:png|jpg))'", line)
    assert len(named) == 4
    assert all((cwd / "data" / name).is_file() for name in named)
    assert differing(resumed(cwd), whole()) == []  # from the last good epoch
    failed(fit(cwd, trouble=("nan", 2)), "the loss is nan at epoch 1, batch 3", "nothing was saved yet")


def test_a_full_disk(whole, cwd):
    done = fit(cwd, trouble=("full disk", 7))
    failed(done, ".ckpt: the checkpoint cannot be written (File too large)", "the previous one is unchanged")
    folder = run_folder(cwd) / "checkpoints"
    assert {f.name for f in folder.iterdir()} <= {"best.ckpt", "last.ckpt", checkpoint.PREVIOUS}  # no debris
    assert checkpoint.read_ckpt(str(folder / "last.ckpt"))["global_step"] == 6
    assert differing(resumed(cwd), whole()) == []


@pytest.mark.parametrize("trouble", ["worker dies", "worker dies amid a batch"])
def test_a_worker_dies(whole, cwd, trouble):
    done = fit(cwd, "--data.num_workers", 1, trouble=(trouble, 8))
    failed(done, "a data loading worker died", "memory", "data.num_workers")
    if trouble == "worker dies":
        assert differing(resumed(cwd), whole()) == []


def test_a_worker_without_shared_memory(cwd):
    """What a /dev/shm that is too small does: the kernel answers a write there with a bus error."""
    done = fit(cwd, "--data.num_workers", 1, trouble=("worker's bus error", 8))
    failed(done, "a data loading worker died", "/dev/shm", "data.num_workers")  # noqa: S108


def test_training_continues_without_logs(whole, cwd):
    done = fit(cwd, trouble=("no room for logs", 7))
    assert done.code == 0, done.out
    assert done.out.count("RunTensorBoardLogger: the log in ") == 1
    assert done.out.count("the record of the run cannot be written") == 1
    assert "cannot be written (No space left on device); training continues without it" in done.out
    assert differing(weights(cwd), whole()) == []
    with (run_folder(cwd) / "metrics.csv").open() as file:  # what was written before is still there
        assert [row for row in csv.DictReader(file) if row["val/loss"]]


def test_a_worker_hangs(cwd):
    done = fit(cwd, "--data.num_workers", 1, trouble=("worker hangs", 0))
    line = failed(done, "a data loading worker gave nothing for 3 s", "data.num_workers")
    assert re.search(r"before the batch of '\S+/\S+\.(png|jpg)'", line)


# --- what a resume refuses ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(home):
    """A run of one epoch, to be resumed."""
    cwd = another(home, home.parent / "stopped")
    assert fit(cwd, "--trainer.max_epochs", 1).code == 0
    return cwd


@pytest.fixture
def run(home, stopped, cwd):
    shutil.copytree(stopped / "runs", cwd / "runs")
    return cwd


CHANGES = (
    ("--seed_everything", 5, "seed_everything (0 then, 5 now)"),
    ("--trainer.accumulate_grad_batches", 2, "trainer.accumulate_grad_batches (1 then, 2 now)"),
    ("--trainer.gradient_clip_val", 1, "trainer.gradient_clip_val (None then, 1 now)"),
    ("--model.loss.label_smoothing", 0, "model.loss.label_smoothing (0.1 then, 0.0 now)"),
    ("--data.batch_size", 6, "data.batch_size (4 then, 6 now)"),
    ("--data.sampler", "balanced", "data.sampler (shuffle then, balanced now)"),
    ("--data.image_size", 64, "data.image_size (32 then, 64 now)"),
    ("--data.augment.hflip", 0.3, "data.augment.hflip"),
)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([part for option, value, _ in CHANGES for part in (option, value)], [words for *_, words in CHANGES]),
        (("--config", CONFIGS / "hardware" / "ddp_sim.yaml"), ["processes (1 then, 2 now)"]),
        (("--model.grad_checkpointing", "true"), ["model.grad_checkpointing (False then, True now)"]),
        # The checkpoint's own would be used, whatever is said.
        (
            (
                "--model.optimizer.momentum",
                0.8,
                "--model.optimizer.name",
                "sgd",
                "--model.ema",
                0.9,
                "--accept_changes",
                "true",
            ),
            [
                "model.optimizer.momentum (0.9 then, 0.8 now)",
                "model.optimizer.name (adamw then, sgd now)",
                "model.ema (0.0 then, 0.9 now)",
            ],
        ),
        (
            ("--model.optimizer.lr", 1, "--model.ema", 0.9, "--data.sampler", "balanced", "--model.loss", "focal"),
            [
                "model.optimizer.lr (0.004 then, 1.0 now)",
                "model.ema (0.0 then, 0.9 now)",
                "data.sampler (shuffle then, balanced now)",
                "model.loss.name (cross_entropy then, focal now)",
            ],
        ),
        (
            ("--model.optimizer", "{class_path: torch.optim.SGD, init_args: {lr: 0.1}}", "--accept_changes", "true"),
            ["model.optimizer.class_path (None then, torch.optim.SGD now)", "model.optimizer.init_args"],
        ),
        (("--model.backbone", "rexnet_130"), ["model.backbone is rexnet_100, this run's is rexnet_130"]),
        (("--model.head", "mlp"), ["model.head.name is linear, this run's is mlp"]),
    ],
    ids=("settings", "processes", "memory", "optimizer", "both kinds", "own", "backbone", "head"),
)
def test_resume_refuses_other_settings(run, settings, expected):
    before = contents(run_folder(run))
    line = failed(fit(run, *settings, "--ckpt_path", "last"), *expected)
    fixed = any(words in text for text in expected for words in ("momentum", "ema", "init_args", "backbone", "head"))
    assert ("--accept_changes true" in line, "model.weights" in line) == (not fixed, fixed)
    assert contents(run_folder(run)) == before


def contents(folder):
    """All files but the lock, which a process that opens and closes it would lose."""
    return {f.relative_to(folder): f.read_bytes() for f in folder.rglob("[!.]*") if f.is_file()}


def test_resume_with_more_epochs(run):
    done = fit(run, "--ckpt_path", "last", "--trainer.max_epochs", 2)
    assert done.code == 0, done.out
    assert "note: trainer.max_epochs was 1 and is 2: the schedule changes with it" in done.out


def test_resume_refuses_a_run_that_is_still_running(run):
    with run_folders.lock(run_folder(run)):
        before = contents(run_folder(run))
        failed(fit(run, "--ckpt_path", "last"), "version_0: another process is training in this run folder")
        assert contents(run_folder(run)) == before
    assert fit(run, "--ckpt_path", "last", "--trainer.max_epochs", 2).code == 0


def test_a_removed_lock_file_locks_nothing(tmp_path):
    """Its holder had it until after another opened it."""
    lock = tmp_path / ".lock"
    with run_folders.lock(tmp_path):
        orphan = lock.open("w")
    with run_folders.lock(tmp_path):
        assert not os.path.samestat(os.fstat(orphan.fileno()), lock.stat())
    orphan.close()


def test_a_lock_file_removed_while_locking_is_refused(tmp_path, monkeypatch):
    """Its holder has ended after this process opened the file, and before it locks it."""

    def remove_then_lock(file, operation):
        (tmp_path / ".lock").unlink()
        lockf(file, operation)

    lockf = run_folders.fcntl.lockf
    monkeypatch.setattr(run_folders.fcntl, "lockf", remove_then_lock)
    with pytest.raises(UserError, match="another process is training"), run_folders.lock(tmp_path):
        pass
    monkeypatch.undo()
    with run_folders.lock(tmp_path):
        assert (tmp_path / ".lock").is_file()


def test_runs_that_start_at_once_get_folders_of_their_own(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(lambda _: run_folders.claim(tmp_path), range(40)))
    assert sorted(int(folder.name[8:]) for folder in claimed) == list(range(40))


def test_a_run_that_wrote_nothing_leaves_no_folder(tmp_path):
    folder, other = run_folders.claim(tmp_path), run_folders.claim(tmp_path)
    with run_folders.lock(folder):
        pass
    run_folders.remove_if_empty(folder)
    (other / "config.yaml").touch()
    run_folders.remove_if_empty(other)
    assert [f.name for f in (tmp_path / "lightning_logs").iterdir()] == ["version_1"]


def test_max_steps_before_the_first_validation_and_fast_dev_run(cwd):
    done = fit(cwd, "--trainer.max_steps", 2)
    assert done.code == 0, done.out
    assert "Fit finished. Kept: the last weights (nothing was validated)" in done.out
    assert (run_folder(cwd) / "model.safetensors").is_file()
    done = fit(cwd, "--trainer.fast_dev_run", "true")
    assert done.code == 0, done.out
    assert "model.safetensors" not in done.out
    assert not run_folder(cwd, 1).exists()


def test_run_folder_without_a_logger(cwd):
    (run_folder(cwd) / "checkpoints").mkdir(parents=True)
    assert fit(cwd, "--trainer.logger", "false", "--trainer.max_epochs", 1).code == 0
    names = {file.name for file in run_folder(cwd, 1).iterdir()}
    assert names == {"checkpoints", "config.yaml", "metrics.csv", "model.safetensors", "result.json"}


def test_resume_refuses_changed_images_unless_accepted(run, home, make_shapes):
    (run / "data").unlink()
    shutil.copytree(home / "data", run / "data")
    shutil.copy(run / "data/train/circle/train_000.jpg", run / "data/train/circle/new.jpg")
    failed(
        fit(run, "--ckpt_path", "last"), "train images (24, fingerprint", "then, 25, fingerprint", "--accept_changes"
    )
    done = fit(run, "--ckpt_path", "last", "--accept_changes", "true")
    assert done.code == 0, done.out


def test_resume_refuses_other_classes(run, make_shapes):
    (run / "data").unlink()
    make_shapes(run / "data", train=8, val=3, test=0, classes=("x", "y", "z"))
    failed(fit(run, "--ckpt_path", "last"), "classes (3: circle, cross, square) differ", "x, y, z", "model.weights")


def odd(run, change):
    """A checkpoint that is whole, but was made by somebody else."""
    content = checkpoint.read_ckpt(str(run_folder(run) / "checkpoints" / "last.ckpt"))
    change(content)
    checkpoint.write_ckpt(content, run / "odd.ckpt")
    return fit(run, "--ckpt_path", "odd.ckpt")


def test_c43_missing_and_unknown_tensors_are_counted(run):
    def change(content):
        state = content["state_dict"]
        state["other"] = state.pop("network.stem.conv.weight")
        state["network.head.fc.bias"] = torch.zeros(9)

    failed(odd(run, change), "1 tensors missing, 1 unknown, 1 of another shape", "network.stem.conv.weight")


@pytest.mark.parametrize("key", ["optimizer_states", "loops", "lr_schedulers"])
def test_a_checkpoint_that_cannot_be_restored_is_one_line(run, key):
    failed(
        odd(run, lambda content: content.update({key: {"junk": [1]}})), "odd.ckpt cannot be resumed (", "model.weights"
    )


def test_resume_takes_the_newest_valid_checkpoint(run):
    folder = run_folder(run) / "checkpoints"
    shutil.copy(folder / "last.ckpt", folder / checkpoint.PREVIOUS)
    content = bytearray((folder / "last.ckpt").read_bytes())
    content[len(content) // 2] ^= 1  # a flipped bit, which torch loads in silence
    (folder / "last.ckpt").write_bytes(content)
    with pytest.raises(UserError, match=r"last\.ckpt: damaged"):
        checkpoint.read_ckpt(str(folder / "last.ckpt"))
    done = fit(run, "--ckpt_path", "last")
    assert done.code == 0
    assert re.search(r"^skipped: \S+last\.ckpt: damaged", done.out, re.M)
    assert re.search(rf"^resuming \S+{re.escape(checkpoint.PREVIOUS)}, after 6 steps$", done.out, re.M)
    (folder / "last.ckpt").write_bytes(content)
    (folder / checkpoint.PREVIOUS).write_bytes(content[: len(content) // 2])
    line = failed(fit(run, "--ckpt_path", "last"), "there is no checkpoint to resume below runs")
    assert line.count("skipped: ") == 2


def test_every_flipped_byte_is_seen(tmp_path):
    path = tmp_path / "last.ckpt"
    checkpoint.write_ckpt({"weights": torch.arange(6.0)}, path)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        with pytest.raises(UserError, match=r"damaged|refused"):
            checkpoint.read_ckpt(str(path))


def test_nothing_to_resume(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint to resume"):
        run_folders.find_last_checkpoint([tmp_path])


def test_resume_refuses_a_weights_file(run):
    model = run_folder(run) / "model.safetensors"
    failed(fit(run, "--ckpt_path", model), "ckpt_path: ", "model.weights")


def test_resume_of_a_moved_run_keeps_the_best_score(run):
    shutil.move(run / "runs", run / "elsewhere")
    last = run / "elsewhere/lightning_logs/version_0/checkpoints/last.ckpt"
    done = fit(run, "--ckpt_path", last)
    assert done.code == 0, done.out
    assert not (run / "runs").exists()
    best = checkpoint.read_ckpt(str(last.with_name("best.ckpt")))
    state = next(v for k, v in best["callbacks"].items() if k.startswith("RunCheckpoint"))
    tops = [float(row["val/top1"]) for row in rows_of(last.parents[1] / "metrics.csv") if row["epoch"]]
    assert len(tops) == 3
    assert float(state["best_model_score"]) == pytest.approx(max(tops))


def test_monitor_of_a_metric_that_is_not_logged(cwd):
    config = {"trainer": {"callbacks": [{"class_path": "EarlyStopping", "init_args": {"monitor": "val/los"}}]}}
    (cwd / "early.yaml").write_text(yaml.safe_dump(config))
    failed(fit(cwd, "--config", "early.yaml"), "EarlyStopping monitors 'val/los'", "did you mean 'val/loss'")


# --- the save itself ------------------------------------------------------------------------------


SAVE_CALLS = [
    (os, n) for n in ("open", "close", "fsync", "fdopen", "replace", "rename", "chmod", "unlink", "umask", "link")
]
SAVE_CALLS += [(tempfile, "mkstemp")]


def save(folder: Path, value: float) -> None:
    checkpoint.write_ckpt({"value": torch.full((4096,), value)}, folder / "last.ckpt")


def save_the_best(folder: Path, value: float) -> None:
    checkpoint.write_ckpt({"value": torch.full((4096,), value)}, folder / "best.ckpt")
    link_or_copy(folder / "best.ckpt", folder / "last.ckpt", folder / checkpoint.PREVIOUS)


def save_and_die(save, folder: Path, value: float, last_call: int) -> int:
    """Save in a forked process that ends, without any clean-up, at so many calls; return its exit code."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    seen = 0

    def guarded(call):
        def wrapper(*args, **kwargs):
            nonlocal seen
            seen += 1
            if seen == last_call:
                os._exit(9)
            return call(*args, **kwargs)

        return wrapper

    for module, name in SAVE_CALLS:
        setattr(module, name, guarded(getattr(module, name)))
    save(folder, value)
    os._exit(0)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # the child only writes a file
@pytest.mark.parametrize("save", [save, save_the_best])
def test_killed_at_every_boundary_of_a_save(tmp_path, save):
    """The process ends before each call that a save makes to the system: one of two generations is always whole."""
    for last_call in range(1, 50):
        save(tmp_path, 1.0)
        save(tmp_path, 2.0)
        code = save_and_die(save, tmp_path, 3.0, last_call)
        files = [tmp_path / name for name in ("last.ckpt", checkpoint.PREVIOUS) if (tmp_path / name).exists()]
        values = [checkpoint.read_ckpt(str(file))["value"][0].item() for file in files]
        assert values in ([2.0, 1.0], [2.0], [3.0, 2.0]), last_call
        if save is save_the_best:  # never older than the last, which a resume would not make up for
            assert checkpoint.read_ckpt(str(tmp_path / "best.ckpt"))["value"][0].item() in (2.0, 3.0)
            assert values[0] < 3.0 or checkpoint.read_ckpt(str(tmp_path / "best.ckpt"))["value"][0].item() == 3.0
        if code == 0:
            break
    assert code == 0
    assert last_call > 6


class Scaler:
    """A scale that halves at every step, as under gradients that always overflow."""

    scale = 2.0**16

    def get_scale(self) -> float:
        self.scale /= 2
        return self.scale


def test_a71_steps_that_overflow_are_counted_and_too_many_end_the_run(capsys):
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=Scaler()), current_epoch=4)
    guard = NaNGuard()
    for _ in range(3):
        guard.on_train_batch_end(trainer, None, None, None, 6)
    guard.on_fit_end(trainer, None)
    assert "2 steps were skipped because 16-bit gradients overflowed" in capsys.readouterr().out
    trainer.precision_plugin.scaler.scale = 2.0**-10
    with pytest.raises(UserError, match=r"26 steps were skipped until epoch 5, batch 7; .* bf16-mixed"):
        guard.on_train_batch_end(trainer, None, None, None, 6)


def test_nan_loss_on_a_gpu_names_its_batch():
    """On a GPU the guard looks at ten losses at once."""
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_idx=0))
    trainer = SimpleNamespace(current_epoch=1, fit_loop=loop, train_dataloader=None, checkpoint_callbacks=[])
    guard, losses = NaNGuard(), [1.0, 1.0, 1.0, float("nan"), *([1.0] * 6)]
    with pytest.raises(UserError, match="the loss is nan at epoch 2, batch 4;"):  # noqa: PT012
        for batch, loss in enumerate(losses):
            loop.epoch_loop.batch_idx = batch
            guard.on_before_backward(trainer, None, OnGpu(loss))


class OnGpu:
    """A loss that claims to be on a GPU."""

    device = SimpleNamespace(type="cuda")

    def __init__(self, value):
        self.value = value

    def detach(self):
        return torch.tensor(self.value)


def two_processes(cwd, overlay, *settings):
    """Start a long run; return the main process, the other's number, and the log, in the second epoch."""
    log = cwd / "log"
    argv = ["fit", "--config", CONFIGS / "quickstart.yaml", "--config", overlay, "--data.root", "data"]
    argv += ["--trainer.default_root_dir", "runs", "--data.num_workers", 0, "--data.batch_size", 4]
    with log.open("w") as out:
        command = [sys.executable, "-m", "rexnet_lit", *map(str, (*argv, *settings)), "--trainer.max_epochs", "100"]
        main = subprocess.Popen(command, cwd=cwd, stdout=out, stderr=out)
    waited = time.monotonic()
    while "epoch 2/" not in log.read_text():
        assert main.poll() is None, log.read_text()
        assert time.monotonic() - waited < 200
        time.sleep(0.2)
    (child,) = Path(f"/proc/{main.pid}/task/{main.pid}/children").read_text().split()
    return main, int(child), log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "rank", "settings"),
    [(15, 0, ()), (15, 1, ()), (15, 1, ("--trainer.val_check_interval", 1)), (9, 0, ()), (9, 1, ())],
)
def test_a62_a68_a_signal_to_one_of_two_processes_ends_both(cwd, number, rank, settings):
    """SIGTERM: one save, both exit with 143. SIGKILL: the other ends too, and says so; no process stays."""
    main, child, log = two_processes(cwd, CONFIGS / "hardware" / "ddp_sim.yaml", *settings)
    os.kill((main.pid, child)[rank], number)
    code, text = main.wait(60), log.read_text()
    waited = time.monotonic()
    while Path(f"/proc/{child}").exists() and time.monotonic() - waited < 60:
        time.sleep(0.2)
    assert not Path(f"/proc/{child}").exists()
    if number == 15:
        assert code == 143
        assert re.search(r"stopped by SIGTERM after batch \d+ of \d+ of epoch \d+; resume with", text)
        checkpoint.read_ckpt(str(run_folder(cwd) / "checkpoints" / "last.ckpt"))
    else:  # it misses the other, or Lightning, which looks every five seconds, does
        assert code in ((-9,) if rank == 0 else (2, -9)), text
        said = f"another process of this run has ended|process with PID {child} terminated"
        assert re.search(said, log.read_text())
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_a63_timeout_for_a_stalled_process(cwd):
    """By default torch's half hour."""
    strategy = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"timeout": "0:00:10"}}
    overlay = {"trainer": {"accelerator": "cpu", "devices": 2, "strategy": strategy}}
    (cwd / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    main, child, log = two_processes(cwd, cwd / "overlay.yaml")
    os.kill(child, signal.SIGSTOP)
    try:
        assert main.wait(60) == 2
    finally:
        os.kill(child, signal.SIGKILL)
    assert "another process of this run has not answered for 10 s" in log.read_text().splitlines()[-1]
    assert "Traceback" not in log.read_text()

"""The command `plan`: its arithmetic by hand, and that it writes nothing."""

from __future__ import annotations

import numpy as np
import pytest
from cli_tools import write_dataset

from rexnet_lit.cli import main
from rexnet_lit.data.folder import Samples, scan
from rexnet_lit.search import plan
from rexnet_lit.search.plan import ShortFit, Stopwatch, Work

TRAINER = {
    "limit_train_batches": None, "limit_val_batches": None, "max_epochs": 5, "max_steps": -1,
    "accumulate_grad_batches": 1, "check_val_every_n_epoch": 1,
}  # fmt: skip


def watch(steps, validations, **times):
    found = Stopwatch()
    found.steps, found.validations, found.times = steps, validations, times
    return found


def test_times_by_hand():
    """Steps of 2 s after two slow ones, 4 s of validation, 1 s for the rest of an epoch, 2 s to prepare 100 images.

    Choosing `hflip` takes another second for 80 + 2 x 20 images; the fit looks at 500 + 2 x 200.
    """
    cold = ShortFit(watch([[6.0, 1.0, 1.0]], [1.0]), 4, 12, 10, 0)
    warm = watch([[5, 3, *[2] * 8], [2.5, *[2] * 9]], [6.0, 4.0], setup=0, start=3, trained=60, end=62)
    warm.choice = 1.0
    warm.epochs = [3.5, 32.0, 32.0 + 20 + 4 + 1]
    found = plan.estimate_times(cold, ShortFit(warm, 8, 80, 20, 0), Work(800, 200, 100, 5, 5, selects=True), 7.0, 10)
    assert found.step == 2
    assert found.training == 2 * 100 * 5
    assert found.validation == 4 * 10 * 5 + 2 * 10  # the first one also reads the images
    assert found.saving == 5
    assert found.start == 7 + 5 + 0.5 + 900 / 120 + 2 * 10
    assert found.end == 20
    assert found.total == 1000 + 220 + 5 + 40 + 20


def test_memory_is_on_the_line_through_two_fits():
    cold, warm = (ShortFit(Stopwatch(), batch, 99, 9, 1000 + 10 * batch) for batch in (16, 32))
    assert plan.memory_of(cold, warm, 128) == 1000 + 1280
    assert plan.largest_batch(cold, warm, 3000, 10_000) == 168  # 1000 + 10 b <= 0.9 * 3000, a multiple of 8
    assert plan.largest_batch(cold, warm, 3000, 50) == 48
    assert plan.largest_batch(cold, warm, 1000, 50) == 0


@pytest.mark.parametrize(
    ("settings", "devices", "expected"),
    [
        ({}, 1, Work(100, 30, 13, 5, 5, False)),
        ({}, 2, Work(50, 15, 7, 5, 5, False)),
        ({"limit_train_batches": 4, "limit_val_batches": 0.5}, 1, Work(100, 15, 4, 5, 5, False)),
        ({"max_steps": 13, "accumulate_grad_batches": 2}, 1, Work(100, 30, 13, 2, 2, False)),
        ({"check_val_every_n_epoch": 2}, 1, Work(100, 30, 13, 5, 2, False)),
    ],
)
def test_work_by_hand(settings, devices, expected):
    assert plan.work_of({**TRAINER, **settings}, {"train": 100, "val": 30}, 8, devices) == expected


def test_every_class_is_measured(tmp_path):
    root = write_dataset(tmp_path, train=5)
    samples: Samples = scan(root).splits["train"]
    assert np.bincount(plan.some_of_each_class(samples, 2).targets).tolist() == [1, 1, 1]
    assert np.bincount(plan.some_of_each_class(samples, 7).targets).tolist() in ([3, 2, 2], [2, 3, 2], [2, 2, 3])


@pytest.mark.slow
def test_the_command_writes_nothing(tmp_path, monkeypatch, capsys):
    root = write_dataset(tmp_path / "data", train=4, val=2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    before = set(root.rglob("*"))
    command = ["plan", str(root), "--config", "quickstart", "--data.batch_size", "4", "--data.num_workers", "0"]
    assert main.main(command) == 0
    screen = capsys.readouterr().out
    assert "3 per epoch, 24 in 8 epochs" in screen
    assert "12 train, 6 val" in screen
    assert "time in all" in screen
    assert "4 (this fit)" in screen
    assert "a batch of 8 fits, and larger ones would have more images than there are to train on" in " ".join(
        screen.split()
    )
    assert "Fit finished" not in screen
    assert set(root.rglob("*")) == before
    assert list((tmp_path / "work").iterdir()) == []

"""The README's commands run, as they are written, and its table names settings that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from rexnet_lit.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]


def test_every_command_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    runs = [shlex.split(c)[3:] for c in COMMANDS if c.startswith("python -m rexnet_lit ")]
    assert len(runs) >= 6
    for argv in runs:
        # The same command, but a short fit: what it learns is tested elsewhere.
        short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2"] if argv[0] == "fit" else []
        assert main.main([*argv, *short]) == 0, (argv, capsys.readouterr().err)
    assert (tmp_path / "lightning_logs/version_0/report/report.html").is_file()
    assert (tmp_path / "digits.onnx").is_file()


def test_make_targets_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    wanted = [c.split()[1] for c in COMMANDS if c.startswith("make ")]
    assert wanted == ["quickstart", "test"]
    assert set(wanted) <= set(targets)


def test_the_settings_exist(capsys):
    assert main.main(["fit", "--help"]) == 0
    help_text = capsys.readouterr().out
    for key in re.findall(r"^\| `((?:data|model)\.\w+)`", README, re.MULTILINE):
        assert f"--{key}" in help_text, key


@pytest.mark.parametrize("name", re.findall(r"`?(configs/[\w/.]+\.yaml)", README))
def test_the_configs_exist(name):
    assert (ROOT / name).is_file()

"""What only a GPU shows; skipped where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from module_tools import data_of, model_of, trainer_of
from run_tools import CONFIGS, differing, weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_training(shapes, tmp_path, monkeypatch, precision, long):
    """Images arrive in the layout of the weights, whatever it is, in training and validation."""
    module, met = model_of(), set()
    monkeypatch.setattr(type(module), "_trains_long", lambda self: long)

    def look(stem: Any, inputs: Any) -> None:
        for tensor in (inputs[0], next(stem.parameters())):
            met.add((tensor.device.type, tensor.is_contiguous(memory_format=torch.channels_last)))

    module.network.get_submodule("stem").register_forward_pre_hook(look)
    trainer_of(tmp_path, accelerator="gpu", precision=precision).fit(module, data_of(shapes))
    assert met == {("cuda", long)}


def command(cwd, *argv) -> subprocess.Popen[str]:
    line = [
        sys.executable, "-m", "rexnet_lit", "fit", "--config", CONFIGS / "quickstart.yaml",
        "--config", CONFIGS / "hardware" / "gpu_amp.yaml", "--data.root", "data", "--trainer.default_root_dir", "runs",
        "--trainer.deterministic", "true", "--data.batch_size", 4, "--trainer.max_epochs", 3, *argv,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "XDG_CACHE_HOME": str(cwd / "cache")}
    return subprocess.Popen(
        [str(word) for word in line],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_a_run_that_is_resumed_is_the_same_run(tmp_path, make_shapes):
    """With trainer.deterministic, bit by bit."""
    for name in ("whole", "cut"):
        make_shapes(tmp_path / name / "data", train=8, val=3, test=0)
    whole, cut = (command(tmp_path / name) for name in ("whole", "cut"))
    assert cut.stdout is not None
    next(line for line in cut.stdout if line.startswith("epoch 1/3"))
    cut.terminate()
    said = cut.communicate()[0]
    assert cut.returncode == 143, said
    resumed = command(tmp_path / "cut", "--ckpt_path", "runs/lightning_logs/version_0/checkpoints/last.ckpt")
    for process in (whole, resumed):
        said = process.communicate()[0]
        assert process.returncode == 0, said
        assert "Warning" not in said
    assert differing(weights(tmp_path / "cut"), weights(tmp_path / "whole")) == []


def test_distributed_training_is_quiet(tmp_path, make_shapes):
    make_shapes(tmp_path / "data", train=8, val=3, test=0)
    process = command(tmp_path, "--config", CONFIGS / "hardware" / "ddp.yaml", "--trainer.devices", 1)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert "Warning" not in said

"""Probabilities that mean what they say."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from module_tools import data_of, model_of, trainer_of
from scipy.optimize import minimize_scalar

from rexnet_lit.models import checkpoint
from rexnet_lit.training.calibration import fit_temperature
from rexnet_lit.training.callbacks import calibration
from rexnet_lit.training.callbacks.checkpoint import RunCheckpoint
from rexnet_lit.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_runs")


def drawn(temperature: float, n: int = 4000, k: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits whose true temperature is known: the targets are drawn by it."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(n, k)) * 3
    odds = np.exp(logits / temperature)
    targets = [rng.choice(k, p=row / row.sum()) for row in odds]
    return torch.tensor(logits), torch.tensor(targets)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_that_drew_the_labels_is_found(temperature):
    logits, targets = drawn(temperature)
    found, loss = fit_temperature(logits, targets)
    assert found == pytest.approx(temperature, rel=0.05)
    independent = minimize_scalar(  # scipy's, without Platt's targets
        lambda t: float(torch.nn.functional.cross_entropy(logits / t, targets)), bounds=(0.1, 5), method="bounded"
    )
    assert found == pytest.approx(independent.x, rel=0.01)
    assert loss == pytest.approx(independent.fun, rel=0.02)
    again, _ = fit_temperature(logits / found, targets)
    assert again == 1.0  # to the last bit: a run that is killed here, and resumed, ships the same weights


@pytest.mark.parametrize("scale", [0.01, 100])
def test_a_head_that_is_far_off_is_mended_at_once(scale):
    logits, targets = drawn(1.0)
    temperature, _ = fit_temperature(logits * scale, targets)
    assert temperature == pytest.approx(scale, rel=0.05)
    assert fit_temperature(logits * scale / temperature, targets)[0] == 1.0


def test_thirty_right_answers_are_no_certainty():
    logits = 20 * torch.eye(3).repeat(10, 1)
    temperature, _ = fit_temperature(logits, torch.arange(3).repeat(10))
    top = (logits / temperature).softmax(1).max()
    assert float(top) == pytest.approx(1 - 1 / 32, abs=0.002)  # Platt 1999: (N + 1) / (N + 2)


def fit(folder: Path, root: Path, precision: str = "32-true", **settings: object) -> tuple[object, dict, dict]:
    module = model_of(calibrate=True, **settings)
    saver = RunCheckpoint()
    trainer = trainer_of(folder, max_epochs=1, precision=precision, enable_checkpointing=True, callbacks=[saver])
    trainer.fit(module, data_of(root))
    return module, *(checkpoint.load_model(Path(saver.dirpath) / name).state for name in ("best.ckpt", "last.ckpt"))


@pytest.mark.parametrize(("head", "layer"), [("linear", "head.fc"), ("mlp", "head.fc.3")])
def test_the_last_layer_is_divided(head, layer, shapes, tmp_path, capsys):
    module, best, last = fit(tmp_path, shapes, head=head)
    ratios = last[f"{layer}.weight"] / best[f"{layer}.weight"]
    assert float(ratios.std()) < 1e-5
    out = capsys.readouterr().out
    assert f"temperature {float(ratios.mean()):.2f};" in out
    now = re.search(r"ece \S+ -> (\d\.\d+)", out)[1]
    summary = out.partition("Fit finished")[2]
    assert float(re.search(r"val/ece +(\S+)", summary)[1]) == pytest.approx(float(now), abs=6e-4)
    shipped = checkpoint.load_model(next(tmp_path.rglob("model.safetensors"))).state
    for name, tensor in best.items():
        assert torch.equal(tensor, shipped[name])
        if not name.startswith(layer):
            assert torch.equal(tensor, last[name])
    for name, tensor in module.network.state_dict().items():
        assert torch.equal(tensor, last[name])  # the module is as training has left it


def test_half_precision(shapes, tmp_path, capsys):
    _, best, last = fit(tmp_path, shapes, "bf16-true", strategy={"blend": True})
    assert "Calibrated: temperature" in capsys.readouterr().out
    assert not torch.equal(best["head.fc.weight"], last["head.fc.weight"])


@pytest.mark.parametrize(("sure", "told"), [(0.1, False), (20.0, True)])
def test_a_loss_that_rises_is_explained(sure, told, shapes, tmp_path, capsys, monkeypatch):
    right = sure * torch.eye(3).repeat_interleave(4, dim=0)
    monkeypatch.setattr("rexnet_lit.training.callbacks.calibration.head_logits", lambda module, features: right)
    fit(tmp_path, shapes)
    assert ("12 validation images are too few for such confidence" in capsys.readouterr().out) is told


def test_weights_that_know_nothing_are_left_alone(shapes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(calibration, "fit_temperature", lambda logits, targets: (1000.0, 1.1))
    _, best, last = fit(tmp_path, shapes)
    assert "Not calibrated" in capsys.readouterr().out
    assert all(torch.equal(tensor, last[name]) for name, tensor in best.items())


def test_a_rewritten_best_is_not_resumed_from(shapes, tmp_path):
    module, _, _ = fit(tmp_path, shapes)
    trainer = trainer_of(
        tmp_path / "again",
        max_epochs=2,
        enable_checkpointing=True,
    )
    with pytest.raises(UserError, match=r"resume the last\.ckpt beside it"):
        trainer.fit(module, data_of(shapes), ckpt_path=next(tmp_path.rglob("best.ckpt")))


def test_a_cosine_head_keeps_its_temperature(shapes, tmp_path):
    _, best, last = fit(tmp_path, shapes, head="cosine")
    assert all(torch.equal(tensor, last[name]) for name, tensor in best.items())

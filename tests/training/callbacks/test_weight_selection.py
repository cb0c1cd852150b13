"""Which weights ship: an epoch's, those between the start and the end of a fine-tuning, those with a solved head."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from module_tools import data_of, model_of, trainer_of
from sklearn.linear_model import Ridge
from torch.nn import functional

from rexnet_lit.models import checkpoint
from rexnet_lit.training.calibration import fit_temperature
from rexnet_lit.training.callbacks import weight_selection
from rexnet_lit.training.callbacks.checkpoint import RunCheckpoint

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture
def weights(tmp_path):
    module = model_of()
    checkpoint.save_model(tmp_path / "start.safetensors", module.spec, module.network.state_dict())
    return str(tmp_path / "start.safetensors")


def fit(folder, shapes, saver=None, epochs=1, **settings):
    module, saver = model_of(strategy={"blend": True}, select="loss", **settings), saver or RunCheckpoint()
    trainer = trainer_of(folder, max_epochs=epochs, enable_checkpointing=True, callbacks=[saver])
    trainer.fit(module, data_of(shapes))
    best, last = (checkpoint.load_model(Path(saver.dirpath) / name).state for name in ("best.ckpt", "last.ckpt"))
    return module, best, last


class FirstCheckpoint(RunCheckpoint):
    """Keeps the first epoch as the best one."""

    def _is_best(self, trainer, candidates):
        return self.best_model_score is None


def test_the_interpolation_with_the_lowest_loss_is_saved(tmp_path, shapes, weights, capsys):
    # A rate that ruins the network: the start, with a solved head, is better than the end.
    module, best, last = fit(tmp_path, shapes, weights=weights, optimizer={"lr": 5.0})
    out = capsys.readouterr().out
    found = re.search(
        r"(\S+) for the starting weights, (\S+) for the last epoch; selected: (.+) \((\S+)\), lowest val loss\.", out
    )
    start, end, kept, chosen = found.groups()
    assert float(chosen) > float(end) < float(start)
    summary = out.partition("Fit finished. Kept: ")[2]
    assert summary.startswith(kept)
    assert float(re.search(r"val/top1 +(\S+)", summary)[1]) == pytest.approx(float(chosen), abs=5e-4)
    ends = {"the starting weights": 0, "the last epoch with a solved head": 100}
    share = ends[kept] if kept in ends else float(kept.partition("% of the way from the starting weights")[0])
    for name, begun in module.start.state.items():
        if name.startswith("head.fc") or not begun.is_floating_point():
            continue
        torch.testing.assert_close(best[name], begun.lerp(last[name], share / 100), msg=name)
    for name, tensor in module.network.state_dict().items():
        assert torch.equal(tensor, last[name])  # the module is as training has left it


def test_the_last_epoch_is_selected(tmp_path, shapes, capsys):
    saver = FirstCheckpoint()
    _, best, last = fit(tmp_path, shapes, saver, epochs=12, head="mlp", optimizer={"lr": 0.004})
    assert "selected: the last epoch" in capsys.readouterr().out
    for name, tensor in best.items():
        assert torch.equal(tensor, last[name])


def test_a_solved_head_is_selected(tmp_path, shapes, capsys):
    module, best, last = fit(tmp_path, shapes, epochs=4)
    out = capsys.readouterr().out
    end, chosen = re.search(r"(\S+) for the last epoch; selected: .+ with a solved head \((\S+)\)", out).groups()
    assert float(chosen) >= float(end)
    assert module.start.state is None
    assert {name for name, tensor in best.items() if not torch.equal(tensor, last[name])} == {
        "head.fc.weight",
        "head.fc.bias",
    }


def test_a_difference_that_may_be_chance_is_reported(tmp_path, shapes, capsys, monkeypatch):
    """Its loss is a little lower, by one image of twelve; logits that nobody will divide are compared as they are."""
    right = torch.eye(3).repeat_interleave(4, dim=0)
    found = iter([3 * right, 3 * torch.cat([right[:-1], right[:1]])])  # of the best epoch, then of the last
    monkeypatch.setattr(weight_selection, "head_logits", lambda module, features: next(found))
    fit(tmp_path, shapes, FirstCheckpoint(), epochs=2, head="cosine")
    out = capsys.readouterr().out
    assert "selected: the last epoch (0.917), the lower val loss of the best epoch may be chance." in out
    assert "Fit finished. Kept: the last epoch (" in out


def test_without_calibration_the_plain_loss_decides(tmp_path, shapes, capsys, monkeypatch):
    """Divided by its best temperature, a model that is far too sure of itself would be as good as the other."""
    right = torch.eye(3).repeat_interleave(4, dim=0)
    some = torch.cat([right[:7], right.roll(4, dims=0)[7:]])  # seven of twelve
    logits = {"the best epoch": 0.5 * some, "the last epoch": 50 * some}
    for calibrate in (False, True):
        found = iter(logits.values())
        monkeypatch.setattr(weight_selection, "head_logits", lambda module, features, found=found: next(found))
        fit(tmp_path / str(calibrate), shapes, FirstCheckpoint(), epochs=2, head="mlp", calibrate=calibrate)
        kept = re.search("selected: (.*) \\(", capsys.readouterr().out)[1]
        assert kept == ("the last epoch" if calibrate else "the best epoch")


def test_errors_of_images_that_are_left_out():
    """Those of scikit-learn's ridge regression, fitted again without each image."""
    random, targets, weights = np.random.default_rng(0), np.arange(14) % 3, torch.tensor([1.0, 0.5, 2.0])
    features = random.normal(size=(14, 6)) * random.uniform(1, 9, 6) + np.eye(3, 6)[targets]
    found = weight_selection._left_out_errors(*map(torch.from_numpy, (features, targets)), weights, "loss")
    scaled, rows = (features - features.mean(0)) / features.std(0), np.arange(14)
    expected = []
    for penalty in (0.01, 0.1, 1, 10, 100):
        ridge = Ridge(penalty * 6)
        fitted = [ridge.fit(scaled[rows != i], np.eye(3)[targets[rows != i]]).predict(scaled[[i]])[0] for i in rows]
        logits = torch.from_numpy(np.stack(fitted))
        temperature, loss = fit_temperature(logits, torch.from_numpy(targets), weights)
        errors = -torch.log_softmax(logits / temperature, 1)[rows, targets] * weights[targets]
        expected.append((loss, errors))
    torch.testing.assert_close(found, min(expected, key=lambda pair: pair[0])[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("select", ["loss", "top1", "macro_f1"])
def test_networks_that_cannot_win_are_left_out(select):
    targets, noise = torch.arange(60) % 3, torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    good = functional.one_hot(targets, 5) + noise / 3
    features = {"start": noise, "middle": good, "end": good * 1.01 + 1}
    assert weight_selection._not_clearly_worse(features, targets, torch.ones(3), select) == ["middle", "end"]


def test_no_selection_after_one_epoch_with_an_mlp_head(tmp_path, shapes, capsys):
    fit(tmp_path, shapes, head="mlp")
    assert "Weight selection" not in capsys.readouterr().out


def test_settings_include_a_digest_of_the_starting_weights(weights, tmp_path):
    """They decide what ships, so a resume compares them."""
    module = model_of()
    digests = [model_of(strategy={"blend": True}, weights=weights).start.settings()["weights"]]
    for layer in ("head.fc", "stem.conv"):
        torch.nn.init.ones_(module.network.get_submodule(layer).weight)
        other = tmp_path / f"{layer}.safetensors"
        checkpoint.save_model(other, module.spec, module.network.state_dict())
        digests.append(model_of(strategy={"blend": True}, weights=str(other)).start.settings()["weights"])
    assert digests[0] == digests[1] != digests[2]  # the head is solved again


@pytest.mark.parametrize("settings", [{}, {"head": "mlp"}, {"strategy": {"name": "linear_probe", "blend": True}}])
def test_no_interpolation(settings):
    assert model_of(**{"strategy": {"blend": True}, **settings}).start.state is None

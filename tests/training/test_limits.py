"""Limits of the answers: by hand, on synthetic data that keep what they promise, and in a run."""

from __future__ import annotations

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
from module_tools import data_of, equal, model_of, trainer_of
from scipy.stats import binom

import rexnet_lit
from rexnet_lit.cli.main import main
from rexnet_lit.models import checkpoint
from rexnet_lit.models.limits import KnownFeatures, Limits
from rexnet_lit.models.spec import ModelSpec
from rexnet_lit.training.callbacks.limits import FitLimits
from rexnet_lit.training.limits import chance_of, fit_known, fit_limits, sure_confidence
from rexnet_lit.utils.errors import UserError


def limits_of(scores: np.ndarray, confidence: float | None = 0.5) -> Limits:
    """Limits with these scores; known are two classes at -3 and 3 on the first axis, of unit variance."""
    means = np.array([[-3.0], [3.0]], np.float32)
    known = KnownFeatures(np.zeros(3, np.float32), np.eye(3, 1, dtype=np.float16), np.eye(1, dtype=np.float32), means,
                          residual=4.0, threshold=2.0)  # fmt: skip
    return Limits(len(scores), scores[: 10**3].astype(np.float32), 0.95, confidence, known)


def drawn(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (n, 5) that are right: the classes are drawn by them."""
    odds = np.exp(6 * rng.normal(size=(n, 5)))
    probs = (odds / odds.sum(1, keepdims=True)).astype(np.float32)
    return probs, (probs.cumsum(1) < rng.random((n, 1))).sum(1).clip(max=4)


@pytest.mark.parametrize(("coverage", "least"), [(0.5, 0.5), (0.9, 0.1), (0.85, 0.1), (0.91, 0.0)])
def test_quantiles_by_hand(coverage, least):
    """Of 9 scores 0.1, ..., 0.9: the (9 + 1) * coverage-th, rounded up; a tenth would be needed for more than 0.9."""
    limits = limits_of(np.arange(1, 10) / 10)
    assert limits.least_probability(coverage) == pytest.approx(least, abs=1e-6)
    probs = np.array([[0.45, 0.55], [0.95, 0.05]], np.float32)
    assert limits.sets(probs, coverage).tolist() == [[least < 0.46, True], [True, least < 0.06]]


def test_a_file_keeps_a_thousand_scores():
    """Of 2,500 images every 2.5th: the 2,251st score, (2,500 + 1) * 0.9, is not among these, and the 2,253rd is."""
    probs = np.stack([np.arange(2500), 2500 - np.arange(2500)], 1).astype(np.float32) / 2500
    limits = fit_limits(probs, np.ones(2500, np.int64), np.zeros((2500, 3)), limits_of(np.ones(1)).known, 0.95)
    assert limits.scores.shape == (1000,)
    assert limits.least_probability(0.9) == pytest.approx(1 - 2252 / 2500)


def test_wrong_coverage():
    for coverage in (0, 1, float("nan")):
        with pytest.raises(UserError, match="coverage"):
            limits_of(np.ones(9)).least_probability(coverage)


def test_sets_have_the_coverage_on_unseen_images():
    """The expectation is between 0.9 and 0.9 + 1 / 61 for 60 images, whatever the probabilities are."""
    rng, hits = np.random.default_rng(0), []
    known = limits_of(np.ones(1)).known
    for _ in range(300):
        probs, targets = drawn(160, rng)
        spoilt = probs**3 / (probs**3).sum(1, keepdims=True)  # too sure of itself
        limits = fit_limits(spoilt[:60], targets[:60], np.zeros((60, 3)), known, 0.95)
        hits.append(limits.sets(spoilt[60:])[np.arange(100), targets[60:]].mean())
    assert 0.895 < np.mean(hits) < 0.925


def test_sure_by_hand():
    """With 0.9, 22 answers are the first set: 0.9 ** 22 is 0.098, below the risk of 0.1; then 24, 26, 28, 30, 33."""
    right = np.ones(40, bool)
    confidence = np.linspace(0.9, 0.51, 40)
    assert sure_confidence(confidence, right, 0.9) == 0  # all of them
    assert sure_confidence(confidence[:21], right[:21], 0.9) is None
    right[29:] = False  # one of 30: 0.9 ** 30 + 30 * 0.1 * 0.9 ** 29 is 0.18
    assert sure_confidence(confidence, right, 0.9) == pytest.approx(confidence[28])  # the 28 above it are sure
    assert chance_of(1, 30, 0.1) == pytest.approx(0.1837, abs=1e-4)
    assert chance_of(7, 90, 0.05) == pytest.approx(binom.cdf(7, 90, 0.05))
    right[5] = False
    assert sure_confidence(confidence, right, 0.9) is None


def test_sure_answers_are_right_as_often_as_asked_for():
    """In nine of ten cases at least, by the true precision of the answers above the confidence."""
    rng, kept, met = np.random.default_rng(0), [], []
    unseen, truth = drawn(20_000, rng)
    right = unseen.argmax(1) == truth
    for _ in range(100):
        probs, targets = drawn(250, rng)
        limit = sure_confidence(probs.max(1), probs.argmax(1) == targets, 0.9)
        sure = unseen.max(1) > (1 if limit is None else limit)
        kept.append(sure.mean())
        met.append(not sure.any() or right[sure].mean() >= 0.9)
    possible = (right[np.argsort(-unseen.max(1))].cumsum() / np.arange(1, 20_001) >= 0.9).nonzero()[0][-1] / 20_000
    assert np.mean(met) >= 0.9
    assert 0.7 * possible < np.mean(kept) < possible


def test_strangeness_by_hand():
    """The nearest class is 1 away along the axis; the rest, 8 in squares, counts a fourth: sqrt(1 + 2) / 2."""
    features = np.array([[4, 2, 2], [-3, 0, 0]], np.float32)
    np.testing.assert_allclose(limits_of(np.ones(9)).strangeness(features), [np.sqrt(3) / 2, 0], atol=1e-6)


def test_strangers_among_known_images():
    """Classes of different spread per direction, in 20 of 60 dimensions; strangers vary in the others."""
    rng = np.random.default_rng(0)
    spread = np.where(np.arange(60) < 20, np.geomspace(5, 0.5, 60), 0.01)
    means = 3 * rng.normal(size=(4, 60)) * spread

    def known(n):
        targets = rng.integers(0, 4, n)
        return (means[targets] + rng.normal(size=(n, 60)) * spread).astype(np.float32), targets

    (train, targets), (val, val_targets), (test, _) = known(400), known(200), known(1000)
    probs = np.full((200, 4), 0.25, np.float32)
    limits = fit_limits(probs, val_targets, val, fit_known(train, targets, 4), 0.95)
    assert 0.01 < (limits.strangeness(test) > 1).mean() < 0.1
    assert (limits.strangeness(test + 0.5 * (spread < 0.1)) > 1).all()
    assert limits.confidence is None


@pytest.mark.parametrize("features", [np.arange(24.0).reshape(6, 4) ** 2, np.zeros((6, 4))])
def test_known_features_of_one_image_per_class(features):
    """Images of a class do not tell how much they differ; a fit of 300 such classes ended in a traceback."""
    train = features.astype(np.float32)
    limits = fit_limits(np.full((6, 6), 1 / 6), np.arange(6), train + 0.1, fit_known(train, np.arange(6), 6), 0.95)
    near, far = limits.strangeness(np.stack([train[1], train[1] + 1e4]))
    assert near <= 1 < far < np.inf


def test_a_description_keeps_limits_and_refuses_damaged_ones():
    spec = ModelSpec("rexnet_100", ("ant", "bee"), limits=limits_of(np.arange(1, 10) / 10, None))
    again = ModelSpec.from_json(spec.to_json(), "x").limits
    features = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    assert again.strangeness(features).tolist() == spec.limits.strangeness(features).tolist()
    assert again.scores.tolist() == spec.limits.scores.tolist()
    assert again.confidence is None
    for key, value in (("images", 12), ("scores", "<f4:1:AAA"), ("known", {}), ("precision", float("nan"))):
        raw = json.loads(spec.to_json())
        raw["limits"][key] = value
        with pytest.raises(UserError, match="model description is invalid"):
            ModelSpec.from_json(json.dumps(raw), "m.ckpt")
    older = {name: value for name, value in json.loads(spec.to_json()).items() if name != "limits"}
    old = ModelSpec.from_json(json.dumps({**older, "format_version": 1}), "m.ckpt")
    classifier = rexnet_lit.Classifier(old, torch.nn.Linear(1, 1), "cpu")
    for ask in (classifier.predict_set, classifier.strangeness):
        with pytest.raises(UserError, match="fit it again"):
            ask([])


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_shapes):
    root = tmp_path_factory.mktemp("limits")
    make_shapes(root / "other", train=1, val=1, test=2, classes=("w", "x", "y", "z"))
    return make_shapes(root / "data", train=8, val=8, test=4)


@pytest.mark.usefixtures("quick_runs")
def test_a_run(data, tmp_path, monkeypatch, capsys):
    """The weights stay as they are, and the answers come with their limits everywhere."""
    settings = {"strategy": {"name": "full", "blend": True}, "calibrate": True}
    states = []
    for folder in ("with", "without"):
        torch.manual_seed(0)
        trainer_of(tmp_path / folder, enable_checkpointing=True, max_epochs=1).fit(
            model_of(**settings), datamodule=data_of(data)
        )
        (best,) = (tmp_path / folder).rglob("best.ckpt")
        states.append(checkpoint.load_model(best))
        monkeypatch.setattr(FitLimits, "finish", lambda *args: None)
    assert equal(states[0].state, states[1].state)
    assert states[1].spec.limits is None
    assert "Limits, from 24 validation images, which also selected the weights: no answer is sure" in (
        capsys.readouterr().out
    )
    (model,) = (tmp_path / "with").rglob("model.safetensors")
    cpu = ["--trainer.accelerator", "cpu", "--data.num_workers", "0", "--trainer.default_root_dir", str(tmp_path)]
    assert main(["test", str(model), str(data), "--data.strangers", str(data.parent / "other"), *cpu]) == 0
    (report,) = tmp_path.rglob("report")
    found = json.loads((report / "metrics.json").read_text())["limits"]
    assert found["stranger"]["images"] == 16
    recognised = f"{found['stranger']['recognised']:.1%} of 16 readable images in other are recognised"
    assert recognised in capsys.readouterr().out
    assert "Strangers: other" in (report / "report.html").read_text(encoding="utf-8")
    with (report / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    classifier = rexnet_lit.load(model, device="cpu")
    files = [data / row["path"] for row in rows]
    sets = [[each.label for each in row] for row in classifier.predict_set(files)]
    assert [row["set"].split(" | ") for row in rows] == sets
    assert [row["stranger"] == "1" for row in rows] == (classifier.strangeness(files) > 1).tolist()
    assert {row["unsure"] for row in rows} == {"1"}
    covered = [row["target"] in names for row, names in zip(rows, sets, strict=True)]
    assert found["sets"]["coverage"] == pytest.approx(np.mean(covered))
    assert len(classifier.predict_set(files[0], coverage=0.99)[0]) == 3  # 24 images allow for no more than 0.96
    capsys.readouterr()
    output = str(tmp_path / "p.csv")
    assert main(["predict", str(model), str(data / "test" / "cross"), "--data.predict_output", output, *cpu]) == 0
    assert "unsure" in capsys.readouterr().out
    spec = dataclasses.replace(classifier.spec, limits=None)
    checkpoint.save_model(tmp_path / "old.safetensors", spec, states[0].state)
    assert main(["test", str(tmp_path / "old.safetensors"), str(data), "--data.strangers", str(data), *cpu]) == 2
    assert "no limits" in capsys.readouterr().err

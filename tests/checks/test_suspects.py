"""Wrong labels are found; expected values are by hand or from scikit-learn."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
from cli_tools import fails, lively_model, write_dataset, write_pictures
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from rexnet_lit.checks import suspects
from rexnet_lit.checks.check import check
from rexnet_lit.cli import main
from rexnet_lit.data.settings import DataRecord
from rexnet_lit.models import weights
from rexnet_lit.utils import files
from rexnet_lit.utils.errors import MissingFileError


def blobs(counts, width=8, seed=0):
    """Features in a cluster per class, and the classes."""
    rng = np.random.default_rng(seed)
    targets = np.repeat(np.arange(len(counts)), counts)
    centres = 4 * rng.standard_normal((len(counts), width))
    return (centres[targets] + rng.standard_normal((len(targets), width))).astype(np.float32), targets


@pytest.mark.parametrize("width", [8, 100])
def test_the_head_is_discriminant_analysis(width):
    features, targets = blobs([20, 30, 25], width)
    folds = suspects.assign_folds(targets, np.arange(75))
    for shrinkage, logits in zip(
        suspects._SHRINKAGES, suspects._held_out_logits(features, targets, 3, folds), strict=True
    ):
        seen = folds != 2
        theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage / (1 + shrinkage))
        theirs.fit(features[seen], targets[seen])
        prior = np.log(np.bincount(targets[seen]) / seen.sum())
        # scikit-learn divides the covariance by 1 + shrinkage
        expected = (theirs.decision_function(features[~seen]) - prior) / (1 + shrinkage) + prior
        np.testing.assert_allclose(logits[~seen], expected, rtol=1e-3, atol=1e-3)


def test_planted_labels_are_the_suspects():
    features, right = blobs([60, 60, 60])
    given = right.copy()
    wrong = [3, 70, 71, 150]
    given[wrong] = (given[wrong] + 1) % 3
    found = suspects.judge_features(features, given, 3, np.arange(180))
    assert sorted(found.suspects) == wrong
    assert found.share == pytest.approx(4 / 180, abs=0.005)
    order = found.probs[found.suspects, given[found.suspects]]
    assert list(order) == sorted(order)
    assert not len(suspects.judge_features(features, right, 3, np.arange(180)).suspects)


@pytest.mark.parametrize("classes", [2, 5, 40])
def test_labels_that_have_nothing_to_do_with_the_images(classes):
    """Not even of a rare class, which a head that always answers with the other one would suspect as a whole."""
    rng = np.random.default_rng(classes)
    features = rng.normal(size=(400, 6)).astype(np.float32)
    for targets in (rng.integers(0, classes, 400), (rng.random(400) < 0.1).astype(int)):
        found = suspects.judge_features(features, targets, classes, np.arange(400))
        assert found.share is None
        assert not len(found.suspects)


def test_the_share_of_wrong_labels():
    right = np.array([1.0, 1.0, 1.0, 0.0])
    assert suspects._share(right, 1 - right) == pytest.approx(0.25, abs=1e-6)
    assert suspects._share(np.ones(4), np.zeros(4)) == 0
    probs = np.array([[0.7, 0.2, 0.1]], np.float32)
    np.testing.assert_allclose(suspects._likelihoods(probs, np.array([1])), [[0.2], [0.4]], rtol=1e-6)


def test_folds_keep_units_whole_and_spread_classes():
    targets = np.repeat([0, 1, 2], [25, 25, 1])
    units = suspects.join_units(51, [[0, 1], [1, 2], [30, 31]])
    assert len({*units[:3]}) == len({*units[30:32]}) == 1
    assert len(np.unique(units)) == 48
    folds = suspects.assign_folds(targets, units)
    assert len({*folds[:3]}) == len({*folds[30:32]}) == 1
    shares = [np.bincount(folds[[i for i in range(51) if targets[i] == k]], minlength=5) for k in (0, 1)]
    assert min(map(min, shares)) >= 4


@pytest.mark.parametrize("counts", [[30, 1, 2, 30], [1, 1], [3, 2]])
def test_tiny_classes(counts):
    features, targets = blobs(counts)
    found = suspects.judge_features(features, targets, len(counts), np.arange(len(targets)))
    alone = [int(np.flatnonzero(targets == k)[0]) for k, count in enumerate(counts) if count == 1]
    assert not {*alone} & {*found.suspects.tolist()}  # nothing to compare it with
    suspects.describe(found, targets, [*map(str, targets)], "abcd", features, np.arange(len(targets)))


def test_predictions_of_a_model_instead(tmp_path):
    file = tmp_path / "predictions.csv"
    file.write_text("path,label_1,prob_1,label_2,prob_2,target\na/1.png,a,0.7,b,0.2,a\nelse.png,a,1,b,0,a\n")
    logits = suspects.read_logits(file, ("a", "b", "c"), ["a/1.png", "b/1.png"])
    np.testing.assert_allclose(np.exp(logits), [[0.7, 0.2, 0.1], [0, 0, 0]], rtol=1e-5)
    certain = np.log(np.array([[0.98, 0.01, 0.01]] * 20 + [[0.01, 0.98, 0.01]], np.float32))
    found = suspects.judge_logits(np.concatenate([certain, np.full((1, 3), -np.inf, np.float32)]), np.zeros(22, int))
    assert found.suspects.tolist() == [20]
    assert 0 < found.share < 1 / 21  # part of it may be the model's own mistake


def test_predictions_of_names_that_a_csv_file_escapes(tmp_path):
    names, paths = ("-minus", "=sum", "a\nb"), ["-minus/@1.png", "=sum/1.png", "a\nb/1.png"]
    rows = [[path, name, 0.9] for path, name in zip(paths, names, strict=True)]
    files.write_csv(tmp_path / "predictions.csv", ("path", "label_1", "prob_1"), rows)
    assert "'-minus/@1.png,'-minus,0.9" in (tmp_path / "predictions.csv").read_text()
    logits = suspects.read_logits(tmp_path / "predictions.csv", names, paths)
    np.testing.assert_allclose(np.exp(logits), np.full((3, 3), 0.05) + np.eye(3) * 0.85, rtol=1e-5)


def mean_colour(paths, side, change):
    """Features that tell the drawn classes apart."""
    assert side == 48
    return np.stack([change(cv2.imread(path)).reshape(-1, 3).mean(0) for path in paths]).astype(np.float32)


@pytest.fixture
def planted(tmp_path):
    """Twelve images of a class in train, six in test; a disc under ring and a ring under bars; one is unreadable."""
    root = write_dataset(tmp_path / "data", train=12, val=4, test=6)
    write_pictures(root / "train/ring", "disc", 1, 500)
    write_pictures(root / "test/bars", "ring", 1, 500)
    (root / "train/bars/broken.png").write_bytes(b"")
    copy = root / "train/ring/ring 000.png"
    (root / "val/ring/copy.png").write_bytes(copy.read_bytes())
    return root


def test_suspects_of_a_folder(planted):
    result = check(planted, DataRecord(max_bad_fraction=0.2), embed=mean_colour)
    rows = {row.path: row for row in result.suspects}
    assert {*rows} == {"train/ring/disc 500.png", "test/bars/ring 500.png"}
    row = rows["train/ring/disc 500.png"]
    assert (row.label, row.suggested) == ("ring", "disc")
    assert row.prob_label < 0.1 < 0.9 < row.prob_suggested
    assert len(row.like_label) == len(row.like_suggested) == 3
    assert all("/ring/ring" in path or path.endswith("copy.png") for path in row.like_label)
    assert all("/disc/disc" in path for path in row.like_suggested)
    finding = next(finding for finding in result.findings if finding.code == "suspect-label")
    assert finding.severity == "warning"
    assert finding.paths == tuple(row.path for row in result.suspects)
    assert check(planted).suspects == ()
    nothing = check(planted, embed=lambda paths, side, change: np.zeros((len(paths), 3), np.float32))
    assert nothing.suspects == ()
    assert any("hardly tell the classes apart" in finding.message for finding in nothing.findings)
    for path in rows:
        (planted / path).unlink()
    result = check(planted, DataRecord(max_bad_fraction=0.2), embed=mean_colour)
    assert result.suspects == ()
    assert "labels" in {finding.code for finding in result.findings}


def test_the_command(planted, tmp_path, capsys):
    model = lively_model(tmp_path / "model.safetensors")
    config = tmp_path / "small.yaml"
    config.write_text(f"data: {{image_size: 64, max_bad_fraction: 0.2}}\nmodel: {{weights: {model}}}\n")
    main.main(["check", str(planted), "--labels", "--json", "--config", str(config)])
    found = json.loads(capsys.readouterr().out)["suspects"]
    assert {"path", "label", "suggested", "prob_label", "prob_suggested"} <= found[0].keys()
    assert {"train/ring/disc 500.png", "test/bars/ring 500.png"} <= {row["path"] for row in found}
    main.main(["check", str(planted), "--labels", "--model", str(model)])
    assert "suggested" in capsys.readouterr().out


def test_mistakes_of_the_user(planted, tmp_path, capsys, monkeypatch):
    def unavailable(*_, **__):
        raise MissingFileError("no network")

    monkeypatch.setattr(weights, "load_pretrained", unavailable)
    error = fails(capsys, "check", planted, "--labels")
    assert "--model" in error
    assert "--weights" in error
    assert "--labels" in fails(capsys, "check", planted, "--model", "x.ckpt")
    assert "exclude" in fails(capsys, "check", planted, "--labels", "--model", "x", "--weights", "y")
    assert "no file" in fails(capsys, "check", planted, "--labels", "--weights", tmp_path / "no.safetensors")
    table = tmp_path / "predictions.csv"
    for text in (
        "path,label\n",
        "path,label_1,prob_1\ntrain/ring/ring 000.png,cat,1\n",
        "path,label_1,prob_1\nx,ring,1\n",
    ):
        table.write_text(text)
        assert "--predictions" in fails(capsys, "check", planted, "--labels", "--predictions", table)


def test_nothing_is_known_of_any_label():
    found = suspects.judge_logits(np.full((2, 2), -np.inf, np.float32), np.zeros(2, int))
    assert found.share is None
    assert not len(found.suspects)

"""Comparing runs: the numbers by hand and against other libraries, and how often they are wrong."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from rexnet_lit.report import comparison
from rexnet_lit.report.comparison import compare_runs, macro_f1, mcnemar, paired_interval
from rexnet_lit.utils.errors import UserError


def result_of(name, truth, labels, **settings):
    answers = {f"test/{i}.png": (f"c{t}", f"c{label}") for i, (t, label) in enumerate(zip(truth, labels, strict=True))}
    metrics = {"top1": float(np.mean(truth == labels)), "macro_f1": macro_f1(truth, labels), "nll": 0.5, "ece": 0.1}
    return comparison.TestedRun(name, metrics, answers, settings)


def draw(random, count, accuracy, other, classes=5):
    """Truth, and the answers of two models that are right this often, independently."""
    truth = random.integers(0, classes, count)
    wrong = (truth + random.integers(1, classes, count)) % classes
    return truth, *(np.where(random.random(count) < share, truth, wrong) for share in (accuracy, other))


def test_mcnemar_by_hand():
    # 1 against 5 of 6: two-sided exact 2 (1 + 6) / 64, less half of each of the two outcomes 1 and 5: 6 / 64.
    assert mcnemar(1, 5) == mcnemar(5, 1) == pytest.approx(14 / 64 - 6 / 64)
    assert mcnemar(0, 3) == pytest.approx(1 / 8)
    assert mcnemar(2, 2) == pytest.approx(1 - 0.5 * 6 / 16)
    assert mcnemar(0, 0) == 1


def test_mcnemar_equals_scipy():
    from scipy.stats import binom, binomtest  # scikit-learn depends on scipy

    for b, c in ((3, 12), (40, 61), (500, 433)):
        exact = binomtest(b, b + c).pvalue
        assert mcnemar(b, c) == pytest.approx(exact - binom.pmf(b, b + c, 0.5), rel=1e-9)


def test_interval_by_hand():
    # Bonett and Price (2012): (c + 1 - b - 1) / (n + 2) +- 1.96 sqrt((p1 + p2 - (p2 - p1)^2) / (n + 2))
    half = 1.959964 * np.sqrt((4 / 100 + 13 / 100 - (9 / 100) ** 2) / 100)
    assert paired_interval(3, 12, 98) == pytest.approx((0.09 - half, 0.09 + half), abs=1e-6)


def test_macro_f1_and_its_bootstrap_equal_scikit_learn_and_scipy():
    from scipy.stats import bootstrap
    from sklearn.metrics import f1_score

    truth, first, second = draw(np.random.default_rng(1), 300, 0.7, 0.8)
    assert macro_f1(truth, first) == pytest.approx(f1_score(truth, first, average="macro"))
    difference = compare_runs([result_of("a", truth, first), result_of("b", truth, second)]).differences[0]

    def gain(*data):
        return macro_f1(data[0], data[2]) - macro_f1(data[0], data[1])

    expected = bootstrap(
        (truth, first, second), gain, paired=True, vectorized=False, n_resamples=300, method="percentile"
    ).confidence_interval
    assert difference.macro_f1 == pytest.approx(gain(truth, first, second))
    assert difference.macro_f1_interval == pytest.approx((expected.low, expected.high), abs=0.02)


def test_no_difference_is_rarely_found_and_a_real_one_mostly(monkeypatch):
    monkeypatch.setattr(comparison, "_RESAMPLES", 2)
    found = {"none": 0, "five points": 0}
    for seed in range(20):
        for name, other in (("none", 0.85), ("five points", 0.90)):
            truth, first, second = draw(np.random.default_rng((seed, len(name))), 1000, 0.85, other)
            result = compare_runs([result_of("a", truth, first), result_of("b", truth, second)]).differences[0]
            found[name] += result.differs
            assert ("b is better than a by" in result.sentence) == (result.differs and result.top1 > 0)
    assert found["none"] <= 1
    assert found["five points"] >= 18


def test_few_images_and_several_runs(monkeypatch):
    monkeypatch.setattr(comparison, "_RESAMPLES", 2)
    truth, first, second = draw(np.random.default_rng(2), 143, 0.80, 0.83)
    runs = [result_of("a", truth, first, lr=1), result_of("b", truth, second, lr=2), result_of("c", truth, first, lr=1)]
    result = compare_runs(runs)
    assert "143 images are too few to see a difference between b and a" in result.differences[0].sentence
    assert "show no difference between c and a" in result.differences[1].sentence
    assert result.confidence == 0.975  # of each of two intervals
    assert result.settings == {"lr": (1, 2, 1)}


@pytest.mark.parametrize(("change", "reason"), [("other", "2 of 3 and 3"), ("label", "1 image has another label")])
def test_runs_on_different_images_are_refused(change, reason):
    truth = np.array([0, 1, 2])
    first, second = result_of("a", truth, truth), result_of("b", truth, truth)
    answer = second.answers.pop("test/0.png")
    second.answers["test/9.png" if change == "other" else "test/0.png"] = ("c2", answer[1])
    with pytest.raises(UserError, match=reason):
        compare_runs([first, second])


def test_reports_of_validation_images_are_named():
    truth = np.arange(10) % 5
    one, other, less = (
        result_of(name, truth[:count], truth[:count]) for name, count in (("a", 10), ("b", 10), ("c", 5))
    )
    assert compare_runs([one, other]).split == "test"
    other.metrics["split"] = less.metrics["split"] = "val"
    assert compare_runs([one, other]).split == "val"
    with pytest.raises(UserError, match=r"5 of 10 and 5 images are the same: test and validation images"):
        compare_runs([one, less])


def test_command(tmp_path, capsys, monkeypatch):
    from rexnet_lit.cli import main

    monkeypatch.setattr(comparison, "_RESAMPLES", 2)
    monkeypatch.chdir(tmp_path)
    truth, *answers = draw(np.random.default_rng(0), 200, 0.6, 0.9)
    for name, labels in zip(("v0", "<b>v1"), answers, strict=True):
        folder = tmp_path / name / "report"
        folder.mkdir(parents=True)
        (tmp_path / name / "checkpoints").mkdir()
        run_ = result_of(name, truth, labels)
        (folder / "metrics.json").write_text(json.dumps(run_.metrics))
        with (folder / "predictions.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label_1", "prob_1", "target"])
            writer.writerows([path, label, 0.9, target] for path, (target, label) in run_.answers.items())
        (tmp_path / name / "config.yaml").write_text(f"data: {{batch_size: {len(name)}}}\nseed_everything: 0\n")
    assert main.main(["compare", "v0", "<b>v1/checkpoints", "--report", "c.html"]) == 0
    screen = capsys.readouterr().out
    assert "is better than v0 by" in screen
    assert "data.batch_size" in screen
    assert "seed_everything" not in screen
    assert "<b>" not in (tmp_path / "c.html").read_text()
    assert main.main(["compare", "v0", "<b>v1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["differences"][0]["top1"] == pytest.approx(result["runs"][1]["top1"] - result["runs"][0]["top1"])
    (tmp_path / "v2").mkdir()
    for wrong in (["v0", "v2"], ["v0", "no"], ["v0"]):
        assert main.main(["compare", *wrong]) == 2

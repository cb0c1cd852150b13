"""The report: its numbers against scikit-learn, escaping, size, and atomic writes."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from rexnet_lit.report import figures, tables, test_page
from rexnet_lit.report import html as html_module
from rexnet_lit.report.predictions import Predictions, top_k_classes, write_predictions
from rexnet_lit.utils import files, reliability
from rexnet_lit.utils.errors import UserError, printable

HOSTILE = ("<script>alert(1)</script>", "=cmd()", "$x_1$", "猫", "line\nbreak\u202e", "raw\udcff", "a;b,\"c'")


def softmax(logits):
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (exp / exp.sum(axis=1, keepdims=True)).astype(np.float32)


def predictions(n, names, seed=0, pull=2.0):
    """Random predictions that lean towards the truth by `pull`."""
    random = np.random.default_rng(seed)
    targets = random.integers(0, len(names), n)
    logits = random.normal(size=(n, len(names)))
    logits[np.arange(n), targets] += pull
    paths = [f"test/{names[t]}/img {i}.png" for i, t in enumerate(targets)]
    return Predictions(paths, softmax(logits), targets.astype(np.int64), tuple(names))


def results_of(p):
    """What `training.metrics.stage_results` returns for predictions, by scikit-learn."""
    from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support, top_k_accuracy_score

    labels, correct = np.arange(len(p.class_names)), p.predicted == p.targets
    columns = precision_recall_fscore_support(p.targets, p.predicted, labels=labels, zero_division=0)
    top5 = {"top5": float(top_k_accuracy_score(p.targets, p.probs, k=5, labels=labels))} if len(labels) > 5 else {}
    return {
        "top1": float(accuracy_score(p.targets, p.predicted)),
        **top5,
        "macro_f1": float(f1_score(p.targets, p.predicted, average="macro", labels=np.unique(p.targets))),
        "nll": float(-np.log(p.probs[np.arange(len(p.targets)), p.targets].astype(float).clip(1e-38)).mean()),
        "ece": reliability.expected_calibration_error(reliability.confidence_bins(p.confidence, correct)),
        "count": len(p.targets),
        **{name: column.tolist() for name, column in zip(test_page.COLUMNS, columns, strict=True)},
    }


def write_report(folder, p, *, results=None, read_image=None, title="t", facts=None, **more):
    results = results or results_of(p)
    return test_page.write_report(
        folder, p, results, read_image=read_image or grey, title=title, facts=facts or {}, **more
    )


def grey(path):
    return np.full((20, 30, 3), 90, np.uint8)


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


class Page(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.links, self.text = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "srcset")]

    def handle_data(self, data):
        self.text.append(data)


def words(folder):
    """The page's text, in one line."""
    return " ".join(" ".join(Page((folder / "report.html").read_text(encoding="utf-8")).text).split())


# Numbers


def test_the_report_shows_the_given_numbers(tmp_path):
    """It computes no metrics of its own: even impossible ones are written as they are."""
    p = predictions(40, [f"class {i}" for i in range(7)], pull=1.0)
    columns = {name: [0.01 * i + j for i in range(7)] for j, name in enumerate(test_page.COLUMNS[:3])}
    results = {"top1": 0.1234567890123, "top5": 0.5, "macro_f1": 0.31, "nll": 7.654321, "ece": 0.271, "count": 40}
    results |= {**columns, "support": [3, 1, 4, 1, 5, 9, 0]}
    metrics = write_report(tmp_path, p, results=results)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert list(metrics) == [*list(results)[:6], "classes_without_images", "per_class"]
    assert metrics["classes_without_images"] == ["class 6"]
    assert {key: results[key] for key in list(metrics)[:6]} == {key: metrics[key] for key in list(metrics)[:6]}
    expected = {"precision": 0.02, "recall": 1.02, "f1": 2.02, "support": 4}
    assert metrics["per_class"]["class 2"] == pytest.approx(expected)
    assert rows_of(tmp_path / "per_class.csv")[3] == ["class 2", *map(str, metrics["per_class"]["class 2"].values())]
    text = words(tmp_path)
    for shown in ("12.3\u00a0%", "31.0\u00a0%", "27.1\u00a0%", "7.654", "no part in macro F1: class 6 ."):
        assert " ".join(shown.split()) in text


def test_confidence_bins_by_hand():
    # 1/15 belongs to the first bin and 1.0 to the last.
    confidence, correct = np.array([1 / 15, 0.99, 1.0, 1.0, 0.5]), np.array([True, True, False, True, False])
    count, mean, accuracy = reliability.confidence_bins(confidence, correct)
    assert count.tolist() == [1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 3]
    assert (mean[14], accuracy[14]) == pytest.approx((2.99 / 3, 2 / 3))
    ece = reliability.expected_calibration_error(np.stack([count, mean, accuracy]))
    assert ece == pytest.approx((14 / 15 + 0.5 + 3 * (2.99 - 2) / 3) / 5)


def test_ece_equals_torchmetrics():
    import torch
    from torchmetrics.functional import classification as tm

    p = predictions(400, [f"class {i}" for i in range(10)], seed=3, pull=1.0)
    ece = reliability.expected_calibration_error(reliability.confidence_bins(p.confidence, p.predicted == p.targets))
    probs, targets = torch.from_numpy(p.probs), torch.from_numpy(p.targets)
    assert ece == pytest.approx(float(tm.multiclass_calibration_error(probs, targets, 10)), abs=1e-6)


def test_wilson_interval():
    from scipy.stats import binomtest  # scikit-learn depends on scipy

    for right, count in ((350, 360), (1, 1), (0, 7), (5, 10)):
        expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
        assert tables.wilson_interval(right, count) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_percentages_are_never_rounded_to_all_or_nothing():
    nbsp = "\u00a0"
    shares = (0, 0.0001, 0.9722, 0.99999, 1)
    assert [tables.percent(s) for s in shares] == [x + nbsp + "%" for x in ("0", "0.1", "97.2", "99.9", "100")]


def test_top_k_takes_the_first_of_equals_as_argmax_does():
    probs = np.full((2, 8), 1 / 8, np.float32)
    assert top_k_classes(probs, 3).tolist() == [[0, 1, 2]] * 2
    probs = np.random.default_rng(0).random((3000, 20), np.float32)
    np.testing.assert_array_equal(top_k_classes(probs, 5), np.argsort(-probs, axis=1, kind="stable")[:, :5])


def test_confusion_matrix_equals_scikit_learn():
    from sklearn.metrics import confusion_matrix

    p = predictions(300, list("abcdefg"), pull=1.0)
    answers = p.probs.argmax(1)
    pairs = tables.confused_pairs(p.targets, answers)
    classes, counts, shares = tables.confusion_matrix(p.targets, answers, 7, pairs)
    expected = confusion_matrix(p.targets, answers)
    np.testing.assert_array_equal(counts, expected)
    np.testing.assert_allclose(shares, confusion_matrix(p.targets, answers, normalize="true"))
    assert classes == list(range(7))
    true, guess, count = pairs[0]
    assert count == expected[true, guess] == (expected - np.diag(np.diag(expected))).max()


def test_many_classes_show_the_most_confused():
    targets, answers = np.arange(40).repeat(3), np.arange(40).repeat(3)
    answers[:] = targets
    answers[targets == 30] = 7
    pairs = tables.confused_pairs(targets, answers)
    assert pairs == [(30, 7, 3)]
    classes, counts, _ = tables.confusion_matrix(targets, answers, 40, pairs)
    assert len(classes) == 25
    assert counts[classes.index(30), classes.index(7)] == 3


# Invalid input


def test_predictions_of_different_lengths_are_refused():
    probs = np.full((2, 3), 1 / 3, np.float32)
    with pytest.raises(ValueError, match="shape"):
        Predictions(["a"], probs, None, ("x", "y", "z"))
    with pytest.raises(ValueError, match="targets has shape"):
        Predictions(["a", "b"], probs, np.array([0]), ("x", "y", "z"))
    with pytest.raises(ValueError, match="run from 0 to 3"):
        Predictions(["a", "b"], probs, np.array([0, 3]), ("x", "y", "z"))
    probs[1, 0] = np.nan
    with pytest.raises(UserError, match=r"b\\nc: the model's output is NaN.* 1 of 2"):
        Predictions(["a", "b\nc"], probs, None, ("x", "y", "z"))


def test_a_report_needs_targets_and_images(tmp_path):
    probs = np.full((1, 2), 0.5, np.float32)
    with pytest.raises(ValueError, match="unlabelled"):
        write_report(tmp_path, Predictions(["a"], probs, None, ("x", "y")), results={"top1": 0})
    with pytest.raises(UserError, match="no images"):
        write_report(tmp_path, Predictions([], probs[:0], np.zeros(0, np.int64), ("x", "y")), results={"top1": 0})
    assert not list(tmp_path.iterdir())


def test_absolute_paths_are_refused(tmp_path):
    p = Predictions(["/home/me/a.png"], np.array([[0.5, 0.5]], np.float32), np.array([0]), ("x", "y"))
    with pytest.raises(ValueError, match="relative"):
        write_report(tmp_path / "report", p)
    assert not (tmp_path / "report").exists()


# Names


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Kohlmeise Männchen 猫", "Kohlmeise Männchen 猫"),
        ("a\nb\tc\rd\x00", r"a\nb\tc\rd\x00"),
        ("raw\udcff\udc80", r"raw\xff\x80"),
        ("lone \ud800", r"lone \ud800"),
        ("gpj.\u202eexe", r"gpj.\u202eexe"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown
    printable(text).encode()


def test_predictions_csv(tmp_path):
    probs = np.array([[0.25, 0.75], [0.6, 0.4]], np.float32)
    write_predictions(Predictions(["a b.png", 'c,"d".png'], probs, np.array([1, 1]), ("x", "y")), tmp_path / "p.csv")
    assert (tmp_path / "p.csv").read_bytes() == (
        b'path,label_1,prob_1,label_2,prob_2,target\na b.png,y,0.75,x,0.25,y\n"c,""d"".png",x,0.6,y,0.4,y\n'
    )
    write_predictions(Predictions(["a"], probs[:1], None, ("x", "y")), tmp_path / "new folder" / "p.csv", top_k=1)
    assert rows_of(tmp_path / "new folder" / "p.csv") == [["path", "label_1", "prob_1"], ["a", "y", "0.75"]]


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\uff1d"])
def test_csv_cells_are_not_formulas(tmp_path, start):
    names = (start + "cmd()", "plain")
    p = Predictions([f"{start}1+1.png"], np.array([[0.9, 0.1]], np.float32), np.array([0]), names)
    write_predictions(p, tmp_path / "p.csv")
    path, label, _, other, _, target = rows_of(tmp_path / "p.csv")[1]
    assert path == "'" + printable(start) + "1+1.png"
    assert label == target == "'" + printable(start) + "cmd()"
    assert other == "plain"


def test_one_line_per_image_whatever_its_name(tmp_path):
    paths = ["a\nb.png", "raw\udcff.png", "\u202egnp.exe"]
    write_predictions(Predictions(paths, np.full((3, 1), 1, np.float32), None, ("x",)), tmp_path / "p.csv")
    lines = (tmp_path / "p.csv").read_text(encoding="utf-8").splitlines()
    assert lines[1:] == [r"a\nb.png,x,1.0", r"raw\xff.png,x,1.0", r"\u202egnp.exe,x,1.0"]


def test_classes_with_the_same_name_get_their_index(tmp_path):
    # ImageNet has two "crane".
    p = Predictions(["a"], np.array([[0.2, 0.7, 0.1]], np.float32), np.array([1]), ("crane", "crane", "dog"))
    metrics = write_report(tmp_path, p)
    assert list(metrics["per_class"]) == ["crane (#0)", "crane (#1)", "dog"]
    assert sum(row["support"] for row in metrics["per_class"].values()) == 1


def test_hostile_names_stay_text(tmp_path):
    p = predictions(60, HOSTILE, pull=1.0)
    p.paths[0] = "x\n<img src=http://evil/>.png"
    write_report(
        tmp_path,
        p,
        title="<b>title</b>",
        facts={"<i>Model</i>": "a\udcff<u>"},
        history=[{"train/loss": 1.0, "val/$x_1$": 0.5, "val/猫": 0.2}],
    )
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not {"b1", "i1", "u", "link", "iframe"} & set(page.tags)
    own = Path(html_module.__file__).with_name("decide.js").read_text("utf-8")
    assert html.count("<script") == html.count(f"<script>{own}</script>") == 1
    assert all(link.startswith("data:image/") for link in page.links)
    text = words(tmp_path)
    for shown in ("<script>alert(1)</script>", "<b>title</b>", "<i>Model</i>", r"a\xff<u>", "$x_1$", "猫"):
        assert shown in text
    assert r"line\nbreak\u202e" in text
    assert not re.search("[\u202e\ud800-\udfff]", html)
    assert (
        list(json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))["per_class"])[4]
        == r"line\nbreak\u202e"
    )
    assert rows_of(tmp_path / "per_class.csv")[2][0] == "'=cmd()"


def test_names_in_figures():
    # Cut in the middle; a script that DejaVu Sans lacks (it warns, and warnings are errors here) is an index.
    assert figures.figure_name("Great spotted woodpecker 12", 0) == "Great spo…ecker 12"
    assert len(figures.figure_name("x" * 500, 0)) == figures.NAME_LENGTH
    assert figures.figure_name("Кошка $x_1$", 0) == "Кошка $x_1$"
    assert figures.figure_name("猫", 7) == "#7"


# Files


FILES = {
    "metrics.json",
    "per_class.csv",
    "predictions.csv",
    "report.html",
    "confusion.png",
    "mistakes.png",
    "calibration.png",
    "risk_coverage.png",
}


def test_report_of_the_digits(tmp_path):
    from sklearn.datasets import load_digits
    from sklearn.naive_bayes import GaussianNB

    digits = load_digits()
    model = GaussianNB(var_smoothing=1e-2).fit(digits.data[:1400], digits.target[:1400])
    probs = model.predict_proba(digits.data[1400:]).astype(np.float32)
    targets = digits.target[1400:].astype(np.int64)
    p = Predictions([f"{i}.png" for i in range(1400, 1797)], probs, targets, tuple("0123456789"))
    read = []

    def read_image(path):
        read.append(path)
        return (digits.images[int(path[:-4])][..., None].repeat(3, axis=2) * 15).astype(np.uint8)

    history = [{"epoch": e, "train/loss": 2 - e, "val/loss": 2.1 - e, "val/top1": e / 2, "lr": 0.1} for e in range(2)]
    facts = {"Model": "naive Bayes"}
    metrics = write_report(tmp_path / "r", p, read_image=read_image, title="Digits", facts=facts, history=history)

    assert {path.name for path in (tmp_path / "r").iterdir()} == FILES | {"history.png"}
    assert json.loads((tmp_path / "r" / "metrics.json").read_text()) == metrics
    assert metrics["top1"] == pytest.approx(model.score(digits.data[1400:], targets))
    text = words(tmp_path / "r")
    assert f"{100 * metrics['top1']:.1f} % of 397 images classified correctly; most frequent mistake:" in text
    assert "naive Bayes" in text
    assert "Training" in text
    # Only what is shown is read, and once.
    assert len(read) == len(set(read)) <= test_page.WORST + test_page.UNSURE
    table = rows_of(tmp_path / "r" / "per_class.csv")
    assert table[0] == ["class", "precision", "recall", "f1", "support"]
    assert float(table[4][3]) == metrics["per_class"]["3"]["f1"]


@pytest.mark.parametrize(
    ("answers", "targets", "headline"),
    [
        ([0], [0], "The one image is classified correctly."),
        ([0], [1], "0 % of 1 image classified correctly."),
        ([0, 1, 1], [0, 1, 1], "All 3 images are classified correctly."),
        ([1, 1], [0, 0], "0 % of 2 images classified correctly; most frequent mistake: x predicted as y (2 times)."),
    ],
)
def test_smallest_reports(tmp_path, answers, targets, headline):
    probs = np.array([[0.9, 0.1], [0.2, 0.8]], np.float32)[answers]
    p = Predictions([f"{i}.png" for i in range(len(answers))], probs, np.array(targets), ("x", "y"))
    write_report(tmp_path, p)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert headline in words(tmp_path)


def test_history_without_curves_is_left_out(tmp_path):
    rows = [{"lr": 0.1, "train/loss": float("nan")}, {}]
    assert figures.draw_history(rows, figures.LIGHT) is None
    assert figures.draw_history([], figures.LIGHT) is None
    assert figures.draw_history([*rows, {"val/loss": 3.0}], figures.DARK)


def test_unreadable_images_are_grey(tmp_path):
    def broken(path):
        raise OSError(path)

    p = predictions(12, ["x", "y"], pull=0)
    write_report(tmp_path, p, read_image=broken)
    assert (html_module.thumbnail(broken, "a") == 160).all()


def test_thumbnails_keep_their_aspect():
    def shape(height, width):
        return html_module.thumbnail(lambda _: np.zeros((height, width, 3), np.uint8), "a").shape

    assert shape(300, 400) == (120, 160, 3)
    assert shape(2000, 3) == (160, 1, 3)
    assert shape(8, 8) == (8, 8, 3)


def test_thumbnails_keep_their_colours():
    import base64

    import cv2

    red = np.zeros((100, 100, 3), np.uint8)
    red[..., 0] = 255
    data = base64.b64decode(html_module.gallery_entry(red, "a")["image"].split(",")[1])
    blue, _, shown = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[50, 50]  # OpenCV is BGR
    assert blue < 10
    assert shown > 245


def test_no_paths_of_this_machine_are_in_the_report(tmp_path):
    write_report(tmp_path / "run", predictions(30, list("abc")), facts={"Model": "m"})
    for path in (tmp_path / "run").iterdir():
        content = path.read_bytes()
        for place in (str(tmp_path), str(Path.home()), str(Path.cwd()), sys.prefix):
            assert place == "/" or place.encode() not in content, (path.name, place)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "p.csv"
    path.write_text("old")
    p = predictions(3, ["x", "y"])

    def full(self, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(UserError, match=r"cannot write .*p\.csv: No space left on device"):
            write_predictions(p, path)
    assert [f.name for f in tmp_path.iterdir()] == ["p.csv"]
    assert path.read_text() == "old"

    def broken(*args):
        raise RuntimeError("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(files, "csv_cell", broken)
        with pytest.raises(RuntimeError, match="middle"):
            write_predictions(p, path)
    assert [f.name for f in tmp_path.iterdir()] == ["p.csv"]
    assert path.read_text() == "old"

    write_predictions(p, path)
    assert len(rows_of(path)) == 4
    with pytest.raises(UserError, match="cannot write"):
        write_predictions(p, path / "below a file.csv")


def test_files_can_be_read_by_colleagues(tmp_path):
    if sys.platform == "win32":
        pytest.skip("POSIX permissions")
    (tmp_path / "usual").touch()
    write_predictions(predictions(1, ["x", "y"]), tmp_path / "p.csv")
    assert (tmp_path / "p.csv").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_ten_thousand_classes(tmp_path):
    p = predictions(1000, [f"class {i}" for i in range(10_000)], pull=4.0)
    start = time.process_time()
    write_report(tmp_path, p)
    # Usually 3 to 5 s; the bound only catches work that grows with the square of the classes.
    assert time.process_time() - start < 60
    assert (tmp_path / "report.html").stat().st_size < 1e6
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 6e6
    assert "Only the 25 most confused of 10,000 classes are shown." in words(tmp_path)


def test_import_is_light_and_drawing_leaves_the_backend_alone(tmp_path):
    code = """
import sys
from rexnet_lit.report.predictions import Predictions
from rexnet_lit.report.test_page import write_report
heavy = {"torch", "lightning", "matplotlib", "jinja2", "cv2", "sklearn"} & set(sys.modules)
assert not heavy, heavy
import numpy as np
p = Predictions(["a"], np.array([[0.4, 0.6]], np.float32), np.array([0]), ("x", "y"))
read = lambda path: np.zeros((9, 9, 3), np.uint8)
results = {"top1": 0.0, "macro_f1": 0.0, "nll": 0.9, "ece": 0.6, "count": 1, "support": [1, 0]}
results |= dict.fromkeys(("precision", "recall", "f1"), [0.0, 0.0])
write_report(sys.argv[1], p, results, read_image=read, title="t", facts={})
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(tmp_path)], check=True)


def test_a_users_style_does_not_break_the_figures(tmp_path):
    import matplotlib

    style = {"axes.grid": True, "figure.autolayout": True, "text.color": "red", "font.family": "no such font"}
    with matplotlib.rc_context(style):
        write_report(tmp_path, predictions(9, list("abc")))

"""Deciding about images on the page of `check`: in Chromium, by keyboard and mouse, and back through `data.fixes`."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_tools import rows_of
from image_tools import encode, photo

from rexnet_lit.checks.check import check
from rexnet_lit.checks.findings import Suspect
from rexnet_lit.data import decode, fixes
from rexnet_lit.data.folder import scan
from rexnet_lit.data.settings import DataRecord, SplitSettings
from rexnet_lit.report import test_page
from rexnet_lit.report.dataset_page import write_dataset_page
from rexnet_lit.report.predictions import Predictions

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "=<b>\n\"'</script><script>document.title=1</script>".replace("/", "\u2215")  # no name holds a slash


@pytest.fixture
def dataset(tmp_path):
    """60 classes, one with a hostile name; a copy in another class, and an image of odd shape."""
    root = tmp_path / "data"
    for number in range(60):
        folder = root / (EVIL if number == 0 else f"class {number}")
        folder.mkdir(parents=True)
        for i in range(4 if number < 4 else 2):
            (folder / f"{i}\udcff,.png").write_bytes(encode(photo(40, 40, 10 * number + i), "PNG"))
    shutil.copy(root / "class 7" / "0\udcff,.png", root / "class 8" / "copy.png")
    (root / "class 9" / "long.png").write_bytes(encode(photo(200, 40, 9999), "PNG"))
    return root


def write_page(root, file):
    """Write the page with three suspects."""
    result = check(root)
    names = (EVIL, "class 1", "class 2", "class 3")
    suspects = tuple(
        Suspect(f"{a}/0\udcff,.png", a, b, 0.1, 0.8, (f"{a}/1\udcff,.png",), (f"{b}/0\udcff,.png", f"{b}/1\udcff,.png"))
        for a, b in itertools.pairwise(names)
    )
    result = dataclasses.replace(result, suspects=suspects)
    write_dataset_page(
        file, result, read_image=lambda p: decode.read(root / p), sha256=lambda p: fixes.sha256_of(root / p)
    )


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_decisions_by_keyboard_and_mouse(dataset, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    write_page(dataset, tmp_path / "page.html")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, errors = browser.new_page(), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "console", lambda message: errors.append(message.text)
        )  # what the content security policy blocks is said there
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else errors.append(r.url))
        page.goto((tmp_path / "page.html").as_uri())
        keys, count = page.keyboard, page.locator("#decide output")
        assert count.inner_text().startswith("0 of 6 decided")  # three suspects, two copies, one long
        keys.press("k")  # no image is selected yet
        assert count.inner_text().startswith("0 of 6 decided")
        for key in ("ArrowRight", "k", "u", "s", "l"):  # the first: kept, undone, relabelled; the second: which class?
            keys.press(key)
        keys.type("ss 5")
        assert page.locator("#choose option").first.inner_text() == "class 5"
        keys.press("ArrowDown")
        keys.press("Enter")
        keys.press("r")  # the third
        assert count.inner_text() == "3 of 6 decided: 0 kept, 2 relabelled, 1 removed"
        page.reload()
        assert count.inner_text() == "3 of 6 decided: 0 kept, 2 relabelled, 1 removed"
        copy, long = (page.locator(f"[data-path$='{name}']") for name in ("copy.png", "long.png"))
        copy.get_by_text("Remove").click()
        long.get_by_text("Relabel…").click()
        page.locator("#choose input").fill("=<B>")
        page.locator("#choose option").click()
        assert long.locator("[aria-pressed=true]").inner_text() == "Relabel as '" + EVIL.replace("\n", "\\n")
        page.locator("[data-path^='class 7']").get_by_text("Keep").click()
        with page.expect_download() as download:
            page.get_by_text("Save fixes.csv").click()
        download.value.save_as(tmp_path / "fixes.csv")
        assert page.title() == "data"
        browser.close()
    assert errors == []
    rows = rows_of(tmp_path / "fixes.csv")
    assert list(rows[0]) == list(fixes.COLUMNS)
    escaped = "'" + EVIL.replace("\n", "\\n")
    assert [(row["path"], row["action"], row["label"]) for row in rows] == [
        (escaped + "/0\\xff,.png", "relabel", "class 1"),
        ("class 1/0\\xff,.png", "relabel", "class 50"),
        ("class 2/0\\xff,.png", "remove", ""),
        ("class 8/copy.png", "remove", ""),
        ("class 9/long.png", "relabel", escaped),
        ("class 7/0\\xff,.png", "keep", ""),
    ]
    assert rows[1]["reason"] == "suspect: class 2 80 %, class 1 10 %"
    folder = scan(dataset, SplitSettings(fixes=str(tmp_path / "fixes.csv")))
    labels = {
        path: folder.class_names[target]
        for samples in folder.splits.values()
        for path, target in zip(samples.paths, samples.targets.tolist(), strict=True)
    }
    assert (labels[f"{EVIL}/0\udcff,.png"], labels["class 9/long.png"]) == ("class 1", EVIL)
    (dataset / "class 9" / "long.png").write_bytes(encode(photo(200, 41), "PNG"))
    found = {
        finding.code: finding for finding in check(dataset, DataRecord(fixes=str(tmp_path / "fixes.csv"))).findings
    }
    assert "has changed since it was decided on: 'class 9/long.png'" in found["folder"].message


def test_kept_images_are_not_reported_again(dataset, tmp_path):
    text = "path,action\nclass 9/long.png,keep\nclass 8/copy.png,keep\n"
    (tmp_path / "fixes.csv").write_text(text)
    codes = {f.code for f in check(dataset, DataRecord(fixes=str(tmp_path / "fixes.csv"))).findings}
    assert "long" not in codes
    assert "duplicate-across-classes" in codes  # of which one image is decided on
    (tmp_path / "fixes.csv").write_text(text + '"class 7/0\\xff,.png",keep\n')
    result = check(dataset, DataRecord(fixes=str(tmp_path / "fixes.csv")))
    assert "duplicate-across-classes" not in {f.code for f in result.findings}
    assert result.duplicates == ()


def test_mistakes_of_a_test_are_decided_on_the_same_way(tmp_path):
    probs = np.array([[0.2, 0.8], [0.9, 0.1], [0.3, 0.7]], np.float32)
    p = Predictions(["a/=1.png", "a/2.png", "b/3.png"], probs, np.array([0, 0, 1]), ("a", "b"))
    results = {"top1": 2 / 3, "macro_f1": 0.5, "nll": 1.0, "ece": 0.1, "count": 3}
    results |= {name: [1, 1] for name in test_page.COLUMNS}
    grey = np.full((20, 30, 3), 90, np.uint8)
    test_page.write_report(
        tmp_path, p, results, read_image=lambda _: grey, title="t", facts={}, sha256=lambda p: p[::-1]
    )
    html = (tmp_path / "report.html").read_text("utf-8")
    assert html.count('class="item"') == 1
    shown = (
        'data-path="a/=1.png" data-label="a" data-suggested="b" data-reason="predicted b, 80 %" data-sha256="gnp.1=/a"'
    )
    assert shown in html


def test_a_page_with_nothing_to_decide_has_no_script(tmp_path):
    for name in ("a", "b"):
        for i in range(12):
            Path(tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{i}.png").write_bytes(encode(photo(40, 40, ord(name) * 100 + i), "PNG"))
    write_dataset_page(tmp_path / "p.html", check(tmp_path), read_image=lambda p: decode.read(tmp_path / p))
    assert "<script" not in (tmp_path / "p.html").read_text("utf-8")

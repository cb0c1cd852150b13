"""What the report shows of each mistake, against scikit-learn's neighbours and the classifier's own heat map."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_tools import lively_model, write_dataset
from sklearn.neighbors import NearestNeighbors

import rexnet_lit
from rexnet_lit.cli import main
from rexnet_lit.data.splits import draw_evenly
from rexnet_lit.report.html import draw_heat
from rexnet_lit.training.callbacks import evidence


def test_the_draw_is_even():
    targets = np.array([0] * 10 + [1] * 3 + [2])
    drawn = draw_evenly(targets, 7)
    assert np.bincount(targets[drawn]).tolist() == [3, 3, 1]
    assert (np.diff(drawn) > 0).all()
    assert (draw_evenly(targets, 7) == drawn).all()
    assert draw_evenly(targets, 14).tolist() == list(range(14))
    assert draw_evenly(targets[:0], 7).tolist() == []


@pytest.mark.usefixtures("quick_runs")
def test_mistakes_are_explained(tmp_path, monkeypatch):
    root = write_dataset(tmp_path / "data", train=4, val=1, test=3)
    model = lively_model(tmp_path / "model.safetensors", size=32)
    (root / "train" / "ring" / "empty.png").touch()
    monkeypatch.chdir(tmp_path)
    shown = []
    find = evidence.explainer

    def recorded(*args):
        explain = find(*args)

        def record(path):
            shown.append((path, explain(path)))
            return shown[-1][1]

        return record

    monkeypatch.setattr(evidence, "explainer", recorded)
    argv = ["test", str(model), str(root), "--data.num_workers", "0", "--trainer.accelerator", "cpu"]
    assert main.main(argv) == 0
    classifier = rexnet_lit.load(model, "cpu")
    files = sorted(f for f in (root / "train").rglob("*.png") if f.stat().st_size)
    nearest = NearestNeighbors(n_neighbors=3, metric="cosine", algorithm="brute").fit(classifier.embed(files))
    for path, found in shown:
        indices = nearest.kneighbors(classifier.embed(root / path), return_distance=False)[0]
        wanted = [files[i].relative_to(root).as_posix() for i in indices]
        assert [near for near, _ in found.nearest] == wanted
        assert [classifier.class_names[k] for _, k in found.nearest] == [path.split("/")[1] for path in wanted]
        heat = draw_heat(classifier.view(root / path), classifier.explain(root / path))
        assert np.abs(found.heat.astype(int) - heat).max() <= 1  # BatchNorm is folded
    page = Path("lightning_logs/version_0/report/report.html").read_text("utf-8")
    assert shown
    assert page.count('class="seen"') == len(shown)
    assert re.findall(r'<span title="(train/[^"]*)"', page) == [near for _, found in shown for near, _ in found.nearest]
    assert "All 12 training images were compared." in page  # one cannot be read
    count = len(shown)
    shutil.rmtree(root / "train")
    assert main.main(argv) == 0
    page = Path("lightning_logs/version_1/report/report.html").read_text("utf-8")
    assert "There are no training images here to compare with." in page
    assert page.count('class="seen"') == len(shown) - count > 0

"""The command `similar`: the nearest images, against scikit-learn; an index that is kept and brought up to date."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cli_tools import NAMES, fails, lively_model, picture, write_dataset
from PIL import Image
from sklearn.neighbors import NearestNeighbors

import rexnet_lit
from rexnet_lit.cli import main
from rexnet_lit.models.predictor import Classifier
from rexnet_lit.search import similar


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return lively_model(tmp_path_factory.mktemp("model") / "model.safetensors")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rexnet_lit" / "similar"


def search(capsys, *argv):
    assert main.main(["similar", *map(str, argv)]) == 0
    return capsys.readouterr().out


def test_the_nearest_images_are_scikit_learn_s(model, tmp_path, capsys):
    root = write_dataset(tmp_path / "data", train=3, val=1)
    (root / "train" / "ring" / "empty.png").touch()
    query = tmp_path / "query.png"
    Image.fromarray(picture("ring", 77)).save(query)
    page = tmp_path / "page.html"
    options = ("--index", root, "--model", model, "--top", 4)
    found = json.loads(search(capsys, query, *options, "--json", "--report", page))
    assert (found["images"], found["unreadable"]) == (13, ["train/ring/empty.png"])
    files = sorted(f for f in root.rglob("*.png") if f.stat().st_size)
    classifier = rexnet_lit.load(model, "cpu")
    nearest = NearestNeighbors(n_neighbors=4, metric="cosine", algorithm="brute").fit(classifier.embed(files))
    distances, indices = nearest.kneighbors(classifier.embed(query))
    rows = found["results"][0]["similar"]
    assert [row["path"] for row in rows] == [files[i].relative_to(root).as_posix() for i in indices[0]]
    np.testing.assert_allclose([row["similarity"] for row in rows], 1 - distances[0], atol=0.002)
    assert all(row["class"] == row["path"].split("/")[1] for row in rows)
    assert page.read_text("utf-8").count("data:image/png") == 5
    own = search(capsys, files[0], *options)
    assert files[0].name not in own.partition("\n")[2]
    assert len(own.splitlines()) == 6  # the query, the titles, four images


def test_a_packed_dataset(model, tmp_path, capsys):
    root = write_dataset(tmp_path / "data", train=3, val=1)
    assert main.main(["pack", str(root), str(tmp_path / "packed")]) == 0
    assert "12 images in 1 shard" in capsys.readouterr().out
    query = min((root / "train" / "ring").iterdir())
    options = ("--model", model, "--top", 3, "--json")
    expected, found = (
        json.loads(search(capsys, query, "--index", index, *options))["results"][0]["similar"]
        for index in (root, f"file://{tmp_path / 'packed'}")
    )
    assert found[0]["path"] == query.relative_to(root).as_posix()  # the query itself: another file than the packed one
    assert [row["path"] for row in found[1:]] == [row["path"] for row in expected[:2]]


def test_only_new_images_are_computed(model, cache, tmp_path, monkeypatch):
    root = write_dataset(tmp_path / "data", train=2)
    before = set(root.rglob("*"))
    classifier, embedded = rexnet_lit.load(model, "cpu"), []
    embed = Classifier.embed

    def record(self, images, **options):
        embedded.extend(image.name for image in images)
        return embed(self, images, **options)

    monkeypatch.setattr(Classifier, "embed", record)
    first = similar.build_index(root, classifier)
    assert len(embedded) == 6
    assert set(root.rglob("*")) == before
    assert [file.suffix for file in cache.iterdir()] == [".npz"]
    embedded.clear()
    Image.fromarray(picture("disc", 9)).save(root / "train" / "disc" / "new.png")
    Image.fromarray(picture("ring", 9)).save(root / "train" / "ring" / "ring 000.png")
    (root / "train" / "bars" / "bars 000.png").unlink()
    second = similar.build_index(root, classifier)
    assert sorted(embedded) == ["new.png", "ring 000.png"]
    assert second.paths != first.paths
    embedded.clear()
    third = similar.build_index(root, classifier)
    assert embedded == []
    np.testing.assert_array_equal(third.features, second.features)
    next(cache.iterdir()).write_bytes(b"damaged")
    assert len(similar.build_index(root, classifier).paths) == 6
    assert len(embedded) == 6


def test_mistakes_are_one_line(model, tmp_path, capsys):
    root = write_dataset(tmp_path / "data", names=NAMES[:1], train=1)
    image = next(root.rglob("*.png"))
    for argv, message in (
        ((tmp_path / "none.png", "--index", root), "no such file or folder"),
        ((image, "--index", image), "there is no folder"),
        ((image, "--index", root, "--top", "0"), "--top is 0"),
        ((image, "--index", root, "--report", image), "is no .html or .htm file"),
    ):
        assert message in fails(capsys, "similar", *argv, "--model", model)


def test_the_class_is_the_first_folder_below_the_splits():
    paths = ("a.png", "train/a.png", "cat/a.png", "val/cat/deep/a.png", "cat/val/a.png", "train/val/a.png")
    assert [similar.class_of(path) for path in paths] == ["", "", "cat", "cat", "cat", "val"]

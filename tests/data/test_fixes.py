"""Fixes of a dataset: read from a CSV file, applied to what `scan` finds, and written as a copy."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest
from cli_tools import fails

from rexnet_lit.cli import main
from rexnet_lit.data import fixes
from rexnet_lit.data.datamodule import ImageFolderDataModule
from rexnet_lit.data.folder import scan
from rexnet_lit.data.settings import DataRecord, SplitSettings
from rexnet_lit.data.table import write_split
from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.files import csv_cell


def files(root, *paths):
    """Write a file at each path, whose content is the path."""
    for path in paths:
        where = Path(root) / os.fsdecode(path)
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_bytes(os.fsencode(path))
    return Path(root)


@pytest.fixture
def root(tmp_path):
    """Ten images in each of three classes, to be split."""
    return files(tmp_path / "data", *(f"{name}/{i}.png" for name in ("cat", "dog", "emu") for i in range(10)))


def labels(folder):
    """Split and class of each image."""
    return {
        path: (split, folder.class_names[target])
        for split, samples in folder.splits.items()
        for path, target in zip(samples.paths, samples.targets.tolist(), strict=True)
    }


def apply(root, text, **settings):
    file = root.parent / "fixes.csv"
    file.write_text(text)
    return scan(root, SplitSettings(fixes=str(file), **settings))


def test_labels_change_and_splits_do_not(root):
    before = labels(scan(root))
    text = f"path,action,label\n./cat/3.png,relabel,dog\n{root}/emu/1.png,remove,\n"
    text += "dog/0.png,keep,\ndog/2.png,relabel,dog\n"
    folder = apply(root, text)
    expected = {**before, "cat/3.png": (before["cat/3.png"][0], "dog")}
    del expected["emu/1.png"]
    assert labels(folder) == expected
    assert folder.fixes.kept == {"dog/0.png"}
    assert folder.fixes.summary == "1 relabelled ('cat' to 'dog': 1), 1 removed, 1 kept, 1 already as wanted"
    assert any(folder.fixes.summary in note for note in folder.notes)
    for samples in folder.splits.values():  # in order within each class, as without fixes
        rows = list(zip(samples.targets.tolist(), samples.paths.raws(), strict=True))
        assert rows == sorted(rows)


def test_fixes_are_a_condition_of_an_exact_resume(root, tmp_path):
    def fingerprints(text):
        (tmp_path / "fixes.csv").write_text("path,action,label\n" + text)
        return ImageFolderDataModule(str(root), fixes=str(tmp_path / "fixes.csv")).fingerprints()

    before = ImageFolderDataModule(str(root)).fingerprints()
    split_of = {path: split for path, (split, _) in labels(scan(root)).items()}
    train, val = (next(path for path, split in split_of.items() if split == name) for name in ("train", "val"))
    changed = fingerprints(f"{train},relabel,dog\n")
    assert [name for name in before if changed[name] != before[name]] == ["train images"]
    changed = fingerprints(f"{val},remove,\n")
    assert [name for name in before if changed[name] != before[name]] == ["val images"]
    assert fingerprints(f"{train},keep,\n") == before


def test_a_split_file_with_the_fixes_can_be_fixed_again(root, tmp_path):
    text = "path,action,label\ncat/3.png,relabel,dog\nemu/1.png,remove,\ndog/0.png,keep,\n"
    folder = apply(root, text)
    write_split(folder, tmp_path / "split.csv")
    again = apply(root, text, split_file=str(tmp_path / "split.csv"))
    assert labels(again) == labels(folder)
    assert again.fixes.summary == "0 relabelled, 0 removed, 1 kept, 2 already as wanted"


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ("cat/99.png,keep,,", "no such image"),
        ("../secret.png,remove,,", "no such image"),
        ("cat/1.png,relable,dog,", "none of keep, relabel, remove: 'cat/1.png: relable'"),
        ("cat/1.png,relabel,dgo,", "no such class: 'cat/1.png: dgo'"),
        ("cat/1.png,relabel,,", "no such class"),
        ("cat/1.png,keep,,\ncat/1.png,remove,,", "listed twice: 'cat/1.png'"),
        ("cat/1.png,remove,,0123", "changed since it was decided on: 'cat/1.png'"),
        ("\n".join(f"cat/{i}.png,remove,," for i in range(10)), "no training image is left of 'cat'"),
    ],
)
def test_wrong_fixes_are_refused(root, rows, named):
    with pytest.raises(UserError, match=r"data\.fixes") as caught:
        apply(root, f"path,action,label,sha256\n{rows}\n")
    assert named in str(caught.value)


@pytest.mark.parametrize("text", ["", "path;action\n", "path,label\ncat/1.png,dog\n"])
def test_a_file_of_another_kind_is_refused(root, text):
    with pytest.raises(UserError, match="expected the columns path, action, label"):
        apply(root, text)
    with pytest.raises(UserError, match=r"data.fixes .*gone.csv.*No such file"):
        scan(root, SplitSettings(fixes="gone.csv"))


def test_s10_hostile_names_come_back(tmp_path):
    """As the pages write them: invisible characters escaped, formulas quoted."""
    names = ("=cmd()", "line\nbreak", "raw\udcff", 'a,b"c')
    root = files(tmp_path / "data", *(f"{name}/+{i}\r.png" for name in names for i in range(4)))
    with (tmp_path / "fixes.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(fixes.COLUMNS)
        for old, new in zip(names, (*names[1:], names[0]), strict=True):
            path = f"{old}/+0\r.png"
            writer.writerow((csv_cell(path), "relabel", csv_cell(new), "", fixes.sha256_of(root / path)))
    found = labels(scan(root, SplitSettings(fixes=str(tmp_path / "fixes.csv"))))
    assert [found[f"{name}/+0\r.png"][1] for name in names] == [*names[1:], names[0]]
    files(root, r"line\nbreak/1.png", "line\nbreak/1.png")
    with pytest.raises(UserError, match="several images may be meant"):
        apply(root, "path,action\nline\\nbreak/1.png,keep\n")


@pytest.mark.parametrize("link", [False, True])
def test_a_fixed_copy(tmp_path, capsys, monkeypatch, link):
    monkeypatch.chdir(tmp_path)
    names = [f"{split}/{name}/{i}.png" for split in ("train", "val") for name in ("cat", "dog") for i in range(3)]
    root = files("data", *names, "train/cat/inner/X.png", "train/notes.txt")
    rows = "train/cat/0.png,relabel,dog\ntrain/cat/inner/X.png,relabel,dog\nval/dog/1.png,remove,\nval/cat/2.png,keep,"
    Path("fixes.csv").write_text(f"path,action,label\n{rows}\n")
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in root.rglob("*.png")}
    command = ["fix", "data", "fixes.csv", "--output", "new", *(["--link"] if link else [])]
    assert main.main(command) == 0
    assert capsys.readouterr().out == "new: 12 images; 2 relabelled ('cat' to 'dog': 2), 1 removed, 1 kept\n"
    content = {str(p.relative_to("new")): p.read_text() for p in Path("new").rglob("*") if p.is_file()}
    gone = {"train/cat/0.png", "val/dog/1.png"}
    moved = {"train/dog/0-1.png": "train/cat/0.png", "train/dog/inner/X.png": "train/cat/inner/X.png"}
    assert content == {name: name for name in names if name not in gone} | moved
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in root.rglob("*.png")} == before
    assert (Path("new/val/cat/0.png").stat().st_nlink == 2) == link
    assert {path.name for path in tmp_path.iterdir()} == {"data", "fixes.csv", "new"}
    assert "exists and is not empty" in fails(capsys, *command)
    assert "inside the dataset" in fails(capsys, *command[:4], "data/new")
    Path("fixes.csv").write_text("path,action\ngone.png,keep\n")
    assert "no such image" in fails(capsys, *command[:4], "other")
    assert not Path("other").exists()


def test_the_record_of_a_model_names_the_fixes():
    assert DataRecord(fixes="a.csv") == DataRecord()  # the same splits
    with pytest.raises(TypeError):
        DataRecord(fixes=3)

"""Folders as people have them. Numbers after "A" are the cases of the project's list of data faults."""

from __future__ import annotations

import os
import pickle
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rexnet_lit.data import folder as scanner
from rexnet_lit.data import walk as walk_module
from rexnet_lit.data.folder import Samples, fingerprint, list_images, try_scan
from rexnet_lit.data.settings import SplitSettings
from rexnet_lit.data.table import write_split
from rexnet_lit.data.walk import PathList, Walk
from rexnet_lit.utils.errors import UserError


def scan(root, class_names=None, **settings):
    return scanner.scan(root, SplitSettings(**settings), class_names)


def make(root: Path, *files: str) -> Path:
    """Create empty files; scanning never opens them."""
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def many(folder: str, count: int, suffix: str = "jpg") -> list[str]:
    return [f"{folder}/{i:04}.{suffix}" for i in range(count)]


def names(folder, split) -> dict[str, list[str]]:
    """The paths of each class."""
    samples = folder.splits[split]
    found: dict[str, list[str]] = {}
    for path, target in zip(samples.paths, samples.targets, strict=True):
        found.setdefault(folder.class_names[target], []).append(path)
    return found


# --- PathList -------------------------------------------------------------------------------------


def test_path_list_behaves_like_a_list():
    raw = [b"a/x.jpg", b"", "ü.png".encode(), b"\xff.gif"]
    paths = PathList(raw)
    assert list(paths) == [os.fsdecode(p) for p in raw]
    assert len(paths) == 4
    assert paths[-1] == "\udcff.gif"
    assert paths[np.int64(0)] == "a/x.jpg"
    assert list(paths.take(np.array([3, 0, 0]))) == ["\udcff.gif", "a/x.jpg", "a/x.jpg"]
    assert list(PathList.join([paths, PathList(), paths])) == list(paths) * 2
    assert pickle.loads(pickle.dumps(paths)) == paths  # noqa: S301
    assert "ü.png" in paths
    assert list(PathList()) == []
    for index in (4, -5):
        with pytest.raises(IndexError):
            paths[index]


def test_path_list_is_small():
    paths = PathList([b"class/%07d.jpg" % i for i in range(100_000)])
    assert len(pickle.dumps(paths)) < 100_000 * (17 + 8) + 1000


# --- layouts and classes --------------------------------------------------------------------------


def test_split_layout(tmp_path):
    make(
        tmp_path,
        "train/cat/1.jpg",
        "train/dog/2.PNG",
        "val/cat/3.webp",
        "val/dog/4.tiff",
        "test/dog/5.gif",
        "test/cat/6.bmp",
    )
    folder = scan(tmp_path)
    assert folder.layout == "split"
    assert folder.class_names == ("cat", "dog")
    assert folder.root == tmp_path
    assert list(folder.splits) == ["train", "val", "test"]
    assert names(folder, "train") == {"cat": ["train/cat/1.jpg"], "dog": ["train/dog/2.PNG"]}
    assert folder.splits["test"].targets.tolist() == [0, 1]
    assert folder.splits["test"].path(0) == str(tmp_path / "test/cat/6.bmp")
    assert folder.notes == ()
    assert folder.clutter == 0


def test_every_usual_ending_of_the_formats_is_an_image(tmp_path):
    """Pillow's endings of them, and those of Chrome, Windows and stereo cameras."""
    Image.init()
    formats = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF")
    known = {ending[1:] for ending, name in Image.registered_extensions().items() if name in formats}
    known |= {"jif", "jfi", "jfif-tbnl", "pjp", "pjpeg", "jps", "btf", "tf8"}
    folder = scan(make(tmp_path, *(f"{c}/{e}.{e.upper()}" for c in "ab" for e in known)))
    assert sum(len(samples) for samples in folder.splits.values()) == 2 * len(known)
    assert folder.clutter == 0


def test_flat_layout_is_split_by_class(tmp_path):
    folder = scan(make(tmp_path, *many("cat", 50), *many("dog", 10)), val_fraction=0.2, test_fraction=0.1)
    assert folder.layout == "flat"
    counts = {split: np.bincount(s.targets).tolist() for split, s in folder.splits.items()}
    assert counts == {"train": [35, 7], "val": [10, 2], "test": [5, 1]}
    everything = [p for s in folder.splits.values() for p in s.paths]
    assert len(set(everything)) == 60


@pytest.mark.parametrize("name", ["valid", "validation", "Val", "VALID"])
def test_other_names_of_val(tmp_path, name):
    folder = scan(make(tmp_path, "Train/a/1.jpg", "Train/b/1.jpg", f"{name}/a/2.jpg", f"{name}/b/2.jpg"))
    assert set(folder.splits) == {"train", "val"}
    assert any(f"'{name}' is taken as val/" in note for note in folder.notes)


def test_val_twice(tmp_path):
    make(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/a/2.jpg", "valid/b/2.jpg")
    with pytest.raises(UserError, match="'val', 'valid' are one split; keep one"):
        scan(tmp_path)


def test_train_without_val_is_divided_and_test_is_never_invented(tmp_path):
    make(tmp_path, *many("train/a", 10), *many("train/b", 10), "test/a/x.jpg")
    folder = scan(tmp_path)
    assert {split: len(s) for split, s in folder.splits.items()} == {"train": 16, "val": 4, "test": 1}
    assert any("val is drawn from train" in note for note in folder.notes)
    (tmp_path / "test/a/x.jpg").unlink()
    assert set(scan(tmp_path).splits) == {"train", "val"}


def test_class_order(tmp_path):
    make(tmp_path, *(f"{split}/{c}/1.jpg" for split in ("train", "val") for c in ("x9", "x10", "X1", "é")))
    assert scan(tmp_path).class_names == ("X1", "x10", "x9", "é")
    assert scan(tmp_path, class_order="natural").class_names == ("X1", "x9", "x10", "é")
    order = tmp_path / "order.txt"
    order.write_text("é\nx10\r\nX1\nx9\n", encoding="utf-8")
    folder = scan(tmp_path, class_order=order)
    assert folder.class_names == ("é", "x10", "X1", "x9")
    assert names(folder, "val")["x10"] == ["val/x10/1.jpg"]
    order.write_text("é\nx10\nno\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"without a folder: 'no'; not listed: 'X1', 'x9'"):
        scan(tmp_path, class_order=order)
    order.write_text("\ufeffé\nx10\nX1\nx9\nx9", encoding="utf-8")  # as Windows' editor saves it
    with pytest.raises(UserError, match=r"data.class_order .*listed twice: 'x9'"):
        scan(tmp_path, class_order=order)
    with pytest.raises(UserError, match=r"class_order 'alphabetical': expected sorted, natural or a file of names"):
        scan(tmp_path, class_order="alphabetical")


def test_natural_order_takes_any_name(tmp_path):
    make(tmp_path, *many("x²", 3), *many("٣", 3), *many("12", 3), *many("a1b", 3))
    assert len(scan(tmp_path, class_order="natural").class_names) == 4


def test_a16_nested_folders_belong_to_the_class_above(tmp_path):
    make(tmp_path, *many("bottle/good", 5), *many("bottle/bad/deep", 5), *many("cable", 5), "cable/good/1.jpg")
    folder = scan(tmp_path)
    assert folder.class_names == ("bottle", "cable")
    assert len([n for n in folder.notes if "nested" in n]) == 1
    assert sum(map(len, folder.splits.values())) == 16


def test_a17_val_lacks_a_class(tmp_path):
    make(tmp_path, *(f"train/{c}/1.jpg" for c in "abc"), "val/a/1.jpg", "val/c/1.jpg")
    folder = scan(tmp_path)
    assert names(folder, "val") == {"a": ["val/a/1.jpg"], "c": ["val/c/1.jpg"]}
    assert folder.splits["val"].targets.tolist() == [0, 2]
    assert any("1 of 3 classes have no images in val: 'b'" in note for note in folder.notes)


def test_a18_class_only_in_val_or_test_names_all(tmp_path):
    make(tmp_path, *(f"train/{c}/1.jpg" for c in "ab"), *(f"val/{c}/1.jpg" for c in "abxy"), "test/z/1.jpg")
    with pytest.raises(UserError) as error:
        scan(tmp_path)
    for part in ("in val, but not in train: 'x', 'y'", "in test, but not in train: 'z'"):
        assert part in str(error.value)


def test_a19_empty_classes_are_all_listed(tmp_path):
    make(tmp_path, *many("a", 3), *many("b", 3), "c/readme.txt")
    (tmp_path / "d").mkdir()
    with pytest.raises(UserError, match=r"2 class folders without images: 'c', 'd'$"):
        scan(tmp_path)
    for name in "efghij":
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"8 class folders without images: 'c', 'd', 'e', 'f', 'g', 'h', 'i', 'j'$"):
        scan(tmp_path)


def test_a20_class_of_one_image_stays_in_train(tmp_path):
    folder = scan(make(tmp_path, *many("a", 10), "b/1.jpg"), val_fraction=0.9)
    assert names(folder, "train")["b"] == ["b/1.jpg"]
    assert any("one image" in note and "'b'" in note for note in folder.notes)


@pytest.mark.parametrize(("val", "test"), [(0.5, 0.4), (0.01, 0.01), (0.2, 0.0), (0.4, 0.59)])
@pytest.mark.parametrize("count", [2, 3, 4, 100])
def test_a20_small_classes_keep_train_and_val(tmp_path, count, val, test):
    folder = scan(make(tmp_path, *many("a", count), *many("b", count)), val_fraction=val, test_fraction=test)
    for split in ("train", "val"):
        assert np.bincount(folder.splits[split].targets).min() >= 1
    assert sum(map(len, folder.splits.values())) == 2 * count


def test_a21_no_val_and_no_fraction(tmp_path):
    make(tmp_path, *many("a", 3), *many("b", 3))
    with pytest.raises(UserError, match=r"no val split and data\.val_fraction is 0"):
        scan(tmp_path, val_fraction=0)


@pytest.mark.parametrize(("val", "test"), [(-0.1, 0), (1, 0), (0.5, 0.5), (float("nan"), 0), (0.2, 1.5)])
def test_fractions_are_checked(tmp_path, val, test):
    with pytest.raises(UserError, match="fraction"):
        scan(tmp_path, val_fraction=val, test_fraction=test)


def test_all_problems_at_once(tmp_path):
    make(tmp_path, "train/a/1.jpg", "train/b/x.txt", "val/c/1.jpg", "val/a/1.jpg", "test/d/1.jpg")
    _, problems = try_scan(tmp_path)
    assert len(problems) == 3
    with pytest.raises(UserError) as error:
        scan(tmp_path)
    assert all(problem in str(error.value) for problem in problems)
    assert "\n" not in str(error.value)


def test_unusable_folders(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        scan(tmp_path / "no")
    make(tmp_path, "file")
    with pytest.raises(UserError, match="a file, not a folder"):
        scan(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="it is empty; expected DIR/train/CLASS"):
        scan(tmp_path / "empty")
    with pytest.raises(UserError, match="2 images directly, no class folders; expected"):
        scan(make(tmp_path / "direct", "1.jpg", "2.jpg"))
    with pytest.raises(UserError, match="at least 2"):
        scan(make(tmp_path / "one", *many("a", 5)))
    with pytest.raises(UserError, match="no train/ folder"):
        scan(make(tmp_path / "eval", "val/a/1.jpg", "test/b/1.jpg"))
    with pytest.raises(UserError, match="no train/ folder beside 'cat', 'dog', 'test'"):
        scan(make(tmp_path / "mixed", "cat/1.jpg", "dog/1.jpg", "test/1.jpg"))


def test_splits_by_other_names(tmp_path):
    for train, val in (("Training", "dev"), ("TRAIN", "Validation")):
        root = tmp_path / train
        make(root, *many(f"{train}/a", 3), *many(f"{train}/b", 3), *many(f"{val}/a", 1), *many("Testing/b", 2), "x.jpg")
        folder = scan(root)
        assert {k: len(v) for k, v in folder.splits.items()} == {"train": 6, "val": 1, "test": 2}
        assert "1 image beside the splits, ignored" in folder.notes


def test_splits_with_unusual_names_are_noted(tmp_path):
    layout = [*many("seg_train/seg_train/a", 3), *many("seg_train/seg_train/b", 3), *many("seg_test/seg_test/b", 2)]
    folder = scan(make(tmp_path, *layout, *many("seg_test/seg_test/a", 2)))
    assert any("holds folders called 'a', 'b': if those are the classes" in note for note in folder.notes)


def test_valid_can_be_a_class_beside_invalid(tmp_path):
    folder = scan(make(tmp_path, *many("valid", 4), *many("invalid", 4)))
    assert folder.class_names == ("invalid", "valid")
    with pytest.raises(UserError, match="if 'test' is meant as a class, rename that folder"):
        scan(make(tmp_path / "other", *many("test", 4), *many("field", 4)))


def test_a22_a23_split_folders_that_are_links(tmp_path):
    make(tmp_path / "out", *many("a", 4), *many("b", 4))
    root = make(tmp_path / "in", *many("val/a", 2), *many("val/b", 2))
    (root / "train").symlink_to(tmp_path / "out")
    with pytest.raises(UserError, match="1 link out of the folder: 'train'"):
        scan(root)
    assert len(scan(root, follow_outside_links=True).splits["train"]) == 8
    (root / "train").unlink()
    (root / "train").symlink_to("val")
    with pytest.raises(UserError, match=r"(train and val|val and train) are the same folder by a link"):
        scan(root)


def test_a22_broken_links_are_counted(tmp_path):
    make(tmp_path, *many("a", 3), *many("b", 3))
    for link, target in (("a/self.jpg", "self.jpg"), ("a/through", "0000.jpg/x"), ("far", "y" * 300), ("me", "me")):
        (tmp_path / link).symlink_to(target)
    folder = scan(tmp_path)
    assert sum(map(len, folder.splits.values())) == 6
    assert any(note.startswith("4 broken links") for note in folder.notes)
    assert len(list_images(tmp_path)[1]) == 6


def test_train_can_be_a_class_of_vehicles(tmp_path):
    folder = scan(make(tmp_path, *many("bus", 4), *many("car", 4), *many("train", 4)))
    assert folder.class_names == ("bus", "car", "train")
    assert any("taken as a class" in note for note in folder.notes)


def test_unlabelled_test_folder_and_loose_images_are_noted(tmp_path):
    make(tmp_path, *many("train/a", 4), *many("train/b", 4), "train/x.jpg", *many("test", 7), "models/m.jpg")
    folder = scan(tmp_path)
    assert "test" not in folder.splits
    text = "\n".join(folder.notes)
    assert "test/ has 7 images without class folders" in text
    assert "'train': 1 image outside every class folder" in text
    assert "ignored beside the splits: 'models'" in text


# --- evaluating a model ---------------------------------------------------------------------------


def test_class_names_of_a_model_give_the_numbers(tmp_path):
    make(tmp_path, *(f"{split}/{c}/1.jpg" for split in ("train", "val") for c in "abc"))
    folder = scan(tmp_path, class_names=("c", "a", "b"))
    assert folder.class_names == ("c", "a", "b")
    assert names(folder, "val") == {c: [f"val/{c}/1.jpg"] for c in "cab"}


def test_class_names_with_test_only(tmp_path):
    make(tmp_path, "test/b/1.jpg", "test/a/1.jpg")
    (tmp_path / "test/c").mkdir()
    folder = scan(tmp_path, class_names=("c", "b", "a"), val_fraction=0)
    assert list(folder.splits) == ["test"]
    assert folder.splits["test"].targets.tolist() == [1, 2]
    assert any("1 of 3 classes have no images in test: 'c'" in note for note in folder.notes)


def test_a32_class_names_that_do_not_fit(tmp_path):
    make(tmp_path, *(f"{split}/{c}/1.jpg" for split in ("train", "val") for c in "abx"))
    with pytest.raises(
        UserError,
        match=r"classes of train, val are not the model's: unknown to it: 'x'; the model's, but not here: 'c'",
    ):
        scan(tmp_path, class_names=("a", "b", "c"))
    with pytest.raises(UserError, match=r"the model's, but not here: 'c'"):
        scan(tmp_path, class_names=("a", "b", "c", "x"))


def test_class_names_with_a_flat_folder_draw_the_same_val(tmp_path):
    make(tmp_path, *many("a", 20), *many("b", 20))
    fitted, evaluated = scan(tmp_path), scan(tmp_path, class_names=("b", "a"))
    assert names(fitted, "val") == names(evaluated, "val")


def test_class_names_with_train_only_draw_the_same_val(tmp_path):
    make(tmp_path, *many("train/a", 20), *many("train/b", 20))
    fitted, evaluated = scan(tmp_path), scan(tmp_path, class_names=("b", "a"))
    assert names(fitted, "val") == names(evaluated, "val")
    (tmp_path / "train/c").mkdir()
    assert set(scan(tmp_path, class_names=("b", "a", "c")).splits) == {"train", "val"}


# --- clutter --------------------------------------------------------------------------------------


def test_a14_a15_clutter_is_ignored_and_counted(tmp_path):
    make(tmp_path, *many("a", 5), *many("b", 5))
    make(
        tmp_path,
        *(
            ".DS_Store",
            "a/.DS_Store",
            "a/._0001.jpg",
            "a/Thumbs.db",
            "b/desktop.ini",
            ".ipynb_checkpoints/1.jpg",
        ),
        *("a/.ipynb_checkpoints/1.jpg", "__MACOSX/a/1.jpg", "notes.txt", "b/labels.csv", "b/x.json"),
        "b/.hidden/1.jpg",
    )
    folder = scan(tmp_path)
    assert folder.class_names == ("a", "b")
    assert sum(map(len, folder.splits.values())) == 10
    assert folder.clutter == 12


def test_unsupported_images_are_noted(tmp_path):
    make(tmp_path, *many("a", 5), *many("b", 5), "a/1.HEIC", "a/2.heic", "b/x.svg", "b/noextension")
    text = "\n".join(scan(tmp_path).notes)
    assert "2 .heic files ignored: convert to JPEG or PNG" in text
    assert "1 .svg file ignored" in text
    assert "1 file without an extension" in text


def test_pipes_and_folders_with_image_names(tmp_path):
    make(tmp_path, *many("a", 3), *many("b", 3), "a/folder.jpg/inner.jpg")
    os.mkfifo(tmp_path / "a/pipe.jpg")
    folder = scan(tmp_path)
    everything = [p for s in folder.splits.values() for p in s.paths]
    assert "a/folder.jpg/inner.jpg" in everything
    assert len(everything) == 7


# --- links (A22, A23) -----------------------------------------------------------------------------


def test_a22_link_loops_end(tmp_path):
    make(tmp_path, *many("train/a", 3), *many("train/b", 3), *many("val/a", 2), "val/b/1.jpg")
    (tmp_path / "train/a/loop").symlink_to(tmp_path / "train/a")
    (tmp_path / "train/b/up").symlink_to(tmp_path)
    (tmp_path / "train/b/sibling").symlink_to("../a")
    folder = scan(tmp_path)
    assert len(folder.splits["train"]) == 6
    assert len(folder.splits["val"]) == 3
    assert any("3 links to folders already read" in note for note in folder.notes)


def test_a22_links_to_each_other(tmp_path):
    make(tmp_path, *many("a", 3), *many("b", 3))
    outside = make(tmp_path.parent / f"{tmp_path.name}-x", "1/1.jpg", "2/2.jpg")
    (outside / "1/two").symlink_to("../2")
    (outside / "2/one").symlink_to("../1")
    (tmp_path / "a/one").symlink_to(outside / "1")
    (tmp_path / "b/one").symlink_to(outside / "1")
    folder = scan(tmp_path, follow_outside_links=True)
    everything = sorted(p for s in folder.splits.values() for p in s.paths)
    assert len(everything) == 8
    assert "a/one/1.jpg" in everything
    assert any(p.endswith("two/2.jpg") for p in everything)


def test_a22_a_folder_read_through_a_link_is_not_read_again(tmp_path):
    make(tmp_path, *many("a", 3), *many("b", 3), ".store/in/1.jpg", ".store/2.jpg")
    (tmp_path / "a/in").symlink_to("../.store/in")
    (tmp_path / "b/all").symlink_to("../.store")
    everything = sorted(p for s in scan(tmp_path).splits.values() for p in s.paths)
    assert len(everything) == 8
    assert {"a/in/1.jpg", "b/all/2.jpg"} <= set(everything)


def test_a23_links_out_of_the_root(tmp_path):
    outside = make(tmp_path.parent / f"{tmp_path.name}-y", "1.jpg", "more/2.jpg")
    make(tmp_path, *many("a", 3), *many("b", 3))
    (tmp_path / "a/link.jpg").symlink_to(outside / "1.jpg")
    (tmp_path / "b/more").symlink_to(outside / "more")
    with pytest.raises(UserError, match=r"2 links out of the folder: 'a/link.jpg'"):
        scan(tmp_path)
    folder = scan(tmp_path, follow_outside_links=True)
    assert sum(map(len, folder.splits.values())) == 8


def test_a23_a_class_folder_that_is_a_link(tmp_path):
    make(tmp_path, *many("a", 3), *many(".store/b", 4))
    (tmp_path / "b").symlink_to(".store/b")
    assert np.bincount(np.concatenate([s.targets for s in scan(tmp_path).splits.values()])).tolist() == [3, 4]
    (tmp_path / "c").symlink_to("/etc")
    with pytest.raises(UserError, match="1 link out of the folder: 'c'"):
        scan(tmp_path)


def test_links_inside_the_root_broken_links_and_a_linked_root(tmp_path):
    root = make(tmp_path / "real", *many("a", 3), *many("b", 3))
    (root / "b/same.jpg").symlink_to("../a/0000.jpg")
    (root / "b/broken.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "link").symlink_to(root)
    folder = scan(tmp_path / "link")
    assert sum(map(len, folder.splits.values())) == 7
    assert any("1 broken link ignored" in note for note in folder.notes)
    assert folder.splits["train"].path(0).startswith(str(tmp_path / "link"))


def test_only_links_are_resolved(tmp_path, monkeypatch):
    make(tmp_path, *many("a", 3, "JPEG"), *many("b", 3, "webp"))
    walk = Walk(os.fsencode(tmp_path))
    monkeypatch.setattr(os.path, "realpath", lambda path: pytest.fail(f"{path} is no link"))
    assert [len(paths) for paths in walk.images([b"a", b"b"])] == [3, 3]


def test_many_links_in_a_class_are_merged_once(tmp_path, monkeypatch):
    make(tmp_path, *many("a", 2), *many("b", 2), *(f".store/{i}/1.jpg" for i in range(20)))
    for i in range(20):
        (tmp_path / f"a/{i}").symlink_to(f"../.store/{i}")
    merges = []
    monkeypatch.setattr(walk_module, "_merge", lambda parts, merge=walk_module._merge: merges.append(1) or merge(parts))
    assert [len(paths) for paths in Walk(os.fsencode(tmp_path)).images([b"a", b"b"])] == [22, 2]
    assert merges == [1]


def test_links_are_followed_in_the_order_of_the_classes(tmp_path):
    """A folder that two classes link to belongs to the one whose link is found first, as in earlier versions."""
    make(tmp_path, *many("b", 2), ".store/in/1.jpg", ".store/all/2.jpg", ".store/all/x.jpg")
    (tmp_path / ".store/all/deep").symlink_to("../in")
    (tmp_path / "a").symlink_to(".store/all")
    (tmp_path / "b/in").symlink_to("../.store/in")
    walk = Walk(os.fsencode(tmp_path))
    a, b = walk.images([b"a", b"b"])
    assert "b/in/1.jpg" in list(b)
    assert list(a) == ["a/2.jpg", "a/x.jpg"]
    assert walk.repeated_links == ["a/deep"]


def test_a_folder_is_known_by_device_and_inode(tmp_path, monkeypatch):
    """Two paths of one folder need not have the same real path: on a bind mount, say."""
    make(tmp_path, *many("a", 2), *many("b", 2), ".one/1.jpg", ".two/1.jpg")
    (tmp_path / "a/link").symlink_to("../.one")
    (tmp_path / "b/link").symlink_to("../.two")
    stat = os.stat
    two, one = os.fsencode(tmp_path / "b/link"), os.fsencode(tmp_path / "a/link")
    monkeypatch.setattr(walk_module.os, "stat", lambda path, **options: stat(one if path == two else path, **options))
    a, b = Walk(os.fsencode(tmp_path)).images([b"a", b"b"])
    assert (len(a), len(b)) == (3, 2)


# --- names and permissions (A25, A26) -------------------------------------------------------------


ODD_NAMES = [
    b"a b.jpg",
    "ü ж 日.jpg".encode(),
    b"new\nline.jpg",
    b"\xff\xfe.jpg",
    b'quo"te,comma.jpg',
    b"cr\rx.jpg",
    b"=1+1.jpg",
]


def make_odd(root: Path) -> Path:
    for name in ("a", "b ü\n"):
        (root / name).mkdir(parents=True)
        for file in ODD_NAMES:
            (root / name / os.fsdecode(file)).write_bytes(b"x")
    return root


def test_a26_odd_names_work_and_round_trip(tmp_path):
    root = make_odd(tmp_path / "data")
    folder = scan(root, test_fraction=0.2)
    assert folder.class_names == ("a", "b ü\n")
    for samples in folder.splits.values():
        assert all(Path(samples.path(i)).read_bytes() == b"x" for i in range(len(samples)))
    write_split(folder, tmp_path / "split.csv")
    again = scan(root, split_file=tmp_path / "split.csv")
    assert again.layout == "file"
    assert again.class_names == folder.class_names
    for split, samples in folder.splits.items():
        assert again.splits[split].paths == samples.paths
        assert again.splits[split].targets.tolist() == samples.targets.tolist()


def test_a26_errors_show_odd_names_on_one_line(tmp_path):
    make(tmp_path, *many("a", 2), *many("b", 2))
    (tmp_path / "c\n\x1b[31mred").mkdir()
    with pytest.raises(UserError, match=r"'c\\n\\x1b\[31mred'") as error:
        scan(tmp_path)
    assert str(error.value).isprintable()


def test_a25_nothing_is_written_to_the_dataset(tmp_path):
    make(tmp_path, *many("a", 3), *many("b", 3))
    for path in [tmp_path, *tmp_path.rglob("*")]:
        path.chmod(stat.S_IRUSR | (stat.S_IXUSR if path.is_dir() else 0))
    before = {p: p.stat().st_mtime_ns for p in [tmp_path, *tmp_path.rglob("*")]}
    scan(tmp_path)
    list_images(tmp_path)
    assert {p: p.stat().st_mtime_ns for p in [tmp_path, *tmp_path.rglob("*")]} == before
    for path in [tmp_path, tmp_path / "a", tmp_path / "b"]:
        path.chmod(0o700)


# --- the draw -------------------------------------------------------------------------------------


def test_the_draw_never_changes(tmp_path):
    """Written down from this code's first run: a change would move everyone's validation images."""
    folder = scan(make(tmp_path, *many("a", 10), *many("b", 10)))
    assert names(folder, "val") == VAL_OF_TEN


VAL_OF_TEN = {"a": ["a/0004.jpg", "a/0006.jpg"], "b": ["b/0000.jpg", "b/0002.jpg"]}


def test_draw_hardly_moves_when_files_are_added(tmp_path):
    make(tmp_path, *many("a", 100), *many("b", 100))
    before = scan(tmp_path, test_fraction=0.1)
    make(tmp_path, "a/new.jpg", "b/another.jpg")
    after = scan(tmp_path, test_fraction=0.1)
    for split, samples in before.splits.items():
        assert len(set(samples.paths) - set(after.splits[split].paths)) <= 4


def test_folds_hardly_move_when_files_are_added(tmp_path):
    make(tmp_path, *many("a", 100), *many("b", 100))
    before = [scan(tmp_path, num_folds=5, fold=k) for k in range(5)]
    make(tmp_path, "a/!first.jpg", "b/another.jpg")
    for k, folder in enumerate(before):
        after = scan(tmp_path, num_folds=5, fold=k)
        assert len(set(folder.splits["val"].paths) - set(after.splits["val"].paths)) <= 4


def test_folds_are_disjoint_cover_all_and_leave_test_alone(tmp_path):
    root = make(tmp_path, *many("a", 23), *many("b", 7), *many("c", 2), "d/alone.jpg")
    folds = [scan(root, test_fraction=0.1, num_folds=5, fold=k) for k in range(5)]
    tests = {tuple(folder.splits["test"].paths) for folder in folds}
    assert len(tests) == 1
    vals = [set(folder.splits["val"].paths) for folder in folds]
    trains = [set(folder.splits["train"].paths) for folder in folds]
    everything = set().union(*vals, *trains)
    assert len(everything) == 33 - len(tests.pop())
    for k in range(5):
        assert trains[k] == everything - vals[k]
        assert all(vals[k].isdisjoint(vals[j]) for j in range(k))
        assert names(folds[k], "train").keys() == {"a", "b", "c", "d"}
        assert len(names(folds[k], "val")["a"]) in (4, 5)  # 21 of 23 in five folds
    assert set().union(*vals) == everything - {"d/alone.jpg"}
    again = scan(root, test_fraction=0.1, val_fraction=0.85, num_folds=5)  # which the folds replace
    assert tuple(again.splits["test"].paths) == tuple(folds[0].splits["test"].paths)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_folds": 1}, "data.num_folds is 1"),
        ({"num_folds": 3, "fold": 3}, "data.fold is 3"),
        ({"fold": 1}, "data.fold is 1; .*data.num_folds"),
        ({"group_pattern": "("}, r"data.group_pattern '\(' is not a regular expression"),
        ({"group_pattern": "patient"}, "data.group_pattern 'patient' matches no"),
        ({"group_pattern": "(x)?0"}, "data.group_pattern .* matches no"),  # its group takes no part in any match
    ],
)
def test_wrong_folds_and_groups(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        scan(make(tmp_path, *many("a", 4), *many("b", 4)), **settings)


def test_folds_beside_a_given_val_are_refused(tmp_path):
    make(tmp_path, *many("train/a", 4), *many("train/b", 4), *many("val/a", 2), *many("val/b", 2))
    with pytest.raises(UserError, match=r"num_folds is set, but there is a val split"):
        scan(tmp_path, num_folds=2)


def patients(root: Path) -> Path:
    """40 patients with one to five images each, of one class or both."""
    rng = np.random.default_rng(0)
    return make(
        root,
        *(f"{rng.choice(['ill', 'well'])}/p{p:02}_{i}.jpg" for p in range(40) for i in range(rng.integers(1, 6))),
    )


@pytest.mark.parametrize("settings", [{}, {"test_fraction": 0.2}, {"num_folds": 4, "fold": 3}])
def test_groups_are_never_in_two_splits(tmp_path, settings):
    folder = scan(patients(tmp_path), group_pattern=r"/(p\d+)_", **settings)
    of = {split: {Path(path).name[:3] for path in samples.paths} for split, samples in folder.splits.items()}
    assert sorted(of) == sorted(["train", "val", *(["test"] if "test_fraction" in settings else [])])
    assert sum(map(len, of.values())) == len(set().union(*of.values())) == 40
    assert "40 groups of images, each in one split" in folder.notes
    total = sum(map(len, folder.splits.values()))
    assert len(folder.splits["val"]) / total == pytest.approx(0.25 if "fold" in settings else 0.2, abs=0.05)
    for samples in folder.splits.values():  # stratified, as well as groups allow
        share = samples.targets.mean() / np.concatenate([s.targets for s in folder.splits.values()]).mean()
        assert 0.6 < share < 1.5
    again = scan(tmp_path, group_pattern=r"/(p\d+)_", **settings)
    assert fingerprint(again.splits["val"]) == fingerprint(folder.splits["val"])


def test_group_folds_cover_all(tmp_path):
    folders = [scan(patients(tmp_path), group_pattern=r"p\d+", num_folds=4, fold=k) for k in range(4)]
    vals = [set(folder.splits["val"].paths) for folder in folders]
    assert len(set().union(*vals)) == sum(map(len, vals)) == sum(map(len, folders[0].splits.values()))


def test_given_splits_that_share_a_group_are_refused(tmp_path):
    make(tmp_path, *(f"{split}/{c}/{p}_1.jpg" for split in ("train", "val") for c in "ab" for p in ("ann", "bob")))
    with pytest.raises(UserError, match=r"2 groups in more than one split: 'ann', 'bob'; move each to one"):
        scan(tmp_path, group_pattern=r"/([a-z]+)_")


def test_groups_from_the_split_file(tmp_path):
    rows = [(f"{'ab'[i % 2]}/{i}.jpg", f"g{i // 4}") for i in range(40)]
    make(tmp_path, *(path for path, _ in rows))
    (tmp_path / "s.csv").write_text("path,group\n" + "".join(f"{path},{group}\n" for path, group in rows))
    folder = scan(tmp_path, split_file=tmp_path / "s.csv")
    group = dict(rows)
    of = [{group[path] for path in samples.paths} for samples in folder.splits.values()]
    assert len(of) == 2
    assert of[0].isdisjoint(of[1])
    assert len(folder.splits["val"]) == 8
    assert "val is drawn from train" in folder.notes
    with pytest.raises(UserError, match=r"has a group column, and data.group_pattern is set too; remove one"):
        scan(tmp_path, split_file=tmp_path / "s.csv", group_pattern=r"/(\d)")


def test_fractions_of_splits_that_are_there(tmp_path):
    make(tmp_path, *many("train/a", 4), *many("train/b", 4), *many("val/a", 2), *many("val/b", 2), *many("test/a", 1))
    assert not any("fraction" in note for note in scan(tmp_path).notes)
    notes = scan(tmp_path, val_fraction=0.1, test_fraction=0.3).notes
    assert "data.val_fraction 0.1 has no effect: there is a val split" in notes
    assert "data.test_fraction 0.3 has no effect: there is a test split" in notes


def test_fingerprint(tmp_path):
    make(tmp_path, *many("a", 5), *many("b", 5))
    samples = scan(tmp_path).splits["train"]
    shuffled = samples.take(np.random.default_rng(0).permutation(len(samples)))
    assert fingerprint(samples) == fingerprint(shuffled)
    assert len(fingerprint(samples)) == 64
    assert fingerprint(samples) != fingerprint(samples.take(np.arange(len(samples) - 1)))
    assert fingerprint(samples) != fingerprint(Samples(samples.root, samples.paths, 1 - samples.targets))


# --- the split file -------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_split_file(tmp_path):
    make(tmp_path, "x/1.jpg", "x/2.jpg", "y/3.jpg", "y/4")
    file = write(
        tmp_path / "s.csv",
        "\ufefflabel,path,split\ncat,x/1.jpg,train\ndog,x/2.jpg,Train\ncat,./y/3.jpg,valid\n",
    )
    folder = scan(tmp_path, split_file=file)
    assert folder.class_names == ("cat", "dog")
    assert names(folder, "train") == {"cat": ["x/1.jpg"], "dog": ["x/2.jpg"]}
    assert names(folder, "val") == {"cat": ["y/3.jpg"]}
    # Without a split column, the fractions; without a label, the first folder.
    make(tmp_path, *many("train/a", 10), *many("b", 10))
    rows = "\n".join(["path", *many("train/a", 10), *many("b", 10)])
    folder = scan(tmp_path, split_file=write(file, rows))
    assert folder.class_names == ("a", "b")
    assert {k: len(v) for k, v in folder.splits.items()} == {"train": 16, "val": 4}
    # The header's case and blanks do not matter.
    rows = "\n".join(["Path, Label,SPLIT", "b/0000.jpg,x,val", "b/0001.jpg,x,train", "b/0002.jpg,y,Train"])
    folder = scan(tmp_path, split_file=write(file, rows))
    assert {k: len(v) for k, v in folder.splits.items()} == {"train": 2, "val": 1}
    # Absolute paths inside the root are the same files.
    rows = "\n".join(["path,label", *(f"{tmp_path}/{p},{i % 2}" for i, p in enumerate(many("b", 10)))])
    assert scan(tmp_path, split_file=write(file, rows)).splits["train"].paths[0].startswith("b/")


def test_all_faults_of_a_split_file_are_reported(tmp_path):
    make(tmp_path, "a/1.jpg", "a/2.jpg", "b/3.jpg", "lone.jpg")
    text = "path,label,split\na/1.jpg,a,train\na/1.jpg,b,val\na/2.jpg,a,holdout\nno.jpg,a,val\nlone.jpg,,train\n"
    text += "../up.jpg,a,train\n"
    with pytest.raises(UserError) as error:
        scan(tmp_path, split_file=write(tmp_path / "s.csv", text))
    for part in ("1 x listed twice: 'a/1.jpg'", "2 x no such file: 'no.jpg'", "'a/2.jpg: holdout'", "no label"):
        assert part in str(error.value)


def test_invalid_split_files(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        scan(tmp_path, split_file=tmp_path / "no.csv")
    with pytest.raises(UserError, match=r"expected a header with a column for the image.*; got 'age', 'class'"):
        scan(tmp_path, split_file=write(tmp_path / "s.csv", "age,class\n1,2\n"))
    for text, reason in (
        ("path,label,set\na,b,first\n", "1 x split is none of train, val, test: 'a: first'"),
        ("path,label,split\n", "lists no images"),
        (f'path,label\n"{"a" * 200_000}', "line 2: field larger than field limit"),
    ):
        with pytest.raises(UserError, match=reason):
            scan(tmp_path, split_file=write(tmp_path / "s.csv", text))


def test_split_file_cannot_leave_the_root(tmp_path):
    outside = make(tmp_path / "out", "1.jpg")
    root = make(tmp_path / "root", "a/1.jpg", "b/1.jpg")
    file = write(tmp_path / "s.csv", f"path,label\na/1.jpg,a\nb/1.jpg,b\n{outside}/1.jpg,b\n")
    with pytest.raises(UserError, match="1 link out of the folder"):
        scan(root, split_file=file)
    assert sum(map(len, scan(root, split_file=file, follow_outside_links=True).splits.values())) == 3


# --- tables of labels -----------------------------------------------------------------------------


def test_labels_from_a_table(tmp_path):
    """As Kaggle's: images of all classes in one folder, ids without endings, numbers for labels."""
    files = many("imgs", 10)
    make(tmp_path, *files, "imgs/extra.jpg")
    header = "id;Age;Breed ID;CLASS"
    rows = [f"{i:04};{i};7;{i % 2}" for i in range(10)]
    folder = scan(tmp_path, labels=write(tmp_path / "train.csv", "\n".join([header, *rows])))
    assert folder.class_names == ("0", "1")
    assert {split: len(samples) for split, samples in folder.splits.items()} == {"train": 8, "val": 2}
    found = names(folder, "train")["0"] + names(folder, "val")["0"]
    assert sorted(found) == files[::2]
    assert folder.pooled
    assert [note.partition(": ")[2] for note in folder.notes] == [
        "taken as: 'id' as the image, 'CLASS' as the label; ignored: 'Age', 'Breed ID'",
        "1 image without a row, left out: 'imgs/extra.jpg'",
    ]
    # The same images, drawn as if the labels were folders.
    make(tmp_path / "flat", *many("0", 10), *many("1", 10))
    table = "file_name,label\n" + "".join(f"{c}/{i:04}.jpg,{c}\n" for c in "01" for i in range(10))
    drawn = scan(tmp_path / "flat", labels=write(tmp_path / "t.csv", table), test_fraction=0.2)
    as_folders = scan(tmp_path / "flat", test_fraction=0.2)
    assert all(names(drawn, split) == names(as_folders, split) for split in ("train", "val", "test"))


@pytest.mark.parametrize(
    ("cell", "path"),
    [
        ("x", "in/x.jpg"),
        ("x.jpg", "in/x.jpg"),
        ("in/x", "in/x.jpg"),
        ("root\\in\\x.jpg", "in/x.jpg"),  # from a folder above, on Windows
        ("cafe\u0301.png", "deep/er/caf\u00e9.png"),  # Unicode's other form
        ("y.z", "y.z.png"),
    ],
)
def test_what_names_an_image(tmp_path, cell, path):
    root = make(tmp_path / "root", path, "b/other.jpg")
    folder = scan(root, labels=write(tmp_path / "t.tsv", f"file\tlabel\nother\tb\n{cell}\ta\n"), val_fraction=0.1)
    assert names(folder, "train")["a"] == [path]


def test_tables_that_other_programs_write(tmp_path):
    """Excel's "Unicode text" is in UTF-16; spaces after a comma are no part of a label; Latin-1 is said so."""
    root = make(tmp_path / "root", *many("x", 4))
    table = "id\tlabel\n" + "".join(f"{i:04}\t {'é' if i % 2 else 'b '}\n" for i in range(4))
    for encoding in ("utf-16", "utf-8-sig"):
        (tmp_path / "t.csv").write_bytes(table.encode(encoding))
        assert scan(root, labels=tmp_path / "t.csv").class_names == ("b", "é")
    (tmp_path / "t.csv").write_bytes(table.encode("latin-1"))
    assert "1 label not in UTF-8" in "".join(scan(root, labels=tmp_path / "t.csv").notes)


def test_all_faults_of_a_table_of_labels_are_reported(tmp_path):
    make(tmp_path, "a/1.jpg", "b/1.jpg", "a/2.jpg", "a/3.jpg", "a/4.jpg", "a/5.jpg")
    rows = ["1,x", "a/2.jpg,x", "2,y", "3,x", "3.jpg,x", "4,", "5,y", "elsewhere/5.jpg,y"]
    file = write(tmp_path / "t.csv", "\n".join(["id,label", *rows]))
    _, (several, twice, missing) = try_scan(tmp_path, SplitSettings(labels=str(file)))
    assert "1 x several files have this name: '1'" in several
    assert "1 x listed twice: '2'" in twice
    assert "1 x no such file: 'elsewhere/5.jpg'" in missing  # though there is a/5.jpg
    folder, problems = try_scan(tmp_path, SplitSettings(labels=str(file), max_bad_fraction=0.125))  # 1 of 8
    assert len(problems) == 2
    notes = [note.partition(": ")[2] for note in folder.notes]
    assert "1 row without a file, left out: 'elsewhere/5.jpg'" in notes
    assert "1 row without a label, left out: '4'" in notes
    assert "1 row of an image listed before, left out: '3.jpg'" in notes
    for text, reason in (("id\n1\n", "for the label: .*; got 'id'"), ("label\n1\n", "for the image: .*; got 'label'")):
        with pytest.raises(UserError, match=reason):
            scan(tmp_path, labels=write(file, text))
    with pytest.raises(UserError, match=r"data\.labels and data\.split_file are both set"):
        scan(tmp_path, labels=file, split_file=file)


def test_the_splits_of_a_table_of_labels(tmp_path):
    files = [f"{split}/{i}.jpg" for split in ("train", "Valid") for i in range(4)]
    make(tmp_path, *files, "test/9.jpg")
    file = write(tmp_path / "t.csv", "image,target\n" + "".join(f"{name},{i % 2}\n" for i, name in enumerate(files)))
    folder = scan(tmp_path, labels=file)
    assert names(folder, "val") == {"0": ["Valid/0.jpg", "Valid/2.jpg"], "1": ["Valid/1.jpg", "Valid/3.jpg"]}
    assert len(folder.splits["train"]) == 4
    rows = "".join(f"{i},{i % 2},{split}\n" for split in ("train", "valid") for i in range(4))
    folder = scan(tmp_path, labels=write(file, "image,target,split\n" + rows))  # the split tells 0.jpg from 0.jpg
    assert names(folder, "val")["0"] == ["Valid/0.jpg", "Valid/2.jpg"]


def test_labels_from_parquet(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    make(tmp_path, *many("imgs", 6))
    labels = [0, 1, 0, 1, 0, None]  # whole numbers, though one is missing
    pandas.DataFrame({"image_id": [f"{i:04}" for i in range(6)], "label": labels}).to_parquet(tmp_path / "t.parquet")
    folder = scan(tmp_path, labels=tmp_path / "t.parquet")
    assert folder.class_names == ("0", "1")


def test_class_names_are_compared_in_one_form_of_unicode(tmp_path):
    nfc, nfd = "caf\u00e9", "cafe\u0301"
    make(tmp_path, *many(f"train/{nfc}", 2), *many("train/b", 2), *many(f"val/{nfd}", 1), *many("val/b", 1))
    folder = scan(tmp_path)
    assert folder.class_names == ("b", nfc)
    assert names(folder, "val")[nfc] == [f"val/{nfd}/0000.jpg"]
    assert names(scan(tmp_path, ["b", nfd]), "val") == names(folder, "val")  # a model's names
    assert scan(tmp_path, class_order=write(tmp_path / "o.txt", f"{nfd}\nb\n")).class_names == (nfc, "b")
    make(tmp_path, f"train/{nfd}/other.jpg")  # side by side
    folder = scan(tmp_path)
    assert len(names(folder, "train")[nfc]) == 3
    assert any("2 folders are called 'caf\u00e9'" in note for note in folder.notes)


# --- predicting -----------------------------------------------------------------------------------


def test_list_images(tmp_path):
    make(tmp_path, "b/2.jpg", "a.png", "c/d/1.WEBP", ".hidden/x.jpg", "notes.txt", "b/._2.jpg")
    (tmp_path / "b/loop").symlink_to(tmp_path)
    (tmp_path / "raw").touch()
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    root, paths, notes = list_images(tmp_path)
    assert root == tmp_path
    assert notes == (
        "1 broken link ignored: 'gone.jpg'",
        "1 link to folders already read, ignored: 'b/loop'",
        "1 file without an extension, ignored",
    )
    assert list(paths) == ["a.png", "b/2.jpg", "c/d/1.WEBP"]
    assert list_images(tmp_path / "b/2.jpg") == (tmp_path / "b", PathList([b"2.jpg"]), ())
    (tmp_path / "alias").symlink_to("c")
    assert list(list_images(tmp_path / "alias")[1]) == ["d/1.WEBP"]
    for path, reason in ((tmp_path / "no", "no such"), (make(tmp_path / "e", "x.txt"), "no images here")):
        with pytest.raises(UserError, match=reason):
            list_images(path)


# --- size -----------------------------------------------------------------------------------------


def test_a27_ten_thousand_classes(tmp_path):
    for number in range(10_000):
        (tmp_path / f"c{number}").mkdir()
        for file in (b"1.jpg", b"2.jpg"):
            os.mknod(os.fsencode(tmp_path / f"c{number}") + b"/" + file)
    started = time.process_time()
    folder = scan(tmp_path)
    assert len(folder.class_names) == 10_000
    assert len(folder.splits["val"]) == 10_000
    assert time.process_time() - started < 10


def test_scanning_needs_no_torch():
    code = "import sys, rexnet_lit.data.folder; print('torch' in sys.modules, 'cv2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]

"""Packed datasets: the same images, splits and errors as from the folder."""

import shutil
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from image_tools import encode, photo

from rexnet_lit import ImageFolderDataModule
from rexnet_lit.checks.check import check
from rexnet_lit.data import image_file, pack, packed
from rexnet_lit.data.decode import read
from rexnet_lit.data.fixed_copy import write_fixed_copy
from rexnet_lit.data.folder import fingerprint, list_images, scan, try_scan
from rexnet_lit.data.image_header import DecodeError
from rexnet_lit.data.settings import SplitSettings
from rexnet_lit.data.verify import verify_images
from rexnet_lit.utils.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two splits of two classes, with a nested folder, a link, names in Unicode, and a broken image."""
    root = tmp_path / "pets"
    names = {
        "train/cat": ["a.jpg", "b.png", "inner/c.jpg", "ä ö.jpg"],
        "train/dog": ["a.jpg", "a.b.jpg", "d" * 120 + ".png"],
        "val/cat": ["v.jpg"],
        "val/dog": ["w.jpg", "x.jpg"],
    }
    number = 0
    for where, files in names.items():
        for name in files:
            file = root / where / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode(photo(40 + number, 30, seed=number), {".jpg": "jpeg"}.get(file.suffix, "png")))
            number += 1
    (root / "train/dog/broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    (root / "train/dog/link.jpg").symlink_to(root / "train/cat/b.png")
    (root / "notes.txt").write_text("left out")
    return root


def packed_copy(folder: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int = 4096) -> Path:
    monkeypatch.setattr(pack, "SHARD_BYTES", shard_bytes)
    out = folder.with_name("packed")
    written = pack.pack(str(folder), str(out))
    assert written.images == 12
    assert written.shards == len(list(out.glob("*.tar"))) > 1
    return out


def test_it_has_the_images_of_the_folder(folder, monkeypatch):
    out = packed_copy(folder, monkeypatch)
    expected, found = scan(folder), scan(out)
    assert found.class_names == expected.class_names
    assert found.layout == expected.layout
    assert found.notes == expected.notes
    for split, samples in expected.splits.items():
        assert found.splits[split].paths == samples.paths
        np.testing.assert_array_equal(found.splits[split].targets, samples.targets)
        assert fingerprint(found.splits[split]) == fingerprint(samples)
        for path in samples.paths:
            assert image_file.read_bytes(out / path) == (folder / path).read_bytes()
    assert (
        verify_images(found.splits["train"], cache=False).bad
        == verify_images(expected.splits["train"], cache=False).bad
    )


@pytest.mark.parametrize(
    "settings",
    [
        SplitSettings(val_fraction=0.3, test_fraction=0.3),
        SplitSettings(num_folds=2, fold=1),
        SplitSettings(group_pattern="(.)"),
    ],
)
def test_splits_are_drawn_as_from_the_folder(folder, monkeypatch, settings):
    shutil.rmtree(folder / "val")
    for file in list((folder / "train").iterdir()):
        file.rename(folder / file.name)
    (folder / "train").rmdir()
    (folder / "dog/link.jpg").unlink()
    monkeypatch.setattr(pack, "SHARD_BYTES", 4096)
    out = folder.with_name("packed")
    pack.pack(str(folder), str(out))
    (expected, problems), (found, same) = try_scan(folder, settings), try_scan(out, settings)
    assert problems == same
    assert found.splits.keys() == expected.splits.keys()
    for split, samples in expected.splits.items():
        assert found.splits[split].paths == samples.paths


def test_a_shard_is_an_ordinary_tar_file(folder, monkeypatch, tmp_path):
    out = packed_copy(folder, monkeypatch)
    for shard in out.glob("*.tar"):
        with tarfile.open(shard) as tar:
            tar.extractall(tmp_path / "again", filter="data")
    again, expected = list_images(tmp_path / "again")[:2], list_images(folder)[:2]
    assert again[1] == expected[1]
    for path in expected[1]:
        assert (again[0] / path).read_bytes() == (folder / path).read_bytes()


def test_threads_read_the_same(folder, monkeypatch):
    out = packed_copy(folder, monkeypatch)
    names = [path for path in list_images(folder)[1] if "broken" not in path]
    scan(out)
    with ThreadPoolExecutor(8) as pool:
        for path, pixels in zip(names * 20, pool.map(lambda path: read(out / path), names * 20), strict=True):
            np.testing.assert_array_equal(pixels, read(folder / path))


def test_an_empty_folder_on_another_disk(folder, tmp_path):
    """The link leads to a folder in memory."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as disk:
        (tmp_path / "link").symlink_to(disk)
        (folder / "train/empty").mkdir()
        written = pack.pack(str(folder), str(tmp_path / "link"))
        assert written.notes[-1] == "1 empty folder left out: 'train/empty'"
        assert {file.name for file in Path(disk).iterdir()} == {"shard-00000.tar", packed.INDEX}
        assert image_file.read_bytes(tmp_path / "link" / "val/cat/v.jpg") == (folder / "val/cat/v.jpg").read_bytes()


def test_a_folder_in_place_of_a_packed_one(folder, monkeypatch):
    out = packed_copy(folder, monkeypatch)
    path = scan(out).splits["train"].paths[0]
    image_file.read_bytes(out / path)
    shutil.rmtree(out)
    shutil.copytree(folder, out)
    (out / path).write_bytes(b"another")
    scan(out)
    assert image_file.read_bytes(out / path) == b"another"


def test_a_server_without_ranges_of_bytes(folder, url, monkeypatch):
    monkeypatch.setattr(packed, "_file_system", lambda url: (Whole(), url.removeprefix("file://")))
    with pytest.raises(UserError, match="the server ignores requests for a range of bytes"):
        scan(url)


class Whole:
    """A file system that returns whole files."""

    def cat_file(self, path, start=None, end=None):
        return Path(path).read_bytes()


def test_few_files_stay_open(folder, monkeypatch):
    monkeypatch.setattr(packed, "_MAX_OPEN", 2)
    out = packed_copy(folder, monkeypatch, 1)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for path in list_images(out)[1]:
        image_file.read_bytes(out / path)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


def test_another_process_finds_the_index(folder, monkeypatch):
    """A loader process that is spawned has not scanned the dataset."""
    out = packed_copy(folder, monkeypatch)
    monkeypatch.setattr(image_file, "_packs", {})
    assert image_file.read_bytes(out / "train/cat/a.jpg") == (folder / "train/cat/a.jpg").read_bytes()
    with pytest.raises(DecodeError, match="No such file"):
        image_file.read_bytes(out / "train/cat/none.jpg")


def test_it_may_be_packed_again(folder, monkeypatch):
    out = packed_copy(folder, monkeypatch)
    scan(out)
    shutil.rmtree(out)
    content = encode(photo(9, 9), "png")
    (folder / "train/cat/b.png").write_bytes(content)
    packed_copy(folder, monkeypatch)
    scan(out)
    assert image_file.read_bytes(out / "train/cat/b.png") == content


def test_batches_are_those_of_the_folder(folder, monkeypatch):
    (folder / "train/dog/broken.jpg").unlink()
    (folder / "notes.txt").unlink()
    (folder / "train/cat/more.jpg").write_bytes(encode(photo(50, 50), "jpeg"))
    out = packed_copy(folder, monkeypatch)

    def batches(root):
        data = ImageFolderDataModule(root, image_size=32, batch_size=4, num_workers=1, cache="none")
        data.prepare_data()
        data.setup("fit")
        return [images for images, *_ in data.train_dataloader()]

    assert all(torch.equal(a, b) for a, b in zip(batches(folder), batches(out), strict=True))


@pytest.fixture
def url(folder, monkeypatch, tmp_path):
    """A packed dataset behind a URL."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return f"file://{packed_copy(folder, monkeypatch)}"


def test_a_url(folder, url):
    expected, found = scan(folder), scan(url)
    assert found.splits["train"].paths == expected.splits["train"].paths
    path = found.splits["train"].paths[0]
    np.testing.assert_array_equal(read(found.root / path), read(folder / path))
    index = found.root / packed.INDEX
    written = index.stat().st_mtime_ns
    scan(url)
    assert index.stat().st_mtime_ns == written  # so the index need not be read again
    result = check(url)
    assert result.counts == check(folder).counts
    assert result.to_dict()["root"].endswith("/packed")


def test_a_url_without_a_dataset(folder, url):
    with pytest.raises(UserError, match=r"there is no rexnet_lit_index.npz here; upload what `rexnet-lit pack"):
        scan(f"file://{folder}")
    with pytest.raises(UserError, match="nosuch://bucket/x: "):
        scan("nosuch://bucket/x")


def test_a_shard_that_is_missing_or_cut_short(folder, monkeypatch):
    out = packed_copy(folder, monkeypatch)
    shards = sorted(out.glob("*.tar"))
    with shards[0].open("r+b") as file:
        file.truncate(600)
    shards[-1].unlink()
    samples = scan(out).splits
    with pytest.raises(DecodeError, match=r"shard-00000\.tar is shorter than the index says; pack the folder again"):
        image_file.read_bytes(out / samples["train"].paths[0])
    with pytest.raises(DecodeError, match="No such file"):
        image_file.read_bytes(out / samples["val"].paths[-1])


def test_a_damaged_index(folder, monkeypatch):
    out = packed_copy(folder, monkeypatch)
    (out / packed.INDEX).write_bytes(b"PK damaged")
    with pytest.raises(UserError, match=r"a damaged index .*; pack the folder again"):
        scan(out)


def test_bad_arguments(folder, monkeypatch, tmp_path):
    out = packed_copy(folder, monkeypatch)
    with pytest.raises(UserError, match="exists and is not empty; name a new folder"):
        pack.pack(str(folder), str(out))
    with pytest.raises(UserError, match="is a URL; pack into a folder"):
        pack.pack(str(folder), "s3://bucket/pets")
    with pytest.raises(UserError, match="there is no folder"):
        pack.pack(str(folder / "train/cat/a.jpg"), str(tmp_path / "again"))
    with pytest.raises(UserError, match="is packed already"):
        pack.pack(str(out), str(tmp_path / "again"))
    with pytest.raises(UserError, match="is inside the dataset"):
        pack.pack(str(folder), str(folder / "inner"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images here"):
        pack.pack(str(tmp_path / "empty"), str(tmp_path / "again"))
    assert not (tmp_path / "again").exists()
    fixes = tmp_path / "fixes.csv"
    fixes.write_text("path,action\ntrain/cat/a.jpg,remove\n")
    with pytest.raises(UserError, match="is packed; unpack it"):
        write_fixed_copy(str(out), str(fixes), str(tmp_path / "again"))


def test_fixes_and_tables(folder, monkeypatch, tmp_path):
    out = packed_copy(folder, monkeypatch)
    fixes, table = tmp_path / "fixes.csv", tmp_path / "labels.csv"
    digest = "0" * 64
    fixes.write_text("path,action,label\ntrain/cat/a.jpg,relabel,dog\ntrain/dog/broken.jpg,remove,\n")
    table.write_text("file_name,label,split\na.b,dog,train\ntrain/cat/b.png,cat,train\nv.jpg,cat,val\n")
    for settings in (SplitSettings(fixes=str(fixes)), SplitSettings(labels=str(table))):
        (expected, problems), (found, same) = try_scan(folder, settings), try_scan(out, settings)
        assert problems == same
        assert expected.splits["train"].paths == found.splits["train"].paths
    fixes.write_text(f"path,action,label,sha256\ntrain/cat/a.jpg,remove,,{digest}\n")
    assert "has changed" in try_scan(out, SplitSettings(fixes=str(fixes)))[1][0]


def test_an_unreadable_file_is_left_out_and_named(folder, monkeypatch):
    monkeypatch.setattr(
        pack, "read_bytes", lambda path: _refuse(path) if "a.b" in str(path) else Path(path).read_bytes()
    )
    written = pack.pack(str(folder), str(folder.with_name("packed")))
    assert written.images == 11
    assert "1 file left out, cannot be read: 'train/dog/a.b.jpg: Permission denied'" in written.notes[-1]


def _refuse(path):
    raise DecodeError("Permission denied")

"""Bad files are found, remembered and listed. Numbers after "A" are the cases of the list of data faults."""

from __future__ import annotations

import csv
import os
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
from image_tools import encode
from PIL import Image

from rexnet_lit.data import verify
from rexnet_lit.data.duplicates import equal_groups, groups_across
from rexnet_lit.data.folder import Samples
from rexnet_lit.data.verify import UnreadableFile, find_unreadable, verify_images, write_quarantine
from rexnet_lit.data.walk import PathList
from rexnet_lit.utils.process import cache_dir

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(small, (80, 60), interpolation=cv2.INTER_CUBIC)


def jpeg(seed: int = 0) -> bytes:
    return cv2.imencode(".jpg", picture(seed))[1].tobytes()


def make(root: Path, files: dict[str, bytes]) -> Samples:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return Samples(root, PathList([os.fsencode(name) for name in files]), np.zeros(len(files), np.int64))


def broken() -> dict[str, bytes]:
    """Good and bad files, by what is wrong with them."""
    whole = jpeg()
    start = whole.index(b"\xff\xda")
    return {
        "a/good.jpg": whole,
        "a/cut.jpg": whole[: len(whole) // 2],
        "a/empty.png": b"",
        "b/good.png": cv2.imencode(".png", picture())[1].tobytes(),
        "b/page.jpg": b"<!DOCTYPE html><html>404</html>",
        "b/lost.jpg": whole[: start + 200].rstrip(b"\xff") + b"\xff\xd9",
        "b/misnamed.png": whole,
        "b/tail.jpg": whole + b"\0" * 100,
    }


def test_a1_a2_a3_bad_files_are_found_with_reasons(tmp_path):
    samples = make(tmp_path / "data", broken())
    found = {samples.paths[i]: reason for i, reason in find_unreadable(samples)}
    assert list(found) == ["a/cut.jpg", "a/empty.png", "b/page.jpg", "b/lost.jpg"]
    assert found["a/cut.jpg"] == "truncated JPEG"
    assert found["a/empty.png"] == "empty file"
    assert "HTML" in found["b/page.jpg"]
    assert "data missing" in found["b/lost.jpg"]


def test_a24_the_same_content_in_several_splits_and_classes(tmp_path):
    x, y, z = jpeg(1), jpeg(2), jpeg(3)
    train = make(tmp_path / "train", {"a1": x, "a2": x, "b1": y, "b2": z, "b3": b"", "a3": b""})
    val = make(tmp_path / "val", {"a1": y, "a2": jpeg(4), "a3": b"no", "b1": z})
    classes = [0, 0, 1, 1, 1, 0, 0, 0, 0, 1]
    for _ in range(2):  # the second time from the cache
        groups = equal_groups(np.concatenate([verify_images(samples).contents for samples in (train, val)]))
        assert groups == [[0, 1], [2, 6], [3, 9]]
        assert groups_across(groups, [0] * 6 + [1] * 4) == [[2, 6], [3, 9]]
        assert groups_across(groups, classes) == [[2, 6]]


@pytest.mark.parametrize("workers", [1, 4])
def test_order_and_progress(tmp_path, workers):
    files = {f"{i:03}.jpg": jpeg() if i % 3 else b"no" for i in range(100)}
    samples = make(tmp_path / "data", files)
    seen = []
    caller = threading.get_ident()
    bad = verify_images(
        samples, workers=workers, progress=lambda *a: seen.append((*a, threading.get_ident() == caller))
    ).bad
    assert [i for i, _ in bad] == list(range(0, 100, 3))
    assert seen[-1] == (100, 100, True)
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)


def test_no_samples(tmp_path):
    assert find_unreadable(make(tmp_path, {})) == []


def decodes(monkeypatch) -> list[bytes]:
    """Count decodings."""
    calls: list[bytes] = []
    original = verify.decode_with_info

    def counted(data, **options):
        calls.append(data)
        return original(data, **options)

    monkeypatch.setattr(verify, "decode_with_info", counted)
    return calls


def test_frames_are_counted_only_where_there_can_be_several(tmp_path, monkeypatch):
    counted: list[bytes] = []
    monkeypatch.setattr(verify, "count_frames", lambda data: counted.append(data) or 7)
    gif = encode(Image.fromarray(picture()).quantize(16), "GIF")
    samples = make(tmp_path, {"a.jpg": jpeg(), "b.gif": gif})
    assert [details.info.frames for details in verify.verify_images(samples, details=True).details] == [1, 7]
    assert counted == [gif]


def test_the_second_verification_decodes_nothing(tmp_path, monkeypatch):
    samples = make(tmp_path / "data", broken())
    first = find_unreadable(samples)
    calls = decodes(monkeypatch)
    assert find_unreadable(samples) == first
    assert calls == []
    assert verify_images(samples, cache=False).bad == first
    assert len(calls) == len(samples)


def test_a_changed_file_is_verified_again(tmp_path, monkeypatch):
    samples = make(tmp_path / "data", broken())
    find_unreadable(samples)
    calls = decodes(monkeypatch)
    (tmp_path / "data/a/good.jpg").write_bytes(jpeg()[:-700])
    os.utime(tmp_path / "data/a/cut.jpg", ns=(1, 1))
    (tmp_path / "data/a/empty.png").write_bytes(jpeg(1))
    assert [samples.paths[i] for i, _ in find_unreadable(samples)] == [
        "a/good.jpg",
        "a/cut.jpg",
        "b/page.jpg",
        "b/lost.jpg",
    ]
    assert len(calls) == 3


def test_the_cache_is_outside_the_dataset_and_grows_by_splits(tmp_path, monkeypatch):
    samples = make(tmp_path / "data", broken())
    before = sorted((tmp_path / "data").rglob("*"))
    find_unreadable(samples.take(np.arange(4)))
    find_unreadable(samples.take(np.arange(4, 8)))
    assert sorted((tmp_path / "data").rglob("*")) == before
    assert cache_dir() == tmp_path / "cache/rexnet_lit"
    calls = decodes(monkeypatch)
    find_unreadable(samples)
    assert calls == []


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 cut zip"])
def test_a_broken_cache_is_ignored_and_replaced(tmp_path, monkeypatch, content):
    samples = make(tmp_path / "data", broken())
    first = find_unreadable(samples)
    (file,) = cache_dir().rglob("*.npz")
    file.write_bytes(content)
    assert find_unreadable(samples) == first
    calls = decodes(monkeypatch)
    assert find_unreadable(samples) == first
    assert calls == []


def test_s1_a_cache_that_holds_a_pickle_is_not_opened(tmp_path):
    samples = make(tmp_path / "data", broken())
    first = find_unreadable(samples)
    (file,) = cache_dir().rglob("*.npz")
    np.savez(file, keys=np.array([{"x": 1}], dtype=object), reasons=np.zeros(0, np.uint8))
    assert find_unreadable(samples) == first


def test_an_unwritable_cache_is_no_error(tmp_path, monkeypatch):
    samples = make(tmp_path / "data", broken())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(find_unreadable(samples)) == 4
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home/.cache/rexnet_lit"


def test_two_runs_at_once_leave_a_whole_cache(tmp_path):
    samples = make(tmp_path / "data", {f"{i}.jpg": jpeg(i) for i in range(60)})
    runs = [threading.Thread(target=find_unreadable, args=(samples.take(np.arange(i, 60, 4)),)) for i in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    (file,) = (p for p in cache_dir().rglob("*") if p.is_file())
    with np.load(file, allow_pickle=False) as arrays:
        assert arrays["keys"].size >= 15 * 16


def test_an_interruption_keeps_what_was_done(tmp_path, monkeypatch):
    samples = make(tmp_path / "data", {f"{i:03}.jpg": jpeg() for i in range(200)})

    def interrupt(done, total):
        if done >= 96:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify_images(samples, workers=1, progress=interrupt)
    calls = decodes(monkeypatch)
    find_unreadable(samples)
    assert len(calls) <= 200 - 96


def test_a29_a_missing_file_is_bad_and_not_remembered(tmp_path):
    samples = make(tmp_path / "data", broken())
    path = tmp_path / "data/a/good.jpg"
    data = path.read_bytes()
    path.unlink()
    assert (0, "No such file or directory") in find_unreadable(samples)
    path.write_bytes(data)
    assert 0 not in dict(find_unreadable(samples))


def test_a5_real_bombs_are_found(bombs):
    names = [os.fsencode(p.relative_to(bombs)) for p in sorted(bombs.rglob("*.png"))]
    samples = Samples(bombs, PathList(names), np.zeros(3, np.int64))
    found = find_unreadable(samples)
    assert [i for i, _ in found] == [0, 1, 2]
    assert all("megapixels" in reason for _, reason in found)


def test_s10_a26_the_list_is_safe_and_readable(tmp_path):
    odd = [
        "=cmd|x.jpg",
        "+1.jpg",
        "-1.jpg",
        "@a.jpg",
        "\ttab.jpg",
        "a\nb.jpg",
        "\x1b[31mred.jpg",
        "\udcff.jpg",
        'ü,".jpg',
    ]
    write_quarantine([UnreadableFile(name, "truncated JPEG") for name in odd], tmp_path / "q.csv")
    text = (tmp_path / "q.csv").read_text("utf-8")
    assert len(text.splitlines()) == len(odd) + 1
    rows = list(csv.reader(text.splitlines()))
    assert rows[0] == ["path", "reason"]
    assert [row[0] for row in rows[1:]] == [
        "'=cmd|x.jpg", "'+1.jpg", "'-1.jpg", "'@a.jpg", "'\\ttab.jpg", "a\\nb.jpg", "\\x1b[31mred.jpg",
        "\\xff.jpg", 'ü,".jpg',
    ]  # fmt: skip


def test_a4_mutated_files_are_listed_and_good_ones_are_not(tmp_path):
    rng = np.random.default_rng(0)
    files = {}
    for i in range(150):
        data = bytearray(jpeg(i))
        files[f"good/{i}.jpg"] = bytes(data)
        files[f"cut/{i}.jpg"] = bytes(data[: int(rng.integers(0, len(data) - 2))])
    samples = make(tmp_path / "data", files)
    bad = {samples.paths[i] for i, _ in find_unreadable(samples)}
    assert bad == {name for name in files if name.startswith("cut")}

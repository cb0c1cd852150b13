"""The dataset doctor finds what was put there. Numbers after "A" are the cases of the list of data faults."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from rexnet_lit.checks import findings
from rexnet_lit.checks.check import check
from rexnet_lit.checks.findings import print_result
from rexnet_lit.data import duplicates
from rexnet_lit.data.settings import DataRecord, EvalRecipe

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL")


def picture(seed: int, width: int = 96, height: int = 72) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def save(path: Path, pixels: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def healthy(tmp_path) -> Path:
    """Two classes, 12 images each in train, 4 in val: nothing to say."""
    seed = 0
    for split, count in (("train", 12), ("val", 4)):
        for name in ("cat", "dog"):
            for i in range(count):
                save(tmp_path / split / name / f"{i}.png", picture(seed))
                seed += 1
    return tmp_path


def found(result) -> dict[str, findings.Finding]:
    return {finding.code: finding for finding in result.findings}


def shown(result, width: int = 120) -> str:
    stream = io.StringIO()
    print_result(result, Console(file=stream, width=width, force_terminal=False))
    return stream.getvalue()


def test_a_healthy_dataset_has_no_findings(healthy):
    result = check(healthy)
    assert result.findings == ()
    assert result.ok
    assert result.layout == "split"
    assert result.counts == {"train": {"cat": 12, "dog": 12}, "val": {"cat": 4, "dog": 4}}
    assert result.formats == {"PNG": 32}
    assert result.sizes == {"width": (96, 96, 96), "height": (72, 72, 72)}
    assert "fit for training: 0 errors, 0 warnings" in shown(result)


def test_nothing_is_written(healthy):
    before = {p: p.stat().st_mtime_ns for p in healthy.rglob("*")}
    check(healthy)
    assert {p: p.stat().st_mtime_ns for p in healthy.rglob("*")} == before


def test_all_problems_at_once_and_none_raises(healthy):
    save(healthy / "val/bird/1.png", picture(900))
    (healthy / "train/empty").mkdir()
    (healthy / "train/cat/link").symlink_to("/etc")
    (healthy / "train/cat/0.png").write_bytes(b"")
    result = check(healthy)
    errors = [finding.message for finding in result.findings if finding.severity == "error"]
    assert len(errors) == 3
    assert not result.ok
    assert found(result)["unreadable"].paths == ("train/cat/0.png",)
    assert "not fit for training: 3 errors" in shown(result)


@pytest.mark.parametrize("make", [lambda p: p / "no", lambda p: p, lambda p: Path("/dev/null")])
def test_no_dataset_at_all(tmp_path, make):
    result = check(make(tmp_path))
    assert not result.ok
    assert "not fit" in shown(result)
    json.dumps(result.to_dict())


def test_bad_files_warn_and_many_are_an_error(healthy):
    (healthy / "train/cat/0.png").write_bytes(b"<html>")
    result = check(healthy)
    assert found(result)["unreadable"].severity == "warning"
    assert [(bad.path, "HTML" in bad.reason) for bad in result.bad] == [("train/cat/0.png", True)]
    (healthy / "train/cat/1.png").write_bytes((healthy / "train/cat/2.png").read_bytes()[:200])
    result = check(healthy)
    assert found(result)["unreadable"].severity == "error"
    assert "2 of 32 images are unreadable" in found(result)["unreadable"].message


def test_what_training_refuses_is_an_error(healthy, tmp_path):
    (healthy / "val/cat/0.png").write_bytes(b"")  # 1 of 32, but of 8 in val
    unreadable = found(check(healthy))["unreadable"]
    assert unreadable.severity == "error"
    assert unreadable.advice.endswith("refuses more than 5% (data.max_bad_fraction): val")
    for file in (healthy / "val").rglob("*.png"):
        file.write_bytes(b"")
    nothing = found(check(healthy))["unreadable-split"]
    assert (nothing.severity, nothing.message) == ("error", "no image can be read of val")
    for file in (healthy / "train/dog").iterdir():
        file.write_bytes(b"")
    lost = found(check(healthy))["unreadable-class"]
    assert (lost.severity, lost.message) == ("error", "no training image can be read of 1 class: 'dog'")
    for name in ("a", "b"):
        save(tmp_path / "ones" / name / "1.png", picture(ord(name)))
    empty = found(check(tmp_path / "ones"))["empty-split"]
    assert (empty.severity, empty.message) == ("error", "no images for val")


def test_a14_clutter_is_counted(healthy):
    (healthy / ".DS_Store").touch()
    (healthy / "train/cat/notes.txt").touch()
    result = check(healthy)
    assert result.clutter == 2
    assert found(result)["clutter"].severity == "info"


def test_a24_equal_bytes_across_splits_and_classes(healthy):
    (healthy / "val/cat/copy.png").write_bytes((healthy / "train/cat/0.png").read_bytes())
    (healthy / "train/dog/copy.png").write_bytes((healthy / "train/cat/1.png").read_bytes())
    (healthy / "train/dog/again.png").write_bytes((healthy / "train/dog/3.png").read_bytes())
    result = check(healthy)
    codes = found(result)
    assert set(codes) == {"duplicate-across-splits", "duplicate-across-classes", "duplicate-within-class"}
    assert set(codes["duplicate-across-splits"].paths) == {"train/cat/0.png", "val/cat/copy.png"}
    assert set(codes["duplicate-across-classes"].paths) == {"train/cat/1.png", "train/dog/copy.png"}
    assert codes["duplicate-across-splits"].severity == "warning"
    assert codes["duplicate-within-class"].severity == "info"
    assert len(result.duplicates) == 3
    assert result.near_duplicates == ()
    assert result.ok


def test_a24_the_same_picture_saved_anew(healthy):
    pixels = np.array(Image.open(healthy / "train/cat/0.png"))
    save(healthy / "val/cat/again.jpg", pixels, quality=60)
    save(healthy / "val/cat/smaller.png", cv2.resize(pixels, (64, 48), interpolation=cv2.INTER_AREA))
    result = check(healthy)
    (group,) = result.near_duplicates
    assert set(group) == {"train/cat/0.png", "val/cat/again.jpg", "val/cat/smaller.png"}
    assert set(found(result)) == {"near-duplicate-across-splits"}


def test_blank_and_tiny_pictures_are_no_near_duplicates(healthy):
    for i in range(12):
        save(healthy / f"train/cat/white{i}.png", np.full((72, 96, 3), 255 - i, np.uint8))
        page = np.full((72, 96, 3), 255, np.uint8)
        page[i * 6 : i * 6 + 2, :40] = 0
        save(healthy / f"train/dog/line{i}.png", page)
    assert check(healthy).near_duplicates == ()


def test_near_duplicates_are_found_among_many():
    """2,000 random pictures and a copy of 200 of them saved at half the size: few missed, none invented."""
    pictures = [picture(seed) for seed in range(2000)]
    copies = [cv2.resize(p, (48, 36), interpolation=cv2.INTER_AREA) for p in pictures[:200]]
    everything = pictures + copies
    hashes = np.array([duplicates.perceptual_hash(p) for p in everything], np.uint64)
    small = np.array([duplicates.thumbnail(p) for p in everything])
    groups = duplicates.near_groups(hashes, small)
    right = [g for g in groups if len(g) == 2 and g[0] + 2000 == g[1]]
    assert len(groups) == len(right)
    assert len(right) >= 190


def test_near_duplicates_do_not_take_quadratic_time():
    hashes = np.concatenate(
        [np.zeros(30_000, np.uint64), np.random.default_rng(0).integers(0, 2**63, 30_000).astype(np.uint64)]
    )
    small = np.zeros((60_000, 16, 16, 3), np.uint8)
    small[:, ::2] = 255
    started = time.process_time()
    groups = duplicates.near_groups(hashes, small)
    assert time.process_time() - started < 20  # all pairs would take an hour
    assert max(map(len, groups)) >= 30_000


def test_groups_of_equals():
    contents = np.zeros((5, 16), np.uint8)
    contents[[0, 3], 0], contents[2, 0] = 7, 9  # zeros stand for unreadable files
    assert duplicates.equal_groups(contents) == [[0, 3]]
    assert duplicates.near_groups(np.zeros(0, np.uint64), np.zeros((0, 16, 16, 3), np.uint8)) == []


def test_groups_that_stay_together_are_no_warning(tmp_path):
    for name in ("cat", "dog"):
        for i in range(30):
            save(tmp_path / name / f"animal{i // 2}_{i}.png", picture(i + 100 * (name == "dog")))
    result = check(tmp_path, DataRecord(group_pattern=r"(\w+/animal\d+)_"))
    assert [finding.message for finding in result.findings if finding.severity != "info"] == []
    assert "each in one split" in found(result)["layout"].message


def test_a17_a20_missing_tiny_and_unequal_classes(healthy):
    for i in range(130):
        save(healthy / f"train/many/{i}.png", picture(2000 + i))
    save(healthy / "train/lone/1.png", picture(3000))
    (healthy / "val/cat/copy.png").write_bytes((healthy / "train/cat/0.png").read_bytes())
    result = check(healthy)
    codes = found(result)
    assert "2 of 4 classes have no images in val: 'lone', 'many'" in codes["missing-class"].message
    assert codes["missing-class"].severity == "warning"
    assert "layout" not in codes
    # What spoils the scores comes first.
    lines = [line for line in shown(result).splitlines() if not line.startswith("    ")]
    assert "have no images in val" in lines[0]
    assert "same content in different splits" in lines[1]
    assert lines[2].endswith("4 classes, 155 train, 9 val")
    assert "1 of 4 classes have fewer than 10 images in train: 'lone'" in codes["tiny-class"].message
    assert "'many', has 130 images in train, the smallest, 'lone', 1" in codes["imbalance"].message


def test_sizes_and_animations(healthy):
    save(healthy / "train/cat/icon.png", picture(500, 20, 20))
    save(healthy / "train/cat/strip.png", picture(501, 600, 40))
    save(healthy / "train/cat/big.jpg", picture(502, 1200, 900))
    frames = [Image.fromarray(picture(510 + i)) for i in range(3)]
    frames[0].save(healthy / "train/cat/moving.gif", save_all=True, append_images=frames[1:])
    result = check(healthy)
    codes = found(result)
    assert codes["small"].paths == ("train/cat/icon.png",)
    assert codes["long"].paths == ("train/cat/strip.png",)
    assert codes["odd-size"].paths == ("train/cat/big.jpg",)
    assert codes["animated"].paths == ("train/cat/moving.gif",)
    assert result.animated == 1
    assert result.formats == {"PNG": 34, "JPEG": 1, "GIF": 1}


def test_what_the_centre_crop_leaves_out_is_said(tmp_path):
    """Of 320 x 96 pixels it shows 0.875 x 0.875 x 96 / 320 = 0.23, of 3:2 photographs 0.51."""
    for name in ("cat", "dog"):
        for i in range(10):
            save(tmp_path / name / f"{i}.png", picture(i + (100 if name == "dog" else 0), 320, 96))
    result = check(tmp_path)
    crop = found(result)["crop"]
    assert crop.severity == "warning"
    assert "77% of the images' area" in crop.message
    assert "data.crop_mode" in crop.advice
    assert "use 23% of their area" in shown(result)
    for mode in ("border", "squash"):
        result = check(tmp_path, recipe=EvalRecipe(96).with_crop_mode(mode))
        assert "crop" not in found(result)
        assert result.visible == 1.0
    assert EvalRecipe().visible(300, 200) == pytest.approx(0.875**2 * 2 / 3)
    assert EvalRecipe(crop_mode="border").visible(300, 200) == 0.875  # 224 of 256 columns, all 171 rows
    assert EvalRecipe(crop_mode="squash").visible(300, 200) == 0.875**2


def test_16_bit_images_of_fewer_bits_are_named(healthy):
    grey = picture(7)[..., 0].astype(np.uint16)
    save(healthy / "train/cat/a.png", grey * 16)
    finding = found(check(healthy))["bit-depth"]
    assert finding.severity == "info"
    assert finding.message == "1 16-bit image uses only part of the 16 bits: 1 scaled as 12 bits"
    save(healthy / "train/cat/b.png", grey[::-1] * 257)
    save(healthy / "train/dog/c.png", grey[:, ::-1] * 4)
    finding = found(check(healthy))["bit-depth"]
    assert finding.severity == "warning"
    assert finding.message.endswith("1 scaled as 10 bits, 1 scaled as 12 bits, 1 scaled as 16 bits")
    assert finding.paths == ("train/cat/a.png", "train/dog/c.png")


def test_flat_folder_is_checked_as_it_will_be_split(tmp_path):
    for i in range(20):
        save(tmp_path / ("a" if i % 2 else "b") / f"{i}.png", picture(i))
    result = check(tmp_path, DataRecord(val_fraction=0.3, test_fraction=0.2))
    assert result.layout == "flat"
    assert {split: sum(c.values()) for split, c in result.counts.items()} == {
        "train": 10,
        "val": 6,
        "test": 4,
    }


def test_s10_a26_names_can_neither_format_nor_move_the_cursor(healthy):
    evil = "[red]x[/red]\x1b[2J\n\udcff"
    for i in range(12):
        save(healthy / "train" / f"{i}.png", picture(i))
    os.makedirs(os.fsencode(healthy / "train" / evil))  # noqa: PTH103
    for i in range(3):
        data = (healthy / f"train/{i}.png").read_bytes()
        (healthy / "train" / evil / f"[bold]{i}\r.png").write_bytes(data[:90] if i else data)
    result = check(healthy)
    text = shown(result)
    assert "[red]x[/red]\\x1b[2J\\n\\udcff" in text
    assert "\x1b" not in text
    assert "\r" not in text
    text.encode()
    json.loads(json.dumps(result.to_dict()))


def test_json_has_everything(healthy):
    (healthy / "train/cat/0.png").write_bytes(b"")
    data = json.loads(json.dumps(check(healthy).to_dict()))
    assert data["ok"] is True
    assert data["counts"]["val"] == {"cat": 4, "dog": 4}
    assert data["bad"] == [{"path": "train/cat/0.png", "reason": "empty file"}]
    assert data["findings"][0]["code"] == "unreadable"
    assert data["findings"][0]["paths"] == ["train/cat/0.png"]


def test_a27_a_table_of_many_classes_stays_on_the_screen(tmp_path):
    for number in range(60):
        for i in range(2):
            save(tmp_path / f"class{number:02}" / f"{i}.png", picture(2 * number + i, 40, 40))
    text = shown(check(tmp_path))
    assert "... 36 more" in text
    assert len(text.splitlines()) < 45


def test_progress_is_reported(healthy):
    seen = []
    check(healthy, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (32, 32)

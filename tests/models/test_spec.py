"""The model's description, the process's settings and the sample dataset."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys

import cv2
import numpy as np
import pytest

from rexnet_lit.data.sample import write_sample
from rexnet_lit.data.settings import EvalRecipe
from rexnet_lit.models.heads import HeadSpec
from rexnet_lit.models.spec import FORMAT_VERSION, ModelSpec
from rexnet_lit.utils import process
from rexnet_lit.utils.errors import UserError, did_you_mean
from rexnet_lit.utils.settings import check_range

SPEC = ModelSpec(
    "rexnet_130.nav_in1k",
    ("ant", "bee ü", "=1+1"),
    HeadSpec("mlp", 64, 0.1),
    EvalRecipe(96, 0.95, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
)


def test_json_round_trip_is_exact():
    assert ModelSpec.from_json(SPEC.to_json(), "x") == SPEC
    assert hash(ModelSpec.from_json(SPEC.to_json(), "x")) == hash(SPEC)  # tuples again, not lists
    assert SPEC.num_classes == 3


def test_the_crop_mode_is_kept_and_older_files_crop_the_centre():
    squash = dataclasses.replace(SPEC, eval_recipe=SPEC.eval_recipe.with_crop_mode("squash"))
    again = ModelSpec.from_json(squash.to_json(), "x").eval_recipe
    assert (again.crop_mode, again.crop_pct) == ("squash", 1.0)
    older = json.loads(squash.to_json())
    del older["eval_recipe"]["crop_mode"]
    assert ModelSpec.from_json(json.dumps(older), "x").eval_recipe.crop_mode == "center"


def test_a_description_holds_plain_values_only():
    def plain(value):
        if isinstance(value, dict):
            return all(isinstance(k, str) and plain(v) for k, v in value.items())
        if isinstance(value, list):
            return all(map(plain, value))
        return value is None or isinstance(value, str | int | float)

    assert plain(json.loads(SPEC.to_json()))


def changed(**values) -> str:
    return json.dumps({**json.loads(SPEC.to_json()), **values})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "5",
        "null",
        '"x"',
        "{}",
        "[" * 100_000,
        changed(format_version=None),
        changed(format_version=float("inf")),
        changed(class_names=5),
        changed(head={"name": "linear", "surprise": 1}),
        changed(head=None),
        changed(eval_recipe={}),
        changed(eval_recipe={**dataclasses.asdict(SPEC.eval_recipe), "mean": 3}),
        changed(eval_recipe={**dataclasses.asdict(SPEC.eval_recipe), "image_size": "big"}),
        changed(eval_recipe={**dataclasses.asdict(SPEC.eval_recipe), "crop_pct": float("nan")}),
        changed(eval_recipe={**dataclasses.asdict(SPEC.eval_recipe), "image_size": 64.5}),
        changed(eval_recipe={**dataclasses.asdict(SPEC.eval_recipe), "image_size": 10**9}),
        changed(eval_recipe={**dataclasses.asdict(SPEC.eval_recipe), "mean": [0.5, None, 0.5]}),
        changed(eval_recipe={**dataclasses.asdict(SPEC.eval_recipe), "std": [0.5, 0.5]}),
        changed(eval_recipe={**dataclasses.asdict(SPEC.eval_recipe), "std": [0.5, 0.5, 0]}),
        changed(head={**dataclasses.asdict(SPEC.head), "hidden": True}),
        changed(head={**dataclasses.asdict(SPEC.head), "layers": 10**9}),
        changed(head=["linear"]),
        changed(head={**dataclasses.asdict(SPEC.head), "name": ["linear"]}),
        changed(head={**dataclasses.asdict(SPEC.head), "pool": {}}),
        changed(format_version=-9),
        changed(class_names=["a", ""]),
        changed(class_names=[]),
        changed(class_names=["a", "b", "a"]),
        changed(class_names={"a": 1, "b": 2}),
        changed(class_names=["a", ["b"]]),
        changed(class_names=list(map(str, range(200_001)))),
        changed(backbone=None),
        changed(head={**dataclasses.asdict(SPEC.head), "name": 5}),
        changed(head={**dataclasses.asdict(SPEC.head), "dropout": None}),
        changed(head={**dataclasses.asdict(SPEC.head), "temperature": "0.05"}),
        changed(eval_recipe={**dataclasses.asdict(SPEC.eval_recipe), "crop_pct": None}),
        changed(eval_recipe={**dataclasses.asdict(SPEC.eval_recipe), "interpolation": None}),
        changed(eval_recipe={**dataclasses.asdict(SPEC.eval_recipe), "crop_mode": None}),
    ],
    ids=range(40),
)
def test_what_is_no_description_is_one_line(text):
    with pytest.raises(UserError) as error:
        ModelSpec.from_json(text, "model.ckpt")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("model.ckpt: ")


def test_a_newer_format_says_so():
    with pytest.raises(UserError, match=rf"m.ckpt: model format {FORMAT_VERSION + 1} is newer .* upgrade"):
        ModelSpec.from_json(changed(format_version=FORMAT_VERSION + 1), "m.ckpt")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EvalRecipe(image_size=31), "data.image_size is 31"),
        (lambda: EvalRecipe(crop_pct=0), "crop_pct is 0"),
        (lambda: EvalRecipe(crop_mode="pad"), "data.crop_mode is 'pad'; expected one of center, border, squash"),
        (lambda: EvalRecipe(crop_pct=1.01), "crop_pct is 1.01"),
        (lambda: EvalRecipe(interpolation="lanczos"), "interpolation is 'lanczos'"),
        (lambda: HeadSpec(dropout=1.0), "model.head.dropout is 1"),
        (lambda: HeadSpec(hidden=0), "model.head.hidden is 0"),
        (lambda: HeadSpec(layers=0), "model.head.layers is 0"),
        (lambda: HeadSpec(temperature=0), "model.head.temperature is 0"),
        (lambda: HeadSpec(pool="mean"), "model.head.pool is 'mean'; expected one of avg, max, avgmax"),
    ],
)
def test_wrong_settings(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("value", [None, "0.5", [0.5], float("nan"), 1j])
def test_a_range_holds_numbers_only(value):
    with pytest.raises(UserError, match=r"model.ema is "):
        check_range("model.ema", value, "[0, 1)")
    with pytest.raises(UserError, match=r"model.head.dropout is "):
        HeadSpec(dropout=value)


def test_an_optional_setting_may_be_none_and_values_are_shown_as_written():
    check_range("data.cache_gb", None, "(0, inf]", optional=True)
    check_range("data.cache_gb", np.float32(1), "(0, inf]", optional=True)
    with pytest.raises(UserError, match=r"data.batch_size is 123456789; expected a number in \[1, 10\]"):
        check_range("data.batch_size", 123456789, "[1, 10]")


def test_resize_size():
    assert EvalRecipe(224, 0.875).resize_size == 256
    assert EvalRecipe(288, 1.0).resize_size == 288
    assert EvalRecipe(224, 0.95).resize_size == 235  # 235.8; timm rounds down


def test_user_errors_are_one_line():
    assert str(UserError("what\n  is   wrong\n")) == "what is wrong"
    assert did_you_mean("rexnet_10", ["rexnet_100", "adam"]) == "; did you mean 'rexnet_100'?"
    assert did_you_mean("zzz", ["rexnet_100"]) == ""


# --- process --------------------------------------------------------------------------------------


def test_tune_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("REXNET_LIT_TUNE", "0")
    assert process.configure_allocator() is False


def test_tune_does_its_work_on_glibc_only(monkeypatch):
    monkeypatch.delenv("REXNET_LIT_TUNE", raising=False)
    glibc = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
    assert process.configure_allocator() is glibc
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    assert process.configure_allocator() is False


@pytest.mark.parametrize(
    ("cpus", "gpus", "workers"),
    [(1, 0, 0), (2, 0, 1), (64, 0, 1), (1, 1, 1), (4, 1, 4), (64, 1, 8), (32, 8, 4), (4, 8, 1)],
)
def test_auto_num_workers(monkeypatch, cpus, gpus, workers):
    monkeypatch.setattr(process, "cpu_count", lambda: cpus)
    assert process.default_num_workers(gpus) == workers


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_s_limits(monkeypatch, tmp_path, version):
    monkeypatch.setattr(process, "_CGROUPS", tmp_path)
    monkeypatch.setattr(process, "_OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(process.os, "sched_getaffinity", lambda pid: set(range(8)))
    free = process.available_memory()
    assert process.cpu_count() == 8  # there is no such file
    if version == 2:
        (tmp_path / "own").write_text("0::/jobs/mine\n")
        write(
            tmp_path / "jobs", memory__max=f"{2**30}\n", memory__current=f"{2**29}\n", memory__stat="inactive_file 4096"
        )
        write(tmp_path / "jobs" / "mine", memory__max="max\n", cpu__max="250000 100000\n")
        write(tmp_path, cpu__max="max 100000\n")
    else:
        (tmp_path / "own").write_text("5:cpu,cpuacct:/mine\n4:memory:/mine\n1:name=systemd:/\n")
        use = {"memory__limit_in_bytes": f"{2**30}\n", "memory__usage_in_bytes": f"{2**29}\n"}
        write(tmp_path / "memory" / "mine", **use, memory__stat="cache 9\ntotal_inactive_file 4096\n")
        write(tmp_path / "cpu", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
        write(tmp_path / "cpu" / "mine", cpu__cfs_quota_us="250000\n", cpu__cfs_period_us="100000\n")
    assert process.available_memory() == min(free, 2**29 + 4096)
    assert process.cpu_count() == 2


# --- sample ---------------------------------------------------------------------------------------


def test_the_sample_is_scikit_learn_s_digits(tmp_path):
    from sklearn.datasets import load_digits

    counts = write_sample(str(tmp_path / "new" / "digits"))
    root = tmp_path / "new" / "digits"
    digits = load_digits()
    seen = {}
    for path in root.rglob("*.png"):
        split, label, _ = path.relative_to(root).parts
        index = int(path.stem)
        assert index not in seen, "in two splits"
        seen[index] = split
        assert digits.target[index] == int(label)
    assert sorted(seen) == list(range(1797))
    assert counts == {s: list(seen.values()).count(s) for s in ("train", "val", "test")}
    assert counts["train"] / 1797 == pytest.approx(0.7, abs=0.01)
    assert counts["val"] / 1797 == pytest.approx(0.15, abs=0.01)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["digits"]  # nothing temporary stays
    path = next(root.rglob("*.png"))
    small = cv2.resize(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE), (8, 8), interpolation=cv2.INTER_AREA)
    assert np.abs(small - digits.images[int(path.stem)] * (255 / 16)).mean() < 16  # one of the 17 grey levels


def test_the_sample_never_overwrites(tmp_path):
    (tmp_path / "mine.txt").touch()
    for taken in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(UserError, match="exists and is not empty"):
            write_sample(str(taken))


def test_the_sample_may_go_into_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    write_sample(".")
    assert sorted(p.name for p in (tmp_path / "empty").iterdir()) == ["test", "train", "val"]
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]

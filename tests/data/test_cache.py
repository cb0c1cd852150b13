"""Decoded images that are kept: always what decoding gives, whatever happened to the cache or the file."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_shape

from rexnet_lit.data import decode, memory
from rexnet_lit.data.augmentation import AugmentSettings
from rexnet_lit.data.cache import DiskCache, decode_all
from rexnet_lit.data.datamodule import ImageFolderDataModule
from rexnet_lit.data.dataset import ImageDataset
from rexnet_lit.data.folder import Samples
from rexnet_lit.data.memory import DecodedImages
from rexnet_lit.data.settings import EvalRecipe
from rexnet_lit.data.transforms import ProgressiveTransform
from rexnet_lit.data.walk import PathList
from rexnet_lit.utils import process
from rexnet_lit.utils.errors import UserError


@pytest.fixture
def photo(tmp_path: Path) -> str:
    import cv2

    file = tmp_path / "photo.jpg"
    file.write_bytes(cv2.imencode(".jpg", draw_shape(1, np.random.default_rng(0), 300))[1].tobytes())
    return str(file)


def kept(cache_root: Path) -> list[Path]:
    return sorted(cache_root.rglob("*.npy"))


def test_the_second_read_decodes_nothing(photo, tmp_path, monkeypatch):
    wanted = decode.read(photo, 64)
    cache = DiskCache(tmp_path / "cache")
    np.testing.assert_array_equal(cache.read(photo, 64), wanted)
    monkeypatch.setattr(decode, "read", None)
    np.testing.assert_array_equal(cache.read(photo, 64), wanted)
    np.testing.assert_array_equal(DiskCache(tmp_path / "cache").read(photo, 64), wanted)  # another run
    assert len(kept(tmp_path / "cache")) == 1


def test_it_is_in_the_user_s_cache_not_in_the_dataset(photo, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    DiskCache().read(photo, 64)
    assert sorted(tmp_path.rglob("*")) == before
    assert len(kept(process.cache_dir() / "decoded")) == 1


def test_another_file_time_or_size_is_another_image(photo, tmp_path):
    import cv2

    cache = DiskCache(tmp_path / "cache")
    cache.read(photo, 64)
    cache.read(photo, 300)  # a recipe that needs more pixels
    Path(photo).write_bytes(cv2.imencode(".jpg", draw_shape(2, np.random.default_rng(1), 300))[1].tobytes())
    np.testing.assert_array_equal(cache.read(photo, 64), decode.read(photo, 64))
    os.utime(photo, ns=(0, 0))
    cache.read(photo, 64)
    assert len(kept(tmp_path / "cache")) == 4


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"nonsense", None])
def test_a_damaged_entry_is_decoded_again(photo, tmp_path, damage):
    cache = DiskCache(tmp_path / "cache")
    wanted = cache.read(photo, 64)
    (file,) = kept(tmp_path / "cache")
    if damage is None:  # an array of objects is a pickle
        np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    else:
        file.write_bytes(damage)
    np.testing.assert_array_equal(cache.read(photo, 64), wanted)
    np.testing.assert_array_equal(np.load(file), wanted)


def test_the_limit_holds_and_what_does_not_fit_is_decoded(tmp_path, make_shapes):
    root = make_shapes(tmp_path / "d", train=6, size=40)
    paths = sorted(map(str, root.rglob("*.png")))
    one = decode.read(paths[0], 32).nbytes
    cache = DiskCache(tmp_path / "cache", limit=2.5 * one)
    for _ in range(2):
        for path in paths:
            np.testing.assert_array_equal(cache.read(path, 32), decode.read(path, 32))
    assert len(kept(tmp_path / "cache")) == 2
    before = kept(tmp_path / "cache")
    smaller = DiskCache(tmp_path / "cache", limit=1.5 * one)  # the longest unread goes
    assert len(kept(tmp_path / "cache")) == 1
    other = make_shapes(tmp_path / "other", train=6, size=40)  # another dataset is not kept out by the first
    cache = DiskCache(tmp_path / "cache", limit=2.5 * one)
    for path in sorted(map(str, other.rglob("*.png"))):
        cache.read(path, 32)
    assert len(kept(tmp_path / "cache")) == 2
    assert not set(before) & set(kept(tmp_path / "cache"))
    smaller.read(paths[-1], 32)
    images = decode_all(paths, 32, limit=3 * one)
    assert sum(image is not None for image in images) in (3, 4)  # two threads may overdraw it
    assert sum(image is not None for image in decode_all(paths, 32)) == len(paths)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache: .*file/cache: Not a directory; set XDG_CACHE_HOME"):
        DiskCache(tmp_path / "file" / "cache")


def test_both_splits_share_the_memory_that_is_asked_for(tmp_path, make_shapes):
    root = make_shapes(tmp_path / "d", train=6, val=6, size=40)
    one = decode.read(next(map(str, root.rglob("*.png"))), 32).nbytes
    data = ImageFolderDataModule(str(root), image_size=32, num_workers=0, cache="ram", cache_gb=20 * one / 1e9)
    data.setup("fit")
    with pytest.warns(UserWarning, match="do not fit into the memory"):
        loaders = data.train_dataloader(), data.val_dataloader()
    assert all(loaders)
    assert 19 * one <= sum(data._datasets[name].images_bytes for name in ("train", "val")) <= 22 * one


def test_a_disk_that_takes_nothing_harms_nobody(photo, tmp_path, monkeypatch):
    cache = DiskCache(tmp_path / "cache")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        np.testing.assert_array_equal(cache.read(photo, 64), decode.read(photo, 64))
    assert not [f for f in (tmp_path / "cache").glob("*/*") if f.is_file()]
    assert int((tmp_path / "cache" / ".bytes").read_text()) == 0
    shutil.rmtree(tmp_path / "cache")  # whoever tidies up meanwhile
    cache.read(photo, 64)
    assert len(kept(tmp_path / "cache")) == 1


def test_leftovers_of_killed_runs_go(photo, tmp_path):
    cache = DiskCache(tmp_path / "cache")
    cache.read(photo, 64)
    (file,) = kept(tmp_path / "cache")
    old, fresh = file.parent / "tmpold", file.parent / "tmpnew"
    for leftover in (old, fresh):
        leftover.write_bytes(b"half of it")
    os.utime(old, (time.time() - 7200,) * 2)
    DiskCache(tmp_path / "cache")
    assert not old.exists()
    assert fresh.exists()  # another run may be writing it
    assert file.exists()


def test_killed_while_writing(tmp_path, make_shapes):
    """Processes that fill the cache and are killed leave nothing that is read wrongly."""
    root = make_shapes(tmp_path / "d", train=40, val=0, test=0, size=200)
    paths = sorted(map(str, root.rglob("*.png")))
    code = (
        "import sys; from pathlib import Path; from rexnet_lit.data.cache import DiskCache\n"
        "cache = DiskCache(Path(sys.argv[1])); print('ready', flush=True)\n"
        "while True:\n"
        "    for path in sys.argv[2:]: cache.read(path, 32); [p.unlink() for p in Path(sys.argv[1]).rglob('*.npy')]\n"
    )
    for wait in (0.05, 0.2):
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "cache"), *paths], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(wait)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    cache = DiskCache(tmp_path / "cache")
    for path in paths:
        np.testing.assert_array_equal(cache.read(path, 32), decode.read(path, 32))


def test_runs_that_fill_it_at_once_keep_its_limit(tmp_path, make_shapes):
    root = make_shapes(tmp_path / "d", train=40, val=0, test=0, size=100)
    paths = sorted(map(str, root.rglob("*.png")))
    one = decode.read(paths[0], 32).nbytes
    code = (
        "import sys; from pathlib import Path; from rexnet_lit.data.cache import DiskCache\n"
        "cache = DiskCache(Path(sys.argv[1]), limit=float(sys.argv[2])); print('ready', flush=True); input()\n"
        "for path in sys.argv[3:]: cache.read(path, 32)\n"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "cache"), str(20.5 * one), *paths[start::3]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for start in range(3)
    ]
    for run in runs:
        run.stdout.readline()
    for run in runs:
        run.stdin.write(b"go\n")
        run.stdin.flush()
    for run in runs:
        run.communicate()
        assert run.returncode == 0
    assert len(kept(tmp_path / "cache")) == 20


def test_a_missing_file_is_said_as_without_a_cache(photo, tmp_path):
    cache = DiskCache(tmp_path / "cache")
    cache.read(photo, 64)
    Path(photo).unlink()
    with pytest.raises(decode.DecodeError, match="No such file"):
        cache.read(photo, 64)


# Loaders whose workers are not forked (macOS, Windows, Python 3.14)

SCRIPT = """
import hashlib, multiprocessing, sys
{guard}
    multiprocessing.set_start_method({method!r}, force=True)
    import lightning.pytorch as pl, torch, rexnet_lit
    torch.set_num_threads(1)
    data = rexnet_lit.ImageFolderDataModule(
        {root!r}, image_size=32, batch_size=8, num_workers=int({workers}), predict_path={root!r}
    )
    torch.manual_seed(0)
    model = rexnet_lit.RexNetModule("rexnet_100", pretrained=False, class_names=data.class_names, image_size=32)
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, use_distributed_sampler=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )
    trainer.fit(model, datamodule=data)
    for run in (trainer.validate, trainer.test, trainer.predict):
        run(model, datamodule=data)
    assert data._datasets["train"].images is not None
    print(hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.state_dict().values())).hexdigest())
"""


def run_script(folder, method, workers, root, guard="if __name__ == '__main__':"):
    file = folder / f"{method}_{workers}.py"
    file.write_text(SCRIPT.format(guard=guard, method=method, workers=workers, root=str(root)))
    return subprocess.run([sys.executable, file], cwd=folder, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "workers"), [("spawn", 1), ("spawn", 2), ("forkserver", 2)])
def test_workers_that_are_not_forked_give_the_same_weights(method, workers, shapes, tmp_path):
    expected = run_script(tmp_path, "fork", 0, shapes)
    got = run_script(tmp_path, method, workers, shapes)
    assert got.returncode == 0, got.stderr
    assert got.stdout.splitlines()[-1] == expected.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_without_a_main_guard_a_run_ends(method, shapes, tmp_path):
    ended = run_script(tmp_path, method, 1, shapes, guard="if True:")
    assert ended.returncode == 1
    assert "UserError: a data loading worker has ended" in ended.stderr.splitlines()[-1]


def test_a_worker_s_pickle_fits_into_a_pipe(tmp_path):
    """More would block `multiprocessing` if the worker has died: images, names and pipelines are left out."""
    paths = [f"class/some long name {i:06d}.png".encode() for i in range(20_000)]
    samples = Samples(tmp_path, PathList(paths), np.zeros(len(paths), np.int64))
    stages = [(0, 32), (1, 64), (2, 96)]
    transform = ProgressiveTransform(AugmentSettings(name="heavy"), EvalRecipe(image_size=32), stages)
    cache = DiskCache(tmp_path / "cache")
    cache._old = [(0.0, 1, f"/some/cache/folder/{i}.npy") for i in range(20_000)]
    dataset = ImageDataset(samples, transform, 0, cache.read)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (3 + i % 5, 4, 3), dtype=np.uint8) if i % 7 else None for i in range(20_000)]
    dataset.images = DecodedImages(list(images))
    pickled = ForkingPickler.dumps(dataset)
    assert len(pickled) < 2**14
    restored = ForkingPickler.loads(pickled)
    assert restored.samples.paths[19_999] == paths[-1].decode()
    for i in (0, 1, 6, 7, 9_999, 19_999):
        for each in (dataset, restored):
            assert np.array_equal(each.images[i], images[i]) if i % 7 else each.images[i] is None
    view = rng.integers(0, 256, (70, 80, 3), dtype=np.uint8)
    for epoch in (0, 1, 2):
        assert torch.equal(restored.transform.at(epoch)(view, 5), transform.at(epoch)(view, 5))


def test_images_that_do_not_fit_into_the_shared_memory_are_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 50, 50))
    images = DecodedImages([np.zeros((5, 6, 3), np.uint8)])
    with pytest.warns(UserWarning, match="too small"):
        restored = ForkingPickler.loads(ForkingPickler.dumps(images))
    assert restored[0] is None
    assert images[0].shape == (5, 6, 3)

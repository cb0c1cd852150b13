"""Batches: their images and order, which depend on seed, epoch and position alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import albumentations as A  # noqa: N812
import numpy as np
import pytest
import torch
from conftest import draw_shape
from image_tools import SAMPLES, mutate
from PIL import Image

from rexnet_lit.cli.messages import user_message
from rexnet_lit.data import loader as loader_module
from rexnet_lit.data.augmentation import AugmentSettings
from rexnet_lit.data.datamodule import ImageFolderDataModule
from rexnet_lit.data.dataset import ImageDataset
from rexnet_lit.data.folder import Samples
from rexnet_lit.data.sampler import BatchKey, BatchSampler, training_order
from rexnet_lit.data.settings import EvalRecipe
from rexnet_lit.data.table import write_split
from rexnet_lit.data.transforms import EvalTransform, TrainTransform
from rexnet_lit.data.walk import PathList
from rexnet_lit.utils import process
from rexnet_lit.utils.errors import UserError


def module(root: Path, **settings) -> ImageFolderDataModule:
    settings = {"image_size": 32, "batch_size": 7, "num_workers": 0, **settings}
    return ImageFolderDataModule(str(root), **settings)


def epoch_of(loader, epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    loader.sampler.set_epoch(epoch)
    return [(images, targets) for images, targets, _ in loader]


def same(a, b) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y, *_), (u, v, *_) in zip(a, b, strict=True)
    )


# --- batches --------------------------------------------------------------------------------------


def sampler_batches(n: int, batch_size: int, world: int) -> list[np.ndarray]:
    """The training batches of all processes."""
    order = np.random.default_rng((n, batch_size)).permutation(n)
    samplers = [BatchSampler(n, batch_size, lambda epoch: order, rank=r, world_size=world) for r in range(world)]
    per_rank = [[key.indices for key in s] for s in samplers]
    assert {len(b) for b in per_rank} == {len(s) for s in samplers}  # as many steps on each, as the length says
    return [batch for batches in per_rank for batch in batches]


def check_training_batches(n: int, batch_size: int, world: int) -> None:
    batches = sampler_batches(n, batch_size, world)
    sizes = [len(b) for b in batches]
    where = (n, batch_size, world, sizes)
    assert sorted(np.concatenate(batches).tolist()) == list(range(n)), where
    assert max(sizes) - min(sizes) <= 1, where
    assert min(sizes) >= 2, where
    if batch_size >= 4:
        assert max(sizes) <= batch_size, where


def test_training_batches_hold_every_image_once_and_never_one_alone():
    for world in (1, 2, 3, 4):
        for batch_size in (4, 5, 6, 8, 16, 32):
            for n in [*range(2 * world, 70), 128, 129, 1001]:
                check_training_batches(n, batch_size, world)


@pytest.mark.parametrize(("batch_size", "worlds"), [(2, (1, 2, 3, 4)), (3, (1, 2, 3, 4))])
def test_the_smallest_batches_never_hold_one_image(batch_size, worlds):
    for world in worlds:
        for n in range(2 * world, 70):
            check_training_batches(n, batch_size, world)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_evaluation_batches_cover_without_padding(world):
    for n in [*range(1, 40), 100]:
        for batch_size in (2, 7, 32):
            samplers = [BatchSampler(n, batch_size, rank=r, world_size=world) for r in range(world)]
            per_rank = [[key.indices for key in s] for s in samplers]
            assert [len(b) for b in per_rank] == [len(s) for s in samplers]
            found = [int(i) for batches in per_rank for b in batches for i in b]
            assert sorted(found) == list(range(n))
            assert all(0 < len(b) <= batch_size for batches in per_rank for b in batches)
            assert all(list(b) == sorted(b) for batches in per_rank for b in batches)


def test_iterating_a_sampler_gives_its_epoch_and_goes_on_midway():
    order = lambda epoch: np.random.default_rng(epoch).permutation(20)  # noqa: E731
    sampler = BatchSampler(20, 4, order)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert [b.epoch for b in first + second] == [0] * 5 + [1] * 5
    assert not all(np.array_equal(a.indices, b.indices) for a, b in zip(first, second, strict=True))
    resumed = list(BatchSampler(20, 4, order, position=lambda: (1, 3)))
    assert [b.indices.tolist() for b in resumed] == [b.indices.tolist() for b in second[3:]]


# --- samplers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "share"),
    # 90 to 10 images: as they are; equal; as their square roots, sqrt(90) : sqrt(10) = 3 : 1.
    [("shuffle", 0.9), ("balanced", 0.5), ("balanced_sqrt", 0.75)],
)
def test_how_often_classes_are_drawn(sampler, share):
    targets = np.repeat([0, 2], [9000, 1000]).astype(np.int64)  # class 1 has no image
    order = training_order(targets, sampler, seed=3, epoch=5)
    assert len(order) == 10_000
    deviation = 0 if sampler == "shuffle" else 4 * (share * (1 - share) / 10_000) ** 0.5
    assert abs((targets[order] == 0).mean() - share) <= deviation
    if sampler == "shuffle":
        assert sorted(order.tolist()) == list(range(10_000))
    else:  # within a class no image is drawn much more often than the mean
        counts = np.bincount(order, minlength=10_000)[targets == 2]
        assert counts.max() < counts.mean() + 8 * counts.mean() ** 0.5
    assert np.array_equal(order, training_order(targets, sampler, 3, 5))
    assert not np.array_equal(order, training_order(targets, sampler, 3, 6))
    assert not np.array_equal(order, training_order(targets, sampler, 4, 5))


def test_the_balanced_sampler_reaches_the_batches(tmp_path, make_shapes):
    root = make_shapes(tmp_path, train=30, val=2, test=0, classes=("common", "rare"))
    for path in sorted((root / "train" / "rare").iterdir())[2:]:
        path.unlink()
    data = module(root, sampler="balanced", augment=AugmentSettings("none"))
    data.setup("fit")
    targets = torch.cat([y for epoch in range(8) for _, y in epoch_of(data.train_dataloader(), epoch)])
    assert len(targets) == 8 * 32
    assert 0.35 < (targets == 1).float().mean().item() < 0.65  # 4 sigma; 2 of 32 images otherwise


# --- augmentation ---------------------------------------------------------------------------------


def test_an_image_that_is_drawn_again_is_augmented_differently(tmp_path, make_shapes):
    root = make_shapes(tmp_path, train=30, val=2, test=0, classes=("common", "rare"))
    for path in sorted((root / "train" / "rare").iterdir())[1:]:
        path.unlink()
    views = []
    for workers in (0, 2):
        data = module(root, sampler="balanced", num_workers=workers)
        data.setup("fit")
        batches = epoch_of(data.train_dataloader(), 3)
        views.append(torch.cat([images[targets == 1] for images, targets in batches]))
    assert torch.equal(*views)
    assert len(views[0]) > 5  # of one image
    assert len(torch.unique(views[0].flatten(1), dim=0)) == len(views[0])


def test_draws_are_counted_across_processes():
    order = np.array([2, 0, 2, 1, 2, 0, 2, 1])
    samplers = [BatchSampler(8, 2, lambda epoch: order, rank=rank, world_size=2) for rank in range(2)]
    keys = [key for pair in zip(*samplers, strict=True) for key in pair]
    assert np.concatenate([key.indices for key in keys]).tolist() == order.tolist()
    assert np.concatenate([key.draws for key in keys]).tolist() == [0, 0, 1, 0, 2, 1, 3, 1]


@pytest.mark.parametrize("recipe", ["light", "medium", "heavy", "randaugment"])
def test_a72_no_augmentation_comes_twice(tmp_path, recipe):
    """3 epochs, 2 workers, one and the same picture under every name: all 180 views of it differ.

    It is large enough that two crops hardly meet by chance.
    """
    y, x = np.mgrid[:600, :800]
    picture = np.stack([x * 255 // 800, y * 255 // 600, (x + y) % 256], axis=2).astype(np.uint8)
    for split, count in (("train", 30), ("val", 1)):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(picture).save(tmp_path / split / label / f"{i}.png")
    data = module(tmp_path, batch_size=5, num_workers=2, augment=AugmentSettings(recipe))
    data.setup("fit")
    loader = data.train_dataloader()
    views = torch.cat([images for epoch in range(3) for images, _ in epoch_of(loader, epoch)])
    assert len(torch.unique(views.flatten(1), dim=0)) == len(views) == 180
    if recipe == "light":  # mirrored half of the time, as asked: 4 sigma
        left, right = views[:, 0, :, :16].mean((1, 2)), views[:, 0, :, 16:].mean((1, 2))
        assert 0.35 < (left > right).float().mean() < 0.65


# --- what a batch holds ---------------------------------------------------------------------------


def test_workers_change_nothing(shapes):
    """Batches of two epochs are the same for 0 and 2 workers, and whatever was asked for before."""
    found = []
    for workers, epochs in ((0, (0, 1)), (2, (0, 1)), (1, (1,))):
        data = module(shapes, num_workers=workers, augment=AugmentSettings("medium", erasing=0.3))
        data.setup("fit")
        loader = data.train_dataloader()
        torch.manual_seed(workers)  # the global streams do not matter
        np.random.seed(workers)
        found.append({epoch: epoch_of(loader, epoch) for epoch in epochs})
    assert same(found[0][0], found[1][0])
    assert same(found[0][1], found[1][1])
    assert same(found[0][1], found[2][1])
    assert not same(found[0][0], found[0][1])
    images, targets = found[0][0][0]
    assert images.shape == (6, 3, 32, 32)  # 24 images in batches of 7 at most: 4 of 6
    assert images.dtype == torch.float32
    assert targets.dtype == torch.int64
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_another_seed_gives_other_batches(shapes, monkeypatch):
    found = []
    for seed in ("1", "2", "1"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)  # what seed_everything writes
        data = module(shapes)
        data.setup("fit")
        found.append(epoch_of(data.train_dataloader(), 0))
    assert same(found[0], found[2])
    assert not same(found[0], found[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_no_two_images_share_their_augmentation(tmp_path, workers):
    """24 copies of one picture come out in 24 ways, and in others in the next epoch."""
    for split, count in (("train", 12), ("val", 1)):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(draw_shape(0, np.random.default_rng(0))).save(tmp_path / split / name / f"{i}.png")
    data = module(tmp_path, num_workers=workers, augment=AugmentSettings("medium"))
    data.setup("fit")
    loader = data.train_dataloader()
    views = [image.numpy().tobytes() for e in range(2) for images, _ in epoch_of(loader, e) for image in images]
    assert len(views) == 48
    assert len(set(views)) == 48


def test_evaluation_is_in_order_and_by_the_eval_recipe(shapes):
    data = module(shapes, num_workers=1)
    data.setup("fit")
    data.setup("test")
    assert data.eval_recipe == EvalRecipe(image_size=32)
    for loader, split in ((data.val_dataloader(), "val"), (data.test_dataloader(), "test")):
        images, targets = (torch.cat(parts) for parts in zip(*epoch_of(loader, 0), strict=True))
        samples = data.splits()[split]
        assert targets.tolist() == samples.targets.tolist()
        for i, image in enumerate(images):
            pixels = np.asarray(Image.open(samples.path(i)).convert("RGB"))
            wanted = EvalTransform(EvalRecipe(image_size=32))(pixels)
            assert (image - wanted).abs().max() < 0.05  # a level of 255 is 0.017; JPEGs are decoded by another library
        assert same(epoch_of(loader, 0), epoch_of(loader, 3))


def test_the_cache_changes_nothing(shapes):
    found = []
    for cache in ("none", "ram", "disk", "disk"):  # the second time from the disk
        data = module(shapes, cache=cache, augment=AugmentSettings("heavy"))
        data.setup("fit")
        found.append(
            [*epoch_of(data.train_dataloader(), 0), *epoch_of(data.train_dataloader(), 1), *data.val_dataloader()]
        )
    assert all(same(found[0], other) for other in found[1:])


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_the_cache_changes_no_features(tmp_path, cache):
    """Large JPEGs are decoded at a scale that the recipe decides, which is training's for both."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(3):
                picture = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).resize((300, 300))
                picture.save(tmp_path / split / label / f"{i}.jpg")
    found = []
    for kept in ("none", cache):
        data = module(tmp_path, cache=kept)
        data.trainer = trainer_like()
        data.setup("fit")
        data.train_dataloader()
        assert (data._datasets["train"].images is not None) == (kept == "ram")
        found.append(data.compute_features("train", lambda images: images.flatten(1), evaluate=True))
    assert torch.equal(*found)


def test_features_of_fewer_images_than_processes(shapes):
    data = module(shapes)
    data.trainer = trainer_like()
    data.trainer.world_size = 1000
    data.setup("fit")
    with pytest.raises(UserError, match=r"images for 1000 processes: .* trainer.devices"):
        data.compute_features("train", lambda images: images.flatten(1))


class Workers:
    """In place of torch's iterator: times out before each batch."""

    def __init__(self, batches):
        self.events = [event for batch in batches for event in (RuntimeError("DataLoader timed out after 10 s"), batch)]

    def __iter__(self):
        return self

    def __next__(self):
        if not self.events:
            raise StopIteration
        event = self.events.pop(0)
        if isinstance(event, Exception):
            raise event
        return event


def test_a_loader_waits_while_its_workers_live(shapes, monkeypatch):
    """Torch checks that they do after each timeout; one that comes while they start leaves a half-built iterator."""
    data = module(shapes, num_workers=1)
    data.setup("fit")
    loader = data.train_dataloader()
    assert loader.timeout == 10
    starts: list[object] = []

    def start(self):
        starts.append(self._iterator)
        if len(starts) == 1:
            self._iterator = "half-built"
            raise RuntimeError("DataLoader timed out after 10 s")
        return Workers([1, 2, 3])

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", start)
    assert list(loader) == [1, 2, 3]
    assert starts == [None, None]
    monkeypatch.setattr(loader_module, "_PATIENCE", 10)
    with pytest.raises(UserError, match="gave nothing for 10 s"):
        list(loader)


def test_another_recipe_creates_new_datasets(shapes):
    data = module(shapes)
    data.setup("fit")
    val = data._datasets["val"]
    data.setup("fit")
    assert data._datasets["val"] is val
    data.image_size, data.eval_recipe = 48, EvalRecipe(image_size=48)
    data.setup("fit")
    assert next(iter(data.val_dataloader()))[0].shape[-1] == 48


def test_progressive_resizing_is_a_function_of_the_epoch(shapes):
    data = module(shapes, size_schedule=[[0, 32], [2, 48]], batch_size=24, cache="ram")
    data.setup("fit")
    loader = data.train_dataloader()
    sizes = [epoch_of(loader, epoch)[0][0].shape[-1] for epoch in (0, 1, 2, 5, 0)]
    assert sizes == [32, 32, 48, 48, 32]
    assert {images.shape[-1] for images, *_ in data.val_dataloader()} == {32}
    assert data.preview(5).shape == (5, 32, 32, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_fraction": "0.1"}, "data.val_fraction is '0.1'; expected float"),
        ({"num_folds": "3"}, "data.num_folds is '3'; expected int"),
        ({"image_size": "64"}, "data.image_size is '64'; expected int or None"),
        ({"group_pattern": 3}, "data.group_pattern is 3; expected str or None"),
        ({"follow_outside_links": "no"}, "data.follow_outside_links is 'no'; expected bool"),
        ({"augment": {"transforms": "Blur"}}, "data.augment.transforms: expected a list of transforms, got 'Blur'"),
    ],
)
def test_settings_of_other_types(shapes, settings, message):
    with pytest.raises(UserError, match=message):
        module(shapes, **settings).train_transform()


class OwnAugmentation(ImageFolderDataModule):
    def train_transform(self):
        return A.Compose([A.RandomResizedCrop(size=(32, 32)), A.Normalize(), A.ToTensorV2()])


def test_an_own_training_transform(shapes):
    data = OwnAugmentation(str(shapes), image_size=32, batch_size=7, num_workers=0)
    data.setup("fit")
    loader = data.train_dataloader()
    (first, *_), (again, *_), (other, *_) = (epoch_of(loader, epoch)[0] for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert data.preview(5).shape == (5, 32, 32, 3)
    assert data.settings()["train_transform"].endswith("OwnAugmentation.train_transform")
    assert module(shapes).settings()["train_transform"] is None
    with pytest.raises(UserError, match=r"data\.size_schedule has no effect on your own train_transform"):
        OwnAugmentation(str(shapes), image_size=32, size_schedule=[(0, 32)]).setup("fit")


@pytest.mark.parametrize("sizes", [[[1, 64]], [[0, 64], [0, 96]], [[0, 96], [5, 16]], [[0, 64], [4, 96], [2, 128]]])
def test_wrong_size_schedules(shapes, sizes):
    with pytest.raises(UserError, match=r"data.size_schedule is .*; expected pairs of epoch and pixels"):
        module(shapes, size_schedule=sizes)


def test_mixup_and_cutmix_by_hand(shapes):
    """Each image is blended with the one before it in its batch, each label likewise, by the same share."""
    plain = module(shapes, batch_size=6, augment=AugmentSettings("light"))
    plain.setup("fit")
    (images, targets), *_ = epoch_of(plain.train_dataloader(), 1)
    for settings in ({"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}):
        data = module(shapes, batch_size=6, augment=AugmentSettings("light", **settings))
        data.setup("fit")
        (mixed, probs), *rest = epoch_of(data.train_dataloader(), 1)
        assert probs.shape == (6, 3)
        torch.testing.assert_close(probs.sum(1), torch.ones(6))
        one_hot = torch.nn.functional.one_hot(targets, 3).float()
        before = one_hot.roll(1, 0)
        share = float(((probs - before) / (one_hot - before))[one_hot != before].mean())
        torch.testing.assert_close(probs, share * one_hot + (1 - share) * before)
        if settings == {"mixup": 0.8}:
            torch.testing.assert_close(mixed, share * images + (1 - share) * images.roll(1, 0), atol=1e-5, rtol=0)
        elif settings == {"cutmix": 1.0}:
            own = (mixed == images).all(1)
            assert ((mixed == images.roll(1, 0)).all(1) | own).all()
        shares = {float(p.max(1).values.min()) for _, p in [(mixed, probs), *rest]}
        assert len(shares) == 4  # each batch draws its own
        again = module(shapes, batch_size=6, num_workers=2, augment=data.augment)
        again.setup("fit")
        assert same(epoch_of(data.train_dataloader(), 3), epoch_of(again.train_dataloader(), 3))
        assert all(targets.ndim == 1 for _, targets, _ in data.val_dataloader())


def test_wrong_mixes():
    for key in ("mixup", "cutmix"):
        with pytest.raises(UserError, match=f"data.augment.{key} is -1"):
            AugmentSettings(**{key: -1})


def test_the_cache_reads_no_file_again(tmp_path, make_shapes):
    data = module(make_shapes(tmp_path / "d"), cache="ram")
    data.setup("fit")
    loader = data.train_dataloader()
    shutil.rmtree(tmp_path / "d")
    assert sum(len(y) for _, y, _ in loader) == 24


def trainer_like(**change) -> SimpleNamespace:
    what = {"max_epochs": 2, "limit_train_batches": 1.0, "state": "fit", **change}
    what["state"] = SimpleNamespace(fn=what["state"])
    strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce=lambda found, reduce_op: found)
    return SimpleNamespace(**what, world_size=1, global_rank=0, strategy=strategy)


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({}, True),
        ({"max_epochs": 1}, False),
        ({"limit_train_batches": 2}, False),
        ({"limit_train_batches": 1}, False),
        ({"state": "test"}, False),
    ],
)
def test_a_fit_of_several_epochs_decodes_once_what_fits(shapes, monkeypatch, change, kept):
    data = module(shapes)
    assert data.cache == "auto"
    data.setup("fit")
    data.trainer = trainer_like(**change)
    whole = sum(data._datasets["train"].read(i).nbytes for i in range(24))
    monkeypatch.setattr(process, "available_memory", lambda: 4 * whole - 4)  # a byte too little
    data.train_dataloader()
    assert data._datasets["train"].images is None
    monkeypatch.setattr(process, "available_memory", lambda: 4 * whole)
    data.train_dataloader()
    assert (data._datasets["train"].images is not None) == kept


# --- files that go missing ------------------------------------------------------------------------


def dataset(root: Path, count: int = 4, train: bool = True) -> ImageDataset:
    """``count`` images of class 0 and two of class 1, all different."""
    names = [f"{i}.png" for i in range(count + 2)]
    for i, name in enumerate(names):
        Image.fromarray(draw_shape(i, np.random.default_rng(i))).save(root / name)
    targets = np.array([0] * count + [1] * 2, np.int64)
    recipe = EvalRecipe(32)
    transform = TrainTransform(AugmentSettings("medium"), recipe, 32) if train else EvalTransform(recipe)
    return ImageDataset(Samples(root, PathList([n.encode() for n in names]), targets), transform, seed=0)


def test_a_deleted_training_image_is_replaced_by_the_next_of_its_class(tmp_path):
    data = dataset(tmp_path)
    second, first_of_other = data.read(1), data.read(4)
    (tmp_path / "0.png").unlink()
    for _ in range(2):  # always the same one
        with pytest.warns(UserWarning, match=r"0\.png' can no longer be read .* replaced"):
            assert np.array_equal(data.read(0), second)
    (tmp_path / "1.png").write_bytes(b"no picture any more")
    with pytest.warns(UserWarning, match="replaced by the next"):
        assert np.array_equal(data.read(0), data.read(2))
    (tmp_path / "5.png").unlink()
    with pytest.warns(UserWarning, match="replaced by the next"):
        assert np.array_equal(data.read(5), first_of_other)  # after the last comes the first
    with pytest.warns(UserWarning, match="replaced by the next"):
        images, targets, _ = data[BatchKey(0, np.array([0, 5]), np.zeros(2, int))]
    assert images.shape == (2, 3, 32, 32)
    assert targets.tolist() == [0, 1]


def test_a_class_without_readable_images_is_one_line(tmp_path):
    data = dataset(tmp_path)
    for name in ("4.png", "5.png"):
        (tmp_path / name).unlink()
    with (
        pytest.warns(UserWarning, match="replaced by the next"),
        pytest.raises(UserError, match="no image of its class can be read any longer"),
    ):
        data.read(4)


def test_a_deleted_evaluation_image_stops_the_run(tmp_path):
    data = dataset(tmp_path, train=False)
    (tmp_path / "0.png").unlink()
    with pytest.raises(UserError, match=r"0\.png: can no longer be read .* restore the file"):
        data[BatchKey(0, np.array([0, 1]), np.zeros(2, int))]


def test_an_error_in_a_loader_worker_is_one_line_too(tmp_path, make_shapes):
    root = make_shapes(tmp_path, test=0)
    data = module(root, num_workers=1)
    data.setup("fit")
    victim = data.splits()["val"].path(0)
    Path(victim).unlink()
    with pytest.raises(UserError) as error:
        list(data.val_dataloader())
    message = user_message(error.value)
    assert message is not None
    assert message.startswith(f"{victim}: can no longer be read")
    assert "\n" not in message
    assert "Traceback" not in message


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("fault", ["shape mismatch in my transform", "read timed out"])
def test_a_transform_s_own_error_is_its_own(shapes, monkeypatch, workers, fault):
    data = module(shapes, num_workers=workers)
    data.setup("fit")

    def fails(self, image):
        raise RuntimeError(fault)

    monkeypatch.setattr(EvalTransform, "__call__", fails)
    with pytest.raises(RuntimeError, match=fault):
        list(data.val_dataloader())


# --- setup ----------------------------------------------------------------------------------------


def damage(root: Path, split: str, count: int) -> list[str]:
    paths = sorted((root / split).rglob("*.png"))[:count]
    for path in paths:
        path.write_bytes(path.read_bytes()[:60])
    return [path.relative_to(root).as_posix() for path in paths]


def test_unreadable_files_are_left_out_and_remembered(tmp_path, make_shapes):
    root = make_shapes(tmp_path, test=0)
    bad = damage(root, "train", 1)  # 1 of 24: less than 5 %
    data = module(root)
    assert len(data.splits()["train"]) == 24
    data.prepare_data()
    data.setup("fit")
    data.setup("fit")  # Lightning may ask twice
    assert [row.path for row in data.bad_files] == bad
    assert "truncated" in data.bad_files[0].reason
    assert len(data.splits()["train"]) == 23
    assert bad[0] not in list(data.splits()["train"].paths)
    assert sum(len(y) for _, y, _ in data.train_dataloader()) == 23


@pytest.mark.parametrize("split", ["train", "val"])
def test_too_many_unreadable_files_are_refused(tmp_path, make_shapes, split):
    root = make_shapes(tmp_path, test=0)
    damage(root, split, 2)
    with pytest.raises(
        UserError, match=rf"2 of \d+ images of {split} cannot be read .*data.max_bad_fraction 0.05.*check"
    ):
        module(root).setup("fit")
    data = module(root, max_bad_fraction=0.2)
    data.setup("fit")
    assert len(data.bad_files) == 2


def test_the_limit_of_a_drawn_split_is_of_all_images(tmp_path, make_shapes):
    """The limit is of all images then, also where the draw is read from a file."""
    root = make_shapes(tmp_path, train=20, val=0, test=0) / "train"
    drawn = module(root)
    where = drawn.splits()["val"]
    Path(where.path(0)).write_bytes(b"")  # of 12, and of 60 altogether
    assert 1 / len(where) > 0.05
    write_split(drawn.folder, tmp_path / "split.csv")
    for data in (module(root), module(root, split_file=str(tmp_path / "split.csv"))):
        data.setup("fit")
        data.setup("validate")
        assert len(data.bad_files) == 1
    with pytest.raises(UserError, match=r"1 of 60 images of train, val cannot be read .*, more than"):
        module(root, max_bad_fraction=0.01).setup("fit")


def test_unreadable_images_are_recorded_also_if_none_is_left(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"\xff\xd8\xff")
    data = ImageFolderDataModule(predict_path=str(tmp_path), image_size=32, num_workers=0)
    with pytest.raises(UserError, match=r"none of the 2 images can be read: .*a.jpg.* \(truncated JPEG\)"):
        data.setup("predict")
    assert [row.path for row in data.bad_files] == ["a.jpg", "b.jpg"]


def test_an_unknown_stage_lists_all(shapes):
    with pytest.raises(UserError, match="fit, validate, test, predict"):
        module(shapes).setup("fitt")


def test_a_split_without_readable_images(tmp_path, make_shapes):
    root = make_shapes(tmp_path, test=0, val=1)
    for path in (root / "val").rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 3 images can be read: 'val/.*repair or replace them"):
        module(root, max_bad_fraction=1.0).setup("fit")


def test_a_single_training_image_says_so(tmp_path, make_shapes):
    root = make_shapes(tmp_path, train=1, val=1, test=0, classes=("good", "bad"))
    (root / "train" / "bad" / "train_000.jpg").write_bytes(b"")
    data = module(root, max_bad_fraction=1.0)
    with pytest.raises(UserError, match=r"no training image can be read of 1 class: 'bad'; repair the files"):
        data.setup("fit")
    data = module(make_shapes(tmp_path / "two", train=1, val=1, test=0, classes=("a", "b")))
    data.setup("fit")
    device = torch.device("cpu")
    data.trainer = SimpleNamespace(world_size=2, global_rank=0, strategy=SimpleNamespace(root_device=device))
    with pytest.raises(UserError, match=r"2 images for 2 processes; each needs at least 2"):
        data.train_dataloader()


def test_a_missing_split_says_what_to_do(tmp_path, make_shapes):
    root = make_shapes(tmp_path, val=0, test=0)
    with pytest.raises(UserError, match=r"there is no val split and data\.val_fraction is 0"):
        module(root, val_fraction=0.0).setup("fit")
    data = module(root, val_fraction=0.25)
    data.setup("fit")
    assert {name: len(s) for name, s in data.splits().items()} == {"train": 18, "val": 6}
    with pytest.raises(UserError, match=r"there is no test split; .* data.test_fraction above 0"):
        data.setup("test")
    with pytest.raises(UserError, match=r"there is no val split; .* more images: a class keeps its only one"):
        module(make_shapes(tmp_path / "one", train=1, val=0, test=0)).setup("fit")


def test_a_split_file_without_validation_images(tmp_path, make_shapes):
    """A fit does without them if none are to be drawn; a validation does not."""
    root = make_shapes(tmp_path, val=0, test=0)
    split_file = tmp_path / "split.csv"
    rows = [f"{path.relative_to(root)},train\n" for path in (root / "train").rglob("*.*")]
    split_file.write_text("path,split\n" + "".join(rows))
    data = module(root, split_file=str(split_file), val_fraction=0.0)
    data.setup("fit")
    assert data.val_dataloader() == []
    assert sorted(i for batch in data.train_dataloader() for i in batch[2].tolist()) == list(range(24))
    with pytest.raises(UserError, match="there is no val split"):
        data.setup("validate")
    assert "val" in module(root, split_file=str(split_file)).splits()  # drawn from train


def test_a_loader_before_setup_says_so(tmp_path, make_shapes):
    data = module(make_shapes(tmp_path))
    for load, stage in (
        (data.train_dataloader, "fit"),
        (data.val_dataloader, "validate"),
        (data.test_dataloader, "test"),
    ):
        with pytest.raises(UserError, match=rf"call setup\('{stage}'\) first"):
            load()


def test_class_folders_are_split(tmp_path, make_shapes):
    root = make_shapes(tmp_path, train=10, val=0, test=0, flat=True)
    data = module(root, val_fraction=0.2, test_fraction=0.1)
    assert {name: len(s) for name, s in data.splits().items()} == {"train": 21, "val": 6, "test": 3}
    assert data.num_classes == 3
    assert data.class_names == ("circle", "cross", "square")


def test_predict_needs_no_labels_and_lists_what_it_cannot_read(tmp_path):
    (tmp_path / "deep").mkdir()
    for i in range(3):
        Image.fromarray(draw_shape(i, np.random.default_rng(i))).save(tmp_path / "deep" / f"{i}.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    data = ImageFolderDataModule(predict_path=str(tmp_path), image_size=32, num_workers=0)
    data.setup("predict")
    ((images, targets, _),) = list(data.predict_dataloader())
    assert images.shape == (3, 3, 32, 32)
    assert targets.tolist() == [-1, -1, -1]
    assert [row.path for row in data.bad_files] == ["broken.jpg"]  # one of four, and yet no error


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_without_a_folder_each_stage_names_its_key(stage):
    with pytest.raises(UserError, match=r"data.root is not set"):
        ImageFolderDataModule(image_size=32).setup(stage)


def test_without_a_path_predictions_name_their_key():
    data = ImageFolderDataModule(image_size=32)
    data.setup("predict")  # a trainer that is given a loader does so all the same
    with pytest.raises(UserError, match=r"data.predict_path is not set"):
        data.predict_dataloader()


def test_a_batch_of_one_is_refused(shapes):
    with pytest.raises(UserError, match=r"data.batch_size is 1"):
        module(shapes, batch_size=1)
    assert module(shapes, batch_size=1, class_names=("circle", "cross", "square")).batch_size == 1  # not to train


def test_relative_roots_are_remembered_whole(shapes, monkeypatch):
    monkeypatch.chdir(shapes.parent)
    data = ImageFolderDataModule(shapes.name)
    assert data.record.root == str(shapes)


def test_settings_as_in_a_notebook(tmp_path):
    assert ImageFolderDataModule(augment="heavy").augment.name == "heavy"
    assert ImageFolderDataModule(augment={"hflip": 0.0}).augment.hflip == 0
    with pytest.raises(UserError, match=r"data.sampler is 'foo'; expected one of shuffle"):
        ImageFolderDataModule(sampler="foo")
    with pytest.raises(UserError, match=r"data.augment.name is 'lihgt'"):
        ImageFolderDataModule(augment="lihgt")
    with pytest.raises(UserError, match=r"data.batch_size is 0; .*; data.num_workers is -1; .*; data.cache is 'tape'"):
        ImageFolderDataModule(batch_size=0, num_workers=-1, cache="tape")


def test_a4_mutated_files_in_loader_workers(tmp_path):
    """1,500 of each format: what is bad is listed, the rest arrives under its label, and no worker dies."""
    rng = np.random.default_rng(0)
    good = 0
    for label, names in (("a", ("jpeg", "png", "webp")), ("b", ("bmp", "tiff", "gif"))):
        folder = tmp_path / "train" / label
        folder.mkdir(parents=True)
        (tmp_path / "val" / label).mkdir(parents=True)
        (tmp_path / "val" / label / "0").with_suffix(".png").write_bytes(SAMPLES["png"])
        for name in names:
            (folder / f"good.{name}").write_bytes(SAMPLES[name])
            good += 1
            for i in range(1500):
                (folder / f"{i}.{name}").write_bytes(mutate(SAMPLES[name], rng))
    data = module(tmp_path, batch_size=64, num_workers=2, max_bad_fraction=1.0, cache="none")
    data.setup("fit")
    samples, loader = data.splits()["train"], data.train_dataloader()
    assert len(data.bad_files) + len(samples) == 9000 + good
    assert 1000 < len(data.bad_files) < 9000
    assert {row.path for row in data.bad_files}.isdisjoint(set(samples.paths))
    assert {f"train/{label}/good.{name}" for label, name in (("a", "png"), ("b", "gif"))} <= set(samples.paths)
    loader.sampler.set_epoch(0)
    for images, targets, indices in loader:
        assert images.isfinite().all()
        assert targets.tolist() == samples.targets[indices.numpy()].tolist()


@pytest.mark.parametrize("key", ["predict_path", "strangers", "unlabelled"])
def test_a_missing_folder_of_images_is_named_with_its_setting(shapes, key):
    with pytest.raises(UserError, match=rf"^data\.{key}: 'gone': no such file or folder"):
        module(shapes, **{key: "gone"})

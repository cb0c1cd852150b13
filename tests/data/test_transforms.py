"""Recipes: the eval geometry against timm's, values by hand, and augmentation that draws from its seed alone."""

from __future__ import annotations

import functools
import pickle
import random

import albumentations as A  # noqa: N812
import cv2
import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from torchvision.transforms import v2

from rexnet_lit.data.augmentation import AugmentSettings, build_pipeline
from rexnet_lit.data.settings import EvalRecipe
from rexnet_lit.data.transforms import EvalTransform, OwnTransform, TrainTransform
from rexnet_lit.utils.errors import UserError

RECIPES = ("none", "light", "medium", "heavy", "randaugment")


def ramps(height: int, width: int) -> np.ndarray:
    """Red rises from left to right, green from top to bottom, blue is half: a pixel's colour says where it was."""
    image = np.full((height, width, 3), 128, np.uint8)
    image[..., 0] = np.round(np.linspace(0, 255, width))
    image[..., 1] = np.round(np.linspace(0, 255, height))[:, None]
    return image


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# --- the eval recipe ------------------------------------------------------------------------------


def timm_s(image: np.ndarray, size: int, crop_pct: float, interpolation: str, crop_mode="center") -> np.ndarray:
    """Return timm's view of an image, (S, S, 3)."""
    theirs = timm.data.create_transform(
        size, crop_pct=crop_pct, interpolation=interpolation, normalize=False, crop_mode=crop_mode
    )
    return np.asarray(theirs(Image.fromarray(image))).transpose(1, 2, 0).astype(int)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.95, 1.0])
@pytest.mark.parametrize(
    ("height", "width"), [(300, 400), (400, 300), (224, 224), (256, 256), (64, 48), (333, 999), (777, 333), (40, 41)]
)
def test_the_pixels_are_timm_s(height, width, crop_pct, interpolation):
    """Of any picture, to two levels: Pillow rounds between its two passes, and so does torch."""
    image = cv2.GaussianBlur(noise(height, width), (0, 0), 1)
    for size in (96, 224):
        got = EvalTransform(EvalRecipe(size, crop_pct, interpolation)).crop(image).astype(int)
        assert np.abs(got - timm_s(image, size, crop_pct, interpolation)).max() <= 2


@pytest.mark.parametrize("crop_mode", ["center", "border", "squash"])
def test_every_crop_mode_of_images_of_all_shapes_is_timm_s(crop_mode):
    """200 pictures, up to forty times as long as wide."""
    rng = np.random.default_rng(1)
    for number, (height, width) in enumerate(np.exp(rng.uniform(np.log(10), np.log(400), (200, 2))).astype(int)):
        image = cv2.blur(noise(height, width, number), (3, 3))
        crop_pct, interpolation = (0.875, 0.95, 1.0)[number % 3], ("bicubic", "bilinear")[number % 2]
        got = EvalTransform(EvalRecipe(48, crop_pct, interpolation, crop_mode=crop_mode)).crop(image).astype(int)
        assert np.abs(got - timm_s(image, 48, crop_pct, interpolation, crop_mode)).max() <= 2, (height, width)


def test_shrinking_averages_what_it_leaves_out():
    """A chessboard of single pixels becomes grey; without averaging it would stay black and white."""
    board = np.zeros((256, 256, 3), np.uint8)
    board[::2, ::2] = board[1::2, 1::2] = 255
    small = EvalTransform(EvalRecipe(64, 1.0)).crop(board).astype(int)
    assert np.abs(small - 128).max() <= 1


def test_an_image_of_the_right_size_is_untouched():
    image = noise(96, 96)
    for interpolation in ("bicubic", "bilinear", "nearest"):
        assert np.array_equal(EvalTransform(EvalRecipe(96, 1.0, interpolation)).crop(image), image)


def test_the_centre_is_cut_out():
    image = noise(50, 90)
    got = EvalTransform(EvalRecipe(40, 0.8)).crop(image)  # 50 = 40 / 0.8: no resizing
    assert np.array_equal(got, image[5:45, 25:65])


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (1, 7), (2, 3), (5, 5), (1, 1000), (1000, 1), (3, 200_000), (31, 33)]
)
def test_small_images_and_strips(height, width):
    image = noise(height, width)
    for size, crop_mode in ((32, "center"), (224, "center"), (96, "border"), (96, "squash")):
        got = EvalTransform(EvalRecipe(size, crop_mode=crop_mode))(image)
        assert got.shape == (3, size, size)
        assert torch.isfinite(got).all()


def test_values_by_hand():
    """(x / 255 - mean) / std, with ImageNet's mean and std per channel, RGB."""
    image = np.zeros((32, 32, 3), np.uint8)
    image[0, 0], image[0, 1], image[0, 2] = (255, 255, 255), (128, 128, 128), (255, 0, 128)
    got = EvalTransform(EvalRecipe(32, 1.0))(image)
    assert got.dtype == torch.float32
    for x, wanted in enumerate(
        (
            (2.2489083, 2.4285714, 2.64),
            (0.0740646, 0.2051821, 0.4264924),
            (2.2489083, -2.0357143, 0.4264924),
            (-2.1179039, -2.0357143, -1.8044444),
        )
    ):
        assert got[:, 0, x].tolist() == pytest.approx(wanted, abs=1e-6)


def test_other_means_are_used_and_recipes_do_not_share_tables():
    image = noise(32, 32)
    for mean, std in (((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ((0.1, 0.2, 0.3), (1.0, 0.5, 0.25))):
        got = EvalTransform(EvalRecipe(32, 1.0, mean=mean, std=std))(image)
        wanted = (image / 255 - mean) / std
        np.testing.assert_allclose(got.permute(1, 2, 0).numpy(), wanted, atol=1e-6)


def test_the_memory_is_channels_last():
    assert EvalTransform(EvalRecipe(32))(noise(50, 40)).permute(1, 2, 0).is_contiguous()


def test_an_image_is_never_changed_in_place():
    image = noise(40, 40)
    before = image.copy()
    EvalTransform(EvalRecipe(32, 1.0))(image)
    for name in RECIPES:
        train(name, 40, erasing=1.0)(image, 1)
    assert np.array_equal(image, before)


# --- training recipes -----------------------------------------------------------------------------


def train(name: str, size: int = 48, **settings) -> TrainTransform:
    return TrainTransform(AugmentSettings(name=name, **settings), EvalRecipe(size), size)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(("height", "width"), [(60, 80), (1, 1), (2, 500), (500, 3), (48, 48), (20, 20)])
def test_every_recipe_gives_the_right_shape(name, height, width):
    recipe = train(name, erasing=0.5)
    for seed in range(3):
        got = recipe(noise(height, width), seed)
        assert got.shape == (3, 48, 48)
        assert got.dtype == torch.float32
        assert torch.isfinite(got).all()


@pytest.mark.parametrize("name", RECIPES)
def test_same_seed_same_result_other_seed_other_result(name):
    image = noise(60, 80)
    one, two = train(name, erasing=0.5), train(name, erasing=0.5)
    results = []
    for seed in range(16):
        got = one(image, seed)
        one(image, 1000 + seed)  # what was drawn in between does not matter, nor do the global streams
        np.random.seed(seed)
        torch.manual_seed(seed)
        assert torch.equal(one(image, seed), got)
        assert torch.equal(two(image, seed), got)
        results.append(got.numpy().tobytes())
    if name != "none":
        assert len(set(results)) == len(results)
    large = train(name)(image, 2**32 - 1)  # the largest seed that data.py hands over
    assert large.shape == (3, 48, 48)


def test_none_is_the_eval_recipe_at_the_training_size():
    image = noise(70, 90)
    recipe = EvalRecipe(64, 0.9)
    got = TrainTransform(AugmentSettings(name="none"), recipe, 48)(image, 5)
    assert torch.equal(got, EvalTransform(EvalRecipe(48, 0.9))(image))


@pytest.mark.parametrize("crop_mode", ["center", "border", "squash"])
@pytest.mark.parametrize(("height", "width"), [(96, 320), (320, 96)])
def test_training_sees_all_of_a_long_image(height, width, crop_mode):
    """Red says which columns, green which rows. No crop of 0.6 of the area and at most 4:3 fits into these."""
    seen = np.zeros((256, 2), int)
    transform = TrainTransform(AugmentSettings("light", hflip=0.0), EvalRecipe(64, crop_mode=crop_mode), 64)
    for seed in range(60):
        view = transform.augment(ramps(height, width), seed)
        inside = view[np.abs(view[..., 2].astype(int) - 128) <= 2]  # not the border, whose blue is 104
        for channel in (0, 1):
            low, high = int(inside[:, channel].min()), int(inside[:, channel].max())
            seen[low : high + 1, channel] += 1
    assert seen[8:-8].min() > 0
    if crop_mode != "center":  # a crop has the image's shape, and keeps most of its length
        assert seen[[64, 192]].min() >= 45


def test_a_crop_of_a_photograph_is_drawn_as_albumentations_draws_it():
    """The middle crop of those that do not fit is only moved where none can fit: 4:3 of 0.6 of the area."""
    draw = A.Compose([A.RandomResizedCrop((64, 64), scale=(0.6, 1.0))])
    for height, width in ((200, 300), (440, 200)):
        for seed in range(60):
            draw.set_random_state(np.random.default_rng(seed), random.Random(seed))
            theirs = draw(image=ramps(height, width))["image"].astype(int)
            ours = train("light", 64, hflip=0.0).augment(ramps(height, width), seed).astype(int)
            assert np.abs(ours - theirs).max() <= 5  # OpenCV's filter against torch's
    moved = {train("light", 64, hflip=0.0).augment(ramps(460, 200), seed)[0, 0, 1] for seed in range(5)}
    assert len(moved) == 5


def test_the_crop_keeps_the_least_area():
    """On ramps the view's range of red and green says which share of the image was kept."""
    image = ramps(256, 256)
    shares = []
    for seed in range(60):
        view = train("light", 64, min_scale=0.4, hflip=0.0).augment(image, seed).astype(float)
        # Pixel centres: the outermost of 64 lie half a pixel inside.
        spans = [(view[..., c].max() - view[..., c].min()) / 255 * 64 / 63 for c in (0, 1)]
        shares.append(spans[0] * spans[1])
    assert min(shares) > 0.4 - 0.03
    assert min(shares) < 0.6  # it does draw small ones
    assert max(shares) > 0.85


def test_the_flip_is_a_mirror_image_with_its_probability():
    image = ramps(64, 64)
    for hflip, low, high in ((0.0, 0, 0), (0.5, 70, 130), (1.0, 200, 200)):  # 200 draws; 130 is 4 sigma off 100
        recipe = train("light", 32, min_scale=1.0, hflip=hflip)
        views = [recipe.augment(image, seed) for seed in range(200)]
        flipped = sum(int(v[0, 0, 0]) > int(v[0, -1, 0]) for v in views)
        assert low <= flipped <= high
        assert all(v[0, 0, 1] < v[-1, 0, 1] for v in views)  # never upside down


def test_symmetries():
    """All eight views of a square appear, about equally often, and no other; the defaults are without them."""
    corners = np.zeros((32, 32, 3), np.uint8)
    corners[:16, :16], corners[:16, 16:], corners[16:, :16] = 255, 160, 80
    square = [np.rot90(flipped, k) for flipped in (corners, corners[:, ::-1]) for k in range(4)]
    recipe = train("light", 32, min_scale=1.0, hflip=0.5, vflip=0.5, quarter_turns=1.0)
    counts = [0] * 8
    for seed in range(200):
        view = recipe.augment(corners, seed)[4::23, 4::23]
        counts[[np.abs(view.astype(int) - other[4::23, 4::23]).max() < 9 for other in square].index(True)] += 1
    assert min(counts) > 8  # 25 are expected
    with pytest.raises(UserError, match="vflip"):
        AugmentSettings("none", vflip=0.5)


@pytest.mark.parametrize("name", ["light", "medium", "heavy", "randaugment"])
def test_decoded_images_need_not_be_larger_than_min_size(name):
    """A crop of the least area out of a square of min_size has at least the input's area."""
    for min_scale, size in ((0.35, 224), (0.08, 96), (1.0, 64)):
        recipe = train(name, size, min_scale=min_scale)
        assert recipe.min_size**2 * min_scale >= size**2
        assert (recipe.min_size - 1) ** 2 * min_scale < size**2  # and no more than that
    assert train("none", 224).min_size == 256


def test_randaugment_does_as_many_changes_as_it_is_told():
    image = noise(64, 64)
    plain = train("light", 32, hflip=0.0)
    none = train("randaugment", 32, hflip=0.0, num_ops=0)
    assert all(torch.equal(plain(image, s), none(image, s)) for s in range(5))

    def change(magnitude: float) -> float:
        recipe = train("randaugment", 64, hflip=0.0, min_scale=1.0, num_ops=1, magnitude=magnitude)
        smooth = ramps(64, 64)
        return float(np.mean([np.abs(recipe.augment(smooth, s).astype(int) - smooth).mean() for s in range(80)]))

    assert change(1) < change(5) < change(10)


def test_erasing_puts_noise_into_one_rectangle():
    grey = np.full((64, 64, 3), 100, np.uint8)
    shares = []
    for seed in range(40):
        view = train("none", 64, erasing=1.0).augment(grey, seed)
        changed = (view != 100).any(2)
        if not changed.any():
            continue
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean() > 0.95  # one full rectangle
        shares.append(height * width / 64**2)
        if height * width > 200:
            assert len(np.unique(view[changed], axis=0)) > 100  # a colour per pixel, not one per rectangle
    assert len(shares) >= 36
    assert min(shares) > 0.01
    assert max(shares) < 0.36
    sometimes = [(train("none", 64, erasing=0.5).augment(grey, s) != 100).any() for s in range(100)]
    assert 30 <= sum(sometimes) <= 70  # 4 sigma
    assert not any((train("none", 64).augment(grey, s) != 100).any() for s in range(5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "lots"}, "data.augment.name is 'lots'; expected one of none, light"),
        ({"min_scale": 0}, "data.augment.min_scale is 0"),
        ({"hflip": 1.1}, "data.augment.hflip is 1.1"),
        ({"erasing": -0.1}, "data.augment.erasing is -0.1"),
        ({"magnitude": 11}, "data.augment.magnitude"),
        ({"num_ops": -1}, "data.augment.num_ops"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(UserError, match=message):
        AugmentSettings(**settings)


# --- pipelines from YAML --------------------------------------------------------------------------


def test_a_pipeline_takes_the_place_of_the_recipe_s_own_changes():
    image = noise(64, 64)
    inverted = train("heavy", 64, min_scale=1.0, hflip=0.0, transforms=[{"InvertImg": {"p": 1.0}}])
    assert np.array_equal(inverted.augment(image, 3), 255 - image)
    nothing = train("heavy", 64, min_scale=1.0, hflip=0.0, transforms=[])
    assert np.array_equal(nothing.augment(image, 3), image)


def test_a_nested_pipeline_draws_from_the_seed():
    steps = [
        {"OneOf": {"transforms": [{"GaussianBlur": {"p": 1.0}}, "InvertImg", {"Rotate": {"limit": 30}}], "p": 0.9}},
        {"RandomBrightnessContrast": None},
        "GaussNoise",
    ]
    image = noise(64, 64)
    one, two = train("light", 32, transforms=steps), train("light", 32, transforms=steps)
    results = [one(image, s) for s in range(12)]
    assert all(torch.equal(two(image, s), results[s]) for s in reversed(range(12)))
    assert len({r.numpy().tobytes() for r in results}) == 12


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            ["GaussBlur"],
            r"data\.augment\.transforms\[0\]: albumentations has no 'GaussBlur'; did you mean .*GaussianBl",
        ),
        ([{"Rotate": {"limt": 3}}], r"\[0\]: Rotate refuses its arguments: .*limt"),
        (["HorizontalFlip", {"Rotate": {"p": 7}}], r"transforms\[1\]: Rotate refuses its arguments"),
        ([{"Rotate": {}, "Blur": {}}], r"\[0\]: expected a name or \{name: \{argument: value\}\}"),
        ([{"Rotate": [30]}], r"\[0\]: expected a name or"),
        ([5], r"\[0\]: expected a name or"),
        ("Rotate", r"data\.augment\.transforms: expected a list of transforms, got 'Rotate'"),
        ([{"OneOf": {}}], r"OneOf refuses its arguments"),
        ([{"OneOf": {"transforms": None}}], r"transforms\[0\]\.OneOf\.transforms: expected a list"),
        ([{"OneOf": {"transforms": ["Blurr"]}}], r"\[0\]\.OneOf\.transforms\[0\]: albumentations has no 'Blurr'"),
        (["read_rgb_image"], r"albumentations has no 'read_rgb_image'"),  # a function of its, but no transform
        (["__builtins__"], r"albumentations has no '__builtins__'"),
        (["Normalize"], r"\[0\]: Normalize must map uint8 .* got ndarray of float32"),
        (["HorizontalFlip", "ToTensorV2"], r"\[1\]: ToTensorV2 must map uint8 .* got Tensor"),
        ([{"Resize": {"height": 9, "width": 9}}], r"\[0\]: Resize must map uint8 \(48, 48, 3\) to the same"),
        ([{"Resize": {"height": 9, "width": 9, "p": 0.01}}], r"\[0\]: Resize must map"),  # rare, but it would come
        ([{"OneOf": {"transforms": ["Blur", "ToFloat"]}}], r"\[0\]: ToFloat must map"),
        ([{"RandomCrop": {"height": 99, "width": 99}}], r"\[0\]: RandomCrop fails on an image"),
    ],
)
def test_pipelines_that_cannot_be_are_one_line(steps, message):
    with pytest.raises(UserError, match=message) as error:
        train("light", transforms=steps)
    assert "\n" not in str(error.value)


def test_the_key_of_an_error_can_be_named():
    with pytest.raises(UserError, match=r"^mine\[0\]: "):
        build_pipeline(["Blurr"], "mine")


def test_recipes_travel_to_loader_workers():
    import pickle

    image = noise(40, 40)
    for recipe in (train("heavy", erasing=0.3), train("none")):
        again = pickle.loads(pickle.dumps(recipe))  # noqa: S301
        assert torch.equal(again(image, 7), recipe(image, 7))
    evaluate = EvalTransform(EvalRecipe(32))
    assert functools.reduce(torch.equal, [pickle.loads(pickle.dumps(evaluate))(image), evaluate(image)])  # noqa: S301


# --- a user's own ---------------------------------------------------------------------------------


def test_albumentations_objects():
    mine = A.OneOf([A.GaussianBlur(blur_limit=(3, 5), p=0.5), A.InvertImg(p=0.5)], p=0.9)
    objects = train("light", 32, transforms=[mine, A.Rotate(limit=(-30, 30), p=0.5)])
    named = train(
        "light",
        32,
        transforms=[
            {"OneOf": {"transforms": [{"GaussianBlur": {"blur_limit": [3, 5]}}, "InvertImg"], "p": 0.9}},
            {"Rotate": {"limit": [-30, 30], "p": 0.5}},
        ],
    )
    for seed in range(5):
        np.testing.assert_array_equal(objects.augment(noise(90, 120), seed), named.augment(noise(90, 120), seed))
    assert mine.transforms[0].p == 0.5
    with pytest.raises(UserError, match=r"transforms\[0\]: Resize must map uint8"):
        train("light", 32, transforms=[A.Resize(8, 8)])


def own_function(image):
    noise = np.random.rand() + random.random() + float(torch.rand(()))
    return torch.from_numpy(cv2.resize(image, (32, 32))).permute(2, 0, 1) / 255 * noise


@pytest.mark.parametrize(
    "transform",
    [
        own_function,
        A.Compose([A.RandomResizedCrop(size=(32, 32)), A.Normalize(), A.ToTensorV2()]),
        v2.Compose([v2.ToImage(), v2.RandomResizedCrop(32), v2.ToDtype(torch.float32, scale=True)]),
    ],
    ids=["function", "albumentations", "torchvision"],
)
def test_an_own_transform_follows_the_seed(transform):
    own = pickle.loads(pickle.dumps(OwnTransform(transform, EvalRecipe(32), 32)))  # noqa: S301
    before = (random.random, np.random.rand, lambda: torch.rand(()).item())
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = [draw() for draw in before]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    first, again, other = own(noise(90, 120), 1), own(noise(90, 120), 1), own(noise(90, 120), 2)
    assert [draw() for draw in before] == expected  # the caller's random numbers are untouched
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert own.augment(noise(90, 120), 1).shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda image: image.no, "train_transform fails on an image: AttributeError: .*no"),
        (
            lambda image: torch.zeros(3, 8, 8),
            r"tensor \(3, 32, 32\); got Tensor torch.float32 \(3, 8, 8\)",
        ),
        (lambda image: image, r"got ndarray uint8"),
    ],
)
def test_wrong_own_transforms(transform, message):
    with pytest.raises(UserError, match=message):
        OwnTransform(transform, EvalRecipe(32), 32)

"""Loading a model and predicting: the same preprocessing everywhere, all kinds of images, ImageNet's class names."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import io
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import NAMES, lively_model, picture, write_dataset
from PIL import Image

import rexnet_lit
from rexnet_lit import UserError
from rexnet_lit.data import decode
from rexnet_lit.data.settings import EvalRecipe
from rexnet_lit.data.transforms import EvalTransform
from rexnet_lit.models import rexnet


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return lively_model(tmp_path_factory.mktemp("model") / "model.safetensors")


@pytest.fixture(scope="module")
def classifier(model):
    return rexnet_lit.load(model, device="cpu")


def write_formats(folder):
    """Write an image in formats that libraries read differently; return the files."""
    folder.mkdir(parents=True)
    image = Image.fromarray(picture("ring", 3, 90)).crop((0, 0, 90, 70))
    grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
    hidden = np.dstack([np.asarray(image), np.full((70, 90), 255, np.uint8)])
    hidden[:30, :, 3] = 0
    turned = Image.Exif()
    turned[0x0112] = 6
    image.save(folder / "plain.png")
    image.save(folder / "photo.jpg", quality=90)
    image.resize((900, 700)).save(folder / "large.jpg", quality=90)
    image.save(folder / "turned.jpg", exif=turned)
    image.convert("CMYK").save(folder / "print.jpg")
    image.convert("L").save(folder / "grey.png")
    Image.fromarray(grey).save(folder / "deep.png")
    Image.fromarray(hidden).save(folder / "see-through.png")
    image.quantize(16).save(folder / "palette.png", transparency=3)
    image.save(folder / "web.webp", lossless=True)
    return sorted(folder.iterdir())


def test_logits_equal_those_of_validation(classifier, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = write_dataset(tmp_path / "data", train=1, val=2)
    write_formats(root / "val" / "ring" / "formats")
    data = rexnet_lit.ImageFolderDataModule(str(root), batch_size=5, num_workers=0)
    data.eval_recipe = classifier.spec.eval_recipe
    data.setup("validate")
    with torch.inference_mode():
        batches = [classifier.network(images) for images, *_ in data.val_dataloader()]
    samples = data.splits()["val"]
    assert len(samples) == 16
    assert len(batches) == 4
    expected = torch.cat(batches)
    got = classifier.logits([samples.path(i) for i in range(len(samples))])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert expected.std(0).min() > 0.05  # the images' logits differ, so the comparison means something


def test_the_module_and_the_classifier_predict_the_same(model, classifier):
    from rexnet_lit.models import checkpoint

    module = rexnet_lit.RexNetModule.from_model(checkpoint.load_model(model)).eval()
    images = [picture(name, 5) for name in NAMES]
    batch = torch.cat([classifier._batch([image]) for image in images])
    with torch.inference_mode():
        probs = module.predict_step((batch, torch.full((3,), -1)), 0)
    np.testing.assert_allclose(probs.numpy(), classifier.probabilities(images), atol=1e-6)


def test_paths_pil_images_and_arrays_agree(classifier, tmp_path):
    files = [f for f in write_formats(tmp_path / "formats") if f.name != "large.jpg"]
    from_paths = classifier.logits(files)
    torch.testing.assert_close(classifier.logits([str(f) for f in files]), from_paths)
    opened = [Image.open(f) for f in files]
    torch.testing.assert_close(classifier.logits(opened), from_paths, atol=1e-5, rtol=0)
    plain = tmp_path / "formats" / "plain.png"
    array = np.asarray(Image.open(plain))
    one = classifier.logits(plain)
    torch.testing.assert_close(classifier.logits(array), one)
    torch.testing.assert_close(classifier.logits(np.stack([array, array])), one.repeat(2, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(classifier.logits(array[::-1][::-1]), one)  # arrays need not be contiguous
    grey = tmp_path / "formats" / "grey.png"
    torch.testing.assert_close(classifier.logits(np.asarray(Image.open(grey))), classifier.logits(grey))
    see_through = tmp_path / "formats" / "see-through.png"
    torch.testing.assert_close(classifier.logits(np.asarray(Image.open(see_through))), classifier.logits(see_through))


def test_a_truncated_photograph_is_refused(classifier, tmp_path):
    """No decoder reports it, because an end marker follows."""
    from sklearn import datasets

    data = (Path(datasets.__file__).parent / "images" / "china.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(data[: len(data) // 2].rstrip(b"\xff") + b"\xff\xd9")
    with pytest.raises(UserError, match=r"half.jpg: cannot be read as an image \(truncated JPEG"):
        classifier.predict(tmp_path / "half.jpg")


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_scaled_decoding_gives_nearly_the_same_image(name):
    """The tolerance that decode.py states, on scikit-learn's photographs (640 x 427), scaled and whole."""
    from sklearn import datasets

    file = Path(datasets.__file__).parent / "images" / name
    for size in (64, 96, 128, 224):
        transform = EvalTransform(EvalRecipe(image_size=size))
        scaled = transform.crop(decode.read(str(file), transform.min_size)).astype(float)
        whole = transform.crop(decode.from_pil(Image.open(file))).astype(float)
        assert np.abs(scaled - whole).mean() < 7, size  # of 255


def test_repr(classifier):
    assert re.fullmatch(r"Classifier\(rexnet_\d+, 3 classes, \d+ x \d+ pixels, cpu\)", repr(classifier))


def test_predict(classifier):
    images = [picture(name, 7) for name in NAMES for _ in range(12)]  # more than a batch
    rows = classifier.predict(images, top_k=2)
    assert [len(row) for row in rows] == [2] * 36
    probs = classifier.probabilities(images)
    np.testing.assert_allclose(probs.sum(1), 1, atol=1e-5)
    for row, p in zip(rows, probs, strict=True):
        best = np.argsort(-p)[:2]
        assert [each.label for each in row] == [NAMES[i] for i in best]
        assert [each.prob for each in row] == pytest.approx(p[best].tolist(), abs=1e-6)
    label, prob = classifier.predict(images[0])[0][0]
    assert (label, prob) == classifier.predict(iter(images[:1]))[0][0]
    assert len(classifier.predict(images[0])[0]) == 3  # top_k is 5, the model has 3 classes


def test_embed(classifier):
    images = [picture("disc", 1), picture("disc", 2)]
    features = classifier.embed(images)
    assert features.shape == (2, 1280)
    assert features.dtype == np.float32
    head = classifier.network.head.fc
    np.testing.assert_allclose(
        features @ head.weight.numpy().T + head.bias.numpy(), classifier.logits(images).numpy(), atol=1e-4
    )


def test_explain_takes_any_form_of_a_name(model):
    classifier = rexnet_lit.load(model, device="cpu")
    names = ("caf\u00e9", *classifier.class_names[1:])
    classifier.spec = dataclasses.replace(classifier.spec, class_names=names)
    image = picture("ring", 3, 80)
    np.testing.assert_array_equal(classifier.explain(image, "cafe\u0301"), classifier.explain(image, names[0]))


@pytest.mark.parametrize("target", [None, "bars"])
def test_explain(classifier, target):
    image = picture("ring", 3, 80)
    heat = classifier.explain(image, target)
    assert heat.shape == (64, 64)
    assert heat.dtype == np.float32
    assert heat.min() >= 0
    assert heat.max() == pytest.approx(1)
    assert heat.std() > 0.02  # at 64 px the last features are 2 x 2, too coarse for a map
    assert classifier.view(image).shape == (64, 64, 3)
    assert not classifier.network.training


def test_explain_is_grad_cam_on_the_last_features_of_a_large_view(model):
    """Against the paper's formula on forward_features, at a size at which they have 4 x 4 cells."""
    import dataclasses

    classifier = rexnet_lit.load(model, device="cpu")
    spec = dataclasses.replace(
        classifier.spec, eval_recipe=dataclasses.replace(classifier.spec.eval_recipe, image_size=128)
    )
    classifier = rexnet_lit.Classifier(spec, classifier.network, "cpu")
    image = picture("ring", 3, 150)
    features = classifier.network.forward_features(classifier._batch([image])).detach().requires_grad_()
    assert features.shape[2:] == (4, 4)
    classifier.network.forward_head(features)[0, 1].backward()
    weights = features.grad[0].mean((1, 2))
    cam = torch.einsum("c,chw->hw", weights, features.detach()[0]).relu()
    cam = torch.nn.functional.interpolate(cam[None, None], size=(128, 128), mode="bilinear")[0, 0]
    np.testing.assert_allclose(classifier.explain(image, NAMES[1]), (cam / cam.max()).numpy(), atol=1e-4)


def test_bytes_files_and_tensors(classifier, tmp_path):
    """What web frameworks and torchvision have. A file object that was just written is at its end."""
    image = picture("ring", 3, 80)
    Image.fromarray(image).save(tmp_path / "ring.png")
    data, written = (tmp_path / "ring.png").read_bytes(), io.BytesIO()
    Image.fromarray(image).save(written, "png")
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    expected = classifier.logits(image)
    with (tmp_path / "ring.png").open("rb") as file:
        for same in (data, bytearray(data), memoryview(data), written, file, tensor, tensor / 255, tensor[None]):
            torch.testing.assert_close(classifier.logits(same), expected)
    torch.testing.assert_close(classifier.logits(tensor[0]), classifier.logits(image[..., 0]))
    paths = np.array([tmp_path / "ring.png"] * 2)
    torch.testing.assert_close(classifier.logits(paths), expected.repeat(2, 1), atol=1e-5, rtol=0)


def test_bad_images_are_skipped(classifier, tmp_path):
    (tmp_path / "empty.png").touch()
    good = [picture(name, 3) for name in NAMES]
    images = [good[0], tmp_path / "empty.png", good[1], b"", good[2]]
    rows = classifier.predict(iter(images), on_error="skip", batch_size=2)
    assert [row is None for row in rows] == [False, True, False, True, False]
    assert list(rows.errors) == [1, 3]
    assert "empty.png: cannot be read as an image" in rows.errors[1]
    expected = classifier.probabilities(good)
    np.testing.assert_allclose([rows[i][0].prob for i in (0, 2, 4)], expected.max(1), atol=1e-5)
    with pytest.warns(UserWarning, match=r"2 of 5 images were skipped: image 1: .*empty.png.*; image 3: these bytes"):
        features = classifier.embed(images, on_error="skip")
    assert np.isnan(features).all(1).tolist() == [False, True, False, True, False]
    np.testing.assert_allclose(features[[0, 2, 4]], classifier.embed(good), atol=1e-4)
    with pytest.raises(UserError, match=r"image 1: .*empty.png"):
        classifier.predict(images)


def test_a_generator_is_read_batch_by_batch(classifier, monkeypatch):
    read, computed = [], []
    images = (read.append(seed) or picture("disc", seed) for seed in range(7))
    batches = classifier._to_device
    monkeypatch.setattr(classifier, "_to_device", lambda batch: computed.append(len(read)) or batches(batch))
    assert len(classifier.predict(images, batch_size=3, progress=True)) == 7
    assert computed == [3, 6, 7]


def test_threads_and_copies_answer_alike(classifier, tmp_path):
    Image.fromarray(picture("ring", 3, 300)).save(tmp_path / "ring.png")
    with Image.open(tmp_path / "ring.png") as shared:  # Pillow reads it on first use
        images = [shared, *(picture(name, seed) for name in NAMES for seed in range(3))]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: (classifier.predict(images), classifier.explain(shared)), range(8)))
    copy = pickle.loads(pickle.dumps(classifier))  # noqa: S301
    for rows, heat in [*answers, (copy.predict(images), copy.explain(shared))]:
        assert rows == classifier.predict(images)
        np.testing.assert_array_equal(heat, classifier.explain(shared))
    assert pickle.loads(pickle.dumps(rows)).errors == {}  # noqa: S301


def test_arrays_of_every_dtype(classifier):
    image = picture("ring", 3)
    grey = image[..., :1]
    expected, expected_grey = classifier.logits(image), classifier.logits(grey[..., 0])
    deep = image.astype(np.uint16) * 257
    for same in (deep, deep.astype(">u2"), image / 255, (image / 255).astype(np.float32)):
        torch.testing.assert_close(classifier.logits(same), expected)
    torch.testing.assert_close(classifier.logits(grey), expected_grey)
    torch.testing.assert_close(
        classifier.logits(grey[..., 0] > 128), classifier.logits((grey[..., 0] > 128) * np.uint8(255))
    )


def test_bad_input_is_one_line(classifier, tmp_path):
    (tmp_path / "empty.png").touch()
    cases = [
        (tmp_path / "missing.png", "missing.png"),
        (tmp_path / "empty.png", r"empty\.png: cannot be read"),
        (tmp_path, "cannot be read.*rglob"),
        ([], "no images"),
        (np.full((8, 8, 3), 255.0), r"values from 255 to 255; expected 0 to 1"),
        (np.full((8, 8), np.nan), r"values from nan to nan; expected 0 to 1"),
        (np.zeros((8, 8, 3), np.int64), r"int64 \(8, 8, 3\); expected"),
        (np.zeros((8, 8, 2), np.uint8), r"uint8 \(8, 8, 2\)"),
        (np.zeros((0, 8, 3), np.uint8), r"uint8 \(0, 8, 3\)"),
        ([7], "a int is not an image"),
        (b"bytes", r"these bytes: cannot be read as an image \(text, not an image"),
        (io.StringIO("text"), r"this StringIO: .*open it in binary mode"),
        (np.zeros((3, 8, 8), np.uint8), r"uint8 \(3, 8, 8\); .*array.transpose\(1, 2, 0\)"),
        (torch.zeros(8, 8, 3), r"\(8, 8, 3\); .*tensor.permute\(2, 0, 1\)"),
        ("https://example.com/cat.jpg", "URLs are not opened: download it"),
        ({"image": Image.new("L", (8, 8))}, r"a dict is not an image; pass the images in it: row\['image'\]"),
        ([picture("disc", 1), None], "image 1: a NoneType is not an image; cv2.imread returns None"),
        (Image.new("I", (8, 8)), "32-bit"),
    ]
    for images, message in cases:
        with pytest.raises(UserError, match=message) as error:
            classifier.predict(images)
        assert "\n" not in str(error.value)
    for device in ("gpu", "cuda:64", "mps"):
        with pytest.raises(UserError, match=f"device is '{device}'"):
            rexnet_lit.Classifier(classifier.spec, classifier.network, device)
    with pytest.raises(UserError, match="on_error is 'ignore'; expected one of raise, skip"):
        classifier.predict(picture("disc", 1), on_error="ignore")
    for top_k in (0, 1.5):
        with pytest.raises(UserError, match=f"top_k is {top_k}; expected an integer"):
            classifier.predict(picture("disc", 1), top_k=top_k)
    with pytest.raises(UserError, match="no class 'rings'; did you mean 'ring'"):
        classifier.explain(picture("disc", 1), "rings")
    with pytest.raises(UserError, match="no class 3; it knows"):
        classifier.explain(picture("disc", 1), 3)


def test_load_refuses_other_files(tmp_path):
    for name, message in (
        ("nothing.ckpt", "there is no file"),
        ("https://example.com/model.ckpt", "local files only"),
        ("rexnet_99", "no ReXNet is named 'rexnet_99'"),
        ("rexnet_9.ckpt", "there is no file"),
    ):
        with pytest.raises(UserError, match=message):
            rexnet_lit.load(tmp_path / name if name == "nothing.ckpt" else name)


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2", "predictions.csv"])
def test_load_names_what_is_no_model(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x08\x08 a graph")
    with pytest.raises(UserError, match=rf"{name}: not a model of rexnet_lit; name a .ckpt or .safetensors file"):
        rexnet_lit.load(tmp_path / name)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's cache in an empty folder, and no network."""
    import socket
    import urllib.request

    from huggingface_hub import constants

    def unreachable(*args, **kwargs):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    return tmp_path / "hub"


def test_imagenet_weights_from_the_local_cache(hub):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    net = rexnet.build_network("rexnet_100", 1000)
    with torch.no_grad():
        net.head.fc.bias[281] = 9  # ImageNet's tabby
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = hub / "models--timm--rexnet_100.nav_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    (repository / "snapshots" / revision).mkdir(parents=True)
    save_file(net.state_dict(), repository / "snapshots" / revision / "model.safetensors")

    classifier = rexnet_lit.load("rexnet_100")
    assert len(classifier.class_names) == 1000
    assert classifier.class_names[:2] == ("tench, Tinca tinca", "goldfish, Carassius auratus")
    assert classifier.spec.eval_recipe.image_size == 224
    assert classifier.predict(picture("disc", 1), top_k=1)[0][0].label == "tabby, tabby cat"
    assert torch.equal(classifier.network.head.fc.weight.cpu(), net.head.fc.weight)


def test_imagenet_weights_that_are_not_available(hub):
    with pytest.raises(UserError, match="neither in the local cache nor available from the hub") as error:
        rexnet_lit.load("rexnet_100")
    assert "\n" not in str(error.value)
    assert not hub.exists() or not list(hub.rglob("*.safetensors"))

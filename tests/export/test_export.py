"""Exports: each format, read back by its own library, predicts as the model does."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from cli_tools import NAMES, fails, lively_model, picture, write_pictures
from image_tools import encode, photo
from PIL import Image

import rexnet_lit
from rexnet_lit.cli import main
from rexnet_lit.export import export, formats, onnx_files, torch_files
from rexnet_lit.models import checkpoint
from rexnet_lit.models.predictor import Classifier


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return lively_model(tmp_path_factory.mktemp("model") / "model.safetensors", size=32)


@pytest.fixture(scope="module")
def expected(model):
    """Images as the graphs take them, float32 (5, 3, S, S) from 0 to 1, and the model's probabilities (5, K)."""
    classifier = rexnet_lit.load(model, device="cpu")
    images = [picture(name, seed) for name in NAMES for seed in (21, 22)][:5]
    views = np.stack([classifier.view(image) for image in images]).transpose(0, 3, 1, 2)
    probs = classifier.probabilities(images)
    assert probs.std(0).min() > 0.02  # a wrong input would change the predictions
    return (views / 255).astype(np.float32), probs


def run(model, kind, output, capfd, *more):
    """Export through the command line; return its one line. Nothing else is left in the folder."""
    assert main.main(["export", str(model), "--format", kind, "--output", str(output), *more]) == 0
    out, err = capfd.readouterr()
    check_export(output, out, err)
    return out


def check_export(output, out, err):
    assert err == ""
    assert len(out.splitlines()) == 1
    assert f"{output}: " in out
    assert [f.name for f in output.parent.iterdir()] == [output.name]
    content = output.read_bytes()
    assert str(Path(formats.__file__).parents[1]).encode() not in content  # no path of this machine
    assert b"site-packages" not in content


def check_metadata(metadata):
    assert json.loads(metadata["class_names"]) == list(NAMES)
    recipe = json.loads(metadata["rexnet_lit"])["eval_recipe"]
    assert recipe["image_size"] == 32
    assert not {"mean", "std"} & recipe.keys()  # they are applied inside the graph: not twice
    assert "0 to 1" in metadata["input"]
    steps = json.loads(metadata["preprocessing"])
    assert (steps["resize"], steps["resize_side"], steps["crop"], steps["padding"]) == (36, "shorter", 32, None)
    assert "inside the graph" in steps["normalisation"]


@pytest.fixture(scope="module")
def onnx_file(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("onnx") / "model.onnx"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main.main(["export", str(model), "--format", "onnx", "--output", str(output)]) == 0
    check_export(output, out.getvalue(), err.getvalue())
    return output


def test_onnx(onnx_file, expected):
    import onnx
    import onnxruntime

    output = onnx_file
    onnx.checker.check_model(output, full_check=True)
    onnx.shape_inference.infer_shapes(onnx.load(output), strict_mode=True, data_prop=True)
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    assert entry.name == "images"
    assert isinstance(entry.shape[0], str)  # any batch
    assert entry.shape[1:] == [3, 32, 32]
    assert not {"Gather", "Shape"} & {node.op_type for node in onnx.load(output).graph.node}  # see export._stack
    images, probs = expected
    for count in (1, 5):
        (got,) = session.run(["probabilities"], {"images": images[:count]})
        np.testing.assert_allclose(got, probs[:count], atol=1e-4)
    check_metadata(session.get_modelmeta().custom_metadata_map)


GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"


def write_hard_images(folder):
    """One image of each rule of the decoder that the guide's script states."""
    turned = Image.Exif()
    turned[0x112] = 6
    (folder / "exif.jpg").write_bytes(encode(photo(121, 77, 1), "JPEG", exif=turned))
    turned[0x112] = 5
    (folder / "a quarter.jpg").write_bytes(encode(photo(301, 177, 2), "JPEG", exif=turned))
    glass = Image.fromarray(photo(49, 63, 3))
    glass.putalpha(Image.linear_gradient("L").resize(glass.size))
    glass.save(folder / "alpha.png")
    glass.quantize(31).save(folder / "palette.png")
    Image.fromarray(photo(33, 57, 4)).convert("L").save(folder / "grey.png")
    Image.fromarray(photo(20, 29, 5)).save(folder / "small.bmp")
    Image.fromarray(photo(29, 190, 6)).save(folder / "long.png")


def test_the_guides_script_predicts_as_the_model(model, onnx_file, tmp_path, monkeypatch, capsys):
    """With NumPy, Pillow and onnxruntime alone, in each crop mode: to 2 of 255 levels, or to 1e-4 in probabilities."""
    import onnx
    import onnxruntime

    code = re.findall(r"```python\n(.*?)```", GUIDE.read_text("utf-8"), re.S)
    (script,) = (text for text in code if "onnx" in text)
    (exact,) = (text for text in code if "def resized" in text)
    assert set(re.findall(r"^(?:import|from) (\w+)", script, re.M)) == {"json", "numpy", "onnxruntime", "PIL"}
    assert len([line for line in script.splitlines() if line]) < 30
    exact_script, count = re.subn(r"image\.resize\(sides, .*\)", "resized(image, sides)", script)
    assert count == 1
    monkeypatch.chdir(tmp_path)
    write_hard_images(tmp_path)
    files = [file.name for file in tmp_path.iterdir()]
    own, graph, open_session = rexnet_lit.load(model, device="cpu"), onnx.load(onnx_file), onnxruntime.InferenceSession
    for mode in ("center", "border", "squash"):
        spec = dataclasses.replace(own.spec, eval_recipe=own.spec.eval_recipe.with_crop_mode(mode))
        classifier = Classifier(spec, own.network, "cpu")
        onnx.helper.set_model_props(graph, export.metadata(classifier))
        onnx.save(graph, "model.onnx")
        session = open_session("model.onnx", providers=["CPUExecutionProvider"])
        monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, s=session, **__: s)  # one for all images
        probs = classifier.probabilities(files)
        assert probs.std(0).min() > 0.02
        for file, wanted in zip(files, probs, strict=True):
            found = {}
            exec(compile(script.replace("photo.jpg", file), str(GUIDE), "exec"), found)  # noqa: S102
            view = np.asarray(found["view"], int)
            np.testing.assert_allclose(view, classifier.view(file), atol=2, err_msg=f"{mode} {file}")
            top = classifier.class_names[found["probabilities"].argmax()]
            assert capsys.readouterr().out.startswith(f"{top}: {found['probabilities'].max():.1%}\n")
            if (mode, file) != ("center", "long.png"):
                exec(compile(exact + exact_script.replace("photo.jpg", file), str(GUIDE), "exec"), found)  # noqa: S102
                np.testing.assert_allclose(found["probabilities"], wanted, atol=1e-4, err_msg=f"{mode} {file}")
                capsys.readouterr()


@pytest.mark.usefixtures("quick_runs")
def test_openvino(tmp_path, capsys, no_network):
    openvino = pytest.importorskip("openvino")
    model = lively_model(tmp_path / "model.safetensors", size=32)
    command = ["export", str(model), "--format", "openvino", "--output"]
    assert main.main([*command, str(tmp_path / "made")]) == 0
    found, core = tmp_path / "made" / "model.xml", openvino.Core()
    assert sorted(file.name for file in found.parent.iterdir()) == ["model.bin", "model.xml"]
    size = sum(file.stat().st_size for file in found.parent.iterdir())
    assert f"{size / 1e6:.1f} MB; compared with the model on 4 images" in capsys.readouterr().out
    assert str(Path(formats.__file__).parents[1]) not in found.read_text()
    graph = core.read_model(found)
    run = core.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    classifier, pictures = rexnet_lit.load(model, device="cpu"), [picture(name, 21) for name in NAMES]
    views = np.stack([classifier.view(image) for image in pictures]).transpose(0, 3, 1, 2)
    probs = classifier.probabilities(pictures)
    assert probs.std(0).min() > 0.02
    for count in (1, 3):
        images = (views[:count] / 255).astype(np.float32)
        np.testing.assert_allclose(run(images)["probabilities"], probs[:count], atol=1e-4)
    check_metadata(
        {key: graph.get_rt_info(key).value for key in ("class_names", "rexnet_lit", "input", "preprocessing")}
    )
    assert no_network == []  # openvino has telemetry


def test_openvino_replaces_only_its_own_files(model, tmp_path, capsys):
    command = ["export", model, "--format", "openvino", "--output"]
    boxes = tmp_path / "boxes.xml"
    boxes.write_text("<annotation/>")
    assert "no earlier output" in fails(capsys, *command, boxes)
    (tmp_path / "model.bin").write_text("precious")
    for output in (tmp_path, tmp_path / "model.xml"):
        assert "model.bin' exists already" in fails(capsys, *command, output)
    assert "must end in .xml" in fails(capsys, *command, tmp_path / "model.onnx")


@pytest.mark.parametrize(("kind", "name"), [("onnx", "mine.onnx"), ("torch", "mine.pt2")])
def test_a_file_of_another_program_is_not_overwritten(model, onnx_file, tmp_path, capsys, kind, name):
    mine = tmp_path / name
    mine.write_bytes(b"someone else's graph")
    line = fails(capsys, "export", model, "--format", kind, "--output", mine)
    assert f"{name}' exists and is no earlier output of this command; name another" in line
    assert mine.read_bytes() == b"someone else's graph"
    shutil.copy(onnx_file, tmp_path / "again.onnx")
    assert main.main(["export", str(model), "--format", "onnx", "--output", str(tmp_path / "again.onnx")]) == 0


def test_openvino_is_an_extra(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    line = fails(capsys, "export", model, "--format", "openvino", "--output", tmp_path / "model.xml")
    assert line == "export: openvino is not installed; pip install 'rexnet-lit[openvino]'"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A flat folder of sixty images and one unreadable file."""
    folder = tmp_path_factory.mktemp("images")
    for name in NAMES:
        write_pictures(folder, name, 20)
    (folder / "broken.png").write_bytes(b"not an image")
    return folder


@pytest.fixture(scope="module")
def confident_model(model, images, tmp_path_factory):
    """The model with a head fitted to its classes: quantisation would change the predictions of a random one."""
    from sklearn.linear_model import LogisticRegression

    classifier = rexnet_lit.load(model, device="cpu")
    files = sorted(images.glob("* *.png"))
    features = classifier.embed(files)
    scale = features.std()
    solved = LogisticRegression().fit(features / scale, [NAMES.index(file.name.split()[0]) for file in files])
    state = classifier.network.state_dict()
    state["head.fc.weight"] = torch.from_numpy(np.float32(solved.coef_ / scale))
    state["head.fc.bias"] = torch.from_numpy(np.float32(solved.intercept_))
    path = tmp_path_factory.mktemp("confident") / "model.safetensors"
    checkpoint.save_model(path, classifier.spec, state)
    return path


def test_int8(confident_model, images, tmp_path, capfd, monkeypatch, no_network):
    """In both formats that have it; a graph with weights of 8 bits is wrong on a CPU without VNNI."""
    import onnxruntime

    openvino = pytest.importorskip("openvino")
    output = tmp_path / "made" / "model.onnx"
    output.parent.mkdir()
    line = run(confident_model, "onnx-int8", output, capfd, "--images", str(images))
    assert re.search(r"on 30 \w+", line)  # the other 30 set the ranges
    assert output.stat().st_size < 0.35 * confident_model.stat().st_size
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    check_metadata(session.get_modelmeta().custom_metadata_map)

    folder, core = tmp_path / "openvino", openvino.Core()
    monkeypatch.setattr(onnx_files, "write_int8", lambda *args: shutil.copy(output, args[-1]))  # not a second time
    command = ["export", str(confident_model), "--format", "openvino-int8", "--output", str(folder)]
    assert main.main([*command, "--images", str(images)]) == 0
    assert re.search(r"on 30 images: .*% get the same class", capfd.readouterr().out)
    assert (folder / "model.bin").stat().st_size < 0.35 * confident_model.stat().st_size
    graph = core.read_model(folder / "model.xml")
    assert json.loads(graph.get_rt_info("class_names").value) == list(NAMES)
    assert no_network == []

    classifier = rexnet_lit.load(confident_model, device="cpu")
    files = sorted(images.glob("* *.png"))
    views = (np.stack([classifier.view(file) for file in files]).transpose(0, 3, 1, 2) / 255).astype(np.float32)
    probs = classifier.probabilities(files)
    for got in (session.run(None, {"images": views})[0], core.compile_model(graph, "CPU")(views)["probabilities"]):
        assert (got.argmax(1) == probs.argmax(1)).mean() >= 0.9
        assert 1e-5 < abs(got - probs).mean() < 0.05  # integers


@pytest.mark.usefixtures("quick_runs")
def test_int8_needs_images_and_agreement(images, tmp_path, capsys, monkeypatch):
    model = lively_model(tmp_path / "model.safetensors", size=32)
    command = ["export", model, "--output", tmp_path / "model.onnx", "--format"]
    assert "dataset is unknown" in fails(capsys, *command, "onnx-int8")
    few = tmp_path / "few"
    write_pictures(few, NAMES[0], 1)
    assert "--images: there is no folder 'gone'" in fails(capsys, *command, "onnx-int8", "--images", "gone")
    assert "at least 20 images, " in fails(capsys, *command, "onnx-int8", "--images", few)
    assert "--images is for onnx-int8 and openvino-int8, not onnx" in fails(capsys, *command, "onnx", "--images", few)
    monkeypatch.setattr(export, "LEAST_AGREEMENT", 1.1)
    assert "not kept" in fails(capsys, *command, "onnx-int8", "--images", images)
    assert not (tmp_path / "model.onnx").exists()


def test_torch(model, expected, tmp_path, capfd):
    output = tmp_path / "made" / "model.pt2"
    output.parent.mkdir()
    run(model, "torch", output, capfd)
    metadata = dict.fromkeys(("class_names", "rexnet_lit", "input", "preprocessing"), "")
    graph = torch.export.load(output, extra_files=metadata).module()
    images, probs = expected
    for count in (1, 5):
        got = graph(torch.from_numpy(images[:count])).detach().numpy()
        np.testing.assert_allclose(got, probs[:count], atol=1e-4)
    check_metadata(metadata)


def test_safetensors(model, expected, tmp_path, capfd):
    from safetensors import safe_open

    output = tmp_path / "new" / "folder" / "model.safetensors"
    run(model, "safetensors", output, capfd)
    classifier = rexnet_lit.load(output, device="cpu")
    assert classifier.class_names == NAMES
    images, _ = expected
    views = list((images.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8))
    again = rexnet_lit.load(model, device="cpu").probabilities(views)
    np.testing.assert_allclose(classifier.probabilities(views), again, atol=1e-6)
    with safe_open(output, framework="pt") as content:
        assert set(content.metadata()) == {"format", "rexnet_lit", "rexnet_lit_sha256"}


def _run(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "model.safetensors"


def test_timm_loads_a_hub_folder(tmp_path, capsys, expected):
    import timm

    names = ("a|b", "`c`", "<b>d</b>")
    model = lively_model(_run(tmp_path), names=names, size=32, crop_mode="border")
    command = ["export", str(model), "--format", "hub", "--output"]
    assert main.main([*command, str(tmp_path / "hub")]) == 0
    assert "compared with the model" in capsys.readouterr().out
    assert sorted(f.name for f in (tmp_path / "hub").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    net = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    assert net.pretrained_cfg["label_names"] == list(names)
    recipe = timm.data.resolve_model_data_config(net)
    own = rexnet_lit.load(model, device="cpu")
    assert tuple(recipe["input_size"]) == (3, 32, 32)
    assert (tuple(recipe["mean"]), tuple(recipe["std"]), recipe["crop_pct"], recipe["interpolation"]) == (
        own.spec.eval_recipe.mean, own.spec.eval_recipe.std, own.spec.eval_recipe.crop_pct, "bicubic",
    )  # fmt: skip
    assert recipe["crop_mode"] == "border"
    images, probs = expected  # of a model with other names, and the same weights
    mean, std = (torch.tensor(recipe[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        got = net((torch.from_numpy(images) - mean) / std).softmax(1).numpy()
    np.testing.assert_allclose(got, probs, atol=1e-5)
    transform = timm.data.create_transform(**recipe)  # as in the card
    noise = np.random.default_rng(0).integers(0, 256, (150, 201, 3), np.uint8)
    photo = Image.fromarray(cv2.GaussianBlur(noise, (9, 9), 3))
    with torch.no_grad():
        got = net(transform(photo)[None]).softmax(1).numpy()
    # One pixel in two hundred differs by one level of 255, and this model is sensitive.
    np.testing.assert_allclose(own.probabilities([photo]), got, atol=0.02)
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "Not measured" in card
    assert "- `a/b`\n- `'c'`\n- `<b>d</b>`" in card

    line = fails(capsys, *command, tmp_path / "hub")
    assert "exists already; name a new folder" in line


def test_the_model_card_has_results_of_these_weights_only(tmp_path, capsys):
    from huggingface_hub import ModelCard

    model = lively_model(_run(tmp_path), size=32)
    per_class = {name: {"precision": 0.5, "recall": 1.0, "f1": 2 / 3, "support": 4} for name in NAMES}
    per_class[NAMES[1]] = {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    figures = {"top1": 0.75, "macro_f1": 0.7, "nll": 0.5, "ece": 0.1, "count": 12, "per_class": per_class}
    report = tmp_path / "run" / "report"
    report.mkdir()
    (report / "metrics.json").write_text(json.dumps(figures))

    def card(weights, name):
        (report / "weights.sha256").write_text(weights)
        assert main.main(["export", str(model), "--format", "hub", "--output", str(tmp_path / name)]) == 0
        capsys.readouterr()
        return ModelCard.load(tmp_path / name / "README.md")

    own = checkpoint.digest(checkpoint.load_model(model).state)
    found = card(own, "tested")
    (accuracy, f1) = found.data.eval_results
    assert (accuracy.metric_type, accuracy.metric_value, f1.metric_value) == ("accuracy", 0.75, 0.7)
    assert "| Top-1 accuracy | 75.0\u00a0% (46.8\u00a0% to 91.1\u00a0%, 95 % confidence interval) |" in found.text
    assert f"| `{NAMES[0]}` | 50.0\u00a0% | 100\u00a0% | 66.7\u00a0% | 4 |" in found.text
    assert f"| `{NAMES[1]}` | - | - | - | 0 |" in found.text  # no test images
    for number, other in enumerate(("another model's", "")):
        assert "Not measured" in card(other, f"other-{number}").text


def test_hub_needs_a_head_that_timm_has(tmp_path, capsys):
    from rexnet_lit.data.settings import EvalRecipe
    from rexnet_lit.models import rexnet
    from rexnet_lit.models.heads import HeadSpec
    from rexnet_lit.models.spec import ModelSpec

    spec = ModelSpec("rexnet_100", NAMES, HeadSpec("mlp"), EvalRecipe(image_size=32))
    model = tmp_path / "model.safetensors"
    checkpoint.save_model(model, spec, rexnet.build_network("rexnet_100", 3, spec.head).state_dict())
    line = fails(capsys, "export", model, "--format", "hub", "--output", tmp_path / "hub")
    assert "linear head, and this model's is mlp" in line
    assert not (tmp_path / "hub").exists()


@pytest.fixture
def fake(monkeypatch):
    """Replace a format by a quick one whose file returns given probabilities."""

    def add(check):
        def write(classifier, model, example, target):
            target.write_text("graph")
            return check

        monkeypatch.setattr(torch_files, "write_safetensors", write)

    return add


@pytest.mark.parametrize("wrong", [1 / 3, np.nan])
def test_a_file_that_disagrees_is_not_kept(model, tmp_path, capsys, fake, wrong):
    fake(lambda images: np.full((len(images), 3), wrong, np.float32))
    output = tmp_path / "made" / "model.safetensors"
    output.parent.mkdir()
    line = fails(capsys, "export", model, "--format", "safetensors", "--output", output)
    assert "not kept" in line
    assert list(output.parent.iterdir()) == []

    output.write_text("another model")
    line = fails(capsys, "export", model, "--format", "safetensors", "--output", output)
    assert "exists already; name a new file" in line
    assert output.read_text() == "another model"


def test_a_full_disk(model, tmp_path, capsys, fake):
    def full(images):
        raise OSError(28, "No space left on device")

    fake(full)
    line = fails(capsys, "export", model, "--format", "safetensors", "--output", tmp_path / "m.safetensors")
    assert "the disk is full" in line
    assert list(tmp_path.iterdir()) == []


def test_errors_are_one_line(model, tmp_path, capsys, monkeypatch):
    output = tmp_path / "model.onnx"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        line = fails(capsys, "export", model, "--format", "onnx", "--output", output)
        assert line == "export: onnxruntime is not installed; pip install 'rexnet-lit[onnx]'"
    assert not output.exists()
    assert "invalid choice" in fails(capsys, "export", model, "--format", "coreml", "--output", output)
    assert "there is no file" in fails(capsys, "export", "gone.ckpt", "--format", "onnx", "--output", output)
    assert "is a folder" in fails(capsys, "export", model, "--format", "onnx", "--output", tmp_path)
    other = tmp_path / "last.ckpt"
    other.write_text("precious")
    assert "is no .onnx file, so it is not" in fails(capsys, "export", model, "--format", "onnx", "--output", other)
    assert other.read_text() == "precious"
    assert "the model itself" in fails(capsys, "export", model, "--format", "onnx", "--output", model)
    assert "--output" in fails(capsys, "export", model, "--format", "torch", "--output", tmp_path / "model.pt")


def test_the_registry_is_light_and_complete(capsys):
    code = "import sys, rexnet_lit.export.formats; assert not {'torch', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
    for entry in formats.FORMATS.values():
        module, _, function = entry.writer.partition(":")
        assert callable(getattr(importlib.import_module(f"rexnet_lit.export.{module}"), function))
    with contextlib.suppress(SystemExit):
        main.main(["export", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"{name}: {entry.description}" in text for name, entry in formats.FORMATS.items())

"""Exports: each format, read back by its own library, answers as the model does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import NAMES, fails, lively_model, picture

import rexnet_lit
from rexnet_lit import cli, export


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
    assert probs.std(0).min() > 0.02  # a wrong input would change the answers
    return (views / 255).astype(np.float32), probs


def run(model, kind, output, capfd):
    """Export through the command line: one line on the screen, and nothing left beside the file."""
    assert cli.main(["export", str(model), "--format", kind, "--output", str(output)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert len(out.splitlines()) == 1
    assert f"{output}: " in out
    assert [f.name for f in output.parent.iterdir()] == [output.name]
    content = output.read_bytes()
    assert str(Path(export.__file__).parents[1]).encode() not in content  # no folder of whoever exported it
    assert b"site-packages" not in content


def check_metadata(metadata):
    assert json.loads(metadata["class_names"]) == list(NAMES)
    recipe = json.loads(metadata["rexnet_lit"])["eval_recipe"]
    assert recipe["image_size"] == 32
    assert "0 to 1" in metadata["input"]


def test_onnx(model, expected, tmp_path, capfd):
    import onnxruntime

    output = tmp_path / "made" / "model.onnx"
    output.parent.mkdir()
    run(model, "onnx", output, capfd)
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    assert entry.name == "images"
    assert isinstance(entry.shape[0], str)  # any batch
    assert entry.shape[1:] == [3, 32, 32]
    images, probs = expected
    for count in (1, 5):
        (got,) = session.run(["probabilities"], {"images": images[:count]})
        np.testing.assert_allclose(got, probs[:count], atol=1e-4)
    check_metadata(session.get_modelmeta().custom_metadata_map)


def test_torch(model, expected, tmp_path, capfd):
    output = tmp_path / "made" / "model.pt2"
    output.parent.mkdir()
    run(model, "torch", output, capfd)
    metadata = dict.fromkeys(("class_names", "rexnet_lit", "input"), "")
    graph = torch.export.load(output, extra_files=metadata).module()
    images, probs = expected
    for count in (1, 5):
        got = graph(torch.from_numpy(images[:count])).detach().numpy()
        np.testing.assert_allclose(got, probs[:count], atol=1e-4)
    check_metadata(metadata)


def test_safetensors(model, expected, tmp_path, capfd):
    from safetensors import safe_open

    output = tmp_path / "made" / "model.safetensors"
    output.parent.mkdir()
    run(model, "safetensors", output, capfd)
    classifier = rexnet_lit.load(output, device="cpu")
    assert classifier.class_names == NAMES
    images, _ = expected
    views = list((images.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8))
    again = rexnet_lit.load(model, device="cpu").probabilities(views)
    np.testing.assert_allclose(classifier.probabilities(views), again, atol=1e-6)
    with safe_open(output, framework="pt") as content:
        assert set(content.metadata()) == {"format", "rexnet_lit", "rexnet_lit_sha256"}


@pytest.fixture
def fake(monkeypatch):
    """A quick format whose file answers as it likes."""

    def add(answer):
        def write(classifier, example, target):
            target.write_text("graph")
            return answer

        monkeypatch.setitem(export.FORMATS, "safetensors", write)

    return add


@pytest.mark.parametrize("wrong", [1 / 3, np.nan])
def test_a_file_that_disagrees_is_not_kept(model, tmp_path, capsys, fake, wrong):
    fake(lambda images: np.full((len(images), 3), wrong, np.float32))
    output = tmp_path / "made" / "model.safetensors"
    output.parent.mkdir()
    line = fails(capsys, "export", model, "--format", "safetensors", "--output", output)
    assert "differ from the model's" in line
    assert list(output.parent.iterdir()) == []

    output.write_text("an earlier export")
    fails(capsys, "export", model, "--format", "safetensors", "--output", output)
    assert output.read_text() == "an earlier export"


def test_a_full_disk(model, tmp_path, capsys, fake):
    fake(lambda images: np.zeros((len(images), 3)))
    whole = export.FORMATS["safetensors"]

    def full(*args):
        whole(*args)
        raise OSError(28, "No space left on device")

    export.FORMATS["safetensors"] = full
    line = fails(capsys, "export", model, "--format", "safetensors", "--output", tmp_path / "m.safetensors")
    assert line == "the disk is full (No space left on device); make room, or write to another"
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_one_line(model, tmp_path, capsys, monkeypatch):
    output = tmp_path / "model.onnx"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        line = fails(capsys, "export", model, "--format", "onnx", "--output", output)
        assert line == "export: onnxruntime is not installed; pip install 'rexnet-lit[onnx]'"
    assert not output.exists()
    line = fails(capsys, "export", model, "--format", "onnx", "--output", tmp_path / "none" / "model.onnx")
    assert "there is no folder" in line
    assert "invalid choice" in fails(capsys, "export", model, "--format", "coreml", "--output", output)
    assert "there is no file" in fails(capsys, "export", "gone.ckpt", "--format", "onnx", "--output", output)
    assert "is a folder" in fails(capsys, "export", model, "--format", "onnx", "--output", tmp_path)
    other = tmp_path / "last.ckpt"
    other.write_text("precious")
    assert "is no .onnx file, so it is not" in fails(capsys, "export", model, "--format", "onnx", "--output", other)
    assert other.read_text() == "precious"
    assert "the model itself" in fails(capsys, "export", model, "--format", "onnx", "--output", model)

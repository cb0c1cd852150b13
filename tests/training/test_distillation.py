"""Learning from a teacher (model.teacher), also of images without labels (data.unlabelled)."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from cli_tools import fails, lively_model, rows_of
from module_tools import NAMES, data_of, equal, model_of, state_of, trainer_of
from torch import nn

import rexnet_lit
from rexnet_lit.data.sampler import training_order
from rexnet_lit.data.settings import EvalRecipe
from rexnet_lit.models import checkpoint
from rexnet_lit.models.spec import ModelSpec
from rexnet_lit.training.distillation import Teacher, TeacherSettings
from rexnet_lit.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_runs")

RECIPE = {"augment": {"mixup": 0.4, "cutmix": 1.0}, "cache": "none"}
"""Both kinds of mixing, and images that are read by the workers."""


@pytest.fixture
def teacher(tmp_path):
    """The file of a fine-tuned model, whose classes are in another order."""
    return lively_model(tmp_path / "teacher.safetensors", names=NAMES[::-1], size=32)


@pytest.fixture
def others(tmp_path, make_shapes):
    """A folder of 12 images without labels, one of which cannot be read."""
    folder = make_shapes(tmp_path / "others", train=4, val=0, test=0, flat=True)
    (folder / NAMES[0] / "train_000.jpg").write_bytes(b"no image")
    return str(folder)


def fit(folder, shapes, path, others=None, **settings):
    """Train with a constant learning rate, so that a run's length does not change its steps."""
    data = data_of(shapes, **{"max_bad_fraction": 0.1, "unlabelled": others, **settings.pop("data", {})})
    schedule = {"name": "constant", "warmup_epochs": 0}
    module = model_of(teacher=path, schedule=schedule, **settings.pop("model", {}))
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = trainer_of(folder, enable_checkpointing=True, logger=True, **settings)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module, trainer


def test_the_loss_by_hand(teacher, monkeypatch):
    """Of three images the third has no label; temperature 2, weight 0.25."""
    found = Teacher(TeacherSettings(str(teacher), 2.0, 0.25))
    theirs = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0], [1.0, 1.0, 4.0]])
    monkeypatch.setattr(found, "logits", lambda images: theirs)
    logits = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 2.0], [0.5, 0.0, 1.0]], requires_grad=True)

    def log_softmax(values):
        return values - np.log(np.exp(values).sum(1, keepdims=True))

    soft, logs = log_softmax(theirs.numpy() / 2), log_softmax(logits.detach().numpy() / 2)
    divergence = 4 * (np.exp(soft) * (soft - logs)).sum(1)
    cross_entropy = -log_softmax(logits.detach().numpy())[[0, 1], [0, 2]]
    expected = (0.25 * divergence[:2].sum() + 0.75 * cross_entropy.sum() + divergence[2]) / 3

    loss_of = found.loss_of(nn.CrossEntropyLoss(), torch.zeros(3, 3, 32, 32))
    assert loss_of(logits, torch.tensor([0, 2, -1])).item() == pytest.approx(expected, rel=1e-6)
    mixed = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [-1.0, -1.0, -1.0]])  # as after MixUp
    assert loss_of(logits, mixed).item() == pytest.approx(expected, rel=1e-6)
    assert loss_of(logits, torch.tensor([-1, -1, -1])).item() == pytest.approx(divergence.mean(), rel=1e-6)


def test_a_teacher_with_classes_in_another_order_and_another_preprocessing(teacher):
    classifier = rexnet_lit.load(teacher, "cpu")
    recipe = EvalRecipe(32, mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7))
    found = Teacher(TeacherSettings(str(teacher)))
    found.prepare(ModelSpec("rexnet_100", NAMES, eval_recipe=recipe))
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def normalised(values, of):
        return (values - torch.tensor(of.mean).view(3, 1, 1)) / torch.tensor(of.std).view(3, 1, 1)

    with torch.no_grad():
        expected = classifier.network(normalised(image, classifier.spec.eval_recipe))
    torch.testing.assert_close(found.logits(normalised(image, recipe)), expected.flip(1), rtol=1e-4, atol=1e-4)


def test_a_fit_with_images_without_labels(tmp_path, shapes, teacher, others):
    """The same weights from two workers; no checkpoint, optimiser or count of parameters contains the teacher."""
    module, trainer = fit(tmp_path / "a", shapes, str(teacher), others, data=RECIPE, max_epochs=1)
    workers = {**RECIPE, "num_workers": 2}
    again, _ = fit(tmp_path / "b", shapes, str(teacher), others, data=workers, max_epochs=1)
    assert equal(state_of(module), state_of(again))
    alone, _ = fit(tmp_path / "c", shapes, str(teacher), data=RECIPE, max_epochs=1)
    assert not equal(state_of(module), state_of(alone))

    assert trainer.num_training_batches == 5  # 24 + 11 images in batches of 8
    saved = checkpoint.read_ckpt(trainer.checkpoint_callback.last_model_path)
    assert saved["state_dict"].keys() == module.state_dict().keys() == model_of().state_dict().keys()
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in model_of().parameters())
    (folder,) = (tmp_path / "a" / "lightning_logs").iterdir()
    assert [row["path"] for row in rows_of(folder / "quarantine.csv")] == [f"{others}/{NAMES[0]}/train_000.jpg"]
    batch = next(iter(trainer.train_dataloader))
    labelled = batch[2] < 24
    assert labelled.sum() in (5, 6)
    assert bool((batch[1][~labelled] == -1).all())
    torch.testing.assert_close(batch[1][labelled].sum(1), torch.ones(int(labelled.sum())))


def test_a_resumed_run_needs_the_same_teacher_and_images(tmp_path, shapes, teacher, others):
    whole, _ = fit(tmp_path / "whole", shapes, str(teacher), others, model={"ema": 0.5})
    _, trainer = fit(tmp_path / "run", shapes, str(teacher), others, model={"ema": 0.5}, max_epochs=1)
    last = {"ckpt_path": trainer.checkpoint_callback.last_model_path, "model": {"ema": 0.5}}
    resumed, _ = fit(tmp_path / "run", shapes, str(teacher), others, **last)
    assert equal(state_of(whole), state_of(resumed))

    source = checkpoint.load_model(teacher)
    other = tmp_path / "other.safetensors"
    checkpoint.save_model(
        other, source.spec, {k: v * 1.01 if k == "head.fc.weight" else v for k, v in source.state.items()}
    )
    for path, images, expected in (
        (str(other), others, "model.teacher"),
        ({"path": str(teacher), "weight": 0.9}, others, r"weight 0.5 then, .* weight 0.9 now"),
        (None, None, r"model.teacher.*data.unlabelled"),
        (str(teacher), None, r"data.unlabelled \(12, fingerprint .* then, None now\)"),
    ):
        with pytest.raises(UserError, match=expected):
            fit(tmp_path / "run", shapes, path, images, **last)


def test_errors(tmp_path, shapes, teacher, others, capsys):
    command = ("fit", "--data.root", shapes, "--model.pretrained", "false", "--data.image_size", 32)
    assert "model.teacher: there is no file 'no.ckpt'" in fails(capsys, *command, "--model.teacher", "no.ckpt")
    spec = checkpoint.load_model(teacher).spec
    strange = tmp_path / "strange.safetensors"
    state = checkpoint.load_model(teacher).state
    checkpoint.save_model(strange, dataclasses.replace(spec, class_names=("circle", "cross", "dog")), state)
    line = fails(capsys, *command, "--model.teacher", strange)
    assert "unknown to it: 'square'; not in the data: 'dog'" in line
    line = fails(capsys, *command, "--model.teacher.path", teacher, "--model.strategy", "linear_probe")
    assert "model.strategy" in line
    assert "--model.teacher MODEL" in fails(capsys, *command, "--data.unlabelled", others)
    line = fails(capsys, *command, "--data.unlabelled", others, "--model.teacher", teacher)
    assert "1 of the 12 images of data.unlabelled cannot be read" in line
    with pytest.raises(UserError, match=r"teacher\.weight"):
        model_of(teacher={"path": str(teacher), "weight": 0})


def test_copies_of_validation_images_are_counted(tmp_path, shapes, teacher, capsys):
    shutil.copytree(shapes / "val" / NAMES[0], tmp_path / "copies")
    shutil.copytree(shapes / "train" / NAMES[0], tmp_path / "copies" / "train")
    fit(tmp_path, shapes, str(teacher), str(tmp_path / "copies"), max_epochs=1)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]
    assert warnings == ["warning: 4 images of data.unlabelled are also in val or test: the scores may be too good"]


@pytest.mark.parametrize("sampler", ["shuffle", "balanced"])
def test_images_without_labels_are_spread_evenly(sampler):
    targets = np.repeat([0, 1], [8, 2])
    order = training_order(targets, sampler, 0, 3, unlabelled=40)
    labelled = order[order < 10]
    np.testing.assert_array_equal(labelled, training_order(targets, sampler, 0, 3))
    np.testing.assert_array_equal(np.sort(order[order >= 10]), np.arange(10, 50))
    assert [int((part < 10).sum()) for part in np.split(order, 10)] == [1] * 10
    np.testing.assert_array_equal(order, training_order(targets, sampler, 0, 3, unlabelled=40))
    assert not np.array_equal(order, training_order(targets, sampler, 0, 4, unlabelled=40))

"""A researcher's own parts: loss, metric, optimiser, schedule, network and loaders."""

from __future__ import annotations

import json
from functools import partial

import lightning.pytorch as pl
import numpy as np
import pytest
import timm
import torch
from module_tools import NAMES, data_of, model_of, state_of, trainer_of
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAUROC
from torchvision.datasets import ImageFolder

import rexnet_lit
from rexnet_lit import RexNetModule, UserError
from rexnet_lit.models import checkpoint
from rexnet_lit.training.losses import own_loss

pytestmark = pytest.mark.usefixtures("quick_runs")


class PlainLoss(torch.nn.Module):
    """Cross-entropy with a temperature that is learned."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))
        self.calls = 0

    def forward(self, logits, targets):
        self.calls += 1
        return torch.nn.functional.cross_entropy(logits * self.scale, targets)


class OwnLoss(RexNetModule):
    def configure_loss(self):
        return PlainLoss(2.0)


def fit(module, folder, root, epochs=1, **settings):
    trainer = trainer_of(folder, max_epochs=epochs, enable_checkpointing=True, **settings)
    trainer.fit(module, data_of(root))
    return trainer


def attribute():
    module = model_of()
    module.loss = PlainLoss(2.0)
    return module


PATH = f"{__name__}.PlainLoss"


@pytest.mark.parametrize(
    "build",
    [
        attribute,
        lambda: model_of(loss=PlainLoss(2.0)),
        lambda: model_of(loss=partial(PlainLoss, 2.0)),
        lambda: model_of(OwnLoss),
    ],
    ids=["attribute", "module", "function", "override"],
)
def test_an_own_loss_trains(build, shapes, tmp_path):
    module = build()
    trainer = fit(module, tmp_path, shapes)
    assert isinstance(module.loss, PlainLoss)
    assert module.loss.calls == 3
    assert float(module.loss.scale.detach()) != 2.0  # its parameter is trained
    assert rexnet_lit.load(trainer.checkpoint_callback.best_model_path).class_names == NAMES


def test_an_own_loss_as_a_module_a_function_or_what_makes_a_module():
    cross_entropy, kind = torch.nn.functional.cross_entropy, torch.nn.CrossEntropyLoss
    logits, targets = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([0])
    for own in (
        cross_entropy,
        partial(cross_entropy, weight=None),
        lambda x, y: cross_entropy(x, y),
        kind,
        lambda: kind(),
    ):
        assert own_loss(own)(logits, targets) == cross_entropy(logits, targets)
    with pytest.raises(UserError, match=r"model.loss: .* returns a builtins.int; expected a torch.nn.Module"):
        own_loss(lambda: 5)


def test_an_own_loss_by_its_class_path(shapes, tmp_path):
    loss = {"class_path": "torch.nn.CrossEntropyLoss", "init_args": {"label_smoothing": 0.1}}
    own, ours = model_of(loss=loss), model_of(loss="cross_entropy")
    fit(own, tmp_path / "own", shapes)
    fit(ours, tmp_path / "ours", shapes)
    assert isinstance(own.loss, torch.nn.CrossEntropyLoss)
    for name, tensor in state_of(ours).items():  # the same function
        torch.testing.assert_close(state_of(own)[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("loss", "key"),
    [
        ({"class_path": "torch.nn.CrossEntropyLos"}, "model.loss.class_path"),
        ({"class_path": "no_module.Loss"}, "model.loss.class_path"),
        ({"class_path": "Loss"}, "model.loss.class_path"),
        ({"nam": "focal"}, "model.loss.nam"),
        (3, "model.loss is 3"),
    ],
)
def test_wrong_losses(loss, key):
    with pytest.raises(UserError, match=key):
        model_of(loss=loss)


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.RMSprop,
        partial(torch.optim.SGD, lr=0.01, momentum=0.5),
        {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01, "momentum": 0.5}},
    ],
    ids=["class", "function", "class_path"],
)
def test_an_own_optimizer(optimizer, shapes, tmp_path):
    module = model_of(optimizer=optimizer, schedule="constant")
    module.schedule_settings  # noqa: B018
    before = state_of(module)
    trainer = fit(module, tmp_path, shapes)
    (used,) = trainer.optimizers
    assert type(used) in (torch.optim.RMSprop, torch.optim.SGD)
    assert used.defaults["lr"] == 0.01  # RMSprop's default as well
    assert not torch.equal(before["stem.conv.weight"], state_of(module)["stem.conv.weight"])


def test_an_own_optimizer_that_refuses_its_arguments(shapes, tmp_path):
    module = model_of(optimizer={"class_path": "torch.optim.SGD", "init_args": {"learning_rate": 1}})
    with pytest.raises(UserError, match=r"model\.optimizer: torch\.optim\.sgd\.SGD"):
        fit(module, tmp_path, shapes)


@pytest.mark.parametrize(
    "schedule",
    [
        partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.1),
        {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1, "gamma": 0.1}},
    ],
    ids=["function", "class_path"],
)
def test_an_own_schedule_is_stepped_each_epoch(schedule, shapes, tmp_path):
    rates = []

    class Note(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit(model_of(optimizer={"lr": 0.01}, schedule=schedule), tmp_path, shapes, epochs=3, callbacks=[Note()])
    assert rates == pytest.approx([0.01, 0.001, 0.0001])


AUROC = {"class_path": "torchmetrics.AUROC", "init_args": {"task": "multiclass", "num_classes": 3}}


class OwnMetrics(RexNetModule):
    def configure_metrics(self):
        return {"auroc": MulticlassAUROC(self.spec.num_classes)}


@pytest.mark.parametrize(
    "build",
    [
        lambda: model_of(metrics={"auroc": MulticlassAUROC(3)}),
        lambda: model_of(
            metrics={
                "auroc": {"class_path": "torchmetrics.AUROC", "init_args": {"task": "multiclass", "num_classes": 3}}
            }
        ),
        lambda: model_of(OwnMetrics),
    ],
    ids=["metric", "class_path", "override"],
)
def test_own_metrics_are_logged_and_recorded(build, shapes, tmp_path):
    module = build()
    trainer = fit(module, tmp_path, shapes)
    assert 0 <= float(trainer.callback_metrics["val/auroc"]) <= 1
    (result,) = tmp_path.rglob("result.json")
    assert json.loads(result.read_text())["metrics"]["val/auroc"] == float(trainer.callback_metrics["val/auroc"])
    (found,) = trainer.test(module, data_of(shapes), verbose=False)
    assert "test/auroc" in found


def test_a_metric_that_exists_or_is_none():
    with pytest.raises(UserError, match=r"model\.metrics: .*'top1'"):
        model_of(metrics={"top1": MulticlassAUROC(3)})
    with pytest.raises(UserError, match=r"model\.metrics\.mine"):
        model_of(metrics={"mine": 3})


def test_an_own_plateau_is_stepped_when_there_is_a_validation_loss(shapes, tmp_path):
    sgd = partial(torch.optim.SGD, lr=0.1)
    module = model_of(optimizer=sgd, schedule=torch.optim.lr_scheduler.ReduceLROnPlateau)
    trainer = trainer_of(tmp_path, max_epochs=4, check_val_every_n_epoch=2)
    trainer.fit(module, data_of(shapes))
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 2
    with pytest.raises(UserError, match=r"ReduceLROnPlateau needs the validation loss; nothing is validated"):
        trainer_of(tmp_path, limit_val_batches=0).fit(model_of(schedule=module._own["schedule"]), data_of(shapes))


# --- networks -------------------------------------------------------------------------------------


def other():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3)


class OwnNetwork(RexNetModule):
    def configure_network(self):
        return other()


@pytest.mark.parametrize(
    "build",
    [
        lambda: model_of(network=other()),
        lambda: model_of(network={"class_path": f"{__name__}.other"}),
        lambda: model_of(OwnNetwork),
    ],
    ids=["module", "class_path", "override"],
)
def test_an_own_network_trains_and_is_loaded_into_one(build, shapes, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, __name__, __import__("sys").modules.get(__name__, _here()))
    module = build()
    trainer = fit(module, tmp_path, shapes)
    best = trainer.checkpoint_callback.best_model_path
    with pytest.raises(UserError, match=r"timm\.models\.resnet\.ResNet.*network="):
        rexnet_lit.load(best)
    classifier = rexnet_lit.load(best, network=other())
    paths = data_of(shapes).splits()["val"]
    images = [paths.path(i) for i in range(len(paths))]
    again = RexNetModule.load_from_checkpoint(best, network=other()).eval()
    batch = torch.stack([again.eval_transform(rexnet_lit.data.decode.read(image, 32)) for image in images])
    with torch.no_grad():
        np.testing.assert_allclose(classifier.logits(images), again(batch), atol=1e-5)


def _here():
    import types

    module = types.ModuleType(__name__)
    module.other = other
    module.PlainLoss = PlainLoss
    return module


@pytest.mark.parametrize(
    "settings", [{"strategy": {"blend": True}}, {"strategy": "staged"}, {"calibrate": True}], ids=str
)
def test_what_needs_a_rexnet_says_so(settings, shapes, tmp_path):
    (key,) = settings
    with pytest.raises(UserError, match=rf"model\.{key}.*ReXNet"):
        fit(model_of(network=other(), **settings), tmp_path, shapes)


def test_a_rexnet_with_a_layer_replaced_is_an_own_network(shapes, tmp_path):
    def changed():
        module = model_of()
        module.network.head.fc = torch.nn.Sequential(
            torch.nn.Linear(module.network.head_hidden_size, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
        )
        return module

    trainer = fit(changed(), tmp_path, shapes)
    best = trainer.checkpoint_callback.best_model_path
    with pytest.raises(UserError, match=r"its network is your own \(timm\.models\.rexnet\.RexNet\); .* network="):
        RexNetModule.load_from_checkpoint(best)
    again = RexNetModule.load_from_checkpoint(best, network=changed().network)
    assert len(again.network.head.fc) == 3
    module = changed()
    module.calibrate = True
    with pytest.raises(UserError, match=r"model\.calibrate: this needs the unchanged layers"):
        fit(module, tmp_path, shapes)


def test_a_network_with_other_logits_than_classes(shapes, tmp_path):
    with pytest.raises(UserError, match=r"model\.network has 5 logits for 3 classes"):
        model_of(network=timm.create_model("test_resnet", num_classes=5))
    module = model_of()
    module.network.head.fc = torch.nn.Linear(module.network.head_hidden_size, 4)
    with pytest.raises(UserError, match=r"model\.network has 4 logits for 3 classes"):
        fit(module, tmp_path, shapes)


class Forgetful(RexNetModule):
    def validation_step(self, batch, batch_idx):
        return None


def test_a_validation_step_that_counts_nothing(shapes, tmp_path):
    with pytest.raises(UserError, match=r"no predictions were counted: validation_step must call super"):
        fit(model_of(Forgetful), tmp_path, shapes)


def test_a_network_without_timms_interface():
    with pytest.raises(UserError, match=r"model\.network: torch\.nn.*forward_features"):
        model_of(network=torch.nn.Linear(3, 3))


# --- own loaders ----------------------------------------------------------------------------------


def test_own_loaders(shapes, tmp_path, capsys):
    """The transform is public; the model records that its preprocessing is assumed, and predicts what was trained."""
    module = model_of(image_size=32, schedule="constant")
    train = ImageFolder(shapes / "train", module.eval_transform)
    val = ImageFolder(shapes / "val", module.eval_transform)
    trainer = trainer_of(tmp_path, max_epochs=3, enable_checkpointing=True)
    trainer.fit(module, DataLoader(train, 8, shuffle=True), DataLoader(val, 8))
    assert capsys.readouterr().out.count("own loaders") == 1
    best = trainer.checkpoint_callback.best_model_path
    assert checkpoint.load_model(best).spec.assumed_preprocessing
    with pytest.warns(UserWarning, match="loaders of your own"):
        classifier = rexnet_lit.load(best)
    right = [classifier.class_names.index(p[0].label) if not p[0].label.isdigit() else int(p[0].label) for p in
             classifier.predict([path for path, _ in val.samples], top_k=1)]  # fmt: skip
    top1 = np.mean(np.array(right) == np.array(val.targets))
    assert top1 == pytest.approx(trainer.checkpoint_callback.shipped.metrics["val/top1"])


def test_training_transforms_for_own_loaders_differ_and_follow_torchs_seed(shapes):
    transform = rexnet_lit.TrainTransform(rexnet_lit.AugmentSettings("medium"), rexnet_lit.EvalRecipe(32), 32)
    train = ImageFolder(shapes / "train", transform)
    torch.manual_seed(0)
    first, second = train[0][0], train[0][0]
    torch.manual_seed(0)
    assert torch.equal(first, train[0][0])
    assert not torch.equal(first, second)
    assert first.shape == (3, 32, 32)


# --- a trainer that is used again -----------------------------------------------------------------


def test_a_second_module_is_trained_and_shipped(shapes, tmp_path):
    first, second = model_of(ema=0.9), model_of(optimizer={"lr": 0.01})
    trainer = fit(first, tmp_path, shapes)
    kept = trainer.checkpoint_callback.best_model_path
    before = state_of(second)
    trainer.fit(second, data_of(shapes))
    assert not torch.equal(before["stem.conv.weight"], state_of(second)["stem.conv.weight"])
    best = trainer.checkpoint_callback.best_model_path
    assert best != kept
    shipped = checkpoint.load_model(best).state
    assert all(torch.equal(tensor, shipped[name]) for name, tensor in state_of(second).items())
    alone = model_of(optimizer={"lr": 0.01})
    fit(alone, tmp_path / "alone", shapes)
    assert all(torch.equal(tensor, state_of(alone)[name]) for name, tensor in state_of(second).items())


def test_a_trainer_that_has_nothing_left_to_train_says_so(shapes, tmp_path):
    module = model_of(schedule="constant")
    trainer = fit(module, tmp_path, shapes)
    with pytest.raises(UserError, match=r"max_epochs"):
        trainer.fit(module, data_of(shapes))
    trainer = fit(module, tmp_path / "again", shapes)
    before = state_of(module)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data_of(shapes))
    assert trainer.current_epoch == 2
    assert not torch.equal(before["stem.conv.weight"], state_of(module)["stem.conv.weight"])
    last = checkpoint.load_model(trainer.checkpoint_callback.last_model_path).state
    assert all(torch.equal(tensor, last[name]) for name, tensor in state_of(module).items())

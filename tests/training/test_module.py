"""The LightningModule in a notebook's manner: Trainer.fit without the command line."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, WeightAveraging
from module_tools import NAMES, data_of, equal, make_runs_quick, model_of, state_of, trainer_of
from sklearn.metrics import f1_score, log_loss

from rexnet_lit.data.augmentation import AugmentSettings
from rexnet_lit.data.datamodule import ImageFolderDataModule
from rexnet_lit.data.settings import EvalRecipe
from rexnet_lit.models import checkpoint, rexnet, variants, weights
from rexnet_lit.models.heads import HeadSpec
from rexnet_lit.models.rexnet import build_network
from rexnet_lit.models.spec import ModelSpec
from rexnet_lit.training import parts
from rexnet_lit.training.callbacks.checkpoint import RunCheckpoint
from rexnet_lit.training.callbacks.run_files import find_run_folder
from rexnet_lit.training.freezing import StrategySettings
from rexnet_lit.training.module import RexNetModule
from rexnet_lit.training.optim import OptimizerSettings, build_optimizer
from rexnet_lit.training.schedules import ScheduleSettings, lr_factor
from rexnet_lit.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_runs")


class Diary(RexNetModule):
    """Writes down the state of the random numbers that each training step meets."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if not hasattr(self, "seeds"):
            self.seeds, self.losses = {}, []
        self.seeds[self.current_epoch, batch_idx] = torch.initial_seed()
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss


# --- learning -------------------------------------------------------------------------------------


def test_five_epochs_learn(tmp_path, make_shapes, whole_network):
    """As in a notebook: a data module, a module made for it, Lightning's own trainer; then the file in Python."""
    import rexnet_lit

    data = data_of(make_shapes(tmp_path / "data", train=40, val=8, test=8), augment=AugmentSettings("none"))
    torch.manual_seed(0)
    module = rexnet_lit.RexNetModule(
        pretrained=False,
        num_classes=data.num_classes,
        image_size=32,
        optimizer={"name": "adamw", "lr": 3e-3},  # type: ignore[arg-type]
        schedule="cosine",  # type: ignore[arg-type]
    )
    assert module.spec.class_names == ("0", "1", "2")
    trainer = trainer_of(tmp_path, max_epochs=5, enable_checkpointing=True, callbacks=[RunCheckpoint()])
    trainer.fit(module, data)
    assert module.spec.class_names == NAMES  # taken from the data
    assert trainer.callback_metrics["val/top1"].item() >= 0.8
    assert trainer.callback_metrics["train/loss"].item() < 1.0  # it began at ln 3
    (found,) = trainer.test(module, data, verbose=False)
    assert found["test/top1"] >= 0.8

    classifier = rexnet_lit.load(trainer.checkpoint_callback.best_model_path, device="cpu")
    assert classifier.class_names == NAMES
    samples = data.splits()["test"]
    best = [row[0].label for row in classifier.predict([samples.path(i) for i in range(len(samples))])]
    share = np.mean([NAMES[t] == label for t, label in zip(samples.targets, best, strict=True)])
    assert share >= 0.8
    assert Path(trainer.checkpoint_callback.best_model_path).name == "best.ckpt"


@pytest.fixture(scope="module")
def reference(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Diary:
    """A run of two epochs with all that draws random numbers: augmentation, dropout, drop path."""
    with pytest.MonkeyPatch.context() as patch:
        make_runs_quick(patch)
        return diary(shapes, tmp_path_factory.mktemp("reference"))


def diary(shapes: Path, folder: Path, seed: int | None = None, **data: Any) -> Diary:
    if seed is not None:
        pl.seed_everything(seed, verbose=False)
    module = model_of(Diary, head=HeadSpec(dropout=0.5), drop_path_rate=0.2)
    trainer_of(folder).fit(module, data_of(shapes, augment=AugmentSettings("medium"), **data))
    return module  # type: ignore[return-value]


def test_workers_do_not_change_what_is_learnt(reference, shapes, tmp_path):
    torch.rand(17)  # the global streams are elsewhere now
    again = diary(shapes, tmp_path, num_workers=2)
    assert again.losses == reference.losses
    assert equal(state_of(again), state_of(reference))


def test_a_long_training_is_told_from_a_short_one(shapes, tmp_path):
    """By the pixels that it sees: 24 images of 32 px an epoch are half an image of 224 px."""
    module = model_of()
    trainer = trainer_of(tmp_path, max_epochs=1)
    trainer.fit(module, data_of(shapes))
    for epochs, long in ((1, False), (204_000, False), (204_300, True)):
        trainer.fit_loop.max_epochs = epochs
        assert parts.trains_long(module) == long
    trainer.limit_train_batches = 1  # of three
    assert not parts.trains_long(module)


def test_images_follow_the_weights_layout():
    images = torch.randn(2, 3, 32, 32)
    for ours, theirs in itertools.product((torch.contiguous_format, torch.channels_last), repeat=2):
        net = build_network("rexnet_100", 3).to(memory_format=ours)
        laid = rexnet.match_memory_format(images.contiguous(memory_format=theirs), net)
        assert laid.is_contiguous(memory_format=ours)
        assert torch.equal(laid, images)


def test_dropout_draws_from_seed_epoch_and_batch(reference, shapes, tmp_path):
    assert reference.seeds.keys() == {(epoch, batch) for epoch in (0, 1) for batch in (0, 1, 2)}
    assert len(set(reference.seeds.values())) == 6
    other = diary(shapes, tmp_path, seed=5)
    assert not set(other.seeds.values()) & set(reference.seeds.values())
    assert other.losses != reference.losses


def test_dropout_and_drop_path_are_drawn_anew(reference, shapes):
    """With the step's seed the network gives one answer, with another step's another."""
    images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    module = model_of(head=HeadSpec(dropout=0.5), drop_path_rate=0.2).train()
    answers = []
    for batch in (0, 1, 0):
        module.network.load_state_dict(reference.network.state_dict())
        module.on_train_batch_start(None, batch)
        with torch.no_grad():
            answers.append(module(images))
    assert torch.equal(answers[0], answers[2])
    assert not torch.equal(answers[0], answers[1])


# --- the moving average ---------------------------------------------------------------------------


class Follow(pl.Callback):
    """Averages the weights by itself: Polyak's average with the decay min(ema, (1 + n) / (10 + n))."""

    def __init__(self, ema: float) -> None:
        self.ema, self.steps, self.mean = ema, 0, {}

    def on_train_batch_end(self, trainer, pl_module, *_: Any) -> None:
        for name, tensor in pl_module.network.state_dict().items():
            tensor = tensor.double() if tensor.is_floating_point() else tensor.clone()
            if self.steps == 0 or not tensor.is_floating_point():
                self.mean[name] = tensor
            else:
                decay = min(self.ema, (1 + self.steps) / (10 + self.steps))
                self.mean[name] = decay * self.mean[name] + (1 - decay) * tensor
        self.steps += 1


def test_the_averaged_weights_are_validated_and_kept(tmp_path, shapes):
    ema = 0.3  # so low that both branches of the decay are met: 2/11, 3/12, then 0.3
    data = data_of(shapes)
    module, follow = model_of(ema=ema), Follow(ema)
    trainer = trainer_of(tmp_path, enable_checkpointing=True, callbacks=[follow, RunCheckpoint()])
    trainer.fit(module, data)
    folder = Path(trainer.checkpoint_callback.dirpath)
    assert follow.steps == 6
    averaged = checkpoint.load_model(folder / "last.ckpt").state
    assert averaged.keys() == follow.mean.keys() == build_network("rexnet_100", 3).state_dict().keys()
    for name, tensor in follow.mean.items():
        torch.testing.assert_close(averaged[name].double(), tensor.double(), rtol=1e-4, atol=1e-5)
    content = checkpoint.read_ckpt(str(folder / "last.ckpt"))
    current = {k.removeprefix("network."): v for k, v in content["current_model_state"].items()}
    assert not torch.equal(current["head.fc.weight"], averaged["head.fc.weight"])  # to resume from

    shipped = RexNetModule.from_model(checkpoint.load_model(folder / "best.ckpt"))
    (found,) = trainer_of(tmp_path).validate(shipped, data, verbose=False)
    assert found["val/top1"] == pytest.approx(trainer.checkpoint_callback.best_model_score.item())


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_no_average_unless_asked_for(ema, shapes, tmp_path):
    trainer = trainer_of(tmp_path, max_epochs=1)
    trainer.fit(model_of(ema=ema), data_of(shapes))
    assert any(isinstance(c, WeightAveraging) for c in trainer.callbacks) is bool(ema)


# --- metrics --------------------------------------------------------------------------------------


def test_validation_counts_what_scikit_learn_counts(tmp_path, shapes):
    data = data_of(shapes, batch_size=5)  # 12 images in batches of 5, 5 and 2
    module = model_of()
    module.network.head.fc.weight.data.normal_(0, 0.5)  # so that the classes named differ
    (found,) = trainer_of(tmp_path).validate(module, data, verbose=False)
    module.eval()
    with torch.no_grad():
        rows = [(module(images), targets) for images, targets, _ in data.val_dataloader()]
    logits, targets = (torch.cat(parts) for parts in zip(*rows, strict=True))
    probs, truth = logits.double().softmax(1).numpy(), targets.numpy()
    assert len(set(probs.argmax(1))) > 1
    assert found["val/top1"] == pytest.approx((probs.argmax(1) == truth).mean())
    assert found["val/macro_f1"] == pytest.approx(f1_score(truth, probs.argmax(1), average="macro"))
    assert found["val/loss"] == pytest.approx(log_loss(truth, probs, labels=range(3)), rel=1e-4)
    assert "val/top5" not in found  # of three classes


# --- schedules and freezing -----------------------------------------------------------------------


class Rates(pl.Callback):
    """Writes down the learning rate of each step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_schedule_is_stepped_every_optimiser_step(tmp_path, shapes, accumulate):
    """24 images in 6 batches an epoch; the recorded rate is the next step's."""
    rates = Rates()
    module = model_of(
        optimizer=OptimizerSettings("sgd", lr=0.1),
        schedule=ScheduleSettings("step", warmup_epochs=0, step_epochs=1, gamma=0.5),
        strategy=StrategySettings("linear_probe"),
    )
    trainer = trainer_of(tmp_path, callbacks=[rates], accumulate_grad_batches=accumulate, limit_val_batches=0)
    trainer.fit(module, data_of(shapes, batch_size=4))
    assert rates.rates == pytest.approx([0.1] * 5 + [0.05] * 6 + [0.025])
    assert trainer.global_step == 12 // accumulate


def test_plateau_drops_with_the_next_step(tmp_path, shapes):
    """6 steps an epoch: a loss that only rises drops the rate after the second epoch, and after each one then."""

    class Rising(RexNetModule):
        def on_validation_epoch_end(self) -> None:
            self.val_metrics["loss"].compute = lambda: torch.tensor(float(self.current_epoch))  # type: ignore[method-assign]
            super().on_validation_epoch_end()

    class Used(pl.Callback):
        def __init__(self) -> None:
            self.rates: list[float] = []

        def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
            self.rates.append(optimizer.param_groups[0]["lr"])

    used = Used()
    module = model_of(
        Rising,
        optimizer=OptimizerSettings("sgd", lr=0.1),
        schedule=ScheduleSettings("plateau", warmup_epochs=0, gamma=0.5, patience=0),
        strategy=StrategySettings("linear_probe"),
    )
    trainer_of(tmp_path, callbacks=[used], max_epochs=3).fit(module, data_of(shapes, batch_size=4))
    assert used.rates == pytest.approx([0.1] * 12 + [0.05] * 6)


def test_the_gradient_of_accumulated_batches_is_their_mean(tmp_path, shapes):
    """6 batches in steps of 4: the second step has 2, and Lightning divides by 4."""

    class Gradients(pl.Callback):
        def __init__(self) -> None:
            self.batches: list[Any] = []
            self.steps: list[tuple[float, int]] = []

        def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
            self.batches.append(batch)

        def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
            bias = module.network.head.fc.bias
            with torch.enable_grad():
                loss = sum(module.loss(module(images), targets) for images, targets, _ in self.batches)
                (wanted,) = torch.autograd.grad(loss / len(self.batches), bias)
            self.steps.append((float((bias.grad - wanted).abs().max() / wanted.abs().max()), len(self.batches)))
            self.batches = []

    seen = Gradients()
    head = HeadSpec(dropout=0.0)
    module = model_of(head=head, strategy=StrategySettings("linear_probe"), optimizer=OptimizerSettings("sgd", lr=0.1))
    trainer = trainer_of(tmp_path, callbacks=[seen], accumulate_grad_batches=4, limit_val_batches=0, max_epochs=1)
    trainer.fit(module, data_of(shapes, batch_size=4))
    assert [count for _, count in seen.steps] == [4, 2]
    assert max(difference for difference, _ in seen.steps) < 1e-4


@pytest.mark.parametrize(("batch_size", "accumulate", "images"), [(4, 1, 4), (4, 3, 12), (100, 1, 24), (4, 8, 24)])
def test_a_step_has_no_more_images_than_there_are(tmp_path, shapes, batch_size, accumulate, images):
    optimizer = OptimizerSettings("sgd", lr=0.1, base_batch_size=24)
    module = model_of(
        optimizer=optimizer,
        strategy=StrategySettings("linear_probe"),
        schedule=ScheduleSettings("constant", warmup_epochs=0),
    )
    trainer = trainer_of(tmp_path, accumulate_grad_batches=accumulate, limit_val_batches=0, max_epochs=1)
    trainer.fit(module, data_of(shapes, batch_size=batch_size))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * images / 24)


def test_views_are_of_one_size(tmp_path, shapes):
    module = model_of(strategy=StrategySettings("linear_probe", views=2))
    with pytest.raises(UserError, match=r"leave data\.size_schedule out"):
        trainer_of(tmp_path).fit(module, data_of(shapes, size_schedule=[(0, 32), (1, 48)]))


def test_frozen_parts_stay_in_eval_mode():
    module = model_of(strategy="linear_probe")
    module.train()
    assert {name.split(".")[0] for name, m in module.network.named_modules() if m.training} == {"", "features", "head"}
    module.eval()
    assert not any(m.training for m in module.network.modules())


# --- weights to start from ------------------------------------------------------------------------


def test_starting_from_timm_s_weights_replaces_the_head(tmp_path, capsys):
    theirs = timm.create_model("rexnet_100", num_classes=10)
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    fresh = state_of(model_of())
    got = state_of(model_of(weights=str(tmp_path / "timm.safetensors")))
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(got[name], fresh[name] if name.startswith("head.fc") else tensor)
    same_size = timm.create_model("rexnet_100", num_classes=3)
    safetensors.torch.save_file(same_size.state_dict(), tmp_path / "three.safetensors")
    assert equal(state_of(model_of(weights=str(tmp_path / "three.safetensors"))), dict(same_size.state_dict()))


def test_gradient_checkpointing_changes_no_gradient():
    images, targets = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 1])
    grads = []
    for checkpointing in (False, True):
        module = model_of(grad_checkpointing=checkpointing, drop_path_rate=0.2).train()
        torch.manual_seed(1)
        module.loss(module(images), targets).backward()
        grads.append({name: p.grad for name, p in module.network.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-6)


def test_rows_of_classes_that_the_weights_know(tmp_path, capsys):
    """Two of three classes are known by name, in another order: their rows are taken, the third's is new."""
    source = build_network("rexnet_100", 4).eval()
    with torch.no_grad():
        source.head.fc.bias.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    spec = ModelSpec("rexnet_100", ("Square", "moon", "circle", "star"), HeadSpec(), EvalRecipe(32))
    checkpoint.save_model(tmp_path / "m.safetensors", spec, source.state_dict())
    weights = str(tmp_path / "m.safetensors")
    module = model_of(weights=weights, keep_matching_classes=True)
    module.start.require(resumes=False)
    fresh, kept = state_of(model_of()), state_of(module)
    assert "these classes by name (2: circle, square)" in capsys.readouterr().out
    theirs = source.state_dict()
    for ours, row in ((0, 2), (2, 0)):
        assert torch.equal(kept["head.fc.weight"][ours], theirs["head.fc.weight"][row])
    assert torch.equal(kept["head.fc.weight"][1], fresh["head.fc.weight"][1])
    assert kept["head.fc.bias"].tolist() == [3.0, 0.0, 1.0]
    without = state_of(model_of(weights=weights))
    assert torch.equal(without["head.fc.weight"], fresh["head.fc.weight"])


def test_imagenet_s_names_and_their_synonyms():
    names = variants.published_names("rexnet_100")
    assert len(names) == 1000
    found = weights.matching_rows(names, ["goldfish", "Carassius_auratus", "golden_retriever", "my cat"])
    assert found == {0: 1, 1: 1, 2: 207}  # ImageNet's own numbers


@pytest.mark.parametrize(
    ("names", "head", "kept"),
    [(NAMES, HeadSpec(), True), (("a", "b", "c"), HeadSpec(), False), (NAMES, HeadSpec("mlp", 8), False)],
)
def test_our_own_head_is_kept_for_the_same_classes_only(tmp_path, names, head, kept):
    """Three other classes need another head, though it would fit."""
    source = build_network("rexnet_100", 3, head)
    spec = ModelSpec("rexnet_100.nav_in1k", names, head, EvalRecipe(32))
    checkpoint.save_model(tmp_path / "a.safetensors", spec, source.state_dict())
    got = state_of(model_of(weights=str(tmp_path / "a.safetensors")))
    assert torch.equal(got["features.3.conv_pwl.conv.weight"], source.state_dict()["features.3.conv_pwl.conv.weight"])
    fits = "head.fc.weight" in source.state_dict()
    assert (fits and torch.equal(got["head.fc.weight"], source.state_dict()["head.fc.weight"])) == kept


def test_starting_from_another_backbone_is_one_line(tmp_path):
    source = build_network("rexnet_130", 3)
    checkpoint.save_model(tmp_path / "a.safetensors", ModelSpec("rexnet_130", NAMES), source.state_dict())
    with pytest.raises(UserError, match=r"a\.safetensors is a rexnet_130, but model.backbone is rexnet_100"):
        model_of(weights=str(tmp_path / "a.safetensors"))


def test_pretrained_is_never_silently_random(no_network, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"model\.pretrained"):
        RexNetModule(num_classes=3).start.require(resumes=False)
    with pytest.raises(UserError, match=r"model\.pretrained"):
        RexNetModule(num_classes=3)(torch.zeros(1, 3, 32, 32))


def model_file(folder: Path, state: dict[str, torch.Tensor], head: HeadSpec) -> checkpoint.Model:
    spec = ModelSpec("rexnet_100", NAMES, head, EvalRecipe(48, 0.9, "bilinear"))
    checkpoint.save_model(folder / "m.safetensors", spec, state)
    return checkpoint.load_model(folder / "m.safetensors")


def test_from_model_is_the_model(tmp_path):
    source = build_network("rexnet_100", 3, HeadSpec("mlp", 8)).eval()
    module = RexNetModule.from_model(model_file(tmp_path, source.state_dict(), HeadSpec("mlp", 8)))
    assert module.spec.eval_recipe == EvalRecipe(48, 0.9, "bilinear")
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(module.eval()(images), source(images))


def test_from_model_never_has_a_random_head(tmp_path):
    state = build_network("rexnet_100", 5).state_dict()  # five classes, but three names
    with pytest.raises(UserError, match="head"):
        RexNetModule.from_model(model_file(tmp_path, state, HeadSpec()))


# --- resuming and mistakes ------------------------------------------------------------------------


def test_a_checkpoint_of_another_model_is_not_resumed(tmp_path, shapes, make_shapes):
    trainer = trainer_of(tmp_path, max_epochs=1, enable_checkpointing=True, callbacks=[RunCheckpoint()])
    trainer.fit(model_of(), data_of(shapes))
    last = str(Path(trainer.checkpoint_callback.dirpath) / "last.ckpt")
    record = checkpoint.load_model(last).data
    assert record.root == str(shapes)
    other = make_shapes(tmp_path / "other", train=2, val=1, test=0, classes=("x", "y", "z"))
    for module, root, message in (
        (model_of(head=HeadSpec("mlp", 8)), shapes, "model.head.name is linear, this run's is mlp"),
        (model_of(class_names=("x", "y", "z")), other, r"classes \(3: circle, cross, square\) differ from .* x, y, z"),
    ):
        with pytest.raises(UserError, match=message):
            trainer_of(tmp_path).fit(module, data_of(root), ckpt_path=last)


class Bomb:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def test_no_way_through_lightning_unpickles(tmp_path, shapes, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, path, good = model_of(), tmp_path / "bomb.ckpt", tmp_path / "good.ckpt"
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": Bomb()}, path)
    with pytest.raises(UserError, match="a checkpoint contains no data"):
        ImageFolderDataModule.load_from_checkpoint(path, weights_only=False)
    for refused in (
        lambda: RexNetModule.load_from_checkpoint(path, map_location="cpu"),
        lambda: trainer_of(tmp_path).fit(model_of(), data_of(shapes), ckpt_path=path, weights_only=False),
        lambda: trainer_of(tmp_path).validate(model_of(), data_of(shapes), ckpt_path=path, weights_only=False),
    ):
        with pytest.raises(UserError, match=r"bomb.ckpt: refused, it holds pickled objects"):
            refused()
    with pytest.raises(UserError, match="is a URL; models are read from local files only"):
        trainer_of(tmp_path).fit(model_of(), data_of(shapes), ckpt_path="http://127.0.0.1:1/a.ckpt")
    assert not Path("exploded").exists()
    trainer = trainer_of(tmp_path, max_epochs=1)
    trainer.fit(model, data_of(shapes))
    trainer.save_checkpoint(good)
    assert equal(state_of(RexNetModule.load_from_checkpoint(good)), state_of(model))


def test_data_of_another_class_count_is_one_line(tmp_path, shapes):
    with pytest.raises(UserError, match="the data has 3 classes, but the model was made for 2"):
        trainer_of(tmp_path).fit(model_of(class_names=("a", "b")), data_of(shapes))


def test_data_of_other_classes_is_one_line(tmp_path, shapes, make_shapes):
    """Tested in another order, or on other classes, a good model would seem bad."""
    module = model_of()
    (tmp_path / "order.txt").write_text("square\ncross\ncircle\n")
    turned = data_of(shapes, class_order=tmp_path / "order.txt")
    for run in ("fit", "validate"):
        with pytest.raises(UserError, match=r"the data's classes \(3: square, cross, circle\) are not the model's"):
            getattr(trainer_of(tmp_path), run)(module, turned)
    few = make_shapes(tmp_path / "few", classes=NAMES[1:], train=2, val=2, test=0)
    with pytest.raises(UserError, match="the data has 2 classes"):
        trainer_of(tmp_path).validate(module, data_of(few))
    as_the_model = data_of(shapes, class_order=tmp_path / "order.txt", class_names=module.spec.class_names)
    trainer_of(tmp_path).validate(module, as_the_model, verbose=False)
    trainer_of(tmp_path).predict(module, data_of(few, predict_path=str(few / "val")))  # where there is no truth
    numbered = model_of(class_names=None, num_classes=3)
    trainer_of(tmp_path, max_epochs=1).fit(numbered, data_of(shapes))
    assert numbered.spec.class_names == NAMES


def test_sizes_that_differ_are_one_line(tmp_path, shapes):
    with pytest.raises(UserError, match="ImageFolderDataModule has image_size 48, and the model 32"):
        trainer_of(tmp_path).fit(model_of(), data_of(shapes, image_size=48))
    with pytest.raises(UserError, match="ImageFolderDataModule has crop_mode squash, and the model center"):
        trainer_of(tmp_path).fit(model_of(), data_of(shapes, crop_mode="squash"))
    trainer_of(tmp_path).validate(model_of(), data_of(shapes, image_size=None), verbose=False)


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_what_lightning_would_ask_of_the_data_otherwise(tmp_path, shapes):
    with pytest.raises(UserError, match="use limit_train_batches instead of overfit_batches"):
        trainer_of(tmp_path, overfit_batches=1).fit(model_of(), data_of(shapes))
    with pytest.raises(UserError, match=r"the stage is 'train'; expected one of .*predict"):
        data_of(shapes).setup("train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ema": 1.0}, "model.ema is 1"),
        ({"class_names": None}, "needs num_classes or class_names"),
        ({"num_classes": 4}, "num_classes is 4, but there are 3 class_names"),
        ({"backbone": "rexnet_10"}, "no ReXNet is named 'rexnet_10'; did you mean"),
        ({"head": "cosin"}, "model.head.name is 'cosin'"),
        ({"strategy": "half"}, "model.strategy.name is 'half'"),
        ({"schedule": "cosin"}, "model.schedule.name is 'cosin'"),
        ({"loss": "hinge"}, "model.loss.name is 'hinge'"),
        ({"image_size": 16}, "data.image_size is 16"),
        ({"weights": "no.safetensors"}, "model.weights: there is no file 'no.safetensors'"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(UserError, match=message):
        model_of(**settings).start.require(resumes=False)


def test_a_trained_head_survives_another_dropout(tmp_path):
    first = model_of(head={"dropout": 0.0})
    path = str(tmp_path / "model.safetensors")
    checkpoint.save_model(path, first.spec, first.network.state_dict())
    torch.manual_seed(1)
    second = RexNetModule(weights=path, head={"dropout": 0.3}, class_names=first.spec.class_names)
    assert torch.equal(second.network.head.fc.weight, first.network.head.fc.weight)


def test_views_are_not_blended(shapes, tmp_path):
    module = model_of(strategy={"name": "linear_probe", "views": 2})
    with pytest.raises(UserError, match=r"set data.augment.mixup and cutmix to 0"):
        trainer_of(tmp_path).fit(module, data_of(shapes, augment={"mixup": 0.4}))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_features_come_in_the_networks_precision(shapes, tmp_path, precision):
    module = model_of(strategy={"name": "linear_probe", "solver": "logistic"})
    trainer_of(tmp_path, precision=precision).fit(module, data_of(shapes))


def test_looks_before_between_and_after_fits(tmp_path, shapes):
    """A notebook's order: a baseline, a fit, another look, predictions for a loader at hand, more training."""
    module, data, trainer = model_of(), data_of(shapes), trainer_of(tmp_path, max_epochs=1)
    trainer.validate(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data)
    trainer.validate(module, datamodule=data, verbose=False)
    found = trainer.predict(module, dataloaders=data.val_dataloader())
    assert torch.cat(found).shape == (12, len(NAMES))
    trainer_of(tmp_path, max_epochs=1).fit(module, datamodule=data)
    with pytest.raises(UserError, match="predict_path is not set"):
        trainer_of(tmp_path).predict(module, datamodule=data)


# --- the user's own loaders, Lightning's tuner, torch.compile ----------------------------------------


def loader_of(images, batch_size=8, **settings):
    rows = torch.utils.data.TensorDataset(images, torch.arange(len(images)) % 3)
    return torch.utils.data.DataLoader(rows, batch_size, **settings)


@pytest.mark.parametrize(
    ("images", "batch_size", "named"),
    [
        (torch.rand(17, 3, 32, 32), 8, "drop_last=True"),
        (torch.rand(4, 3, 32, 32), 1, "batch_size"),
        (torch.zeros(4, 3, 32, 32, dtype=torch.uint8), 2, "uint8 (2, 3, 32, 32)"),
        (torch.rand(4, 3, 32, 32, dtype=torch.float64), 2, "float64"),
        (torch.rand(4, 32, 32, 3), 2, "(2, 32, 32, 3)"),
        (torch.rand(4, 1, 32, 32), 2, "(2, 1, 32, 32)"),
    ],
    ids=("last batch", "batches of one", "bytes", "doubles", "channels last", "grey"),
)
def test_what_a_loader_must_give(tmp_path, images, batch_size, named):
    with pytest.raises(UserError, match=r"loader|DataLoader") as caught:
        trainer_of(tmp_path, max_epochs=1).fit(model_of(), loader_of(images, batch_size), loader_of(images[:2]))
    assert named in str(caught.value)


def test_one_image_can_be_evaluated_and_frozen_batchnorm_trains_on_it(tmp_path):
    images = torch.rand(17, 3, 32, 32)
    module = model_of(strategy=StrategySettings("linear_probe"))
    trainer = trainer_of(tmp_path, max_epochs=1)
    trainer.fit(module, loader_of(images), loader_of(images))
    assert trainer.global_step == 3


@pytest.mark.parametrize("base_batch_size", [None, 64])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightning_s_tuner_sets_the_learning_rate(tmp_path, shapes, base_batch_size):
    data, module = data_of(shapes), model_of(optimizer={"base_batch_size": base_batch_size, "layer_decay": 0.9})
    trainer = trainer_of(tmp_path, max_epochs=20)
    before = state_of(module)
    found = pl.tuner.Tuner(trainer).lr_find(module, datamodule=data, num_training=40)
    assert equal(before, state_of(module))
    assert module.lr == pytest.approx(found.suggestion(), rel=1e-12)
    scale = 1 if base_batch_size is None else (8 / 64) ** 0.5  # AdamW: the square root, timm's rule
    assert module.optimizer_settings.lr == pytest.approx(found.suggestion() / scale, rel=1e-12)
    trainer = trainer_of(tmp_path, max_epochs=1)
    trainer.fit(module, data)
    assert max(trainer.lr_scheduler_configs[0].scheduler.base_lrs) == pytest.approx(found.suggestion(), rel=1e-12)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("callback", [False, True])
def test_lightning_s_tuner_sets_the_batch_size(tmp_path, shapes, callback):
    data, module = data_of(shapes), model_of()
    finder = BatchSizeFinder(max_trials=2, init_val=8)
    trainer = trainer_of(tmp_path, max_epochs=1, enable_checkpointing=True, callbacks=[finder] if callback else None)
    if not callback:
        pl.tuner.Tuner(trainer).scale_batch_size(module, datamodule=data, max_trials=2, init_val=8)
    trainer.fit(module, data)
    assert data.batch_size == 16
    assert trainer.global_step == data.steps_per_epoch() == -(-len(data.splits()["train"]) // 16)
    assert json.loads((find_run_folder(trainer) / "result.json").read_text())["resumed"] is None


def test_the_tuner_cannot_set_the_rate_of_an_own_optimizer():
    module = model_of(optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(UserError, match=r"the learning rate 0.02 cannot be set: model\.optimizer is your own"):
        module.lr = 0.02


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"calibrate": "yes"}, "model.calibrate is 'yes'; expected bool"),
        ({"pretrained": "no"}, "model.pretrained is 'no'; expected bool"),
        ({"weights": 3}, "model.weights is 3; expected str or None"),
        ({"strategy": {"blend": "no"}}, "model.strategy.blend is 'no'; expected bool"),
        ({"class_names": "abc"}, "class_names: expected a list of texts, got 'abc'"),
        ({"class_names": ["a", 2]}, "class_names: expected a list of texts, got 2 among them"),
        ({"class_names": ["a", "b", "a"]}, "class_names: 'a' is there twice"),
    ],
)
def test_settings_of_other_types(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        model_of(**settings)


@pytest.mark.parametrize("how", ["assigned", "in place", "whole"])
@pytest.mark.parametrize("ema", [0, 0.9])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's, of the compiled `log`
def test_a_compiled_network_has_plain_names(tmp_path, shapes, how, ema):
    """It trains, resumes what was not compiled, and is resumed by what is not."""
    plain, runs = list(model_of().state_dict()), {}
    for number, compiled in enumerate((False, True, False)):
        module: Any = model_of(ema=ema)
        model = module
        if compiled and how == "assigned":
            module.network = torch.compile(module.network, backend="eager")
        elif compiled and how == "in place":
            module.network.compile(backend="eager")
        elif compiled:
            model = torch.compile(module, backend="eager")
        path = tmp_path / f"{number}.ckpt"
        trainer = trainer_of(tmp_path, max_epochs=number + 1, limit_train_batches=2, limit_val_batches=1)
        trainer.fit(model, data_of(shapes), ckpt_path=tmp_path / f"{number - 1}.ckpt" if number else None)
        trainer.save_checkpoint(path)
        assert list(module.state_dict()) == plain
        assert list(checkpoint.read_ckpt(str(path))["state_dict"]) == plain
        runs[number] = trainer.global_step
        assert RexNetModule.load_from_checkpoint(path).spec.class_names == NAMES
    assert runs == {0: 2, 1: 4, 2: 6}


@pytest.mark.parametrize("wrap", ["torch.compile", "DDP", "both", "AveragedModel"])
def test_weights_of_a_wrapped_network_are_read(tmp_path, wrap):
    network = build_network("rexnet_100", 3)
    prefix = {"torch.compile": "_orig_mod.", "DDP": "module.", "both": "module._orig_mod.", "AveragedModel": "module."}
    state = {prefix[wrap] + name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    if wrap == "AveragedModel":
        state = {"n_averaged": torch.tensor(3), **state}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    module = RexNetModule(weights=str(tmp_path / "w.safetensors"), num_classes=3)
    assert equal(state_of(module), network.state_dict())
    checkpoint.save_model(tmp_path / "m.safetensors", module.spec, state)
    assert checkpoint.load_model(tmp_path / "m.safetensors").state.keys() == network.state_dict().keys()


# --- what a resumed run takes from its settings ------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"optimizer": {"lr": 0.02, "weight_decay": 0.3, "layer_decay": 0.8}}])
@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_a_resumed_run_follows_its_own_schedule_from_its_first_step(tmp_path, shapes, schedule, settings):
    """Made longer, or with another rate: `lr_factor` of the new run, not the rate in the checkpoint."""

    class Rates(RexNetModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            groups = self.optimizers().param_groups
            self.met = [*getattr(self, "met", []), [(g["lr"], g["weight_decay"]) for g in groups]]
            return super().training_step(batch, batch_idx)

    first = {"schedule": schedule, "optimizer": {"layer_decay": 0.8}}
    trainer = trainer_of(tmp_path, max_epochs=2)
    trainer.fit(model_of(Rates, **first), data_of(shapes))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    module = model_of(Rates, **{**first, **settings})
    trainer = trainer_of(tmp_path, max_epochs=6)
    trainer.fit(module, data_of(shapes), ckpt_path=tmp_path / "a.ckpt")
    built = build_optimizer(module.network, module.optimizer_settings, module.lr)
    factors = [lr_factor(module.schedule_settings, step, 18, 3) for step in range(6, 18)]  # 24 images by 8: 3 steps
    expected = [[(g["lr"] * factor, g["weight_decay"]) for g in built.param_groups] for factor in factors]
    assert module.met == expected

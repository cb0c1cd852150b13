"""Features computed once, and the head that is solved on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from module_tools import data_of, equal, model_of, state_of, trainer_of
from sklearn.linear_model import LogisticRegression

from rexnet_lit.data.augmentation import AugmentSettings
from rexnet_lit.data.dataset import FeatureDataset, ImageDataset
from rexnet_lit.models.heads import HeadSpec
from rexnet_lit.training import logistic_head
from rexnet_lit.training.features import class_weights, embedder
from rexnet_lit.training.freezing import StrategySettings
from rexnet_lit.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_runs")


class Counting(ImageDataset):
    """Counts the images that are read."""

    count = 0

    def read(self, index: int) -> Any:
        type(self).count += 1
        return super().read(index)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> type[Counting]:
    monkeypatch.setattr("rexnet_lit.data.datamodule.ImageDataset", Counting)
    monkeypatch.setattr(Counting, "count", 0)
    return Counting


def probed(root: Path, folder: Path, epochs: int = 3, **settings: Any) -> tuple[Any, Any]:
    data_settings = {key: settings.pop(key) for key in ("augment", "num_workers") if key in settings}
    module = model_of(**{"strategy": "linear_probe", "optimizer": "sgd", **settings})
    data = data_of(root, **{"augment": AugmentSettings("none"), **data_settings})
    trainer = trainer_of(folder, max_epochs=epochs)
    trainer.fit(module, data)
    return module, trainer


def test_cached_and_uncached_probes_are_the_same(shapes, tmp_path, monkeypatch, reads):
    cached, trainer = probed(shapes, tmp_path)
    assert reads.count == 24 + 12  # each image once, in three epochs
    with monkeypatch.context() as patch:
        patch.setattr(AugmentSettings, "fixed", property(lambda self: False))
        uncached, other = probed(shapes, tmp_path)
    assert reads.count == 36 + 3 * 36
    before, a, b = state_of(model_of()), state_of(cached), state_of(uncached)
    assert not torch.equal(a["head.fc.weight"], before["head.fc.weight"])
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], rtol=1e-4, atol=1e-6)
    for name, value in trainer.callback_metrics.items():
        torch.testing.assert_close(value, other.callback_metrics[name], rtol=1e-4, atol=1e-5)


def test_augmented_views_are_those_of_the_first_epochs(shapes, tmp_path, reads):
    """Two views over two epochs are just what the uncached probe would see."""
    augment = AugmentSettings("light", min_scale=0.5)
    cached, _ = probed(shapes, tmp_path, 2, augment=augment, strategy=StrategySettings("linear_probe", views=2))
    assert reads.count == 2 * 24 + 12
    uncached, _ = probed(shapes, tmp_path, 2, augment=augment)
    for name, tensor in state_of(cached).items():
        torch.testing.assert_close(tensor, state_of(uncached)[name], rtol=1e-4, atol=1e-6)
    assert reads.count == 60 + 2 * 36


def test_features_are_another_network_s_after_the_next_setup(shapes, tmp_path):
    data = data_of(shapes, augment=AugmentSettings("none"))
    trainer_of(tmp_path).fit(model_of(strategy="linear_probe"), data)
    assert isinstance(data.val_dataloader().dataset, FeatureDataset)
    trainer_of(tmp_path, max_epochs=1).fit(model_of(), data)
    assert not isinstance(data.val_dataloader().dataset, FeatureDataset)


def test_solve_is_scikit_learn_s_regression():
    """The logits are those of scikit-learn's own model on standardised features; K = 2 and a missing class too."""
    rng = np.random.default_rng(0)
    for classes in (2, 4):
        targets = rng.integers(0, classes, 200)
        features = (rng.normal(size=(200, 6)) * 3 + 5 + 2 * np.eye(classes, 6)[targets]).astype(np.float32)
        head = logistic_head.fit_logistic_head(
            features[:150], targets[:150], features[150:], targets[150:], np.ones(classes + 1)
        )
        mean, spread = features[:150].mean(0), features[:150].std(0)
        theirs = LogisticRegression(C=head.strength, max_iter=500).fit((features[:150] - mean) / spread, targets[:150])
        wanted = theirs.predict_proba((features[150:] - mean) / spread)
        logits = features[150:] @ head.weight.T + head.bias
        found = np.exp(logits[:, :classes]) / np.exp(logits[:, :classes]).sum(1, keepdims=True)
        np.testing.assert_allclose(found, wanted, atol=2e-3)
        assert head.top1 == (wanted.argmax(1) == targets[150:]).mean()
        assert (logits[:, classes] < logits[:, :classes].max(1)).all()  # nobody is of the class without images


def test_solve_converges_at_weak_regularisations():
    """More features than images, of which many tell the class: the best strength is the weakest."""
    rng = np.random.default_rng(0)
    targets = np.arange(120) % 5
    features = (
        rng.normal(size=(120, 300)).astype(np.float32) + 0.6 * rng.normal(size=(5, 300)).astype(np.float32)[targets]
    )
    half = features[:60], targets[:60], features[60:], targets[60:]
    head = logistic_head.fit_logistic_head(*half, np.ones(5))
    assert head.strength >= 1
    mean, spread = half[0].mean(0), half[0].std(0)
    exact = LogisticRegression(C=head.strength, tol=1e-10, max_iter=10_000).fit((half[0] - mean) / spread, half[1])
    wanted = exact.decision_function((half[2] - mean) / spread)
    logits = half[2] @ head.weight.T + head.bias
    np.testing.assert_allclose(logits - logits.mean(1, keepdims=True), wanted, atol=0.02)


def test_the_solved_probe_needs_one_epoch_and_changes_nothing_else(shapes, tmp_path, capsys):
    module, trainer = probed(shapes, tmp_path, 7, strategy=StrategySettings("linear_probe", solver="logistic"))
    assert trainer.current_epoch == 1
    fresh, solved = state_of(model_of()), state_of(module)
    assert {name for name in fresh if not torch.equal(fresh[name], solved[name])} == {"head.fc.weight", "head.fc.bias"}
    module.eval()
    data = trainer.datamodule
    features = data.compute_features("train", embedder(module), evaluate=True)[0].numpy()
    val = data.compute_features("val", embedder(module))[0].numpy()
    splits = data.splits()
    head = logistic_head.fit_logistic_head(features, splits["train"].targets, val, splits["val"].targets, np.ones(3))
    np.testing.assert_allclose(solved["head.fc.weight"], head.weight, rtol=1e-3, atol=1e-5)
    assert float(trainer.callback_metrics["val/top1"]) == pytest.approx(head.top1)


def test_without_validation_images_a_fifth_of_the_others_chooses(shapes, tmp_path, capsys):
    rows = [f"{path.relative_to(shapes)},train\n" for path in (shapes / "train").rglob("*.*")]
    (tmp_path / "split.csv").write_text("path,split\n" + "".join(rows))
    data = data_of(shapes, split_file=str(tmp_path / "split.csv"), val_fraction=0.0)
    module, trainer = model_of(strategy=StrategySettings("linear_probe", solver="logistic")), trainer_of(tmp_path)
    with pytest.warns(UserWarning, match="Total length of `list`"):  # Lightning's, of no validation batches
        trainer.fit(module, data)
    features = data.compute_features("train", embedder(module.eval()), evaluate=True)[0].numpy()
    targets = data.splits()["train"].targets  # rising
    held = np.concatenate([np.arange(count) % 5 == 1 for count in np.bincount(targets)])
    chosen = logistic_head.fit_logistic_head(features[~held], targets[~held], features[held], targets[held], np.ones(3))
    assert (
        f"held-out top-1 {chosen.top1:.3f}, loss {chosen.loss:.3f} (C = {chosen.strength:g})" in capsys.readouterr().out
    )
    exact = LogisticRegression(C=chosen.strength, tol=1e-10, max_iter=10_000)
    wanted = exact.fit((features - features.mean(0)) / features.std(0), targets).coef_ / features.std(0)
    found = state_of(module)["head.fc.weight"].numpy()
    np.testing.assert_allclose(found, wanted, rtol=0.01, atol=0.01 * np.abs(wanted).max())


def test_a_solved_head_starts_a_fine_tuning(shapes, tmp_path):
    """With a learning rate that hardly moves, the run still validates as the solved head does."""
    settings = StrategySettings("full", solver="logistic", bn="frozen")
    module, _ = probed(shapes, tmp_path, 1, strategy=settings, optimizer={"name": "sgd", "lr": 1e-12})
    solved, _ = probed(shapes, tmp_path, 1, strategy=StrategySettings("linear_probe", solver="logistic"))
    torch.testing.assert_close(
        state_of(module)["head.fc.weight"], state_of(solved)["head.fc.weight"], rtol=1e-4, atol=1e-6
    )


def test_a_resumed_run_keeps_its_head(shapes, tmp_path):
    """The head is solved once: a resume must not solve it again over what was learned since."""
    from rexnet_lit.training.callbacks.checkpoint import RunCheckpoint

    settings = {"strategy": StrategySettings("full", solver="logistic"), "optimizer": {"name": "sgd", "lr": 0.001}}

    def fit(folder: Path, epochs: int, ckpt: Path | None = None) -> Any:
        module = model_of(schedule={"name": "constant", "warmup_epochs": 0}, **settings)
        trainer = trainer_of(folder, max_epochs=epochs, callbacks=[RunCheckpoint()], enable_checkpointing=True)
        trainer.fit(module, data_of(shapes, augment=AugmentSettings("none")), ckpt_path=ckpt)
        return module

    whole = fit(tmp_path / "whole", 2)
    fit(tmp_path / "parts", 1)
    (last,) = (tmp_path / "parts").rglob("last.ckpt")
    assert equal(state_of(fit(tmp_path / "rest", 2, last)), state_of(whole))


def test_classes_that_count_more_win_more():
    """Where two classes overlap, the border moves to the one that counts less."""
    rng = np.random.default_rng(0)
    targets = np.repeat([0, 1], [900, 100])
    features = (rng.normal(size=(1000, 4)) + targets[:, None]).astype(np.float32)
    recalls = []
    for weights in (np.ones(2), np.array([1.0, 9.0])):
        head = logistic_head.fit_logistic_head(features, targets, features, targets, weights)
        found = (features @ head.weight.T + head.bias).argmax(1)
        recalls.append((found[targets == 1] == 1).mean())
    assert recalls[1] > recalls[0] + 0.1


@pytest.mark.parametrize(
    ("sampler", "loss", "expected"),
    [
        ("shuffle", "none", [1, 1, 1]),
        ("balanced", "none", [1 / 8, 1 / 4, 1 / 2]),
        ("balanced_sqrt", "none", [8**-0.5, 4**-0.5, 2**-0.5]),
        ("shuffle", "auto", [14 / 24, 14 / 12, 14 / 6]),
    ],
)
def test_a_solved_head_weighs_classes_as_training_does(tmp_path, make_shapes, sampler, loss, expected):
    root = make_shapes(tmp_path / "data", train=8, val=2, test=0)
    for name, keep in (("cross", 4), ("square", 2)):
        for file in sorted((root / "train" / name).iterdir())[keep:]:
            file.unlink()
    module = model_of(loss={"class_weights": loss})
    data = data_of(root, sampler=sampler)
    trainer_of(tmp_path, max_epochs=1).fit(module, data)
    np.testing.assert_allclose(class_weights(module), expected, rtol=1e-6)


def test_only_a_linear_head_can_be_solved():
    with pytest.raises(UserError, match=r"logistic solves a linear head; model.head.name is cosine"):
        model_of(strategy=StrategySettings("staged", solver="logistic"), head=HeadSpec("cosine"))

"""Metrics against scikit-learn and a direct count; the loss against numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, log_loss, precision_recall_fscore_support, top_k_accuracy_score

from rexnet_lit.training import metrics


def softmax(logits):
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def calibration_error(probs, targets, bins=15):
    """Guo et al. 2017, equation 3, with bins (a, b]: the mean gap of confidence and accuracy, weighted by bin."""
    confidence, right = probs.max(1), probs.argmax(1) == targets
    edges = np.linspace(0, 1, bins + 1)
    error = 0.0
    for low, high in itertools.pairwise(edges):
        members = (confidence > low) & (confidence <= high)
        if members.any():
            error += members.mean() * abs(confidence[members].mean() - right[members].mean())
    return error


def collect(logits, targets, batches, prefix="val/"):
    """The metrics after these batches."""
    collection = metrics.build_metrics(logits.shape[1], prefix)
    for rows in batches:
        collection.update(torch.from_numpy(logits[rows]), torch.from_numpy(targets[rows]))
    return collection


def measure(logits, targets, batches):
    return {name: float(value) for name, value in collect(logits, targets, batches).compute().items()}


def draw(classes, images=203):
    rng = np.random.default_rng(classes)
    targets = rng.integers(0, classes, images)
    logits = rng.normal(0, 1, (images, classes)).astype(np.float32)
    logits[np.arange(images), targets] += 1.0
    return logits, targets


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_metrics_equal_scikit_learn_s_whatever_the_batches(classes):
    logits, targets = draw(classes)
    probs = softmax(logits.astype(np.float64))
    expected = {
        "val/loss": log_loss(targets, probs, labels=range(classes)),
        "val/top1": (probs.argmax(1) == targets).mean(),
        "val/macro_f1": f1_score(targets, probs.argmax(1), average="macro"),
        "val/ece": calibration_error(probs, targets),
    }
    if classes > 5:
        expected["val/top5"] = top_k_accuracy_score(targets, probs, k=5, labels=range(classes))
    for size in (203, 32, 1):  # the last batch is smaller; and image by image
        batches = np.split(np.arange(203), range(size, 203, size))
        assert measure(logits, targets, batches) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("classes", [2, 7])
def test_results_are_the_logged_values_and_scikit_learn_s(classes):
    logits, targets = draw(classes)
    logits, missing = np.pad(logits, ((0, 0), (0, 1)), constant_values=-9), classes  # a class that never occurs
    collection = collect(logits, targets, np.array_split(np.arange(203), 7), "test/")
    found = metrics.stage_results(collection)
    logged = {name.removeprefix("test/"): float(value) for name, value in collection.compute().items()}
    assert {name: found["nll" if name == "loss" else name] for name in logged} == logged  # to the last digit
    assert ("top5" in found) == (classes > 4)
    named = softmax(logits.astype(np.float64)).argmax(1)
    assert found["top1"] == (named == targets).mean()
    assert found["macro_f1"] == pytest.approx(f1_score(targets, named, average="macro"), rel=1e-14)
    columns = precision_recall_fscore_support(targets, named, labels=range(classes + 1), zero_division=0)
    for name, column in zip(("precision", "recall", "f1", "support"), columns, strict=True):
        assert found[name] == pytest.approx(column.tolist(), rel=1e-14)
    assert found["support"][missing] == 0
    assert found["count"] == 203
    assert all(type(value) in (int, float, list) for value in found.values())


def test_a_confidence_of_1_is_in_the_last_bin():
    """torchmetrics gives it a 16th bin: the error would be (1.0 + 0.01) / 2."""
    logits, targets = np.array([[200.0, 0.0], [np.log(99), 0.0]], np.float32), np.array([1, 0])
    assert measure(logits, targets, [[0, 1]])["val/ece"] == pytest.approx((1.0 + 0.99 - 1) / 2, abs=1e-6)


def test_logits_between_0_and_1_are_still_logits():
    """Torchmetrics takes such a batch for probabilities: the calibration error would depend on the batches."""
    logits, targets = np.array([[0.1, 0.9]], np.float32), np.array([1])
    # softmax: 1 / (1 + exp(-0.8)) = 0.68997
    assert measure(logits, targets, [[0]])["val/ece"] == pytest.approx(1 - 0.6899745)


def test_a_class_without_images_does_not_count_in_macro_f1():
    logits = np.eye(4, dtype=np.float32)[[0, 0, 1, 2]]
    targets = np.array([0, 1, 1, 1])
    # F1 of class 0: 2 x 1 / (2 x 1 + 1 + 0); of class 1: 2 x 1 / (2 x 1 + 0 + 2); 2 is predicted only, 3 never occurs.
    collection = collect(logits, targets, [[0, 1], [2, 3]])
    found = float(collection.compute()["val/macro_f1"])
    assert found == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found == pytest.approx(f1_score(targets, logits.argmax(1), average="macro", labels=np.unique(targets)))
    assert metrics.classes_without_images(collection, ["a", "b", "c", "d"]) == ["c", "d"]


def test_a_loss_that_is_nan_shows():
    logits, targets = np.array([[np.nan, 1.0], [2.0, 1.0]], np.float32), np.array([0, 0])
    found = measure(logits, targets, [[0], [1]])
    assert np.isnan(found["val/loss"])
    assert np.isnan(found["val/ece"])


def test_one_class():
    assert measure(np.zeros((2, 1), np.float32), np.array([0, 0]), [[0, 1]]) == {
        "val/loss": 0, "val/top1": 1, "val/macro_f1": 1, "val/ece": 0,
    }  # fmt: skip


def test_half_precision_logits_are_measured_in_full():
    logits = torch.tensor([[3.0, 1.0, 0.5], [0.25, 2.0, 1.0]], dtype=torch.bfloat16)  # exact in bfloat16
    targets = torch.tensor([0, 2])
    collection = metrics.build_metrics(3, "")
    collection.update(logits, targets)
    probs = softmax(logits.double().numpy())
    assert float(collection.compute()["loss"]) == pytest.approx(log_loss(targets, probs, labels=range(3)), rel=1e-6)

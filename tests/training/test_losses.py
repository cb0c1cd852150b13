"""Losses against torch's, timm's and values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from timm.loss import BinaryCrossEntropy
from torch import nn

from rexnet_lit.training.losses import LossSettings, build_loss
from rexnet_lit.utils.errors import UserError

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.3, -2.0], [1.0, 1.0, 1.0], [-3.0, 4.0, 0.1]])
TARGETS = torch.tensor([0, 2, 1, 1])
SOFT = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.0, 1.0], [0.5, 0.0, 0.5], [0.1, 0.9, 0.0]])
EVEN = [1, 1, 1]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("targets", [TARGETS, SOFT])
def test_cross_entropy_is_torch_s(smoothing, targets):
    ours = build_loss(LossSettings(label_smoothing=smoothing), EVEN)
    theirs = nn.CrossEntropyLoss(label_smoothing=smoothing)
    torch.testing.assert_close(ours(LOGITS, targets), theirs(LOGITS, targets))


def test_label_smoothing_by_hand():
    """Szegedy et al. 2016: a share s of the target spread over all K classes, the true one included."""
    wanted = torch.full((4, 3), 0.3 / 3)
    wanted[range(4), TARGETS] += 0.7
    found = build_loss(LossSettings(label_smoothing=0.3), EVEN)(LOGITS, TARGETS)
    torch.testing.assert_close(found, -(wanted * LOGITS.softmax(1).log()).sum(1).mean())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bce_is_timm_s(smoothing):
    ours = build_loss(LossSettings("bce", label_smoothing=smoothing), EVEN)
    torch.testing.assert_close(ours(LOGITS, TARGETS), BinaryCrossEntropy(smoothing=smoothing)(LOGITS, TARGETS))
    if not smoothing:  # timm smooths no blended targets
        torch.testing.assert_close(ours(LOGITS, SOFT), BinaryCrossEntropy()(LOGITS, SOFT))


def test_focal_by_hand():
    """One image of a class that has the probability 1/3: (1 - 1/3)^2 log 3."""
    loss = build_loss(LossSettings("focal", label_smoothing=0, gamma=2), EVEN)
    assert loss(LOGITS[2:3], TARGETS[2:3]).item() == pytest.approx((2 / 3) ** 2 * math.log(3))
    plain = build_loss(LossSettings("focal", label_smoothing=0, gamma=0), EVEN)
    torch.testing.assert_close(plain(LOGITS, TARGETS), nn.functional.cross_entropy(LOGITS, TARGETS))


def test_class_weights_by_hand():
    """6, 3 and 1 images of three classes: N / (K n) is 10/18, 10/9 and 10/3, and 1 on average over the images."""
    loss = build_loss(LossSettings(label_smoothing=0, class_weights="auto"), [6, 3, 1])
    torch.testing.assert_close(loss.weights, torch.tensor([10 / 18, 10 / 9, 10 / 3]))
    assert sum(w * n for w, n in zip(loss.weights.tolist(), [6, 3, 1], strict=True)) == pytest.approx(10)
    each = nn.functional.cross_entropy(LOGITS, TARGETS, weight=loss.weights, reduction="none")
    torch.testing.assert_close(loss(LOGITS, TARGETS), each.mean())
    assert "weights" not in loss.state_dict()  # no part of the model


def test_two_processes_average_to_one():
    """Halves of a batch, as two processes see them: the mean of their losses is the loss of the whole."""
    loss = build_loss(LossSettings(class_weights="auto"), [6, 3, 1])
    halves = (loss(LOGITS[:2], TARGETS[:2]) + loss(LOGITS[2:], TARGETS[2:])) / 2
    torch.testing.assert_close(halves, loss(LOGITS, TARGETS))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "hinge"}, "model.loss.name is 'hinge'; expected one of cross_entropy, focal, bce"),
        ({"class_weights": "some"}, "model.loss.class_weights is 'some'; expected one of none, auto"),
        ({"label_smoothing": 1.0}, "model.loss.label_smoothing is 1"),
        ({"label_smoothing": -0.1}, "model.loss.label_smoothing is -0.1"),
        ({"gamma": -1}, "model.loss.gamma is -1"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(UserError, match=message):
        LossSettings(**settings)


def test_a_focal_loss_has_a_slope_where_an_image_is_certain():
    logits = torch.tensor([[20.0, 0.0, 0.0], [90.0, 0.0, 0.0]], requires_grad=True)
    build_loss(LossSettings("focal", gamma=0.5), [1] * 3)(logits, torch.tensor([0, 0])).backward()
    assert torch.isfinite(logits.grad).all()

"""The best linear head for fixed features: multinomial logistic regression, solved to convergence.

On its own it is a linear probe; as the start of fine-tuning it avoids the large gradients of a random head (Kumar et
al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", 2022).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Floats = NDArray[np.float64]

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""scikit-learn's C, the inverse of the regularisation, for features of unit variance."""


class LogisticHead(NamedTuple):
    """A linear head.

    Args:
        weight: (K, C).
        bias: (K,).
        strength: scikit-learn's C.
        loss: Mean validation loss in nats, images weighted by class.
        top1: Validation top-1, a fraction.
    """

    weight: Floats
    bias: Floats
    strength: float
    loss: float
    top1: float

    def copy_to(self, linear: nn.Module) -> None:
        """Overwrite the parameters of a linear layer."""
        with torch.no_grad():
            for name, values in (("weight", self.weight), ("bias", self.bias)):
                linear.get_parameter(name).copy_(torch.from_numpy(values))


def fit_logistic_head(
    features: NDArray[np.float32],
    targets: NDArray[np.int64],
    val_features: NDArray[np.float32],
    val_targets: NDArray[np.int64],
    class_weights: NDArray[np.float64],
    strengths: Sequence[float] = STRENGTHS,
) -> LogisticHead:
    """Return the logistic regression whose regularisation has the lowest validation loss.

    Args:
        features: Training features, (N, C).
        targets: Their classes, (N,).
        val_features: Validation features, (M, C).
        val_targets: Their classes, (M,).
        class_weights: Weight of an image of each class, (K,).
        strengths: What to choose from, rising.
    """
    from sklearn.linear_model import LogisticRegression

    mean, spread = features.mean(0), features.std(0) + 1e-6
    standardised = (features - mean) / spread
    weights = class_weights / class_weights[targets].mean()
    # L-BFGS, the default solver, takes up to thirty times as long when features outnumber images. With the default
    # tolerance, weak regularisation stops half a logit from the optimum.
    regression = LogisticRegression(
        solver="newton-cg", warm_start=True, tol=1e-6, max_iter=500, class_weight=dict(enumerate(weights))
    )
    best: LogisticHead | None = None
    for strength in strengths:
        regression.C = strength
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no convergence with weak regularisation, which does not win
            regression.fit(standardised, targets)
        slopes, offsets = regression.coef_.astype(np.float64), regression.intercept_.astype(np.float64)
        if len(slopes) == 1:  # for two classes scikit-learn keeps the difference
            slopes, offsets = np.concatenate([-slopes, slopes]) / 2, np.concatenate([-offsets, offsets]) / 2
        weight, bias = np.zeros((len(weights), features.shape[1])), np.full(len(weights), offsets.min() - 10.0)
        weight[regression.classes_] = slopes / spread
        bias[regression.classes_] = offsets - weight[regression.classes_] @ mean
        logits = val_features @ weight.T + bias
        logs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        loss = -float(np.average(logs[np.arange(len(logs)), val_targets], weights=weights[val_targets]))
        if best is not None and loss >= best.loss:
            break
        best = LogisticHead(weight, bias, strength, loss, float((logits.argmax(1) == val_targets).mean()))
    assert best is not None  # noqa: S101 (for the type checker)
    return best

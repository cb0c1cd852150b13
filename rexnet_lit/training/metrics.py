"""Validation and test metrics, from torchmetrics: counted once per image, whatever the number of processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassF1Score


class Nll(MeanMetric):
    """Mean negative log-likelihood (nats) of the true class, without label smoothing.

    Each process adds up its own images, so unequal batches and processes average right. A loss that is not a number
    is shown as such: torchmetrics would leave it out.
    """

    def __init__(self) -> None:
        super().__init__(nan_strategy="disable")

    def update(self, logits: Tensor, targets: Tensor) -> None:  # type: ignore[override]
        """Add logits (B, K) and targets (B,)."""
        super().update(torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none"))


class CalibrationError(MulticlassCalibrationError):
    """Expected calibration error over 15 bins of confidence (Guo et al. 2017)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, n_bins=15, norm="l1", validate_args=False)

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add logits (B, K) and targets (B,)."""
        # torchmetrics takes logits that happen to lie in [0, 1] for probabilities, batch by batch.
        super().update(logits.float().softmax(1), targets)


def build_metrics(num_classes: int, prefix: str) -> MetricCollection:
    """Return the metrics of one stage, each updated with logits (B, K) and targets (B,).

    Args:
        num_classes: K.
        prefix: Put before each name, as in ``val/``.
    """
    metrics: dict[str, Metric | MetricCollection] = {
        "loss": Nll(),
        "top1": MulticlassAccuracy(num_classes, average="micro", validate_args=False),
        "macro_f1": MulticlassF1Score(num_classes, average="macro", validate_args=False),
        "ece": CalibrationError(num_classes),
    }
    if num_classes > 5:
        metrics["top5"] = MulticlassAccuracy(num_classes, top_k=5, average="micro", validate_args=False)
    return MetricCollection(metrics, prefix=prefix, compute_groups=False)

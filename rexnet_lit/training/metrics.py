"""Validation and test metrics, from torchmetrics: each image counts once, whatever the number of processes.

The state of a metric is what torchmetrics gathers over all processes. The last division is in float64 on the CPU, so
the screen, ``metrics.json`` and the report show the same digits (and a GPU without float64 can train).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassStatScores
from torchmetrics.utilities import dim_zero_cat

BINS = 15
"""Confidence bins of the calibration error."""


def probabilities(logits: Tensor) -> Tensor:
    """Return the float32 softmax of logits (B, K): what predictions are made of, rounding included."""
    return logits.float().softmax(1)


class NegativeLogLikelihood(Metric):
    """Mean negative log-likelihood (nats) of the true class, without label smoothing. NaN where a loss is NaN."""

    losses: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("losses", [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add logits (B, K) and targets (B,)."""
        self.losses.append(functional.cross_entropy(logits.float(), targets, reduction="none"))

    def compute(self) -> Tensor:
        """Return the mean."""
        return dim_zero_cat(self.losses).cpu().double().mean()


class Accuracy(MulticlassAccuracy):
    """Share of the images whose class is among the ``top_k`` most probable ones."""

    def __init__(self, num_classes: int, top_k: int = 1) -> None:
        super().__init__(num_classes, top_k=top_k, average="micro", validate_args=False)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add logits (B, K) and targets (B,)."""
        super().update(probabilities(preds), target)

    def compute(self) -> Tensor:
        """Return the share."""
        hits, misses = (cast(Tensor, state).sum().cpu().double() for state in (self.tp, self.fn))
        return hits / (hits + misses)


class MacroF1(MulticlassStatScores):
    """Macro F1, over the classes that occur among the targets or the predictions, as scikit-learn's ``f1_score``."""

    table: Tensor
    """Precision, recall, F1 and support of each class, (4, K), float64: of the last `compute`. 0/0 is 0."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, average=None, validate_args=False)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add logits (B, K) and targets (B,)."""
        super().update(probabilities(preds), target)

    def compute(self) -> Tensor:
        """Return the mean F1, and keep the figures of each class in `table`."""
        states = (self.tp, self.fp, self.fn)
        hits, wrong, missed = (cast(Tensor, state).reshape(-1).cpu().double() for state in states)
        occurs = hits + wrong + missed > 0
        precision, recall = hits / (hits + wrong), hits / (hits + missed)
        f1 = 2 * hits / (2 * hits + wrong + missed)
        self.table = torch.stack([precision.nan_to_num(), recall.nan_to_num(), f1.nan_to_num(), hits + missed])
        return f1[occurs].mean()


class CalibrationError(MulticlassCalibrationError):
    """Expected calibration error over 15 bins ``(m/15, (m+1)/15]`` of confidence (Guo et al. 2017).

    torchmetrics' own bins are closed on the left, so that a confidence of exactly 1 falls into a 16th.
    """

    confidences: list[Tensor]
    accuracies: list[Tensor]

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, n_bins=BINS, norm="l1", validate_args=False)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add logits (B, K) and targets (B,)."""
        # torchmetrics takes logits that happen to lie in [0, 1] for probabilities, batch by batch.
        super().update(probabilities(preds), target)

    def compute(self) -> Tensor:
        """Return the mean gap between confidence and accuracy, weighted by the bins' images."""
        confidences, hits = (dim_zero_cat(state).cpu().double() for state in (self.confidences, self.accuracies))
        bins = torch.bucketize(confidences, torch.linspace(0, 1, BINS + 1, dtype=torch.float64)[1:-1])
        gaps = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, hits - confidences)
        return gaps.abs().sum() / len(confidences)


def build_metrics(num_classes: int, prefix: str) -> MetricCollection:
    """Return the metrics of one stage, each updated with logits (B, K) and targets (B,).

    Args:
        num_classes: K.
        prefix: Put before each name, as in ``val/``.
    """
    metrics: dict[str, Metric | MetricCollection] = {
        "loss": NegativeLogLikelihood(),
        "top1": Accuracy(num_classes),
        "macro_f1": MacroF1(num_classes),
        "ece": CalibrationError(num_classes),
    }
    if num_classes > 5:
        metrics["top5"] = Accuracy(num_classes, top_k=5)
    return MetricCollection(metrics, prefix=prefix, compute_groups=False)


def test_results(metrics: MetricCollection) -> dict[str, Any]:
    """Return the figures of ``metrics.json`` in plain Python values; to be called in all processes.

    Args:
        metrics: What `build_metrics` returned, before its reset.

    Returns:
        ``top1``, ``top5`` (with more than 5 classes), ``macro_f1``, ``nll``, ``ece``, ``count``, and for each class,
        as lists of K, ``precision``, ``recall``, ``f1`` and ``support``.
    """
    values = {name: float(metric.compute()) for name, metric in metrics.items(keep_base=True)}
    precision, recall, f1, support = cast(MacroF1, metrics["macro_f1"]).table
    names = ("top1", *(["top5"] if "top5" in values else []), "macro_f1")
    return {
        **{name: values[name] for name in names},
        "nll": values["loss"],
        "ece": values["ece"],
        "count": int(support.sum()),
        "precision": precision.tolist(),
        "recall": recall.tolist(),
        "f1": f1.tolist(),
        "support": support.int().tolist(),
    }

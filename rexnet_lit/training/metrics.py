"""Validation and test metrics, from torchmetrics: each image counts once, whatever the number of processes.

torchmetrics gathers their states over all processes. The last division is in float64 on the CPU, so the screen,
``metrics.json`` and the report show the same digits (also with devices that have no float64).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassCalibrationError, MulticlassStatScores
from torchmetrics.utilities import dim_zero_cat

from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.reliability import confidence_bins, expected_calibration_error

_FIRST = ("top1", "top5", "macro_f1", "nll", "ece")  # in metrics.json
_STAGES = ("train", "val", "test")
_SHOWN_FIRST = ("loss", "top1", "top5", "macro_f1", "ece")


class _NegativeLogLikelihood(Metric):
    """Mean negative log-likelihood (nats) of the true class, without label smoothing. NaN if a loss is NaN."""

    losses: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("losses", [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        losses = functional.cross_entropy(logits.float(), targets, reduction="none")
        self.losses.append(losses.clamp(max=torch.finfo(torch.float32).max))  # JSON has no infinity

    def compute(self) -> Tensor:
        return dim_zero_cat(self.losses).cpu().double().mean()


class _FromLogits(Metric):
    """Passes on the float32 softmax of logits, which predictions are made of.

    torchmetrics takes logits that happen to lie in [0, 1] for probabilities, batch by batch.
    """

    def update(self, logits: Tensor, targets: Tensor) -> None:
        super().update(logits.float().softmax(1), targets)  # type: ignore[safe-super]


class _TopK(Metric):
    """Share of the images whose class is among the ``k`` most probable ones; of equals the lower index comes first."""

    hits: Tensor
    count: Tensor

    def __init__(self, k: int) -> None:
        super().__init__()
        self._k = k
        for name in ("hits", "count"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        probs = logits.float().softmax(1)  # as in the files of predictions
        own = probs.gather(1, targets[:, None])
        before = torch.arange(probs.shape[1], device=probs.device) < targets[:, None]
        rank = (~(probs <= own) | ((probs == own) & before)).sum(1)  # a NaN is a miss
        self.hits += (rank < self._k).sum()
        self.count += len(targets)

    def compute(self) -> Tensor:
        return self.hits.cpu().double() / self.count.cpu()


class _MacroF1(_FromLogits, MulticlassStatScores):
    """Macro F1 over the classes that have images: scikit-learn's ``f1_score`` with these as ``labels``.

    Without ``labels`` a class that is predicted, but has no images, would count as 0. A wrong prediction of it counts
    all the same, as a miss of the true class.
    """

    table: Tensor
    """Precision, recall, F1 and support of each class at the last `compute`, (4, K). 0/0 is 0."""

    def compute(self) -> Tensor:
        hits, wrong, missed = (cast(Tensor, state).cpu().double() for state in (self.tp, self.fp, self.fn))
        f1 = 2 * hits / (2 * hits + wrong + missed)
        rates = torch.stack([hits / (hits + wrong), hits / (hits + missed), f1]).nan_to_num()
        self.table = torch.cat([rates, (hits + missed)[None]])
        return f1[hits + missed > 0].mean()


class _CalibrationError(_FromLogits, MulticlassCalibrationError):
    """Expected calibration error over 15 bins ``(m/15, (m+1)/15]`` of confidence (Guo et al. 2017).

    torchmetrics' own bins are closed on the left, so that a confidence of exactly 1 falls into a 16th.
    """

    def compute(self) -> Tensor:
        confidences, hits = (dim_zero_cat(state).cpu().double() for state in (self.confidences, self.accuracies))
        bins = confidence_bins(confidences.numpy(), hits.numpy() > 0)
        return torch.tensor(expected_calibration_error(bins), dtype=torch.float64)


def build_metrics(num_classes: int, prefix: str) -> MetricCollection:
    """Return the metrics of one stage, each updated with logits (B, K) and targets (B,).

    Args:
        num_classes: K.
        prefix: Put before each name, as in ``val/``.
    """
    metrics: dict[str, Metric | MetricCollection] = {
        "loss": _NegativeLogLikelihood(),
        "top1": _TopK(1),
        "macro_f1": _MacroF1(num_classes, average=None, validate_args=False),
        "ece": _CalibrationError(num_classes, validate_args=False),
    }
    if num_classes > 5:
        metrics["top5"] = _TopK(5)
    return MetricCollection(metrics, prefix=prefix, compute_groups=False)


def require_updates(metrics: MetricCollection, batches: Sequence[float]) -> None:
    """Check that a user's own steps have updated the metrics.

    Args:
        metrics: What `build_metrics` returned.
        batches: How many batches each loader had in this process.

    Raises:
        UserError: There were batches, and no update.
    """
    if sum(batches) and not any(metric.update_called for metric in metrics.values()):
        name = str(next(iter(metrics.keys()))).partition("/")[0]
        step = {"val": "validation_step"}.get(name, f"{name}_step")
        how = f"call super().{step}(batch, batch_idx), or self.{name}_metrics.update(logits, targets)"
        raise UserError(f"no predictions were counted: {step} must {how}")


def stage_results(metrics: MetricCollection) -> dict[str, Any]:
    """Return the content of ``metrics.json`` as plain Python values; must be called on all processes.

    Args:
        metrics: What `build_metrics` returned, before its reset.

    Returns:
        Each metric by its name (``loss`` as ``nll``), ``count``, and for each class, as lists of K, ``precision``,
        ``recall``, ``f1`` and ``support``.
    """
    values = {name: float(metric.compute()) for name, metric in metrics.items(keep_base=True)}
    values["nll"] = values.pop("loss")
    precision, recall, f1, support = cast(_MacroF1, metrics["macro_f1"]).table
    return {
        **{name: values[name] for name in _FIRST if name in values},
        **{name: value for name, value in values.items() if name not in _FIRST},
        "count": int(support.sum()),
        "precision": precision.tolist(),
        "recall": recall.tolist(),
        "f1": f1.tolist(),
        "support": support.int().tolist(),
    }


def classes_without_images(metrics: MetricCollection, class_names: Sequence[str]) -> list[str]:
    """Return the classes that had no images at the last `stage_results` or ``compute``."""
    support = cast(_MacroF1, metrics["macro_f1"]).table[3].tolist()
    return [name for name, count in zip(class_names, support, strict=True) if not count]


def main_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of each stage, the most important first; without learning rates and losses of single steps."""
    names = [name for name in metrics if name.partition("/")[0] in _STAGES and not name.endswith("_step")]
    ranks = {f"{stage}/{name}": rank for rank, (stage, name) in enumerate(itertools.product(_STAGES, _SHOWN_FIRST))}
    return {name: float(metrics[name]) for name in sorted(names, key=lambda name: ranks.get(name, len(ranks)))}

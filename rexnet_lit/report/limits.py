"""What the report says of the limits of the answers: the risk-coverage curve, prediction sets, unsure, strangers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rexnet_lit.report.tables import wilson_interval

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rexnet_lit.report.predictions import Limited, Predictions


@dataclass(frozen=True)
class Strangers:
    """A model's answers to images of other things.

    Args:
        name: Their folder.
        strangeness: How unlike the images that the model knows each one is, (M,).
        confidence: That of the answer to each, (M,).
    """

    name: str
    strangeness: NDArray[np.float64]
    confidence: NDArray[np.float32]


def risk_coverage(p: Predictions) -> NDArray[np.float64]:
    """Return the share of mistakes among the 1, 2, ..., N most confident answers, (N,); the mean is the area (AURC).

    Answers of equal confidence share their mistakes, so that their order does not matter.
    """
    order = np.argsort(-p.confidence, kind="stable")
    wrong = (p.predicted != p.truth)[order].astype(np.float64)
    _, first, count = np.unique(-p.confidence[order], return_index=True, return_counts=True)
    wrong = np.repeat(np.add.reduceat(wrong, first) / count, count)
    return np.asarray(wrong.cumsum() / np.arange(1, len(wrong) + 1))


def limits_of(p: Predictions, risk: NDArray[np.float64], strangers: Strangers | None) -> dict[str, Any]:
    """Return what ``metrics.json`` says of the limits, as fractions; nothing for a model without them.

    Args:
        p: The predictions.
        risk: What `risk_coverage` returned for them.
        strangers: The answers to images of other things.
    """
    if p.limited is None:
        return {}
    found: Limited = p.limited
    covered, right = found.sets[np.arange(len(p.truth)), p.truth], p.predicted == p.truth
    sizes, sure = found.sets.sum(1), ~found.unsure
    per_class = {
        p.names[k]: _share(covered[p.truth == k]) | {"mean_size": float(sizes[p.truth == k].mean())}
        for k in np.unique(p.truth).tolist()
    }
    limits: dict[str, Any] = {
        "aurc": float(risk.mean()),
        "sets": {
            "asked": found.coverage, **_share(covered),
            "mean_size": float(sizes.mean()), "empty": float((sizes == 0).mean()),
        },
        "sets_per_class": per_class,
        "sure": {"confidence": found.confidence, "target_precision": found.precision, "answers": float(sure.mean())},
        "stranger": {} if np.isnan(found.strangeness).any() else {"false_alarms": float(found.stranger.mean())},
    }  # fmt: skip
    if sure.any():
        limits["sure"] |= {"precision": float(right[sure].mean()), "interval": _share(right[sure])["interval"]}
    if strangers is not None:
        from sklearn.metrics import roc_auc_score

        labels = np.repeat([0, 1], [len(p.truth), len(strangers.strangeness)])
        by_strangeness = np.concatenate([found.strangeness, strangers.strangeness])
        by_confidence = -np.concatenate([p.confidence, strangers.confidence])
        limits["stranger"] |= {
            "folder": strangers.name,
            "images": len(strangers.strangeness),
            "recognised": float((strangers.strangeness > 1).mean()),
            "auroc": float(roc_auc_score(labels, by_strangeness)),
            "auroc_of_confidence": float(roc_auc_score(labels, by_confidence)),
        }
    return {"limits": limits}


def _share(hits: NDArray[np.bool_]) -> dict[str, Any]:
    """Return the share of hits, with its 95 % confidence interval."""
    return {"coverage": float(hits.mean()), "interval": list(wilson_interval(int(hits.sum()), len(hits)))}

"""The report of a test."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from rexnet_lit.callbacks.console import SHOWN_METRICS
from rexnet_lit.callbacks.predictions import PredictionCollector
from rexnet_lit.data import decode, verify
from rexnet_lit.data.datamodule import find_datamodule
from rexnet_lit.models import checkpoint
from rexnet_lit.report.predictions import Predictions
from rexnet_lit.report.test_page import write_report
from rexnet_lit.training.metrics import test_results
from rexnet_lit.training.module import RexNetModule
from rexnet_lit.utils.files import unused_path


class TestReport(PredictionCollector):
    """Writes ``report/`` after a test.

    Args:
        folder: The run folder to write into.
    """

    __test__ = False  # no test case, whatever pytest makes of the name

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.metrics: Mapping[str, Any] = {}

    def on_test_batch_end(  # noqa: D102
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        self._add(batch_idx, outputs)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report."""
        data = find_datamodule(trainer)
        if data is None or not isinstance(pl_module, RexNetModule):
            return
        found, probs = self._gather(trainer)
        results = test_results(pl_module.test_metrics)  # gathers, so on every process
        total = len(data.splits()["test"])
        samples = data.splits()["test"].take(found)
        if not trainer.is_global_zero:
            return
        spec = pl_module.spec
        predictions = Predictions(samples.paths, probs, samples.targets, spec.class_names)
        facts = {
            "Model": f"{spec.backbone}, {spec.head.name} head",
            "Input": f"{spec.eval_recipe.image_size} x {spec.eval_recipe.image_size} pixels",
            "Classes": str(spec.num_classes),
            "Test images": f"{len(samples)} of {total}" if len(samples) < total else str(total),
            "Unreadable images left out": str(len(data.bad_files)),
        }
        target = self.folder / "report"
        if target.exists():  # the newest report has the name, and no earlier one is lost
            target.rename(unused_path(target))
        root = samples.root
        self.metrics = write_report(
            target,
            predictions,
            results,
            read_image=lambda path: decode.read(root / path, 160),
            title=f"Test report: {Path(root).name}",
            facts=facts,
            history=_history(self.folder / "metrics.csv"),
            weights=checkpoint.digest(pl_module.network.state_dict()),
        )
        if data.bad_files:
            verify.write_quarantine(data.bad_files, target / "quarantine.csv")


def _history(path: Path) -> list[dict[str, float]]:
    """Return the epochs' figures from a run's ``metrics.csv``, where it has one."""
    if not path.is_file():
        return []
    epochs: dict[int, dict[str, float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            shown = {k: float(row[k]) for k in SHOWN_METRICS if row.get(k)}
            if shown and row.get("epoch"):
                epoch = int(float(row["epoch"]))
                epochs.setdefault(epoch, {"epoch": epoch}).update(shown)
    return [epochs[epoch] for epoch in sorted(epochs)]

"""The report of a test or of a validation."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from rexnet_lit.data import decode, quarantine, verify
from rexnet_lit.data.datamodule import ImageFolderDataModule, find_datamodule
from rexnet_lit.data.fixes import sha256_of
from rexnet_lit.data.splits import Split
from rexnet_lit.models import checkpoint
from rexnet_lit.report.limits import Strangers
from rexnet_lit.report.predictions import Predictions
from rexnet_lit.report.test_page import write_report
from rexnet_lit.training.callbacks import evidence
from rexnet_lit.training.callbacks.predictions import LimitsCollector
from rexnet_lit.training.features import embedder, head_logits
from rexnet_lit.training.metrics import main_metrics, stage_results
from rexnet_lit.training.module import RexNetModule
from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.files import unused_path


class EvaluationReport(LimitsCollector):
    """Writes ``report/`` into the run folder ``folder`` after a test or a validation."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.metrics: dict[str, Any] = {}

    on_test_batch_end = on_validation_batch_end = LimitsCollector.collect

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that strangers can be told."""
        super().setup(trainer, pl_module, stage)
        data = find_datamodule(trainer)
        known = self._limits.known if self._limits is not None else None
        if stage == "test" and data is not None and data.strangers is not None and known is None:
            raise UserError(
                "data.strangers: there are no limits to tell strangers by: fit with 20 or more validation images ("
                "crossval --ship refit has none), and test at the model's own data.image_size and data.crop_mode"
            )

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report of a test."""
        self._write(trainer, pl_module, "test")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report of a validation."""
        self._write(trainer, pl_module, "val")

    def _write(self, trainer: Trainer, pl_module: LightningModule, split: Split) -> None:
        data = find_datamodule(trainer)
        if data is None or not isinstance(pl_module, RexNetModule):
            return
        indices, probs = self.gather(trainer)
        found = self.gather_limited(trainer, probs)
        strangers = _strangers(pl_module, data) if split == "test" else None
        metrics = pl_module.test_metrics if split == "test" else pl_module.val_metrics
        self.metrics = {**stage_results(metrics), "split": split}
        spec, images = pl_module.spec, data.splits()[split]
        samples, size = images.take(indices), spec.eval_recipe.image_size
        explains = spec.network is None and bool((probs.argmax(1) != samples.targets).any())
        trained_on = evidence.embed_training_images(pl_module, data) if explains else None
        if not trainer.is_global_zero:
            return
        name = {"test": "Test", "val": "Validation"}[split]
        facts = {
            "Model": f"{spec.backbone}, {spec.head.name} head",
            "Input": f"{size} x {size} pixels",
            "Classes": str(spec.num_classes),
            f"{name} images": f"{len(samples)} of {len(images)}" if len(samples) < len(images) else str(len(images)),
            "Left out as unreadable": str(len(data.bad_files)),
        }
        if strangers is not None and data.strangers is not None:
            facts["Strangers"] = (
                f"{strangers.name}, {len(strangers.confidence)} of {len(data.strangers)} images readable"
            )
        predictions = Predictions(list(samples.paths), probs, samples.targets, spec.class_names, found)
        target, root = self.folder / "report", samples.root
        if target.exists():  # the newest report gets the name; earlier ones are kept
            target.rename(unused_path(target))
        self.metrics = write_report(
            target,
            predictions,
            self.metrics,
            read_image=lambda path: decode.read(root / path, 160),
            title=f"{name} report: {Path(root).name}",
            facts=facts,
            history=history_of(self.folder / "metrics.csv"),
            sha256=lambda path: sha256_of(root / path),
            weights=checkpoint.digest(pl_module.network.state_dict()),
            strangers=strangers,
            explain=evidence.explainer(pl_module, root, trained_on) if explains else None,
            compared=evidence.describe(trained_on, data) if explains else "",
        )
        if data.bad_files:
            verify.write_quarantine(data.bad_files, target / "quarantine.csv")


def _strangers(module: RexNetModule, data: ImageFolderDataModule) -> Strangers | None:
    """Return the predictions for the images of ``data.strangers``, or None if it is not set."""
    limits = module.spec.limits
    if data.strangers is None or limits is None or limits.known is None:
        return None
    samples = quarantine.without_bad(data.strangers, verify.find_unreadable(data.strangers))
    features = data.compute_features(samples, embedder(module))[0]
    confidence = head_logits(module, features).softmax(1).max(1).values
    return Strangers(samples.root.name, limits.strangeness(features.numpy()), confidence.numpy())


def history_of(path: Path) -> list[dict[str, float]]:
    """Return the metrics of each epoch from a run's ``metrics.csv``, if it has one, and ``epoch``, from 0."""
    if not path.is_file():
        return []
    epochs: dict[int, dict[str, float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            shown = main_metrics({name: value for name, value in row.items() if name and value})
            if shown and row.get("epoch"):
                epoch = int(float(row["epoch"]))
                epochs.setdefault(epoch, {"epoch": epoch}).update(shown)
    return [epochs[epoch] for epoch in sorted(epochs)]

"""What a run prints on the screen: when it starts, and after validate, test and predict."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from lightning.pytorch import Trainer

from rexnet_lit.data.datamodule import ImageFolderDataModule
from rexnet_lit.data.splits import first_few
from rexnet_lit.report.predictions import Predictions, set_names
from rexnet_lit.training.callbacks.console import print_table
from rexnet_lit.training.callbacks.predictions import PredictionWriter
from rexnet_lit.training.metrics import classes_without_images, main_metrics
from rexnet_lit.training.module import RexNetModule
from rexnet_lit.utils.errors import plural, printable

_IGNORED_WARNINGS = (
    ".*does not have many workers.*",
    ".*The number of training batches .* is smaller than the logging interval.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*Experiment logs directory .* exists and is not empty.*",  # TensorBoard and metrics.csv share it
    ".*GPU available but not used.*",
    ".*AccumulateGrad node's stream does not match.*",  # Lightning builds DDP in a stream of its own
    ".*isinstance\\(treespec, LeafSpec\\).*",
)


def silence_libraries() -> None:
    """Hide the log lines and warnings that are of no use to a user."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # about calls by Lightning
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Reports which process of a distributed run has died; all others are then killed.
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    for message in _IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def print_notes(notes: Iterable[str]) -> None:
    """Print a line for each note."""
    for note in notes:
        print(f"note: {note}", flush=True)  # noqa: T201


def print_start(trainer: Trainer, model: RexNetModule, data: ImageFolderDataModule) -> None:
    """Print what a fit trains, on what, and the notes about the folder."""
    counts = ", ".join(f"{len(samples)} {name}" for name, samples in data.splits().items())
    counts += f", {len(data.unlabelled)} without labels" if data.unlabelled is not None else ""
    millions = sum(p.numel() for p in model.network.parameters()) / 1e6
    print(  # noqa: T201
        f"{model.spec.backbone} ({millions:.1f} M parameters) on {trainer.world_size} x "
        f"{trainer.strategy.root_device.type}; {data.num_classes} classes; images: {counts}",
        flush=True,
    )
    if data.folder:
        print_notes(data.folder.notes)
        if data.folder.clutter:
            many = plural(data.folder.clutter, "file or folder that is not an image", "files or folders without images")
            print_notes([f"ignored {many}"])


def print_metrics(trainer: Trainer, data: ImageFolderDataModule, title: str, listed: Path | None = None) -> None:
    """Print the metrics, and the images that they leave out."""
    values = main_metrics(trainer.callback_metrics)
    print_table(title, [(name.partition("/")[2], f"{value:.4f}") for name, value in values.items()])
    module = trainer.lightning_module
    if isinstance(module, RexNetModule):
        metrics, names = module.test_metrics if title.startswith("Test") else module.val_metrics, data.class_names
        absent = classes_without_images(metrics, names)
        if absent:
            what = f"{len(absent)} of {len(names)} classes have no images here"
            print_notes([f"{what}, and no part in macro F1: {first_few(absent)}"])
    print_unreadable(data, listed)


def print_predictions(writer: PredictionWriter, data: ImageFolderDataModule) -> None:
    """Print the first predictions, and where all of them are."""
    found = writer.predictions
    if found is None:
        return
    best = found.probs.argmax(1)
    labels = [printable(found.class_names[k]) for k in best[:10]]
    rows = zip(found.paths, labels, found.probs.max(1), _remarks(found), strict=False)
    print_table("Predictions", [(printable(path), f"{label}  {prob:.3f}{more}") for path, label, prob, more in rows])
    more = f" ({len(best)} images)" if len(best) > 10 else ""
    print(f"predictions: {writer.path}{more}")  # noqa: T201
    print_notes(data.predict_notes)
    print_unreadable(data, writer.quarantined)


def _remarks(p: Predictions) -> Iterator[str]:
    """Yield what is to be said of each answer beside its confidence: unsure, stranger, and its set of several."""
    for index in range(len(p.paths)):
        found = p.limited
        words = []
        if found is not None:
            words = [word for word in ("unsure", "stranger") if getattr(found, word)[index]]
            words += [f"set: {set_names(p, index)}"] if found.sets[index].sum() > 1 else []
        yield f"  ({'; '.join(words)})" if words else ""


def print_unreadable(data: ImageFolderDataModule, listed: Path | None) -> None:
    """Print how many images could not be read, and where they are listed."""
    bad = data.bad_files
    if bad:
        first = f"{printable(bad[0].path)}: {printable(bad[0].reason)}"
        where = f"; all are listed in {listed}" if listed else ""
        print(f"left out as unreadable: {plural(len(bad), 'image', 'images')}, first {first}{where}")  # noqa: T201

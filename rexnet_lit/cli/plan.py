"""`plan`: what a fit will take, before it is started."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from rexnet_lit.cli import several_runs
from rexnet_lit.cli.tables import table
from rexnet_lit.search import plan
from rexnet_lit.search.plan import NoPictures, ShortFit, Stopwatch, TimedChoice, Times, Work
from rexnet_lit.training.callbacks.console import print_table
from rexnet_lit.utils import process
from rexnet_lit.utils.errors import Stopped, UserError, plural

_SAFE = {
    "trainer.logger": None,  # the user's own may send what it gets to a server
    "trainer.callbacks": None,
    "trainer.devices": 1,
    "trainer.num_nodes": 1,
    "trainer.strategy": "auto",
    "trainer.max_steps": -1,
    "trainer.min_epochs": None,
    "trainer.min_steps": None,
    "trainer.max_time": None,
    "trainer.limit_train_batches": plan.STEPS,
    "trainer.limit_val_batches": plan.STEPS,
    "trainer.val_check_interval": None,
    "trainer.check_val_every_n_epoch": 1,
    "trainer.enable_progress_bar": False,
    "data.max_bad_fraction": 1.0,
    "data.size_schedule": None,
}


class ShortRuns(several_runs.SeveralRuns):
    """Short fits on some of the images."""

    sizes: dict[str, int]
    """Number of images of each split, of the whole folder."""
    watch: Stopwatch
    count: int

    def before_fit(self) -> None:
        """Leave out most of the images, and start the stopwatch."""
        data = self.datamodule
        folder = data.folder
        self.sizes = {name: len(samples) for name, samples in folder.splits.items()}
        splits = {name: plan.some_of_each_class(samples, self.count) for name, samples in folder.splits.items()}
        data.folder = dataclasses.replace(folder, splits=splits)
        self.sizes["train"], data.unlabelled = self.sizes["train"] + len(data.unlabelled or ()), None
        if data.cache in ("auto", "ram"):  # images are kept in memory if all of them would be
            share = sum(map(len, splits.values())) / sum(self.sizes.values())
            limit = data._cache_bytes or process.available_memory() / (4 if data.cache == "auto" else 2)
            data._cache_bytes = limit * share
        watching = [self.watch, TimedChoice(self.watch), NoPictures()]
        self.trainer.callbacks[:0] = watching  # type: ignore[attr-defined]
        super().before_fit()

    def measure(self, folder: Path, batch: int, steps: int, epochs: int) -> ShortFit:
        """Train for a few steps in a folder; return what it took."""
        self.watch, self.count = Stopwatch(), batch * steps
        root = {"trainer.default_root_dir": str(folder), "trainer.max_epochs": epochs, "data.batch_size": batch}
        strategy = self.settings["model"]["strategy"]["name"]
        changes = {**_SAFE, **root, "model.strategy.name": "full" if strategy == "staged" else strategy}
        with contextlib.redirect_stdout(io.StringIO()):
            self.train(changes)
        self.watch.stop()
        splits = {name: len(samples) for name, samples in self.datamodule.folder.splits.items()}
        train, val = (min(splits.get(name, 0), batch * plan.STEPS) for name in ("train", "val"))
        return ShortFit(self.watch, min(batch, train), train, val, plan.peak_memory(self.model.device))


def run_plan(argv: Sequence[str]) -> int:
    """Run `plan`."""
    about = (
        "Measure a few steps of a fit, and print what the whole fit will take: time, memory and disk. Nothing is "
        "written into your folders."
    )
    _, rest = several_runs.options_parser("plan", "", about).parse_known_args(argv[1:])
    runs = several_runs.parse(rest, ShortRuns)
    assert isinstance(runs, ShortRuns)  # noqa: S101 (for the type checker)
    settings = runs.settings
    batch = settings["data"]["batch_size"]
    if settings["trainer"]["max_epochs"] in (None, -1) and settings["trainer"]["max_steps"] in (None, -1):
        raise UserError("plan: the fit has no end; set trainer.max_epochs or trainer.max_steps")
    print("Measuring a few steps; this takes as long as about 25 steps of the fit.", flush=True)  # noqa: T201
    imports = time.process_time()
    with tempfile.TemporaryDirectory(prefix="rexnet_lit_plan_") as temporary:
        try:
            cold = runs.measure(Path(temporary, "cold"), max(2, batch // 2), 3, 1)
            gc.collect()
            warm = runs.measure(Path(temporary, "warm"), batch, plan.STEPS, plan.EPOCHS)
        except Stopped as stop:
            raise Stopped(stop.exit_code - 128, "stopped; nothing was written") from None
        disk = _disk_bytes(Path(temporary, "warm"))
    devices = _devices(settings["trainer"], runs.model.device)
    work = plan.work_of(settings["trainer"], runs.sizes, batch, devices)
    if runs.model.strategy_settings.only_solves:
        work = dataclasses.replace(work, epochs=1, validations=1)
    work = dataclasses.replace(work, selects=runs.model.blends)
    times = plan.estimate_times(cold, warm, work, imports, runs.datamodule.num_classes)
    _print(runs, work, times, warm.batch, devices, disk)
    _print_memory(cold, warm, runs.model.device, runs.sizes["train"])
    for note in _notes(settings, devices):
        print(f"note: {note}")  # noqa: T201
    return 0


def _devices(trainer: Mapping[str, Any], device: torch.device) -> int:
    """Return on how many devices the fit will run."""
    devices = trainer["devices"]
    if isinstance(devices, list):
        count = len(devices)
    elif str(devices) in ("auto", "-1"):
        count = torch.cuda.device_count() if device.type == "cuda" else 1
    else:
        count = len(str(devices).split(",")) if "," in str(devices) else int(devices)
    return count * int(trainer["num_nodes"])


def _disk_bytes(folder: Path) -> tuple[int, int]:
    """Return what a run folder takes, and what it takes while the largest of its files is replaced."""
    found = {(status.st_dev, status.st_ino): status.st_size for status in map(os.stat, folder.rglob("*.*"))}
    return sum(found.values()), sum(found.values()) + max(found.values(), default=0)


def _print(runs: ShortRuns, work: Work, times: Times, images: int, devices: int, disk: tuple[int, int]) -> None:
    network = runs.model.network
    parameters = sum(p.numel() for p in network.parameters()) / 1e6
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad) / 1e6
    epochs = "epoch" if work.epochs == 1 else "epochs"
    rows = [
        ("parameters", f"{parameters:.2f} M, {trained:.2f} M of them trained"),
        ("images", ", ".join(f"{count:,} {name}" for name, count in runs.sizes.items())),
        ("steps", f"{work.steps:,} per epoch, {round(work.steps * work.epochs):,} in {work.epochs:g} {epochs}"),
        ("a step", f"{times.step:.3g} s, {images * devices / times.step:,.0f} images/s"),
        *((f"time: {name}", _duration(getattr(times, name))) for name in ("start", "training", "validation", "saving")),
        ("time: end", _duration(times.end)),
        ("time in all", _duration(times.total)),
        ("disk", f"{disk[0] / 1e6:,.0f} MB; {disk[1] / 1e6:,.0f} MB while a checkpoint is written"),
    ]
    print_table(f"Plan: {runs.model.spec.backbone} on {plural(devices, 'device', 'devices')}", rows)


def _print_memory(cold: ShortFit, warm: ShortFit, device: torch.device, images: int) -> None:
    if not plan.memory_of(cold, warm, warm.batch):
        print("memory: not known for this system, or too few images to measure it")  # noqa: T201
        return
    listed = table("batch size", "memory of the GPU" if device.type == "cuda" else "memory of the main process")
    batches = sorted({warm.batch, *(2**n for n in range(3, 10))})
    for batch in batches:
        mark = " (this fit)" if batch == warm.batch else ""
        listed.add_row(f"{batch}{mark}", f"{plan.memory_of(cold, warm, batch) / 2**30:.2f} GiB")
    Console().print(listed)
    memory = plan.all_memory(device, warm.memory)
    largest = plan.largest_batch(cold, warm, memory, images)
    fits = f"the largest batch that fits is about {largest}" if largest else "not even a batch of 8 fits"
    if largest and plan.memory_of(cold, warm, largest + 8) <= plan.MARGIN * memory:
        fits = f"a batch of {largest} fits, and larger ones would have more images than there are to train on"
    Console().print(Text(f"{memory / 2**30:.1f} GiB are free for it; {fits}"))


def _notes(settings: Mapping[str, Any], devices: int) -> list[str]:
    """Return what the figures leave out."""
    trainer, found = settings["trainer"], []
    if devices > 1:
        found.append("measured on one device; what several devices spend on communication is not included")
    if settings["model"]["strategy"]["name"] == "staged":
        found.append("model.strategy staged is counted as if all layers trained in all epochs; it takes less")
    if settings["data"]["size_schedule"]:
        found.append("data.size_schedule is counted as if all epochs had the full size; it takes less")
    if trainer["callbacks"]:
        found.append("trainer.callbacks are left out")
    if trainer["max_time"] is not None or trainer["val_check_interval"] not in (None, 1.0):
        found.append("trainer.max_time and val_check_interval are not considered")
    return found


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 2:
        return f"{seconds:.1f} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"

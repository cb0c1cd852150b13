"""The commands, and what each of them adds to the command line.

To add a command, write a function that runs it and enter it in `COMMANDS` with its arguments.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rexnet_lit.cli import shipped_configs
from rexnet_lit.data.settings import DataRecord, EvalRecipe
from rexnet_lit.export.formats import FORMATS
from rexnet_lit.utils import process
from rexnet_lit.utils.errors import UserError, plural, printable
from rexnet_lit.utils.files import expand_home, is_url

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rexnet_lit.checks.findings import CheckResult
    from rexnet_lit.data.augmentation import AugmentSettings


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: its line in ``--help``, the function that runs it and returns the exit code, and its arguments.

    ``arguments`` maps each name to the keywords of `argparse.ArgumentParser.add_argument`. It is None for a command
    that parses ``args.argv`` itself.
    """

    help: str
    run: Callable[[argparse.Namespace], int]
    arguments: Mapping[str, Mapping[str, Any]] | None = None


def _run_lightning(args: argparse.Namespace) -> int:
    with process.gc_paused():
        from rexnet_lit.cli.lightning_cli import RexNetCLI

    RexNetCLI.run(args.argv)
    return 0


def _check(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from rexnet_lit.checks import check, findings

    if not args.dir or not (is_url(args.dir) or Path(args.dir).is_dir()):
        raise UserError(f"check: there is no folder {args.dir!r}")
    if args.report:
        from rexnet_lit.report.html import check_page

        check_page(Path(args.report))
    sources = [name for name in ("model", "weights", "predictions") if getattr(args, name) is not None]
    if sources and not args.labels:
        raise UserError(f"check: --{sources[0]} is for --labels; add it")
    if len(sources) > 1:
        raise UserError(f"check: --{' and --'.join(sources)} exclude each other; give one")
    record, augment, recipe = DataRecord(), None, EvalRecipe()
    settings = None
    if args.config:
        from rexnet_lit.cli.config import read_for_check

        settings = read_for_check(args.config)
        record, augment, recipe = settings.record, settings.augment, settings.recipe
    if args.labels_table:
        record = dataclasses.replace(record, labels=args.labels_table)
    console = Console(stderr=True)  # stdout may be JSON
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:

        def show(title: str) -> Callable[[int, int], None]:
            task = bar.add_task(title)
            return lambda done, total: bar.update(task, completed=done, total=total)

        embed = None
        if args.labels and args.predictions is None:
            from rexnet_lit.cli.label_features import build_embedder

            embed = build_embedder(args.model, args.weights, settings, show)
        result = check.check(
            args.dir, record, recipe, progress=show("checking the images"), embed=embed, predictions=args.predictions
        )
    if args.json:
        print(json.dumps(result.to_dict(), indent=2))  # noqa: T201
    else:
        findings.print_result(result, Console())
    if args.report:
        _write_page(args, result, augment, recipe)
        print(f"report: {args.report}", file=sys.stderr)  # noqa: T201 (stdout may be JSON)
    warns = any(finding.severity == "warning" for finding in result.findings)
    return 1 if not result.ok or (args.strict and warns) else 0


def _write_page(
    args: argparse.Namespace, result: CheckResult, augment: AugmentSettings | None, recipe: EvalRecipe
) -> None:
    from rexnet_lit.data import decode, fixes
    from rexnet_lit.report import dataset_page

    def read(path: str) -> NDArray[np.uint8]:
        return decode.read(Path(result.root) / path, dataset_page.LARGE)

    def sha256(path: str) -> str:
        return fixes.sha256_of(Path(result.root) / path)

    samples = _augmented_samples(result, read, augment, recipe) if augment else []
    config = Path(args.config).name if args.config else ""
    dataset_page.write_dataset_page(
        args.report, result, read_image=read, sha256=sha256, augmented=samples, config=config
    )


def _fix(args: argparse.Namespace) -> int:
    from rexnet_lit.data.fixed_copy import write_fixed_copy

    folder = write_fixed_copy(args.dir, args.fixes, args.output, link=args.link)
    count = sum(map(len, folder.splits.values()))
    print(f"{args.output}: {count} images; {printable(folder.fixes.summary)}")  # noqa: T201
    return 0


def _pack(args: argparse.Namespace) -> int:
    from rexnet_lit.data.pack import pack

    packed = pack(args.dir, args.output)
    images, shards = plural(packed.images, "image", "images"), plural(packed.shards, "shard", "shards")
    print(f"{args.output}: {images} in {shards}, {packed.size / 1e6:,.1f} MB")  # noqa: T201
    for note in packed.notes:
        print(f"note: {printable(note)}")  # noqa: T201
    print(f"train on it with: rexnet-lit fit {shlex.quote(args.output)}")  # noqa: T201
    return 0


def _augmented_samples(
    result: CheckResult, read: Callable[[str], NDArray[np.uint8]], augment: AugmentSettings, recipe: EvalRecipe
) -> list[tuple[str, str, NDArray[np.uint8]]]:
    """Return path, caption and image for four training images, each as it is and with three augmentations."""
    from rexnet_lit.data.transforms import TrainTransform

    transform = TrainTransform(augment, recipe, recipe.image_size)
    bad = {row.path for row in result.bad}
    paths = [path for split, _, path in result.examples if split == "train" and path not in bad]
    samples = []
    for path in paths[:: max(1, len(paths) // 4)][:4]:
        image = read(path)
        views = [(f"epoch {seed}", transform.augment(image, seed)) for seed in (1, 2, 3)]
        samples += [(path, caption, view) for caption, view in [("original", image), *views]]
    return samples


def _compare(args: argparse.Namespace) -> int:
    from rexnet_lit.cli.compare import compare

    compare(args.runs, as_json=args.json, page=args.report)
    return 0


def _several_runs(args: argparse.Namespace) -> int:
    with process.gc_paused():
        from rexnet_lit.cli import plan, several_runs, tune

    runs = {"tune": tune.run_tune, "crossval": several_runs.run_crossval, "plan": plan.run_plan}
    return runs[args.command](args.argv)


def _similar(args: argparse.Namespace) -> int:
    with process.gc_paused():
        from rexnet_lit.cli.similar import similar

    similar(args.query, args.index, args.model, top=args.top, as_json=args.json, page=args.report)
    return 0


def _completion(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("shtab") is None:
        raise UserError("completion needs the package shtab; install the extra: pip install 'rexnet-lit[completion]'")
    from rexnet_lit.cli.completion import PrintCompletion
    from rexnet_lit.cli.main import build_parser

    PrintCompletion.parser_of_commands = build_parser()
    PrintCompletion.run(args.argv)
    return 0


def _configs(args: argparse.Namespace) -> int:
    if args.name:
        print(shipped_configs.named(args.name).read_text("utf-8"), end="")  # noqa: T201
        return 0
    known = shipped_configs.shipped()
    width = max(map(len, known))
    for name, file in known.items():
        print(f"{name:{width}}  {shipped_configs.summary(file)}")  # noqa: T201
    return 0


def _models(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    with process.gc_paused():
        from rexnet_lit.models.variants import variants

    table = Table("name", box=None, header_style="bold")
    for title in ("parameters", "multiply-adds", "features"):
        table.add_column(title, justify="right")
    for title in ("weights", "top-1 % at 224 / 288 px"):
        table.add_column(title)
    for v in variants():
        adds = f"{v.multiply_adds / 1e6:,.1f} M"
        for i, tag in enumerate(v.weights or ("none",)):
            cells = (v.name, f"{v.parameters:,}", adds, str(v.features)) if i == 0 else ("",) * 4
            table.add_row(*cells, tag, v.top1.get(tag, "-"))
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    print("multiply-adds: one image at 224 px; top-1: ImageNet, published by timm")  # noqa: T201
    return 0


def _sample(args: argparse.Namespace) -> int:
    from rexnet_lit.data.sample import write_sample

    counts = write_sample(args.dir)
    print(f"{args.dir}: 10 classes, " + ", ".join(f"{n} {split}" for split, n in counts.items()))  # noqa: T201
    return 0


def _export(args: argparse.Namespace) -> int:
    with process.gc_paused():
        from rexnet_lit.export.export import export

    parity = export(args.model, args.format, args.output, args.images)
    load = f"; load it with torch.export.load({args.output!r}).module()" if args.format == "torch" else ""
    print(  # noqa: T201
        f"{args.output}: {parity.size / 1e6:.1f} MB; compared with the model on {parity.images} images: "
        f"probabilities differ by at most {parity.difference:.1g}, {parity.same:.1%} get the same class{load}"
    )
    return 0


def _demo(args: argparse.Namespace) -> int:
    with process.gc_paused():
        from rexnet_lit.cli.demo import serve

    serve(args.model, args.index, args.host, args.port)
    return 0


def _path(metavar: str, help_: str, **more: Any) -> dict[str, Any]:
    """Return the keywords of an argument that is a file or a folder."""
    return {"type": expand_home, "metavar": metavar, "help": help_, **more}


COMMANDS = {
    "fit": Command("train a classifier on a folder of images", _run_lightning),
    "validate": Command("evaluate a model on the validation split", _run_lightning),
    "test": Command("evaluate a model on the test split and write report/", _run_lightning),
    "predict": Command("classify unlabelled images and write a CSV", _run_lightning),
    "check": Command(
        "find problems in a folder of images",
        _check,
        {
            "dir": _path("DIR", "contains train/ val/ [test/], or class folders"),
            "--json": {"action": "store_true", "help": "print the findings as JSON"},
            "--report": _path(
                "FILE.html", "write a page with images of every class, on which wrong labels and duplicates are decided"
            ),
            "--config": _path("FILE.yaml", "split the folder, and show augmented images, as this config"),
            "--labels": {"action": "store_true", "help": "find wrong labels, by the features of a pretrained network"},
            "--model": _path("MODEL", "for --labels: a model of a run; finds more"),
            "--weights": _path("FILE", "for --labels: a timm state dict; default: timm's published weights"),
            "--predictions": _path(
                "FILE.csv", "for --labels: predictions of a model not trained on these images, instead of features"
            ),
            "--data.labels": _path(
                "FILE.csv", "take the labels from this table, as a fit with the same setting", dest="labels_table"
            ),
            "--strict": {"action": "store_true", "help": "exit with code 1 for warnings too, not only for errors"},
        },
    ),
    "tune": Command("search for the best settings within some minutes", _several_runs),
    "crossval": Command("train and test a model for each of several folds", _several_runs),
    "plan": Command("estimate the time, memory and disk that a fit will take", _several_runs),
    "compare": Command(
        "compare runs that were tested on the same images",
        _compare,
        {
            "runs": _path(
                "RUN", "the folder of a run, or its model; the others are compared with the first", nargs="+"
            ),
            "--json": {"action": "store_true", "help": "print the comparison as JSON"},
            "--report": _path("FILE.html", "write it as a page"),
        },
    ),
    "similar": Command(
        "find the images of a folder that are most similar to an image",
        _similar,
        {
            "query": _path("QUERY", "an image, or a folder of a few"),
            "--index": _path(
                "DIR",
                "where to search; the features are kept in the cache folder, and new images added next time; "
                "for up to about a million images",
                required=True,
            ),
            "--model": _path(
                "MODEL", "a .ckpt or .safetensors file of a run, or a name such as rexnet_100", required=True
            ),
            "--top": {"type": int, "default": 10, "metavar": "N", "help": "how many images to find; default: 10"},
            "--json": {"action": "store_true", "help": "print the result as JSON"},
            "--report": _path("FILE.html", "write a page with the images"),
        },
    ),
    "fix": Command(
        "copy a folder of images with corrected labels",
        _fix,
        {
            "dir": _path("DIR", "the folder, which is not changed"),
            "fixes": _path("FIXES.csv", "saved from the page of check --report"),
            "--output": _path("NEW", "a new folder", required=True),
            "--link": {"action": "store_true", "help": "make hard links instead of copies; on the same disk only"},
        },
    ),
    "pack": Command(
        "write a folder of images as a few tar files, for network disks and object storage",
        _pack,
        {
            "dir": _path("DIR", "the folder, which is not changed"),
            "output": _path("OUT", "a new folder, which fit, test and the others take; uploaded, they take its URL"),
        },
    ),
    "configs": Command(
        "list the shipped configs, or print one",
        _configs,
        {"name": {"nargs": "?", "metavar": "NAME", "help": "prints this one, to change it: configs NAME > mine.yaml"}},
    ),
    "models": Command("list the ReXNet variants", _models, {}),
    "completion": Command(
        "print a script that completes commands and settings in the shell",
        _completion,
        {"shell": {"choices": ("bash", "zsh", "tcsh"), "help": "see docs/guide.md for where the script belongs"}},
    ),
    "sample": Command(
        "write the sample dataset, handwritten digits",
        _sample,
        {"dir": _path("DIR", "a new folder")},
    ),
    "export": Command(
        "convert a model for other programs",
        _export,
        {
            "model": _path("MODEL", "a .ckpt or .safetensors file of a run"),
            "--format": {
                "required": True,
                "choices": tuple(FORMATS),
                "help": "; ".join(f"{name}: {kind.description}" for name, kind in FORMATS.items()),
            },
            "--output": _path(
                "FILE", "for hub, a new folder that timm can load; for openvino, FILE.xml or a folder", required=True
            ),
            "--images": _path("DIR", "for the int8 formats, typical images; default: the dataset of its run"),
        },
    ),
    "demo": Command(
        "show a page on this computer that classifies and explains the image that one drops on it",
        _demo,
        {
            "model": _path("MODEL", "a .ckpt or .safetensors file of a run"),
            "--index": _path("DIR", "also show the most similar images of this folder; kept as those of similar"),
            "--port": {"type": int, "default": 7860, "help": "default: 7860; 0 for any that is free"},
            "--host": {"default": "127.0.0.1", "help": "default: 127.0.0.1, for this computer only; 0.0.0.0 for all"},
        },
    ),
}

"""The command line: RexNetCLI over LightningCLI for runs, small commands beside it, one place for errors.

``fit`` takes Lightning's YAML files and ``--key value`` overrides. ``validate``, ``test`` and ``predict`` take a
model file, which knows all they need; what the command line or a config says beats it. Of a model file nothing but its
record of the dataset reaches the parser, as defaults.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rexnet_lit import __version__
from rexnet_lit.data.settings import DataRecord
from rexnet_lit.export.formats import FORMATS
from rexnet_lit.utils import process
from rexnet_lit.utils.errors import Stopped, UserError, printable
from rexnet_lit.utils.files import check_output

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rexnet_lit.data.transforms import AugmentSettings
    from rexnet_lit.inspect.findings import CheckResult


RUNS = {
    "fit": "train a classifier on a folder of images",
    "validate": "measure a model on the validation split",
    "test": "measure a model on the test split and write report/",
    "predict": "name what is in unlabelled images and write a CSV",
}


def _check(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from rexnet_lit.inspect import check, findings

    if not args.dir or not Path(args.dir).is_dir():
        raise UserError(f"check: there is no folder {args.dir!r}")
    if args.report:
        check_output("--report", Path(args.report), ".html", ".htm", mark=b'name="generator" content="rexnet_lit"')
    record, augment, size = DataRecord(), None, 0
    if args.config:
        from rexnet_lit.cli.config import read_data

        record, augment, size = read_data(args.config)
    console = Console(stderr=True)  # stdout may be JSON
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("looking at the images")
        checkup = check.check(
            args.dir, record, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    if args.json:
        print(json.dumps(checkup.to_dict(), indent=2))  # noqa: T201
    else:
        findings.print_result(checkup, Console())
    if args.report:
        from rexnet_lit.data import decode
        from rexnet_lit.report import dataset_page

        def read(path: str) -> NDArray[np.uint8]:
            return decode.read(Path(args.dir) / path, 160)

        samples = _augmented(checkup, read, augment, size) if augment else []
        config = Path(args.config).name if args.config else ""
        dataset_page.write_dataset_page(args.report, checkup, read_image=read, augmented=samples, config=config)
        print(f"report: {args.report}", file=sys.stderr)  # noqa: T201 (stdout may be JSON)
    return 0 if checkup.ok else 1


def _augmented(
    checkup: CheckResult, read: Callable[[str], NDArray[np.uint8]], augment: AugmentSettings, size: int
) -> list[tuple[str, str, NDArray[np.uint8]]]:
    """Return path, caption and picture of four images as they are, and as a recipe shows them in training."""
    from rexnet_lit.data.settings import EvalRecipe
    from rexnet_lit.data.transforms import TrainTransform

    transform = TrainTransform(augment, EvalRecipe(image_size=size), size)
    bad = {row.path for row in checkup.bad}
    paths = [path for split, _, path in checkup.examples if split == "train" and path not in bad]
    found = []
    for path in paths[:: max(1, len(paths) // 4)][:4]:
        image = read(path)
        views = [(f"epoch {seed}", transform.augment(image, seed)) for seed in (1, 2, 3)]
        found += [(path, "as it is", image), *((path, caption, view) for caption, view in views)]
    return found


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
            facts = (v.name, f"{v.parameters:,}", adds, str(v.features)) if i == 0 else ("",) * 4
            table.add_row(*facts, tag, v.top1.get(tag, "-"))
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
    output = Path(args.output)
    size = sum(file.stat().st_size for file in (output, *output.glob("*")) if file.is_file()) / 1e6
    print(  # noqa: T201
        f"{args.output}: {size:.1f} MB; on {parity.images} pictures it agrees with the model to "
        f"{parity.difference:.1g} in probability, and in the class of {parity.same:.1%}"
    )
    return 0


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> Any:
        """Raise instead of printing the usage."""
        raise UserError(f"{message}; see: {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rexnet-lit",
        description="Fine-tune ReXNet image classifiers on your own folder of images.",
        epilog="Every command has its own --help. --debug (or REXNET_LIT_DEBUG=1) shows tracebacks.",
    )
    parser.add_argument("--version", action="version", version=f"rexnet_lit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, text in RUNS.items():
        commands.add_parser(name, help=text, add_help=False)

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    check = add("check", _check, "find what is wrong with a folder of images")
    check.add_argument("dir", metavar="DIR", help="holds train/ val/ [test/], or class folders")
    check.add_argument("--json", action="store_true", help="print the findings as JSON")
    check.add_argument("--report", metavar="FILE.html", help="write a page with pictures of every class and all copies")
    help_ = "split the folder as this config does, and show in the page what its augmentation makes of the images"
    check.add_argument("--config", metavar="FILE.yaml", help=help_)
    add("models", _models, "list the ReXNet variants")
    sample = add("sample", _sample, "write the sample dataset, handwritten digits")
    sample.add_argument("dir", metavar="DIR", help="a new folder")
    export = add("export", _export, "write a model for other programs")
    export.add_argument("model", metavar="MODEL", help="a .ckpt or .safetensors file of a run")
    formats = "; ".join(f"{name}: {each.description}" for name, each in FORMATS.items())
    export.add_argument("--format", required=True, choices=FORMATS, help=formats)
    export.add_argument("--output", required=True, metavar="FILE", help="the file; for hub, a new folder")
    quantised = " and ".join(name for name, each in FORMATS.items() if each.needs_images)
    help_ = f"for {quantised}: a folder of images like those that the model is for; by default its run's dataset"
    export.add_argument("--images", metavar="DIR", help=help_)
    return parser


def _dispatch(argv: list[str]) -> int:
    args, rest = _parser().parse_known_args(argv)
    if args.command in RUNS:
        with process.gc_paused():
            from rexnet_lit.cli.lightning_cli import RexNetCLI

        RexNetCLI.run(argv)
        return 0
    if rest:
        raise UserError(f"unrecognized arguments: {' '.join(rest)}; see: rexnet-lit {args.command} --help")
    return int(args.run(args))


def main(argv: Sequence[str]) -> int:
    """Run a command.

    Args:
        argv: The arguments, without the program's name.

    Returns:
        The exit code: 0; 1 for findings of `check` and for our own faults; 2 for a mistake the user can mend; 143,
        130 and 129 where SIGTERM, Ctrl-C and the end of its terminal have stopped it.
    """
    arguments = [a for a in argv if a != "--debug"]
    debug = len(arguments) < len(argv) or os.environ.get("REXNET_LIT_DEBUG") == "1"
    try:
        return _dispatch(arguments)
    except Stopped as stop:
        print(f"rexnet-lit: {stop}", file=sys.stderr)  # noqa: T201
        return stop.exit_code
    except KeyboardInterrupt:  # where `process.answer_signals` was not called
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        sys.stderr.close()
        return 1
    except SystemExit as stop:
        if type(stop).__name__ == "SIGTERMException":  # Lightning's, without a code
            return 143
        return stop.code if isinstance(stop.code, int) else 2
    except Exception as error:
        message = None if debug else user_message(error)
        if message is None:
            raise
        print(f"rexnet-lit: error: {printable(message)}", file=sys.stderr)  # noqa: T201
        return 2


def user_message(error: BaseException) -> str | None:
    """Return the one line for an exception that a user caused, None for one of our own faults."""
    if isinstance(error, UserError):
        # A loader worker's error arrives as the text of its traceback.
        return str(error).rpartition("rexnet_lit.utils.errors.UserError: ")[2]
    kind = type(error).__name__
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" for {error.filename!r}" if error.filename is not None else ""
        return f"the disk is full{where} ({error.strerror}); make room, or write to another"
    if (isinstance(error, OSError) and error.filename is not None) or kind == "OSError":
        return " ".join(str(error).split())
    if kind == "OutOfMemoryError" or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return "out of memory; set a smaller data.batch_size or data.image_size"
    if kind == "RuntimeError" and str(error).startswith("DataLoader worker"):  # raised wherever it is noticed
        return (
            f"a data loading worker died ({' '.join(str(error).split())}); memory, or /dev/shm, may be full: "
            "set a smaller data.num_workers (0 reads in the main process) or data.batch_size"
        )
    if kind in ("DistBackendError", "DistNetworkError") or "/gloo/transport/" in str(error):
        waited = re.search(r"[Tt]imed out waiting (\d+)ms", str(error))
        if waited:
            return (
                f"another process of this run has not answered for {int(waited.group(1)) / 1000:g} s: it, its disk or "
                "its machine hangs (trainer.strategy's timeout is how long to wait)"
            )
        return "another process of this run has ended; what it said last is the cause"
    if kind == "ValueError" and "null byte" in str(error):
        return "a path holds a null byte, which no file's name does"
    if kind == "MisconfigurationException":
        return " ".join(str(error).split())
    return None

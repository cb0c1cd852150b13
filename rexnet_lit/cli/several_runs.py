"""`crossval` and `tune`: their arguments, and the fits that they consist of."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from rexnet_lit.cli import shipped_configs
from rexnet_lit.cli.config import leaves
from rexnet_lit.cli.lightning_cli import RexNetCLI
from rexnet_lit.cli.messages import Parser
from rexnet_lit.data.folder import fingerprint, scan
from rexnet_lit.data.settings import SplitSettings
from rexnet_lit.search import crossval, result
from rexnet_lit.search.space import read_space
from rexnet_lit.search.state import remember
from rexnet_lit.search.tune import Search
from rexnet_lit.training.callbacks.console import print_table
from rexnet_lit.training.callbacks.run_files import find_run_folder
from rexnet_lit.training.optim import OptimizerSettings
from rexnet_lit.utils.errors import Stopped, UserError

_TEST_FRACTION = 0.15  # set aside by a search where there is no test split
_OF_A_RUN = ("trainer.default_root_dir", "trainer.logger", "ckpt_path", "accept_changes", "find_lr", "config")


class SeveralRuns(RexNetCLI):
    """The settings of a fit, parsed once, and fits with some of them changed."""

    def instantiate_classes(self) -> None:
        """Build nothing yet."""
        self._settings: Namespace = self.config

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing yet."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of a fit, in groups."""
        found: dict[str, Any] = self._settings["fit"].as_dict()
        return found

    @property
    def identity(self) -> dict[str, Any]:
        """The settings by key, without those that may differ between two starts of the same command."""
        return {key: value for key, value in leaves(self.settings) if not key.startswith(_OF_A_RUN)}

    def train(self, changes: Mapping[str, Any]) -> Path:
        """Train with some settings changed, or resume what ``trainer.default_root_dir`` holds; return the run folder.

        Raises:
            UserError: A setting is wrong, or the run cannot be resumed.
        """
        self.config, self.folder = self._settings.clone(), None
        for key, value in changes.items():
            self.config["fit"][key] = value
        root = Path(self.config["fit"]["trainer"]["default_root_dir"])
        begun = any(root.glob("lightning_logs/*/checkpoints/last.ckpt"))
        self.config["fit"]["ckpt_path"] = "last" if begun else None
        self._read_resumed(self.config["fit"])
        self._set_seed()
        super().instantiate_classes()
        super()._run_subcommand("fit")
        folder = find_run_folder(self.trainer)
        if folder is None or not (folder / "model.safetensors").is_file():
            raise UserError("this command needs the files of its runs: leave trainer.enable_checkpointing at true")
        return folder


def parse(argv: Sequence[str], kind: type[SeveralRuns] = SeveralRuns) -> SeveralRuns:
    """Return the runs of a command line: that of a fit."""
    runs = kind.run(["fit", *argv])
    assert isinstance(runs, kind)  # noqa: S101 (for the type checker)
    if not runs.settings["data"]["root"]:
        raise UserError("data.root is not set; name a folder of images: --data.root DIR")
    if runs.settings["ckpt_path"]:
        raise UserError("ckpt_path: this command goes on by itself when it is started again; leave ckpt_path out")
    return runs


def options_parser(command: str, options: str, description: str) -> Parser:
    """Return the parser of what a command takes beside the settings of a fit; it leaves these to `parse`."""
    usage = " ".join(filter(None, (f"rexnet-lit {command} DIR [--config FILE]", options, "[--KEY VALUE ...]")))
    description += " It takes all settings of fit: rexnet-lit fit --help."
    return Parser(prog=f"rexnet-lit {command}", allow_abbrev=False, usage=usage, description=description)


def run_crossval(argv: Sequence[str]) -> int:
    """Run `crossval`."""
    parser = options_parser("crossval", "[--data.num_folds 5]", "Train and test a model for each fold.")
    _, rest = parser.parse_known_args(argv[1:])
    runs = parse(rest)
    data = dict(runs.settings["data"])
    if not data["num_folds"]:
        data["num_folds"] = 5
    target = Path(runs.settings["trainer"]["default_root_dir"] or ".") / "crossval"
    metrics = crossval.cross_validate(runs.train, data, runs.identity, target)
    rows = [
        (name, f"{metrics[name]:.4f}    {mean:.4f} ({metrics['std'][name]:.4f})")
        for name, mean in metrics["mean"].items()
    ]
    print_table(f"Cross-validation: {metrics['count']} images    mean of {data['num_folds']} folds (spread)", rows)
    print(f"report: {target / 'report.html'}")  # noqa: T201
    return 0


def run_tune(argv: Sequence[str]) -> int:
    """Run `tune`."""
    parser = options_parser("tune", "[--budget 30m] [--trials N] [--space FILE]", "Search for better settings.")
    parser.add_argument("--budget", metavar="TIME", help="how long to search, such as 90s, 30m or 2h; 30m by default")
    parser.add_argument("--trials", type=int, metavar="N", help="how many settings to try, instead of a time")
    parser.add_argument("--space", metavar="FILE", default="tune", help="what to search; the shipped tune by default")
    args, rest = parser.parse_known_args(argv[1:])
    if importlib.util.find_spec("optuna") is None:
        raise UserError("tune needs the package optuna; install the extra: pip install 'rexnet-lit[tune]'")
    budget = _seconds(args.budget or "30m") if args.budget or args.trials is None else None
    if args.trials is not None and args.trials < 1:
        raise UserError(f"--trials is {args.trials}; expected 1 or more")
    runs = parse(rest)
    root = Path(runs.settings["trainer"]["default_root_dir"] or ".")
    search, data = _search(runs, root, args.space, budget, args.trials)
    stopped: BaseException | None = None
    try:
        search.run()
    except Stopped as error:
        stopped = Stopped(error.exit_code - 128, "stopped; the same command goes on where this one has stopped")
        if not search.full:
            raise stopped from None
    except KeyboardInterrupt as error:
        stopped = error
        if not search.full:
            raise
    _finish_tune(search, root, data, stopped=stopped is not None)
    if stopped is not None:
        raise stopped
    return 0


def _search(
    runs: SeveralRuns, root: Path, space_name: str, budget: float | None, trials: int | None
) -> tuple[Search, dict[str, Any]]:
    """Return the search, and the settings of its data; without a test split, one is set aside."""
    if runs.settings["trainer"]["max_time"] is not None:
        raise UserError("trainer.max_time: a search has a time of its own; use --budget")
    data, fixed = dict(runs.settings["data"]), dict[str, Any]()
    images = scan(data["root"], SplitSettings.of(data))
    if "test" not in images.splits and not data["test_fraction"]:
        fixed["data.test_fraction"] = data["test_fraction"] = _TEST_FRACTION
        images = scan(data["root"], SplitSettings.of(data))
        print(  # noqa: T201
            f"There is no test split: {len(images.splits['test'])} images are set aside to measure the result. They "
            "neither train nor choose anything (data.test_fraction).",
            flush=True,
        )
    base = {**dict(leaves(runs.settings)), **fixed}
    if base["model.optimizer.lr"] is None:
        scratch = not (base["model.pretrained"] or base["model.weights"])
        base["model.optimizer.lr"] = OptimizerSettings(name=base["model.optimizer.name"]).full_lr(scratch)
    file = shipped_configs.find(space_name)
    space = read_space(yaml.safe_load(Path(file).read_text("utf-8")), space_name, base)
    described = {f"--space {key}": str(setting) for key, setting in space.items()}
    digests = {f"{name} images": fingerprint(samples) for name, samples in images.splits.items()}
    remember(root / "tuning", {**runs.identity, **fixed, **described, **digests})

    def train(changes: Mapping[str, Any]) -> Path:
        return runs.train({**fixed, **changes})

    return Search(train, root / "tuning", space, base, budget, trials, base["model.select"]), data


def _finish_tune(search: Search, root: Path, data: Mapping[str, Any], *, stopped: bool) -> None:
    """Ship the best weights so far, measure them on the test images unless the search was stopped, and print both."""
    run = result.ship(search, root)
    verdict = "" if stopped else result.describe_test(search, data)
    result.write_report(search, Path(data["root"]).name, verdict)
    best, default = search.best, search.done[0]
    rows = [
        ("validation top-1", f"{best.metrics['val/top1']:.4f} ({default.metrics['val/top1']:.4f} with the config's)")
    ]
    rows += [("validation loss", f"{best.loss:.4f} ({default.loss:.4f})")]
    rows += [("", f"{key}: {before} -> {after}") for key, (before, after) in result.changes(search).items()]
    rows += [("run folder", str(run)), ("model", str(run / "model.safetensors"))]
    rows += [("all runs", str(search.folder / "leaderboard.csv")), ("report", str(search.folder / "report.html"))]
    print_table(f"Search {'stopped' if stopped else 'finished'}: {len(search.done)} runs, {search.elapsed:.0f} s", rows)
    if verdict:
        print(f"{verdict}.", flush=True)  # noqa: T201


def _seconds(text: str) -> float:
    """Return the seconds of a time such as ``1h30m``; a bare number is minutes."""
    number = r"(\d+(?:\.\d+)?)"
    match = re.fullmatch(f"(?:{number}h)?(?:{number}m)?(?:{number}s)?|{number}", text.strip())
    if not match or not any(match.groups()):
        raise UserError(f"--budget is {text!r}; expected a time such as 90s, 30m or 2h")
    hours, minutes, seconds, alone = (float(part or 0) for part in match.groups())
    total = 3600 * hours + 60 * (minutes + alone) + seconds
    if total <= 0:
        raise UserError(f"--budget is {text!r}; expected more than no time")
    return total

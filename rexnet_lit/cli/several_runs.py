"""Commands that consist of several fits, of which some settings are changed; and the command `crossval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback

from rexnet_lit.cli import shipped_configs
from rexnet_lit.cli.config import leaves
from rexnet_lit.cli.lightning_cli import RexNetCLI
from rexnet_lit.cli.messages import Parser
from rexnet_lit.data.folder import scan
from rexnet_lit.data.settings import SplitSettings
from rexnet_lit.search import crossval, ship
from rexnet_lit.search.state import read_result
from rexnet_lit.training import start
from rexnet_lit.training.callbacks.console import print_table
from rexnet_lit.training.callbacks.run_files import find_run_folder
from rexnet_lit.training.schedules import auto_epochs
from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.settings import check_choice

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

    @property
    def overlay(self) -> dict[str, Any]:
        """The settings by key that make a `fit` this one: all but the defaults, and those that `finetune` changes."""
        defaults = dict(leaves(self._subcommand_parsers["fit"].get_defaults().as_dict()))
        changed = dict(leaves(yaml.safe_load(shipped_configs.named(shipped_configs.DEFAULT).read_text("utf-8"))))
        return {
            key: value
            for key, value in self.identity.items()
            if key != "data.root" and (key in changed or value != defaults.get(key))
        }

    @property
    def from_scratch(self) -> bool:
        """Whether training starts from random weights."""
        return start.from_scratch(*(self.settings["model"][key] for key in ("weights", "pretrained", "network")))

    def choose_epochs(self) -> None:
        """Replace ``trainer.max_epochs: auto`` by the number that it stands for, which all runs then have."""
        config = self._settings["fit"]
        if config["trainer"]["max_epochs"] == "auto":
            folder = scan(config["data"]["root"], SplitSettings.of(config["data"].as_dict()))
            images = len(folder.splits["train"])
            config["trainer"]["max_epochs"] = auto_epochs(images, config["data"]["batch_size"], self.from_scratch)

    def before_fit(self) -> None:
        """Let the fit have the callbacks of a search."""
        self.trainer.callbacks.extend(self._callbacks)  # type: ignore[attr-defined]
        super().before_fit()

    def train(self, changes: Mapping[str, Any], callbacks: Sequence[Callback] = ()) -> Path:
        """Train with some settings changed, or resume what ``trainer.default_root_dir`` holds; return the run folder.

        Args:
            changes: Settings of a fit, by key.
            callbacks: Of the trainer, beside those of a fit.

        Raises:
            UserError: A setting is wrong, or the run cannot be resumed.
        """
        self._callbacks = callbacks
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
    if runs.settings["find_lr"]:
        raise UserError("find_lr is for fit; leave it out")
    if runs.settings["ckpt_path"]:
        raise UserError("ckpt_path: this command goes on by itself when it is started again; leave ckpt_path out")
    runs.choose_epochs()
    return runs


def options_parser(command: str, options: str, description: str) -> Parser:
    """Return the parser of what a command takes beside the settings of a fit; it leaves these to `parse`."""
    usage = " ".join(filter(None, (f"rexnet-lit {command} DIR [--config FILE]", options, "[--KEY VALUE ...]")))
    description += " It takes all settings of fit: rexnet-lit fit --help."
    return Parser(prog=f"rexnet-lit {command}", allow_abbrev=False, usage=usage, description=description)


def run_crossval(argv: Sequence[str]) -> int:
    """Run `crossval`."""
    about = "Train and test a model for each fold."
    parser = options_parser("crossval", "[--data.num_folds 5] [--ship refit|average]", about)
    parser.add_argument("--ship", metavar="HOW", help="then make one model: " + "; ".join(ship.HELP))
    args, rest = parser.parse_known_args(argv[1:])
    if args.ship is not None:
        check_choice("--ship", args.ship, ship.SHIP)
    runs = parse(rest)
    settings = runs.settings
    data = settings["data"]
    data["num_folds"] = data["num_folds"] or 5
    root = Path(settings["trainer"]["default_root_dir"] or ".")
    target, folder = root / "crossval", crossval.pool(data["root"], SplitSettings.of(data))
    if args.ship is not None:
        ship.check(args.ship, settings, folder)
    if settings["model"]["teacher"]["path"]:
        print("note: a model.teacher that was trained on these images makes the figures too good", flush=True)  # noqa: T201
    identity = {**runs.identity, "data.num_folds": data["num_folds"]}
    folds = crossval.cross_validate(runs.train, settings, folder, identity, target)
    metrics = folds.metrics
    rows = [
        (name, f"{metrics[name]:.4f}    {mean:.4f} ({metrics['std'][name]:.4f})")
        for name, mean in metrics["mean"].items()
    ]
    print_table(f"Cross-validation: {metrics['count']} images    mean of {data['num_folds']} folds (spread)", rows)
    print(f"report: {target / 'report.html'}", flush=True)  # noqa: T201
    if args.ship is not None:
        run = ship.SHIP[args.ship](folds, runs.train, settings, root)
        result = read_result(run)
        rows = [("run folder", str(run)), ("model", str(run / "model.safetensors"))]
        print_table(f"Shipped: {result['weights']} ({result['why']})", rows)
    return 0

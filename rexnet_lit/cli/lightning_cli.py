"""fit, validate, test and predict: LightningCLI with our module, data, callbacks and manners."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jsonargparse
import torch.distributed
import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from rexnet_lit.callbacks.calibration import Calibrate
from rexnet_lit.callbacks.checkpoint import RunCheckpoint
from rexnet_lit.callbacks.console import ConsoleSummary, main_metrics, print_table
from rexnet_lit.callbacks.loggers import RunCSVLogger, RunTensorBoardLogger
from rexnet_lit.callbacks.nan_guard import NaNGuard
from rexnet_lit.callbacks.predictions import PredictionWriter
from rexnet_lit.callbacks.run_files import AugmentedSamples, RunFiles
from rexnet_lit.callbacks.signals import StopOnSignal
from rexnet_lit.callbacks.test_report import TestReport
from rexnet_lit.callbacks.weight_selection import WeightSelection
from rexnet_lit.cli import run_folder, trainer_checks
from rexnet_lit.cli.config import expand, load_yaml, named_key, one_line, read_configs, without
from rexnet_lit.data.datamodule import ImageFolderDataModule
from rexnet_lit.data.sampler import uses_all_batches
from rexnet_lit.data.settings import SplitSettings
from rexnet_lit.data.splits import lists_images_of
from rexnet_lit.data.transforms import AugmentSettings
from rexnet_lit.models import checkpoint
from rexnet_lit.models.heads import HeadSpec
from rexnet_lit.training.freezing import StrategySettings
from rexnet_lit.training.losses import LossSettings
from rexnet_lit.training.lr_finder import find_lr
from rexnet_lit.training.module import RexNetModule
from rexnet_lit.training.optim import OptimizerSettings
from rexnet_lit.training.schedules import ScheduleSettings
from rexnet_lit.utils import process
from rexnet_lit.utils.errors import UserError, plural, printable
from rexnet_lit.utils.files import absolute_path, check_output, check_writable, unused_path

_SPLITTING = tuple(
    field.name for field in dataclasses.fields(SplitSettings) if "links" not in field.name and "order" not in field.name
)
"""Settings that say which image is in which split."""


class RunConfig(SaveConfigCallback):
    """Writes ``config.yaml`` once training begins: a resume that fails before leaves the run's own as it is."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wait."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it, as the config of a new run: what this one has resumed is not to be resumed by the next."""
        self.config["ckpt_path"], self.config["accept_changes"] = None, False
        try:
            super().setup(trainer, pl_module, "fit")
        except ValueError as error:
            raise UserError(
                f"trainer: its settings cannot be written into config.yaml: {one_line(str(error), [])}"
            ) from error


class RexNetCLI(LightningCLI):
    """The runs' command line.

    Model settings exist for ``fit`` alone; the other runs read the model file.
    """

    folder: Path | None = None
    """The run folder that this run has claimed or goes on in."""

    @classmethod
    def run(cls, argv: list[str]) -> None:
        """Parse ``argv`` (the run's name first) and run it."""
        _quieten()
        atexit.register(_leave_process_group)
        command = argv[0]
        if command == "fit":  # nobody reads on: no reason to lose a training
            sys.stdout, sys.stderr = process.ignore_write_errors(sys.stdout), process.ignore_write_errors(sys.stderr)
        jsonargparse.set_parsing_settings(config_read_mode_fsspec_enabled=False)  # Lightning reads addresses
        _read_yaml(command)
        cls(
            RexNetModule,
            ImageFolderDataModule,
            save_config_callback=RunConfig,
            args=expand(argv),
            seed_everything_default=0,
            trainer_defaults={
                "max_epochs": 20,
                "log_every_n_steps": 10,
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
                "use_distributed_sampler": False,  # ours neither pads nor repeats
            },
            parser_kwargs={
                "exit_on_error": False,
                "prog": "rexnet-lit",
                **{name: {"exit_on_error": False} for name in cls.subcommands()},
            },
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    # Parsing

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return Lightning's, less the option to read pickles."""
        return {name: {*skipped, "weights_only"} for name, skipped in LightningCLI.subcommands().items()}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        self._adding = subcommand
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``trainer`` and ``data``, and for ``fit`` the model."""
        limits = [f"limit_{name}_batches" for name in ("train", "val", "test", "predict")]
        parser.add_class_arguments(  # as add_lightning_class_args does, which skips nothing
            Trainer, "trainer", skip=set(limits), instantiate=False, fail_untyped=False, sub_configs=True
        )
        # For Optional[Union[int, float]] typing gives out what it has met first, float | int too: 1 would be all.
        help_ = "how many of the batches to use (int), or which share of them (float)"
        for name in limits:
            parser.add_argument(f"--trainer.{name}", type=int | float | None, help=help_)
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})
        fit = self._adding == "fit"
        parser.add_class_arguments(ImageFolderDataModule, "data", skip={"class_names"}, instantiate=fit)
        if fit:
            help_ = "resume although images, batch size or processes are others than the checkpoint's"
            parser.add_argument("--accept_changes", type=bool, default=False, help=help_)
            help_ = "instead of training, try learning rates and write a picture of the losses"
            parser.add_argument("--find_lr", type=bool, default=False, help=help_)
            parser.add_lightning_class_args(RexNetModule, "model")
            for key in ("num_classes", "class_names", "image_size"):
                parser.link_arguments(f"data.{key}", f"model.{key}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; for the runs that read a model file, once more with its defaults below the user's."""
        self.config = self._parse(parser, args)
        command = self.config["subcommand"]
        if command == "fit":
            self._prepare_fit(self.config["fit"])
            return
        path = self.config[command].get("ckpt_path")
        if not path:
            raise UserError(f"{command} needs a model: --ckpt_path MODEL (a .ckpt or .safetensors file of a run)")
        self.file = checkpoint.load_model(path)
        defaults: dict[str, Any] = {}
        draw: dict[str, Any] = {}
        if command != "predict":
            home = run_folder.run_folder_of(self.file.path)
            if home is not None:
                defaults["trainer.default_root_dir"] = str(home.parent.parent)
            defaults |= {f"data.{key}": value for key, value in dataclasses.asdict(self.file.data).items()}
            draw = self._draw(args, home)
        self._subcommand_parsers[command].set_defaults(defaults)
        self.config = self._parse(parser, args)
        for key, value in draw.items():
            self.config[command]["data"][key] = value

    def _draw(self, args: list[str], home: Path | None) -> dict[str, Any]:
        """Return the settings by which a run of a model file finds the splits that the model's run has drawn.

        Not where the user names a folder of other images, or other settings of the draw: a fit's config says the same.
        """
        command, record = args[0], dataclasses.asdict(self.file.data)
        data = self.config[command]["data"]
        texts = [args, *read_configs(args, command).values()]
        said = [key for key in _SPLITTING if any(without(text, f"data.{key}") is not text for text in texts)]
        other = [key for key in said if (absolute_path(data[key]) if key == "split_file" else data[key]) != record[key]]
        draw: dict[str, Any] = {}
        drawn = str(home / "split.csv") if home is not None and (home / "split.csv").is_file() else None
        if data["root"] is not None and not _same_folder(data["root"], record["root"]):
            written = drawn or record["split_file"]
            moved = written and not other and lists_images_of(written, data["root"])  # the same images elsewhere
            draw = {"split_file": written if moved else None, "num_folds": 0, "fold": 0}
        elif other:
            draw = {"split_file": None, **({"num_folds": 0, "fold": 0} if "val_fraction" in other else {})}
        elif drawn:
            draw = {"split_file": drawn, "num_folds": 0, "fold": 0}
        return {key: value for key, value in draw.items() if key not in other}

    def _prepare_fit(self, config: Namespace) -> None:
        """Find and read the checkpoint to resume."""
        self.resumed: dict[str, Any] = {}
        path = config["ckpt_path"]
        if path is None:
            return
        if path == "last":
            found, skipped = run_folder.find_last_checkpoint(Path(config["trainer"]["default_root_dir"] or "."))
            for line in skipped:
                rank_zero_only(print)(line, flush=True)
            path = str(found.absolute())
        elif Path(path).is_dir():
            raise UserError(f"ckpt_path: {path!r} is a folder; name the run's checkpoints/last.ckpt, or last")
        elif Path(path).suffix == ".safetensors":
            raise UserError(
                f"ckpt_path: {path} holds weights only, which cannot be resumed; to start a new run from them, "
                "use model.weights instead"
            )
        self.resumed = checkpoint.read_ckpt(path)
        checkpoint.read_record(self.resumed, path)
        missing = [key for key in ("epoch", "global_step", "loops", "optimizer_states") if key not in self.resumed]
        if missing:
            raise UserError(f"ckpt_path: {path} cannot be resumed, it lacks {', '.join(missing)}; use model.weights")
        config["ckpt_path"] = path
        rank_zero_only(print)(f"resuming {path}, after {self.resumed['global_step']} steps", flush=True)

    def _parse(self, parser: LightningArgumentParser, args: list[str]) -> Namespace:
        """Parse; where that fails, leave out what it fails at and go on, to name all mistakes at once."""
        command = args[0]
        problems: list[str] = []
        dropped: list[str] = []
        configs = read_configs(args, command)
        known = [action.dest for action in self._subcommand_parsers[command]._actions]
        while True:
            try:
                config: Namespace = parser.parse_args(args)
            except (ArgumentError, TypeError, ValueError) as error:
                key = named_key(str(error))
                files = [path for path, content in configs.items() if key and without(content, key) is not content]
                given = without(args, key) if key else args
                problem = one_line(str(error), known)
                problems.append(f"{files[-1]}: {problem}" if files and given == args else problem)
                if key is None or key in dropped or len(dropped) == 20 or not (files or given != args):
                    break
                dropped.append(key)
                args = given
                _read_yaml(command, dropped)
            else:
                break
        if problems:
            _read_yaml(command)
            raise UserError("; ".join(dict.fromkeys(problems)))
        return config

    def _parse_ckpt_path(self) -> None:
        """Never feed a checkpoint's hyper-parameters to the parser, as LightningCLI would."""

    # Making the objects

    def instantiate_classes(self) -> None:
        """Make the data, the model and the trainer; for runs of a model file, from that file."""
        if self.subcommand == "fit":
            if not self.config["fit"]["data"]["root"]:
                raise UserError("data.root is not set; say which folder of images: --data.root DIR")
            try:
                with trainer_checks.one_line_errors(), self._without_start():
                    super().instantiate_classes()
            except UserError as error:
                raise UserError("; ".join(dict.fromkeys([str(error), *self._wrong_settings()]))) from None
            config = self.config["fit"]  # the run folder's config.yaml is good from any folder
            for group, key in (("data", "root"), ("data", "split_file"), ("data", "class_order"), ("model", "weights")):
                path = config[group][key]
                if path not in ("sorted", "natural"):
                    config[group][key] = absolute_path(path)
            return
        self.model = RexNetModule.from_model(self.file)
        settings = self.config[self.subcommand]["data"].as_dict()
        if self.subcommand == "predict":
            settings["root"] = None
        elif settings["root"] is None:
            raise UserError(f"data.root: {self.file.path} does not say which dataset; add --data.root DIR")
        size = settings["image_size"]
        if size is not None:  # what the user says beats the model file
            recipe = dataclasses.replace(self.model.spec.eval_recipe, image_size=size)
            self.model.spec = dataclasses.replace(self.model.spec, eval_recipe=recipe)
        self.datamodule = ImageFolderDataModule(**settings, class_names=self.model.spec.class_names)
        folder = self.datamodule.folder
        if folder is not None and folder.drawn and self.datamodule.record != self.file.data:
            rank_zero_only(print)(
                f"warning: the splits of {settings['root']} are drawn now, not as the model's run has drawn them: "
                "images that it was trained on may be among these",
                flush=True,
            )
        self.config[self.subcommand]["trainer"]["logger"] = False
        with trainer_checks.one_line_errors():
            self.config_init = self.parser.instantiate_classes(self.config)
        self.trainer = self.instantiate_trainer()

    @contextlib.contextmanager
    def _without_start(self) -> Iterator[None]:
        """Have a resumed run read its checkpoint alone: the weights that it once started from may be gone.

        Unless they are to be blended with the last ones.
        """
        model = self.config["fit"]["model"]
        if not self.resumed or model["strategy"]["blend"]:
            yield
            return
        weights, pretrained = model["weights"], model["pretrained"]
        model["weights"], model["pretrained"] = None, False
        try:
            yield
            self.model.scratch = weights is None and not pretrained
        finally:
            model["weights"], model["pretrained"] = weights, pretrained

    def _wrong_settings(self) -> list[str]:
        """Say what is wrong with each group of a fit's settings, whatever else is."""
        data, model = self.config["fit"]["data"], self.config["fit"]["model"]
        groups: tuple[tuple[Callable[..., Any], Namespace], ...] = (
            (AugmentSettings, data["augment"]),
            (HeadSpec, model["head"]),
            (StrategySettings, model["strategy"]),
            (OptimizerSettings, model["optimizer"]),
            (ScheduleSettings, model["schedule"]),
            (LossSettings, model["loss"]),
        )
        found = []
        for kind, settings in groups:
            try:
                kind(**settings.as_dict())
            except UserError as error:
                found.append(str(error))
        return found

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer with our loggers, callbacks and safe checkpoints."""
        settings = self._get(self.config_init, "trainer")
        given = settings["callbacks"] or []
        given = given if isinstance(given, list) else [given]
        trainer_checks.check_settings(settings)
        trainer_checks.check_callbacks(given)
        terminal = sys.stdout.isatty()
        own_bar = any(isinstance(callback, ProgressBar) for callback in given)
        if settings["enable_progress_bar"] is None:
            settings["enable_progress_bar"] = terminal or own_bar
        bar = settings["enable_progress_bar"] and terminal and not own_bar
        callbacks: list[Any] = [RichProgressBar(leave=True)] if bar else []
        if self.subcommand == "fit":
            callbacks += [WeightSelection(), Calibrate(), RunFiles(), AugmentedSamples()]
            callbacks += [ConsoleSummary(lines=not terminal), NaNGuard()]
            if settings["logger"] in (None, True, False):  # metrics.csv is the run's record, and its folder the run's
                settings["logger"] = self._loggers(settings["default_root_dir"] or ".", settings["logger"] is not False)
            if not any(isinstance(callback, LearningRateMonitor) for callback in given):
                callbacks.append(LearningRateMonitor("step"))
            if settings["enable_checkpointing"] is not False:
                callbacks.append(RunCheckpoint(accept_changes=self.config["fit"]["accept_changes"]))
        else:
            settings["callbacks"] = [
                callback for callback in given if not isinstance(callback, trainer_checks.TRAINING_CALLBACKS)
            ]
            settings["enable_checkpointing"] = False
            self.save_config_callback = None
            callbacks.append(StopOnSignal())
            callbacks += [self._writer()] if self.subcommand != "validate" else []
        try:
            trainer = self._instantiate_trainer({**settings, **kwargs}, callbacks)
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
            raise UserError(f"trainer: {error}") from None
        if self.subcommand == "fit":
            trainer_checks.check_trainer(trainer, settings)
        return trainer

    def _loggers(self, root: str, board: bool) -> list[Logger]:
        """Return the loggers of a new run folder; of a resumed run its own, less what was logged after the save."""
        self.folder = run_folder.run_folder_of(Path(self.config["fit"]["ckpt_path"])) if self.resumed else None
        if self.folder is None:
            boards: list[Logger] = [RunTensorBoardLogger(root, default_hp_metric=False)] if board else []
            return [*boards, RunCSVLogger(root)]
        root, version = str(self.folder.parent.parent), run_folder.run_number(self.folder)
        step = self.resumed["global_step"]
        self.save_config_kwargs["overwrite"] = True
        boards = (
            [RunTensorBoardLogger(root, version=version, default_hp_metric=False, purge_step=step)] if board else []
        )
        return [*boards, RunCSVLogger(root, version, keep=step)]

    def _writer(self) -> TestReport | PredictionWriter:
        root = Path(self._get(self.config_init, "trainer")["default_root_dir"] or ".")
        if self.subcommand == "predict":
            given = self.datamodule.predict_output
            output = Path(given) if given else unused_path(root / "predictions.csv")
            check_output("data.predict_output", output, ".csv", mark=b"path,label_1,prob_1")
            if output.name == "quarantine.csv":
                raise UserError("data.predict_output: quarantine.csv is the list of unreadable images; name another")
            check_writable("data.predict_output", output)
            self.writer: Any = PredictionWriter(output)
        else:
            home = run_folder.run_folder_of(self.file.path)
            inside = home is not None and root.absolute() in home.parents
            self.writer = TestReport(home if inside and home else root)
            check_writable("trainer.default_root_dir", self.writer.folder / "report")
        return self.writer  # type: ignore[no-any-return]

    # Running

    def before_fit(self) -> None:
        """Say what is about to happen.

        Raises:
            UserError: A callback monitors what nobody logs.
        """
        trainer: Trainer = self.trainer
        data, model = self.datamodule, self.model
        trainer_checks.check_fit(trainer, model)
        trainer_checks.disable_slurm_requeue(trainer, resumes=bool(self.resumed))
        if self.resumed:  # before anything in the run's folder is touched
            model.on_load_checkpoint(self.resumed)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, RunCheckpoint):
                    callback.refuse_changes(trainer, model, data, self.resumed)
        if not self.trainer.is_global_zero:
            return
        counts = ", ".join(f"{len(samples)} {name}" for name, samples in data.splits().items())
        millions = sum(p.numel() for p in model.network.parameters()) / 1e6
        device = self.trainer.strategy.root_device.type
        print(  # noqa: T201
            f"{model.spec.backbone} ({millions:.1f} M parameters) on {self.trainer.world_size} x {device}; "
            f"{data.num_classes} classes; images: {counts}",
            flush=True,
        )
        for note in data.folder.notes if data.folder else ():
            print(f"note: {note}", flush=True)  # noqa: T201
        if data.folder and data.folder.clutter:
            many = plural(data.folder.clutter, "file or folder is no image", "files and folders are no images")
            print(f"note: {many}, and ignored", flush=True)  # noqa: T201
        if self.config["fit"]["find_lr"]:
            find_lr(trainer, model, data)
            raise SystemExit(0)
        self._take_folder()

    def _take_folder(self) -> None:
        """Claim a new run folder, unless there is one to go on in, and see that nobody else trains there."""
        ours = [logger for logger in self.trainer.loggers if isinstance(logger, RunTensorBoardLogger | RunCSVLogger)]
        if self.folder is None and ours:
            self.folder = run_folder.claim(Path(ours[0].root_dir).parent)
            for logger in ours:
                logger._version = run_folder.run_number(self.folder)
        if self.folder is not None:
            check_writable("trainer.default_root_dir", self.folder / "checkpoints" / "last.ckpt")
            self._held.enter_context(run_folder.lock(self.folder))

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise UserError(f"seed_everything: {error}") from None

    def _run_subcommand(self, subcommand: str) -> None:
        self._held = contextlib.ExitStack()
        try:
            super()._run_subcommand(subcommand)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if subcommand != "fit" or self.model.started:
                raise
            if isinstance(error, ValueError) and trainer_checks.raised_by_lightning(error):
                raise UserError(f"trainer: {error}") from error  # a setting does not suit the data
            if not self.resumed:
                raise
            reason = (str(error).splitlines() or [""])[0]
            raise UserError(
                f"ckpt_path: {self.config['fit']['ckpt_path']} cannot be resumed ({type(error).__name__}: {reason}); "
                "use another checkpoint of the run, or start a new run with model.weights"
            ) from error
        finally:
            self._held.close()
            if self.folder is not None:
                run_folder.remove_if_empty(self.folder)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "fit":
            return kwargs
        kwargs.pop("ckpt_path", None)  # the model is loaded already, by our own reader
        return {**kwargs, "verbose": False} if subcommand != "predict" else {**kwargs, "return_predictions": False}

    def before_validate(self) -> None:
        """Refuse a run of nothing."""
        self._refuse_no_batches("limit_val_batches")

    def before_test(self) -> None:
        """Refuse a run of nothing; make a run folder where the model lies in none."""
        self._refuse_no_batches("limit_test_batches")
        if self.trainer.is_global_zero and run_folder.run_folder_of(self.writer.folder / "report") is None:
            self.folder = self.writer.folder = run_folder.claim(self.writer.folder)

    def before_predict(self) -> None:
        """Refuse a run of nothing."""
        self._refuse_no_batches("limit_predict_batches")

    def _refuse_no_batches(self, key: str) -> None:
        if getattr(self.trainer, key) == 0:
            raise UserError(f"trainer.{key} is 0: no image would be looked at")

    def after_validate(self) -> None:
        """Print the figures."""
        limit, count = self.trainer.limit_val_batches, len(self.datamodule.splits()["val"])
        self._print_metrics("Validation", count if uses_all_batches(limit) else f"limit_val_batches {limit} of {count}")

    def after_test(self) -> None:
        """Print the figures and where the report is."""
        page = self.writer.folder / "report" / "report.html"
        self._print_metrics("Test", self.writer.metrics.get("count", 0), page.with_name("quarantine.csv"))
        if self.trainer.is_global_zero:
            print(f"report: {page}")  # noqa: T201

    def _print_metrics(self, title: str, count: object, quarantined: Path | None = None) -> None:
        if not self.trainer.is_global_zero:
            return
        values = main_metrics(self.trainer.callback_metrics)
        print_table(f"{title}: {count} images", [(n.partition("/")[2], f"{v:.4f}") for n, v in values.items()])
        self._say_bad(quarantined)

    def _say_bad(self, listed: Path | None = None) -> None:
        """Say which images could not be read: those of the figures are without them."""
        bad = self.datamodule.bad_files
        if bad:
            first = f"{printable(bad[0].path)}: {printable(bad[0].reason)}"
            where = f"; all are listed in {listed}" if listed else ""
            print(f"left out as unreadable: {plural(len(bad), 'image', 'images')}, first {first}{where}")  # noqa: T201

    def after_predict(self) -> None:
        """Print the first predictions and where the rest are."""
        found = self.writer.predictions
        if found is None:
            return
        best = found.probs.argmax(1)
        labels = [printable(found.class_names[k]) for k in best[:10]]
        rows = zip(found.paths, labels, found.probs.max(1), strict=False)
        print_table("Predictions", [(printable(path), f"{label}  {prob:.3f}") for path, label, prob in rows])
        more = f" ({len(best)} images)" if len(best) > 10 else ""
        print(f"predictions: {self.writer.path}{more}")  # noqa: T201
        for note in self.datamodule.predict_notes:
            print(f"note: {note}")  # noqa: T201
        self._say_bad(self.writer.quarantined)


def _same_folder(path: str, other: str | None) -> bool:
    return other is not None and os.path.realpath(path) == os.path.realpath(other)


def _read_yaml(command: str, leave_out: Iterable[str] = ()) -> None:
    """Have the parser read YAML by our rules."""
    jsonargparse.set_loader("yaml", lambda text: load_yaml(text, command, leave_out), (yaml.YAMLError,))


def _quieten() -> None:
    """Leave on the screen what a user needs."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # they are about Lightning's own calls
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Which process of a distributed run has died: all others are then killed.
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    for message in (
        ".*does not have many workers.*",
        ".*The number of training batches .* is smaller than the logging interval.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*Experiment logs directory .* exists and is not empty.*",  # TensorBoard and metrics.csv share it
        ".*GPU available but not used.*",
        ".*AccumulateGrad node's stream does not match.*",  # Lightning makes DDP in a stream of its own
        ".*isinstance\\(treespec, LeafSpec\\).*",
    ):
        warnings.filterwarnings("ignore", message=message)


def _leave_process_group() -> None:
    """End the threads of a distributed run before Python ends, as Lightning has NCCL do but not Gloo.

    One that lets go of its last tensor while Python goes down asks it for its lock, and aborts the process.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

"""fit, validate, test and predict: LightningCLI with this package's model, data, callbacks and checks.

``fit`` takes Lightning's config files and ``--key value`` options. The other runs take a model file, which records all
that they need; options and configs override it. Only its record of the dataset reaches the parser, as defaults.
"""

from __future__ import annotations

import atexit
import dataclasses
import inspect
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jsonargparse
import torch.distributed
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from rexnet_lit.cli import (
    commands,
    output,
    previous_run,
    settings_parser,
    shipped_configs,
    trainer_checks,
    trainer_parts,
)
from rexnet_lit.cli.config import expand, split_configs, usage
from rexnet_lit.cli.messages import raised_by_lightning
from rexnet_lit.data.datamodule import ImageFolderDataModule
from rexnet_lit.data.sampler import uses_all_batches
from rexnet_lit.data.settings import failed_checks
from rexnet_lit.models import checkpoint
from rexnet_lit.training.callbacks import run_folder
from rexnet_lit.training.callbacks.checkpoint import RunCheckpoint
from rexnet_lit.training.callbacks.loggers import RunTensorBoardLogger
from rexnet_lit.training.callbacks.signals import StopOnSignal
from rexnet_lit.training.module import RexNetModule
from rexnet_lit.training.parts import check_settings
from rexnet_lit.training.schedules import auto_epochs
from rexnet_lit.utils import process
from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.files import absolute_path

_TRAINER_DEFAULTS = {
    "max_epochs": 20,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "use_distributed_sampler": False,  # the data module's own sampler neither pads nor repeats
}


class RexNetCLI(LightningCLI):
    """The command line of the runs.

    Only ``fit`` has model settings; the other runs read the model file.
    """

    command = ""
    """The command that runs."""
    writer: Any = None
    """What writes the report or the predictions of this run."""
    folder: Path | None = None
    """The run folder that this run has created or resumes in."""

    @classmethod
    def run(cls, argv: list[str]) -> RexNetCLI:
        """Parse ``argv`` (the command first) and run it."""
        cls.command = argv[0]
        output.silence_libraries()
        atexit.register(_leave_process_group)
        if argv[0] == "fit":  # a screen that has gone is no reason to lose a training
            sys.stdout, sys.stderr = process.ignore_write_errors(sys.stdout), process.ignore_write_errors(sys.stderr)
        jsonargparse.set_parsing_settings(config_read_mode_fsspec_enabled=False)  # LightningCLI would read URLs
        strict = {"exit_on_error": False, "allow_abbrev": False}
        return cls(
            RexNetModule,
            ImageFolderDataModule,
            save_config_callback=trainer_parts.RunConfig,
            args=argv,
            seed_everything_default=0,
            trainer_defaults=_TRAINER_DEFAULTS,
            parser_kwargs={
                "prog": "rexnet-lit",
                **strict,
                **{
                    name: {**strict, "add_help": False, "description": commands.COMMANDS[name].help}
                    for name in cls.subcommands()
                },
            },
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    # Parsing

    @classmethod
    def subcommands(cls) -> dict[str, set[str]]:
        """Return the one that runs, as each parser takes time to build; without the option to read pickles."""
        found = {name: {*skipped, "weights_only"} for name, skipped in LightningCLI.subcommands().items()}
        return {cls.command: found[cls.command]} if cls.command in found else found

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        self._adding = subcommand
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        settings_parser.describe(parser, subcommand)
        return parser

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the settings of the command."""
        settings_parser.add_settings(parser, self._adding)
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})

    def parse_arguments(self, parser: LightningArgumentParser, argv: Any) -> None:
        """Parse; for the runs that read a model file, again with its record as the defaults."""
        command, args = argv[0], expand(argv)
        self.config = settings_parser.parse(parser, self._subcommand_parsers, args)
        rank_zero_only(output.print_notes)(settings_parser.unused(args, command, self.config[command]))
        if command == "fit":
            if shipped_configs.needs_default(command, split_configs(argv)[0]):
                name = shipped_configs.DEFAULT
                rank_zero_only(print)(f"using the shipped config {name} (see: rexnet-lit configs {name})", flush=True)
            self._read_resumed(self.config["fit"])
            return
        path = self.config[command].get("ckpt_path")
        if not path:
            raise UserError(f"{command} needs a model (--ckpt_path), a file of a run; usage: {usage(command)}")
        self.file = checkpoint.load_model(path)
        if command == "predict":
            return
        defaults = {f"data.{key}": value for key, value in dataclasses.asdict(self.file.data).items() if key != "fixes"}
        home = run_folder.run_folder_of(self.file.path)
        if home is not None:
            defaults["trainer.default_root_dir"] = str(home.parent.parent)
        self._subcommand_parsers[command].set_defaults(defaults)
        self.config = settings_parser.parse(parser, self._subcommand_parsers, args)
        data = self.config[command]["data"]
        for key, value in previous_run.recorded_splits(data, self.file.data, home).items():
            data[key] = value
        if self.file.data.fixes and not data["fixes"] and not data["split_file"]:
            note = f"the fixes of the model's run, {self.file.data.fixes}, are not applied to {data['root']}"
            rank_zero_only(print)(f"note: {note}; --data.fixes FILE does that", flush=True)

    def _read_resumed(self, config: Namespace) -> None:
        """Find and read the checkpoint to resume."""
        self.resumed: dict[str, Any] = {}
        if config["ckpt_path"] is None:
            return
        root = config["trainer"]["default_root_dir"]
        path, self.resumed, skipped = previous_run.read_checkpoint(config["ckpt_path"], root)
        config["ckpt_path"], self.folder = path, run_folder.run_folder_of(path)
        for line in [*skipped, f"resuming {path}, after {self.resumed['global_step']} steps"]:
            rank_zero_only(print)(line, flush=True)

    def _parse_ckpt_path(self) -> None:
        """Do not feed a checkpoint's hyper-parameters to the parser, as LightningCLI would."""

    # Building

    def instantiate_classes(self) -> None:
        """Build the data module, the model and the trainer."""
        if self.subcommand == "fit":
            self._build_fit()
        else:
            self._build_from_model()

    def _build_fit(self) -> None:
        config = self.config["fit"]
        if not config["data"]["root"]:
            raise UserError("data.root is not set; name a folder of images: --data.root DIR")
        try:
            with trainer_checks.one_line_errors():
                super().instantiate_classes()
        except UserError as error:
            raise UserError("; ".join(dict.fromkeys([str(error), *self._wrong_settings()]))) from None
        # The run folder's config.yaml must work from any folder.
        paths = [("data", key) for key in ("root", "split_file", "labels", "fixes", "class_order", "unlabelled")]
        for group, key in (*paths, ("model", "weights"), ("model", "teacher.path")):
            path = config[group][key]
            if path not in ("sorted", "natural"):
                config[group][key] = absolute_path(path)

    def _build_from_model(self) -> None:
        self.model = RexNetModule.from_model(self.file)
        config = self.config[self.subcommand]
        settings = config["data"].as_dict()
        if self.subcommand == "predict":
            settings["root"] = None
        elif settings["root"] is None:
            raise UserError(f"data.root: {self.file.path} does not record a dataset; add --data.root DIR")
        recipe, size = self.model.spec.eval_recipe, settings["image_size"]  # the settings override the model file
        recipe = dataclasses.replace(recipe, image_size=recipe.image_size if size is None else size)
        recipe = recipe.with_crop_mode(settings["crop_mode"])
        if self.model.spec.limits is not None and recipe != self.model.spec.eval_recipe:
            self.model.spec = dataclasses.replace(self.model.spec, limits=None)
            note = "no unsure, set and stranger: the model's limits hold for its own image_size and crop_mode"
            rank_zero_only(print)(f"note: {note}", flush=True)
        self.model.spec = dataclasses.replace(self.model.spec, eval_recipe=recipe)
        self.datamodule = ImageFolderDataModule(**settings, class_names=self.model.spec.class_names)
        if self.subcommand == "test" and previous_run.is_new(self.datamodule, self.file.data):
            self._test_all_images(settings)
        folder = self.datamodule.folder
        if folder is not None and folder.drawn and self.datamodule.record != self.file.data:
            rank_zero_only(print)(
                f"warning: the splits of {settings['root']} differ from those of the model's training run: "
                "images that it was trained on may be among these",
                flush=True,
            )
        config["trainer"]["logger"] = False
        with trainer_checks.one_line_errors():
            self.config_init = self.parser.instantiate_classes(self.config)
        self.trainer = self.instantiate_trainer()

    def _test_all_images(self, settings: dict[str, Any]) -> None:
        """Take all images of a folder of class folders as its test split."""
        whole = {**settings, "val_fraction": 0.0, "num_folds": 0, "fold": 0}
        self.datamodule = data = ImageFolderDataModule(**whole, class_names=self.model.spec.class_names)
        assert data.folder is not None  # noqa: S101 (for the type checker)
        images = data.folder.splits["train"]
        data.folder = dataclasses.replace(data.folder, splits={"test": images})
        note = f"{settings['root']} has no splits, so all of its images are tested"
        rank_zero_only(print)(f"note: {note}", flush=True)

    def _wrong_settings(self) -> list[str]:
        """Return what is wrong with each group of settings, to report all errors at once."""
        config = self.config["fit"]
        checks = [partial(trainer_checks.check_settings, config["trainer"]), partial(check_settings, config["model"])]
        for group, kind in (("data", ImageFolderDataModule), ("model", RexNetModule)):
            for name, parameter in inspect.signature(kind).parameters.items():
                if dataclasses.is_dataclass(parameter.default):
                    settings: Any = type(parameter.default)
                    checks.append(partial(settings, **config[group][name].as_dict()))
        return failed_checks(*checks)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with the run's loggers and callbacks."""
        settings = self._get(self.config_init, "trainer")
        given = settings["callbacks"] or []
        given = given if isinstance(given, list) else [given]
        trainer_checks.check_settings(settings)
        trainer_checks.check_callbacks(given)
        bar = trainer_parts.progress_bar(settings, given)
        if settings["max_epochs"] == "auto":
            settings["max_epochs"] = self._choose_epochs() if self.subcommand == "fit" else None
        if self.subcommand == "fit":
            saves = settings["enable_checkpointing"] is not False
            own: list[Callback] = [RunCheckpoint(accept_changes=self.config["fit"]["accept_changes"])] if saves else []
            if settings["logger"] in (None, True):
                settings["logger"] = self._logger(settings["default_root_dir"] or ".")
        else:
            settings["callbacks"] = [c for c in given if not isinstance(c, trainer_parts.TRAINING_CALLBACKS)]
            settings["enable_checkpointing"] = False
            self.save_config_callback = None
            own = [StopOnSignal(), *self._writers(Path(settings["default_root_dir"] or "."))]
        try:
            trainer = self._instantiate_trainer({**settings, **kwargs}, [*bar, *own])
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
            raise UserError(f"trainer: {error}") from None
        trainer_checks.check_trainer(trainer, settings, str(self.subcommand))
        return trainer

    def _choose_epochs(self) -> int:
        """Return what ``trainer.max_epochs: auto`` stands for, and write it into the config."""
        images, scratch = len(self.datamodule.splits()["train"]), self.model.scratch
        epochs = auto_epochs(images, self.datamodule.batch_size, scratch)
        start = ", from random weights" if scratch else ""
        rank_zero_only(print)(f"trainer.max_epochs auto: {epochs}, for {images} training images{start}", flush=True)
        self.config["fit"]["trainer"]["max_epochs"] = epochs
        return epochs

    def _logger(self, root: str) -> Logger:
        """Return the logger of a new run; for a resumed one its own, without what was logged after the checkpoint."""
        if self.folder is None:
            return RunTensorBoardLogger(root, default_hp_metric=False)
        step, runs = self.resumed["global_step"], self.folder.parent
        return RunTensorBoardLogger(
            runs.parent, name=runs.name, version=self.folder.name, default_hp_metric=False, purge_step=step
        )

    def _writers(self, root: Path) -> list[Callback]:
        if self.subcommand == "validate" and not self.config["validate"]["report"]:
            return []
        if self.subcommand == "predict":
            self.writer = trainer_parts.prediction_writer(self.datamodule.predict_output, root)
        else:
            self.writer = trainer_parts.evaluation_report(self.file.path, root)
        return [self.writer]

    # Running

    def before_fit(self) -> None:
        """Check the run as a whole, print what it trains, and take its folder."""
        trainer: Trainer = self.trainer
        data, model = self.datamodule, self.model
        if "val" not in data.splits():
            trainer.limit_val_batches = 0
        trainer_checks.check_fit(trainer, model)
        trainer_checks.disable_slurm_requeue(trainer, resumes=bool(self.resumed))
        if self.resumed:  # before anything in the run folder is changed
            model.on_load_checkpoint(self.resumed)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, RunCheckpoint):
                    callback.refuse_changes(trainer, model, data, self.resumed)
        model.start.require(resumes=bool(self.resumed))
        if not trainer.is_global_zero:
            return
        if self.folder is not None:
            with run_folder.lock(self.folder):  # now, before a logger writes there; the callbacks hold it later
                pass
        output.print_start(trainer, model, data)
        if self.config["fit"]["find_lr"]:
            from rexnet_lit.training.lr_finder import find_lr

            find_lr(trainer, model, data)
            raise SystemExit(0)
        for logger in trainer.loggers:
            if isinstance(logger, RunTensorBoardLogger) and self.folder is None:
                self.folder = run_folder.claim(Path(logger.root_dir).parent)
                logger._version = int(self.folder.name.removeprefix("version_"))

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if subcommand != "fit" or self.model.started:
                raise
            if isinstance(error, ValueError) and raised_by_lightning(error):
                raise UserError(f"trainer: {error}") from error  # a setting does not suit the data
            if not self.resumed:
                raise
            reason = (str(error).splitlines() or [""])[0]
            raise UserError(
                f"ckpt_path: {self.config['fit']['ckpt_path']} cannot be resumed ({type(error).__name__}: {reason}); "
                "use another checkpoint of the run, or start a new run with model.weights"
            ) from error
        finally:
            if self.folder is not None:
                run_folder.remove_if_empty(self.folder)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "fit":
            return kwargs
        kwargs.pop("ckpt_path", None)  # the model is already loaded, by our own reader
        return {**kwargs, "verbose": False} if subcommand != "predict" else {**kwargs, "return_predictions": False}

    def before_test(self) -> None:
        """Create a run folder if the model is in none."""
        if self.writer is None or not self.trainer.is_global_zero:
            return
        if run_folder.run_folder_of(self.writer.folder / "report") is None:
            self.folder = self.writer.folder = run_folder.claim(self.writer.folder)

    before_validate = before_test

    @rank_zero_only
    def after_validate(self) -> None:
        """Print the metrics, and where the report is."""
        limit, count = self.trainer.limit_val_batches, len(self.datamodule.splits()["val"])
        images = count if uses_all_batches(limit) else f"limit_val_batches {limit} of {count}"
        output.print_metrics(self.trainer, self.datamodule, f"Validation: {images} images")
        if self.writer is not None:
            print(f"report: {self.writer.folder / 'report' / 'report.html'}")  # noqa: T201

    @rank_zero_only
    def after_test(self) -> None:
        """Print the metrics and where the report is."""
        page, count = self.writer.folder / "report" / "report.html", self.writer.metrics.get("count", 0)
        listed = page.with_name("quarantine.csv")
        output.print_metrics(self.trainer, self.datamodule, f"Test: {count} images", listed)
        output.print_strangers(self.writer.metrics)
        print(f"report: {page}")  # noqa: T201

    @rank_zero_only
    def after_predict(self) -> None:
        """Print the first predictions and where the rest are."""
        output.print_predictions(self.writer, self.datamodule)


def _leave_process_group() -> None:
    """End the threads of a distributed run before Python exits, which Lightning does for NCCL but not for Gloo.

    A Gloo thread that frees its last tensor while Python shuts down waits for the interpreter, and aborts the process.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

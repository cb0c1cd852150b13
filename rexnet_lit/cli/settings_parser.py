"""The settings of each run as options, and parsing them with all mistakes reported at once."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jsonargparse
import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from rexnet_lit.cli.config import load_yaml, read_configs, split_configs, without_key, without_option
from rexnet_lit.cli.messages import named_key, parser_message
from rexnet_lit.cli.short_help import ShortHelp
from rexnet_lit.data.datamodule import ImageFolderDataModule
from rexnet_lit.training.module import RexNetModule
from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.files import expand_home
from rexnet_lit.utils.settings import check_range

_FROM_DATA = ("num_classes", "class_names", "image_size", "crop_mode")  # of the model
# Settings that only these runs use. The others take them too, because runs may share a config.
_USED_BY = (
    (r"data\.predict_(path|output)", ("predict",)),
    (r"data\.strangers", ("test",)),
    (r"data\.(augment|sampler|size_schedule|unlabelled)\b.*", ("fit",)),
    (r"trainer\.((max|min)_(epochs|steps)|accumulate_grad_batches|gradient_clip_\w+|limit_train_batches)", ("fit",)),
    (
        r"data\.(root|(val|test|max_bad)_fraction|num_folds|fold|group_pattern|split_file|labels|class_order|fixes|cache\w*)",
        ("fit", "validate", "test"),
    ),
)
# Settings that only some choices of another setting use.
_USED_WITH = (
    (r"model\.strategy\.frozen", "model.strategy.name", ("partial",)),
    (r"model\.strategy\.unfreeze_epochs", "model.strategy.name", ("staged",)),
    (r"model\.strategy\.views", "model.strategy.name", ("linear_probe",)),
    (r"model\.head\.(hidden|layers)", "model.head.name", ("mlp",)),
    (r"model\.head\.temperature", "model.head.name", ("cosine",)),
    (r"model\.loss\.gamma", "model.loss.name", ("focal",)),
    (r"model\.schedule\.warmup_epochs", "model.schedule.name", ("cosine", "step", "plateau", "constant")),
    (r"model\.schedule\.min_factor", "model.schedule.name", ("cosine",)),
    (r"model\.schedule\.step_epochs", "model.schedule.name", ("step",)),
    (r"model\.schedule\.gamma", "model.schedule.name", ("step", "plateau")),
    (r"model\.schedule\.patience", "model.schedule.name", ("plateau",)),
    (r"model\.schedule\.rise", "model.schedule.name", ("one_cycle",)),
    (r"data\.augment\.(num_ops|magnitude)", "data.augment.name", ("randaugment",)),
    (r"data\.cache_gb", "data.cache", ("auto", "ram", "disk")),
)


def add_settings(parser: LightningArgumentParser, command: str) -> None:
    """Add ``--help``, ``trainer`` and ``data``, and for ``fit`` the model."""
    parser.add_argument("-h", "--help", action=ShortHelp, command=command, help="show the most useful settings")
    parser.add_argument("--help_all", action="help", default=argparse.SUPPRESS, help="show all settings")
    limits = [f"limit_{name}_batches" for name in ("train", "val", "test", "predict")]
    parser.add_class_arguments(  # add_lightning_class_args cannot skip parameters
        Trainer, "trainer", skip={*limits, "max_epochs"}, instantiate=False, fail_untyped=False, sub_configs=True
    )
    help_ = "passes over the training images; auto: 20, or up to 80 of few images"
    parser.add_argument("--trainer.max_epochs", type=int | Literal["auto"] | None, help=help_)
    # `typing` caches Optional[Union[int, float]] and may return float | int, which reads 1 as 1.0: all batches.
    help_ = "how many of the batches to use (int), or which share of them (float)"
    for name in limits:
        parser.add_argument(f"--trainer.{name}", type=int | float | None, help=help_)
    parser.add_class_arguments(ImageFolderDataModule, "data", skip={"class_names"}, instantiate=command == "fit")
    if command == "validate":
        help_ = "write the report of a test, for models without a test split"
        parser.add_argument("--report", action="store_true", help=help_)
    if command == "fit":
        help_ = "resume although the images, batch size or number of processes differ from the checkpoint's"
        parser.add_argument("--accept_changes", type=bool, default=False, help=help_)
        help_ = "instead of training, try a range of learning rates and plot the losses"
        parser.add_argument("--find_lr", type=bool, default=False, help=help_)
        parser.add_lightning_class_args(RexNetModule, "model")
        for key in _FROM_DATA:
            parser.link_arguments(f"data.{key}", f"model.{key}", apply_on="instantiate")


def describe(parser: LightningArgumentParser, command: str) -> None:
    """Replace what Lightning says of its own options, some of which does not hold here."""
    resumed = "Checkpoint of a run to resume exactly, or ``last`` for that of the newest run."
    texts = {
        "ckpt_path": resumed if command == "fit" else "The model: a .ckpt or .safetensors file of a run.",
        "config": "A YAML file, or the name of a shipped config; later ones win, and options win over all.",
        "seed_everything": "Seed of all random numbers.",
        "trainer.accelerator": "Where to compute: auto, cpu, gpu, mps, ...",
        "trainer.default_root_dir": "Where lightning_logs/ is made; the current folder by default.",
        "trainer.devices": "How many devices (-1 for all), or a list of their numbers.",
        "trainer.precision": "32-true by default; 16-mixed, bf16-mixed, ... on a GPU.",
    }
    for action in parser._actions:
        action.help = texts.get(action.dest, action.help)


def keys(parser: LightningArgumentParser, command: str) -> list[str]:
    """Return the settings that a user of a command can give."""
    found = [action.dest for action in parser._actions if action.option_strings]
    hidden = {argparse.SUPPRESS, *(f"model.{key}" for key in _FROM_DATA)}
    hidden |= {key for key in found if command not in _users(key, command)}
    return [*(key for key in found if key not in hidden and not key.endswith(".help")), "help_all"]


def _users(key: str, command: str) -> tuple[str, ...]:
    """Return the runs that use a setting, as far as `_USED_BY` tells; else the one that is asked for."""
    return next((runs for pattern, runs in _USED_BY if re.fullmatch(pattern, key)), (command,))


def unused(args: list[str], command: str, config: Namespace) -> Iterator[str]:
    """Yield what to say of each option of a command line that has no effect in this run, whose settings are given."""
    for key in (arg.partition("=")[0].removeprefix("--") for arg in args if arg.startswith("--")):
        runs = _users(key, command)
        if command not in runs:
            yield f"--{key} has no effect in {command}; it is for {', '.join(runs)}"
        group, _, name = key.rpartition(".")
        if config.get(f"{group}.class_path") and name not in ("class_path", "init_args", "name"):
            yield f"--{key} has no effect with --{group}.class_path; give its arguments in init_args"
            continue
        for pattern, chooser, choices in _USED_WITH:
            if command == "fit" and re.fullmatch(pattern, key) and config[chooser] not in choices:
                yield f"--{key} has no effect with --{chooser} {config[chooser]}; it is for {', '.join(choices)}"


def parse(parser: LightningArgumentParser, own: Mapping[str, LightningArgumentParser], args: list[str]) -> Namespace:
    """Parse a command line; on an error remove the setting that it names and parse again, to report all errors at once.

    Args:
        parser: The whole parser.
        own: The parser of each command.
        args: The command line, as `config.expand` returns it.

    Raises:
        UserError: There are mistakes.
    """
    command, removed = args[0], list[str]()
    jsonargparse.set_loader("yaml", lambda text: load_yaml(text, command, removed), (yaml.YAMLError,))
    configs = read_configs(split_configs(args)[0], command)
    known = keys(own[command], command)
    problems = [
        f"{path}: model.{key} is taken from the data; remove it"
        for path, content in configs.items()
        for key in _FROM_DATA
        if content.get("model", {}).get(key) is not None  # else the parser would replace it without a word
    ]
    for _ in range(20):
        try:
            config: Namespace = parser.parse_args(args)
            break
        except (ArgumentError, TypeError, ValueError) as error:
            key, problem = named_key(str(error)) or "", parser_message(str(error), known)
            if key.startswith("model.") and command != "fit":
                problem = f"{key} is for fit; the model is taken from its file"
            options = without_option(args, key) if key else args
            shorter = {path: without_key(content, key) for path, content in configs.items()}
            files = [path for path in configs if shorter[path] is not configs[path]]
            problems.append(f"{files[-1]}: {problem}" if files and options is args else problem)
            if not files and options is args:
                break
            removed.append(key)
            args, configs = options, shorter
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))
    seed: Any = config[command]["seed_everything"]
    check_range("seed_everything", seed, "[0, 4294967295]")
    trainer = config[command]["trainer"]
    trainer["default_root_dir"] = trainer["default_root_dir"] and expand_home(trainer["default_root_dir"])
    return config

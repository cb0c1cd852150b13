"""``--help`` of the runs: how to call them, and their most useful settings; ``--help_all`` lists all settings.

The texts and choices are those of the parser, which has them from docstrings and registries.
"""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from rexnet_lit.cli import shipped_configs
from rexnet_lit.cli.config import leaves, load_yaml, usage

_EXAMPLES = {
    "fit": (
        "DIR",
        "DIR --model.backbone rexnet_150 --trainer.max_epochs 40",
        "DIR --config linear_probe --config hardware/gpu_amp",
        "DIR --ckpt_path last",
    ),
    "validate": ("lightning_logs/version_0/model.safetensors", "lightning_logs/version_0/model.safetensors DIR"),
    "test": ("lightning_logs/version_0/model.safetensors", "lightning_logs/version_0/model.safetensors DIR"),
    "predict": ("lightning_logs/version_0/model.safetensors NEW_IMAGES",),
}

_HARDWARE = ("trainer.accelerator", "trainer.devices", "trainer.precision")
_EVALUATION = ("data.root", "data.batch_size", "data.num_workers", *_HARDWARE, "trainer.default_root_dir")
_KEYS = {
    "fit": (
        "data.root", "data.image_size", "data.batch_size", "data.num_workers", "data.val_fraction",
        "data.test_fraction", "data.augment", "model.backbone", "model.pretrained", "model.weights", "model.head",
        "model.strategy", "model.optimizer", "model.optimizer.lr", "model.schedule", "model.loss", "model.select",
        "trainer.max_epochs", *_HARDWARE, "trainer.default_root_dir", "seed_everything", "ckpt_path",
    ),
    "validate": ("ckpt_path", *_EVALUATION),
    "test": ("ckpt_path", "data.strangers", *_EVALUATION),
    "predict": ("ckpt_path", "data.predict_path", "data.predict_output", *_EVALUATION[1:]),
}  # fmt: skip


class ShortHelp(argparse.Action):
    """Prints the short help of a command, and exits."""

    def __init__(self, option_strings: Any, dest: str, command: str, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=kwargs["help"])
        self.command = command

    def __call__(self, parser: Any, *args: Any) -> None:
        """Print and exit."""
        width = min(shutil.get_terminal_size().columns, 120)
        print(page(parser, self.command, max(width, 60)))  # noqa: T201
        parser.exit()


def page(parser: Any, command: str, width: int) -> str:
    """Return the short help of a command.

    Args:
        parser: Its parser.
        command: Its name.
        width: The most characters of a line.
    """
    values, source = dict[str, Any](), "those of data are the model's own by default"
    if command == "fit":
        file = shipped_configs.named(shipped_configs.DEFAULT)
        values = dict(leaves(load_yaml(file.read_text("utf-8"), command)))
        source = f"defaults are those of the shipped config {shipped_configs.DEFAULT}"
    lines = [f"usage: {usage(command)}", "", parser.description, "", "examples:"]
    lines += [f"  rexnet-lit {command} {example}" for example in _EXAMPLES[command]]
    lines += ["", *textwrap.wrap(f"the most useful settings [{source}]:", width)]
    actions = {action.dest: action for action in parser._actions}
    for key in _KEYS[command]:
        lines += _entry(key, _describe(key, parser, actions), _default(key, actions, values), width)
    names = ", ".join(shipped_configs.shipped())
    more = "--help_all lists all settings, --print_config prints them as a YAML file for --config."
    lines += ["", *textwrap.wrap(more, width)]
    lines += textwrap.wrap(f"Shipped configs: {names}", width, subsequent_indent="  ")
    return "\n".join(lines)


def _describe(key: str, parser: Any, actions: Mapping[str, argparse.Action]) -> str:
    """Return the first sentence of a setting's help; for one with a name, what it is, and the names."""
    action = actions.get(f"{key}.name", actions[key])
    choices = re.fullmatch(r"\{(.*)\}", str(action.metavar or ""))
    if f"{key}.name" in actions and choices:
        return f"{re.split(r'[;:.]', parser.groups[key].title)[0]}: {choices[1].replace(',', ', ')}"
    text = " ".join((action.help or "").replace("`", "").split())
    found = re.match(r"(.*?[^.])\.(\s|$)", text)
    return found[1] if found else text


def _default(key: str, actions: Mapping[str, argparse.Action], values: Mapping[str, Any]) -> Any:
    key = f"{key}.name" if f"{key}.name" in actions else key
    return values.get(key, actions[key].default)


def _entry(key: str, text: str, default: Any, width: int) -> Iterator[str]:
    shown = str(default).lower() if isinstance(default, bool) else default
    text += f" [{shown}]" if default is not None else ""
    margin = 29
    yield from textwrap.wrap(text, width, initial_indent=f"  --{key}".ljust(margin), subsequent_indent=" " * margin)

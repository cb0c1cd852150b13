"""What a user writes, before it is parsed: YAML files within bounds, and short forms written out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from rexnet_lit.errors import UserError, did_you_mean
from rexnet_lit.spec import EvalRecipe
from rexnet_lit.transforms import AugmentSettings

__all__ = ["expand", "load_yaml", "one_line", "read_augment"]

_yaml_load = jsonargparse.get_loader("yaml")  # before ours takes its place
# Settings for which a bare name stands for {name: ...}.
_NAMED = {"model": ("head", "strategy", "optimizer", "schedule", "loss"), "data": ("augment",)}
_MAX_ALIASES = 20  # of a YAML file; nested aliases grow exponentially
_MAX_DEPTH = 40  # of nesting; parsers recurse
_MAX_CONFIG_BYTES = 2**20


def expand(argv: list[str]) -> list[str]:
    """Write ``--model.head mlp`` as ``--model.head.name mlp``, and likewise for the other settings with a name."""
    keys = {f"--{group}.{key}" for group, names in _NAMED.items() for key in names}
    expanded = list(argv)
    for i, argument in enumerate(argv):
        key, equals, value = argument.partition("=")
        following = value if equals else (argv[i + 1] if i + 1 < len(argv) else "")
        if key in ("--config", "-c") and "://" in following:
            raise UserError(f"{key}: {following!r} is an address; configs are read from local files only")
        if key in keys and re.fullmatch(r"\w+", following):
            expanded[i] = f"{key}.name{equals}{value}"
    return expanded


def load_yaml(text: str, command: str) -> Any:
    """Read YAML as jsonargparse does, within bounds, with our short forms written out."""
    if len(text) > _MAX_CONFIG_BYTES:
        raise yaml.YAMLError(f"a config of more than {_MAX_CONFIG_BYTES} bytes")
    _check_yaml(text)
    value = _yaml_load(text)
    if not isinstance(value, dict):
        return value
    for group in ("trainer", "data", "model"):
        if value.get(group, {}) is None:  # a section whose settings are all commented out
            del value[group]
        elif not isinstance(value.get(group, {}), dict):
            raise yaml.YAMLError(f"{group} must hold settings, such as {group}: {{key: value}}")
    for group, names in _NAMED.items():
        section: Any = value.get(group)
        for name in names if isinstance(section, dict) else ():
            if isinstance(section.get(name), str):
                section[name] = {"name": section[name]}
            elif isinstance(section.get(name), list):
                section[name] = {"transforms": section[name]}
    if command != "fit":  # a fit's config may be given to the other runs: its model is in the model file
        value = {key: part for key, part in value.items() if key not in ("model", "ckpt_path")}
    return value


def _check_yaml(text: str) -> None:
    """Refuse what a parser would spend all memory or its whole stack on, and keys that stand twice in one place.

    Raises:
        yaml.YAMLError: The text is no YAML, or one of these.
    """
    aliases = 0
    stack: list[tuple[set[str] | None, bool]] = []  # of each open mapping its keys, and whether a key is next
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionEndEvent):
            stack.pop()
            continue
        if not isinstance(event, yaml.NodeEvent):
            continue
        aliases += isinstance(event, yaml.AliasEvent)
        if aliases > _MAX_ALIASES:
            raise yaml.YAMLError(f"a config with more than {_MAX_ALIASES} aliases")
        keys, is_key = stack[-1] if stack else (None, False)
        if keys is not None:
            if is_key and isinstance(event, yaml.ScalarEvent):
                if event.value in keys:
                    raise yaml.YAMLError(f"the key {event.value!r} stands twice in one place")
                keys.add(event.value)
            stack[-1] = keys, not is_key
        if isinstance(event, yaml.CollectionStartEvent):
            is_mapping = isinstance(event, yaml.MappingStartEvent)
            stack.append((set() if is_mapping else None, is_mapping))
            if len(stack) > _MAX_DEPTH:
                raise yaml.YAMLError(f"a config nested deeper than {_MAX_DEPTH}")


def read_augment(config: str) -> tuple[AugmentSettings, int]:
    """Return the training recipe of a config, and the image size in pixels.

    Raises:
        UserError: The file cannot be read, or the recipe is wrong.
    """
    try:
        data = (load_yaml(Path(config).read_text("utf-8"), "fit") or {}).get("data") or {}
        size = data.get("image_size") or EvalRecipe().image_size
        return AugmentSettings(**(data.get("augment") or {})), int(size)
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"--config {config}: {' '.join(str(error).split())}") from None


def one_line(message: str, known: list[str]) -> str:
    """Return the parser's complaint as one line, with the nearest key where one is not known."""
    unknown = re.search(
        r"(?:unrecognized arguments: --|accept option '|Key '|[Nn]o action for key \"|nested key ')([\w.]+)", message
    )
    hint = did_you_mean(unknown.group(1), known) if unknown else ""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines) + hint

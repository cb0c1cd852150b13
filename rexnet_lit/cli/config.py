"""Config files and options before they are parsed: YAML is read here, and short forms are written out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jsonargparse
import yaml

from rexnet_lit.cli import shipped_configs
from rexnet_lit.cli.messages import Parser
from rexnet_lit.data.augmentation import AugmentSettings
from rexnet_lit.data.settings import DataRecord, EvalRecipe
from rexnet_lit.utils.errors import UserError

_yaml_load = jsonargparse.get_loader("yaml")  # before `load_yaml` replaces it
# Settings for which a bare word is short for a field: a name for {name: ...}, a file for {path: ...}.
_SHORT = {
    "model": {**dict.fromkeys(("head", "strategy", "optimizer", "schedule", "loss"), "name"), "teacher": "path"},
    "data": {"augment": "name"},
}
_OWN = {"optimizer": "adamw", "schedule": "cosine", "loss": "cross_entropy"}
"""The settings that take a ``class_path``. Without a name, jsonargparse refuses the mapping as another class's."""
ARGUMENTS = {
    "fit": {"DIR": "data.root"},
    "validate": {"MODEL": "ckpt_path", "DIR": "data.root"},
    "test": {"MODEL": "ckpt_path", "DIR": "data.root"},
    "predict": {"MODEL": "ckpt_path", "PATH": "data.predict_path"},
}
"""The keys that the arguments without an option set, in their order."""

_WITHOUT_VALUE = ("-h", "--help", "--help_all", "--print_config", "--report")
_FIT_ONLY = ("model", "ckpt_path", "accept_changes", "find_lr")
_MAX_ALIASES = 20
_MAX_BYTES = 2**20


def split_configs(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the config files that a command line names, and its other arguments.

    Raises:
        UserError: There is no such config, or ``--config`` has no value.
    """
    parser = Parser(prog=f"rexnet-lit {argv[0]}", add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    found, rest = parser.parse_known_args(argv)
    return [shipped_configs.find(name) for name in found.config], rest


def expand(argv: Sequence[str]) -> list[str]:
    """Return a command line with its configs first, so that options override them wherever they stand.

    A ``fit`` without a config, or with overlays only, gets the default one. An argument without an option gets its
    option: ``fit DIR`` becomes ``fit --data.root DIR``. ``--model.head mlp`` becomes ``--model.head.name mlp``, and
    likewise for the other settings with a name.
    """
    configs, rest = split_configs(argv)
    rest = _name_arguments(rest, configs)
    if shipped_configs.needs_default(argv[0], configs):
        configs = [str(shipped_configs.named(shipped_configs.DEFAULT)), *configs]
    keys = {f"--{group}.{key}": field for group, fields in _SHORT.items() for key, field in fields.items()}
    expanded = []
    for argument, following, previous in zip(rest, [*rest[1:], ""], ["", *rest[:-1]], strict=True):
        key, equals, value = argument.partition("=")
        name = _OWN.get((previous if argument.startswith("{") else key).removeprefix("--model."))
        if name and re.search(r"\bclass_path\b", argument) and not re.search(r"\bname\b", argument):
            argument = argument.replace("{", f"{{name: {name}, ", 1)
        pattern = r"\w+" if keys.get(key) == "name" else r"[^{].*"
        short = key in keys and re.fullmatch(pattern, value if equals else following)
        expanded.append(f"{key}.{keys[key]}{equals}{value}" if short else argument)
    return [*expanded[:1], *(f"--config={path}" for path in configs), *expanded[1:]]


def usage(command: str) -> str:
    """Return the one-line usage of a run."""
    arguments = " ".join("[DIR]" if name == "DIR" else name for name in ARGUMENTS[command])
    return f"rexnet-lit {command} {arguments} [--config FILE] [--KEY VALUE ...]"


def _name_arguments(argv: list[str], configs: list[str]) -> list[str]:
    """Return a command line with an option before each argument that has none.

    Raises:
        UserError: There are too many or too few, or one is also given by its option.
    """
    command, found, named = argv[0], list[str](), list[str]()
    words = iter(argv[1:])
    for word in words:
        if not word.startswith("-") or word == "-":
            found.append(word)
            continue
        named.append(word)
        if "=" not in word and word not in _WITHOUT_VALUE:
            named += [value for value in (next(words, None),) if value is not None]
    keys = ARGUMENTS[command]
    if len(found) > len(keys):
        raise UserError(f"{command}: unexpected argument {found[len(keys)]!r}; usage: {usage(command)}")
    given = {word.partition("=")[0] for word in named}
    for name, value in zip(keys, found, strict=False):
        if f"--{keys[name]}" in given:
            raise UserError(f"{command}: {name} is given twice, as {value!r} and by --{keys[name]}; remove one of them")
    for name in list(keys)[len(found) :] if found and not configs else ():
        if name != "DIR" and f"--{keys[name]}" not in given:
            raise UserError(f"{command}: {name} is missing; usage: {usage(command)}")
    options = [f"--{key}={value}" for key, value in zip(keys.values(), found, strict=False)]
    return [command, *options, *named]


class _Checker(yaml.SafeLoader):
    """Refuses duplicate keys, because a setting is never silently ignored, and alias bombs."""

    aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.aliases += self.check_event(yaml.AliasEvent)
        if self.aliases > _MAX_ALIASES:  # nested aliases grow exponentially
            raise yaml.YAMLError(f"more than {_MAX_ALIASES} aliases")
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in set(keys):
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} is given twice")
        return node


def load_yaml(text: str, command: str, leave_out: Iterable[str] = ()) -> Any:
    """Read YAML as jsonargparse does, with short forms written out.

    Keys in ``leave_out`` are dropped, and so are the settings of a fit if ``command`` is another run: its model comes
    from a file.
    """
    if len(text) > _MAX_BYTES:
        raise yaml.YAMLError(f"more than {_MAX_BYTES} bytes")
    try:
        yaml.compose(text, Loader=_Checker)
    except RecursionError:
        raise yaml.YAMLError("too deeply nested") from None
    value = _yaml_load(text)
    if not isinstance(value, dict):
        return value
    for group in ("trainer", "data", "model"):
        section = value.get(group, {})
        if section is None:  # all its settings are commented out
            del value[group]
        elif not isinstance(section, dict):
            raise yaml.YAMLError(f"{group} must be a mapping, such as {group}: {{key: value}}")
        for name, field in _SHORT.get(group, {}).items() if section else ():
            if isinstance(section.get(name), str) or (field == "path" and section.get(name, "") is None):
                section[name] = {field: section[name]}
            elif isinstance(section.get(name), list):
                section[name] = {"transforms": section[name]}
        for name, kind in _OWN.items() if group == "model" else ():
            if isinstance(section.get(name), dict) and "class_path" in section[name]:
                section[name].setdefault("name", kind)
        if section and isinstance(section.get("callbacks"), dict):  # for a list the parser's messages are better
            section["callbacks"] = [section["callbacks"]]
    for key in leave_out:
        value = without_key(value, key)
    return value if command == "fit" else {key: part for key, part in value.items() if key not in _FIT_ONLY}


def read_configs(paths: Iterable[str], command: str) -> dict[str, Any]:
    """Return the contents of config files by path.

    Raises:
        UserError: A file cannot be read or contains no settings.
    """
    found = {}
    for path in paths:
        if Path(path).is_file():  # a pipe can be read only once, by the parser
            try:
                found[path] = load_yaml(_read(path), command)
            except (OSError, yaml.YAMLError) as error:
                raise UserError(f"{path}: {error}") from None
            if not isinstance(found[path], dict):
                raise UserError(f"{path}: the file contains no settings, such as data: {{root: DIR}}")
    return found


class CheckSettings(NamedTuple):
    """What `check` takes from a config; ``image_size`` is 0 where it is not set."""

    record: DataRecord = DataRecord()
    augment: AugmentSettings | None = None
    recipe: EvalRecipe = EvalRecipe()
    image_size: int = 0
    backbone: str = "rexnet_100"
    weights: str | None = None


def read_for_check(path: str) -> CheckSettings:
    """Return what `check` takes from a config.

    Raises:
        UserError: The file cannot be read, or a setting is wrong.
    """
    path = shipped_configs.find(path)
    try:
        config = load_yaml(_read(path), "fit") or {}
        data, model = config.get("data") or {}, config.get("model") or {}
        record = DataRecord.of({**data, "root": None})
        size, backbone, weights = int(data.get("image_size") or 0), model.get("backbone"), model.get("weights")
        recipe = EvalRecipe(size or EvalRecipe().image_size).with_crop_mode(data.get("crop_mode"))
        augment = AugmentSettings(**(data.get("augment") or {}))
        return CheckSettings(record, augment, recipe, size, backbone or CheckSettings().backbone, weights)
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or error  # without the file name, which is in the message
        raise UserError(f"--config {path}: {reason}") from None


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except UnicodeDecodeError:
        raise yaml.YAMLError("not a UTF-8 text file; save it with that encoding") from None


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings of a config by their full keys, such as ``data.augment.name``."""
    for key, value in config.items():
        yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


def without_key(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a config without ``key`` (as ``data.root``); the same object if it has no such key."""
    first, _, rest = key.partition(".")
    if not isinstance(config, dict) or first not in config:
        return config
    if not rest:
        return {name: value for name, value in config.items() if name != first}
    part = without_key(config[first], rest)
    return config if part is config[first] else {**config, first: part}


def without_option(argv: list[str], key: str) -> list[str]:
    """Return a command line without the first option that sets ``key`` or a group of it; the same object if none."""
    for i, argument in enumerate(argv):
        option, equals, _ = argument.partition("=")
        if option.startswith("--") and f"{key}.".startswith(f"{option.removeprefix('--')}."):
            single = equals or i + 1 == len(argv) or argv[i + 1].startswith("--")
            return argv[:i] + argv[i + (1 if single else 2) :]
    return argv

"""What a user writes, before it is parsed: YAML files within bounds, and short forms written out."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from rexnet_lit.data.settings import DataRecord, EvalRecipe
from rexnet_lit.data.transforms import AugmentSettings
from rexnet_lit.utils.errors import UserError, did_you_mean

_yaml_load = jsonargparse.get_loader("yaml")  # before ours takes its place
# Settings for which a bare name stands for {name: ...}.
_NAMED = {"model": ("head", "strategy", "optimizer", "schedule", "loss"), "data": ("augment",)}
_CONFIG = ("--config", "-c")
_OF_FIT = ("model", "ckpt_path", "accept_changes", "find_lr")
_MAX_ALIASES = 20  # of a YAML file; nested aliases grow exponentially
_MAX_DEPTH = 40  # of nesting; parsers recurse
_MAX_CONFIG_BYTES = 2**20


def expand(argv: list[str]) -> list[str]:
    """Bring a command line into the form that the parser takes.

    Configs come first, so that options beat them wherever they stand; ``--model.head mlp`` becomes
    ``--model.head.name mlp``, and likewise for the other settings with a name.

    Args:
        argv: The run's name, and what follows it.
    """
    argv = _configs_first(argv)
    keys = {f"--{group}.{key}" for group, names in _NAMED.items() for key in names}
    expanded = list(argv)
    for i, argument in enumerate(argv):
        if _brackets(argument) > _MAX_DEPTH:
            raise UserError(f"{argument[:40]}...: nested deeper than {_MAX_DEPTH}")
        key, equals, value = argument.partition("=")
        following = value if equals else (argv[i + 1] if i + 1 < len(argv) else "")
        if key in _CONFIG and "://" in following:
            raise UserError(f"{key}: {following!r} is an address; configs are read from local files only")
        if key in keys and re.fullmatch(r"\w+", following):
            expanded[i] = f"{key}.name{equals}{value}"
    return expanded


def _configs_first(argv: list[str]) -> list[str]:
    configs: list[str] = []
    rest: list[str] = []
    arguments = iter(argv[1:])
    for argument in arguments:
        if argument in _CONFIG:
            configs += [argument, *itertools.islice(arguments, 1)]
        else:
            (configs if argument.partition("=")[0] in _CONFIG else rest).append(argument)
    return [*argv[:1], *configs, *rest]


def load_yaml(text: str, command: str, leave_out: Iterable[str] = ()) -> Any:
    """Read YAML as jsonargparse does, within bounds, with our short forms written out.

    Args:
        text: Of a file, or of an option's value.
        command: The run that it is for.
        leave_out: Keys of a file that are not wanted.
    """
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
    trainer = value.get("trainer", {})
    if isinstance(trainer.get("callbacks"), dict):  # in a list, the parser can say what is wrong with it
        trainer["callbacks"] = [trainer["callbacks"]]
    for key in leave_out:
        value = without(value, key)
    if command != "fit":  # a fit's config may be given to the other runs: its model is in the model file
        value = {key: part for key, part in value.items() if key not in _OF_FIT}
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
        if isinstance(event, yaml.ScalarEvent) and _brackets(event.value) > _MAX_DEPTH:  # jsonargparse parses it again
            raise yaml.YAMLError(f"a value nested deeper than {_MAX_DEPTH}")
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


def _brackets(text: str) -> int:
    """Return how many brackets are open at once in a text, at most."""
    depth = most = 0
    for char in re.findall(r"[\[\]{}]", text):
        depth += 1 if char in "[{" else -1
        most = max(most, depth)
    return most


def read_data(config: str) -> tuple[DataRecord, AugmentSettings, int]:
    """Return what a config says of a dataset, its training recipe, and the image size in pixels.

    Raises:
        UserError: The file cannot be read, or what it says is wrong.
    """
    try:
        data = (load_yaml(_text(config), "fit") or {}).get("data") or {}
        size = data.get("image_size") or EvalRecipe().image_size
        fields = [field.name for field in dataclasses.fields(DataRecord) if field.name != "root"]
        record = DataRecord(**{name: data[name] for name in fields if name in data})
        return record, AugmentSettings(**(data.get("augment") or {})), int(size)
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        said = getattr(error, "strerror", None) or error  # the system's words without the file's name again
        raise UserError(f"--config {config}: {' '.join(str(said).split())}") from None


def _text(config: str) -> str:
    try:
        return Path(config).read_text("utf-8")
    except UnicodeDecodeError:
        raise yaml.YAMLError("it is not text in UTF-8; save it as that") from None


def read_configs(argv: list[str], command: str) -> dict[str, Any]:
    """Return what each config file on a command line says, by its path.

    Raises:
        UserError: One cannot be read, or holds no settings; it is named.
    """
    found = {}
    for key, following in itertools.pairwise([*argv, ""]):
        option, equals, value = key.partition("=")
        path = value if equals else following
        if option in _CONFIG and Path(path).is_file():
            try:
                found[path] = load_yaml(_text(path), command)
            except (OSError, yaml.YAMLError) as error:
                raise UserError(f"{path}: {error}") from None
            if not isinstance(found[path], dict):
                raise UserError(f"{path}: it holds no settings, such as data: {{root: DIR}}")
    return found


_KEY = re.compile(
    r"(?:unrecognized arguments: --|accept option '|Key '|[Nn]o action for key \"|nested key '|Parser key \")([\w.]+)"
)


def named_key(message: str) -> str | None:
    """Return the key that a complaint of the parser's is about."""
    found = _KEY.search(message)
    return found.group(1) if found else None


def without(value: Any, key: str) -> Any:
    """Return a config, or the arguments of a command line, less what they say of ``key``; itself where nothing is."""
    if isinstance(value, list):
        for i, argument in enumerate(value):
            option, equals, _ = argument.partition("=")
            if option.startswith("--") and key.startswith(option.removeprefix("--")):
                single = equals or i + 1 == len(value) or value[i + 1].startswith("--")
                return value[:i] + value[i + (1 if single else 2) :]
        return value
    first, _, rest = key.partition(".")
    if not isinstance(value, dict) or first not in value:
        return value
    part = without(value[first], rest) if rest else None
    if rest and part is value[first]:
        return value
    return {k: part if k == first else v for k, v in value.items() if rest or k != first}


_PLAINLY = (
    (r'^Parser key "([\w.]+)": ', r"\1: "),
    (r"<class '([\w.]+)'>", r"\1"),
    (r"typing\.", ""),
    (r"Expected a (\S.*?)\. Got value: (.*)$", r"expected \1, got \2"),
    (r"Literal\[(.*?)\]", r"one of \1"),
    (
        r"Does not validate against any of the Union subtypes Subtypes: \[(.*)\] "
        r"Errors:(?: - Expected (?:(?! - ).)*)+ Given value type: \w+ Given value: (.*)$",
        r"expected \1, got \2",
    ),
    (r"\bNoneType\b", "null"),
    (r"- Expected a path but \S+ either not accessible or invalid - ", ""),  # it may be no file's name at all
    (r"^argument data\.\w+ --> model\.(\w+): .*", r"model.\1 is taken from the data: leave it out"),
    (r"(unrecognized arguments: --\S+(?: (?!--)\S+)*).*", r"\1"),  # others after it are named by themselves
    (r"^Subcommand '\w+' does not accept option", "no setting is called"),
)
"""What the parser says, and how a user would say it."""


_CLASS_PROBLEM = re.compile(
    r"^(?P<indent> *)- (?:Problem with given class_path '(?P<path>.+?)':|"
    r"Expected a dot import path string: (?P<unknown>\S+)|"
    r"Import path (?P<other>\S+) does not correspond to)(?P<reason>.*?)(?=\n(?!(?P=indent) )|\Z)",
    re.DOTALL | re.MULTILINE,
)


def class_problem(message: str) -> str | None:
    """Return what the parser has against a class that was named; None where that is not what it complains of."""
    problems = list(_CLASS_PROBLEM.finditer(message))
    if not problems:
        return None
    found = next((problem for problem in problems if problem["path"]), problems[0])
    if found["unknown"]:
        from lightning.pytorch import callbacks, loggers  # seconds, which are spent where they help

        hint = did_you_mean(found["unknown"], (loggers if "trainer.logger" in message else callbacks).__all__)
        if not hint and "Given value type: <class 'str'>" in message:  # it need not have been meant for a class
            return None
        return f"no class is called {found['unknown']!r}{hint or '; give its whole path, as package.Class'}"
    reason = _plainly(found["reason"])
    return f"{found['path']}: {reason}" if found["path"] else f"{found['other']} is not {reason}"


def one_line(message: str, known: list[str]) -> str:
    """Return the parser's complaint as one line, with the nearest key where one is not known."""
    key = named_key(message)
    problem = class_problem(message)
    if problem is not None:
        return f"{key}: {problem}"
    hint = did_you_mean(key, known) if key is not None and key not in known else ""
    return _plainly(message) + hint


def _plainly(message: str) -> str:
    text = " ".join(message.split())
    for pattern, plain in _PLAINLY:
        text = re.sub(pattern, plain, text)
    return text

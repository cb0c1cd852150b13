"""Settings: given as a name, a mapping or a dataclass, and checked with one message for each kind of mistake."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import numbers
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from rexnet_lit.utils.errors import UserError, did_you_mean

T = TypeVar("T")


def settings_of(kind: type[T], value: T | str | Mapping[str, Any], key: str) -> T:
    """Return ``value`` as settings: in Python a name stands for its defaults, and a mapping for its fields.

    Args:
        kind: A dataclass.
        value: Such settings, a name (the first field), or a mapping.
        key: The setting, as the user writes it: ``model.loss``.

    Raises:
        UserError: It is something else, or has an unknown key.
    """
    if isinstance(value, str):
        return kind(value)  # type: ignore[call-arg]
    if isinstance(value, Mapping):
        known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
        for name in value:
            if name not in known:
                raise UserError(f"{key}.{name}: there is no such setting{did_you_mean(name, known)}")
        made = kind(**value)
        check_types(key, kind, value)
        return made
    if not isinstance(value, kind):
        raise UserError(f"{key} is {value!r}; expected a name, a mapping, or {kind.__name__}")
    return value


def settings_and_own(kind: type[T], value: Any, key: str) -> tuple[T, Any]:
    """Return settings, and the user's own part in their place: an object or what builds it; None if there is none.

    Args:
        kind: A dataclass with the fields ``class_path`` and ``init_args``.
        value: As `settings_of` takes it, perhaps with a ``class_path``; or an object, a class or a function.
        key: The setting, as the user writes it: ``model.loss``.

    Raises:
        UserError: It is neither settings nor such an object, or there is no such class.
    """
    if isinstance(value, kind | str | Mapping) or not callable(value):
        settings: Any = settings_of(kind, value, key)
        return settings, own_part(settings.class_path, settings.init_args, key)
    own = {"class_path": class_path_of(value), "init_args": plain_arguments(value)}
    return kind(**own), value


def own_part(class_path: str | None, init_args: Mapping[str, Any] | None, key: str) -> Callable[..., Any] | None:
    """Return what builds the class with a path; None for no path."""
    return None if class_path is None else functools.partial(import_class(class_path, key), **(init_args or {}))


def import_class(path: str, key: str) -> Any:
    """Return the class or function with a path such as ``torch.nn.CrossEntropyLoss``.

    Raises:
        UserError: There is none.
    """
    module, _, name = path.rpartition(".")
    try:
        found = importlib.import_module(module) if module else None
    except ImportError as error:
        raise UserError(f"{key}.class_path: {path!r} cannot be imported: {error}") from None
    if not hasattr(found, name):
        near = did_you_mean(name, dir(found)) if found else "; give its full path, such as my_module.MyClass"
        raise UserError(f"{key}.class_path: there is no class {path!r}{near}")
    return getattr(found, name)


def class_path_of(value: Any) -> str:
    """Return the path of an object's class, of a class, or of a function."""
    while isinstance(value, functools.partial):
        value = value.func
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def overridden(value: object, method: str) -> str | None:
    """Return the path of a method that a user's subclass has in place of ours; None if there is none."""
    own = getattr(type(value), method)
    return None if own.__module__.startswith("rexnet_lit.") else class_path_of(own)


def plain_arguments(value: Any) -> dict[str, Any] | None:
    """Return the numbers and texts that a ``partial`` passes, or that an object holds; None if there are none."""
    if isinstance(value, functools.partial):
        given = {str(i): argument for i, argument in enumerate(value.args)} | value.keywords
        given = (plain_arguments(value.func) or {}) | given
    else:
        given = {} if hasattr(value, "__qualname__") else getattr(value, "__dict__", {})
    kept = {k: v for k, v in given.items() if isinstance(v, str | int | float | tuple | list) and k[0] != "_"}
    kept.pop("training", None)
    return kept or None


def call_own(own: Callable[..., Any], key: str, *args: Any) -> Any:
    """Call a user's own class or function.

    Raises:
        UserError: It refuses its arguments.
    """
    try:
        return own(*args)
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}: {class_path_of(own)} cannot be built: {error}") from error


def check_choice(key: str, value: object, choices: Iterable[object]) -> None:
    """Raise `UserError` unless a setting is one of ``choices``, such as the keys of a registry."""
    known = [str(choice) for choice in choices]
    if str(value) not in known:
        raise UserError(f"{key} is {value!r}; expected one of {', '.join(known)}{did_you_mean(str(value), known)}")


_PLAIN: dict[Any, tuple[type, ...]] = {
    bool: (bool,),
    int: (numbers.Integral,),
    float: (numbers.Real,),
    str: (str, os.PathLike),
    type(None): (type(None),),
}


def check_types(group: str, kind: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Check the plain settings, of bool, int, float or str, that are given in Python; the command line parses them.

    Args:
        group: What the settings belong to: ``model``.
        kind: A dataclass or a constructor, with the types.
        values: The settings by name.

    Raises:
        UserError: One has another type.
    """
    for name, hint in typing.get_type_hints(kind).items():
        kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        if name not in values or not all(part in _PLAIN for part in kinds):
            continue
        value, allowed = values[name], tuple(found for part in kinds for found in _PLAIN[part])
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join("None" if part is type(None) else part.__name__ for part in kinds)
            raise UserError(f"{group}.{name} is {value!r}; expected {names}")


def check_range(
    key: str, value: float | None, interval: str, hint: str = "", *, optional: bool = False, whole: bool = False
) -> None:
    """Raise `UserError` unless a setting is a number in an interval.

    Args:
        key: The setting, as the user writes it: ``model.ema``.
        value: What it is set to.
        interval: In mathematical notation: ``[0, 1)`` holds 0 but not 1; ``inf`` is no bound.
        hint: What to do, or an example, for the end of the message.
        optional: Whether it may be None.
        whole: Whether it must be an integer.
    """
    if optional and value is None:
        return
    if not isinstance(value, numbers.Integral if whole else numbers.Real) or not _is_within(value, interval):
        end = f"; {hint}" if hint else ""
        shown = repr(value) if isinstance(value, str) else value
        raise UserError(f"{key} is {shown}; expected {'an integer' if whole else 'a number'} in {interval}{end}")


def _is_within(value: Any, interval: str) -> bool:
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return bool(above and below)  # NaN is neither

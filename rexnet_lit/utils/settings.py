"""Settings: given as a name, a mapping or a dataclass, and checked with one message for each kind of mistake."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any, TypeVar

from rexnet_lit.utils.errors import UserError, did_you_mean

T = TypeVar("T")


def settings_of(kind: type[T], value: T | str | dict[str, Any]) -> T:
    """Return ``value`` as settings: in Python a name stands for its defaults, and a mapping for its fields."""
    if isinstance(value, str):
        return kind(name=value)  # type: ignore[call-arg]
    return kind(**value) if isinstance(value, dict) else value


def check_choice(key: str, value: object, choices: Iterable[object]) -> None:
    """Raise `UserError` unless a setting is one of ``choices``, such as the keys of a registry."""
    known = [str(choice) for choice in choices]
    if str(value) not in known:
        raise UserError(f"{key} is {value!r}; expected one of {', '.join(known)}{did_you_mean(str(value), known)}")


def check_range(key: str, value: float | None, interval: str, hint: str = "", *, optional: bool = False) -> None:
    """Raise `UserError` unless a setting is a number in an interval.

    Args:
        key: The setting, as the user writes it: ``model.ema``.
        value: What it is set to.
        interval: In mathematical notation: ``[0, 1)`` holds 0 but not 1; ``inf`` is no bound.
        hint: What to do, or an example, for the end of the message.
        optional: Whether it may be None.
    """
    if optional and value is None:
        return
    if not isinstance(value, numbers.Real) or not _is_within(value, interval):
        end = f"; {hint}" if hint else ""
        shown = repr(value) if isinstance(value, str) else value
        raise UserError(f"{key} is {shown}; expected a number in {interval}{end}")


def _is_within(value: Any, interval: str) -> bool:
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return bool(above and below)  # NaN is neither

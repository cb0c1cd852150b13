"""Settings given as a name, a mapping or a dataclass."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


def settings_of(kind: type[T], value: T | str | dict[str, Any]) -> T:
    """Return ``value`` as settings: in Python a name stands for its defaults, and a mapping for its fields."""
    if isinstance(value, str):
        return kind(name=value)  # type: ignore[call-arg]
    return kind(**value) if isinstance(value, dict) else value

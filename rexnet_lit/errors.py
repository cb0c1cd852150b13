"""The exceptions that the command line turns into one line: a mistake a user can mend, and being told to stop.

Everything below the command line raises `UserError`; the command line prints it as one line and exits with 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["Stopped", "UserError", "did_you_mean"]


class UserError(Exception):
    """What is wrong, where (file or key), and what to do: one line, no traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class Stopped(Exception):  # noqa: N818 (no error)
    """The process was told to stop, and has saved what there was; it exits with 128 + the signal's number."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``'; did you mean "x"?'`` for the nearest known names, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""

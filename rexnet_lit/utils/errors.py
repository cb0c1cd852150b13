"""The exceptions that the command line prints as one line: mistakes of the user (exit code 2), and being stopped."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# Control characters, line separators, direction overrides (they make a name read as another) and surrogates.
_INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")

_OPENCV_BROKEN = (
    "OpenCV cannot be imported ({}); this happens when opencv-python and opencv-python-headless were both installed "
    "and one was removed: pip install --force-reinstall opencv-python-headless"
)


def opencv_message(error: BaseException) -> str | None:
    """Return how to repair OpenCV if it, or a system library that it needs, caused an error of an import."""
    of_opencv = isinstance(error, ImportError | AttributeError) and re.search(r"\bcv2\b|\blibGL\b", str(error))
    return _OPENCV_BROKEN.format(error) if of_opencv else None


def printable(text: str) -> str:
    r"""Return ``text`` with invisible and undecodable characters escaped (a newline as ``\n``)."""

    def escape(match: re.Match[str]) -> str:
        char = match.group()
        # os.fsdecode keeps an undecodable byte b as U+DC00 + b.
        return f"\\x{ord(char) - 0xDC00:02x}" if "\udc80" <= char <= "\udcff" else ascii(char)[1:-1]

    return _INVISIBLE.sub(escape, text)


def plural(number: int, one: str, many: str) -> str:
    """Return a number and its noun: ``1 image``, ``2 images``."""
    return f"{number} {one if number == 1 else many}"


class UserError(Exception):
    """What is wrong, where (file or key), and what to do: one line, no traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.split())))


class MissingFileError(UserError):
    """A file that is not there; what does not need it may go on."""


class Stopped(BaseException):
    """A signal has stopped the run, which has saved its state; the exit code is 128 + the signal.

    Not an `Exception`: code that handles errors of reading a file must not catch it.
    """

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``'; did you mean "x"?'`` for the nearest known names, or an empty string."""
    return question(difflib.get_close_matches(name, list(known), n=3, cutoff=0.5))


def question(names: Iterable[str]) -> str:
    """Return ``'; did you mean "x" or "y"?'``, an empty string without names."""
    quoted = " or ".join(map(repr, names))
    return f"; did you mean {quoted}?" if quoted else ""

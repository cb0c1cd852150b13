"""Error messages of other libraries, reworded for users. Every pattern on such a message is in this module.

tests/cli/test_messages.py provokes each message with the real library. A message without a pattern is shown as it is,
on one line.
"""

from __future__ import annotations

import argparse
import errno
import re
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rexnet_lit.cli import suggestions
from rexnet_lit.utils.errors import UserError, did_you_mean, opencv_message

_OUT_OF_MEMORY = "out of memory; set a smaller data.batch_size or data.image_size"

# Type ("" for any), pattern, message. The first match counts.
_CAUSES = (
    ("", r"out of memory|can't allocate memory", _OUT_OF_MEMORY),
    (
        "RuntimeError",
        r"^(DataLoader worker .*)",
        r"a data loading worker died (\1); memory or /dev/shm may be full: set a smaller data.num_workers "
        "(0 loads in the main process) or data.batch_size",
    ),
    (
        "RuntimeError",
        r"/gloo/transport/.*Timed out waiting (\d+)\d{3}ms",
        r"another process of this run has not answered for \1 s: it, its disk or its machine hangs "
        "(the timeout is a setting of trainer.strategy)",
    ),
    ("RuntimeError", r"/gloo/transport/", "another process of this run has ended; its own error is the cause"),
    ("DistError", r"", "another process of this run has ended or cannot be reached; its own error is the cause"),
    ("ValueError", r"null byte", "a path contains a null byte"),
    ("MisconfigurationException", r"(.*)", r"\1"),  # Lightning refuses a setting
)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> Any:
        """Raise instead of printing."""
        raise UserError(f"{message}; see: {self.prog} --help")


def one_line(text: object) -> str:
    """Return a text with each run of whitespace as one space."""
    return " ".join(str(text).split())


def user_message(error: BaseException) -> str | None:
    """Return the one line for an exception that the user can fix, None for a bug."""
    if isinstance(error, UserError):
        # From a worker of the DataLoader, the message is the traceback.
        return str(error).rpartition("rexnet_lit.utils.errors.UserError: ")[2]
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" for {error.filename!r}" if error.filename is not None else ""
        return f"the disk is full{where} ({error.strerror}); free some space, or write to another disk"
    if isinstance(error, OSError) and (error.filename is not None or type(error) is OSError):
        return one_line(error)
    if (broken := opencv_message(error)) is not None:
        return broken
    if isinstance(error, MemoryError):
        return _OUT_OF_MEMORY
    kinds = {kind.__name__ for kind in type(error).__mro__}
    text = one_line(error)
    for kind, pattern, message in _CAUSES:
        match = re.search(pattern, text)
        if match and (not kind or kind in kinds):
            return match.expand(message)
    return None


# The parser's messages

_KEY = re.compile(r"(?:unrecognized arguments: --?|accept option '|Parser key \")(\w[\w.-]*)")

_NO_CONFIG = re.compile(r"""^.*Unable to load config '(.*?)'.*Parser key "([\w.]+)".*""", re.DOTALL)

_PARSER_WORDS: tuple[tuple[str | re.Pattern[str], str], ...] = (
    (_NO_CONFIG, r"\2: there is no config file '\1'"),
    (r'^Parser key "([\w.]+)": ', r"\1: "),
    (r"<class '([\w.]+)'>", r"\1"),
    (r"typing\.", ""),
    (r"Expected a (\S.*?)\. Got value: (.*)$", r"expected \1, got \2"),
    (r"Literal\[('\w+')\]", r"\1"),
    (r"Literal\[(.*?)\]", r"one of \1"),
    (
        r"Does not validate against any of the Union subtypes Subtypes: \[(.*)\] "
        r"Errors:(?: - (?:(?! - ).)*)+ Given value type: \w+ Given value: (.*)$",
        r"expected \1, got \2",
    ),
    (r"\bNoneType\b", "null"),
    (r"- Expected a path but .+? either not accessible or invalid - ", ""),  # the value need not be a file name
    (r"^argument data\.\w+ --> model\.(\w+): .*", r"model.\1 is taken from the data; remove it"),
    (r"(unrecognized arguments: --\S+(?: (?!--)\S+)*).*", r"\1"),  # the following ones are reported separately
    (r"^Subcommand '\w+' does not accept option", "there is no setting"),
)

_CLASS_PROBLEM = re.compile(
    r"^(?P<indent> *)- (?:Problem with given class_path '(?P<path>.+?)':|"
    r"Expected a dot import path string: (?P<unknown>\S+)|"
    r"Import path (?P<other>\S+) does not correspond to)(?P<reason>.*?)(?=\n(?!(?P=indent) )|\Z)",
    re.DOTALL | re.MULTILINE,
)


def named_key(message: str) -> str | None:
    """Return the key that a message of the parser names."""
    found = _KEY.search(message)
    return found.group(1) if found else None


def parser_message(message: str, known: Iterable[str] = ()) -> str:
    """Return a message of the parser as one line, with the most similar keys where it names an unknown one.

    Args:
        message: Raised by jsonargparse.
        known: All keys.
    """
    key, known = named_key(message), list(known)
    problem = _class_problem(message)
    if problem is not None:
        return f"{key}: {problem}"
    if key is None or (key in known and not _NO_CONFIG.search(message)):
        return _reword(message)
    return _reword(message) + suggestions.which(key, (other for other in known if other != key))


def _reword(message: str) -> str:
    text = one_line(message)
    for pattern, replacement in _PARSER_WORDS:
        text = re.sub(pattern, replacement, text)
    return text


def _class_problem(message: str) -> str | None:
    """Return why the parser refuses a class; None if the message is about something else."""
    problems = list(_CLASS_PROBLEM.finditer(message))
    if not problems:
        return None
    found = next((problem for problem in problems if problem["path"]), problems[0])
    if found["unknown"]:
        from lightning.pytorch import callbacks, loggers  # takes seconds

        hint = did_you_mean(found["unknown"], (loggers if "trainer.logger" in message else callbacks).__all__)
        if not hint and "Given value type: <class 'str'>" in message:  # perhaps not meant as a class
            return None
        return f"there is no class {found['unknown']!r}{hint or '; give its full path, as package.Class'}"
    reason = _reword(found["reason"])
    return f"{found['path']}: {reason}" if found["path"] else f"{found['other']} is not {reason}"


# Errors while the trainer is built


def trainer_message(error: ValueError) -> str | None:
    """Return why Lightning or the parser refuses a setting of the trainer; None for an error of the user's class."""
    cause: BaseException = error
    while cause.__cause__ or cause.__context__:
        cause = cause.__cause__ or cause.__context__ or cause
    if _raised_in(cause, "jsonargparse"):  # the class was refused as each type of a union; its settings follow
        return one_line(str(error).partition("\nGiven ")[0])
    return one_line(cause) if raised_by_lightning(cause) or _built_by_lightning(cause) else None


def _built_by_lightning(error: BaseException) -> bool:
    """Return whether a class of Lightning, such as a logger, was refused by a library that it uses."""
    files = [Path(frame.filename).parts for frame in traceback.extract_tb(error.__traceback__)]
    last = max((i for i, parts in enumerate(files) if "jsonargparse" in parts), default=len(files))
    return any("lightning" in parts for parts in files[last + 1 : last + 2])


def raised_by_lightning(error: BaseException) -> bool:
    """Return whether an exception was raised by Lightning's own code."""
    return _raised_in(error, "lightning")


def _raised_in(error: BaseException, package: str) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and package in Path(frames[-1].filename).parts

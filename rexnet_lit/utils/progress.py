"""Progress of work that takes long: a bar in a terminal, a line now and then in a log file or a notebook."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

SECONDS = 8.0
"""Seconds between two lines, at most."""


@contextlib.contextmanager
def progress(title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show the progress of the block, in the first process of a run; yields a function of how many images are done.

    Work that ends within `SECONDS` prints nothing in a log file.

    Args:
        title: What is done: "Reading the images".
        total: How many images there are; None if the work is not done by image.
    """
    if any(os.environ.get(name, "0") != "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK")):
        yield lambda done: None
    elif sys.stdout.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = [TextColumn("{task.description}"), BarColumn(), *([MofNCompleteColumn()] if total else [])]
        with Progress(*columns, TimeElapsedColumn(), transient=True) as bar:
            task = bar.add_task(title, total=total)
            yield lambda done: bar.update(task, completed=done)
    else:
        with _Lines(title, total) as lines:
            yield lines.show


class _Lines(threading.Thread):
    """Prints a line every `SECONDS`."""

    def __init__(self, title: str, total: int | None) -> None:
        super().__init__(daemon=True)
        self._title, self._total, self._done = title, total, 0
        self._start, self._ended = time.monotonic(), threading.Event()

    def __enter__(self) -> _Lines:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self.join()

    def show(self, done: int) -> None:
        self._done = done

    def run(self) -> None:
        while not self._ended.wait(SECONDS):
            counted = "" if self._total is None else f" {self._done:,} of {self._total:,} images,"
            print(f"{self._title}:{counted} {time.monotonic() - self._start:.0f} s", flush=True)  # noqa: T201

"""The process: the allocator (for fast training on CPUs), signals, standard streams, and the limits of a container.

glibc returns every large activation to the kernel and faults it in again at the next step. With an allocator that
keeps its memory, a ReXNet training step on a CPU takes about half the time, for roughly a quarter more memory
(docs/benchmarks.md). ``REXNET_LIT_TUNE=0`` turns this off.

Source: glibc's mallopt(3); the figures are measured by ``tests/benchmarks/bench_train.py``.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import os
import platform
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

# malloc.h: parameter numbers of mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def configure_allocator() -> bool:
    """Make the allocator keep its memory; return whether that worked. Only on Linux with glibc.

    The command line calls this before it imports torch. In a notebook, call `rexnet_lit.configure_allocator` in
    the first cell: memory that was allocated before stays as it is.
    """
    if os.environ.get("REXNET_LIT_TUNE") == "0" or sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch requests huge pages
    mallopt = ctypes.CDLL(None).mallopt
    # -1 is "never": the largest value of mallopt's int, 2 GiB, is less than a step at 224 px frees.
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 256 * 2**20))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Import large packages in this context: none of their objects is garbage, so they are never searched for it.

    A training run imports 860,000 objects. Searching them took 0.6 s at its start and 1.1 s at its end.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


_received: list[int] = []


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return SIGTERM, SIGINT and, unless nohup ignores it, SIGHUP (the terminal was closed)."""
    signals = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    return tuple(signals)


def install_signal_handlers() -> None:
    """Make `stop_signals` raise `SystemExit` with the shell's exit code, 128 + the signal.

    A training run replaces these handlers by its own, which save a checkpoint.
    """
    for number in stop_signals():
        signal.signal(number, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os._exit(128 + number)  # code that meets a half-imported package may never end; nothing needs clean-up
        frame = frame.f_back
    sys.exit(128 + number)


def received_signal() -> int:
    """Return the signal that should have ended this process, or 0: Python drops an exception raised during a fork."""
    return _received[-1] if _received else 0


def open_missing_streams() -> None:
    """Open closed standard streams on the null device: the next file would get their number, and what is printed."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def escape_unencodable() -> None:
    r"""Let the standard streams escape what their encoding lacks (``\u3084``): a name must not end a command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _LossyFile(io.FileIO):
    original: TextIO  # kept, because it would close the shared file descriptor when it is collected

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


def ignore_write_errors(stream: TextIO) -> TextIO:
    """Return a stream that drops what cannot be written: a closed pipe or a full disk must not end a training run.

    Streams that are not the process's stdout or stderr, as in a notebook or a test, are returned unchanged.
    """
    try:
        number = stream.fileno()
    except (OSError, ValueError):
        return stream
    if number not in (1, 2):
        return stream
    stream.flush()
    raw = _LossyFile(number, "w", closefd=False)
    raw.original = stream
    file = io.BufferedWriter(raw)
    return io.TextIOWrapper(file, encoding=stream.encoding, errors=stream.errors, line_buffering=True)


def cpu_count() -> int:
    """Return how many CPUs this process may use, within the limits of containers and ``taskset``."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _control_groups("cpu"):
        limit = _numbers(folder / "cpu.max")
        limit = limit or _numbers(folder / "cpu.cfs_quota_us") + _numbers(folder / "cpu.cfs_period_us")
        if len(limit) == 2 and min(limit) > 0:
            cpus = min(cpus, max(1, limit[0] // limit[1]))
    return cpus


def default_num_workers(gpus: int) -> int:
    """Return the number of DataLoader workers per process for this machine.

    With GPUs (one process each) the CPUs are free: up to 8 workers. Without, the training step uses all CPUs, and one
    worker is enough to decode at the same time; none on a single CPU.
    """
    cpus = cpu_count()
    if gpus:
        return min(8, max(1, cpus // gpus))
    return 1 if cpus > 1 else 0


def available_memory() -> int:
    """Return the bytes of memory that this process could get without swapping, within the limit of its container.

    4 GiB on other systems than Linux.
    """
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, UnicodeDecodeError):
        return 4 * 2**30
    for folder in _control_groups("memory"):
        limit = _numbers(folder / "memory.max") or _numbers(folder / "memory.limit_in_bytes")
        used = _numbers(folder / "memory.current") or _numbers(folder / "memory.usage_in_bytes")
        if limit and used:
            free = min(free, max(0, limit[0] - used[0] + _idle_file_pages(folder)))
    return free


_CGROUPS, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def _control_groups(controller: str) -> Iterator[Path]:
    """Yield the folders of the control groups that limit this process: its own and their parents.

    Source: the kernel's cgroup-v1 and cgroup-v2 documentation.
    """
    try:
        lines = _OWN_CGROUP.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _CGROUPS / controller if controllers else _CGROUPS
        own = root / path.strip("/")
        yield from (folder for folder in (own, *own.parents) if folder == root or root in folder.parents)


def _numbers(file: Path) -> tuple[int, ...]:
    """Return the integers in a file of the kernel; none if it is missing or has other words."""
    try:
        return tuple(int(word) for word in file.read_text("ascii").split())
    except (OSError, ValueError):
        return ()


def _idle_file_pages(folder: Path) -> int:
    """Return the bytes of cached files in a control group, which the kernel frees when memory is needed."""
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text("ascii").splitlines())
        return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        return 0


def cache_dir() -> Path:
    """Return this user's cache folder: ``$XDG_CACHE_HOME/rexnet_lit``, or ``~/.cache/rexnet_lit``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not Path(base).is_absolute():  # relative paths are ignored, as the XDG specification requires
        base = os.path.expanduser("~/.cache")  # noqa: PTH111 - Path.expanduser raises without a home
    return Path(base) / "rexnet_lit"

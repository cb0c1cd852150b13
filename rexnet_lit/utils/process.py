"""Set the process up: its allocator for fast CPU training, before torch is imported; its signals and its screen.

glibc gives every large activation back to the kernel and faults it in again at the next step. Told to keep its
memory, a ReXNet training step on a CPU takes about half the time, for roughly a quarter more memory (README,
"Speed"). Set ``REXNET_LIT_TUNE=0`` to leave the process alone.

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
    """Make the allocator keep its memory; return whether it was done.

    The command line calls this before it imports torch. In a notebook, call ``rexnet_lit.tune()`` in the first
    cell: later calls still help with everything that is allocated after them. Only on Linux with glibc.
    """
    # Importing albumentations would otherwise ask the package index for its newest version.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    if os.environ.get("REXNET_LIT_TUNE") == "0" or sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks the kernel for huge pages
    mallopt = ctypes.CDLL(None).mallopt
    # -1 is "never": the most that fits mallopt's int, 2 GiB, is less than a step at 224 px gives back.
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 256 * 2**20))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Import large packages in here: nothing of them is garbage, so nobody needs to look for it, now or at the end.

    A run's are 860,000 objects. Looking through them took 0.6 s of its start and 1.1 s of its end.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


_told: list[int] = []


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return SIGTERM, Ctrl-C and a terminal that is closed, unless nohup has this process outlive its terminal."""
    signals = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    return tuple(signals)


def install_signal_handlers() -> None:
    """Have `stop_signals` end the process as the shell's convention has it, through the clean-up of an exception.

    A training run has its own answer, which saves.
    """
    for number in stop_signals():
        signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    _told.append(number)
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os._exit(128 + number)  # what asks for half a package next may never end; there is nothing to clean up
        frame = frame.f_back
    sys.exit(128 + number)


def received_signal() -> int:
    """Return the signal that should have ended this process, 0 for none: Python drops an exception raised in a fork."""
    return _told[-1] if _told else 0


def open_missing_streams() -> None:
    """Open what the caller has closed of input, output and errors, or the next file would be taken for the screen."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


class _Lossy(io.FileIO):
    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream.fileno(), "w", closefd=False)
        self._stream = stream  # which would close what it shares, were it collected

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


def ignore_write_errors(stream: TextIO) -> TextIO:
    """Return a screen that drops what nobody takes any more: the reader has gone, the disk of a log is full.

    A stream that is none of the process's own, as in a notebook or a test, is returned as it is.
    """
    try:
        number = stream.fileno()
    except (OSError, ValueError):
        return stream
    if number not in (1, 2):
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Lossy(stream)), encoding=stream.encoding, errors=stream.errors, line_buffering=True
    )


def cpu_count() -> int:
    """Return how many CPUs this process may use, which containers and ``taskset`` make fewer than there are."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _control_groups("cpu"):
        limit = _numbers(folder / "cpu.max")
        limit = limit or _numbers(folder / "cpu.cfs_quota_us") + _numbers(folder / "cpu.cfs_period_us")
        if len(limit) == 2 and min(limit) > 0:
            cpus = min(cpus, max(1, limit[0] // limit[1]))
    return cpus


def default_num_workers(gpus: int) -> int:
    """Return how many loader workers suit this machine, per process.

    Beside GPUs, each of which has a process, the CPUs have nothing else to do: up to 8 for each. On a CPU the training
    step wants them all, and one worker is enough to hide decoding behind it; with a single CPU there is nothing to
    hide it behind.
    """
    cpus = cpu_count()
    if gpus:
        return min(8, max(1, cpus // gpus))
    return 1 if cpus > 1 else 0


def available_memory() -> int:
    """Return the bytes of memory that this process could have without swapping, in a container those of its limit.

    An estimate where Linux does not say.
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
    """Yield the folders of the control groups that limit this process: its own, and those that it lies in.

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
    """Return the whole numbers that a kernel's file holds, none where it holds anything else."""
    try:
        return tuple(int(word) for word in file.read_text("ascii").split())
    except (OSError, ValueError):
        return ()


def _idle_file_pages(folder: Path) -> int:
    """Return the bytes of a control group that the kernel would give back: files that it has read and keeps."""
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text("ascii").splitlines())
        return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        return 0


def cache_dir() -> Path:
    """Return where this user's caches are: ``$XDG_CACHE_HOME/rexnet_lit``, or below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not Path(base).is_absolute():  # the XDG specification: others are to be ignored
        base = os.path.expanduser("~/.cache")  # noqa: PTH111 - Path.expanduser raises where there is no home
    return Path(base) / "rexnet_lit"

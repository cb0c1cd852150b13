"""Set the process up for fast CPU training: once, before torch is imported.

glibc gives every large activation back to the kernel and faults it in again at the next step. Told to keep its
memory, a ReXNet training step on a CPU takes about half the time, for roughly a quarter more memory (README,
"Speed"). Set ``REXNET_LIT_TUNE=0`` to leave the process alone.

Source: glibc's mallopt(3); the figures are measured by ``tests/benchmarks/bench_train.py``.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path

__all__ = ["auto_num_workers", "cache_folder", "cpu_count", "free_memory", "tune"]

# malloc.h: parameter numbers of mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def tune() -> bool:
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


def cpu_count() -> int:
    """Return how many CPUs this process may use, which containers and ``taskset`` make fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def auto_num_workers(on_gpu: bool) -> int:
    """Return how many loader workers suit this machine, per process.

    On a GPU the CPUs have nothing else to do, up to 8. On a CPU the training step wants them all, and one worker
    is enough to hide decoding behind it; with a single CPU there is nothing to hide it behind.
    """
    cpus = cpu_count()
    if on_gpu:
        return min(8, cpus)
    return 1 if cpus > 1 else 0


def free_memory() -> int:
    """Return the bytes of memory that could be had without swapping; an estimate where Linux does not say."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, UnicodeDecodeError):
        return 4 * 2**30


def cache_folder() -> Path:
    """Return where this user's caches are: ``$XDG_CACHE_HOME/rexnet_lit``, or below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not Path(base).is_absolute():  # the XDG specification: others are to be ignored
        base = os.path.expanduser("~/.cache")  # noqa: PTH111 - Path.expanduser raises where there is no home
    return Path(base) / "rexnet_lit"

"""Whole runs in separate processes that start fast: they are forked from one that has imported everything.

Each runs `python -m rexnet_lit` with a small network, and an optional `trouble`: what goes wrong, and at which step.
"""

from __future__ import annotations

import errno
import functools
import multiprocessing
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from multiprocessing import resource_sharer
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from module_tools import make_runs_quick

CONFIGS = Path(__file__).parents[1] / "configs"
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["rexnet_lit.cli.lightning_cli", "rexnet_lit.cli.main", "run_tools"])


class Done(NamedTuple):
    """How a run ended: the exit code (negative: killed by that signal), and what it printed."""

    code: int
    out: str


def fit(cwd: Path, *argv: object, trouble: tuple[str, int] | None = None, save_every: float = 600.0) -> Done:
    """Run ``fit`` on ``cwd/data`` for 3 epochs of a few steps each; ``argv`` is added."""
    command = [
        "fit", "--config", CONFIGS / "quickstart.yaml", "--data.root", "data", "--trainer.default_root_dir", "runs",
        "--trainer.accelerator", "cpu", "--data.batch_size", 4, "--data.num_workers", 0, "--trainer.max_epochs", 3,
        "--model.drop_path_rate", 0.1, "--model.calibrate", "false", *argv,
    ]  # fmt: skip
    return command_line(cwd, *command, trouble=trouble, save_every=save_every)


def command_line(
    cwd: Path, *argv: object, trouble: tuple[str, int] | None = None, save_every: float = 600.0, timeout: float = 300
) -> Done:
    """Run a command in ``cwd``."""
    log = Path(cwd) / "screen.txt"
    arguments = ([str(a) for a in argv], str(cwd), str(log), trouble, save_every)
    process = _FORKS.Process(target=_run, args=arguments)  # type: ignore[attr-defined]
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"{argv} has not ended in {timeout} s:\n{log.read_text()}")
    # torch's handler of a worker's bus error writes its text with the terminating zero.
    return Done(process.exitcode, log.read_text().replace("\0", "\n"))


def _run(argv: list[str], cwd: str, log: str, trouble: tuple[str, int] | None, save_every: float) -> None:
    multiprocessing.set_start_method("fork", force=True)  # Linux's default until 3.14, for the loaders' workers
    os.chdir(cwd)
    screen = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(screen, 1)
    os.dup2(screen, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    os.environ.update(XDG_CACHE_HOME=str(Path(cwd) / "cache"), CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    make_runs_quick(pytest.MonkeyPatch())
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    from rexnet_lit import __main__
    from rexnet_lit.training.callbacks.checkpoint import RunCheckpoint

    RunCheckpoint.__init__ = functools.partialmethod(RunCheckpoint.__init__, every=save_every)  # type: ignore
    if trouble is not None:
        _TROUBLES[trouble[0]](trouble[1])
    sys.argv = ["rexnet-lit", *argv]
    code = __main__.main()
    sys.stdout.flush()
    os._exit(code)


def at_step(step: int, what: Any, hook: str = "on_train_batch_start") -> None:
    """Have ``what(module)`` happen in a module's hook, when so many optimiser steps are done."""
    from rexnet_lit.training.module import RexNetModule

    before, due = getattr(RexNetModule, hook), [step]

    def hooked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.trainer.global_step in due:
            due.clear()
            what(self)
        return before(self, *args, **kwargs)

    setattr(RexNetModule, hook, hooked)


def _signalled(number: signal.Signals, hook: str, step: int) -> None:
    at_step(step, lambda module: os.kill(os.getpid(), number), hook)


def _signalled_in_selection(number: signal.Signals, step: int) -> None:
    from rexnet_lit.training.callbacks import weight_selection

    weight_selection.solve_head = lambda *args: os.kill(os.getpid(), number)  # type: ignore[assignment]


def _killed_at_batch_3(step: int) -> None:
    """In the second half of an accumulated step, which the number of steps does not show."""
    from rexnet_lit.training.module import RexNetModule

    before = RexNetModule.on_train_batch_start

    def hooked(self: Any, batch: Any, batch_idx: int) -> None:
        if self.current_epoch == 1 and batch_idx == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        before(self, batch, batch_idx)

    RexNetModule.on_train_batch_start = hooked  # type: ignore[method-assign]


def _nan(step: int) -> None:
    from rexnet_lit.training.module import RexNetModule

    before = RexNetModule.training_step

    def spoilt(self: Any, batch: Any, batch_idx: int) -> Any:
        loss = before(self, batch, batch_idx)
        return loss * float("nan") if self.trainer.global_step == step else loss

    RexNetModule.training_step = spoilt  # type: ignore[method-assign]


def _full_disk(step: int) -> None:
    """No file may grow beyond 1 MB: what the kernel says to a write is real."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    at_step(step, lambda module: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)))


def _worker_dies(number: signal.Signals, step: int) -> None:
    at_step(step, lambda module: os.kill(multiprocessing.active_children()[0].pid or 0, number))


def _term_to_all(step: int) -> None:
    """As ``timeout``, ``scancel`` and systemd do: the loaders' workers get the signal too."""

    def terminate(module: Any) -> None:
        processes = (*multiprocessing.active_children(), multiprocessing.current_process())
        subprocess.run(["kill", *(str(process.pid) for process in processes)], check=True)
        time.sleep(1)  # until the signal has ended what it would end

    at_step(step, terminate)


def _worker_dies_amid_a_batch(step: int) -> None:
    """While another hands a batch to the main process, which turns away from it then."""
    at_step(step, lambda module: setattr(resource_sharer._ResourceSharer, "get_connection", staticmethod(turn_away)))

    def turn_away(ident: tuple[str, int]) -> Any:
        address, key = ident
        connection = Client(address, authkey=multiprocessing.current_process().authkey)
        peer = socket.socket(fileno=os.dup(connection.fileno()))
        sender = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        peer.close()
        os.kill(sender, signal.SIGSTOP)
        connection.send((key, os.getpid()))
        connection.close()
        os.kill(sender, signal.SIGCONT)
        time.sleep(0.5)  # it finds nobody there
        os.kill(
            next(child.pid or 0 for child in multiprocessing.active_children() if child.pid != sender), signal.SIGKILL
        )
        time.sleep(5)
        return connection


def _no_room_for_logs(step: int) -> None:
    """Let both logs fail from a step on, as on a full or broken disk."""

    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def break_logs(module: Any) -> None:
        from torch.utils.tensorboard.writer import FileWriter

        from rexnet_lit.training.callbacks import record

        record.write_file = fails  # type: ignore[assignment]
        FileWriter.add_event = fails  # type: ignore[method-assign]

    at_step(step, break_logs)


def _worker_hangs(step: int) -> None:
    from rexnet_lit.data import loader

    loader._POLL, loader._PATIENCE = 1, 3
    read = loader.ImageDataset.read

    def slow(self: Any, index: int) -> Any:
        if index == 7:
            time.sleep(60)
        return read(self, index)

    loader.ImageDataset.read = slow  # type: ignore[method-assign]


def _start_up(number: signal.Signals, step: int) -> None:
    from rexnet_lit.data import datamodule

    scan = datamodule.scan

    def signalled(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), number)
        return scan(*args, **kwargs)

    datamodule.scan = signalled  # type: ignore[assignment]


def _signal_in_a_fork(step: int) -> None:
    """Python drops what is raised in a fork's call-backs, a signal's exception too."""

    def drop() -> None:
        if os.getpid() == main:
            os.kill(main, signal.SIGTERM)

    main = os.getpid()
    os.register_at_fork(before=drop)


def _no_screen(step: int) -> None:
    def lose(module: Any) -> None:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, 1)
        os.dup2(full, 2)

    at_step(step, lose)


_TROUBLES = {
    "kill": functools.partial(_signalled, signal.SIGKILL, "on_train_batch_start"),
    "kill at batch 3": _killed_at_batch_3,
    "kill in validation": functools.partial(_signalled, signal.SIGKILL, "validation_step"),
    "term": functools.partial(_signalled, signal.SIGTERM, "on_train_batch_start"),
    "term to all": _term_to_all,
    "term in validation": functools.partial(_signalled, signal.SIGTERM, "validation_step"),
    "term at start-up": functools.partial(_start_up, signal.SIGTERM),
    "ctrl-c at start-up": functools.partial(_start_up, signal.SIGINT),
    "ctrl-c in validation": functools.partial(_signalled, signal.SIGINT, "validation_step"),
    "term in a fork": _signal_in_a_fork,
    "no screen": _no_screen,
    "ctrl-c": functools.partial(_signalled, signal.SIGINT, "on_train_batch_start"),
    "terminal closed": functools.partial(_signalled, signal.SIGHUP, "on_train_batch_start"),
    "kill in blend": functools.partial(_signalled_in_selection, signal.SIGKILL),
    "term in blend": functools.partial(_signalled_in_selection, signal.SIGTERM),
    "ctrl-c in blend": functools.partial(_signalled_in_selection, signal.SIGINT),
    "nan": _nan,
    "full disk": _full_disk,
    "worker dies": functools.partial(_worker_dies, signal.SIGKILL),
    "worker dies amid a batch": _worker_dies_amid_a_batch,
    "worker's bus error": functools.partial(_worker_dies, signal.SIGBUS),
    "no room for logs": _no_room_for_logs,
    "worker hangs": _worker_hangs,
}


def weights(cwd: Path, version: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of a run's last checkpoint: weights, their average, the optimiser's."""
    from rexnet_lit.models import checkpoint

    content = checkpoint.read_ckpt(str(run_folder(cwd, version) / "checkpoints" / "last.ckpt"))
    found: dict[str, torch.Tensor] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict):
            for key, part in value.items():
                collect(f"{name}.{key}", part)
        elif isinstance(value, list | tuple):
            for number, part in enumerate(value):
                collect(f"{name}.{number}", part)

    for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states"):
        collect(key, content.get(key))
    return found


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """The names of tensors that are not the same bit for bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def run_folder(cwd: Path, version: int = 0) -> Path:
    """The run's folder."""
    return Path(cwd) / "runs" / "lightning_logs" / f"version_{version}"

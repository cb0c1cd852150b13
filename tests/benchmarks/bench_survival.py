"""What interrupts or spoils a run, done for real to rexnet_lit and to plain Lightning + timm + ImageFolder.

    python tests/benchmarks/bench_survival.py [--steps 30]

Both train rexnet_100 at 32 px on the same drawn images, on a CPU, in one thread: 3 epochs of a third of the steps,
a checkpoint after every step. Plain Lightning is set up as its documentation says: `ModelCheckpoint(save_last=True,
every_n_train_steps=1)`, `seed_everything(0, workers=True)`, and `fit(ckpt_path=...)` to resume. Prints a table.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest
import lightning.pytorch as pl
import run_tools
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torchvision.datasets import ImageFolder

from rexnet_lit import load
from rexnet_lit.models import checkpoint

BATCH = 4


# Plain Lightning


class PlainModule(pl.LightningModule):
    """As in Lightning's tutorials, with the same network and randomness: dropout, drop path, augmentation."""

    def __init__(self, trouble: tuple[str, int] | None) -> None:
        super().__init__()
        self.network = timm.create_model("rexnet_100", num_classes=3, drop_rate=0.2, drop_path_rate=0.1)
        self.trouble = trouble

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        what, step = self.trouble or ("", -1)
        loss = torch.nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        if self.global_step != step:
            return loss
        if what in ("kill", "term"):
            os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGTERM)
        if what == "full disk":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        return loss * float("nan") if what == "nan" else loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", torch.nn.functional.cross_entropy(self.network(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def plain(cwd: Path, trouble: tuple[str, int] | None = None, resume: bool = False, workers: int = 0) -> int:
    """Train in a process of its own; return its exit code."""
    process = run_tools._FORKS.Process(target=_plain, args=(str(cwd), trouble, resume, workers))
    process.start()
    process.join()
    return int(process.exitcode or 0)


def _plain(cwd: str, trouble: tuple[str, int] | None, resume: bool, workers: int) -> None:
    multiprocessing.set_start_method("fork", force=True)
    os.chdir(cwd)
    screen = os.open("screen.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(screen, 1)
    os.dup2(screen, 2)
    torch.set_num_threads(1)
    pl.seed_everything(0, workers=True)
    transform = timm.data.create_transform(32, is_training=True), timm.data.create_transform(32)
    loaders = [
        torch.utils.data.DataLoader(
            ImageFolder(f"data/{split}", t), BATCH, shuffle=split == "train", num_workers=workers
        )
        for split, t in zip(("train", "val"), transform, strict=True)
    ]
    saver = ModelCheckpoint("checkpoints", save_last=True, every_n_train_steps=1)
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", callbacks=[saver], logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(PlainModule(trouble), *loaders, ckpt_path="checkpoints/last.ckpt" if resume else None)


def plain_weights(cwd: Path) -> dict[str, torch.Tensor]:
    content = torch.load(cwd / "checkpoints" / "last.ckpt", weights_only=True)
    return content["state_dict"]


# The cases: each yields whether it was survived, once for us and once for plain Lightning


class Sides(types.SimpleNamespace):
    """Makes fresh folders with the same images."""

    def fresh(self) -> Path:
        self.count = getattr(self, "count", 0) + 1
        cwd = self.root / str(self.count)
        cwd.mkdir()
        (cwd / "data").symlink_to(self.root / "data")
        return cwd


def ours(cwd: Path, *argv: object, **settings: Any) -> run_tools.Done:
    return run_tools.fit(cwd, *argv, save_every=-1, **settings)


def killed(sides: Sides) -> Iterator[tuple[bool | None, bool | None]]:
    """SIGKILL before each step, then a resume: the weights are those of an uninterrupted run, bit for bit"""
    a, b = sides.fresh(), sides.fresh()
    ours(a)
    plain(b)
    whole, plain_whole = run_tools.weights(a), plain_weights(b)
    for step in range(sides.steps):
        a, b = sides.fresh(), sides.fresh()
        ours(a, trouble=("kill", step))
        if (run_tools.run_folder(a) / "checkpoints" / "last.ckpt").exists():
            ours(a, "--ckpt_path", "last")
        else:  # nothing is saved yet: the run starts from the beginning
            a = sides.fresh()
            ours(a)
        plain(b, ("kill", step))
        plain(b, resume=(b / "checkpoints" / "last.ckpt").exists())
        found = plain_weights(b)
        yield not run_tools.differing(run_tools.weights(a), whole), not run_tools.differing(found, plain_whole)


def terminated(sides: Sides) -> Iterator[tuple[bool | None, bool | None]]:
    """SIGTERM in the middle of an epoch: exit code 143, and that very step is saved"""
    step = sides.steps // 2
    a, b = sides.fresh(), sides.fresh()
    done = ours(a, trouble=("term", step))
    saved = checkpoint.read_ckpt(str(run_tools.run_folder(a) / "checkpoints" / "last.ckpt"))["global_step"]
    code = plain(b, ("term", step))
    plain_saved = torch.load(b / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    yield done.code == 143 and saved == step + 1, code == 143 and plain_saved == step + 1


def full_disk(sides: Sides) -> Iterator[tuple[bool | None, bool | None]]:
    """The disk is full when a checkpoint is written: the one before still loads"""
    a, b = sides.fresh(), sides.fresh()
    ours(a, trouble=("full disk", sides.steps // 2))
    plain(b, ("full disk", sides.steps // 2))
    yield _works(lambda: run_tools.weights(a)), _works(lambda: plain_weights(b))


def flipped(sides: Sides) -> Iterator[tuple[bool | None, bool | None]]:
    """One flipped bit in a checkpoint's weights is noticed"""
    a, b = sides.fresh(), sides.fresh()
    ours(a)
    plain(b)
    files = run_tools.run_folder(a) / "checkpoints" / "last.ckpt", b / "checkpoints" / "last.ckpt"
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    yield not _works(lambda: run_tools.weights(a)), not _works(lambda: plain_weights(b))


def nan(sides: Sides) -> Iterator[tuple[bool | None, bool | None]]:
    """A loss that is no number: the run ends with an error, and the last checkpoint's weights are finite"""
    a, b = sides.fresh(), sides.fresh()
    done = ours(a, trouble=("nan", sides.steps // 2))
    code = plain(b, ("nan", sides.steps // 2))
    yield done.code == 2 and _finite(run_tools.weights(a)), code != 0 and _finite(plain_weights(b))


def workers(sides: Sides) -> Iterator[tuple[bool | None, bool | None]]:
    """0 and 2 loader workers end with the same weights"""
    found = []
    for number in (0, 2):
        a, b = sides.fresh(), sides.fresh()
        ours(a, "--data.num_workers", number)
        plain(b, workers=number)
        found.append((run_tools.weights(a), plain_weights(b)))
    yield not run_tools.differing(found[0][0], found[1][0]), not run_tools.differing(found[0][1], found[1][1])


def code_in_a_file(sides: Sides) -> Iterator[tuple[bool | None, bool | None]]:
    """A checkpoint that holds an object with code in it is opened: the code does not run"""
    a, b = sides.fresh(), sides.fresh()
    torch.save({"state_dict": {}, "x": Bomb(str(a / "ran"))}, a / "bomb.ckpt")
    torch.save({"state_dict": {}, "x": Bomb(str(b / "ran"))}, b / "bomb.ckpt")
    _works(lambda: load(a / "bomb.ckpt"))
    _works(lambda: PlainModule.load_from_checkpoint(b / "bomb.ckpt", trouble=None))
    yield not (a / "ran").exists(), not (b / "ran").exists()


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def _works(call: Callable[[], Any]) -> bool:
    try:
        call()
    except Exception:
        return False
    return True


def _finite(tensors: dict[str, torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors.values())


CASES = (killed, terminated, full_disk, flipped, nan, workers, code_in_a_file)


def main() -> None:
    """Run every case and print how often each side survived it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="of a run; a multiple of 3")
    steps = parser.parse_args().steps
    print("| Case | rexnet_lit | plain Lightning |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        images = steps // 3 * BATCH  # of training; ours never leaves a smaller last batch
        names = conftest.SHAPES[:3] if images % 3 == 0 else conftest.SHAPES[:2] if images % 2 == 0 else ()
        conftest._write_shapes(root / "data", images // len(names), 3, 0, names)
        sides = Sides(root=root, steps=steps)
        for case in CASES:
            results = list(case(sides))
            marks = [f"{sum(bool(r[side]) for r in results)} of {len(results)}" for side in (0, 1)]
            print(f"| {case.__doc__} | {marks[0]} | {marks[1]} |", flush=True)


if __name__ == "__main__":
    main()

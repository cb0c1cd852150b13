"""Saving a run: its ``best.ckpt`` and ``last.ckpt``, from which `resume` lets it be resumed exactly."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from rexnet_lit.data.datamodule import find_datamodule
from rexnet_lit.data.splits import Split
from rexnet_lit.models import checkpoint
from rexnet_lit.models.limits import Limits
from rexnet_lit.training.callbacks import resume
from rexnet_lit.training.callbacks.run_files import find_run_folder
from rexnet_lit.training.callbacks.run_folder import refuse_same_files
from rexnet_lit.training.callbacks.signals import StopSignals
from rexnet_lit.training.metrics import main_metrics
from rexnet_lit.training.module import RexNetModule
from rexnet_lit.training.parts import SELECT
from rexnet_lit.utils.errors import Stopped, UserError
from rexnet_lit.utils.files import link_or_copy


@dataclasses.dataclass(frozen=True)
class Shipped:
    """Which weights are in ``best.ckpt`` and will ship.

    Args:
        weights: What they are, such as "epoch 3".
        why: Why these.
        metrics: Their validation metrics, by name (``val/top1``).
        temperature: What their logits were divided by.
        strength: scikit-learn's C of their head, if it was solved.
    """

    weights: str
    why: str
    metrics: Mapping[str, float]
    temperature: float = 1.0
    strength: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values, as a checkpoint keeps it."""
        return {**dataclasses.asdict(self), "metrics": dict(self.metrics)}


_OF_TUNER = (".lr_find_", ".scale_batch_size_")  # files of Lightning's `Tuner` and its callbacks
_SHIPPED, _ENDED = "rexnet_lit_shipped", "rexnet_lit_ended"
"""What a ``best.ckpt`` says of what the end of training has put into it, and what that depended on."""

NOTHING = Shipped("the last weights", "nothing was validated", {})
NOT_SAVED = Shipped("none", "the trainer saves no checkpoints", {})
WHY = {"top1": "highest val top-1", "macro_f1": "highest val macro F1", "loss": "lowest val loss"}


class RunCheckpoint(ModelCheckpoint):
    """Keeps ``best.ckpt``, by ``model.select``, and ``last.ckpt``, in the run folder.

    ``last.ckpt`` is written at the end of each epoch, every ``every`` seconds within one, and when the process receives
    SIGTERM, Ctrl-C or the hang-up of its terminal: the running step (or validation) is finished first.

    Args:
        every: Seconds between saves within an epoch.
        accept_changes: Resume although the images, the batch size or the number of processes have changed.
    """

    def __init__(self, every: float = 600.0, accept_changes: bool = False) -> None:
        super().__init__(
            filename="best",
            monitor="val/top1",
            mode="max",
            save_last=True,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )
        self._every, self._accept_changes = every, accept_changes
        self._saved = time.monotonic()
        self._signals = StopSignals(self._how_to_resume)
        self._stop: Stopped | None = None
        self._new_best: Path | None = None
        """The best checkpoint, while it holds the present weights."""
        self._validated = -1
        self.shipped = NOTHING
        """What is in ``best.ckpt``; the selection and the calibration at the end of training change it."""
        self.features: dict[Split, Tensor] = {}
        """Features of the shipped weights, (N, C), of splits for which the end of training has computed them."""
        self._folder: Path | None = None
        self._best: dict[str, Any] | None = None
        """The content of ``best.ckpt`` while the end of training changes it."""
        self._best_changed = False

    def reset(self) -> None:
        """Forget the run, before the trainer's next one."""
        RunCheckpoint.__init__(self, self._every, self._accept_changes)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the metric that makes weights the best."""
        if stage == "fit" and isinstance(pl_module, RexNetModule):
            self.monitor, self.mode = f"val/{pl_module.select}", SELECT[pl_module.select]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Checkpoint directory")  # that of the last fit; the next may get another
            super().setup(trainer, pl_module, stage)

    def _use_run_folder(self, trainer: Trainer, module: LightningModule) -> None:
        folder = find_run_folder(trainer)
        if self._folder not in (None, folder):  # that was another trainer's run
            self.reset()
            self.setup(trainer, module, "fit")
        self._folder = folder
        if folder is not None:
            self.dirpath = str(folder / "checkpoints")
            refuse_same_files([c for c in trainer.checkpoint_callbacks if c is not self], Path(self.dirpath))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the temporary files of a save that was killed, and handle the signals."""
        self._forget_best()
        if trainer.is_global_zero and self.dirpath:
            for temporary in Path(self.dirpath).glob(".*.ckpt.*"):
                temporary.unlink(missing_ok=True)
        self._signals.install(trainer)

    def on_train_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # A checkpoint does not hold the gradients of half a step.
        if _is_dry_run(trainer) or trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        # Before a validation, only a signal causes a save: the next regular one comes after it.
        validates = trainer.val_check_batch and (batch_idx + 1) % trainer.val_check_batch == 0
        if self._is_due(trainer, self._signals.received is not None or (not validates and self._is_time())):
            self._save_last(trainer)
            self._stop = self._signals.stop(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Within an epoch, save the best weights, and the last ones when it is time; its end saves both anyway."""
        self._validated = trainer.global_step
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.is_last_batch or _is_dry_run(trainer):
            return
        self._save_best(trainer)
        whole_step = (trainer.fit_loop.epoch_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if self._is_due(trainer, whole_step and self._is_time()):
            self._save_last(trainer)
        self._new_best = None  # the next step changes the weights

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last weights, and the best ones if this epoch has validated them."""
        if _is_dry_run(trainer):
            return
        with contextlib.nullcontext() if trainer.is_last_batch else _within_epoch(trainer):
            if self._validated == trainer.global_step:  # otherwise the metrics are those of other weights
                self._save_best(trainer)
            self._save_last(trainer)
        self._stop = self._signals.stop(trainer)

    def _raise_stop(self, *args: Any, **kwargs: Any) -> None:
        """Stop at the start of what follows a save: the step or epoch that has ended is logged by then."""
        stop, self._stop = self._stop, None  # the trainer may fit again
        if stop is not None:
            raise stop

    on_train_batch_start = on_train_epoch_start = on_validation_start = _raise_stop

    def end_training(self, trainer: Trainer) -> None:
        """Stop if a signal has come in the last epoch; from now on, signals stop the run at once.

        Raises:
            Stopped: A signal has come.
        """
        self._signals.training_ended = True
        self._stop = self._stop or self._signals.stop(trainer)
        self._raise_stop()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the last weights for the best ones if none were validated."""
        if _is_dry_run(trainer):
            return
        super().on_train_end(trainer, pl_module)
        self.take_last(trainer)

    def take_last(self, trainer: Trainer) -> None:
        """Make ``last.ckpt`` the ``best.ckpt`` of a run in which nothing was validated."""
        last = Path(self.last_model_path)
        if self.best_model_path or not self.last_model_path:
            return
        best = last.with_name("best.ckpt")
        if trainer.is_global_zero and last.is_file():
            best.unlink(missing_ok=True)
            link_or_copy(last, best, best)
        self.best_model_path = str(best)

    def has_ended(self, trainer: Trainer) -> bool:
        """Return whether ``best.ckpt`` has what the end of training makes of it, of a run that was killed after it."""
        ended = False
        # Once the end of training has begun to change it, it has not ended.
        if trainer.is_global_zero and self._best is None and Path(self.best_model_path).is_file():
            ended = self._read_best().get(_ENDED) == self._end(trainer)
            if ended:
                self._forget_best()
        return trainer.strategy.broadcast(ended)

    @staticmethod
    def _end(trainer: Trainer) -> list[Any]:
        """Return what the end of training depends on."""
        module = trainer.lightning_module
        own = [getattr(module, name, None) for name in ("calibrate", "target_precision")]
        return [trainer.global_step, *own, *resume.record(trainer, module, find_datamodule(trainer)).values()]

    def _read_best(self) -> dict[str, Any]:
        self._best = checkpoint.read_ckpt(self.best_model_path)
        self.shipped = dataclasses.replace(self.shipped, **self._best.get(_SHIPPED, {}))
        return self._best

    def best_weights(self, trainer: Trainer) -> dict[str, Tensor]:
        """Return the network's weights in ``best.ckpt``, as the end of training has changed them, in all processes."""
        state: dict[str, Tensor] = {}
        if trainer.is_global_zero:
            state = checkpoint.network_weights(self._best or self._read_best(), self.best_model_path)
        return trainer.strategy.broadcast(state)

    def change_best(self, weights: Mapping[str, Tensor] | None = None, limits: Limits | None = None) -> None:
        """Change what `best_weights` has read; `write_best` saves it.

        Args:
            weights: The network's. The file can then no longer be resumed.
            limits: Those of the answers; the weights stay as they are.
        """
        if self._best is None:  # not the first process
            return
        self._best_changed = True
        if weights is not None:
            self._best["state_dict"] |= {f"network.{name}": tensor for name, tensor in weights.items()}
            self._best[resume.REPLACED] = True
        if limits is not None:
            spec, data = checkpoint.read_record(self._best, self.best_model_path)
            self._best[checkpoint.KEY] = checkpoint.make_record(dataclasses.replace(spec, limits=limits), data)

    def write_best(self, trainer: Trainer) -> None:
        """Save what has changed in ``best.ckpt``."""
        if self._best is not None and self._best_changed:
            self._best |= {_SHIPPED: self.shipped.as_dict(), _ENDED: self._end(trainer)}
            checkpoint.write_ckpt(self._best, self.best_model_path)
        self._forget_best()
        trainer.strategy.barrier()

    def _forget_best(self) -> None:
        self._best, self._best_changed, self.features = None, False, {}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the signal handlers."""
        self._signals.uninstall()

    def _is_time(self) -> bool:
        return time.monotonic() - self._saved > self._every

    def _is_due(self, trainer: Trainer, here: bool) -> bool:
        """Return whether a save is due in any process: all save together."""
        return trainer.strategy.reduce_boolean_decision(here, all=False)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Write a checkpoint, or link to the best one if that was just written with the same content."""
        best, self._new_best = self._new_best, None
        path = Path(filepath)
        if best is None:
            super()._save_checkpoint(trainer, filepath)
            self._new_best = None if path.name == "last.ckpt" else path
            return
        if trainer.is_global_zero:
            link_or_copy(best, path, path.with_name(checkpoint.PREVIOUS))
        trainer.strategy.barrier()

    def _save_best(self, trainer: Trainer) -> None:
        candidates = self._monitor_candidates(trainer)
        if self.monitor in candidates and self._is_best(trainer, candidates):
            metrics = {name: float(value) for name, value in main_metrics(candidates).items() if name[:4] == "val/"}
            why = WHY.get(str(self.monitor).removeprefix("val/"), f"best {self.monitor}")
            self.shipped = Shipped(f"epoch {trainer.current_epoch + 1}", why, metrics)
            self._update_best_and_save(candidates[str(self.monitor)], trainer, candidates)

    def _is_best(self, trainer: Trainer, candidates: Mapping[str, Tensor]) -> bool:
        """Return whether the present weights are better than the best ones; of equals the lower loss wins."""
        score, best = candidates[str(self.monitor)], self.best_model_score
        if best is None or self.check_monitor_top_k(trainer, score):
            return True
        lower = float(candidates.get("val/loss", torch.inf)) < self.shipped.metrics.get("val/loss", -torch.inf)
        return trainer.strategy.reduce_boolean_decision(bool(score == best.to(score)) and lower)

    def _save_last(self, trainer: Trainer) -> None:
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        self._saved = time.monotonic()

    def _how_to_resume(self) -> str:
        last = Path(self.dirpath or "") / "last.ckpt"
        config = last.parent.parent / "config.yaml"
        if not last.is_file():
            return "nothing was saved yet"
        if not config.is_file():
            return f"everything is saved in {last}"
        command = ["python", "-m", "rexnet_lit", "fit", "--config", str(config), "--ckpt_path", str(last)]
        return f"resume with: {shlex.join(command)}"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save into the run folder; do not train a resumed run that had stopped early."""
        self._use_run_folder(trainer, pl_module)
        if trainer.ckpt_path is not None and stopped_early(trainer):
            trainer.should_stop = True
            rank_zero_only(print)("note: EarlyStopping has ended this run; remove it from trainer.callbacks to resume")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Record what an exact resume depends on."""
        checkpoint |= resume.record(trainer, pl_module, find_datamodule(trainer))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse a resume that would silently be another run; find the best weights so far."""
        if trainer.state.fn != "fit":  # a test of these weights
            return
        if Path(str(trainer.ckpt_path)).name.startswith(_OF_TUNER):
            trainer.ckpt_path = None  # the fit goes back to its start, and resumes nothing
            return
        self._use_run_folder(trainer, pl_module)
        self.refuse_changes(trainer, pl_module, find_datamodule(trainer), checkpoint)
        self._restore_best(trainer, checkpoint)
        resume.begin_next_epoch(trainer, checkpoint)
        resume.print_length_changes(trainer, checkpoint)

    def refuse_changes(self, trainer: Trainer, module: LightningModule, data: Any, content: Any) -> None:
        """Compare a run with the one that wrote a checkpoint, see `resume.refuse_changes`."""
        resume.refuse_changes(trainer, module, data, content, self._accept_changes)

    def _restore_best(self, trainer: Trainer, content: dict[str, Any]) -> None:
        """Make a checkpoint's record of the best weights agree with the ``best.ckpt`` of the run folder.

        A user's own `ModelCheckpoint` writes before this one, so its file does not know the newest best; a checkpoint
        that was copied from elsewhere names a best that is not here.
        """
        recorded = content["callbacks"].get(self.state_key)
        best, found = Path(self.dirpath or "") / "best.ckpt", None
        if trainer.is_global_zero and best.is_file():
            with contextlib.suppress(UserError):  # a damaged one counts as missing
                written = checkpoint.read_ckpt(str(best))
                state = written["callbacks"][self.state_key]
                found = written["global_step"], {key: state[key] for key in ("best_model_score", "shipped")}
        step, score = trainer.strategy.broadcast(found) or (0, None)
        if recorded is not None and step <= content["global_step"]:
            recorded |= score or {"best_model_score": None}

    def state_dict(self) -> dict[str, Any]:
        """Return what Lightning's does, and what is in ``best.ckpt``."""
        return {**super().state_dict(), "shipped": self.shipped.as_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score; the paths are those of the present folder, as a run may have been moved."""
        self.shipped = Shipped(**state_dict["shipped"]) if "shipped" in state_dict else NOTHING
        folder = Path(self.dirpath or "")
        self.last_model_path = str(folder / "last.ckpt")
        self.best_model_score = state_dict["best_model_score"]
        if self.best_model_score is not None:
            self.kth_value = self.best_model_score
            self.best_model_path = self.kth_best_model_path = str(folder / "best.ckpt")
            self.best_k_models = {self.best_model_path: self.best_model_score}


def find_checkpoint(trainer: Trainer) -> RunCheckpoint | None:
    """Return the callback that keeps a run's best and last weights."""
    found = [c for c in trainer.checkpoint_callbacks if isinstance(c, RunCheckpoint)]
    return found[0] if found else None


def stopped_early(trainer: Trainer) -> bool:
    """Return whether EarlyStopping has ended the run."""
    early = [c for c in trainer.callbacks if isinstance(c, EarlyStopping)]  # type: ignore[attr-defined]
    return any(c.stopped_epoch or c.stopping_reason_message for c in early)


@contextlib.contextmanager
def _within_epoch(trainer: Trainer) -> Iterator[None]:
    """Save an epoch that ``max_steps`` cuts short as unfinished, which Lightning counts as done."""
    progress: Any = trainer.fit_loop.epoch_progress
    for count in (progress.current, progress.total):
        count.processed -= 1
    try:
        yield
    finally:
        for count in (progress.current, progress.total):
            count.processed += 1


def _is_dry_run(trainer: Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]

"""The LightningModule: wires the network, loss, strategy, optimiser, schedule and metrics to Lightning's hooks."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection

from rexnet_lit.data.datamodule import ImageFolderDataModule, any_datamodule, find_datamodule, run_seed
from rexnet_lit.data.sampler import class_sampling_weights
from rexnet_lit.data.settings import DataRecord
from rexnet_lit.models import checkpoint, rexnet, variants
from rexnet_lit.models.heads import HeadSpec
from rexnet_lit.models.spec import ModelSpec
from rexnet_lit.models.weights import load_trained
from rexnet_lit.training import freezing, frozen_features, optim, plugins, schedules, start
from rexnet_lit.training.freezing import StrategySettings
from rexnet_lit.training.logistic_head import LogisticHead, fit_logistic_head
from rexnet_lit.training.losses import LossSettings, build_loss
from rexnet_lit.training.metrics import build_metrics
from rexnet_lit.training.optim import OptimizerSettings
from rexnet_lit.training.schedules import Plateau, Schedule, ScheduleSettings
from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.settings import check_range, settings_of

_LOSSES = "rexnet_lit_losses"


class RexNetModule(pl.LightningModule):
    """A ReXNet with its training settings.

    It starts from ``weights`` if given, else from timm's published weights if ``pretrained``, else from random ones.
    If the weights cannot be loaded, that is an error: it never falls back to random ones.

    Args:
        backbone: timm's name: ``rexnet_100`` to ``rexnet_300``, ``rexnetr_100`` to ``rexnetr_300``, with a tag or not.
        pretrained: Start from timm's published weights.
        weights: Local file to start from: a timm state dict (``.safetensors``) or a model of rexnet_lit.
        head: Maps features to logits; a name stands for its defaults.
        strategy: Which parts train when.
        optimizer: The optimiser.
        schedule: The learning-rate schedule.
        loss: The training loss.
        ema: Decay per step of the exponential moving average of the weights, such as 0.999; the average is then
            validated and shipped. 0 for none.
        drop_path_rate: Stochastic depth: share of residual branches dropped in the last block during training.
        grad_checkpointing: Recompute the activations in the backward pass instead of storing them: about a quarter
            slower, for larger batches or images on a small GPU. BatchNorm's running statistics see each batch twice.
        calibrate: When training ends, fit the temperature of the logits on the validation images, so that the
            probabilities match the accuracy. In Python, add `callbacks.calibration.Calibrate` to the trainer's
            callbacks, after `callbacks.weight_selection.WeightSelection`.
        keep_matching_classes: Copy the head's rows of the classes that the starting weights have under the same name.
        num_classes: K; from the data.
        class_names: One per logit; from the data.
        image_size: Height and width in pixels; from the data, the backbone's own by default.

    Raises:
        UserError: A setting is wrong, or the weights are missing or do not fit.
    """

    def __init__(
        self,
        backbone: str = "rexnet_100",
        pretrained: bool = True,
        weights: str | None = None,
        head: HeadSpec = HeadSpec(),  # noqa: B008 (frozen, as are the next four)
        strategy: StrategySettings = StrategySettings(),  # noqa: B008
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008
        schedule: ScheduleSettings = ScheduleSettings(),  # noqa: B008
        loss: LossSettings = LossSettings(),  # noqa: B008
        ema: float = 0.0,
        drop_path_rate: float = 0.0,
        grad_checkpointing: bool = False,
        calibrate: bool = False,
        keep_matching_classes: bool = False,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        check_range("model.ema", ema, "[0, 1)", "0 for none, or a decay such as 0.999")
        check_range("model.drop_path_rate", drop_path_rate, "[0, 1)")
        head = settings_of(HeadSpec, head)
        self.strategy_settings = settings_of(StrategySettings, strategy)
        self.optimizer_settings = settings_of(OptimizerSettings, optimizer)
        self.schedule_settings = settings_of(ScheduleSettings, schedule)
        self.loss_settings = settings_of(LossSettings, loss)
        self.ema, self._drop_path_rate, self.calibrate = ema, drop_path_rate, calibrate
        self._grad_checkpointing = grad_checkpointing
        names = start.initial_names(num_classes, class_names)
        self._numbered = class_names is None
        """Whether the classes have only numbers so far."""
        self.spec = ModelSpec(backbone, names, head, variants.eval_recipe(backbone, image_size))
        self.train_size = image_size or variants.train_size(backbone)
        self.network = rexnet.build_network(backbone, len(names), head, drop_path_rate=drop_path_rate)
        if grad_checkpointing:
            cast(Any, self.network).set_grad_checkpointing(True)
        self.loss = build_loss(self.loss_settings, [1] * len(names))
        self._plateau: Plateau | None = None
        self.started = False
        """Whether training has begun: a checkpoint is then restored completely."""
        self.scratch = weights is None and not pretrained
        """Whether training starts from random weights; after a resume, whether it did."""
        if self.strategy_settings.solves_head and head.name != "linear":
            raise UserError(f"model.strategy.solver: logistic solves a linear head; model.head.name is {head.name}")
        start.load_start(self.network, self.spec, weights, pretrained, keep_matching_classes)
        self.blends = self.strategy_settings.blend and self.strategy_settings.name != "linear_probe"
        """Whether the weights that ship are selected when training ends."""
        self.start: dict[str, Tensor] | None = None
        """The starting weights, if the selection interpolates from them."""
        if self.blends and head.name == "linear" and not self.scratch:
            self.start = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
            backbone_state = {name: tensor for name, tensor in self.start.items() if not name.startswith("head.fc.")}
            self._start_digest = checkpoint.digest(backbone_state)[:12]  # its head is solved again
        self.train_loss = MeanMetric(nan_strategy="disable")  # the NaN guard checks it
        self.val_metrics = build_metrics(len(names), "val/")
        self.test_metrics = build_metrics(len(names), "test/")

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; of a compiled ``network`` keep the network itself, so that its weights keep their names."""
        super().__setattr__(name, rexnet.compile_in_place(value) if name == "network" else value)

    @classmethod
    def from_model(cls, model: checkpoint.Model) -> RexNetModule:
        """Return the module of a model file, for validation, test and prediction."""
        spec = model.spec
        module = cls(spec.backbone, pretrained=False, head=spec.head, class_names=spec.class_names)
        module.spec = spec
        load_trained(module.network, model.state, str(model.path))
        return module

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | os.PathLike[str], map_location: str | torch.device = "cpu"
    ) -> RexNetModule:
        """Return the module of a model file, on a device; unlike Lightning's, this never unpickles."""
        return cls.from_model(checkpoint.load_model(checkpoint_path)).to(map_location)

    def setup(self, stage: str) -> None:
        """Take over the data's class names, choose the memory format, and prepare the loss and the strategy."""
        strategy = self.trainer.strategy
        plugins.install(strategy)
        names = tuple(getattr(any_datamodule(self.trainer), "class_names", None) or ())
        if stage != "predict" and names and names != self.spec.class_names:  # prediction needs no targets
            self.spec, self._numbered = start.adopt_classes(self.spec, names, self._numbered), False
        if strategy.root_device.type == "cpu" or (stage == "fit" and self._trains_long()):
            self.network.to(memory_format=torch.channels_last)
        if stage != "fit":
            return
        self.loss = build_loss(self.loss_settings, self._class_counts())
        freezing.freeze(self.network, self.strategy_settings, self.current_epoch)
        if self.strategy_settings.name == "staged" and isinstance(strategy, DDPStrategy):
            # DDP reads requires_grad once: all parameters must have it then, and later some get no gradient.
            self.network.requires_grad_(True)
            strategy._ddp_kwargs["find_unused_parameters"] = True

    def _trains_long(self) -> bool:
        """Whether channels_last pays on a GPU.

        It halves the time of a step in 16 bits. But cuDNN compiles its kernels for each batch size, which takes 5 to
        10 s (tests/benchmarks/bench_blocks.py, H200): as long as the whole training on a small folder.
        """
        if find_datamodule(self.trainer) is None:
            return False
        images = schedules.count_steps(self.trainer, self.schedule_settings.name)[1] * cast(int, self.images_per_step)
        return images * (self.spec.eval_recipe.image_size / 224) ** 2 > 100_000

    def _class_counts(self) -> Sequence[int]:
        """Return the training images of each class, (K,); ones if the loss does not need them."""
        data, classes = any_datamodule(self.trainer), self.spec.num_classes
        if self.loss_settings.class_weights == "none":
            return [1] * classes
        if not isinstance(data, ImageFolderDataModule):
            raise UserError("model.loss.class_weights: auto counts the images of an ImageFolderDataModule")
        counts: list[int] = np.bincount(data.splits()["train"].targets, minlength=classes).tolist()
        return counts

    def on_fit_start(self) -> None:
        """Compute the features of a frozen backbone that are needed once."""
        frozen_features.prepare(self)

    def embedder(self) -> Callable[[Tensor], Tensor]:
        """Return a function from images (B, 3, H, W) to features (B, C): the current backbone, for inference."""
        fused = rexnet.fuse_batchnorm(self.network)
        dtype = next(fused.parameters()).dtype

        def embed(images: Tensor) -> Tensor:
            with torch.no_grad(), self.trainer.precision_plugin.forward_context():
                return rexnet.embed(fused, rexnet.match_memory_format(images.to(dtype), fused))

        return embed

    def logits(self, features: Tensor) -> Tensor:
        """Return the current head's logits (N, K), float32 on the CPU, for features (N, C), in eval mode."""
        weights = next(self.network.get_submodule("head").parameters())
        with torch.no_grad():
            return rexnet.classify(self.network, features.to(weights)).float().cpu()

    def solve(self, features: Tensor, val_features: Tensor) -> LogisticHead:
        """Set the head to the best linear one for the features of the training and validation images.

        Args:
            features: (N, C), the same on all processes.
            val_features: (M, C).
        """
        head, splits = None, cast(ImageFolderDataModule, find_datamodule(self.trainer)).splits()
        if self.trainer.is_global_zero:
            head = fit_logistic_head(
                features.numpy(),
                splits["train"].targets,
                val_features.numpy(),
                splits["val"].targets,
                self.class_weights(),
            )
        solved = cast(LogisticHead, self.trainer.strategy.broadcast(head))
        solved.copy_to(self.network.get_submodule("head.fc"))
        return solved

    def class_weights(self) -> NDArray[np.float64]:
        """Return the weight of an image of each class, (K,): that of the loss times how often it is drawn."""
        data = cast(ImageFolderDataModule, find_datamodule(self.trainer))
        counts = np.bincount(data.splits()["train"].targets, minlength=self.spec.num_classes)
        return cast(Tensor, self.loss.weights).double().cpu().numpy() * class_sampling_weights(counts, data.sampler)

    def train(self, mode: bool = True) -> RexNetModule:
        """Set the training mode; frozen parts stay in eval mode."""
        super().train(mode)
        if mode:
            epoch = self.current_epoch if self._trainer is not None else 0
            freezing.freeze_batchnorm(self.network, self.strategy_settings, epoch)
        return self

    def on_train_start(self) -> None:
        """Freeze for this epoch, which a resumed run knows only now."""
        self.started = True
        self._freeze()

    def on_train_epoch_start(self) -> None:
        """Freeze for this epoch, and reset its mean loss."""
        self._freeze()
        self.train_loss.reset()

    def _freeze(self) -> None:
        freezing.freeze(self.network, self.strategy_settings, self.current_epoch)
        self.train()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed dropout and drop path by (seed, epoch, batch, process), so that no random state needs saving."""
        key = (run_seed(), self.current_epoch, batch_idx, self.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map images (B, 3, H, W), or their features (B, C), to logits (B, K)."""
        rexnet.check_input(inputs, self.network)
        if inputs.ndim == 2:
            return rexnet.classify(self.network, inputs)
        return cast(Tensor, self.network(rexnet.match_memory_format(inputs, self.network)))

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of images (B, 3, H, W) and targets (B,), or (B, K) after MixUp."""
        images, targets = batch[0], batch[1]
        loss: Tensor = self.loss(self(images), targets)
        self.log("train/loss_step", loss, prog_bar=True, on_epoch=False)
        self.train_loss.update(loss.detach(), len(targets))
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True)
        return loss * self._share(batch_idx)

    def _share(self, batch_idx: int) -> float:
        """Return the factor that makes the gradient of accumulated batches their mean.

        Lightning divides by ``accumulate_grad_batches`` in an epoch's last step too, which may have fewer.
        """
        every, batches = self.trainer.accumulate_grad_batches, self.trainer.num_training_batches
        rest = 0 if math.isinf(batches) else int(batches) % every
        return every / rest if rest and batch_idx >= batches - rest else 1.0

    def on_validation_epoch_start(self) -> None:
        """Reset: outside a fit Lightning leaves inference tensors, which a fit cannot update."""
        self.val_metrics.reset()

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> dict[str, Tensor | None]:
        """Update the metrics; return ``logits`` (B, K), ``targets`` (B,) and, if there are any, ``indices`` (B,)."""
        return self._evaluate(batch, self.val_metrics)

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics, which torchmetrics gathers over all processes."""
        self.log_dict(self.val_metrics, prog_bar=True)
        if self._plateau is not None and self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._plateau.update(float(self.val_metrics["loss"].compute()))
            cast(Schedule, self.lr_schedulers()).apply()

    def measure(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the validation metrics of logits (N, K) and targets (N,), the same on all processes."""
        self.val_metrics.reset()
        self.val_metrics.update(logits.to(self.device), targets.to(self.device))
        found: dict[str, Tensor] = self.val_metrics.compute()
        self.val_metrics.reset()
        return found

    def on_test_epoch_start(self) -> None:
        """Reset: an earlier test may have been interrupted."""
        self.test_metrics.reset()

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> dict[str, Tensor | None]:
        """Return what `validation_step` does."""
        return self._evaluate(batch, self.test_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self.log_dict(self.test_metrics)

    def _evaluate(self, batch: Sequence[Tensor], metrics: MetricCollection) -> dict[str, Tensor | None]:
        logits = self(batch[0])
        metrics.update(logits, batch[1])
        return {"logits": logits, "targets": batch[1], "indices": batch[2] if len(batch) > 2 else None}

    def predict_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the probabilities (B, K) of images (B, 3, H, W)."""
        logits: Tensor = self(batch[0])
        return logits.float().softmax(1)

    def configure_optimizers(self) -> Any:
        """Return the optimiser and its schedule, stepped every optimiser step."""
        optimizer = optim.build_optimizer(self.network, self.optimizer_settings, self.lr)
        settings = self.schedule_settings
        per_epoch, total = schedules.count_steps(self.trainer, settings.name)
        factor: Callable[[int], float] = lambda step: schedules.lr_factor(settings, step, total, per_epoch)  # noqa: E731
        if self.strategy_settings.only_solves:
            factor = lambda step: 0.0  # noqa: E731
        elif settings.name == "plateau":
            factor = self._plateau = Plateau.start(settings, total, per_epoch)
        scheduler = Schedule(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def lr(self) -> float:
        """The full learning rate; Lightning's ``Tuner`` sets it."""
        return self.optimizer_settings.full_lr(self.scratch, self.images_per_step if self._trainer else None)

    @lr.setter
    def lr(self, rate: float) -> None:
        unscaled = rate * self.optimizer_settings.full_lr(self.scratch) / self.lr
        self.optimizer_settings = dataclasses.replace(self.optimizer_settings, lr=unscaled)

    @property
    def calibrates(self) -> bool:
        """Whether the shipped logits are divided by a temperature: a cosine head has its own."""
        return self.calibrate and self.spec.head.name != "cosine"

    @property
    def images_per_step(self) -> int | None:
        """Images of an optimiser step, over all processes; None if the data module has no batch size."""
        return schedules.images_per_step(self.trainer)

    def configure_callbacks(self) -> list[pl.Callback]:
        """Average the weights if ``ema`` is set."""
        return [WeightAveraging(avg_fn=partial(optim.average, self.ema))] if self.ema else []

    def on_save_checkpoint(self, content: dict[str, Any]) -> None:
        """Add the model's description, in plain strings, and the loss of the epoch so far."""
        record = getattr(any_datamodule(self.trainer), "record", DataRecord())
        content[checkpoint.KEY] = checkpoint.make_record(self.spec, record)
        losses = torch.stack([self.train_loss.mean_value, self.train_loss.weight])
        content[_LOSSES] = self.trainer.strategy.reduce(losses, reduce_op="sum").tolist()

    def on_load_checkpoint(self, content: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model; restore the loss of its last epoch so far.

        Raises:
            UserError: The architecture, the classes or the tensors differ.
        """
        start.check_checkpoint(content, self.spec, self.state_dict())
        # The sums over all processes: one process restores them.
        total, count = content.get(_LOSSES, (0.0, 0.0)) if self.global_rank == 0 else (0.0, 0.0)
        self.train_loss.mean_value, self.train_loss.weight = torch.tensor(total), torch.tensor(count)

    def settings(self) -> dict[str, Any]:
        """Return the settings that decide the weights of a run, apart from its data."""
        groups: dict[str, Any] = {
            "strategy": self.strategy_settings,
            "optimizer": self.optimizer_settings,
            "schedule": self.schedule_settings,
            "loss": self.loss_settings,
        }
        nested = {f"{k}.{f}": v for k, group in groups.items() for f, v in dataclasses.asdict(group).items()}
        start = {} if self.start is None else {"weights": self._start_digest}
        more = {"ema": self.ema, "drop_path_rate": self._drop_path_rate, "grad_checkpointing": self._grad_checkpointing}
        return {**nested, **start, **more}

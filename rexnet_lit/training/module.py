"""The LightningModule: wires the network, loss, strategy, optimiser, schedule and metrics to Lightning's hooks."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection

from rexnet_lit.data.datamodule import any_datamodule
from rexnet_lit.data.sampler import run_seed
from rexnet_lit.data.settings import CropMode, DataRecord
from rexnet_lit.data.transforms import EvalTransform
from rexnet_lit.models import checkpoint, rexnet, variants
from rexnet_lit.models.heads import HeadSpec
from rexnet_lit.models.spec import ModelSpec
from rexnet_lit.models.weights import check_own_network, load_trained
from rexnet_lit.training import features, freezing, parts, plugins, schedules, start
from rexnet_lit.training.distillation import TeacherSettings, build_teacher
from rexnet_lit.training.freezing import StrategySettings
from rexnet_lit.training.losses import LossSettings, build_loss, own_loss
from rexnet_lit.training.metrics import build_metrics, require_updates
from rexnet_lit.training.optim import OptimizerSettings
from rexnet_lit.training.schedules import Plateau, Schedule, ScheduleSettings
from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.settings import check_types, overridden, settings_and_own, settings_of

_LOSSES = "rexnet_lit_losses"


class RexNetModule(pl.LightningModule):
    """A ReXNet with its training settings, for Lightning's ``Trainer``.

    It starts from ``weights`` if given, else from timm's published weights if ``pretrained``, else from random ones.
    If the weights are damaged or do not fit, that is an error; if they are missing, it is one when training starts,
    because a resumed run does not need them. It never falls back to random ones.

    Settings are given as a name, which stands for its defaults, as a mapping, or as a dataclass. With an
    `ImageFolderDataModule` it does under any ``Trainer`` what the command line does with the same settings:
    `configure_callbacks` adds what saves, selects, calibrates and records. With loaders of your own, batches are
    ``(images, targets)``: float32 images (B, 3, S, S), RGB, as `eval_transform` makes them, and int64 targets (B,).

    A researcher's own parts: pass a loss, an optimiser, a schedule, metrics or a network, name its class in YAML
    (``class_path``, ``init_args``), set the attributes ``loss`` or ``network``, or override `configure_loss`,
    `configure_metrics`, `configure_network` or ``configure_optimizers``. See notebooks/research.ipynb.

    Args:
        backbone: timm's name: ``rexnet_100`` to ``rexnet_300``, ``rexnetr_100`` to ``rexnetr_300``, with a tag or not.
        pretrained: Start from timm's published weights.
        weights: Local file to start from: a timm state dict (``.safetensors``) or a model of rexnet_lit.
        head: Maps features to logits.
        strategy: Which parts train when.
        optimizer: The optimiser: settings, or what is called with the parameters, such as ``torch.optim.RMSprop``.
        schedule: The learning-rate schedule: settings, or what is called with the optimiser.
        loss: The training loss: settings, or a module or function of logits (B, K) and targets (B,) for the mean loss.
        select: What makes weights the best on the validation images. It decides ``best.ckpt`` and what ships: the
            highest ``top1`` or ``macro_f1``, or the lowest ``loss``; of equals the lower loss wins.
        ema: Decay per step of the exponential moving average of the weights, such as 0.999; the average is then
            validated and shipped. 0 for none.
        drop_path_rate: Stochastic depth: share of residual branches dropped in the last block during training.
        grad_checkpointing: Recompute the activations in the backward pass instead of storing them: about a quarter
            slower, for larger batches or images on a small GPU. BatchNorm's running statistics see each batch twice.
        calibrate: When training ends, fit the temperature, so that the probabilities match the validation accuracy.
        target_precision: The share of sure answers that should be right; the others are marked as unsure.
        keep_matching_classes: Copy the head's rows of the classes that the starting weights have under the same name.
        teacher: A fine-tuned model of the same classes, to learn from its probabilities too: its file, or settings.
        metrics: Further metrics by name: torchmetrics that are updated with logits (B, K) and targets (B,), or their
            ``class_path`` and ``init_args``. They are logged as ``val/NAME`` and ``test/NAME``.
        network: A network of your own: a module that maps images to logits and has timm's ``forward_features``,
            ``forward_head`` and ``get_classifier``, or its ``class_path`` and ``init_args``. ``backbone``,
            ``pretrained`` and ``head`` then have no effect, and what needs a ReXNet's layers says so.
        num_classes: K; from the data.
        class_names: One per logit; from the data.
        image_size: Height and width in pixels; from the data, the backbone's own by default.
        crop_mode: How an image becomes a square; likewise.

    Raises:
        UserError: A setting is wrong, or the weights are missing or do not fit.
    """

    def __init__(
        self,
        backbone: str = "rexnet_100",
        pretrained: bool = True,
        weights: str | None = None,
        head: parts.Head = HeadSpec(),  # noqa: B008 (frozen, as are the next four)
        strategy: parts.Strategy = StrategySettings(),  # noqa: B008
        optimizer: parts.OptimizerLike = OptimizerSettings(),  # noqa: B008
        schedule: parts.ScheduleLike = ScheduleSettings(),  # noqa: B008
        loss: parts.Loss = LossSettings(),  # noqa: B008
        select: parts.Select = "top1",
        ema: float = 0.0,
        drop_path_rate: float = 0.0,
        grad_checkpointing: bool = False,
        calibrate: bool = False,
        target_precision: float = 0.95,
        keep_matching_classes: bool = False,
        teacher: parts.Taught = TeacherSettings(),  # noqa: B008
        metrics: dict[str, Any] | None = None,
        network: parts.Network = None,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        image_size: int | None = None,
        crop_mode: CropMode | None = None,
    ) -> None:
        super().__init__()
        check_types("model", RexNetModule.__init__, locals())
        parts.check_settings(locals())
        head = settings_of(HeadSpec, head, "model.head")
        self.strategy_settings = settings_of(StrategySettings, strategy, "model.strategy")
        own: dict[str, Any] = {"network": network}
        self.optimizer_settings, own["optimizer"] = settings_and_own(OptimizerSettings, optimizer, "model.optimizer")
        self.schedule_settings, own["schedule"] = settings_and_own(ScheduleSettings, schedule, "model.schedule")
        self.loss_settings, own["loss"] = settings_and_own(LossSettings, loss, "model.loss")
        self._own = own
        """The user's own parts, by setting."""
        self.ema, self.calibrate, self.select, self.target_precision = ema, calibrate, select, target_precision
        self.drop_path_rate, self.grad_checkpointing = drop_path_rate, grad_checkpointing
        names = start.initial_names(num_classes, class_names)
        self._numbered = class_names is None  # the classes have only numbers so far
        self.spec = ModelSpec(backbone, names, head, variants.eval_recipe(backbone, image_size, crop_mode))
        self.network = self.configure_network()
        changed = network is not None or overridden(self, "configure_network")
        self._built = None if changed else parts.shapes_of(self.network)
        self.spec = parts.describe_network(self.spec, self.network, image_size, crop_mode, self._built)
        size = variants.train_size(backbone) if self.spec.network is None else self.spec.eval_recipe.image_size
        self.train_size = image_size or size
        self.teacher = build_teacher(teacher, self.strategy_settings, None if self._numbered else self.spec)
        if grad_checkpointing:
            cast(Any, self.network).set_grad_checkpointing(True)
        self.loss: nn.Module = build_loss(LossSettings(), [1] * len(names))
        self._default_loss = (self.loss,)  # in a tuple, so that it is no submodule
        self._plateau: Plateau | None = None
        self._frozen: set[str] = set()  # by the strategy
        self.started = False
        """Whether training has begun: a checkpoint is then restored completely."""
        self.scratch = start.from_scratch(weights, pretrained, self.spec.network)
        """Whether training starts from random weights; after a resume, whether it did."""
        if self.strategy_settings.solves_head and head.name != "linear":
            raise UserError(f"model.strategy.solver: logistic solves a linear head; model.head.name is {head.name}")
        self.blends = self.strategy_settings.blend and self.strategy_settings.name != "linear_probe"
        """Whether the weights that ship are selected when training ends."""
        self.start = start.StartingWeights(
            None if self.scratch else self.network, self.spec, weights, keep_matching_classes, keep_copy=self.blends
        )
        self.train_loss = MeanMetric(nan_strategy="disable")  # the NaN guard checks it
        self.val_metrics = build_metrics(len(names), "val/")
        self.test_metrics = build_metrics(len(names), "test/")
        self._add_metrics(parts.build_metrics_of(metrics))

    # A researcher's own parts

    def configure_network(self) -> nn.Module:
        """Return the network; it is called by the constructor, once ``spec`` is known."""
        own = self._own["network"]
        if own is None:
            spec = self.spec
            return rexnet.build_network(spec.backbone, spec.num_classes, spec.head, drop_path_rate=self.drop_path_rate)
        return cast(nn.Module, parts.build_own(own, "model.network", nn.Module))

    def configure_loss(self) -> nn.Module:
        """Return the training loss, which maps logits (B, K) and targets (B,), or (B, K) after MixUp, to the mean."""
        own = self._own["loss"]
        if own is None:
            return build_loss(self.loss_settings, parts.class_counts(self))
        return own_loss(own)

    def configure_metrics(self) -> dict[str, Metric]:
        """Return further metrics by name, each updated with logits (B, K) and targets (B,)."""
        return {}

    def _add_metrics(self, metrics: dict[str, Metric]) -> None:
        for collection in (self.val_metrics, self.test_metrics):
            if same := metrics.keys() & set(collection.keys(keep_base=True)):
                raise UserError(f"model.metrics: there is already a metric {min(same)!r}; choose another name")
            collection.add_metrics({name: metric.clone() for name, metric in metrics.items()})

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; of a compiled ``network`` keep the network itself, so that its weights keep their names."""
        super().__setattr__(name, rexnet.compile_in_place(value) if name == "network" else value)

    @classmethod
    def from_model(cls, model: checkpoint.Model, network: nn.Module | None = None, **settings: Any) -> RexNetModule:
        """Return the module of a model file, see `load_from_checkpoint`."""
        if network is not None or cls.configure_network is RexNetModule.configure_network:
            own = check_own_network(model.spec, network, str(model.path))
            settings |= {} if own is None else {"network": own}
        module = cls(**start.settings_of_model(model.spec, cls, settings))
        module.spec, module.scratch = model.spec, False
        load_trained(module.network, model.state, str(model.path))
        module.start = start.StartingWeights.of_model(module.network, module.spec, keep_copy=module.blends)
        return module

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | os.PathLike[str],
        map_location: str | torch.device = "cpu",
        network: nn.Module | None = None,
        **settings: Any,
    ) -> RexNetModule:
        """Return the module of a model file, on a device; unlike Lightning's, this never unpickles.

        It takes a network of your own if the model has one, and settings of the class other than the model's own
        (backbone, head, classes, image size, crop); without them, their defaults.
        """
        return cls.from_model(checkpoint.load_model(checkpoint_path), network, **settings).to(map_location)

    @property
    def eval_transform(self) -> EvalTransform:
        """What maps an image, uint8 (H, W, 3) or a PIL image, to the network's input: float32 (3, S, S)."""
        return EvalTransform(self.spec.eval_recipe)

    def setup(self, stage: str) -> None:
        """Take over the data's class names, choose the memory format, and prepare the loss and the strategy."""
        strategy = self.trainer.strategy
        plugins.install(strategy)
        names = tuple(getattr(any_datamodule(self.trainer), "class_names", None) or ())
        if stage != "predict" and names and names != self.spec.class_names:  # prediction needs no targets
            self.spec, self._numbered = start.adopt_classes(self.spec, names, self._numbered), False
        if strategy.root_device.type == "cpu" or (stage == "fit" and parts.trains_long(self)):
            self.network.to(memory_format=torch.channels_last)
        known = self.val_metrics.keys(keep_base=True)
        self._add_metrics({name: metric for name, metric in self.configure_metrics().items() if name not in known})
        if stage != "fit":
            return
        self.started = False
        recipe = self.spec.eval_recipe
        size, mode = recipe.image_size, recipe.crop_mode
        self.spec = parts.describe_network(self.spec, self.network, size, mode, self._built)
        self.spec = parts.describe_preprocessing(self.spec, self.trainer)
        parts.check_network(self)
        if self.teacher is not None:
            self.teacher.prepare(self.spec, self.network)
        if self.loss is self._default_loss[0]:  # not one that the user has set
            self.loss = self.configure_loss()
            self._default_loss = (self.loss,)
        freezing.freeze(self.network, self.strategy_settings, self.current_epoch, self._frozen)
        if self.strategy_settings.name == "staged" and isinstance(strategy, DDPStrategy):
            # DDP reads requires_grad once: all parameters must have it then, and later some get no gradient.
            freezing.unfreeze(self.network, self._frozen)
            strategy._ddp_kwargs["find_unused_parameters"] = True

    def on_fit_start(self) -> None:
        """Require the starting weights; compute the features of a frozen backbone that are needed once."""
        self.start.require(resumes=self.trainer.ckpt_path is not None)
        features.prepare(self)

    def train(self, mode: bool = True) -> RexNetModule:
        """Set the training mode; frozen parts stay in eval mode."""
        super().train(mode)
        if mode:
            epoch = self.current_epoch if self._trainer is not None else 0
            freezing.freeze_batchnorm(self.network, self.strategy_settings, epoch)
        return self

    def on_train_start(self) -> None:
        """Freeze for this epoch, which a resumed run knows only now; a loaded model's limits no longer hold."""
        self.started, self.spec = True, dataclasses.replace(self.spec, limits=None)
        self._freeze()

    def on_train_epoch_start(self) -> None:
        """Freeze for this epoch, and reset its mean loss."""
        self._freeze()
        self.train_loss.reset()

    def _freeze(self) -> None:
        freezing.freeze(self.network, self.strategy_settings, self.current_epoch, self._frozen)
        self.train()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed dropout and drop path by (seed, epoch, batch, process), so that no random state needs saving."""
        key = (run_seed(), self.current_epoch, batch_idx, self.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map images (B, 3, H, W), or their features (B, C), to logits (B, K)."""
        if self.start.missing is not None:
            raise self.start.missing
        rexnet.check_input(inputs, self.network)
        if inputs.ndim == 2:
            return rexnet.classify(self.network, inputs)
        return cast(Tensor, self.network(rexnet.match_memory_format(inputs, self.network)))

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of images (B, 3, H, W) and targets (B,), or (B, K) after MixUp."""
        loss_of = self.loss if self.teacher is None else self.teacher.loss_of(self.loss, batch[0])
        loss: Tensor = loss_of(self(batch[0]), batch[1])
        self.log("train/loss_step", loss, prog_bar=True, on_epoch=False)
        self.train_loss.update(loss.detach(), len(batch[1]))
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True)
        return loss * schedules.gradient_factor(self.trainer, batch_idx)

    def on_validation_epoch_start(self) -> None:
        """Reset: outside a fit Lightning leaves inference tensors, which a fit cannot update."""
        self.val_metrics.reset()

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> dict[str, Tensor | None]:
        """Update the metrics; return ``logits`` (B, K), ``targets`` (B,) and, if there are any, ``indices`` (B,)."""
        return self._evaluate(batch, self.val_metrics)

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics, which torchmetrics gathers over all processes."""
        require_updates(self.val_metrics, self.trainer.num_val_batches)
        self.log_dict(self.val_metrics, prog_bar=True)
        if self._plateau is not None and self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._plateau.update(float(self.val_metrics["loss"].compute()))
            cast(Schedule, self.lr_schedulers()).apply()

    def measure(self, logits: Tensor, targets: Tensor) -> dict[str, float]:
        """Return the validation metrics of logits (N, K) and targets (N,), the same on all processes."""
        self.val_metrics.reset()
        self.val_metrics.update(logits.to(self.device), targets.to(self.device))
        found = {str(name): float(value) for name, value in self.val_metrics.compute().items()}
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
        require_updates(self.test_metrics, self.trainer.num_test_batches)
        self.log_dict(self.test_metrics)

    def _evaluate(self, batch: Sequence[Tensor], metrics: MetricCollection) -> dict[str, Tensor | None]:
        logits = self(batch[0])
        metrics.update(logits, batch[1])
        return {"logits": logits, "targets": batch[1], "indices": batch[2] if len(batch) > 2 else None}

    def predict_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the probabilities (B, K) of images (B, 3, H, W)."""
        return cast(Tensor, self(batch[0])).float().softmax(1)

    def configure_optimizers(self) -> Any:
        """Return the optimiser and its schedule, stepped every optimiser step."""
        optimizer = parts.build_optimizer(self, self._own["optimizer"])
        schedule, self._plateau = parts.build_schedule(self, optimizer, self._own["schedule"])
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    @property
    def lr(self) -> float:
        """The full learning rate; Lightning's ``Tuner`` sets it."""
        images = schedules.images_per_step(self.trainer) if self._trainer else None
        return self.optimizer_settings.full_lr(self.scratch, images)

    @lr.setter
    def lr(self, rate: float) -> None:
        if self._own["optimizer"] is not None:
            raise UserError(f"the learning rate {rate:.3g} cannot be set: model.optimizer is your own; give it there")
        unscaled = rate * self.optimizer_settings.full_lr(self.scratch) / self.lr
        self.optimizer_settings = dataclasses.replace(self.optimizer_settings, lr=unscaled)

    @property
    def calibrates(self) -> bool:
        """Whether the shipped logits are divided by a temperature: a cosine head has its own."""
        return self.calibrate and self.spec.head.name != "cosine"

    def configure_callbacks(self) -> list[pl.Callback]:
        """Return what saves, selects, calibrates and records in a fit; see `callbacks.defaults`."""
        from rexnet_lit.training.callbacks import defaults  # which imports this module

        return defaults.callbacks_of(self)

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
        return parts.settings_of_run(self) | freezing.settings(self.network, self._frozen)

"""The LightningModule: wires the network, loss, strategy, optimiser, schedule and metrics to Lightning's hooks."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from rexnet_lit.data.datamodule import ImageFolderDataModule, any_datamodule, find_datamodule, run_seed
from rexnet_lit.data.sampler import class_sampling_weights
from rexnet_lit.data.settings import DataRecord
from rexnet_lit.models import checkpoint, rexnet, variants
from rexnet_lit.models.spec import HeadSpec, ModelSpec
from rexnet_lit.models.weights import describe_mismatch, load_pretrained, load_weights, matching_rows
from rexnet_lit.training import checkpoint_io, freezing, logistic_head, optim, sync_batchnorm
from rexnet_lit.training.freezing import StrategySettings
from rexnet_lit.training.losses import LossSettings, build_loss
from rexnet_lit.training.metrics import build_metrics
from rexnet_lit.training.optim import OptimizerSettings
from rexnet_lit.training.schedules import Plateau, ScheduleSettings, lr_factor
from rexnet_lit.utils import process
from rexnet_lit.utils.errors import UserError, printable
from rexnet_lit.utils.settings import settings_of


class RexNetModule(pl.LightningModule):
    """A ReXNet that learns.

    The weights it starts from: ``weights`` where given, else timm's published ones where ``pretrained``, else
    random ones; never random ones in silence.

    Args:
        backbone: timm's name: ``rexnet_100`` to ``rexnet_300``, ``rexnetr_100`` to ``rexnetr_300``, with a tag or not.
        pretrained: Start from timm's published weights.
        weights: Local file to start from: a timm state dict (``.safetensors``) or a model of ours.
        head: What turns features into logits; a name stands for its defaults.
        strategy: What trains when.
        optimizer: How it learns.
        schedule: How the learning rate changes.
        loss: What it minimises.
        ema: Decay per step of the exponential moving average of the weights that is then validated and shipped
            (0.999, say); 0 for none.
        drop_path_rate: Stochastic depth: share of residual branches dropped in the last block while training.
        grad_checkpointing: Compute the activations again in the backward pass instead of keeping them: about a quarter
            slower, for larger batches or images on a small GPU. BatchNorm's running statistics see each batch twice.
        calibrate: When training ends, fit the temperature of the logits on the validation images, so that probabilities
            mean what they say. In Python, add `calibration.Calibrate` to the trainer's callbacks, after `blend.Blend`.
        keep_matching_classes: Where the starting weights know a class by its name, start from their row of the head.
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
        if not 0 <= ema < 1:
            raise UserError(f"model.ema is {ema}; expected a decay from 0 (none) to below 1, such as 0.999")
        if not 0 <= drop_path_rate < 1:
            raise UserError(f"model.drop_path_rate is {drop_path_rate}; expected a fraction from 0 to below 1")
        head = settings_of(HeadSpec, head)
        self.strategy_settings = settings_of(StrategySettings, strategy)
        self.optimizer_settings = settings_of(OptimizerSettings, optimizer)
        self.schedule_settings = settings_of(ScheduleSettings, schedule)
        self.ema, self._drop_path_rate, self.calibrate = ema, drop_path_rate, calibrate
        names = _names(num_classes, class_names)
        self._numbered = class_names is None
        """Whether the classes have no names yet but their numbers."""
        self.spec = ModelSpec(backbone, names, head, variants.eval_recipe(backbone, image_size))
        self.train_size = image_size or variants.train_size(backbone)
        self.network = rexnet.build_network(backbone, len(names), head, drop_path_rate=drop_path_rate)
        self._grad_checkpointing = grad_checkpointing
        if grad_checkpointing:
            cast(Any, self.network).set_grad_checkpointing(True)
        self.loss_settings = settings_of(LossSettings, loss)
        self.loss = build_loss(self.loss_settings, [1] * len(names))
        self._plateau: Plateau | None = None
        self.started = False
        """Whether training has begun: all of a checkpoint is restored then."""
        self.scratch = weights is None and not pretrained
        """Whether the weights are random at first; of a resumed run, whether they were."""
        if self._solved and head.name != "linear":
            raise UserError(f"model.strategy.solver: logistic solves a linear head; model.head.name is {head.name}")
        if weights is not None:
            self._start_from(weights, keep_matching_classes)
        elif pretrained:
            rows: dict[int, int] = {}
            if keep_matching_classes and head.shape == HeadSpec().shape:
                rows = self._matching_rows(variants.published_names(backbone))
            elif keep_matching_classes:
                self._keeps_none("the published weights have another kind of head")
            load_pretrained(self.network, backbone, rows=rows)
        self.blends = self.strategy_settings.blend and self.strategy_settings.name != "linear_probe"
        """Whether better weights than the best epoch's are looked for at the end."""
        self.start: dict[str, Tensor] | None = None
        """The weights it starts from, where they are to be blended with the end's."""
        if self.blends and head.name == "linear" and not self.scratch:
            self.start = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
            body = {name: tensor for name, tensor in self.start.items() if not name.startswith("head.fc.")}
            self._start_digest = checkpoint.digest(body)[:12]  # its head is solved anew
        self.train_loss = MeanMetric(nan_strategy="disable")  # `FiniteLoss` looks
        self.val_metrics = build_metrics(len(names), "val/")
        self.test_metrics = build_metrics(len(names), "test/")

    @classmethod
    def from_model(cls, model: checkpoint.Model) -> RexNetModule:
        """Return the module of a model file, for validation, test and prediction."""
        spec = model.spec
        module = cls(spec.backbone, pretrained=False, head=spec.head, class_names=spec.class_names)
        module.spec = spec
        if not load_weights(module.network, model.state, str(model.path)):
            raise UserError(f"{model.path}: its head does not fit its description; re-create the file")
        return module

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | os.PathLike[str], map_location: str | torch.device = "cpu"
    ) -> RexNetModule:
        """Return the module of a model file, on a device; unlike Lightning's, this never unpickles."""
        return cls.from_model(checkpoint.load_model(checkpoint_path)).to(map_location)

    @property
    def _solved(self) -> bool:
        """Whether the head is solved rather than learned."""
        return self.strategy_settings.solver == "logistic"

    @property
    def _nothing_left(self) -> bool:
        """Whether there is nothing to learn once the head is solved."""
        return self._solved and self.strategy_settings.name == "linear_probe"

    def _matching_rows(self, theirs: Sequence[str]) -> dict[int, int]:
        rows = matching_rows(theirs, self.spec.class_names)
        named = [self.spec.class_names[row] for row in rows]
        rank_zero_only(print)(f"The starting weights know these classes by name ({_short(tuple(named))}).")
        return rows

    def _keeps_none(self, why: str) -> None:
        rank_zero_only(print)(f"model.keep_matching_classes: {why}; none is kept.")

    def _start_from(self, path: str, keep_matching_classes: bool) -> None:
        state, spec = checkpoint.load_starting_weights(path)
        backbone = self.spec.backbone
        if spec is not None and spec.backbone.partition(".")[0] != backbone.partition(".")[0]:
            raise UserError(f"model.weights: {path} is a {spec.backbone}, but model.backbone is {backbone}")
        same_head = spec is None or spec.head.shape == self.spec.head.shape
        same_classes = same_head and (spec is None or spec.class_names == self.spec.class_names)
        rows: dict[int, int] = {}
        if keep_matching_classes:
            if spec is None:
                self._keeps_none(f"{path} does not name its classes")
            elif same_head:
                rows = self._matching_rows(spec.class_names)
            else:
                self._keeps_none(f"{path} has another kind of head")
        where = f"model.weights: {path}"
        kept = load_weights(self.network, state, where, keep_head=same_classes, rows=rows)
        old = f"{len(state['head.fc.weight'])} classes" if "head.fc.weight" in state else "of another kind"
        said = "its head too" if kept else f"its head ({old}) is replaced by a new one ({len(self.spec.class_names)})"
        rank_zero_only(print)(f"Starting from {path}: {said}.")

    def setup(self, stage: str) -> None:
        """Take the data module's class names, lay the weights out for the device, and have checkpoints read safely."""
        checkpoint_io.install(self.trainer.strategy)
        sync_batchnorm.install(self.trainer.strategy)
        if stage != "predict":  # which needs no truth
            self._meet_classes(getattr(any_datamodule(self.trainer), "class_names", None))
        if self.trainer.strategy.root_device.type == "cpu" or (stage == "fit" and self._trains_long()):
            self.network.to(memory_format=torch.channels_last)
        if stage != "fit":
            return
        self.loss = build_loss(self.loss_settings, self._class_counts())
        freezing.freeze(self.network, self.strategy_settings, self.current_epoch)
        if self.strategy_settings.name == "staged" and isinstance(self.trainer.strategy, DDPStrategy):
            # DDP looks at the parameters once: all must seem to train then, and later some get no gradient.
            self.network.requires_grad_(True)
            self.trainer.strategy._ddp_kwargs["find_unused_parameters"] = True

    def _trains_long(self) -> bool:
        """Whether channels_last pays on a GPU.

        A step in 16 bits takes half the time then. But cuDNN makes its kernels for each size of batch, which
        takes 5 to 10 s (tests/benchmarks/bench_blocks.py, H200): as long as all of a small folder's training.
        """
        if find_datamodule(self.trainer) is None:
            return False
        images = self._steps()[1] * cast(int, self.images_per_step)
        return images * (self.spec.eval_recipe.image_size / 224) ** 2 > 100_000

    def _meet_classes(self, found: Sequence[str] | None) -> None:
        """Take over the data's class names where the model has none yet; else they must be the model's."""
        names = tuple(found or ())
        if not names or names == self.spec.class_names:
            return
        if len(names) != self.spec.num_classes:
            raise UserError(f"the data has {len(names)} classes, but the model was made for {self.spec.num_classes}")
        if not self._numbered:
            raise UserError(
                f"the data's classes ({_short(names)}) are not the model's, in its order "
                f"({_short(self.spec.class_names)}); to test it, pass class_names=module.spec.class_names to "
                "ImageFolderDataModule; to train it on other classes, pass its file to RexNetModule as weights"
            )
        self.spec, self._numbered = dataclasses.replace(self.spec, class_names=names), False

    def _class_counts(self) -> Sequence[int]:
        """Return the training images of each class, (K,); all alike where nobody asks."""
        data, classes = any_datamodule(self.trainer), self.spec.num_classes
        if self.loss_settings.class_weights == "none":
            return [1] * classes
        if not isinstance(data, ImageFolderDataModule):
            raise UserError("model.loss.class_weights: auto counts the images of an ImageFolderDataModule")
        counts: list[int] = np.bincount(data.splits()["train"].targets, minlength=classes).tolist()
        return counts

    def on_fit_start(self) -> None:
        """Compute what of a frozen backbone is needed once: features to train on, the solved head."""
        if self._nothing_left:
            self.trainer.fit_loop.max_epochs = 1
        settings, data = self.strategy_settings, any_datamodule(self.trainer)
        if not isinstance(data, ImageFolderDataModule):
            if self._solved:
                raise UserError("model.strategy.solver: logistic needs an ImageFolderDataModule")
            return
        if settings.name == "linear_probe" and settings.views:
            if data.augment.mixup or data.augment.cutmix:
                raise UserError(
                    "model.strategy.views keeps features of whole images; set data.augment.mixup and cutmix to 0"
                )
            if data.size_schedule:
                raise UserError("model.strategy.views keeps features of one size; leave data.size_schedule out")
        views = settings.views or int(data.augment.fixed and not data.size_schedule)
        width: int = cast(Any, self.network).head_hidden_size
        needed = 4 * width * max(views, 1) * len(data.splits()["train"])
        if settings.name == "linear_probe" and views and needed > process.available_memory() / 2:
            rank_zero_only(print)(f"The features would fill {needed / 1e9:.0f} GB: they are computed in each epoch.")
            views = 0
        cached = settings.name == "linear_probe" and (views > 0 or self._nothing_left)
        resumed = self.trainer.ckpt_path is not None
        if not cached and (resumed or not self._solved):
            return
        self.eval()
        embed = self.embedder()
        val = data.compute_features("val", embed)
        fixed = data.compute_features("train", embed, evaluate=True) if self._solved else None
        if cached:
            again = fixed if self._nothing_left else None
            train = data.compute_features("train", embed, views) if again is None else again
            data.train_on_features(train, val)
        super().train()  # Lightning expects it so; `on_train_start` freezes
        if fixed is not None and not resumed:
            head = self.solve(fixed[0], val[0])
            rank_zero_only(print)(
                f"The head is solved on the frozen features: val top-1 {head.top1:.3f}, loss {head.loss:.3f} (C = "
                f"{head.strength:g}).",
                flush=True,
            )
            if self._nothing_left:
                rank_zero_only(print)(
                    "There is nothing left to train: one epoch, with a learning rate of 0, writes the files."
                )

    def embedder(self) -> Callable[[Tensor], Tensor]:
        """Return what maps images (B, 3, H, W) to the features (B, C) of the network as it is now, for inference."""
        fused = rexnet.fuse_batchnorm(self.network)
        dtype = next(fused.parameters()).dtype

        def embed(images: Tensor) -> Tensor:
            with torch.no_grad(), self.trainer.precision_plugin.forward_context():
                return rexnet.embed(fused, rexnet.match_memory_format(images.to(dtype), fused))

        return embed

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits (N, K), float32 on the CPU, that the head as it is gives features (N, C) in eval mode."""
        weights = next(self.network.get_submodule("head").parameters())
        with torch.no_grad():
            return rexnet.classify(self.network, features.to(weights)).float().cpu()

    def solve(self, features: Tensor, val_features: Tensor) -> logistic_head.LogisticHead:
        """Give the network the best linear head for its features of the training and validation images.

        Args:
            features: (N, C); on all processes the same.
            val_features: (M, C).
        """
        head, data = None, cast(ImageFolderDataModule, find_datamodule(self.trainer))
        targets, val_targets = data.splits()["train"].targets, data.splits()["val"].targets
        if self.trainer.is_global_zero:
            weights = self.class_weights()
            head = logistic_head.fit_logistic_head(
                features.numpy(), targets, val_features.numpy(), val_targets, weights
            )
        head = self.trainer.strategy.broadcast(head)
        assert head is not None  # noqa: S101 (for the type checker)
        fc = self.network.get_submodule("head.fc")
        with torch.no_grad():
            for name, values in (("weight", head.weight), ("bias", head.bias)):
                fc.get_parameter(name).copy_(torch.from_numpy(values))
        return head

    def class_weights(self) -> NDArray[np.float64]:
        """Return how much an image of each class counts, (K,): by the loss, and by how often it is drawn."""
        data = cast(ImageFolderDataModule, find_datamodule(self.trainer))
        counts = np.bincount(data.splits()["train"].targets, minlength=self.spec.num_classes)
        return cast(Tensor, self.loss.weights).double().cpu().numpy() * class_sampling_weights(counts, data.sampler)

    def train(self, mode: bool = True) -> RexNetModule:
        """Set the mode of what trains; frozen parts stay in eval mode."""
        super().train(mode)
        if mode:
            epoch = self.current_epoch if self._trainer is not None else 0
            freezing.freeze_batchnorm(self.network, self.strategy_settings, epoch)
        return self

    def on_train_start(self) -> None:
        """Freeze what the strategy freezes in this epoch, which on a resume is known only now."""
        self.started = True
        self._freeze()

    def on_train_epoch_start(self) -> None:
        """Freeze what the strategy freezes in this epoch, and begin its mean loss."""
        self._freeze()
        self.train_loss.reset()

    def _freeze(self) -> None:
        freezing.freeze(self.network, self.strategy_settings, self.current_epoch)
        self.train()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed dropout and drop path by (seed, epoch, batch, process): there is no random state to lose."""
        key = (run_seed(), self.current_epoch, batch_idx, self.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map images (B, 3, H, W), or their features (B, C), to logits (B, K)."""
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
        """Begin anew: outside a fit Lightning leaves inference tensors, which a fit cannot go on with."""
        self.val_metrics.reset()

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Count images (B, 3, H, W) and targets (B,) in the validation metrics."""
        images, targets = batch[0], batch[1]
        self.val_metrics.update(self(images), targets)

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics, which torchmetrics gathers over all processes."""
        self.log_dict(self.val_metrics, prog_bar=True)
        if self._plateau is not None and self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._plateau.update(float(self.val_metrics["loss"].compute()))
            self._plateau.apply(cast(LambdaLR, self.lr_schedulers()))

    def measure(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the validation metrics of logits (N, K) and targets (N,), on all processes the same."""
        self.val_metrics.reset()
        self.val_metrics.update(logits.to(self.device), targets.to(self.device))
        found: dict[str, Tensor] = self.val_metrics.compute()
        self.val_metrics.reset()
        return found

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the probabilities (B, K) of images (B, 3, H, W)."""
        images, targets = batch[0], batch[1]
        logits: Tensor = self(images)
        self.test_metrics.update(logits, targets)
        return logits.float().softmax(1)

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self.log_dict(self.test_metrics)

    def predict_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the probabilities (B, K) of images (B, 3, H, W)."""
        logits: Tensor = self(batch[0])
        return logits.float().softmax(1)

    def configure_optimizers(self) -> Any:
        """Return the optimiser and its schedule, stepped every optimiser step."""
        lr = self.optimizer_settings.full_lr(self.scratch, self.images_per_step)
        optimizer = optim.build_optimizer(self.network, self.optimizer_settings, lr)
        per_epoch, total = self._steps()
        settings = self.schedule_settings
        if self._nothing_left:
            scheduler = LambdaLR(optimizer, lambda step: 0.0)
        elif settings.name == "plateau":
            self._plateau = Plateau.of(settings, total, per_epoch)
            scheduler = LambdaLR(optimizer, self._plateau)
        else:
            scheduler = LambdaLR(optimizer, lambda step: lr_factor(settings, step, total, per_epoch))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def calibrates(self) -> bool:
        """Whether the logits that ship are divided by a temperature: a cosine head has one of its own."""
        return self.calibrate and self.spec.head.name != "cosine"

    @property
    def images_per_step(self) -> int | None:
        """Images of an optimiser step, over all processes; None with a data module that names no batch size."""
        data = any_datamodule(self.trainer)
        size: int | None = getattr(data, "batch_size", None)
        if size is None:
            return None
        images = size * self.trainer.accumulate_grad_batches * self.trainer.world_size
        return min(images, len(data.splits()["train"])) if isinstance(data, ImageFolderDataModule) else images

    def _steps(self) -> tuple[int, int]:
        """Return the optimiser steps of an epoch and of the run.

        Lightning's ``estimated_stepping_batches`` would start the loader's workers at once: on the batches of the
        first epoch, when a run is resumed in another.
        """
        trainer, data = self.trainer, any_datamodule(self.trainer)
        if data is None:  # someone's own loaders
            total, epochs = int(trainer.estimated_stepping_batches), trainer.max_epochs
            return (math.ceil(total / epochs) if epochs and epochs > 0 else total), total
        ours = isinstance(data, ImageFolderDataModule)
        limit, batches = (
            trainer.limit_train_batches,
            cast(ImageFolderDataModule, data).steps_per_epoch() if ours else len(data.train_dataloader()),
        )
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * (1.0 if limit is None else limit))
        per_epoch = max(1, math.ceil(batches / trainer.accumulate_grad_batches))
        ends = [] if trainer.max_epochs in (None, -1) else [per_epoch * int(trainer.max_epochs)]
        ends += [trainer.max_steps] if trainer.max_steps >= 0 else []
        if not ends and self.schedule_settings.name in ("cosine", "one_cycle"):
            name = self.schedule_settings.name
            raise UserError(f"model.schedule: {name} needs an end; set trainer.max_epochs or trainer.max_steps")
        return per_epoch, min(ends, default=2**62)

    def configure_callbacks(self) -> list[pl.Callback]:
        """Keep the moving average of the weights where ``ema`` asks for it."""
        return [WeightAveraging(avg_fn=_ema(self.ema))] if self.ema else []

    def on_save_checkpoint(self, content: dict[str, Any]) -> None:
        """Add the model's description, in plain strings, and the losses of an epoch that is not at its end."""
        record = getattr(any_datamodule(self.trainer), "record", DataRecord())
        content[checkpoint.KEY] = checkpoint.make_record(self.spec, record)
        losses = torch.stack([self.train_loss.mean_value, self.train_loss.weight])
        content[_LOSSES] = self.trainer.strategy.reduce(losses, reduce_op="sum").tolist()

    def on_load_checkpoint(self, content: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model; take over the losses of its last epoch's batches.

        Raises:
            UserError: The architecture, the classes or the tensors differ.
        """
        spec, _ = checkpoint.read_record(content, "ckpt_path")
        ours = self.spec
        for name, then, now in (
            ("backbone", spec.backbone, ours.backbone),
            *((f"head.{key}", then, getattr(ours.head, key)) for key, then in dataclasses.asdict(spec.head).items()),
        ):
            if then != now:
                raise UserError(
                    f"ckpt_path: the checkpoint's model.{name} is {then}, this run's is {now}; set it to the "
                    "checkpoint's, or start a new run with model.weights"
                )
        if spec.class_names != ours.class_names:
            raise UserError(
                f"ckpt_path: the checkpoint's classes ({_short(spec.class_names)}) differ from the folder's "
                f"({_short(ours.class_names)}); to start a new run from its weights, use model.weights instead"
            )
        theirs = content.get("state_dict")
        difference = describe_mismatch(self.state_dict(), theirs if isinstance(theirs, dict) else {})
        if difference:
            raise UserError(f"ckpt_path: the checkpoint's weights do not fit: {difference}")
        # They are the sums over all processes: one takes them.
        total, count = content.get(_LOSSES, (0.0, 0.0)) if self.global_rank == 0 else (0.0, 0.0)
        self.train_loss.mean_value, self.train_loss.weight = torch.tensor(total), torch.tensor(count)

    def settings(self) -> dict[str, Any]:
        """Return, by key, what decides the weights of a run beside its data."""
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


_LOSSES = "rexnet_lit_losses"


def _short(names: tuple[str, ...]) -> str:
    return f"{len(names)}: {', '.join(map(printable, names[:5]))}{', ...' if len(names) > 5 else ''}"


def _names(num_classes: int | None, class_names: Sequence[str] | None) -> tuple[str, ...]:
    if class_names is None:
        if num_classes is None:
            raise UserError("RexNetModule needs num_classes or class_names: pass the data module's")
        return tuple(str(i) for i in range(num_classes))
    if num_classes is not None and num_classes != len(class_names):
        raise UserError(f"num_classes is {num_classes}, but there are {len(class_names)} class_names")
    return tuple(class_names)


def _ema(decay: float) -> Any:
    """Return the averaging rule of `WeightAveraging`, whose decay rises to ``decay`` over the first steps."""

    def average(averaged: Tensor, current: Tensor, count: Tensor) -> Tensor:
        now = min(decay, (1 + int(count)) / (10 + int(count)))
        return averaged.lerp(current.to(averaged.dtype), 1 - now) if averaged.is_floating_point() else current

    return average

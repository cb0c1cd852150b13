"""Features of a module's current backbone, to train a head on, to solve the head with, and to compare weights by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray
from torch import Tensor, nn

from rexnet_lit.data.datamodule import ImageFolderDataModule, find_datamodule
from rexnet_lit.data.sampler import class_sampling_weights
from rexnet_lit.data.splits import Split
from rexnet_lit.models import rexnet
from rexnet_lit.training.logistic_head import STRENGTHS, LogisticHead, fit_logistic_head
from rexnet_lit.utils import process
from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.progress import progress
from rexnet_lit.utils.settings import overridden

if TYPE_CHECKING:
    from rexnet_lit.training.module import RexNetModule


def prepare(module: RexNetModule) -> None:
    """Compute the features that a fit needs; hand them to the data module, and solve the head with them.

    Raises:
        UserError: The data or its augmentation does not allow it.
    """
    settings, data = module.strategy_settings, find_datamodule(module.trainer)
    if settings.only_solves:
        module.trainer.fit_loop.max_epochs = 1
    if data is None:
        if settings.solves_head:
            raise UserError("model.strategy.solver: logistic needs an ImageFolderDataModule")
        return
    views = _views(module, data) if settings.name == "linear_probe" else 0
    train_on_features = views > 0 or settings.only_solves
    solves = settings.solves_head and module.trainer.ckpt_path is None  # a resumed run has its head
    if not train_on_features and not solves:
        return
    module.eval()
    embed = embedder(module)
    val = data.compute_features("val", embed) if "val" in data.splits() else None
    fixed = data.compute_features("train", embed, evaluate=True) if settings.solves_head else None
    if train_on_features:
        again = None if settings.only_solves else data.compute_features("train", embed, views)
        found: dict[Split, Tensor] = {"train": cast(Tensor, fixed if again is None else again)}
        data.train_on_features(found if val is None else {**found, "val": val})
    nn.Module.train(module)  # Lightning expects this mode; `on_train_start` freezes
    if fixed is None or not solves:
        return
    head = solve_head(module, fixed[0], None if val is None else val[0])
    measured = "val" if val is not None else "held-out"
    rank_zero_only(print)(
        f"Solved the head on the frozen features: {measured} top-1 {head.top1:.3f}, loss {head.loss:.3f} "
        f"(C = {head.strength:g}).",
        flush=True,
    )
    if settings.only_solves:
        rank_zero_only(print)("Nothing is left to train: one epoch, with a learning rate of 0, writes the files.")


def _views(module: RexNetModule, data: ImageFolderDataModule) -> int:
    """Return how many views of each training image to keep features of; 0 to compute them in each epoch."""
    views = module.strategy_settings.views
    if views and (data.augment.mixup or data.augment.cutmix):
        raise UserError("model.strategy.views keeps features of whole images; set data.augment.mixup and cutmix to 0")
    if views and data.size_schedule:
        raise UserError("model.strategy.views keeps features of one size; leave data.size_schedule out")
    views = views or int(data.augment.fixed and not data.size_schedule and not overridden(data, "train_transform"))
    width: int = cast(Any, module.network).head_hidden_size
    needed = 4 * width * max(views, 1) * len(data.splits()["train"])
    if views and needed > process.available_memory() / 2:
        rank_zero_only(print)(f"The features would take {needed / 1e9:.0f} GB: they are computed in each epoch.")
        return 0
    return views


def embedder(module: RexNetModule) -> Callable[[Tensor], Tensor]:
    """Return a function from images (B, 3, H, W) to features (B, C): the current backbone, for inference."""
    fused = rexnet.fuse_batchnorm(module.network)
    dtype = next(fused.parameters()).dtype

    def embed(images: Tensor) -> Tensor:
        with torch.no_grad(), module.trainer.precision_plugin.forward_context():
            return rexnet.embed(fused, rexnet.match_memory_format(images.to(dtype), fused))

    return embed


def head_logits(module: RexNetModule, features: Tensor) -> Tensor:
    """Return the current head's logits (N, K), float32 on the CPU, for features (N, C), in eval mode."""
    weights = next(module.network.get_submodule("head").parameters())
    with torch.no_grad():
        return rexnet.classify(module.network, features.to(weights)).float().cpu()


def solve_head(
    module: RexNetModule, features: Tensor, val_features: Tensor | None, strengths: Sequence[float] = STRENGTHS
) -> LogisticHead:
    """Set the head to the best linear one for the features of the training images.

    Args:
        module: The module.
        features: (N, C), the same on all processes.
        val_features: Features of the validation images, (M, C), used to choose the regularisation. If None, a fifth of
            the training images is held out to choose it, and the head is then fitted to all of them.
        strengths: What to choose from.
    """
    head, splits = None, cast(ImageFolderDataModule, find_datamodule(module.trainer)).splits()
    if module.trainer.is_global_zero:
        inputs, targets, weights = features.numpy(), splits["train"].targets, class_weights(module)
        with progress("Solving a head"):
            if val_features is not None:
                val = val_features.numpy(), splits["val"].targets
                head = fit_logistic_head(inputs, targets, *val, weights, strengths)
            else:
                place = np.empty(len(targets), np.int64)  # of each image in its class
                for target in np.unique(targets):
                    place[targets == target] = np.arange((targets == target).sum())
                held = place % 5 == 1  # a class with one image keeps it
                val = (inputs[held], targets[held]) if held.any() else (inputs, targets)
                if len(strengths) > 1 and held.any():
                    head = fit_logistic_head(inputs[~held], targets[~held], *val, weights, strengths)
                    strengths = (head.strength,)
                whole = fit_logistic_head(inputs, targets, *val, weights, strengths)
                head = whole if head is None else whole._replace(loss=head.loss, top1=head.top1)
    solved = cast(LogisticHead, module.trainer.strategy.broadcast(head))
    solved.copy_to(module.network.get_submodule("head.fc"))
    return solved


def class_weights(module: RexNetModule) -> NDArray[np.float64]:
    """Return the weight of an image of each class, (K,): that of the loss times how often it is drawn."""
    data = cast(ImageFolderDataModule, find_datamodule(module.trainer))
    counts = np.bincount(data.splits()["train"].targets, minlength=module.spec.num_classes)
    of_loss = getattr(module.loss, "weights", None)  # a user's own loss has none
    drawn = class_sampling_weights(counts, data.sampler)
    return drawn if of_loss is None else cast(Tensor, of_loss).double().cpu().numpy() * drawn

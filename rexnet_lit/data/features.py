"""Features computed once from images, for strategies that train on them instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor

from rexnet_lit.data.dataset import ImageDataset
from rexnet_lit.data.loader import build_loader
from rexnet_lit.data.sampler import BatchSampler
from rexnet_lit.utils.errors import UserError, plural
from rexnet_lit.utils.progress import progress


def embed_dataset(
    dataset: ImageDataset,
    embed: Callable[[Tensor], Tensor],
    trainer: Any,
    *,
    views: int,
    batch_size: int,
    num_workers: int,
    on_gpu: bool,
) -> Tensor:
    """Return the features (V, N, C), float32, of all images; each process computes its share.

    Args:
        dataset: The images.
        embed: Maps images (B, 3, S, S) to features (B, C).
        trainer: Knows the processes.
        views: V: epochs whose augmentation to use.
        batch_size: Images per batch, at most.
        num_workers: Loader processes.
        on_gpu: Whether the batches go to a GPU.

    Raises:
        UserError: There are fewer images than processes. All processes raise it, so that none waits for another.
    """
    if len(dataset) < trainer.world_size:
        raise UserError(
            f"{plural(len(dataset), 'image', 'images')} for {trainer.world_size} processes: each computes the features "
            "of at least one; set fewer trainer.devices, or add images"
        )
    found: Tensor | None = None
    with progress("Computing features", views * len(dataset)) as show:
        for view in range(views):
            sampler = BatchSampler(len(dataset), batch_size, rank=trainer.global_rank, world_size=trainer.world_size)
            sampler.set_epoch(view)
            loader = build_loader(dataset, sampler, num_workers, stays=False, on_gpu=on_gpu, seed=0)
            for images, _, indices in loader:
                features = embed(images.to(trainer.strategy.root_device)).float()
                if found is None:
                    found = features.new_zeros(views, len(dataset), features.shape[1])
                found[view, indices.to(features.device)] = features
                show(view * len(dataset) + int(indices.max()) + 1)  # in order, over all processes
    return cast(Tensor, trainer.strategy.reduce(found, reduce_op="sum")).cpu()

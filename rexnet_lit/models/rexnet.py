"""The network: timm's ReXNet with a replaceable head, in plain PyTorch.

With a linear head its state dict is timm's own, so weights can be exchanged both ways. Only ``head.fc``, the last
layer, is replaced (`models.heads`).

Source: Han et al., "Rethinking Channel Dimensions for Efficient Model Design" (arXiv:2007.00992), and timm's
``rexnet.py``.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import timm
import torch
from timm.layers import BatchNormAct2d, ConvNormAct, SEModule
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from rexnet_lit.models.blocks import save_memory_traffic
from rexnet_lit.models.heads import HEADS, HeadSpec
from rexnet_lit.models.variants import check_backbone
from rexnet_lit.utils.errors import UserError


def build_network(
    backbone: str, num_classes: int, head: HeadSpec | None = None, *, drop_path_rate: float = 0.0
) -> nn.Module:
    """Return an untrained network that maps images (B, 3, H, W) to logits (B, K).

    Args:
        backbone: timm's name, such as ``rexnet_100`` or ``rexnetr_200.sw_in12k``.
        num_classes: K.
        head: The head's settings; linear by default.
        drop_path_rate: Stochastic depth: the share of residual branches dropped in the last block while training.

    Raises:
        UserError: There is no such ReXNet.
    """
    check_backbone(backbone)
    head = head or HeadSpec()
    network: Any = timm.create_model(
        backbone,
        pretrained=False,
        num_classes=num_classes,
        drop_rate=head.dropout,
        drop_path_rate=drop_path_rate,
        global_pool=head.pool,
    )
    save_memory_traffic(network)
    for block in network.features:
        if getattr(block, "use_shortcut", False):
            # Start as the identity (Goyal et al., "Accurate, Large Minibatch SGD", 2017): the largest gain of trainings
            # from scratch in docs/experiments.md.
            nn.init.zeros_(block.conv_pwl.bn.weight)
    network.head.fc = HEADS[head.name](network.head_hidden_size, num_classes, head)
    last = next(m for m in reversed(list(network.head.fc.modules())) if isinstance(m, nn.Linear))
    # timm initialises this layer for 1,000 classes: for ten, the first loss would be three times that of chance.
    nn.init.trunc_normal_(last.weight, std=0.01)
    if last.bias is not None:
        nn.init.zeros_(last.bias)
    return network  # type: ignore[no-any-return]


def embed(network: nn.Module, images: Tensor) -> Tensor:
    """Return the pooled features (B, C) of images (B, 3, H, W): what the head sees."""
    model = cast(Any, network)
    return cast(Tensor, model.forward_head(model.forward_features(images), pre_logits=True))


def check_input(inputs: Tensor, network: nn.Module) -> None:
    """Check what a loader gives the network: images (B, 3, H, W), or their features (B, C).

    Raises:
        UserError: It is something else, or a single image, on which BatchNorm cannot train.
    """
    given = f"{inputs.dtype} {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
    images = isinstance(inputs, Tensor) and (inputs.ndim == 2 or (inputs.ndim == 4 and inputs.shape[1] == 3))
    double = isinstance(inputs, Tensor) and inputs.dtype == torch.float64 != next(network.parameters()).dtype
    if not images or not inputs.is_floating_point() or double:
        raise UserError(
            f"the loader's images are {given.removeprefix('torch.')}; expected a normalised float32 tensor (B, 3, H, W)"
        )
    if len(inputs) == 1 and inputs.ndim == 4 and any(map(_needs_a_batch, network.modules())):
        raise UserError(
            "a training batch has one image, and BatchNorm needs two: give the DataLoader drop_last=True if it is an "
            "epoch's last batch, or another batch_size"
        )


def _needs_a_batch(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d) and module.training


def compile_in_place(network: Any) -> Any:
    """Return the network in what ``torch.compile`` returned, compiled as by ``network.compile()``.

    ``torch.compile`` wraps a module in another one, which puts a prefix before the names of its weights. What is not
    compiled is returned as it is.
    """
    original = getattr(network, "_orig_mod", None)
    if original is None:
        return network
    original._compiled_call_impl = network.dynamo_ctx(original._call_impl)
    return original


def match_memory_format(images: Tensor, network: nn.Module) -> Tensor:
    """Return images (B, 3, H, W) in the memory format of the network's weights.

    If only one were in channels_last, a GPU would convert the weights in each step.
    """
    stem = next(network.parameters())  # (C, 3, 3, 3)
    last = stem.is_contiguous(memory_format=torch.channels_last)
    return images.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def fuse_batchnorm(network: nn.Module) -> nn.Module:
    """Return a copy for inference, with each BatchNorm folded into its convolution: a quarter less time on a CPU.

    Its outputs are those of ``network`` in eval mode, except for rounding.
    """
    copied = copy.deepcopy(network).eval().requires_grad_(False)
    for block in list(copied.modules()):
        if isinstance(block, ConvNormAct) and isinstance(block.bn, BatchNormAct2d):
            norm = block.bn
            block.conv = fuse_conv_bn_eval(block.conv, norm)
            block.bn = nn.Sequential(norm.drop, norm.act)
        elif isinstance(block, SEModule) and isinstance(block.bn, nn.BatchNorm2d):
            block.fc1, block.bn = fuse_conv_bn_eval(block.fc1, block.bn), nn.Identity()
    return copied


def classify(network: nn.Module, features: Tensor) -> Tensor:
    """Return the logits (B, K) of features (B, C), with the head's dropout in training mode."""
    head = cast(Any, network).head
    return cast(Tensor, head.fc(head.drop(features)))

"""The network: timm's ReXNet with a replaceable head, in plain PyTorch.

The network *is* timm's model: its state dict with a linear head is timm's own, so weights travel both ways. Only
``head.fc``, the last layer, is replaced. To add a head, write a function and name it in `HEADS`.

Source: Han et al., "Rethinking Channel Dimensions for Efficient Model Design" (arXiv:2007.00992), and timm's
``rexnet.py``.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import BatchNormAct2d, ConvNormAct, SEModule
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from rexnet_lit.blocks import save_memory_traffic
from rexnet_lit.errors import UserError, did_you_mean
from rexnet_lit.spec import EvalRecipe, HeadSpec

__all__ = [
    "HEADS",
    "Variant",
    "build_network",
    "check_backbone",
    "classify",
    "embed",
    "eval_recipe",
    "fuse",
    "laid_out",
    "load_pretrained",
    "load_weights",
    "matching_rows",
    "published_classes",
    "published_names",
    "train_size",
    "variants",
]

# Top-1 in percent at 224 and 288 px: timm's results/results-imagenet.csv.
_TOP1 = {
    "rexnet_100.nav_in1k": "77.862",
    "rexnet_130.nav_in1k": "79.492",
    "rexnet_150.nav_in1k": "80.322",
    "rexnet_200.nav_in1k": "81.636",
    "rexnet_300.nav_in1k": "82.780",
    "rexnetr_200.sw_in12k_ft_in1k": "82.602 / 83.160",
    "rexnetr_300.sw_in12k_ft_in1k": "84.036 / 84.582",
}


def _linear(in_features: int, num_classes: int, head: HeadSpec) -> nn.Module:
    return nn.Linear(in_features, num_classes)


def _mlp(in_features: int, num_classes: int, head: HeadSpec) -> nn.Module:
    widths = [in_features, *[head.hidden] * head.layers]
    hidden = [
        layer
        for narrow, wide in itertools.pairwise(widths)
        for layer in (nn.Linear(narrow, wide), nn.SiLU(), nn.Dropout(head.dropout))
    ]
    return nn.Sequential(*hidden, nn.Linear(head.hidden, num_classes))


class _Cosine(nn.Linear):
    """Maps features to the cosines of their angles with K vectors, over a temperature."""

    def __init__(self, in_features: int, num_classes: int, temperature: float) -> None:
        super().__init__(in_features, num_classes, bias=False)
        self.temperature = temperature

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C) to (B, K)."""
        return functional.linear(functional.normalize(features), functional.normalize(self.weight)) / self.temperature


def _cosine(in_features: int, num_classes: int, head: HeadSpec) -> nn.Module:
    return _Cosine(in_features, num_classes, head.temperature)


HEADS: dict[str, Callable[[int, int, HeadSpec], nn.Module]] = {"linear": _linear, "mlp": _mlp, "cosine": _cosine}
"""Each takes the pooled features' width, K and the head's settings; it maps features (B, C) to logits (B, K)."""


def check_backbone(backbone: str) -> None:
    """Raise `UserError` with the nearest names unless ``backbone`` is a ReXNet of timm, with or without a tag."""
    names = timm.list_models(["rexnet_*", "rexnetr_*"])
    tagged = timm.list_models(["rexnet_*", "rexnetr_*"], include_tags=True)
    if backbone not in names and backbone not in tagged:
        near = did_you_mean(backbone, [*names, *tagged]) or f"; known: {', '.join(names)}"
        raise UserError(f"model.backbone: no ReXNet is named {backbone!r}{near}")


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
    if head.name not in HEADS:
        raise UserError(f"model.head.name is {head.name!r}; expected one of {', '.join(HEADS)}")
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
            # At first it passes on what it is given (Goyal et al., "Accurate, Large Minibatch SGD", 2017). Measured in
            # tests/benchmarks/recipe.md: what scratch trainings gain most by.
            nn.init.zeros_(block.conv_pwl.bn.weight)
    network.head.fc = HEADS[head.name](network.head_hidden_size, num_classes, head)
    last = next(m for m in reversed(list(network.head.fc.modules())) if isinstance(m, nn.Linear))
    # timm draws this layer for 1,000 classes: for ten, the first loss is three times that of guessing.
    nn.init.trunc_normal_(last.weight, std=0.01)
    if last.bias is not None:
        nn.init.zeros_(last.bias)
    return network  # type: ignore[no-any-return]


def _published(backbone: str) -> Any:
    """Return timm's ``pretrained_cfg`` of a ReXNet."""
    check_backbone(backbone)
    return timm.get_pretrained_cfg(backbone)


def eval_recipe(backbone: str, image_size: int | None = None) -> EvalRecipe:
    """Return the preprocessing that ``backbone``'s weights were tested with.

    Args:
        backbone: timm's name; its ``pretrained_cfg`` decides.
        image_size: Height and width in pixels; None for the weights' own test size.
    """
    cfg = _published(backbone)
    test_size = (cfg.test_input_size or cfg.input_size)[-1]
    return EvalRecipe(
        image_size=test_size if image_size is None else image_size,
        crop_pct=cfg.test_crop_pct or cfg.crop_pct,
        interpolation=cfg.interpolation,
        mean=tuple(cfg.mean),
        std=tuple(cfg.std),
    )


def train_size(backbone: str) -> int:
    """Return the height and width in pixels that ``backbone``'s weights were trained at."""
    return int(_published(backbone).input_size[-1])


def embed(network: nn.Module, images: Tensor) -> Tensor:
    """Return the pooled features (B, C) of images (B, 3, H, W): what the head sees."""
    model = cast(Any, network)
    return cast(Tensor, model.forward_head(model.forward_features(images), pre_logits=True))


def laid_out(images: Tensor, network: nn.Module) -> Tensor:
    """Return images (B, 3, H, W) in the memory format of the network's weights.

    torch would compute in channels_last if either were, and a GPU would turn the weights round in each step.
    """
    stem = next(network.parameters())  # (C, 3, 3, 3)
    last = stem.is_contiguous(memory_format=torch.channels_last)
    return images.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def fuse(network: nn.Module) -> nn.Module:
    """Return a copy for inference, each BatchNorm folded into the convolution before it: a quarter less time on a CPU.

    Its outputs are ``network``'s in eval mode but for rounding.
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
    """Return the logits (B, K) of what `embed` returned, with the head's dropout while training."""
    head = cast(Any, network).head
    return cast(Tensor, head.fc(head.drop(features)))


def published_classes(backbone: str) -> int:
    """Return the number of classes of ``backbone``'s published weights."""
    return int(_published(backbone).num_classes)


def published_names(backbone: str) -> tuple[str, ...]:
    """Return the class names of ``backbone``'s published weights, synonyms after commas."""
    from timm.data import imagenet_info

    subset = imagenet_info.infer_imagenet_subset(_published(backbone).to_dict())
    return tuple(imagenet_info.ImageNetInfo(subset or "imagenet-1k").label_descriptions())


def matching_rows(theirs: Sequence[str], ours: Sequence[str]) -> dict[int, int]:
    """Return which of our classes is which of theirs, by name: ``golden_retriever`` is "Golden Retriever, ..."."""

    def plain(name: str) -> str:
        return re.sub(r"[\W_]+", " ", name.casefold()).strip()

    rows = {plain(synonym): row for row, name in reversed([*enumerate(theirs)]) for synonym in name.split(",")}
    rows |= {plain(name): row for row, name in enumerate(theirs)}
    return {row: rows[plain(name)] for row, name in enumerate(ours) if plain(name) in rows}


def misfit(own: Mapping[str, Tensor], state: Mapping[str, Any]) -> str:
    """Count what keeps ``state`` from being loaded as ``own``; an empty string where nothing does."""
    missing, unknown = sorted(own.keys() - state.keys()), sorted(map(str, state.keys() - own.keys()))
    other = sorted(k for k in own.keys() & state.keys() if getattr(state[k], "shape", None) != own[k].shape)
    if not (missing or unknown or other):
        return ""
    return (
        f"{len(missing)} tensors missing, {len(unknown)} unknown, {len(other)} of another shape "
        f"(such as {', '.join([*missing, *unknown, *other][:3])})"
    )


def load_weights(
    network: nn.Module,
    state: Mapping[str, Tensor],
    where: str,
    *,
    keep_head: bool = True,
    rows: Mapping[int, int] | None = None,
) -> bool:
    """Copy ``state`` into ``network``; a head of another shape is left as it was built.

    Args:
        network: What `build_network` returned.
        state: A timm or rexnet_lit state dict.
        where: The file it came from, for the errors.
        keep_head: Whether the head is wanted too where it fits.
        rows: Where it is not taken over: which of its rows to take for our classes, ours to theirs (`matching_rows`).

    Returns:
        Whether the head was loaded.

    Raises:
        UserError: The backbone's tensors are missing, unknown or of another shape.
    """
    own = network.state_dict()
    body, given = ({k: v for k, v in s.items() if not k.startswith("head.fc.")} for s in (own, state))
    difference = misfit(body, given)
    if difference:
        raise UserError(
            f"{where} does not fit this backbone: {difference}; set model.backbone to the file's architecture"
        )
    head = {k: v for k, v in state.items() if k.startswith("head.fc.")}
    own_head = {k: v.shape for k, v in own.items() if k.startswith("head.fc.")}
    fits = keep_head and {k: v.shape for k, v in head.items()} == own_head
    network.load_state_dict({**given, **head} if fits else given, strict=fits)
    if not fits and rows and head.keys() == own_head.keys():  # of another kind of head no row is of use
        with torch.no_grad():
            last = list(own_head)[-1].rpartition(".")[0]  # of an mlp, the layers before it are kept whole
            for name in own_head:  # these share the network's memory
                if name.rpartition(".")[0] == last:
                    own[name][list(rows)] = head[name][list(rows.values())].to(own[name].dtype)
                else:
                    own[name].copy_(head[name])
    return fits


def load_pretrained(
    network: nn.Module, backbone: str, *, keep_head: bool = False, rows: Mapping[int, int] | None = None
) -> None:
    """Load timm's published weights from the local hub cache, or else from the hub; the head as in `load_weights`.

    Only ``model.safetensors`` is ever read, so nothing is unpickled.

    Raises:
        UserError: The variant has no published weights, or they can be had neither here nor there.
    """
    cfg = _published(backbone)
    if not cfg.hf_hub_id:
        raise UserError(
            f"model.pretrained: {backbone} has no published weights; "
            "set model.pretrained to false, or choose a variant that `python -m rexnet_lit models` lists with weights"
        )
    file = _hub_file(cfg, backbone)
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"model.pretrained: the weights of {backbone} in the local cache are damaged ({error}); "
            f"delete {Path(file).parents[2]} and run again"
        ) from None
    load_weights(network, state, f"the weights of {backbone}", keep_head=keep_head, rows=rows)


def _hub_file(cfg: Any, backbone: str) -> str:
    """Return the local path of a variant's weights, downloading them when they are not in the cache."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    repository, _, revision = cfg.hf_hub_id.partition("@")
    if repository.endswith("/"):
        repository += f"{cfg.architecture}.{cfg.tag}"
    wanted = {"repo_id": repository, "filename": "model.safetensors", "revision": revision or None}
    # Not hf_hub_download(local_files_only=True): it asks the hub who we are, and waits 3 s where there is no network.
    cached = try_to_load_from_cache(**wanted)
    if isinstance(cached, str):
        return cached
    try:
        if not urllib.request.getproxies():  # fail at once, not after half a minute of retries
            socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, 443)
        return str(hf_hub_download(**wanted))
    except Exception as error:  # the hub's client raises dozens of kinds; all mean the same to the user
        raise UserError(
            f"model.pretrained: the weights of {backbone} are neither in the local cache nor to be had from the "
            f"hub ({type(error).__name__}); either run once with a network (or copy the cache folder here), or set "
            "model.weights to a local .safetensors file, or model.pretrained to false to train from scratch"
        ) from None


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of ``rexnet_lit models``.

    Args:
        name: timm's name.
        parameters: Count, with 1000 classes.
        multiply_adds: Count for one image at 224 px.
        features: Width of the pooled features.
        weights: Tags with published weights.
        top1: Published ImageNet top-1 in percent by tag, at 224 px (``/`` at 288 px).
    """

    name: str
    parameters: int
    multiply_adds: int
    features: int
    weights: tuple[str, ...]
    top1: dict[str, str]


def variants() -> list[Variant]:
    """Return all ReXNets of the installed timm, smallest first within each family."""
    from torch.utils.flop_counter import FlopCounterMode

    rows = []
    tagged = timm.list_pretrained(["rexnet_*", "rexnetr_*"])
    for name in sorted(timm.list_models(["rexnet_*", "rexnetr_*"]), key=lambda n: re.split(r"_", n)):
        with torch.device("meta"):  # shapes only: no memory, no arithmetic
            network: Any = timm.create_model(name).eval()
            image = torch.empty(1, 3, 224, 224)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(image)
        weights = tuple(t.partition(".")[2] for t in tagged if t.partition(".")[0] == name)
        rows.append(
            Variant(
                name=name,
                parameters=sum(p.numel() for p in network.parameters()),
                multiply_adds=counter.get_total_flops() // 2,  # it counts a multiply-add as two
                features=network.num_features,
                weights=weights,
                top1={tag: _TOP1[f"{name}.{tag}"] for tag in weights if f"{name}.{tag}" in _TOP1},
            )
        )
    return rows

"""A trained classifier in Python: load, predict, embed, explain. No Lightning.

import rexnet_lit

classifier = rexnet_lit.load("model.safetensors")
classifier.predict(["cat.jpg", "dog.jpg"], top_k=3)
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from rexnet_lit.data import decode, image_header
from rexnet_lit.data.transforms import EvalTransform
from rexnet_lit.models import checkpoint, rexnet, variants, weights
from rexnet_lit.models.spec import ModelSpec
from rexnet_lit.utils.errors import UserError, did_you_mean, plural

ImageLike: TypeAlias = "str | os.PathLike[str] | Image.Image | NDArray[Any]"
"""A path, a PIL image, or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8, uint16, bool or floats to 1."""

Images: TypeAlias = "ImageLike | Iterable[ImageLike]"
"""One image, or several: a list, a generator such as ``Path.glob``, or an array (N, H, W, 3)."""

_BATCH = 32
_MAP_CELLS = 4
"""Cells a side of the coarsest feature map that can still say where something is."""


class Prediction(NamedTuple):
    """A class name and its probability."""

    label: str
    prob: float


class Classifier:
    """A network and its description, ready for use.

    Args:
        spec: The description.
        network: Maps images (B, 3, S, S) to logits (B, K).
        device: Where to compute; a GPU where there is one, by default.
    """

    def __init__(self, spec: ModelSpec, rexnet: nn.Module, device: str | torch.device | None = None) -> None:
        self.spec = spec
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.network = rexnet.eval().requires_grad_(False).to(self.device)
        if self.device.type == "cpu":
            self.network.to(memory_format=torch.channels_last)  # about 1.5 times as fast there
        self._transform = EvalTransform(spec.eval_recipe)

    def __repr__(self) -> str:
        """Say what it is, for notebooks."""
        classes, size = plural(self.spec.num_classes, "class", "classes"), self.spec.eval_recipe.image_size
        return f"Classifier({self.spec.backbone}, {classes}, {size} x {size} pixels, {self.device})"

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per logit."""
        return self.spec.class_names

    def logits(self, images: Images) -> Tensor:
        """Return the logits (N, K) on the CPU."""
        with torch.inference_mode():
            return torch.cat([self.network(batch).float().cpu() for batch in self._batches(images)])

    def probabilities(self, images: Images) -> NDArray[np.float32]:
        """Return the probabilities (N, K) of all classes."""
        return self.logits(images).softmax(1).numpy()

    def predict(self, images: Images, top_k: int = 5) -> list[list[Prediction]]:
        """Name what is in each image.

        Args:
            images: One image or several.
            top_k: Names per image, at most the number of classes.

        Returns:
            For each image its most probable classes, best first.

        Raises:
            UserError: A file cannot be read as an image, or an array is none.
        """
        if top_k < 1:
            raise UserError(f"top_k is {top_k}; expected at least 1")
        probs, classes = self.logits(images).softmax(1).topk(min(top_k, self.spec.num_classes))
        return [
            [Prediction(self.class_names[c], p) for c, p in zip(row_c, row_p, strict=True)]
            for row_c, row_p in zip(classes.tolist(), probs.tolist(), strict=True)
        ]

    def embed(self, images: Images) -> NDArray[np.float32]:
        """Return the pooled features (N, C): what the head sees, for search and clustering."""
        with torch.inference_mode():
            parts = [rexnet.embed(self.network, batch).float().cpu() for batch in self._batches(images)]
        return torch.cat(parts).numpy()

    def explain(self, image: ImageLike, target: str | None = None) -> NDArray[np.float32]:
        """Show where the evidence for a class lies (Grad-CAM; Selvaraju et al. 2017).

        Args:
            image: One image.
            target: The class; the most probable one by default.

        Returns:
            A map (S, S) from 0 to 1 over the network's view of the image, which `view` returns.

        Raises:
            UserError: There is no such class.
        """
        if target is not None and target not in self.class_names:
            near = did_you_mean(str(target), self.class_names) or f"; it knows {', '.join(self.class_names[:20])}"
            raise UserError(f"explain: the model has no class {target!r}{near}")
        model = cast(Any, self.network)
        batch = self._batch([image])
        blocks, maps = [model.stem, *model.features], [batch]
        with torch.no_grad():
            for block in blocks:
                maps.append(block(maps[-1]))
        # The last features are 1/32 of the view: of small views earlier ones must do, or there is nothing to map.
        chosen = max(i for i, m in enumerate(maps) if i == 1 or min(m.shape[2:]) >= _MAP_CELLS)
        with torch.enable_grad():
            features = maps[chosen].clone().requires_grad_()
            last = features
            for block in blocks[chosen:]:
                last = block(last)
            logits = model.forward_head(last)
            index = int(logits.argmax()) if target is None else self.class_names.index(target)
            (gradient,) = torch.autograd.grad(logits[0, index], features)
        weights = gradient.mean((2, 3), keepdim=True)
        cam = (weights * features.detach()).sum(1, keepdim=True).relu()
        cam = nn.functional.interpolate(cam, size=batch.shape[2:], mode="bilinear", align_corners=False)[0, 0]
        return (cam / cam.max().clamp_min(1e-12)).float().cpu().numpy()

    def view(self, image: ImageLike) -> NDArray[np.uint8]:
        """Return what the network sees of an image: uint8 (S, S, 3)."""
        return self._transform.crop(_pixels(image, self._transform.min_size))

    def _batch(self, images: list[ImageLike]) -> Tensor:
        """Return the network's input (N, 3, S, S)."""
        views = [self._transform(_pixels(image, self._transform.min_size)) for image in images]
        stacked = torch.stack([view.permute(1, 2, 0) for view in views]).permute(0, 3, 1, 2)
        return rexnet.match_memory_format(stacked.to(self.device), self.network)

    def _batches(self, images: Images) -> Iterator[Tensor]:
        rest = _each(images)
        empty = True
        while chunk := list(itertools.islice(rest, _BATCH)):
            empty = False
            yield self._batch(chunk)
        if empty:
            raise UserError("there are no images to predict: the list is empty")


def _each(images: Images) -> Iterator[ImageLike]:
    """Return the images one by one."""
    several = isinstance(images, Iterable) and not isinstance(images, str | bytes | os.PathLike | Image.Image)
    if isinstance(images, np.ndarray):
        several = images.ndim == 4
    return iter(cast("Iterable[ImageLike]", images)) if several else iter([cast("ImageLike", images)])


def _pixels(image: ImageLike, min_size: int) -> NDArray[np.uint8]:
    """Return an image of any kind as uint8 (H, W, 3), by the project's one set of rules."""
    if isinstance(image, str | os.PathLike):
        try:
            return decode.decode(decode.read_bytes(image), min_size, thorough=True)
        except image_header.DecodeError as error:
            raise UserError(f"{os.fspath(image)}: cannot be read as an image ({error})") from None
    if isinstance(image, np.ndarray):
        try:
            return decode.from_array(image)
        except image_header.DecodeError as error:
            raise UserError(f"this array is no image ({error})") from None
    if not isinstance(image, Image.Image):
        raise UserError(f"a {type(image).__name__} is no image; expected a path, a PIL image or an array")
    try:
        return decode.from_pil(image)
    except image_header.DecodeError as error:
        raise UserError(f"this PIL image cannot be used ({error})") from None


def load(model: str | os.PathLike[str], device: str | torch.device | None = None) -> Classifier:
    """Return a classifier.

    Args:
        model: A ``.ckpt`` or ``.safetensors`` file of ours; or timm's name of a ReXNet (``rexnet_100``), for its
            published ImageNet weights with ImageNet's class names.
        device: Where to compute; a GPU where there is one, by default.

    Raises:
        UserError: The file is missing, damaged, unsafe or not ours; or the published weights cannot be had.
    """
    name = os.fspath(model)
    if re.fullmatch(r"rexnetr?_\w+(\.\w+)?", name) and not name.endswith((".ckpt", ".safetensors")):
        return Classifier(*_published(name), device)
    file = checkpoint.load_model(model, "model")
    spec = file.spec
    net = rexnet.build_network(spec.backbone, spec.num_classes, spec.head)
    if not weights.load_weights(net, file.state, name):
        raise UserError(f"{name}: its head does not fit its description; re-create the file")
    return Classifier(spec, net, device)


def _published(backbone: str) -> tuple[ModelSpec, nn.Module]:
    recipe = variants.eval_recipe(backbone)
    net = rexnet.build_network(backbone, variants.published_classes(backbone))
    weights.load_pretrained(net, backbone, keep_head=True)
    return ModelSpec(backbone, variants.published_names(backbone), eval_recipe=recipe), net

"""A trained classifier in Python: load, predict, embed, explain. No Lightning.

import rexnet_lit

classifier = rexnet_lit.load("model.safetensors")
classifier.predict(["cat.jpg", "dog.jpg"], top_k=3)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from rexnet_lit import checkpoint, decode, network
from rexnet_lit.errors import UserError
from rexnet_lit.spec import ModelSpec
from rexnet_lit.transforms import EvalTransform

__all__ = ["Classifier", "ImageLike", "Prediction", "load"]

ImageLike: TypeAlias = "str | os.PathLike[str] | Image.Image | NDArray[Any]"
"""A path, a PIL image, or an array (H, W), (H, W, 3) or (H, W, 4) of uint8."""

_BATCH = 32


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

    def __init__(self, spec: ModelSpec, network: nn.Module, device: str | torch.device | None = None) -> None:
        self.spec = spec
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.network = network.eval().requires_grad_(False).to(self.device)
        if self.device.type == "cpu":
            self.network.to(memory_format=torch.channels_last)  # about 1.5 times as fast there
        self._transform = EvalTransform(spec.eval_recipe)

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per logit."""
        return self.spec.class_names

    def logits(self, images: ImageLike | Sequence[ImageLike]) -> Tensor:
        """Return the logits (N, K) on the CPU."""
        with torch.inference_mode():
            return torch.cat([self.network(batch).float().cpu() for batch in self._batches(images)])

    def probabilities(self, images: ImageLike | Sequence[ImageLike]) -> NDArray[np.float32]:
        """Return the probabilities (N, K) of all classes."""
        return self.logits(images).softmax(1).numpy()

    def predict(self, images: ImageLike | Sequence[ImageLike], top_k: int = 5) -> list[list[Prediction]]:
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

    def embed(self, images: ImageLike | Sequence[ImageLike]) -> NDArray[np.float32]:
        """Return the pooled features (N, C): what the head sees, for search and clustering."""
        with torch.inference_mode():
            parts = [network.embed(self.network, batch).float().cpu() for batch in self._batches(images)]
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
            raise UserError(
                f"explain: there is no class {target!r}; the model knows {', '.join(self.class_names[:20])}"
            )
        model = cast(Any, self.network)
        batch = next(self._batches(image))
        with torch.no_grad():
            features = model.forward_features(batch)
        with torch.enable_grad():
            features = features.clone().requires_grad_()
            logits = model.forward_head(features)
            index = int(logits.argmax()) if target is None else self.class_names.index(target)
            (gradient,) = torch.autograd.grad(logits[0, index], features)
        weights = gradient.mean((2, 3), keepdim=True)
        cam = (weights * features.detach()).sum(1, keepdim=True).relu()
        cam = nn.functional.interpolate(cam, size=batch.shape[2:], mode="bilinear", align_corners=False)[0, 0]
        return (cam / cam.max().clamp_min(1e-12)).float().cpu().numpy()

    def view(self, image: ImageLike) -> NDArray[np.uint8]:
        """Return what the network sees of an image: uint8 (S, S, 3)."""
        return self._transform.crop(_pixels(image, self._transform.min_size))

    def _batches(self, images: ImageLike | Sequence[ImageLike]) -> Iterator[Tensor]:
        several = isinstance(images, Sequence) and not isinstance(images, str | bytes)
        items: Sequence[ImageLike] = images if several else [cast(ImageLike, images)]  # type: ignore[assignment]
        if not items:
            raise UserError("there are no images to predict: the list is empty")
        for start in range(0, len(items), _BATCH):
            views = [self._transform(_pixels(i, self._transform.min_size)) for i in items[start : start + _BATCH]]
            stacked = torch.stack([view.permute(1, 2, 0) for view in views]).permute(0, 3, 1, 2)
            yield stacked.to(self.device)


def _pixels(image: ImageLike, min_size: int) -> NDArray[np.uint8]:
    """Return an image of any kind as uint8 (H, W, 3), by the project's one set of rules."""
    if isinstance(image, str | os.PathLike):
        try:
            return decode.read(image, min_size)
        except decode.DecodeError as error:
            raise UserError(f"{os.fspath(image)}: cannot be read as an image ({error})") from None
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
            raise UserError(
                f"an array of {image.dtype} {image.shape} is no image; expected uint8 (H, W), (H, W, 3) or (H, W, 4)"
            )
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise UserError(f"a {type(image).__name__} is no image; expected a path, a PIL image or an array")
    return decode.from_pil(image)


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
    if name.startswith("rexnet") and "://" not in name and Path(name).suffix not in (".ckpt", ".safetensors"):
        return Classifier(*_published(name), device)
    file = checkpoint.load_model(model, "model")
    spec = file.spec
    net = network.build_network(spec.backbone, spec.num_classes, spec.head)
    if not network.load_weights(net, file.state, name):
        raise UserError(f"{name}: its head does not fit its description; re-create the file")
    return Classifier(spec, net, device)


def _published(backbone: str) -> tuple[ModelSpec, nn.Module]:
    from timm.data import imagenet_info

    recipe = network.eval_recipe(backbone)
    net = network.build_network(backbone, network.published_classes(backbone))
    network.load_pretrained(net, backbone, keep_head=True)
    info = imagenet_info.ImageNetInfo(imagenet_info.infer_imagenet_subset(net) or "imagenet-1k")
    return ModelSpec(backbone, tuple(info.label_descriptions()), eval_recipe=recipe), net

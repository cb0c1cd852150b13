"""A trained classifier in Python: load, predict, embed, explain. No Lightning.

import rexnet_lit

classifier = rexnet_lit.load("model.safetensors")
classifier.predict(["cat.jpg", "dog.jpg"], top_k=3)
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from rexnet_lit.data import decode, image_header
from rexnet_lit.data.transforms import EvalTransform
from rexnet_lit.models import checkpoint, rexnet, variants, weights
from rexnet_lit.models.limits import COVERAGE, Limits
from rexnet_lit.models.spec import ModelSpec
from rexnet_lit.utils.errors import UserError, did_you_mean, plural
from rexnet_lit.utils.files import expand_home
from rexnet_lit.utils.settings import check_range

ImageLike: TypeAlias = "str | os.PathLike[str] | Image.Image | NDArray[Any]"
"""A path, a PIL image, or an array (H, W) or (H, W, C), C in 1, 3, 4, of uint8, uint16, bool or floats from 0 to 1."""

Images: TypeAlias = "ImageLike | Iterable[ImageLike]"
"""One image, or several: a list, a generator such as ``Path.glob``, or an array (N, H, W, 3)."""

_BATCH = 32
_MIN_MAP_CELLS = 4
"""Cells per side of the coarsest feature map that `Classifier.explain` uses."""


class Prediction(NamedTuple):
    """A class name and its probability."""

    label: str
    prob: float


class Classifier:
    """A network and its description, ready to predict.

    Args:
        spec: The description.
        network: Maps images (B, 3, S, S) to logits (B, K).
        device: Where to compute; by default a GPU if there is one.
    """

    def __init__(self, spec: ModelSpec, network: nn.Module, device: str | torch.device | None = None) -> None:
        self.spec = spec
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.network = network.eval().requires_grad_(False).to(self.device)
        if self.device.type == "cpu":
            self.network.to(memory_format=torch.channels_last)  # about 1.5 times as fast on CPUs
        self._transform = EvalTransform(spec.eval_recipe)

    def __repr__(self) -> str:
        """Return the backbone, number of classes, image size and device."""
        classes, size = plural(self.spec.num_classes, "class", "classes"), self.spec.eval_recipe.image_size
        return f"Classifier({self.spec.backbone}, {classes}, {size} x {size} pixels, {self.device})"

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per logit."""
        return self.spec.class_names

    def logits(self, images: Images) -> Tensor:
        """Return the logits (N, K) on the CPU."""
        return self._apply(self.network, images)

    def probabilities(self, images: Images) -> NDArray[np.float32]:
        """Return the probabilities (N, K) of all classes."""
        return self.logits(images).softmax(1).numpy()

    def predict(self, images: Images, top_k: int = 5) -> list[list[Prediction]]:
        """Return the most probable classes of each image, best first.

        Args:
            images: One image or several.
            top_k: Classes per image, at most as many as the model has.

        Raises:
            UserError: A file or an array cannot be read as an image, or there are no images.
        """
        check_range("top_k", top_k, "[1, inf)")
        probs, classes = self.logits(images).softmax(1).topk(min(top_k, self.spec.num_classes))
        rows = zip(classes.tolist(), probs.tolist(), strict=True)
        return [[Prediction(self.class_names[c], p) for c, p in zip(*row, strict=True)] for row in rows]

    @property
    def limits(self) -> Limits:
        """How far the answers can be relied on, as found when the model was trained.

        Raises:
            UserError: The model file has no limits.
        """
        if self.spec.limits is None:
            raise UserError(
                "this model has no limits (prediction sets, unsure, stranger): it is of an older version, or had fewer "
                "than 20 validation images; fit it again"
            )
        return self.spec.limits

    def predict_set(self, images: Images, coverage: float = COVERAGE) -> list[list[Prediction]]:
        """Return the classes that each image may be of, most probable first: its prediction set.

        For images like those the model was validated on, this share of the sets has the true class. Easy images have
        sets of one class. An image may have none: then no class is as probable as true classes usually are.

        Args:
            images: One image or several.
            coverage: The share of images whose set has the true class, between 0 and 1.

        Raises:
            UserError: As `predict`; or the model has no limits.
        """
        limits = self.limits
        limits.least_probability(coverage)  # refuses a wrong coverage before the images are read
        probs = self.probabilities(images)
        order = np.argsort(-probs, axis=1, kind="stable")
        found = zip(order.tolist(), probs, limits.sets(probs, coverage), strict=True)
        return [[Prediction(self.class_names[c], float(p[c])) for c in row if among[c]] for row, p, among in found]

    def strangeness(self, images: Images) -> NDArray[np.float64]:
        """Return how unlike the images that the model knows each image is, (N,): higher is stranger.

        Of images like those the model was validated on, 95 % have 1 or less.

        Raises:
            UserError: As `predict`; or the model has no limits.
        """
        limits = self.limits
        return limits.strangeness(self.embed(images))

    def embed(self, images: Images) -> NDArray[np.float32]:
        """Return the pooled features (N, C): the head's input, for search and clustering."""
        return self._apply(functools.partial(rexnet.embed, self.network), images).numpy()

    def explain(self, image: ImageLike, target: str | None = None) -> NDArray[np.float32]:
        """Return where in an image's `view` the evidence for a class is: a heat map (S, S) from 0 to 1.

        This is HiResCAM (Draelos and Carin, 2020, https://arxiv.org/abs/2011.08891). Grad-CAM (Selvaraju et al., 2017)
        averages the gradient over the map first: for small images its maps are sometimes all zero.

        Args:
            image: One image.
            target: The class; the most probable one by default.

        Raises:
            UserError: The model has no such class.
        """
        if target is not None and target not in self.class_names:
            near = did_you_mean(str(target), self.class_names) or f"; it knows {', '.join(self.class_names[:20])}"
            raise UserError(f"explain: the model has no class {target!r}{near}")
        model, batch = cast(Any, self.network), self._batch([image])
        with torch.enable_grad():
            features = last = model.stem(batch).requires_grad_()
            for block in model.features:
                last = block(last)
                # The last features are 1/32 of the view: for a small view, earlier ones show more.
                if min(last.shape[2:]) >= _MIN_MAP_CELLS:
                    features = last = last.detach().requires_grad_()
            logits = model.forward_head(last)
            index = int(logits.argmax()) if target is None else self.class_names.index(target)
            (gradient,) = torch.autograd.grad(logits[0, index], features)
        cam = (gradient * features.detach()).sum(1, keepdim=True).relu()
        cam = nn.functional.interpolate(cam, size=batch.shape[2:], mode="bilinear", align_corners=False)[0, 0]
        return (cam / cam.max().clamp_min(1e-12)).float().cpu().numpy()

    def view(self, image: ImageLike) -> NDArray[np.uint8]:
        """Return the part of an image that the network is given: uint8 (S, S, 3)."""
        return self._transform.crop(_pixels(image, self._transform.min_size))

    def _batch(self, images: list[ImageLike]) -> Tensor:
        """Return the network's input (N, 3, S, S)."""
        batch = torch.stack([self._transform(_pixels(image, self._transform.min_size)) for image in images])
        return rexnet.match_memory_format(batch.to(self.device), self.network)

    def _apply(self, function: Callable[[Tensor], Tensor], images: Images) -> Tensor:
        """Apply a function to batches (B, 3, S, S) of the images; return its results on the CPU."""
        rest, results = _each(images), []
        with torch.inference_mode():
            while chunk := list(itertools.islice(rest, _BATCH)):
                results.append(function(self._batch(chunk)).float().cpu())
        if not results:
            raise UserError("there are no images to predict: the list is empty")
        return torch.cat(results)


def _each(images: Images) -> Iterator[ImageLike]:
    """Yield the images one by one."""
    one = isinstance(images, str | bytes | os.PathLike | Image.Image) or not isinstance(images, Iterable)
    one = images.ndim != 4 if isinstance(images, np.ndarray) else one
    return iter(cast("Iterable[ImageLike]", [images] if one else images))


def _pixels(image: ImageLike, min_size: int) -> NDArray[np.uint8]:
    """Return an image of any kind as uint8 (H, W, 3), by the same rules as training."""
    try:
        if isinstance(image, str | os.PathLike):
            return decode.decode(decode.read_bytes(expand_home(image)), min_size, thorough=True)
        if isinstance(image, np.ndarray):
            return decode.from_array(image)
        if isinstance(image, Image.Image):
            return decode.from_pil(image)
    except image_header.DecodeError as error:
        name = os.fspath(image) if isinstance(image, str | os.PathLike) else f"this {type(image).__name__}"
        raise UserError(f"{name}: cannot be read as an image ({error})") from None
    raise UserError(f"a {type(image).__name__} is not an image; expected a path, a PIL image or an array")


def load(
    model: str | os.PathLike[str], device: str | torch.device | None = None, network: nn.Module | None = None
) -> Classifier:
    """Load a classifier.

    Args:
        model: A ``.ckpt`` or ``.safetensors`` file of a run; or timm's name of a ReXNet (``rexnet_100``), for its
            published ImageNet weights and class names.
        device: Where to compute; by default a GPU if there is one.
        network: A network of your own, if the model was trained with one; its weights are replaced.

    Raises:
        UserError: The file is missing, damaged or unsafe, or the published weights are not available.
    """
    name = os.fspath(model)
    if re.fullmatch(r"rexnetr?_\w+(\.\w+)?", name) and not name.endswith((".ckpt", ".safetensors")):
        spec = ModelSpec(name, variants.published_names(name), eval_recipe=variants.eval_recipe(name))
        net = rexnet.build_network(name, spec.num_classes)
        weights.load_pretrained(net, name, keep_head=True)
        return Classifier(spec, net, device)
    file = checkpoint.load_model(model, "model")
    own = weights.check_own_network(file.spec, network, name)
    net = rexnet.build_network(file.spec.backbone, file.spec.num_classes, file.spec.head) if own is None else own
    weights.load_trained(net, file.state, name)
    if file.spec.assumed_preprocessing:
        warnings.warn(
            f"{name} was trained with loaders of your own: it is assumed that they prepared the images as "
            f"{file.spec.eval_recipe} does",
            stacklevel=2,
        )
    return Classifier(file.spec, net, device)

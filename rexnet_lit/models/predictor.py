"""A trained classifier in Python: load, predict, embed, explain. No Lightning.

import rexnet_lit

classifier = rexnet_lit.load("model.safetensors")
classifier.predict(["cat.jpg", "dog.jpg"], top_k=3)

`inputs` lists what is taken for an image. Images are decoded and computed batch by batch, so a generator may yield
any number of them. A classifier has no state: threads may share one, and it can be pickled.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rexnet_lit.data.transforms import EvalTransform
from rexnet_lit.models import checkpoint, inputs, rexnet, variants, weights
from rexnet_lit.models.inputs import ImageLike, Images
from rexnet_lit.models.limits import COVERAGE, Limits
from rexnet_lit.models.spec import ModelSpec
from rexnet_lit.utils.errors import MissingFileError, UserError, did_you_mean, plural
from rexnet_lit.utils.progress import progress as show_progress
from rexnet_lit.utils.settings import check_choice, check_range

BATCH = 32
OnError: TypeAlias = Literal["raise", "skip"]
_MIN_MAP_CELLS = 4
"""Cells per side of the coarsest feature map that `Classifier.explain` uses."""


class Prediction(NamedTuple):
    """A class name and its probability."""

    label: str
    prob: float


class Predictions(list[list[Prediction]]):
    """What `Classifier.predict` returns: for each image a list of predictions, or None if it was skipped.

    Attributes:
        errors: Why images were skipped, by their index.
    """

    def __init__(self) -> None:
        super().__init__()
        self.errors: dict[int, str] = {}


class Classifier:
    """A network and its description, ready to predict.

    Args:
        spec: The description.
        network: Maps images (B, 3, S, S) to logits (B, K).
        device: Where to compute: ``"cuda"``, ``"cuda:1"``, ``"mps"`` or ``"cpu"``; by default CUDA if there is a GPU.
    """

    def __init__(self, spec: ModelSpec, network: nn.Module, device: str | torch.device | None = None) -> None:
        self.spec = spec
        self.device = _device(device)
        self.network = network.eval().to(self.device)
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

    def logits(
        self, images: Images, on_error: OnError = "raise", batch_size: int = BATCH, progress: bool = False
    ) -> Tensor:
        """Return the logits (N, K) on the CPU; see `embed`."""
        return self._apply(self.network, images, on_error, batch_size, progress)

    def probabilities(
        self, images: Images, on_error: OnError = "raise", batch_size: int = BATCH, progress: bool = False
    ) -> NDArray[np.float32]:
        """Return the probabilities (N, K) of all classes; see `embed`."""
        return self.logits(images, on_error, batch_size, progress).softmax(1).numpy()

    def predict(
        self,
        images: Images,
        top_k: int = 5,
        on_error: OnError = "raise",
        batch_size: int = BATCH,
        progress: bool = False,
    ) -> Predictions:
        """Return the most probable classes of each image, best first.

        Args:
            images: One image or several.
            top_k: Classes per image, at most as many as the model has.
            on_error: ``"raise"`` an error for an image that cannot be read; or ``"skip"`` it: its place in the list
                has None, and the list's ``errors`` the reason.
            batch_size: Images that are computed at once.
            progress: Show a progress bar, in a log file a line every few seconds.

        Raises:
            UserError: An image cannot be read (the message has its index), or there are no images.
        """
        check_range("top_k", top_k, "[1, inf)", whole=True)
        rows = Predictions()
        for logits in self._batches(self.network, images, on_error, batch_size, progress, rows.errors):
            probs, classes = logits.softmax(1).topk(min(top_k, self.spec.num_classes))
            for row in zip(classes.tolist(), probs.tolist(), strict=True):
                best = [Prediction(self.class_names[c], p) for c, p in zip(*row, strict=True)]
                rows.append(cast(Any, None if len(rows) in rows.errors else best))
        return rows

    @property
    def limits(self) -> Limits:
        """How far the answers can be relied on, as found when the model was trained.

        Raises:
            UserError: The model file has no limits.
        """
        if self.spec.limits is None:
            raise UserError(
                "this model has no limits (prediction sets, unsure, stranger). It is a checkpoint of an epoch: use its "
                "run's model.safetensors; or it had fewer than 20 validation images, or is older: fit it again"
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
            UserError: As `predict`; or the model has no limits, or none for strangers.
        """
        limits = self.limits
        if limits.known is None:
            raise UserError("this model tells no strangers: all images trained it, and none was left to fit that on")
        return limits.strangeness(self.embed(images))

    def embed(
        self, images: Images, on_error: OnError = "raise", batch_size: int = BATCH, progress: bool = False
    ) -> NDArray[np.float32]:
        """Return the pooled features (N, C): the head's input, for search and clustering.

        The arguments are those of `predict`; the row of an image that is skipped is NaN, and a warning has the reason.
        """
        function = functools.partial(rexnet.embed, self.network)
        return self._apply(function, images, on_error, batch_size, progress).numpy()

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
        target = unicodedata.normalize("NFC", target) if isinstance(target, str) else target
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
        return self._transform.crop(inputs.pixels(image, self._transform.min_size))

    def _input(self, image: ImageLike) -> Tensor:
        """Return an image as the network's input (3, S, S)."""
        return self._transform(inputs.pixels(image, self._transform.min_size))

    def _batch(self, images: Iterable[ImageLike]) -> Tensor:
        """Return the network's input (N, 3, S, S)."""
        return self._to_device([self._input(image) for image in images])

    def _to_device(self, images: list[Tensor]) -> Tensor:
        return rexnet.match_memory_format(torch.stack(images).to(self.device), self.network)

    def _apply(
        self,
        function: Callable[[Tensor], Tensor],
        images: Images,
        on_error: OnError = "raise",
        batch_size: int = BATCH,
        progress: bool = False,
    ) -> Tensor:
        """Apply a function to batches (B, 3, S, S) of the images; return its results on the CPU."""
        errors: dict[int, str] = {}
        results = torch.cat(list(self._batches(function, images, on_error, batch_size, progress, errors)))
        if errors:
            shown = "; ".join(f"image {index}: {reason}" for index, reason in itertools.islice(errors.items(), 3))
            warnings.warn(f"{len(errors)} of {len(results)} images were skipped: {shown}", stacklevel=3)
        return results

    def _batches(
        self,
        function: Callable[[Tensor], Tensor],
        images: Images,
        on_error: OnError,
        batch_size: int,
        progress: bool,
        errors: dict[int, str],
    ) -> Iterator[Tensor]:
        """Yield a function's results for one batch of images after the other; those of skipped images are NaN.

        Args:
            function: Maps the network's input (B, 3, S, S) to (B, ...).
            images: One image or several.
            on_error: See `predict`.
            batch_size: B.
            progress: See `predict`.
            errors: Gets the index of each image that is skipped, and the reason.
        """
        check_choice("on_error", on_error, ("raise", "skip"))
        check_range("batch_size", batch_size, "[1, inf)", whole=True)
        total = len(images) if isinstance(images, Sized) else None
        rest, one = inputs.each(images)
        bar = show_progress("Classifying the images", total) if progress and not one else contextlib.nullcontext()
        size, done = self.spec.eval_recipe.image_size, 0
        with bar as show:
            while chunk := list(itertools.islice(rest, batch_size)):
                batch = []
                for index, image in enumerate(chunk, done):
                    try:
                        batch.append(self._input(image))
                    except UserError as error:
                        if on_error == "raise":
                            raise error if one else UserError(f"image {index}: {error}") from None
                        errors[index] = str(error)
                        batch.append(torch.zeros(3, size, size))
                skipped = [index - done for index in range(done, done + len(chunk)) if index in errors]
                done += len(chunk)
                with torch.inference_mode():  # not while the caller has the results
                    results = function(self._to_device(batch)).float().cpu()
                    results[skipped] = torch.nan
                yield results
                if show is not None:
                    show(done)
        if not done:
            raise UserError("there are no images to predict: the list is empty")


def _device(name: str | torch.device | None) -> torch.device:
    """Return a device; by default a GPU of NVIDIA or AMD, if there is one.

    Raises:
        UserError: There is no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"device is {name!r}; expected cpu, cuda, cuda:1 or mps") from None
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    missing = device.type == "cuda" and (device.index or 0) >= gpus
    if missing or (device.type == "mps" and not torch.backends.mps.is_available()):
        raise UserError(f"device is {str(device)!r}, but torch finds no such device on this machine; use 'cpu'")
    return device


def load(
    model: str | os.PathLike[str], device: str | torch.device | None = None, network: nn.Module | None = None
) -> Classifier:
    """Load a classifier.

    Args:
        model: A ``.ckpt`` or ``.safetensors`` file of a run; or timm's name of a ReXNet (``rexnet_100``), for its
            published ImageNet weights and class names.
        device: Where to compute: ``"cuda"``, ``"cuda:1"``, ``"mps"`` or ``"cpu"``; by default CUDA if there is a GPU.
        network: A network of your own, if the model was trained with one; its weights are replaced.

    Raises:
        UserError: The file is missing, damaged or unsafe, or the published weights are not available.
    """
    name = os.fspath(model)
    if re.fullmatch(r"rexnetr?_\w+(\.\w+)?", name) and not name.endswith((".ckpt", ".safetensors")):
        spec = ModelSpec(name, variants.published_names(name), eval_recipe=variants.eval_recipe(name))
        published = rexnet.build_network(name, spec.num_classes).requires_grad_(False)
        weights.load_pretrained(published, name, keep_head=True)
        return Classifier(spec, published, device)
    try:
        file = checkpoint.load_model(model, "model")
    except MissingFileError as error:
        raise MissingFileError(f"{error}; expected a file of a run, or a name such as 'rexnet_100'") from None
    net = weights.check_own_network(file.spec, network, name)
    if net is None:
        net = rexnet.build_network(file.spec.backbone, file.spec.num_classes, file.spec.head).requires_grad_(False)
    weights.load_trained(net, file.state, name)
    if file.spec.assumed_preprocessing:
        warnings.warn(
            f"{name} was trained with loaders of your own: it is assumed that they prepared the images as "
            f"{file.spec.eval_recipe} does",
            stacklevel=2,
        )
    return Classifier(file.spec, net, device)

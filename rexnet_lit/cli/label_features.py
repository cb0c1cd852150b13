"""`check --labels`: which network computes the features of the images, and how."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from torch import nn

from rexnet_lit.checks.symmetries import Change
from rexnet_lit.cli.config import CheckSettings
from rexnet_lit.data import decode, image_header
from rexnet_lit.data.settings import EvalRecipe
from rexnet_lit.data.transforms import EvalTransform
from rexnet_lit.models import checkpoint, predictor, rexnet, variants, weights
from rexnet_lit.models.spec import ModelSpec
from rexnet_lit.utils.errors import MissingFileError, UserError
from rexnet_lit.utils.process import cpu_count

_SMALLEST = 64  # pixels
_AHEAD = 64  # images that are decoded while the network computes

Embedder = Callable[[list[str], int, Change], NDArray[np.float32]]


def build_embedder(
    model: str | None,
    weights_file: str | None,
    config: CheckSettings | None,
    show: Callable[[str], Callable[[int, int], None]],
) -> Embedder:
    """Return what `checks.check.check` computes features with; its network is loaded now.

    A model of a run has its own image size. Otherwise it is the config's, or as near to the images' as 64 to 224 pixels
    and the network's stride of 32 allow: enlarged images take longer and are not judged better.

    Args:
        model: A model of a run.
        weights_file: A state dict, of rexnet_lit or timm.
        config: Names the backbone, and the weights if ``weights_file`` does not.
        show: Starts a progress bar with a title; returns a function of the images done and their total.

    Raises:
        UserError: A file does not fit, or the published weights are not available.
    """
    config = config or CheckSettings()
    fixed: EvalRecipe | None
    if model is not None:
        loaded = predictor.load(model)
        network, spec = loaded.network, loaded.spec
        fixed = spec.eval_recipe
    else:
        network, backbone, recipe = _starting_network(weights_file or config.weights, config.backbone)
        spec = ModelSpec(backbone, ("features",), eval_recipe=recipe)
        fixed = variants.eval_recipe(backbone, config.image_size) if config.image_size else None
    network = network if spec.network else rexnet.fuse_batchnorm(network)

    def embed(paths: list[str], side: int, change: Change) -> NDArray[np.float32]:
        size = min(max(32 * round(side / 32), _SMALLEST), spec.eval_recipe.image_size)
        recipe = fixed or variants.eval_recipe(spec.backbone, size)
        classifier = predictor.Classifier(ModelSpec(spec.backbone, spec.class_names, eval_recipe=recipe), network)
        report = show(f"computing features at {recipe.image_size} px")
        images = _read(paths, EvalTransform(recipe).min_size, report)
        return classifier.embed(np.ascontiguousarray(change(image)) for image in images)

    return embed


def _starting_network(file: str | None, backbone: str) -> tuple[nn.Module, str, EvalRecipe]:
    """Return a network with the weights of a file or the published ones, its backbone and its preprocessing."""
    state, spec = checkpoint.load_starting_weights(file, "--weights") if file is not None else (None, None)
    name, recipe = (backbone, variants.eval_recipe(backbone)) if spec is None else (spec.backbone, spec.eval_recipe)
    network = rexnet.build_network(name, 1)
    if state is not None:
        weights.load_weights(network, state, f"--weights: {file}", keep_head=False)
        return network, name, recipe
    try:
        weights.load_pretrained(network, name)
    except MissingFileError:
        raise UserError(
            f"check --labels: the published weights of {name} are neither in the local cache nor available from the "
            "hub; run once with a network, or give other weights: --model with a model of a run, or --weights with a "
            "local .safetensors file"
        ) from None
    return network, name, recipe


def _read(paths: Sequence[str], min_size: int, report: Callable[[int, int], None]) -> Iterator[NDArray[np.uint8]]:
    """Yield the decoded images in order, read ahead in threads."""

    def read(path: str) -> NDArray[np.uint8]:
        try:
            return decode.read(path, min_size)
        except image_header.DecodeError as error:
            raise UserError(f"{path}: can no longer be read ({error}); restore or remove the file") from None

    pool = ThreadPoolExecutor(cpu_count())
    try:
        rest = iter(paths)
        waiting = [pool.submit(read, path) for path in itertools.islice(rest, _AHEAD)]
        for done in range(1, len(paths) + 1):
            image = waiting.pop(0).result()
            waiting += [pool.submit(read, path) for path in itertools.islice(rest, 1)]
            report(done, len(paths))
            yield image
    finally:
        pool.shutdown(cancel_futures=True)

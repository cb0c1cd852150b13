"""Writes a model in another format, and compares the file with the model on images before it is kept.

A graph takes float32 RGB images (B, 3, S, S) from 0 to 1, the centre square that `predictor.Classifier.view` returns,
and returns probabilities (B, K): normalisation and softmax are inside. Class names, the preprocessing and the limits of
the answers are in its metadata.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rexnet_lit.data import decode
from rexnet_lit.data.folder import list_images
from rexnet_lit.data.settings import EvalRecipe
from rexnet_lit.export.formats import FORMATS
from rexnet_lit.models import checkpoint
from rexnet_lit.models.limits import COVERAGE
from rexnet_lit.models.predictor import Classifier, load
from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.files import check_output, check_writable, is_url

Check: TypeAlias = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Maps images (B, 3, S, S) to probabilities (B, K), computed by the written file."""

Writer: TypeAlias = Callable[[Classifier, Path, Tensor, Path], Check]
"""Takes a classifier, its own file, example images (N, 3, S, S) from 0 to 1 and the path to write to."""

_KEY = "rexnet_lit"
"""Names the model's description in a graph's metadata; by it an earlier export is recognised."""

BATCH = {"images": {0: torch.export.Dim("batch")}}
"""The dynamic shapes of a graph: any number of images."""

TOLERANCE = 1e-4
"""Largest difference in a probability between a float32 file and the model."""

LEAST_AGREEMENT = 0.9
"""Smallest share of images for which a quantised file must predict the model's class."""

MAX_IMAGES, MIN_IMAGES = 256, 20
"""Images for quantisation: one half sets the ranges, the other compares the file with the model."""


class Parity(NamedTuple):
    """How well a written file agrees with the model."""

    difference: float  # the largest in a probability
    same: float  # share of the images for which both predict the same class
    images: int  # how many were compared
    size: int = 0  # of what was written, in bytes


def export(model: str, kind: str, output: str, images: str | None = None) -> Parity:
    """Write ``model`` in another format.

    Args:
        model: A ``.ckpt`` or ``.safetensors`` file of a run.
        kind: A key of `FORMATS`.
        output: The file, or for ``hub`` the new folder. It is only written if it agrees with the model.
        images: A folder of images for quantised formats, like those that the model is for; its run's dataset by
            default.

    Raises:
        UserError: The model cannot be read, a package or images are missing, or the file disagrees with the model.
    """
    quantised = FORMATS[kind].needs_images
    file = _check_output(Path(output), Path(model), kind)
    if images is not None and not quantised:
        raise UserError(f"--images is for {' and '.join(n for n, f in FORMATS.items() if f.needs_images)}, not {kind}")
    classifier = load(model, device="cpu")
    views = _sample_views(classifier, model, images) if quantised else _photo_views(classifier)
    example, unseen = np.array_split(views, 2) if quantised else (views[:2], views)
    expected = Deployed(classifier).check(unseen)
    module, _, function = FORMATS[kind].writer.partition(":")
    write: Writer = getattr(importlib.import_module(f"rexnet_lit.export.{module}"), function)
    near = next(folder for folder in file.absolute().parents if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=".export-", dir=near) as temporary, _quiet():
        written = Path(temporary) / "model"
        check = write(classifier, Path(model), torch.from_numpy(example), written)
        # One image and many: the file must take a batch of any size.
        got = np.concatenate([check(unseen[:1]), check(unseen)[1:]])
        same = float((got.argmax(1) == expected.argmax(1)).mean())
        parity = Parity(float(np.abs(got - expected).max()), same, len(unseen))
        agrees = same >= LEAST_AGREEMENT if quantised else parity.difference <= TOLERANCE
        if not agrees:
            limit = f"the same class for {LEAST_AGREEMENT:.0%} of images" if quantised else f"at most {TOLERANCE:g}"
            raise UserError(
                f"export: the {kind} file is not kept: its probabilities differ from the model's by up to "
                f"{parity.difference:.2g}, its class is the same for {same:.0%} of images; expected {limit}"
            )
        return parity._replace(size=_keep(written, file, FORMATS[kind].companion))


def _keep(written: Path, output: Path, companion: str) -> int:
    """Move what was written to its place; return its size in bytes."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if companion:
        written.with_suffix(companion).replace(output.with_suffix(companion))
    written.replace(Path(os.path.realpath(output)))
    pair = (output, output.with_suffix(companion)) if companion else (output, *output.glob("*"))
    return sum(file.stat().st_size for file in pair if file.is_file())


def _check_output(output: Path, model: Path, kind: str) -> Path:
    """Return what to write; raise before any work is done if it cannot be written, or would replace something else."""
    suffixes, companion = FORMATS[kind].suffixes, FORMATS[kind].companion
    if companion and (output.is_dir() or not output.suffix):
        output /= f"model{suffixes[0]}"
    check_writable("--output", output)
    if output.exists() and model.exists() and output.samefile(model):
        raise UserError(f"--output: {str(output)!r} is the model itself; name another file")
    empty = not suffixes and output.is_dir() and not any(output.iterdir())
    if output.exists() and not FORMATS[kind].overwrites and not empty:
        raise UserError(f"--output: {str(output)!r} exists already; name a new {'file' if suffixes else 'folder'}")
    if suffixes:
        check_output("--output", output, *suffixes, mark=_KEY.encode(), within=-1)
    if suffixes and output.suffix.lower() not in suffixes:  # torch and `load` go by it
        raise UserError(f"--output: {str(output)!r} must end in {' or '.join(suffixes)} for {kind}")
    if companion and not output.exists() and output.with_suffix(companion).exists():
        raise UserError(f"--output: {str(output.with_suffix(companion))!r} exists already; name another file")
    return output


class Deployed(nn.Module):
    """A network that maps images from 0 to 1 to probabilities."""

    def __init__(self, classifier: Classifier, network: nn.Module | None = None) -> None:
        super().__init__()
        recipe = classifier.spec.eval_recipe
        self.network = (network or classifier.network).cpu().to(memory_format=torch.contiguous_format)
        self.mean = nn.Buffer(torch.tensor(recipe.mean).view(1, 3, 1, 1))
        self.std = nn.Buffer(torch.tensor(recipe.std).view(1, 3, 1, 1))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, S, S) to (B, K)."""
        return cast(Tensor, self.network((images - self.mean) / self.std)).softmax(1)

    @torch.no_grad()
    def check(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map arrays, as a `Check`."""
        return cast("NDArray[np.float32]", self(torch.from_numpy(images)).numpy())


def metadata(classifier: Classifier) -> dict[str, str]:
    """Return what a graph carries about itself."""
    spec, limits = classifier.spec, classifier.spec.limits
    squares = {"center": "centre square", "border": "padded to a square", "squash": "squashed to a square"}
    square = squares[spec.eval_recipe.crop_mode]
    thresholds = {}
    if limits is not None:
        thresholds = {
            "sure_above": limits.confidence,
            "target_precision": limits.precision,
            "in_set_from": {f"{share:g}": limits.least_probability(share) for share in (0.8, COVERAGE, 0.95, 0.99)},
        }
    described = json.loads(spec.to_json())
    for key in ("mean", "std"):  # whoever finds them here normalises a second time
        del described["eval_recipe"][key]
    return {
        _KEY: json.dumps(described),
        **({"limits": json.dumps(thresholds)} if thresholds else {}),
        "class_names": json.dumps(classifier.class_names),
        "preprocessing": json.dumps(_preprocessing(classifier.spec.eval_recipe)),
        "input": f"float32 RGB (B, 3, S, S) from 0 to 1, {square}, not normalised: that is inside the graph; "
        "output: probabilities (B, K)",
    }


def _preprocessing(recipe: EvalRecipe) -> dict[str, Any]:
    """Return all that turns an image file into a graph's input, in order: what `decode` and `EvalTransform` do."""
    sides, floor = {"center": "shorter", "border": "longer", "squash": "both"}, recipe.crop_mode == "center"
    return {
        "jpeg": "decoded at the smallest of 1/8, 1/4 and 1/2 of its size that leaves its shorter side (rounded up) at "
        "least 'resize' pixels, otherwise in full",
        "orientation": "turned as EXIF says",
        "background": list(decode.BACKGROUND),  # below transparent images
        "channels": "RGB",
        "crop_mode": recipe.crop_mode,
        "resize": recipe.resize_size,
        "resize_side": sides[recipe.crop_mode],
        "resize_rounding": "floor" if floor else "nearest, halves to even; at least 1",  # of the other side
        "filter": recipe.interpolation,
        "antialias": recipe.interpolation != "nearest",
        "resampling": "in bytes, first the rows, then the columns, with 16-bit weights, as torch's interpolate; "
        "with crop_mode center, a side that becomes longer than 3 * resize: as Pillow's resize, the crop as its box",
        "crop": recipe.image_size,
        "crop_offset": "(side - crop) / 2, halves to even; 0 for a shorter side",
        "padding": list(recipe.padding) if recipe.crop_mode == "border" else None,
        "padding_offset": "(crop - side) / 2, rounded down",
        "divide_by": 255,
        "normalisation": "inside the graph: give it values from 0 to 1",
        "layout": "float32 (B, 3, crop, crop)",
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporters' progress messages and deprecation warnings."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _photo_views(classifier: Classifier) -> NDArray[np.float32]:
    """Return four views (4, 3, S, S) of the two photographs that scikit-learn ships."""
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    return _stack([classifier.view(np.ascontiguousarray(photo[::s, ::s])) for photo in photos for s in (1, -1)])


def _sample_views(classifier: Classifier, model: str, images: str | None) -> NDArray[np.float32]:
    """Return views (N, 3, S, S) of images drawn from a folder, the same ones each time."""
    folder = checkpoint.load_model(model).data.root if images is None else images
    if folder is None or not (is_url(folder) or Path(folder).exists()):
        missing = "the model's dataset is unknown" if folder is None else f"there is no folder {folder!r}"
        raise UserError(f"--images: {missing}; quantisation needs a folder of images like those that the model is for")
    root, paths, _ = list_images(folder)
    views: list[NDArray[np.uint8]] = []
    for i in np.random.default_rng(0).permutation(len(paths)):
        with contextlib.suppress(UserError):  # unreadable images are skipped
            views.append(classifier.view(root / os.fsdecode(paths[int(i)])))
        if len(views) == MAX_IMAGES:
            break
    if len(views) < MIN_IMAGES:
        raise UserError(f"--images: quantisation needs at least {MIN_IMAGES} images, {folder} has {len(views)}")
    return _stack(views)


def _stack(views: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """Return views (S, S, 3) as float32 (N, 3, S, S) from 0 to 1.

    In that order in memory: of images in channels_last, torch.export makes a graph that gathers the features by their
    strides, which OpenVINO gets wrong once they are quantised.
    """
    return np.ascontiguousarray(np.stack(views).transpose(0, 3, 1, 2) / np.float32(255), np.float32)

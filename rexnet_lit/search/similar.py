"""The images of a folder by their features, and the nearest ones of a query.

The features are kept in the user's cache folder, in one file for each folder and model. Of a folder that has changed,
only new images are computed. The query is compared with every image, without approximation. For much more than a
million images use `Classifier.embed` and a vector database.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rexnet_lit.data import decode, image_file
from rexnet_lit.data.folder import list_images
from rexnet_lit.models import checkpoint
from rexnet_lit.models.predictor import Classifier
from rexnet_lit.utils.errors import UserError
from rexnet_lit.utils.files import atomic_write, is_url
from rexnet_lit.utils.process import cache_dir
from rexnet_lit.utils.progress import progress

_CHUNK = 512  # images that are computed, and rows that are compared, at once
_SAVE_SECONDS = 600
_SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
    """The images of a folder and their features.

    Args:
        root: The folder, absolute.
        paths: Of the images, below it.
        features: (N, C) float16, of length 1; NaN for an image that cannot be read.
        notes: One line each, for the user.
    """

    root: Path
    paths: tuple[str, ...]
    features: NDArray[np.float16]
    notes: tuple[str, ...] = ()

    @property
    def unreadable(self) -> list[str]:
        """The images that cannot be read."""
        return [self.paths[i] for i in np.flatnonzero(np.isnan(self.features[:, 0]))]

    def nearest(self, feature: NDArray[np.float32], top: int, query: str | None = None) -> list[Similar]:
        """Return the nearest images, the most similar first.

        Args:
            feature: (C,) of the query.
            top: How many.
            query: The query's path: it is not similar to itself, if the folder holds it.
        """
        unit = feature / max(float(np.linalg.norm(feature)), 1e-12)
        rows = range(0, len(self.paths), 64 * _CHUNK)
        similarity = np.concatenate([self.features[i : i + 64 * _CHUNK].astype(np.float32) @ unit for i in rows])
        similarity[np.isnan(similarity)] = -np.inf
        found: list[Similar] = []
        for i in np.argsort(-similarity, kind="stable"):
            path = self.paths[i]
            if len(found) == top or np.isneginf(similarity[i]):
                break
            if query is None or os.path.realpath(self.root / path) != os.path.realpath(query):
                found.append(Similar(path, class_of(path), min(1.0, float(similarity[i]))))
        return found


@dataclasses.dataclass(frozen=True)
class Similar:
    """An image and its cosine similarity to the query, at most 1.

    Args:
        path: Below the index's folder.
        label: Its class folder; empty if it is in none.
        similarity: Of the features.
    """

    path: str
    label: str
    similarity: float


def class_of(path: str) -> str:
    """Return the class folder of a path below a dataset's folder: its first folder that is not a split."""
    folders = Path(path).parts[:-1]
    return next((name for depth, name in enumerate(folders) if depth or name not in _SPLITS), "")


def build_index(folder: str | os.PathLike[str], classifier: Classifier) -> Index:
    """Return the index of a folder: what is in the cache, brought up to date.

    Raises:
        UserError: It is no folder, or holds no images.
    """
    if not (is_url(folder) or Path(folder).is_dir()):
        raise UserError(f"--index: there is no folder {os.fspath(folder)!r}")
    root, listed, notes = list_images(folder)
    paths = list(listed)
    keys = [_key(root, path) for path in paths]
    model = checkpoint.digest(classifier.network.state_dict(), classifier.spec.to_json())
    name = hashlib.blake2b(os.fsencode(os.path.realpath(root)) + f"\0{model}\0{decode.RULES}".encode(), digest_size=16)
    file = cache_dir() / "similar" / f"{name.hexdigest()}.npz"
    known = _load(file)
    new = [i for i, key in enumerate(keys) if key not in known]
    if new or len(known) > len(keys):
        with _kept(file, known, set(keys)) as save, progress("Computing features", len(new)) as show:
            saved = time.monotonic()
            for start in range(0, len(new), _CHUNK):
                chunk = new[start : start + _CHUNK]
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # `Index.unreadable` has what is skipped
                    rows = classifier.embed([root / paths[i] for i in chunk], on_error="skip")
                rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
                known.update(zip([keys[i] for i in chunk], rows.astype(np.float16), strict=True))
                show(start + len(chunk))
                if time.monotonic() - saved > _SAVE_SECONDS:
                    save()
                    saved = time.monotonic()
    return Index(root, tuple(paths), np.stack([known[key] for key in keys]), tuple(notes))


def _key(root: Path, path: str) -> bytes:
    """Return 16 bytes that change with a file: of its path, size and modification time."""
    try:
        status = image_file.status(root / path)
    except OSError:
        return hashlib.blake2b(os.fsencode(path), digest_size=16).digest()
    state = f"\0{status.st_size} {status.st_mtime_ns}".encode()
    return hashlib.blake2b(os.fsencode(path) + state, digest_size=16).digest()


@contextlib.contextmanager
def _kept(file: Path, known: dict[bytes, NDArray[np.float16]], keys: set[bytes]) -> Iterator[Callable[[], None]]:
    """Save the features of these keys when the block ends, also by Ctrl-C; yields what saves them now."""

    def save() -> None:
        rows = {key: row for key, row in known.items() if key in keys}
        if not rows:
            return
        try:
            with atomic_write(file) as stream:
                np.savez(stream, keys=np.frombuffer(b"".join(rows), np.uint8), features=np.stack([*rows.values()]))
        except OSError as error:
            warnings.warn(f"the index cannot be kept in {file.parent}: {error.strerror or error}", stacklevel=2)

    try:
        yield save
    finally:
        save()


def _load(file: Path) -> dict[bytes, NDArray[np.float16]]:
    """Return the features by key; a damaged file counts as missing."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            raw, features = arrays["keys"].astype(np.uint8).tobytes(), arrays["features"].astype(np.float16)
        return dict(zip([raw[at : at + 16] for at in range(0, len(raw), 16)], features, strict=True))
    except Exception:  # a damaged or foreign file raises anything
        return {}

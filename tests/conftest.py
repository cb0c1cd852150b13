"""What all tests share: folders and caches of their own, no network of the hub's, small datasets to learn from."""

from __future__ import annotations

import os
import socket
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # before anything imports albumentations
# Tiny tensors gain nothing from two threads, which wait for each other on a busy machine; before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import pytest

SHAPES = ("circle", "cross", "square", "stripes")
"""Classes that a small network tells apart by colour in a few steps, and by shape in a few more."""

_COLOURS = ((220, 40, 40), (40, 180, 60), (50, 80, 230), (230, 200, 40), (200, 60, 200), (60, 200, 200))


def pytest_configure(config: pytest.Config) -> None:
    """Excuse the warnings of Lightning 2.6 that small runs meet; everything else is an error (pyproject.toml)."""
    for excused in (
        # connectors/data_connector.py: it would like more loader workers than a test should have.
        "ignore:The '.*_dataloader' does not have many workers",
        # loops/fit_loop.py: an epoch of a test is shorter than 50 steps.
        "ignore:The number of training batches .* is smaller than the logging interval",
        # trainer/setup.py: most tests are of the CPU, where there is a GPU too.
        "ignore:GPU available but not used",
        # utilities/_pytree.py still asks torch the old way.
        "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    ):
        config.addinivalue_line("filterwarnings", excused)


@pytest.fixture(scope="session")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three real PNGs of 231 to 623 megapixels, where the data that the project is developed with is at hand."""
    archive = Path(__file__).parents[2] / "shared" / "data" / "openclipart_huge.tar"
    if not archive.is_file():
        pytest.skip(f"{archive} is not here")
    folder = tmp_path_factory.mktemp("bombs")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / "openclipart_huge"


@pytest.fixture(autouse=True)
def _own_surroundings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test empty caches, no seed of an earlier run, and a hub that is asked as for a user."""
    caches = tmp_path_factory.mktemp("caches")
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches / "xdg"))
    monkeypatch.setenv("HF_HOME", str(caches / "hf"))
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    hub = sys.modules.get("huggingface_hub.constants")
    if hub is not None:  # it reads the environment once, when it is imported
        monkeypatch.setattr(hub, "HF_HUB_CACHE", str(caches / "hf" / "hub"))
        monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)


def draw_shape(kind: int, rng: np.random.Generator, size: int = 40) -> np.ndarray:
    """Draw a class's shape, uint8 (size, size, 3) RGB: its place, size and shade vary, and so does the grey behind."""
    image = np.full((size, size, 3), rng.integers(20, 90), np.uint8)
    shade = rng.integers(-25, 26)
    colour = tuple(int(np.clip(c + shade, 0, 255)) for c in _COLOURS[kind % len(_COLOURS)])
    x, y = (int(v) for v in rng.integers(size // 3, size - size // 3, 2))
    r = int(rng.integers(size // 5, size // 3))
    if kind % 4 == 0:
        cv2.circle(image, (x, y), r, colour, -1)
    elif kind % 4 == 1:
        cv2.line(image, (x - r, y), (x + r, y), colour, 5)
        cv2.line(image, (x, y - r), (x, y + r), colour, 5)
    elif kind % 4 == 2:
        cv2.rectangle(image, (x - r, y - r), (x + r, y + r), colour, -1)
    else:
        for offset in range(-r, r + 1, 6):
            cv2.line(image, (x - r, y + offset), (x + r, y + offset), colour, 2)
    return np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)


def _write_shapes(
    root: Path,
    train: int = 8,
    val: int = 4,
    test: int = 4,
    classes: Sequence[str] = SHAPES[:3],
    size: int = 40,
    flat: bool = False,
) -> Path:
    """Write ``root/{train,val,test}/CLASS/*.{png,jpg}`` with so many images a class; ``flat``: ``root/CLASS/*``."""
    for kind, name in enumerate(classes):
        for number, (split, count) in enumerate((("train", train), ("val", val), ("test", test))):
            folder = root / name if flat else root / split / name
            for i in range(count):
                folder.mkdir(parents=True, exist_ok=True)
                image = draw_shape(kind, np.random.default_rng((kind, number, i)), size)
                path = folder / f"{split}_{i:03d}{'.png' if i % 2 else '.jpg'}"
                encoded = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1]
                path.write_bytes(encoded.tobytes())
    return root


@pytest.fixture(scope="session")
def make_shapes() -> Callable[..., Path]:
    """A dataset of coloured shapes: ``make_shapes(root, train=8, val=4, test=4, classes=(...))`` returns ``root``."""
    return _write_shapes


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, 8 + 4 + 4 images each, for tests that only read."""
    return _write_shapes(tmp_path_factory.mktemp("shapes"))


@pytest.fixture
def quick_runs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks, and no pictures: for tests that are about neither."""
    from module_tools import make_runs_quick

    if "whole_network" not in request.fixturenames:
        make_runs_quick(monkeypatch)


@pytest.fixture
def whole_network() -> None:
    """Keep the network as it is, for a test in a module of `quick_runs`."""


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Refuse every connection of this process and list who asked for one."""
    asked: list[str] = []

    def refuse(*args: object, **kwargs: object) -> None:
        asked.append(str(args))
        raise socket.gaierror("the tests have no network")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return asked

"""Shared by the tests of the command line, the predictor and the exports: drawn images, a model, runs."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rexnet_lit.cli import main
from rexnet_lit.data.settings import EvalRecipe
from rexnet_lit.models import checkpoint, rexnet
from rexnet_lit.models.spec import ModelSpec

NAMES = ("bars", "disc", "ring")
TRUE_COLOURS = {"bars": (200, 60, 40), "disc": (40, 160, 60), "ring": (50, 70, 200)}


def picture(name, seed, size=48):
    """An image of class ``name``, uint8 (size, size, 3): a coloured shape on noise."""
    random = np.random.default_rng((NAMES.index(name), seed))
    image = random.integers(190, 256, (size, size, 3))
    y, x = np.mgrid[:size, :size] - size / 2 - random.uniform(-3, 3, (2, 1, 1))
    radius = np.hypot(x, y) / size
    shape = {"bars": np.sin(x / 2) > 0, "disc": radius < 0.3, "ring": (radius > 0.25) & (radius < 0.4)}[name]
    image[shape] = np.clip(np.array(TRUE_COLOURS[name]) + random.integers(-20, 20, 3), 0, 255)
    return image.astype(np.uint8)


def write_pictures(folder, name, count, start=0):
    """Write ``count`` images of a class into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(start, start + count):
        Image.fromarray(picture(name, seed)).save(folder / f"{name} {seed:03d}.png")


def write_dataset(root, names=NAMES, **counts):
    """Write ``root/{split}/{class}/*.png`` with the given number per class, ``train=8``; return ``root``."""
    for number, (split, count) in enumerate(counts.items()):
        for name in names:
            write_pictures(root / split / name, name, count, 1000 * number)
    return root


def lively_model(path, names=NAMES, size=64, backbone="rexnet_100", crop_mode="center"):
    """Write a model whose predictions differ from image to image, as after training; return its path.

    An untrained network predicts 1/K for every image, which would hide a wrong preprocessing.
    """
    torch.manual_seed(0)
    net = rexnet.build_network(backbone, len(names)).to(memory_format=torch.channels_last)
    views = torch.from_numpy(np.stack([picture(n, s, size) for n in NAMES for s in range(4)]))
    views = ((views / 255 - 0.45) / 0.225).permute(0, 3, 1, 2)
    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0  # the running statistics are those of the one batch below
        net.train()
        net(views)
        net.eval()
        net.head.fc.weight /= net(views).std()
        net.head.fc.bias -= net(views).mean(0)
    spec = ModelSpec(backbone, tuple(names), eval_recipe=EvalRecipe(size).with_crop_mode(crop_mode))
    checkpoint.save_model(path, spec, net.state_dict())
    return Path(path)


def rows_of(path):
    """The rows of a CSV file."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def fails(capsys, *argv):
    """Run a command with an error of the user; return its one line."""
    code = main.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert code == 2, (code, out, err)
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("rexnet-lit: error: ")
    assert "Traceback" not in out + err
    return lines[0].removeprefix("rexnet-lit: error: ")


def run_rexnet(*argv, cwd, timeout=300):
    """Run ``python -m rexnet_lit`` in a process of its own; return what it printed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "REXNET_LIT", "MASTER_"))}
    environment |= {"XDG_CACHE_HOME": str(Path(cwd) / "cache"), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", "rexnet_lit", *map(str, argv)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, (argv, done.stdout, done.stderr)
    return done.stdout, done.stderr

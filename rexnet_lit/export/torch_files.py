"""Files for PyTorch: ``torch.export`` programs, which run without this package, and ``.safetensors`` weights."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from rexnet_lit.export.export import BATCH, Check, Deployed, metadata
from rexnet_lit.models import checkpoint
from rexnet_lit.models.predictor import Classifier, load


def write_program(classifier: Classifier, model: Path, example: Tensor, target: Path) -> Check:
    """Write a ``torch.export`` program, as a `export.Writer`."""
    program = torch.export.export(Deployed(classifier), (example,), dynamic_shapes=BATCH)
    for node in program.graph.nodes:  # source locations, with paths of this machine
        node.meta.pop("stack_trace", None)
    archive = io.BytesIO()  # if torch writes to a full disk itself, it aborts the process
    torch.export.save(program, archive, extra_files=metadata(classifier))
    target.write_bytes(archive.getvalue())
    restored = torch.export.load(io.BytesIO(target.read_bytes())).module()
    return lambda images: restored(torch.from_numpy(images)).detach().numpy()


def write_safetensors(classifier: Classifier, model: Path, example: Tensor, target: Path) -> Check:
    """Write a ``.safetensors`` file like that of a run, as a `export.Writer`."""
    named = target.with_suffix(".safetensors")  # `load` goes by the suffix
    checkpoint.save_model(named, classifier.spec, classifier.network.state_dict())
    check = Deployed(load(named, device="cpu")).check
    named.replace(target)
    return check

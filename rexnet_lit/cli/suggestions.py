"""Which setting, option or command a user may have meant by a name that does not exist.

The error names it, and nothing is guessed: an abbreviation, or a name from another program, is an unknown name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from rexnet_lit.utils.errors import question

# What other programs call it, by the last part of a name; a key may come with the value to give it.
_SYNONYMS = {
    "amp": ("trainer.precision bf16-mixed", "trainer.precision 16-mixed"),
    "arch": ("model.backbone",),
    "bs": ("data.batch_size",),
    "checkpoint": ("ckpt_path",),
    "cpu": ("trainer.accelerator cpu",),
    "csv": ("data.labels", "data.split_file"),
    "cuda": ("trainer.accelerator gpu",),
    "data": ("data.root",),
    "dataset": ("data.root",),
    "device": ("trainer.accelerator",),
    "dir": ("data.root",),
    "epochs": ("trainer.max_epochs",),
    "eval": ("validate", "test"),
    "evaluate": ("validate", "test"),
    "folder": ("data.root",),
    "gpu": ("trainer.accelerator gpu",),
    "gpus": ("trainer.devices",),
    "help": ("help_all",),
    "img": ("data.image_size",),
    "img_size": ("data.image_size",),
    "model": ("model.backbone", "ckpt_path"),
    "output": ("data.predict_output", "trainer.default_root_dir"),
    "resume": ("ckpt_path last", "ckpt_path"),
    "seed": ("seed_everything",),
    "train": ("fit",),
    "wd": ("model.optimizer.weight_decay",),
    "weights": ("ckpt_path",),
    "workers": ("data.num_workers",),
}


def which(name: str, known: Iterable[str]) -> str:
    """Return ``'; did you mean "x"?'`` for the known names that ``name`` may stand for, or an empty string."""
    known = list(dict.fromkeys(known))
    name = name.lower().replace("-", "_")
    last = _last(name)
    likeness = difflib.SequenceMatcher(b=name)

    def similarity(other: str) -> float:
        likeness.set_seq1(other)
        return likeness.ratio()

    def nearest(names: Iterable[str]) -> list[str]:
        names = list(names)
        of_its_group = [other for other in names if "." in name and other.rpartition(".")[0] == name.rpartition(".")[0]]
        return sorted(of_its_group or names, key=similarity, reverse=True)

    found = (
        [other for other in known if other == name]
        or nearest(other for other in known if _last(other) == last and other != last)
        or [other for other in _SYNONYMS.get(last, ()) if other.partition(" ")[0] in known]
        or nearest(other for other in known if _last(other).startswith(last))
        or difflib.get_close_matches(name, known, cutoff=0.5)
        or [other for other in known if difflib.get_close_matches(last, [_last(other)], cutoff=0.7)]
    )
    return question(found[:3])


def _last(name: str) -> str:
    return name.rpartition(".")[2]

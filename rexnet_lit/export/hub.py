"""A folder that timm loads by its path, and by its name once it is on a hub: weights, configuration and model card.

``config.json`` is what timm's ``push_to_hf_hub`` writes, which has no public way to leave out the upload; here nothing
leaves the machine. The card's header is huggingface_hub's, which timm brings along.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import timm
from torch import nn

from rexnet_lit.models import checkpoint
from rexnet_lit.models.predictor import Classifier
from rexnet_lit.models.spec import ModelSpec
from rexnet_lit.report.tables import percent, wilson_interval
from rexnet_lit.utils.errors import UserError, printable

_SHOWN_CLASSES = 100
"""Rows of the card's table: more are a file, not a table."""


def read_figures(model: Path, weights: str) -> dict[str, Any]:
    """Return the content of the run's ``report/metrics.json``, where it is about these weights; else nothing.

    Args:
        model: The model's file in the run folder or its ``checkpoints/``.
        weights: Its `checkpoint.digest`.
    """
    folder = model.absolute().parent
    folder = folder.parent if folder.name == "checkpoints" else folder
    try:
        if (folder / "report" / "weights.sha256").read_text(encoding="ascii").strip() != weights:
            return {}
        return dict(json.loads((folder / "report" / "metrics.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def write_folder(classifier: Classifier, figures: dict[str, Any], folder: Path) -> None:
    """Write ``model.safetensors``, ``config.json`` and ``README.md`` into a new folder.

    Args:
        classifier: The model.
        figures: What its test measured (`read_figures`); nothing where it was not tested.
        folder: The folder, which is made.

    Raises:
        UserError: timm has no such network.
    """
    spec = classifier.spec
    if spec.head.name != "linear":
        raise UserError(
            f"export: timm's ReXNets have a linear head, and this model's is {spec.head.name}; "
            "take another --format, such as onnx"
        )
    recipe, size = spec.eval_recipe, spec.eval_recipe.image_size
    config = {
        "architecture": spec.backbone.partition(".")[0],
        "num_classes": spec.num_classes,
        "num_features": cast(Any, classifier.network).num_features,
        "global_pool": spec.head.pool,
        "label_names": spec.class_names,
        "model_args": {"global_pool": spec.head.pool},
        "pretrained_cfg": {
            "num_classes": spec.num_classes,
            "input_size": (3, size, size),
            "fixed_input_size": False,
            "interpolation": recipe.interpolation,
            "crop_pct": recipe.crop_pct,
            "crop_mode": "center",
            "mean": recipe.mean,
            "std": recipe.std,
            "first_conv": "stem.conv",
            "classifier": "head.fc",
        },
    }
    folder.mkdir()
    checkpoint.save_model(folder / "model.safetensors", spec, classifier.network.state_dict())
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(spec, figures), encoding="utf-8")


def load_folder(folder: Path) -> nn.Module:
    """Return the network that timm makes of a folder, for inference."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def _card(spec: ModelSpec, figures: dict[str, Any]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    name = f"{spec.backbone}, {spec.num_classes} classes"
    named = {"top1": ("accuracy", "Top-1"), "macro_f1": ("f1", "Macro F1")}
    results = [
        EvalResult("image-classification", "imagefolder", "the test split", kind, figures[key], metric_name=title)
        for key, (kind, title) in named.items()
        if key in figures
    ]
    header = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "rexnet"],
        model_name=name,
        eval_results=results or None,
    )
    size = spec.eval_recipe.image_size
    return f"""---
{header.to_yaml()}
---

# {name}

A ReXNet image classifier (`{spec.backbone}`), fine-tuned with rexnet_lit. It answers with one of its classes for every
picture, also for one that shows none of them. Pictures are scaled so that the shorter side has
{spec.eval_recipe.resize_size} pixels, and the centre square of {size} is looked at; transparent ones were put on white.

## Use

```python
import timm
from PIL import Image

model = timm.create_model("local-dir:PATH/TO/THIS/FOLDER", pretrained=True).eval()  # on a hub: hf-hub:OWNER/NAME
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
probabilities = model(transform(Image.open("a.jpg").convert("RGB"))[None]).softmax(1)[0]
print(model.pretrained_cfg["label_names"][probabilities.argmax()])
```

`model.safetensors` is also what `rexnet_lit.load` reads, with the names and the preprocessing inside.

## Test figures

{_figures(figures)}
## Classes

{_classes(spec, figures)}
"""


def _figures(figures: dict[str, Any]) -> str:
    if not figures:
        return "Not measured: these weights were not tested before they were exported.\n"
    count = figures["count"]
    low, high = (percent(end) for end in wilson_interval(round(figures["top1"] * count), count))
    rows = {"Top-1 accuracy": f"{percent(figures['top1'])} ({low} to {high}, a 95 % interval)"}
    if "top5" in figures:
        rows["Top-5 accuracy"] = percent(figures["top5"])
    rows |= {
        "Macro F1": percent(figures["macro_f1"]),
        "Calibration error (ECE)": percent(figures["ece"]),
        "Negative log-likelihood": f"{figures['nll']:.3f} nats",
    }
    lines = [f"{count} pictures of the test split.", "", "| | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items()), ""])


def _classes(spec: ModelSpec, figures: dict[str, Any]) -> str:
    """Return the classes, with what was measured of each; their names are other people's text."""
    if spec.num_classes > _SHOWN_CLASSES:
        return f"{spec.num_classes}: `label_names` in `config.json`, in the order of the logits."
    if not figures:
        return "\n".join(f"- {_cell(name)}" for name in spec.class_names)
    lines = ["| Class | Precision | Recall | F1 | Test pictures |", "|---|---|---|---|---|"]
    for name, row in figures["per_class"].items():
        columns = ("precision", "recall", "f1")  # of a class without pictures nothing is known
        shares = " | ".join(percent(row[column]) if row["support"] else "-" for column in columns)
        lines.append(f"| {_cell(name)} | {shares} | {row['support']} |")
    return "\n".join(lines)


def _cell(name: str) -> str:
    """Return a name as code, which neither Markdown nor HTML reads."""
    return f"`{printable(name).replace('`', chr(39)).replace('|', '/')}`"
